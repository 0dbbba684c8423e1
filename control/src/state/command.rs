//! What can be asked of the control state, and its answers. Commands are what a Raft log holds: their JSON is a format
//! (`docs/formats/control.md`), a changed or new one raises [`super::FORMAT`].

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use unibody_dataplane::config::{Outcome, Proposal, VolumeConfig};
use unibody_dataplane::ids::DiskUuid;

use super::ids::{DefinitionDigest, NodeId, disk_uuid, hex_u128, moves, placement, proposal};

/// Most commands in one [`Command::Batch`].
pub const BATCH_MAX: usize = 4096;

/// What is to be known of a VM to place it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// The whole definition, a JSON object; what is in it is the affair of whoever runs it.
    pub definition: String,
    /// Bytes of a node's memory that it takes.
    pub memory: u64,
    /// Its volumes; a volume belongs to one VM at most.
    pub volumes: Vec<String>,
    /// Whether it is to run.
    pub run: bool,
}

/// A change of the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum Command {
    /// A node joins the cluster. The same node again, with the same store, changes the rest.
    AddNode {
        /// The node.
        node: NodeId,
        /// Identity of its store.
        #[serde(with = "hex_u128")]
        store: u128,
        /// What people call it.
        name: String,
        /// Where it listens, `host:port`.
        addresses: Vec<String>,
        /// Failure domain of its disks, unless they name their own.
        domain: String,
        /// Bytes of memory for VMs.
        memory: u64,
        /// Drawn at each start of its process.
        #[serde(with = "hex_u128")]
        incarnation: u128,
    },
    /// A node that is part of the cluster has started. One that was removed stays out.
    NodeUp {
        /// The node.
        node: NodeId,
        /// Where it listens now, `host:port`.
        addresses: Vec<String>,
        /// Bytes of memory for VMs.
        memory: u64,
        /// Drawn at each start of its process.
        #[serde(with = "hex_u128")]
        incarnation: u128,
    },
    /// A node leaves for good. Refused while data or VMs are on it; its empty disks are forgotten with it.
    RemoveNode {
        /// The node.
        node: NodeId,
    },
    /// Nothing new goes to a node, or (`on` false) it takes part again.
    Drain {
        /// The node.
        node: NodeId,
        /// Whether it is drained.
        on: bool,
    },
    /// A disk is part of a node. The same disk again changes its node, domain and size.
    AddDisk {
        /// The disk.
        #[serde(with = "disk_uuid")]
        disk: DiskUuid,
        /// Where it is.
        node: NodeId,
        /// Its failure domain; empty: that of its node.
        domain: String,
        /// Bytes for data.
        bytes: u64,
    },
    /// A disk was opened: from now on only replicas brought up to date in this boot can be marked in-sync.
    DiskUp {
        /// The disk.
        #[serde(with = "disk_uuid")]
        disk: DiskUuid,
        /// Its boot id.
        #[serde(with = "hex_u128")]
        boot: u128,
    },
    /// A disk is gone for good, says the operator: nothing new goes to it, and its replicas are stale wherever another
    /// in-sync one is left.
    DiskOut {
        /// The disk.
        #[serde(with = "disk_uuid")]
        disk: DiskUuid,
    },
    /// Nothing new goes to a disk; what is in sync on it stays so until it is in sync elsewhere. Since format 3.
    DiskLeave {
        /// The disk.
        #[serde(with = "disk_uuid")]
        disk: DiskUuid,
    },
    /// What the disk completed before may be lost though the machine kept its power.
    Distrust {
        /// The disk.
        #[serde(with = "disk_uuid")]
        disk: DiskUuid,
        /// Drawn by the caller.
        #[serde(with = "hex_u128")]
        salt: u128,
    },
    /// A disk without replicas is forgotten.
    ForgetDisk {
        /// The disk.
        #[serde(with = "disk_uuid")]
        disk: DiskUuid,
    },
    /// Make a volume with its first replicas on these disks.
    CreateVolume {
        /// Name.
        name: String,
        /// Bytes.
        size: u64,
        /// Copies.
        mirror: u32,
        /// Stripe unit, bytes.
        stripe_unit: u64,
        /// Stripe width, chunks.
        stripe_width: u32,
        /// Refuse writes.
        read_only: bool,
        /// Drawn by the caller.
        #[serde(with = "hex_u128")]
        instance: u128,
        /// For each chunk its disks.
        #[serde(with = "placement")]
        chunks: Vec<Vec<DiskUuid>>,
    },
    /// Grow a volume; the new chunks' disks.
    ResizeVolume {
        /// Name.
        name: String,
        /// Bytes.
        size: u64,
        /// For each further chunk its disks.
        #[serde(with = "placement")]
        chunks: Vec<Vec<DiskUuid>>,
    },
    /// Forget a volume.
    DeleteVolume {
        /// Name.
        name: String,
    },
    /// The contents are no longer what front ends remember: writes they were promised may be gone.
    Renew {
        /// Name.
        name: String,
        /// Drawn by the caller.
        #[serde(with = "hex_u128")]
        instance: u128,
    },
    /// A node becomes the owner: the next generation. Only a volume without an owner, or the owner itself again (its
    /// earlier process is gone).
    Attach {
        /// Name.
        name: String,
        /// The new owner.
        node: NodeId,
        /// The generation the caller saw.
        generation: u32,
    },
    /// The owner lets go. It has stopped and flushed.
    Release {
        /// Name.
        name: String,
        /// The owner.
        node: NodeId,
        /// Its generation.
        generation: u32,
    },
    /// The owner is taken to be gone: whoever proposes it has waited until its lease has surely run out.
    Revoke {
        /// Name.
        name: String,
        /// The owner's generation.
        generation: u32,
    },
    /// The owner passes the volume on, quiet and flushed: the next generation, without anybody waiting.
    Handover {
        /// Name.
        name: String,
        /// The present owner's generation.
        generation: u32,
        /// The next owner.
        to: NodeId,
    },
    /// The owner's proposal.
    Propose {
        /// Name.
        name: String,
        /// What it asks for.
        #[serde(with = "proposal")]
        proposal: Proposal,
    },
    /// Give the place of replicas on one disk to another.
    Move {
        /// Name.
        name: String,
        /// The generation the plan was made in.
        generation: u32,
        /// The configuration it was made from.
        config: u32,
        /// The disk that loses them; they must not be in sync.
        #[serde(with = "disk_uuid")]
        from: DiskUuid,
        /// For each chunk moved the disk that gets it.
        #[serde(with = "moves")]
        to: Vec<(u32, DiskUuid)>,
    },
    /// Give chunks one replica more, to take the place of the one on a disk: that leaves, or that is fuller. Since format 3.
    AddReplicas {
        /// Name.
        name: String,
        /// The generation the plan was made in.
        generation: u32,
        /// The configuration it was made from.
        config: u32,
        /// That disk.
        #[serde(with = "disk_uuid")]
        from: DiskUuid,
        /// For each chunk the disk that gets the new one.
        #[serde(with = "moves")]
        to: Vec<(u32, DiskUuid)>,
    },
    /// Remove replicas on a disk, where there is one more than needed. Since format 3.
    RemoveReplicas {
        /// Name.
        name: String,
        /// The generation the plan was made in.
        generation: u32,
        /// The configuration it was made from.
        config: u32,
        /// The disk.
        #[serde(with = "disk_uuid")]
        disk: DiskUuid,
        /// The chunks.
        chunks: Vec<u32>,
    },
    /// Replicas on a disk that is lost count no more; each of their chunks has another one that is in sync. Since format 3.
    GiveUp {
        /// Name.
        name: String,
        /// The generation the plan was made in.
        generation: u32,
        /// The configuration it was made from.
        config: u32,
        /// The disk.
        #[serde(with = "disk_uuid")]
        disk: DiskUuid,
        /// The chunks.
        chunks: Vec<u32>,
    },
    /// Define a VM.
    CreateVm {
        /// Name.
        name: String,
        /// What it is.
        vm: VmSpec,
    },
    /// Define it anew, and say whether it is to run. Before format 3 for either; it undoes what was changed meanwhile.
    UpdateVm {
        /// Name.
        name: String,
        /// What it is now.
        vm: VmSpec,
    },
    /// Define it anew; whether it is to run stays as it is. Since format 3.
    DescribeVm {
        /// Name.
        name: String,
        /// The definition that this one was made from: refused if it is another meanwhile. Without it, whatever it is. Since format 4.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        of: Option<DefinitionDigest>,
        /// As in [`VmSpec`].
        definition: String,
        /// As in [`VmSpec`].
        memory: u64,
        /// As in [`VmSpec`].
        volumes: Vec<String>,
    },
    /// It is to run, or not to; what it is stays as it is. Since format 3.
    RunVm {
        /// Name.
        name: String,
        /// Whether it is to run.
        run: bool,
        /// Seconds that its guest may take to shut down; none: the node says. Since format 4.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seconds: Option<u32>,
    },
    /// Forget a VM that is nowhere.
    DeleteVm {
        /// Name.
        name: String,
    },
    /// A VM belongs on a node, or on none. Whoever proposes it knows that it runs nowhere else any more.
    PlaceVm {
        /// Name.
        name: String,
        /// Where.
        node: Option<NodeId>,
        /// The number of placements the caller saw.
        epoch: u32,
    },
    /// Several at once, each with its own answer; one that is refused does not stop the others.
    Batch(Vec<Command>),
}

impl Command {
    /// The volume that it is about, if any.
    pub fn volume(&self) -> Option<&str> {
        match self {
            Command::CreateVolume { name, .. }
            | Command::ResizeVolume { name, .. }
            | Command::DeleteVolume { name }
            | Command::Renew { name, .. }
            | Command::Attach { name, .. }
            | Command::Release { name, .. }
            | Command::Revoke { name, .. }
            | Command::Handover { name, .. }
            | Command::Propose { name, .. }
            | Command::Move { name, .. }
            | Command::AddReplicas { name, .. }
            | Command::RemoveReplicas { name, .. }
            | Command::GiveUp { name, .. } => Some(name),
            _ => None,
        }
    }
}

/// What a command did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied {
    /// Done.
    Done,
    /// The volume's configuration now.
    Volume(Box<VolumeConfig>),
    /// The end of a proposal.
    Outcome(Outcome),
    /// The answers of a batch, in order.
    Batch(Vec<Result<Applied, Refused>>),
}

/// Why a command was refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum Refused {
    /// No such volume.
    #[error("there is no volume {0}")]
    NoVolume(String),
    /// The name is taken.
    #[error("there is a volume {0} already")]
    VolumeExists(String),
    /// The name is not one.
    #[error(
        "{0:?} is no name: use letters, digits, `.`, `_` and `-`, 64 at most, beginning with a letter or digit"
    )]
    Name(String),
    /// The size is not one.
    #[error("{0} bytes is no size for a volume: use a multiple of 4 KiB, at most 1 PiB")]
    Size(u64),
    /// Shrinking would lose data.
    #[error("a volume can not shrink from {from} to {to} bytes: make a smaller one and copy")]
    Shrink {
        /// Now.
        from: u64,
        /// Asked for.
        to: u64,
    },
    /// Copies out of range.
    #[error("{0} copies are not possible: use 1, 2 or 3")]
    Mirror(u32),
    /// Stripe geometry out of range.
    #[error("{0}")]
    Geometry(String),
    /// No such disk.
    #[error("there is no disk {0}")]
    NoDisk(super::Disk),
    /// The disk's new domain holds other replicas of its chunks.
    #[error(
        "disk {disk} can not belong to domain {domain}: volume {volume} has another copy of the same data there; name the domain it had before"
    )]
    Domain {
        /// The disk.
        disk: super::Disk,
        /// The domain asked for.
        domain: String,
        /// A volume that has replicas in both.
        volume: String,
    },
    /// Still in use.
    #[error("disk {0} holds replicas of {1}: move them first")]
    DiskInUse(super::Disk, String),
    /// The placement breaks a rule (a bug in the planner, or the state has moved on since it planned).
    #[error("the placement of chunk {chunk} is not allowed: {why}")]
    Placement {
        /// Which chunk.
        chunk: u32,
        /// Which rule.
        why: Cow<'static, str>,
    },
    /// Generations are counted in 24 bits.
    #[error("volume {0} has had all its owners: copy it to a new one")]
    Generations(String),
    /// Somebody was faster.
    #[error("{name} has changed meanwhile: look again, then try again")]
    Overtaken {
        /// The volume or VM.
        name: String,
    },
    /// Another node has it.
    #[error("volume {volume} is attached to node {owner}: detach it there first")]
    Owned {
        /// The volume.
        volume: String,
        /// Its owner.
        owner: NodeId,
    },
    /// Nobody has it.
    #[error("volume {0} is not attached")]
    NotOwned(String),
    /// A VM uses it.
    #[error("volume {volume} belongs to VM {vm}: change or delete that first")]
    VolumeInUse {
        /// The volume.
        volume: String,
        /// The VM.
        vm: String,
    },
    /// No such node.
    #[error("there is no node {0}")]
    NoNode(NodeId),
    /// The name or address is taken by another node.
    #[error("another node is called {0} already: choose another name")]
    NodeExists(String),
    /// The same id, another store.
    #[error("node {0} has lost its store: it can only join as a new node")]
    Amnesia(NodeId),
    /// What describes the node is out of range.
    #[error("the description of the node is not right: {0}")]
    Node(Cow<'static, str>),
    /// Something is on the node still.
    #[error("node {node} can not be removed: {why}")]
    NodeInUse {
        /// The node.
        node: NodeId,
        /// What.
        why: String,
    },
    /// Nothing may be placed on it.
    #[error("node {0} is being drained: choose another, or end the draining")]
    Draining(NodeId),
    /// No such VM.
    #[error("there is no VM {0}")]
    NoVm(String),
    /// The name is taken.
    #[error("there is a VM {0} already")]
    VmExists(String),
    /// The definition is out of range.
    #[error("the definition of the VM is not right: {0}")]
    Vm(Cow<'static, str>),
    /// It is somewhere.
    #[error("VM {0} is placed on a node: stop it first")]
    VmPlaced(String),
    /// No room.
    #[error("node {node} has {free} bytes of memory left for VMs, {wanted} are needed")]
    Memory {
        /// The node.
        node: NodeId,
        /// Bytes free.
        free: u64,
        /// Bytes needed.
        wanted: u64,
    },
    /// A bound of the state is reached.
    #[error("there can be no more than {max} {what}")]
    TooMany {
        /// Of what.
        what: Cow<'static, str>,
        /// How many.
        max: u64,
    },
}
