//! The VMs that belong on this node: started when their volumes are served here, ended when they belong elsewhere.
//!
//! What runs a VM is given from outside ([`VmHost`]), since the control plane knows no VMM. Everything it does may take long
//! and happens on threads of its own, one at a time for each VM.
//!
//! What makes a VM that was moved harmless is not that it is ended here, which may come late, but that its volumes have
//! another owner: every write of the old one is refused by the replicas.

use std::path::PathBuf;
use std::time::Duration;

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

    /// Ends a VM: asks the guest to, and kills it if it has not within `patience`. Succeeds if it does not run.
    ///
    /// # Errors
    /// When it still runs.
    fn stop(&self, name: &str, patience: Duration) -> Result<(), String>;

    /// The VMs that this node started and that run now.
    ///
    /// # Errors
    /// When that can not be known.
    fn running(&self) -> Result<Vec<String>, String>;
}
