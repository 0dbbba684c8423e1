//! The replica's end of a link: requests of one peer reactor in, jobs for the disks out, answers back. Sans-I/O.
//!
//! Every request that came has a slot of an extent's memory until its answer was sent. The peer never has more requests out
//! than it was given credits, and there are more slots than credits, so a receiver never stops reading.
//!
//! Sessions: one connection after the other. When one ends, what had come whole goes on; what waits is dropped; answers have
//! nowhere to go. A request of the next session waits until those of earlier ones to the same disk have ended, so that
//! nothing late undoes what came after; their slots are no credits of the next session until then.
//!
//! Invariants:
//! * The memory of a request is named by its job until [`Server::answered`]; it is neither given to another nor freed before.
//! * Blocks are checked against the checksums they came with before a job exists.
//! * Whatever a peer sends: at worst its connection ends, or its request is refused; both are counted.
//!
//! Deliberately absent: sockets, knowledge of stores, and any memory of requests once answered: a request sent again is
//! carried out again, which changes nothing (a replica's obligations, and `dataplane/tests/wire_replay.rs`).

use std::collections::VecDeque;
use std::mem::ManuallyDrop;

use super::LinkCounts;
use super::frame::{FrameError, Head, Kind, META_MAX};
use super::handshake::SessionKey;
use super::message::{Notice, decode_request, encode_reply};
use super::stream::{Batch, FRAMES_MAX, Incoming, Part};
use crate::checksum;
use crate::ids::{BLOCK, BLOCKS_PER_EXTENT, BlockMask, BootId, DiskUuid, PowerId, mask_runs};
use crate::memory::{Arena, Payload};
use crate::plane::DISKS_MAX;
use crate::replica::{Header, Reply, Request, Span, Status};

/// Requests a peer reactor may have out.
pub const CREDITS: usize = 256;
/// Slots: the answers in one batch have given their credits back already.
const SLOTS: usize = CREDITS + FRAMES_MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// Its frame is coming.
    Coming,
    /// Waits for requests of earlier sessions to the same disk.
    Held,
    /// A disk has it.
    Working,
    /// Its answer waits to be sent.
    Answered,
    /// Its answer is in the batch.
    Sending,
}

#[derive(Debug)]
struct Slot {
    state: State,
    session: u32,
    tag: u32,
    disk: u16,
    /// Which opening of the disk is meant.
    turn: u32,
    header: Header,
    request: Request,
    reply: Option<Reply>,
}

/// What the driver is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// Names it: for [`Server::answered`].
    pub slot: u16,
    /// For which disk of this node.
    pub disk: u16,
    /// Goes with it.
    pub header: Header,
    /// What to do; its memory is the slot's.
    pub request: Request,
}

/// A disk of this node as the peers are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Which disk.
    pub uuid: DiskUuid,
    /// Its present boot.
    pub boot: BootId,
    /// Its present span of power.
    pub power: PowerId,
}

/// See the module.
#[derive(Debug)]
pub struct Server {
    memory: ManuallyDrop<Arena>,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    batch: Batch,
    incoming: Incoming,
    open: bool,
    session: u32,
    greeted: bool,
    /// The slot of the frame that is coming.
    coming: Option<u16>,
    /// Credits to be given with the next frame.
    credits: u16,
    answered: VecDeque<u16>,
    /// Whose answers are in the batch.
    sending: Vec<u16>,
    held: VecDeque<u16>,
    /// Requests of earlier sessions that disks still have.
    old: Box<[u16; DISKS_MAX]>,
    offers: Box<[Option<Offer>; DISKS_MAX]>,
    turns: Box<[u32; DISKS_MAX]>,
    /// Disks of which the peer is to be told.
    tell: VecDeque<u16>,
    scratch: Vec<u8>,
    counts: LinkCounts,
}

impl Server {
    /// Takes the memory it will ever have.
    ///
    /// # Errors
    /// When the kernel has none.
    pub fn new() -> std::io::Result<Self> {
        let idle = || Slot {
            state: State::Free,
            session: 0,
            tag: 0,
            disk: 0,
            turn: 0,
            header: Head::new(Kind::Flush).header(),
            request: Request::Flush,
            reply: None,
        };
        Ok(Server {
            memory: ManuallyDrop::new(Arena::new(SLOTS * BLOCKS_PER_EXTENT)?),
            slots: (0..SLOTS).map(|_| idle()).collect(),
            free: (0..SLOTS as u16).rev().collect(),
            batch: Batch::new(),
            incoming: Incoming::new()?,
            open: false,
            session: 0,
            greeted: false,
            coming: None,
            credits: 0,
            answered: VecDeque::with_capacity(SLOTS),
            sending: Vec::with_capacity(FRAMES_MAX),
            held: VecDeque::with_capacity(SLOTS),
            old: Box::new([0; DISKS_MAX]),
            offers: Box::new([None; DISKS_MAX]),
            turns: Box::new([0; DISKS_MAX]),
            tell: VecDeque::with_capacity(DISKS_MAX),
            scratch: Vec::with_capacity(META_MAX),
            counts: LinkCounts::default(),
        })
    }

    /// Counters since it was made.
    pub fn counts(&self) -> LinkCounts {
        self.counts
    }

    /// No disk has a request of it.
    pub fn quiet(&self) -> bool {
        self.slots.iter().all(|slot| slot.state != State::Working)
    }

    /// A disk can be reached, or not any more.
    pub fn offer(&mut self, disk: u16, offer: Option<Offer>) {
        let at = usize::from(disk);
        if self.offers[at].is_none() && offer.is_none() {
            return;
        }
        self.offers[at] = offer;
        if offer.is_some() {
            self.turns[at] += 1;
        }
        if self.open && !self.tell.contains(&disk) {
            self.tell.push_back(disk);
        }
    }

    /// A connection begins; the one before has ended.
    pub fn begin(&mut self, key: &SessionKey) {
        assert!(!self.open, "one connection after the other");
        (self.open, self.greeted) = (true, false);
        self.session = self.session.wrapping_add(1);
        self.batch.begin(key, false);
        self.incoming.begin(key, true);
        self.tell.clear();
        for disk in 0..DISKS_MAX as u16 {
            if self.offers[usize::from(disk)].is_some() {
                self.tell.push_back(disk);
            }
        }
        let old: u16 = self.old.iter().sum();
        self.credits = CREDITS as u16 - old.min(CREDITS as u16);
        self.counts.sessions += 1;
    }

    /// The connection has ended; no I/O on it is under way.
    pub fn end(&mut self) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        self.batch.clear();
        self.coming = None;
        self.answered.clear();
        self.sending.clear();
        self.held.clear();
        for n in 0..SLOTS {
            let slot = &mut self.slots[n];
            match slot.state {
                State::Free => {}
                State::Working => {
                    if slot.session == self.session {
                        self.old[usize::from(slot.disk)] += 1;
                    }
                }
                State::Coming | State::Held | State::Answered | State::Sending => self.give(n as u16),
            }
        }
    }

    fn give(&mut self, n: u16) {
        let slot = &mut self.slots[usize::from(n)];
        slot.state = State::Free;
        slot.reply = None;
        self.free.push(n);
    }

    /// Where what comes next is to be received.
    pub fn room(&mut self) -> (*mut u8, usize) {
        self.incoming.room()
    }

    /// So many bytes came. Jobs are appended to `out`.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub fn received(&mut self, bytes: usize, out: &mut Vec<Job>) -> Result<(), FrameError> {
        self.counts.bytes_received += bytes as u64;
        self.incoming.filled(bytes);
        let result = self.take_parts(out);
        self.counts.bad_frames += u64::from(result.is_err());
        result
    }

    fn take_parts(&mut self, out: &mut Vec<Job>) -> Result<(), FrameError> {
        while let Some(part) = self.incoming.take()? {
            match part {
                Part::Head(head, _) => self.head(&head)?,
                Part::Meta => self.meta()?,
                Part::Block(block) => self.block(block)?,
                Part::End => self.whole(out),
            }
        }
        Ok(())
    }

    /// A request is coming.
    fn head(&mut self, head: &Head) -> Result<(), FrameError> {
        if !head.kind.is_request() || !self.greeted || usize::from(head.disk) >= DISKS_MAX {
            return Err(FrameError::Kind);
        }
        // Only one that was given no credit finds none.
        let n = self.free.pop().ok_or(FrameError::Value)?;
        let slot = &mut self.slots[usize::from(n)];
        (slot.state, slot.session, slot.tag, slot.disk) = (State::Coming, self.session, head.tag, head.disk);
        (slot.turn, slot.header) = (head.turn, head.header());
        self.coming = Some(n);
        Ok(())
    }

    /// What the request says is there; for one with data that is still to come.
    fn meta(&mut self) -> Result<(), FrameError> {
        let n = usize::from(self.coming.expect("a header came before"));
        let data = self.memory.payload(n * BLOCKS_PER_EXTENT);
        self.slots[n].request = decode_request(self.incoming.head(), self.incoming.meta(), data)?;
        Ok(())
    }

    /// A block of the request's data: the one copy on this side, with its checksum.
    fn block(&mut self, block: u8) -> Result<(), FrameError> {
        let n = usize::from(self.coming.expect("a header came before"));
        let expected = match &self.slots[n].request {
            Request::Write { span, crcs, .. } => crcs[usize::from(span.first + block)],
            Request::Install { image, .. } => image.crcs[usize::from(block)],
            _ => unreachable!("no other request has data"),
        };
        let data = self.memory.payload(n * BLOCKS_PER_EXTENT + usize::from(block));
        let mut crc = [0];
        // SAFETY: a whole block is in the receive buffer and the slot has room for an extent; the slot's memory is used
        // by nobody while its request is coming.
        unsafe { checksum::copy_out(self.incoming.block(), data, &mut crc) };
        if crc[0] == expected {
            return Ok(());
        }
        // The network's own checksums let it pass. A new connection brings it again.
        self.counts.mismatches += 1;
        Err(FrameError::Data)
    }

    /// The request is complete.
    fn whole(&mut self, out: &mut Vec<Job>) {
        self.counts.requests += 1;
        let n = self.coming.take().expect("a header came before");
        let slot = &mut self.slots[usize::from(n)];
        let disk = usize::from(slot.disk);
        if self.old[disk] > 0 {
            slot.state = State::Held;
            self.held.push_back(n);
        } else {
            self.work(n, out);
        }
    }

    /// A disk gets the request, if it is still the one that is meant.
    fn work(&mut self, n: u16, out: &mut Vec<Job>) {
        let slot = &mut self.slots[usize::from(n)];
        let disk = usize::from(slot.disk);
        if self.offers[disk].is_none() || self.turns[disk] != slot.turn {
            self.counts.refused += 1;
            slot.state = State::Answered;
            slot.reply = Some(Reply::Refused(Status::DiskFailed));
            self.answered.push_back(n);
            return;
        }
        slot.state = State::Working;
        out.push(Job {
            slot: n,
            disk: slot.disk,
            header: slot.header,
            request: slot.request,
        });
    }

    /// A job has ended: nobody uses the slot's memory any more. Jobs that waited for it are appended to `out`.
    pub fn answered(&mut self, n: u16, reply: Reply, out: &mut Vec<Job>) {
        let slot = &mut self.slots[usize::from(n)];
        assert_eq!(slot.state, State::Working, "a job is answered once");
        if self.open && slot.session == self.session {
            slot.state = State::Answered;
            slot.reply = Some(reply);
            self.answered.push_back(n);
            return;
        }
        let disk = slot.disk;
        // While no connection is open, the jobs of the last one are counted already.
        self.old[usize::from(disk)] -= 1;
        self.give(n);
        self.counts.late += 1;
        if !self.open {
            return;
        }
        self.credits += 1;
        if self.old[usize::from(disk)] == 0 {
            for _ in 0..self.held.len() {
                let n = self.held.pop_front().expect("counted");
                if self.slots[usize::from(n)].disk == disk {
                    self.work(n, out);
                } else {
                    self.held.push_back(n);
                }
            }
        }
    }

    /// A batch is gathered and not all of it was sent.
    pub fn owes(&self) -> bool {
        !self.batch.is_empty()
    }

    /// Gathers what is to be sent, unless there is something already. `None`: nothing. The driver sends it, as a whole or
    /// in parts, calls [`Server::sent`], and does not come here in between.
    pub fn gather(&mut self) -> Option<&mut Batch> {
        if !self.open {
            return None;
        }
        if !self.batch.is_empty() {
            return Some(&mut self.batch);
        }
        while self.batch.has_room() {
            let Some(disk) = self.tell.pop_front() else { break };
            self.announce(disk);
        }
        if !self.greeted && self.tell.is_empty() && self.batch.has_room() {
            self.greeted = true;
            self.push_credits(Kind::Welcome);
        }
        while self.batch.has_room() {
            let Some(n) = self.answered.pop_front() else { break };
            self.push_answer(n);
        }
        if self.greeted && self.credits > 0 && self.batch.has_room() {
            self.push_credits(Kind::Credits);
        }
        (!self.batch.is_empty()).then_some(&mut self.batch)
    }

    fn announce(&mut self, disk: u16) {
        let at = usize::from(disk);
        let offer = self.offers[at];
        let known = offer.unwrap_or(Offer {
            uuid: DiskUuid(0),
            boot: BootId::default(),
            power: PowerId::default(),
        });
        let notice = Notice {
            disk,
            turn: self.turns[at],
            up: offer.is_some(),
            uuid: known.uuid,
            boot: known.boot,
            power: known.power,
        };
        let mut meta = [0; META_MAX];
        let (head, len) = notice.encode(&mut meta);
        // SAFETY: no data.
        unsafe { self.batch.push(&head, &meta[..len], (Payload::NONE, 0)) };
    }

    fn push_credits(&mut self, kind: Kind) {
        let mut head = Head::new(kind);
        head.credits = std::mem::take(&mut self.credits);
        // SAFETY: no data.
        unsafe { self.batch.push(&head, &[], (Payload::NONE, 0)) };
    }

    fn push_answer(&mut self, n: u16) {
        let memory = self.memory.payload(usize::from(n) * BLOCKS_PER_EXTENT);
        let slot = &mut self.slots[usize::from(n)];
        let reply = slot.reply.take().expect("an answered request has its answer");
        let (span, present) = match (&slot.request, &reply) {
            (Request::Read { span, raw, data }, Reply::Read { .. }) => {
                (Some(*span), present(span, *raw, *data, &reply))
            }
            _ => (None, 0),
        };
        let (mut head, reply) = match encode_reply(&reply, span.as_ref(), present, &mut self.scratch) {
            Some(head) => (head, reply),
            None => {
                // More than a frame can say.
                self.counts.refused += 1;
                let refusal = Reply::Refused(Status::Invalid);
                let head = encode_reply(&refusal, None, 0, &mut self.scratch).expect("a refusal is short");
                (head, refusal)
            }
        };
        head.tag = slot.tag;
        head.credits = 1 + std::mem::take(&mut self.credits);
        let data = if matches!(reply, Reply::Read { .. }) {
            present
        } else {
            0
        };
        slot.state = State::Sending;
        self.sending.push(n);
        // SAFETY: the slot has room for an extent and is left alone until the batch was sent.
        unsafe { self.batch.push(&head, &self.scratch, (memory, data)) };
    }

    /// So many bytes of the batch went out. True: all of it.
    pub fn sent(&mut self, bytes: usize) -> bool {
        self.counts.bytes_sent += bytes as u64;
        if !self.batch.sent(bytes) {
            return false;
        }
        while let Some(n) = self.sending.pop() {
            self.give(n);
        }
        true
    }
}

/// The blocks of a read's answer that are worth sending, by their place in the span: all that hold data which is
/// believed, and of a raw read those that are what their checksum says they are.
fn present(span: &Span, raw: bool, data: Payload, reply: &Reply) -> BlockMask {
    let Reply::Read { holes, bad, crcs, .. } = reply else {
        return 0;
    };
    let asked = span.mask();
    let mut present = asked & !holes & !bad;
    if raw {
        mask_runs(asked & bad, |first, count| {
            for b in first..first + count {
                let mut crc = [0];
                let block = data.advance(usize::from(b - span.first) * BLOCK);
                // SAFETY: the slot's own memory, which nobody uses any more.
                unsafe { checksum::sums(block, &mut crc) };
                if crc[0] == crcs[usize::from(b)] {
                    present |= 1 << b;
                }
            }
        });
    }
    present >> span.first
}

impl Drop for Server {
    fn drop(&mut self) {
        // What a disk still has keeps its memory: it is given up rather than given to somebody else.
        if self.quiet() && !self.open {
            // SAFETY: dropped once, here; no job names it and no connection sends it.
            unsafe { ManuallyDrop::drop(&mut self.memory) };
        }
    }
}
