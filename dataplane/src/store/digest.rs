//! What a region holds: the records of its extents, and where asked or in doubt what the device really returns.
//!
//! Not ordered with other operations: the owner holds its range lock where it needs a stable picture.

use super::ops::Step;
use super::tables::{ABSENT, EMPTY};
use super::write::runs;
use super::{Effect, Failure, Kind, Store, token};
use crate::disk::{Completion, Io};
use crate::ids::{BLOCK, EXTENTS_PER_REGION};
use crate::replica::{ExtentDigest, Reply, Request, Status};

impl Store {
    pub(super) fn go_on_digest(&mut self, i: u32, out: &mut Vec<Effect>) {
        let Some(Request::Digest {
            chunk,
            region,
            verify,
        }) = self.ops[i].request
        else {
            unreachable!()
        };
        let place = self.ops[i].place;
        if !self.alive(place, &chunk) {
            if self.ops[i].ios == 0 {
                self.refuse(i, Status::NoChunk, out);
            } else {
                self.ops[i].failed = Some(Status::NoChunk);
                self.ops[i].step = Step::Under;
            }
            return;
        }
        let first_extent = u16::from(region) * EXTENTS_PER_REGION as u16;
        if self.ops[i].digest.is_none() {
            self.ops[i].digest = Some(Box::new([ExtentDigest::default(); EXTENTS_PER_REGION]));
            self.ops[i].in_doubt = self.in_doubt(place, first_extent);
            self.counters.digests += 1;
        }
        let verify = verify || self.ops[i].in_doubt;
        while usize::from(self.ops[i].cursor) < EXTENTS_PER_REGION {
            let n = self.ops[i].cursor;
            let extent = first_extent + u16::from(n);
            let map = self.tables.chunks[place as usize]
                .map
                .as_ref()
                .expect("a live chunk has a map");
            let mut slot = map[usize::from(extent)];
            let mut digest = ExtentDigest::default();
            if slot != ABSENT {
                slot &= !EMPTY;
                let Some(frame) = self.find_page(i, slot, out) else {
                    return;
                };
                let Some(record) = self.extent_record(frame, slot, &chunk, extent) else {
                    return self.fail(Failure::MetadataRead, out);
                };
                digest.image = record.image;
            }
            if self.unknown(place, extent) {
                digest.bad = !digest.image.valid & !digest.image.lost;
                digest.unreadable = digest.bad;
            }
            let valid = digest.image.valid;
            self.ops[i].digest.as_mut().expect("made above")[usize::from(n)] = digest;
            self.ops[i].cursor += 1;
            if verify {
                runs(valid, |first, count| self.verify(i, slot, n, first, count, out));
            }
        }
        self.ops[i].step = Step::Under;
        self.end_digest(i, out);
    }

    fn verify(&mut self, i: u32, slot: u32, n: u8, first: u8, count: u8, out: &mut Vec<Effect>) {
        self.ops[i].ios += 1;
        out.push(Effect::Io {
            token: token(Kind::Verify, n, first, count, i),
            io: Io::Verify {
                offset: self.layout.block_at(slot, first),
                len: u32::from(count) * BLOCK as u32,
            },
        });
    }

    /// A run of blocks was read for its checksums, or was not: then the blocks are read one by one.
    pub(super) fn verify_completed(
        &mut self,
        i: u32,
        n: u8,
        first: u8,
        count: u8,
        completion: &Completion,
        out: &mut Vec<Effect>,
    ) {
        let Some(Request::Digest { region, .. }) = self.ops[i].request else {
            unreachable!()
        };
        let digest = &mut self.ops[i].digest.as_mut().expect("made before its first read")[usize::from(n)];
        if completion.result.is_ok() {
            for k in 0..count {
                let b = usize::from(first + k);
                let found = completion.crcs[usize::from(k)];
                if found != digest.image.crcs[b] {
                    digest.bad |= 1 << b;
                    digest.found[b] = found;
                    self.counters.mismatches += 1;
                }
            }
        } else if count == 1 {
            digest.bad |= 1 << first;
            digest.unreadable |= 1 << first;
            self.counters.read_errors += 1;
        } else {
            let extent = usize::from(region) * EXTENTS_PER_REGION + usize::from(n);
            let place = self.ops[i].place as usize;
            let slot = self.tables.chunks[place]
                .map
                .as_ref()
                .map_or(ABSENT, |map| map[extent]);
            if slot == ABSENT {
                self.ops[i].failed = Some(Status::NoChunk);
            } else {
                for b in first..first + count {
                    self.verify(i, slot & !EMPTY, n, b, 1, out);
                }
            }
        }
        self.end_digest(i, out);
    }

    fn end_digest(&mut self, i: u32, out: &mut Vec<Effect>) {
        if self.ops[i].ios > 0 || self.ops[i].step != Step::Under {
            return;
        }
        let Some(Request::Digest { chunk, .. }) = self.ops[i].request else {
            unreachable!()
        };
        if self.ops[i].failed.is_some() || !self.alive(self.ops[i].place, &chunk) {
            self.refuse(i, Status::NoChunk, out);
            return;
        }
        let extents = self.ops[i].digest.take().expect("made at the start");
        let reply = Reply::Digest {
            in_doubt: self.ops[i].in_doubt,
            extents,
        };
        self.end(i, reply, out);
    }
}
