//! Tests of the specification: what is accepted, what each refusal says, and that nothing panics.

use super::*;

const FULL: &str = r#"
name = "web-1"
vcpus = 2
memory = "512M"
accelerator = "tcg"
serial_log = "/var/log/web-1.serial"
[boot]
kernel = "/boot/vmlinuz"
initramfs = "/boot/initrd"
cmdline = "console=ttyS0"
[[volumes]]
name = "root"
socket = "/run/unibody/root.sock"
queues = 2
[[volumes]]
name = "iso"
socket = "/run/unibody/iso.sock"
readonly = true
[[networks]]
tap = "tap0"
mac = "52:54:00:12:34:56"
"#;

fn refused(from: &str, to: &str) -> String {
    assert!(
        FULL.contains(from),
        "the test replaces {from:?}, which is not there"
    );
    VmSpec::parse(&FULL.replacen(from, to, 1))
        .expect_err("must be refused")
        .to_string()
}

#[test]
fn a_full_specification_is_read_and_survives_being_written() {
    let spec = VmSpec::parse(FULL).unwrap();
    assert_eq!(spec.memory, Memory(512 << 20));
    assert_eq!(spec.accelerator, Accelerator::Tcg);
    assert_eq!((spec.volumes[0].queues, spec.volumes[1].queues), (2, 1));
    assert!(spec.volumes[1].readonly && !spec.volumes[0].readonly);
    assert_eq!(VmSpec::parse(&spec.to_toml().unwrap()).unwrap(), spec);
}

#[test]
fn what_cannot_work_is_refused_with_its_key() {
    for (from, to, says) in [
        ("name = \"web-1\"", "name = \"../etc\"", "name: \"../etc\""),
        ("vcpus = 2", "vcpus = 0", "vcpus: 0"),
        ("\"512M\"", "\"512Q\"", "\"512Q\" is no amount of memory"),
        ("\"512M\"", "\"1000\"", "memory: 1000"),
        ("\"512M\"", "\"99999999999T\"", "no amount of memory"),
        ("\"tcg\"", "\"warp\"", "unknown variant `warp`"),
        ("vcpus = 2", "cpus = 2", "unknown field `cpus`"),
        ("kernel = \"/boot/vmlinuz\"", "", "boot: nothing to boot"),
        (
            "kernel = \"/boot/vmlinuz\"",
            "firmware = {qemu = \"/x\"}",
            "go with `kernel`",
        ),
        (
            "kernel = \"/boot/vmlinuz\"",
            "kernel = \"vmlinuz\"",
            "boot: vmlinuz is relative",
        ),
        ("\"iso\"", "\"root\"", "volumes.name: \"root\" is there twice"),
        ("iso.sock", "root.sock", "can be attached only once"),
        ("queues = 2", "queues = 65", "volumes.queues: 65"),
        (
            "queues = 2",
            "queues = 3",
            "volumes.queues: 3 are more than vcpus",
        ),
        ("52:54:00:12:34:56", "53:54:00:12:34:56", "networks.mac"),
        ("52:54:00:12:34:56", "52:54:00:12:34:+6", "networks.mac"),
        ("tap0", "tap0,script=/bin/sh", "networks.tap"),
    ] {
        let error = refused(from, to);
        assert!(error.contains(says), "{from} -> {to}: {error}");
    }
    let long = format!("/run/{}.sock", "x".repeat(120));
    assert!(refused("/run/unibody/iso.sock", &long).contains("limit for a socket"));
}

#[test]
fn memory_is_written_as_it_is_read() {
    for (text, bytes) in [
        ("512M", 512 << 20),
        ("4G", 4 << 30),
        ("1T", 1 << 40),
        ("3K", 3072),
        ("17", 17),
    ] {
        assert_eq!(text.parse::<Memory>(), Ok(Memory(bytes)));
        assert_eq!(Memory(bytes).to_string(), text);
    }
    for text in ["", "M", "-1M", "1.5G", "1 G", "18446744073709551616", "1GG"] {
        assert!(text.parse::<Memory>().is_err(), "{text:?}");
    }
}

#[test]
fn relative_paths_of_a_file_start_at_its_directory() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("vm.toml");
    std::fs::write(
        &file,
        FULL.replace("/boot/vmlinuz", "vmlinuz")
            .replace("/run/unibody/iso.sock", "iso.sock"),
    )
    .unwrap();
    let spec = VmSpec::load(&file).unwrap();
    assert_eq!(spec.boot.kernel, Some(dir.path().join("vmlinuz")));
    assert_eq!(spec.volumes[1].socket, dir.path().join("iso.sock"));
    assert_eq!(spec.volumes[0].socket, Path::new("/run/unibody/root.sock"));
    let missing = VmSpec::load(&dir.path().join("none.toml")).unwrap_err();
    assert!(missing.to_string().contains("cannot read the VM specification"));
}

/// Not a fuzzer, a replay: each byte of a good file replaced, cut and doubled, which finds slicing and arithmetic that panics.
#[test]
fn damaged_specifications_do_not_panic() {
    for at in 0..FULL.len() {
        for byte in [0u8, b'"', b'9', b'[', b'\n', 0x80, 0xff] {
            let mut bytes = FULL.as_bytes().to_vec();
            bytes[at] = byte;
            fuzz_spec(&bytes);
        }
        fuzz_spec(&FULL.as_bytes()[..at]);
        fuzz_spec(&[&FULL.as_bytes()[..at], &FULL.as_bytes()[at / 2..]].concat());
    }
}
