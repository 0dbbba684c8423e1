//! The mirror under random faults: model replicas, model control state, register checker.
//!
//! `MIRROR_SEEDS=from..to` runs other seeds; `MIRROR_TRACE=seed` prints one.

mod common;

use common::world::{self, World};

#[test]
fn one_seed_traced() {
    let Ok(seed) = std::env::var("MIRROR_TRACE") else {
        return;
    };
    let mut world = World::new(seed.parse().unwrap());
    world.trace = true;
    println!("{:?}", world.profile);
    println!("{:?}", world.run());
}

#[test]
fn every_block_is_a_linearizable_register_through_all_faults() {
    let seeds = std::env::var("MIRROR_SEEDS").unwrap_or_else(|_| "0..300".into());
    let (from, to) = seeds.split_once("..").unwrap();
    let mut failed = Vec::new();
    let mut ops = 0;
    for seed in from.parse::<u64>().unwrap()..to.parse().unwrap() {
        let result = std::panic::catch_unwind(|| world::run(seed));
        match result {
            Ok(Ok(stats)) => ops += stats.ops,
            Ok(Err(error)) => failed.push((seed, error)),
            Err(_) => failed.push((seed, "panicked".into())),
        }
    }
    println!("{ops} operations");
    for (seed, error) in failed.iter().take(3) {
        let error: String = error.chars().take(1500).collect();
        println!("seed {seed}: {error}");
    }
    assert!(
        failed.is_empty(),
        "{} seeds failed: {:?}",
        failed.len(),
        failed.iter().map(|f| f.0).take(40).collect::<Vec<_>>()
    );
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..20 {
        assert_eq!(world::run(seed), world::run(seed), "seed {seed}");
    }
}
