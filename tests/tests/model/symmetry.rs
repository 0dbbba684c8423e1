//! States that differ only in the names of replicas are one state, since no rule looks at a name. The checker knows states
//! by their hashes. So a state is hashed as what it says of no replica, and the sorted hashes of what it says of each.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use super::SLOTS;
use super::control::{Change, Proposal};
use super::owner::{Owner, Task};
use super::system::{Node, State};

impl Hash for State {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        // Named one by one, so that nothing is forgotten.
        let State {
            control,
            replicas: _,
            nodes,
            register,
            deceit,
            writes,
            breaks,
            reboots,
            events,
        } = self;
        (
            control.generation,
            control.owner,
            register,
            deceit,
            writes,
            breaks,
            reboots,
            events,
        )
            .hash(hasher);
        for Node {
            owner,
            wires: _,
            proposal,
        } in nodes
        {
            proposal
                .map(
                    |Proposal {
                         generation,
                         fresh,
                         change,
                     }| (generation, fresh, nameless(change)),
                )
                .hash(hasher);
            owner.is_some().hash(hasher);
            if let Some(owner) = owner {
                hash_owner(owner, hasher);
            }
        }
        let mut each: [u64; SLOTS] = std::array::from_fn(|r| self.hash_replica(r));
        each.sort_unstable();
        each.hash(hasher);
    }
}

/// An owner, but for what it knows of single replicas.
fn hash_owner(owner: &Owner, hasher: &mut impl Hasher) {
    let Owner {
        generation,
        phase,
        served,
        leased,
        unflushed,
        slots: _,
        fresh,
        proposed,
        views: _,
        task,
        writes,
    } = owner;
    (generation, phase, served, leased, unflushed, fresh, writes).hash(hasher);
    (proposed.map(nameless), task.renamed(|_| 0)).hash(hasher);
}

impl State {
    /// What the state says of a replica.
    fn hash_replica(&self, r: usize) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.control.slots[r], self.replicas[r]).hash(&mut hasher);
        for node in &self.nodes {
            let proposed = node
                .proposal
                .is_some_and(|proposal| proposal.change.replica() == r);
            (node.wires[r], proposed).hash(&mut hasher);
            if let Some(owner) = &node.owner {
                let proposed = owner.proposed.is_some_and(|change| change.replica() == r);
                (owner.slots[r], owner.views[r], proposed).hash(&mut hasher);
                owner
                    .task
                    .renamed(|name| usize::from(name == r))
                    .hash(&mut hasher);
            }
        }
        hasher.finish()
    }
}

fn nameless(change: Change) -> Change {
    match change {
        Change::MarkStale { .. } => Change::MarkStale { replica: 0 },
        Change::StartRebuild { .. } => Change::StartRebuild { replica: 0 },
        Change::MarkInSync { boot, .. } => Change::MarkInSync { replica: 0, boot },
    }
}

impl Task {
    fn renamed(self, name: impl Fn(usize) -> usize) -> Task {
        match self {
            Task::Confirm { value, from, began } => Task::Confirm {
                value,
                from: name(from),
                began,
            },
            Task::Rebuild { version, target } => Task::Rebuild {
                version,
                target: name(target),
            },
            Task::Idle | Task::Write { .. } | Task::Flush { .. } => self,
        }
    }
}
