//! Proves the guest machinery itself against a foreign back end (qemu-storage-daemon), so that a failure with our own data
//! plane is a failure of our data plane.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use unibody_tests::guest::backend::StorageDaemon;
use unibody_tests::guest::{GuestVolume, LinuxGuest, LinuxOptions, boot_files, pvh, tool, wait_until};
use unibody_vmm_adapter::{
    CloudHypervisor, Phase, Qemu, RuntimeRoot, Stopped, VmSpec, Vmm, VmmError, VmmKind, VolumeSpec, swap,
};

const SHORT: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(300);

fn cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest")
}

fn image(dir: &Path, bytes: u64) -> Result<PathBuf> {
    image_named(dir, "disk.img", bytes)
}

fn image_named(dir: &Path, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = dir.join(name);
    File::create(&path)?.set_len(bytes)?;
    Ok(path)
}

#[test]
fn a_linux_guest_makes_a_file_system_and_its_content_is_verified() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = image(dir.path(), 256 << 20)?;
    let daemon = StorageDaemon::start(&image, &dir.path().join("disk.sock"), 2)?;
    let volumes = vec![GuestVolume {
        socket: daemon.socket().to_path_buf(),
        queues: 2,
    }];
    let options = LinuxOptions {
        volumes,
        workdir: dir.path().to_path_buf(),
        cache: cache(),
        vcpus: 2,
    };
    let mut guest = LinuxGuest::start(&options)?;

    let (code, output) = guest.run("echo out; echo err >&2; exit 7", SHORT)?;
    ensure!(
        (code, output.as_str()) == (7, "out\nerr\n"),
        "the command port garbles: {code} {output:?}"
    );
    ensure!(
        guest.run("sleep 30", Duration::from_secs(1)).is_err(),
        "a command that takes too long must be an error"
    );
    drop(guest);

    daemon.stop();
    let daemon = StorageDaemon::start(&image, &dir.path().join("again.sock"), 2)?;
    let volumes = vec![GuestVolume {
        socket: daemon.socket().to_path_buf(),
        queues: 2,
    }];
    let mut guest = LinuxGuest::start(&LinuxOptions { volumes, ..options })?;
    guest.must(
        "test -b /dev/vda && mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt",
        LONG,
    )?;
    guest.begin(
        "fio --name=v --directory=/mnt --size=24m --rw=randwrite --bs=4k --ioengine=libaio --direct=1 --iodepth=16 \
         --verify=crc32c --do_verify=1 --verify_fatal=1",
    )?;
    let (code, output) = guest.finish(LONG)?;
    ensure!(
        code == 0 && output.contains("err= 0"),
        "fio ended with {code}:\n{output}"
    );
    guest.begin("false")?;
    ensure!(
        guest.finish(SHORT)?.0 == 1,
        "the exit code of a command in the background is lost"
    );
    guest.must("echo the-token >/mnt/token && sync && umount /mnt", SHORT)?;
    guest.poweroff()?;
    daemon.stop();

    let check = Command::new(tool("e2fsck", "e2fsprogs")?)
        .args(["-f", "-n"])
        .arg(&image)
        .output()?;
    ensure!(
        check.status.success(),
        "e2fsck: {}",
        String::from_utf8_lossy(&check.stdout)
    );
    let bytes = std::fs::read(&image)?;
    ensure!(
        bytes.windows(9).any(|window| window == b"the-token"),
        "what the guest wrote is not in the image"
    );
    Ok(())
}

/// One VM with one disk and our tiny kernel; killed when dropped, under whichever VMM it runs.
struct Bench {
    dir: tempfile::TempDir,
    root: RuntimeRoot,
    daemon: StorageDaemon,
    kernel: PathBuf,
}

impl Bench {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let image = image(dir.path(), 64 << 20)?;
        let daemon = StorageDaemon::start(&image, &dir.path().join("disk.sock"), 1)?;
        let root = RuntimeRoot::new(dir.path().join("run"));
        Ok(Bench {
            root,
            daemon,
            kernel: pvh::build(&cache())?,
            dir,
        })
    }

    /// The VM, to do `work`; each has a serial log of its own.
    fn spec(&self, work: &str) -> Result<VmSpec> {
        let (kernel, socket) = (self.kernel.display(), self.daemon.socket().display());
        let log = self.serial(work);
        Ok(VmSpec::parse(&format!(
            "name = 'tiny'\nmemory = '64M'\nserial_log = '{}'\n[boot]\nkernel = '{kernel}'\ncmdline = '{work}'\n\
             [[volumes]]\nname = 'root'\nsocket = '{socket}'\n",
            log.display()
        ))?)
    }

    fn serial(&self, work: &str) -> PathBuf {
        self.dir.path().join(format!("{}.serial", work.replace(' ', "-")))
    }

    /// Starts the VM, takes its verdict and waits until it has powered itself off.
    fn work(&self, vmm: &dyn Vmm, work: &str) -> Result<String> {
        let log = self.serial(work);
        if log.exists() {
            std::fs::remove_file(&log)?;
        }
        for notice in vmm.start(&self.spec(work)?)?.notices {
            eprintln!("{}: {notice}", vmm.kind());
        }
        let verdict = pvh::verdict(&log, LONG);
        ensure!(
            verdict.is_err()
                || wait_until(SHORT, || vmm
                    .status("tiny")
                    .is_ok_and(|status| status.phase == Phase::Stopped)),
            "{} did not end after its guest powered off",
            vmm.kind()
        );
        vmm.kill("tiny")?;
        verdict
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for kind in VmmKind::ALL {
            // It runs under one of them at most; the other refuses.
            let _ = kind.adapter(self.root.clone()).kill("tiny");
        }
    }
}

/// Says aloud that a test did nothing, and what would let it.
fn usable(vmm: &dyn Vmm, test: &str) -> bool {
    match vmm.probe() {
        Ok(probe) => {
            eprintln!("{test}: {} ({})", probe.version, probe.accel_reason);
            true
        }
        Err(error) => {
            eprintln!("SKIPPED {test}: {error}");
            false
        }
    }
}

fn proves_content(vmm: &dyn Vmm, bench: &Bench) -> Result<()> {
    let wrote = bench.work(vmm, "write one")?;
    ensure!(wrote.starts_with("wrote "), "{wrote}");
    let verified = bench.work(vmm, "verify one")?;
    ensure!(
        verified.replace("verified", "wrote") == wrote,
        "{verified} is another token than {wrote}"
    );
    let other = bench
        .work(vmm, "verify two")
        .err()
        .context("a guest that finds another token must fail")?;
    ensure!(other.to_string().contains("content differs"), "{other}");
    Ok(())
}

#[test]
fn the_tiny_guest_proves_a_disk_under_qemu() -> Result<()> {
    let bench = Bench::new()?;
    proves_content(&Qemu::new(bench.root.clone()), &bench)
}

#[test]
fn the_tiny_guest_proves_a_disk_under_cloud_hypervisor() -> Result<()> {
    let bench = Bench::new()?;
    let vmm = CloudHypervisor::new(bench.root.clone());
    if !usable(&vmm, "the_tiny_guest_proves_a_disk_under_cloud_hypervisor") {
        return Ok(());
    }
    proves_content(&vmm, &bench)
}

#[test]
fn a_vm_goes_to_the_other_vmm_and_back_with_its_disk() -> Result<()> {
    let bench = Bench::new()?;
    let (qemu, cloud) = (
        Qemu::new(bench.root.clone()),
        CloudHypervisor::new(bench.root.clone()),
    );
    if !usable(&cloud, "a_vm_goes_to_the_other_vmm_and_back_with_its_disk") {
        return Ok(());
    }
    let (there, back): (&dyn Vmm, &dyn Vmm) = (&cloud, &qemu);
    qemu.start(&bench.spec("hold there")?)?;
    pvh::verdict(&bench.serial("hold there"), LONG)?;
    let (stopped, _) = swap(&bench.spec("verify there")?, back, there, Duration::from_secs(1))?;
    ensure!(
        stopped == Stopped::Killed,
        "a guest that ignores its power button must be killed, not {stopped:?}"
    );
    pvh::verdict(&bench.serial("verify there"), LONG)?;
    cloud.kill("tiny")?;
    cloud.start(&bench.spec("hold back")?)?;
    pvh::verdict(&bench.serial("hold back"), LONG)?;
    swap(&bench.spec("verify back")?, there, back, Duration::from_secs(1))?;
    pvh::verdict(&bench.serial("verify back"), LONG)?;
    Ok(())
}

/// The life of a VM under one VMM, each step through an adapter made anew, as a new command would.
fn lives(kind: VmmKind) -> Result<()> {
    let bench = Bench::new()?;
    let vmm = || kind.adapter(RuntimeRoot::new(bench.root.path()));
    let phase = || vmm().status("tiny").map(|status| status.phase);
    ensure!(phase()? == Phase::Stopped);
    ensure!(vmm().stop("tiny", SHORT.into())? == Stopped::WasNotRunning);
    ensure!(matches!(vmm().pause("tiny"), Err(VmmError::NotRunning { .. })));

    let spec = bench.spec("hold x")?;
    let process = vmm().start(&spec)?.process;
    pvh::verdict(&bench.serial("hold x"), LONG)?;
    ensure!(phase()? == Phase::Running, "{:?}", phase()?);
    ensure!(unibody_vmm_adapter::find(&bench.root, "tiny")?.is_some_and(|found| found.kind() == kind));
    for other in VmmKind::ALL {
        let refused = other.adapter(bench.root.clone()).start(&spec);
        ensure!(
            matches!(
                refused,
                Err(VmmError::AlreadyRunning { .. } | VmmError::NoBinary { .. })
            ),
            "a second start under {other}: {refused:?}"
        );
    }
    vmm().pause("tiny")?;
    ensure!(phase()? == Phase::Paused);
    vmm().resume("tiny")?;
    ensure!(phase()? == Phase::Running);

    let more = image_named(bench.dir.path(), "more.img", 16 << 20)?;
    let daemon = StorageDaemon::start(&more, &bench.dir.path().join("more.sock"), 1)?;
    let volume = |name: &str, socket: &Path| VolumeSpec {
        name: name.to_owned(),
        socket: socket.to_path_buf(),
        queues: 1,
        readonly: false,
    };
    let nobody = vmm().add_volume("tiny", &volume("more", &bench.dir.path().join("nobody.sock")));
    ensure!(matches!(nobody, Err(VmmError::Volume { .. })), "{nobody:?}");
    vmm().add_volume("tiny", &volume("more", daemon.socket()))?;
    ensure!(
        bench.root.spec("tiny")?.volumes.len() == 2,
        "the kept specification must know the new volume"
    );
    ensure!(
        vmm()
            .add_volume("tiny", &volume("more", daemon.socket()))
            .is_err(),
        "twice the same volume"
    );
    let none = vmm().remove_volume("tiny", "none", SHORT.into());
    ensure!(matches!(none, Err(VmmError::Volume { .. })), "{none:?}");
    let kept = vmm()
        .remove_volume("tiny", "more", Duration::from_secs(2).into())
        .err()
        .context("this guest lets go of nothing")?;
    ensure!(kept.to_string().contains("did not let go"), "{kept}");
    ensure!(bench.root.spec("tiny")?.volumes.len() == 2);

    ensure!(process.is_alive());
    ensure!(vmm().stop("tiny", Duration::from_secs(1).into())? == Stopped::Killed);
    ensure!(!process.is_alive() && phase()? == Phase::Stopped);

    let mut broken = bench.spec("hold x")?;
    (broken.vcpus, broken.volumes[0].queues) = (9, 9);
    let failed = vmm()
        .start(&broken)
        .err()
        .context("the back end offers one queue, not nine")?;
    eprintln!("{kind} refuses: {failed}");
    ensure!(
        phase()? == Phase::Stopped,
        "a failed start must leave nothing behind"
    );
    Ok(())
}

#[test]
fn a_vm_lives_under_qemu() -> Result<()> {
    lives(VmmKind::Qemu)
}

#[test]
fn a_vm_lives_under_cloud_hypervisor() -> Result<()> {
    let vmm = VmmKind::CloudHypervisor.adapter(RuntimeRoot::from_env());
    if usable(&*vmm, "a_vm_lives_under_cloud_hypervisor") {
        lives(vmm.kind())
    } else {
        Ok(())
    }
}

/// What only a guest that takes part can show: a disk comes and goes while it runs, and it powers itself off when asked.
#[test]
fn a_linux_under_the_adapter_takes_part() -> Result<()> {
    let bench = Bench::new()?;
    let vmm = Qemu::new(bench.root.clone());
    let (kernel, initramfs) = boot_files(&cache(), bench.dir.path())?;
    let mut spec = bench.spec("console=ttyS0 watch")?;
    spec.memory = "512M".parse().map_err(anyhow::Error::msg)?;
    (spec.boot.kernel, spec.boot.initramfs) = (Some(kernel), Some(initramfs));
    let log = bench.serial("console=ttyS0 watch");
    let told = |disks: &str| {
        let line = format!("disks {disks}");
        ensure!(
            wait_until(SHORT, || pvh::verdict(&log, Duration::ZERO)
                .is_ok_and(|now| now == line)),
            "the guest does not see {disks}: {}",
            String::from_utf8_lossy(&std::fs::read(&log).unwrap_or_default())
        );
        Ok(())
    };
    vmm.start(&spec)?;
    told("/sys/block/vda")?;

    let more = image_named(bench.dir.path(), "more.img", 16 << 20)?;
    let daemon = StorageDaemon::start(&more, &bench.dir.path().join("more.sock"), 1)?;
    let volume = VolumeSpec {
        name: "more".to_owned(),
        socket: daemon.socket().to_path_buf(),
        queues: 1,
        readonly: false,
    };
    for _ in 0..2 {
        vmm.add_volume("tiny", &volume)?;
        told("/sys/block/vda /sys/block/vdb")?;
        vmm.remove_volume("tiny", "more", SHORT.into())?;
        told("/sys/block/vda")?;
        ensure!(bench.root.spec("tiny")?.volumes.len() == 1);
    }
    // A paused guest has to be woken to hear the button.
    vmm.pause("tiny")?;
    ensure!(
        vmm.stop("tiny", SHORT.into())? == Stopped::Graceful,
        "the guest did not power itself off"
    );
    Ok(())
}
