//! Proves the guest machinery itself against a foreign back end (qemu-storage-daemon), so that a failure with our own data
//! plane is a failure of our data plane.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use unibody_tests::guest::backend::StorageDaemon;
use unibody_tests::guest::{GuestVolume, LinuxGuest, LinuxOptions, tool};

const SHORT: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_secs(300);

fn cache() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest")
}

fn image(dir: &Path, bytes: u64) -> Result<PathBuf> {
    let path = dir.join("disk.img");
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
    guest.must(
        "fio --name=v --directory=/mnt --size=24m --rw=randwrite --bs=4k --ioengine=libaio --direct=1 --iodepth=16 \
         --verify=crc32c --do_verify=1 --verify_fatal=1",
        LONG,
    )?;
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
