//! What a store needs of a disk, in two forms.
//!
//! * [`Io`] and [`Completion`]: the words of the hot path. A store asks, the reactor's back end does it and answers.
//! * [`BlockIo`]: plain sequential access, for formatting, opening and checking a disk, where clarity beats speed.
//!
//! All offsets and lengths are multiples of [`BLOCK`].
//!
//! [`Disk`] is what a reactor drives: synchronous back ends complete inside `submit`, io_uring ones share the reactor's
//! ring. Back ends: [`uring`], [`memory_disk`], [`null`], and [`faulty`] around any of them.

use std::io;
use std::path::PathBuf;

use crate::ids::{BLOCK, EXTENT};
use crate::memory::Payload;
use crate::reactor::Ring;
use crate::replica::Crcs;

pub mod faulty;
mod faulty_cache;
pub mod file;
pub mod memory_disk;
pub mod null;
pub mod open;
pub mod spec;
pub mod uring;

/// I/Os a disk takes before it answers [`Busy`]: being done and waiting inside the back end together.
pub const QUEUE_MAX: usize = 1024;
/// Longest single I/O, bytes (write-zeroes has no such limit).
pub const IO_MAX: u32 = 16 * 1024 * 1024;

/// Names an I/O to whoever asked for it; the back end only hands it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// One I/O on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Io {
    /// Read `len` bytes into `data`. With `crcs` (then `len` is at most one extent) the completion carries the checksum
    /// of each block, computed over what was read; entry 0 is the first block read.
    Read {
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        len: u32,
        /// Where to.
        data: Payload,
        /// Compute checksums.
        crcs: bool,
    },
    /// Read at most one extent into memory of the back end's own, only for the checksums.
    Verify {
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Write `len` bytes from `data`.
    Write {
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        len: u32,
        /// Where from.
        data: Payload,
    },
    /// Make `len` bytes read as zeros.
    WriteZeroes {
        /// First byte on the disk.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Make everything completed before durable.
    Flush,
}

/// How an I/O failed. What to do about it is the store's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoError {
    /// The device reports a media or transport error, or a short transfer.
    Media,
    /// The device (a thinly provisioned file) has no room.
    NoSpace,
    /// The device is gone.
    Gone,
}

/// The end of an I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The asker's name for it.
    pub token: Token,
    /// How it ended.
    pub result: Result<(), IoError>,
    /// Checksums of the blocks read, from entry 0, where they were asked for; else zeros.
    pub crcs: Crcs,
}

impl Completion {
    /// A completion without checksums.
    #[inline]
    pub fn new(token: Token, result: Result<(), IoError>) -> Self {
        Completion {
            token,
            result,
            crcs: Crcs::default(),
        }
    }
}

impl Io {
    /// Panics if the I/O breaks the rules of this module or leaves a disk of `bytes`: the store never asks for that, and
    /// carrying it out could touch memory or data that is not meant.
    #[inline]
    pub fn check(&self, bytes: u64) {
        let (offset, len, max) = match *self {
            Io::Flush => return,
            Io::Read {
                offset,
                len,
                crcs: false,
                ..
            }
            | Io::Write { offset, len, .. } => (offset, len, IO_MAX),
            Io::Read {
                offset,
                len,
                crcs: true,
                ..
            }
            | Io::Verify { offset, len } => (offset, len, EXTENT as u32),
            Io::WriteZeroes { offset, len } => (offset, len, u32::MAX),
        };
        let block = BLOCK as u64;
        assert!(
            offset.is_multiple_of(block) && u64::from(len).is_multiple_of(block) && len > 0 && len <= max,
            "misshapen {self:?}"
        );
        assert!(
            offset < bytes && u64::from(len) <= bytes - offset,
            "{self:?} outside a disk of {bytes} bytes"
        );
    }
}

/// What sort of back end a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskKind {
    /// A regular file.
    File,
    /// A block device.
    BlockDevice,
    /// This process's memory.
    Memory,
    /// Keeps nothing.
    Null,
}

/// What is known of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskInfo {
    /// What it is.
    pub kind: DiskKind,
    /// Where it is.
    pub path: Option<PathBuf>,
    /// Bytes, whole blocks.
    pub bytes: u64,
    /// Payload memory has to be aligned like this for the data to go there directly; else it is copied. Bytes.
    pub memory_align: u32,
    /// What completed may still be lost with the power until a flush.
    pub volatile_cache: bool,
    /// I/O goes past the page cache (O_DIRECT).
    pub direct: bool,
    /// Completions are polled from the device.
    pub iopoll: bool,
}

/// The disk has [`QUEUE_MAX`] I/Os in hand: ask again when some completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the disk has {QUEUE_MAX} requests in hand")]
pub struct Busy;

/// A disk as a reactor drives it. All calls but the first come from the reactor's thread.
///
/// I/Os in hand at the same time take effect in any order; a flush covers what had completed when it was submitted.
/// Every I/O taken completes exactly once, into `done`. Payload memory belongs to the disk until then, so the owner of a
/// disk waits until [`Disk::in_hand`] is zero before it drops disk, ring or payload memory.
pub trait Disk: Send {
    /// What it is.
    fn info(&self) -> &DiskInfo;

    /// Binds the disk to its reactor's ring. Ring completions with [`Kind::Disk`](crate::reactor::Kind::Disk) and this
    /// `owner` are to be given to [`Disk::complete`]. Called once, first, on the reactor's thread.
    ///
    /// # Errors
    /// When the kernel has not the memory for it.
    fn attach(&mut self, ring: &mut Ring, owner: u32) -> io::Result<()>;

    /// Takes the disk off its ring, to be dropped; nothing is in hand. A disk dropped without it leaks its buffers.
    fn detach(&mut self, _ring: &mut Ring) {}

    /// Takes an I/O.
    ///
    /// # Errors
    /// [`Busy`]: not taken.
    ///
    /// # Safety
    /// The payload's memory is valid for the I/O and stays so until it completed, as the module [`memory`](crate::memory)
    /// demands, and during a read nobody refers to it.
    unsafe fn submit(
        &mut self,
        ring: &mut Ring,
        token: Token,
        io: Io,
        done: &mut Vec<Completion>,
    ) -> Result<(), Busy>;

    /// A completion of the ring with the tag index `index`.
    fn complete(&mut self, ring: &mut Ring, index: u32, result: i32, done: &mut Vec<Completion>);

    /// Once a turn while something is in hand: goes on with what waited for room. True: something completed.
    fn poll(&mut self, ring: &mut Ring, done: &mut Vec<Completion>) -> bool;

    /// I/Os taken and not completed.
    fn in_hand(&self) -> usize;

    /// The reactor must not sleep: something is in hand that no ring event will announce.
    fn must_poll(&self) -> bool {
        false
    }
}

/// Sequential access to a whole disk. Any memory will do for `buf`; lengths are multiples of 4 KiB.
pub trait BlockIo {
    /// Bytes of the disk, rounded down to whole blocks.
    fn size(&self) -> u64;
    /// Fills `buf` from `offset`.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), IoError>;
    /// Writes `buf` at `offset`; durable only after `flush`.
    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), IoError>;
    /// Makes a range read as zeros; durable only after `flush`.
    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), IoError>;
    /// Makes everything before durable.
    fn flush(&mut self) -> Result<(), IoError>;
    /// The range is known to read as zeros without looking at it (never written, or deallocated). False: unknown.
    fn known_zero(&mut self, _offset: u64, _len: u64) -> bool {
        false
    }
}
