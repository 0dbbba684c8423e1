//! One node by itself (`unibody serve`) on four disk files: disks fail, return and are replaced under load, the node is killed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use unibody_control::admin::{NodeStatus, Request, call};
use unibody_vmm_adapter::{RuntimeRoot, VmSpec, Vmm, VmmKind, guest};

use super::load::Load;
use super::process::{self, Process};
use super::{Story, check_disk, guest_says, wait, whole};

const DISKS: usize = 4;
const DISK_BYTES: u64 = 1 << 30;

/// The demo's node.
struct Node {
    process: Process,
    dir: PathBuf,
}

impl Node {
    fn start(dir: &Path, core: usize) -> Result<Self> {
        let text = |name: &str| dir.join(name).display().to_string();
        let mut arguments = vec!["serve".to_owned(), "--cores".to_owned(), core.to_string()];
        arguments.extend(["--state".to_owned(), text("state")]);
        for disk in 0..DISKS {
            arguments.extend(["--disk".to_owned(), disk_path(dir, disk).display().to_string()]);
        }
        for (name, size) in [("demo", "1G"), ("vm", "64M")] {
            let socket = text(&format!("{name}.sock"));
            arguments.extend([
                "--volume".to_owned(),
                format!("{name},size={size},mirror=2,socket={socket}"),
            ]);
        }
        let mut process = Process::start(arguments.iter().map(String::as_str), &dir.join("node.log"))?;
        process.ready()?;
        Ok(Node {
            process,
            dir: dir.to_path_buf(),
        })
    }

    fn ask(&self, request: &Request) -> Result<serde_json::Value> {
        Ok(call(&self.dir.join("state/control.sock"), request)?)
    }

    fn status(&self) -> Result<NodeStatus> {
        Ok(serde_json::from_value(self.ask(&Request::Status)?)?)
    }

    /// Waits until every replica is in sync and nothing is left to compare; how long that took.
    fn heal(&self) -> Result<Duration> {
        let (took, ()) = wait("redundancy is back", || {
            Ok(self.status()?.volumes.iter().all(whole).then_some(()))
        })?;
        Ok(took)
    }

    fn stop(self) -> Result<()> {
        self.process.terminate()?;
        self.process.ended()
    }
}

fn disk_path(dir: &Path, disk: usize) -> PathBuf {
    dir.join(format!("disk{disk}.img"))
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

impl Vms {
    fn find(dir: &Path) -> Self {
        let mut vms = Vms {
            there: Vec::new(),
            missing: Vec::new(),
            dir: dir.to_path_buf(),
            runs: 0,
        };
        let root = RuntimeRoot::new(dir.join("run"));
        process::own_vms(root.path());
        for vmm in VmmKind::ALL.map(|kind| kind.adapter(root.clone())) {
            match vmm.probe() {
                Ok(_) => vms.there.push(vmm),
                Err(error) => vms.missing.push(error.to_string()),
            }
        }
        vms
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
        let said = guest_says(&log)?;
        vmm.kill(VM)?;
        Ok(format!("a VM under {}: {said}", vmm.kind()))
    }
}

pub(super) fn play(dir: &Path, core: usize, story: &Story) -> Result<()> {
    let say = |text: String| story.say(text);
    for disk in 0..DISKS {
        unibody_control::node::format_disk(&disk_path(dir, disk), Some(DISK_BYTES), None, true)?;
    }
    say(format!("formatted {DISKS} disks of 1 GiB in {}", dir.display()));
    let socket = dir.join("demo.sock");
    let node = Node::start(dir, core)?;
    say("a node serves a volume of 1 GiB: two copies of everything, striped over the four disks".into());

    let mut vms = Vms::find(dir);
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
    let checked = written.verify(&socket)?;
    say(format!(
        "the load ends without an error; its longest request took {:.0} ms; {checked} blocks verified",
        written.longest_ms()
    ));

    node.process.kill()?;
    say("the node is killed (SIGKILL)".into());
    let node = Node::start(dir, core)?;
    let checked = written.verify(&socket)?;
    say(format!("started again: {checked} blocks verified"));
    say(vms.run("verify")?);
    node.heal()?;
    node.stop()?;
    for disk in 0..DISKS {
        check_disk(&disk_path(dir, disk))?;
    }
    say("the node ended cleanly; all disks pass an offline check".into());
    Ok(())
}

/// A disk that was taken away is let go only when its last I/O has ended.
fn return_disk(node: &Node, name: &str) -> Result<()> {
    again(|| {
        node.ask(&Request::DiskReturn {
            disk: name.to_owned(),
        })
        .map(drop)
    })
}

fn replace(node: &Node, name: &str, spare: &Path) -> Result<()> {
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
