//! What the leader does so that disks are equally full, after disks came or volumes went: it has few replicas at a time move,
//! as `planner::balance` chooses, by the same two steps as those on disks that leave.
//!
//! Moves are begun only while nothing else is wrong: every node answers, every disk is in service, none is to leave, and
//! every chunk has all its copies. What has begun is ended whatever happens, as soon as it may be.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::leader::Life;
use crate::admin::DiskStatus;
use crate::planner::balance::{self, Fills};
use crate::state::{Command, Disk, NodeId, Replica, ReplicaState, State};

/// Most chunks that move at a time.
const MOVES_MAX: usize = 8;
/// How old what the nodes say of their disks may be.
const FRESH: Duration = Duration::from_secs(20);

/// What the nodes say of their disks.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    /// In service.
    pub(crate) online: BTreeSet<Disk>,
    pub(crate) fills: Fills,
}

impl Told {
    /// Takes in what all nodes that answer say of their disks.
    pub(crate) fn take(&mut self, state: &State, disks: &[DiskStatus]) {
        self.online.clear();
        for &disk in state.disks.keys() {
            let uuid = disk.to_string();
            let mut found = disks.iter().filter(|said| said.uuid == uuid);
            if let Some(said) = found.find(|said| said.state == "online") {
                self.online.insert(disk);
                self.fills.say(disk, said.capacity, said.free);
            }
        }
        let known = |disk: &Disk| state.disks.contains_key(disk);
        self.fills.full.retain(known);
        self.fills.crowded.retain(known);
    }
}

/// What the nodes said last, from whoever asks them to whoever leads.
#[derive(Debug, Default)]
pub(crate) struct Reports(Mutex<Option<(Instant, Told)>>);

impl Reports {
    /// See [`Told::take`].
    pub(crate) fn say(&self, state: &State, disks: &[DiskStatus]) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, told) = last.get_or_insert_with(|| (Instant::now(), Told::default()));
        *at = Instant::now();
        told.take(state, disks);
    }

    /// What was said, if it was said lately.
    pub(crate) fn last(&self) -> Option<Told> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref()
            .filter(|(at, _)| at.elapsed() < FRESH)
            .map(|(_, told)| told.clone())
    }
}

/// What the leader does now, from the state, from how the nodes look to it and from what they say.
pub(crate) fn duties(state: &State, life: &impl Fn(NodeId) -> Life, told: Option<&Told>) -> Vec<Command> {
    let is_ready = |slot: &Replica| {
        let alive = state
            .disks
            .get(&slot.disk)
            .is_some_and(|record| life(record.node) == Life::Alive);
        let online = told.is_none_or(|told| told.online.contains(&slot.disk));
        slot.state == ReplicaState::InSync && alive && online
    };
    let none = Fills::default();
    let fills = told.map_or(&none, |told| &told.fills);
    let mut next = Next {
        after: Cow::Borrowed(state),
        commands: Vec::new(),
    };
    for (name, chunk, disk) in balance::finished(state, fills, is_ready) {
        next.add(name, |name, generation, config| Command::RemoveReplicas {
            name,
            generation,
            config,
            disk: disk.0,
            chunks: vec![chunk],
        });
    }
    let Some(told) = told.filter(|told| is_sound(state, life, told)) else {
        return next.commands;
    };
    let room = MOVES_MAX.saturating_sub(balance::moving(&next.after));
    for shift in balance::plan(&next.after, &told.fills, room) {
        next.add(shift.volume, |name, generation, config| Command::AddReplicas {
            name,
            generation,
            config,
            from: shift.from.0,
            to: vec![(shift.chunk, shift.to.0)],
        });
    }
    next.commands
}

/// Commands, each made from the state after those before it.
struct Next<'a> {
    after: Cow<'a, State>,
    commands: Vec<Command>,
}

impl Next<'_> {
    fn add(&mut self, name: String, command: impl FnOnce(String, u32, u32) -> Command) {
        let volume = &self.after.volumes[&name];
        let command = command(name, volume.generation, volume.config);
        if self.after.to_mut().apply(&command).is_ok() {
            self.commands.push(command);
        }
    }
}

/// Whether nothing is missing and nothing else goes on.
fn is_sound(state: &State, life: &impl Fn(NodeId) -> Life, told: &Told) -> bool {
    let mut nodes = state.nodes.iter();
    let mut disks = state.disks.iter();
    let mut volumes = state.volumes.values();
    nodes.all(|(id, node)| life(*id) == Life::Alive && !node.drain)
        && disks.all(|(disk, record)| !record.out && told.online.contains(disk))
        && volumes.all(|volume| {
            volume.chunks.iter().all(|slots| {
                let in_sync = slots.iter().filter(|slot| slot.state == ReplicaState::InSync);
                in_sync.count() >= volume.mirror as usize
            })
        })
}

#[cfg(test)]
#[path = "balancing_tests.rs"]
mod tests;
