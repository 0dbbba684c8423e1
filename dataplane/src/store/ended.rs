//! A disk that ended by itself says so to the next opening, see decision 0006.

use super::codec::{Superblock, get_u128, put};
use super::{Effect, Kind, Store, token};
use crate::disk::{BlockIo, Io, IoError};
use crate::ids::{BLOCK, PowerId};
use crate::planted::{self, Bug};

/// That a disk ended by itself: in this span of power nobody is to believe that it kept what it had completed before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// The opening that ended.
    pub boot: u128,
    /// The machine's span of power at that time.
    pub power: u128,
}

impl Superblock {
    /// As a block that also says how the disk ended.
    pub fn encode_ended(&self, ended: &Ended) -> [u8; BLOCK] {
        let mut b = self.encode();
        put(&mut b, 64, &ended.boot.to_le_bytes());
        put(&mut b, 80, &ended.power.to_le_bytes());
        let hash = blake3::hash(&b[..BLOCK - 32]);
        put(&mut b, BLOCK - 32, hash.as_bytes());
        b
    }

    /// What an intact block says of how the disk ended; `None`: nothing.
    pub fn decode_ended(b: &[u8]) -> Option<Ended> {
        let (boot, power) = (get_u128(b, 64), get_u128(b, 80));
        (boot != 0).then_some(Ended { boot, power })
    }
}

impl Store {
    /// Writes to where the next opening reads it that the disk ended by itself: this process may die before anybody else
    /// knows. Not flushed, since it has to outlive the process and not the power: with that goes the span of power in which
    /// anybody believes that the disk kept everything. Only the first superblock: a loss of power may tear it, and then
    /// the copy must be whole.
    pub(super) fn mark_ended(&mut self, out: &mut Vec<Effect>) {
        if self.marking {
            return;
        }
        let ended = Ended {
            boot: self.boot.0,
            power: self.host_power.0,
        };
        let block = self.layout.superblock.encode_ended(&ended);
        self.arena.bytes_mut(self.mark_page, 1).copy_from_slice(&block);
        self.marking = true;
        out.push(Effect::Io {
            token: token(Kind::Ended, 0, 0, 0, 0),
            io: Io::Write {
                offset: 0,
                len: BLOCK as u32,
                data: self.arena.payload(self.mark_page),
            },
        });
    }
}

/// The span of power that what the disk holds has survived. In the one in which it ended by itself it may have lost what
/// it had completed: what is there now begins a span of its own, one for each such end.
pub(super) fn span(ended: Option<Ended>, host: PowerId) -> PowerId {
    match ended {
        Some(ended) if ended.power == host.0 && !planted::on(Bug::ForgetFailedFlush) => {
            PowerId(host.0 ^ ended.boot)
        }
        _ => host,
    }
}

/// A disk of which it is noticed that a flush failed.
pub(super) struct Watched<'a> {
    pub(super) io: &'a mut dyn BlockIo,
    pub(super) failed: bool,
}

impl BlockIo for Watched<'_> {
    fn size(&self) -> u64 {
        self.io.size()
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        self.io.read(offset, buf)
    }

    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), IoError> {
        self.io.write(offset, buf)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), IoError> {
        self.io.write_zeroes(offset, len)
    }

    fn flush(&mut self) -> Result<(), IoError> {
        let flushed = self.io.flush();
        self.failed |= flushed.is_err();
        flushed
    }

    fn known_zero(&mut self, offset: u64, len: u64) -> bool {
        self.io.known_zero(offset, len)
    }
}
