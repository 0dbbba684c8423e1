//! A deterministic simulator of one node's data plane: the real mirror, the real stores and the real control state on
//! virtual disks, in virtual time, under every fault it can think of.
//!
//! One thread, one seed: the same seed gives the same run, event for event, which the trace's hash shows. A run has four
//! phases: faults under load; heal (faults stop, disks return); quiesce; and the oracle, which reads every block against
//! its history, compares the replicas and checks every disk offline.
//!
//! * `random`: the only source of chance. `profile`: what a seed draws.
//! * `disk`: virtual disks. `world`: events, messages, the control state. `process`: death and return of disks, process
//!   and power. `work`: guests. `oracle`: what must hold at the end. `script`: a crash at every device write of a script.
//!
//! Deliberately absent: threads, clocks, sockets, io_uring, virtqueues: other tests drive the real ones.

pub mod disk;
mod oracle;
mod process;
pub mod profile;
pub mod random;
pub mod script;
pub(crate) mod trace;
pub(crate) mod work;
pub(crate) mod world;

pub use profile::Profile;
pub use world::{Stats, World};

/// What a run found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// What was violated.
    pub verdict: Result<(), String>,
    /// Figures.
    pub stats: Stats,
    /// Hash of the trace.
    pub trace: [u8; 32],
}

/// Runs a profile. With `trace` every event is printed.
pub fn run(profile: Profile, trace: bool) -> Run {
    let mut world = World::new(profile, trace);
    let verdict = world.run();
    Run {
        verdict,
        stats: world.stats.clone(),
        trace: world.hash(),
    }
}

/// Runs a seed; a panic in the code under test is a violation like others.
pub fn run_seed(seed: u64, trace: bool) -> Run {
    guarded(move || run(Profile::draw(seed), trace))
}

/// Runs, and turns a panic into a verdict.
pub fn guarded(run: impl FnOnce() -> Run + std::panic::UnwindSafe) -> Run {
    std::panic::catch_unwind(run).unwrap_or_else(|cause| {
        let text = cause
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| cause.downcast_ref::<&str>().map(|s| (*s).to_owned()));
        Run {
            verdict: Err(format!("panicked: {}", text.unwrap_or_default())),
            stats: Stats::default(),
            trace: [0; 32],
        }
    })
}
