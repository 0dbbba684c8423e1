//! What a node says of itself.

use std::collections::BTreeMap;

use unibody_dataplane::disk::DiskKind;
use unibody_dataplane::mirror::{MirrorStatus, Phase};
use unibody_dataplane::plane::ShardStatus;

use unibody_dataplane::frontend::Export;
use unibody_dataplane::plane::VolumeIndex;

use super::Node;
use super::disks;
use crate::admin::{DiskStatus, NodeStatus, ReactorStatus, VolumeStatus};
use crate::state::{Disk, ReplicaState, State, Volume};

impl Node {
    /// Everything there is to know.
    pub(super) fn status(&self) -> NodeStatus {
        let shards = self.plane.status();
        let mut volumes = self.volume_status(&shards);
        self.paces.tell(&mut volumes);
        NodeStatus {
            disks: self
                .disks
                .iter()
                .map(|disk| disk_status(disk, self.control.state(), &shards))
                .collect(),
            volumes,
            reactors: shards.iter().map(reactor_status).collect(),
            vms: Vec::new(),
        }
    }

    pub(super) fn volume_status(&self, shards: &[ShardStatus]) -> Vec<VolumeStatus> {
        self.volumes
            .iter()
            .flatten()
            .map(|volume| {
                let state = self.control.state();
                let Some(record) = state.volumes.get(&volume.name) else {
                    // It is deleted and its last I/O has not ended.
                    return VolumeStatus {
                        name: volume.name.clone(),
                        state: "offline".into(),
                        ..VolumeStatus::default()
                    };
                };
                let mut status =
                    volume_status(&volume.name, record, volume.index, volume.export.as_ref(), shards);
                status.socket = volume.socket.clone();
                status
            })
            .collect()
    }
}

/// What is known of a disk of this node.
pub(crate) fn disk_status(disk: &disks::NodeDisk, state: &State, shards: &[ShardStatus]) -> DiskStatus {
    let (phase, reason) = match &disk.phase {
        disks::Phase::Online => ("online", None),
        disks::Phase::Leaving => ("leaving", Some("its last I/O has not ended".to_owned())),
        disks::Phase::Failed(reason) => ("failed", Some(reason.clone())),
        disks::Phase::Opening => ("opening", None),
    };
    let kind = match disk.kind {
        DiskKind::File => "file",
        DiskKind::BlockDevice => "block",
        DiskKind::Memory => "memory",
        DiskKind::Null => "null",
    };
    let mut status = DiskStatus {
        name: disk.name.clone(),
        uuid: disk.uuid.map(|uuid| uuid.to_string()).unwrap_or_default(),
        domain: disk.domain(),
        state: phase.into(),
        reason,
        kind: kind.into(),
        ..DiskStatus::default()
    };
    if let Some(record) = disk.uuid.and_then(|uuid| state.disks.get(&Disk(uuid))) {
        status.capacity = record.bytes;
    }
    let stats = shards
        .iter()
        .flat_map(|shard| &shard.disks)
        .find(|(index, _)| *index == disk.index);
    if let Some((_, stats)) = stats {
        status.capacity = stats.capacity_bytes;
        status.free = stats.free_bytes;
        status.suspect = stats.suspect_chunks > 0;
        status.dirty_regions = stats.dirty_regions;
        status.in_doubt_regions = stats.in_doubt_regions;
        status.counters = stats
            .counters()
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
    }
    status.counters.insert("failures".into(), disk.failures);
    if let Some(faults) = &disk.faults {
        status.counters.insert("faults_injected".into(), faults.faults());
    }
    status
}

/// What is known of a volume that is attached here.
pub(crate) fn volume_status(
    name: &str,
    record: &Volume,
    index: VolumeIndex,
    export: Option<&Export>,
    shards: &[ShardStatus],
) -> VolumeStatus {
    let mut status = VolumeStatus {
        name: name.to_owned(),
        size: record.size,
        mirror: record.mirror,
        stripe_unit: record.stripe_unit,
        stripe_width: record.stripe_width,
        state: "offline".into(),
        replicas: record.chunks.iter().map(|slots| slots.len() as u64).sum(),
        ..VolumeStatus::default()
    };
    let found = shards
        .iter()
        .flat_map(|shard| &shard.volumes)
        .find(|(found, _)| *found == index);
    let Some((_, mirror)) = found else { return status };
    status.in_sync = u64::from(mirror.in_sync);
    status.rebuilding = u64::from(mirror.rebuilding);
    status.stale = u64::from(mirror.stale + mirror.lost);
    status.regions_to_heal = mirror.regions_unsettled + mirror.regions_to_rebuild;
    status.state = state(mirror, full(record)).into();
    status.counters = counters(mirror);
    if let Some(export) = export {
        let shared = export.shared();
        status.counters.extend(
            shared
                .counters
                .list()
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value)),
        );
        status
            .counters
            .insert("connected".into(), u64::from(export.connected()));
    }
    status
}

/// Whether every chunk has all the copies it is to have, so that any further ones only move.
fn full(record: &Volume) -> bool {
    record.chunks.iter().all(|slots| {
        let in_sync = slots.iter().filter(|slot| slot.state == ReplicaState::InSync);
        in_sync.count() >= record.mirror as usize
    })
}

/// `full`: as the state has it, everything is in sync that is to be.
fn state(mirror: &MirrorStatus, full: bool) -> &'static str {
    match mirror.phase {
        Phase::New | Phase::Attaching => "attaching",
        Phase::Draining | Phase::Detached => "offline",
        Phase::Fenced => "fenced",
        Phase::Failed => "failed",
        Phase::Serving if mirror.unavailable > 0 => "unavailable",
        Phase::Serving if full && mirror.lost == 0 && mirror.degraded => "moving",
        Phase::Serving if mirror.rebuilding > 0 => "healing",
        Phase::Serving if mirror.degraded => "degraded",
        Phase::Serving => "healthy",
    }
}

fn counters(mirror: &MirrorStatus) -> BTreeMap<String, u64> {
    [
        ("operations", u64::from(mirror.ops)),
        ("bytes_synced", mirror.bytes_synced),
        ("read_repairs", mirror.read_repairs),
        ("regions_verified", mirror.regions_verified),
        ("blocks_repaired", mirror.blocks_repaired),
        ("generations_renewed", mirror.renewals),
        ("blocks_adopted", mirror.blocks_adopted),
        ("blocks_lost", mirror.blocks_lost),
        ("regions_unsettled", mirror.regions_unsettled),
        ("regions_to_rebuild", mirror.regions_to_rebuild),
        ("errors_io", mirror.errors_io),
        ("errors_no_space", mirror.errors_no_space),
        ("errors_timeout", mirror.errors_timeout),
        ("answers_odd", mirror.answers_odd),
    ]
    .into_iter()
    .map(|(name, value)| (name.to_owned(), value))
    .collect()
}

pub(crate) fn reactor_status(shard: &ShardStatus) -> ReactorStatus {
    let r = &shard.reactor;
    let counters = [
        ("turns", r.turns),
        ("busy_turns", r.busy_turns),
        ("sleeps", r.sleeps),
        ("enters", r.enters),
        ("requests", r.requests),
        ("errors", r.errors),
        ("bytes_copied_in", r.copied_in),
        ("bytes_copied_out", r.copied_out),
        ("waits", r.waits),
        ("queues_polled", r.queues_polled),
        ("queues_idle", r.queues_idle),
        ("buffers_lent", r.buffers_lent),
    ];
    ReactorStatus {
        core: r.core,
        counters: counters
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
    }
}
