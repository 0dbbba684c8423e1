//! What the checker does with the model: what may happen next, within which bounds, and what must hold.

use stateright::{Model, Property};

use super::action::{Action, Event};
use super::bug::Bug;
use super::control::{Change, SlotState, in_sync};
use super::owner::{Link, Owner, Phase, Task};
use super::system::{State, Wire};
use super::{NODES, SLOTS};

/// What the checker finds violated first by most bugs, and the others that the tests name.
pub(crate) const DECEIVED: &str = "no guest is deceived";
pub(crate) const FENCED: &str = "once an owner serves, older ones are fenced";
pub(crate) const REMAINS: &str = "an in-sync replica remains";

/// How far the search goes, and which bug is planted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Search {
    pub(crate) replicas: usize,
    /// Owners, one after the other.
    pub(crate) generations: u8,
    /// Writes, of all owners together.
    pub(crate) writes: u8,
    /// Connections that break.
    pub(crate) breaks: u8,
    /// Reboots, of all replicas together.
    pub(crate) reboots: u8,
    /// An operator takes disks out.
    pub(crate) operator: bool,
    /// The volume may be taken from an owner that lives on.
    pub(crate) zombies: bool,
    pub(crate) bug: Option<Bug>,
}

impl Model for Search {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::new(self.replicas)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        // A guest that was deceived is enough.
        if state.deceit.is_some() {
            return;
        }
        for n in 0..NODES {
            self.attachments(state, n, actions);
            self.messages(state, n, actions);
            if let Some(owner) = &state.nodes[n].owner {
                self.owner_acts(state, n, owner, actions);
            }
        }
        for r in 0..self.replicas {
            let replica = &state.replicas[r];
            if state.reboots < self.reboots {
                actions.push(Action::Reboot(r, true));
                if replica.value != replica.durable {
                    actions.push(Action::Reboot(r, false));
                }
            }
            let slot = state.control.slots[r];
            if self.operator && slot.state != SlotState::Stale {
                actions.push(Action::TakeOut(r));
            }
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = *state;
        next.act(action, self.bug);
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Search>> {
        properties()
    }
}

impl Search {
    /// The volume is given to a node without an owner, when its owner does not believe in a lease any more.
    fn attachments(&self, state: &State, n: usize, actions: &mut Vec<Action>) {
        let leased = state
            .rightful()
            .is_some_and(|owner| owner.leased || !self.zombies);
        let room = state.control.generation < self.generations && state.nodes[n].owner.is_none();
        if room && (!leased || self.bug == Some(Bug::LeaseCountedLate)) {
            actions.push(Action::Attach(n));
        }
    }

    fn messages(&self, state: &State, n: usize, actions: &mut Vec<Action>) {
        for (r, wire) in state.nodes[n].wires.iter().enumerate() {
            match wire {
                Wire::Idle => {}
                Wire::Asked(..) => actions.push(Action::Serve(n, r)),
                Wire::Answered(..) => actions.push(Action::Answer(n, r)),
            }
        }
        if let Some(proposal) = &state.nodes[n].proposal {
            actions.push(Action::Decide(n, false));
            if let Change::MarkInSync { replica, boot } = proposal.change
                && state.replicas[replica].boot != boot
            {
                actions.push(Action::Decide(n, true));
            }
        }
    }

    fn owner_acts(&self, state: &State, n: usize, owner: &Owner, actions: &mut Vec<Action>) {
        let rightful = n == state.control.owner && owner.generation == state.control.generation;
        let wires = &state.nodes[n].wires;
        let last = owner.generation == self.generations;
        if owner.leased && !last && self.zombies {
            actions.push(Action::LeaseEnds(n));
        } else if rightful && matches!(owner.task, Task::Confirm { .. }) {
            actions.push(Action::LeaseRenewed(n));
        }
        if rightful && !last {
            actions.push(Action::Crash(n));
        }
        for r in (0..self.replicas).filter(|_| rightful) {
            let (view, idle) = (owner.views[r], wires[r] == Wire::Idle);
            let wanted = owner.slots[r].state == SlotState::InSync || owner.phase == Phase::Serving;
            if view.link == Link::Down && idle && wanted {
                actions.push(Action::Connect(n, r));
            }
            if view.link != Link::Down && state.breaks < self.breaks {
                actions.push(Action::Break(n, r));
            }
        }
        if owner.choice(self.bug).is_some() {
            actions.push(Action::Choose(n));
        }
        // Whoever was replaced is refused, as with a proposal that was made before.
        let heeded = rightful || self.bug == Some(Bug::AnyGenerationProposes);
        if owner.proposed.is_none() && heeded {
            actions.extend(owner.wishes(self.bug).map(|change| Action::Propose(n, change)));
        }
        if rightful && !owner.fresh {
            actions.push(Action::Hear(n));
        }
        // The next operation begins when nothing of the last one is on its way.
        let quiet = owner.task == Task::Idle && wires.iter().all(|wire| *wire == Wire::Idle);
        if owner.phase != Phase::Serving || !quiet {
            return;
        }
        if state.writes < self.writes {
            actions.push(Action::Write(n));
        }
        if owner.unflushed && rightful {
            actions.push(Action::Flush(n));
        }
        for from in owner.trusted() {
            actions.push(Action::Read(n, from));
            let all_good = owner.lost().next().is_none();
            for target in (0..SLOTS).filter(|_| all_good) {
                let rebuilding = owner.slots[target].state == SlotState::Rebuilding;
                if rebuilding && owner.views[target].link == Link::Sealed && !owner.pending(target) {
                    actions.push(Action::Rebuild(n, from, target));
                }
            }
        }
    }
}

/// The owner that serves by right.
fn serving(state: &State) -> Option<&Owner> {
    state.rightful().filter(|owner| owner.phase == Phase::Serving)
}

/// Every in-sync replica that has not rebooted since has what was acknowledged or read.
fn in_sync_is_complete(_: &Search, state: &State) -> bool {
    in_sync(&state.control.slots).all(|r| {
        let rebooted = state.replicas[r].boot != state.control.slots[r].boot;
        rebooted || state.replicas[r].value >= state.register.newest()
    })
}

/// Every in-sync replica has what must outlive a loss of power.
fn in_sync_is_durable(_: &Search, state: &State) -> bool {
    in_sync(&state.control.slots).all(|r| state.replicas[r].durable >= state.register.durable)
}

/// Once an owner serves, some replica that each older one requires refuses it.
fn older_owners_are_fenced(_: &Search, state: &State) -> bool {
    let Some(newest) = serving(state) else {
        return true;
    };
    state.nodes.iter().filter_map(|node| node.owner).all(|old| {
        let mut required = (0..SLOTS).filter(|&r| old.required(r, None));
        old.generation >= newest.generation || required.any(|r| state.replicas[r].sealed > old.generation)
    })
}

/// What an owner may read, and has not to be told of, is equal.
fn trusted_are_equal(_: &Search, state: &State) -> bool {
    let Some(owner) = serving(state) else {
        return true;
    };
    let writing = matches!(owner.task, Task::Write { .. });
    let value = |r: usize| state.replicas[r].value;
    let mut values = owner.trusted().map(value);
    let first = values.next();
    writing || values.all(|value| Some(value) == first)
}

fn properties() -> Vec<Property<Search>> {
    let mut all = vec![
        Property::always(DECEIVED, |_, state: &State| state.deceit.is_none()),
        Property::always(
            "in-sync replicas have every acknowledged write",
            in_sync_is_complete,
        ),
        Property::always(
            "in-sync replicas have durably what was flushed",
            in_sync_is_durable,
        ),
        Property::always(FENCED, older_owners_are_fenced),
        Property::always("replicas that are read are equal", trusted_are_equal),
        Property::always(
            "a sealed replica obeys no older generation",
            |_, state: &State| !state.replicas.iter().any(|replica| replica.obeyed_older),
        ),
        Property::always(REMAINS, |_, state: &State| {
            in_sync(&state.control.slots).next().is_some()
        }),
    ];
    macro_rules! reached {
        ($($name:literal $event:ident,)*) => {
            $(all.push(Property::sometimes($name, |_, state: &State| state.saw(Event::$event)));)*
        };
    }
    reached! {
        "a degraded set acknowledges a write" AcknowledgedDegraded,
        "the last replica acknowledges a write" AcknowledgedAlone,
        "a write is acknowledged while a promotion is undecided" AcknowledgedPending,
        "a replaced owner collects a late acknowledgement" AcknowledgedLate,
        "a later owner's write is acknowledged" AcknowledgedByLater,
        "a replaced owner's write is refused" ZombieRefused,
        "a read is confirmed" ReadConfirmed,
        "a read is not confirmed" ConfirmRefused,
        "a replaced owner's proposal is refused" ProposalFenced,
        "a promotion in an old boot is refused" OldBootRefused,
        "an owner's proposal comes after another change" ProposalMoved,
        "the last replica is not dropped" LastCopyKept,
        "a rebuilt replica is promoted" Promoted,
        "a rebuild replaces a newer value" DivergentReplaced,
        "a new owner completes a write" RolledForward,
        "a lost replica returns" Returned,
        "a new owner tells of a loss of power" PowerLost,
        "all replicas reboot and nothing is lost" BegunAnew,
        "unflushed writes are lost under a guest" LostUnflushed,
    }
    all
}
