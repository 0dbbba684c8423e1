//! `unibody demo`: the main job on this machine in a minute or two, told as it happens.
//!
//! It runs the same program a user would, as processes of their own, on disk files in a directory of its own, and fails if
//! anything that it promises does not hold.
//!
//! * `cluster`: three nodes; nodes are killed under load, a VM is restarted on another node
//! * `alone`: one node by itself; disks fail and are replaced under load
//! * `load`: the load of both, which knows what was acknowledged
//! * `process`: the processes, and that none of them is left

mod alone;
mod cluster;
mod load;
mod process;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use unibody_control::admin::VolumeStatus;
use unibody_vmm_adapter::guest;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);

#[derive(Args)]
pub(crate) struct DemoArgs {
    /// Show one node by itself, with disks that fail, instead of a cluster.
    #[arg(long)]
    alone: bool,
    /// Where to put disks and state [default: a fresh directory, removed at the end].
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Cores for the data planes' reactors, one for each node in turn [default: all].
    #[arg(long, value_delimiter = ',')]
    cores: Vec<usize>,
}

pub(crate) fn run(args: DemoArgs) -> Result<()> {
    let all = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let cores = if args.cores.is_empty() {
        (0..all).collect()
    } else {
        args.cores
    };
    let (dir, fresh) = match args.dir {
        Some(dir) => (std::path::absolute(dir)?, false),
        None => {
            let name = format!("unibody-demo-{}", std::process::id());
            (std::env::temp_dir().join(name), true)
        }
    };
    std::fs::create_dir_all(&dir).with_context(|| format!("{} can not be made", dir.display()))?;
    let _tidy = process::begin(fresh.then_some(&*dir))?;
    std::fs::write(dir.join("guest"), guest::KERNEL)?;
    let story = Story(Instant::now());
    match args.alone {
        true => alone::play(&dir, cores[0], &story),
        false => cluster::play(&dir, &cores, &story),
    }
}

/// What happened, and when.
struct Story(Instant);

impl Story {
    fn say(&self, text: impl std::fmt::Display) {
        println!("[{:6.2} s] {text}", self.0.elapsed().as_secs_f64());
    }
}

/// Looks until something is there; how long that took, and what it is.
fn wait<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<(Duration, T)> {
    let start = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok((start.elapsed(), found));
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "{what}: not within {} s",
            PATIENCE.as_secs()
        );
        std::thread::sleep(LOOK);
    }
}

/// What the guest says on its serial port.
fn guest_says(serial: &Path) -> Result<String> {
    let (_, said) = wait("the guest says something", || Ok(guest::verdict(serial)))?;
    said.map_err(|said| anyhow::anyhow!("the guest found: {said}"))
}

/// Every replica is in sync and nothing is left to compare.
fn whole(volume: &VolumeStatus) -> bool {
    volume.state == "healthy" && volume.regions_to_heal == 0 && volume.in_sync == volume.replicas
}

/// Checks a disk that is not in use.
fn check_disk(path: &Path) -> Result<()> {
    let report = unibody_control::node::check_disk(path, &mut |_, _| {})?;
    if report.findings_total > 0 {
        let first = &report.findings[0];
        bail!(
            "{}: {} findings, the first: {first}",
            path.display(),
            report.findings_total
        );
    }
    Ok(())
}
