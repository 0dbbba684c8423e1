//! Where a running VM is found again: one directory per VM, which outlives the command that started it.
//!
//! ```text
//! <root>/<name>/lock        held (flock) by a command that changes the VM
//! <root>/<name>/vm.toml     the specification, kept up to date when volumes are added and removed
//! <root>/<name>/state.json  which VMM, its process id and the start time of that process
//! <root>/<name>/api.sock    the VMM's API
//! <root>/<name>/vmm.log     what the VMM says, appended
//! ```
//!
//! Invariants: `state.json` is replaced by rename, so it is whole or absent; a process counts as the VM's only if both its id
//! and its start time match, so a recycled id is never signalled.
//!
//! Deliberately absent: a daemon that supervises. What should run is for the control plane to say.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::process::Process;
use crate::spec::{VmSpec, check_socket};
use crate::{Accel, VmmError, VmmKind};

/// Environment variable that moves the root of the runtime directories.
pub const RUNTIME_ENV: &str = "UNIBODY_RUNTIME_DIR";

/// Lines of a VMM's log that an error message repeats.
const TAIL_LINES: usize = 12;

/// The root of the runtime directories of this user's VMs.
#[derive(Clone, Debug)]
pub struct RuntimeRoot(PathBuf);

/// What is known about the process of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// Which VMM runs it.
    pub vmm: VmmKind,
    /// How guest instructions are executed.
    pub accel: Accel,
    /// Its process.
    pub process: Process,
}

/// The runtime directory of one VM.
#[derive(Clone, Debug)]
pub(crate) struct VmDir {
    name: String,
    path: PathBuf,
}

/// Held while a command changes a VM.
pub(crate) struct VmLock {
    _file: File,
}

impl RuntimeRoot {
    /// A root at this path; it is made when the first VM starts.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        RuntimeRoot(path.into())
    }

    /// `$UNIBODY_RUNTIME_DIR`, or `/run/unibody/vm` for root, or `$XDG_RUNTIME_DIR/unibody/vm` for others.
    pub fn from_env() -> Self {
        let set = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        if let Some(path) = set(RUNTIME_ENV) {
            return RuntimeRoot(path);
        }
        match set("XDG_RUNTIME_DIR") {
            Some(path) if !rustix::process::geteuid().is_root() => RuntimeRoot(path.join("unibody/vm")),
            _ => RuntimeRoot(PathBuf::from("/run/unibody/vm")),
        }
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Names of the VMs that have a directory here, running or not, sorted.
    ///
    /// # Errors
    /// The root cannot be read; one that does not exist is empty.
    pub fn names(&self) -> Result<Vec<String>, VmmError> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(VmmError::io("reading the runtime directory", &self.0))?,
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok())
            .filter(|entry| entry.path().join("vm.toml").exists())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        Ok(names)
    }

    /// The state of the VM of this name, if its process lives.
    ///
    /// # Errors
    /// The state file is there but cannot be read.
    pub fn running(&self, name: &str) -> Result<Option<VmState>, VmmError> {
        self.vm(name).running()
    }

    /// The specification with which the VM of this name was started, with the volumes added and removed since.
    ///
    /// # Errors
    /// No VM of this name was ever started here, or its directory is damaged.
    pub fn spec(&self, name: &str) -> Result<VmSpec, VmmError> {
        Ok(VmSpec::load(&self.vm(name).path.join("vm.toml"))?)
    }

    pub(crate) fn vm(&self, name: &str) -> VmDir {
        VmDir {
            name: name.to_owned(),
            path: self.0.join(name),
        }
    }
}

impl VmDir {
    /// Makes the directory if it is not there, for this user only: who can reach the API socket controls the VM.
    pub(crate) fn create(&self) -> Result<(), VmmError> {
        check_socket("runtime directory", &self.api_socket())?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .map_err(VmmError::io("making the runtime directory", &self.path))
    }

    /// Takes the VM for a change, or says that another command has it.
    pub(crate) fn lock(&self) -> Result<VmLock, VmmError> {
        let path = self.path.join("lock");
        if !self.path.exists() {
            return Err(VmmError::NotRunning {
                name: self.name.clone(),
            });
        }
        let file = File::options()
            .append(true)
            .open(&path)
            .map_err(VmmError::io("opening the lock", &path))?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(VmLock { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(VmmError::Busy {
                name: self.name.clone(),
                lock: path,
            }),
            Err(errno) => Err(VmmError::io("taking the lock", path)(errno.into())),
        }
    }

    /// Makes the lock file, without taking it.
    pub(crate) fn create_lock(&self) -> Result<(), VmmError> {
        let path = self.path.join("lock");
        let open = File::options().create(true).append(true).mode(0o600).open(&path);
        open.map(drop).map_err(VmmError::io("making the lock", path))
    }

    pub(crate) fn api_socket(&self) -> PathBuf {
        self.path.join("api.sock")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("vmm.log")
    }

    /// Opens the VMM's log to append to it.
    pub(crate) fn open_log(&self) -> Result<File, VmmError> {
        let path = self.log();
        File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(VmmError::io("opening the log", path))
    }

    /// The end of the VMM's log, for an error message.
    pub(crate) fn log_tail(&self) -> String {
        let bytes = fs::read(self.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        match lines.len() {
            0 => "(nothing)".to_owned(),
            count => lines[count.saturating_sub(TAIL_LINES)..].join("\n"),
        }
    }

    fn state_path(&self) -> PathBuf {
        self.path.join("state.json")
    }

    /// Reads the state, whether or not the process lives.
    pub(crate) fn state(&self) -> Result<Option<VmState>, VmmError> {
        let path = self.state_path();
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(VmmError::io("reading the state", &path))?,
        };
        let state = serde_json::from_slice(&bytes)
            .map_err(|error| VmmError::io("understanding the state", path)(error.into()))?;
        Ok(Some(state))
    }

    /// The state, if the process lives.
    pub(crate) fn running(&self) -> Result<Option<VmState>, VmmError> {
        Ok(self.state()?.filter(|state| state.process.is_alive()))
    }

    /// The state of a VM that must be running, and under this VMM.
    pub(crate) fn require(&self, kind: VmmKind) -> Result<VmState, VmmError> {
        let state = self.running()?.ok_or_else(|| VmmError::NotRunning {
            name: self.name.clone(),
        })?;
        if state.vmm != kind {
            return Err(VmmError::OtherVmm {
                name: self.name.clone(),
                running: state.vmm,
                asked: kind,
            });
        }
        Ok(state)
    }

    pub(crate) fn write_state(&self, state: &VmState) -> Result<(), VmmError> {
        let text = serde_json::to_vec_pretty(state)
            .map_err(|error| VmmError::io("writing the state", self.state_path())(error.into()))?;
        self.replace("state.json", &text)
    }

    pub(crate) fn write_spec(&self, spec: &VmSpec) -> Result<(), VmmError> {
        self.replace("vm.toml", spec.to_toml()?.as_bytes())
    }

    /// Puts a file in place whole: a reader sees the old one or the new one.
    fn replace(&self, file: &str, content: &[u8]) -> Result<(), VmmError> {
        let (path, new) = (self.path.join(file), self.path.join(format!("{file}.new")));
        fs::write(&new, content).map_err(VmmError::io("writing", &new))?;
        fs::rename(&new, &path).map_err(VmmError::io("renaming into place", path))
    }

    /// [`VmDir::clear`] for a VM that may never have been started.
    pub(crate) fn clear_if_present(&self) -> Result<(), VmmError> {
        if self.path.exists() { self.clear() } else { Ok(()) }
    }

    /// Removes what belongs to a process that has ended. Log and specification stay.
    pub(crate) fn clear(&self) -> Result<(), VmmError> {
        for path in [self.state_path(), self.api_socket()] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(VmmError::io("removing", path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> VmState {
        VmState {
            vmm: VmmKind::Qemu,
            accel: Accel::Tcg,
            process: Process::of(std::process::id()).unwrap(),
        }
    }

    #[test]
    fn a_state_counts_only_while_its_very_process_lives() {
        let dir = tempfile::tempdir().unwrap();
        let vm = RuntimeRoot::new(dir.path()).vm("a");
        vm.create().unwrap();
        assert!(vm.running().unwrap().is_none());
        vm.write_state(&state()).unwrap();
        assert_eq!(vm.running().unwrap(), Some(state()));
        let mut recycled = state();
        recycled.process.start_ticks += 1;
        vm.write_state(&recycled).unwrap();
        assert!(
            vm.running().unwrap().is_none(),
            "a recycled process id must not pass for the VM"
        );
        assert!(matches!(
            vm.require(VmmKind::Qemu),
            Err(VmmError::NotRunning { .. })
        ));
        vm.write_state(&state()).unwrap();
        assert!(matches!(
            vm.require(VmmKind::CloudHypervisor),
            Err(VmmError::OtherVmm { .. })
        ));
        vm.clear().unwrap();
        assert!(vm.state().unwrap().is_none());
    }

    #[test]
    fn a_damaged_state_is_an_error_not_a_stopped_vm() {
        let dir = tempfile::tempdir().unwrap();
        let vm = RuntimeRoot::new(dir.path()).vm("a");
        vm.create().unwrap();
        fs::write(vm.state_path(), b"{").unwrap();
        assert!(
            vm.running()
                .unwrap_err()
                .to_string()
                .contains("understanding the state")
        );
    }

    #[test]
    fn one_command_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let vm = RuntimeRoot::new(dir.path()).vm("a");
        assert!(matches!(vm.lock(), Err(VmmError::NotRunning { .. })));
        vm.create().unwrap();
        vm.create_lock().unwrap();
        let held = vm.lock().unwrap();
        assert!(matches!(vm.lock(), Err(VmmError::Busy { .. })));
        drop(held);
        vm.lock().unwrap();
    }

    #[test]
    fn a_root_too_deep_for_a_socket_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let vm = RuntimeRoot::new(dir.path().join("x".repeat(120))).vm("a");
        assert!(
            vm.create()
                .unwrap_err()
                .to_string()
                .contains("limit for a socket")
        );
    }
}
