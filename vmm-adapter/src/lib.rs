//! One VM specification, several virtual machine monitors: Cloud Hypervisor and QEMU behind the trait [`Vmm`].
//!
//! A VM outlives the command that started it: its process has a session of its own, and a runtime directory
//! ([`RuntimeRoot`]) in which every later command finds it again. Its disks are vhost-user-blk sockets of the data plane, so
//! the VMM holds no data, and the same VM can go on under another one ([`swap`]).
//!
//! Invariants: at most one process runs a VM of one runtime root; what the machine cannot do is refused with the reason, or,
//! where there is a slower way, done and said aloud ([`Started::notices`]).
//!
//! Deliberately absent: supervision and restart (the control plane's work), live migration, and any knowledge of volumes
//! beyond their sockets.

mod accel;
mod backend;
mod binary;
mod cloud_hypervisor;
mod error;
pub mod guest;
mod lifecycle;
mod patience;
mod process;
mod qemu;
mod qemu_arguments;
mod runtime;
pub mod spec;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use accel::Accel;
pub use cloud_hypervisor::CloudHypervisor;
pub use error::VmmError;
pub use patience::Patience;
pub use process::Process;
pub use qemu::Qemu;
pub use runtime::{RUNTIME_ENV, RuntimeRoot, VmState};
pub use spec::{VmSpec, VolumeSpec, fuzz_spec};

/// The virtual machine monitors we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmKind {
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// QEMU.
    Qemu,
}

impl VmmKind {
    /// All of them, the one to prefer first.
    pub const ALL: [VmmKind; 2] = [VmmKind::CloudHypervisor, VmmKind::Qemu];

    /// The adapter for this VMM with its VMs under `root`.
    pub fn adapter(self, root: RuntimeRoot) -> Box<dyn Vmm> {
        match self {
            VmmKind::CloudHypervisor => Box::new(CloudHypervisor::new(root)),
            VmmKind::Qemu => Box::new(Qemu::new(root)),
        }
    }
}

impl fmt::Display for VmmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            VmmKind::CloudHypervisor => "cloud-hypervisor",
            VmmKind::Qemu => "qemu",
        })
    }
}

impl std::str::FromStr for VmmKind {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        VmmKind::ALL
            .into_iter()
            .find(|kind| kind.to_string() == text)
            .ok_or_else(|| format!("{text:?} is no VMM; take cloud-hypervisor or qemu"))
    }
}

/// What [`Vmm::probe`] found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Probe {
    /// Which VMM.
    pub vmm: VmmKind,
    /// The program.
    pub binary: PathBuf,
    /// First line of what it says about its version.
    pub version: String,
    /// What the accelerator `auto` means here.
    pub accel: Accel,
    /// Why.
    pub accel_reason: String,
}

/// What [`Vmm::start`] did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Started {
    /// The VMM's process.
    pub process: Process,
    /// How guest instructions are executed.
    pub accel: Accel,
    /// What the user should be told: a slower way taken, and why.
    pub notices: Vec<String>,
}

/// How [`Vmm::stop`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stopped {
    /// The guest powered itself off.
    Graceful,
    /// The guest did not within the time, and was killed.
    Killed,
    /// It was not running.
    WasNotRunning,
}

/// What a VM does now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmStatus {
    /// The VM.
    pub name: String,
    /// What it does.
    pub phase: Phase,
    /// Its process, if it has one.
    pub process: Option<Process>,
    /// How guest instructions are executed, if they are.
    pub accel: Option<Accel>,
}

/// The phases of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// No process.
    Stopped,
    /// The VMM is there, the guest has not begun.
    Starting,
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
    /// The VMM is there, the guest has ended or failed: what the VMM calls it.
    Ended(String),
}

/// One virtual machine monitor. All calls block; none needs the process that made an earlier one.
pub trait Vmm: Send + Sync {
    /// Which one.
    fn kind(&self) -> VmmKind;

    /// Finds its program and asks for its version.
    ///
    /// # Errors
    /// It is not installed or does not run.
    fn probe(&self) -> Result<Probe, VmmError>;

    /// Starts the VM and returns when its guest executes.
    ///
    /// # Errors
    /// It runs already, something in the specification cannot be had here, or the VMM fails; then nothing is left running.
    fn start(&self, spec: &VmSpec) -> Result<Started, VmmError>;

    /// Asks the guest to power off, and kills it if it has not within `patience`; not if that is called off.
    ///
    /// # Errors
    /// It runs under another VMM, or cannot be killed, or it was called off.
    fn stop(&self, name: &str, patience: Patience<'_>) -> Result<Stopped, VmmError>;

    /// Kills it at once. Works while another command is stuck on it.
    ///
    /// # Errors
    /// It runs under another VMM, or cannot be killed.
    fn kill(&self, name: &str) -> Result<Stopped, VmmError>;

    /// What it does now.
    ///
    /// # Errors
    /// It runs under another VMM, or the VMM does not answer.
    fn status(&self, name: &str) -> Result<VmStatus, VmmError>;

    /// Stops its virtual CPUs.
    ///
    /// # Errors
    /// It does not run here, or the VMM refuses.
    fn pause(&self, name: &str) -> Result<(), VmmError>;

    /// Lets its virtual CPUs run again.
    ///
    /// # Errors
    /// It does not run here, or the VMM refuses.
    fn resume(&self, name: &str) -> Result<(), VmmError>;

    /// Adds a volume to the running VM, and to the specification kept in its runtime directory.
    ///
    /// # Errors
    /// It does not run here, the volume cannot be attached, or the VMM refuses.
    fn add_volume(&self, name: &str, volume: &VolumeSpec) -> Result<(), VmmError>;

    /// Removes a volume from the running VM, once its guest let go of it, and from the kept specification.
    ///
    /// # Errors
    /// It does not run here, has no such volume, or the guest does not let go within `patience`.
    fn remove_volume(&self, name: &str, volume: &str, patience: Patience<'_>) -> Result<(), VmmError>;
}

/// The adapter under which the VM of this name runs, if it does.
///
/// # Errors
/// The runtime directory is damaged.
pub fn find(root: &RuntimeRoot, name: &str) -> Result<Option<Box<dyn Vmm>>, VmmError> {
    Ok(root.running(name)?.map(|state| state.vmm.adapter(root.clone())))
}

/// The same VM, the same volumes, the other VMM: shuts down under `from` and starts under `to`. If the start fails, the VM is
/// left stopped, with its volumes intact; start it again under either.
///
/// # Errors
/// `to` is not usable (then nothing was touched), or as [`Vmm::stop`] and [`Vmm::start`].
pub fn swap(
    spec: &VmSpec,
    from: &dyn Vmm,
    to: &dyn Vmm,
    timeout: Duration,
) -> Result<(Stopped, Started), VmmError> {
    spec.check()?;
    to.probe()?;
    let stopped = from.stop(&spec.name, timeout.into())?;
    Ok((stopped, to.start(spec)?))
}
