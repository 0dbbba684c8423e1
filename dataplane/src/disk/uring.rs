//! A file or block device driven through the reactor's io_uring.
//!
//! An I/O becomes one request of the kernel where its memory allows that: in registered memory, in one piece, or as a
//! vector. Misaligned or badly scattered memory goes through a bounce buffer, an extent at a time; so does `Verify`.
//! What the kernel did only in part is gone on with. Zeros are made by deallocating from an extent on, and written below.
//!
//! Invariants: at most [`DEPTH`] I/Os are in the kernel and [`QUEUE_MAX`] in hand, the rest waits in order; steady state
//! allocates nothing and makes no system call of its own. Checksums are taken when the data is there, over private
//! bytes (guest memory is copied aside first).
//!
//! Deliberately absent: any order between I/Os, retries of failed I/O (the store decides), opening (see [`file`](super::file)).

use std::collections::VecDeque;
use std::io;
use std::mem::ManuallyDrop;
use std::time::Duration;

use io_uring::{opcode, squeue, types};

use super::file::{DiskFile, ZERO_MODES, io_error};
use super::{Busy, Completion, Disk, DiskInfo, Io, IoError, QUEUE_MAX, Token};
use crate::checksum;
use crate::ids::{BLOCK, EXTENT};
use crate::memory::{Arena, Payload};
use crate::reactor::{Kind, Ring, Tag};
use crate::replica::Crcs;

/// I/Os of one disk that are in the kernel at a time.
pub const DEPTH: usize = 256;
/// Bounce buffers of a disk, one extent each.
pub const BOUNCES: usize = 16;
/// Pieces of memory the kernel is given in one request.
const PIECES_MAX: usize = 18;
/// How often an I/O that the kernel asks to repeat is repeated.
const AGAIN_MAX: u8 = 100;

const NO_IOVEC: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// How the present step of an I/O is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Into or from the payload; registered memory is private, other may be a guest's.
    Direct { private: bool },
    /// By way of a bounce buffer.
    Bounced(u16),
    /// Writing from the page of zeros.
    Zeros,
    /// Deallocating, with this entry of [`ZERO_MODES`].
    Allocate(usize),
    /// Flushing.
    Flush,
}

struct Op {
    token: Token,
    io: Io,
    done: u32,
    step: Step,
    again: u8,
    crcs: Crcs,
    pieces: [libc::iovec; PIECES_MAX],
}

/// See the module.
pub struct UringDisk {
    file: DiskFile,
    info: DiskInfo,
    owner: u32,
    registered: Option<u32>,
    ops: Box<[Op]>,
    free: Vec<u16>,
    /// Begun, but ring or bounce buffers had no room.
    stalled: VecDeque<u16>,
    waiting: VecDeque<(Token, Io)>,
    /// `BOUNCES` buffers, then one extent of zeros that is never written. Given back only after `detach`, since the
    /// kernel may know it.
    memory: ManuallyDrop<Arena>,
    attached: bool,
    bounces: Vec<u16>,
    /// First entry of [`ZERO_MODES`] that has not been refused.
    zero_mode: usize,
    iopoll: Option<Polled>,
    want_iopoll: bool,
}

struct Polled {
    ring: Ring,
    registered: Option<u32>,
    in_kernel: usize,
    events: Vec<crate::reactor::Event>,
    /// The device turned out not to poll after all (a read of a hole, as at the start, never reaches it).
    refused: bool,
}

// SAFETY: the raw pointers in `ops` are names of memory that is kept by the askers, on whatever thread (`Disk::submit`).
unsafe impl Send for UringDisk {}

impl UringDisk {
    /// Drives `file`; with `iopoll`, completions are polled from the device if it can do that ([`DiskInfo::iopoll`] tells
    /// after `attach`).
    ///
    /// # Errors
    /// When there is no memory for bounce buffers.
    pub fn new(file: DiskFile, iopoll: bool) -> io::Result<Self> {
        let idle = || Op {
            token: Token(0),
            io: Io::Flush,
            done: 0,
            step: Step::Flush,
            again: 0,
            crcs: Crcs::default(),
            pieces: [NO_IOVEC; PIECES_MAX],
        };
        Ok(UringDisk {
            info: file.info().clone(),
            file,
            owner: 0,
            registered: None,
            ops: (0..DEPTH).map(|_| idle()).collect(),
            free: (0..DEPTH as u16).rev().collect(),
            stalled: VecDeque::with_capacity(DEPTH),
            waiting: VecDeque::with_capacity(QUEUE_MAX),
            memory: ManuallyDrop::new(Arena::new((BOUNCES + 1) * (EXTENT / BLOCK))?),
            attached: false,
            bounces: (0..BOUNCES as u16).rev().collect(),
            zero_mode: 0,
            iopoll: None,
            want_iopoll: iopoll,
        })
    }

    fn bounce(&self, index: u16) -> *mut u8 {
        self.memory.span().0.wrapping_add(usize::from(index) * EXTENT)
    }

    fn zeros(&self) -> *mut u8 {
        self.bounce(BOUNCES as u16)
    }

    /// Tries a ring with IOPOLL: the device answers one read, or we go without.
    fn try_iopoll(&mut self) -> Option<Polled> {
        let mut ring = Ring::new_iopoll(DEPTH as u32).ok()?;
        let registered = ring.register_file(self.file.fd());
        let entry = opcode::Read::new(types::Fd(self.file.fd()), self.bounce(0), BLOCK as u32).build();
        let tag = self.tag(0);
        // SAFETY: the bounce buffer is ours and idle, and kept past the wait below, which ends when the read has ended
        // (an IOPOLL ring waits for its device); the descriptor stays open as long as `self.file`.
        unsafe { ring.push(entry, tag) }.ok()?;
        let mut events = Vec::with_capacity(ring.events_max());
        while events.is_empty() {
            if ring.wait(Some(Duration::from_secs(1))).is_err() {
                // Nothing was submitted, or the ring is unusable; the memory is never given back in that case.
                return None;
            }
            ring.reap(&mut events);
        }
        if events[0].result != BLOCK as i32 {
            return None;
        }
        events.clear();
        let (base, bytes) = self.memory.span();
        // SAFETY: the memory outlives the ring: both are fields of this disk, and `detach` drops the ring first.
        unsafe { ring.register_memory(base, bytes) };
        Some(Polled {
            ring,
            registered,
            in_kernel: 0,
            events,
            refused: false,
        })
    }

    fn tag(&self, index: u16) -> Tag {
        Tag {
            kind: Kind::Disk,
            owner: self.owner,
            index: u32::from(index),
        }
    }

    /// Begins, or goes on with, operation `index`. False: no room; nothing happened.
    fn start(&mut self, index: u16, ring: &mut Ring) -> bool {
        let op = &self.ops[usize::from(index)];
        let done = op.done;
        match op.io {
            Io::Flush => {
                self.ops[usize::from(index)].step = Step::Flush;
                let flags = types::FsyncFlags::DATASYNC;
                let entry = match self.registered {
                    Some(slot) => opcode::Fsync::new(types::Fixed(slot)).flags(flags).build(),
                    None => opcode::Fsync::new(types::Fd(self.file.fd())).flags(flags).build(),
                };
                self.push(ring, entry, index)
            }
            Io::WriteZeroes { offset, len } => {
                let (at, left) = (offset + u64::from(done), len - done);
                if left >= EXTENT as u32 && self.zero_mode < ZERO_MODES.len() {
                    let mode = ZERO_MODES[self.zero_mode];
                    self.ops[usize::from(index)].step = Step::Allocate(self.zero_mode);
                    let entry = match self.registered {
                        Some(slot) => opcode::Fallocate::new(types::Fixed(slot), u64::from(left))
                            .offset(at)
                            .mode(mode)
                            .build(),
                        None => opcode::Fallocate::new(types::Fd(self.file.fd()), u64::from(left))
                            .offset(at)
                            .mode(mode)
                            .build(),
                    };
                    return self.push(ring, entry, index);
                }
                self.ops[usize::from(index)].step = Step::Zeros;
                self.ops[usize::from(index)].pieces[0] = libc::iovec {
                    iov_base: self.zeros().cast(),
                    iov_len: left.min(EXTENT as u32) as usize,
                };
                self.transfer(ring, index, true, at, 1)
            }
            Io::Verify { offset, len } => {
                self.bounced(ring, index, None, false, offset + u64::from(done), len - done)
            }
            Io::Read {
                offset, len, data, ..
            } => self.payload(
                ring,
                index,
                data.advance(done as usize),
                false,
                offset + u64::from(done),
                len - done,
            ),
            Io::Write { offset, len, data } => self.payload(
                ring,
                index,
                data.advance(done as usize),
                true,
                offset + u64::from(done),
                len - done,
            ),
        }
    }

    fn payload(
        &mut self,
        ring: &mut Ring,
        index: u16,
        data: Payload,
        write: bool,
        at: u64,
        left: u32,
    ) -> bool {
        let memory_mask = self.info.memory_align as usize - 1;
        // With direct I/O every piece has to be whole sectors; blocks are the largest sectors there are.
        let len_mask = if self.info.direct { 511 } else { 0 };
        let op = &mut self.ops[usize::from(index)];
        let (mut count, mut fits) = (0, true);
        // SAFETY: the asker keeps the payload until completion (`Disk::submit`).
        let missing = unsafe {
            data.pieces(left as usize, |ptr, len| {
                fits &= count < PIECES_MAX && ptr as usize & memory_mask == 0 && len & len_mask == 0;
                if count < PIECES_MAX {
                    op.pieces[count] = libc::iovec {
                        iov_base: ptr.cast(),
                        iov_len: len,
                    };
                }
                count += 1;
            })
        };
        assert_eq!(missing, 0, "payload shorter than its request");
        if !fits {
            return self.bounced(ring, index, Some(data), write, at, left);
        }
        let private = count == 1
            && ring
                .registered(op.pieces[0].iov_base.cast(), left as usize)
                .is_some();
        op.step = Step::Direct { private };
        self.transfer(ring, index, write, at, count)
    }

    fn bounced(
        &mut self,
        ring: &mut Ring,
        index: u16,
        data: Option<Payload>,
        write: bool,
        at: u64,
        left: u32,
    ) -> bool {
        let Some(bounce) = self.bounces.pop() else {
            return false;
        };
        let len = left.min(EXTENT as u32) as usize;
        let buffer = self.bounce(bounce);
        if let (true, Some(data)) = (write, data) {
            // SAFETY: the asker keeps the payload; the buffer was free, so it is ours, and as long as an extent.
            unsafe { checksum::gather(data, len, buffer) };
        }
        let op = &mut self.ops[usize::from(index)];
        op.step = Step::Bounced(bounce);
        op.pieces[0] = libc::iovec {
            iov_base: buffer.cast(),
            iov_len: len,
        };
        let pushed = self.transfer(ring, index, write, at, 1);
        if !pushed {
            self.bounces.push(bounce);
        }
        pushed
    }

    /// Queues the read or write of the operation's first `count` pieces.
    fn transfer(&mut self, ring: &mut Ring, index: u16, write: bool, at: u64, count: usize) -> bool {
        let pieces = &self.ops[usize::from(index)].pieces;
        let (ptr, len) = (pieces[0].iov_base.cast::<u8>(), pieces[0].iov_len as u32);
        let vector = pieces.as_ptr();
        let (lookup, file) = match &self.iopoll {
            Some(polled) if !polled.refused => (&polled.ring, polled.registered),
            _ => (&*ring, self.registered),
        };
        let fixed = (count == 1 && self.info.direct)
            .then(|| lookup.registered(ptr, len as usize))
            .flatten();
        macro_rules! build {
            ($fd:expr) => {
                match (write, count, fixed) {
                    (false, 1, Some(buffer)) => opcode::ReadFixed::new($fd, ptr, len, buffer)
                        .offset(at)
                        .build(),
                    (true, 1, Some(buffer)) => opcode::WriteFixed::new($fd, ptr, len, buffer)
                        .offset(at)
                        .build(),
                    (false, 1, None) => opcode::Read::new($fd, ptr, len).offset(at).build(),
                    (true, 1, None) => opcode::Write::new($fd, ptr, len).offset(at).build(),
                    (false, ..) => opcode::Readv::new($fd, vector, count as u32)
                        .offset(at)
                        .build(),
                    (true, ..) => opcode::Writev::new($fd, vector, count as u32)
                        .offset(at)
                        .build(),
                }
            };
        }
        let entry = match file {
            Some(slot) => build!(types::Fixed(slot)),
            None => build!(types::Fd(self.file.fd())),
        };
        let tag = self.tag(index);
        let Some(polled) = self.iopoll.as_mut().filter(|polled| !polled.refused) else {
            return self.push(ring, entry, index);
        };
        // SAFETY: as in `push`.
        let pushed = unsafe { polled.ring.push(entry, tag) }.is_ok();
        polled.in_kernel += usize::from(pushed);
        pushed
    }

    fn push(&mut self, ring: &mut Ring, entry: squeue::Entry, index: u16) -> bool {
        // SAFETY: the entry names the payload, kept by the asker until its completion, or a bounce buffer or the zeros,
        // which live until `detach`; the vector is part of the operation, which is not reused before its completion and
        // never moves (boxed). The descriptor is open as long as this disk, which is not dropped before its I/Os ended.
        unsafe { ring.push(entry, self.tag(index)) }.is_ok()
    }

    /// Starts what waited for room.
    fn pump(&mut self, ring: &mut Ring) {
        while let Some(&index) = self.stalled.front() {
            if !self.start(index, ring) {
                return;
            }
            self.stalled.pop_front();
        }
        while !self.waiting.is_empty() {
            let Some(index) = self.free.pop() else { return };
            let (token, io) = self.waiting.pop_front().expect("just seen");
            self.begin(ring, index, token, io);
            if !self.stalled.is_empty() {
                return;
            }
        }
    }

    fn begin(&mut self, ring: &mut Ring, index: u16, token: Token, io: Io) {
        let op = &mut self.ops[usize::from(index)];
        (op.token, op.io, op.done, op.again, op.crcs) = (token, io, 0, 0, Crcs::default());
        if !self.start(index, ring) {
            self.stalled.push_back(index);
        }
    }

    /// A step of operation `index` ended with `result`.
    fn step_ended(&mut self, ring: &mut Ring, index: u16, result: i32, done: &mut Vec<Completion>) {
        let step = self.ops[usize::from(index)].step;
        let outcome = self.advance(index, step, result);
        if let Step::Bounced(bounce) = step {
            self.bounces.push(bounce);
        }
        match outcome {
            Some(result) => {
                let op = &self.ops[usize::from(index)];
                done.push(Completion {
                    token: op.token,
                    result,
                    crcs: op.crcs,
                });
                self.free.push(index);
            }
            None => {
                if !self.start(index, ring) {
                    self.stalled.push_back(index);
                }
            }
        }
    }

    /// Takes a step's result in. None: the operation goes on.
    fn advance(&mut self, index: u16, step: Step, result: i32) -> Option<Result<(), IoError>> {
        let op = &mut self.ops[usize::from(index)];
        if result < 0 {
            let errno = -result;
            if let Step::Allocate(mode) = step
                && matches!(
                    errno,
                    libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS | libc::ENOTTY | libc::EPERM
                )
            {
                self.zero_mode = self.zero_mode.max(mode + 1);
                return None;
            }
            if errno == libc::EOPNOTSUPP
                && let Some(polled) = &mut self.iopoll
                && op.again < AGAIN_MAX
            {
                polled.refused = true;
                self.info.iopoll = false;
                op.again = AGAIN_MAX;
                return None;
            }
            if matches!(errno, libc::EAGAIN | libc::EINTR) && op.again < AGAIN_MAX {
                op.again += 1;
                return None;
            }
            return Some(Err(io_error(errno)));
        }
        let len = match op.io {
            Io::Flush => return Some(Ok(())),
            Io::Read { len, .. }
            | Io::Verify { len, .. }
            | Io::Write { len, .. }
            | Io::WriteZeroes { len, .. } => len,
        };
        if matches!(step, Step::Allocate(_)) {
            return Some(Ok(()));
        }
        // Whole blocks only: what is left of a broken one is done again.
        let moved = result as u32 & !(BLOCK as u32 - 1);
        if moved == 0 || moved > len - op.done {
            return Some(Err(IoError::Media));
        }
        let (from, data) = (op.done as usize, moved as usize);
        let blocks = from / BLOCK..(from + data) / BLOCK;
        let io = op.io;
        op.done += moved;
        let ended = (op.done == len).then_some(Ok(()));
        match (io, step) {
            (Io::Read { data: to, crcs, .. }, Step::Bounced(bounce)) => {
                let (buffer, to) = (self.bounce(bounce), to.advance(from));
                // SAFETY: the asker keeps the payload; the device is done with the buffer, which is ours.
                unsafe {
                    if crcs {
                        checksum::copy_out(buffer, to, &mut self.ops[usize::from(index)].crcs[blocks]);
                    } else {
                        checksum::scatter(buffer, to, data);
                    }
                }
            }
            (
                Io::Read {
                    data: to, crcs: true, ..
                },
                Step::Direct { private },
            ) => {
                let (to, crcs) = (to.advance(from), &mut op.crcs[blocks]);
                // SAFETY: the asker keeps the payload. Registered memory is private (`Ring::register_memory`), and
                // the device is done with it.
                unsafe {
                    match to.contiguous(data).filter(|_| private) {
                        Some(ptr) => {
                            let bytes = std::slice::from_raw_parts(ptr.as_ptr(), data);
                            for (crc, block) in crcs.iter_mut().zip(bytes.chunks_exact(BLOCK)) {
                                *crc = checksum::crc32c(block);
                            }
                        }
                        None => checksum::sums(to, crcs),
                    }
                }
            }
            (Io::Verify { .. }, Step::Bounced(bounce)) => {
                // SAFETY: the device is done with the buffer, which is ours and at least as long as what was moved.
                let bytes = unsafe { std::slice::from_raw_parts(self.bounce(bounce), data) };
                let crcs = &mut self.ops[usize::from(index)].crcs[blocks];
                for (crc, block) in crcs.iter_mut().zip(bytes.chunks_exact(BLOCK)) {
                    *crc = checksum::crc32c(block);
                }
            }
            _ => {}
        }
        ended
    }
}

impl Disk for UringDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn attach(&mut self, ring: &mut Ring, owner: u32) -> io::Result<()> {
        assert!(!self.attached, "a disk is attached once");
        self.owner = owner;
        self.attached = true;
        self.registered = ring.register_file(self.file.fd());
        if self.info.direct {
            let (base, bytes) = self.memory.span();
            // SAFETY: the memory is given back only after `detach` took it off the ring.
            unsafe { ring.register_memory(base, bytes) };
            if self.want_iopoll {
                self.iopoll = self.try_iopoll();
                self.info.iopoll = self.iopoll.is_some();
            }
        }
        Ok(())
    }

    fn detach(&mut self, ring: &mut Ring) {
        assert_eq!(self.in_hand(), 0, "a disk is detached when its I/Os have ended");
        self.iopoll = None;
        if let Some(slot) = self.registered.take() {
            ring.unregister_file(slot);
        }
        if !self.attached || ring.unregister_memory(self.memory.span().0) {
            self.attached = false;
        }
    }

    #[inline]
    unsafe fn submit(
        &mut self,
        ring: &mut Ring,
        token: Token,
        io: Io,
        _: &mut Vec<Completion>,
    ) -> Result<(), Busy> {
        io.check(self.info.bytes);
        if self.in_hand() >= QUEUE_MAX {
            return Err(Busy);
        }
        if self.stalled.is_empty()
            && self.waiting.is_empty()
            && let Some(index) = self.free.pop()
        {
            self.begin(ring, index, token, io);
        } else {
            self.waiting.push_back((token, io));
        }
        Ok(())
    }

    fn complete(&mut self, ring: &mut Ring, index: u32, result: i32, done: &mut Vec<Completion>) {
        self.step_ended(ring, index as u16, result, done);
        self.pump(ring);
    }

    fn poll(&mut self, ring: &mut Ring, done: &mut Vec<Completion>) -> bool {
        let before = done.len();
        if let Some(mut polled) = self.iopoll.take() {
            let mut events = std::mem::take(&mut polled.events);
            // An unusable ring leaves its I/Os unanswered, and the mirror gives the silent disk up.
            if polled.in_kernel > 0 && polled.ring.submit_and_poll().is_ok() {
                polled.ring.reap(&mut events);
                polled.in_kernel -= events.len();
            }
            self.iopoll = Some(polled);
            for event in events.drain(..) {
                self.step_ended(ring, event.tag.index as u16, event.result, done);
            }
            if let Some(polled) = &mut self.iopoll {
                polled.events = events;
            }
        }
        self.pump(ring);
        done.len() > before
    }

    fn in_hand(&self) -> usize {
        DEPTH - self.free.len() + self.waiting.len()
    }

    fn must_poll(&self) -> bool {
        !self.stalled.is_empty() || self.iopoll.as_ref().is_some_and(|polled| polled.in_kernel > 0)
    }
}

impl Drop for UringDisk {
    fn drop(&mut self) {
        if !self.attached && self.in_hand() == 0 {
            // SAFETY: dropped once, here; no ring knows the memory any more and no I/O is using it.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}
