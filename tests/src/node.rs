//! The real program as a child process: a node on disk files, for tests with real guests.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use unibody_control::admin::{NodeStatus, Request, call};

const PATIENCE: Duration = Duration::from_secs(120);

/// The program: `UNIBODY`, or the release build beside these tests.
fn program() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("UNIBODY") {
        return Ok(path.into());
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR_PARENT"));
    let path = target.join("release/unibody");
    ensure!(
        path.exists(),
        "{} is not there: cargo build --release -p unibody-tools",
        path.display()
    );
    Ok(path)
}

/// A node; killed when dropped.
pub struct Node {
    child: Child,
    dir: PathBuf,
    disks: usize,
}

impl Drop for Node {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Node {
    /// Formats `disks` disk files in `dir`.
    ///
    /// # Errors
    /// When a disk can not be formatted.
    pub fn format(dir: &Path, disks: usize, bytes: u64) -> Result<()> {
        for disk in 0..disks {
            unibody_control::node::format_disk(&disk_path(dir, disk), Some(bytes), None, true)?;
        }
        Ok(())
    }

    /// Starts a node on the first `disks` disks of `dir`, serving volume `v` as `dir/v.sock`.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn start(dir: &Path, disks: usize, volume: &str) -> Result<Self> {
        let mut command = Command::new(program()?);
        command
            .arg("serve")
            .args(["--cores", "0"])
            .arg("--state")
            .arg(dir.join("state"));
        for disk in 0..disks {
            command.arg("--disk").arg(disk_path(dir, disk));
        }
        command.args([
            "--volume",
            &format!("v,{volume},socket={}", dir.join("v.sock").display()),
        ]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let output = child.stdout.take().context("the node has no output")?;
        let node = Node {
            child,
            dir: dir.to_path_buf(),
            disks,
        };
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line)?;
        ensure!(line == "ready\n", "the node did not start");
        Ok(node)
    }

    /// The volume's socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("v.sock")
    }

    /// Name of a disk of this node.
    pub fn disk(&self, disk: usize) -> String {
        disk_path(&self.dir, disk).display().to_string()
    }

    /// Asks the node for something.
    ///
    /// # Errors
    /// When it refuses.
    pub fn ask(&self, request: &Request) -> Result<serde_json::Value> {
        Ok(call(&self.dir.join("state/control.sock"), request)?)
    }

    /// The node's state.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<NodeStatus> {
        Ok(serde_json::from_value(self.ask(&Request::Status)?)?)
    }

    /// Waits for a state.
    ///
    /// # Errors
    /// When it does not come.
    pub fn wait(&self, what: &str, is: impl Fn(&NodeStatus) -> bool) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.status()?;
            if is(&status) {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("{what}: not within {} s: {status:?}", PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until every replica is in sync and nothing is left to compare.
    ///
    /// # Errors
    /// When redundancy does not come back.
    pub fn heal(&self) -> Result<()> {
        self.wait("full redundancy", |status| {
            status
                .volumes
                .iter()
                .all(|v| v.state == "healthy" && v.regions_to_heal == 0 && v.in_sync == v.replicas)
        })
    }

    /// SIGKILL.
    ///
    /// # Errors
    /// When it had ended already.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// SIGTERM, then an offline check of every disk.
    ///
    /// # Errors
    /// When it does not end cleanly, or a disk is damaged.
    pub fn finish(mut self) -> Result<()> {
        ensure!(
            Command::new("kill")
                .arg(self.child.id().to_string())
                .status()?
                .success()
        );
        let status = self.child.wait()?;
        ensure!(status.success(), "the node ended with {status}");
        for disk in 0..self.disks {
            let report = unibody_control::node::check_disk(&disk_path(&self.dir, disk), &mut |_, _| {})?;
            let first = report.findings.first().map(ToString::to_string);
            ensure!(
                report.findings_total == 0 && report.in_doubt == 0 && report.closed,
                "disk {disk}: {first:?}, {report:?}"
            );
        }
        Ok(())
    }
}

fn disk_path(dir: &Path, disk: usize) -> PathBuf {
    dir.join(format!("disk{disk}.img"))
}
