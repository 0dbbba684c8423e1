//! The journal being written: the open batch, blocks on their way, and how far the chain is complete and durable.
//!
//! Numbers: `next` is the sequence of the open block; every block before `complete` has been written, every block before
//! `durable` has been flushed, every block before `tail` may be overwritten.
//! Invariant: `tail <= durable <= complete <= next` (the tail moves only to what a flush covered), `next - tail <= ring`.

use super::codec::{BlockHeader, Entry, JOURNAL_HEADER, Seed};
use super::ops::List;
use crate::ids::BLOCK;
use crate::memory::Arena;

/// Block buffers, and with them blocks that are not complete, the open one included.
pub(super) const BUFFERS: usize = 32;
/// Blocks on their way beyond which a batch that is not full waits, so that batches grow under load.
pub(super) const IN_FLIGHT_NORMAL: usize = 2;
/// Blocks on their way beyond which even full ones wait.
pub(super) const IN_FLIGHT_MAX: usize = 16;

/// State of the journal.
#[derive(Debug)]
pub(super) struct Journal {
    first_page: usize,
    ring: u64,
    pub(super) tail: u64,
    pub(super) next: u64,
    pub(super) complete: u64,
    pub(super) durable: u64,
    pub(super) in_flight: usize,
    boot: u128,
    last_hash: [u8; 32],
    used: usize,
    count: u32,
    done: [bool; BUFFERS],
    waiters: [List; BUFFERS],
}

impl Journal {
    /// An empty chain that begins with block `sequence`; the buffers are the arena's pages from `first_page`.
    pub(super) fn new(first_page: usize, ring: u64, sequence: u64, boot: u128, last_hash: [u8; 32]) -> Self {
        Journal {
            first_page,
            ring,
            tail: sequence,
            next: sequence,
            complete: sequence,
            durable: sequence,
            in_flight: 0,
            boot,
            last_hash,
            used: JOURNAL_HEADER,
            count: 0,
            done: [false; BUFFERS],
            waiters: [List::EMPTY; BUFFERS],
        }
    }

    /// The open batch holds something.
    #[inline]
    pub(super) fn pending(&self) -> bool {
        self.count > 0
    }

    /// Blocks of the ring that are in use or spoken for.
    pub(super) fn ring_used(&self) -> u64 {
        self.next - self.tail + u64::from(self.count > 0)
    }

    /// Blocks of the ring.
    pub(super) fn ring(&self) -> u64 {
        self.ring
    }

    /// The open block may be begun.
    #[inline]
    fn may_begin(&self, sequence: u64) -> bool {
        sequence - self.tail < self.ring && sequence - self.complete < BUFFERS as u64
    }

    /// What an append of `size` bytes needs first.
    #[inline]
    pub(super) fn room(&self, size: usize) -> Room {
        let fits = self.used + size <= BLOCK;
        if self.count == 0 {
            return if self.may_begin(self.next) {
                Room::Here
            } else {
                Room::None
            };
        }
        if fits {
            Room::Here
        } else if self.in_flight < IN_FLIGHT_MAX && self.may_begin(self.next + 1) {
            Room::AfterClose
        } else {
            Room::None
        }
    }

    /// Adds an entry, for which there is room here, to the open batch. Returns what `complete` must reach.
    #[inline]
    pub(super) fn append(&mut self, arena: &mut Arena, entry: &Entry<'_>) -> u64 {
        let size = entry.size();
        assert!(self.used + size <= BLOCK, "room was asked for");
        let page = self.page(self.next);
        entry.encode(&mut arena.bytes_mut(page, 1)[self.used..self.used + size]);
        self.used += size;
        self.count += 1;
        self.next + 1
    }

    /// The operations that wait for the block before `need`.
    #[inline]
    pub(super) fn waiters(&mut self, need: u64) -> &mut List {
        &mut self.waiters[((need - 1) % BUFFERS as u64) as usize]
    }

    /// Arena page of a block.
    #[inline]
    fn page(&self, sequence: u64) -> usize {
        self.first_page + (sequence % BUFFERS as u64) as usize
    }

    /// Completes the open batch. Returns its sequence and its arena page, to be written.
    #[inline]
    pub(super) fn close(&mut self, seed: &Seed, arena: &mut Arena) -> (u64, usize) {
        assert!(self.count > 0);
        let sequence = self.next;
        let page = self.page(sequence);
        let header = BlockHeader {
            used: self.used as u32,
            count: self.count,
            sequence,
            flushed: self.durable,
            boot: self.boot,
            previous: self.last_hash,
        };
        self.last_hash = header.seal(seed, arena.bytes_mut(page, 1));
        self.done[(sequence % BUFFERS as u64) as usize] = false;
        self.next += 1;
        self.used = JOURNAL_HEADER;
        self.count = 0;
        self.in_flight += 1;
        (sequence, page)
    }

    /// A block was written. Calls `ready` with the waiters of each block that the chain is now complete up to.
    #[inline]
    pub(super) fn written(&mut self, sequence: u64, mut ready: impl FnMut(&mut List)) {
        self.in_flight -= 1;
        self.done[(sequence % BUFFERS as u64) as usize] = true;
        while self.complete < self.next {
            let i = (self.complete % BUFFERS as u64) as usize;
            if !self.done[i] {
                break;
            }
            self.done[i] = false;
            self.complete += 1;
            ready(&mut self.waiters[i]);
        }
    }

    /// Where replay would have to begin if everything so far were in its place, and the hash before it.
    pub(super) fn position(&self) -> (u64, [u8; 32]) {
        assert!(self.count == 0);
        (self.next, self.last_hash)
    }

    /// Forgets all waiters: the disk has failed.
    pub(super) fn forget(&mut self) {
        self.waiters = [List::EMPTY; BUFFERS];
    }
}

/// Whether something can be appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Yes.
    Here,
    /// Once the open batch is closed.
    AfterClose,
    /// Not before a block completes or a checkpoint frees some.
    None,
}
