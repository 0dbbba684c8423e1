//! Real guests for tests: a Linux that obeys commands, and a tiny kernel of our own that also boots where a stock kernel is
//! too slow.
//!
//! Invariants: everything that waits has a time limit; every process started here is killed when its owner is dropped; what
//! is downloaded or built lands in the cache directory that the caller gives (inside the cargo target directory), and nothing
//! is installed on the machine.
//!
//! Deliberately absent: the VMM adapter under test. The Linux guest starts QEMU by itself, so that a broken adapter cannot
//! hide a broken data plane, or the other way round.

pub mod backend;
mod cpio;
mod kernel;
mod linux;
pub mod pvh;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

pub use linux::{GuestVolume, LinuxGuest, LinuxOptions, boot_files};

/// How often waiting code looks again.
const POLL: Duration = Duration::from_millis(20);

/// A child process that does not outlive its owner.
pub struct Owned(Child);

impl Owned {
    /// Takes over a child.
    pub fn new(child: Child) -> Self {
        Owned(child)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }

    /// Kills it with SIGKILL and collects it.
    pub fn kill(&mut self) {
        // Either it has ended already, which is what is wanted, or there is nothing more a test could do.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// Waits for its end; false if it has not come within `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> bool {
        wait_until(timeout, || !self.is_alive())
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until `condition` holds; false if it does not within `timeout`.
pub fn wait_until(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(POLL);
    }
}

/// Where a program is, or an error that names the Debian package which has it.
pub fn tool(name: &str, package: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/bin", "/sbin", "/usr/bin", "/usr/sbin"].map(PathBuf::from);
    let found = std::env::split_paths(&path)
        .chain(more)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    found.with_context(|| {
        format!("{name} is missing: install the Debian package {package} (`cargo xtask test` does so)")
    })
}

/// Runs a short command to its end and fails with its output if it fails.
fn run(command: &mut Command) -> Result<Output> {
    let output = command
        .output()
        .with_context(|| format!("{command:?} cannot be started"))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        bail!(
            "{command:?} ended with {}:\n{}",
            output.status,
            String::from_utf8_lossy(&text)
        );
    }
    Ok(output)
}

/// The last lines of a log, for an error message.
fn tail(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(25)..].join("\n")
}
