//! Whole data planes and a volume mirrored across them: what a guest wrote it reads, whatever becomes of connections,
//! processes and disks.

mod cluster;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use cluster::{Cluster, Node, Relay, local, memory_disk, mix, until};
use unibody_dataplane::disk::open::OpenDisk;
use unibody_dataplane::disk::spec::Backend;
use unibody_dataplane::ids::DiskUuid;
use unibody_dataplane::mirror::Phase;
use unibody_dataplane::plane::{DiskIndex, reactor_params};
use unibody_dataplane::wire::handshake::{
    self, Handshake, HandshakeError, Incarnation, NodeId, Purpose, Refusal,
};

const SIZE: u64 = 64 << 20;
const BLOCKS: usize = (SIZE / 4096) as usize;

fn uuids(count: u128) -> Vec<DiskUuid> {
    (1..=count).map(DiskUuid).collect()
}

/// Nodes 1 to `count` with a disk each, whose number is the node's; node 1 reaches the others.
fn nodes(cluster: &std::sync::Arc<Cluster>, count: u64, reactors: usize) -> Vec<Node> {
    let nodes: Vec<Node> = (1..=count).map(|id| Node::start(id, cluster, reactors)).collect();
    for node in &nodes {
        let (up, service) = memory_disk(node.id.0 as u16, u128::from(node.id.0), 7);
        node.plane.add_disk(up, service).unwrap();
    }
    for node in &nodes[1..] {
        nodes[0].plane.add_node(node.id).unwrap();
    }
    nodes
}

/// Makes the link from `from` to node `to`, which was begun directly, anew through the relay. It is waited for first: a
/// connection still being dialed directly would be taken for the new link's.
fn go_through(relay: &Relay, cluster: &Cluster, from: &Node, to: NodeId) {
    until("the first link is up", || {
        from.links().iter().any(|link| link.asks && link.connected)
    });
    from.plane.forget_node(to);
    until("the first link is gone", || from.links().is_empty());
    cluster.addresses.lock().unwrap().insert(to, relay.address);
    from.plane.add_node(to).unwrap();
}

fn in_sync(node: &Node, replicas: u32) {
    let mut last = None;
    until("all replicas in sync", || {
        let status = node.volume();
        let over = status.phase == Phase::Serving && status.in_sync == replicas;
        if last != Some(status) {
            last = Some(status);
        }
        over
    });
}

#[test]
fn three_nodes_hold_three_equal_copies() {
    let cluster = Cluster::new(SIZE, &uuids(3));
    let nodes = nodes(&cluster, 3, 2);
    let dir = tempfile::tempdir().unwrap();
    let mut device = nodes[0].serve(&cluster, Vec::new(), dir.path());
    in_sync(&nodes[0], 3);
    device.client().run(3_000, mix(1, BLOCKS), |_| ());
    device.client().flush();
    device.client().verify();
    assert_eq!(cluster.marked_stale(), 0);
    // Each replica alone has everything: first without the local one, then without the second as well.
    nodes[0].plane.fail_disk(DiskIndex(1));
    nodes[0].plane.disk_down(DiskIndex(1));
    device.client().verify();
    device.client().run(500, mix(2, BLOCKS), |_| ());
    nodes[1].plane.fail_disk(DiskIndex(2));
    nodes[1].plane.disk_down(DiskIndex(2));
    device.client().verify();
    assert_eq!(nodes[0].volume().in_sync, 1);
    for node in &nodes {
        for link in node.links() {
            assert_eq!(
                (link.counts.bad_frames, link.counts.mismatches),
                (0, 0),
                "{link:?}"
            );
        }
    }
}

#[test]
fn connections_are_cut_in_mid_write_and_nothing_is_lost() {
    let cluster = Cluster::new(SIZE, &uuids(2));
    let nodes = nodes(&cluster, 2, 1);
    let relay = Relay::start(nodes[1].address);
    go_through(&relay, &cluster, &nodes[0], NodeId(2));
    let dir = tempfile::tempdir().unwrap();
    let mut device = nodes[0].serve(&cluster, Vec::new(), dir.path());
    in_sync(&nodes[0], 2);
    for round in 0..30 {
        relay.cut_after(10_000 + round * 77_777);
        device.client().run(400, mix(round as usize, BLOCKS), |_| ());
    }
    relay.cut_after(-1);
    device.client().flush();
    device.client().verify();
    assert!(relay.cuts() > 10);
    assert_eq!(cluster.marked_stale(), 0, "every connection came back in time");
    let links = nodes[0].links();
    let asks = links.iter().find(|link| link.asks).unwrap();
    assert!(asks.counts.resent > 0, "{asks:?}");
    assert_eq!(asks.counts.bad_frames, 0);
    assert_eq!(asks.pending, 0);
    // The other replica alone.
    nodes[0].plane.fail_disk(DiskIndex(1));
    nodes[0].plane.disk_down(DiskIndex(1));
    device.client().verify();
}

#[test]
fn a_peer_away_for_long_is_left_behind_and_catches_up() {
    let cluster = Cluster::new(SIZE, &uuids(2));
    let nodes = nodes(&cluster, 2, 1);
    let relay = Relay::start(nodes[1].address);
    go_through(&relay, &cluster, &nodes[0], NodeId(2));
    let dir = tempfile::tempdir().unwrap();
    let mut device = nodes[0].serve(&cluster, Vec::new(), dir.path());
    in_sync(&nodes[0], 2);
    device.client().run(500, mix(1, BLOCKS), |_| ());
    relay.close(true);
    // Nothing is acknowledged before the replica is taken out, then everything goes on.
    device.client().run(500, mix(2, BLOCKS), |_| ());
    assert!(cluster.marked_stale() > 0);
    relay.close(false);
    in_sync(&nodes[0], 2);
    device.client().flush();
    nodes[0].plane.fail_disk(DiskIndex(1));
    nodes[0].plane.disk_down(DiskIndex(1));
    device.client().verify();
}

#[test]
fn a_peer_that_restarts_has_forgotten_and_is_made_equal_again() {
    let cluster = Cluster::new(SIZE, &uuids(2));
    let mut nodes = nodes(&cluster, 2, 1);
    let dir = tempfile::tempdir().unwrap();
    let mut device = nodes[0].serve(&cluster, Vec::new(), dir.path());
    in_sync(&nodes[0], 2);
    let mut second = nodes.pop();
    device.client().run(1_500, mix(1, BLOCKS), |ended| {
        if ended > 500
            && let Some(node) = second.take()
        {
            // In the middle of everything. What comes back is a disk of the same name that knows nothing.
            node.kill();
            let node = Node::start(2, &cluster, 1);
            let (up, service) = memory_disk(2, 2, 99);
            node.plane.add_disk(up, service).unwrap();
            nodes.push(node);
        }
    });
    in_sync(&nodes[0], 2);
    assert!(cluster.marked_stale() > 0);
    device.client().run(300, mix(2, BLOCKS), |_| ());
    device.client().flush();
    nodes[0].plane.fail_disk(DiskIndex(1));
    nodes[0].plane.disk_down(DiskIndex(1));
    device.client().verify();
}

/// Dials node `to` as if it were node 9, with the cluster's secret.
fn intruder(to: &Node, secret: &str) -> Result<(TcpStream, handshake::Peer), HandshakeError> {
    let mut socket = TcpStream::connect(to.address).unwrap();
    let local = local(9, Incarnation(9), secret);
    let shake = Handshake::dial(local, Purpose::Data, reactor_params(0), None);
    let peer = handshake::run(&mut socket, shake, Duration::from_secs(5))?;
    Ok((socket, peer))
}

#[test]
fn what_a_peer_sends_that_makes_no_sense_ends_its_connection_only() {
    use unibody_dataplane::wire::frame::{HEAD, Head, Kind, Sequence};
    let cluster = Cluster::new(SIZE, &uuids(2));
    let nodes = nodes(&cluster, 2, 1);
    let dir = tempfile::tempdir().unwrap();
    let mut device = nodes[0].serve(&cluster, Vec::new(), dir.path());
    in_sync(&nodes[0], 2);
    let frame = |peer: &handshake::Peer, kind: Kind, change: &dyn Fn(&mut Head)| {
        let mut head = Head::new(kind);
        change(&mut head);
        let mut bytes = [0; HEAD];
        head.encode(&mut Sequence::new(&peer.key, true), &mut bytes);
        bytes.to_vec()
    };
    let ended = |what: &dyn Fn(&handshake::Peer) -> Vec<u8>, half: bool| {
        let (mut socket, peer) = intruder(&nodes[1], "secret").unwrap();
        // Its greeting first: what comes earlier is refused for that alone.
        let mut greeting = [0; HEAD];
        socket.read_exact(&mut greeting).unwrap();
        socket.write_all(&what(&peer)).unwrap();
        if half {
            socket.shutdown(std::net::Shutdown::Write).unwrap();
        }
        socket.set_read_timeout(Some(cluster::PATIENCE)).unwrap();
        // Until the end, or a reset where it did not even read on.
        let mut rest = Vec::new();
        match socket.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    };
    ended(
        &|_| {
            b"GET / HTTP/1.1\r\nHost: what is this, exactly? A request that goes on for a while\r\n\r\n"
                .to_vec()
        },
        false,
    );
    ended(&|_| vec![0xff; 5_000], false);
    // Truncated, in the middle of a header.
    ended(&|peer| frame(peer, Kind::Flush, &|_| ())[..40].to_vec(), true);
    // An answer nobody asked for; a body longer than anything.
    ended(&|peer| frame(peer, Kind::Done, &|_| ()), false);
    ended(
        &|peer| frame(peer, Kind::Write, &|head| head.body = u32::MAX),
        false,
    );
    ended(
        &|peer| frame(peer, Kind::Flush, &|head| head.disk = 60_000),
        false,
    );
    let found = nodes[1].links();
    let link = found.iter().find(|link| link.node == NodeId(9)).unwrap();
    assert!(link.counts.bad_frames >= 4, "{link:?}");
    // A frame in order for a disk that is not there is answered.
    let (mut socket, peer) = intruder(&nodes[1], "secret").unwrap();
    let mut theirs = Sequence::new(&peer.key, false);
    let mut next = |socket: &mut TcpStream| {
        let mut bytes = [0; HEAD];
        socket.read_exact(&mut bytes).unwrap();
        let head = Head::decode(&mut theirs, &bytes).unwrap();
        let mut body = vec![0; head.body as usize];
        socket.read_exact(&mut body).unwrap();
        head
    };
    assert_eq!(next(&mut socket).kind, Kind::Disk);
    assert_eq!(next(&mut socket).kind, Kind::Welcome);
    socket
        .write_all(&frame(&peer, Kind::Flush, &|head| {
            (head.disk, head.tag) = (77, 5)
        }))
        .unwrap();
    let answer = next(&mut socket);
    assert_eq!((answer.kind, answer.tag, answer.flags), (Kind::Refused, 5, 4));
    assert_eq!(answer.credits, 1);
    // The owner's own link has not even noticed.
    device.client().run(500, mix(1, BLOCKS), |_| ());
    device.client().verify();
    assert_eq!(cluster.marked_stale(), 0);
    let links = nodes[0].links();
    assert_eq!(links.iter().map(|link| link.counts.sessions).sum::<u64>(), 1);
}

#[test]
fn nobody_without_the_token_gets_to_a_reactor() {
    let cluster = Cluster::new(SIZE, &uuids(1));
    let node = Node::start(1, &cluster, 1);
    let refused = intruder(&node, "guess").map(drop);
    assert!(matches!(refused, Err(HandshakeError::WrongToken)), "{refused:?}");
    let mut socket = TcpStream::connect(node.address).unwrap();
    socket.write_all(&[7; 4096]).unwrap();
    let mut told = [0; 16];
    socket.read_exact(&mut told).unwrap();
    assert_eq!(told[9], Refusal::Malformed as u8);
    drop(socket);
    until("both are counted", || {
        let counts = node.handshakes.now();
        counts.wrong_token == 1 && counts.malformed == 1
    });
    assert_eq!(node.links(), []);
}

#[test]
fn idle_links_let_reactors_sleep() {
    let cluster = Cluster::new(SIZE, &uuids(2));
    let nodes = nodes(&cluster, 2, 1);
    until("connected", || {
        nodes
            .iter()
            .all(|node| node.links().iter().all(|link| link.connected))
            && !nodes[1].links().is_empty()
    });
    let sleeps = || -> Vec<(u64, u64)> {
        let reactor = |node: &Node| node.plane.status()[0].reactor;
        nodes
            .iter()
            .map(|node| (reactor(node).turns, reactor(node).sleeps))
            .collect()
    };
    let before = sleeps();
    std::thread::sleep(Duration::from_millis(600));
    for (before, after) in before.iter().zip(sleeps()) {
        // A polling reactor makes a million turns in this time.
        assert!(after.1 > before.1);
        assert!(
            after.0 - before.0 < 50_000,
            "{} turns without work",
            after.0 - before.0
        );
    }
}

/// A disk of the peer that stops answering, in the middle of everything, while others go on.
#[test]
fn a_silent_far_disk_is_given_up_and_taken_back() {
    use unibody_dataplane::disk::faulty::{Fault, FaultyDisk, Kinds, Rule};
    let cluster = Cluster::new(SIZE, &uuids(2));
    let nodes: Vec<Node> = (1..=2).map(|id| Node::start(id, &cluster, 1)).collect();
    let (up, service) = memory_disk(1, 1, 7);
    nodes[0].plane.add_disk(up, service).unwrap();
    let mut disk = OpenDisk::open(&Backend::Memory(256 << 20)).unwrap();
    cluster::format(&mut disk, 2);
    let mut handle = None;
    let (up, service) = cluster::open(disk, 2, 2, 7, false, |disk| {
        let (faulty, switch) = FaultyDisk::new(disk);
        handle = Some(switch);
        Box::new(faulty)
    });
    nodes[1].plane.add_disk(up, service).unwrap();
    nodes[0].plane.add_node(NodeId(2)).unwrap();
    let handle = handle.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut device = nodes[0].serve(&cluster, Vec::new(), dir.path());
    in_sync(&nodes[0], 2);
    device.client().run(300, mix(1, BLOCKS), |_| ());
    handle.add(Rule::always(Kinds::ALL, Fault::Stuck));
    device.client().run(500, mix(2, BLOCKS), |_| ());
    assert!(cluster.marked_stale() > 0);
    let asks = || nodes[0].links().into_iter().find(|link| link.asks).unwrap();
    assert!(asks().connected);
    assert!(asks().pending > 0, "the peer still has what it was asked");
    // It wakes up: what it answers now is too late, and it is made equal again.
    handle.clear();
    in_sync(&nodes[0], 2);
    assert!(asks().counts.late > 0, "{:?}", asks());
    assert_eq!(asks().counts.bad_frames, 0);
    device.client().run(300, mix(3, BLOCKS), |_| ());
    device.client().flush();
    nodes[0].plane.fail_disk(DiskIndex(1));
    nodes[0].plane.disk_down(DiskIndex(1));
    device.client().verify();
}
