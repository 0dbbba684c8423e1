//! The VMs that belong on this node: started when their volumes are served here, ended when they belong elsewhere.
//!
//! What runs a VM is given from outside ([`VmHost`]), since the control plane knows no VMM. Everything it does may take long
//! and happens on threads of its own, one at a time for each VM; what only waits for a guest can be called off.
//!
//! What makes a VM that was moved harmless is not that it is ended here, which may come late, but that its volumes have
//! another owner: every write of the old one is refused by the replicas.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a definition asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmNeeds {
    /// The VM's name.
    pub name: String,
    /// Bytes of memory.
    pub memory: u64,
    /// Names of its volumes, in the order in which the guest sees them.
    pub volumes: Vec<String>,
}

/// A volume of a VM, as its definition has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmVolume {
    /// The volume.
    pub volume: String,
    /// The guest may only read.
    #[serde(default)]
    pub readonly: bool,
    /// Request queues; absent: as many as the most that another volume of the VM has.
    #[serde(default)]
    pub queues: Option<u16>,
}

/// A change of a definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmChange {
    /// Another VMM is to run it.
    Vmm(String),
    /// It gets another volume.
    AddVolume(VmVolume),
    /// It has a volume no more.
    RemoveVolume(String),
}

/// What is done to the process of a VM on its node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub enum VmAct {
    /// Say what it does: null if it does not run.
    Status,
    /// End it at once.
    Kill,
    /// Let the guest shut down; kill it if it has not after so long.
    Stop {
        /// So long.
        seconds: u64,
    },
    /// Stop its virtual CPUs.
    Pause,
    /// Let them run again.
    Resume,
    /// Give it a volume that is served on its node, unless it has it or does not run: then it has it from its next start.
    AddVolume(VmVolume),
    /// Take a volume from it, if it runs and has it.
    RemoveVolume {
        /// The volume.
        volume: String,
        /// How long the guest may take to let go of it.
        seconds: u64,
    },
}

/// Most seconds that a guest is given to do what it was asked to.
pub(crate) const SECONDS_MAX: u64 = 3600;

impl VmAct {
    /// It neither changes what another act relies on, nor may it wait for one: a VM that does not end can be killed.
    pub(crate) fn is_for_any_time(&self) -> bool {
        matches!(self, VmAct::Status | VmAct::Kill)
    }

    /// Whether the VM is to be what the newest state says when this has been done: a start that comes later must know that state.
    pub(crate) fn is_of_the_newest(&self) -> bool {
        matches!(
            self,
            VmAct::AddVolume(_) | VmAct::RemoveVolume { .. } | VmAct::Stop { .. }
        )
    }

    /// How long the guest may take: no longer than an hour, whatever was asked for.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(match self {
            VmAct::Stop { seconds } | VmAct::RemoveVolume { seconds, .. } => (*seconds).min(SECONDS_MAX),
            _ => 0,
        })
    }
}

/// Runs VMs on this machine. They outlive the process.
pub trait VmHost: Send + Sync {
    /// Reads a definition, in whatever form users write it, and answers with what it asks for and a JSON object that says the
    /// same.
    ///
    /// # Errors
    /// When it is not one; what is wrong, and what to write instead.
    fn check(&self, text: &str) -> Result<(VmNeeds, String), String>;

    /// Starts a VM whose volumes are served at these sockets. Succeeds if it runs already.
    ///
    /// # Errors
    /// When it does not run afterwards, and why.
    fn start(&self, definition: &str, volumes: &[(String, PathBuf)]) -> Result<(), String>;

    /// Ends a VM: asks the guest to, and kills it if it has not within `patience`. Succeeds if it does not run. Once `off` is
    /// set it waits no longer, and leaves the guest as it is.
    ///
    /// # Errors
    /// When it still runs.
    fn stop(&self, name: &str, patience: Duration, off: &AtomicBool) -> Result<(), String>;

    /// The definition of before with a change, as [`VmHost::check`] gives it.
    ///
    /// # Errors
    /// When the change makes no sense; why.
    fn amend(&self, definition: &str, change: &VmChange) -> Result<(VmNeeds, String), String>;

    /// Does something to a VM that runs; `socket` is where a volume to be added is served. Once `off` is set it waits for the
    /// guest no longer. The status has the names of the VM's `volumes`.
    ///
    /// # Errors
    /// When it was not done; why, and what to do.
    fn act(
        &self,
        name: &str,
        act: &VmAct,
        socket: Option<&Path>,
        off: &AtomicBool,
    ) -> Result<serde_json::Value, String>;

    /// Which VMMs there are on this machine, and of those that can not be used, why.
    fn vmms(&self) -> serde_json::Value;

    /// The VMs that this node started and that run now.
    ///
    /// # Errors
    /// When that can not be known.
    fn running(&self) -> Result<Vec<String>, String>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_wait_is_too_long_to_be_added_to_another() {
        let seconds = u64::MAX;
        let volume = "v".to_owned();
        for act in [VmAct::Stop { seconds }, VmAct::RemoveVolume { volume, seconds }] {
            assert_eq!(act.patience(), Duration::from_secs(SECONDS_MAX));
        }
        assert_eq!(VmAct::Stop { seconds: 5 }.patience(), Duration::from_secs(5));
    }
}
