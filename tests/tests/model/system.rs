//! All of it together: control state, replicas, the owners on two nodes, what is on its way between them, and the judge.
//!
//! A node has at most one owner; one that was replaced and does not know it (a zombie) goes on beside the new one. Between
//! a node and a replica there is one connection with at most one request or answer on it, which takes as long as it
//! likes and is lost when the connection breaks; requests of an owner that died may still arrive. A proposal may be
//! decided long after it was made. Leases are not timed: the control state gives a volume away only when its owner does not
//! believe in its lease any more, which is what the real timing is to ensure.
//!
//! Some things happen at once, because taking time would only weaken what was promised meanwhile, or be as if they had
//! begun later: sealing, reading one replica, comparing replicas that are sealed, learning how a proposal ended (who does
//! not know that yet requires no less).
//!
//! What is bounded is counted: generations, writes, broken connections, reboots. Everything else may happen any number
//! of times.

use super::action::{Action, Event};
use super::bug::Bug;
use super::control::{Change, Control, Decision, Proposal, Slot, SlotState, in_sync};
use super::owner::{Link, Owner, Phase, Task};
use super::register::{Deceit, Known, Register, Version};
use super::replica::{Replica, Reply, Request};
use super::{NODES, SLOTS};

/// A connection between a node and a replica.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) enum Wire {
    #[default]
    Idle,
    Asked(u8, Request),
    Answered(Request, Reply),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Node {
    pub(crate) owner: Option<Owner>,
    pub(crate) wires: [Wire; SLOTS],
    /// Undecided.
    pub(crate) proposal: Option<Proposal>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct State {
    pub(crate) control: Control,
    pub(crate) replicas: [Replica; SLOTS],
    pub(crate) nodes: [Node; NODES],
    pub(crate) register: Register,
    pub(crate) deceit: Option<Deceit>,
    /// Writes, broken connections and reboots, which are bounded.
    pub(crate) writes: u8,
    pub(crate) breaks: u8,
    pub(crate) reboots: u8,
    pub(crate) events: u32,
}

impl State {
    pub(crate) fn new(replicas: usize) -> State {
        let mut control = Control {
            generation: 1,
            ..Control::default()
        };
        for slot in &mut control.slots[..replicas] {
            *slot = Slot {
                state: SlotState::InSync,
                boot: 0,
            };
        }
        let mut nodes = [Node::default(); NODES];
        nodes[0].owner = Some(Owner::serving(1, control.slots));
        let replica = Replica {
            sealed: 1,
            ..Replica::default()
        };
        State {
            control,
            replicas: [replica; SLOTS],
            nodes,
            register: Register::default(),
            deceit: None,
            writes: 0,
            breaks: 0,
            reboots: 0,
            events: 0,
        }
    }

    pub(crate) fn saw(&self, event: Event) -> bool {
        self.events >> event as u32 & 1 != 0
    }

    fn see(&mut self, event: Event) {
        self.events |= 1 << event as u32;
    }

    fn judge(&mut self, verdict: Result<(), Deceit>) {
        if let Err(deceit) = verdict {
            self.deceit = Some(deceit);
        }
    }

    /// The owner that the control state means, if it is there.
    pub(crate) fn rightful(&self) -> Option<&Owner> {
        let owner = self.nodes[self.control.owner].owner.as_ref();
        owner.filter(|owner| owner.generation == self.control.generation)
    }

    fn owner(&mut self, n: usize) -> &mut Owner {
        self.nodes[n].owner.as_mut().expect("only an owner acts so")
    }

    pub(crate) fn act(&mut self, action: Action, bug: Option<Bug>) {
        self.events = 0;
        match action {
            Action::Attach(n) => self.attach(n, bug),
            Action::Crash(n) => self.end(n),
            Action::LeaseEnds(n) => self.owner(n).leased = false,
            Action::LeaseRenewed(n) => {
                self.owner(n).leased = true;
                if let Task::Confirm { .. } = self.owner(n).task {
                    self.read_done(n);
                }
            }
            Action::Connect(n, r) => self.connect(n, r, bug),
            Action::Break(n, r) => {
                self.breaks += 1;
                self.lose(n, r);
            }
            Action::Serve(n, r) => self.serve(n, r, bug),
            Action::Answer(n, r) => self.answer(n, r, bug),
            Action::Choose(n) => self.choose(n, bug),
            Action::Propose(n, change) => {
                let owner = self.owner(n);
                owner.proposed = Some(change);
                let (generation, fresh) = (owner.generation, owner.fresh);
                self.nodes[n].proposal = Some(Proposal {
                    generation,
                    fresh,
                    change,
                });
            }
            Action::Decide(n, boot_refused) => self.decide(n, boot_refused, bug),
            Action::Hear(n) => {
                let slots = self.control.slots;
                self.owner(n).fresh = true;
                self.owner(n).take(slots);
            }
            Action::Write(n) => {
                let began = self.register.known;
                let owner = self.owner(n);
                owner.writes += 1;
                let version = Version {
                    generation: owner.generation,
                    number: owner.writes,
                };
                owner.go_on(Task::Write {
                    version,
                    flush: false,
                    began,
                });
                self.writes += 1;
            }
            Action::Flush(n) => {
                let covers = self.register.newest();
                self.owner(n).go_on(Task::Flush { covers });
            }
            Action::Read(n, from) => {
                let began = self.register.known;
                if let Some(value) = self.fetch(n, from, bug) {
                    let owner = self.owner(n);
                    owner.go_on(Task::Confirm { value, from, began });
                    if owner.leased || bug == Some(Bug::ReadUnconfirmed) {
                        self.read_done(n);
                    }
                }
            }
            Action::Rebuild(n, from, target) => {
                if let Some(version) = self.fetch(n, from, bug) {
                    self.owner(n).go_on(Task::Rebuild { version, target });
                }
            }
            Action::Reboot(r, keeps_all) => {
                self.reboots += 1;
                self.replicas[r].reboot(keeps_all, bug);
                (0..NODES).for_each(|n| self.lose(n, r));
            }
            Action::TakeOut(r) => {
                if !self.control.mark_stale(r, bug) {
                    return self.see(Event::LastCopyKept);
                }
                for node in &mut self.nodes {
                    node.owner.iter_mut().for_each(|owner| owner.fresh = false);
                    node.proposal
                        .iter_mut()
                        .for_each(|proposal| proposal.fresh = false);
                }
            }
        }
        (0..NODES).for_each(|n| self.settle(n, bug));
    }

    fn attach(&mut self, n: usize, bug: Option<Bug>) {
        self.control.generation += 1;
        self.control.owner = n;
        let (generation, slots) = (self.control.generation, self.control.slots);
        let owner = match bug {
            Some(Bug::NoSeal) => Owner::serving(generation, slots),
            _ => Owner::new(generation, slots),
        };
        // An owner that waits for a replica, without a new configuration, waits for ever. (It may connect anew, but that is as
        // if the connection had not broken.)
        for old in 0..NODES {
            let waits = |owner: &Owner| {
                let good = |r: usize| owner.views[r].link == Link::Good;
                owner.phase != Phase::Serving || (0..SLOTS).any(|r| owner.required(r, bug) && !good(r))
            };
            let may_go_on = bug == Some(Bug::AnyGenerationProposes);
            if self.nodes[old].owner.as_ref().is_some_and(waits) && !may_go_on {
                self.end(old);
            }
        }
        // What a dead owner proposed is refused from now on, and changes nothing. What it asked from this node was served
        // before, or is refused.
        for node in self.nodes.iter_mut().filter(|node| node.owner.is_none()) {
            node.proposal = None;
        }
        self.nodes[n] = Node {
            owner: Some(owner),
            ..Node::default()
        };
    }

    /// An owner is no more. What it asked for may still be done; answers reach nobody.
    fn end(&mut self, n: usize) {
        self.nodes[n].owner = None;
        for wire in &mut self.nodes[n].wires {
            let lasting = matches!(
                wire,
                Wire::Asked(_, Request::Write { .. } | Request::Copy { .. } | Request::Flush)
            );
            if !lasting {
                *wire = Wire::Idle;
            }
        }
    }

    fn lose(&mut self, n: usize, r: usize) {
        self.nodes[n].wires[r] = Wire::Idle;
        if let Some(owner) = &mut self.nodes[n].owner {
            owner.lose(r);
        }
    }

    fn connect(&mut self, n: usize, r: usize, bug: Option<Bug>) {
        let owner = self.nodes[n].owner.as_mut().expect("only an owner connects");
        match self.replicas[r].serve(owner.generation, Request::Seal, bug) {
            Reply::Sealed { boot } => {
                (owner.views[r].link, owner.views[r].boot) = (Link::Sealed, boot);
                owner.trust_returned(bug);
                if owner.served && owner.views[r].link == Link::Good {
                    self.see(Event::Returned);
                }
            }
            _ => self.end(n),
        }
    }

    /// Reads a replica, if it still obeys this owner.
    fn fetch(&mut self, n: usize, from: usize, bug: Option<Bug>) -> Option<Version> {
        let generation = self.owner(n).generation;
        match self.replicas[from].serve(generation, Request::Read, bug) {
            Reply::Value(value) => Some(value),
            _ => {
                self.end(n);
                None
            }
        }
    }

    fn serve(&mut self, n: usize, r: usize, bug: Option<Bug>) {
        let Wire::Asked(generation, request) = self.nodes[n].wires[r] else {
            return;
        };
        let before = self.replicas[r].value;
        let reply = self.replicas[r].serve(generation, request, bug);
        if matches!(request, Request::Copy { .. }) && before > self.replicas[r].value {
            self.see(Event::DivergentReplaced);
        }
        let heard = self.nodes[n].owner.is_some();
        self.nodes[n].wires[r] = if heard {
            Wire::Answered(request, reply)
        } else {
            Wire::Idle
        };
        // Only of a write it matters how long the answer takes: the others promise nothing to a guest that would be worth
        // more later.
        let late = self.nodes[n]
            .owner
            .is_some_and(|owner| owner.phase == Phase::Serving);
        if heard && !(late && matches!(request, Request::Write { .. })) {
            self.answer(n, r, bug);
        }
    }

    fn answer(&mut self, n: usize, r: usize, bug: Option<Bug>) {
        let Wire::Answered(request, reply) = std::mem::take(&mut self.nodes[n].wires[r]) else {
            return;
        };
        let owner = self.owner(n);
        let counts = owner.wants(r, bug) == Some(request);
        match reply {
            Reply::StaleGeneration => {
                match request {
                    Request::Write { .. } => self.see(Event::ZombieRefused),
                    Request::Confirm => self.see(Event::ConfirmRefused),
                    _ => {}
                }
                self.end(n);
            }
            Reply::Done if counts => owner.views[r].answered = true,
            _ => {}
        }
    }

    fn choose(&mut self, n: usize, bug: Option<Bug>) {
        let Some((chosen, power_lost)) = self.owner(n).choice(bug) else {
            return;
        };
        let owner = self.owner(n);
        owner.choose(chosen);
        match (owner.served, power_lost) {
            (_, false) => {}
            (true, true) if owner.unflushed && bug != Some(Bug::LossNotTold) => {
                // Nothing is promised to the guest any more, but only the next owner tells the next guest.
                self.see(Event::LostUnflushed);
                self.end(n);
            }
            (true, true) => {
                owner.begin_anew();
                self.see(Event::BegunAnew);
            }
            (false, true) => {
                let newest = self.register.newest();
                let have = |r: usize| self.replicas[r].value >= newest;
                let kept = (0..SLOTS).any(|r| chosen[r] && have(r));
                if !kept && in_sync(&self.control.slots).any(have) {
                    self.deceit = Some(Deceit::GivenUp);
                }
                if !kept {
                    self.see(Event::PowerLost);
                }
                self.register.power_lost();
            }
        }
    }

    fn decide(&mut self, n: usize, boot_refused: bool, bug: Option<Bug>) {
        let Some(proposal) = self.nodes[n].proposal.take() else {
            return;
        };
        let before = self.control.slots;
        let decision = self.control.decide(proposal, boot_refused, bug);
        match decision {
            Decision::Fenced => {
                self.see(Event::ProposalFenced);
                return self.end(n);
            }
            Decision::Moved => self.see(Event::ProposalMoved),
            Decision::Committed => match proposal.change {
                Change::MarkInSync { .. } if boot_refused => self.see(Event::OldBootRefused),
                Change::MarkInSync { replica, .. } if before[replica].state == SlotState::Rebuilding => {
                    self.see(Event::Promoted);
                }
                _ => {}
            },
        }
        let slots = self.control.slots;
        if let Some(owner) = &mut self.nodes[n].owner {
            (owner.proposed, owner.fresh) = (None, true);
            owner.take(slots);
        }
    }

    /// An owner does what follows from what it knows, and asks what it wants to know.
    fn settle(&mut self, n: usize, bug: Option<Bug>) {
        while self.nodes[n].owner.is_some() && self.advance(n, bug) {}
        let Node { owner, wires, .. } = &mut self.nodes[n];
        let Some(owner) = owner else { return };
        for (r, wire) in wires.iter_mut().enumerate() {
            if let (Wire::Idle, Some(request)) = (*wire, owner.wants(r, bug)) {
                *wire = Wire::Asked(owner.generation, request);
            }
        }
    }

    /// One step, if there is one to be taken.
    fn advance(&mut self, n: usize, bug: Option<Bug>) -> bool {
        let replicas = self.replicas;
        let owner = self.owner(n);
        owner.trust_returned(bug);
        match owner.phase {
            Phase::Choosing => {
                if owner.lost().next().is_some() {
                    return false;
                }
                let values: Vec<Version> = owner.trusted().map(|r| replicas[r].value).collect();
                let newest = values.iter().copied().max().unwrap_or_default();
                let first = !owner.served;
                owner.phase = Phase::Equalising { version: newest };
                if bug == Some(Bug::NoReconcile) {
                    (owner.phase, owner.served) = (Phase::Serving, true);
                }
                owner.ask();
                if first && values.iter().any(|value| *value != newest) {
                    self.see(Event::RolledForward);
                }
                true
            }
            Phase::Equalising { .. } if !owner.trusted().all(|r| owner.views[r].answered) => false,
            Phase::Equalising { .. } => {
                owner.phase = Phase::Serving;
                (owner.served, owner.unflushed) = (true, false);
                owner.ask();
                true
            }
            Phase::Serving => self.advance_task(n, bug),
        }
    }

    fn advance_task(&mut self, n: usize, bug: Option<Bug>) -> bool {
        let owner = self.owner(n);
        let alone = owner.alone();
        let all = owner.all_answered(bug);
        match owner.task {
            // Whoever has answered an unflushed write has to answer again.
            Task::Write {
                version,
                began,
                flush: false,
            } if alone && bug != Some(Bug::LastCopyUnflushed) => {
                owner.go_on(Task::Write {
                    version,
                    began,
                    flush: true,
                });
                true
            }
            Task::Write {
                version,
                flush,
                began,
            } if all => {
                owner.unflushed = !flush;
                owner.go_on(Task::Idle);
                self.acknowledge(n, version, began, alone);
                true
            }
            Task::Flush { covers } if all => {
                owner.unflushed = false;
                owner.go_on(Task::Idle);
                self.register.flushed(covers);
                true
            }
            Task::Confirm { .. } if all => {
                self.see(Event::ReadConfirmed);
                self.read_done(n);
                true
            }
            Task::Rebuild { target, .. } if owner.views[target].answered => {
                owner.views[target].link = Link::Good;
                owner.go_on(Task::Idle);
                true
            }
            _ => false,
        }
    }

    fn acknowledge(&mut self, n: usize, version: Version, began: Known, alone: bool) {
        let owner = *self.owner(n);
        let verdict = self.register.acknowledged(version, began, alone);
        self.judge(verdict);
        let copies = self
            .control
            .slots
            .iter()
            .filter(|slot| slot.state != SlotState::Absent);
        let events = [
            (
                Event::AcknowledgedDegraded,
                in_sync(&owner.slots).count() < copies.count(),
            ),
            (Event::AcknowledgedAlone, alone),
            (
                Event::AcknowledgedPending,
                (0..SLOTS).any(|r| owner.slots[r].state == SlotState::Rebuilding && owner.pending(r)),
            ),
            (
                Event::AcknowledgedLate,
                owner.generation < self.control.generation,
            ),
            (Event::AcknowledgedByLater, owner.generation > 1),
        ];
        for (event, happened) in events {
            if happened {
                self.see(event);
            }
        }
    }

    fn read_done(&mut self, n: usize) {
        let owner = self.owner(n);
        let Task::Confirm { value, began, .. } = owner.task else {
            return;
        };
        let generation = owner.generation;
        owner.go_on(Task::Idle);
        let verdict = self.register.read(value, generation, began);
        self.judge(verdict);
    }
}
