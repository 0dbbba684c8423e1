//! `unibody vm`: virtual machines from a specification, under either VMM.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use unibody_vmm_adapter::{RuntimeRoot, VmSpec, Vmm, VmmKind, VolumeSpec, find, swap};

#[derive(Subcommand)]
pub(crate) enum VmCommand {
    /// Start a VM.
    Start {
        /// Its specification (TOML).
        spec: PathBuf,
        /// cloud-hypervisor or qemu [default: the first of these that is there].
        #[arg(long)]
        vmm: Option<VmmKind>,
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
    /// List the VMs of this machine.
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

pub(crate) fn run(command: VmCommand) -> Result<()> {
    let root = RuntimeRoot::from_env();
    match command {
        VmCommand::Start { spec, vmm } => start(&root, &read_spec(&spec)?, vmm)?,
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

fn start(root: &RuntimeRoot, spec: &VmSpec, vmm: Option<VmmKind>) -> Result<()> {
    let adapter = match vmm {
        Some(kind) => kind.adapter(root.clone()),
        None => {
            let there = VmmKind::ALL
                .into_iter()
                .map(|kind| kind.adapter(root.clone()))
                .find(|vmm| vmm.probe().is_ok());
            there.context("neither Cloud Hypervisor nor QEMU is installed: install one, or name it with --vmm to see why")?
        }
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
