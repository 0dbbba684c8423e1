//! A deterministic simulator of a cluster: the real mirrors, stores and control state of several nodes, behind a simulated
//! consensus and a simulated network, in virtual time.
//!
//! One volume, striped and mirrored over all nodes' disks. Whichever node owns it runs a guest; when it is gone another node
//! attaches the volume and a guest starts anew there. A node that was cut off or stood still may be an owner still, in its
//! own belief: what it answers its guest counts like everything else. Phases as in [`crate::sim`]: faults under load, heal,
//! quiesce, and the oracle.
//!
//! * `profile`: what a seed draws. `world`: events and nodes. `stores`: disks. `link` and `connect`:
//!   requests from an owner's node to a replica's, and the connections they take.
//! * `consensus`: the log, its leader, leases. `agent`: what a node makes of the committed state, and the owner's mirror.
//! * `work`: guests. `faults`: death and return. `operator`: what somebody changes meanwhile. `oracle`: what must hold at
//!   the end.
//!
//! The agent, the link and the consensus are models: small on purpose, with the rules that the real ones keep.
//! Deliberately absent: rot of metadata, lost and misdirected writes (the simulator of one node has them), more than one
//! volume, changes of membership.

mod agent;
mod connect;
mod consensus;
mod faults;
mod link;
mod operator;
mod oracle;
pub mod profile;
mod stores;
mod work;
mod world;

pub use crate::sim::{Run, guarded};
pub use profile::Profile;
use world::Cluster;

/// Runs a profile. With `trace` every event is printed.
pub fn run(profile: Profile, trace: bool) -> Run {
    let mut cluster = Cluster::new(profile, trace);
    let verdict = cluster.run();
    Run {
        verdict,
        stats: cluster.stats.clone(),
        trace: cluster.hash(),
    }
}

/// Runs a seed; a panic in the code under test is a violation like others.
pub fn run_seed(seed: u64, trace: bool) -> Run {
    guarded(move || run(Profile::draw(seed), trace))
}
