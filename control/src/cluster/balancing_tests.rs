//! When something moves, and when nothing does.

use unibody_dataplane::config::{Change, Proposal};
use unibody_dataplane::ids::{BootId, DiskUuid, Generation, PowerId};

use super::*;
use crate::planner;

/// Nodes of one disk each, and a volume of two copies that was placed before the last of them came.
fn cluster() -> State {
    let mut state = State::default();
    let run = |state: &mut State, command| state.apply(&command).unwrap();
    for n in 1..=4 {
        if n == 4 {
            let create = Command::CreateVolume {
                name: "v".into(),
                size: 60 << 26,
                mirror: 2,
                stripe_unit: 256 << 10,
                stripe_width: 3,
                read_only: false,
                instance: 1,
                chunks: planner::plan_chunks(&state, 60, 2).unwrap(),
            };
            run(&mut state, create);
            let (name, node, generation) = ("v".into(), NodeId(1), 0);
            run(
                &mut state,
                Command::Attach {
                    name,
                    node,
                    generation,
                },
            );
        }
        let add = Command::AddNode {
            node: NodeId(n),
            store: u128::from(n),
            name: format!("n{n}"),
            addresses: vec!["[::1]:1".into()],
            domain: format!("d{n}"),
            memory: 0,
            incarnation: 1,
        };
        run(&mut state, add);
        let add = Command::AddDisk {
            disk: DiskUuid(u128::from(n)),
            node: NodeId(n),
            domain: String::new(),
            bytes: 64 << 30,
        };
        run(&mut state, add);
    }
    state
}

fn disk(n: u128) -> Disk {
    Disk(DiskUuid(n))
}

/// All disks are in service and empty, but as said here.
fn told(said: &[(u128, &str, u64)]) -> Told {
    let mut told = Told::default();
    tell(&mut told, said);
    told
}

fn tell(told: &mut Told, said: &[(u128, &str, u64)]) {
    let of = |n: u128| {
        let found = said.iter().find(|(disk, ..)| *disk == n);
        let (state, free) = found.map_or(("online", 100), |(_, state, free)| (*state, *free));
        DiskStatus {
            uuid: disk(n).to_string(),
            state: state.into(),
            capacity: 100,
            free,
            ..DiskStatus::default()
        }
    };
    told.take(&cluster(), &[1, 2, 3, 4].map(of));
}

fn alive(_: NodeId) -> Life {
    Life::Alive
}

fn run(state: &mut State, commands: &[Command]) {
    for command in commands {
        state.apply(command).unwrap();
    }
    state.check().unwrap();
}

fn propose(state: &mut State, change: Change) {
    let volume = &state.volumes["v"];
    let (generation, config) = (Generation(volume.generation), volume.config);
    let proposal = Proposal {
        generation,
        config,
        change,
    };
    run(
        state,
        &[Command::Propose {
            name: "v".into(),
            proposal,
        }],
    );
}

fn heal(state: &mut State) {
    for n in 1..=4 {
        let numbered = (0u32..).zip(&state.volumes["v"].chunks);
        let stale = |slots: &[Replica]| {
            slots
                .iter()
                .any(|slot| slot.disk == disk(n) && slot.state != ReplicaState::InSync)
        };
        let chunks: Vec<u32> = numbered
            .filter(|(_, slots)| stale(slots))
            .map(|(n, _)| n)
            .collect();
        let (disk, boot, power) = (DiskUuid(n), BootId(0), PowerId(0));
        propose(
            state,
            Change::StartRebuild {
                disk,
                chunks: chunks.clone(),
            },
        );
        propose(
            state,
            Change::MarkInSync {
                disk,
                chunks,
                boot,
                power,
            },
        );
    }
}

fn on(state: &State, n: u128) -> usize {
    let slots = state.volumes["v"].chunks.iter().flatten();
    slots.filter(|slot| slot.disk == disk(n)).count()
}

#[test]
fn a_new_disk_gets_its_share_in_moves_of_a_few() {
    let mut state = cluster();
    let told = told(&[]);
    let mut moved = 0;
    for _ in 0..100 {
        let commands = duties(&state, &alive, Some(&told));
        if commands.is_empty() {
            break;
        }
        let added = commands
            .iter()
            .filter(|command| matches!(command, Command::AddReplicas { .. }));
        moved += added.count();
        run(&mut state, &commands);
        assert!(balance::moving(&state) <= MOVES_MAX);
        assert_eq!(
            duties(&state, &alive, Some(&told)),
            [],
            "what moves is waited for"
        );
        heal(&mut state);
    }
    assert!((28..=30).contains(&on(&state, 4)), "{}", on(&state, 4));
    assert!(moved <= on(&state, 4) + 2, "{moved} have moved");
    assert!((1..=4).all(|n| (28..=32).contains(&on(&state, n))));
    assert!(state.volumes["v"].chunks.iter().all(|slots| slots.len() == 2));
}

#[test]
fn nothing_begins_to_move_while_anything_is_wrong() {
    let state = cluster();
    let fine = told(&[]);
    let begins = |state: &State, life: &dyn Fn(NodeId) -> Life, told: Option<&Told>| {
        !duties(state, &life, told).is_empty()
    };
    assert!(begins(&state, &alive, Some(&fine)));
    assert!(!begins(&state, &alive, None), "nobody says how the disks are");
    assert!(!begins(&state, &alive, Some(&told(&[(2, "failed", 100)]))));
    for bad in [Life::Silent, Life::Gone, Life::Lost] {
        let life = move |node| if node == NodeId(3) { bad } else { Life::Alive };
        assert!(!begins(&state, &life, Some(&fine)));
    }
    let with = |command: Command| {
        let mut state = state.clone();
        run(&mut state, &[command]);
        state
    };
    let drain = Command::Drain {
        node: NodeId(2),
        on: true,
    };
    assert!(!begins(&with(drain), &alive, Some(&fine)));
    assert!(!begins(
        &with(Command::DiskLeave { disk: DiskUuid(2) }),
        &alive,
        Some(&fine)
    ));
    let mut degraded = state.clone();
    let chunks = (0..60).collect();
    propose(
        &mut degraded,
        Change::MarkStale {
            disk: DiskUuid(2),
            chunks,
            no_space: false,
        },
    );
    assert!(!begins(&degraded, &alive, Some(&fine)));
}

#[test]
fn what_has_begun_ends_when_the_successor_can_be_read() {
    let mut state = cluster();
    let fine = told(&[]);
    let begun = duties(&state, &alive, Some(&fine));
    assert_eq!(begun.len(), MOVES_MAX);
    run(&mut state, &begun);
    heal(&mut state);
    let away = |node| {
        if node == NodeId(4) {
            Life::Silent
        } else {
            Life::Alive
        }
    };
    assert_eq!(duties(&state, &away, Some(&fine)), []);
    assert_eq!(duties(&state, &alive, Some(&told(&[(4, "failed", 100)]))), []);
    let removed = duties(&state, &alive, None);
    assert_eq!(removed.len(), MOVES_MAX);
    run(&mut state, &removed);
    assert_eq!(balance::moving(&state), 0);
}

#[test]
fn a_disk_that_is_all_but_full_is_relieved_and_gets_nothing_back() {
    let mut state = cluster();
    let mut told = told(&[(1, "online", 4), (4, "online", 15)]);
    let before = on(&state, 1);
    for round in 0..6 {
        // As it gets emptier.
        tell(&mut told, &[(1, "online", 4 + round), (4, "online", 15)]);
        let commands = duties(&state, &alive, Some(&told));
        run(&mut state, &commands);
        heal(&mut state);
    }
    assert!(on(&state, 1) < before && on(&state, 1) > 0, "{}", on(&state, 1));
    for free in [11, 15, 17] {
        tell(&mut told, &[(1, "online", free), (4, "online", 15)]);
        let commands = duties(&state, &alive, Some(&told));
        let to_it = |command: &Command| matches!(command, Command::AddReplicas { to, .. } if to.iter().any(|(_, to)| *to == DiskUuid(1)));
        assert!(!commands.iter().any(to_it), "{commands:?}");
        run(&mut state, &commands);
        heal(&mut state);
    }
}
