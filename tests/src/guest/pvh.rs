//! Our own guest of a few KiB, built at test time from `tests/guest/pvh.*`: it proves a virtio-blk disk under any VMM that
//! boots a PVH kernel, also where KVM is there but so slow that a stock kernel never comes up.
//!
//! It is 32-bit code in a 64-bit ELF file, because that is what the VMMs load. The compiler's 32-bit assembler text is put
//! through the 64-bit assembler, so that no 32-bit libraries and no conversion of relocations are needed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{run, tool, wait_until};

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/guest");
/// How the guest begins its verdict.
const VERDICT: &str = "UNIBODY-GUEST ";

/// Builds the guest into `cache` and returns the kernel image.
///
/// # Errors
/// gcc or ld is missing (the message says so), or the source does not compile.
pub fn build(cache: &Path) -> Result<PathBuf> {
    fs::create_dir_all(cache).with_context(|| format!("making {}", cache.display()))?;
    let lock = File::create(cache.join("pvh.lock"))?;
    lock.lock()
        .context("waiting for another test that builds the guest")?;
    let gcc = tool("gcc", "gcc")?;
    let at = |name: &str| cache.join(name);
    let source = |name: &str| Path::new(SOURCE).join(name);
    run(Command::new(&gcc)
        .args([
            "-m32",
            "-march=i686",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-ffreestanding",
            "-fno-pic",
            "-fno-pie",
        ])
        .args([
            "-fno-stack-protector",
            "-fno-asynchronous-unwind-tables",
            "-fno-tree-loop-distribute-patterns",
        ])
        .args(["-fcf-protection=none", "-S", "-o"])
        .args([at("pvh.32.s"), source("pvh.c")]))?;
    fs::write(
        at("pvh.s"),
        format!(".code32\n{}", fs::read_to_string(at("pvh.32.s"))?),
    )?;
    run(Command::new(&gcc)
        .args(["-m64", "-c", "-o"])
        .args([at("pvh.main.o"), at("pvh.s")]))?;
    run(Command::new(&gcc)
        .args(["-m64", "-c", "-o"])
        .args([at("pvh.entry.o"), source("pvh.S")]))?;
    // Beside and then renamed: a VMM of another test may have the image open.
    run(Command::new(tool("ld", "binutils")?)
        .args([
            "-m",
            "elf_x86_64",
            "--no-warn-rwx-segments",
            "--build-id=none",
            "-T",
        ])
        .arg(source("pvh.ld"))
        .args([at("pvh.entry.o"), at("pvh.main.o")])
        .arg("-o")
        .arg(at("pvh.new")))?;
    fs::rename(at("pvh.new"), at("pvh"))?;
    Ok(at("pvh"))
}

/// Waits for the guest's verdict on its serial log: what follows `OK`.
///
/// # Errors
/// The guest says `FAIL`, or says nothing within `timeout`.
pub fn verdict(serial_log: &Path, timeout: Duration) -> Result<String> {
    let mut found = None;
    wait_until(timeout, || {
        let text = String::from_utf8_lossy(&fs::read(serial_log).unwrap_or_default()).into_owned();
        // A line counts once it has ended; a Linux console ends it with a carriage return as well.
        let (ended, _) = text.rsplit_once('\n').unwrap_or_default();
        let whole = ended.lines().rev().find(|line| line.contains(VERDICT));
        found = whole
            .and_then(|line| line.split_once(VERDICT))
            .map(|(_, verdict)| verdict.trim().to_owned());
        found.is_some()
    });
    match found
        .as_deref()
        .map(|text| text.split_once(' ').unwrap_or((text, "")))
    {
        Some(("OK", rest)) => Ok(rest.to_owned()),
        Some(_) => bail!("the guest found: {}", found.unwrap_or_default()),
        None => bail!(
            "no verdict of the guest within {} s in {}",
            timeout.as_secs(),
            serial_log.display()
        ),
    }
}
