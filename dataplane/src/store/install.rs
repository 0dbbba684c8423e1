//! Making an extent exactly what the owner says: resync, repair, adoption.

use super::codec::Record;
use super::ops::Step;
use super::write::{Found, runs};
use super::{Effect, Failure, Store};
use crate::ids::BLOCK;
use crate::replica::{Request, Status};

impl Store {
    pub(super) fn begin_install(&mut self, i: u32, out: &mut Vec<Effect>) {
        let Some(Request::Install {
            chunk,
            extent,
            image,
            write,
            data,
        }) = self.ops[i].request
        else {
            unreachable!()
        };
        if self.ops[i].step == Step::FreeJournal {
            return self.journal_freeing(i, out);
        }
        let remove = image.version.0 == 0;
        let Found::Here((slot, frame)) = self.prepare_change(i, &chunk, extent, !remove, out) else {
            return;
        };
        let Some(mut record) = self.extent_record(frame, slot, &chunk, extent) else {
            return self.fail(Failure::MetadataRead, out);
        };
        if remove {
            self.ops[i].slot = slot;
            return self.begin_zeroing(i, out);
        }
        let kept = image.valid & !write;
        let mut agree = kept & !record.image.valid == 0;
        runs(kept, |first, count| {
            for b in usize::from(first)..usize::from(first + count) {
                agree &= record.image.crcs[b] == image.crcs[b];
            }
        });
        if !agree {
            self.undo_slot(i, frame, slot);
            self.refuse(i, Status::Invalid, out);
            return;
        }
        record.image = image;
        for b in 0..16 {
            if image.valid >> b & 1 == 0 {
                record.image.crcs[b] = 0;
            }
        }
        self.counters.installs += 1;
        let need = self.change_record(i, frame, slot, Record::Extent(record));
        self.wait_journal(i, need);
        runs(write, |first, count| {
            self.write_data(
                i,
                slot,
                first,
                count,
                data.advance(usize::from(first) * BLOCK),
                out,
            );
        });
        // What is not valid may hold anything; it must be zero before it can be valid again.
        runs(!image.valid, |first, count| {
            self.zero_data(i, slot, first, count, out)
        });
    }

    /// Gives back a slot that was taken for a change which was then refused, unless another one waits to use it.
    fn undo_slot(&mut self, i: u32, frame: u32, slot: u32) {
        if self.record(frame, slot) == Record::Free {
            let (place, extent) = (self.ops[i].place, self.ops[i].extent);
            let map = self.tables.chunks[place as usize]
                .map
                .as_mut()
                .expect("a live chunk has a map");
            map[usize::from(extent)] = super::tables::ABSENT;
            self.slots.give(slot);
        }
    }
}
