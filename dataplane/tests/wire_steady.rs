//! A volume with one replica here and one on another node, under load: the reactors at both ends allocate nothing, each
//! byte is copied once on the way in, and the only system call is the turn's `io_uring_enter`.

mod cluster;
mod counting;

use cluster::{Client, Cluster, Node, memory_disk, until};
use counting::allocations_of;
use unibody_dataplane::ids::DiskUuid;
use unibody_dataplane::mirror::Phase;

const SIZE: u64 = 64 << 20;

/// `count` requests of `blocks` blocks spread over the volume.
fn load(client: &mut Client, write: bool, count: usize, blocks: usize) {
    let slots = SIZE as usize / 4096 / blocks;
    client.run(count, |n| (write, n * 7919 % slots * blocks, blocks), |_| ());
}

#[test]
fn in_steady_state_a_remote_replica_costs_no_allocation() {
    let cluster = Cluster::new(SIZE, &[DiskUuid(1), DiskUuid(2)]);
    let first = Node::start(1, &cluster, 1);
    let second = Node::start(2, &cluster, 2);
    for (node, id) in [(&first, 1), (&second, 2)] {
        // The far disk is on the reactor that does not have the link.
        let (up, service) = memory_disk(if id == 2 { 3 } else { 0 }, id, 7);
        node.plane.add_disk(up, service).unwrap();
    }
    first.plane.add_node(second.id).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut device = first.serve(&cluster, Vec::new(), dir.path());
    until("both replicas in sync", || {
        let status = first.volume();
        status.phase == Phase::Serving && status.in_sync == 2
    });
    let client = device.client();
    for blocks in [16, 1] {
        load(client, true, (SIZE / 4096) as usize / blocks, blocks);
        load(client, true, 20_000, blocks);
        load(client, false, 10_000, blocks);
    }
    for (write, blocks) in [(true, 1), (false, 1), (true, 16), (false, 16)] {
        let stats = || first.plane.status().remove(0).reactor;
        let before_stats = stats();
        second.plane.status();
        load(client, write, 1_000, blocks);
        let before: Vec<u64> = NAMES.iter().map(|name| allocations_of(name)).collect();
        load(client, write, 10_000, blocks);
        for (name, before) in NAMES.iter().zip(before) {
            let allocated = allocations_of(name) - before;
            assert_eq!(
                allocated, 0,
                "{name}: {allocated} allocations in 10,000 requests (write: {write}, {blocks} blocks)"
            );
        }
        let after = stats();
        assert_eq!(after.requests - before_stats.requests, 11_000);
        let copied = after.copied_in - before_stats.copied_in;
        assert_eq!(copied, if write { 11_000 * blocks as u64 * 4096 } else { 0 });
    }
    let far = second.links();
    assert!(far.iter().any(|link| link.counts.requests > 40_000), "{far:?}");
}

/// What the threads of the reactors are called; those of both nodes bear the same names.
const NAMES: [&str; 2] = ["reactor0", "reactor1"];
