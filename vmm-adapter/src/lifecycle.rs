//! The life of a VM's process, the same for every VMM: start, graceful end, kill, and its bookkeeping.
//!
//! Invariants: a start that fails leaves no process and no state behind; a state is written before the VMM is talked to, so a
//! command that dies in the middle of a start leaves a VM that the next command can see and kill.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::process::{Process, spawn_detached};
use crate::runtime::{RuntimeRoot, VmDir, VmState};
use crate::spec::VmSpec;
use crate::{Accel, Patience, Phase, Stopped, VmStatus, VmmError, VmmKind, backend};

/// How long a killed process may take to disappear.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// What a start needs to know, checked.
pub(crate) struct Launch<'a> {
    pub(crate) dir: &'a VmDir,
    pub(crate) kind: VmmKind,
    pub(crate) spec: &'a VmSpec,
    pub(crate) accel: Accel,
}

impl Launch<'_> {
    /// Runs `command` as the VM's process, lets `bring_up` make the guest run, and cleans up if that fails.
    pub(crate) fn run(
        &self,
        command: &mut Command,
        bring_up: impl FnOnce(&Process) -> Result<(), VmmError>,
    ) -> Result<Process, VmmError> {
        self.dir.create()?;
        // The lock file must be there before it can be taken: its absence is how other commands see that there is no such VM.
        self.dir.create_lock()?;
        let _lock = self.dir.lock()?;
        if let Some(state) = self.dir.running()? {
            return Err(VmmError::AlreadyRunning {
                name: self.spec.name.clone(),
                kind: state.vmm,
                pid: state.process.pid,
            });
        }
        self.check_files()?;
        self.spec.volumes.iter().try_for_each(backend::check)?;
        self.dir.clear()?;
        self.dir.write_spec(self.spec)?;
        let log = self.dir.open_log()?;
        let program = Path::new(command.get_program()).to_path_buf();
        let process = spawn_detached(command, &log).map_err(VmmError::io("starting the VMM", program))?;
        let state = VmState {
            vmm: self.kind,
            accel: self.accel,
            process,
        };
        let result = self.dir.write_state(&state).and_then(|()| bring_up(&process));
        match result {
            Ok(()) => Ok(process),
            Err(error) => {
                let died = !process.is_alive();
                let killed = end(self.dir, &self.spec.name, &process);
                if died {
                    return Err(VmmError::StartFailed {
                        kind: self.kind,
                        log: self.dir.log(),
                        tail: self.dir.log_tail(),
                    });
                }
                killed?;
                Err(error)
            }
        }
    }

    fn check_files(&self) -> Result<(), VmmError> {
        let boot = &self.spec.boot;
        let firmware = boot.firmware.as_ref().and_then(|firmware| match self.kind {
            VmmKind::CloudHypervisor => firmware.cloud_hypervisor.as_ref(),
            VmmKind::Qemu => firmware.qemu.as_ref(),
        });
        if boot.firmware.is_some() && firmware.is_none() {
            return Err(VmmError::Unsupported {
                kind: self.kind,
                problem: format!("boot.firmware has no image for it; give `{}`", self.kind),
            });
        }
        for path in [boot.kernel.as_ref(), boot.initramfs.as_ref(), firmware]
            .into_iter()
            .flatten()
        {
            std::fs::File::open(path).map_err(VmmError::io("opening what the VM boots", path))?;
        }
        Ok(())
    }
}

/// Asks the guest to power off by `ask`, and kills it when there is no more patience; not if that is called off.
pub(crate) fn stop(
    root: &RuntimeRoot,
    kind: VmmKind,
    name: &str,
    patience: Patience<'_>,
    ask: impl FnOnce(&VmDir) -> Result<(), VmmError>,
) -> Result<Stopped, VmmError> {
    let dir = root.vm(name);
    let _lock = match dir.lock() {
        Err(VmmError::NotRunning { .. }) => return Ok(Stopped::WasNotRunning),
        other => other?,
    };
    let Some(process) = living(&dir, kind)? else {
        return Ok(Stopped::WasNotRunning);
    };
    // A VMM that cannot even be asked is one that needs to be killed; why it did not answer would not help here.
    if ask(&dir).is_ok() && process.wait(patience) {
        dir.clear()?;
        return Ok(Stopped::Graceful);
    }
    let graceful = !process.is_alive();
    if !graceful && patience.is_off() {
        return Err(VmmError::CalledOff);
    }
    end(&dir, name, &process)?;
    Ok(if graceful {
        Stopped::Graceful
    } else {
        Stopped::Killed
    })
}

/// Kills the VM, taking no lock: it must work while another command waits on the VM.
pub(crate) fn kill(root: &RuntimeRoot, kind: VmmKind, name: &str) -> Result<Stopped, VmmError> {
    let dir = root.vm(name);
    let Some(process) = living(&dir, kind)? else {
        return Ok(Stopped::WasNotRunning);
    };
    end(&dir, name, &process)?;
    Ok(Stopped::Killed)
}

/// The status of the VM, `phase` telling what its living VMM says.
pub(crate) fn status(
    root: &RuntimeRoot,
    kind: VmmKind,
    name: &str,
    phase: impl FnOnce(&VmDir) -> Result<Phase, VmmError>,
) -> Result<VmStatus, VmmError> {
    let dir = root.vm(name);
    let stopped = VmStatus {
        name: name.to_owned(),
        phase: Phase::Stopped,
        process: None,
        accel: None,
    };
    let Some(state) = dir.running()? else {
        return Ok(stopped);
    };
    dir.require(kind)?;
    match phase(&dir) {
        Ok(phase) => Ok(VmStatus {
            phase,
            process: Some(state.process),
            accel: Some(state.accel),
            ..stopped
        }),
        // It ended while it was asked.
        Err(_) if !state.process.is_alive() => Ok(stopped),
        Err(error) => Err(error),
    }
}

fn living(dir: &VmDir, kind: VmmKind) -> Result<Option<Process>, VmmError> {
    match dir.require(kind) {
        Ok(state) => Ok(Some(state.process)),
        Err(VmmError::NotRunning { .. }) => dir.clear_if_present().map(|()| None),
        Err(error) => Err(error),
    }
}

fn end(dir: &VmDir, name: &str, process: &Process) -> Result<(), VmmError> {
    process
        .kill()
        .map_err(VmmError::io("killing the VMM", format!("/proc/{}", process.pid)))?;
    if !process.wait(KILL_TIMEOUT.into()) {
        return Err(VmmError::Unkillable {
            name: name.to_owned(),
            pid: process.pid,
            seconds: KILL_TIMEOUT.as_secs(),
        });
    }
    dir.clear()
}
