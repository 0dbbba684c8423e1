//! The volatile write cache of a faulty disk: blocks that were written and not yet flushed.
//!
//! A block is `fresh` from its write until a flush begins, then `leaving` until it was written to the disk beneath.
//! Dropping the cache loses what is fresh; what is leaving is on its way. Reads see fresh before leaving before disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Io;
use crate::checksum;
use crate::ids::BLOCK;
use crate::memory::{Payload, Seg};
use crate::replica::Crcs;

#[repr(C, align(4096))]
struct Block([u8; BLOCK]);

/// A block of memory with a payload of its own; it stays where it is.
pub(super) struct Staged {
    segs: [Seg; 1],
    block: Box<Block>,
}

impl Staged {
    pub(super) fn new() -> Box<Self> {
        let mut block = Box::new(Block([0; BLOCK]));
        let ptr = (&raw mut block.0).cast();
        Box::new(Staged {
            segs: [Seg {
                ptr,
                len: BLOCK as u32,
            }],
            block,
        })
    }

    /// Names the block.
    pub(super) fn payload(&self) -> Payload {
        Payload::new(&self.segs)
    }

    /// Its address.
    pub(super) fn block(&mut self) -> *mut u8 {
        (&raw mut self.block.0).cast()
    }
}

/// `None` is a block of zeros.
type Blocks = BTreeMap<u64, Option<Arc<Staged>>>;

/// What was in the cache for a read when it began: index in the read, and the block.
pub(super) type Seen = Vec<(usize, Option<Arc<Staged>>)>;

/// See the module.
#[derive(Default)]
pub(super) struct Cache {
    fresh: Blocks,
    leaving: Blocks,
    /// Blocks of `leaving` below this have been handed out.
    handed_out: u64,
}

fn range(offset: u64, len: u32) -> impl Iterator<Item = u64> {
    (offset..offset + u64::from(len)).step_by(BLOCK)
}

impl Cache {
    pub(super) fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.leaving.is_empty()
    }

    /// Some block of the range is here.
    pub(super) fn holds(&self, offset: u64, len: u32) -> bool {
        let range = offset..offset + u64::from(len);
        self.fresh.range(range.clone()).next().is_some() || self.leaving.range(range).next().is_some()
    }

    /// # Safety
    /// The payload is alive and readable.
    pub(super) unsafe fn write(&mut self, offset: u64, len: u32, data: Payload) {
        for (i, at) in range(offset, len).enumerate() {
            let mut staged = Staged::new();
            // SAFETY: the caller keeps the payload; the block is new and ours.
            unsafe { checksum::gather(data.advance(i * BLOCK), BLOCK, staged.block()) };
            self.fresh.insert(at, Some(Arc::from(staged)));
        }
    }

    pub(super) fn zero(&mut self, offset: u64, len: u32) {
        self.fresh.extend(range(offset, len).map(|at| (at, None)));
    }

    /// Fresh blocks of the range are forgotten.
    pub(super) fn forget(&mut self, offset: u64, len: u32) {
        self.fresh
            .retain(|&at, _| at < offset || at >= offset + u64::from(len));
    }

    /// Loses what is fresh; tells how many blocks.
    pub(super) fn drop_fresh(&mut self) -> usize {
        std::mem::take(&mut self.fresh).len()
    }

    /// What is fresh begins to leave. The last flush has ended.
    pub(super) fn begin_flush(&mut self) {
        debug_assert!(self.leaving.is_empty());
        self.leaving = std::mem::take(&mut self.fresh);
        self.handed_out = 0;
    }

    /// The next block to write to the disk beneath, if any is left: its offset and data, or `None` for zeros.
    pub(super) fn next_to_write(&mut self) -> Option<(u64, Option<Payload>)> {
        let (&at, block) = self.leaving.range(self.handed_out..).next()?;
        self.handed_out = at + 1;
        Some((at, block.as_ref().map(|staged| staged.payload())))
    }

    /// All that was leaving has been written.
    pub(super) fn end_flush(&mut self) {
        self.leaving.clear();
    }

    /// What a read that begins now has to see. (When it ends, a block may have left and the disk beneath may have been
    /// read before it arrived.)
    pub(super) fn look(&self, io: &Io) -> Seen {
        match *io {
            Io::Read { offset, len, .. } | Io::Verify { offset, len } if !self.is_empty() => {
                range(offset, len)
                    .enumerate()
                    .filter_map(|(i, at)| {
                        let block = self.fresh.get(&at).or_else(|| self.leaving.get(&at))?;
                        Some((i, block.clone()))
                    })
                    .collect()
            }
            _ => Vec::new(),
        }
    }
}

/// Puts what a read has to see over what the disk beneath returned.
///
/// # Safety
/// The payload of `io` is alive, writable and used by nobody else.
pub(super) unsafe fn overlay(seen: &Seen, io: &Io, crcs: &mut Crcs) {
    const ZEROS: &Block = &Block([0; BLOCK]);
    let (data, summed) = match *io {
        Io::Read { data, crcs, .. } => (Some(data), crcs),
        Io::Verify { .. } => (None, true),
        _ => return,
    };
    for &(i, ref block) in seen {
        let bytes = block.as_ref().map_or(&ZEROS.0, |staged| &staged.block.0);
        if let Some(data) = data {
            // SAFETY: the caller's obligations; the source is a whole block of ours.
            unsafe { checksum::scatter(bytes.as_ptr(), data.advance(i * BLOCK), BLOCK) };
        }
        if summed {
            crcs[i] = checksum::crc32c(bytes);
        }
    }
}
