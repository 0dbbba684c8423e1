//! Our own guest of a few KiB (`guest/pvh.c`): it proves a VM's first volume under any VMM that boots a PVH kernel, also
//! where KVM is there but so slow that a stock kernel never comes up. The demo and the tests boot it.
//!
//! Its command line says what it does: `write TOKEN` writes blocks derived from the token, flushes and reads them back;
//! `verify TOKEN` only reads; both then power off. `hold TOKEN` is `write` without the power-off. It says how it went on its
//! serial port, in one line that [`verdict`] reads.

use std::path::Path;

/// The kernel image; empty if there was no C compiler when this was built.
pub const KERNEL: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest"));
/// How the guest begins its verdict.
const VERDICT: &str = "UNIBODY-GUEST ";

/// What the guest has said on its serial log so far: what follows `OK`, or the whole of anything else. `None`: nothing yet.
pub fn verdict(serial_log: &Path) -> Option<Result<String, String>> {
    let text = String::from_utf8_lossy(&std::fs::read(serial_log).unwrap_or_default()).into_owned();
    // A line counts once it has ended; a Linux console ends it with a carriage return as well.
    let (ended, _) = text.rsplit_once('\n')?;
    let line = ended.lines().rev().find(|line| line.contains(VERDICT))?;
    let (_, said) = line.split_once(VERDICT)?;
    let said = said.trim();
    Some(match said.split_once(' ').unwrap_or((said, "")) {
        ("OK", rest) => Ok(rest.to_owned()),
        _ => Err(said.to_owned()),
    })
}
