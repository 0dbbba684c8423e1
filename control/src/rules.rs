//! Random commands on the control state, and what must hold after each.

use std::collections::BTreeSet;

use proptest::prelude::*;
use unibody_dataplane::config::{Change, Outcome, Proposal};
use unibody_dataplane::ids::{BootId, DiskUuid, Generation, PowerId};

use crate::planner;
use crate::state::{Applied, Command, Disk, ReplicaState, State};

/// A step of a random history; numbers are taken modulo what there is.
#[derive(Clone, Debug)]
enum Step {
    AddDisk(u8, u8),
    DiskOut(u8),
    Create(u8, u8),
    Grow(u8),
    Delete(u8),
    Attach(u8),
    Propose {
        volume: u8,
        disk: u8,
        kind: u8,
        chunks: Vec<u32>,
        old_config: bool,
        old_generation: bool,
    },
    Move(u8, u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => (0u8..8, prop_oneof![3 => Just(0u8), 1 => 0u8..5]).prop_map(|(n, moved)| Step::AddDisk(n, moved)),
        1 => (0u8..8).prop_map(Step::DiskOut),
        2 => (0u8..4, 1u8..=3).prop_map(|(v, m)| Step::Create(v, m)),
        1 => (0u8..4).prop_map(Step::Grow),
        1 => (0u8..4).prop_map(Step::Delete),
        3 => (0u8..4).prop_map(Step::Attach),
        12 => (0u8..4, 0u8..8, 0u8..3, prop::collection::vec(0u32..6, 0..5), prop::bool::weighted(0.1), prop::bool::weighted(0.1))
            .prop_map(|(volume, disk, kind, chunks, old_config, old_generation)| Step::Propose {
                volume, disk, kind, chunks, old_config, old_generation,
            }),
        3 => (0u8..4, 0u8..8).prop_map(|(v, d)| Step::Move(v, d)),
    ]
}

fn disk(n: u8) -> DiskUuid {
    DiskUuid(u128::from(n) + 1)
}

fn command(state: &State, step: &Step) -> Option<Command> {
    let name = |v: &u8| format!("v{v}");
    Some(match step {
        Step::AddDisk(n, moved) => Command::AddDisk {
            disk: disk(*n),
            domain: format!("d{}", (n + moved) % 5),
            bytes: 1 << 30,
        },
        Step::DiskOut(n) => Command::DiskOut { disk: disk(*n) },
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
        Step::Attach(v) => Command::Attach { name: name(v) },
        Step::Propose {
            volume,
            disk: d,
            kind,
            chunks,
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
                    boot: BootId(9),
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
        Step::Move(v, d) => Command::Move {
            name: name(v),
            from: disk(*d),
            to: planner::plan_moves(state, &name(v), disk(*d), false),
        },
    })
}

/// Rules about one change, beside those that [`State::check`] knows of every state.
fn check_change(before: &State, after: &State, command: &Command, result: &Applied) {
    for (name, volume) in &after.volumes {
        let Some(old) = before.volumes.get(name).filter(|old| old.id == volume.id) else {
            continue;
        };
        assert!(volume.config >= old.config && volume.generation >= old.generation);
        if volume != old {
            assert!(
                volume.config > old.config,
                "a change that the configuration number does not show"
            );
        }
        for (now, then) in volume.chunks.iter().zip(&old.chunks) {
            let domains: BTreeSet<_> = now.iter().map(|slot| &after.disks[&slot.disk].domain).collect();
            assert_eq!(
                domains.len(),
                now.len(),
                "{command:?}: two replicas in one domain"
            );
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
        let current = proposal.generation.0 == old.generation && proposal.config == old.config;
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
    fn no_history_breaks_a_rule(steps in prop::collection::vec(step(), 1..120)) {
        let mut state = State::default();
        for n in 0..4 {
            let add = Command::AddDisk { disk: disk(n), domain: format!("d{n}"), bytes: 1 << 30 };
            state.apply(&add).unwrap();
        }
        for step in &steps {
            let Some(command) = command(&state, step) else { continue };
            let before = state.clone();
            let mut twin = state.clone();
            let result = state.apply(&command);
            prop_assert_eq!(&result, &twin.apply(&command));
            prop_assert_eq!(&state, &twin, "equal commands gave different states");
            prop_assert_eq!(state.check(), Ok(()));
            match &result {
                Ok(applied) => check_change(&before, &state, &command, applied),
                Err(_) => prop_assert_eq!(&state, &before, "a refused command changed something"),
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
                domain: format!("d{n}"),
                bytes: 1 << 30,
            })
            .unwrap();
    }
    let create = Step::Create(0, 2);
    let create = command(&state, &create).unwrap();
    state.apply(&create).unwrap();
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
