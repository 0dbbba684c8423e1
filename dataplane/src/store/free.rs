//! Giving a slot back: zero its data, flush, journal the freeing, flush; only then is it free.
//!
//! The order matters. Zeroes before the freeing: were it the other way round, a crash in between would leave a slot that
//! looks free and still holds old bytes. A flush after the freeing: were the slot used before, a crash could bring the
//! old owner's record back over the new owner's bytes. The operation holds its extent from first to last, so that no
//! read of it is under way.

use super::codec::{ChunkState, ENTRY_MAX, Record};
use super::ops::Step;
use super::tables::{ABSENT, EMPTY};
use super::{Effect, Failure, Store};
use crate::ids::Version;
use crate::planted::{self, Bug};
use crate::replica::{Reply, Request};

impl Store {
    /// A freeing that the background began, from its start or from where it was parked.
    pub(super) fn advance_free(&mut self, i: u32, out: &mut Vec<Effect>) {
        if self.ops[i].step == Step::FreeJournal {
            return self.journal_freeing(i, out);
        }
        let (place, extent) = (self.ops[i].place, self.ops[i].extent);
        let state = self.tables.chunks[place as usize].entry.state;
        let dropped = self.tables.chunks[place as usize].mark_need;
        if state == ChunkState::Dropping && self.journal.durable < dropped {
            // A loss of power could bring the replica back, with zeros for what its records say is there.
            return self.wait_flush(i, dropped, Step::Begin);
        }
        let map = self.tables.chunks[place as usize]
            .map
            .as_mut()
            .expect("held by its freeing");
        let slot = map[usize::from(extent)];
        let wanted = match state {
            ChunkState::Dropping => slot != ABSENT,
            ChunkState::Live => slot != ABSENT && slot & EMPTY != 0,
            ChunkState::Free => false,
        };
        if !wanted || (state == ChunkState::Live && self.in_doubt(place, extent)) {
            return self.end_freeing(i, out);
        }
        let slot = slot & !EMPTY;
        let Some(frame) = self.find_page(i, slot, out) else {
            return;
        };
        let stable = self.stable_of(place);
        let meant = self.tables.chunks[place as usize].entry.chunk;
        match self.record(frame, slot) {
            Record::Free => {
                // Taken for a write that was never carried out: nothing was written.
                let map = self.tables.chunks[place as usize]
                    .map
                    .as_mut()
                    .expect("held by its freeing");
                map[usize::from(extent)] = ABSENT;
                self.slots.give(slot);
                self.end_freeing(i, out);
            }
            Record::Extent(r) if r.chunk != meant || r.extent != extent => {
                self.fail(Failure::MetadataRead, out);
            }
            Record::Extent(r) if state == ChunkState::Live && r.image.version > stable => {
                self.end_freeing(i, out);
            }
            Record::Extent(_) => {
                self.ops[i].slot = slot;
                if planted::on(Bug::ReuseEarly) {
                    return self.journal_freeing(i, out);
                }
                self.begin_zeroing(i, out);
            }
            Record::Quarantined => unreachable!("no extent has a quarantined slot"),
        }
    }

    pub(super) fn stable_of(&self, place: u32) -> Version {
        let volume = self.tables.chunks[place as usize].entry.chunk.key.volume;
        self.tables
            .volume(volume)
            .map_or(Version::ZERO, |v| self.tables.volumes[v as usize].stable)
    }

    /// Zeroes the whole slot of an operation.
    pub(super) fn begin_zeroing(&mut self, i: u32, out: &mut Vec<Effect>) {
        let slot = self.ops[i].slot;
        self.ops[i].step = Step::Zeroing;
        self.zero_data(i, slot, 0, 16, out);
    }

    /// The zeros are durable: the record goes.
    pub(super) fn journal_freeing(&mut self, i: u32, out: &mut Vec<Effect>) {
        self.ops[i].step = Step::FreeJournal;
        let slot = self.ops[i].slot;
        let Some(frame) = self.find_page(i, slot, out) else {
            return;
        };
        if !self.make_room(ENTRY_MAX, out) {
            self.ops.push(&mut self.journal_wait, i);
            return;
        }
        if self.record(frame, slot) == Record::Free {
            let (place, extent) = (self.ops[i].place, self.ops[i].extent);
            let map = self.tables.chunks[place as usize]
                .map
                .as_mut()
                .expect("held by its freeing");
            map[usize::from(extent)] = ABSENT;
            return self.freed(i, out);
        }
        let need = self.change_record(i, frame, slot, Record::Free);
        if planted::on(Bug::ReuseEarly) {
            return self.freed(i, out);
        }
        self.wait_flush(i, need, Step::FreeFlush);
    }

    /// The freeing is durable: the slot may be used again.
    pub(super) fn freed(&mut self, i: u32, out: &mut Vec<Effect>) {
        let slot = self.ops[i].slot;
        self.slots.give(slot);
        self.counters.freed += 1;
        if self.ops[i].request.is_some() {
            debug_assert!(matches!(self.ops[i].request, Some(Request::Install { .. })));
            self.end(i, Reply::Done, out);
        } else {
            self.end_freeing(i, out);
        }
    }

    fn end_freeing(&mut self, i: u32, out: &mut Vec<Effect>) {
        let place = self.ops[i].place;
        self.tables.chunks[place as usize].freeing -= 1;
        self.free_work = true;
        self.end(i, Reply::Done, out);
    }
}
