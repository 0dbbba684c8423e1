//! Volumes: their replicas, their owners, and the rules of changing both.
//!
//! * The last in-sync replica of a chunk is never made stale, moved or removed.
//! * While a volume is attached only its present generation, from its present configuration, changes its slots. (An
//!   operator who takes a disk out changes them too, always towards stale; the configuration number tells the owner.)
//! * The replicas of a chunk are on distinct failure domains, those aside that are on disks that leave or move (`moves`).
//! * A replica becomes in-sync only from rebuilding (or stays so, with a new boot recorded), and only with the boot that its
//!   disk has now, where the disk's node reports boots.
//!
//! Absent: leases. That an owner is gone is known to whoever proposes `Revoke`, never here.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use unibody_dataplane::config::{Change, Outcome, Proposal, SLOTS_MAX, Slot, SlotState, VolumeConfig};
use unibody_dataplane::geometry::Geometry;
use unibody_dataplane::ids::{BLOCK, BootId, ChunkKey, DiskUuid, Generation, LayerId, PowerId, VolumeId};
use unibody_dataplane::replica::ChunkRef;

use super::ids::hex_u128;
use super::{Applied, Command, Disk, NodeId, Refused, State, is_name};

/// Largest volume, bytes.
pub const VOLUME_BYTES_MAX: u64 = 1 << 50;
/// Most volumes.
pub const VOLUMES_MAX: usize = 1 << 16;

/// State of a replica, as in the data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicaState {
    /// Has every acknowledged write.
    InSync,
    /// Missed something.
    Stale,
    /// Being brought up to date.
    Rebuilding,
}

/// One replica of a chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Replica {
    /// The disk.
    pub disk: Disk,
    /// Its state.
    pub state: ReplicaState,
    /// Configuration number at which the slot was given to the disk.
    pub incarnation: u32,
    /// Boot of the disk in which the replica was last known in sync.
    #[serde(with = "hex_u128")]
    pub boot: u128,
    /// Span of power of the disk in which it was.
    #[serde(with = "hex_u128")]
    pub power: u128,
    /// The disk had no room for it: it belongs elsewhere.
    #[serde(default)]
    pub no_space: bool,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Number, never reused.
    pub id: u32,
    /// The layer that takes writes; never reused.
    pub head: u32,
    /// Names the contents to front ends across restarts.
    #[serde(with = "hex_u128")]
    pub instance: u128,
    /// Bytes.
    pub size: u64,
    /// Copies wanted.
    pub mirror: u32,
    /// Stripe unit, bytes.
    pub stripe_unit: u64,
    /// Stripe width, chunks.
    pub stripe_width: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// Counts its owners.
    pub generation: u32,
    /// Counts its changes.
    pub config: u32,
    /// The node that may do I/O on it now.
    #[serde(default)]
    pub owner: Option<NodeId>,
    /// Replicas of each chunk.
    pub chunks: Vec<Vec<Replica>>,
}

impl Volume {
    /// The geometry; it was checked when the volume was made.
    pub fn geometry(&self) -> Geometry {
        Geometry::new(self.stripe_unit, self.stripe_width).expect("checked at creation")
    }

    /// What the owner is told.
    pub fn to_config(&self) -> VolumeConfig {
        let slot = |replica: &Replica| Slot {
            disk: replica.disk.0,
            state: match replica.state {
                ReplicaState::InSync => SlotState::InSync,
                ReplicaState::Stale => SlotState::Stale,
                ReplicaState::Rebuilding => SlotState::Rebuilding,
            },
            incarnation: replica.incarnation,
            boot: BootId(replica.boot),
            power: PowerId(replica.power),
        };
        VolumeConfig {
            id: VolumeId(self.id),
            head: LayerId(self.head),
            size: self.size,
            geometry: self.geometry(),
            generation: Generation(self.generation),
            config: self.config,
            chunks: self
                .chunks
                .iter()
                .map(|slots| slots.iter().map(slot).collect())
                .collect(),
        }
    }
}

impl Volume {
    /// The replicas that are on a disk.
    pub fn replicas_on(&self, disk: DiskUuid) -> impl Iterator<Item = ChunkRef> {
        (0u32..).zip(&self.chunks).filter_map(move |(chunk, slots)| {
            let slot = slots.iter().find(|slot| slot.disk == Disk(disk))?;
            let key = ChunkKey {
                volume: VolumeId(self.id),
                layer: LayerId(self.head),
                chunk,
            };
            Some(ChunkRef {
                key,
                incarnation: slot.incarnation,
            })
        })
    }
}

impl State {
    /// Whether a replica found on `disk` has no place there any more (its volume was deleted, or it was moved while the disk
    /// was away), and then the generation in whose name it is to be dropped.
    pub fn orphan(&self, disk: DiskUuid, found: &ChunkRef) -> Option<Generation> {
        let volume = self
            .volumes
            .values()
            .find(|volume| volume.id == found.key.volume.0);
        let Some(volume) = volume else {
            return Some(Generation::LAST);
        };
        let slots = volume.chunks.get(found.key.chunk as usize);
        let placed = found.key.layer.0 == volume.head
            && slots
                .into_iter()
                .flatten()
                .any(|slot| slot.disk.0 == disk && slot.incarnation <= found.incarnation);
        (!placed).then_some(Generation(volume.generation))
    }

    /// Whether this state ever gave a volume this number.
    pub fn has_named(&self, volume: VolumeId) -> bool {
        volume.0 < self.next_volume
    }

    /// Whether any volume has a replica on the disk.
    pub fn has_replicas(&self, disk: DiskUuid) -> bool {
        let mut slots = self.volumes.values().flat_map(|volume| &volume.chunks).flatten();
        slots.any(|slot| slot.disk.0 == disk)
    }

    pub(super) fn create_volume(&mut self, command: &Command) -> Result<Applied, Refused> {
        let Command::CreateVolume {
            name,
            size,
            mirror,
            stripe_unit,
            stripe_width,
            read_only,
            instance,
            chunks,
        } = command
        else {
            unreachable!("the caller has looked");
        };
        if !is_name(name) {
            return Err(Refused::Name(name.clone()));
        }
        if self.volumes.contains_key(name) {
            return Err(Refused::VolumeExists(name.clone()));
        }
        super::room(self.volumes.len(), VOLUMES_MAX, "volumes")?;
        check_size(*size)?;
        if !(1..=3).contains(mirror) {
            return Err(Refused::Mirror(*mirror));
        }
        let geometry = Geometry::new(*stripe_unit, *stripe_width)
            .map_err(|error| Refused::Geometry(error.to_string()))?;
        self.check_placement(chunks, geometry.chunks(*size), 0, *mirror)?;
        let (id, head) = (self.next_volume, self.next_layer);
        self.next_volume += 1;
        self.next_layer += 1;
        let volume = Volume {
            id,
            head,
            instance: *instance,
            size: *size,
            mirror: *mirror,
            stripe_unit: *stripe_unit,
            stripe_width: *stripe_width,
            read_only: *read_only,
            generation: 0,
            config: 1,
            owner: None,
            chunks: fresh_chunks(chunks, 1),
        };
        let config = Applied::Volume(Box::new(volume.to_config()));
        self.volumes.insert(name.clone(), Arc::new(volume));
        Ok(config)
    }

    pub(super) fn resize_volume(
        &mut self,
        name: &str,
        size: u64,
        chunks: &[Vec<DiskUuid>],
    ) -> Result<Applied, Refused> {
        check_size(size)?;
        let volume = self.volume(name)?;
        if size < volume.size {
            return Err(Refused::Shrink {
                from: volume.size,
                to: size,
            });
        }
        let (have, mirror) = (volume.chunks.len() as u32, volume.mirror);
        self.check_placement(chunks, volume.geometry().chunks(size) - have, have, mirror)?;
        let volume = self.volume_mut(name)?;
        volume.config += 1;
        volume.size = size;
        let fresh = fresh_chunks(chunks, volume.config);
        volume.chunks.extend(fresh);
        Ok(Applied::Volume(Box::new(volume.to_config())))
    }

    pub(super) fn delete_volume(&mut self, name: &str) -> Result<Applied, Refused> {
        self.volume(name)?;
        if let Some(vm) = self.user_of(name) {
            return Err(Refused::VolumeInUse {
                volume: name.to_owned(),
                vm: vm.to_owned(),
            });
        }
        self.volumes.remove(name);
        Ok(Applied::Done)
    }

    pub(super) fn attach(&mut self, name: &str, node: NodeId, generation: u32) -> Result<Applied, Refused> {
        if !self.has_node(node) {
            return Err(Refused::NoNode(node));
        }
        let volume = self.volume(name)?;
        if let Some(owner) = volume.owner.filter(|owner| *owner != node) {
            return Err(Refused::Owned {
                volume: name.to_owned(),
                owner,
            });
        }
        if volume.generation != generation {
            return Err(overtaken(name));
        }
        self.next_owner(name, node)
    }

    pub(super) fn hand_over(&mut self, name: &str, generation: u32, to: NodeId) -> Result<Applied, Refused> {
        if !self.has_node(to) {
            return Err(Refused::NoNode(to));
        }
        self.owned(name, generation)?;
        self.next_owner(name, to)
    }

    /// The owner lets go (`node`), or is taken to be gone.
    pub(super) fn let_go(
        &mut self,
        name: &str,
        node: Option<NodeId>,
        generation: u32,
    ) -> Result<Applied, Refused> {
        let owner = self.owned(name, generation)?;
        if node.is_some_and(|node| node != owner) {
            return Err(Refused::Owned {
                volume: name.to_owned(),
                owner,
            });
        }
        let volume = self.volume_mut(name)?;
        volume.owner = None;
        volume.config += 1;
        Ok(Applied::Volume(Box::new(volume.to_config())))
    }

    /// The owner of a volume that is attached in this generation.
    fn owned(&self, name: &str, generation: u32) -> Result<NodeId, Refused> {
        let volume = self.volume(name)?;
        if volume.generation != generation {
            return Err(overtaken(name));
        }
        volume.owner.ok_or_else(|| Refused::NotOwned(name.to_owned()))
    }

    fn next_owner(&mut self, name: &str, node: NodeId) -> Result<Applied, Refused> {
        let volume = self.volume_mut(name)?;
        if volume.generation + 1 >= 1 << 24 {
            return Err(Refused::Generations(name.to_owned()));
        }
        volume.generation += 1;
        volume.config += 1;
        volume.owner = Some(node);
        Ok(Applied::Volume(Box::new(volume.to_config())))
    }

    pub(super) fn volume(&self, name: &str) -> Result<&Volume, Refused> {
        let volume = self.volumes.get(name).map(Arc::as_ref);
        volume.ok_or_else(|| Refused::NoVolume(name.to_owned()))
    }

    pub(super) fn volume_mut(&mut self, name: &str) -> Result<&mut Volume, Refused> {
        let volume = self.volumes.get_mut(name).map(Arc::make_mut);
        volume.ok_or_else(|| Refused::NoVolume(name.to_owned()))
    }

    /// Nobody waits any longer for what was on a disk that is out, where another in-sync replica is left. An owner that is
    /// attached hears of it as of any change by another's hand.
    pub(super) fn give_up_on(&mut self, disk: Disk) {
        let affected = |volume: &&mut Arc<Volume>| {
            let mut slots = volume.chunks.iter().flatten();
            slots.any(|slot| slot.disk == disk && slot.state != ReplicaState::Stale)
        };
        for volume in self.volumes.values_mut().filter(affected) {
            let volume = Arc::make_mut(volume);
            let mut changed = false;
            for slots in &mut volume.chunks {
                let in_sync = slots
                    .iter()
                    .filter(|slot| slot.state == ReplicaState::InSync)
                    .count();
                for slot in slots.iter_mut().filter(|slot| slot.disk == disk) {
                    let last = slot.state == ReplicaState::InSync && in_sync == 1;
                    if !last && slot.state != ReplicaState::Stale {
                        slot.state = ReplicaState::Stale;
                        changed = true;
                    }
                }
            }
            volume.config += u32::from(changed);
        }
    }

    /// The rules for the replicas of new chunks, numbered from `first`.
    fn check_placement(
        &self,
        chunks: &[Vec<DiskUuid>],
        wanted: u32,
        first: u32,
        mirror: u32,
    ) -> Result<(), Refused> {
        let fail = |chunk, why| {
            Err(Refused::Placement {
                chunk,
                why: Cow::Borrowed(why),
            })
        };
        if chunks.len() != wanted as usize {
            return fail(
                first + chunks.len() as u32,
                "the plan has another number of chunks than the volume",
            );
        }
        for (number, disks) in (first..).zip(chunks) {
            if disks.len() != mirror as usize {
                return fail(number, "the plan has another number of copies than the volume");
            }
            let mut domains = BTreeSet::new();
            for disk in disks {
                let Some(record) = self.usable(*disk) else {
                    return fail(
                        number,
                        "a disk of the plan does not exist, was taken out or its node is being drained",
                    );
                };
                if !domains.insert(self.domain_of_record(record)) {
                    return fail(number, "two replicas would be in one failure domain");
                }
            }
        }
        Ok(())
    }

    pub(super) fn propose(&mut self, name: &str, proposal: &Proposal) -> Result<Outcome, Refused> {
        let volume = self.volume(name)?;
        if volume.owner.is_none() || proposal.generation.0 != volume.generation {
            return Ok(Outcome::Fenced);
        }
        if proposal.config != volume.config {
            return Ok(Outcome::Moved(volume.to_config()));
        }
        // A replica brought up to date in a boot that is over may lack what the disk forgot since.
        let forgotten = match &proposal.change {
            Change::MarkInSync { disk, boot, .. } => {
                let record = self.disks.get(&Disk(*disk));
                record.is_some_and(|record| record.boot != 0 && record.boot != boot.0)
            }
            _ => false,
        };
        let volume = self.volume_mut(name)?;
        // Even a change that changes nothing counts, so that it voids whatever was proposed beside it.
        volume.config += 1;
        let (disk, chunks) = match &proposal.change {
            Change::MarkStale { disk, chunks, .. }
            | Change::StartRebuild { disk, chunks }
            | Change::MarkInSync { disk, chunks, .. } => (Disk(*disk), chunks),
        };
        for &chunk in chunks {
            let Some(slots) = volume.chunks.get_mut(chunk as usize) else {
                continue;
            };
            let in_sync = slots
                .iter()
                .filter(|slot| slot.state == ReplicaState::InSync)
                .count();
            let Some(slot) = slots.iter_mut().find(|slot| slot.disk == disk) else {
                continue;
            };
            match &proposal.change {
                Change::MarkStale { no_space, .. } => {
                    if slot.state != ReplicaState::InSync || in_sync > 1 {
                        slot.state = ReplicaState::Stale;
                        slot.no_space |= no_space;
                    }
                }
                Change::StartRebuild { .. } => {
                    if slot.state == ReplicaState::Stale {
                        slot.state = ReplicaState::Rebuilding;
                    }
                }
                Change::MarkInSync { boot, power, .. } => {
                    if slot.state != ReplicaState::Stale && !forgotten {
                        slot.state = ReplicaState::InSync;
                        slot.no_space = false;
                        (slot.boot, slot.power) = (boot.0, power.0);
                    }
                }
            }
        }
        Ok(Outcome::Committed(volume.to_config()))
    }

    /// What must hold of the volumes of every state.
    pub(super) fn check_volumes(&self) -> Result<(), String> {
        for (name, volume) in &self.volumes {
            let fail = |why: &str| Err(format!("volume {name}: {why}"));
            let Ok(geometry) = Geometry::new(volume.stripe_unit, volume.stripe_width) else {
                return fail("impossible stripe geometry");
            };
            if !is_name(name) || check_size(volume.size).is_err() || !(1..=3).contains(&volume.mirror) {
                return fail("impossible name, size or number of copies");
            }
            if volume.id >= self.next_volume || volume.head >= self.next_layer || volume.generation >= 1 << 24
            {
                return fail("a number that was never given out");
            }
            if geometry.chunks(volume.size) as usize != volume.chunks.len() {
                return fail("another number of chunks than its size needs");
            }
            if volume.owner.is_some_and(|owner| !self.has_node(owner)) {
                return fail("an owner that there is not");
            }
            for slots in &volume.chunks {
                let disks: BTreeSet<_> = slots.iter().map(|slot| slot.disk).collect();
                if disks.len() != slots.len() || slots.len() > SLOTS_MAX {
                    return fail("a chunk twice on one disk, or too often");
                }
                if !disks.iter().all(|disk| self.disks.contains_key(disk)) {
                    return fail("a replica on an unknown disk");
                }
                if !self.apart(volume, slots) {
                    return fail("two replicas of a chunk in one failure domain");
                }
                if slots.len().wrapping_sub(volume.mirror as usize) > 1 {
                    return fail("a chunk with another number of replicas than the volume has copies");
                }
                if !slots.iter().any(|slot| slot.state == ReplicaState::InSync) {
                    return fail("a chunk without an in-sync replica");
                }
            }
        }
        Ok(())
    }
}

pub(super) fn overtaken(name: &str) -> Refused {
    Refused::Overtaken {
        name: name.to_owned(),
    }
}

fn check_size(size: u64) -> Result<(), Refused> {
    if size == 0 || !size.is_multiple_of(BLOCK as u64) || size > VOLUME_BYTES_MAX {
        return Err(Refused::Size(size));
    }
    Ok(())
}

pub(super) fn fresh(disk: DiskUuid, incarnation: u32) -> Replica {
    Replica {
        disk: Disk(disk),
        state: ReplicaState::InSync,
        incarnation,
        boot: 0,
        power: 0,
        no_space: false,
    }
}

fn fresh_chunks(chunks: &[Vec<DiskUuid>], incarnation: u32) -> Vec<Vec<Replica>> {
    chunks
        .iter()
        .map(|disks| disks.iter().map(|&disk| fresh(disk, incarnation)).collect())
        .collect()
}
