//! What a store needs of a disk, in two forms.
//!
//! * [`Io`] and [`Completion`]: the words of the hot path. A store asks, the reactor's back end does it and answers.
//! * [`BlockIo`]: plain sequential access, for formatting, opening and checking a disk, where clarity beats speed.
//!
//! All offsets and lengths are multiples of [`BLOCK`](crate::ids::BLOCK).

use crate::memory::Payload;
use crate::replica::Crcs;

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
}
