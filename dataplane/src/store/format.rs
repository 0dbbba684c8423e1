//! Making a disk ours.
//!
//! Order: what vouched for an old content goes first, what vouches for the new goes last, with a flush between.

use super::codec::{CheckpointHeader, NO_WINDOW, Seed, SuperError, Superblock, WINDOWS};
use super::layout::{DISK_MIN, Layout};
use crate::disk::{BlockIo, IoError};
use crate::ids::{BLOCK, DiskUuid};

/// Bytes at either end of a disk in which a foreign content is looked for.
pub const FOREIGN_BYTES: u64 = 64 * 1024;
/// Most bytes zeroed by one call of the device.
const ZERO_MAX: u64 = 64 << 20;

/// How to format.
#[derive(Clone, Copy, Debug)]
pub struct FormatOptions {
    /// The disk's name: new for every format, it seeds all checksums.
    pub uuid: DiskUuid,
    /// Size of the journal; `None`: a 64th of the disk, 1 to 64 MiB.
    pub journal_bytes: Option<u64>,
    /// Overwrite whatever is there.
    pub force: bool,
    /// All of the disk is known to read as zeros.
    pub already_zero: bool,
}

/// Why a disk was not formatted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It holds our format, sound or damaged.
    #[error("the disk holds a Unibody superblock: open it, or format it with force to destroy its contents")]
    Formatted,
    /// It holds something else.
    #[error("the disk is not blank (byte {0}): if its contents may be destroyed, format it with force")]
    Foreign(u64),
    /// It is too small.
    #[error("the disk has {0} bytes and at least {min} are needed, more with a large journal", min = DISK_MIN)]
    TooSmall(u64),
    /// The journal size is out of range.
    #[error("a journal of {0} bytes is out of range: it may have 64 KiB to 4 GiB, and must fit the disk")]
    Journal(u64),
    /// The disk failed.
    #[error("the disk failed while it was formatted: {0:?}")]
    Io(IoError),
}

impl From<IoError> for FormatError {
    fn from(e: IoError) -> Self {
        FormatError::Io(e)
    }
}

impl super::Store {
    /// Formats a disk.
    ///
    /// # Errors
    /// See [`FormatError`]. After [`FormatError::Io`] the disk holds nothing that can be opened.
    pub fn format(io: &mut dyn BlockIo, options: &FormatOptions) -> Result<(), FormatError> {
        let block = BLOCK as u64;
        let size = io.size() / block * block;
        if size < DISK_MIN {
            return Err(FormatError::TooSmall(size));
        }
        let layout =
            Layout::plan(options.uuid.0, size, options.journal_bytes).ok_or(match options.journal_bytes {
                Some(bytes) => FormatError::Journal(bytes),
                None => FormatError::TooSmall(size),
            })?;
        if !options.force {
            refuse_foreign(io, size)?;
        }
        zero(io, 0, block)?;
        zero(io, size - block, block)?;
        io.flush()?;
        // Records must be zero to be free. The other areas are seeded, what is left there would not check; zero all the
        // same, so that nothing of an old content stays.
        zero(io, block, layout.data - block)?;
        if !options.already_zero {
            zero(io, layout.data, layout.copy - layout.data)?;
        }
        let seed = Seed::new(options.uuid.0);
        let header = CheckpointHeader {
            sequence: 1,
            tail: 1,
            tail_hash: seed.chain_start(0, 1),
            boot: 0,
            power: 0,
            volumes: 0,
            chunks: 0,
            clean: true,
            tables: *seed.table_hasher().finalize().as_bytes(),
            windows: [NO_WINDOW; WINDOWS],
        };
        let mut bytes = [0; BLOCK];
        header.encode(&seed, 0, &mut bytes);
        io.write(layout.checkpoints[0], &bytes)?;
        io.flush()?;
        let superblock = layout.superblock.encode();
        io.write(layout.copy, &superblock)?;
        io.write(0, &superblock)?;
        io.flush()?;
        Ok(())
    }
}

fn zero(io: &mut dyn BlockIo, mut offset: u64, len: u64) -> Result<(), IoError> {
    let end = offset + len;
    while offset < end {
        let step = (end - offset).min(ZERO_MAX);
        io.write_zeroes(offset, step)?;
        offset += step;
    }
    Ok(())
}

fn refuse_foreign(io: &mut dyn BlockIo, size: u64) -> Result<(), FormatError> {
    let mut bytes = vec![0; FOREIGN_BYTES as usize];
    for offset in [0, size - FOREIGN_BYTES] {
        io.read(offset, &mut bytes)?;
        let end = if offset == 0 {
            &bytes[..BLOCK]
        } else {
            &bytes[bytes.len() - BLOCK..]
        };
        match Superblock::decode(end) {
            Err(SuperError::Blank | SuperError::Foreign) => {}
            Ok(_) | Err(SuperError::Newer(_) | SuperError::Damaged) => return Err(FormatError::Formatted),
        }
        if let Some(at) = bytes.iter().position(|&b| b != 0) {
            return Err(FormatError::Foreign(offset + at as u64));
        }
    }
    Ok(())
}
