//! `unibody vm`: virtual machines from a specification, under either VMM; on this machine, or in a cluster, which keeps what
//! they are and runs them wherever there is room.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use unibody_control::api::types::{OnNode, Swap, VmDefinition, VmDetail, VmStop, VolumeOff};
use unibody_control::cluster::LocalRequest;
use unibody_control::cluster::vms::VmVolume;
use unibody_vmm_adapter::{RuntimeRoot, Started, VmSpec, VmStatus, Vmm, VmmKind, VolumeSpec, find, swap};

use crate::host;
use crate::output::{self, Out};
use crate::target::{Client, NodeArgs, Target, segment};

/// Between two looks at whether a VM runs.
const LOOK: Duration = Duration::from_millis(200);
/// How long a VM may take to come up, or a volume to come to it.
const PATIENCE: Duration = Duration::from_secs(60);

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
    /// End it at once, as pulling the plug does, and keep it so.
    Kill {
        /// Its name.
        name: String,
    },
    /// Say what it does.
    Status {
        /// Its name.
        name: String,
    },
    /// List the VMs of this machine, or of the cluster.
    List,
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
    /// Add a volume to a running VM; in a cluster also to what it is at its next start.
    AddVolume {
        /// Its name.
        name: String,
        /// The volume; of a node by itself, its name in the VM.
        volume: String,
        /// The volume's socket; a cluster knows it.
        socket: Option<PathBuf>,
        /// Request queues [default: as many as the most that another volume of it has].
        #[arg(long)]
        queues: Option<u16>,
        /// The guest may only read.
        #[arg(long)]
        readonly: bool,
    },
    /// Take a volume from a running VM; in a cluster also from what it is at its next start.
    RemoveVolume {
        /// Its name.
        name: String,
        /// The volume.
        volume: String,
        #[command(flatten)]
        patience: Patience,
    },
    /// The same VM, the same volumes, the other VMM: shut down, start there.
    Swap {
        /// Its name.
        name: String,
        /// cloud-hypervisor or qemu.
        #[arg(long)]
        to: VmmKind,
        #[command(flatten)]
        patience: Patience,
    },
    /// Say which VMMs there are and how they would run guests.
    Vmms {
        /// In a cluster: of this node [default: the one that is asked].
        #[arg(long, value_name = "NODE")]
        on: Option<String>,
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

/// The VMs of this machine that no cluster has.
struct Here(RuntimeRoot);

impl Here {
    fn vmm(&self, name: &str) -> Result<Box<dyn Vmm>> {
        match find(&self.0, name)? {
            Some(vmm) => Ok(vmm),
            None => bail!(
                "no VM {name} runs on this machine by itself ({} was looked at): `unibody vm list` names those that do; \
                 for the VMs of a cluster, name one of its nodes with --node-dir or --api",
                self.0.path().display()
            ),
        }
    }
}

/// Where a command goes is one rule for all of them ([`NodeArgs`]): to a cluster by way of its API, or to the VMMs of this machine.
pub(crate) fn run(args: VmArgs, out: Out) -> Result<()> {
    let VmArgs { node, command } = args;
    match node.target()? {
        Target::Cluster(client) => in_cluster(client, command, out),
        Target::Alone(_) => here(&Here(RuntimeRoot::from_env()), command, out),
    }
}

fn here(here: &Here, command: VmCommand, out: Out) -> Result<()> {
    let root = &here.0;
    match command {
        VmCommand::Start { on: Some(_), .. }
        | VmCommand::Vmms { on: Some(_) }
        | VmCommand::Define { .. }
        | VmCommand::Delete { .. } => {
            bail!("that is for a cluster: name a node of it with --node-dir or --api")
        }
        VmCommand::Start { spec, vmm, on: None } => start(root, &read_spec(&spec)?, vmm, out)?,
        VmCommand::Stop { name, patience } => {
            let stopped = json!(here.vmm(&name)?.stop(&name, patience.duration().into())?);
            let text = format!("{name}: {}", stopped.as_str().unwrap_or_default());
            out.done(&text, &json!({ "vm": name, "stopped": stopped }))?;
        }
        VmCommand::Kill { name } => {
            here.vmm(&name)?.kill(&name)?;
            out.done("", &json!({ "vm": name, "stopped": "killed" }))?;
        }
        VmCommand::Status { name } => {
            let process = host::process(&*here.vmm(&name)?, &name)?;
            out.done(&process_text(&name, &process), &process)?;
        }
        VmCommand::List => list(root, out)?,
        VmCommand::Pause { name } => {
            here.vmm(&name)?.pause(&name)?;
            out.done("", &json!({ "vm": name, "paused": true }))?;
        }
        VmCommand::Resume { name } => {
            here.vmm(&name)?.resume(&name)?;
            out.done("", &json!({ "vm": name, "paused": false }))?;
        }
        VmCommand::AddVolume { socket: None, .. } => bail!("the volume's socket is needed"),
        VmCommand::AddVolume {
            name,
            volume,
            socket: Some(socket),
            queues,
            readonly,
        } => {
            let vmm = here.vmm(&name)?;
            let spec = VolumeSpec {
                name: volume,
                socket: std::path::absolute(&socket)?,
                queues: host::queues(queues, &root.spec(&name)?),
                readonly,
            };
            vmm.add_volume(&name, &spec)?;
            out.done("", &json!({ "vm": name, "added": spec.name }))?;
        }
        VmCommand::RemoveVolume {
            name,
            volume,
            patience,
        } => {
            here.vmm(&name)?
                .remove_volume(&name, &volume, patience.duration().into())?;
            out.done("", &json!({ "vm": name, "removed": volume }))?;
        }
        VmCommand::Swap { name, to, patience } => {
            let from = here.vmm(&name)?;
            if from.kind() == to {
                bail!("{name} runs under {to} already");
            }
            // As it is now, not as it was when it was started: volumes have come and gone.
            let spec = root.spec(&name)?;
            let to_vmm = to.adapter(root.clone());
            let (stopped, started) = swap(&spec, &*from, &*to_vmm, patience.duration())?;
            tell_notices(&started);
            out.done(
                &format!("{name}: {stopped:?}, then started under {to}"),
                &json!({ "vm": name, "vmm": to, "stopped": stopped, "started": started }),
            )?;
        }
        VmCommand::Vmms { on: None } => vmms(&host::vmms(root), out)?,
    }
    Ok(())
}

fn in_cluster(client: Client, command: VmCommand, out: Out) -> Result<()> {
    let path = |name: &str| format!("/v1/vms/{}", segment(name));
    let define = |spec: &Path, vmm| -> Result<String> {
        let (name, definition) = host::definition(spec, vmm)?;
        client.put::<()>(&path(&name), &VmDefinition { definition })?;
        Ok(name)
    };
    match command {
        VmCommand::Define { spec, vmm } => {
            let name = define(&spec, vmm)?;
            out.done("", &json!({ "vm": name }))?;
        }
        VmCommand::Start { spec, vmm, on } => {
            let name = match spec.is_file() {
                true => define(&spec, vmm)?,
                false if vmm.is_some() => bail!("--vmm goes with a specification: give its file"),
                false => spec.to_string_lossy().into_owned(),
            };
            client.post::<()>(&format!("{}/start", path(&name)), &OnNode { node: on })?;
            let node = until(&client, &name, "running", Duration::from_secs(60))?;
            let text = format!("{name}: runs on {}", node.as_deref().unwrap_or_default());
            out.done(&text, &json!({ "vm": name, "node": node }))?;
        }
        VmCommand::Stop { name, patience } => {
            let seconds = patience.timeout;
            client.post::<()>(&format!("{}/stop", path(&name)), &VmStop { seconds })?;
            let end = patience.duration() + Duration::from_secs(10);
            until(&client, &name, "stopped", end)?;
            out.done(
                &format!("{name}: stopped"),
                &json!({ "vm": name, "stopped": true }),
            )?;
        }
        VmCommand::Kill { name } => {
            client.post::<()>(&format!("{}/kill", path(&name)), &())?;
            until(&client, &name, "stopped", Duration::from_secs(30))?;
            out.done("", &json!({ "vm": name, "stopped": "killed" }))?;
        }
        VmCommand::Delete { name } => {
            client.delete(&path(&name))?;
            out.done("", &json!({ "vm": name, "deleted": true }))?;
        }
        VmCommand::List => output::vms(&client, out)?,
        VmCommand::Status { name } => {
            let detail: VmDetail = client.get(&path(&name))?;
            let vm = &detail.summary;
            let mut text = match &vm.node {
                Some(node) => format!("{name}: {} on {node}", vm.state),
                None => format!("{name}: {}", vm.state),
            };
            if !detail.process.is_null() {
                text = format!("{text}\n{}", process_text("its process", &detail.process));
            }
            out.done(&text, &json!(detail))?;
        }
        VmCommand::Pause { name } => {
            client.post::<()>(&format!("{}/pause", path(&name)), &())?;
            out.done("", &json!({ "vm": name, "paused": true }))?;
        }
        VmCommand::Resume { name } => {
            client.post::<()>(&format!("{}/resume", path(&name)), &())?;
            out.done("", &json!({ "vm": name, "paused": false }))?;
        }
        VmCommand::AddVolume { socket: Some(_), .. } => {
            bail!("a cluster knows where the volume is served: leave out the socket")
        }
        VmCommand::AddVolume {
            name,
            volume,
            socket: None,
            queues,
            readonly,
        } => {
            let add = VmVolume {
                volume,
                readonly,
                queues,
            };
            let client = client.patient(PATIENCE);
            client.post::<()>(&format!("{}/volumes", path(&name)), &add)?;
            out.done("", &json!({ "vm": name, "added": add.volume }))?;
        }
        VmCommand::RemoveVolume {
            name,
            volume,
            patience,
        } => {
            let seconds = patience.timeout;
            let off = VolumeOff {
                volume: volume.clone(),
                seconds,
            };
            let client = client.patient(patience.duration());
            client.post::<()>(&format!("{}/volumes/remove", path(&name)), &off)?;
            out.done("", &json!({ "vm": name, "removed": volume }))?;
        }
        VmCommand::Swap { name, to, patience } => {
            let client = client.patient(patience.duration());
            let ask = Swap {
                to: to.to_string(),
                seconds: patience.timeout,
            };
            client.post::<()>(&format!("{}/swap", path(&name)), &ask)?;
            let detail = until_under(&client, &path(&name), to)?;
            let text = match &detail.summary.node {
                Some(node) => format!("{name}: runs under {to} on {node}"),
                None => format!("{name}: will run under {to}"),
            };
            out.done(
                &text,
                &json!({ "vm": name, "vmm": to, "node": detail.summary.node }),
            )?;
        }
        VmCommand::Vmms { on } => vmms(&client.command(on.as_deref(), &LocalRequest::Vmms)?, out)?,
    }
    Ok(())
}

/// Waits until a VM that has a place runs under a VMM.
fn until_under(client: &Client, path: &str, to: VmmKind) -> Result<VmDetail> {
    let end = Instant::now() + PATIENCE;
    loop {
        let detail: VmDetail = client.get(path)?;
        if detail.summary.node.is_none() || detail.process["vmm"] == json!(to) {
            return Ok(detail);
        }
        if Instant::now() >= end {
            bail!(
                "VM {} does not run under {to} yet: look at the output of its node; swap it back if it can not",
                detail.summary.name
            );
        }
        std::thread::sleep(LOOK);
    }
}

/// What a VM's process does, for people.
fn process_text(who: &str, process: &Value) -> String {
    let status = &process["status"];
    let phase = match &status["phase"] {
        Value::String(phase) => phase.clone(),
        phase => phase["ended"].as_str().unwrap_or("ended").to_owned(),
    };
    let mut text = format!(
        "{who}: {phase} under {}",
        process["vmm"].as_str().unwrap_or_default()
    );
    if let Some(accel) = status["accel"].as_str() {
        text += &format!("; guest instructions: {accel}");
    }
    text
}

fn tell_notices(started: &Started) {
    for notice in &started.notices {
        eprintln!("unibody: {notice}");
    }
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

fn start(root: &RuntimeRoot, spec: &VmSpec, vmm: Option<VmmKind>, out: Out) -> Result<()> {
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
    tell_notices(&started);
    out.done(
        &format!(
            "{}: started under {} ({:?})",
            spec.name,
            adapter.kind(),
            started.accel
        ),
        &json!({ "vm": spec.name, "vmm": adapter.kind(), "started": started }),
    )
}

fn list(root: &RuntimeRoot, out: Out) -> Result<()> {
    let mut all = Vec::new();
    for name in root.names()? {
        if let Some(vmm) = find(root, &name)? {
            all.push((vmm.kind(), vmm.status(&name)?));
        }
    }
    let value = |(kind, status): &(VmmKind, VmStatus)| json!({ "vmm": kind, "status": status });
    let text: Vec<_> = all
        .iter()
        .map(|(kind, status)| format!("{}  {kind}  {:?}", status.name, status.phase))
        .collect();
    out.done(&text.join("\n"), &all.iter().map(value).collect())
}

fn vmms(found: &Value, out: Out) -> Result<()> {
    let line = |vmm: &Value| {
        let text = |key: &str| vmm[key].as_str().unwrap_or_default().to_owned();
        match vmm["error"].as_str() {
            Some(error) => format!("{}: {error}", text("vmm")),
            None => format!(
                "{}: {} ({}); {}: {}",
                text("vmm"),
                text("version"),
                text("binary"),
                text("accel"),
                text("accel_reason")
            ),
        }
    };
    let lines: Vec<_> = found.as_array().into_iter().flatten().map(line).collect();
    out.done(&lines.join("\n"), found)
}
