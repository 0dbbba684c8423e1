//! What a VM is, independent of the program that runs it: read from TOML, checked once, then trusted.
//!
//! Invariant: a [`VmSpec`] that [`VmSpec::parse`] returned has passed [`VmSpec::check`], so the adapters need not check names,
//! sizes and counts again. A key that is not known here is an error, never ignored.
//!
//! Deliberately absent: anything that only one VMM understands (the point is that the VMM can be swapped), a `serial` per
//! volume (with vhost-user the data plane answers the guest's GET_ID, a VMM cannot), and the existence of files (checked at
//! start, on the machine that starts it).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Most virtual CPUs a specification may ask for.
pub const VCPUS_MAX: u32 = 254;
/// Least memory of a VM in bytes (1 MiB).
pub const MEMORY_BYTES_MIN: u64 = 1 << 20;
/// Most memory of a VM in bytes (16 TiB).
pub const MEMORY_BYTES_MAX: u64 = 16 << 40;
/// Most volumes of one VM.
pub const VOLUMES_MAX: usize = 24;
/// Most queues of one volume.
pub const QUEUES_MAX: u16 = 64;
/// Most network interfaces of one VM.
pub const NETWORKS_MAX: usize = 4;
/// Longest name of a VM or a volume, in bytes.
pub const NAME_BYTES_MAX: usize = 48;
/// Longest path of a Unix socket, in bytes (the kernel's limit, its final zero taken off).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Longest kernel command line, in bytes.
pub const CMDLINE_BYTES_MAX: usize = 2048;

/// Why a specification was refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("cannot read the VM specification {path}; check the path and its permissions")]
    Read {
        /// The file asked for.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not TOML, or not the keys of a specification.
    #[error("the VM specification does not parse: {0}")]
    Syntax(#[from] toml::de::Error),
    /// A value that cannot work.
    #[error("{field}: {problem}")]
    Invalid {
        /// The key, as in the file.
        field: String,
        /// What is wrong and what to write instead.
        problem: String,
    },
}

fn invalid(field: impl Into<String>, problem: impl Into<String>) -> SpecError {
    SpecError::Invalid {
        field: field.into(),
        problem: problem.into(),
    }
}

/// One virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Its name: the key of its runtime directory.
    pub name: String,
    /// Virtual CPUs.
    #[serde(default = "one")]
    pub vcpus: u32,
    /// Memory: a number of bytes with an optional suffix K, M, G or T (powers of 1024), as in `"512M"`.
    pub memory: Memory,
    /// How the guest is executed.
    #[serde(default)]
    pub accelerator: Accelerator,
    /// File that gets what the guest writes to its first serial port. Appended to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_log: Option<PathBuf>,
    /// What it boots.
    pub boot: Boot,
    /// Its disks, in the order in which the guest sees them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeSpec>,
    /// Its network interfaces.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NetworkSpec>,
}

fn one() -> u32 {
    1
}

fn one_queue() -> u16 {
    1
}

/// One disk of a VM: a vhost-user-blk socket that a data plane serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeSpec {
    /// Its name, unique in the VM.
    pub name: String,
    /// Absolute path of the vhost-user-blk socket.
    pub socket: PathBuf,
    /// Request queues. No more than the data plane offers and the VM has virtual CPUs.
    #[serde(default = "one_queue")]
    pub queues: u16,
    /// The guest must not write. A VMM cannot enforce this, the data plane does: a start is refused if it serves the volume
    /// writable.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub readonly: bool,
}

/// One network interface: a tap device that somebody else has made and connected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Name of the tap device on the host.
    pub tap: String,
    /// Hardware address, as in `52:54:00:12:34:56`. Give one, or a swap of the VMM changes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// What a VM boots: a kernel, or a firmware that finds one on the first volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// Kernel image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system for the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// Command line for the kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Firmware image. The VMMs take different builds, hence one for each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Firmware>,
}

/// Firmware images by VMM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Firmware {
    /// For Cloud Hypervisor.
    #[serde(default, rename = "cloud-hypervisor", skip_serializing_if = "Option::is_none")]
    pub cloud_hypervisor: Option<PathBuf>,
    /// For QEMU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub qemu: Option<PathBuf>,
}

/// How guest instructions are executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// KVM where the processor has virtualisation and `/dev/kvm` opens; emulation where the VMM can, otherwise.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// QEMU's emulation, whatever the machine can do.
    Tcg,
}

/// An amount of memory in bytes, written in TOML as `"512M"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory(pub u64);

impl std::str::FromStr for Memory {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let problem = || format!("{text:?} is no amount of memory; write for example \"512M\" or \"4G\"");
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &text[digits.len()..] {
            "" => 0,
            "K" | "k" | "KiB" => 10,
            "M" | "m" | "MiB" => 20,
            "G" | "g" | "GiB" => 30,
            "T" | "t" | "TiB" => 40,
            _ => return Err(problem()),
        };
        let number: u64 = digits.parse().map_err(|_| problem())?;
        number.checked_mul(1 << shift).map(Memory).ok_or_else(problem)
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl Serialize for Memory {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

impl VmSpec {
    /// Reads and checks a specification. Relative paths in it are taken from the directory of the file.
    ///
    /// # Errors
    /// The file cannot be read, is not a specification, or asks for what cannot work.
    pub fn load(path: &Path) -> Result<Self, SpecError> {
        let read = |source| SpecError::Read {
            path: path.to_path_buf(),
            source,
        };
        let text = std::fs::read_to_string(path).map_err(read)?;
        let file = std::path::absolute(path).map_err(read)?;
        let mut spec: VmSpec = toml::from_str(&text)?;
        spec.resolve_paths(file.parent().unwrap_or(Path::new("/")));
        spec.check()?;
        Ok(spec)
    }

    /// Parses and checks a specification. Its paths must be absolute.
    ///
    /// # Errors
    /// It is not a specification, or asks for what cannot work.
    pub fn parse(text: &str) -> Result<Self, SpecError> {
        let spec: VmSpec = toml::from_str(text)?;
        spec.check()?;
        Ok(spec)
    }

    /// The specification as TOML; [`VmSpec::parse`] of it gives an equal one.
    ///
    /// # Errors
    /// A path that is not UTF-8.
    pub fn to_toml(&self) -> Result<String, SpecError> {
        toml::to_string(self).map_err(|problem| invalid("specification", problem.to_string()))
    }

    /// Makes relative paths absolute, from `base`.
    pub fn resolve_paths(&mut self, base: &Path) {
        let firmware = self
            .boot
            .firmware
            .iter_mut()
            .flat_map(|f| [&mut f.cloud_hypervisor, &mut f.qemu])
            .flatten();
        let boot = [
            &mut self.boot.kernel,
            &mut self.boot.initramfs,
            &mut self.serial_log,
        ]
        .into_iter()
        .flatten();
        let sockets = self.volumes.iter_mut().map(|v| &mut v.socket);
        for path in firmware.chain(boot).chain(sockets) {
            *path = base.join(&*path);
        }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// The first value that cannot work, with its key.
    pub fn check(&self) -> Result<(), SpecError> {
        check_name("name", &self.name)?;
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(invalid(
                "vcpus",
                format!("{} is out of range; give 1 to {VCPUS_MAX}", self.vcpus),
            ));
        }
        let bytes = self.memory.0;
        if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes) || !bytes.is_multiple_of(MEMORY_BYTES_MIN)
        {
            return Err(invalid(
                "memory",
                format!("{} is out of range; give whole MiB from 1M to 16T", self.memory),
            ));
        }
        if let Some(path) = &self.serial_log {
            check_path("serial_log", path)?;
        }
        self.boot.check()?;
        if self.volumes.len() > VOLUMES_MAX {
            return Err(invalid(
                "volumes",
                format!("{} are too many; at most {VOLUMES_MAX}", self.volumes.len()),
            ));
        }
        let (mut names, mut sockets) = (BTreeSet::new(), BTreeSet::new());
        for volume in &self.volumes {
            volume.check()?;
            if u32::from(volume.queues) > self.vcpus {
                // More would bring nothing, and Cloud Hypervisor refuses them: such a VM could not be swapped.
                return Err(invalid(
                    "volumes.queues",
                    format!(
                        "{} are more than vcpus ({}); give one per virtual CPU at most",
                        volume.queues, self.vcpus
                    ),
                ));
            }
            if !names.insert(&volume.name) {
                return Err(invalid(
                    "volumes.name",
                    format!(
                        "{:?} is there twice; give each volume a name of its own",
                        volume.name
                    ),
                ));
            }
            if !sockets.insert(&volume.socket) {
                return Err(invalid(
                    "volumes.socket",
                    format!(
                        "{} is there twice; a volume can be attached only once",
                        volume.socket.display()
                    ),
                ));
            }
        }
        if self.networks.len() > NETWORKS_MAX {
            return Err(invalid(
                "networks",
                format!("{} are too many; at most {NETWORKS_MAX}", self.networks.len()),
            ));
        }
        self.networks.iter().try_for_each(NetworkSpec::check)
    }
}

impl Boot {
    fn check(&self) -> Result<(), SpecError> {
        match (&self.kernel, &self.firmware) {
            (None, None) => return Err(invalid("boot", "nothing to boot; give `kernel` or `firmware`")),
            (Some(_), Some(_)) => {
                return Err(invalid("boot", "both `kernel` and `firmware`; give one of them"));
            }
            (None, Some(_)) if self.initramfs.is_some() || self.cmdline.is_some() => {
                return Err(invalid(
                    "boot",
                    "`initramfs` and `cmdline` go with `kernel`; leave them out with `firmware`",
                ));
            }
            (
                None,
                Some(Firmware {
                    cloud_hypervisor: None,
                    qemu: None,
                }),
            ) => {
                return Err(invalid(
                    "boot.firmware",
                    "no image; give `cloud-hypervisor`, `qemu` or both",
                ));
            }
            _ => {}
        }
        let firmware = self.firmware.iter().flat_map(|f| [&f.cloud_hypervisor, &f.qemu]);
        for path in firmware.chain([&self.kernel, &self.initramfs]).flatten() {
            check_path("boot", path)?;
        }
        match &self.cmdline {
            Some(text) if text.len() > CMDLINE_BYTES_MAX || text.contains(['\0', '\n']) => Err(invalid(
                "boot.cmdline",
                format!("must be one line of at most {CMDLINE_BYTES_MAX} bytes"),
            )),
            _ => Ok(()),
        }
    }
}

impl VolumeSpec {
    /// Checks every value of one volume.
    ///
    /// # Errors
    /// The first value that cannot work, with its key.
    pub fn check(&self) -> Result<(), SpecError> {
        check_name("volumes.name", &self.name)?;
        check_socket("volumes.socket", &self.socket)?;
        if !(1..=QUEUES_MAX).contains(&self.queues) {
            return Err(invalid(
                "volumes.queues",
                format!("{} is out of range; give 1 to {QUEUES_MAX}", self.queues),
            ));
        }
        Ok(())
    }
}

impl NetworkSpec {
    fn check(&self) -> Result<(), SpecError> {
        let good = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
        if self.tap.is_empty() || self.tap.len() > 15 || !self.tap.bytes().all(good) {
            return Err(invalid(
                "networks.tap",
                format!(
                    "{:?} is no interface name; 1 to 15 of a-z A-Z 0-9 - _ .",
                    self.tap
                ),
            ));
        }
        match &self.mac {
            Some(mac) if !is_mac(mac) => Err(invalid(
                "networks.mac",
                format!("{mac:?} is no unicast hardware address; write six bytes as in 52:54:00:12:34:56"),
            )),
            _ => Ok(()),
        }
    }
}

fn is_mac(text: &str) -> bool {
    let byte = |part: &str| match part.len() {
        2 if part.bytes().all(|b| b.is_ascii_hexdigit()) => u8::from_str_radix(part, 16).ok(),
        _ => None,
    };
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    bytes.is_some_and(|b| b.len() == 6 && b[0] & 1 == 0)
}

/// A name becomes a directory, a device id and part of a command line, so it is kept to what none of these takes apart.
fn check_name(field: &str, name: &str) -> Result<(), SpecError> {
    let good = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
    let starts_well = name.bytes().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if !starts_well || name.len() > NAME_BYTES_MAX || !name.bytes().all(good) {
        return Err(invalid(
            field,
            format!(
                "{name:?} will not do; 1 to {NAME_BYTES_MAX} of a-z A-Z 0-9 - _ . with a letter or digit first"
            ),
        ));
    }
    Ok(())
}

fn check_path(field: &str, path: &Path) -> Result<(), SpecError> {
    match path.to_str() {
        None => Err(invalid(
            field,
            format!("the path {} is not UTF-8; rename it", path.display()),
        )),
        Some(text) if text.contains(['\0', '\n']) => Err(invalid(
            field,
            "the path has a line break or a zero in it; rename it",
        )),
        Some(_) if !path.is_absolute() => Err(invalid(
            field,
            format!("{} is relative; give an absolute path", path.display()),
        )),
        Some(_) => Ok(()),
    }
}

/// Checks the path of a Unix socket.
pub(crate) fn check_socket(field: &str, path: &Path) -> Result<(), SpecError> {
    check_path(field, path)?;
    if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(invalid(
            field,
            format!(
                "{} is longer than {SOCKET_PATH_BYTES_MAX} bytes, the limit for a socket; take a shorter one",
                path.display()
            ),
        ));
    }
    Ok(())
}

/// Entry point for fuzzing: whatever the bytes, no panic; and what parses must survive being written and read again.
pub fn fuzz_spec(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(spec) = VmSpec::parse(text) {
        let again = spec.to_toml().and_then(|text| VmSpec::parse(&text));
        assert!(
            again.is_ok_and(|again| again == spec),
            "a specification does not survive being written and read again"
        );
    }
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
