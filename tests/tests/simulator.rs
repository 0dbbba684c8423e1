//! The simulator over many seeds, and over the seeds that found something once.
//!
//! `UNIBODY_SEEDS=5000` or `UNIBODY_SEEDS=1000..9000` runs other seeds; `UNIBODY_SEED=7 UNIBODY_TRACE=1` replays one and
//! prints every event. See `docs/testing.md`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;
use unibody_tests::sim::script::{self, Crash};
use unibody_tests::sim::{self, Profile, Run};

/// Seeds of the default run.
const SEEDS: Range<u64> = 0..2_000;

/// Seeds that found a bug once, with what it was.
const KEPT: &[(u64, &str)] = &[
    (
        1849,
        "an unaligned write failed because the replica of its edges was away for a moment",
    ),
    (1138, "a disk declared gone kept its volume from attaching"),
    (
        151,
        "a torn first write was recorded lost though a replica that never had it was intact",
    ),
    (
        18,
        "a second replica's bad block was read over the first one's good one",
    ),
    (31, "a suspect replica was rebuilt for ever"),
    (55, "a flush waited for ever for a disk that had nothing to flush"),
];

/// Rare branches that the default run must reach.
const PROBES: &[&str] = &[
    "I/O error",
    "abandoned disk",
    "blocks adopted",
    "blocks lost",
    "bytes made equal",
    "checkpoints",
    "checksum mismatches",
    "chunks marked clean",
    "clean openings",
    "closed",
    "crash while opening",
    "damage found at opening",
    "device full",
    "disconnect",
    "disk ended itself",
    "disk lost",
    "disk lost power",
    "disk replaced",
    "edges merged",
    "flush error",
    "journal blocks replayed",
    "killed",
    "last copy forgot writes",
    "latent error",
    "lost write",
    "misdirected write",
    "operations timed out",
    "operations without room",
    "power lost",
    "read repairs",
    "record pages loaded",
    "regions in doubt",
    "replicas moved",
    "rot of data",
    "rot of metadata",
    "slots freed",
    "slow I/O",
    "stuck disk",
];

fn seeds() -> Range<u64> {
    let Ok(text) = std::env::var("UNIBODY_SEEDS") else {
        return SEEDS;
    };
    let number = |text: &str| text.parse().expect("UNIBODY_SEEDS is a number or from..to");
    match text.split_once("..") {
        Some((from, to)) => number(from)..number(to),
        None => 0..number(&text),
    }
}

/// Runs on all cores; each seed on one.
fn over(seeds: Range<u64>, each: impl Fn(u64) + Sync + Send) {
    seeds.into_par_iter().for_each(each);
}

fn tell(seed: u64, run: &Run) -> Option<String> {
    let error = run.verdict.as_ref().err()?;
    let error: String = error.chars().take(1_500).collect();
    Some(format!(
        "seed {seed}: {error}\n  replay: UNIBODY_SEED={seed} UNIBODY_TRACE=1 cargo test -p unibody-tests --test simulator -- --exact replay --nocapture"
    ))
}

#[test]
fn replay() {
    let Ok(seed) = std::env::var("UNIBODY_SEED") else {
        return;
    };
    let seed = seed.parse().expect("UNIBODY_SEED is a number");
    println!("{:?}", Profile::draw(seed));
    let run = sim::run_seed(seed, std::env::var("UNIBODY_TRACE").is_ok());
    println!("{:#?}", run.stats);
    assert!(run.verdict.is_ok(), "{}", tell(seed, &run).unwrap_or_default());
}

#[test]
fn no_seed_finds_anything_and_every_seed_replays() {
    let totals = Mutex::new((sim::Stats::default(), BTreeMap::<&str, u64>::new(), Vec::new()));
    let seeds = seeds();
    over(seeds.clone(), |seed| {
        let run = sim::run_seed(seed, false);
        let again = sim::run_seed(seed, false);
        let mut totals = totals.lock().expect("no thread panics with it");
        if let Some(text) = tell(seed, &run) {
            totals.2.push((seed, text));
        }
        if run != again {
            totals
                .2
                .push((seed, format!("seed {seed} does not replay: its traces differ")));
        }
        totals.0.events += run.stats.events;
        totals.0.ops += run.stats.ops;
        totals.0.ops_failed += run.stats.ops_failed;
        totals.0.sectors_judged += run.stats.sectors_judged;
        totals.0.device_ios += run.stats.device_ios;
        totals.0.virtual_ms += run.stats.virtual_ms;
        for (what, n) in run.stats.seen {
            *totals.1.entry(what).or_default() += n;
        }
    });
    let (stats, seen, mut failed) = totals.into_inner().expect("no thread panics with it");
    failed.sort();
    println!("seeds {seeds:?}: {stats:?}\n{seen:#?}");
    for (_, text) in failed.iter().take(10) {
        println!("{text}");
    }
    let names: Vec<u64> = failed.iter().map(|(seed, _)| *seed).collect();
    assert!(failed.is_empty(), "{} seeds failed: {names:?}", failed.len());
    if seeds.end - seeds.start >= 1_000 {
        let missed: Vec<_> = PROBES
            .iter()
            .filter(|probe| seen.get(*probe).is_none_or(|&n| n == 0))
            .collect();
        assert!(missed.is_empty(), "never reached: {missed:?}");
    }
}

#[test]
fn seeds_that_found_something_once() {
    for &(seed, what) in KEPT {
        let run = sim::run_seed(seed, false);
        assert!(
            run.verdict.is_ok(),
            "{what}: {}",
            tell(seed, &run).unwrap_or_default()
        );
    }
}

#[test]
fn runs_without_faults_have_no_errors() {
    over(0..40, |seed| {
        let run = sim::guarded(move || sim::run(Profile::calm(seed), false));
        assert!(run.verdict.is_ok(), "{}", tell(seed, &run).unwrap_or_default());
        let room = run
            .stats
            .seen
            .get("operations without room")
            .copied()
            .unwrap_or(0);
        assert!(
            run.stats.ops_failed == 0 || room > 0,
            "seed {seed}: {:?}",
            run.stats
        );
    });
}

#[test]
fn a_disk_that_does_not_keep_some_blocks_delays_no_read_and_loses_its_replica() {
    let (weak, moved) = (AtomicU64::new(0), AtomicU64::new(0));
    over(0..60, |seed| {
        let run = sim::guarded(move || sim::run(Profile::weak(seed), false));
        assert!(run.verdict.is_ok(), "{}", tell(seed, &run).unwrap_or_default());
        assert_eq!(run.stats.ops_failed, 0, "seed {seed}: {:?}", run.stats);
        let seen = |what| run.stats.seen.get(what).copied().unwrap_or(0);
        weak.fetch_add(seen("weak block"), Ordering::Relaxed);
        moved.fetch_add(u64::from(seen("replicas moved") > 0), Ordering::Relaxed);
    });
    println!("{weak:?} weak blocks, replicas moved in {moved:?} runs");
    assert!(moved.into_inner() >= 20, "few runs met their weak blocks");
}

/// Seeds of the exhaustive mode: each plays every script with a crash at every point.
const DRAWS: u64 = 16;

/// `UNIBODY_CRASH=2,5,17,power` (script, seed, point, kill or power) replays one.
#[test]
fn every_device_write_of_a_script_may_be_the_last() {
    if let Ok(text) = std::env::var("UNIBODY_CRASH") {
        let parts: Vec<&str> = text.split(',').collect();
        let number = |n: usize| {
            parts[n]
                .parse()
                .expect("UNIBODY_CRASH is script,seed,point,power")
        };
        let (seed, at, power) = (number(1), number(2), parts[3] == "power");
        let (_, script) = script::SCRIPTS[parts[0].parse::<usize>().expect("a script's number")];
        let crash = Crash { at, power };
        let (run, _) = script::play(script, seed, Some(crash).filter(|crash| crash.at > 0), true);
        assert!(run.verdict.is_ok(), "{:?}", run.verdict);
        return;
    }
    let runs = AtomicU64::new(0);
    let scripts = script::SCRIPTS.len() as u64;
    let draws = std::env::var("UNIBODY_DRAWS").map_or(DRAWS, |n| n.parse().expect("a number"));
    over(0..scripts * draws, |n| {
        let (seed, n) = (n / scripts, n % scripts);
        let (name, script) = script::SCRIPTS[n as usize];
        let all = script::exhaust(script, seed);
        assert!(
            all.failed.is_none(),
            "script {n}, {name}, seed {seed}: {:?}",
            all.failed
        );
        runs.fetch_add(all.runs, Ordering::Relaxed);
    });
    println!("{runs:?} runs");
    assert!(
        runs.into_inner() > 500 * draws,
        "the scripts make the devices do something"
    );
}

#[test]
fn different_seeds_are_different_runs() {
    assert_ne!(sim::run_seed(1, false).trace, sim::run_seed(2, false).trace);
}
