//! What the leader does in one situation and another, and that there is an end of it.

use std::collections::BTreeSet;

use super::*;
use crate::planner;
use crate::state::{Disk, VmSpec};
use unibody_dataplane::config::{Change, Proposal};
use unibody_dataplane::ids::{BootId, DiskUuid, Generation, PowerId};

const GIB: u64 = 1 << 30;

fn cluster(nodes: u64) -> State {
    let mut state = State::default();
    for n in 1..=nodes {
        let run = |state: &mut State, command| state.apply(&command).unwrap();
        run(
            &mut state,
            Command::AddNode {
                node: NodeId(n),
                store: u128::from(n),
                name: format!("n{n}"),
                addresses: vec![format!("127.0.0.1:{n}")],
                domain: format!("d{n}"),
                memory: 4 * GIB,
                incarnation: 1,
            },
        );
        for d in 0..2 {
            run(
                &mut state,
                Command::AddDisk {
                    disk: DiskUuid(u128::from(n * 10 + d)),
                    node: NodeId(n),
                    domain: String::new(),
                    bytes: 64 * GIB,
                },
            );
        }
    }
    state
}

fn volume(state: &mut State, name: &str, owner: Option<u64>) {
    volume_of(state, name, 2, owner);
}

fn volume_of(state: &mut State, name: &str, mirror: u32, owner: Option<u64>) {
    let count = 12;
    let chunks = planner::plan_chunks(state, count, mirror).unwrap();
    let create = Command::CreateVolume {
        name: name.into(),
        size: u64::from(count) << 26,
        mirror,
        stripe_unit: 256 << 10,
        stripe_width: 4,
        read_only: false,
        instance: 1,
        chunks,
    };
    state.apply(&create).unwrap();
    if let Some(owner) = owner {
        let attach = Command::Attach {
            name: name.into(),
            node: NodeId(owner),
            generation: 0,
        };
        state.apply(&attach).unwrap();
    }
}

fn vm(state: &mut State, name: &str, volumes: &[&str], node: Option<u64>) {
    let vm = VmSpec {
        definition: "{}".into(),
        memory: 3 * GIB,
        volumes: volumes.iter().map(|name| (*name).to_owned()).collect(),
        run: true,
    };
    let create = Command::CreateVm {
        name: name.into(),
        vm,
    };
    state.apply(&create).unwrap();
    if let Some(node) = node {
        let place = Command::PlaceVm {
            name: name.into(),
            node: Some(NodeId(node)),
            epoch: 0,
        };
        state.apply(&place).unwrap();
    }
}

fn life(of: &[(u64, Life)]) -> BTreeMap<NodeId, Life> {
    of.iter().map(|&(node, life)| (NodeId(node), life)).collect()
}

/// Carries out what is to be done until nothing is.
fn settle(state: &mut State, life: &BTreeMap<NodeId, Life>) -> usize {
    for round in 0..50 {
        let duties = duties(state, life);
        if duties.is_empty() {
            return round;
        }
        for duty in duties {
            let (Duty::Take(_, command) | Duty::Do(command)) = duty;
            state.apply(&command).unwrap();
        }
        state.check().unwrap();
    }
    panic!("there is no end of duties");
}

#[test]
fn what_a_node_had_goes_to_others_when_its_lease_is_over_and_not_before() {
    let mut state = cluster(3);
    volume(&mut state, "v", Some(1));
    vm(&mut state, "m", &["v"], Some(1));
    let alive = life(&[(1, Life::Alive), (2, Life::Alive), (3, Life::Alive)]);
    assert_eq!(duties(&state, &alive), []);
    let silent = life(&[(1, Life::Silent), (2, Life::Alive), (3, Life::Alive)]);
    assert_eq!(duties(&state, &silent), []);
    let gone = life(&[(1, Life::Gone), (2, Life::Alive), (3, Life::Alive)]);
    let first = duties(&state, &gone);
    assert!(
        matches!(&first[..], [Duty::Take(NodeId(1), Command::Batch(taken))] if taken.len() == 2),
        "{first:?}"
    );
    settle(&mut state, &gone);
    let new = state.vms["m"].node.unwrap();
    assert_ne!(new, NodeId(1));
    assert_eq!(state.volumes["v"].owner, Some(new), "the volume follows the VM");
}

#[test]
fn memory_is_promised_once() {
    let mut state = cluster(3);
    for name in ["a", "b", "c", "d"] {
        vm(&mut state, name, &[], None);
    }
    let alive = life(&[(1, Life::Alive), (2, Life::Alive), (3, Life::Alive)]);
    settle(&mut state, &alive);
    let placed: Vec<_> = state.vms.values().filter_map(|vm| vm.node).collect();
    assert_eq!(
        placed.len(),
        3,
        "each node has room for one, and the fourth waits"
    );
    assert_eq!(placed.iter().collect::<BTreeSet<_>>().len(), 3);
}

#[test]
fn a_volume_without_an_owner_gets_one() {
    let mut state = cluster(3);
    volume(&mut state, "v", None);
    let none = life(&[]);
    assert_eq!(duties(&state, &none), [], "nobody is there to take it");
    let one = life(&[(2, Life::Alive)]);
    settle(&mut state, &one);
    assert_eq!(state.volumes["v"].owner, Some(NodeId(2)));
}

#[test]
fn the_data_of_a_lost_node_moves_to_the_others() {
    let mut state = cluster(4);
    volume(&mut state, "v", Some(2));
    let lost = life(&[
        (1, Life::Lost),
        (2, Life::Alive),
        (3, Life::Alive),
        (4, Life::Alive),
    ]);
    settle(&mut state, &lost);
    let on_lost = state.volumes["v"]
        .chunks
        .iter()
        .flatten()
        .filter(|slot| matches!(slot.disk.0.0, 10 | 11))
        .count();
    assert_eq!(on_lost, 0);
    assert!(
        !state.disks.contains_key(&Disk(DiskUuid(10))),
        "empty disks are forgotten"
    );
}

/// What owners do who reach every disk: all replicas are in sync in a moment.
fn heal(state: &mut State) {
    let names: Vec<_> = state.volumes.keys().cloned().collect();
    for name in names {
        let stale: Vec<_> = {
            let chunks = (0u32..).zip(&state.volumes[&name].chunks);
            let slots = chunks.flat_map(|(chunk, slots)| slots.iter().map(move |slot| (chunk, slot)));
            let stale = slots.filter(|(_, slot)| slot.state == ReplicaState::Stale);
            stale.map(|(chunk, slot)| (chunk, slot.disk.0)).collect()
        };
        for (chunk, disk) in stale {
            let chunks = vec![chunk];
            for change in [
                Change::StartRebuild {
                    disk,
                    chunks: chunks.clone(),
                },
                Change::MarkInSync {
                    disk,
                    chunks,
                    boot: BootId(0),
                    power: PowerId(0),
                },
            ] {
                let volume = &state.volumes[&name];
                let proposal = Proposal {
                    generation: Generation(volume.generation),
                    config: volume.config,
                    change,
                };
                let name = name.clone();
                state.apply(&Command::Propose { name, proposal }).unwrap();
            }
        }
    }
}

fn drain(state: &mut State, node: u64) {
    let (node, on) = (NodeId(node), true);
    state.apply(&Command::Drain { node, on }).unwrap();
}

fn copies_everywhere(state: &State, what: &Command) {
    for (name, volume) in &state.volumes {
        for slots in &volume.chunks {
            let in_sync = slots.iter().filter(|slot| slot.state == ReplicaState::InSync);
            let domains: BTreeSet<_> = in_sync.map(|slot| state.domain_of(slot.disk)).collect();
            assert!(
                domains.len() >= volume.mirror as usize,
                "{name} has fewer copies after {what:?}"
            );
        }
    }
}

/// Carries out what is to be done until nothing is, while owners heal what they can; no copy may be missing at any time.
fn move_all(state: &mut State, life: &BTreeMap<NodeId, Life>) {
    for _ in 0..50 {
        let duties = duties(state, life);
        if duties.is_empty() {
            return;
        }
        for duty in duties {
            let (Duty::Take(_, command) | Duty::Do(command)) = duty;
            state.apply(&command).unwrap();
            state.check().unwrap();
            copies_everywhere(state, &command);
        }
        heal(state);
    }
    panic!("there is no end of duties");
}

fn alive(nodes: u64) -> BTreeMap<NodeId, Life> {
    (1..=nodes).map(|node| (NodeId(node), Life::Alive)).collect()
}

#[test]
fn no_copy_is_missing_while_disks_leave() {
    for leaving in [&[10u128][..], &[10, 11], &[10, 20], &[10, 21, 31]] {
        let mut state = cluster(4);
        (1..=3).for_each(|copies| volume_of(&mut state, &format!("v{copies}"), copies, Some(2)));
        for &disk in leaving {
            let disk = DiskUuid(disk);
            state.apply(&Command::DiskLeave { disk }).unwrap();
        }
        move_all(&mut state, &alive(4));
        for &disk in leaving {
            assert!(
                !state.disks.contains_key(&Disk(DiskUuid(disk))),
                "{disk} of {leaving:?}"
            );
        }
        assert_eq!(state.disks.len(), 8 - leaving.len());
    }
}

#[test]
fn three_copies_on_three_nodes_stay_in_their_nodes() {
    let mut state = cluster(3);
    volume_of(&mut state, "v", 3, Some(2));
    let disk = DiskUuid(10);
    state.apply(&Command::DiskLeave { disk }).unwrap();
    move_all(&mut state, &alive(3));
    let mut slots = state.volumes["v"].chunks.iter().flatten();
    assert!(slots.all(|slot| slot.disk != Disk(disk)));
}

#[test]
fn a_drained_node_becomes_empty_one_disk_after_the_other() {
    let mut state = cluster(4);
    (1..=3).for_each(|copies| volume_of(&mut state, &format!("v{copies}"), copies, Some(2)));
    drain(&mut state, 1);
    let first = duties(&state, &alive(4));
    let leave = |duty: &&Duty| matches!(duty, Duty::Do(Command::DiskLeave { .. }));
    assert_eq!(first.iter().filter(leave).count(), 1, "{first:?}");
    move_all(&mut state, &alive(4));
    assert!(state.disks.values().all(|disk| disk.node != NodeId(1)));
    let remove = Command::RemoveNode { node: NodeId(1) };
    state.apply(&remove).unwrap();
}

#[test]
fn what_has_nowhere_to_go_stays_as_it_is_and_the_rest_goes() {
    let mut state = cluster(3);
    (1..=3).for_each(|copies| volume_of(&mut state, &format!("v{copies}"), copies, Some(2)));
    drain(&mut state, 1);
    move_all(&mut state, &alive(3));
    let on_it = |volume: &str| {
        let mut slots = state.volumes[volume].chunks.iter().flatten();
        slots.any(|slot| state.disks[&slot.disk].node == NodeId(1))
    };
    assert_eq!(["v1", "v2", "v3"].map(on_it), [false, false, true]);
    let left: Vec<_> = state
        .disks
        .iter()
        .filter(|(_, disk)| disk.node == NodeId(1))
        .collect();
    assert!(!left.is_empty() && left.iter().all(|(disk, _)| !leaving::goes(&state, **disk)));
}

#[test]
fn nothing_is_removed_while_the_new_copies_can_not_be_reached() {
    let mut state = cluster(4);
    volume(&mut state, "v", Some(1));
    let (disk, mut dark) = (DiskUuid(10), alive(4));
    state.apply(&Command::DiskLeave { disk }).unwrap();
    for duty in duties(&state, &dark) {
        let (Duty::Take(_, command) | Duty::Do(command)) = duty;
        state.apply(&command).unwrap();
    }
    heal(&mut state);
    dark.extend([2, 3, 4].map(|node| (NodeId(node), Life::Silent)));
    assert_eq!(duties(&state, &dark), []);
    move_all(&mut state, &alive(4));
    assert!(!state.disks.contains_key(&Disk(disk)));
}

#[test]
fn of_two_lost_nodes_neither_is_chosen_to_be_the_one_without_data() {
    let mut state = cluster(4);
    volume(&mut state, "v", None);
    let before = state.volumes["v"].chunks.clone();
    let mut dark = alive(4);
    dark.extend([1, 2].map(|node| (NodeId(node), Life::Lost)));
    settle(&mut state, &dark);
    let lost = |slot: &crate::state::Replica| {
        let record = &state.disks[&slot.disk];
        matches!(record.node, NodeId(1 | 2))
    };
    let mut both = 0;
    for (now, then) in state.volumes["v"].chunks.iter().zip(&before) {
        if then.iter().all(|slot| matches!(slot.disk.0.0, 10..=29)) {
            both += 1;
            assert_eq!(now, then, "either may come back");
        } else {
            assert!(!now.iter().any(lost), "another copy is there");
        }
    }
    assert!(both > 0);
    heal(&mut state);
    move_all(&mut state, &alive(4));
    let mut slots = state.volumes["v"].chunks.iter().flatten();
    assert!(slots.all(|slot| matches!(slot.disk.0.0, 30..)));
}

#[test]
fn a_vm_that_can_not_run_elsewhere_has_no_place_on_a_node_that_is_gone() {
    let mut state = cluster(3);
    volume(&mut state, "v", Some(1));
    volume(&mut state, "w", Some(1));
    // Each of the others is full.
    vm(&mut state, "b", &[], Some(2));
    vm(&mut state, "c", &[], Some(3));
    let mut large = state.clone();

    vm(&mut state, "stopping", &["v"], Some(1));
    let stop = Command::RunVm {
        name: "stopping".into(),
        run: false,
        seconds: None,
    };
    state.apply(&stop).unwrap();
    let gone = life(&[(1, Life::Gone), (2, Life::Alive), (3, Life::Alive)]);
    settle(&mut state, &gone);
    assert_eq!(state.vms["stopping"].node, None, "it has stopped with its node");
    assert!(matches!(state.volumes["v"].owner, Some(NodeId(2 | 3))));

    vm(&mut large, "large", &["w"], Some(1));
    settle(&mut large, &gone);
    assert_eq!(large.vms["large"].node, None);
    assert!(matches!(large.volumes["w"].owner, Some(NodeId(2 | 3))));
    // It is placed as soon as there is room, and its volume can follow it.
    let free = Command::RunVm {
        name: "b".into(),
        run: false,
        seconds: None,
    };
    large.apply(&free).unwrap();
    let left = Command::PlaceVm {
        name: "b".into(),
        node: None,
        epoch: large.vms["b"].epoch,
    };
    large.apply(&left).unwrap();
    settle(&mut large, &gone);
    assert_eq!(large.vms["large"].node, Some(NodeId(2)));
}

#[test]
fn a_node_owns_no_more_volumes_than_its_data_plane_takes() {
    let mut state = cluster(2);
    volume(&mut state, "v", Some(1));
    let volumes = &mut state.volumes;
    let one = volumes["v"].clone();
    for n in 1..VOLUMES_MAX {
        volumes.insert(format!("v{n}"), one.clone());
    }
    let mut free = one;
    std::sync::Arc::make_mut(&mut free).owner = None;
    volumes.insert("free".into(), free);
    let mut life = life(&[(1, Life::Alive), (2, Life::Alive)]);
    let to = |state: &State, life: &BTreeMap<NodeId, Life>| -> Vec<NodeId> {
        let attached = duties(state, life).into_iter().filter_map(|duty| match duty {
            Duty::Do(Command::Attach { node, .. }) => Some(node),
            _ => None,
        });
        attached.collect()
    };
    assert_eq!(to(&state, &life), [NodeId(2)]);
    life.insert(NodeId(2), Life::Silent);
    assert_eq!(to(&state, &life), []);
}
