//! `unibody demo`: the main job on this machine in a minute, told as it happens.
//!
//! It runs the same program a user would (`unibody serve` as a child), on four disk files in a directory of its own, and
//! fails if anything that it promises does not hold.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use unibody_control::admin::{NodeStatus, Request, VolumeStatus, call};
use unibody_vmm_adapter::{RuntimeRoot, VmSpec, Vmm, VmmKind, guest};

use crate::bench::client::Client;
use crate::bench::stamp;

const DISKS: usize = 4;
const DISK_BYTES: u64 = 1 << 30;
/// The part of the volume that is loaded, bytes: enough to see, little enough to verify in a moment.
const SPAN: u64 = 192 << 20;
const SEED: u64 = 0x5eed;
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Args)]
pub(crate) struct DemoArgs {
    /// Where to put disks and state [default: a fresh directory, removed at the end].
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Core for the data plane's reactor.
    #[arg(long, default_value_t = 0)]
    core: usize,
}

/// The demo's node: a child process, killed when the demo ends early.
struct NodeProcess {
    child: Child,
    dir: PathBuf,
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl NodeProcess {
    fn start(dir: &Path, core: usize) -> Result<Self> {
        let program = std::env::current_exe().context("this program can not find itself")?;
        let mut command = Command::new(program);
        command
            .arg("serve")
            .args(["--cores", &core.to_string()])
            .arg("--state")
            .arg(dir.join("state"));
        for disk in 0..DISKS {
            command.arg("--disk").arg(disk_path(dir, disk));
        }
        let demo = format!("demo,size=1G,mirror=2,socket={}", dir.join("demo.sock").display());
        let vm = format!("vm,size=64M,mirror=2,socket={}", dir.join("vm.sock").display());
        command
            .args(["--volume", &demo, "--volume", &vm])
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn().context("the node can not be started")?;
        let output = child.stdout.take().context("the node has no output")?;
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut line)?;
        let node = NodeProcess {
            child,
            dir: dir.to_path_buf(),
        };
        ensure!(
            line.trim() == "ready",
            "the node did not start; run `unibody serve` by hand to see why"
        );
        Ok(node)
    }

    fn ask(&self, request: &Request) -> Result<serde_json::Value> {
        Ok(call(&self.dir.join("state/control.sock"), request)?)
    }

    fn status(&self) -> Result<NodeStatus> {
        Ok(serde_json::from_value(self.ask(&Request::Status)?)?)
    }

    /// Waits until every replica is in sync and nothing is left to compare; how long that took.
    fn heal(&self) -> Result<Duration> {
        let start = Instant::now();
        loop {
            let status = self.status()?;
            let whole = |volume: &VolumeStatus| {
                volume.state == "healthy" && volume.regions_to_heal == 0 && volume.in_sync == volume.replicas
            };
            if status.volumes.iter().all(whole) {
                return Ok(start.elapsed());
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "redundancy did not come back: {:?}",
                status.volumes
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn stop(mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "the node did not end cleanly: {status}");
        Ok(())
    }
}

fn disk_path(dir: &Path, disk: usize) -> PathBuf {
    dir.join(format!("disk{disk}.img"))
}

/// A load in the background: random stamped writes and checked reads. What was acknowledged is remembered.
struct Load {
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    thread: JoinHandle<Result<Written>>,
}

/// For each block of the span the sequence number of its last acknowledged write.
struct Written {
    blocks: Vec<u64>,
    longest: Duration,
}

impl Load {
    fn start(socket: &Path) -> Result<Self> {
        const DEPTH: usize = 16;
        let mut client = Client::connect(socket, DEPTH, DEPTH * stamp::BLOCK)?;
        let (stop, requests) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ask, count) = (Arc::clone(&stop), Arc::clone(&requests));
        let thread = std::thread::spawn(move || {
            let mut written = Written {
                blocks: vec![0; (SPAN / stamp::BLOCK as u64) as usize],
                longest: Duration::ZERO,
            };
            let mut busy = vec![false; written.blocks.len()];
            let mut flights = vec![(0usize, 0u64, Instant::now()); DEPTH];
            let mut idle: Vec<usize> = (0..DEPTH).collect();
            let (mut random, mut sequence) = (SEED, 0u64);
            let mut done = Vec::new();
            loop {
                let stopping = ask.load(Ordering::Relaxed);
                if stopping && idle.len() == DEPTH {
                    return Ok(written);
                }
                while let (false, Some(&tag)) = (stopping, idle.last()) {
                    random = random
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    let block = (random >> 33) as usize % busy.len();
                    if busy[block] {
                        continue;
                    }
                    idle.pop();
                    busy[block] = true;
                    let at = (block * stamp::BLOCK) as u64;
                    let write = random >> 63 == 0 || written.blocks[block] == 0;
                    if write {
                        sequence += 1;
                        stamp::fill(
                            client.memory(tag * stamp::BLOCK, stamp::BLOCK),
                            at,
                            sequence,
                            SEED,
                        );
                        client.write(at, tag * stamp::BLOCK, stamp::BLOCK, tag);
                    } else {
                        client.read(at, tag * stamp::BLOCK, stamp::BLOCK, tag);
                    }
                    flights[tag] = (block, if write { sequence } else { 0 }, Instant::now());
                }
                done.clear();
                client.poll(|tag, result| done.push((tag, result)))?;
                for &(tag, result) in &done {
                    let (block, sequence, began) = flights[tag];
                    ensure!(result == 0, "the volume answered with an I/O error");
                    if sequence > 0 {
                        written.blocks[block] = sequence;
                    } else {
                        let at = (block * stamp::BLOCK) as u64;
                        let found = stamp::check(client.memory(tag * stamp::BLOCK, stamp::BLOCK), at, SEED);
                        ensure!(found == Some(written.blocks[block]), "wrong data at byte {at}");
                    }
                    written.longest = written.longest.max(began.elapsed());
                    busy[block] = false;
                    idle.push(tag);
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Load {
            stop,
            requests,
            thread,
        })
    }

    fn so_far(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    fn finish(self) -> Result<Written> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the load died"))?
    }
}

/// The VMMs of this machine, to boot the tiny guest on the volume `vm` with.
struct Vms {
    there: Vec<Box<dyn Vmm>>,
    /// Why the others are not used.
    missing: Vec<String>,
    dir: PathBuf,
    runs: usize,
}

/// The VM's name, and the volume's.
const VM: &str = "vm";

impl Drop for Vms {
    fn drop(&mut self) {
        for vmm in &self.there {
            // It runs under one of them at most, and under none if all went well.
            vmm.kill(VM).ok();
        }
    }
}

impl Vms {
    fn find(dir: &Path) -> Result<Self> {
        let mut vms = Vms {
            there: Vec::new(),
            missing: Vec::new(),
            dir: dir.to_path_buf(),
            runs: 0,
        };
        let root = RuntimeRoot::new(dir.join("run"));
        for vmm in VmmKind::ALL.map(|kind| kind.adapter(root.clone())) {
            match vmm.probe() {
                Ok(_) => vms.there.push(vmm),
                Err(error) => vms.missing.push(error.to_string()),
            }
        }
        std::fs::write(dir.join("guest"), guest::KERNEL)?;
        Ok(vms)
    }

    /// Boots the guest, each time under the next VMM, to write to the volume or to verify what was written there. What
    /// happened, or why nothing did.
    fn run(&mut self, work: &str) -> Result<String> {
        if guest::KERNEL.is_empty() {
            return Ok("no VM: the demo's guest was not built, for want of gcc and ld".into());
        }
        let Some(vmm) = self.there.get(self.runs % self.there.len().max(1)) else {
            return Ok(format!("no VM: {}", self.missing.join("; ")));
        };
        self.runs += 1;
        let log = self.dir.join(format!("{work}.serial"));
        let show = |name: &str| toml::Value::String(self.dir.join(name).display().to_string());
        let spec = VmSpec::parse(&format!(
            "name = '{VM}'\nmemory = '64M'\nserial_log = {}\n[boot]\nkernel = {}\ncmdline = '{work} demo'\n[[volumes]]\n\
             name = 'root'\nsocket = {}\n",
            show(&format!("{work}.serial")),
            show("guest"),
            show("vm.sock"),
        ))?;
        vmm.start(&spec)?;
        let end = Instant::now() + PATIENCE;
        let said = loop {
            if let Some(said) = guest::verdict(&log) {
                break said;
            }
            ensure!(
                Instant::now() < end,
                "the guest says nothing in {}",
                log.display()
            );
            std::thread::sleep(Duration::from_millis(20));
        };
        let said = said.map_err(|said| anyhow::anyhow!("the guest found: {said}"))?;
        vmm.kill(VM)?;
        Ok(format!("a VM under {}: {said}", vmm.kind()))
    }
}

/// Reads everything that was written back and compares.
fn verify(socket: &Path, written: &Written) -> Result<usize> {
    let mut client = Client::connect(socket, 1, stamp::BLOCK)?;
    let mut checked = 0;
    for (block, &sequence) in written
        .blocks
        .iter()
        .enumerate()
        .filter(|(_, sequence)| **sequence > 0)
    {
        let at = (block * stamp::BLOCK) as u64;
        client.read(at, 0, stamp::BLOCK, 0);
        client.finish(1)?;
        let found = stamp::check(client.memory(0, stamp::BLOCK), at, SEED);
        ensure!(
            found == Some(sequence),
            "the block at byte {at} is not what was written last: {found:?}, not {sequence}"
        );
        checked += 1;
    }
    Ok(checked)
}

pub(crate) fn run(args: DemoArgs) -> Result<()> {
    let fresh = args.dir.is_none();
    let dir = match args.dir {
        Some(dir) => dir,
        None => std::env::temp_dir().join(format!("unibody-demo-{}", std::process::id())),
    };
    std::fs::create_dir_all(&dir).with_context(|| format!("{} can not be made", dir.display()))?;
    let result = play(&dir, args.core);
    if fresh {
        std::fs::remove_dir_all(&dir).ok();
    }
    result
}

fn play(dir: &Path, core: usize) -> Result<()> {
    let start = Instant::now();
    let say = |text: String| println!("[{:6.2} s] {text}", start.elapsed().as_secs_f64());
    for disk in 0..DISKS {
        unibody_control::node::format_disk(&disk_path(dir, disk), Some(DISK_BYTES), None, true)?;
    }
    say(format!("formatted {DISKS} disks of 1 GiB in {}", dir.display()));
    let socket = dir.join("demo.sock");
    let node = NodeProcess::start(dir, core)?;
    say("a node serves a volume of 1 GiB: two copies of everything, striped over the four disks".into());

    let mut vms = Vms::find(dir)?;
    say(vms.run("write")?);

    let load = Load::start(&socket)?;
    std::thread::sleep(Duration::from_secs(2));
    say(format!(
        "a client writes and checks at random: {} requests so far",
        load.so_far()
    ));

    let name = disk_path(dir, 1).display().to_string();
    node.ask(&Request::DiskFail { disk: name.clone() })?;
    std::thread::sleep(Duration::from_secs(1));
    let volumes = node.status()?.volumes;
    let volume = volumes.iter().find(|volume| volume.name == "demo");
    let state = volume.context("the volume is gone")?.state.clone();
    ensure!(
        state == "degraded",
        "a disk was taken away, and the volume is {state}"
    );
    say(format!(
        "disk 1 was taken away under load; the volume is {state} and goes on: {} requests",
        load.so_far()
    ));

    return_disk(&node, &name)?;
    let took = node.heal()?;
    say(format!(
        "disk 1 is back and got what it missed in {:.2} s, under load",
        took.as_secs_f64()
    ));

    let name = disk_path(dir, 2).display().to_string();
    node.ask(&Request::DiskFail { disk: name.clone() })?;
    let spare = dir.join("spare.img");
    unibody_control::node::format_disk(&spare, Some(DISK_BYTES), None, true)?;
    replace(&node, &name, &spare)?;
    let took = node.heal()?;
    say(format!(
        "disk 2 died for good; an empty one took its place and got everything in {:.2} s",
        took.as_secs_f64()
    ));
    std::fs::rename(&spare, disk_path(dir, 2))?;

    let written = load.finish()?;
    let checked = verify(&socket, &written)?;
    say(format!(
        "the load ends without an error; its longest request took {:.0} ms; {checked} blocks verified",
        written.longest.as_secs_f64() * 1000.0
    ));

    drop(node);
    say("the node is killed (SIGKILL)".into());
    let node = NodeProcess::start(dir, core)?;
    let checked = verify(&socket, &written)?;
    say(format!("started again: {checked} blocks verified"));
    say(vms.run("verify")?);
    node.heal()?;
    node.stop()?;
    for disk in 0..DISKS {
        let report = unibody_control::node::check_disk(&disk_path(dir, disk), &mut |_, _| {})?;
        if report.findings_total > 0 {
            bail!(
                "disk {disk}: {} findings, the first: {}",
                report.findings_total,
                report.findings[0]
            );
        }
    }
    say("the node ended cleanly; all disks pass an offline check".into());
    Ok(())
}

/// A disk that was taken away is let go only when its last I/O has ended.
fn return_disk(node: &NodeProcess, name: &str) -> Result<()> {
    again(|| {
        node.ask(&Request::DiskReturn {
            disk: name.to_owned(),
        })
        .map(drop)
    })
}

fn replace(node: &NodeProcess, name: &str, spare: &Path) -> Result<()> {
    let spec = spare.display().to_string();
    again(|| {
        node.ask(&Request::DiskReplace {
            disk: name.to_owned(),
            spec: spec.clone(),
        })
        .map(drop)
    })
}

fn again(mut call: impl FnMut() -> Result<()>) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match call() {
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(20)),
            result => return result,
        }
    }
}
