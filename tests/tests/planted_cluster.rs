//! Each planted bug must be found by the simulator of a cluster within its number of seeds.
//!
//! Needs the feature `planted`. The choice is per thread, so seeds run side by side. `UNIBODY_BUG_SEEDS=300` looks
//! further, at all bugs, and prints how many seeds each needs. That the same seeds find nothing without a bug is what
//! `cluster_sim` shows.
#![cfg(feature = "planted")]

use std::sync::Mutex;

use unibody_dataplane::planted::{self, Bug};
use unibody_tests::cluster;

/// Bugs and the seeds, from zero on, within which each must be found.
const FOUND: &[(Bug, u64)] = &[
    (Bug::LateAnswer, 400),
    (Bug::NewPeerIsOld, 400),
    (Bug::BootReportedOnce, 400),
    (Bug::RevokeEarly, 120),
    (Bug::NewLeaderForgetsLeases, 120),
    (Bug::GrantWhileRevoking, 400),
    (Bug::LeaseIgnored, 1000),
    (Bug::AnswerBadBlock, 120),
    (Bug::AckBeforeCommit, 120),
    (Bug::AckAtFirst, 120),
    (Bug::SkipSeal, 120),
    (Bug::WritesIgnoreConflicts, 120),
    (Bug::SkipReconcile, 120),
    (Bug::RebuildForgetsTrims, 120),
    (Bug::RebuildWithoutLock, 120),
    (Bug::ReadsIgnoreConflicts, 1000),
    (Bug::PromoteWithoutCompare, 120),
    (Bug::ReadFromStale, 120),
    (Bug::FlushEarly, 400),
    (Bug::OldBootIsSame, 120),
    (Bug::PendingPromotionForgotten, 400),
    (Bug::AckBeforeJournal, 400),
    (Bug::SkipDirtyMark, 120),
    (Bug::FreeJournalEarly, 120),
    (Bug::CleanAboveStable, 1000),
];

/// The first seed that finds the bug, and how.
fn find(bug: Bug, seeds: u64) -> Option<(u64, String)> {
    planted::set(Some(bug));
    let found = (0..seeds).find_map(|seed| {
        let error = cluster::run_seed(seed, false).verdict.err()?;
        Some((seed, error))
    });
    planted::set(None);
    found
}

#[test]
fn each_planted_bug_is_found() {
    let further = std::env::var("UNIBODY_BUG_SEEDS").ok();
    let further: Option<u64> = further.map(|n| n.parse().expect("a number"));
    let all = Bug::CLUSTER.iter().chain(Bug::MIRROR).chain(Bug::STORE);
    let work: Vec<(Bug, u64)> = match further {
        Some(seeds) => {
            let only = std::env::var("UNIBODY_BUGS").ok();
            let wanted = |bug: &Bug| {
                let name = format!("{bug:?}");
                only.as_ref()
                    .is_none_or(|only| only.split(',').any(|one| one == name))
            };
            all.copied().filter(wanted).map(|bug| (bug, seeds)).collect()
        }
        None => FOUND.to_vec(),
    };
    let (next, missed) = (Mutex::new(work.into_iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let Some((bug, seeds)) = next.lock().expect("nobody panics with it").next() else {
                        break;
                    };
                    match find(bug, seeds) {
                        Some((seed, error)) => {
                            let error: String = error.chars().take(110).collect();
                            println!("{bug:?}: {} seeds: {error}", seed + 1);
                        }
                        None => missed.lock().expect("nobody panics with it").push((bug, seeds)),
                    }
                }
            });
        }
    });
    let missed = missed.into_inner().expect("nobody panics with it");
    println!("not found: {missed:?}");
    assert!(further.is_some() || missed.is_empty(), "not found: {missed:?}");
}
