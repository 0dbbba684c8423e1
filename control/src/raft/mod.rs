//! The control state of a cluster, replicated by Raft.
//!
//! `machine` is what is replicated: the control state and the answers given lately. `store` keeps log, vote and snapshots on
//! disk. `frame` and `net` carry messages between nodes, over connections that `unibody_dataplane::wire::handshake` has
//! authenticated. `cluster` is what the rest of a node uses: start or join, propose, read, watch; behind it `core` runs, `proposals` asks
//! and `answers` answers. `keeper` is the leader's
//! upkeep of the membership, `lease` its knowledge of who may still be reading.
//!
//! Invariants:
//! * Nothing is acknowledged before it is durable: log entries, votes and snapshots are flushed before Raft hears so.
//! * A node that lost its store is another node: its id was drawn when the store was made.
//! * A request has its effect at most once, however often it is sent.
//! * No byte of a peer that has not proven itself is looked at.
//!
//! Deliberately absent: anything about volumes, disks or VMs (`state` decides, the agent acts), and secrecy on the wire.

mod answers;
mod cluster;
#[cfg(test)]
mod cluster_tests;
mod core;
mod frame;
mod keeper;
mod lease;
mod machine;
#[cfg(test)]
mod machine_tests;
mod net;
mod proposals;
mod store;
#[cfg(test)]
mod store_tests;

use serde::{Deserialize, Serialize};

pub use cluster::{Cluster, ClusterError, Options, ProposeError, Start, Status, Timing, View};
pub use lease::{LEASE, LEASE_MARGIN, Lease};
pub use machine::{Machine, REMEMBERED, Receipt, Request, RequestId, fuzz_snapshot};
pub use net::{Gate, fuzz_call};
pub use store::{Identity, StoreError, fuzz_log};

use crate::state::NodeId;

/// Where a node listens, as Raft's membership has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contact {
    /// `host:port`, the best first.
    pub addresses: Vec<String>,
}

openraft::declare_raft_types!(
    /// The types that Raft is made for here.
    pub Types:
        D = Request,
        R = Receipt,
        NodeId = NodeId,
        Node = Contact,
        SnapshotData = Vec<u8>,
);

/// This node's Raft.
pub(crate) type Raft = openraft::Raft<Types>;

impl std::fmt::Display for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "request {:032x}", self.request.id)
    }
}

/// A random number from the system.
pub(crate) fn random() -> u128 {
    let mut bytes = [0; 16];
    fill_random(&mut bytes);
    u128::from_le_bytes(bytes)
}

/// Random bytes from the system.
pub(crate) fn fill_random(bytes: &mut [u8]) {
    use std::io::Read;
    std::fs::File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(bytes))
        .expect("the system has random numbers");
}
