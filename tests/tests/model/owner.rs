//! An owner: the one who does I/O on the chunk, or believes so.
//!
//! * It begins by sealing the in-sync replicas, decides which of them to trust, makes those equal, and only then serves.
//! * One operation at a time (they overlap: the chunk is one block), a rebuild's copy included.
//! * What is *required*: every replica in sync as committed, as far as it knows, every one whose promotion is undecided,
//!   and a rebuilt one. An operation has ended when all required replicas answered. So one that is lost holds everything
//!   up until it is back, or its removal is committed.
//!
//! Here is what an owner knows and concludes, `system` carries its messages. At any moment [`Owner::wants`] says what it
//! would ask a replica, and an answer counts if it answers just that.

use super::SLOTS;
use super::bug::Bug;
use super::control::{Change, SlotState, Slots, in_sync};
use super::register::{Known, Version};
use super::replica::Request;

/// How an owner stands with a replica.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) enum Link {
    /// Away, as far as the owner can see.
    #[default]
    Down,
    /// Sealed and connected. If in sync: lost, until it is trusted or stale.
    Sealed,
    /// In sync: trusted. Rebuilding: copied; it gets every write.
    Good,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct View {
    pub(crate) link: Link,
    /// Boot in which it was last trusted; at first the recorded one.
    pub(crate) trusted: u8,
    /// Boot that it has in this connection.
    pub(crate) boot: u8,
    /// It has answered what the present step asks.
    pub(crate) answered: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Phase {
    /// Until all in-sync replicas are trusted.
    Choosing,
    /// Gives all of them the newest that one of them has: a write that reached one of them is completed.
    Equalising {
        version: Version,
    },
    Serving,
}

/// The operation under way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Task {
    Idle,
    Write {
        version: Version,
        flush: bool,
        began: Known,
    },
    Flush {
        covers: Version,
    },
    /// Read without a lease: every required replica is asked whether this owner is still the owner.
    Confirm {
        value: Version,
        from: usize,
        began: Known,
    },
    /// A rebuild, under its lock: what was read from a replica in sync is copied to another.
    Rebuild {
        version: Version,
        target: usize,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Owner {
    pub(crate) generation: u8,
    pub(crate) phase: Phase,
    /// It has served: a guest relies on it.
    pub(crate) served: bool,
    pub(crate) leased: bool,
    /// Acknowledged writes may be unflushed.
    pub(crate) unflushed: bool,
    /// The configuration it goes by, and whether that is the present one.
    pub(crate) slots: Slots,
    pub(crate) fresh: bool,
    /// Proposed and undecided; at most one.
    pub(crate) proposed: Option<Change>,
    pub(crate) views: [View; SLOTS],
    pub(crate) task: Task,
    /// Writes submitted.
    pub(crate) writes: u8,
}

impl Owner {
    pub(crate) fn new(generation: u8, slots: Slots) -> Owner {
        Owner {
            generation,
            phase: Phase::Choosing,
            served: false,
            leased: true,
            unflushed: false,
            slots,
            fresh: true,
            proposed: None,
            views: slots.map(|slot| View {
                trusted: slot.boot,
                ..View::default()
            }),
            task: Task::Idle,
            writes: 0,
        }
    }

    /// Serves, all replicas trusted, without having asked any: how the model begins.
    pub(crate) fn serving(generation: u8, slots: Slots) -> Owner {
        let mut owner = Owner::new(generation, slots);
        (owner.phase, owner.served) = (Phase::Serving, true);
        for r in in_sync(&slots) {
            let boot = slots[r].boot;
            (owner.views[r].link, owner.views[r].boot) = (Link::Good, boot);
        }
        owner
    }

    pub(crate) fn trusted(&self) -> impl Iterator<Item = usize> + '_ {
        in_sync(&self.slots).filter(|&r| self.views[r].link == Link::Good)
    }

    /// In sync as committed, and not trusted.
    pub(crate) fn lost(&self) -> impl Iterator<Item = usize> + '_ {
        in_sync(&self.slots).filter(|&r| self.views[r].link != Link::Good)
    }

    /// One copy is left: what it acknowledges must be durable.
    pub(crate) fn alone(&self) -> bool {
        in_sync(&self.slots).count() == 1
    }

    pub(crate) fn pending(&self, r: usize) -> bool {
        matches!(self.proposed, Some(Change::MarkInSync { replica, .. }) if replica == r)
    }

    pub(crate) fn required(&self, r: usize, bug: Option<Bug>) -> bool {
        let good = self.views[r].link == Link::Good;
        let pending = self.pending(r);
        match self.slots[r].state {
            SlotState::InSync => good || bug != Some(Bug::AckBeforeCommit),
            SlotState::Rebuilding if pending && bug == Some(Bug::PendingForgotten) => false,
            SlotState::Rebuilding => good || pending,
            SlotState::Stale => pending,
            SlotState::Absent => false,
        }
    }

    /// What it would ask the replica now.
    pub(crate) fn wants(&self, r: usize, bug: Option<Bug>) -> Option<Request> {
        let View { link, answered, .. } = self.views[r];
        if link == Link::Down || answered {
            return None;
        }
        let good = link == Link::Good;
        let trusted = good && self.slots[r].state == SlotState::InSync;
        let required = good && self.required(r, bug);
        match (self.phase, self.task) {
            (Phase::Choosing, _) => None,
            (Phase::Equalising { version }, _) => trusted.then_some(Request::Write { version, flush: true }),
            (Phase::Serving, Task::Idle) => None,
            (Phase::Serving, Task::Write { version, flush, .. }) => {
                required.then_some(Request::Write { version, flush })
            }
            (Phase::Serving, Task::Flush { .. }) => required.then_some(Request::Flush),
            (Phase::Serving, Task::Confirm { from, .. }) => {
                let asked = r == from || bug != Some(Bug::ConfirmedByOne);
                (required && asked).then_some(Request::Confirm)
            }
            (Phase::Serving, Task::Rebuild { version, target }) => (r == target).then_some(Request::Copy {
                version,
                flush: bug != Some(Bug::PromotedUnflushed),
            }),
        }
    }

    /// Everybody has answered the present step who has to.
    pub(crate) fn all_answered(&self, bug: Option<Bug>) -> bool {
        let at_first = match self.task {
            Task::Write { .. } => bug == Some(Bug::AckAtFirst),
            Task::Flush { .. } => bug == Some(Bug::FlushAtFirst),
            Task::Confirm { .. } => bug == Some(Bug::ConfirmedByOne),
            _ => false,
        };
        let mut required = (0..SLOTS).filter(|&r| self.required(r, bug)).peekable();
        if required.peek().is_none() {
            return false;
        }
        if at_first {
            return required.any(|r| self.views[r].answered);
        }
        required.all(|r| self.views[r].answered)
    }

    /// The next step asks anew.
    pub(crate) fn ask(&mut self) {
        self.views.iter_mut().for_each(|view| view.answered = false);
    }

    /// Goes on with another step of the operation, or none.
    pub(crate) fn go_on(&mut self, task: Task) {
        self.task = task;
        self.ask();
    }

    /// The connection broke: what was under way with the replica is lost.
    pub(crate) fn lose(&mut self, r: usize) {
        let View { trusted, .. } = self.views[r];
        self.views[r] = View {
            trusted,
            ..View::default()
        };
        self.stop_rebuild(r);
        if self.phase != Phase::Serving && self.slots[r].state == SlotState::InSync {
            self.phase = Phase::Choosing;
            self.ask();
        }
    }

    fn stop_rebuild(&mut self, r: usize) {
        if matches!(self.task, Task::Rebuild { target, .. } if target == r) {
            self.task = Task::Idle;
        }
    }

    /// While others are trusted, a lost replica may go on with them if it forgot nothing: if it has the boot that it had.
    pub(crate) fn trust_returned(&mut self, bug: Option<Bug>) {
        if self.trusted().next().is_none() {
            return;
        }
        for r in 0..SLOTS {
            let leaving = matches!(self.proposed, Some(Change::MarkStale { replica }) if replica == r);
            let view = self.views[r];
            let kept = view.boot == view.trusted || bug == Some(Bug::NewBootTrusted);
            if self.slots[r].state == SlotState::InSync && view.link == Link::Sealed && kept && !leaving {
                (self.views[r].link, self.views[r].trusted) = (Link::Good, view.boot);
            }
        }
    }

    /// When no replica is trusted: those to go on with, and whether power may have been lost. Those with the boot that they
    /// had, if there are any. Else all of them, once all have answered: each may have what the others forgot.
    pub(crate) fn choice(&self, bug: Option<Bug>) -> Option<([bool; SLOTS], bool)> {
        if self.trusted().next().is_some() {
            return None;
        }
        let here = |r: usize| self.slots[r].state == SlotState::InSync && self.views[r].link == Link::Sealed;
        let same = |view: View| view.boot == view.trusted || bug == Some(Bug::NewBootTrusted);
        let kept = |r: usize| here(r) && same(self.views[r]);
        if (0..SLOTS).any(kept) {
            return Some((std::array::from_fn(kept), false));
        }
        let silent = in_sync(&self.slots).any(|r| !here(r));
        if (0..SLOTS).any(here) && (!silent || bug == Some(Bug::SilentNotWaitedFor)) {
            return Some((std::array::from_fn(here), true));
        }
        None
    }

    /// The replicas of [`Owner::choice`] are trusted.
    pub(crate) fn choose(&mut self, chosen: [bool; SLOTS]) {
        for (view, chosen) in self.views.iter_mut().zip(chosen) {
            if chosen {
                (view.link, view.trusted) = (Link::Good, view.boot);
            }
        }
    }

    /// In service, after all replicas rebooted: they are made equal anew. A write or a flush goes on afterwards.
    pub(crate) fn begin_anew(&mut self) {
        self.phase = Phase::Choosing;
        if !matches!(self.task, Task::Write { .. } | Task::Flush { .. }) {
            self.task = Task::Idle;
        }
        self.ask();
    }

    /// A newer configuration is known.
    pub(crate) fn take(&mut self, slots: Slots) {
        for (r, new) in slots.iter().enumerate() {
            let (old, view) = (self.slots[r].state, &mut self.views[r]);
            if old == new.state {
                continue;
            }
            match new.state {
                SlotState::InSync => view.trusted = new.boot,
                _ if view.link == Link::Good => view.link = Link::Sealed,
                _ => {}
            }
            self.stop_rebuild(r);
        }
        self.slots = slots;
    }

    /// What it may propose now.
    pub(crate) fn wishes(&self, bug: Option<Bug>) -> impl Iterator<Item = Change> + '_ {
        let others = self.trusted().next().is_some();
        let serving = self.phase == Phase::Serving;
        (0..SLOTS).filter_map(move |replica| {
            let View { link, boot, .. } = self.views[replica];
            let recorded = self.slots[replica].boot;
            match (self.slots[replica].state, link) {
                (SlotState::InSync, Link::Down | Link::Sealed) => {
                    others.then_some(Change::MarkStale { replica })
                }
                (SlotState::InSync, Link::Good) => {
                    (serving && recorded != boot).then_some(Change::MarkInSync { replica, boot })
                }
                (SlotState::Stale, Link::Sealed) => {
                    (serving && others).then_some(Change::StartRebuild { replica })
                }
                (SlotState::Rebuilding, Link::Good) => Some(Change::MarkInSync { replica, boot }),
                (SlotState::Rebuilding, Link::Sealed) => {
                    (bug == Some(Bug::PromotedEarly)).then_some(Change::MarkInSync { replica, boot })
                }
                _ => None,
            }
        })
    }
}
