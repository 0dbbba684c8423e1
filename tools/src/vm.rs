//! `unibody vm`: virtual machines from a specification, under either VMM; on this machine, or in a cluster, which keeps what
//! they are and runs them wherever there is room.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use unibody_control::api::types::{OnNode, VmDefinition};
use unibody_vmm_adapter::{RuntimeRoot, VmSpec, Vmm, VmmKind, VolumeSpec, find, swap};

use crate::host;
use crate::output;
use crate::target::{Client, NodeArgs, Target, segment};

/// Between two looks at whether a VM runs.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Args)]
pub(crate) struct VmArgs {
    #[command(flatten)]
    node: NodeArgs,
    #[command(subcommand)]
    command: VmCommand,
}

#[derive(Subcommand)]
enum VmCommand {
    /// Start a VM; in a cluster also after every failure of its node, until it is stopped.
    Start {
        /// Its specification (TOML); in a cluster also the name of a VM that is known already.
        spec: PathBuf,
        /// cloud-hypervisor or qemu [default: the first of these that is there].
        #[arg(long)]
        vmm: Option<VmmKind>,
        /// In a cluster: the node to run it on [default: one that has room].
        #[arg(long, value_name = "NODE")]
        on: Option<String>,
    },
    /// Make a VM known to a cluster, or change it, without starting it.
    Define {
        /// Its specification (TOML), without sockets.
        spec: PathBuf,
        /// cloud-hypervisor or qemu [default: the first of these that is on its node].
        #[arg(long)]
        vmm: Option<VmmKind>,
    },
    /// Have a cluster forget a VM that is stopped. Its volumes stay.
    Delete {
        /// Its name.
        name: String,
    },
    /// Let the guest shut down; kill it if it does not.
    Stop {
        /// Its name.
        name: String,
        #[command(flatten)]
        patience: Patience,
    },
    /// End it at once, as pulling the plug does.
    Kill {
        /// Its name.
        name: String,
    },
    /// Say what it does.
    Status {
        /// Its name.
        name: String,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// List the VMs of this machine, or of the cluster.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Stop its virtual CPUs.
    Pause {
        /// Its name.
        name: String,
    },
    /// Let them run again.
    Resume {
        /// Its name.
        name: String,
    },
    /// Add a volume to a running VM.
    AddVolume {
        /// Its name.
        name: String,
        /// Name of the volume in the VM.
        volume: String,
        /// The volume's socket.
        socket: PathBuf,
        /// The guest may only read.
        #[arg(long)]
        readonly: bool,
    },
    /// Take a volume from a running VM.
    RemoveVolume {
        /// Its name.
        name: String,
        /// Name of the volume in the VM.
        volume: String,
        #[command(flatten)]
        patience: Patience,
    },
    /// The same VM, the same volumes, the other VMM: shut down, start there.
    Swap {
        /// Its specification (TOML).
        spec: PathBuf,
        /// cloud-hypervisor or qemu.
        #[arg(long)]
        to: VmmKind,
        #[command(flatten)]
        patience: Patience,
    },
    /// Say which VMMs there are and how they would run guests.
    Vmms {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
pub(crate) struct Patience {
    /// Seconds to wait for the guest.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
}

impl Patience {
    fn duration(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }
}

fn read_spec(path: &Path) -> Result<VmSpec> {
    VmSpec::load(path).with_context(|| format!("{} is not a VM's specification", path.display()))
}

fn running(root: &RuntimeRoot, name: &str) -> Result<Box<dyn Vmm>> {
    match find(root, name)? {
        Some(vmm) => Ok(vmm),
        None => bail!("no VM {name} is running: `unibody vm list` names those that are"),
    }
}

fn json<T: serde::Serialize>(value: &T) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

pub(crate) fn run(args: VmArgs) -> Result<()> {
    let VmArgs { node, command } = args;
    let root = node
        .runtime()
        .map_or_else(RuntimeRoot::from_env, RuntimeRoot::new);
    let command = match node.target()? {
        Target::Cluster(client) => match in_cluster(&client, command)? {
            None => return Ok(()),
            // What is done to a VMM is done on its machine.
            Some(command) => command,
        },
        Target::Alone(_) => command,
    };
    match command {
        VmCommand::Start { on: Some(_), .. } | VmCommand::Define { .. } | VmCommand::Delete { .. } => {
            bail!("that is for a cluster: name a node of it with --node-dir or --api")
        }
        VmCommand::Start { spec, vmm, on: None } => start(&root, &read_spec(&spec)?, vmm)?,
        VmCommand::Stop { name, patience } => {
            let stopped = running(&root, &name)?.stop(&name, patience.duration())?;
            println!(
                "{name}: {}",
                serde_json::to_value(stopped)?.as_str().unwrap_or_default()
            );
        }
        VmCommand::Kill { name } => {
            running(&root, &name)?.kill(&name)?;
        }
        VmCommand::Status { name, json: as_json } => {
            let vmm = running(&root, &name)?;
            let status = vmm.status(&name)?;
            if as_json {
                return json(&status);
            }
            println!("{name}: {:?} under {}", status.phase, vmm.kind());
            if let Some(accel) = status.accel {
                println!("guest instructions: {accel:?}");
            }
        }
        VmCommand::List { json: as_json } => list(&root, as_json)?,
        VmCommand::Pause { name } => running(&root, &name)?.pause(&name)?,
        VmCommand::Resume { name } => running(&root, &name)?.resume(&name)?,
        VmCommand::AddVolume {
            name,
            volume,
            socket,
            readonly,
        } => {
            let socket = std::path::absolute(&socket)?;
            let volume = VolumeSpec {
                name: volume,
                socket,
                queues: 1,
                readonly,
            };
            running(&root, &name)?.add_volume(&name, &volume)?;
        }
        VmCommand::RemoveVolume {
            name,
            volume,
            patience,
        } => {
            running(&root, &name)?.remove_volume(&name, &volume, patience.duration())?;
        }
        VmCommand::Swap { spec, to, patience } => {
            let spec = read_spec(&spec)?;
            let from = running(&root, &spec.name)?;
            if from.kind() == to {
                bail!("{} runs under {to} already", spec.name);
            }
            let (stopped, started) = swap(&spec, &*from, &*to.adapter(root), patience.duration())?;
            started
                .notices
                .iter()
                .for_each(|notice| eprintln!("unibody: {notice}"));
            println!("{}: {stopped:?}, then started under {to}", spec.name);
        }
        VmCommand::Vmms { json: as_json } => vmms(&root, as_json)?,
    }
    Ok(())
}

/// What the cluster does; anything else is given back.
fn in_cluster(client: &Client, command: VmCommand) -> Result<Option<VmCommand>> {
    let path = |name: &str| format!("/v1/vms/{}", segment(name));
    let define = |spec: &Path, vmm| -> Result<String> {
        let (name, definition) = host::definition(spec, vmm)?;
        client.put::<()>(&path(&name), &VmDefinition { definition })?;
        Ok(name)
    };
    match command {
        VmCommand::Define { spec, vmm } => drop(define(&spec, vmm)?),
        VmCommand::Start { spec, vmm, on } => {
            let name = match spec.is_file() {
                true => define(&spec, vmm)?,
                false if vmm.is_some() => bail!("--vmm goes with a specification: give its file"),
                false => spec.to_string_lossy().into_owned(),
            };
            client.post::<()>(&format!("{}/start", path(&name)), &OnNode { node: on })?;
            let node = until(client, &name, "running", Duration::from_secs(60))?;
            println!("{name}: runs on {}", node.unwrap_or_default());
        }
        VmCommand::Stop { name, patience } => {
            client.post::<()>(&format!("{}/stop", path(&name)), &())?;
            until(
                client,
                &name,
                "stopped",
                patience.duration() + Duration::from_secs(10),
            )?;
            println!("{name}: stopped");
        }
        VmCommand::Delete { name } => client.delete(&path(&name))?,
        VmCommand::List { json } => output::vms(client, json)?,
        other => return Ok(Some(other)),
    }
    Ok(None)
}

/// Waits until a VM is as wanted, and says where it is.
fn until(client: &Client, name: &str, state: &str, patience: Duration) -> Result<Option<String>> {
    let end = Instant::now() + patience;
    loop {
        let vms = client.status()?.vms;
        let vm = vms.into_iter().find(|vm| vm.name == name);
        let vm = vm.with_context(|| format!("there is no VM {name} any more"))?;
        if vm.state == state {
            return Ok(vm.node);
        }
        if Instant::now() >= end {
            bail!(
                "VM {name} is {}: look at `unibody status` and at the output of its node",
                vm.state
            );
        }
        std::thread::sleep(LOOK);
    }
}

fn start(root: &RuntimeRoot, spec: &VmSpec, vmm: Option<VmmKind>) -> Result<()> {
    let adapter = match vmm {
        Some(kind) => kind.adapter(root.clone()),
        None => host::any_vmm(root).context(
            "neither Cloud Hypervisor nor QEMU is installed: install one, or name it with --vmm to see why",
        )?,
    };
    if find(root, &spec.name)?.is_some() {
        bail!("{} is running already", spec.name);
    }
    let started = adapter.start(spec)?;
    started
        .notices
        .iter()
        .for_each(|notice| eprintln!("unibody: {notice}"));
    println!(
        "{}: started under {} ({:?})",
        spec.name,
        adapter.kind(),
        started.accel
    );
    Ok(())
}

fn list(root: &RuntimeRoot, as_json: bool) -> Result<()> {
    let mut all = Vec::new();
    for name in root.names()? {
        if let Some(vmm) = find(root, &name)? {
            all.push((vmm.kind(), vmm.status(&name)?));
        }
    }
    if as_json {
        let values: Vec<_> = all
            .iter()
            .map(|(kind, status)| serde_json::json!({ "vmm": kind, "status": status }))
            .collect();
        return json(&values);
    }
    for (kind, status) in all {
        println!("{}  {kind}  {:?}", status.name, status.phase);
    }
    Ok(())
}

fn vmms(root: &RuntimeRoot, as_json: bool) -> Result<()> {
    let probes: Vec<_> = VmmKind::ALL
        .into_iter()
        .map(|kind| (kind, kind.adapter(root.clone()).probe()))
        .collect();
    if as_json {
        let there: Vec<_> = probes
            .iter()
            .filter_map(|(_, probe)| probe.as_ref().ok())
            .collect();
        return json(&there);
    }
    for (kind, probe) in probes {
        match probe {
            Ok(probe) => println!(
                "{kind}: {} ({}); {:?}: {}",
                probe.version,
                probe.binary.display(),
                probe.accel,
                probe.accel_reason
            ),
            Err(error) => println!("{kind}: {error}"),
        }
    }
    Ok(())
}
