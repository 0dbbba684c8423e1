//! Which way guest instructions are executed on this machine, decided without starting a VM.
//!
//! `/dev/kvm` alone proves nothing: inside a VM it may be there with no virtualisation behind it, so slow that a stock kernel
//! never comes up. Hence a second sign is asked for, `vmx` or `svm` among the processor's flags.

use std::fs::File;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::spec::Accelerator;

/// A way to execute guest instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// By the processor.
    Kvm,
    /// Emulated by QEMU.
    Tcg,
}

/// What the machine shows of its ability to run KVM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KvmSigns {
    /// `/dev/kvm` opens for reading and writing, or why not.
    pub(crate) device: Result<(), String>,
    /// The processor says that it has virtualisation.
    pub(crate) processor: bool,
}

impl KvmSigns {
    /// Looks at this machine.
    pub(crate) fn read() -> Self {
        let device = File::options().read(true).write(true).open("/dev/kvm");
        let cpuinfo = std::fs::read_to_string(Path::new("/proc/cpuinfo")).unwrap_or_default();
        KvmSigns {
            device: device.map(drop).map_err(|error| error.to_string()),
            processor: has_virtualisation(&cpuinfo),
        }
    }

    /// What `auto` means, and why.
    pub(crate) fn auto(&self) -> (Accel, String) {
        match (&self.device, self.processor) {
            (Ok(()), true) => (Accel::Kvm, "/dev/kvm opens and the processor has virtualisation".to_owned()),
            (Ok(()), false) => (
                Accel::Tcg,
                "/dev/kvm opens, but the processor's flags show neither vmx nor svm, so it may only emulate; \
                 set accelerator = \"kvm\" to use it all the same"
                    .to_owned(),
            ),
            (Err(error), _) => (Accel::Tcg, format!("/dev/kvm does not open ({error})")),
        }
    }

    /// What to use for this wish, and what to tell the user; or why the wish cannot be met.
    pub(crate) fn choose(&self, wish: Accelerator) -> Result<(Accel, Option<String>), String> {
        match (wish, &self.device) {
            (Accelerator::Tcg, _) => Ok((Accel::Tcg, None)),
            (Accelerator::Kvm, Ok(())) => Ok((Accel::Kvm, None)),
            (Accelerator::Kvm, Err(error)) => Err(format!(
                "/dev/kvm does not open ({error}); load the kvm module, or give this user access, or take accelerator = \"tcg\""
            )),
            (Accelerator::Auto, _) => match self.auto() {
                (Accel::Kvm, _) => Ok((Accel::Kvm, None)),
                (Accel::Tcg, why) => Ok((
                    Accel::Tcg,
                    Some(format!(
                        "the guest is emulated (TCG), many times slower than with KVM: {why}"
                    )),
                )),
            },
        }
    }
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|line| {
        line.split_ascii_whitespace()
            .any(|flag| flag == "vmx" || flag == "svm")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signs(device: bool, processor: bool) -> KvmSigns {
        KvmSigns {
            device: if device { Ok(()) } else { Err("no".to_owned()) },
            processor,
        }
    }

    #[test]
    fn kvm_is_taken_only_with_both_signs_unless_asked_for() {
        assert_eq!(
            signs(true, true).choose(Accelerator::Auto),
            Ok((Accel::Kvm, None))
        );
        for (device, processor) in [(true, false), (false, true), (false, false)] {
            let (accel, notice) = signs(device, processor).choose(Accelerator::Auto).unwrap();
            assert_eq!(accel, Accel::Tcg);
            assert!(
                notice.unwrap().contains("/dev/kvm"),
                "emulation must be said aloud"
            );
        }
        assert_eq!(
            signs(true, false).choose(Accelerator::Kvm),
            Ok((Accel::Kvm, None))
        );
        assert!(
            signs(false, true)
                .choose(Accelerator::Kvm)
                .unwrap_err()
                .contains("does not open")
        );
        assert_eq!(signs(true, true).choose(Accelerator::Tcg), Ok((Accel::Tcg, None)));
    }

    #[test]
    fn flags_are_words() {
        assert!(has_virtualisation("x: y\nflags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("flags : svm"));
        assert!(!has_virtualisation("flags : fpu svm_lock avmx\nvmx flags : vnmi"));
        assert!(!has_virtualisation(""));
    }
}
