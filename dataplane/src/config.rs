//! A volume's committed configuration, as the control state hands it to the owner, and what the owner may propose.
//!
//! The owner follows the last committed configuration it knows and never changes it by itself: it proposes, and goes on
//! when the outcome is committed. The control state decides; its rules are in the `control` crate.

use crate::geometry::Geometry;
use crate::ids::{BootId, DiskUuid, Generation, LayerId, PowerId, VolumeId};

/// Most copies a chunk can have (and one more while a replica is being moved).
pub const SLOTS_MAX: usize = 4;

/// What a replica is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotState {
    /// Has every acknowledged write; reads may come from it.
    InSync,
    /// Missed something; neither read nor written.
    Stale,
    /// Being brought up to date: written where it is clean already, never read.
    Rebuilding,
}

/// One replica of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The disk it is on.
    pub disk: DiskUuid,
    /// Its state.
    pub state: SlotState,
    /// Configuration number at which the slot was given to this disk.
    pub incarnation: u32,
    /// Boot of the disk with which the replica was last known in sync.
    pub boot: BootId,
    /// Span of power of the disk with which the replica was last known in sync.
    pub power: PowerId,
}

/// A volume as committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeConfig {
    /// The volume.
    pub id: VolumeId,
    /// The layer that takes writes.
    pub head: LayerId,
    /// Bytes, a multiple of 4 KiB.
    pub size: u64,
    /// Stripe geometry.
    pub geometry: Geometry,
    /// The present owner's generation.
    pub generation: Generation,
    /// Grows with every change of the volume.
    pub config: u32,
    /// Per chunk its replicas, at most [`SLOTS_MAX`].
    pub chunks: Vec<Vec<Slot>>,
}

/// A change the owner asks for. It is committed only if `generation` and `config` are still the present ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// The owner's generation.
    pub generation: Generation,
    /// The configuration the proposal was made from.
    pub config: u32,
    /// What to change.
    pub change: Change,
}

/// What an owner can ask for. `chunks` are indexes into [`VolumeConfig::chunks`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// These replicas on `disk` missed something. Refused for a chunk whose last in-sync replica this is.
    MarkStale {
        /// The disk.
        disk: DiskUuid,
        /// The chunks.
        chunks: Vec<u32>,
        /// The disk had no room, or does not keep what is written to it: the chunks belong elsewhere.
        no_space: bool,
    },
    /// Begin to bring these stale replicas on `disk` up to date.
    StartRebuild {
        /// The disk.
        disk: DiskUuid,
        /// The chunks.
        chunks: Vec<u32>,
    },
    /// These rebuilding replicas are equal to the in-sync ones, durably, and had every write since. Also renews the
    /// boot recorded for replicas that are in sync already.
    MarkInSync {
        /// The disk.
        disk: DiskUuid,
        /// The chunks.
        chunks: Vec<u32>,
        /// The boot the replicas were brought up to date in.
        boot: BootId,
        /// The disk's span of power.
        power: PowerId,
    },
}

/// How a proposal ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Committed; this is the configuration now. Chunks for which a rule forbade the change are unchanged in it.
    Committed(VolumeConfig),
    /// Generation or configuration had moved on; this is the present one: look again, then propose again.
    Moved(VolumeConfig),
    /// Another owner has the volume: stop.
    Fenced,
}
