//! Three nodes on this machine, each with a port, a directory and a disk of its own. A client loads one volume, a VM lives on
//! another. First a node is killed that has nothing but copies, then the node of the VM; both come back.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use unibody_control::api::types::{Attached, ClusterStatus, NewVolume, OnNode, VmDefinition, VmSummary};
use unibody_vmm_adapter::{RuntimeRoot, VmmKind, find, guest};

use super::load::Load;
use super::process::{self, Process};
use super::{Story, check_disk, guest_says, wait, whole};
use crate::node::join_token;
use crate::target::{Client, runtime};

const NODES: usize = 3;
/// Sparse files: only what is written takes room.
const DISK_BYTES: u64 = 2 << 30;
/// The volume of the client, and that of the VM.
const DATA: &str = "data";
const ROOT: &str = "root";
/// The VM.
const VM: &str = "web1";

/// The nodes; `None` for one that was killed.
struct Cluster {
    dir: PathBuf,
    nodes: Vec<Option<Process>>,
    /// The API of the first node.
    client: Client,
}

fn name(node: usize) -> String {
    format!("n{}", node + 1)
}

impl Cluster {
    /// Founds one and waits until every node has a vote.
    fn found(dir: &Path, cores: &[usize]) -> Result<Self> {
        // All at once, so that they differ. Somebody else may take one before the node does, and the demo says so and ends.
        let listeners: Vec<_> = (0..NODES)
            .map(|_| TcpListener::bind("127.0.0.1:0"))
            .collect::<Result<_, _>>()?;
        let ports: Vec<_> = listeners
            .iter()
            .map(TcpListener::local_addr)
            .collect::<Result<_, _>>()?;
        drop(listeners);
        let start = |node: usize, how: &[&str]| {
            let text = |path: PathBuf| path.display().to_string();
            let (name, listen, disk) = (name(node), ports[node].to_string(), text(disk(dir, node)));
            let (home, core) = (text(home(dir, node)), cores[node % cores.len()].to_string());
            let flags = [
                "--dir", &home, "--name", &name, "--listen", &listen, "--disk", &disk,
            ];
            let more = ["--memory", "256M", "--cores", &core];
            let all = [&["node"], how, &flags, &more].concat();
            Process::start(all, &log(dir, node))
        };
        for node in 0..NODES {
            process::own_vms(&runtime(&home(dir, node)));
        }
        let mut first = start(0, &["init"])?;
        first.ready()?;
        let token = join_token(&home(dir, 0))?.to_string();
        let mut nodes = vec![first];
        for node in 1..NODES {
            nodes.push(start(node, &["join", &token])?);
        }
        nodes[1..].iter_mut().try_for_each(Process::ready)?;
        let cluster = Cluster {
            dir: dir.to_path_buf(),
            nodes: nodes.into_iter().map(Some).collect(),
            client: Client::of(&home(dir, 0))?,
        };
        wait("all nodes are voters", || {
            let status = cluster.client.status()?;
            let votes = |role: &str| matches!(role, "leader" | "voter");
            let ready = status
                .nodes
                .iter()
                .filter(|node| node.alive && votes(&node.role))
                .count()
                == NODES;
            let disks = status
                .disks
                .iter()
                .filter(|disk| disk.disk.state == "online")
                .count()
                == NODES;
            Ok((ready && disks).then_some(()))
        })?;
        Ok(cluster)
    }

    fn kill(&mut self, node: usize) -> Result<()> {
        self.nodes[node].take().context("it is dead already")?.kill()
    }

    fn restart(&mut self, node: usize) -> Result<()> {
        let home = home(&self.dir, node).display().to_string();
        let mut process = Process::start(["node", "run", "--dir", &home], &log(&self.dir, node))?;
        process.ready()?;
        self.nodes[node] = Some(process);
        Ok(())
    }

    /// A volume with two copies of everything, attached to a node; its socket there.
    fn volume(&self, name: &str, size: u64, node: usize) -> Result<PathBuf> {
        let new = NewVolume {
            name: name.into(),
            size,
            mirror: 2,
            stripe_unit: 256 << 10,
            stripe_width: None,
            read_only: false,
            near: Some(self::name(node)),
        };
        self.client.post::<()>("/v1/volumes", &new)?;
        let on = OnNode {
            node: Some(self::name(node)),
        };
        let attached: Attached = self.client.post(&format!("/v1/volumes/{name}/attach"), &on)?;
        Ok(attached.socket)
    }

    /// Waits until all nodes are there and nothing is left to be healed; how long that took.
    fn heal(&self) -> Result<Duration> {
        let (took, ()) = wait("redundancy is back", || {
            let status = self.client.status()?;
            let nodes = status.nodes.iter().all(|node| node.alive);
            let volumes = status.volumes.iter().all(|volume| whole(&volume.volume));
            Ok((nodes && volumes).then_some(()))
        })?;
        Ok(took)
    }

    fn vm(&self) -> Result<VmSummary> {
        let vms = self.client.status()?.vms;
        vms.into_iter().find(|vm| vm.name == VM).context("the VM is gone")
    }

    /// The node on which the VM runs, once it does.
    fn vm_runs(&self) -> Result<Option<String>> {
        let vm = self.vm()?;
        Ok(vm.node.filter(|_| vm.state == "running"))
    }

    /// Defines the VM and starts it; why not, if there is nothing to run it with.
    fn start_vm(&self, node: usize) -> Result<Result<String, String>> {
        if guest::KERNEL.is_empty() {
            return Ok(Err(
                "the demo's guest was not built, for want of gcc and ld".into()
            ));
        }
        let root = RuntimeRoot::new(self.dir.join("none"));
        let probes = VmmKind::ALL.map(|kind| kind.adapter(root.clone()).probe());
        if probes.iter().all(Result::is_err) {
            let missing: Vec<_> = probes
                .iter()
                .filter_map(|probe| Some(probe.as_ref().err()?.to_string()))
                .collect();
            return Ok(Err(missing.join("; ")));
        }
        let text = |path: PathBuf| toml::Value::String(path.display().to_string());
        let definition = format!(
            "name = '{VM}'\nmemory = '64M'\nserial_log = {}\n[boot]\nkernel = {}\ncmdline = 'live demo'\n[[volumes]]\nname = \
             '{ROOT}'\n",
            text(self.serial()),
            text(self.dir.join("guest")),
        );
        let path = format!("/v1/vms/{VM}");
        self.client.put::<()>(&path, &VmDefinition { definition })?;
        let on = OnNode {
            node: Some(name(node)),
        };
        self.client.post::<()>(&format!("{path}/start"), &on)?;
        wait("the VM runs", || self.vm_runs())?;
        guest_says(&self.serial()).map(Ok)
    }

    fn serial(&self) -> PathBuf {
        self.dir.join("serial")
    }

    /// Stops the VM for good. The guest may know no power button, so the plug is pulled too.
    fn stop_vm(&self) -> Result<()> {
        let node = self.vm()?.node.context("the VM is nowhere")?;
        self.client.post::<()>(&format!("/v1/vms/{VM}/stop"), &())?;
        let root = RuntimeRoot::new(runtime(&self.dir.join(node)));
        wait("the VM is stopped", || {
            if let Some(vmm) = find(&root, VM)? {
                vmm.kill(VM)?;
            }
            Ok((self.vm()?.state == "stopped").then_some(()))
        })?;
        Ok(())
    }

    fn stop(self) -> Result<()> {
        let nodes: Vec<_> = self.nodes.into_iter().flatten().collect();
        nodes.iter().try_for_each(Process::terminate)?;
        nodes.into_iter().try_for_each(Process::ended)
    }
}

fn home(dir: &Path, node: usize) -> PathBuf {
    dir.join(name(node))
}

fn disk(dir: &Path, node: usize) -> PathBuf {
    dir.join(format!("disk{}.img", node + 1))
}

fn log(dir: &Path, node: usize) -> PathBuf {
    dir.join(format!("n{}.log", node + 1))
}

/// What the state of a volume is.
fn state_of(status: &ClusterStatus, name: &str) -> Result<String> {
    let volume = status.volumes.iter().find(|volume| volume.volume.name == name);
    Ok(volume.context("the volume is gone")?.volume.state.clone())
}

pub(super) fn play(dir: &Path, cores: &[usize], story: &Story) -> Result<()> {
    for node in 0..NODES {
        unibody_control::node::format_disk(&disk(dir, node), Some(DISK_BYTES), None, true)?;
    }
    let mut cluster = Cluster::found(dir, cores)?;
    story.say(format_args!(
        "three nodes are a cluster, each a process with a port, a directory and a disk of 2 GiB, in {}",
        dir.display()
    ));
    let socket = cluster.volume(DATA, 512 << 20, 0)?;
    cluster.volume(ROOT, 64 << 20, 1)?;
    story.say("two volumes, striped over the nodes, two copies of everything: `data` on n1, `root` on n2");
    let vm = match cluster.start_vm(1)? {
        Ok(said) => {
            story.say(format_args!(
                "VM {VM} runs on n2, on volume `root`: its guest {said}"
            ));
            true
        }
        Err(why) => {
            story.say(format_args!("no VM: {why}"));
            false
        }
    };
    let load = Load::start(&socket)?;
    std::thread::sleep(Duration::from_secs(2));
    story.say(format_args!(
        "a client writes and checks `data` at random: {} requests so far",
        load.so_far()
    ));

    let before = load.so_far();
    cluster.kill(2)?;
    story.say("n3 is killed (SIGKILL) under load");
    let (took, ()) = wait("the volume goes on without the node", || {
        let degraded = state_of(&cluster.client.status()?, DATA)? == "degraded";
        Ok((degraded && load.so_far() > before + 1000).then_some(()))
    })?;
    let runs = match vm && cluster.vm_runs()?.is_some() {
        true => "; the VM runs on",
        false => "",
    };
    story.say(format_args!(
        "`data` is degraded and goes on, after {:.1} s: {} requests{runs}",
        took.as_secs_f64(),
        load.so_far()
    ));
    cluster.restart(2)?;
    let took = cluster.heal()?;
    story.say(format_args!(
        "n3 is back and got what it missed in {:.1} s, under load",
        took.as_secs_f64()
    ));

    // What the guest said before is not what it says next.
    std::fs::remove_file(cluster.serial()).ok();
    cluster.kill(1)?;
    story.say(if vm {
        "n2, the VM's node, is killed (SIGKILL)"
    } else {
        "n2 is killed (SIGKILL)"
    });
    if vm {
        let (took, node) = wait("the VM runs elsewhere", || {
            let node = cluster.vm_runs()?.filter(|node| *node != "n2");
            Ok(node.filter(|_| guest::verdict(&cluster.serial()).is_some()))
        })?;
        let said = guest_says(&cluster.serial())?;
        ensure!(
            said.starts_with("verified"),
            "the guest did not find its data again: it {said}"
        );
        story.say(format_args!(
            "the VM runs on {node} after {:.1} s, of which 7 make sure that it runs nowhere else: its guest {said}",
            took.as_secs_f64()
        ));
    }
    cluster.restart(1)?;
    let took = cluster.heal()?;
    story.say(format_args!(
        "n2 is back and got what it missed in {:.1} s, under load",
        took.as_secs_f64()
    ));
    if vm {
        let left_behind = RuntimeRoot::new(runtime(&home(dir, 1)));
        wait("the VM that was left behind has ended", || {
            Ok(find(&left_behind, VM)?.is_none().then_some(()))
        })?;
        story.say("the VM's process that was left behind on n2 has been ended");
    }

    let written = load.finish()?;
    let checked = written.verify(&socket)?;
    story.say(format_args!(
        "the load ends without an error; its longest request took {:.0} ms; {checked} blocks verified",
        written.longest_ms()
    ));
    if vm {
        cluster.stop_vm()?;
    }
    cluster.heal()?;
    story.say("every copy of everything is in sync");
    cluster.stop()?;
    for node in 0..NODES {
        check_disk(&disk(dir, node))?;
    }
    story.say("the nodes ended cleanly; all disks pass an offline check");
    Ok(())
}
