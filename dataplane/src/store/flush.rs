//! Device flushes, shared by all who wait: guests, dirty marks, freed slots, seals, the checkpoint.
//!
//! Who needs journal blocks flushed waits first until they have been written. One flush is under way at a time; whoever
//! comes meanwhile is covered by the next.

use super::ops::{List, Step};
use super::{Effect, Kind, Store, token};
use crate::disk::Io;
use crate::replica::Reply;

/// Who waits for a flush.
#[derive(Debug)]
pub(super) struct Flusher {
    /// Wait for journal blocks, in order.
    pending: List,
    /// Wait for the next flush.
    ready: List,
    /// Wait for the one under way.
    covered: List,
    pub(super) in_flight: bool,
    /// Journal blocks that were complete when it was sent.
    reach: u64,
    /// The checkpoint waits: for the journal to reach this, then for a flush.
    pub(super) checkpoint: Option<u64>,
    checkpoint_covered: bool,
    /// Chunks that may be marked clean after the next flush, with the count of their writes.
    pub(super) cleaning: Vec<(u32, u64)>,
    /// The same, after the one under way.
    pub(super) cleaning_covered: Vec<(u32, u64)>,
}

impl Flusher {
    pub(super) fn new() -> Self {
        Flusher {
            pending: List::EMPTY,
            ready: List::EMPTY,
            covered: List::EMPTY,
            in_flight: false,
            reach: 0,
            checkpoint: None,
            checkpoint_covered: false,
            cleaning: Vec::with_capacity(super::background::CLEANING_MAX),
            cleaning_covered: Vec::with_capacity(super::background::CLEANING_MAX),
        }
    }

    pub(super) fn forget(&mut self) {
        (self.pending, self.ready, self.covered) = (List::EMPTY, List::EMPTY, List::EMPTY);
    }
}

impl Store {
    pub(super) fn begin_flush(&mut self, i: u32) {
        self.counters.flushes += 1;
        self.wait_flush(i, 0, Step::LastFlush);
    }

    /// Parks an operation until the journal before `need` and everything completed by then are durable. It goes on at
    /// `step`.
    pub(super) fn wait_flush(&mut self, i: u32, need: u64, step: Step) {
        self.ops[i].step = step;
        self.ops[i].need = need;
        if need <= self.journal.complete {
            self.ops.push(&mut self.flusher.ready, i);
        } else {
            self.ops.push(&mut self.flusher.pending, i);
        }
    }

    /// The journal got on: who waited for it can be flushed.
    pub(super) fn ready_flush(&mut self) {
        while let Some(i) = self.ops.pop(&mut self.flusher.pending) {
            if self.ops[i].need > self.journal.complete {
                // Back to the front.
                let mut rest = self.flusher.pending;
                let mut list = List::EMPTY;
                self.ops.push(&mut list, i);
                self.ops.append(&mut list, &mut rest);
                self.flusher.pending = list;
                break;
            }
            self.ops.push(&mut self.flusher.ready, i);
        }
    }

    /// Sends a flush if someone waits for one and none is under way.
    pub(super) fn send_flush(&mut self, out: &mut Vec<Effect>) {
        let checkpoint = self
            .flusher
            .checkpoint
            .is_some_and(|need| need <= self.journal.complete);
        let wanted = checkpoint || !self.flusher.ready.is_empty() || !self.flusher.cleaning.is_empty();
        if self.flusher.in_flight || !wanted {
            return;
        }
        self.flusher.covered = self.flusher.ready;
        self.flusher.ready = List::EMPTY;
        self.flusher.checkpoint_covered = checkpoint;
        std::mem::swap(&mut self.flusher.cleaning, &mut self.flusher.cleaning_covered);
        self.flusher.in_flight = true;
        self.flusher.reach = self.journal.complete;
        self.counters.device_flushes += 1;
        out.push(Effect::Io {
            token: token(Kind::Flush, 0, 0, 0, 0),
            io: Io::Flush,
        });
    }

    /// The flush succeeded.
    pub(super) fn flushed(&mut self, out: &mut Vec<Effect>) {
        self.flusher.in_flight = false;
        self.journal.durable = self.journal.durable.max(self.flusher.reach);
        let mut covered = self.flusher.covered;
        self.flusher.covered = List::EMPTY;
        while let Some(i) = self.ops.pop(&mut covered) {
            match self.ops[i].step {
                // A window to take a slot from, or a dirty mark: then it counts as a writer, so that no clean mark
                // can have come between.
                Step::Begin => {
                    if self.ops[i].writing {
                        let region = usize::from(self.ops[i].extent) / crate::ids::EXTENTS_PER_REGION;
                        self.tables.chunks[self.ops[i].place as usize].marked |= 1 << region;
                    }
                    self.ops.push(&mut self.ready, i);
                }
                Step::ZeroFlush => {
                    self.ops[i].step = Step::FreeJournal;
                    self.ops.push(&mut self.ready, i);
                }
                Step::FreeFlush => self.freed(i, out),
                Step::LastFlush => self.last_flush(i, out),
                Step::Ordered | Step::Under | Step::Zeroing | Step::FreeJournal => unreachable!(),
            }
        }
        if self.flusher.checkpoint_covered {
            self.flusher.checkpoint_covered = false;
            self.flusher.checkpoint = None;
            self.checkpoint_flushed(out);
        }
        self.cleaning_flushed(out);
    }

    fn last_flush(&mut self, i: u32, out: &mut Vec<Effect>) {
        if let Some(crate::replica::Request::Seal) = self.ops[i].request {
            self.seal_durable(i, out);
        } else {
            self.end(i, Reply::Done, out);
        }
    }
}
