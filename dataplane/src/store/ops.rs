//! Requests under way: a fixed slab, the order of operations on one extent, and lists that operations wait in.
//!
//! An operation is in its bucket from the moment it is admitted until it ends. Buckets are short lists in order of
//! arrival; an operation begins when no earlier one of its bucket touches the same blocks of the same extent, unless
//! both only read. It is in at most one other list at a time: the one of what it waits for.

use super::codec::Record;
use crate::ids::BlockMask;
use crate::replica::{Crcs, ExtentDigest, Header, Request, Status};

/// Operations under way at once.
pub(super) const OPS_MAX: usize = 1024;
/// Of these, how many are left to the freeing of slots.
pub(super) const FREES_MAX: usize = 32;
/// No operation.
pub(super) const NIL: u32 = u32::MAX;

const BUCKETS: usize = 4096;

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Waits for earlier operations on its blocks.
    Ordered,
    /// Waits for room in a list, a page, a mark: begins again when woken.
    Begin,
    /// Its I/O or journal block is under way.
    Under,
    /// Freeing: its slot is being zeroed. Settling: what is not valid of an extent is.
    Zeroing,
    /// Freeing, settling: the zeros are on their way to durability.
    ZeroFlush,
    /// Freeing, settling: wants to journal that.
    FreeJournal,
    /// Freeing: the freeing is on its way to durability.
    FreeFlush,
    /// Waits for a flush, then is done.
    LastFlush,
}

/// One operation.
#[derive(Debug)]
pub(super) struct Op {
    pub(super) tag: u64,
    pub(super) header: Header,
    /// `None`: the freeing of an extent, which nobody waits for.
    pub(super) request: Option<Request>,
    pub(super) step: Step,
    /// Index of its chunk, or of its volume for a seal.
    pub(super) place: u32,
    pub(super) extent: u16,
    pub(super) mask: BlockMask,
    pub(super) exclusive: bool,
    pub(super) bucketed: bool,
    /// It counts as a writer of its chunk.
    pub(super) writing: bool,
    /// I/Os under way.
    pub(super) ios: u16,
    /// Waits for its journal block.
    pub(super) journaling: bool,
    /// The journal must have reached this before the flush that it waits for.
    pub(super) need: u64,
    /// Operations of older generations that a seal waits for.
    pub(super) older: u32,
    pub(super) slot: u32,
    pub(super) holes: BlockMask,
    pub(super) bad: BlockMask,
    pub(super) lost: BlockMask,
    pub(super) expected: Crcs,
    pub(super) found: Crcs,
    pub(super) cursor: u8,
    pub(super) in_doubt: bool,
    pub(super) digest: Option<Box<[ExtentDigest; 16]>>,
    pub(super) failed: Option<Status>,
    before: u32,
    after: u32,
    link: u32,
    used: bool,
}

/// A first-in first-out list of operations.
#[derive(Clone, Copy, Debug)]
pub(super) struct List {
    head: u32,
    tail: u32,
}

impl List {
    pub(super) const EMPTY: List = List { head: NIL, tail: NIL };

    pub(super) fn is_empty(&self) -> bool {
        self.head == NIL
    }
}

/// The slab.
#[derive(Debug)]
pub(super) struct Ops {
    all: Vec<Op>,
    free: Vec<u32>,
    buckets: Vec<List>,
    frees: usize,
}

impl std::ops::Index<u32> for Ops {
    type Output = Op;
    #[inline]
    fn index(&self, i: u32) -> &Op {
        &self.all[i as usize]
    }
}

impl std::ops::IndexMut<u32> for Ops {
    #[inline]
    fn index_mut(&mut self, i: u32) -> &mut Op {
        &mut self.all[i as usize]
    }
}

#[inline]
fn bucket(place: u32, extent: u16) -> usize {
    let key = u64::from(place) << 10 | u64::from(extent);
    (key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52) as usize
}

impl Ops {
    pub(super) fn new() -> Self {
        const { assert!(BUCKETS == 1 << 12, "bucket() yields twelve bits") };
        const { assert!(size_of::<Record>() < 256) };
        let empty = || Op {
            tag: 0,
            header: Header {
                volume: crate::ids::VolumeId(0),
                generation: crate::ids::Generation(0),
                stable: crate::ids::Version::ZERO,
            },
            request: None,
            step: Step::Begin,
            place: NIL,
            extent: 0,
            mask: 0,
            exclusive: false,
            bucketed: false,
            writing: false,
            ios: 0,
            journaling: false,
            need: 0,
            older: 0,
            slot: 0,
            holes: 0,
            bad: 0,
            lost: 0,
            expected: Crcs::default(),
            found: Crcs::default(),
            cursor: 0,
            in_doubt: false,
            digest: None,
            failed: None,
            before: NIL,
            after: NIL,
            link: NIL,
            used: false,
        };
        Ops {
            all: (0..OPS_MAX).map(|_| empty()).collect(),
            free: (0..OPS_MAX as u32).rev().collect(),
            buckets: vec![List::EMPTY; BUCKETS],
            frees: 0,
        }
    }

    /// Takes an operation for a request; `None` when all are under way.
    #[inline]
    pub(super) fn take(&mut self, tag: u64, header: &Header, request: &Request) -> Option<u32> {
        if self.free.len() <= FREES_MAX - self.frees {
            return None;
        }
        let i = self.free.pop()?;
        self.fill(i, tag, header);
        self[i].request = Some(*request);
        Some(i)
    }

    /// Takes an operation for the freeing of an extent.
    pub(super) fn take_free(&mut self) -> Option<u32> {
        if self.frees == FREES_MAX {
            return None;
        }
        let i = self.free.pop()?;
        self.frees += 1;
        let header = self[i].header;
        self.fill(i, 0, &header);
        self[i].request = None;
        Some(i)
    }

    #[inline]
    fn fill(&mut self, i: u32, tag: u64, header: &Header) {
        let op = &mut self[i];
        op.tag = tag;
        op.header = *header;
        op.step = Step::Begin;
        op.place = NIL;
        op.bucketed = false;
        op.writing = false;
        op.ios = 0;
        op.journaling = false;
        op.need = 0;
        op.older = 0;
        op.slot = NIL;
        op.holes = 0;
        op.bad = 0;
        op.lost = 0;
        op.found = Crcs::default();
        op.cursor = 0;
        op.in_doubt = false;
        op.failed = None;
        op.link = NIL;
        op.used = true;
    }

    /// Gives an operation back.
    #[inline]
    pub(super) fn give(&mut self, i: u32) {
        let op = &mut self[i];
        assert!(op.used && op.ios == 0 && !op.bucketed);
        op.used = false;
        op.digest = None;
        if op.request.is_none() {
            self.frees -= 1;
        }
        self.free.push(i);
    }

    /// Operations under way.
    pub(super) fn under_way(&self) -> usize {
        OPS_MAX - self.free.len()
    }

    /// Freeings under way.
    pub(super) fn frees(&self) -> usize {
        self.frees
    }

    /// The operations under way, by place in the slab.
    pub(super) fn used(&self) -> impl Iterator<Item = u32> + '_ {
        (0..OPS_MAX as u32).filter(|&i| self[i].used)
    }

    /// Puts an operation in its bucket. True: it may begin.
    #[inline]
    pub(super) fn order(
        &mut self,
        i: u32,
        place: u32,
        extent: u16,
        mask: BlockMask,
        exclusive: bool,
    ) -> bool {
        let b = bucket(place, extent);
        let tail = self.buckets[b].tail;
        let op = &mut self[i];
        (op.place, op.extent, op.mask, op.exclusive) = (place, extent, mask, exclusive);
        (op.before, op.after, op.bucketed) = (tail, NIL, true);
        if tail == NIL {
            self.buckets[b] = List { head: i, tail: i };
            return true;
        }
        self[tail].after = i;
        self.buckets[b].tail = i;
        !self.blocked(i)
    }

    /// An earlier operation stands in its way.
    #[inline]
    fn blocked(&self, i: u32) -> bool {
        let op = &self[i];
        let mut at = op.before;
        while at != NIL {
            let other = &self[at];
            let same = other.place == op.place && other.extent == op.extent && other.mask & op.mask != 0;
            if same && (other.exclusive || op.exclusive) {
                return true;
            }
            at = other.before;
        }
        false
    }

    /// Takes an operation out of its bucket; those that may begin now are appended to `woken`.
    #[inline]
    pub(super) fn leave(&mut self, i: u32, woken: &mut List) {
        let op = &mut self[i];
        if !op.bucketed {
            return;
        }
        op.bucketed = false;
        let (before, after, b) = (op.before, op.after, bucket(op.place, op.extent));
        if before == NIL {
            self.buckets[b].head = after;
        } else {
            self[before].after = after;
        }
        if after == NIL {
            self.buckets[b].tail = before;
        } else {
            self[after].before = before;
        }
        let mut at = after;
        while at != NIL {
            if self[at].step == Step::Ordered && !self.blocked(at) {
                self[at].step = Step::Begin;
                self.push(woken, at);
            }
            at = self[at].after;
        }
    }

    /// Appends an operation to a list; it is in no other.
    #[inline]
    pub(super) fn push(&mut self, list: &mut List, i: u32) {
        self[i].link = NIL;
        if list.head == NIL {
            list.head = i;
        } else {
            let tail = list.tail;
            self[tail].link = i;
        }
        list.tail = i;
    }

    /// Takes the first of a list.
    #[inline]
    pub(super) fn pop(&mut self, list: &mut List) -> Option<u32> {
        let i = list.head;
        if i == NIL {
            return None;
        }
        list.head = self[i].link;
        if list.head == NIL {
            list.tail = NIL;
        }
        Some(i)
    }

    /// Appends one list to another.
    #[inline]
    pub(super) fn append(&mut self, to: &mut List, from: &mut List) {
        if from.head == NIL {
            return;
        }
        if to.head == NIL {
            *to = *from;
        } else {
            let tail = to.tail;
            self[tail].link = from.head;
            to.tail = from.tail;
        }
        *from = List::EMPTY;
    }
}

impl Ops {
    /// The place in the slab holds an operation.
    pub(super) fn is_used(&self, i: u32) -> bool {
        self[i].used
    }
}
