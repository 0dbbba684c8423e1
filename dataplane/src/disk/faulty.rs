//! A disk that fails on command, around any other: what drills and tests break.
//!
//! [`FaultHandle`] is the switch, shared with any thread. With nothing switched on, an I/O costs one relaxed load and a
//! table entry more. Rules ([`Rule`]) pick I/Os by kind, range and count and say what becomes of them. In cached mode
//! the disk acts as a device with a volatile write cache: writes stay in memory until a flush, and
//! [`FaultHandle::drop_cache`] loses them, as a power cut does.
//!
//! Invariant: an I/O that no rule touches behaves as on the disk beneath. Faults are never silent to the tester: each one
//! carried out is counted. Deliberately absent: chance; who wants it draws the rules.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::faulty_cache::{Cache, Seen, Staged, overlay};
use super::{Busy, Completion, Disk, DiskInfo, Io, IoError, QUEUE_MAX, Token};
use crate::checksum;
use crate::ids::BLOCK;
use crate::memory::Payload;
use crate::reactor::Ring;
use crate::replica::Crcs;

/// Which I/Os a rule is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kinds {
    /// Reads and verifies.
    pub reads: bool,
    /// Writes.
    pub writes: bool,
    /// Write-zeroes.
    pub zeroes: bool,
    /// Flushes.
    pub flushes: bool,
}

impl Kinds {
    /// All of them.
    pub const ALL: Kinds = Kinds {
        reads: true,
        writes: true,
        zeroes: true,
        flushes: true,
    };
    /// Reads and verifies only.
    pub const READS: Kinds = Kinds {
        reads: true,
        writes: false,
        zeroes: false,
        flushes: false,
    };
    /// Writes only.
    pub const WRITES: Kinds = Kinds {
        reads: false,
        writes: true,
        zeroes: false,
        flushes: false,
    };
    /// Flushes only.
    pub const FLUSHES: Kinds = Kinds {
        reads: false,
        writes: false,
        zeroes: false,
        flushes: true,
    };
}

/// What becomes of an I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails and does nothing ([`IoError::NoSpace`] makes a full device).
    Fail(IoError),
    /// It is begun this much later.
    Delay(Duration),
    /// It is begun when [`FaultHandle::clear`] is called, or never.
    Stuck,
    /// A read returns one bit wrong in each block that lies in the rule's range, every time the same. (In a verify, only
    /// its checksum is wrong.)
    Rot,
    /// A write stores its first bytes only and reports success.
    Torn {
        /// Bytes that are stored, a multiple of 512 on real devices.
        bytes: u32,
    },
    /// A write, write-zeroes or flush does nothing and reports success.
    Lost,
}

/// A fault and the I/Os it happens to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Kinds of I/O.
    pub on: Kinds,
    /// Bytes of the disk; an I/O that overlaps them is meant. Flushes are in every range.
    pub range: Range<u64>,
    /// So many of these I/Os are spared first.
    pub after: u64,
    /// So many are hit then.
    pub times: u64,
    /// What becomes of them.
    pub fault: Fault,
}

impl Rule {
    /// Every I/O of these kinds, for good.
    pub fn always(on: Kinds, fault: Fault) -> Self {
        Rule {
            on,
            range: 0..u64::MAX,
            after: 0,
            times: u64::MAX,
            fault,
        }
    }
}

#[derive(Debug, Default)]
struct Plan {
    rules: Vec<Rule>,
    cached: bool,
}

#[derive(Debug, Default)]
struct Switch {
    /// There is a rule, cached mode, or something to undo: look at the plan.
    armed: AtomicBool,
    plan: Mutex<Plan>,
    /// How often rules were cleared: lets go what is stuck.
    clears: AtomicU64,
    drops: AtomicU64,
    faults: AtomicU64,
}

/// The switch of a [`FaultyDisk`].
#[derive(Clone, Debug, Default)]
pub struct FaultHandle(Arc<Switch>);

impl FaultHandle {
    fn plan(&self) -> MutexGuard<'_, Plan> {
        // A plan is consistent after any panic: nothing is left half done while it is locked.
        self.0.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a rule. Of several that fit an I/O the first added counts.
    pub fn add(&self, rule: Rule) {
        self.plan().rules.push(rule);
        self.0.armed.store(true, Ordering::Relaxed);
    }

    /// Takes all rules away and lets what is stuck or delayed go on. Cached mode stays as it is.
    pub fn clear(&self) {
        let mut plan = self.plan();
        plan.rules.clear();
        self.0.clears.fetch_add(1, Ordering::Relaxed);
        self.0.armed.store(plan.cached, Ordering::Relaxed);
    }

    /// Switches the volatile write cache on or off. Off: what it holds reaches the disk with the next flush.
    pub fn cached(&self, on: bool) {
        let mut plan = self.plan();
        plan.cached = on;
        self.0
            .armed
            .store(on || !plan.rules.is_empty(), Ordering::Relaxed);
    }

    /// Loses what was written since the last flush began (the disk does it at its next call).
    pub fn drop_cache(&self) {
        self.0.drops.fetch_add(1, Ordering::Relaxed);
    }

    /// Faults carried out so far.
    pub fn faults(&self) -> u64 {
        self.0.faults.load(Ordering::Relaxed)
    }
}

/// What an entry waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    /// To be begun at that time; without one, when the rules are cleared.
    Held(Option<Instant>),
    /// The I/O itself, on the disk beneath.
    Begun {
        rot: Option<(u64, u64)>,
    },
    /// Reading the block that a torn write leaves half old.
    TearRead {
        bytes: u32,
    },
    /// Writing that block, half new.
    TearWrite {
        bytes: u32,
    },
    /// The flush of the disk beneath, for all in `flushing`.
    Flush,
    /// A block of the cache on its way to the disk beneath.
    Destage,
}

struct Entry {
    token: Token,
    /// What was asked for.
    io: Io,
    /// What the disk beneath is asked for.
    send: Io,
    stage: Stage,
    aside: Option<Box<Staged>>,
    seen: Seen,
}

/// See the module.
pub struct FaultyDisk {
    inner: Box<dyn Disk>,
    info: DiskInfo,
    handle: FaultHandle,
    entries: Box<[Entry]>,
    free: Vec<u32>,
    /// To be given to the disk beneath as soon as it has room.
    ready: VecDeque<u32>,
    held: Vec<u32>,
    in_hand: usize,
    answers: Vec<Completion>,
    spare: Vec<Completion>,
    cache: Cache,
    /// Flushes that came while another one was being done.
    flushes: Vec<u32>,
    /// Flushes being done.
    flushing: Vec<u32>,
    destaging: usize,
    destage_error: Option<IoError>,
    clears_seen: u64,
    drops_seen: u64,
}

// SAFETY: segments and payloads in entries are names of memory that the asker keeps (`Disk::submit`) or that an entry
// or the cache owns itself; all of it moves with the disk.
unsafe impl Send for FaultyDisk {}

/// Entries kept for the cache's own writes.
const DESTAGE_MAX: usize = 64;

impl FaultyDisk {
    /// `inner`, and the switch that breaks it.
    pub fn new(inner: Box<dyn Disk>) -> (Self, FaultHandle) {
        let handle = FaultHandle::default();
        let entries = QUEUE_MAX + DESTAGE_MAX;
        let idle = || Entry {
            token: Token(0),
            io: Io::Flush,
            send: Io::Flush,
            stage: Stage::Idle,
            aside: None,
            seen: Seen::new(),
        };
        let disk = FaultyDisk {
            info: inner.info().clone(),
            inner,
            handle: handle.clone(),
            entries: (0..entries).map(|_| idle()).collect(),
            free: (0..entries as u32).rev().collect(),
            ready: VecDeque::with_capacity(entries),
            held: Vec::with_capacity(entries),
            in_hand: 0,
            answers: Vec::with_capacity(entries),
            spare: Vec::with_capacity(entries),
            cache: Cache::default(),
            flushes: Vec::new(),
            flushing: Vec::new(),
            destaging: 0,
            destage_error: None,
            clears_seen: 0,
            drops_seen: 0,
        };
        (disk, handle)
    }

    fn entry(&mut self, index: u32) -> &mut Entry {
        &mut self.entries[index as usize]
    }

    fn enlist(&mut self, token: Token, io: Io, stage: Stage) -> u32 {
        let index = self.free.pop().expect("the caller saw one");
        *self.entry(index) = Entry {
            token,
            io,
            send: io,
            stage,
            aside: None,
            seen: Seen::new(),
        };
        index
    }

    fn release(&mut self, index: u32) {
        let entry = self.entry(index);
        (entry.stage, entry.aside, entry.seen) = (Stage::Idle, None, Seen::new());
        self.free.push(index);
    }

    fn finish(&mut self, index: u32, result: Result<(), IoError>, crcs: Crcs, done: &mut Vec<Completion>) {
        let token = self.entry(index).token;
        self.release(index);
        self.in_hand -= 1;
        done.push(Completion { token, result, crcs });
    }

    /// What the rules say of an I/O, and whether writes are cached.
    fn consult(&self, io: &Io) -> (Option<(Fault, Range<u64>)>, bool) {
        let mut plan = self.handle.plan();
        let cached = plan.cached;
        let hit = plan
            .rules
            .iter_mut()
            .find_map(|rule| rule.hits(io).then(|| (rule.fault, rule.range.clone())));
        (hit, cached)
    }

    /// An I/O enters.
    fn decide(&mut self, index: u32, done: &mut Vec<Completion>) {
        let io = self.entry(index).io;
        let (hit, cached) = self.consult(&io);
        let Some((fault, range)) = hit else {
            return self.begin(index, None, cached, done);
        };
        let write = matches!(io, Io::Write { .. });
        let read = matches!(io, Io::Read { .. } | Io::Verify { .. });
        let carried_out = match fault {
            Fault::Fail(_) | Fault::Delay(_) | Fault::Stuck => true,
            Fault::Rot => read,
            Fault::Lost => !read,
            Fault::Torn { .. } => write,
        };
        if carried_out {
            self.handle.0.faults.fetch_add(1, Ordering::Relaxed);
        }
        match fault {
            Fault::Fail(error) => self.finish(index, Err(error), Crcs::default(), done),
            Fault::Delay(by) => self.hold(index, Some(Instant::now() + by)),
            Fault::Stuck => self.hold(index, None),
            Fault::Lost if !read => self.finish(index, Ok(()), Crcs::default(), done),
            Fault::Rot if read => self.begin(index, Some((range.start, range.end)), cached, done),
            Fault::Torn { bytes } if write => self.tear(index, bytes, done),
            Fault::Rot | Fault::Lost | Fault::Torn { .. } => self.begin(index, None, cached, done),
        }
    }

    fn hold(&mut self, index: u32, until: Option<Instant>) {
        self.entry(index).stage = Stage::Held(until);
        self.held.push(index);
    }

    /// An I/O is carried out, by the cache or by the disk beneath.
    fn begin(&mut self, index: u32, rot: Option<(u64, u64)>, cached: bool, done: &mut Vec<Completion>) {
        let io = self.entry(index).io;
        match io {
            Io::Write { offset, len, data } if cached || self.cache.holds(offset, len) => {
                // SAFETY: the asker keeps the payload until the completion that follows.
                unsafe { self.cache.write(offset, len, data) };
                self.finish(index, Ok(()), Crcs::default(), done);
            }
            Io::WriteZeroes { offset, len } if cached || self.cache.holds(offset, len) => {
                self.cache.zero(offset, len);
                self.finish(index, Ok(()), Crcs::default(), done);
            }
            Io::Flush if cached || !self.cache.is_empty() || !self.flushing.is_empty() => {
                self.flushes.push(index)
            }
            _ => {
                self.entry(index).seen = self.cache.look(&io);
                self.entry(index).stage = Stage::Begun { rot };
                self.ready.push_back(index);
            }
        }
    }

    fn tear(&mut self, index: u32, bytes: u32, done: &mut Vec<Completion>) {
        let Io::Write { offset, len, data } = self.entry(index).io else {
            unreachable!("only writes are torn");
        };
        let bytes = bytes.min(len);
        let whole = bytes / BLOCK as u32 * BLOCK as u32;
        self.cache.forget(offset, len);
        let entry = self.entry(index);
        if bytes > whole {
            let aside = Staged::new();
            entry.send = Io::Read {
                offset: offset + u64::from(whole),
                len: BLOCK as u32,
                data: aside.payload(),
                crcs: false,
            };
            entry.aside = Some(aside);
            entry.stage = Stage::TearRead { bytes };
            self.ready.push_back(index);
        } else {
            self.write_whole(index, whole, offset, data, done);
        }
    }

    /// The part of a torn write before the block it tears.
    fn write_whole(&mut self, index: u32, len: u32, offset: u64, data: Payload, done: &mut Vec<Completion>) {
        if len == 0 {
            return self.finish(index, Ok(()), Crcs::default(), done);
        }
        let entry = self.entry(index);
        entry.send = Io::Write { offset, len, data };
        entry.stage = Stage::Begun { rot: None };
        self.ready.push_back(index);
    }

    /// The disk beneath answered.
    fn answered(&mut self, answer: Completion, done: &mut Vec<Completion>) {
        let index = answer.token.0 as u32;
        let entry = &mut self.entries[index as usize];
        let mut crcs = answer.crcs;
        match (entry.stage, answer.result, entry.io) {
            (Stage::Destage, result, _) => {
                self.release(index);
                self.destaging -= 1;
                self.destage_error = self.destage_error.or(result.err());
            }
            (Stage::Flush, result, _) => {
                self.release(index);
                let result = self.destage_error.take().map_or(result, Err);
                for flush in std::mem::take(&mut self.flushing) {
                    self.finish(flush, result, Crcs::default(), done);
                }
            }
            (_, Err(error), _) => self.finish(index, Err(error), crcs, done),
            (Stage::TearRead { bytes }, _, Io::Write { offset, data, .. }) => {
                let (from, keep) = (bytes as usize / BLOCK * BLOCK, bytes as usize % BLOCK);
                let aside = entry.aside.as_mut().expect("taken with the stage");
                // SAFETY: the asker keeps the payload; the block aside is ours, its read has ended.
                unsafe { checksum::gather(data.advance(from), keep, aside.block()) };
                entry.send = Io::Write {
                    offset: offset + from as u64,
                    len: BLOCK as u32,
                    data: aside.payload(),
                };
                entry.stage = Stage::TearWrite { bytes };
                self.ready.push_back(index);
            }
            (Stage::TearWrite { bytes }, _, Io::Write { offset, data, .. }) => {
                self.write_whole(index, bytes / BLOCK as u32 * BLOCK as u32, offset, data, done);
            }
            (Stage::Begun { rot }, Ok(()), io) => {
                // SAFETY: the read has ended, so nobody else uses the payload, and the asker keeps it.
                unsafe {
                    overlay(&entry.seen, &io, &mut crcs);
                    if let Some((start, end)) = rot {
                        rot_what_was_read(&io, start..end, &mut crcs);
                    }
                }
                self.finish(index, Ok(()), crcs, done);
            }
            (stage, ..) => unreachable!("the disk beneath answered what it was not asked, in {stage:?}"),
        }
    }

    /// Moves flushes on: cache to the disk beneath, then its own flush.
    fn pump_flushes(&mut self) {
        if self.flushing.is_empty() && !self.flushes.is_empty() {
            std::mem::swap(&mut self.flushing, &mut self.flushes);
            self.cache.begin_flush();
            self.destage_error = None;
        }
        if self.flushing.is_empty() || self.entries.iter().any(|entry| entry.stage == Stage::Flush) {
            return;
        }
        while self.destaging < DESTAGE_MAX
            && let Some((offset, data)) = self.cache.next_to_write()
        {
            let io = match data {
                Some(data) => Io::Write {
                    offset,
                    len: BLOCK as u32,
                    data,
                },
                None => Io::WriteZeroes {
                    offset,
                    len: BLOCK as u32,
                },
            };
            let index = self.enlist(Token(0), io, Stage::Destage);
            self.ready.push_back(index);
            self.destaging += 1;
        }
        if self.destaging == 0 {
            self.cache.end_flush();
            let index = self.enlist(Token(0), Io::Flush, Stage::Flush);
            self.ready.push_back(index);
        }
    }

    fn pump_held(&mut self, done: &mut Vec<Completion>) {
        let clears = self.handle.0.clears.load(Ordering::Relaxed);
        let cleared = std::mem::replace(&mut self.clears_seen, clears) != clears;
        let now = Instant::now();
        let mut at = 0;
        while let Some(&index) = self.held.get(at) {
            let due = matches!(self.entry(index).stage, Stage::Held(Some(until)) if until <= now);
            if due || cleared {
                self.held.swap_remove(at);
                let cached = self.handle.plan().cached;
                self.begin(index, None, cached, done);
            } else {
                at += 1;
            }
        }
    }

    /// Does all that can be done now.
    fn pump(&mut self, ring: &mut Ring, done: &mut Vec<Completion>) {
        loop {
            if !self.flushes.is_empty() || !self.flushing.is_empty() {
                self.pump_flushes();
            }
            while let Some(&index) = self.ready.front() {
                let send = self.entry(index).send;
                let token = Token(u64::from(index));
                // SAFETY: the payload is the asker's, kept until we complete the I/O, or memory of the entry or of the
                // cache, which stays until the disk beneath answered.
                if unsafe { self.inner.submit(ring, token, send, &mut self.answers) }.is_err() {
                    break;
                }
                self.ready.pop_front();
            }
            if self.answers.is_empty() {
                return;
            }
            std::mem::swap(&mut self.answers, &mut self.spare);
            let mut spare = std::mem::take(&mut self.spare);
            for answer in spare.drain(..) {
                self.answered(answer, done);
            }
            self.spare = spare;
        }
    }

    fn lose_what_was_dropped(&mut self) {
        let drops = self.handle.0.drops.load(Ordering::Relaxed);
        if std::mem::replace(&mut self.drops_seen, drops) != drops {
            let lost = self.cache.drop_fresh();
            self.handle.0.faults.fetch_add(lost as u64, Ordering::Relaxed);
        }
    }
}

impl Rule {
    /// Counts an I/O that this rule is about. True: the rule strikes.
    fn hits(&mut self, io: &Io) -> bool {
        let (kind, range) = match *io {
            Io::Read { offset, len, .. } | Io::Verify { offset, len } => (self.on.reads, Some((offset, len))),
            Io::Write { offset, len, .. } => (self.on.writes, Some((offset, len))),
            Io::WriteZeroes { offset, len } => (self.on.zeroes, Some((offset, len))),
            Io::Flush => (self.on.flushes, None),
        };
        let inside = range.is_none_or(|(offset, len)| {
            offset < self.range.end && self.range.start < offset + u64::from(len)
        });
        if !kind || !inside {
            return false;
        }
        if self.after > 0 {
            self.after -= 1;
            return false;
        }
        let strikes = self.times > 0;
        self.times = self.times.saturating_sub(1);
        strikes
    }
}

/// Turns a bit over in each block read that lies in `range`.
///
/// # Safety
/// The payload of `io` is alive and nobody else uses it.
unsafe fn rot_what_was_read(io: &Io, range: Range<u64>, crcs: &mut Crcs) {
    let (offset, len, data, summed) = match *io {
        Io::Read {
            offset,
            len,
            data,
            crcs,
        } => (offset, len, Some(data), crcs),
        Io::Verify { offset, len } => (offset, len, None, true),
        _ => return,
    };
    for i in 0..len as usize / BLOCK {
        let block = offset + (i * BLOCK) as u64;
        if block + BLOCK as u64 <= range.start || block >= range.end {
            continue;
        }
        let Some(data) = data else {
            crcs[i] ^= 1;
            continue;
        };
        let number = (block / BLOCK as u64) as usize;
        let here = data.advance(i * BLOCK);
        // SAFETY: the caller's obligations; the one byte is within the payload's `len`.
        unsafe {
            here.advance(number.wrapping_mul(2_654_435_761) % BLOCK)
                .pieces(1, |ptr, _| {
                    ptr.write_volatile(ptr.read_volatile() ^ (1 << (number % 8)));
                });
            if summed {
                checksum::sums(here, &mut crcs[i..=i]);
            }
        }
    }
}

impl Disk for FaultyDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn attach(&mut self, ring: &mut Ring, owner: u32) -> io::Result<()> {
        self.inner.attach(ring, owner)?;
        self.info = self.inner.info().clone();
        // It can be switched to be at any time, and a store may well ask only once.
        self.info.volatile_cache = true;
        Ok(())
    }

    fn detach(&mut self, ring: &mut Ring) {
        self.inner.detach(ring);
    }

    unsafe fn submit(
        &mut self,
        ring: &mut Ring,
        token: Token,
        io: Io,
        done: &mut Vec<Completion>,
    ) -> Result<(), Busy> {
        io.check(self.info.bytes);
        if self.in_hand >= QUEUE_MAX {
            return Err(Busy);
        }
        self.lose_what_was_dropped();
        self.in_hand += 1;
        let index = self.enlist(token, io, Stage::Idle);
        if self.handle.0.armed.load(Ordering::Relaxed) {
            self.decide(index, done);
        } else {
            self.begin(index, None, false, done);
        }
        self.pump(ring, done);
        Ok(())
    }

    fn complete(&mut self, ring: &mut Ring, index: u32, result: i32, done: &mut Vec<Completion>) {
        self.inner.complete(ring, index, result, &mut self.answers);
        self.pump(ring, done);
    }

    fn poll(&mut self, ring: &mut Ring, done: &mut Vec<Completion>) -> bool {
        let before = done.len();
        self.lose_what_was_dropped();
        if !self.held.is_empty() {
            self.pump_held(done);
        }
        self.inner.poll(ring, &mut self.answers);
        self.pump(ring, done);
        done.len() > before
    }

    fn in_hand(&self) -> usize {
        self.in_hand
    }

    /// A delayed I/O is polled for. What is stuck is not: a sleeping reactor notices `clear` at its next tick.
    fn must_poll(&self) -> bool {
        let delayed = |&index: &u32| matches!(self.entries[index as usize].stage, Stage::Held(Some(_)));
        self.inner.must_poll() || self.held.iter().any(delayed)
    }
}
