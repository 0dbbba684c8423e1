//! The command line of QEMU for a specification, and the names it gives to devices, which later requests repeat.

use std::path::Path;

use crate::spec::VOLUMES_MAX;
use crate::{Accel, VmSpec};

/// Root ports left empty for volumes added later.
pub(crate) const SPARE_PORTS: usize = 4;
/// Seconds between attempts to reach a data plane that went away.
const RECONNECT_SECONDS: u32 = 1;

pub(crate) fn device_id(volume: &str) -> String {
    format!("vol-{volume}")
}

pub(crate) fn chardev_id(volume: &str) -> String {
    format!("chr-{volume}")
}

/// Key and value of the reconnect time: milliseconds since 9.2, whole seconds before.
pub(crate) fn reconnect(version: (i64, i64)) -> (&'static str, u32) {
    if version >= (9, 2) {
        ("reconnect-ms", RECONNECT_SECONDS * 1000)
    } else {
        ("reconnect", RECONNECT_SECONDS)
    }
}

/// Major and minor version from the first line of `--version`; (0, 0), the oldest, if it is unreadable.
pub(crate) fn parse_version(line: &str) -> (i64, i64) {
    let number = line.split_once("version ").map_or("", |(_, rest)| rest);
    let mut parts = number
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse().ok());
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

/// A path inside a QEMU option: a comma is doubled, or it would begin the next option.
fn quoted(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

pub(crate) fn arguments(spec: &VmSpec, accel: Accel, api: &Path, version: (i64, i64)) -> Vec<String> {
    let mut args: Vec<String> = Vec::new();
    let mut option = |name: &str, value: String| args.extend([format!("-{name}"), value]);
    let (accel, cpu) = match accel {
        Accel::Kvm => ("kvm", "host"),
        Accel::Tcg => ("tcg", "max"),
    };
    option("name", spec.name.clone());
    option("machine", format!("q35,accel={accel},memory-backend=mem0"));
    option("cpu", cpu.to_owned());
    option("smp", spec.vcpus.to_string());
    option("m", format!("{}M", spec.memory.0 >> 20));
    option(
        "object",
        format!("memory-backend-memfd,id=mem0,size={},share=on", spec.memory.0),
    );
    option("display", "none".to_owned());
    option("qmp", format!("unix:{},server=on,wait=off", quoted(api)));
    match &spec.serial_log {
        Some(path) => {
            option(
                "chardev",
                format!("file,id=serial0,path={},append=on", quoted(path)),
            );
            option("serial", "chardev:serial0".to_owned());
        }
        None => option("serial", "null".to_owned()),
    }
    for (flag, path) in [("kernel", &spec.boot.kernel), ("initrd", &spec.boot.initramfs)] {
        if let Some(path) = path {
            option(flag, path.to_string_lossy().into_owned());
        }
    }
    if let Some(cmdline) = &spec.boot.cmdline {
        option("append", cmdline.clone());
    }
    if let Some(path) = spec
        .boot
        .firmware
        .as_ref()
        .and_then(|firmware| firmware.qemu.as_ref())
    {
        option("bios", path.to_string_lossy().into_owned());
    }
    // No I/O ports behind a root port: virtio does without, and there are not enough for many.
    for port in 0..(spec.volumes.len() + SPARE_PORTS).min(VOLUMES_MAX) {
        option(
            "device",
            format!("pcie-root-port,id=port{port},chassis={port},slot={port},io-reserve=0"),
        );
    }
    let (key, value) = reconnect(version);
    for (port, volume) in spec.volumes.iter().enumerate() {
        let (id, chardev) = (device_id(&volume.name), chardev_id(&volume.name));
        option(
            "chardev",
            format!(
                "socket,id={chardev},path={},{key}={value}",
                quoted(&volume.socket)
            ),
        );
        option(
            "device",
            format!(
                "vhost-user-blk-pci,id={id},chardev={chardev},num-queues={},bus=port{port}",
                volume.queues
            ),
        );
    }
    for (index, network) in spec.networks.iter().enumerate() {
        let mac = network
            .mac
            .as_ref()
            .map(|mac| format!(",mac={mac}"))
            .unwrap_or_default();
        option(
            "netdev",
            format!("tap,id=net{index},ifname={},script=no,downscript=no", network.tap),
        );
        option("device", format!("virtio-net-pci,netdev=net{index}{mac}"));
    }
    args.extend(["-nodefaults".to_owned(), "-no-user-config".to_owned()]);
    args
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec::parse(
            "name='v'\nvcpus=3\nmemory='1G'\nserial_log='/a,b'\n[boot]\nkernel='/k'\ncmdline='x y'\n\
             [[volumes]]\nname='root'\nsocket='/s,1'\nqueues=2\n[[networks]]\ntap='tap0'\nmac='52:54:00:00:00:01'",
        )
        .unwrap()
    }

    #[test]
    fn the_command_line_says_what_the_specification_says() {
        let line = arguments(&spec(), Accel::Tcg, Path::new("/run/api,sock"), (7, 2)).join(" ");
        for part in [
            "-machine q35,accel=tcg,memory-backend=mem0",
            "-cpu max",
            "-smp 3",
            "-m 1024M",
            "memory-backend-memfd,id=mem0,size=1073741824,share=on",
            "-qmp unix:/run/api,,sock,server=on,wait=off",
            "file,id=serial0,path=/a,,b,append=on",
            "-kernel /k",
            "-append x y",
            "socket,id=chr-root,path=/s,,1,reconnect=1 ",
            "vhost-user-blk-pci,id=vol-root,chardev=chr-root,num-queues=2,bus=port0",
            "tap,id=net0,ifname=tap0,script=no,downscript=no",
            "virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01",
        ] {
            assert!(line.contains(part), "{part} is missing in {line}");
        }
        assert_eq!(line.matches("pcie-root-port").count(), 1 + SPARE_PORTS);
        let line = arguments(&spec(), Accel::Kvm, Path::new("/api"), (9, 2)).join(" ");
        assert!(
            line.contains("accel=kvm") && line.contains("-cpu host") && line.contains(",reconnect-ms=1000"),
            "{line}"
        );
    }

    #[test]
    fn versions_are_read() {
        assert_eq!(
            parse_version("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"),
            (7, 2)
        );
        assert_eq!(parse_version("QEMU emulator version 10.0.3"), (10, 0));
        assert_eq!(parse_version("something else"), (0, 0));
    }
}
