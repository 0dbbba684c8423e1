//! What the leader does about disks that leave: those that an operator took out, those of nodes that are lost, and those of a
//! node that is drained, one after the other.
//!
//! Redundancy does not sink for it. What is in sync on such a disk gets a replica more elsewhere, the owner brings that up to
//! date, and the old one is removed when as many others as the volume has copies are in sync and can be reached. What is not in
//! sync moves at once, and what is on a lost node is given up only where another copy can be reached.

use std::borrow::Cow;

use super::leader::Life;
use crate::planner;
use crate::state::{Command, Disk, NodeId, Replica, ReplicaState, State, Volume};

/// Most replicas given another place in one round.
const MOVES_MAX: usize = 512;
/// Most chunks of another change.
const CHUNKS_MAX: usize = 4096;

/// What the leader does about disks now: a pure choice from the state and from how the nodes look to it.
pub fn disks(state: &State, life: &impl Fn(NodeId) -> Life) -> Vec<Command> {
    let mut commands = begin(state, life);
    // What follows is planned from what goes before it.
    let mut after = Cow::Borrowed(state);
    let mut room = MOVES_MAX;
    for (&disk, record) in &state.disks {
        if !record.out {
            commands.extend(of_volumes(&mut after, disk, |state, name, volume| {
                let to = planner::plan_moves(state, name, disk.0, true);
                moves(name, volume, disk, cut(to, &mut room))
            }));
        } else if !state.has_replicas(disk.0) {
            commands.push(Command::ForgetDisk { disk: disk.0 });
        } else {
            commands.extend(empty(&mut after, disk, life, &mut room));
        }
    }
    commands
}

/// Disks that are to leave and do not yet. Of a drained node one at a time, so that the others are kept if the draining is
/// ended, and only what has somewhere to go.
fn begin(state: &State, life: &impl Fn(NodeId) -> Life) -> Vec<Command> {
    let mut begun = Vec::new();
    for (disk, record) in &state.disks {
        if !record.out && life(record.node) == Life::Lost {
            begun.push(Command::DiskLeave { disk: disk.0 });
        }
    }
    for (node, _) in state.nodes.iter().filter(|(_, node)| node.drain) {
        let mut of_node = state.disks.iter().filter(|(_, record)| record.node == *node);
        if of_node
            .clone()
            .any(|(disk, record)| record.out && goes(state, *disk))
        {
            continue;
        }
        if let Some((disk, _)) = of_node.find(|(disk, record)| !record.out && goes(state, **disk)) {
            begun.push(Command::DiskLeave { disk: disk.0 });
        }
    }
    begun
}

/// Whether something on a disk that leaves is on its way to another or could be; or nothing is on it.
pub fn goes(state: &State, disk: Disk) -> bool {
    let on_it = |volume: &Volume, slots: &Vec<Replica>| {
        volume.has_spare(slots) && slots.iter().any(|slot| slot.disk == disk)
    };
    let mut volumes = state.volumes.iter();
    !state.has_replicas(disk.0)
        || volumes.any(|(name, volume)| {
            volume.chunks.iter().any(|slots| on_it(volume, slots))
                || !planner::plan_moves(state, name, disk.0, false).is_empty()
                || !planner::plan_additions(state, name, disk.0).is_empty()
        })
}

/// The next steps towards an empty disk; `after` is as after them.
fn empty(
    after: &mut Cow<'_, State>,
    disk: Disk,
    life: &impl Fn(NodeId) -> Life,
    room: &mut usize,
) -> Vec<Command> {
    let mut commands = of_volumes(after, disk, |state, name, volume| {
        let chunks = chunks(volume, disk, |slots, slot| {
            state.is_spare(volume, slots, disk)
                && (slot.state != ReplicaState::InSync
                    || copies(state, slots, disk, life) >= volume.mirror as usize)
        });
        (!chunks.is_empty()).then(|| Command::RemoveReplicas {
            name: name.to_owned(),
            generation: volume.generation,
            config: volume.config,
            disk: disk.0,
            chunks,
        })
    });
    if after
        .disks
        .get(&disk)
        .is_some_and(|record| life(record.node) == Life::Lost)
    {
        commands.extend(of_volumes(after, disk, |state, name, volume| {
            let chunks = chunks(volume, disk, |slots, slot| {
                slot.state != ReplicaState::Stale && copies(state, slots, disk, life) > 0
            });
            (!chunks.is_empty()).then(|| Command::GiveUp {
                name: name.to_owned(),
                generation: volume.generation,
                config: volume.config,
                disk: disk.0,
                chunks,
            })
        }));
    }
    commands.extend(of_volumes(after, disk, |state, name, volume| {
        if *room == 0 {
            return None;
        }
        let to = planner::plan_moves(state, name, disk.0, false);
        moves(name, volume, disk, cut(to, room))
    }));
    commands.extend(of_volumes(after, disk, |state, name, volume| {
        if *room == 0 {
            return None;
        }
        let mut to = planner::plan_additions(state, name, disk.0);
        // Without anything to copy from it would only stand about.
        to.retain(|&(chunk, _)| {
            sources(state, &volume.chunks[chunk as usize], life)
                .next()
                .is_some()
        });
        let to = cut(to, room);
        (!to.is_empty()).then(|| Command::AddReplicas {
            name: name.to_owned(),
            generation: volume.generation,
            config: volume.config,
            from: disk.0,
            to,
        })
    }));
    commands
}

/// One command for each volume that has something on a disk, where there is one to be given.
fn of_volumes(
    after: &mut Cow<'_, State>,
    disk: Disk,
    mut command: impl FnMut(&State, &str, &Volume) -> Option<Command>,
) -> Vec<Command> {
    let on_it = |volume: &Volume| volume.chunks.iter().flatten().any(|slot| slot.disk == disk);
    let volumes = after.volumes.iter().filter(|(_, volume)| on_it(volume));
    let given: Vec<_> = volumes
        .filter_map(|(name, volume)| command(after, name, volume))
        .collect();
    for command in &given {
        // One that is refused is so again when it is carried out, and is planned anew.
        after.to_mut().apply(command).ok();
    }
    given
}

fn moves(
    name: &str,
    volume: &Volume,
    from: Disk,
    to: Vec<(u32, unibody_dataplane::ids::DiskUuid)>,
) -> Option<Command> {
    (!to.is_empty()).then(|| Command::Move {
        name: name.to_owned(),
        generation: volume.generation,
        config: volume.config,
        from: from.0,
        to,
    })
}

fn cut<T>(mut to: Vec<T>, room: &mut usize) -> Vec<T> {
    to.truncate(*room);
    *room -= to.len();
    to
}

/// Chunks whose replica on a disk is as wanted.
fn chunks(volume: &Volume, disk: Disk, wanted: impl Fn(&[Replica], &Replica) -> bool) -> Vec<u32> {
    let numbered = (0u32..).zip(&volume.chunks);
    let found = numbered.filter(|(_, slots)| {
        let slot = slots.iter().find(|slot| slot.disk == disk);
        slot.is_some_and(|slot| wanted(slots, slot))
    });
    found.map(|(chunk, _)| chunk).take(CHUNKS_MAX).collect()
}

/// Replicas of a chunk that are in sync and can be reached.
fn sources<'a>(
    state: &'a State,
    slots: &'a [Replica],
    life: &'a impl Fn(NodeId) -> Life,
) -> impl Iterator<Item = &'a Replica> {
    slots.iter().filter(move |slot| {
        let record = state.disks.get(&slot.disk);
        slot.state == ReplicaState::InSync && record.is_some_and(|record| life(record.node) == Life::Alive)
    })
}

/// Failure domains in which a chunk has copies without a disk.
fn copies(state: &State, slots: &[Replica], without: Disk, life: &impl Fn(NodeId) -> Life) -> usize {
    let others = sources(state, slots, life).filter(|slot| slot.disk != without);
    state.domains(others).len()
}
