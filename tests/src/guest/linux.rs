//! A real Linux under QEMU's emulation that does what a test tells it, line by line.
//!
//! Its first serial port is the console (a log file), its second takes commands. The root file system is an archive of our
//! own in memory with busybox, fio and the ext4 tools of the host; the volumes under test are its only disks.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::{Owned, POLL, kernel, run, tail, tool};

/// How long the guest may take until it obeys: it boots in seconds, but the machine may be busy.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// How long the end of the virtual machine may take once it was asked for.
const POWEROFF_TIMEOUT: Duration = Duration::from_secs(60);
/// Most bytes of output of one command.
const OUTPUT_BYTES_MAX: usize = 16 << 20;
/// Programs of the host that the guest gets, with their packages.
const PROGRAMS: &[(&str, &str)] = &[
    ("fio", "fio"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
];

/// A disk of the guest: `/dev/vda`, `/dev/vdb` and so on in their order.
pub struct GuestVolume {
    /// The vhost-user-blk socket.
    pub socket: PathBuf,
    /// Request queues.
    pub queues: u16,
}

/// What the guest is made of.
pub struct LinuxOptions {
    /// Its disks.
    pub volumes: Vec<GuestVolume>,
    /// For its logs and sockets.
    pub workdir: PathBuf,
    /// For what is fetched and built once; inside the cargo target directory (`env!("CARGO_TARGET_TMPDIR")`).
    pub cache: PathBuf,
    /// Virtual CPUs.
    pub vcpus: u32,
}

/// A running guest; killed when dropped.
pub struct LinuxGuest {
    qemu: Owned,
    port: UnixStream,
    console: PathBuf,
}

impl LinuxGuest {
    /// Boots a guest and returns when it obeys.
    ///
    /// # Errors
    /// A program or package is missing (the message says which), or the guest does not come up (the message has the end of
    /// its console).
    pub fn start(options: &LinuxOptions) -> Result<Self> {
        let qemu = tool("qemu-system-x86_64", "qemu-system-x86")?;
        let (kernel, initramfs) = boot_files(&options.cache, &options.workdir)?;
        let console = options.workdir.join("console.log");
        let socket = options.workdir.join("commands.sock");
        let log = fs::File::create(options.workdir.join("qemu.log"))?;
        let mut command = Command::new(qemu);
        command.args([
            "-machine",
            "q35,accel=tcg,memory-backend=mem0",
            "-cpu",
            "max",
            "-m",
            "512M",
        ]);
        command.args(["-object", "memory-backend-memfd,id=mem0,size=512M,share=on"]);
        command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        command.args(["-smp", &options.vcpus.to_string()]);
        command.arg("-serial").arg(format!("file:{}", console.display()));
        command.arg("-chardev").arg(format!(
            "socket,id=commands,path={},server=on,wait=off",
            socket.display()
        ));
        command.args(["-serial", "chardev:commands"]);
        command.arg("-kernel").arg(&kernel).arg("-initrd").arg(&initramfs);
        command.args([
            "-append",
            "console=ttyS0 panic=-1 loglevel=4 mitigations=off tsc=nowatchdog",
        ]);
        for (index, volume) in options.volumes.iter().enumerate() {
            let (path, queues) = (volume.socket.display(), volume.queues);
            command
                .arg("-chardev")
                .arg(format!("socket,id=disk{index},path={path},reconnect=1"));
            command.arg("-device").arg(format!(
                "vhost-user-blk-pci,chardev=disk{index},num-queues={queues}"
            ));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut qemu = Owned::new(command.spawn().context("starting QEMU")?);
        let port = connect(&socket, &mut qemu)
            .with_context(|| format!("QEMU did not start:\n{}", tail(&options.workdir.join("qemu.log"))))?;
        let mut guest = LinuxGuest { qemu, port, console };
        let deadline = Instant::now() + BOOT_TIMEOUT;
        loop {
            // Firmware and an early kernel may write to the port as well.
            if guest.read_line(deadline)?.ends_with("ready") {
                return Ok(guest);
            }
        }
    }

    /// Runs one line of shell in the guest: its exit code, and what it wrote to both outputs.
    ///
    /// # Errors
    /// No answer within `timeout`, or the guest is gone; the message has the end of its console.
    pub fn run(&mut self, line: &str, timeout: Duration) -> Result<(i32, String)> {
        if line.contains('\n') {
            bail!("a command for the guest is one line");
        }
        let deadline = Instant::now() + timeout;
        self.port.set_write_timeout(Some(timeout))?;
        self.port
            .write_all(format!("{line}\n").as_bytes())
            .with_context(|| self.trouble(line))?;
        let head = self.read_line(deadline).with_context(|| self.trouble(line))?;
        let mut words = head.split(' ');
        let (Some("exit"), Some(Ok(code)), Some(Ok(length))) = (
            words.next(),
            words.next().map(str::parse),
            words.next().map(str::parse::<usize>),
        ) else {
            bail!("the guest answered {head:?} to {line:?}");
        };
        if length > OUTPUT_BYTES_MAX {
            bail!("{line:?} wrote {length} bytes; let it write less");
        }
        let mut output = vec![0; length];
        self.read_exact(&mut output, deadline)
            .with_context(|| self.trouble(line))?;
        Ok((code, String::from_utf8_lossy(&output).into_owned()))
    }

    /// [`LinuxGuest::run`] of a command that must succeed: its output.
    ///
    /// # Errors
    /// As there, and if the exit code is not 0.
    pub fn must(&mut self, line: &str, timeout: Duration) -> Result<String> {
        match self.run(line, timeout)? {
            (0, output) => Ok(output),
            (code, output) => bail!("in the guest {line:?} ended with {code}:\n{output}"),
        }
    }

    /// Begins a command whose answer is taken later by [`LinuxGuest::finish`], so that the test can act in the meantime.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn begin(&mut self, line: &str) -> Result<()> {
        let line = format!(
            "rm -f /run/code; ({line}; echo $? >/run/code.new; mv /run/code.new /run/code) >/run/out 2>&1 &"
        );
        self.must(&line, Duration::from_secs(30)).map(drop)
    }

    /// Waits for the command of [`LinuxGuest::begin`]: its exit code, and what it wrote to both outputs.
    ///
    /// # Errors
    /// It has not ended within `timeout`.
    pub fn finish(&mut self, timeout: Duration) -> Result<(i32, String)> {
        let seconds = timeout.as_secs();
        let wait =
            format!("for i in $(seq {seconds}); do test -e /run/code && break; sleep 1; done; cat /run/code");
        // The sleeps of an emulated guest are longer than they should be.
        let code = self.must(&wait, timeout * 2 + Duration::from_secs(30))?;
        let code = code
            .trim()
            .parse()
            .context("the exit code of a command in the background")?;
        Ok((code, self.must("cat /run/out", Duration::from_secs(30))?))
    }

    /// Powers the guest off, after a sync, and waits for the end of QEMU.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn poweroff(mut self) -> Result<()> {
        self.port
            .write_all(b"sync; poweroff -f\n")
            .with_context(|| self.trouble("poweroff"))?;
        if !self.qemu.wait(POWEROFF_TIMEOUT) {
            bail!("{}", self.trouble("poweroff"));
        }
        Ok(())
    }

    /// Everything the guest wrote to its console so far.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into_owned()
    }

    fn trouble(&self, line: &str) -> String {
        format!(
            "the guest did not do {line:?}; the end of its console:\n{}",
            tail(&self.console)
        )
    }

    fn read_line(&mut self, deadline: Instant) -> Result<String> {
        let (mut line, mut byte) = (Vec::new(), [0]);
        loop {
            self.read_exact(&mut byte, deadline)
                .with_context(|| self.trouble("to answer"))?;
            match byte[0] {
                b'\n' => return Ok(String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned()),
                other if line.len() < 4096 => line.push(other),
                _ => bail!("the guest does not end its line"),
            }
        }
    }

    fn read_exact(&mut self, mut buffer: &mut [u8], deadline: Instant) -> Result<()> {
        while !buffer.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("time is up");
            }
            self.port.set_read_timeout(Some(left))?;
            match self.port.read(buffer) {
                Ok(0) => bail!("QEMU has ended"),
                Ok(count) => buffer = &mut buffer[count..],
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// The kernel (in `cache`) and the initial file system (in `workdir`) of this guest, for a test that starts a VMM itself.
///
/// With `console=ttyS0 watch` as its command line the guest tells its disks on the console, as `UNIBODY-GUEST OK disks` and
/// their names below `/sys/block`, whenever they change, and powers off at the power button.
///
/// # Errors
/// A program or package is missing; the message says which.
pub fn boot_files(cache: &Path, workdir: &Path) -> Result<(PathBuf, PathBuf)> {
    let kernel = kernel::get(cache)?;
    let initramfs = workdir.join("initramfs");
    fs::write(&initramfs, initramfs_bytes(&kernel)?)?;
    Ok((kernel.image, initramfs))
}

fn connect(socket: &Path, qemu: &mut Owned) -> Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(error) if !qemu.is_alive() || Instant::now() >= deadline => return Err(error.into()),
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

/// The guest's root file system.
fn initramfs_bytes(kernel: &kernel::Kernel) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    archive.device("dev/console", 5, 1);
    archive.file("init", include_bytes!("../../guest/init.sh"));
    archive.file("bin/busybox", &fs::read(tool("busybox", "busybox-static")?)?);
    let mut order = String::new();
    for path in &kernel.modules {
        let name = path
            .file_name()
            .context("a module without a name")?
            .to_string_lossy();
        archive.file(&format!("modules/{name}"), &fs::read(path)?);
        order += &format!("{name}\n");
    }
    archive.file("modules/order", order.as_bytes());
    let mut libraries = std::collections::BTreeSet::new();
    for (program, package) in PROGRAMS {
        let path = tool(program, package)?;
        libraries.extend(shared_libraries(&path)?);
        archive.file(&format!("usr/bin/{program}"), &fs::read(&path)?);
    }
    for library in libraries {
        archive.file(library.trim_start_matches('/'), &fs::read(&library)?);
    }
    Ok(archive.finish())
}

/// Paths of the shared libraries and the loader that a program needs.
fn shared_libraries(program: &Path) -> Result<Vec<String>> {
    let output = run(Command::new(tool("ldd", "libc-bin")?).arg(program))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if text.contains("not found") {
        bail!("{} lacks shared libraries:\n{text}", program.display());
    }
    // Lines are `name => /path (address)`, or `/path (address)` for the loader.
    Ok(text
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(str::to_owned)
        .collect())
}
