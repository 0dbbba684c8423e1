//! Drills: a cluster of real processes, each on a machine of its own (network namespaces), under a load that judges what it
//! reads, while nodes are killed, stopped, cut off and replaced. `UNIBODY_DRILL_SECONDS` makes the first one longer.

// The program's own client; the drills need only a part of it.
#[allow(dead_code)]
#[path = "../../src/bench/client.rs"]
mod client;
mod common;
mod guest;
mod load;
mod net;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{Cluster, until};
use load::Load;
use net::Net;

/// A cluster with one mirrored volume that is served.
fn begin(test: &str, nodes: usize, disks: usize) -> Option<Arc<Mutex<Cluster>>> {
    let cluster = Cluster::start(Net::new(test, nodes + 1)?, nodes, disks);
    cluster.run(1, &["volume", "create", "v", "--size", "256M", "--mirror", "2"]);
    cluster.healed();
    Some(Arc::new(Mutex::new(cluster)))
}

fn end(cluster: Arc<Mutex<Cluster>>) {
    let cluster = Arc::into_inner(cluster).expect("the load has ended");
    let cluster = cluster.into_inner().expect("nobody panicked with it");
    cluster.healed();
    cluster.end();
}

fn pause(seconds: f64) {
    std::thread::sleep(Duration::from_secs_f64(seconds));
}

#[test]
fn nodes_are_killed_at_random_under_load() {
    let Some(cluster) = begin("nodes_are_killed_at_random_under_load", 3, 3) else {
        return;
    };
    let seconds = std::env::var("UNIBODY_DRILL_SECONDS")
        .ok()
        .and_then(|text| text.parse().ok());
    let over = Instant::now() + Duration::from_secs(seconds.unwrap_or(25));
    let load = Load::start(&cluster);
    load.answers(1000);
    let mut random = std::process::id() as usize;
    while Instant::now() < over {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let node = (random >> 33) % 3 + 1;
        cluster.lock().unwrap().kill(node);
        pause((random >> 40 & 0xff) as f64 / 100.0);
        cluster.lock().unwrap().revive(node);
        pause((random >> 48 & 0xff) as f64 / 60.0);
    }
    load.answers(1000);
    load.end();
    end(cluster);
}

#[test]
fn an_owner_that_stood_still_past_its_lease_does_nothing_any_more() {
    let Some(cluster) = begin(
        "an_owner_that_stood_still_past_its_lease_does_nothing_any_more",
        3,
        3,
    ) else {
        return;
    };
    let load = Load::start(&cluster);
    load.answers(1000);
    let zombie = cluster.lock().unwrap().owner().unwrap();
    cluster.lock().unwrap().stop(zombie);
    until("the volume is another's", || {
        let owner = cluster.lock().unwrap().owner();
        owner.is_some_and(|owner| owner != zombie)
    });
    // Most blocks have been written anew. What it is asked now it finds when it goes on, and then nobody can tell it that there
    // is another owner: only that its lease is over keeps it from answering from what it has.
    load.answers(1000);
    let others: Vec<usize> = (1..=3).filter(|&node| node != zombie).collect();
    for &other in &others {
        let cluster = cluster.lock().unwrap();
        cluster.net.cut(zombie, other);
        cluster.net.cut(other, zombie);
    }
    load.haunt();
    cluster.lock().unwrap().go_on(zombie);
    load.answers(3000);
    pause(1.0);
    cluster.lock().unwrap().net.mend();
    load.answers(3000);
    let done = load.end();
    assert_eq!(done.moves, 1);
    assert!(done.refused > 0, "it was asked, and has said no: {done:?}");
    end(cluster);
}

#[test]
fn partitions_end_and_nothing_was_lost() {
    let Some(cluster) = begin("partitions_end_and_nothing_was_lost", 3, 3) else {
        return;
    };
    let load = Load::start(&cluster);
    load.answers(1000);
    let owner = cluster.lock().unwrap().owner().unwrap();
    let others: Vec<usize> = (1..=3).filter(|&node| node != owner).collect();
    // Cut off both ways: the volume goes elsewhere.
    for &other in &others {
        let cluster = cluster.lock().unwrap();
        cluster.net.cut(owner, other);
        cluster.net.cut(other, owner);
    }
    until("the volume is another's", || {
        let now = cluster.lock().unwrap().owner();
        now.is_some_and(|now| now != owner)
    });
    load.answers(1000);
    cluster.lock().unwrap().net.mend();
    load.answers(1000);
    cluster.lock().unwrap().healed();
    // One way only, between the owner and a node with replicas, each way for a while.
    let owner = cluster.lock().unwrap().owner().unwrap();
    let other = owner % 3 + 1;
    for (from, to) in [(owner, other), (other, owner)] {
        cluster.lock().unwrap().net.cut(from, to);
        pause(5.0);
        cluster.lock().unwrap().net.mend();
        load.answers(1000);
    }
    load.end();
    end(cluster);
}

#[test]
fn all_nodes_are_killed_at_once() {
    let Some(cluster) = begin("all_nodes_are_killed_at_once", 3, 3) else {
        return;
    };
    let load = Load::start(&cluster);
    for _ in 0..2 {
        load.answers(2000);
        let mut all = cluster.lock().unwrap();
        (1..=3).for_each(|node| all.kill(node));
        (1..=3).for_each(|node| all.revive(node));
    }
    load.answers(2000);
    load.end();
    end(cluster);
}

#[test]
fn without_a_majority_reads_and_writes_go_on() {
    let Some(cluster) = begin("without_a_majority_reads_and_writes_go_on", 5, 2) else {
        return;
    };
    {
        let cluster = cluster.lock().unwrap();
        cluster.run(1, &["volume", "attach", "v", "--on", "n1"]);
        cluster.healed();
    }
    let load = Load::start(&cluster);
    load.answers(1000);
    (3..=5).for_each(|node| cluster.lock().unwrap().kill(node));
    // A minute, most of it well past the lease.
    pause(10.0);
    let before = load.answered();
    pause(50.0);
    assert!(load.answered() > before + 5000, "I/O goes on without a majority");
    (3..=5).for_each(|node| cluster.lock().unwrap().revive(node));
    load.answers(1000);
    let done = load.end();
    assert_eq!((done.errors, done.moves), (0, 0), "{done:?}");
    end(cluster);
}

#[test]
fn a_node_is_replaced_by_one_with_empty_disks() {
    let Some(cluster) = begin("a_node_is_replaced_by_one_with_empty_disks", 3, 3) else {
        return;
    };
    let load = Load::start(&cluster);
    load.answers(1000);
    {
        let mut cluster = cluster.lock().unwrap();
        let status = cluster.status(1).unwrap();
        let disks = status["disks"].as_array().unwrap();
        let lost = disks.iter().find(|disk| disk["node"] == "n3").unwrap()["uuid"]
            .as_str()
            .unwrap()
            .to_owned();
        cluster.kill(3);
        std::fs::remove_dir_all(cluster.home(3)).unwrap();
        std::fs::remove_file(cluster.disk(3)).unwrap();
        cluster.join(4, true);
        cluster.run(1, &["disk", "remove", &lost]);
    }
    load.answers(1000);
    until("the lost node can be removed", || {
        let cluster = cluster.lock().unwrap();
        let status = cluster.status(1);
        let without = |status: &serde_json::Value| {
            let disks = status["disks"].as_array().unwrap();
            disks.len() == 3 && disks.iter().all(|disk| disk["node"] != "n3")
        };
        status.as_ref().is_some_and(without)
    });
    cluster.lock().unwrap().run(1, &["node", "remove", "n3"]);
    load.answers(1000);
    load.end();
    end(cluster);
}
