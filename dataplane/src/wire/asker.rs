//! The owner's end of a link: requests to the disks of one peer out, answers in. Sans-I/O.
//!
//! Requests to one disk go out in the order they came; no disk may take more than half of the credits, so that one that has
//! stopped does not stop the others. A request keeps its place until it is answered, over as many connections as it takes:
//! when one ends, what is unanswered is sent again by the next, in order, provided that the peer is still the same process
//! (the driver knows). A disk of which the peer does not speak any more is down, with all that was asked of it.
//!
//! Invariants:
//! * The memory of a request is read while its batch is being sent and written by [`Asker::received`], at no other time. Before
//!   [`Effect::Down`] or [`Effect::Abandoned`] comes, both have ended for the requests concerned.
//! * A block that was read is handed on as good only if it matches the checksum that came from the disk with it.
//! * Nothing is asked of a disk in a later stay than the asker meant: what it would be told to let go of is not here.
//! * An answer that fits no request ends the connection; one that came too late is passed over and counted.
//!
//! Deliberately absent: sockets, clocks, the decision when a peer is lost (the driver's: [`Asker::lose`]), retries of what was
//! refused.

use std::collections::VecDeque;

use super::LinkCounts;
use super::frame::{FrameError, Head, Kind, META_MAX};
use super::handshake::SessionKey;
use super::message::{Notice, decode_reply, encode_request};
use super::stream::{Batch, FRAMES_MAX, Incoming, Part};
use crate::checksum;
use crate::ids::{BLOCK, BlockMask, DiskUuid, VolumeId};
use crate::plane::DISKS_MAX;
use crate::replica::{Header, Reply, Request, Status};

/// Bits of a tag that are the request's place; the others tell apart who had it before.
const PLACE_BITS: u32 = 20;
/// Most credits that are believed.
const CREDITS_MAX: u32 = 1 << 14;
const TURN_MASK: u32 = (1 << (32 - PLACE_BITS)) - 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// Not sent over this connection yet.
    Waiting,
    /// Sent, unanswered.
    Out,
    /// Sent, and nobody wants the answer any more: its memory is not ours.
    Cancelled,
    /// Answered, before we heard that it was sent.
    Spent,
}

#[derive(Debug)]
struct Asked {
    state: State,
    /// In the batch that is being sent: its memory is being read.
    sending: bool,
    /// It was sent before, over another connection.
    again: bool,
    turn: u32,
    /// Order of asking.
    order: u64,
    /// The driver's name for it.
    tag: u64,
    /// The driver's group: what is abandoned together.
    group: u32,
    disk: u16,
    header: Header,
    request: Request,
}

#[derive(Debug, Default)]
struct FarDisk {
    notice: Option<Notice>,
    /// What it will be as soon as what it was has ended.
    next: Option<Notice>,
    /// Counts how often it came up. Who asks says which time is meant: it may not have heard yet that it went and came.
    stay: u32,
    /// Told of over this connection.
    fresh: bool,
    waiting: VecDeque<u32>,
    /// Sent and not answered, wanted or not.
    out: u32,
    cancelled: u32,
    /// In `round`.
    listed: bool,
}

impl FarDisk {
    fn come_up(&mut self, notice: Notice) {
        self.notice = Some(notice);
        self.stay = self.stay.wrapping_add(1);
    }
}

/// What the driver is to do or know.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// A request was answered.
    Answer {
        /// Which.
        tag: u64,
        /// How.
        reply: Reply,
    },
    /// A disk of the peer can be asked.
    Up(Notice),
    /// A disk of the peer can not be asked any more; no request to it will be answered, and none touches its memory.
    Down(DiskUuid),
    /// The end of [`Asker::abandon`].
    Abandoned {
        /// As given.
        group: u32,
        /// The peer's number of the disk.
        disk: u16,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Asker {
    asked: Vec<Asked>,
    free: Vec<u32>,
    disks: Box<[FarDisk]>,
    /// Disks with requests that may be sent, in turn.
    round: VecDeque<u16>,
    /// Requests in the batch.
    sending: Vec<u32>,
    /// What was cancelled while its memory was being read: the group, or the whole disk.
    ending: Vec<(Option<u32>, u16)>,
    batch: Batch,
    incoming: Incoming,
    open: bool,
    welcome: bool,
    credits: u32,
    /// Requests sent over this connection and not answered.
    out: u32,
    /// Most requests that could be out at a time on this connection.
    most: u32,
    order: u64,
    /// The request whose answer is coming, and what was decoded of it.
    coming: Option<u32>,
    reply: Option<Reply>,
    counts: LinkCounts,
}

impl Asker {
    /// An end without a connection.
    ///
    /// # Errors
    /// When the kernel has no memory for the receive buffer.
    pub fn new() -> std::io::Result<Self> {
        Ok(Asker {
            asked: Vec::with_capacity(4096),
            free: Vec::with_capacity(4096),
            disks: (0..DISKS_MAX).map(|_| FarDisk::default()).collect(),
            round: VecDeque::with_capacity(DISKS_MAX),
            sending: Vec::with_capacity(FRAMES_MAX),
            ending: Vec::new(),
            batch: Batch::new(),
            incoming: Incoming::new()?,
            open: false,
            welcome: false,
            credits: 0,
            out: 0,
            most: 0,
            order: 0,
            coming: None,
            reply: None,
            counts: LinkCounts::default(),
        })
    }

    /// Counters since it was made.
    pub fn counts(&self) -> LinkCounts {
        self.counts
    }

    /// The disks of the peer that can be asked now, each with its stay for [`Asker::ask`]: told of, on an open connection,
    /// and nothing abandoned is still with them.
    pub fn disks(&self) -> impl Iterator<Item = (&Notice, u32)> {
        let open = self.welcome;
        self.disks
            .iter()
            .filter(move |disk| open && disk.cancelled == 0)
            .filter_map(|disk| Some((disk.notice.as_ref()?, disk.stay)))
    }

    /// Requests that are not answered yet.
    pub fn pending(&self) -> usize {
        self.asked.len() - self.free.len()
    }

    /// Asks. `disk` is the peer's number of it and its stay, `group` what [`Asker::abandon`] goes by. False: the disk is
    /// down, or was down since and has come back; there will be no answer.
    ///
    /// The request's memory stays its asker's until the answer (or the effect that says that there will be none).
    pub fn ask(
        &mut self,
        tag: u64,
        group: u32,
        (disk, stay): (u16, u32),
        header: Header,
        request: Request,
    ) -> bool {
        let far = &self.disks[usize::from(disk)];
        if far.notice.is_none() || far.stay != stay {
            self.counts.refused += 1;
            return false;
        }
        self.counts.requests += 1;
        let place = self.free.pop().unwrap_or_else(|| {
            assert!(
                self.asked.len() < 1 << PLACE_BITS,
                "requests are bounded by those who ask"
            );
            self.asked.push(Asked {
                state: State::Free,
                sending: false,
                again: false,
                turn: 0,
                order: 0,
                tag,
                group,
                disk,
                header,
                request,
            });
            self.asked.len() as u32 - 1
        });
        self.order += 1;
        let asked = &mut self.asked[place as usize];
        asked.turn = asked.turn.wrapping_add(1) & TURN_MASK;
        (asked.state, asked.sending, asked.again) = (State::Waiting, false, false);
        (asked.tag, asked.group, asked.disk, asked.order) = (tag, group, disk, self.order);
        (asked.header, asked.request) = (header, request);
        self.disks[usize::from(disk)].waiting.push_back(place);
        self.list(disk);
        true
    }

    fn list(&mut self, disk: u16) {
        let far = &mut self.disks[usize::from(disk)];
        if !far.listed && !far.waiting.is_empty() {
            far.listed = true;
            self.round.push_back(disk);
        }
    }

    /// The request is over; its place is free when its batch is, too.
    fn give(&mut self, place: u32) {
        if self.asked[place as usize].sending {
            self.asked[place as usize].state = State::Spent;
            return;
        }
        self.asked[place as usize].state = State::Free;
        self.free.push(place);
    }

    /// A connection begins; the one before has ended.
    pub fn begin(&mut self, key: &SessionKey) {
        assert!(!self.open, "one connection after the other");
        (self.open, self.welcome) = (true, false);
        (self.credits, self.most, self.out) = (0, 0, 0);
        self.batch.begin(key, true);
        self.incoming.begin(key, false);
        for disk in &mut self.disks {
            disk.fresh = false;
        }
        self.counts.sessions += 1;
    }

    /// The connection has ended; no I/O on it is under way. What is unanswered waits for the next.
    pub fn end(&mut self, out: &mut Vec<Effect>) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        self.welcome = false;
        self.batch.clear();
        self.sending.clear();
        (self.coming, self.reply) = (None, None);
        let mut again = Vec::new();
        for place in 0..self.asked.len() as u32 {
            let asked = &mut self.asked[place as usize];
            asked.sending = false;
            match asked.state {
                State::Free | State::Waiting => {}
                State::Out => {
                    (asked.state, asked.again) = (State::Waiting, true);
                    again.push(place);
                }
                State::Cancelled | State::Spent => self.give(place),
            }
        }
        again.sort_unstable_by_key(|&place| std::cmp::Reverse(self.asked[place as usize].order));
        for disk in &mut self.disks {
            (disk.out, disk.cancelled) = (0, 0);
        }
        for place in again {
            let disk = self.asked[place as usize].disk;
            self.disks[usize::from(disk)].waiting.push_front(place);
        }
        for disk in 0..DISKS_MAX as u16 {
            self.list(disk);
        }
        self.report_ended(out);
    }

    /// The peer is another process, or away for too long: all its disks are down. No connection is open.
    pub fn lose(&mut self, out: &mut Vec<Effect>) {
        assert!(!self.open, "a connection is ended first");
        for disk in 0..DISKS_MAX as u16 {
            self.down(disk, out);
        }
    }

    fn down(&mut self, disk: u16, out: &mut Vec<Effect>) {
        if self.disks[usize::from(disk)].notice.is_some() {
            self.cancel(None, disk);
            self.report_ended(out);
        }
    }

    /// Nobody wants the answers any more to what this group asked of this disk. [`Effect::Abandoned`] comes when none of these
    /// requests can touch memory any more. True: that needs the connection to be ended, by the driver.
    pub fn abandon(&mut self, group: u32, disk: u16, out: &mut Vec<Effect>) -> bool {
        self.cancel(Some(group), disk);
        self.report_ended(out);
        !self.ending.is_empty()
    }

    fn cancel(&mut self, group: Option<u32>, disk: u16) {
        let meant = |asked: &Asked| asked.disk == disk && group.is_none_or(|group| asked.group == group);
        self.drop_waiting(group, disk);
        for place in 0..self.asked.len() as u32 {
            let asked = &mut self.asked[place as usize];
            if !meant(asked) {
                continue;
            }
            match asked.state {
                State::Out => {
                    asked.state = State::Cancelled;
                    self.disks[usize::from(disk)].cancelled += 1;
                }
                State::Free | State::Waiting | State::Cancelled | State::Spent => {}
            }
        }
        // It ends once, however often that was said: the second time it would be what came after it.
        if !self.ending.contains(&(group, disk)) {
            self.ending.push((group, disk));
        }
    }

    /// What was not sent is over.
    fn drop_waiting(&mut self, group: Option<u32>, disk: u16) {
        let mut waiting = std::mem::take(&mut self.disks[usize::from(disk)].waiting);
        waiting.retain(|&place| {
            let kept = group.is_some_and(|group| self.asked[place as usize].group != group);
            if !kept {
                self.give(place);
            }
            kept
        });
        self.disks[usize::from(disk)].waiting = waiting;
    }

    /// Says what has ended now that its memory is not being read any more.
    fn report_ended(&mut self, out: &mut Vec<Effect>) {
        let mut at = 0;
        while at < self.ending.len() {
            let (group, disk) = self.ending[at];
            let reading = self.sending.iter().any(|&place| {
                let asked = &self.asked[place as usize];
                asked.disk == disk && group.is_none_or(|group| asked.group == group)
            });
            if reading {
                at += 1;
                continue;
            }
            self.ending.swap_remove(at);
            // Its asker did not know yet and may have gone on asking; from now on the memory is not ours.
            self.drop_waiting(group, disk);
            match group {
                Some(group) => out.push(Effect::Abandoned { group, disk }),
                None => {
                    let far = &mut self.disks[usize::from(disk)];
                    if let Some(notice) = far.notice.take() {
                        out.push(Effect::Down(notice.uuid));
                    }
                    if let Some(next) = far.next.take() {
                        far.come_up(next);
                        if self.welcome {
                            out.push(Effect::Up(next));
                        }
                    }
                }
            }
        }
    }

    /// Gathers what may be sent, unless there is something already. `None`: nothing. The driver sends it, as a whole or in
    /// parts, calls [`Asker::sent`], and does not come here in between.
    pub fn gather(&mut self, out: &mut Vec<Effect>) -> Option<&mut Batch> {
        if !self.welcome {
            return None;
        }
        if !self.batch.is_empty() {
            return Some(&mut self.batch);
        }
        let mut left = self.round.len();
        while left > 0 && self.batch.has_room() {
            if self.credits == 0 {
                self.counts.waits += 1;
                break;
            }
            let disk = self.round.pop_front().expect("counted");
            let far = &mut self.disks[usize::from(disk)];
            // One that has its share is listed again when it answers.
            let next = if far.out < (self.most / 2).max(1) {
                far.waiting.pop_front()
            } else {
                None
            };
            let Some(place) = next else {
                far.listed = false;
                left -= 1;
                continue;
            };
            self.push(place, out);
            self.round.push_back(disk);
        }
        (!self.batch.is_empty()).then_some(&mut self.batch)
    }

    fn push(&mut self, place: u32, out: &mut Vec<Effect>) {
        let asked = &mut self.asked[place as usize];
        let far = &mut self.disks[usize::from(asked.disk)];
        let mut meta = [0; META_MAX];
        let Some((mut head, len, data)) = encode_request(&asked.header, &asked.request, &mut meta) else {
            // What can not even be said is refused as the replica would refuse it.
            self.counts.refused += 1;
            let reply = Reply::Refused(Status::Invalid);
            out.push(Effect::Answer {
                tag: asked.tag,
                reply,
            });
            return self.give(place);
        };
        head.tag = asked.turn << PLACE_BITS | place;
        head.disk = asked.disk;
        head.turn = far.notice.as_ref().map_or(0, |notice| notice.turn);
        (asked.state, asked.sending) = (State::Out, true);
        self.counts.resent += u64::from(asked.again);
        far.out += 1;
        self.out += 1;
        self.credits -= 1;
        self.sending.push(place);
        // SAFETY: the asker keeps the memory until the answer, or until it is told that there will be none; and that it is
        // not told before the batch was sent or the connection has ended.
        unsafe { self.batch.push(&head, &meta[..len], data) };
    }

    /// A batch is gathered and not all of it was sent.
    pub fn owes(&self) -> bool {
        !self.batch.is_empty()
    }

    /// So many bytes of the batch went out. True: all of it.
    pub fn sent(&mut self, bytes: usize, out: &mut Vec<Effect>) -> bool {
        self.counts.bytes_sent += bytes as u64;
        if !self.batch.sent(bytes) {
            return false;
        }
        while let Some(place) = self.sending.pop() {
            let asked = &mut self.asked[place as usize];
            asked.sending = false;
            if asked.state == State::Spent {
                self.give(place);
            }
        }
        if !self.ending.is_empty() {
            self.report_ended(out);
        }
        true
    }

    /// Where what comes next is to be received.
    pub fn room(&mut self) -> (*mut u8, usize) {
        self.incoming.room()
    }

    /// So many bytes came. What follows from them is appended to `out`.
    ///
    /// # Errors
    /// The connection is of no use any more.
    pub fn received(&mut self, bytes: usize, out: &mut Vec<Effect>) -> Result<(), FrameError> {
        self.counts.bytes_received += bytes as u64;
        self.incoming.filled(bytes);
        let result = self.take_parts(out);
        self.counts.bad_frames += u64::from(result.is_err());
        result
    }

    fn take_parts(&mut self, out: &mut Vec<Effect>) -> Result<(), FrameError> {
        while let Some(part) = self.incoming.take()? {
            match part {
                Part::Head(head, _) => self.head(&head)?,
                Part::Meta => self.meta(out)?,
                Part::Block(block) => self.block(block),
                Part::End => self.whole(out),
            }
        }
        Ok(())
    }

    /// Something is coming: does it answer anything?
    fn head(&mut self, head: &Head) -> Result<(), FrameError> {
        if self.credits + self.out + u32::from(head.credits) > CREDITS_MAX {
            return Err(FrameError::Value);
        }
        if !head.kind.is_reply() {
            let fits = match head.kind {
                Kind::Disk => usize::from(head.disk) < DISKS_MAX,
                Kind::Welcome => !self.welcome,
                Kind::Credits => self.welcome,
                _ => false,
            };
            return fits.then_some(()).ok_or(FrameError::Kind);
        }
        let place = head.tag & ((1 << PLACE_BITS) - 1);
        let asked = self.asked.get(place as usize).ok_or(FrameError::Value)?;
        if asked.turn != head.tag >> PLACE_BITS || !matches!(asked.state, State::Out | State::Cancelled) {
            return Err(FrameError::Value);
        }
        let fits = match (&asked.request, head.kind) {
            (_, Kind::Refused) => true,
            (Request::Read { span, .. }, Kind::ReadReply) => head.place[14..] == [span.first, span.count],
            (Request::Seal, Kind::Sealed) | (Request::Digest { .. }, Kind::DigestReply) => true,
            (Request::Read { .. } | Request::Seal | Request::Digest { .. }, _) => false,
            (_, kind) => kind == Kind::Done,
        };
        self.coming = Some(place);
        fits.then_some(()).ok_or(FrameError::Kind)
    }

    fn meta(&mut self, out: &mut Vec<Effect>) -> Result<(), FrameError> {
        let head = *self.incoming.head();
        match self.coming {
            Some(place) => {
                let volume: VolumeId = self.asked[place as usize].header.volume;
                self.reply = Some(decode_reply(&head, self.incoming.meta(), volume)?);
            }
            None if head.kind == Kind::Disk => {
                let notice = Notice::decode(&head, self.incoming.meta())?;
                self.told(notice, out);
            }
            None => {}
        }
        Ok(())
    }

    /// A block that was read: to where it belongs, the one copy on this side.
    fn block(&mut self, block: u8) {
        let asked = &self.asked[self.coming.expect("a header came before") as usize];
        let (Request::Read { span, data, .. }, Some(Reply::Read { bad, crcs, .. })) =
            (&asked.request, &mut self.reply)
        else {
            unreachable!("no other answer has data")
        };
        if asked.state != State::Out {
            return;
        }
        let b = usize::from(span.first + block);
        let mut crc = [0];
        let to = data.advance(usize::from(block) * BLOCK);
        // SAFETY: a whole block is in the receive buffer; the request's memory is the asker's until the answer, has room
        // for the span, and the span was compared when the header came.
        unsafe { checksum::copy_out(self.incoming.block(), to, &mut crc) };
        if crc[0] != crcs[b] {
            self.counts.mismatches += 1;
            crcs[b] = crc[0];
            *bad |= (1 as BlockMask) << b;
        }
    }

    fn whole(&mut self, out: &mut Vec<Effect>) {
        let head = *self.incoming.head();
        self.credits += u32::from(head.credits);
        let Some(place) = self.coming.take() else {
            self.most = self.most.max(self.credits + self.out);
            if head.kind == Kind::Welcome {
                self.welcomed(out);
            }
            return;
        };
        let reply = self.reply.take().expect("decoded with the content");
        let asked = &self.asked[place as usize];
        let (disk, wanted) = (asked.disk, asked.state == State::Out);
        if wanted {
            out.push(Effect::Answer {
                tag: asked.tag,
                reply,
            });
        }
        self.give(place);
        self.out -= 1;
        self.most = self.most.max(self.credits + self.out);
        let far = &mut self.disks[usize::from(disk)];
        far.out -= 1;
        if !wanted {
            self.counts.late += 1;
            far.cancelled -= 1;
            if far.cancelled == 0
                && let Some(notice) = far.notice
            {
                // It had been given up, and it lives.
                out.push(Effect::Up(notice));
            }
        }
        self.list(disk);
    }

    /// The peer speaks of one of its disks.
    fn told(&mut self, notice: Notice, out: &mut Vec<Effect>) {
        let far = &mut self.disks[usize::from(notice.disk)];
        far.fresh = true;
        if !notice.up {
            far.next = None;
            return self.down(notice.disk, out);
        }
        match far.notice {
            Some(known) if known == notice => far.next = None,
            Some(_) => {
                far.next = Some(notice);
                self.down(notice.disk, out);
            }
            None => {
                far.come_up(notice);
                if self.welcome {
                    out.push(Effect::Up(notice));
                }
            }
        }
    }

    /// All disks were told of.
    fn welcomed(&mut self, out: &mut Vec<Effect>) {
        self.welcome = true;
        for disk in 0..DISKS_MAX as u16 {
            if !self.disks[usize::from(disk)].fresh {
                self.down(disk, out);
            } else if let Some(notice) = self.disks[usize::from(disk)].notice {
                out.push(Effect::Up(notice));
            }
        }
    }
}
