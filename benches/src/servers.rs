//! The contenders: how each is started, pinned to core 0, and stopped.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::Args;

/// Where a disk file lies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// On tmpfs.
    Tmpfs,
    /// On the disk behind `--dir`, past the page cache.
    Disk,
}

/// Who is measured.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contender {
    /// `unibody serve` with these disks, one replica on each.
    Unibody(&'static [&'static str]),
    /// `unibody serve` with one formatted disk file.
    UnibodyFile(Place),
    /// qemu-storage-daemon without a disk.
    QsdNull,
    /// qemu-storage-daemon with a tmpfs file, by io_uring.
    Qsd,
    /// fio by io_uring on a raw file, no server at all.
    Fio(Place),
}

impl Contender {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Contender::Unibody(_) | Contender::UnibodyFile(_) => "unibody",
            Contender::QsdNull => "qemu-storage-daemon null-co",
            Contender::Qsd => "qemu-storage-daemon tmpfs",
            Contender::Fio(_) => "fio io_uring",
        }
    }
}

/// Bytes of a disk file: enough for 512 MiB of data, its journal and its records.
const FILE: &str = "1536M";

/// A server that ends with its value, and what it leaves behind.
pub(crate) struct Server {
    child: Child,
    socket: PathBuf,
    litter: Vec<PathBuf>,
}

impl Server {
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already, and what it left may be gone.
        self.child.kill().ok();
        self.child.wait().ok();
        std::fs::remove_file(&self.socket).ok();
        for path in &self.litter {
            if path.is_dir() {
                std::fs::remove_dir_all(path).ok()
            } else {
                std::fs::remove_file(path).ok()
            };
        }
    }
}

fn file(args: &Args, place: Place, name: &str) -> PathBuf {
    let name = format!("unibody-bench-{}-{name}", std::process::id());
    match place {
        Place::Tmpfs => Path::new("/dev/shm").join(name),
        Place::Disk => args.dir.join(name),
    }
}

/// Starts `unibody serve` and waits until it is ready. All its threads begin on core 0; the client has core 1 to itself.
pub(crate) fn unibody(
    args: &Args,
    flags: &[String],
    socket: PathBuf,
    litter: Vec<PathBuf>,
) -> Result<Server> {
    let mut command = Command::new("taskset");
    command
        .args(["-c", "0"])
        .arg(&args.unibody)
        .args(["serve", "--cores", "0"])
        .args(flags);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("unibody does not start")?;
    let output = child.stdout.take().context("no output")?;
    let server = Server {
        child,
        socket,
        litter,
    };
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    ensure!(
        line.trim() == "ready",
        "unibody serve {flags:?} did not say ready"
    );
    Ok(server)
}

pub(crate) fn start(args: &Args, contender: &Contender) -> Result<Server> {
    let socket = std::env::temp_dir().join(format!("unibody-bench-{}.sock", std::process::id()));
    let volume = |copies: usize| format!("bench,size=1G,mirror={copies},socket={}", socket.display());
    match *contender {
        Contender::Unibody(disks) => {
            let mut flags: Vec<String> = disks
                .iter()
                .flat_map(|disk| ["--disk".into(), (*disk).into()])
                .collect();
            flags.extend(["--volume".into(), volume(disks.len())]);
            unibody(args, &flags, socket, Vec::new())
        }
        Contender::UnibodyFile(place) => {
            let (disk, state) = (file(args, place, "disk"), file(args, Place::Tmpfs, "state"));
            // As for the peer. Formatting gives the space back, so filling the range allocates it anew before the measurement;
            // only the journal's first round does so during it.
            fill_file(&disk)?;
            let format = Command::new(&args.unibody)
                .args(["disk", "format"])
                .arg(&disk)
                .arg("--force")
                .output()?;
            ensure!(
                format.status.success(),
                "{}",
                String::from_utf8_lossy(&format.stderr)
            );
            let flags: Vec<String> = vec![
                "--disk".into(),
                disk.display().to_string(),
                "--state".into(),
                state.display().to_string(),
                "--volume".into(),
                volume(1),
            ];
            unibody(args, &flags, socket, vec![disk, state])
        }
        Contender::QsdNull | Contender::Qsd => qsd(args, *contender == Contender::QsdNull, socket),
        Contender::Fio(_) => bail!("fio is no server"),
    }
}

fn qsd(args: &Args, null: bool, socket: PathBuf) -> Result<Server> {
    let mut command = Command::new("taskset");
    command.args([
        "-c",
        "0",
        "qemu-storage-daemon",
        "--object",
        "iothread,id=t,poll-max-ns=1000000",
    ]);
    let mut litter = Vec::new();
    if null {
        command.args([
            "--blockdev",
            "driver=null-co,size=1073741824,node-name=n,read-zeroes=off",
        ]);
    } else {
        let path = file(args, Place::Tmpfs, "qsd");
        std::fs::File::create(&path)?.set_len(1 << 30)?;
        let below = format!(
            "driver=file,filename={},aio=io_uring,cache.direct=off,node-name=f",
            path.display()
        );
        command.args([
            "--blockdev",
            &below,
            "--blockdev",
            "driver=raw,file=f,node-name=n",
        ]);
        litter.push(path);
    }
    let export = "type=vhost-user-blk,id=e,node-name=n,writable=on,iothread=t,addr.type=unix,addr.path=";
    command.args(["--export", &format!("{export}{}", socket.display())]);
    let child = command
        .spawn()
        .context("qemu-storage-daemon does not start: install qemu-system-x86")?;
    let server = Server {
        child,
        socket,
        litter,
    };
    let end = Instant::now() + Duration::from_secs(10);
    while !server.socket.exists() {
        ensure!(Instant::now() < end, "qemu-storage-daemon made no socket in 10 s");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(server)
}

fn fill_file(path: &Path) -> Result<()> {
    let status = Command::new("dd")
        .args([
            "if=/dev/zero",
            "bs=1M",
            &format!("count={}", FILE.trim_end_matches('M')),
            "conv=fsync",
            "status=none",
        ])
        .arg(format!("of={}", path.display()))
        .status()?;
    ensure!(status.success(), "{} can not be written", path.display());
    Ok(())
}

/// fio on a raw file, on core 1 like the load generator; its requests are served in its own context.
pub(crate) fn fio(
    args: &Args,
    place: Place,
    rw: &str,
    bs: &str,
    depth: &str,
    seconds: &str,
) -> Result<Value> {
    let path = file(args, place, "fio");
    fill_file(&path)?;
    let mut command = Command::new("taskset");
    command.args([
        "-c",
        "1",
        "fio",
        "--thread",
        "--name=peer",
        "--ioengine=io_uring",
        "--registerfiles",
        "--fixedbufs",
        "--norandommap",
    ]);
    command.args([
        "--size=512M",
        "--time_based",
        "--ramp_time=0.5",
        "--output-format=json",
        "--group_reporting",
    ]);
    command.args([
        format!("--direct={}", u8::from(place == Place::Disk)),
        format!("--filename={}", path.display()),
    ]);
    command.args([
        format!("--rw={rw}"),
        format!("--bs={bs}"),
        format!("--iodepth={depth}"),
        format!("--runtime={seconds}"),
    ]);
    let output = command.output().context("fio does not start: install fio")?;
    std::fs::remove_file(&path).ok();
    ensure!(
        output.status.success(),
        "fio: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}
