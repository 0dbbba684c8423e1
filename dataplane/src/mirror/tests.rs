//! Single scenes that the simulators meet too rarely, played step by step.

mod scene;

use super::ops::FAR;
use super::*;
use crate::config::SlotState;
use crate::ids::{BLOCK, EXTENTS_PER_REGION, Generation};
use crate::memory::Arena;
use crate::replica::ExtentDigest;

use scene::Scene;

#[test]
fn a_write_that_the_survivor_flushed_meanwhile_is_answered_when_the_silent_disk_is_out() {
    let mut scene = Scene::new();
    scene.pass(0, 500);
    scene.silent.push(DiskIndex(1));
    let arena = Arena::new(1).unwrap();
    scene.submit(0, OpKind::Write, &arena);
    // The owner flushes by itself after a second, well before the disk counts as silent.
    scene.pass(500, 2_500);
    assert_eq!(
        scene.done,
        [],
        "nothing is acknowledged while a required replica is missing"
    );
    scene.pass(2_500, 5_000);
    assert_eq!(scene.config.chunks[0][1].state, SlotState::Stale);
    assert_eq!(
        scene.done,
        [(OpId(0), Ok(()), false)],
        "the other replica has it, flushed; the silent disk still has its memory"
    );
    assert!(!scene.mirror.is_quiet());
}

impl Scene {
    fn read(&mut self, op: u32, arena: &Arena) {
        self.submit(op, OpKind::Read, arena);
        self.play();
    }
}

#[test]
fn without_a_lease_a_read_is_answered_when_every_required_replica_confirmed() {
    let mut scene = Scene::new();
    let arena = Arena::new(1).unwrap();
    scene.mirror.set_leased(false, &mut scene.out);
    scene.read(0, &arena);
    assert_eq!(scene.done, [(OpId(0), Ok(()), true)], "both confirm at once");
    scene.silent.push(DiskIndex(1));
    // The other replica answers the read, but that is not enough.
    scene.read(1, &arena);
    scene.read(2, &arena);
    assert_eq!(scene.done.len(), 1);
    // A lease that is sure again is enough.
    scene.mirror.set_leased(true, &mut scene.out);
    scene.play();
    assert_eq!(scene.done.len(), 3);
    scene.mirror.set_leased(false, &mut scene.out);
    scene.read(3, &arena);
    assert_eq!(scene.done.len(), 3);
    // And so is the commit that the silent replica is required no more.
    scene.pass(100, 5_000);
    assert_eq!(scene.config.chunks[0][1].state, SlotState::Stale);
    assert_eq!(scene.done.len(), 4);
    assert!(scene.done.iter().all(|(_, result, _)| result.is_ok()));
}

#[test]
fn an_owner_that_was_replaced_returns_nothing_it_read() {
    for lease_comes_back in [false, true] {
        let mut scene = Scene::new();
        let arena = Arena::new(1).unwrap();
        scene.mirror.set_leased(false, &mut scene.out);
        // A later owner could reach only the second replica.
        scene.sealed_by_another.push(DiskIndex(1));
        scene.read(0, &arena);
        if lease_comes_back {
            scene.mirror.set_leased(true, &mut scene.out);
            scene.play();
        }
        assert_eq!(scene.mirror.phase(), Phase::Fenced);
        assert_eq!(scene.done, [(OpId(0), Err(OpError::Gone), true)]);
    }
}

#[test]
fn reads_stay_on_this_node_until_its_disk_has_a_queue() {
    let mut scene = Scene::new();
    let arena = Arena::new(1).unwrap();
    scene.mirror.disk_up(DiskUuid(1), false, &mut scene.out);
    scene.silent = vec![DiskIndex(0), DiskIndex(1)];
    for op in 0..2 * FAR + 2 {
        scene.submit(op, OpKind::Read, &arena);
    }
    let reads = |disk| {
        let to = |effect: &&Effect| matches!(effect, Effect::Send { disk: to, request: Request::Read { .. }, .. } if *to == disk);
        scene.out.iter().filter(to).count() as u32
    };
    assert_eq!(
        (reads(DiskIndex(0)), reads(DiskIndex(1))),
        (FAR / 2 + 1, FAR + FAR / 2 + 1)
    );
}

/// The process was stopped, or its machine: what disks answered meanwhile has not been looked at.
#[test]
fn an_owner_that_stood_still_waits_anew_for_its_disks() {
    let mut scene = Scene::new();
    scene.pass(0, 500);
    scene.silent.push(DiskIndex(1));
    let arena = Arena::new(1).unwrap();
    scene.submit(0, OpKind::Write, &arena);
    scene.play();
    scene.pass(40_000, 42_000);
    assert_eq!(
        scene.config.chunks[0][1].state,
        SlotState::InSync,
        "the disk has been waited for since it goes on"
    );
    scene.pass(42_000, 44_000);
    assert_eq!(
        scene.config.chunks[0][1].state,
        SlotState::Stale,
        "and it is silent indeed"
    );
}

/// A disk that is closed afterwards has nothing in doubt.
#[test]
fn a_detach_tells_the_disks_that_all_is_stable() {
    for writes in 0..2 {
        let mut scene = Scene::new();
        let arena = Arena::new(1).unwrap();
        for op in 0..writes {
            scene.submit(op, OpKind::Write, &arena);
        }
        scene.play();
        scene.mirror.detach(&mut scene.out);
        scene.play();
        assert_eq!(scene.mirror.phase(), Phase::Detached);
        let last = Version::new(Generation(1), u64::from(writes));
        assert_eq!(scene.heard[..2], [last; 2]);
    }
}

/// A write that is sent again, since a replica is back, may still be on another one with its first version alone. Were that
/// called stable, that replica would take the region for clean, and nobody would compare it after the owner's end.
#[test]
fn a_write_sent_again_is_not_stable_with_its_first_version() {
    let arena = Arena::new(1).unwrap();
    let mut scene = Scene::settled(&arena);
    scene.writes_lost.push(DiskIndex(1));
    scene.submit(0, OpKind::Write, &arena);
    scene.play();
    scene.undecided = true;
    scene.disk_goes(2);
    scene.writes_lost.push(DiskIndex(0));
    scene.disk_comes(2);
    scene.decide(false);
    scene.flush(1);
    scene.pass(2_100, 3_000);
    assert_eq!(scene.done, [(OpId(1), Ok(()), true)]);
    assert_eq!(scene.mirror.status().stable, Version::new(Generation(1), 1));
}

/// It may have carried out a write whose answer was lost with the connection.
#[test]
fn a_disk_that_is_back_with_its_boot_is_flushed() {
    let arena = Arena::new(1).unwrap();
    let mut scene = Scene::settled(&arena);
    scene.undecided = true;
    scene.disk_goes(2);
    scene.disk_comes(2);
    scene.decide(false);
    let before = scene.flushes[1];
    scene.flush(1);
    assert_eq!(scene.done, [(OpId(1), Ok(()), true)]);
    assert_eq!(scene.flushes[1], before + 1);
}

/// What it had answered and not flushed is gone, and no flush of it brings that back.
#[test]
fn a_flush_waits_until_a_disk_that_lost_power_is_dropped() {
    for times in [1, 2] {
        let arena = Arena::new(1).unwrap();
        let mut scene = Scene::settled(&arena);
        scene.submit(1, OpKind::Write, &arena);
        scene.play();
        assert_eq!(std::mem::take(&mut scene.done), [(OpId(1), Ok(()), true)]);
        scene.undecided = true;
        for op in 0..times {
            scene.disk_goes(2);
            scene.power_losses[1] += 1;
            scene.disk_comes(2);
            scene.flush(2 + op);
        }
        let stable = scene.mirror.status().stable;
        scene.pass(2_100, 4_000);
        assert_eq!(scene.done, []);
        assert_eq!(scene.mirror.status().stable, stable, "the disk lacks the write");
        scene.decide(true);
        scene.pass(4_100, 6_000);
        assert_eq!(scene.config.chunks[0][1].state, SlotState::Stale);
        assert!(scene.done.iter().all(|done| done.1 == Ok(())));
        assert_eq!(scene.done.len(), times as usize);
        assert!(scene.mirror.status().stable > stable);
    }
}

/// Both disks are away, and the one that comes back first has lost records: the other one has what it lacks.
#[test]
fn a_disk_that_lost_records_does_not_go_on_without_one_that_did_not() {
    for power in [true, false] {
        let arena = Arena::new(1).unwrap();
        let mut scene = Scene::settled(&arena);
        scene.undecided = true;
        scene.disk_goes(2);
        scene.disk_goes(1);
        scene.decide(false);
        scene.read(1, &arena);
        scene.openings[0] += 1;
        scene.suspect.push(DiskIndex(0));
        scene.disk_comes(1);
        scene.pass(2_100, 6_000);
        assert_eq!(scene.proposed, [], "neither is given up");
        assert_eq!(scene.done, []);
        scene.power_losses[1] += u128::from(!power);
        scene.disk_comes(2);
        scene.undecided = false;
        scene.pass(6_100, 7_000);
        let mut in_sync = scene.config.chunks[0]
            .iter()
            .map(|slot| slot.state == SlotState::InSync);
        assert_eq!(in_sync.next_back(), Some(true), "the sound one stays in sync");
        assert_eq!(scene.done, [(OpId(1), Ok(()), true)]);
    }
}

/// It has every acknowledged write but for a block: better than nothing.
#[test]
fn a_rotten_replica_goes_on_when_it_is_the_last() {
    let arena = Arena::new(1).unwrap();
    let mut scene = Scene::settled(&arena);
    scene.undecided = true;
    scene.mirror.lose_slots(0, 1, super::chunks::Lost::Rotten);
    scene.disk_goes(2);
    scene.config.chunks[0][1].state = SlotState::Stale;
    scene.config.config += 1;
    scene.mirror.reconfigured(scene.config.clone(), &mut scene.out);
    scene.play();
    scene.decide(false);
    scene.read(1, &arena);
    assert_eq!(scene.done, [(OpId(1), Ok(()), true)]);
}

/// A replica that is rebuilt has a write that the others lack, because they were away: it is copied before they count as equal.
#[test]
fn a_write_that_ends_while_its_chunk_is_looked_at_anew_leaves_its_region_to_be_compared() {
    let arena = Arena::new(1).unwrap();
    let mut scene = Scene::settled(&arena);
    scene.undecided = true;
    scene.writes_lost.push(DiskIndex(0));
    scene.submit(1, OpKind::Write, &arena);
    scene.play();
    scene.disk_goes(1);
    scene.disk_goes(2);
    scene.decide(false);
    scene.undecided = true;
    scene.openings[0] += 1;
    scene.disk_comes(1);
    scene.pass(2_100, 14_000);
    assert_eq!(scene.done, [(OpId(1), Err(OpError::TimedOut), true)]);
    assert_ne!(scene.mirror.unsettled, 0);
}

/// What a write that was given up may still do, it does before its region is compared: afterwards nobody would look again.
#[test]
fn a_region_is_not_compared_while_a_write_that_was_given_up_is_on_its_way() {
    let arena = Arena::new(1).unwrap();
    let mut scene = Scene::settled(&arena);
    scene.writes_lost.push(DiskIndex(0));
    scene.submit(1, OpKind::Write, &arena);
    let given_up = (OpId(1), Err(OpError::TimedOut), false);
    for (op, now) in (2..).zip((2_100..14_000).step_by(1_000)) {
        if !scene.done.contains(&given_up) {
            scene.digests = 0;
        }
        scene.pass(now, now + 900);
        // The disk answers other things.
        let (far, out) = (4 << 20, &mut scene.out);
        let zero = OpKind::Zero { unmap: false };
        scene
            .mirror
            .submit(OpId(op), zero, far, BLOCK as u64, Payload::NONE, &[], out);
        scene.play();
    }
    assert!(scene.done.contains(&given_up));
    assert_eq!((scene.digests, scene.mirror.unsettled), (0, 1));
    let stuck = scene.stuck[0];
    scene.mirror.replied(stuck, Reply::Done, &mut scene.out);
    scene.play();
    scene.pass(14_100, 18_000);
    assert_ne!(scene.digests, 0);
}

/// A bad block is no error while a replica that may have it is lost for the moment.
#[test]
fn a_bad_block_is_read_from_a_replica_that_comes_back() {
    for comes_back in [true, false] {
        let arena = Arena::new(1).unwrap();
        let mut scene = Scene::settled(&arena);
        scene.rotten.push(DiskIndex(0));
        scene.undecided = true;
        scene.disk_goes(2);
        scene.read(0, &arena);
        assert_eq!(scene.done, []);
        if comes_back {
            scene.disk_comes(2);
        }
        scene.decide(!comes_back);
        let result = if comes_back { Ok(()) } else { Err(OpError::Io) };
        assert_eq!(scene.done, [(OpId(0), result, true)]);
    }
}

/// The write waits for the flush of its only replica, which is replaced and dies: it is written to the one that took over.
#[test]
fn a_write_does_not_wait_for_the_flush_of_a_replica_that_was_replaced() {
    let arena = Arena::new(1).unwrap();
    let mut scene = Scene::settled(&arena);
    scene.disk_goes(2);
    assert_eq!(scene.config.chunks[0][1].state, SlotState::Stale);
    scene.flushes_lost.push(DiskIndex(0));
    scene.submit(0, OpKind::Write, &arena);
    scene.play();
    assert_eq!(scene.done, [], "one copy is left: it is flushed first");
    let first = &mut scene.config.chunks[0][0];
    (first.disk, first.incarnation) = (DiskUuid(3), 2);
    scene.config.config += 1;
    scene.mirror.reconfigured(scene.config.clone(), &mut scene.out);
    scene.play();
    scene.disk_comes(3);
    scene.disk_goes(1);
    assert_eq!(scene.done, [(OpId(0), Ok(()), true)]);
}

/// What waits for a region while the volume is let go is not forgotten because the region could not be compared at once.
#[test]
fn a_detach_waits_for_regions_that_are_to_be_compared() {
    let arena = Arena::new(1).unwrap();
    let mut scene = Scene::settled(&arena);
    scene.undecided = true;
    scene.writes_lost.push(DiskIndex(1));
    scene.submit(0, OpKind::Write, &arena);
    scene.pass(2_100, 14_000);
    assert_eq!(scene.done, [(OpId(0), Err(OpError::TimedOut), false)]);
    scene.read(1, &arena);
    scene.mirror.detach(&mut scene.out);
    scene.play();
    assert_eq!(scene.done.len(), 1, "the replicas may differ");
    scene.decide(true);
    assert_eq!(scene.done[1..], [(OpId(1), Ok(()), true)]);
}

fn few_versions() -> Limits {
    Limits {
        versions: 8,
        ..Limits::default()
    }
}

/// Review rule 6. Writes are always under way, and none fails.
#[test]
fn a_new_generation_is_taken_under_a_running_guest() {
    let mut scene = Scene::with(few_versions());
    let arena = Arena::new(1).unwrap();
    scene.guest = Some(Arena::new(1).unwrap());
    for _ in 0..20 {
        for op in 0..8 {
            scene.submit(op, OpKind::Write, &arena);
        }
        scene.play();
        scene.read(9, &arena);
    }
    assert!(scene.done.len() > 20 * 9);
    assert!(scene.done.iter().all(|(_, result, _)| result.is_ok()));
    assert!(
        scene.mirror.status().renewals >= 10,
        "{:?}",
        scene.mirror.status()
    );
    assert_eq!(scene.obeys[..2], [scene.config.generation; 2]);
    // The guest ends as under any other generation.
    scene.mirror.detach(&mut scene.out);
    scene.play();
    assert_eq!(scene.mirror.phase(), Phase::Detached);
}

/// What waits for a new generation goes to each disk in the order in which it was asked.
#[test]
fn what_waited_for_a_new_generation_is_sent_in_order() {
    let mut scene = Scene::with(few_versions());
    let arena = Arena::new(1).unwrap();
    for op in 0..24u32 {
        let at = u64::from(op % 16) * BLOCK as u64;
        let data = arena.payload(0);
        scene.mirror.submit(
            OpId(op),
            OpKind::Write,
            at,
            BLOCK as u64,
            data,
            &[0],
            &mut scene.out,
        );
    }
    scene.play();
    assert_eq!(scene.done.len(), 24);
    assert!(scene.done.iter().all(|(_, result, _)| result.is_ok()));
    assert!(scene.mirror.status().renewals > 0);
}

/// A disk falls silent while requests of the old generation are out: it is dropped in the name of the new one, and not waited
/// for a moment longer.
#[test]
fn a_silent_disk_does_not_keep_a_new_generation_away() {
    let mut scene = Scene::with(few_versions());
    let arena = Arena::new(1).unwrap();
    scene.pass(0, 500);
    scene.silent.push(DiskIndex(1));
    for op in 0..12 {
        // Different blocks, so that all are out at once.
        let at = u64::from(op) * BLOCK as u64;
        scene.mirror.submit(
            OpId(op),
            OpKind::Write,
            at,
            BLOCK as u64,
            arena.payload(0),
            &[0],
            &mut scene.out,
        );
    }
    scene.pass(500, 5_000);
    assert_eq!(scene.config.chunks[0][1].state, SlotState::Stale);
    assert_eq!(scene.done.len(), 12);
    assert!(scene.done.iter().all(|(_, result, _)| result.is_ok()));
    assert_eq!(scene.obeys[0], scene.config.generation);
    assert!(scene.config.generation > Generation(1));
}

/// Without a majority there is no new generation: at the end of the versions I/O waits, longer than it waits for anything
/// else, and goes on.
#[test]
fn at_the_end_of_a_generation_io_waits_and_does_not_fail() {
    let mut scene = Scene::with(few_versions());
    scene.no_majority = true;
    let arena = Arena::new(1).unwrap();
    for op in 0..40 {
        scene.submit(op, OpKind::Write, &arena);
        scene.play();
    }
    let answered = scene.done.len();
    assert!(
        (8..=16).contains(&answered),
        "{answered} writes before the versions were used up"
    );
    scene.pass(0, 30_000);
    assert_eq!(scene.done.len(), answered, "nothing goes on, nothing fails");
    scene.no_majority = false;
    scene.pass(30_000, 33_000);
    assert_eq!(scene.done.len(), 40);
    assert!(scene.done.iter().all(|(_, result, _)| result.is_ok()));
}

impl Scene {
    /// The first block of the volume is there, once everything was promoted; the second disk's copy of it may have rotted.
    fn digests(&self, d: usize, request: &Request) -> [ExtentDigest; EXTENTS_PER_REGION] {
        let mut extents = [ExtentDigest::default(); EXTENTS_PER_REGION];
        if matches!(request, Request::Digest { region: 0, .. }) && self.newest[d] != Version::ZERO {
            extents[0].image.version = self.newest[d];
            extents[0].image.valid = 1;
            let verify = matches!(request, Request::Digest { verify: true, .. });
            extents[0].bad = u16::from(d == 1 && self.rotted && verify);
        }
        extents
    }
}

/// Nobody reads it: the scrub finds it, within its period, and not before the quiet volume's turn.
#[test]
fn rot_at_rest_is_found_and_repaired_by_the_scrub_alone() {
    for scrub_ms in [0, 128_000] {
        let limits = Limits {
            scrub_ms,
            ..Limits::default()
        };
        let mut scene = Scene::with(limits);
        let arena = Arena::new(1).unwrap();
        scene.submit(0, OpKind::Write, &arena);
        scene.play();
        scene.rotted = true;
        scene.pass(0, 64_500);
        let status = scene.mirror.status();
        if scrub_ms == 0 {
            assert!(scene.rotted && status.regions_verified == 0, "{status:?}");
            continue;
        }
        assert!(!scene.rotted, "{status:?}");
        assert_eq!((status.blocks_repaired, status.read_repairs), (1, 0));
        // One region a second: a quiet volume takes half of the time that it has.
        assert!((62..=66).contains(&status.regions_verified), "{status:?}");
        assert_eq!(scene.done, [(OpId(0), Ok(()), true)]);
    }
}
