//! What the node that leads does for the whole cluster: take volumes and VMs from nodes that are gone, give every volume an
//! owner so that it heals, give VMs a place, and move data off disks that leave (`leaving`).
//!
//! A pure choice from the state and from who is alive. Each duty is carried out by a command that the state checks again, so
//! acting on an old view does no harm.
//!
//! Absent: judging when a lease is over (`raft` does, see [`Duty::Take`]), and the data plane.

use std::collections::BTreeMap;

use unibody_dataplane::plane::VOLUMES_MAX;

use super::leaving;
use crate::state::{Command, NodeId, ReplicaState, State, Volume};

/// How a node looks to the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It answers.
    Alive,
    /// It does not, but may hold a lease.
    Silent,
    /// Its lease is over.
    Gone,
    /// It has been gone for so long that its disks are given up.
    Lost,
}

/// Something to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Duty {
    /// Allowed only because the lease of the node is over.
    Take(NodeId, Command),
    /// Allowed at any time.
    Do(Command),
}

/// What is to be done now.
pub(crate) fn duties(state: &State, life: &BTreeMap<NodeId, Life>) -> Vec<Duty> {
    let life = |node: NodeId| life.get(&node).copied().unwrap_or(Life::Silent);
    let mut duties = Vec::new();
    for (&node, _) in state
        .nodes
        .iter()
        .filter(|(node, _)| matches!(life(**node), Life::Gone | Life::Lost))
    {
        let taken = take(state, node, &life);
        if !taken.is_empty() {
            duties.push(Duty::Take(node, Command::Batch(taken)));
        }
    }
    duties.extend(owners(state, &life).into_iter().map(Duty::Do));
    duties.extend(places(state, &life).into_iter().map(Duty::Do));
    duties.extend(leaving::disks(state, &life).into_iter().map(Duty::Do));
    duties
}

/// Volumes and VMs of a node that is gone.
fn take(state: &State, node: NodeId, life: &impl Fn(NodeId) -> Life) -> Vec<Command> {
    let owned = state
        .volumes
        .iter()
        .filter(|(_, volume)| volume.owner == Some(node));
    let revoked = owned.map(|(name, volume)| Command::Revoke {
        name: name.clone(),
        generation: volume.generation,
    });
    let mut commands: Vec<_> = revoked.collect();
    let mut room = Room::of(state, life);
    for (name, vm) in &state.vms {
        if vm.node == Some(node) {
            // What is to stop, or has room nowhere, has no place from now on: with the place kept, its volumes would be
            // handed to a node that is gone. Room is looked for again each round.
            let to = if vm.spec.run {
                room.take(vm.spec.memory, None)
            } else {
                None
            };
            commands.push(Command::PlaceVm {
                name: name.clone(),
                node: to,
                epoch: vm.epoch,
            });
        }
    }
    commands.truncate(crate::state::BATCH_MAX);
    commands
}

/// Owners for volumes that have none, so that what is degraded heals: where the VM is that uses it, else where its data is.
fn owners(state: &State, life: &impl Fn(NodeId) -> Life) -> Vec<Command> {
    let mut commands = Vec::new();
    let mut load: BTreeMap<NodeId, usize> = BTreeMap::new();
    for volume in state.volumes.values() {
        if let Some(owner) = volume.owner {
            *load.entry(owner).or_default() += 1;
        }
    }
    for (name, volume) in &state.volumes {
        if volume.owner.is_some() {
            continue;
        }
        let user = state
            .user_of(name)
            .and_then(|vm| state.vms[vm].node)
            .filter(|node| life(*node) == Life::Alive);
        let near = || {
            let here = replicas_by_node(state, volume);
            state
                .nodes
                .keys()
                .copied()
                .filter(|node| life(*node) == Life::Alive)
                .filter(|node| load.get(node).is_none_or(|&owned| owned < VOLUMES_MAX))
                .max_by_key(|node| {
                    let owned = load.get(node).copied().unwrap_or(0);
                    (
                        !state.nodes[node].drain,
                        here.get(node).copied().unwrap_or(0),
                        std::cmp::Reverse(owned),
                        std::cmp::Reverse(*node),
                    )
                })
        };
        if let Some(node) = user.or_else(near) {
            *load.entry(node).or_default() += 1;
            commands.push(Command::Attach {
                name: name.clone(),
                node,
                generation: volume.generation,
            });
        }
    }
    commands
}

fn replicas_by_node(state: &State, volume: &Volume) -> BTreeMap<NodeId, usize> {
    let mut found = BTreeMap::new();
    let in_sync = volume
        .chunks
        .iter()
        .flatten()
        .filter(|slot| slot.state == ReplicaState::InSync);
    for slot in in_sync {
        if let Some(record) = state.disks.get(&slot.disk) {
            *found.entry(record.node).or_default() += 1;
        }
    }
    found
}

/// Memory for VMs, as it is being given away.
struct Room(BTreeMap<NodeId, u64>);

impl Room {
    fn of(state: &State, life: &impl Fn(NodeId) -> Life) -> Self {
        let usable = |node: &NodeId| life(*node) == Life::Alive && !state.nodes[node].drain;
        let free = state.nodes.keys().copied().filter(usable);
        Room(free.map(|node| (node, state.memory_free(node))).collect())
    }

    fn take(&mut self, memory: u64, preferred: Option<NodeId>) -> Option<NodeId> {
        let fits = |node: &NodeId| self.0.get(node).is_some_and(|free| *free >= memory);
        let best = || {
            let fit = self.0.iter().filter(|(_, free)| **free >= memory);
            fit.max_by_key(|(node, free)| (**free, std::cmp::Reverse(**node)))
                .map(|(node, _)| *node)
        };
        let node = preferred.filter(fits).or_else(best)?;
        *self.0.get_mut(&node)? -= memory;
        Some(node)
    }
}

/// Places for VMs that are to run and have none.
fn places(state: &State, life: &impl Fn(NodeId) -> Life) -> Vec<Command> {
    let mut room = Room::of(state, life);
    let mut commands = Vec::new();
    for (name, vm) in &state.vms {
        if vm.node.is_some() || !vm.spec.run {
            continue;
        }
        let owner = |volume: &String| state.volumes.get(volume)?.owner;
        let near = vm.spec.volumes.first().and_then(owner);
        if let Some(node) = room.take(vm.spec.memory, near) {
            commands.push(Command::PlaceVm {
                name: name.clone(),
                node: Some(node),
                epoch: vm.epoch,
            });
        }
    }
    commands
}

#[cfg(test)]
#[path = "leader_tests.rs"]
mod tests;
