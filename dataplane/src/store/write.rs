//! Changing blocks: write and zero, and the steps that every change of an extent shares.
//!
//! In order: the chunk is still here, the extent has a slot, its region is marked dirty durably, its record page is in
//! memory, the journal has room. Each step that has to wait parks the operation, which then begins anew. When all are
//! met the record changes in memory and in the open batch, and the data goes out beside it.

use super::cache::Held;
use super::codec::{ENTRY_MAX, Entry, ExtentRecord, RECORD, RECORDS_PER_PAGE, Record};
use super::ops::Step;
use super::tables::{ABSENT, EMPTY};
use super::window::Taken;
use super::{Effect, Failure, Kind, Store, token};
use crate::disk::Io;
use crate::ids::{BLOCK, EXTENTS_PER_REGION, Version};
use crate::planted::{self, Bug};
use crate::replica::{ChunkRef, ExtentImage, Request, Status};

/// What a step found.
pub(super) enum Found<T> {
    /// Go on.
    Here(T),
    /// The operation was parked or has ended.
    Later,
}

impl Store {
    #[inline]
    pub(super) fn begin_write(&mut self, i: u32, out: &mut Vec<Effect>) {
        let Some(Request::Write {
            span,
            version,
            crcs,
            data,
        }) = self.ops[i].request
        else {
            unreachable!()
        };
        let Found::Here((slot, frame)) = self.prepare_change(i, &span.chunk, span.extent, true, out) else {
            return;
        };
        let mask = span.mask();
        let Some(mut record) = self.extent_record(frame, slot, &span.chunk, span.extent) else {
            return self.fail(Failure::MetadataRead, out);
        };
        let image = &mut record.image;
        image.version = image.version.max(version);
        image.valid |= mask;
        image.zero &= !mask;
        image.lost &= !mask;
        let blocks = usize::from(span.first)..usize::from(span.first + span.count);
        image.crcs[blocks.clone()].copy_from_slice(&crcs[blocks]);
        self.counters.writes += 1;
        let need = self.change_record(i, frame, slot, Record::Extent(record));
        self.wait_journal(i, need);
        self.write_data(i, slot, span.first, span.count, data, out);
    }

    #[inline]
    pub(super) fn begin_zero(&mut self, i: u32, out: &mut Vec<Effect>) {
        let Some(Request::Zero { span, version }) = self.ops[i].request else {
            unreachable!()
        };
        // An extent that is not there is zero already, unless it is unknown what was there.
        let place = self.ops[i].place;
        let unknown = self.unknown(place, span.extent);
        let Found::Here((slot, frame)) = self.prepare_change(i, &span.chunk, span.extent, unknown, out)
        else {
            return;
        };
        let mask = span.mask();
        let Some(mut record) = self.extent_record(frame, slot, &span.chunk, span.extent) else {
            return self.fail(Failure::MetadataRead, out);
        };
        let image = &mut record.image;
        image.version = image.version.max(version);
        image.valid &= !mask;
        image.lost &= !mask;
        image.zero |= mask;
        image.crcs[usize::from(span.first)..usize::from(span.first + span.count)].fill(0);
        self.counters.zeroes += 1;
        let need = self.change_record(i, frame, slot, Record::Extent(record));
        self.wait_journal(i, need);
        self.zero_data(i, slot, span.first, span.count, out);
    }

    /// The steps before a change. With `create` an absent extent gets a slot, without it the operation is done.
    #[inline]
    pub(super) fn prepare_change(
        &mut self,
        i: u32,
        chunk: &ChunkRef,
        extent: u16,
        create: bool,
        out: &mut Vec<Effect>,
    ) -> Found<(u32, u32)> {
        let place = self.ops[i].place;
        if !self.alive(place, chunk) {
            self.refuse(i, Status::NoChunk, out);
            return Found::Later;
        }
        let map = self.tables.chunks[place as usize]
            .map
            .as_ref()
            .expect("a live chunk has a map");
        let mut slot = map[usize::from(extent)];
        if slot == ABSENT {
            if !create {
                self.end(i, crate::replica::Reply::Done, out);
                return Found::Later;
            }
            slot = match self.take_slot(out) {
                Taken::Slot(slot) => slot,
                Taken::Full => {
                    self.refuse(i, Status::NoSpace, out);
                    return Found::Later;
                }
                Taken::Wait(need) => {
                    self.wait_flush(i, need, Step::Begin);
                    return Found::Later;
                }
                Taken::NoRoom => {
                    self.ops.push(&mut self.journal_wait, i);
                    return Found::Later;
                }
            };
            let map = self.tables.chunks[place as usize]
                .map
                .as_mut()
                .expect("a live chunk has a map");
            map[usize::from(extent)] = slot;
        }
        slot &= !EMPTY;
        let version = match self.ops[i].request {
            Some(Request::Write { version, .. } | Request::Zero { version, .. }) => version,
            Some(Request::Install { image, .. }) => image.version,
            _ => Version::ZERO,
        };
        let state = &mut self.tables.chunks[place as usize];
        if !self.ops[i].writing {
            self.ops[i].writing = true;
            state.writers += 1;
            state.writes += 1;
            state.newest = state.newest.max(version);
        }
        let region = 1u64 << (usize::from(extent) / EXTENTS_PER_REGION);
        if state.marked & region == 0 && !planted::on(Bug::SkipDirtyMark) {
            self.mark_region(i, place, region, out);
            return Found::Later;
        }
        let Some(frame) = self.find_page(i, slot, out) else {
            return Found::Later;
        };
        if !self.make_room(ENTRY_MAX, out) {
            self.ops.push(&mut self.journal_wait, i);
            return Found::Later;
        }
        if !self.windows.counts(slot, self.journal.durable) && self.record(frame, slot) == Record::Free {
            // Its window was replaced while the operation waited; nothing was written to it.
            let map = self.tables.chunks[place as usize]
                .map
                .as_mut()
                .expect("a live chunk has a map");
            map[usize::from(extent)] = ABSENT;
            self.slots.give(slot);
            return self.prepare_change(i, chunk, extent, create, out);
        }
        Found::Here((slot, frame))
    }

    /// Marks a region dirty and parks the operation until that is durable.
    fn mark_region(&mut self, i: u32, place: u32, region: u64, out: &mut Vec<Effect>) {
        let chunk = &mut self.tables.chunks[place as usize];
        if chunk.entry.dirty & region == 0 {
            if !self.make_room(ENTRY_MAX, out) {
                self.ops.push(&mut self.journal_wait, i);
                return;
            }
            self.tables.chunks[place as usize].entry.dirty |= region;
            let need = self.journal_chunk(place);
            self.tables.chunks[place as usize].mark_need = need;
            self.counters.marks += 1;
        }
        let need = self.tables.chunks[place as usize].mark_need;
        self.wait_flush(i, need, Step::Begin);
    }

    /// The frame of a slot's record page. `None`: it is being read, the operation was parked.
    #[inline]
    pub(super) fn find_page(&mut self, i: u32, slot: u32, out: &mut Vec<Effect>) -> Option<u32> {
        let page = slot / RECORDS_PER_PAGE as u32;
        if let Some(frame) = self.cache.find(page) {
            if self.cache.frames[frame as usize].held == Held::Page {
                self.cache.hits += 1;
                return Some(frame);
            }
            self.ops.push(&mut self.cache.frames[frame as usize].waiters, i);
            return None;
        }
        let Some(frame) = self.cache.assign(page) else {
            self.ops.push(&mut self.frame_wait, i);
            return None;
        };
        self.ops.push(&mut self.cache.frames[frame as usize].waiters, i);
        self.counters.loading += 1;
        out.push(Effect::Io {
            token: token(Kind::Page, 0, 0, 0, frame),
            io: Io::Read {
                offset: self.layout.page_at(page),
                len: BLOCK as u32,
                data: self.arena.payload(frame as usize),
                crcs: false,
            },
        });
        None
    }

    /// What a loaded page says of a slot.
    #[inline]
    pub(super) fn record(&self, frame: u32, slot: u32) -> Record {
        let at = slot as usize % RECORDS_PER_PAGE * RECORD;
        let bytes: &[u8; RECORD] = self.arena.bytes(frame as usize, 1)[at..at + RECORD]
            .try_into()
            .expect("a record");
        Record::decode_trusted(bytes).expect("pages are checked when they are loaded")
    }

    /// The record of an extent that has this slot, or an empty one. `None`: the page is not what was written.
    #[inline]
    pub(super) fn extent_record(
        &self,
        frame: u32,
        slot: u32,
        chunk: &ChunkRef,
        extent: u16,
    ) -> Option<ExtentRecord> {
        match self.record(frame, slot) {
            Record::Free => Some(ExtentRecord {
                chunk: *chunk,
                extent,
                image: ExtentImage::default(),
            }),
            // Another extent's: the device lost a write of this page, or returned an old one.
            Record::Extent(record) => (record.chunk == *chunk && record.extent == extent).then_some(record),
            Record::Quarantined => None,
        }
    }

    /// Changes a slot's record in memory and in the journal, where room was made.
    #[inline]
    pub(super) fn change_record(&mut self, i: u32, frame: u32, slot: u32, record: Record) -> u64 {
        let (place, extent) = (self.ops[i].place, usize::from(self.ops[i].extent));
        let at = slot as usize % RECORDS_PER_PAGE * RECORD;
        let was_free = super::codec::get_u16(self.arena.bytes(frame as usize, 1), at) == 0;
        let mut bytes = [0; RECORD];
        record.encode(&self.seed, slot, &mut bytes);
        self.arena.bytes_mut(frame as usize, 1)[at..at + RECORD].copy_from_slice(&bytes);
        self.cache.soil(frame);
        let chunk = &mut self.tables.chunks[place as usize];
        let map = chunk.map.as_mut().expect("a chunk with extents has a map");
        let was_empty = map[extent] & EMPTY != 0;
        let empty = match record {
            Record::Extent(r) => r.image.valid | r.image.lost == 0,
            Record::Free | Record::Quarantined => false,
        };
        chunk.entry.extents += u32::from(was_free);
        chunk.empties += u32::from(empty);
        chunk.empties -= u32::from(was_empty);
        if record == Record::Free {
            chunk.entry.extents -= 1;
            map[extent] = ABSENT;
        } else {
            map[extent] = if empty { slot | EMPTY } else { slot };
        }
        let extents = chunk.entry.extents;
        self.journal.append(
            &mut self.arena,
            &Entry::Record {
                slot,
                chunk: place,
                extents,
                bytes: &bytes,
            },
        )
    }

    /// The operation ends no sooner than its journal block.
    #[inline]
    pub(super) fn wait_journal(&mut self, i: u32, need: u64) {
        self.ops[i].step = Step::Under;
        if planted::on(Bug::AckBeforeJournal) {
            return;
        }
        self.ops[i].journaling = true;
        self.ops.push(self.journal.waiters(need), i);
    }

    /// Sends blocks to a slot.
    #[inline]
    pub(super) fn write_data(
        &mut self,
        i: u32,
        slot: u32,
        first: u8,
        count: u8,
        data: crate::memory::Payload,
        out: &mut Vec<Effect>,
    ) {
        self.ops[i].ios += 1;
        self.counters.data_writes += 1;
        out.push(Effect::Io {
            token: token(Kind::Data, 0, first, count, i),
            io: Io::Write {
                offset: self.layout.block_at(slot, first),
                len: u32::from(count) * BLOCK as u32,
                data,
            },
        });
    }

    /// Zeroes blocks of a slot.
    pub(super) fn zero_data(&mut self, i: u32, slot: u32, first: u8, count: u8, out: &mut Vec<Effect>) {
        self.ops[i].ios += 1;
        out.push(Effect::Io {
            token: token(Kind::Data, 0, first, count, i),
            io: Io::WriteZeroes {
                offset: self.layout.block_at(slot, first),
                len: u32::from(count) * BLOCK as u32,
            },
        });
    }

    /// It is not known what the blocks of an extent without a valid copy here held: damage was found, and the region was
    /// not settled since.
    #[inline]
    pub(super) fn unknown(&self, place: u32, extent: u16) -> bool {
        let entry = &self.tables.chunks[place as usize].entry;
        entry.suspect && entry.in_doubt >> (usize::from(extent) / EXTENTS_PER_REGION) & 1 == 1
    }
}

/// Calls `visit(first, count)` for each run of a mask.
#[inline]
pub(super) fn runs(mut mask: u16, mut visit: impl FnMut(u8, u8)) {
    while mask != 0 {
        let first = mask.trailing_zeros();
        let count = (mask >> first).trailing_ones();
        visit(first as u8, count as u8);
        mask &= !crate::ids::block_mask(first as u8, count as u8);
    }
}
