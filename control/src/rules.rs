//! Random commands on the control state, and what must hold after each.

use std::collections::BTreeSet;

use proptest::prelude::*;
use unibody_dataplane::config::{Change, Outcome, Proposal};
use unibody_dataplane::ids::{BootId, DiskUuid, Generation, PowerId};

use crate::planner;
use crate::state::{Applied, Command, Disk, NodeId, Refused, Replica, ReplicaState, State, VmSpec};

/// A step of a random history; numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Step {
    AddNode(u8, u8),
    NodeUp(u8, u8),
    RemoveNode(u8),
    Drain(u8, bool),
    AddDisk(u8, u8, bool),
    DiskUp(u8, u8),
    ForgetDisk(u8),
    DiskOut(u8),
    DiskLeave(u8),
    Create(u8, u8),
    Grow(u8),
    Delete(u8),
    Attach(u8, u8, bool),
    LetGo(u8, u8, bool),
    Handover(u8, u8),
    Propose {
        volume: u8,
        disk: u8,
        kind: u8,
        chunks: Vec<u32>,
        boot: u8,
        old_config: bool,
        old_generation: bool,
    },
    Move(u8, u8, bool),
    /// As planned, or to a disk of choice.
    Add(u8, u8, Option<u8>),
    Remove(u8, u8, Vec<u32>),
    GiveUp(u8, u8, Vec<u32>),
    Vm(u8, u8, u8),
    Describe(u8, u8),
    Run(u8, bool),
    PlaceVm(u8, u8, bool),
    DeleteVm(u8),
    Batch(Vec<Step>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![30 => one(), 1 => prop::collection::vec(one(), 0..6).prop_map(Step::Batch)]
}

fn one() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => (0u8..6, 0u8..5).prop_map(|(n, domain)| Step::AddNode(n, domain)),
        1 => (0u8..6, 6u8..12).prop_map(|(n, memory)| Step::NodeUp(n, memory)),
        1 => (0u8..6).prop_map(Step::RemoveNode),
        1 => (0u8..6, any::<bool>()).prop_map(|(n, on)| Step::Drain(n, on)),
        2 => (0u8..8, prop_oneof![3 => Just(0u8), 1 => 0u8..5], any::<bool>())
            .prop_map(|(n, moved, own)| Step::AddDisk(n, moved, own)),
        1 => (0u8..8, 0u8..3).prop_map(|(n, boot)| Step::DiskUp(n, boot)),
        1 => (0u8..8).prop_map(Step::ForgetDisk),
        1 => (0u8..8).prop_map(Step::DiskOut),
        2 => (0u8..8).prop_map(Step::DiskLeave),
        2 => (0u8..4, 1u8..=3).prop_map(|(v, m)| Step::Create(v, m)),
        1 => (0u8..4).prop_map(Step::Grow),
        1 => (0u8..4).prop_map(Step::Delete),
        3 => (0u8..4, 0u8..6, prop::bool::weighted(0.1)).prop_map(|(v, n, old)| Step::Attach(v, n, old)),
        1 => (0u8..4, 0u8..6, any::<bool>()).prop_map(|(v, n, revoke)| Step::LetGo(v, n, revoke)),
        1 => (0u8..4, 0u8..6).prop_map(|(v, n)| Step::Handover(v, n)),
        12 => (0u8..4, 0u8..8, 0u8..3, prop::collection::vec(0u32..6, 0..5), 0u8..3, prop::bool::weighted(0.1), prop::bool::weighted(0.1))
            .prop_map(|(volume, disk, kind, chunks, boot, old_config, old_generation)| Step::Propose {
                volume, disk, kind, chunks, boot, old_config, old_generation,
            }),
        3 => (0u8..4, 0u8..8, prop::bool::weighted(0.1)).prop_map(|(v, d, old)| Step::Move(v, d, old)),
        4 => (0u8..4, 0u8..8, prop::option::weighted(0.2, 0u8..8)).prop_map(|(v, d, to)| Step::Add(v, d, to)),
        3 => (0u8..4, 0u8..8, prop::collection::vec(0u32..3, 0..3)).prop_map(|(v, d, chunks)| Step::Remove(v, d, chunks)),
        1 => (0u8..4, 0u8..8, prop::collection::vec(0u32..3, 0..3)).prop_map(|(v, d, chunks)| Step::GiveUp(v, d, chunks)),
        1 => (0u8..4, 0u8..5).prop_map(|(n, memory)| Step::Describe(n, memory)),
        1 => (0u8..4, any::<bool>()).prop_map(|(n, run)| Step::Run(n, run)),
        2 => (0u8..4, 0u8..5, 0u8..4).prop_map(|(n, memory, volumes)| Step::Vm(n, memory, volumes)),
        2 => (0u8..4, 0u8..7, prop::bool::weighted(0.1)).prop_map(|(n, node, old)| Step::PlaceVm(n, node, old)),
        1 => (0u8..4).prop_map(Step::DeleteVm),
    ]
}

fn disk(n: u8) -> DiskUuid {
    DiskUuid(u128::from(n) + 1)
}

fn add_node(n: u8, domain: u8) -> Command {
    Command::AddNode {
        node: NodeId(u64::from(n) + 1),
        store: u128::from(n),
        name: format!("n{n}"),
        addresses: vec![format!("10.0.0.{n}:7000")],
        domain: format!("d{domain}"),
        memory: 8,
        incarnation: 1,
    }
}

/// A node of the state's kind: of a cluster or not.
fn node(state: &State, n: u8) -> NodeId {
    match state.nodes.is_empty() {
        true => NodeId::LOCAL,
        false => NodeId(u64::from(n) + 1),
    }
}

fn command(state: &State, step: &Step) -> Option<Command> {
    let name = |v: &u8| format!("v{v}");
    Some(match step {
        // Never in a state of one node alone.
        Step::AddNode(n, domain) if !state.nodes.is_empty() => add_node(*n, *domain),
        Step::AddNode(..) => return None,
        Step::NodeUp(n, memory) => Command::NodeUp {
            node: node(state, *n),
            addresses: vec!["[::1]:1".into()],
            memory: u64::from(*memory),
            incarnation: 2,
        },
        Step::RemoveNode(n) => Command::RemoveNode {
            node: node(state, *n),
        },
        Step::Drain(n, on) => Command::Drain {
            node: node(state, *n),
            on: *on,
        },
        Step::AddDisk(n, moved, own) => Command::AddDisk {
            disk: disk(*n),
            node: node(state, (n + moved) % 6),
            domain: match *own || state.nodes.is_empty() {
                true => format!("d{}", (n + moved) % 5),
                false => String::new(),
            },
            bytes: 1 << 30,
        },
        Step::DiskUp(n, boot) => Command::DiskUp {
            disk: disk(*n),
            boot: u128::from(*boot),
        },
        Step::ForgetDisk(n) => Command::ForgetDisk { disk: disk(*n) },
        Step::DiskOut(n) => Command::DiskOut { disk: disk(*n) },
        Step::DiskLeave(n) => Command::DiskLeave { disk: disk(*n) },
        Step::Create(v, mirror) => Command::CreateVolume {
            name: name(v),
            size: 100 << 20,
            mirror: u32::from(*mirror),
            stripe_unit: 1 << 18,
            stripe_width: 2,
            read_only: false,
            instance: 1,
            chunks: planner::plan_chunks(state, 2, u32::from(*mirror)).ok()?,
        },
        Step::Grow(v) => {
            let volume = state.volumes.get(&name(v))?;
            let size = volume.size + (100 << 20);
            let more = volume.geometry().chunks(size) - volume.chunks.len() as u32;
            Command::ResizeVolume {
                name: name(v),
                size,
                chunks: planner::plan_chunks(state, more, volume.mirror).ok()?,
            }
        }
        Step::Delete(v) => Command::DeleteVolume { name: name(v) },
        Step::Attach(v, n, old) => Command::Attach {
            name: name(v),
            node: node(state, *n),
            generation: state
                .volumes
                .get(&name(v))?
                .generation
                .wrapping_sub(u32::from(*old)),
        },
        Step::LetGo(v, n, revoke) => {
            let (name, generation) = (name(v), state.volumes.get(&name(v))?.generation);
            let node = node(state, *n);
            match revoke {
                true => Command::Revoke { name, generation },
                false => Command::Release {
                    name,
                    node,
                    generation,
                },
            }
        }
        Step::Handover(v, n) => Command::Handover {
            name: name(v),
            generation: state.volumes.get(&name(v))?.generation,
            to: node(state, *n),
        },
        Step::Propose {
            volume,
            disk: d,
            kind,
            chunks,
            boot,
            old_config,
            old_generation,
        } => {
            let (disk, chunks) = (disk(*d), chunks.clone());
            let change = match kind {
                0 => Change::MarkStale {
                    disk,
                    chunks,
                    no_space: d % 2 == 0,
                },
                1 => Change::StartRebuild { disk, chunks },
                _ => Change::MarkInSync {
                    disk,
                    chunks,
                    boot: BootId(u128::from(*boot)),
                    power: PowerId(8),
                },
            };
            let present = state.volumes.get(&name(volume))?;
            let proposal = Proposal {
                generation: Generation(present.generation.wrapping_sub(u32::from(*old_generation))),
                config: present.config - u32::from(*old_config),
                change,
            };
            Command::Propose {
                name: name(volume),
                proposal,
            }
        }
        Step::Move(v, d, old) => {
            let volume = state.volumes.get(&name(v))?;
            Command::Move {
                name: name(v),
                generation: volume.generation,
                config: volume.config - u32::from(*old),
                from: disk(*d),
                to: planner::plan_moves(state, &name(v), disk(*d), false),
            }
        }
        Step::Add(v, d, to) => {
            let volume = state.volumes.get(&name(v))?;
            Command::AddReplicas {
                name: name(v),
                generation: volume.generation,
                config: volume.config,
                from: disk(*d),
                to: match to {
                    Some(to) => vec![(0, disk(*to))],
                    None => planner::plan_additions(state, &name(v), disk(*d)),
                },
            }
        }
        Step::Remove(v, d, chunks) => {
            let volume = state.volumes.get(&name(v))?;
            Command::RemoveReplicas {
                name: name(v),
                generation: volume.generation,
                config: volume.config,
                disk: disk(*d),
                chunks: chunks.clone(),
            }
        }
        Step::GiveUp(v, d, chunks) => {
            let volume = state.volumes.get(&name(v))?;
            Command::GiveUp {
                name: name(v),
                generation: volume.generation,
                config: volume.config,
                disk: disk(*d),
                chunks: chunks.clone(),
            }
        }
        Step::Describe(n, memory) => Command::DescribeVm {
            name: format!("m{n}"),
            of: None,
            definition: "{}".into(),
            memory: u64::from(*memory),
            volumes: Vec::new(),
        },
        Step::Run(n, run) => Command::RunVm {
            name: format!("m{n}"),
            run: *run,
            seconds: None,
        },
        Step::Vm(n, memory, volumes) => {
            let (name, known) = (format!("m{n}"), state.vms.contains_key(&format!("m{n}")));
            let vm = VmSpec {
                definition: format!("{{\"n\":{n}}}"),
                memory: u64::from(*memory),
                volumes: (0..*volumes).map(|v| format!("v{}", (v + n) % 4)).collect(),
                run: true,
            };
            match known {
                true => Command::UpdateVm { name, vm },
                false => Command::CreateVm { name, vm },
            }
        }
        Step::PlaceVm(n, target, old) => Command::PlaceVm {
            name: format!("m{n}"),
            node: (*target < 6).then(|| node(state, *target)),
            epoch: state
                .vms
                .get(&format!("m{n}"))?
                .epoch
                .wrapping_sub(u32::from(*old)),
        },
        Step::DeleteVm(n) => Command::DeleteVm {
            name: format!("m{n}"),
        },
        Step::Batch(steps) => Command::Batch(steps.iter().filter_map(|step| command(state, step)).collect()),
    })
}

/// Failure domains in which a chunk is in sync.
fn copies(state: &State, slots: &[Replica]) -> usize {
    let in_sync = slots.iter().filter(|slot| slot.state == ReplicaState::InSync);
    let domains: BTreeSet<_> = in_sync.map(|slot| state.domain_of(slot.disk)).collect();
    domains.len()
}

/// Rules about one change, beside those that [`State::check`] knows of every state.
fn check_change(before: &State, after: &State, command: &Command, result: &Applied) {
    if let (Command::Batch(commands), Applied::Batch(answers)) = (command, result) {
        // One after the other is the same as all at once.
        let mut one_by_one = before.clone();
        let expected: Vec<_> = commands.iter().map(|command| one_by_one.apply(command)).collect();
        assert_eq!((&one_by_one, &expected), (after, answers));
        return;
    }
    for id in after.nodes.keys() {
        let placed = after.vms.values().filter(|vm| vm.node == Some(*id));
        let used: u64 = placed.map(crate::state::Vm::memory).sum();
        let shrunk = matches!(command, Command::NodeUp { .. } | Command::AddNode { .. });
        assert!(
            used <= after.nodes[id].memory
                || shrunk
                || before.nodes[id].memory == after.nodes[id].memory && before.memory_free(*id) == 0,
            "{command:?}: memory promised twice"
        );
    }
    for (id, node) in &before.nodes {
        if !after.nodes.contains_key(id) {
            let on_it = |disk: &Disk| before.disks[disk].node == *id;
            let mut slots = before
                .volumes
                .values()
                .flat_map(|volume| volume.chunks.iter().flatten());
            assert!(!slots.any(|slot| on_it(&slot.disk)), "{} had replicas", node.name);
            assert!(before.volumes.values().all(|volume| volume.owner != Some(*id)));
            assert!(before.vms.values().all(|vm| vm.node != Some(*id)));
        }
    }
    for (name, volume) in &after.volumes {
        let Some(old) = before.volumes.get(name).filter(|old| old.id == volume.id) else {
            continue;
        };
        assert!(volume.config >= old.config && volume.generation >= old.generation);
        if volume.owner.is_some() && volume.owner != old.owner {
            assert!(volume.generation > old.generation, "two owners in one generation");
            assert!(old.owner.is_none() || matches!(command, Command::Handover { .. }));
        }
        if volume.chunks != old.chunks && !matches!(command, Command::DiskOut { .. }) {
            assert_eq!(volume.generation, old.generation);
        }
        if volume != old {
            assert!(
                volume.config > old.config,
                "a change that the configuration number does not show"
            );
        }
        for (now, then) in volume.chunks.iter().zip(&old.chunks) {
            let staying = now.iter().filter(|slot| !after.disks[&slot.disk].out);
            let domains: BTreeSet<_> = staying.clone().map(|slot| after.domain_of(slot.disk)).collect();
            let wanted = volume.mirror as usize;
            let all: BTreeSet<_> = now.iter().map(|slot| after.domain_of(slot.disk)).collect();
            assert!(
                domains.len() == staying.count() || now.len() > wanted && all.len() >= wanted,
                "{command:?}: two replicas in one domain"
            );
            if !matches!(
                command,
                Command::Propose { .. } | Command::DiskOut { .. } | Command::GiveUp { .. }
            ) {
                let (now, then) = (copies(after, now), copies(after, then));
                assert!(now.min(wanted) >= then.min(wanted), "{command:?}: fewer copies");
            }
            for slot in now {
                let was = then
                    .iter()
                    .find(|was| was.disk == slot.disk && was.incarnation == slot.incarnation);
                match was {
                    None => assert!(slot.state == ReplicaState::Stale && slot.incarnation == volume.config),
                    Some(was) if slot.state == ReplicaState::InSync => {
                        assert_ne!(was.state, ReplicaState::Stale)
                    }
                    Some(_) => {}
                }
            }
        }
    }
    if let (Command::Propose { name, proposal }, Applied::Outcome(outcome)) = (command, result) {
        let old = &before.volumes[name];
        let current =
            old.owner.is_some() && proposal.generation.0 == old.generation && proposal.config == old.config;
        if let Change::MarkInSync { disk, boot, .. } = &proposal.change {
            let stated = before.disks.get(&Disk(*disk)).map_or(0, |record| record.boot);
            let now = &after.volumes[name].chunks;
            let came = now.iter().zip(&old.chunks).any(|(now, then)| now != then);
            assert!(
                !came || stated == 0 || stated == boot.0,
                "in sync with a boot that is over"
            );
        }
        assert_eq!(
            matches!(outcome, Outcome::Committed(_)),
            current,
            "compare-and-swap"
        );
        assert!(
            current || before == after,
            "a proposal from an old view changed something"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn no_history_breaks_a_rule(cluster: bool, steps in prop::collection::vec(step(), 1..120)) {
        let mut state = State::default();
        for n in 0..4 {
            if cluster {
                state.apply(&add_node(n, n)).unwrap();
            }
            let add = Step::AddDisk(n, 0, false);
            let add = command(&state, &add).unwrap();
            state.apply(&add).unwrap();
        }
        for step in &steps {
            let Some(command) = command(&state, step) else { continue };
            let text = serde_json::to_string(&command).unwrap();
            prop_assert_eq!(&serde_json::from_str::<Command>(&text).unwrap(), &command);
            let before = state.clone();
            let mut twin = state.clone();
            let result = state.apply(&command);
            prop_assert_eq!(&result, &twin.apply(&command));
            prop_assert_eq!(&state, &twin, "equal commands gave different states");
            prop_assert_eq!(state.check(), Ok(()));
            match &result {
                Ok(applied) => check_change(&before, &state, &command, applied),
                Err(refused) => {
                    prop_assert_eq!(&state, &before, "a refused command changed something");
                    let text = serde_json::to_string(refused).unwrap();
                    prop_assert_eq!(&serde_json::from_str::<Refused>(&text).unwrap(), refused);
                }
            }
            let text = serde_json::to_string(&state).unwrap();
            prop_assert_eq!(&serde_json::from_str::<State>(&text).unwrap(), &state);
        }
    }
}

#[test]
fn the_last_copy_stays_in_sync() {
    let mut state = State::default();
    for n in 0..2 {
        state
            .apply(&Command::AddDisk {
                disk: disk(n),
                node: NodeId::LOCAL,
                domain: format!("d{n}"),
                bytes: 1 << 30,
            })
            .unwrap();
    }
    let create = Step::Create(0, 2);
    let create = command(&state, &create).unwrap();
    state.apply(&create).unwrap();
    let attach = command(&state, &Step::Attach(0, 0, false)).unwrap();
    state.apply(&attach).unwrap();
    for (n, left) in [(0, 1), (1, 1)] {
        let volume = &state.volumes["v0"];
        let proposal = Proposal {
            generation: Generation(volume.generation),
            config: volume.config,
            change: Change::MarkStale {
                disk: disk(n),
                chunks: vec![0, 1],
                no_space: false,
            },
        };
        state
            .apply(&Command::Propose {
                name: "v0".into(),
                proposal,
            })
            .unwrap();
        for slots in &state.volumes["v0"].chunks {
            let in_sync: Vec<_> = slots
                .iter()
                .filter(|slot| slot.state == ReplicaState::InSync)
                .collect();
            assert_eq!(in_sync.len(), left);
            assert!(in_sync.iter().all(|slot| slot.disk == Disk(disk(1))));
        }
    }
}

/// Brings every replica up to date, as an owner does that reaches all.
fn heal(state: &mut State) {
    let slots = state.volumes["v0"].chunks[0].clone();
    for slot in slots.iter().filter(|slot| slot.state == ReplicaState::Stale) {
        let (disk, chunks) = (slot.disk.0, vec![0]);
        let (boot, power) = (BootId(0), PowerId(0));
        for change in [
            Change::StartRebuild {
                disk,
                chunks: chunks.clone(),
            },
            Change::MarkInSync {
                disk,
                chunks,
                boot,
                power,
            },
        ] {
            let volume = &state.volumes["v0"];
            let proposal = Proposal {
                generation: Generation(volume.generation),
                config: volume.config,
                change,
            };
            let name = "v0".into();
            state.apply(&Command::Propose { name, proposal }).unwrap();
        }
    }
}

/// Volume `v0` of one chunk on the first disks of six, each a domain but the last two, which are in those of the first two.
fn with_copies(mirror: u8) -> State {
    let mut state = State::default();
    for n in 0..6 {
        let add = Command::AddDisk {
            disk: disk(n),
            node: NodeId::LOCAL,
            domain: format!("d{}", n % 4),
            bytes: 1 << 30,
        };
        state.apply(&add).unwrap();
    }
    let create = Command::CreateVolume {
        name: "v0".into(),
        size: 1 << 20,
        mirror: u32::from(mirror),
        stripe_unit: 1 << 18,
        stripe_width: 1,
        read_only: false,
        instance: 1,
        chunks: vec![(0..mirror).map(disk).collect()],
    };
    state.apply(&create).unwrap();
    let attach = command(&state, &Step::Attach(0, 0, false)).unwrap();
    state.apply(&attach).unwrap();
    state
}

#[test]
fn a_replica_is_removed_when_its_successor_is_in_sync_and_not_before() {
    for (mirror, leaves) in (1..=3).flat_map(|mirror| [(mirror, true), (mirror, false)]) {
        let mut state = with_copies(mirror);
        // In the domain of the disk that leaves: a node has no other place for three copies on three nodes.
        let add = Step::Add(0, 0, Some(4));
        let remove = Step::Remove(0, 0, vec![0]);
        let refused = |state: &mut State, step: &Step| {
            let command = command(state, step).unwrap();
            state.apply(&command).unwrap_err().to_string()
        };
        if leaves {
            state.apply(&Command::DiskLeave { disk: disk(0) }).unwrap();
        }
        assert!(
            state.volumes["v0"].chunks[0]
                .iter()
                .all(|slot| slot.state == ReplicaState::InSync)
        );
        assert!(refused(&mut state, &remove).contains("no replica more"));
        if mirror > 1 {
            assert!(refused(&mut state, &Step::Add(0, 0, Some(5))).contains("failure domain"));
        }
        let added = command(&state, &add).unwrap();
        state.apply(&added).unwrap();
        assert!(refused(&mut state, &Step::Add(0, 0, Some(3))).contains("one replica more already"));
        assert!(refused(&mut state, &remove).contains("too few others"));
        heal(&mut state);
        let removed = command(&state, &remove).unwrap();
        state.apply(&removed).unwrap();
        state.check().unwrap();
        let on: BTreeSet<_> = state.volumes["v0"].chunks[0]
            .iter()
            .map(|slot| slot.disk)
            .collect();
        let wanted = (1..mirror).chain([4]).map(|n| Disk(disk(n)));
        assert_eq!(on, wanted.collect());
        assert!(refused(&mut state, &remove).contains("no replica on that disk"));
    }
}

#[test]
fn copies_in_one_domain_count_once_when_a_replica_is_removed() {
    let mut state = with_copies(3);
    let run = |state: &mut State, step: Step| {
        let command = command(state, &step).unwrap();
        state.apply(&command)
    };
    run(&mut state, Step::DiskLeave(0)).unwrap();
    run(&mut state, Step::Add(0, 0, Some(4))).unwrap();
    heal(&mut state);
    // The first and the fifth are in one domain: without the second, three copies would be in two.
    run(&mut state, Step::DiskLeave(1)).unwrap();
    let refused = run(&mut state, Step::Remove(0, 1, vec![0])).unwrap_err();
    assert!(
        refused.to_string().contains("too few failure domains"),
        "{refused}"
    );
    run(&mut state, Step::Remove(0, 0, vec![0])).unwrap();
    run(&mut state, Step::Add(0, 1, Some(5))).unwrap();
}

#[test]
fn a_stale_replica_is_moved_where_without_it_two_would_share_a_domain() {
    let mut state = with_copies(3);
    let run = |state: &mut State, step: Step| {
        let command = command(state, &step).unwrap();
        state.apply(&command)
    };
    run(&mut state, Step::DiskLeave(0)).unwrap();
    run(&mut state, Step::Add(0, 0, Some(4))).unwrap();
    heal(&mut state);
    run(&mut state, Step::DiskOut(1)).unwrap();
    assert!(run(&mut state, Step::Remove(0, 1, vec![0])).is_err());
    run(&mut state, Step::Move(0, 1, false)).unwrap();
    heal(&mut state);
    run(&mut state, Step::Remove(0, 0, vec![0])).unwrap();
    assert_eq!(copies(&state, &state.volumes["v0"].chunks[0]), 3);
    assert_eq!(state.volumes["v0"].chunks[0].len(), 3);
}

#[test]
fn what_is_given_up_has_another_copy() {
    let mut state = with_copies(2);
    let give_up = |state: &mut State, n| {
        let command = command(state, &Step::GiveUp(0, n, vec![0])).unwrap();
        state.apply(&command)
    };
    give_up(&mut state, 0).unwrap();
    give_up(&mut state, 0).unwrap();
    assert!(
        give_up(&mut state, 1)
            .unwrap_err()
            .to_string()
            .contains("no other replica")
    );
}
