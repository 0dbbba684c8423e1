//! The way back: what the end of each I/O sets in motion.

use super::cache::Held;
use super::codec::{RECORD, RECORDS_PER_PAGE, Record};
use super::ops::{List, Step};
use super::{Effect, Failure, Kind, Store, journal};
use crate::disk::Completion;
use crate::replica::{Reply, Request, Status};

impl Store {
    #[inline]
    pub(super) fn complete(&mut self, completion: Completion, out: &mut Vec<Effect>) {
        let token = completion.token.0;
        let (extent, first, count) = ((token >> 48) as u8, (token >> 40) as u8, (token >> 32) as u8);
        let (kind, index, ok) = ((token >> 56) as u8, token as u32, completion.result.is_ok());
        if kind == Kind::Data as u8 || kind == Kind::Verify as u8 {
            self.ops[index].ios -= 1;
            if self.failed.is_some() {
                if self.ops[index].ios == 0 {
                    self.end(index, Reply::Refused(Status::DiskFailed), out);
                    self.ready = List::EMPTY;
                }
            } else if kind == Kind::Verify as u8 {
                self.verify_completed(index, extent, first, count, &completion, out);
            } else if let Some(Request::Read { .. }) = self.ops[index].request {
                self.read_completed(index, first, count, &completion, out);
            } else if !ok {
                self.fail(Failure::Data, out);
            } else {
                self.changed(index, out);
            }
        } else if kind == Kind::Journal as u8 {
            self.journal_completed(token & ((1 << 56) - 1), ok, out);
        } else if kind == Kind::Page as u8 {
            self.page_completed(index, ok, out);
        } else if kind == Kind::Flush as u8 {
            if !ok || self.failed.is_some() {
                self.flusher.in_flight = false;
                self.fail(Failure::Flush, out);
            } else if self.failed.is_none() {
                self.flushed(out);
            }
        } else {
            self.checkpoint_completed(kind, index, &completion, out);
        }
    }

    /// A part of a change is on the device: it is answered when all of it is, and its journal block.
    #[inline]
    fn changed(&mut self, i: u32, out: &mut Vec<Effect>) {
        let op = &self.ops[i];
        if op.ios > 0 || op.journaling {
            return;
        }
        match op.step {
            Step::Under => self.end(i, Reply::Done, out),
            Step::Zeroing if matches!(op.request, Some(Request::Settle { .. })) => self.holes_zeroed(i),
            Step::Zeroing => self.wait_flush(i, 0, Step::ZeroFlush),
            step => unreachable!("no data is on its way in {step:?}"),
        }
    }

    #[inline]
    fn journal_completed(&mut self, sequence: u64, ok: bool, out: &mut Vec<Effect>) {
        if !ok || self.failed.is_some() {
            self.journal.in_flight -= 1;
            self.fail(Failure::Journal, out);
            return;
        }
        let mut done = List::EMPTY;
        self.journal
            .written(sequence, |waiters| self.ops.append(&mut done, waiters));
        while let Some(i) = self.ops.pop(&mut done) {
            self.ops[i].journaling = false;
            self.changed(i, out);
        }
        self.ready_flush();
        self.ops.append(&mut self.ready, &mut self.journal_wait);
        if self.journal.pending() && self.journal.in_flight < journal::IN_FLIGHT_NORMAL {
            self.close_batch(out);
        }
    }

    fn page_completed(&mut self, frame: u32, ok: bool, out: &mut Vec<Effect>) {
        self.counters.loading -= 1;
        if self.failed.is_some() {
            return;
        }
        let page = self.cache.frames[frame as usize].page;
        let slots = self.layout.slots_of(page * RECORDS_PER_PAGE as u32);
        let good = ok
            && self
                .arena
                .bytes(frame as usize, 1)
                .chunks_exact(RECORD)
                .zip(slots)
                .all(|(bytes, slot)| Record::decode(&self.seed, slot, bytes).is_ok());
        if !good {
            // Which extents a damaged page held is only known by a scan: the disk ends, and comes back suspect.
            self.fail(Failure::MetadataRead, out);
            return;
        }
        let state = &mut self.cache.frames[frame as usize];
        state.held = Held::Page;
        self.ops.append(&mut self.ready, &mut state.waiters);
        self.ops.append(&mut self.ready, &mut self.frame_wait);
    }
}
