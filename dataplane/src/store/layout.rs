//! Where the areas of a disk lie.
//!
//! `superblock | checkpoint A | checkpoint B | journal | records | data | superblock copy`, in blocks of 4 KiB, the data
//! aligned to extents. Computed from the superblock alone, and checked before anything is sized by it.

use super::codec::{CHUNK_ENTRY, RECORDS_PER_PAGE, Superblock, VOLUME_ENTRY};
use crate::ids::{BLOCK, BLOCKS_PER_EXTENT, EXTENT, EXTENTS_PER_CHUNK};

/// Smallest disk, bytes.
pub const DISK_MIN: u64 = 4 * 1024 * 1024;
/// Fewest journal blocks.
pub const JOURNAL_BLOCKS_MIN: u64 = 16;
/// Most journal blocks.
pub const JOURNAL_BLOCKS_MAX: u64 = 1 << 20;
/// Fewest chunk table entries.
pub const CHUNKS_MIN: u64 = 64;
/// Most slots: their numbers share a word with a mark.
pub const SLOTS_MAX: u64 = (1 << 31) - 2;

/// The areas of a disk. Offsets are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// What it was computed from.
    pub superblock: Superblock,
    /// Of the checkpoint areas A and B.
    pub checkpoints: [u64; 2],
    /// Blocks of the volume table in each.
    pub volume_blocks: u64,
    /// Blocks of the chunk table in each.
    pub chunk_blocks: u64,
    /// Of the journal.
    pub journal: u64,
    /// Of the records.
    pub records: u64,
    /// Pages of records.
    pub record_pages: u64,
    /// Of the data.
    pub data: u64,
    /// Of the superblock's copy.
    pub copy: u64,
}

/// Table entries per block.
pub const CHUNKS_PER_BLOCK: usize = BLOCK / CHUNK_ENTRY;
/// Table entries per block.
pub const VOLUMES_PER_BLOCK: usize = BLOCK / VOLUME_ENTRY;

impl Layout {
    /// The largest layout that fits a disk of `bytes` with the journal asked for.
    pub fn plan(uuid: u128, bytes: u64, journal_bytes: Option<u64>) -> Option<Self> {
        if bytes < DISK_MIN {
            return None;
        }
        let blocks = bytes / BLOCK as u64;
        let journal_bytes = journal_bytes.unwrap_or((bytes / 64).clamp(1 << 20, 64 << 20));
        let journal_blocks = journal_bytes / BLOCK as u64;
        let mut slots = (bytes / EXTENT as u64).min(SLOTS_MAX);
        loop {
            let chunks = (slots.div_ceil(EXTENTS_PER_CHUNK as u64) * 4).max(CHUNKS_MIN);
            let superblock = Superblock {
                uuid,
                blocks,
                journal_blocks,
                slots,
                chunk_capacity: chunks as u32,
                volume_capacity: chunks as u32 + 1,
            };
            let layout = Self::places(superblock)?;
            let end = layout.data + slots * EXTENT as u64;
            if end <= layout.copy {
                return Self::new(superblock);
            }
            let over = (end - layout.copy).div_ceil(EXTENT as u64);
            // Dropping that many slots is exact or frees up to a few too many table blocks: never too little twice.
            slots = slots.checked_sub(over)?;
            if slots == 0 {
                return None;
            }
        }
    }

    /// The layout of a superblock, if it is one that can be.
    pub fn new(superblock: Superblock) -> Option<Self> {
        let chunks = u64::from(superblock.chunk_capacity);
        let possible = superblock.slots >= 1
            && superblock.slots <= SLOTS_MAX
            && (JOURNAL_BLOCKS_MIN..=JOURNAL_BLOCKS_MAX).contains(&superblock.journal_blocks)
            && superblock.blocks <= u64::MAX / BLOCK as u64
            && chunks >= 1
            && chunks <= (superblock.slots.div_ceil(EXTENTS_PER_CHUNK as u64) * 4).max(CHUNKS_MIN)
            && u64::from(superblock.volume_capacity) == chunks + 1;
        if !possible {
            return None;
        }
        let layout = Self::places(superblock)?;
        (layout.data.checked_add(superblock.slots * EXTENT as u64)? <= layout.copy).then_some(layout)
    }

    fn places(superblock: Superblock) -> Option<Self> {
        let block = BLOCK as u64;
        let volume_blocks = u64::from(superblock.volume_capacity).div_ceil(VOLUMES_PER_BLOCK as u64);
        let chunk_blocks = u64::from(superblock.chunk_capacity).div_ceil(CHUNKS_PER_BLOCK as u64);
        let area = (1 + volume_blocks + chunk_blocks) * block;
        let checkpoints = [block, block + area];
        let journal = block + 2 * area;
        let records = journal.checked_add(superblock.journal_blocks.checked_mul(block)?)?;
        let record_pages = superblock.slots.div_ceil(RECORDS_PER_PAGE as u64);
        let data = (records.checked_add(record_pages * block)?).next_multiple_of(EXTENT as u64);
        let copy = superblock.blocks.checked_sub(1)?.checked_mul(block)?;
        Some(Layout {
            superblock,
            checkpoints,
            volume_blocks,
            chunk_blocks,
            journal,
            records,
            record_pages,
            data,
            copy,
        })
    }

    /// First byte of block `block` of slot `slot`.
    #[inline]
    pub fn block_at(&self, slot: u32, block: u8) -> u64 {
        debug_assert!(usize::from(block) < BLOCKS_PER_EXTENT);
        self.data + u64::from(slot) * EXTENT as u64 + u64::from(block) * BLOCK as u64
    }

    /// The slots of the page of records that begins with slot `first`: fewer in the last page, whose rest means nothing.
    pub fn slots_of(&self, first: u32) -> std::ops::Range<u32> {
        first..(u64::from(first) + RECORDS_PER_PAGE as u64).min(self.superblock.slots) as u32
    }

    /// First byte of a page of records.
    #[inline]
    pub fn page_at(&self, page: u32) -> u64 {
        self.records + u64::from(page) * BLOCK as u64
    }

    /// First byte of the journal block with this sequence.
    #[inline]
    pub fn journal_at(&self, sequence: u64) -> u64 {
        self.journal + sequence % self.superblock.journal_blocks * BLOCK as u64
    }
}
