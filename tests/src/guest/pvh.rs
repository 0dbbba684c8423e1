//! The tiny guest of the VMM adapter, for tests.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use unibody_vmm_adapter::guest;

use super::wait_until;

/// Puts the guest into `cache` and returns the kernel image.
///
/// # Errors
/// It was not built for want of a compiler, or cannot be written.
pub fn build(cache: &Path) -> Result<PathBuf> {
    ensure!(
        !guest::KERNEL.is_empty(),
        "the tiny guest was not built: install the Debian packages gcc and binutils, then build again"
    );
    fs::create_dir_all(cache).with_context(|| format!("making {}", cache.display()))?;
    let lock = File::create(cache.join("pvh.lock"))?;
    lock.lock()
        .context("waiting for another test that writes the guest")?;
    // Beside and then renamed: a VMM of another test may have the image open.
    fs::write(cache.join("pvh.new"), guest::KERNEL)?;
    fs::rename(cache.join("pvh.new"), cache.join("pvh"))?;
    Ok(cache.join("pvh"))
}

/// Waits for the guest's verdict on its serial log: what follows `OK`.
///
/// # Errors
/// The guest says `FAIL`, or says nothing within `timeout`.
pub fn verdict(serial_log: &Path, timeout: Duration) -> Result<String> {
    let mut found = None;
    wait_until(timeout, || {
        found = guest::verdict(serial_log);
        found.is_some()
    });
    match found {
        Some(Ok(rest)) => Ok(rest),
        Some(Err(said)) => bail!("the guest found: {said}"),
        None => bail!(
            "no verdict of the guest within {} s in {}",
            timeout.as_secs(),
            serial_log.display()
        ),
    }
}
