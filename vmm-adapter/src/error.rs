//! What can go wrong with a running VM, and what to do about it.

use std::path::PathBuf;

use crate::VmmKind;
use crate::spec::SpecError;

/// Why an operation on a VM failed.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The specification itself.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The VMM's program is not there.
    #[error("{kind} is not installed: {searched}; install it or point {variable} at the program")]
    NoBinary {
        /// Which VMM.
        kind: VmmKind,
        /// Where it was looked for.
        searched: String,
        /// The environment variable that names it.
        variable: &'static str,
    },
    /// The specification asks for what this VMM or this machine cannot do.
    #[error("{kind} cannot run this VM here: {problem}")]
    Unsupported {
        /// Which VMM.
        kind: VmmKind,
        /// What is missing and what to change.
        problem: String,
    },
    /// A volume cannot be attached.
    #[error("volume {volume}: {problem}")]
    Volume {
        /// Name of the volume.
        volume: String,
        /// What is wrong and what to do.
        problem: String,
    },
    /// Start of a VM that runs.
    #[error("VM {name} is already running under {kind} (pid {pid}); stop it first")]
    AlreadyRunning {
        /// The VM.
        name: String,
        /// Under which VMM.
        kind: VmmKind,
        /// Its process.
        pid: u32,
    },
    /// An operation that needs a running VM.
    #[error("VM {name} is not running; start it first")]
    NotRunning {
        /// The VM.
        name: String,
    },
    /// The VM runs, but under the other VMM.
    #[error("VM {name} runs under {running}, not under {asked}; address it there, or swap it")]
    OtherVmm {
        /// The VM.
        name: String,
        /// What runs it.
        running: VmmKind,
        /// What was asked.
        asked: VmmKind,
    },
    /// Another command holds the VM.
    #[error("another command is working on VM {name}; wait for it, or look who holds {lock}")]
    Busy {
        /// The VM.
        name: String,
        /// The lock file.
        lock: PathBuf,
    },
    /// The VMM ended while it was being started.
    #[error("{kind} ended while starting the VM; the end of its log {log} says:\n{tail}")]
    StartFailed {
        /// Which VMM.
        kind: VmmKind,
        /// Its log.
        log: PathBuf,
        /// Last lines of it.
        tail: String,
    },
    /// The VMM refused a request.
    #[error("{kind} refused {request}: {answer}")]
    Refused {
        /// Which VMM.
        kind: VmmKind,
        /// What was asked of it.
        request: &'static str,
        /// What it said.
        answer: String,
    },
    /// The VMM does not answer.
    #[error("{kind} did not answer {request} on {socket} within {seconds} s; if it stays so, kill the VM")]
    NoAnswer {
        /// Which VMM.
        kind: VmmKind,
        /// What was asked of it.
        request: &'static str,
        /// Its API socket.
        socket: PathBuf,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The wait for a guest was called off.
    #[error("it was called off, since the VM is to end")]
    CalledOff,
    /// A process that does not go away.
    #[error(
        "process {pid} of VM {name} did not end within {seconds} s of being killed; it hangs in the kernel, look at its stack"
    )]
    Unkillable {
        /// The VM.
        name: String,
        /// Its process.
        pid: u32,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A file or a system call.
    #[error("{what} failed for {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl VmmError {
    /// For `map_err`: an I/O error with its operation and path.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| VmmError::Io { what, path, source }
    }
}
