//! A virtqueue as a reactor polls it: take requests, complete them in any order, hand the answers over in batches.
//!
//! Invariants:
//! * A head is Free, Taken or Completed; it is taken only while free and handed back exactly once. Caller errors here
//!   abort (asserted); the driver's errors break only the queue.
//! * Everything a [`Request`] points to stays mapped until it is completed: the queue holds the memory table, and it is
//!   stopped for a change of memory only when nothing is in flight.
//! * A head is in the log from before its request is given out until after the driver can see its answer.
//! * One load of the available index for each poll, one store of the used index for each publish: a cache line that goes
//!   between two cores is what a request costs most.
//!
//! Absent: eventfd writes and reads. The queue says when the driver wants a call; the reactor makes it (through io_uring:
//! a hostile front end could make a plain write block).

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::guest::MemoryTable;
use super::inflight::{Log, Resumed, crash_point};
use super::request::{IOERR, Limits, OK, Parsed, Range, Request, UNSUPP, parse};
use super::ring::{DESC_INDIRECT, DESC_NEXT, Desc, Ring};
use super::slots::{Slots, State};
use super::{Shared, count, sigbus};
use crate::memory::{Seg, prefetch};

/// Most heads taken in one go: enough to overlap their cache misses, few enough to stay in the cache until parsed.
const BATCH: usize = 32;
/// How far ahead an unwanted kick is put, and how many heads later again.
const PARK_AHEAD: u16 = 0x7fff;
const PARK_AGAIN: u16 = 0x3fff;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// Done.
    Ok,
    /// Failed; the contents of its blocks may be old or new.
    IoErr,
    /// Not something this device does.
    Unsupported,
}

/// What a session knows about a queue when it starts it.
pub(crate) struct Setup {
    pub(crate) shared: Arc<Shared>,
    pub(crate) memory: Arc<MemoryTable>,
    pub(crate) ring: Ring,
    /// Next position of the available ring, unless the log knows better.
    pub(crate) base: u16,
    pub(crate) event_idx: bool,
    pub(crate) kick: Option<OwnedFd>,
    pub(crate) call: Option<OwnedFd>,
    pub(crate) log: Option<Log>,
}

/// One virtqueue. Driven by one thread at a time.
pub struct Queue {
    ring: Ring,
    slots: Slots,
    /// Next position of the available ring to take from.
    next_avail: u16,
    /// Next position of the used ring to fill; below it and from `published` on: filled, not visible yet.
    next_used: u16,
    published: u16,
    /// Heads completed since the last publish, in order.
    batch: Vec<u16>,
    /// Requests given out and not completed.
    outstanding: u32,
    event_idx: bool,
    armed: bool,
    /// The driver is called at the next publish in any case: whoever had the queue before may have died between showing it
    /// answers and calling it, and with EVENT_IDX a call that was left out is never made up for.
    call_owed: bool,
    broken: bool,
    /// All requests fail: memory was truncated or the log is of another instance.
    failed: bool,
    poisonings_seen: u32,
    /// Where the unwanted kick was put last.
    parked_at: u16,
    hint: usize,
    /// Heads to do again after a reconnect, last one first.
    resubmit: Vec<u16>,
    log: Option<Log>,
    shared: Arc<Shared>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    /// Last: the pointers above lead into it.
    memory: Arc<MemoryTable>,
}

impl Queue {
    /// Takes over a queue from its front end, with what the log says was in flight.
    pub(crate) fn new(setup: Setup) -> std::io::Result<Self> {
        let Setup {
            shared,
            memory,
            ring,
            base,
            event_idx,
            kick,
            call,
            mut log,
        } = setup;
        let size = ring.size();
        let used = ring.used_idx();
        let mut slots = Slots::new(size)?;
        let (mut next_avail, mut resubmit) = (base, Vec::new());
        if let Some(recovered) = log
            .as_mut()
            .map(|log| log.recover(used))
            .filter(|r| r.used_before)
        {
            // Every head taken was either returned or is in the log.
            next_avail = used.wrapping_add(recovered.heads.len() as u16);
            resubmit = recovered.heads;
            resubmit.reverse();
            shared
                .counters
                .requests_resumed
                .fetch_add(resubmit.len() as u64, Ordering::Relaxed);
            for &head in &resubmit {
                slots.get(head).state = State::Taken;
            }
        }
        let failed = log.as_ref().is_some_and(|log| log.resumed() == Resumed::Foreign);
        let mut queue = Queue {
            slots,
            next_avail,
            next_used: used,
            published: used,
            batch: Vec::with_capacity(usize::from(size)),
            outstanding: 0,
            event_idx,
            armed: true,
            call_owed: true,
            broken: false,
            failed,
            poisonings_seen: sigbus::poisonings().wrapping_sub(1),
            parked_at: next_avail,
            hint: 0,
            resubmit,
            log,
            shared,
            kick,
            call,
            memory,
            ring,
        };
        queue.disarm();
        Ok(queue)
    }

    /// Takes up to `max` chains and gives the requests among them to `sink`; what is wrong with others is answered here.
    /// Returns the chains taken. Call [`Queue::publish`] afterwards even if no request came out.
    #[inline]
    pub fn poll(&mut self, max: usize, mut sink: impl FnMut(Request)) -> usize {
        if self.poisonings_seen != sigbus::poisonings() {
            self.look_for_poison();
        }
        if self.broken {
            return 0;
        }
        let mut done = self.poll_resubmitted(max, &mut sink);
        let ready = self.ring.avail_idx().wrapping_sub(self.next_avail);
        if ready > self.ring.size() {
            self.break_queue();
            return done;
        }
        let mut left = usize::from(ready).min(max - done);
        while left > 0 {
            let n = left.min(BATCH);
            let taken = self.take_batch(n, &mut sink);
            done += taken;
            left -= n;
            if taken < n {
                break;
            }
        }
        done
    }

    #[inline]
    fn take_batch(&mut self, n: usize, sink: &mut impl FnMut(Request)) -> usize {
        let mut heads = [0u16; BATCH];
        let mut firsts = [Desc::default(); BATCH];
        let mut taken = 0;
        // One stage for all, then the next: the cache misses of a stage overlap.
        for head in &mut heads[..n] {
            *head = self.ring.head(self.next_avail);
            if *head >= self.ring.size() || self.slots.get(*head).state != State::Free {
                self.break_queue();
                break;
            }
            prefetch::<false>(self.ring.desc_ptr(*head));
            self.slots.get(*head).state = State::Taken;
            if let Some(log) = &mut self.log {
                log.taken(*head);
                crash_point();
            }
            self.next_avail = self.next_avail.wrapping_add(1);
            taken += 1;
        }
        for (head, first) in heads[..taken].iter().zip(&mut firsts) {
            *first = self.ring.desc(*head);
            if let Some((ptr, _)) = self.memory.lookup(&mut self.hint, first.addr) {
                if first.flags & DESC_INDIRECT == 0 {
                    // The header, and drivers keep the status beside it: one way for the line instead of two.
                    prefetch::<true>(ptr);
                } else {
                    prefetch::<false>(ptr);
                    // The rest of a short table, mostly.
                    if first.len > 32 {
                        prefetch::<false>(ptr.wrapping_add(47));
                    }
                }
            }
            if first.flags & DESC_NEXT != 0 && first.next < self.ring.size() {
                prefetch::<false>(self.ring.desc_ptr(first.next));
            }
        }
        for (&head, &first) in heads[..taken].iter().zip(&firsts) {
            self.parse_one(head, first, sink);
        }
        taken
    }

    #[inline]
    fn parse_one(&mut self, head: u16, first: Desc, sink: &mut impl FnMut(Request)) {
        let shared = &*self.shared;
        let limits = Limits {
            ring: &self.ring,
            memory: &self.memory,
            counters: &shared.counters,
            serial: shared.config.serial.as_bytes(),
            read_only: shared.config.read_only,
            capacity_bytes: shared.capacity_bytes(),
        };
        match parse(&limits, &mut self.hint, &mut self.slots, head, first) {
            Parsed::Request(request) if !self.failed => {
                prefetch::<true>(self.slots.get(head).status);
                self.outstanding += 1;
                sink(request);
            }
            Parsed::Request(_) => {
                count(&shared.counters.requests_failed);
                self.finish(head, IOERR, 0);
            }
            Parsed::Answer { status, written } => {
                let written = if status == OK { written + 1 } else { 0 };
                self.finish(head, status, written);
            }
            Parsed::Broken => self.break_queue(),
        }
    }

    #[inline]
    fn poll_resubmitted(&mut self, max: usize, sink: &mut impl FnMut(Request)) -> usize {
        let mut done = 0;
        while done < max && !self.broken {
            let Some(head) = self.resubmit.pop() else { break };
            let first = self.ring.desc(head);
            self.parse_one(head, first, sink);
            done += 1;
        }
        done
    }

    /// Ends a request. Its memory is not touched afterwards; the driver sees it after the next [`Queue::publish`].
    /// `head` must be one given out by [`Queue::poll`] and not completed since.
    #[inline]
    pub fn complete(&mut self, head: u16, completion: Completion) {
        // What was copied to or from a page that is gone is not what the guest meant.
        if self.poisonings_seen != sigbus::poisonings() {
            self.look_for_poison();
        }
        let (status, written) = match completion {
            Completion::Ok if !self.failed => (OK, self.slots.get(head).written),
            Completion::Ok | Completion::IoErr => (IOERR, 0),
            Completion::Unsupported => (UNSUPP, 0),
        };
        self.finish(head, status, written);
        self.outstanding -= 1;
    }

    #[inline]
    fn finish(&mut self, head: u16, status: u8, written: u32) {
        let slot = self.slots.get(head);
        assert!(
            slot.state == State::Taken,
            "head {head} completed but not in flight"
        );
        slot.state = State::Completed;
        // SAFETY: the parser found this byte inside the guest's memory, which the queue's table keeps mapped.
        unsafe { slot.status.write_volatile(status) };
        self.ring.set_used(self.next_used, head, written);
        self.next_used = self.next_used.wrapping_add(1);
        if let Some(log) = &self.log {
            log.used(head);
        }
        // Never grows: there are no more heads than its capacity.
        self.batch.push(head);
    }

    /// Hands all completed requests to the driver. Returns the eventfd to write to if the driver wants to be called; it
    /// stays open as long as the queue.
    #[inline]
    pub fn publish(&mut self) -> Option<RawFd> {
        if self.batch.is_empty() && !self.call_owed {
            return None;
        }
        let owed = std::mem::take(&mut self.call_owed);
        let old = self.published;
        crash_point();
        self.ring.set_used_idx(self.next_used);
        crash_point();
        self.published = self.next_used;
        for &head in &self.batch {
            self.slots.get(head).state = State::Free;
            if let Some(log) = &self.log {
                log.returned(head);
            }
        }
        self.batch.clear();
        if let Some(log) = &self.log {
            log.batch_done(self.published);
        }
        let call = self.call.as_ref()?;
        // The driver enables calls and then looks at the index; we store the index and then look whether it wants calls.
        fence(Ordering::SeqCst);
        let wanted = owed
            || if self.event_idx {
                let event = self.ring.used_event();
                self.published.wrapping_sub(event).wrapping_sub(1) < self.published.wrapping_sub(old)
            } else {
                !self.ring.no_interrupt()
            };
        wanted.then(|| call.as_raw_fd())
    }

    /// The call that [`Queue::publish`] asked for could not be made, or another one is due: the next publish asks again.
    pub fn owe_call(&mut self) {
        self.call_owed = true;
    }

    /// Asks the driver for kicks, before going to sleep. True if there is work already: do not sleep then, but
    /// [`Queue::disarm`] and poll.
    pub fn arm(&mut self) -> bool {
        self.armed = true;
        if self.event_idx {
            self.ring.set_avail_event(self.next_avail);
        } else {
            self.ring.set_no_notify(false);
        }
        // The driver stores its index and then looks whether we want kicks; we do it the other way round.
        fence(Ordering::SeqCst);
        !self.broken && (!self.resubmit.is_empty() || self.ring.avail_idx() != self.next_avail)
    }

    /// Tells the driver that nobody needs kicks while the queue is polled. A few may come all the same.
    pub fn disarm(&mut self) {
        self.armed = false;
        if self.event_idx {
            self.park();
        } else {
            self.ring.set_no_notify(true);
        }
    }

    fn park(&mut self) {
        self.parked_at = self.next_avail;
        self.ring
            .set_avail_event(self.next_avail.wrapping_add(PARK_AHEAD));
    }

    /// With EVENT_IDX kicks are suppressed by asking for one far ahead, which comes nearer. Cheap; call it now and then
    /// (each few hundred polls) while polling.
    #[inline]
    pub fn keep_disarmed(&mut self) {
        if self.event_idx && !self.armed && self.next_avail.wrapping_sub(self.parked_at) > PARK_AGAIN {
            self.park();
        }
    }

    /// Memory of the device was truncated under it: what was read from it means nothing.
    #[inline]
    pub fn poisoned(&mut self) -> bool {
        if self.poisonings_seen != sigbus::poisonings() {
            self.look_for_poison();
        }
        self.failed
    }

    #[cold]
    fn look_for_poison(&mut self) {
        self.poisonings_seen = sigbus::poisonings();
        let poisoned = self.memory.poisoned() || self.log.as_ref().is_some_and(Log::poisoned);
        if poisoned && !self.failed {
            self.failed = true;
            count(&self.shared.counters.memory_truncated);
        }
    }

    #[cold]
    fn break_queue(&mut self) {
        if !self.broken {
            self.broken = true;
            count(&self.shared.counters.queues_broken);
        }
    }

    /// Requests given out by [`Queue::poll`] or answered in it, and not yet published. At zero the queue may be given back.
    pub fn in_flight(&self) -> usize {
        self.outstanding as usize + self.batch.len()
    }

    /// The segments of a request that was given out and not completed.
    pub fn segs(&self, request: &Request) -> &[Seg] {
        self.slots.segs(request.head)
    }

    /// The ranges of a discard or write-zeroes request that was given out and not completed.
    pub fn ranges(&mut self, request: &Request) -> &[Range] {
        use super::Kind;
        assert!(matches!(request.kind, Kind::Discard | Kind::WriteZeroes));
        let ptr = self.slots.scratch(request.head).cast::<Range>();
        // SAFETY: the parser left `len` ranges there.
        unsafe { std::slice::from_raw_parts(ptr, request.len as usize) }
    }

    /// The driver broke a rule that leaves no way to answer; nothing more is taken from this queue.
    pub fn broken(&self) -> bool {
        self.broken
    }

    /// Whether requests of an earlier connection are being resumed.
    pub fn resumed(&self) -> Resumed {
        self.log.as_ref().map_or(Resumed::Fresh, Log::resumed)
    }

    /// Becomes readable when the driver kicks; `None`: it never does, the queue must be polled.
    pub fn kick_fd(&self) -> Option<RawFd> {
        self.kick.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// What the queue shares with its session: size of the device, cache mode, counters.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Position of the available ring at which the queue goes on: what GET_VRING_BASE answers.
    pub(crate) fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Gives the eventfds back to the session.
    pub(crate) fn into_fds(self) -> (Option<OwnedFd>, Option<OwnedFd>) {
        (self.kick, self.call)
    }
}
