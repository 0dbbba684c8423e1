//! The control state: which disks and volumes there are, where every chunk lies, and the rules of changing that.
//!
//! [`State::apply`] is the only way to change it. It is pure and deterministic: equal commands on equal states give equal
//! states and answers, so that a Raft log of commands can drive it as well as one node's file. It enforces what no caller
//! may be trusted with:
//!
//! * the last in-sync replica of a chunk is never made stale or dropped;
//! * only the present generation of a volume, from its present configuration, changes its slots;
//! * the replicas of a chunk are on distinct failure domains;
//! * a replica becomes in-sync only from rebuilding (or stays so, with a new boot recorded).
//!
//! Absent: clocks, randomness, hash order, I/O. Placement is planned elsewhere (`planner`) and comes inside the commands.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use unibody_dataplane::config::{Change, Outcome, Proposal, SLOTS_MAX, Slot, SlotState, VolumeConfig};
use unibody_dataplane::geometry::Geometry;
use unibody_dataplane::ids::{BLOCK, BootId, ChunkKey, DiskUuid, Generation, LayerId, PowerId, VolumeId};
use unibody_dataplane::replica::ChunkRef;

/// Version of the serialised form.
pub const FORMAT: u32 = 1;
/// Largest volume, bytes.
pub const VOLUME_BYTES_MAX: u64 = 1 << 50;

/// Identity of a disk as a map key: 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Disk(pub DiskUuid);

impl Serialize for Disk {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Disk {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        hex(&text)
            .map(|n| Disk(DiskUuid(n)))
            .ok_or_else(|| serde::de::Error::custom("32 hexadecimal digits are needed"))
    }
}

fn hex(text: &str) -> Option<u128> {
    (text.len() == 32).then(|| u128::from_str_radix(text, 16).ok())?
}

mod hex_u128 {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &u128, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{value:032x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u128, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        super::hex(&text).ok_or_else(|| serde::de::Error::custom("32 hexadecimal digits are needed"))
    }
}

/// What is known of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRecord {
    /// Failure domain.
    pub domain: String,
    /// Bytes for data.
    pub bytes: u64,
    /// Taken out for good: nothing is placed on it any more.
    pub out: bool,
    /// Drawn anew when the disk may have lost what it completed without the machine losing power (a failed flush): its
    /// spans of power before and after must not look like one.
    #[serde(with = "hex_u128")]
    pub distrust: u128,
}

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

    /// Whether any volume has a replica on the disk.
    pub fn has_replicas(&self, disk: DiskUuid) -> bool {
        let mut slots = self.volumes.values().flat_map(|volume| &volume.chunks).flatten();
        slots.any(|slot| slot.disk.0 == disk)
    }
}

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// [`FORMAT`].
    pub format: u32,
    next_volume: u32,
    next_layer: u32,
    /// Disks by identity.
    pub disks: BTreeMap<Disk, DiskRecord>,
    /// Volumes by name.
    pub volumes: BTreeMap<String, Volume>,
}

impl Default for State {
    fn default() -> Self {
        State {
            format: FORMAT,
            next_volume: 1,
            next_layer: 1,
            disks: BTreeMap::new(),
            volumes: BTreeMap::new(),
        }
    }
}

/// A change of the state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// A disk is part of the node. The same disk again changes its domain and size.
    AddDisk {
        /// The disk.
        disk: DiskUuid,
        /// Its failure domain.
        domain: String,
        /// Bytes for data.
        bytes: u64,
    },
    /// A disk is gone for good, says the operator: nothing new goes to it, and its replicas are stale wherever another
    /// in-sync one is left.
    DiskOut {
        /// The disk.
        disk: DiskUuid,
    },
    /// What the disk completed before may be lost though the machine kept its power.
    Distrust {
        /// The disk.
        disk: DiskUuid,
        /// Drawn by the caller.
        salt: u128,
    },
    /// A disk without replicas is forgotten.
    ForgetDisk {
        /// The disk.
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
        instance: u128,
        /// For each chunk its disks.
        chunks: Vec<Vec<DiskUuid>>,
    },
    /// Grow a volume; the new chunks' disks.
    ResizeVolume {
        /// Name.
        name: String,
        /// Bytes.
        size: u64,
        /// For each further chunk its disks.
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
        instance: u128,
    },
    /// A new owner: the next generation.
    Attach {
        /// Name.
        name: String,
    },
    /// The owner's proposal.
    Propose {
        /// Name.
        name: String,
        /// What it asks for.
        proposal: Proposal,
    },
    /// Give the place of replicas on one disk to another.
    Move {
        /// Name.
        name: String,
        /// The disk that loses them; they must not be in sync.
        from: DiskUuid,
        /// For each chunk moved the disk that gets it.
        to: Vec<(u32, DiskUuid)>,
    },
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
}

/// Why a command was refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No such volume.
    #[error("there is no volume {0}")]
    NoVolume(String),
    /// The name is taken.
    #[error("there is a volume {0} already")]
    VolumeExists(String),
    /// The name is not one.
    #[error(
        "{0:?} is no name for a volume: use letters, digits, `.`, `_` and `-`, 64 at most, beginning with a letter or digit"
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
    #[error(transparent)]
    Geometry(#[from] unibody_dataplane::geometry::GeometryError),
    /// No such disk.
    #[error("there is no disk {0}")]
    NoDisk(DiskUuid),
    /// The disk's new domain holds other replicas of its chunks.
    #[error(
        "disk {disk} can not belong to domain {domain}: volume {volume} has another copy of the same data there; name the domain it had before"
    )]
    Domain {
        /// The disk.
        disk: DiskUuid,
        /// The domain asked for.
        domain: String,
        /// A volume that has replicas in both.
        volume: String,
    },
    /// Still in use.
    #[error("disk {0} holds replicas of {1}: move them first")]
    DiskInUse(DiskUuid, String),
    /// The placement breaks a rule (a bug in the planner).
    #[error("the placement of chunk {chunk} is not allowed: {why}")]
    Placement {
        /// Which chunk.
        chunk: u32,
        /// Which rule.
        why: &'static str,
    },
    /// Generations are counted in 24 bits.
    #[error("volume {0} has had all its owners: copy it to a new one")]
    Generations(String),
}

/// Whether a volume may be called so.
pub fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    name.len() <= 64 && name.chars().all(fits) && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

impl State {
    /// Changes the state, or says why not; then nothing was changed.
    ///
    /// # Errors
    /// When a rule forbids it.
    pub fn apply(&mut self, command: &Command) -> Result<Applied, Refused> {
        match command {
            Command::AddDisk { disk, domain, bytes } => {
                self.check_domain(*disk, domain)?;
                let known = self.disks.get(&Disk(*disk));
                let record = DiskRecord {
                    domain: domain.clone(),
                    bytes: *bytes,
                    out: known.is_some_and(|record| record.out),
                    distrust: known.map_or(0, |record| record.distrust),
                };
                self.disks.insert(Disk(*disk), record);
                Ok(Applied::Done)
            }
            Command::DiskOut { disk } => {
                self.disks
                    .get_mut(&Disk(*disk))
                    .ok_or(Refused::NoDisk(*disk))?
                    .out = true;
                self.give_up_on(Disk(*disk));
                Ok(Applied::Done)
            }
            Command::Distrust { disk, salt } => {
                self.disks
                    .get_mut(&Disk(*disk))
                    .ok_or(Refused::NoDisk(*disk))?
                    .distrust = *salt;
                Ok(Applied::Done)
            }
            Command::ForgetDisk { disk } => self.forget_disk(*disk),
            Command::CreateVolume {
                name,
                size,
                mirror,
                stripe_unit,
                stripe_width,
                read_only,
                instance,
                chunks,
            } => {
                if !is_name(name) {
                    return Err(Refused::Name(name.clone()));
                }
                if self.volumes.contains_key(name) {
                    return Err(Refused::VolumeExists(name.clone()));
                }
                check_size(*size)?;
                if !(1..=3).contains(mirror) {
                    return Err(Refused::Mirror(*mirror));
                }
                let geometry = Geometry::new(*stripe_unit, *stripe_width)?;
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
                    chunks: fresh_chunks(chunks, 1),
                };
                let config = Applied::Volume(Box::new(volume.to_config()));
                self.volumes.insert(name.clone(), volume);
                Ok(config)
            }
            Command::ResizeVolume { name, size, chunks } => {
                check_size(*size)?;
                let volume = self.volume(name)?;
                if *size < volume.size {
                    return Err(Refused::Shrink {
                        from: volume.size,
                        to: *size,
                    });
                }
                let (have, mirror) = (volume.chunks.len() as u32, volume.mirror);
                self.check_placement(chunks, volume.geometry().chunks(*size) - have, have, mirror)?;
                let volume = self.volume_mut(name)?;
                volume.config += 1;
                volume.size = *size;
                let fresh = fresh_chunks(chunks, volume.config);
                volume.chunks.extend(fresh);
                Ok(Applied::Volume(Box::new(volume.to_config())))
            }
            Command::DeleteVolume { name } => self
                .volumes
                .remove(name)
                .map(|_| Applied::Done)
                .ok_or_else(|| Refused::NoVolume(name.clone())),
            Command::Renew { name, instance } => {
                self.volume_mut(name)?.instance = *instance;
                Ok(Applied::Done)
            }
            Command::Attach { name } => {
                let volume = self.volume_mut(name)?;
                if volume.generation + 1 >= 1 << 24 {
                    return Err(Refused::Generations(name.clone()));
                }
                volume.generation += 1;
                volume.config += 1;
                Ok(Applied::Volume(Box::new(volume.to_config())))
            }
            Command::Propose { name, proposal } => self.propose(name, proposal).map(Applied::Outcome),
            Command::Move { name, from, to } => self.move_replicas(name, *from, to),
        }
    }

    fn volume(&self, name: &str) -> Result<&Volume, Refused> {
        self.volumes
            .get(name)
            .ok_or_else(|| Refused::NoVolume(name.to_owned()))
    }

    fn volume_mut(&mut self, name: &str) -> Result<&mut Volume, Refused> {
        self.volumes
            .get_mut(name)
            .ok_or_else(|| Refused::NoVolume(name.to_owned()))
    }

    /// A disk may change its domain only where no chunk on it has another replica there.
    fn check_domain(&self, disk: DiskUuid, domain: &str) -> Result<(), Refused> {
        if !self.disks.contains_key(&Disk(disk)) {
            return Ok(());
        }
        let clashes = |slots: &Vec<Replica>| {
            slots.iter().any(|slot| slot.disk.0 == disk)
                && slots
                    .iter()
                    .any(|slot| slot.disk.0 != disk && self.disks[&slot.disk].domain == domain)
        };
        let clash = self
            .volumes
            .iter()
            .find(|(_, volume)| volume.chunks.iter().any(clashes));
        match clash {
            Some((volume, _)) => Err(Refused::Domain {
                disk,
                domain: domain.to_owned(),
                volume: volume.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Nobody waits any longer for what was on a disk that is out, where another in-sync replica is left. An owner that is
    /// attached hears of it as of any change by another's hand.
    fn give_up_on(&mut self, disk: Disk) {
        for volume in self.volumes.values_mut() {
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

    fn forget_disk(&mut self, disk: DiskUuid) -> Result<Applied, Refused> {
        if !self.disks.contains_key(&Disk(disk)) {
            return Err(Refused::NoDisk(disk));
        }
        let user = self.volumes.iter().find(|(_, volume)| {
            volume
                .chunks
                .iter()
                .flatten()
                .any(|replica| replica.disk == Disk(disk))
        });
        if let Some((name, _)) = user {
            return Err(Refused::DiskInUse(disk, name.clone()));
        }
        self.disks.remove(&Disk(disk));
        Ok(Applied::Done)
    }

    /// The rules for the replicas of new chunks, numbered from `first`.
    fn check_placement(
        &self,
        chunks: &[Vec<DiskUuid>],
        wanted: u32,
        first: u32,
        mirror: u32,
    ) -> Result<(), Refused> {
        let fail = |chunk, why| Err(Refused::Placement { chunk, why });
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
                match self.disks.get(&Disk(*disk)) {
                    None => return fail(number, "a disk of the plan does not exist"),
                    Some(record) if record.out => return fail(number, "a disk of the plan was taken out"),
                    Some(record) if !domains.insert(&record.domain) => {
                        return fail(number, "two replicas would be in one failure domain");
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(())
    }

    fn propose(&mut self, name: &str, proposal: &Proposal) -> Result<Outcome, Refused> {
        let volume = self.volume_mut(name)?;
        if proposal.generation.0 != volume.generation {
            return Ok(Outcome::Fenced);
        }
        if proposal.config != volume.config {
            return Ok(Outcome::Moved(volume.to_config()));
        }
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
                    if slot.state != ReplicaState::Stale {
                        slot.state = ReplicaState::InSync;
                        slot.no_space = false;
                        (slot.boot, slot.power) = (boot.0, power.0);
                    }
                }
            }
        }
        Ok(Outcome::Committed(volume.to_config()))
    }

    fn move_replicas(
        &mut self,
        name: &str,
        from: DiskUuid,
        to: &[(u32, DiskUuid)],
    ) -> Result<Applied, Refused> {
        let volume = self.volume(name)?;
        let fail = |chunk, why| Err(Refused::Placement { chunk, why });
        for &(chunk, target) in to {
            let Some(slots) = volume.chunks.get(chunk as usize) else {
                return fail(chunk, "there is no such chunk");
            };
            let Some(old) = slots.iter().find(|slot| slot.disk == Disk(from)) else {
                return fail(chunk, "it has no replica on that disk");
            };
            if old.state == ReplicaState::InSync {
                return fail(chunk, "the replica to be moved is in sync");
            }
            let Some(record) = self.disks.get(&Disk(target)).filter(|record| !record.out) else {
                return fail(chunk, "the new disk does not exist or was taken out");
            };
            let domain = |slot: &Replica| self.disks.get(&slot.disk).map(|record| &record.domain);
            let clash = slots
                .iter()
                .filter(|slot| slot.disk != Disk(from))
                .any(|slot| slot.disk == Disk(target) || domain(slot) == Some(&record.domain));
            if clash {
                return fail(chunk, "two replicas would be in one failure domain");
            }
        }
        let volume = self.volume_mut(name)?;
        volume.config += 1;
        let incarnation = volume.config;
        for &(chunk, target) in to {
            let slot = volume.chunks[chunk as usize]
                .iter_mut()
                .find(|slot| slot.disk == Disk(from));
            // A chunk named twice finds its replica gone the second time.
            if let Some(slot) = slot {
                *slot = Replica {
                    state: ReplicaState::Stale,
                    ..fresh(target, incarnation)
                };
            }
        }
        Ok(Applied::Volume(Box::new(volume.to_config())))
    }

    /// What must hold of every state; the message names the first rule that does not.
    ///
    /// # Errors
    /// When the state could not have come from [`State::apply`]: a foreign or damaged file.
    pub fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("format {} is not {FORMAT}", self.format));
        }
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
            for slots in &volume.chunks {
                let disks: BTreeSet<_> = slots.iter().map(|slot| slot.disk).collect();
                if disks.len() != slots.len() || slots.len() > SLOTS_MAX {
                    return fail("a chunk twice on one disk, or too often");
                }
                if !disks.iter().all(|disk| self.disks.contains_key(disk)) {
                    return fail("a replica on an unknown disk");
                }
                let domains: BTreeSet<_> = disks.iter().map(|disk| &self.disks[disk].domain).collect();
                if domains.len() != disks.len() {
                    return fail("two replicas of a chunk in one failure domain");
                }
                if !slots.iter().any(|slot| slot.state == ReplicaState::InSync) {
                    return fail("a chunk without an in-sync replica");
                }
            }
        }
        Ok(())
    }
}

fn check_size(size: u64) -> Result<(), Refused> {
    if size == 0 || !size.is_multiple_of(BLOCK as u64) || size > VOLUME_BYTES_MAX {
        return Err(Refused::Size(size));
    }
    Ok(())
}

fn fresh(disk: DiskUuid, incarnation: u32) -> Replica {
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
