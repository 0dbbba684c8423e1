//! Reading blocks: the record names what is there, the device's bytes are checked against it.

use super::ops::Step;
use super::tables::{ABSENT, EMPTY};
use super::write::runs;
use super::{Effect, Failure, Kind, Store, token};
use crate::disk::{Completion, Io};
use crate::ids::BLOCK;
use crate::planted::{self, Bug};
use crate::replica::{Reply, Request, Status};

impl Store {
    #[inline]
    pub(super) fn begin_read(&mut self, i: u32, out: &mut Vec<Effect>) {
        let Some(Request::Read { span, data, .. }) = self.ops[i].request else {
            unreachable!()
        };
        let place = self.ops[i].place;
        if !self.alive(place, &span.chunk) {
            self.refuse(i, Status::NoChunk, out);
            return;
        }
        let map = self.tables.chunks[place as usize]
            .map
            .as_ref()
            .expect("a live chunk has a map");
        let slot = map[usize::from(span.extent)];
        let (mut valid, mut lost) = (0, 0);
        if slot != ABSENT {
            let slot = slot & !EMPTY;
            let Some(frame) = self.find_page(i, slot, out) else {
                return;
            };
            let Some(record) = self.extent_record(frame, slot, &span.chunk, span.extent) else {
                return self.fail(Failure::MetadataRead, out);
            };
            (valid, lost) = (record.image.valid, record.image.lost);
            self.ops[i].expected = record.image.crcs;
        }
        self.counters.reads += 1;
        let mask = span.mask();
        let (valid, lost) = (valid & mask, lost & mask);
        let missing = mask & !valid & !lost;
        let unknown = if self.unknown(place, span.extent) {
            missing
        } else {
            0
        };
        let op = &mut self.ops[i];
        op.step = Step::Under;
        op.holes = missing & !unknown;
        op.bad = lost | unknown;
        op.lost = lost;
        op.slot = slot & !EMPTY;
        if valid == 0 {
            self.end_read(i, out);
            return;
        }
        let slot = op.slot;
        runs(valid, |first, count| {
            self.ops[i].ios += 1;
            out.push(Effect::Io {
                token: token(Kind::Data, 0, first, count, i),
                io: Io::Read {
                    offset: self.layout.block_at(slot, first),
                    len: u32::from(count) * BLOCK as u32,
                    data: data.advance(usize::from(first - span.first) * BLOCK),
                    crcs: true,
                },
            });
        });
    }

    /// A run of blocks was read, or was not: then they are read one by one.
    #[inline]
    pub(super) fn read_completed(
        &mut self,
        i: u32,
        first: u8,
        count: u8,
        completion: &Completion,
        out: &mut Vec<Effect>,
    ) {
        let Some(Request::Read { span, data, .. }) = self.ops[i].request else {
            unreachable!()
        };
        if completion.result.is_ok() {
            let trusting = planted::on(Bug::IgnoreInDoubt) && self.in_doubt(self.ops[i].place, span.extent);
            let op = &mut self.ops[i];
            for k in 0..count {
                let b = usize::from(first + k);
                op.found[b] = completion.crcs[usize::from(k)];
                if op.found[b] != op.expected[b] && !trusting {
                    op.bad |= 1 << b;
                    self.counters.mismatches += 1;
                }
            }
        } else if count == 1 {
            self.counters.read_errors += 1;
            self.ops[i].bad |= 1 << first;
        } else {
            let slot = self.ops[i].slot;
            for b in first..first + count {
                self.ops[i].ios += 1;
                out.push(Effect::Io {
                    token: token(Kind::Data, 0, b, 1, i),
                    io: Io::Read {
                        offset: self.layout.block_at(slot, b),
                        len: BLOCK as u32,
                        data: data.advance(usize::from(b - span.first) * BLOCK),
                        crcs: true,
                    },
                });
            }
        }
        if self.ops[i].ios == 0 {
            self.end_read(i, out);
        }
    }
    #[inline]
    pub(super) fn end_read(&mut self, i: u32, out: &mut Vec<Effect>) {
        let op = &self.ops[i];
        let reply = Reply::Read {
            holes: op.holes,
            bad: op.bad,
            lost: op.lost,
            crcs: op.found,
        };
        self.end(i, reply, out);
    }

    /// The region of an extent is in doubt.
    pub(super) fn in_doubt(&self, place: u32, extent: u16) -> bool {
        let entry = &self.tables.chunks[place as usize].entry;
        entry.in_doubt >> (usize::from(extent) / crate::ids::EXTENTS_PER_REGION) & 1 == 1
    }
}
