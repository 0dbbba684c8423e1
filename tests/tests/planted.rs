//! Each planted bug must be found within its number of seeds, and none of them without it.
//!
//! Needs the feature `planted`. The choice is per thread, so seeds run side by side. `UNIBODY_BUG_SEEDS=300` looks
//! further and prints how many seeds each bug needs; `UNIBODY_BUGS=FlushEarly,SkipSeal` looks for those only.
#![cfg(feature = "planted")]

use std::sync::Mutex;

use unibody_dataplane::planted::{self, Bug};
use unibody_tests::sim::{self, script};

/// Bugs and the seeds, from zero on, within which each must be found.
const FOUND: &[(Bug, u64)] = &[
    (Bug::AckAtFirst, 500),
    (Bug::SkipSeal, 300),
    (Bug::WritesIgnoreConflicts, 60),
    (Bug::ReadsIgnoreConflicts, 300),
    (Bug::RebuildForgetsTrims, 150),
    (Bug::RebuildWithoutLock, 60),
    (Bug::PromoteWithoutCompare, 60),
    (Bug::ReadFromStale, 300),
    (Bug::AnswerBadBlock, 60),
    (Bug::OldBootIsSame, 60),
    (Bug::SkipDirtyMark, 60),
    (Bug::FreeJournalEarly, 60),
    (Bug::FlushEarly, 60),
    (Bug::EdgesWithoutLock, 60),
    (Bug::PendingPromotionForgotten, 120),
    (Bug::SoleCopyUnflushed, 120),
    (Bug::SkipReadRepair, 120),
    (Bug::PromoteWithoutFlush, 120),
    (Bug::SkipReconcile, 200),
    (Bug::AckBeforeCommit, 300),
];

/// The first seed that finds the bug, and how.
fn find(bug: Bug, seeds: u64) -> Option<(u64, String)> {
    planted::set(Some(bug));
    let found = (0..seeds).find_map(|seed| {
        sim::run_seed(seed, false)
            .verdict
            .err()
            .map(|error| (seed, error))
    });
    planted::set(None);
    found
}

/// Bugs that the exhaustive mode must find within its first draws.
const EXHAUSTED: &[Bug] = &[
    Bug::AckAtFirst,
    Bug::WritesIgnoreConflicts,
    Bug::SkipReconcile,
    Bug::RebuildForgetsTrims,
    Bug::RebuildWithoutLock,
    Bug::PromoteWithoutFlush,
    Bug::PromoteWithoutCompare,
    Bug::FlushEarly,
    Bug::PendingPromotionForgotten,
    Bug::AckBeforeJournal,
    Bug::SkipDirtyMark,
    Bug::FreeJournalEarly,
];
/// How many of them.
const DRAWS: u64 = 2;

#[test]
fn a_crash_at_every_device_write_finds_bugs() {
    let further = std::env::var("UNIBODY_BUG_DRAWS").ok();
    let draws = further
        .as_ref()
        .map_or(DRAWS, |n| n.parse().expect("UNIBODY_BUG_DRAWS is a number"));
    let all = Bug::MIRROR.iter().chain(Bug::STORE).copied();
    for bug in all.filter(|bug| further.is_some() || EXHAUSTED.contains(bug)) {
        planted::set(Some(bug));
        let found = (0..draws).find_map(|seed| {
            script::SCRIPTS.iter().find_map(|(name, script)| {
                let failed = script::exhaust(script, seed).failed;
                failed.map(|(crash, error)| (seed, name, crash, error))
            })
        });
        planted::set(None);
        match found {
            Some((seed, name, crash, error)) => {
                let error: String = error.chars().take(110).collect();
                println!("{bug:?}: draw {seed}, {name}, {crash:?}: {error}");
            }
            None if further.is_some() => println!("{bug:?}: not found"),
            None => panic!("{bug:?} was not found within {draws} draws"),
        }
    }
}

#[test]
fn each_planted_bug_is_found() {
    let further: Option<u64> = std::env::var("UNIBODY_BUG_SEEDS")
        .ok()
        .map(|n| n.parse().expect("a number"));
    let only = std::env::var("UNIBODY_BUGS").ok();
    let chosen = |bug: &Bug| {
        only.as_ref()
            .is_none_or(|names| names.split(',').any(|name| name == format!("{bug:?}")))
    };
    let all = Bug::MIRROR.iter().chain(Bug::STORE).copied().filter(chosen);
    let work: Vec<(Bug, u64)> = match further {
        Some(seeds) => all.map(|bug| (bug, seeds)).collect(),
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

#[test]
fn without_a_bug_the_same_seeds_pass() {
    let most = FOUND.iter().map(|&(_, seeds)| seeds).max().unwrap_or(0);
    for seed in 0..most {
        let run = sim::run_seed(seed, false);
        assert!(run.verdict.is_ok(), "seed {seed}: {:?}", run.verdict);
    }
}
