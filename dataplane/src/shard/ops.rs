//! Operations: a guest's request from the moment it is taken until its descriptor is given back.
//!
//! A request is carried out in windows of at most 1 MiB, one after the other, so that what it needs is bounded. A write's
//! window is copied once into private buffers, with the checksums computed on the copy; a read's goes to guest memory
//! directly where no I/O can outlive the request, and otherwise to private buffers first.

use std::collections::VecDeque;

use crate::buffers::{Lent, REQUEST_MAX};
use crate::checksum;
use crate::frontend::{Completion, Kind, Range, Request};
use crate::ids::BLOCK;
use crate::memory::Payload;
use crate::mirror::{OpId, OpKind};
use crate::plane::VolumeIndex;

use super::Shard;

/// Most large buffers of one volume, so that one whose disks hang or whose guest is greedy leaves some to the others.
const VOLUME_LARGE: u32 = super::LARGE_BUFFERS / 8;
/// Blocks of the longest window: it may begin and end inside a block.
const BLOCKS_MAX: usize = REQUEST_MAX / BLOCK + 1;

/// What an operation still has to do when its present window is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// A window is with the mirror.
    Active,
    /// Waits for buffers.
    Waiting,
    /// The window is done but a request still carries its memory, which can not be left behind.
    Lingering,
}

#[derive(Debug)]
struct Op {
    state: State,
    volume: VolumeIndex,
    queue: u32,
    request: Request,
    /// First byte of the window, in the volume.
    at: u64,
    /// Bytes of the window.
    len: u32,
    /// Bytes after the window (of the present range).
    left: u64,
    /// Guest memory of the window.
    guest: Payload,
    lent: Option<Lent>,
    /// The mirror's name for the window.
    name: OpId,
    /// Next range of a discard or write-zeroes.
    range: u32,
    unmap: bool,
    /// The window is a flush that makes a write-through write durable.
    flushing: bool,
    failed: bool,
}

/// Set in what a name stands for: not an operation but memory that one left behind.
const BEHIND: u32 = 1 << 31;

/// The names a mirror knows its operations by: dense and few, so that its tables are small.
#[derive(Debug)]
pub(super) struct Names {
    free: Vec<u32>,
    /// For each name the operation, or with [`BEHIND`] the place of memory left behind.
    op: Vec<u32>,
    /// Operations of the volume, and names left behind.
    in_hand: usize,
}

impl Names {
    pub(super) fn new(max: u32) -> Self {
        Names {
            free: (0..max).rev().collect(),
            op: vec![0; max as usize],
            in_hand: 0,
        }
    }

    /// Operations that can still be begun: each holds one name at most, also while it waits.
    pub(super) fn room(&self) -> usize {
        self.op.len().saturating_sub(self.in_hand)
    }

    /// Operations of the volume, and names left behind.
    pub(super) fn in_hand(&self) -> usize {
        self.in_hand
    }

    fn take(&mut self, op: u32) -> OpId {
        let name = self
            .free
            .pop()
            .expect("the caller polled for no more than there is room for");
        self.op[name as usize] = op;
        OpId(name)
    }

    /// The operation behind a name; with `give` the name is free again.
    pub(super) fn op(&mut self, name: OpId, give: bool) -> u32 {
        if give {
            self.free.push(name.0);
        }
        self.op[name.0 as usize]
    }
}

/// All operations of a reactor.
#[derive(Debug)]
pub(super) struct Ops {
    slots: Vec<Op>,
    free: Vec<u32>,
    waiting: VecDeque<u32>,
    /// Private memory that a late request still carries while its operation went on (a zero carries none). One for a name
    /// at most.
    behind: Vec<Option<Lent>>,
    behind_free: Vec<u32>,
    /// Buffers were given back since those who wait were looked at.
    given: bool,
    /// They are being looked at.
    retrying: bool,
    /// And there was not enough for one of them: nor is there for those behind it.
    exhausted: bool,
    crcs: Box<[u32; BLOCKS_MAX + 1]>,
}

impl Ops {
    pub(super) fn new(max: usize) -> Self {
        let idle = || Op {
            state: State::Free,
            volume: VolumeIndex(0),
            queue: 0,
            request: Request {
                head: 0,
                kind: Kind::Flush,
                sector: 0,
                len: 0,
                data: Payload::NONE,
            },
            at: 0,
            len: 0,
            left: 0,
            guest: Payload::NONE,
            lent: None,
            name: OpId(0),
            range: 0,
            unmap: false,
            flushing: false,
            failed: false,
        };
        Ops {
            slots: (0..max).map(|_| idle()).collect(),
            free: (0..max as u32).rev().collect(),
            waiting: VecDeque::with_capacity(max),
            behind: Vec::new(),
            behind_free: Vec::new(),
            given: false,
            retrying: false,
            exhausted: false,
            crcs: Box::new([0; BLOCKS_MAX + 1]),
        }
    }

    /// Slots left.
    pub(super) fn room(&self) -> usize {
        self.free.len()
    }

    /// Operations in hand.
    pub(super) fn active(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// None waits for buffers.
    pub(super) fn waiting_is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// Bytes from the start of a block to `at`.
#[inline]
fn pad(at: u64) -> usize {
    (at % BLOCK as u64) as usize
}

impl Shard {
    /// Takes a request. There is a slot: the caller looked.
    pub(super) fn begin(&mut self, queue: u32, volume: VolumeIndex, request: Request) {
        self.stats.requests += 1;
        if let Some(volume) = &mut self.volumes[usize::from(volume.0)] {
            volume.names.in_hand += 1;
        }
        let id = self
            .ops
            .free
            .pop()
            .expect("the caller polled for no more than there is room for");
        let op = &mut self.ops.slots[id as usize];
        op.volume = volume;
        op.queue = queue;
        op.request = request;
        op.guest = request.data;
        op.range = 0;
        (op.flushing, op.failed) = (false, false);
        (op.at, op.len) = (request.sector * crate::frontend::SECTOR, 0);
        op.left = match request.kind {
            Kind::In | Kind::Out => u64::from(request.len),
            _ => 0,
        };
        self.next_window(id);
    }

    /// Begins the next window, or ends the operation if there is none.
    fn next_window(&mut self, id: u32) {
        let op = &mut self.ops.slots[id as usize];
        debug_assert!(op.lent.is_none());
        op.state = State::Active;
        if op.failed {
            return self.end(id);
        }
        match op.request.kind {
            Kind::Flush if op.flushing => self.end(id),
            Kind::Flush => self.flush_window(id),
            Kind::In | Kind::Out if op.left > 0 => {
                op.at += u64::from(op.len);
                op.guest = op.guest.advance(op.len as usize);
                // With its edges filled up to whole blocks a window still fits into the longest request.
                let max = if pad(op.at) == 0 {
                    REQUEST_MAX
                } else {
                    REQUEST_MAX - BLOCK
                };
                op.len = op.left.min(max as u64) as u32;
                op.left -= u64::from(op.len);
                if op.request.kind == Kind::In {
                    self.read_window(id)
                } else {
                    self.write_window(id)
                }
            }
            Kind::Out if !op.flushing && self.queues.write_through(op.queue) => self.flush_window(id),
            Kind::In | Kind::Out => self.end(id),
            Kind::Discard | Kind::WriteZeroes => self.zero_window(id),
        }
    }

    fn flush_window(&mut self, id: u32) {
        self.ops.slots[id as usize].flushing = true;
        self.submit_window(id, OpKind::Flush, 0, 0, Payload::NONE, 0);
    }

    fn read_window(&mut self, id: u32) {
        let op = &mut self.ops.slots[id as usize];
        let (at, len) = (op.at, u64::from(op.len));
        let aligned = pad(at) == 0 && pad(len) == 0;
        if aligned
            && self.volumes[usize::from(op.volume.0)]
                .as_ref()
                .is_some_and(|volume| volume.inline)
        {
            let data = op.guest;
            return self.submit_window(id, OpKind::Read, at, len, data, 0);
        }
        let (from, cover) = cover(at, len);
        let Some(lent) = self.borrow(id, from, cover as u32) else {
            return self.wait_for_buffers(id);
        };
        let data = self.buffers.payload(&lent);
        self.ops.slots[id as usize].lent = Some(lent);
        self.submit_window(id, OpKind::Read, from, cover, data, 0);
    }

    fn write_window(&mut self, id: u32) {
        let op = &mut self.ops.slots[id as usize];
        let (at, len) = (op.at, u64::from(op.len));
        let aligned = pad(at) == 0 && pad(len) == 0;
        if aligned
            && self.volumes[usize::from(op.volume.0)]
                .as_ref()
                .is_some_and(|volume| volume.null)
        {
            let data = op.guest;
            return self.submit_window(id, OpKind::Write, at, len, data, len as usize / BLOCK);
        }
        let (from, cover) = cover(at, len);
        let Some(lent) = self.borrow(id, from, cover as u32) else {
            return self.wait_for_buffers(id);
        };
        let mut guest = self.ops.slots[id as usize].guest;
        let mut crcs = &mut self.ops.crcs[..];
        if aligned {
            for seg in self.buffers.segs(&lent) {
                let (now, rest) = crcs.split_at_mut(seg.len as usize / BLOCK);
                // SAFETY: the pieces are lent to this operation alone, whole blocks; the queue keeps the guest's memory
                // mapped until the request is completed, and it is as long as the request says.
                unsafe { checksum::copy_in(guest, seg.ptr, now) };
                guest = guest.advance(seg.len as usize);
                crcs = rest;
            }
        } else {
            // The edge blocks are completed by `merge`, so their checksums mean nothing yet.
            let (mut skip, mut left) = (pad(at), len as usize);
            for seg in self.buffers.segs(&lent) {
                let take = left.min(seg.len as usize - skip);
                // SAFETY: as above; `skip + take` stays inside the piece. The untouched edge bytes are old bytes of the
                // pool, overwritten by `merge` before anybody else sees them.
                unsafe { checksum::gather(guest, take, seg.ptr.wrapping_add(skip)) };
                let (now, rest) = crcs.split_at_mut(seg.len as usize / BLOCK);
                // SAFETY: the whole piece is ours and initialised memory.
                unsafe { checksum::sums(Payload::new(std::slice::from_ref(seg)), now) };
                guest = guest.advance(take);
                crcs = rest;
                (skip, left) = (0, left - take);
            }
        }
        if self.queues.poisoned(self.ops.slots[id as usize].queue) {
            // Zeros in the place of pages that are gone: not what the guest meant to write.
            let op = &mut self.ops.slots[id as usize];
            op.failed = true;
            let volume = op.volume;
            self.give_back(volume, lent);
            return self.next_window(id);
        }
        self.stats.copied_in += len;
        let data = self.buffers.payload(&lent);
        self.ops.slots[id as usize].lent = Some(lent);
        // The mirror is told the bytes that change; `data` covers the blocks they lie in.
        self.submit_window(id, OpKind::Write, at, len, data, cover as usize / BLOCK);
    }

    /// A range is zeroed block by block where it covers whole blocks; what sticks out is written, or for a discard left.
    fn zero_window(&mut self, id: u32) {
        let block = BLOCK as u64;
        loop {
            let op = &mut self.ops.slots[id as usize];
            op.at += u64::from(op.len);
            op.len = 0;
            if op.left == 0 {
                let Some(range) = self.queues.range(op.queue, &op.request, op.range) else {
                    if op.request.kind == Kind::WriteZeroes
                        && !op.flushing
                        && self.queues.write_through(op.queue)
                    {
                        return self.flush_window(id);
                    }
                    return self.end(id);
                };
                op.range += 1;
                (op.at, op.left, op.unmap) = first_bytes(&range, op.request.kind);
                continue;
            }
            if pad(op.at) == 0 && op.left >= block {
                // Several whole gigabytes at once are the mirror's to cut up.
                let len = op.left / block * block;
                let len = len.min(1 << 30);
                (op.len, op.left) = (len as u32, op.left - len);
                let (at, unmap) = (op.at, op.unmap);
                return self.submit_window(id, OpKind::Zero { unmap }, at, len, Payload::NONE, 0);
            }
            let edge = op.left.min(block - op.at % block);
            (op.len, op.left) = (edge as u32, op.left - edge);
            if op.request.kind == Kind::WriteZeroes {
                return self.zero_edge(id);
            }
        }
    }

    fn zero_edge(&mut self, id: u32) {
        let op = &mut self.ops.slots[id as usize];
        let (at, len) = (op.at, u64::from(op.len));
        let (from, cover) = cover(at, len);
        let Some(lent) = self.borrow(id, from, cover as u32) else {
            let op = &mut self.ops.slots[id as usize];
            (op.len, op.left) = (0, op.left + len);
            return self.wait_for_buffers(id);
        };
        for seg in self.buffers.segs(&lent) {
            // SAFETY: the piece is lent to this operation alone.
            unsafe { seg.ptr.write_bytes(0, seg.len as usize) };
        }
        let data = self.buffers.payload(&lent);
        self.ops.slots[id as usize].lent = Some(lent);
        self.submit_window(id, OpKind::Write, at, len, data, 1);
    }

    /// Buffers for a window. `None`: it waits, because none are left, because its volume has its share, or because others
    /// have waited for longer.
    fn borrow(&mut self, id: u32, from: u64, len: u32) -> Option<Lent> {
        let index = self.ops.slots[id as usize].volume;
        let full = self.volumes[usize::from(index.0)]
            .as_ref()
            .is_some_and(|volume| volume.large >= VOLUME_LARGE);
        // One that needs a block never takes from those who wait for many extents.
        let behind = len as usize > BLOCK && !self.ops.retrying && !self.ops.waiting.is_empty();
        if full || behind || self.ops.exhausted {
            return None;
        }
        let Some(lent) = self.buffers.take(from, len) else {
            self.ops.exhausted = self.ops.retrying;
            return None;
        };
        let large = self.buffers.large(&lent);
        if let Some(volume) = &mut self.volumes[usize::from(index.0)] {
            volume.large += large;
        }
        Some(lent)
    }

    fn give_back(&mut self, volume: VolumeIndex, lent: Lent) {
        if let Some(volume) = &mut self.volumes[usize::from(volume.0)] {
            volume.large -= self.buffers.large(&lent);
        }
        self.buffers.give(lent);
        self.ops.given = true;
    }

    fn wait_for_buffers(&mut self, id: u32) {
        if !self.ops.retrying {
            self.stats.waits += 1;
            // It may wait behind somebody whose volume has its share, and need not.
            self.ops.given = true;
        }
        self.ops.slots[id as usize].state = State::Waiting;
        self.ops.waiting.push_back(id);
    }

    /// Buffers were given back: those that waited for them go on, in order; one whose volume has its share lets others by.
    pub(super) fn retry_waiting(&mut self) {
        if !std::mem::take(&mut self.ops.given) {
            return;
        }
        (self.ops.retrying, self.ops.exhausted) = (true, false);
        // Each is looked at once; those that go on waiting come behind each other again, in the same order.
        for _ in 0..self.ops.waiting.len() {
            let Some(id) = self.ops.waiting.pop_front() else {
                break;
            };
            let op = &mut self.ops.slots[id as usize];
            op.state = State::Active;
            match op.request.kind {
                Kind::In => self.read_window(id),
                Kind::Out => self.write_window(id),
                _ => self.zero_window(id),
            }
        }
        (self.ops.retrying, self.ops.exhausted) = (false, false);
    }

    fn submit_window(&mut self, id: u32, kind: OpKind, at: u64, len: u64, data: Payload, blocks: usize) {
        let index = self.ops.slots[id as usize].volume;
        let Some(volume) = &mut self.volumes[usize::from(index.0)] else {
            return self.done(id, false, true);
        };
        let name = volume.names.take(id);
        self.ops.slots[id as usize].name = name;
        volume.mirror.submit(
            name,
            kind,
            at,
            len,
            data,
            &self.ops.crcs[..blocks],
            &mut self.mirror_effects,
        );
        self.apply_mirror(index);
    }

    /// The mirror has read the blocks that an unaligned write touches only in part: fill them up from there. Answers with
    /// the checksums of the same blocks.
    pub(super) fn merge(
        &mut self,
        id: u32,
        head: Option<Payload>,
        tail: Option<Payload>,
    ) -> (Option<u32>, Option<u32>) {
        let op = &self.ops.slots[id as usize];
        let lent = op.lent.as_ref().expect("an unaligned write has private buffers");
        let segs = self.buffers.segs(lent);
        let (start, end) = (pad(op.at), pad(op.at + u64::from(op.len)));
        let first = segs[0].ptr;
        let last_seg = segs[segs.len() - 1];
        let last = last_seg.ptr.wrapping_add(last_seg.len as usize - BLOCK);
        // A write inside one block: the mirror speaks of its head only.
        let tail_page = if first == last { head } else { tail };
        // SAFETY: first and last block are this operation's own; the edge pages are the mirror's, filled and no longer
        // written by anybody; all lengths stay inside one block.
        unsafe {
            if let Some(page) = head {
                checksum::gather(page, start, first);
            }
            if let (Some(page), true) = (tail_page, end > 0) {
                checksum::gather(page.advance(end), BLOCK - end, last.wrapping_add(end));
            }
        }
        // SAFETY: whole blocks of this operation's own memory, which no device uses now.
        let crc = |block: *mut u8| checksum::crc32c(unsafe { std::slice::from_raw_parts(block, BLOCK) });
        (head.map(|_| crc(first)), tail.map(|_| crc(last)))
    }

    /// The mirror is done with the window; `released`: with its memory and its name too.
    pub(super) fn done(&mut self, id: u32, ok: bool, released: bool) {
        let op = &mut self.ops.slots[id as usize];
        debug_assert_eq!(op.state, State::Active);
        op.failed |= !ok;
        if let (Kind::In, Some(lent), false) = (op.request.kind, &op.lent, op.failed) {
            let (mut skip, mut left, mut guest) = (pad(op.at), op.len as usize, op.guest);
            for seg in self.buffers.segs(lent) {
                let take = left.min(seg.len as usize - skip);
                // SAFETY: the piece is lent to this operation and was filled; guest memory is kept by the queue until the
                // request is completed, and it is as long as the request says.
                unsafe { checksum::scatter(seg.ptr.wrapping_add(skip), guest, take) };
                guest = guest.advance(take);
                (skip, left) = (0, left - take);
            }
            self.stats.copied_out += u64::from(op.len);
        }
        if released {
            return self.window_over(id);
        }
        // A disk is late, perhaps for ever. Private memory can stay behind while the guest goes on; guest memory can not.
        op.state = State::Lingering;
        let ends = op.failed
            || op.left == 0
                && match op.request.kind {
                    Kind::In => true,
                    Kind::Out => !self.queues.write_through(op.queue),
                    _ => false,
                };
        let volume = self.volumes[usize::from(op.volume.0)]
            .as_mut()
            .expect("a volume with operations in hand stays");
        // An operation that goes on needs another name.
        let bare = matches!(op.request.kind, Kind::Discard | Kind::WriteZeroes);
        if (ends || volume.names.room() > 0) && (bare || op.lent.is_some()) {
            let place = self.ops.behind_free.pop().unwrap_or_else(|| {
                self.ops.behind.push(None);
                self.ops.behind.len() as u32 - 1
            });
            if let Some(lent) = op.lent.take() {
                // The volume's share is for what it still has to do: it would wait for the late disk after all.
                volume.large -= self.buffers.large(&lent);
                self.ops.given = true;
                self.ops.behind[place as usize] = Some(lent);
            }
            // It was decided here, and the guest may change its mind: there is no name for a flush.
            op.flushing |= ends;
            volume.names.op[op.name.0 as usize] = BEHIND | place;
            volume.names.in_hand += 1;
            self.window_over(id);
        }
    }

    /// No request carries any more what `holder`, an operation or memory left behind, had a name for.
    pub(super) fn released(&mut self, volume: VolumeIndex, holder: u32) {
        if holder & BEHIND == 0 {
            debug_assert_eq!(self.ops.slots[holder as usize].state, State::Lingering);
            return self.window_over(holder);
        }
        let place = holder & !BEHIND;
        if let Some(lent) = self.ops.behind[place as usize].take() {
            self.buffers.give(lent);
            self.ops.given = true;
        }
        self.ops.behind_free.push(place);
        if let Some(volume) = &mut self.volumes[usize::from(volume.0)] {
            volume.names.in_hand -= 1;
        }
    }

    fn window_over(&mut self, id: u32) {
        let op = &mut self.ops.slots[id as usize];
        let volume = op.volume;
        if let Some(lent) = op.lent.take() {
            self.give_back(volume, lent);
        }
        self.next_window(id);
    }

    fn end(&mut self, id: u32) {
        self.answer(id);
        self.free(id);
    }

    fn answer(&mut self, id: u32) {
        let op = &self.ops.slots[id as usize];
        let completion = if op.failed {
            self.stats.errors += 1;
            Completion::IoErr
        } else {
            Completion::Ok
        };
        self.queues.complete(op.queue, op.request.head, completion);
    }

    fn free(&mut self, id: u32) {
        let volume = self.ops.slots[id as usize].volume;
        if let Some(volume) = &mut self.volumes[usize::from(volume.0)] {
            volume.names.in_hand -= 1;
        }
        self.ops.slots[id as usize].state = State::Free;
        self.ops.free.push(id);
    }
}

/// The whole blocks that hold a range.
fn cover(at: u64, len: u64) -> (u64, u64) {
    let from = at - pad(at) as u64;
    (from, (at + len).next_multiple_of(BLOCK as u64) - from)
}

fn first_bytes(range: &Range, kind: Kind) -> (u64, u64, bool) {
    let sector = crate::frontend::SECTOR;
    let unmap = kind == Kind::Discard || range.unmap();
    (range.sector * sector, u64::from(range.sectors) * sector, unmap)
}
