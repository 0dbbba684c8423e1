//! Seals, chunks made and dropped, regions settled: changes of the tables.

use super::codec::{ChunkState, ENTRY_MAX, Entry};
use super::ops::Step;
use super::tables::{ABSENT, EMPTY};
use super::write::runs;
use super::{Effect, Failure, Store};
use crate::ids::{BlockMask, EXTENTS_PER_REGION};
use crate::replica::{ChunkRef, Reply, Request, Sealed, Status};

impl Store {
    pub(super) fn begin_seal(&mut self, i: u32, out: &mut Vec<Effect>) {
        let header = self.ops[i].header;
        if self.ops[i].step == Step::Under {
            return self.answer_seal(i, out);
        }
        if !self.make_room(ENTRY_MAX, out) {
            self.ops.push(&mut self.journal_wait, i);
            return;
        }
        let v = self.tables.volume_or_new(header.volume);
        let volume = &mut self.tables.volumes[v as usize];
        if header.generation.0 < volume.entry.sealed {
            self.refuse(i, Status::StaleGeneration, out);
            return;
        }
        volume.entry.sealed = header.generation.0;
        let entry = volume.entry;
        let need = self
            .journal
            .append(&mut self.arena, &Entry::Volume { index: v, entry });
        let older = self
            .ops
            .used()
            .filter(|&j| {
                let op = &self.ops[j];
                op.request.is_some()
                    && op.header.volume == header.volume
                    && op.header.generation < header.generation
            })
            .count();
        self.ops[i].older = older as u32;
        self.seals += 1;
        self.wait_flush(i, need, Step::LastFlush);
    }

    /// The seal is durable: it is answered when all older operations have ended.
    pub(super) fn seal_durable(&mut self, i: u32, out: &mut Vec<Effect>) {
        if self.ops[i].older == 0 {
            self.answer_seal(i, out);
        } else {
            self.ops[i].step = Step::Under;
        }
    }

    /// An operation ends: seals of a later generation of its volume wait for one less.
    pub(super) fn tell_seals(&mut self, ended: u32) {
        let header = self.ops[ended].header;
        if self.ops[ended].request.is_none() {
            return;
        }
        for j in 0..super::ops::OPS_MAX as u32 {
            let op = &mut self.ops[j];
            let waits = matches!(op.request, Some(Request::Seal))
                && op.older > 0
                && op.header.volume == header.volume
                && op.header.generation > header.generation;
            if waits && self.ops.is_used(j) {
                self.ops[j].older -= 1;
                if self.ops[j].older == 0 && self.ops[j].step == Step::Under {
                    self.ops.push(&mut self.ready, j);
                }
            }
        }
    }

    fn answer_seal(&mut self, i: u32, out: &mut Vec<Effect>) {
        let volume = self.ops[i].header.volume;
        let mut sealed = Sealed {
            disk: self.uuid(),
            boot: self.boot,
            power: self.power,
            suspect: false,
            chunks: Vec::new(),
        };
        for chunk in &self.tables.chunks {
            let entry = &chunk.entry;
            if entry.state == ChunkState::Live && entry.chunk.key.volume == volume {
                sealed.suspect |= entry.suspect;
                sealed.chunks.push((entry.chunk, entry.dirty | entry.in_doubt));
            }
        }
        self.end(i, Reply::Sealed(Box::new(sealed)), out);
    }

    pub(super) fn begin_create(&mut self, i: u32, out: &mut Vec<Effect>) {
        let Some(Request::CreateChunk(chunk)) = self.ops[i].request else {
            unreachable!()
        };
        let present = self.tables.chunk(chunk.key);
        let incarnation = present.map(|p| self.tables.chunks[p as usize].entry.chunk.incarnation);
        if incarnation == Some(chunk.incarnation) {
            let need = self.journal_end();
            return self.wait_flush(i, need, Step::LastFlush);
        }
        let dropped = self.counters.dropping > 0
            && self
                .tables
                .chunks
                .iter()
                .any(|c| c.entry.state == ChunkState::Dropping && c.entry.chunk == chunk);
        if dropped || incarnation > Some(chunk.incarnation) {
            self.refuse(i, Status::NoChunk, out);
            return;
        }
        if !self.tables.has_room() {
            self.refuse(i, Status::NoSpace, out);
            return;
        }
        if !self.make_room(2 * ENTRY_MAX, out) {
            self.ops.push(&mut self.journal_wait, i);
            return;
        }
        if let Some(old) = present {
            self.drop_chunk(old);
        }
        let place = self.tables.create(chunk).expect("room was found above");
        let need = self.journal_chunk(place);
        self.wait_flush(i, need, Step::LastFlush);
    }

    pub(super) fn begin_drop(&mut self, i: u32, out: &mut Vec<Effect>) {
        let Some(Request::DropChunk(chunk)) = self.ops[i].request else {
            unreachable!()
        };
        let present = self
            .tables
            .chunk(chunk.key)
            .filter(|&p| self.tables.chunks[p as usize].entry.chunk.incarnation <= chunk.incarnation);
        let need = match present {
            None => self.journal_end(),
            Some(place) => {
                if !self.make_room(ENTRY_MAX, out) {
                    self.ops.push(&mut self.journal_wait, i);
                    return;
                }
                self.drop_chunk(place)
            }
        };
        self.wait_flush(i, need, Step::LastFlush);
    }

    /// The chunk is served no more; the background frees its extents. Room in the journal was made.
    fn drop_chunk(&mut self, place: u32) -> u64 {
        self.tables.begin_drop(place);
        let chunk = &mut self.tables.chunks[place as usize];
        chunk.free_cursor = 0;
        self.counters.dropping += 1;
        self.free_work = true;
        let need = self.journal_chunk(place);
        self.tables.chunks[place as usize].mark_need = need;
        need
    }

    /// What the journal must complete so that everything in it so far is written.
    pub(super) fn journal_end(&self) -> u64 {
        self.journal.next + u64::from(self.journal.pending())
    }

    /// Zeroes what is not valid of the region's extents, flushes, and ends the doubt. A crash may have left data there
    /// whose record it took: without the zeroes a later crash that takes the data of another write could bring it back,
    /// after zeros were read in its place.
    pub(super) fn begin_settle(&mut self, i: u32, out: &mut Vec<Effect>) {
        let Some(Request::Settle { chunk, region }) = self.ops[i].request else {
            unreachable!()
        };
        let place = self.ops[i].place;
        if !self.alive(place, &chunk) {
            self.refuse(i, Status::NoChunk, out);
            return;
        }
        if self.tables.chunks[place as usize].entry.in_doubt >> region & 1 == 0 {
            self.end(i, Reply::Done, out);
            return;
        }
        if self.ops[i].step != Step::FreeJournal {
            while usize::from(self.ops[i].cursor) < EXTENTS_PER_REGION {
                let extent = u16::from(region) * EXTENTS_PER_REGION as u16 + u16::from(self.ops[i].cursor);
                if !self.zero_holes(i, &chunk, extent, out) {
                    return;
                }
                self.settled_extent(i);
            }
            if self.ops[i].holes != 0 {
                return self.wait_flush(i, 0, Step::ZeroFlush);
            }
        }
        if !self.make_room(ENTRY_MAX, out) {
            self.ops.push(&mut self.journal_wait, i);
            return;
        }
        let entry = &mut self.tables.chunks[place as usize].entry;
        entry.in_doubt &= !(1 << region);
        entry.suspect &= entry.in_doubt != 0;
        let need = self.journal_chunk(place);
        self.ops[i].step = Step::Under;
        self.ops[i].journaling = true;
        self.ops.push(self.journal.waiters(need), i);
    }

    /// One extent of a settling, which holds the extent meanwhile. False: the operation was parked or has ended.
    fn zero_holes(&mut self, i: u32, chunk: &ChunkRef, extent: u16, out: &mut Vec<Effect>) -> bool {
        let place = self.ops[i].place;
        if !self.ops[i].bucketed && !self.ops.order(i, place, extent, BlockMask::MAX, true) {
            self.ops[i].step = Step::Ordered;
            return false;
        }
        let map = self.tables.chunks[place as usize]
            .map
            .as_ref()
            .expect("a live chunk has a map");
        let slot = map[usize::from(extent)];
        if slot == ABSENT {
            return true;
        }
        let slot = slot & !EMPTY;
        let Some(frame) = self.find_page(i, slot, out) else {
            return false;
        };
        let Some(record) = self.extent_record(frame, slot, chunk, extent) else {
            self.fail(Failure::MetadataRead, out);
            return false;
        };
        let holes = !record.image.valid;
        if holes == 0 {
            return true;
        }
        self.ops[i].holes |= holes;
        self.ops[i].step = Step::Zeroing;
        runs(holes, |first, count| self.zero_data(i, slot, first, count, out));
        false
    }

    /// Lets the extent go, for the next one.
    fn settled_extent(&mut self, i: u32) {
        self.ops.leave(i, &mut self.ready);
        self.ops[i].cursor += 1;
    }

    /// The holes of an extent are zero.
    pub(super) fn holes_zeroed(&mut self, i: u32) {
        self.settled_extent(i);
        self.ops[i].step = Step::Begin;
        self.ops.push(&mut self.ready, i);
    }
}
