//! Real guests on a real node: what a VM sees while disks fail and the data plane dies under it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use unibody_control::admin::Request;
use unibody_tests::guest::{GuestVolume, LinuxGuest, LinuxOptions, pvh, wait_until};
use unibody_tests::node::Node;
use unibody_vmm_adapter::{CloudHypervisor, Phase, Qemu, RuntimeRoot, VmSpec, Vmm, VmmKind, swap};

const SHORT: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(300);
const VOLUME: &str = "size=256M,mirror=2";

fn cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest")
}

fn linux(node: &Node, dir: &Path) -> Result<LinuxGuest> {
    let volumes = vec![GuestVolume {
        socket: node.socket(),
        queues: 1,
    }];
    LinuxGuest::start(&LinuxOptions {
        volumes,
        workdir: dir.to_path_buf(),
        cache: cache(),
        vcpus: 1,
    })
}

/// mkfs, mount, fio with verification; meanwhile a disk fails and returns and the data plane is killed and restarted. Then
/// power-off, and everything is checked from outside.
#[test]
fn a_linux_guest_lives_through_a_failed_disk_and_a_killed_data_plane() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    Node::format(dir, 3, 512 << 20)?;
    let node = Node::start(dir, 3, VOLUME)?;
    let mut guest = linux(&node, dir)?;
    guest.must(
        "mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && echo before >/mnt/token && sync",
        LONG,
    )?;
    guest.begin(
        "fio --name=v --directory=/mnt --size=48m --rw=randrw --rwmixread=30 --bs=4k --ioengine=libaio --direct=1 --iodepth=8 \
         --fsync=64 --rate_iops=1500 --verify=crc32c --do_verify=1 --verify_fatal=1 --loops=2",
    )?;
    std::thread::sleep(Duration::from_secs(3));
    let disk = node.disk(1);
    node.ask(&Request::DiskFail { disk: disk.clone() })?;
    node.wait("the failed disk is out", |status| {
        status.volumes[0].state == "degraded" && status.disks[1].state == "failed"
    })?;
    std::thread::sleep(Duration::from_secs(1));
    node.ask(&Request::DiskReturn { disk })?;
    node.heal()?;
    std::thread::sleep(Duration::from_secs(1));
    node.kill()?;
    let node = Node::start(dir, 3, VOLUME)?;
    node.wait("the guest is back", |status| {
        status.volumes[0].counters.get("connected") == Some(&1)
    })?;
    let (code, output) = guest.finish(LONG)?;
    ensure!(
        code == 0 && output.contains("err= 0"),
        "fio ended with {code}:\n{output}\n{}",
        guest.console()
    );
    let token = guest.must(
        "cat /mnt/token && echo after >>/mnt/token && sync && umount /mnt",
        SHORT,
    )?;
    ensure!(token.contains("before"), "{token}");
    let complaints = guest.must("dmesg | grep -ci 'I/O error' || true", SHORT)?;
    ensure!(
        complaints.trim() == "0",
        "the guest saw I/O errors: {}",
        guest.console()
    );
    guest.poweroff()?;
    node.heal()?;
    let volume = node.status()?.volumes.remove(0);
    ensure!(
        volume.counters["blocks_lost"] == 0 && volume.counters["errors_io"] == 0,
        "{volume:?}"
    );
    node.finish()?;

    // Another life: the file system is clean and has both lines.
    let node = Node::start(dir, 3, VOLUME)?;
    let mut guest = linux(&node, dir)?;
    let check = guest.must("e2fsck -fn /dev/vda", LONG)?;
    ensure!(check.contains("clean") || check.contains("files"), "{check}");
    let token = guest.must("mount -o ro /dev/vda /mnt && cat /mnt/token", SHORT)?;
    ensure!(token.contains("before") && token.contains("after"), "{token}");
    guest.poweroff()?;
    node.finish()
}

/// Our tiny guest writes, flushes and reads back under QEMU, then under Cloud Hypervisor, and back again; each finds what the
/// other wrote, also after the data plane was killed in between.
#[test]
fn a_vm_is_swapped_between_vmms_on_one_volume() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    Node::format(dir, 2, 256 << 20)?;
    let node = Node::start(dir, 2, "size=64M,mirror=2")?;
    let kernel = pvh::build(&cache())?;
    let root = RuntimeRoot::new(dir.join("run"));
    let (qemu, cloud) = (Qemu::new(root.clone()), CloudHypervisor::new(root.clone()));
    let ending = Ending(root);
    let log = |work: &str| dir.join(format!("{}.serial", work.replace(' ', "-")));
    let spec = |work: &str| {
        VmSpec::parse(&format!(
            "name = 'tiny'\nmemory = '64M'\nserial_log = '{}'\n[boot]\nkernel = '{}'\ncmdline = '{work}'\n[[volumes]]\n\
             name = 'root'\nsocket = '{}'\n",
            log(work).display(),
            kernel.display(),
            dir.join("v.sock").display()
        ))
    };
    let run = |vmm: &dyn Vmm, work: &str| -> Result<String> {
        vmm.start(&spec(work)?)?;
        let verdict = pvh::verdict(&log(work), LONG)?;
        ensure!(wait_until(SHORT, || vmm
            .status("tiny")
            .is_ok_and(|status| status.phase == Phase::Stopped)));
        vmm.kill("tiny")?;
        Ok(verdict)
    };
    ensure!(run(&qemu, "write one")?.starts_with("wrote "));
    if let Err(error) = cloud.probe() {
        eprintln!(
            "SKIPPED the half of a_vm_is_swapped_between_vmms_on_one_volume that needs Cloud Hypervisor: {error}"
        );
        run(&qemu, "verify one")?;
        return node.finish();
    }
    run(&cloud, "verify one")?;
    run(&cloud, "write two")?;
    node.kill()?;
    let node = Node::start(dir, 2, "size=64M,mirror=2")?;
    run(&qemu, "verify two")?;

    cloud.start(&spec("hold three")?)?;
    pvh::verdict(&log("hold three"), LONG)?;
    swap(&spec("verify three")?, &cloud, &qemu, Duration::from_secs(1))?;
    pvh::verdict(&log("verify three"), LONG)?;
    drop(ending);
    node.finish()
}

/// No VM outlives its test.
struct Ending(RuntimeRoot);

impl Drop for Ending {
    fn drop(&mut self) {
        for kind in VmmKind::ALL {
            // It runs under one of them at most; the other refuses.
            kind.adapter(self.0.clone()).kill("tiny").ok();
        }
    }
}

/// What comes out of the volume is what the guest wrote, on every replica: each disk is taken away in turn.
#[test]
fn every_replica_alone_has_the_guests_file_system() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let dir = dir.path();
    Node::format(dir, 2, 512 << 20)?;
    let node = Node::start(dir, 2, VOLUME)?;
    let mut guest = linux(&node, dir)?;
    guest.must(
        "mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && dd if=/dev/urandom of=/mnt/big bs=1M count=24 2>/dev/null && \
         sha256sum /mnt/big | cut -d' ' -f1 >/mnt/sum && umount /mnt",
        LONG,
    )?;
    for disk in 0..2 {
        let name = node.disk(disk);
        node.ask(&Request::DiskFail { disk: name.clone() })?;
        node.wait("the disk is out", |status| {
            status.disks[disk].state == "failed" && status.volumes[0].state == "degraded"
        })?;
        guest.must("echo 3 >/proc/sys/vm/drop_caches; e2fsck -fn /dev/vda", LONG)?;
        guest.must("mount -o ro /dev/vda /mnt && test $(sha256sum /mnt/big | cut -d' ' -f1) = $(cat /mnt/sum) && umount /mnt", LONG)?;
        node.ask(&Request::DiskReturn { disk: name })?;
        node.heal()?;
    }
    guest.poweroff()?;
    node.finish()
}
