//! Random clusters that get another disk or lose volumes.

use std::collections::BTreeMap;

use proptest::prelude::*;
use unibody_dataplane::config::{Change, Proposal};
use unibody_dataplane::ids::{BootId, DiskUuid, Generation, PowerId};

use super::*;
use crate::planner;
use crate::state::{Command, NodeId};

/// A node that is a failure domain, with disks of so many GiB.
pub(in crate::planner) fn add_node(state: &mut State, number: u64, sizes: &[u64]) {
    let add = Command::AddNode {
        node: NodeId(number),
        store: u128::from(number),
        name: format!("n{number}"),
        addresses: vec!["[::1]:1".into()],
        domain: format!("n{number}"),
        memory: 0,
        incarnation: 0,
    };
    state.apply(&add).unwrap();
    for gigabytes in sizes {
        add_disk(state, number, *gigabytes);
    }
}

fn add_disk(state: &mut State, node: u64, gigabytes: u64) -> Disk {
    let disk = DiskUuid(state.disks.len() as u128 + 1);
    let add = Command::AddDisk {
        disk,
        node: NodeId(node),
        domain: String::new(),
        bytes: gigabytes << 30,
    };
    state.apply(&add).unwrap();
    Disk(disk)
}

fn add_volume(state: &mut State, name: &str, count: u32, mirror: u32, owner: u64) {
    add_volume_of(state, name, count, mirror, owner, 1);
}

fn add_volume_of(state: &mut State, name: &str, count: u32, mirror: u32, owner: u64, stripe_width: u32) {
    let node = NodeId(owner);
    let chunks = planner::plan_chunks_near(state, count, mirror, Some(node), &BTreeSet::new()).unwrap();
    let create = Command::CreateVolume {
        name: name.into(),
        size: u64::from(count) << 26,
        mirror,
        stripe_unit: 256 << 10,
        stripe_width,
        read_only: false,
        instance: 1,
        chunks,
    };
    state.apply(&create).unwrap();
    let (name, generation) = (name.into(), 0);
    state
        .apply(&Command::Attach {
            name,
            node,
            generation,
        })
        .unwrap();
}

fn begin(state: &mut State, shift: &Shift) {
    let volume = &state.volumes[&shift.volume];
    let add = Command::AddReplicas {
        name: shift.volume.clone(),
        generation: volume.generation,
        config: volume.config,
        from: shift.from.0,
        to: vec![(shift.chunk, shift.to.0)],
    };
    state.apply(&add).unwrap();
}

/// What an owner does about a replica that is stale.
fn heal(state: &mut State, shift: &Shift) {
    let (disk, chunks) = (shift.to.0, vec![shift.chunk]);
    let (boot, power) = (BootId(0), PowerId(0));
    let start = Change::StartRebuild {
        disk,
        chunks: chunks.clone(),
    };
    let end = Change::MarkInSync {
        disk,
        chunks,
        boot,
        power,
    };
    for change in [start, end] {
        let volume = &state.volumes[&shift.volume];
        let (generation, config) = (Generation(volume.generation), volume.config);
        let proposal = Proposal {
            generation,
            config,
            change,
        };
        let name = shift.volume.clone();
        state.apply(&Command::Propose { name, proposal }).unwrap();
    }
}

fn remove(state: &mut State, (name, chunk, disk): (String, u32, Disk)) {
    let volume = &state.volumes[&name];
    let remove = Command::RemoveReplicas {
        generation: volume.generation,
        config: volume.config,
        name,
        disk: disk.0,
        chunks: vec![chunk],
    };
    state.apply(&remove).unwrap();
}

fn in_sync(slot: &Replica) -> bool {
    slot.state == ReplicaState::InSync
}

/// Moves until nothing is to move; `together` at a time. Every state between is looked at. Answers how many moved.
fn settle(state: &mut State, fills: &Fills, together: usize) -> usize {
    let mut moved = 0;
    loop {
        let shifts = plan(state, fills, together);
        assert_eq!(shifts, plan(state, fills, together), "equal states, other plans");
        if shifts.is_empty() {
            assert_eq!(moving(state), 0);
            return moved;
        }
        for shift in &shifts {
            begin(state, shift);
        }
        assert_eq!(moving(state), shifts.len());
        assert_eq!(finished(state, fills, in_sync), [], "no successor is complete");
        state.check().unwrap();
        for shift in &shifts {
            heal(state, shift);
        }
        let done = finished(state, fills, in_sync);
        assert_eq!(done.len(), shifts.len());
        for done in done {
            remove(state, done);
            state.check().unwrap();
        }
        for volume in state.volumes.values() {
            for slots in &volume.chunks {
                assert_eq!(state.domains(slots.iter()).len(), volume.mirror as usize);
                assert!(slots.len() == volume.mirror as usize && slots.iter().all(in_sync));
            }
        }
        moved += shifts.len();
        assert!(moved < 10_000, "there is no end of it");
    }
}

fn counts(state: &State) -> BTreeMap<Disk, u64> {
    let mut counts: BTreeMap<Disk, u64> = state.disks.keys().map(|disk| (*disk, 0)).collect();
    for slot in state
        .volumes
        .values()
        .flat_map(|volume| volume.chunks.iter().flatten())
    {
        *counts.entry(slot.disk).or_default() += 1;
    }
    counts
}

/// Uses of the emptiest and the fullest disk and on average, replicas per GiB.
fn uses(state: &State) -> (f64, f64, f64) {
    let counts = counts(state);
    let size = |disk: &Disk| (state.disks[disk].bytes >> 30) as f64;
    let uses = counts.iter().map(|(disk, count)| *count as f64 / size(disk));
    let (min, max) = uses.fold((f64::MAX, 0f64), |(min, max), used| {
        (min.min(used), max.max(used))
    });
    let total: f64 = state.disks.keys().map(size).sum();
    (min, max, counts.values().sum::<u64>() as f64 / total)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_new_disk_gets_its_share_and_no_more_moves(
        nodes in 4u64..7, size in 1u64..4, of_new in 1u64..4, where_to in 0u64..8, copies in 1u32..=3,
        volumes in prop::collection::vec(20u32..60, 2..5), together in 1usize..9,
    ) {
        let mut state = State::default();
        for number in 1..=nodes {
            add_node(&mut state, number, &[size, size]);
        }
        for (number, count) in (0u64..).zip(&volumes) {
            add_volume(&mut state, &format!("v{number}"), *count, copies, number % nodes + 1);
        }
        let none = Fills::default();
        // What is near its owner may have made disks uneven by whole chunks.
        settle(&mut state, &none, together);
        prop_assert_eq!(left(&state), 0);
        // On a node of its own, or beside others.
        let new = match where_to {
            0 => { add_node(&mut state, 100, &[of_new]); Disk(DiskUuid(state.disks.len() as u128)) }
            node => add_disk(&mut state, node % nodes + 1, of_new),
        };
        let (_, _, mean) = uses(&state);
        let share = (mean * of_new as f64).ceil();
        let moved = settle(&mut state, &none, together);
        // A node whose part is larger than that of one copy can not be filled like the others.
        let of_node = of_new + if where_to == 0 { 0 } else { 2 * size };
        let total = nodes * 2 * size + of_new;
        if (of_node * u64::from(copies)) as f64 <= total as f64 * 0.9 {
            // As even as whole chunks can be, where that is more than a twentieth.
            let (min, max, _) = uses(&state);
            let step = 2.0 / size.min(of_new) as f64;
            prop_assert!(max - min <= (mean / 20.0).max(step) + 1e-9, "from {} to {}, {} on average", min, max, mean);
            prop_assert!(counts(&state)[&new] as f64 >= share * 0.9 - 2.0);
        }
        prop_assert!(moved as f64 <= share * 1.1 + 2.0, "{} moved, {} is its share", moved, share);
        prop_assert_eq!(left(&state), 0);
    }

    #[test]
    fn any_cluster_comes_to_rest(
        nodes in prop::collection::vec(prop::collection::vec(1u64..5, 1..4), 3..6), copies in 1u32..=3,
        volumes in prop::collection::vec((10u32..60, any::<bool>()), 1..6),
        new in prop::collection::vec((1u64..4, 1u64..5), 0..3), crowded in prop::option::of(0usize..4), together in 1usize..9,
    ) {
        let mut state = State::default();
        for (number, sizes) in (1u64..).zip(&nodes) {
            add_node(&mut state, number, sizes);
        }
        for (number, (count, _)) in (0u64..).zip(&volumes) {
            add_volume(&mut state, &format!("v{number}"), *count, copies, number % 3 + 1);
        }
        for (number, (_, stays)) in volumes.iter().enumerate() {
            if !stays {
                state.apply(&Command::DeleteVolume { name: format!("v{number}") }).unwrap();
            }
        }
        for (node, size) in new {
            add_disk(&mut state, node.min(nodes.len() as u64), size);
        }
        let mut fills = Fills::default();
        if let Some(&disk) = crowded.and_then(|number| state.disks.keys().nth(number)) {
            fills.say(disk, 100, 1);
        }
        settle(&mut state, &fills, together);
    }
}

#[test]
fn a_crowded_disk_is_emptied_into_those_that_have_room() {
    let mut state = State::default();
    for number in 1..=4 {
        add_node(&mut state, number, &[4]);
    }
    add_volume(&mut state, "v", 40, 2, 1);
    let disk = |number| Disk(DiskUuid(number));
    let mut fills = Fills::default();
    fills.say(disk(1), 100, 4);
    fills.say(disk(2), 100, 10);
    let before = counts(&state);
    let shifts = plan(&state, &fills, 6);
    assert_eq!(shifts.len(), 6);
    assert!(
        shifts
            .iter()
            .all(|shift| shift.from == disk(1) && shift.to != disk(2)),
        "{shifts:?}"
    );
    settle(&mut state, &fills, 6);
    let after = counts(&state);
    assert_eq!(
        after[&disk(2)],
        before[&disk(2)],
        "it is too full to get more, and not crowded"
    );
    // What is left has its other copy on both of the disks with room, or cannot go there.
    assert!(after[&disk(1)] < before[&disk(1)]);
    let full: BTreeSet<_> = [1, 2, 3, 4].map(disk).into();
    fills.full = full;
    fills.crowded = [disk(3)].into();
    assert_eq!(plan(&state, &fills, 8), [], "nobody has room");
}

#[test]
fn a_disk_at_a_limit_does_not_flap() {
    let disk = Disk(DiskUuid(1));
    let mut fills = Fills::default();
    let mut marks = |free| {
        fills.say(disk, 100, free);
        (fills.full.contains(&disk), fills.crowded.contains(&disk))
    };
    assert_eq!(marks(15), (false, false));
    assert_eq!(marks(14), (true, false));
    assert_eq!(marks(17), (true, false));
    assert_eq!(marks(4), (true, true));
    assert_eq!(marks(9), (true, true));
    assert_eq!(marks(10), (true, false));
    assert_eq!(marks(18), (false, false));
}

#[test]
fn what_is_near_its_owner_stays_and_stripes_stay_apart() {
    let mut state = State::default();
    for number in 1..=3 {
        add_node(&mut state, number, &[4]);
    }
    for owner in 1..=3 {
        add_volume_of(&mut state, &format!("v{owner}"), 40, 2, owner, 4);
    }
    add_node(&mut state, 4, &[4]);
    let shifts = plan(&state, &Fills::default(), 8);
    assert_eq!(shifts.len(), 8);
    let mut stripes = BTreeSet::new();
    for shift in &shifts {
        let owner = state.volumes[&shift.volume].owner.unwrap();
        assert_ne!(state.disks[&shift.from].node, owner, "{shift:?} leaves its owner");
        assert!(
            stripes.insert((&shift.volume, shift.chunk / 4)),
            "two of a stripe go to one disk: {shifts:?}"
        );
    }
}

#[test]
fn a_move_whose_source_fails_meanwhile_ends_all_the_same() {
    let mut state = State::default();
    for number in 1..=4 {
        add_node(&mut state, number, &[4]);
    }
    add_volume(&mut state, "v", 60, 2, 1);
    add_disk(&mut state, 4, 4);
    let none = Fills::default();
    let shift = plan(&state, &none, 1).remove(0);
    begin(&mut state, &shift);
    let volume = &state.volumes["v"];
    let proposal = Proposal {
        generation: Generation(volume.generation),
        config: volume.config,
        change: Change::MarkStale {
            disk: shift.from.0,
            chunks: vec![shift.chunk],
            no_space: false,
        },
    };
    let name = "v".into();
    state.apply(&Command::Propose { name, proposal }).unwrap();
    assert_eq!(finished(&state, &none, in_sync), []);
    heal(&mut state, &shift);
    assert_eq!(
        finished(&state, &none, in_sync),
        [("v".into(), shift.chunk, shift.from)]
    );
    assert_eq!(
        finished(&state, &none, |slot| in_sync(slot) && slot.disk != shift.to),
        [],
        "it can not be reached"
    );
}
