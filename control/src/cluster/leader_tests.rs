//! What the leader does in one situation and another, and that there is an end of it.

use super::*;
use crate::state::VmSpec;
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
    let chunks = planner::plan_chunks(state, 4, 2).unwrap();
    let create = Command::CreateVolume {
        name: name.into(),
        size: 256 << 20,
        mirror: 2,
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

#[test]
fn a_drained_node_gives_up_one_disk_at_a_time() {
    let mut state = cluster(4);
    volume(&mut state, "v", Some(2));
    let drain = Command::Drain {
        node: NodeId(1),
        on: true,
    };
    state.apply(&drain).unwrap();
    let alive = life(&[
        (1, Life::Alive),
        (2, Life::Alive),
        (3, Life::Alive),
        (4, Life::Alive),
    ]);
    let first = duties(&state, &alive);
    let outs = first
        .iter()
        .filter(|duty| matches!(duty, Duty::Do(Command::DiskOut { .. })))
        .count();
    assert_eq!(outs, 1, "{first:?}");
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

#[test]
fn a_drained_node_becomes_empty_though_owners_heal_its_disks_at_once() {
    let mut state = cluster(4);
    volume(&mut state, "v", Some(2));
    let drain = Command::Drain {
        node: NodeId(1),
        on: true,
    };
    state.apply(&drain).unwrap();
    let alive = life(&[1, 2, 3, 4].map(|node| (node, Life::Alive)));
    for _ in 0..20 {
        for duty in duties(&state, &alive) {
            let (Duty::Take(_, command) | Duty::Do(command)) = duty;
            state.apply(&command).unwrap();
            state.check().unwrap();
            heal(&mut state);
        }
    }
    assert!(state.disks.values().all(|disk| disk.node != NodeId(1)));
    let remove = Command::RemoveNode { node: NodeId(1) };
    state.apply(&remove).unwrap();
}

#[test]
fn a_disk_is_not_given_up_while_the_other_copies_can_not_be_read() {
    let mut state = cluster(4);
    volume(&mut state, "v", Some(2));
    let drain = Command::Drain {
        node: NodeId(1),
        on: true,
    };
    state.apply(&drain).unwrap();
    let alone = life(&[
        (1, Life::Alive),
        (2, Life::Silent),
        (3, Life::Silent),
        (4, Life::Silent),
    ]);
    let used: BTreeSet<_> = state.volumes["v"]
        .chunks
        .iter()
        .flatten()
        .map(|slot| slot.disk.0)
        .collect();
    for duty in duties(&state, &alone) {
        let Duty::Do(Command::DiskOut { disk }) = duty else {
            continue;
        };
        assert!(!used.contains(&disk), "{disk}");
    }
}
