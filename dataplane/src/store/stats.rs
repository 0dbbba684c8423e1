//! What a store counts.

use super::codec::ChunkState;
use super::{Failure, Store};
use crate::ids::EXTENT;

/// Plain counters, since the disk was opened.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: u64,
    pub(super) writes: u64,
    pub(super) zeroes: u64,
    pub(super) flushes: u64,
    pub(super) installs: u64,
    pub(super) digests: u64,
    pub(super) refused: u64,
    pub(super) data_writes: u64,
    pub(super) journal_blocks: u64,
    pub(super) device_flushes: u64,
    pub(super) checkpoints: u64,
    pub(super) pages_home: u64,
    pub(super) marks: u64,
    pub(super) cleaned: u64,
    pub(super) freed: u64,
    pub(super) mismatches: u64,
    pub(super) read_errors: u64,
    /// Chunks that are being dropped, now.
    pub(super) dropping: usize,
    /// Pages being read, now.
    pub(super) loading: usize,
}

/// A picture of a store. Counters count since the disk was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Bytes that extents can take.
    pub capacity_bytes: u64,
    /// Bytes of slots that are free.
    pub free_bytes: u64,
    /// Replicas held, dropped ones that are being freed included.
    pub chunks: u64,
    /// Regions marked dirty.
    pub dirty_regions: u64,
    /// Regions in doubt.
    pub in_doubt_regions: u64,
    /// Chunks in which damage was found and not settled.
    pub suspect_chunks: u64,
    /// Slots whose record was damaged; never used again.
    pub quarantined_slots: u64,
    /// The disk has ended, and why.
    pub failed: Option<Failure>,
    /// Requests under way or waiting.
    pub under_way: u64,
    /// Reads carried out.
    pub reads: u64,
    /// Writes carried out.
    pub writes: u64,
    /// Zeroings carried out.
    pub zeroes: u64,
    /// Flushes asked for.
    pub flushes: u64,
    /// Installs carried out.
    pub installs: u64,
    /// Digests made.
    pub digests: u64,
    /// Requests refused.
    pub refused: u64,
    /// Data writes sent to the device.
    pub data_writes: u64,
    /// Journal blocks sent to the device.
    pub journal_blocks: u64,
    /// Flushes sent to the device.
    pub device_flushes: u64,
    /// Checkpoints completed.
    pub checkpoints: u64,
    /// Record pages written home.
    pub pages_home: u64,
    /// Dirty marks journaled.
    pub marks: u64,
    /// Chunks marked clean.
    pub cleaned: u64,
    /// Slots freed.
    pub freed: u64,
    /// Blocks read whose checksum was wrong.
    pub mismatches: u64,
    /// Blocks the device could not read.
    pub read_errors: u64,
    /// Record pages found in memory.
    pub cache_hits: u64,
    /// Record pages read.
    pub cache_misses: u64,
    /// Journal ring in use, blocks.
    pub journal_used: u64,
    /// Journal ring, blocks.
    pub journal_size: u64,
}

impl StoreStats {
    /// Names and values, for people and programs that watch.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("under_way", self.under_way),
            ("reads", self.reads),
            ("writes", self.writes),
            ("zeroes", self.zeroes),
            ("flushes", self.flushes),
            ("installs", self.installs),
            ("digests", self.digests),
            ("refused", self.refused),
            ("data_writes", self.data_writes),
            ("journal_blocks", self.journal_blocks),
            ("device_flushes", self.device_flushes),
            ("checkpoints", self.checkpoints),
            ("pages_home", self.pages_home),
            ("marks", self.marks),
            ("cleaned", self.cleaned),
            ("freed", self.freed),
            ("mismatches", self.mismatches),
            ("read_errors", self.read_errors),
            ("cache_hits", self.cache_hits),
            ("cache_misses", self.cache_misses),
            ("journal_used", self.journal_used),
            ("journal_size", self.journal_size),
            ("chunks", self.chunks),
            ("suspect_chunks", self.suspect_chunks),
            ("quarantined_slots", self.quarantined_slots),
        ]
    }
}

impl Store {
    /// A picture of the store, for people and programs that watch. Walks the chunk table: not for the hot path.
    pub fn stats(&self) -> StoreStats {
        let c = &self.counters;
        let mut stats = StoreStats {
            capacity_bytes: self.layout.superblock.slots * EXTENT as u64,
            free_bytes: self.slots.free() * EXTENT as u64,
            quarantined_slots: self.quarantined,
            failed: self.failed,
            under_way: (self.ops.under_way() + self.door.len()) as u64,
            reads: c.reads,
            writes: c.writes,
            zeroes: c.zeroes,
            flushes: c.flushes,
            installs: c.installs,
            digests: c.digests,
            refused: c.refused,
            data_writes: c.data_writes,
            journal_blocks: c.journal_blocks,
            device_flushes: c.device_flushes,
            checkpoints: c.checkpoints,
            pages_home: c.pages_home,
            marks: c.marks,
            cleaned: c.cleaned,
            freed: c.freed,
            mismatches: c.mismatches,
            read_errors: c.read_errors,
            cache_hits: self.cache.hits,
            cache_misses: self.cache.misses,
            journal_used: self.journal.ring_used(),
            journal_size: self.journal.ring(),
            ..StoreStats::default()
        };
        for chunk in &self.tables.chunks {
            if chunk.entry.state != ChunkState::Free {
                stats.chunks += 1;
                stats.dirty_regions += u64::from(chunk.entry.dirty.count_ones());
                stats.in_doubt_regions += u64::from(chunk.entry.in_doubt.count_ones());
                stats.suspect_chunks += u64::from(chunk.entry.suspect);
            }
        }
        stats
    }
}
