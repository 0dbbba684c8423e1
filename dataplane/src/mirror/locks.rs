//! The conflict queue: which pieces hold which blocks, and which wait.
//!
//! An open-addressing table keyed by (chunk, extent). An entry lists the pieces that hold blocks of the extent and those
//! that wait, in order of arrival. Writes hold their blocks alone, reads share: a write also waits for reads, so that a
//! read that meets a bad block can be repeated at another replica without a write in between.
//!
//! A region that is being made equal, or must be before its first use, holds everything back: pieces wait in the same
//! lists. A piece waits only for pieces that came before it, so there is no deadlock.

use crate::ids::{BlockMask, EXTENTS_PER_REGION, block_mask};
use crate::planted::{self, Bug};

use super::ops::{PieceKind, Stage};
use super::slab::NIL;
use super::{Mirror, Phase};

#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    /// Key plus one; zero: free.
    key: u64,
    active: u32,
    wait_head: u32,
    wait_tail: u32,
    writes: BlockMask,
    reads: BlockMask,
}

const FREE: Entry = Entry {
    key: 0,
    active: NIL,
    wait_head: NIL,
    wait_tail: NIL,
    writes: 0,
    reads: 0,
};

/// The table. At most half full; it doubles when that is passed and never shrinks.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Entry>,
    live: usize,
}

impl Table {
    #[inline]
    fn key(chunk: u32, extent: u16) -> u64 {
        (u64::from(chunk) << 16 | u64::from(extent)) + 1
    }

    #[inline]
    fn home(&self, key: u64) -> usize {
        (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize & (self.slots.len() - 1)
    }

    #[inline]
    fn find(&self, key: u64) -> Option<usize> {
        if self.slots.is_empty() {
            return None;
        }
        let mut i = self.home(key);
        loop {
            match self.slots[i].key {
                0 => return None,
                k if k == key => return Some(i),
                _ => i = (i + 1) & (self.slots.len() - 1),
            }
        }
    }

    #[inline]
    fn find_or_add(&mut self, key: u64) -> usize {
        if self.live * 2 >= self.slots.len() {
            self.grow();
        }
        let mut i = self.home(key);
        loop {
            match self.slots[i].key {
                0 => break,
                k if k == key => return i,
                _ => i = (i + 1) & (self.slots.len() - 1),
            }
        }
        self.slots[i] = Entry { key, ..FREE };
        self.live += 1;
        i
    }

    #[cold]
    fn grow(&mut self) {
        let old = std::mem::take(&mut self.slots);
        self.slots = vec![FREE; (old.len() * 2).max(64)];
        for entry in old.into_iter().filter(|e| e.key != 0) {
            let mut i = self.home(entry.key);
            while self.slots[i].key != 0 {
                i = (i + 1) & (self.slots.len() - 1);
            }
            self.slots[i] = entry;
        }
    }

    /// Frees a place and closes the gap, so that no search ends early.
    fn remove(&mut self, mut hole: usize) {
        let mask = self.slots.len() - 1;
        let mut i = hole;
        loop {
            i = (i + 1) & mask;
            let key = self.slots[i].key;
            if key == 0 {
                break;
            }
            let home = self.home(key);
            // It may move into the hole unless its home lies after the hole.
            if (i.wrapping_sub(home) & mask) >= (i.wrapping_sub(hole) & mask) {
                self.slots[hole] = self.slots[i];
                hole = i;
            }
        }
        self.slots[hole] = FREE;
        self.live -= 1;
    }
}

#[inline]
fn conflicts(writes: BlockMask, reads: BlockMask, kind: PieceKind, mask: BlockMask) -> bool {
    if kind == PieceKind::Read {
        writes & mask != 0 && !planted::on(Bug::ReadsIgnoreConflicts)
    } else {
        if planted::on(Bug::WritesIgnoreConflicts) {
            return false;
        }
        if planted::on(Bug::ReadsIgnoreConflicts) {
            return writes & mask != 0;
        }
        (writes | reads) & mask != 0
    }
}

impl Mirror {
    #[inline]
    fn piece_mask(&self, p: u32) -> BlockMask {
        block_mask(self.pieces[p].first, self.pieces[p].count)
    }

    /// Takes the piece's blocks and makes it runnable, or lets it wait.
    pub(super) fn enter(&mut self, p: u32) {
        let (chunk, extent, kind) = {
            let piece = &self.pieces[p];
            (piece.chunk, piece.extent, piece.kind)
        };
        let mask = self.piece_mask(p);
        let i = self.table.find_or_add(Table::key(chunk, extent));
        let region = usize::from(extent) / EXTENTS_PER_REGION;
        let held = self.is_held(chunk, region as u8);
        let entry = self.table.slots[i];
        let free = !held
            && (!conflicts(entry.writes, entry.reads, kind, mask)
                && (entry.wait_head == NIL || !self.conflicts_waiting(entry.wait_head, kind, mask))
                || planted::on(Bug::EdgesWithoutLock) && self.pieces[p].has_edges());
        if free {
            self.hold_blocks(i, p, mask);
            return;
        }
        self.pieces[p].stage = Stage::Waiting;
        self.pieces[p].next = NIL;
        let entry = &mut self.table.slots[i];
        if entry.wait_head == NIL {
            entry.wait_head = p;
        } else {
            let tail = entry.wait_tail;
            self.pieces[tail].next = p;
        }
        self.table.slots[i].wait_tail = p;
        if held {
            self.want_region(chunk, region as u8);
        }
    }

    /// Nothing is served before the attach is complete: only then does the driver know what was lost with the power.
    #[inline]
    fn is_held(&self, chunk: u32, region: u8) -> bool {
        matches!(self.phase, Phase::New | Phase::Attaching)
            || self.chunks[chunk as usize].hold() >> region & 1 != 0
    }

    fn conflicts_waiting(&self, mut w: u32, kind: PieceKind, mask: BlockMask) -> bool {
        while w != NIL {
            let other = self.pieces[w].kind;
            if self.piece_mask(w) & mask != 0 && !(kind == PieceKind::Read && other == PieceKind::Read) {
                let bug = if kind == PieceKind::Read {
                    Bug::ReadsIgnoreConflicts
                } else {
                    Bug::WritesIgnoreConflicts
                };
                return !planted::on(bug);
            }
            w = self.pieces[w].next;
        }
        false
    }

    #[inline]
    fn hold_blocks(&mut self, i: usize, p: u32, mask: BlockMask) {
        let entry = &mut self.table.slots[i];
        let piece = &mut self.pieces[p];
        piece.next = entry.active;
        entry.active = p;
        if piece.kind == PieceKind::Read {
            entry.reads |= mask;
        } else {
            entry.writes |= mask;
        }
        piece.stage = Stage::Ready;
        self.runnable.push_back(p);
    }

    /// Gives the piece's blocks back and lets others go on.
    pub(super) fn leave(&mut self, p: u32) {
        let (chunk, extent) = (self.pieces[p].chunk, self.pieces[p].extent);
        let i = self
            .table
            .find(Table::key(chunk, extent))
            .expect("a piece that holds blocks has an entry");
        let (mut writes, mut reads) = (0, 0);
        let (mut at, mut before) = (self.table.slots[i].active, NIL);
        while at != NIL {
            let next = self.pieces[at].next;
            if at == p {
                if before == NIL {
                    self.table.slots[i].active = next;
                } else {
                    self.pieces[before].next = next;
                }
            } else {
                if self.pieces[at].kind == PieceKind::Read {
                    reads |= self.piece_mask(at);
                } else {
                    writes |= self.piece_mask(at);
                }
                before = at;
            }
            at = next;
        }
        self.table.slots[i].writes = writes;
        self.table.slots[i].reads = reads;
        let region = usize::from(extent) / EXTENTS_PER_REGION;
        if self.chunks[chunk as usize].locked >> region & 1 != 0 {
            self.tasks_due = true;
        }
        self.wake(chunk, extent);
    }

    /// Starts the waiting pieces of an extent that nothing holds back any more.
    pub(super) fn wake(&mut self, chunk: u32, extent: u16) {
        let Some(i) = self.table.find(Table::key(chunk, extent)) else {
            return;
        };
        let region = usize::from(extent) / EXTENTS_PER_REGION;
        if self.table.slots[i].wait_head != NIL && !self.is_held(chunk, region as u8) {
            let (mut writes, mut reads) = (self.table.slots[i].writes, self.table.slots[i].reads);
            let (mut at, mut before) = (self.table.slots[i].wait_head, NIL);
            while at != NIL {
                let next = self.pieces[at].next;
                let (kind, mask) = (self.pieces[at].kind, self.piece_mask(at));
                let stays = conflicts(writes, reads, kind, mask);
                if kind == PieceKind::Read {
                    reads |= mask;
                } else {
                    writes |= mask;
                }
                if stays {
                    before = at;
                } else {
                    self.unlink_waiting(i, before, at, next);
                    self.hold_blocks(i, at, mask);
                }
                at = next;
            }
        }
        let entry = &self.table.slots[i];
        if entry.active == NIL && entry.wait_head == NIL {
            self.table.remove(i);
        }
    }

    fn unlink_waiting(&mut self, i: usize, before: u32, at: u32, next: u32) {
        if before == NIL {
            self.table.slots[i].wait_head = next;
        } else {
            self.pieces[before].next = next;
        }
        if self.table.slots[i].wait_tail == at {
            self.table.slots[i].wait_tail = before;
        }
    }

    /// Takes a piece that waits out of its queue.
    pub(super) fn stop_waiting(&mut self, p: u32) {
        let (chunk, extent) = (self.pieces[p].chunk, self.pieces[p].extent);
        let i = self
            .table
            .find(Table::key(chunk, extent))
            .expect("a piece that waits has an entry");
        let (mut at, mut before) = (self.table.slots[i].wait_head, NIL);
        while at != NIL && at != p {
            before = at;
            at = self.pieces[at].next;
        }
        assert_eq!(at, p, "a piece that waits is in its extent's list");
        let next = self.pieces[p].next;
        self.unlink_waiting(i, before, p, next);
        self.wake(chunk, extent);
    }

    /// Puts a piece that holds blocks back to the front of those that wait.
    pub(super) fn step_back(&mut self, p: u32) {
        let (chunk, extent) = (self.pieces[p].chunk, self.pieces[p].extent);
        let i = self
            .table
            .find(Table::key(chunk, extent))
            .expect("a piece that holds blocks has an entry");
        let (mut at, mut before) = (self.table.slots[i].active, NIL);
        while at != p {
            assert_ne!(at, NIL, "a piece that holds blocks is in its extent's list");
            before = at;
            at = self.pieces[at].next;
        }
        let next = self.pieces[p].next;
        if before == NIL {
            self.table.slots[i].active = next;
        } else {
            self.pieces[before].next = next;
        }
        let (mut writes, mut reads) = (0, 0);
        let mut at = self.table.slots[i].active;
        while at != NIL {
            if self.pieces[at].kind == PieceKind::Read {
                reads |= self.piece_mask(at);
            } else {
                writes |= self.piece_mask(at);
            }
            at = self.pieces[at].next;
        }
        let head = self.table.slots[i].wait_head;
        self.pieces[p].next = head;
        self.pieces[p].stage = Stage::Waiting;
        let entry = &mut self.table.slots[i];
        (entry.writes, entry.reads, entry.wait_head) = (writes, reads, p);
        if head == NIL {
            entry.wait_tail = p;
        }
        let region = usize::from(extent) / EXTENTS_PER_REGION;
        if self.chunks[chunk as usize].locked >> region & 1 != 0 {
            self.tasks_due = true;
        }
    }

    /// Whether no piece holds a block of the region, and none that was given up may still change one on a replica that counts.
    pub(super) fn region_quiet(&self, chunk: u32, region: u8) -> bool {
        let there = &self.chunks[chunk as usize];
        let counts = (there.in_sync | there.pending | there.active) & !there.lost;
        let out = |p: u32| {
            let piece = &self.pieces[p];
            piece.stage == Stage::Ended && piece.kind != PieceKind::Read && piece.sent & counts != 0
        };
        if (0..self.pieces.len())
            .any(|p| self.pieces.is_used(p) && out(p) && self.place(p) == (chunk, region))
        {
            return false;
        }
        let first = u16::from(region) * EXTENTS_PER_REGION as u16;
        (first..first + EXTENTS_PER_REGION as u16).all(|extent| {
            self.table
                .find(Table::key(chunk, extent))
                .is_none_or(|i| self.table.slots[i].active == NIL)
        })
    }

    /// Lets everything that waited for the region go on, in order.
    pub(super) fn wake_region(&mut self, chunk: u32, region: u8) {
        let first = u16::from(region) * EXTENTS_PER_REGION as u16;
        for extent in first..first + EXTENTS_PER_REGION as u16 {
            self.wake(chunk, extent);
        }
    }

    /// Whether something waits in the region.
    pub(super) fn region_wanted(&self, chunk: u32, region: u8) -> bool {
        let first = u16::from(region) * EXTENTS_PER_REGION as u16;
        (first..first + EXTENTS_PER_REGION as u16).any(|extent| {
            self.table
                .find(Table::key(chunk, extent))
                .is_some_and(|i| self.table.slots[i].wait_head != NIL)
        })
    }
}
