//! Requests that come again, and the form in which log and snapshot are kept.

use openraft::{CommittedLeaderId, Entry, EntryPayload, LogId, Membership};
use proptest::prelude::*;
use unibody_dataplane::config::{Change, Proposal};
use unibody_dataplane::ids::{BootId, DiskUuid, Generation, PowerId};

use super::machine::*;
use super::store::{decode_entry, encode_entry};
use super::*;
use crate::envelope::Unreadable;
use crate::state::{Command, DefinitionDigest, State, VmSpec};

const TERM: u64 = 3;

fn add_node(node: u64) -> Command {
    Command::AddNode {
        node: NodeId(node),
        store: u128::from(node),
        name: format!("n{node}"),
        addresses: vec![format!("10.0.0.{node}:7100")],
        domain: format!("rack{node}"),
        memory: 1 << 34,
        incarnation: 7,
    }
}

fn propose(config: u32, change: Change) -> Command {
    let proposal = Proposal {
        generation: Generation(1),
        config,
        change,
    };
    Command::Propose {
        name: "v".into(),
        proposal,
    }
}

/// Every command there is, in an order in which nearly all succeed.
fn all_commands() -> Vec<Command> {
    let mut commands = commands_of_format_3();
    let last = commands.len() - 1;
    let describe = |definition: &str| Command::DescribeVm {
        name: "m".into(),
        of: Some(DefinitionDigest::of(r#"{"vcpus":1}"#)),
        definition: definition.into(),
        memory: 1 << 29,
        volumes: vec!["v".into()],
    };
    let vms = [
        describe(r#"{"vcpus":3}"#),
        // Refused: it is another by now.
        describe(r#"{"vcpus":4}"#),
        Command::RunVm {
            name: "m".into(),
            run: false,
            seconds: Some(5),
        },
    ];
    commands.splice(last..last, vms);
    commands
}

fn commands_of_format_3() -> Vec<Command> {
    let mut commands = commands_of_format_2();
    let forgets = |command: &Command| matches!(command, Command::ForgetDisk { .. });
    let at = commands.iter().position(forgets).expect("it is there") + 1;
    let (a, b, c, d) = (DiskUuid(0xa), DiskUuid(0xb), DiskUuid(0xc), DiskUuid(0xd));
    let name = || "v".to_owned();
    let generation = 1;
    let moving = [
        Command::AddDisk {
            disk: d,
            node: NodeId(2),
            domain: String::new(),
            bytes: 1 << 40,
        },
        Command::DiskLeave { disk: c },
        Command::GiveUp {
            name: name(),
            generation,
            config: 8,
            disk: c,
            chunks: vec![0],
        },
        Command::AddReplicas {
            name: name(),
            generation,
            config: 9,
            from: c,
            to: vec![(1, a)],
        },
        Command::RemoveReplicas {
            name: name(),
            generation,
            config: 10,
            disk: b,
            chunks: vec![1],
        },
    ];
    commands.splice(at..at, moving);
    let last = commands.len() - 1;
    let vms = [
        Command::DescribeVm {
            name: "m".into(),
            of: None,
            definition: r#"{"vcpus":1}"#.into(),
            memory: 1 << 29,
            volumes: vec![name()],
        },
        Command::RunVm {
            name: "m".into(),
            run: false,
            seconds: None,
        },
    ];
    commands.splice(last..last, vms);
    commands
}

fn commands_of_format_2() -> Vec<Command> {
    let (a, b, c) = (DiskUuid(0xa), DiskUuid(0xb), DiskUuid(0xc));
    let name = || "v".to_owned();
    let disk = |disk, node| Command::AddDisk {
        disk,
        node: NodeId(node),
        domain: String::new(),
        bytes: 1 << 40,
    };
    let chunks = vec![0];
    let vm = VmSpec {
        definition: r#"{"vcpus":2}"#.into(),
        memory: 1 << 30,
        volumes: vec![name()],
        run: true,
    };
    vec![
        add_node(1),
        add_node(2),
        add_node(3),
        add_node(4),
        Command::NodeUp {
            node: NodeId(2),
            addresses: vec!["[fe80::1]:7100".into()],
            memory: 1 << 33,
            incarnation: 8,
        },
        Command::Drain {
            node: NodeId(4),
            on: true,
        },
        Command::RemoveNode { node: NodeId(4) },
        disk(a, 1),
        disk(b, 2),
        disk(c, 3),
        Command::DiskUp { disk: b, boot: 0xb00 },
        Command::Distrust { disk: a, salt: 5 },
        Command::CreateVolume {
            name: name(),
            size: 64 << 20,
            mirror: 2,
            stripe_unit: 1 << 18,
            stripe_width: 1,
            read_only: false,
            instance: 9,
            chunks: vec![vec![a, b]],
        },
        Command::ResizeVolume {
            name: name(),
            size: 128 << 20,
            chunks: vec![vec![b, c]],
        },
        Command::Renew {
            name: name(),
            instance: 10,
        },
        Command::Attach {
            name: name(),
            node: NodeId(1),
            generation: 0,
        },
        propose(
            3,
            Change::MarkStale {
                disk: b,
                chunks: chunks.clone(),
                no_space: true,
            },
        ),
        propose(
            4,
            Change::StartRebuild {
                disk: b,
                chunks: chunks.clone(),
            },
        ),
        propose(
            5,
            Change::MarkInSync {
                disk: b,
                chunks,
                boot: BootId(0xb00),
                power: PowerId(0xee),
            },
        ),
        Command::DiskOut { disk: b },
        Command::Move {
            name: name(),
            generation: 1,
            config: 7,
            from: b,
            to: vec![(0, c)],
        },
        Command::ForgetDisk { disk: b },
        Command::Handover {
            name: name(),
            generation: 1,
            to: NodeId(3),
        },
        Command::Release {
            name: name(),
            node: NodeId(3),
            generation: 2,
        },
        Command::Revoke {
            name: name(),
            generation: 2,
        },
        Command::CreateVm {
            name: "m".into(),
            vm: vm.clone(),
        },
        Command::UpdateVm { name: "m".into(), vm },
        Command::PlaceVm {
            name: "m".into(),
            node: Some(NodeId(2)),
            epoch: 0,
        },
        Command::Batch(vec![
            Command::DeleteVm { name: "m".into() },
            Command::DeleteVolume { name: name() },
            Command::DeleteVolume { name: "w".into() },
        ]),
    ]
}

fn request(id: u128, since: u64, command: Command) -> Request {
    Request {
        request: RequestId { id, since },
        term: None,
        command,
    }
}

fn entries(commands: Vec<Command>) -> Vec<Entry<Types>> {
    let contact = Contact {
        addresses: vec!["10.0.0.1:7100".into()],
    };
    let membership = Membership::new(
        vec![[NodeId(1)].into()],
        std::collections::BTreeMap::from([(NodeId(1), contact)]),
    );
    let requests = (1u128..)
        .zip(commands)
        .map(|(id, command)| EntryPayload::Normal(request(id, id as u64 - 1, command)));
    let payloads = [EntryPayload::Membership(membership), EntryPayload::Blank]
        .into_iter()
        .chain(requests);
    (0u64..)
        .zip(payloads)
        .map(|(index, payload)| Entry {
            log_id: LogId::new(CommittedLeaderId::new(TERM, NodeId(1)), index),
            payload,
        })
        .collect()
}

/// The machine after what a log says.
fn replayed(entries: &[Entry<Types>], log: &str) -> Machine {
    let mut machine = Machine::default();
    assert_eq!(entries.len(), log.lines().count());
    for (entry, line) in entries.iter().zip(log.lines()) {
        assert_eq!(&decode_entry(entry.log_id.index, line.as_bytes()).unwrap(), entry);
        machine.applied = Some(entry.log_id);
        match &entry.payload {
            EntryPayload::Normal(request) => drop(machine.apply(request, TERM)),
            EntryPayload::Membership(membership) => {
                machine.membership = openraft::StoredMembership::new(Some(entry.log_id), membership.clone());
            }
            EntryPayload::Blank => {}
        }
    }
    assert_eq!(machine.state.check(), Ok(()));
    machine
}

/// What the log and a snapshot of format 4 look like. Never to be changed: a new format gets files of its own.
#[test]
fn log_and_snapshot_are_as_they_were() {
    let entries = entries(all_commands());
    let log: Vec<u8> = entries.iter().flat_map(encode_entry).collect();
    let golden = include_str!("../../golden/log-4.json");
    assert_eq!(
        String::from_utf8(log).unwrap(),
        golden,
        "the format changed: raise FORMAT and keep reading the old one"
    );
    let machine = replayed(&entries, golden);
    let golden = include_str!("../../golden/snapshot-4.json");
    assert_eq!(
        String::from_utf8(machine.encode()).unwrap(),
        golden,
        "the format changed"
    );
    assert_eq!(Machine::decode(golden.as_bytes()).unwrap(), machine);
}

/// A node that reads an old log and one that reads an old snapshot have the same state.
#[test]
fn logs_and_snapshots_of_the_formats_before_mean_what_they_meant() {
    let (log, snapshot) = (
        include_str!("../../golden/log-2.json"),
        include_str!("../../golden/snapshot-2.json"),
    );
    let machine = replayed(&entries(commands_of_format_2()), log);
    assert_eq!(Machine::decode(snapshot.as_bytes()).unwrap(), machine);
    let (log, snapshot) = (
        include_str!("../../golden/log-3.json"),
        include_str!("../../golden/snapshot-3.json"),
    );
    let machine = replayed(&entries(commands_of_format_3()), log);
    assert_eq!(Machine::decode(snapshot.as_bytes()).unwrap(), machine);
}

#[test]
fn newer_damaged_and_foreign_documents_are_refused_as_such() {
    let snapshot = Machine::default().encode();
    let newer = String::from_utf8(snapshot.clone())
        .unwrap()
        .replacen("\"format\":4", "\"format\":5", 1);
    assert_eq!(
        Machine::decode(newer.as_bytes()).err(),
        Some(Unreadable::Newer(5))
    );
    let entry = encode_entry(&entries(all_commands())[5]);
    assert!(
        matches!(Machine::decode(&entry), Err(Unreadable::Foreign { .. })),
        "an entry is no snapshot"
    );
    for at in 0..entry.len() {
        let mut changed = entry.clone();
        changed[at] ^= 1;
        // White space and the case of hexadecimal digits do not matter; anything else must be refused.
        if let Ok(read) = decode_entry(5, &changed) {
            assert_eq!(
                read,
                entries(all_commands())[5],
                "byte {at} changed the entry unnoticed"
            );
        }
    }
    assert!(decode_entry(6, &entry).is_err(), "an entry of another place");
}

#[test]
fn a_request_that_may_have_been_forgotten_is_not_applied() {
    let mut machine = Machine::default();
    machine.apply(&request(1, 0, add_node(1)), TERM);
    let drain = |on| Command::Drain { node: NodeId(1), on };
    assert_eq!(machine.apply(&request(2, 1, drain(true)), TERM), Receipt::Done);
    assert_eq!(machine.apply(&request(3, 2, drain(false)), TERM), Receipt::Done);
    assert_eq!(machine.apply(&request(2, 1, drain(true)), TERM), Receipt::Done);
    assert!(!machine.state.nodes[&NodeId(1)].drain, "applied a second time");
    let batch = Command::Batch(vec![drain(false); 1023]);
    for id in 0..=REMEMBERED as u128 / 1024 {
        let count = machine.count();
        machine.apply(&request(100 + id, count, batch.clone()), TERM);
    }
    let before = machine.clone();
    assert_eq!(machine.apply(&request(2, 1, drain(true)), TERM), Receipt::Expired);
    assert_eq!(
        machine.apply(&request(9, 1, drain(true)), TERM),
        Receipt::Expired,
        "nobody can tell that it is new"
    );
    assert_eq!(machine, before);
    let long = request(
        50,
        machine.count(),
        Command::DeleteVolume {
            name: "x".repeat(1 << 20),
        },
    );
    assert!(matches!(machine.apply(&long, TERM), Receipt::Refused(_)));
    assert!(machine.encode().len() < 1 << 20, "what a caller sent is not kept");
}

#[test]
fn a_request_for_one_term_is_applied_in_no_other() {
    let mut machine = Machine::default();
    machine.apply(&request(1, 0, add_node(1)), TERM);
    let mut late = request(
        2,
        1,
        Command::Drain {
            node: NodeId(1),
            on: true,
        },
    );
    late.term = Some(TERM);
    assert_eq!(machine.apply(&late, TERM + 1), Receipt::Expired);
    assert!(!machine.state.nodes[&NodeId(1)].drain);
    assert_eq!(machine.apply(&late, TERM), Receipt::Done);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    /// Logs with repetitions, on a machine that is snapshotted and restored at random, against the commands alone.
    #[test]
    fn repetitions_and_restarts_change_nothing(
        steps in prop::collection::vec((0usize..36, prop::option::of(any::<prop::sample::Index>()), prop::bool::weighted(0.2)), 1..60),
    ) {
        let commands = all_commands();
        let (mut state, mut machine, mut twin) = (State::default(), Machine::default(), Machine::default());
        let mut sent: Vec<(Request, Receipt)> = Vec::new();
        for (number, (command, again, restart)) in (1u128..).zip(&steps) {
            match again {
                Some(index) if !sent.is_empty() => {
                    let (request, receipt) = index.get(&sent);
                    prop_assert_eq!(&machine.apply(request, TERM), receipt);
                    prop_assert_eq!(&twin.apply(request, TERM), receipt);
                }
                _ => {
                    let request = request(number, machine.count(), commands[*command].clone());
                    let direct = state.apply(&request.command);
                    let receipt = machine.apply(&request, TERM);
                    prop_assert_eq!(&twin.apply(&request, TERM), &receipt);
                    prop_assert_eq!(receipt.open(&request.command, &machine.state), direct, "the answer in full");
                    sent.push((request, receipt));
                }
            }
            if *restart {
                machine = Machine::decode(&machine.encode()).unwrap();
            }
            prop_assert_eq!(&*machine.state, &state);
            prop_assert_eq!(&machine, &twin);
        }
    }
}
