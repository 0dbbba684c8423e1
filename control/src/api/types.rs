//! What the API takes and gives, as JSON. Sizes are bytes, identities hexadecimal text. Unknown keys are refused.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::admin::{DiskStatus, VolumeStatus};

/// The whole cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ClusterStatus {
    /// The node that answered.
    pub node: String,
    /// The node that leads, as far as that one knows.
    pub leader: Option<String>,
    /// A majority has confirmed that this is the newest state; otherwise it is as of when this node last heard.
    pub confirmed: bool,
    /// How many entries of the log this state has.
    pub applied: u64,
    /// Its nodes.
    pub nodes: Vec<NodeSummary>,
    /// Their disks.
    pub disks: Vec<DiskSummary>,
    /// Its volumes.
    pub volumes: Vec<VolumeSummary>,
    /// Its VMs.
    pub vms: Vec<VmSummary>,
    /// Data that moves so that disks are equally full.
    #[serde(default)]
    pub balance: Balance,
}

/// What moves so that disks are equally full.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Balance {
    /// Chunks that move now.
    pub moving: u64,
    /// About how many replicas are to move after them, once nothing else is wrong.
    pub left: u64,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeSummary {
    /// Its name.
    pub name: String,
    /// Its number.
    pub id: u64,
    /// Where it listens, `host:port`.
    pub addresses: Vec<String>,
    /// Its failure domain.
    pub domain: String,
    /// `leader`, `voter`, `learner`, or `none` when Raft does not know it.
    pub role: String,
    /// It answered when it was asked now.
    pub alive: bool,
    /// Data and VMs are to leave it.
    pub draining: bool,
    /// Memory for VMs, bytes.
    pub memory: u64,
    /// Of it, not promised to VMs.
    pub memory_free: u64,
}

/// A disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskSummary {
    /// Its node.
    pub node: String,
    /// It is being removed: what is on it moves away.
    pub leaving: bool,
    /// Replicas on it.
    pub replicas: u64,
    /// They are to leave it, and have nowhere to go. In the status only, not in the stream of changes.
    #[serde(default)]
    pub stuck: bool,
    /// What is to be done about it. In the status only, not in the stream of changes.
    #[serde(default)]
    pub warning: Option<String>,
    /// What its node says; of a node that does not answer, what the state says.
    #[serde(flatten)]
    pub disk: DiskStatus,
}

/// A volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VolumeSummary {
    /// The node that it is attached to.
    pub owner: Option<String>,
    /// How often it was attached.
    pub generation: u32,
    /// The VM it belongs to.
    pub vm: Option<String>,
    /// Refuses writes.
    pub read_only: bool,
    /// What its owner says; without an owner that answers, what the state says.
    #[serde(flatten)]
    pub volume: VolumeStatus,
}

/// A VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmSummary {
    /// Its name.
    pub name: String,
    /// The node it is placed on.
    pub node: Option<String>,
    /// Its memory, bytes.
    pub memory: u64,
    /// Its volumes.
    pub volumes: Vec<String>,
    /// `running`, `starting`, `stopping`, `stopped`, `waiting` when no node has room for it, or `unknown` when its node does not
    /// answer. The stream of changes has what is to be: `starting` also of one that runs.
    pub state: String,
}

/// What a new volume is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewVolume {
    /// Its name: letters, digits, `.`, `_` and `-`, 64 at most.
    pub name: String,
    /// Bytes, a multiple of 4 KiB.
    pub size: u64,
    /// Copies of each chunk, 1 to 3.
    #[serde(default = "two")]
    pub mirror: u32,
    /// Bytes, a power of two from 4 KiB to 64 MiB.
    #[serde(default = "unit")]
    pub stripe_unit: u64,
    /// Chunks that a row of stripe units is spread over; absent: as wide as makes sense.
    #[serde(default)]
    pub stripe_width: Option<u32>,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// The node it will be used on: its own disks hold a copy where balance allows, and it is attached there.
    #[serde(default)]
    pub near: Option<String>,
}

fn two() -> u32 {
    2
}

fn unit() -> u64 {
    256 << 10
}

/// A volume's new size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Bytes, a multiple of 4 KiB, not less than before.
    pub size: u64,
}

/// A choice of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OnNode {
    /// Its name or number; absent, where that is allowed: any.
    #[serde(default)]
    pub node: Option<String>,
}

/// Where a volume is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Attached {
    /// On this node.
    pub node: String,
    /// At this vhost-user socket.
    #[schema(value_type = String)]
    pub socket: std::path::PathBuf,
}

/// What a VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmDefinition {
    /// TOML, as in a file for `unibody vm start`, without the sockets of its volumes.
    pub definition: String,
}

/// What was given up with a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GivenUp {
    /// Of each volume the chunks that have no other copy that can be read now.
    pub unreadable: std::collections::BTreeMap<String, u64>,
}

/// Everything about one VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmDetail {
    /// As in the status of the cluster.
    #[serde(flatten)]
    pub summary: VmSummary,
    /// Its definition, as the cluster keeps it: `vmm`, if one was chosen, and `spec`.
    #[schema(value_type = Object)]
    pub definition: serde_json::Value,
    /// What its node says of its process: `vmm`, `status` and `volumes`; null if it does not run there, or if the node does not
    /// answer.
    #[schema(value_type = Option<Object>)]
    pub process: serde_json::Value,
}

/// Which VMM is to run a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Swap {
    /// `cloud-hypervisor` or `qemu`.
    pub to: String,
    /// How long the guest may take to shut down.
    #[serde(default = "minute")]
    pub seconds: u64,
}

/// How a VM is to be stopped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VmStop {
    /// How long the guest may take to shut down before it is killed.
    #[serde(default = "minute")]
    pub seconds: u64,
}

/// A volume to be taken from a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeOff {
    /// The volume.
    pub volume: String,
    /// How long the guest may take to let go of it.
    #[serde(default = "minute")]
    pub seconds: u64,
}

fn minute() -> u64 {
    60
}

/// Whether data and VMs are to leave a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// They are.
    pub on: bool,
}

/// A line of the watch stream: what is not as it was in the line before. The first line has everything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Changes {
    /// How many entries of the log the state has now.
    pub applied: u64,
    /// Nodes by name; `null` when there is none of that name any more.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    #[schema(value_type = std::collections::BTreeMap<String, NodeSummary>)]
    pub nodes: std::collections::BTreeMap<String, Option<NodeSummary>>,
    /// Disks by identity, as the state has them.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    #[schema(value_type = std::collections::BTreeMap<String, DiskSummary>)]
    pub disks: std::collections::BTreeMap<String, Option<DiskSummary>>,
    /// Volumes by name, as the state has them.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    #[schema(value_type = std::collections::BTreeMap<String, VolumeSummary>)]
    pub volumes: std::collections::BTreeMap<String, Option<VolumeSummary>>,
    /// VMs by name, as the state has them.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    #[schema(value_type = std::collections::BTreeMap<String, VmSummary>)]
    pub vms: std::collections::BTreeMap<String, Option<VmSummary>>,
}

/// Why something was not done, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// For people.
    pub error: String,
}
