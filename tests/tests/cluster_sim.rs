//! The simulator of a cluster over many seeds, and over the seeds that found something once.
//!
//! `UNIBODY_SEEDS=5000` or `UNIBODY_SEEDS=1000..9000` runs other seeds; `UNIBODY_SEED=7 UNIBODY_TRACE=1` replays one and
//! prints every event. Every seed is run twice, of a longer run than the default every tenth. See `docs/testing.md`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;
use unibody_tests::cluster::{self, Profile, Run};
use unibody_tests::sim::Stats;

/// Seeds of the default run.
const SEEDS: Range<u64> = 0..5_000;

/// Seeds that found a bug once, with what it was.
const KEPT: &[(u64, &str)] = &[
    (
        464,
        "a stale replica was removed for one that is in the domain of another which leaves: three copies in two domains for good",
    ),
    (
        520,
        "a replica lost while its promotion was undecided lacked a write that failed meanwhile, and was promoted",
    ),
    (
        1272,
        "an owner recorded new spans of power and died before it said that power was lost; the next one kept silent",
    ),
    (
        3097,
        "the slots of a dropped replica were zeroed before the drop was durable, and it came back with its records",
    ),
    (
        3238,
        "a zeroing met an extent that a write before it was about to make, on one disk and not on the other",
    ),
    (3529, "as 3097"),
    (
        7424,
        "a flush was answered by a disk that was back without what it had not flushed, and not dropped yet",
    ),
];

/// Rare branches that the default run must reach.
const PROBES: &[&str] = &[
    "I/O error",
    "a peer was away for too long",
    "abandoned disk",
    "all in-sync replicas of a chunk lost power",
    "all nodes killed",
    "all nodes lost power",
    "answer of an old session",
    "answered by an old owner",
    "asked to let go",
    "attached",
    "attachment refused",
    "blocks adopted",
    "blocks repaired by the scrub",
    "boot reported again",
    "bytes made equal",
    "connected",
    "connection broken",
    "cut off from the quorum only",
    "dead owner revoked",
    "device full",
    "disk added",
    "disk destroyed",
    "disk ended itself",
    "disk lost",
    "disk lost power",
    "disk taken out",
    "edges merged",
    "fenced",
    "flush error",
    "flush error that forgot",
    "guest outlived the data plane",
    "handed over",
    "held until the old session was drained",
    "impatient release",
    "journal blocks replayed",
    "last copy forgot writes",
    "latent error",
    "lease refused",
    "live owner revoked",
    "new leader",
    "no quorum for a while",
    "node drained",
    "node gone for good",
    "node lost power",
    "one-way partition",
    "operation on what was added",
    "operations failed",
    "outcome unknown",
    "owner beside an old one",
    "owner cut off from all",
    "owner cut off from the quorum revoked",
    "owner heard of a new size",
    "owner heard that it is none",
    "owner that stood still revoked",
    "partition",
    "process killed",
    "process stood still",
    "proposal of an old owner",
    "proposal overtaken",
    "proposal refused: fenced",
    "proposed again",
    "read repairs",
    "read to be confirmed",
    "refused by another opening of the disk",
    "released",
    "replicas added",
    "replicas given up",
    "replicas moved",
    "replicas removed",
    "rot of data",
    "sent again after a new connection",
    "slow I/O",
    "stuck disk",
    "the peer is another process",
    "volume resized",
    "waited for a credit",
    "zombie refused",
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
        "seed {seed}: {error}\n  replay: UNIBODY_SEED={seed} UNIBODY_TRACE=1 cargo test -p unibody-tests --test cluster_sim -- --exact replay --nocapture"
    ))
}

#[test]
fn replay() {
    let Ok(seed) = std::env::var("UNIBODY_SEED") else {
        return;
    };
    let seed = seed.parse().expect("UNIBODY_SEED is a number");
    println!("{:?}", Profile::draw(seed));
    let run = cluster::run_seed(seed, std::env::var("UNIBODY_TRACE").is_ok());
    println!("{:#?}", run.stats);
    assert!(run.verdict.is_ok(), "{}", tell(seed, &run).unwrap_or_default());
}

#[test]
fn no_seed_finds_anything_and_every_seed_replays() {
    let totals = Mutex::new((Stats::default(), BTreeMap::<&str, u64>::new(), Vec::new()));
    let seeds = seeds();
    let long = seeds.end - seeds.start > SEEDS.end;
    over(seeds.clone(), |seed| {
        let run = cluster::run_seed(seed, false);
        let again = if long && !seed.is_multiple_of(10) {
            run.clone()
        } else {
            cluster::run_seed(seed, false)
        };
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
        let run = cluster::run_seed(seed, false);
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
        let run = cluster::guarded(move || cluster::run(Profile::calm(seed), false));
        assert!(run.verdict.is_ok(), "{}", tell(seed, &run).unwrap_or_default());
        assert_eq!(run.stats.ops_failed, 0, "seed {seed}: {:?}", run.stats);
    });
}
