//! What the node that leads does for the whole cluster: take volumes and VMs from nodes that are gone, give every volume an
//! owner so that it heals, give VMs a place, and move data off disks that leave.
//!
//! A pure choice from the state and from who is alive. Each duty is carried out by a command that the state checks again, so
//! acting on an old view does no harm.
//!
//! Absent: judging when a lease is over (`raft` does, see [`Duty::Take`]), and the data plane.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use crate::planner;
use crate::state::{Command, Disk, NodeId, Replica, ReplicaState, State, Volume};

/// Most moves of chunks proposed in one round.
const MOVES_MAX: usize = 512;

/// How a node looks to the leader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
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
    duties.extend(disks(state, &life).into_iter().map(Duty::Do));
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
        if vm.node == Some(node) && vm.spec.run {
            // Without room it stays where it is, and is looked at again.
            if let Some(to) = room.take(vm.spec.memory, None) {
                commands.push(Command::PlaceVm {
                    name: name.clone(),
                    node: Some(to),
                    epoch: vm.epoch,
                });
            }
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

/// Disks of nodes that are lost are given up; a node that is drained gives up one disk at a time, and only while everything on
/// it has another copy; what was given up moves.
fn disks(state: &State, life: &impl Fn(NodeId) -> Life) -> Vec<Command> {
    let mut commands = Vec::new();
    let mut leaving = BTreeSet::new();
    for (&disk, record) in &state.disks {
        if record.out {
            leaving.insert(disk);
        } else if life(record.node) == Life::Lost {
            commands.push(Command::DiskOut { disk: disk.0 });
        }
    }
    for (node, _) in state.nodes.iter().filter(|(_, node)| node.drain) {
        let mut of_node = state.disks.iter().filter(|(_, record)| record.node == *node);
        if of_node.clone().any(|(_, record)| record.out) {
            continue;
        }
        if let Some((disk, _)) = of_node.find(|(disk, _)| safe_without(state, **disk, life)) {
            commands.push(Command::DiskOut { disk: disk.0 });
        }
    }
    // What follows is planned from what goes before it.
    let mut after = Cow::Borrowed(state);
    let mut room = MOVES_MAX;
    for &disk in &leaving {
        if !state.has_replicas(disk.0) {
            commands.push(Command::ForgetDisk { disk: disk.0 });
            continue;
        }
        let mut planned = after.clone();
        let mut batch = Vec::new();
        // An owner that reaches the disk brings it up to date again, which is fine until there is another place. So it is given
        // up anew, together with the moves.
        if safe_without(state, disk, life) {
            batch.push(Command::DiskOut { disk: disk.0 });
            planned.to_mut().apply(&batch[0]).ok();
        }
        let moved = moves(&mut planned, disk, false, &mut room);
        if !moved.is_empty() {
            batch.extend(moved);
            commands.push(Command::Batch(batch));
            after = planned;
        }
    }
    for &disk in state.disks.keys().filter(|disk| !leaving.contains(*disk)) {
        commands.extend(moves(&mut after, disk, true, &mut room));
    }
    commands
}

/// Moves of what is on a disk and not in sync, or (`full`) of what the disk had no room for; `state` is as after them.
fn moves(state: &mut Cow<'_, State>, disk: Disk, full: bool, room: &mut usize) -> Vec<Command> {
    let wanted = |volume: &Volume| {
        let mut slots = volume.chunks.iter().flatten();
        slots.any(|slot| slot.disk == disk && slot.state != ReplicaState::InSync && (slot.no_space || !full))
    };
    let volumes = state.volumes.iter().filter(|(_, volume)| wanted(volume));
    let names: Vec<_> = volumes.map(|(name, _)| name.clone()).collect();
    let mut commands = Vec::new();
    for name in names {
        let mut to = planner::plan_moves(state, &name, disk.0, full);
        to.truncate(*room);
        if to.is_empty() {
            continue;
        }
        *room -= to.len();
        let volume = &state.volumes[&name];
        let command = Command::Move {
            generation: volume.generation,
            config: volume.config,
            from: disk.0,
            to,
            name,
        };
        // One that is refused is so again when it is carried out, and is planned anew.
        state.to_mut().apply(&command).ok();
        commands.push(command);
    }
    commands
}

/// Every replica on the disk has others that are in sync and can be read now, and nothing is being rebuilt that could need it.
fn safe_without(state: &State, disk: Disk, life: &impl Fn(NodeId) -> Life) -> bool {
    let good = |slot: &Replica| {
        let node = state.disks.get(&slot.disk).map(|record| record.node);
        slot.state == ReplicaState::InSync
            && (slot.disk == disk || node.is_some_and(|node| life(node) == Life::Alive))
    };
    let mut chunks = state.volumes.values().flat_map(|volume| &volume.chunks);
    chunks.all(|slots| {
        let here = slots.iter().any(|slot| slot.disk == disk);
        !here || slots.len() > 1 && slots.iter().all(good)
    })
}

#[cfg(test)]
#[path = "leader_tests.rs"]
mod tests;
