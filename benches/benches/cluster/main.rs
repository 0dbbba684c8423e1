//! A cluster of three nodes on loopback beside what its way costs at least, and beside Ceph where that is installed: latency of
//! single writes, and what a second of processor time of all daemons is good for.
//!
//! Disks are files on tmpfs on both sides, two copies of everything. `--quick` shows that it works; nothing is to be quoted from
//! that. What the figures say: `benches/README.md`.

mod ceph;
mod unibody;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use unibody_dataplane::reactor::pin::spawn_pinned;

/// Bytes that are written and read, of a volume of twice the size.
pub(crate) const SPAN: u64 = 512 << 20;
const BLOCK: usize = 4096;
/// Bytes of a write's frame without its data, and of its answer.
const FRAME: usize = 64 + 12;
const ANSWER: usize = 64;

/// One kind of load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    /// As fio calls it.
    pub(crate) rw: &'static str,
    pub(crate) depth: u32,
    pub(crate) seconds: f64,
}

/// What came of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) iops: f64,
    /// Median latency, microseconds.
    pub(crate) p50: f64,
    /// Requests for each second of processor time of all daemons.
    pub(crate) each: f64,
}

/// A cluster with a volume, filled, that can be put under load.
pub(crate) trait Contender {
    /// Runs a load. The client's processor time is not counted.
    fn run(&mut self, work: Work) -> Outcome;
    /// Processes of all daemons.
    fn daemons(&self) -> Vec<u32>;
}

/// Processor time of processes so far, seconds.
pub(crate) fn processor_seconds(processes: &[u32]) -> f64 {
    let ticks = |pid: &u32| -> f64 {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the daemon runs");
        let (_, fields) = text.rsplit_once(')').expect("a name in parentheses");
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let number = |at: usize| fields[at].parse::<f64>().expect("a number of ticks");
        number(11) + number(12)
    };
    // The unit of these files is the same on all of Linux.
    processes.iter().map(ticks).sum::<f64>() / 100.0
}

fn resident_mib(processes: &[u32]) -> f64 {
    let pages = |pid: &u32| -> f64 {
        let text = fs::read_to_string(format!("/proc/{pid}/statm")).expect("the daemon runs");
        let field = text.split(' ').nth(1).expect("resident pages");
        field.parse().expect("a number of pages")
    };
    processes.iter().map(pages).sum::<f64>() * 4096.0 / f64::from(1 << 20)
}

/// Microseconds of a request and its answer over TCP between two threads that sleep until something comes, the one on core 0
/// and the other on `far_core`.
fn round_trip(count: u32, far_core: usize) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it is bound");
    let far = spawn_pinned("far", far_core, move || {
        let (mut socket, _) = listener.accept().expect("the other thread connects");
        socket.set_nodelay(true).expect("it is TCP");
        let mut room = [0; FRAME + BLOCK];
        while socket.read_exact(&mut room).is_ok() {
            socket
                .write_all(&[7; ANSWER])
                .expect("the other thread waits for it");
        }
    });
    let near = spawn_pinned("near", 0, move || {
        let mut socket = TcpStream::connect(address).expect("it listens");
        socket.set_nodelay(true).expect("it is TCP");
        let mut answer = [0; ANSWER];
        let begun = Instant::now();
        for _ in 0..count {
            socket
                .write_all(&[5; FRAME + BLOCK])
                .expect("the other thread reads");
            socket.read_exact(&mut answer).expect("the other thread answers");
        }
        begun.elapsed().as_secs_f64() * 1e6 / f64::from(count)
    });
    let each = near.expect("core 0 can be used").join();
    far.expect("the core can be used")
        .join()
        .expect("it ends with the connection");
    each.expect("every request is answered")
}

/// Microseconds of a write of a block to a file like the nodes' disks.
fn device_write(dir: &Path, count: u32) -> f64 {
    let path = dir.join("device");
    let file = File::create(&path).expect("the directory can be written");
    file.set_len(SPAN).expect("there is room");
    let at = |n: u32| u64::from(n) * 7919 % (SPAN / BLOCK as u64) * BLOCK as u64;
    // As on the disks, what is measured was written before.
    for n in 0..count {
        file.write_all_at(&[1; BLOCK], at(n)).expect("there is room");
    }
    let begun = Instant::now();
    for n in 0..count {
        file.write_all_at(&[2; BLOCK], at(n)).expect("there is room");
    }
    let each = begun.elapsed().as_secs_f64() * 1e6 / f64::from(count);
    fs::remove_file(path).expect("it was made here");
    each
}

/// Median and spread.
fn of(mut runs: Vec<f64>) -> (f64, String) {
    runs.sort_by(f64::total_cmp);
    let median = runs[runs.len() / 2];
    let digits = usize::from(median < 1000.0);
    let text = format!(
        "{median:.digits$} [{:.digits$} - {:.digits$}]",
        runs[0],
        runs[runs.len() - 1]
    );
    (median, text)
}

fn main() {
    let quick = std::env::args().any(|arg| arg == "--quick");
    let (runs, seconds, count) = if quick { (1, 1.0, 5_000) } else { (5, 4.0, 50_000) };
    let dir = tempfile::tempdir_in("/dev/shm").expect("tmpfs is there");
    let mut ours = unibody::Nodes::start(dir.path());
    let mut theirs = ceph::Ceph::start(dir.path());
    if theirs.is_none() {
        println!(
            "Ceph (ceph-mon, ceph-mgr, ceph-osd, and fio with its engine rbd) is not installed: no comparison with it\n"
        );
    }
    let (mut bare, mut apart, mut single) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..runs {
        let write = device_write(dir.path(), count);
        bare.push(round_trip(count, 0) + write);
        apart.push(round_trip(count, 1) + write);
        let work = Work {
            rw: "randwrite",
            depth: 1,
            seconds,
        };
        single.push(ours.run(work).p50);
    }
    println!("| work | unit | Unibody | peer | ratio | target |");
    println!("| --- | --- | --- | --- | --- | --- |");
    let (ours_us, ours_text) = of(single);
    for (bare, place) in [(bare, "on one core, as the nodes"), (apart, "between two cores")] {
        let (bare_us, bare_text) = of(bare);
        println!(
            "| random write, depth 1 | us (p50) | {ours_text} | {bare_text} (a round trip {place}, and a write) | {:.2} | at most 1.5 |",
            ours_us / bare_us
        );
    }
    for (rw, depth, target) in [
        ("randwrite", 1, ""),
        ("randread", 1, ""),
        ("randwrite", 32, "30"),
        ("randread", 32, "15"),
    ] {
        let work = Work { rw, depth, seconds };
        let (mut mine, mut other) = (Vec::new(), Vec::new());
        for _ in 0..runs {
            mine.push(ours.run(work));
            other.extend(theirs.as_mut().map(|ceph| ceph.run(work)));
        }
        let row = |unit: &str, field: fn(&Outcome) -> f64, target: &str| {
            let (median, text) = of(mine.iter().map(field).collect());
            let (peer, ratio) = match other.is_empty() {
                true => (String::new(), String::new()),
                false => {
                    let (theirs, text) = of(other.iter().map(field).collect());
                    (format!("{text} (Ceph)"), format!("{:.2}", median / theirs))
                }
            };
            println!("| {rw}, depth {depth} | {unit} | {text} | {peer} | {ratio} | {target} |");
        };
        row("IOPS", |outcome| outcome.iops, "");
        row(
            "requests per processor second of all daemons",
            |outcome| outcome.each,
            target,
        );
    }
    let resident = |daemons: Vec<u32>| resident_mib(&daemons);
    let mine = resident(ours.daemons());
    let other = theirs.as_ref().map(|ceph| resident(ceph.daemons()));
    let peer = other.map_or(String::new(), |mib| format!("{mib:.0} (Ceph)"));
    let ratio = other.map_or(String::new(), |mib| format!("{:.2}", mine / mib));
    println!("| resident memory of all daemons | MiB | {mine:.0} | {peer} | {ratio} | at most 0.25 |");
}
