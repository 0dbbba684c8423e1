//! A foreign vhost-user-blk back end: qemu-storage-daemon on a file. It proves the guests themselves, and is the yardstick
//! beside which our own data plane stands.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Owned, tail, tool, wait_until};

/// How long the daemon may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running qemu-storage-daemon; killed when dropped.
pub struct StorageDaemon {
    process: Owned,
    socket: PathBuf,
}

impl StorageDaemon {
    /// Serves the file `image` on `socket`.
    ///
    /// # Errors
    /// The program is missing or does not come to listen.
    pub fn start(image: &Path, socket: &Path, queues: u16) -> Result<Self> {
        let log = socket.with_extension("log");
        let output = std::fs::File::create(&log)?;
        let child = Command::new(tool("qemu-storage-daemon", "qemu-system-x86")?)
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={}", image.display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={queues}",
                socket.display()
            ))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("starting qemu-storage-daemon")?;
        let mut process = Owned::new(child);
        if !wait_until(START_TIMEOUT, || socket.exists() || !process.is_alive()) || !process.is_alive() {
            bail!(
                "qemu-storage-daemon does not serve {}:\n{}",
                socket.display(),
                tail(&log)
            );
        }
        Ok(StorageDaemon {
            process,
            socket: socket.to_path_buf(),
        })
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Ends it; what it has acknowledged is in the file's page cache.
    pub fn stop(mut self) {
        self.process.kill();
    }
}
