//! What is done when there is time: marking idle chunks clean, freeing extents without data and dropped chunks.
//!
//! Bounded work per call; driven by ticks and, while chunks are being dropped, by the end of earlier freeings.

use super::codec::{ChunkState, ENTRY_MAX};
use super::ops::Step;
use super::tables::{ABSENT, EMPTY};
use super::{Effect, Store};
use crate::ids::{EXTENTS_PER_CHUNK, Version};
use crate::planted::{self, Bug};

/// A chunk is marked clean when it was not written for so long, ms.
pub(super) const CLEAN_AFTER_MS: u64 = 5000;
/// Chunks that wait for one flush to be marked clean.
pub(super) const CLEANING_MAX: usize = 256;
/// Chunks looked at per call.
const LOOK_MAX: usize = 256;

impl Store {
    /// Time has come to `now_ms` (of any clock that never goes back): cleans and frees a bounded amount. Call it some
    /// ten times a second, and [`Store::flush_batch`] after it.
    pub fn tick(&mut self, now_ms: u64, out: &mut Vec<Effect>) {
        self.now_ms = self.now_ms.max(now_ms);
        if self.failed.is_some() || self.closing {
            return;
        }
        let chunks = self.tables.chunks.len() as u32;
        for _ in 0..LOOK_MAX.min(chunks as usize) {
            let place = self.hand;
            let stable = self.stable_of(place);
            self.hand = (self.hand + 1) % chunks;
            let chunk = &mut self.tables.chunks[place as usize];
            let idle = chunk.entry.dirty != 0
                && chunk.writers == 0
                && !chunk.cleaning
                && (chunk.newest <= stable || planted::on(Bug::CleanAboveStable))
                && self.now_ms >= chunk.written_ms + CLEAN_AFTER_MS;
            if idle && self.flusher.cleaning.len() < CLEANING_MAX {
                chunk.cleaning = true;
                self.flusher.cleaning.push((place, chunk.writes));
            }
            if chunk.empties > 0 && chunk.entry.state == ChunkState::Live {
                self.free_some(place, out);
            }
        }
        self.free_dropped(out);
        self.pump(out);
    }

    /// A flush covered the writes of these chunks: those without a write since are clean, from now on. The next write
    /// waits for a new mark.
    pub(super) fn cleaning_flushed(&mut self, out: &mut Vec<Effect>) {
        while let Some((place, writes)) = self.flusher.cleaning_covered.pop() {
            let chunk = &mut self.tables.chunks[place as usize];
            chunk.cleaning = false;
            let unchanged = chunk.writes == writes && chunk.writers == 0 && chunk.entry.dirty != 0;
            if unchanged && self.make_room(ENTRY_MAX, out) {
                let chunk = &mut self.tables.chunks[place as usize];
                chunk.entry.dirty = 0;
                chunk.newest = Version::ZERO;
                if !planted::on(Bug::CleanMarkRace) {
                    chunk.marked = 0;
                }
                self.journal_chunk(place);
                self.counters.cleaned += 1;
            }
        }
    }

    /// Goes on with dropped chunks.
    pub(super) fn free_dropped(&mut self, out: &mut Vec<Effect>) {
        if self.counters.dropping == 0 || self.ops.frees() > 0 {
            return;
        }
        for place in 0..self.tables.chunks.len() as u32 {
            let chunk = &self.tables.chunks[place as usize];
            if chunk.entry.state != ChunkState::Dropping || chunk.freeing > 0 {
                continue;
            }
            let map = chunk.map.as_ref().expect("a dropping chunk has a map");
            if map.iter().any(|&slot| slot != ABSENT) {
                self.free_some(place, out);
            } else if chunk.writers == 0 && !chunk.cleaning && self.make_room(ENTRY_MAX, out) {
                self.tables.end_drop(place);
                self.counters.dropping -= 1;
                self.journal_chunk(place);
            }
            if self.ops.frees() > 0 {
                break;
            }
        }
    }

    /// Begins to free extents of a chunk, as many as may be under way.
    fn free_some(&mut self, place: u32, out: &mut Vec<Effect>) {
        if self.tables.chunks[place as usize].freeing > 0 {
            return;
        }
        let dropping = self.tables.chunks[place as usize].entry.state == ChunkState::Dropping;
        for _ in 0..EXTENTS_PER_CHUNK {
            let chunk = &mut self.tables.chunks[place as usize];
            let extent = chunk.free_cursor;
            let slot = chunk.map.as_ref().expect("a chunk in use has a map")[usize::from(extent)];
            if slot != ABSENT && (dropping || slot & EMPTY != 0) {
                let Some(i) = self.ops.take_free() else { break };
                self.tables.chunks[place as usize].freeing += 1;
                if self.ops.order(i, place, extent, u16::MAX, true) {
                    self.advance(i, out);
                } else {
                    self.ops[i].step = Step::Ordered;
                }
            }
            let chunk = &mut self.tables.chunks[place as usize];
            chunk.free_cursor = (extent + 1) % EXTENTS_PER_CHUNK as u16;
        }
    }
}
