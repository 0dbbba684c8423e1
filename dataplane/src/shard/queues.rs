//! The guests' queues on a reactor: busy ones are polled, idle ones wait for a kick.
//!
//! Every queue's kick eventfd is watched by the ring for as long as the queue runs. A queue that is polled asks its driver
//! not to kick; one that found nothing for [`QUEUE_SPIN_MS`] is armed and left alone until a kick comes. So a thousand idle
//! devices cost a turn nothing.

use std::sync::mpsc;

use crate::frontend::{Completion, Queue, Range, Request};
use crate::plane::{QueueKey, VolumeIndex};
use crate::reactor::{Event, Kind, Ring, Tag};

use super::Shard;

/// How long a queue is polled after the last request it had, beside busier ones, milliseconds.
const QUEUE_SPIN_MS: u64 = 5;
/// Most requests taken from one queue in a turn, so that none starves the others.
const TAKE_MAX: usize = 64;

/// The tag of the reactor's own bell.
pub(super) fn wake_tag() -> Tag {
    Tag {
        kind: Kind::Wake,
        owner: 0,
        index: 0,
    }
}

struct Slot {
    key: QueueKey,
    volume: VolumeIndex,
    queue: Box<Queue>,
    polled: bool,
    last_work: u64,
    polls: u32,
    watched: bool,
    /// Answers wait to be published.
    dirty: bool,
    /// A call to the driver is with the kernel: one at a time, since a driver may have filled its eventfd so that none ends.
    calling: bool,
    /// Another one is due then.
    call_again: bool,
    /// The kernel was asked to give up on the call.
    cancelled: bool,
    stopping: Option<mpsc::Sender<Box<Queue>>>,
}

/// All queues of a reactor.
pub(super) struct Queues {
    slots: Vec<Option<Slot>>,
    /// How often each slot was used: events for an earlier queue are not taken for the present one's.
    uses: Vec<u32>,
    polled: Vec<u32>,
    dirty: Vec<u32>,
    /// Dirty ones that the ring had no room for.
    late: Vec<u32>,
    /// Slots whose watch the ring had no room for.
    unwatched: Vec<u32>,
    stopping: Vec<u32>,
    taken: Vec<Request>,
}

impl Queues {
    pub(super) fn new() -> Self {
        Queues {
            slots: Vec::new(),
            uses: Vec::new(),
            polled: Vec::new(),
            dirty: Vec::new(),
            late: Vec::new(),
            unwatched: Vec::new(),
            stopping: Vec::new(),
            taken: Vec::with_capacity(TAKE_MAX),
        }
    }

    fn slot(&mut self, id: u32) -> &mut Slot {
        self.slots[id as usize].as_mut().expect("a queue in use")
    }

    /// Answers or calls wait for the next publish.
    pub(super) fn any_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Memory of the queue's device was truncated under it.
    pub(super) fn poisoned(&mut self, id: u32) -> bool {
        self.slot(id).queue.poisoned()
    }

    /// Whether the guest believes that a completed write is durable.
    pub(super) fn write_through(&self, id: u32) -> bool {
        self.slots[id as usize]
            .as_ref()
            .is_some_and(|slot| slot.queue.shared().write_through())
    }

    /// A range of a discard or write-zeroes request.
    pub(super) fn range(&mut self, id: u32, request: &Request, number: u32) -> Option<Range> {
        self.slot(id).queue.ranges(request).get(number as usize).copied()
    }

    /// Answers a request; the driver sees it after the turn's publish.
    #[inline]
    pub(super) fn complete(&mut self, id: u32, head: u16, completion: Completion) {
        let slot = self.slot(id);
        slot.queue.complete(head, completion);
        if !slot.dirty {
            slot.dirty = true;
            self.dirty.push(id);
        }
    }

    pub(super) fn counts(&self) -> (u64, u64) {
        let all = self.slots.iter().flatten().count() as u64;
        (self.polled.len() as u64, all - self.polled.len() as u64)
    }

    /// Takes a queue in and begins to poll it.
    pub(super) fn start(&mut self, key: QueueKey, volume: VolumeIndex, queue: Box<Queue>, now: u64) {
        let slot = Slot {
            key,
            volume,
            queue,
            polled: true,
            last_work: now,
            polls: 0,
            watched: false,
            // What an earlier holder owes the driver is made good with the first publish.
            dirty: true,
            calling: false,
            call_again: false,
            cancelled: false,
            stopping: None,
        };
        let id = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.uses.push(0);
            self.slots.len() - 1
        });
        self.slots[id] = Some(slot);
        self.uses[id] = self.uses[id].wrapping_add(1);
        self.polled.push(id as u32);
        self.unwatched.push(id as u32);
        self.dirty.push(id as u32);
    }

    /// Begins to stop a queue. If it does not run the sender is dropped, which says so.
    pub(super) fn stop(&mut self, key: QueueKey, reply: mpsc::Sender<Box<Queue>>) {
        let found = self
            .slots
            .iter()
            .position(|slot| slot.as_ref().is_some_and(|slot| slot.key == key));
        let Some(id) = found.map(|id| id as u32) else {
            return;
        };
        self.polled.retain(|&other| other != id);
        let slot = self.slot(id);
        slot.polled = false;
        slot.stopping = Some(reply);
        self.stopping.push(id);
    }

    fn tag(&self, id: u32) -> Tag {
        Tag {
            kind: Kind::Kick,
            owner: id,
            index: self.uses[id as usize],
        }
    }

    fn poll_again(&mut self, id: u32, now: u64) {
        let slot = self.slot(id);
        if !slot.polled && slot.stopping.is_none() {
            slot.polled = true;
            slot.last_work = now;
            slot.queue.disarm();
            self.polled.push(id);
        }
    }

    fn watch(&mut self, ring: &mut Ring) {
        while let Some(&id) = self.unwatched.last() {
            let tag = self.tag(id);
            if let Some(slot) = &mut self.slots[id as usize]
                && let Some(fd) = slot.queue.kick_fd().filter(|_| !slot.watched)
            {
                if ring.watch(fd, tag).is_err() {
                    return;
                }
                slot.watched = true;
            }
            self.unwatched.pop();
        }
    }

    fn call_tag(&self, id: u32) -> Tag {
        Tag {
            kind: Kind::Call,
            ..self.tag(id)
        }
    }

    fn finish_stops(&mut self, ring: &mut Ring) {
        let mut at = 0;
        while at < self.stopping.len() {
            let id = self.stopping[at];
            let slot = self.slot(id);
            if slot.queue.in_flight() > 0 || slot.dirty {
                at += 1;
                continue;
            }
            if slot.calling {
                // It may never end by itself. Its event says when the descriptor is the kernel's no more.
                if !slot.cancelled {
                    let tag = self.call_tag(id);
                    self.slot(id).cancelled = ring.cancel(tag).is_ok();
                }
                at += 1;
                continue;
            }
            let watched = slot.watched;
            // With a full ring the watch stays on until the next turn: so does the queue.
            if watched && ring.unwatch(self.tag(id)).is_err() {
                at += 1;
                continue;
            }
            self.stopping.swap_remove(at);
            self.unwatched.retain(|&other| other != id);
            let slot = self.slots[id as usize].take().expect("a queue in use");
            if let Some(reply) = slot.stopping {
                // If the session has gone, so may the queue.
                reply.send(slot.queue).ok();
            }
        }
    }
}

impl Shard {
    /// Takes what the polled queues offer, as far as there is room for it.
    pub(super) fn poll_queues(&mut self) -> bool {
        if !self.queues.unwatched.is_empty() {
            self.queues.watch(&mut self.ring);
        }
        let mut worked = false;
        let mut at = 0;
        while at < self.queues.polled.len() {
            let id = self.queues.polled[at];
            let volume = self.queues.slot(id).volume;
            let names = self.volumes[usize::from(volume.0)]
                .as_ref()
                .map_or(usize::MAX, |volume| volume.names.room());
            let room = self.ops.room().min(names).min(TAKE_MAX);
            if room == 0 {
                self.stats.waits += 1;
                at += 1;
                continue;
            }
            let mut taken = std::mem::take(&mut self.queues.taken);
            let slot = self.queues.slot(id);
            let chains = slot.queue.poll(room, |request| taken.push(request));
            slot.polls = slot.polls.wrapping_add(1);
            if slot.polls.is_multiple_of(256) {
                slot.queue.keep_disarmed();
            }
            if chains > 0 {
                worked = true;
                slot.last_work = self.now;
                // Chains may have been answered inside: they too wait to be published.
                if !slot.dirty {
                    slot.dirty = true;
                    self.queues.dirty.push(id);
                }
                if taken.len() > 1 {
                    for request in &taken {
                        self.foresee(volume, request);
                    }
                }
                let kept = self.keeps(volume);
                for request in taken.drain(..) {
                    if kept
                        || !matches!(
                            request.kind,
                            crate::frontend::Kind::In | crate::frontend::Kind::Out
                        )
                    {
                        self.begin(id, volume, request);
                    } else {
                        self.stats.requests += 1;
                        self.queues.complete(id, request.head, Completion::Ok);
                    }
                }
            } else if self.now.saturating_sub(slot.last_work) > QUEUE_SPIN_MS
                && slot.queue.in_flight() == 0
                && slot.queue.kick_fd().is_some()
                && slot.watched
                && !slot.queue.arm()
            {
                slot.polled = false;
                self.queues.polled.swap_remove(at);
                self.queues.taken = taken;
                continue;
            }
            self.queues.taken = taken;
            at += 1;
        }
        // A different queue comes first each turn.
        if self.queues.polled.len() > 1 {
            self.queues.polled.rotate_left(1);
        }
        worked
    }

    /// False for a volume in service of which every disk keeps nothing: its reads and writes are over as soon as they
    /// were taken, and nobody is asked.
    fn keeps(&self, volume: VolumeIndex) -> bool {
        self.volumes[usize::from(volume.0)]
            .as_ref()
            .is_none_or(|volume| !volume.null || volume.mirror.phase() != crate::mirror::Phase::Serving)
    }

    /// Before sleeping: asks every polled queue's driver for a kick. True if one has work already.
    pub(super) fn arm_queues(&mut self) -> bool {
        let mut found = !self.queues.unwatched.is_empty();
        let mut at = 0;
        while at < self.queues.polled.len() {
            let id = self.queues.polled[at];
            let slot = self.queues.slot(id);
            let kicks = slot.queue.kick_fd().is_some() && slot.watched;
            if !kicks || slot.queue.arm() {
                slot.queue.disarm();
                found |= true;
                at += 1;
            } else {
                slot.polled = false;
                self.queues.polled.swap_remove(at);
            }
        }
        found
    }

    /// A kick came, or a watch ended.
    pub(super) fn kicked(&mut self, event: Event) {
        let id = event.tag.owner;
        let current = self.queues.uses.get(id as usize) == Some(&event.tag.index)
            && self.queues.slots[id as usize].is_some();
        if !current {
            return;
        }
        if !event.more {
            self.queues.slot(id).watched = false;
            self.queues.unwatched.push(id);
        }
        self.queues.poll_again(id, self.now);
    }

    /// Hands what was answered to the drivers, and calls those that want to be called.
    pub(super) fn publish_queues(&mut self) {
        while let Some(id) = self.queues.dirty.pop() {
            let slot = self.queues.slot(id);
            slot.dirty = false;
            if let Some(fd) = slot.queue.publish() {
                self.call(id, fd);
            }
        }
        std::mem::swap(&mut self.queues.dirty, &mut self.queues.late);
        if !self.queues.stopping.is_empty() {
            self.queues.finish_stops(&mut self.ring);
        }
    }

    /// Calls a driver, unless a call is on its way: then again when that has ended.
    fn call(&mut self, id: u32, fd: std::os::fd::RawFd) {
        let tag = self.queues.call_tag(id);
        let slot = self.queues.slot(id);
        if slot.calling {
            slot.call_again = true;
            return;
        }
        // SAFETY: the queue owns the descriptor, and does not leave this reactor while `calling`.
        if unsafe { self.ring.notify_as(fd, tag) }.is_ok() {
            self.queues.slot(id).calling = true;
            return;
        }
        // Full: made up for at the next turn's publish.
        let slot = self.queues.slot(id);
        slot.queue.owe_call();
        if !slot.dirty {
            slot.dirty = true;
            self.queues.late.push(id);
        }
    }

    /// A call has ended.
    pub(super) fn called(&mut self, event: Event) {
        let id = event.tag.owner;
        let current = self.queues.uses.get(id as usize) == Some(&event.tag.index);
        let Some(Some(slot)) = self.queues.slots.get_mut(id as usize).filter(|_| current) else {
            return;
        };
        slot.calling = false;
        if std::mem::take(&mut slot.call_again) && slot.stopping.is_none() {
            slot.queue.owe_call();
            if !slot.dirty {
                slot.dirty = true;
                self.queues.dirty.push(id);
            }
        }
    }
}
