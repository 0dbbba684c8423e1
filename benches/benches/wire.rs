//! A 4 KiB write with one replica here and one on another node, over loopback, beside what the way costs at least: a round
//! trip over TCP of as many bytes and a write of a block to memory at either end.
//!
//! Both in turns on the same two cores, medians of several runs. What the figures say: `benches/README.md`.

// The planes, the listener and the dialer of the data plane's own tests.
#[path = "../../dataplane/tests/cluster/mod.rs"]
mod cluster;

use std::hint::black_box;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use cluster::{Client, Cluster, Node, memory_disk, until};
use unibody_dataplane::ids::DiskUuid;
use unibody_dataplane::mirror::Phase;

const SIZE: u64 = 64 << 20;
const BLOCK: usize = 4096;
/// Bytes of a write's frame without its data, and of its answer.
const FRAME: usize = 64 + 12;
const ANSWER: usize = 64;

fn pin(core: usize) {
    // SAFETY: a set of cores is plain data, and it lives over the call.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
    }
}

/// Does all of it without ever sleeping, as a reactor that polls. False: the other end has gone.
fn spin(len: usize, mut some: impl FnMut(usize) -> std::io::Result<usize>) -> bool {
    let mut at = 0;
    while at < len {
        match some(at) {
            Ok(0) => return false,
            Ok(done) => at += done,
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::hint::spin_loop(),
            Err(_) => return false,
        }
    }
    true
}

fn take(socket: &mut TcpStream, room: &mut [u8]) -> bool {
    spin(room.len(), |at| socket.read(&mut room[at..]))
}

fn give(socket: &mut TcpStream, bytes: &[u8]) -> bool {
    spin(bytes.len(), |at| socket.write(&bytes[at..]))
}

fn ready(socket: &TcpStream) {
    socket.set_nodelay(true).unwrap();
    socket.set_nonblocking(true).unwrap();
}

/// Microseconds for a request and its answer with a block written to memory at both ends. At a depth above one, requests
/// go out together and so do their answers.
fn bare(depth: usize, count: usize) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let far = std::thread::spawn(move || {
        pin(0);
        let (mut socket, _) = listener.accept().unwrap();
        ready(&socket);
        let mut disk = vec![1u8; SIZE as usize];
        let mut room = vec![0; depth * (FRAME + BLOCK)];
        let answers = vec![7; depth * ANSWER];
        let mut at = 0;
        while take(&mut socket, &mut room) {
            for frame in room.chunks(FRAME + BLOCK) {
                at = (at + 7919) % (disk.len() / BLOCK);
                disk[at * BLOCK..][..BLOCK].copy_from_slice(&frame[FRAME..]);
            }
            if !give(&mut socket, &answers) {
                break;
            }
        }
        black_box(disk);
    });
    let near = std::thread::spawn(move || {
        pin(1);
        let mut socket = TcpStream::connect(address).unwrap();
        ready(&socket);
        let mut disk = vec![1u8; SIZE as usize];
        let frames = vec![5; depth * (FRAME + BLOCK)];
        let mut answers = vec![0; depth * ANSWER];
        let windows = count / depth;
        let begun = Instant::now();
        for window in 0..windows {
            assert!(give(&mut socket, &frames));
            for n in 0..depth {
                let at = (window * depth + n) * 7919 % (disk.len() / BLOCK);
                disk[at * BLOCK..][..BLOCK].copy_from_slice(&frames[..BLOCK]);
            }
            assert!(take(&mut socket, &mut answers));
        }
        let each = begun.elapsed().as_secs_f64() * 1e6 / (windows * depth) as f64;
        black_box(disk);
        each
    });
    let each = near.join().unwrap();
    far.join().unwrap();
    each
}

/// Microseconds for a write as the guest sees it.
fn mirrored(client: &mut Client, depth: usize, count: usize) -> f64 {
    let blocks = SIZE as usize / BLOCK;
    let begun = Instant::now();
    client.run_at(depth, count, |n| (true, n * 7919 % blocks, 1), |_| ());
    begun.elapsed().as_secs_f64() * 1e6 / count as f64
}

fn median(mut runs: Vec<f64>) -> f64 {
    runs.sort_by(f64::total_cmp);
    runs[runs.len() / 2]
}

/// The same volume with its second replica on another node, or on this one.
fn volume(far: bool, depth: usize, runs: usize, count: usize) -> (f64, f64) {
    let cluster = Cluster::new(SIZE, &[DiskUuid(1), DiskUuid(2)]);
    // The owner's reactor is on core 1, the other node's on core 0.
    let nodes = [Node::start(1, &cluster, 1), Node::start(2, &cluster, 1)];
    for uuid in 1..=2 {
        let (up, service) = memory_disk(uuid, u128::from(uuid), 7);
        let node = if far { usize::from(uuid) - 1 } else { 0 };
        nodes[node].plane.add_disk(up, service).unwrap();
    }
    nodes[0].plane.add_node(nodes[1].id).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut device = nodes[0].serve_to(&cluster, Vec::new(), dir.path(), false);
    until("both replicas in sync", || {
        let status = nodes[0].volume();
        status.phase == Phase::Serving && status.in_sync == 2
    });
    mirrored(device.client(), 32, SIZE as usize / BLOCK);
    let (mut ours, mut least) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        ours.push(mirrored(device.client(), depth, count));
        if far {
            least.push(bare(depth, count));
        } else {
            least.push(0.0);
        }
    }
    (median(ours), median(least))
}

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let (runs, count) = if quick { (3, 4_000) } else { (7, 30_000) };
    println!("| depth | both replicas here, us | one on another node, us | bare round trip + memory, us |");
    println!("| --- | --- | --- | --- |");
    for depth in [1, 32] {
        let (near, _) = volume(false, depth, runs, count);
        let (far, least) = volume(true, depth, runs, count);
        println!("| {depth} | {near:.1} | {far:.1} | {least:.1} |");
    }
}
