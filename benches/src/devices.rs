//! A thousand devices attached to one process, eight of them busy: what do the idle ones cost?

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use blkio::{Blkio, MemoryRegion};

use crate::servers::{self, Server};
use crate::{Args, Measure, load, spread};

const BUSY: usize = 8;
const IDLE: usize = 1000;

/// An attached device that does nothing.
struct Idle {
    _blkio: Blkio,
    _queue: blkio::Blkioq,
    _memory: MemoryRegion,
}

fn attach(socket: &Path) -> Result<Idle> {
    let mut blkio = Blkio::new("virtio-blk-vhost-user")?;
    blkio.set_str("path", socket.to_str().context("a path in UTF-8")?)?;
    blkio.connect()?;
    blkio.set_i32("num-queues", 1)?;
    let mut started = blkio.start()?;
    let memory = blkio.alloc_mem_region(4096)?;
    blkio.map_mem_region(&memory)?;
    let queue = started.queues.pop().context("a queue")?;
    Ok(Idle {
        _blkio: blkio,
        _queue: queue,
        _memory: memory,
    })
}

fn start(args: &Args, devices: usize) -> Result<(Server, Vec<PathBuf>)> {
    let dir = std::env::temp_dir().join(format!("unibody-bench-devices-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let sockets: Vec<PathBuf> = (0..devices).map(|n| dir.join(format!("{n}.sock"))).collect();
    let mut flags = vec!["--disk".to_owned(), "mem:24G".to_owned()];
    for (number, socket) in sockets.iter().enumerate() {
        flags.push("--volume".into());
        flags.push(format!(
            "d{number},size=16M,mirror=1,width=1,socket={}",
            socket.display()
        ));
    }
    let server = servers::unibody(args, &flags, dir.join("none.sock"), vec![dir.clone()])?;
    Ok((server, sockets))
}

/// Resident memory of a process, KiB.
fn resident(pid: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS"))
        .context("VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("a number")?.parse()?)
}

/// CPU time of a process, seconds.
fn cpu(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .context("stat")?
        .1
        .split_whitespace()
        .collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}

fn busy(args: &Args, sockets: &[PathBuf]) -> Result<f64> {
    let seconds = args.seconds.to_string();
    load(args, sockets, &["--fill", "--bs", "64K"])?;
    let flags = [
        "--rw",
        "randread",
        "--bs",
        "4K",
        "--iodepth",
        "32",
        "--runtime",
        &seconds,
    ];
    Measure::Iops.of(&load(args, sockets, &flags)?, "randread")
}

pub(crate) fn measure(args: &Args) -> Result<Vec<String>> {
    let (mut alone, mut among, mut memory, mut idle_cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.runs.max(1) {
        let (server, sockets) = start(args, BUSY)?;
        alone.push(busy(args, &sockets)?);
        drop(server);

        let (server, sockets) = start(args, BUSY + IDLE)?;
        let before = resident(server.pid())?;
        let idle = sockets[BUSY..]
            .iter()
            .map(|socket| attach(socket))
            .collect::<Result<Vec<_>>>()
            .context("attaching idle devices")?;
        // Including what each volume cost before anybody attached.
        let (few, _sockets) = (resident(server.pid())?, &sockets);
        memory.push((few - before) / IDLE as f64);
        std::thread::sleep(Duration::from_secs(1));
        let (seconds, start) = (args.seconds.max(2.0), cpu(server.pid())?);
        std::thread::sleep(Duration::from_secs_f64(seconds));
        idle_cpu.push((cpu(server.pid())? - start) / seconds * 100.0);
        among.push(busy(args, &sockets[..BUSY])?);
        drop(idle);
    }
    let ((a, a_text), (b, b_text)) = (spread(&mut among), spread(&mut alone));
    let ((kib, kib_text), (percent, percent_text)) = (spread(&mut memory), spread(&mut idle_cpu));
    let verdict = |reached: bool| if reached { "reached" } else { "missed" };
    Ok(vec![
        format!(
            "| 8 busy at depth 32 among 1,000 devices, random read | IOPS | {a_text} | {b_text} (the 8 alone) | {:.2} | 0.9 | {} |\n",
            a / b,
            verdict(a / b >= 0.9)
        ),
        format!(
            "| resident memory of an idle device, when attached | KiB | {kib_text} | | | 64 | {} |\n",
            verdict(kib <= 64.0)
        ),
        format!(
            "| all 1,000 idle | % of a core | {percent_text} | | | 1 | {} |\n",
            verdict(percent < 1.0)
        ),
    ])
}
