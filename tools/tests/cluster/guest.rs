//! A drill with a real Linux on the volume: its file system, and everything it was told is synced, outlive the nodes.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use unibody_tests::guest::{GuestVolume, LinuxGuest, LinuxOptions, boot_files, tool};

use crate::common::{Cluster, until};
use crate::{begin, end, pause};

const SHORT: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(300);
/// Four files of stamped blocks, written once and read back. With `verify_only` they are only read.
const FIO: &str = "fio --name=v --directory=/mnt --size=12m --numjobs=4 --group_reporting --rw=randwrite --bs=4k \
                   --ioengine=libaio --direct=1 --iodepth=4 --fsync=32 --verify=crc32c --verify_fatal=1 --randseed=7";

fn start(cluster: &Mutex<Cluster>, workdir: &Path) -> LinuxGuest {
    let volume = cluster.lock().unwrap().volume().unwrap();
    let options = LinuxOptions {
        volumes: vec![GuestVolume {
            socket: volume["socket"].as_str().unwrap().into(),
            queues: 1,
        }],
        workdir: workdir.to_owned(),
        cache: Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest"),
        vcpus: 1,
    };
    LinuxGuest::start(&options).unwrap()
}

/// Writes a file; with the command's end the guest has been told that it is durable.
fn mark(guest: &mut LinuxGuest, marks: &mut Vec<String>, what: &str) {
    guest
        .must(
            &format!("echo {what} | dd of=/mnt/{what} conv=fsync 2>/dev/null"),
            LONG,
        )
        .unwrap();
    marks.push(what.to_owned());
}

fn needs() -> anyhow::Result<PathBuf> {
    let dir = tempfile::tempdir()?;
    boot_files(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest"), dir.path())?;
    tool("qemu-system-x86_64", "qemu-system-x86")
}

#[test]
fn a_linux_guest_keeps_its_file_system_through_everything() {
    let name = "a_linux_guest_keeps_its_file_system_through_everything";
    if let Err(error) = needs() {
        eprintln!("SKIPPED {name}: {error:#}");
        return;
    }
    let Some(cluster) = begin(name, 3, 3) else {
        return;
    };
    cluster
        .lock()
        .unwrap()
        .run(1, &["volume", "attach", "v", "--on", "n1"]);
    cluster.lock().unwrap().healed();
    let workdir = tempfile::tempdir().unwrap();
    let mut guest = start(&cluster, workdir.path());
    let mut marks = Vec::new();
    guest
        .must("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt", LONG)
        .unwrap();
    mark(&mut guest, &mut marks, "begun");
    guest.begin(&format!("{FIO} --rate_iops=120")).unwrap();
    pause(1.0);

    for node in [2, 3] {
        cluster.lock().unwrap().kill(node);
        mark(&mut guest, &mut marks, &format!("without-n{node}"));
        cluster.lock().unwrap().revive(node);
        cluster.lock().unwrap().healed();
    }
    // The other nodes go on and the owner cannot reach one of them: it goes on with those it can.
    {
        let cluster = cluster.lock().unwrap();
        cluster.net.cut(1, 2);
        cluster.net.cut(2, 1);
    }
    mark(&mut guest, &mut marks, "cut-off-from-n2");
    cluster.lock().unwrap().net.mend();
    cluster.lock().unwrap().healed();
    guest
        .must("test ! -e /run/code", SHORT)
        .expect("fio is still at work");
    // The owner's own process: back before anybody misses it, it serves the guest's device again.
    {
        let mut cluster = cluster.lock().unwrap();
        cluster.kill(1);
        cluster.revive(1);
    }
    mark(&mut guest, &mut marks, "n1-was-killed");
    let (code, said) = guest.finish(LONG).unwrap();
    assert!(
        code == 0 && said.contains("err= 0"),
        "{said}\n{}",
        guest.console()
    );
    let complaints = guest.must("dmesg | grep -ci 'I/O error' || true", SHORT).unwrap();
    assert_eq!(complaints.trim(), "0", "{}", guest.console());
    until("the owner serves again", || {
        cluster.lock().unwrap().owner() == Some(1)
    });

    // All at once, the guest too: the power is gone.
    mark(&mut guest, &mut marks, "before-the-end");
    {
        let mut cluster = cluster.lock().unwrap();
        (1..=3).for_each(|node| cluster.kill(node));
        drop(guest);
        (1..=3).for_each(|node| cluster.revive(node));
        cluster.healed();
    }
    let mut guest = start(&cluster, workdir.path());
    guest.must("mount /dev/vda /mnt", LONG).unwrap();
    for what in &marks {
        let said = guest.must(&format!("cat /mnt/{what}"), SHORT).unwrap();
        assert_eq!(said.trim(), what);
    }
    let (code, said) = guest.run(&format!("{FIO} --verify_only"), LONG).unwrap();
    assert!(code == 0 && said.contains("err= 0"), "{said}");
    let check = guest.must("umount /mnt && e2fsck -fn /dev/vda", LONG).unwrap();
    assert!(check.contains("files"), "{check}");
    guest.poweroff().unwrap();
    end(cluster);
}
