//! An exhaustive model of the replication protocol: owners, seals, removal, rebuild and confirmed reads.
//!
//! To learn the protocol from it, read `replica` (what a disk owes), `control` (what consensus decides), `owner` (what an
//! owner concludes), then `action` and `system` (how they meet) and `register` (what guests are promised). `search` says when
//! what may happen and what must always hold, `bug` which mistakes are planted.
//!
//! One chunk of one block, two or three replicas, two nodes. The checker visits every state that can be reached within
//! the bounds of a search, breadth first. Every search must also reach what it is there for: properties of the kind
//! `sometimes`, all but those that its bounds exclude. And each planted bug must be found.
//!
//! This is the protocol as meant, not the code: that the code follows it is what the simulators show
//! (`tests/src/cluster`). What is left out is said in each module and in `docs/testing.md`.

mod action;
mod bug;
mod control;
mod owner;
mod register;
mod replica;
mod search;
mod symmetry;
mod system;

use std::collections::BTreeSet;
use std::time::Instant;

use stateright::{Checker, Expectation, HasDiscoveries, Model};

use bug::Bug;
use search::{DECEIVED, FENCED, REMAINS, Search};

/// Room for replicas; a search uses two or three.
const SLOTS: usize = 3;
/// Nodes that can be owners.
const NODES: usize = 2;
/// Threads of a search.
const THREADS: usize = 2;

/// A later owner beside one that lives on, and a connection that breaks.
const ZOMBIES: Search = Search {
    replicas: 2,
    generations: 2,
    writes: 2,
    breaks: 1,
    reboots: 0,
    zombies: true,
    operator: false,
    bug: None,
};

/// Loss of power, of one and of all.
const POWER: Search = Search {
    breaks: 0,
    reboots: 2,
    zombies: false,
    ..ZOMBIES
};

/// Changes that the owner did not propose.
const OPERATOR: Search = Search {
    generations: 1,
    reboots: 1,
    operator: true,
    ..ZOMBIES
};

/// All faults together.
const EVERYTHING: Search = Search {
    writes: 1,
    reboots: 1,
    ..ZOMBIES
};

/// What needs an owner that was replaced and lives on.
const OF_ZOMBIES: &[&str] = &[
    "a replaced owner collects a late acknowledgement",
    "a replaced owner's write is refused",
    "a read is confirmed",
    "a read is not confirmed",
    "a replaced owner's proposal is refused",
];
/// What needs a reboot.
const OF_REBOOTS: &[&str] = &[
    "a new owner tells of a loss of power",
    "a promotion in an old boot is refused",
    "all replicas reboot and nothing is lost",
    "unflushed writes are lost under a guest",
];
/// What needs an operator.
const OF_OPERATORS: &[&str] = &[
    "an owner's proposal comes after another change",
    "the last replica is not dropped",
];

/// Visits every state: nothing that must always hold is violated, and all is reached but `excluded`.
fn exhaust(name: &str, search: Search, excluded: &[&[&str]]) {
    let start = Instant::now();
    let checker = search.checker().threads(THREADS).spawn_bfs().join();
    println!(
        "{name}: {} states, {} steps, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        start.elapsed().as_secs_f32(),
    );
    assert!(checker.is_done(), "the search ended early");
    let found = checker.discoveries();
    let mut unreached = BTreeSet::new();
    for property in search.properties() {
        match (property.expectation, found.get(property.name)) {
            (Expectation::Always, Some(path)) => {
                let last = path.last_state();
                let actions = path.clone().into_actions();
                panic!(
                    "{name}: not \"{}\": {actions:#?} ends in {last:#?}",
                    property.name
                );
            }
            (Expectation::Sometimes, None) => {
                unreached.insert(property.name);
            }
            _ => {}
        }
    }
    let excluded: BTreeSet<_> = excluded.iter().copied().flatten().copied().collect();
    assert_eq!(
        unreached, excluded,
        "{name}: what was not reached, and what should not be"
    );
}

#[test]
fn an_owner_and_its_successor() {
    exhaust("zombies", ZOMBIES, &[OF_REBOOTS, OF_OPERATORS]);
}

#[test]
fn loss_of_power() {
    let others = &["a lost replica returns"];
    exhaust("power", POWER, &[OF_ZOMBIES, OF_OPERATORS, others]);
}

#[test]
fn an_operator() {
    let later = &[
        "a later owner's write is acknowledged",
        "a new owner completes a write",
        "a new owner tells of a loss of power",
        "a rebuild replaces a newer value",
    ];
    exhaust("operator", OPERATOR, &[OF_ZOMBIES, later]);
}

#[test]
fn all_faults_together() {
    exhaust("everything", EVERYTHING, &[OF_OPERATORS]);
}

#[test]
fn three_generations() {
    let search = Search {
        generations: 3,
        breaks: 0,
        ..ZOMBIES
    };
    let others = &["a lost replica returns"];
    exhaust("three generations", search, &[OF_REBOOTS, OF_OPERATORS, others]);
}

#[test]
fn three_replicas() {
    let search = Search {
        replicas: 3,
        writes: 1,
        ..ZOMBIES
    };
    exhaust("three replicas", search, &[OF_REBOOTS, OF_OPERATORS]);
}

#[test]
#[ignore = "minutes"]
fn further() {
    let everything = Search {
        writes: 2,
        ..EVERYTHING
    };
    exhaust("everything, two writes", everything, &[OF_OPERATORS]);
    let three = Search {
        replicas: 3,
        breaks: 0,
        ..EVERYTHING
    };
    let others = &[
        "a lost replica returns",
        "unflushed writes are lost under a guest",
    ];
    exhaust("three replicas, reboots", three, &[OF_OPERATORS, others]);
}

/// Where each bug is looked for, and what it is found to violate.
const PLANTED: &[(Bug, Search, &str)] = &[
    (Bug::NoSeal, ZOMBIES, DECEIVED),
    (Bug::OlderGenerationObeyed, ZOMBIES, DECEIVED),
    (Bug::SealForgotten, EVERYTHING, FENCED),
    (Bug::NoReconcile, ZOMBIES, DECEIVED),
    (Bug::SilentNotWaitedFor, POWER, DECEIVED),
    (Bug::AckBeforeCommit, ZOMBIES, DECEIVED),
    (Bug::AckAtFirst, ZOMBIES, DECEIVED),
    (Bug::NewBootTrusted, POWER, DECEIVED),
    (Bug::LastCopyUnflushed, POWER, DECEIVED),
    (Bug::LossNotTold, POWER, DECEIVED),
    (Bug::FlushAtFirst, POWER, DECEIVED),
    (Bug::PromotedEarly, ZOMBIES, DECEIVED),
    (Bug::PromotedUnflushed, POWER, DECEIVED),
    (Bug::PendingForgotten, ZOMBIES, DECEIVED),
    (Bug::CopyKeepsNewer, ZOMBIES, DECEIVED),
    (Bug::ReadUnconfirmed, ZOMBIES, DECEIVED),
    (Bug::ConfirmedByOne, ZOMBIES, DECEIVED),
    (Bug::LeaseCountedLate, ZOMBIES, DECEIVED),
    (Bug::AnyGenerationProposes, ZOMBIES, DECEIVED),
    (Bug::LastCopyDropped, OPERATOR, REMAINS),
];

#[test]
fn each_planted_bug_is_found() {
    let mut missed = Vec::new();
    for &(bug, search, violated) in PLANTED {
        let search = Search {
            bug: Some(bug),
            ..search
        };
        let found = HasDiscoveries::AnyOf([violated].into());
        let checker = search
            .checker()
            .threads(THREADS)
            .finish_when(found)
            .spawn_bfs()
            .join();
        match checker.discovery(violated) {
            Some(path) => {
                let steps = path.into_actions().len();
                println!("{bug:?}: {steps} steps, {} states", checker.unique_state_count());
            }
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not found: {missed:?}");
}
