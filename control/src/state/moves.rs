//! Replicas that change their disk.
//!
//! What is in sync on a disk that leaves stays so until it is in sync elsewhere: its chunk gets one replica more, which the
//! owner brings up to date like any that is stale, and loses the old one afterwards. What is not in sync counts for nothing
//! and gives its place away at once. Replicas move so between disks that stay, too, that these are equally full
//! (`planner::balance`).
//!
//! * A chunk has as many replicas as its volume has copies, or one more while one of them moves.
//! * A replica that is in sync is removed only if so many others are, on so many failure domains, as the volume has copies;
//!   on a disk that stays, any replica.
//! * A replica on a disk that stays gets a successor only while all of its chunk are in sync.
//! * The new replica may be in the domain of one that leaves or that it takes the place of, and of no other.

use std::borrow::Cow;
use std::collections::BTreeSet;

use unibody_dataplane::ids::DiskUuid;

use super::volumes::{fresh, overtaken};
use super::{Applied, Disk, Refused, Replica, ReplicaState, State, Volume};

/// The volume that a plan is about, as it was when the plan was made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen<'a> {
    pub(super) name: &'a str,
    pub(super) generation: u32,
    pub(super) config: u32,
}

fn refused(chunk: u32, why: &'static str) -> Refused {
    Refused::Placement {
        chunk,
        why: Cow::Borrowed(why),
    }
}

impl Volume {
    /// The replicas of a chunk, and the one of them that is on a disk.
    fn slot(&self, chunk: u32, disk: Disk) -> Result<(&[Replica], &Replica), Refused> {
        let slots = self.chunks.get(chunk as usize);
        let slots = slots.ok_or_else(|| refused(chunk, "there is no such chunk"))?;
        let slot = slots.iter().find(|slot| slot.disk == disk);
        slot.map(|slot| (slots.as_slice(), slot))
            .ok_or_else(|| refused(chunk, "it has no replica on that disk"))
    }

    /// Whether a chunk has a replica more than it needs.
    pub(crate) fn has_spare(&self, slots: &[Replica]) -> bool {
        slots.len() > self.mirror as usize
    }
}

impl State {
    /// Whether nothing is placed on a disk any more.
    pub(crate) fn leaves(&self, disk: Disk) -> bool {
        self.disks.get(&disk).is_none_or(|record| record.out)
    }

    /// Whether a chunk has its replicas in distinct domains, those aside that are on disks that leave; with one more than it
    /// needs two may share a domain.
    pub(super) fn apart(&self, volume: &Volume, slots: &[Replica]) -> bool {
        self.apart_as(volume, slots, |disk| self.domain_of(disk))
    }

    /// The same if disks were in these domains.
    pub(super) fn apart_as<'a>(
        &self,
        volume: &Volume,
        slots: &[Replica],
        domain_of: impl Fn(Disk) -> Option<&'a str>,
    ) -> bool {
        let mut domains = BTreeSet::new();
        let mut staying = slots.iter().filter(|slot| !self.leaves(slot.disk));
        let all = || {
            slots
                .iter()
                .map(|slot| domain_of(slot.disk))
                .collect::<BTreeSet<_>>()
        };
        staying.all(|slot| domains.insert(domain_of(slot.disk)))
            || volume.has_spare(slots) && all().len() >= volume.mirror as usize
    }

    /// Whether a chunk could do without its replica on a disk: what is left would be as many as are wanted, in as many domains.
    /// Two on one domain do not count twice, or there would be no way to three copies again.
    pub(crate) fn is_spare(&self, volume: &Volume, slots: &[Replica], disk: Disk) -> bool {
        let others = slots.iter().filter(|slot| slot.disk != disk);
        let domains = self.domains(others);
        volume.has_spare(slots) && domains.len() >= volume.mirror as usize
    }

    fn seen(&self, seen: Seen<'_>) -> Result<&Volume, Refused> {
        let volume = self.volume(seen.name)?;
        match (seen.generation, seen.config) == (volume.generation, volume.config) {
            true => Ok(volume),
            false => Err(overtaken(seen.name)),
        }
    }

    /// Whether a disk may hold what is on `from` now.
    fn check_target(
        &self,
        chunk: u32,
        slots: &[Replica],
        from: Disk,
        target: DiskUuid,
        mirror: u32,
    ) -> Result<(), Refused> {
        let Some(record) = self.usable(target) else {
            let why = "the new disk does not exist, was taken out or its node is being drained";
            return Err(refused(chunk, why));
        };
        let domain = Some(self.domain_of_record(record));
        // Two that leave may not both be paired, or too few domains would be left to remove either.
        let others = slots.iter().filter(|slot| slot.disk != from);
        let domains = self.domains(others);
        if domains.len() < mirror as usize && domains.contains(&domain) {
            return Err(refused(chunk, "the copies would be in too few failure domains"));
        }
        let clash = slots.iter().filter(|slot| slot.disk != from).any(|slot| {
            slot.disk == Disk(target) || !self.leaves(slot.disk) && self.domain_of(slot.disk) == domain
        });
        match clash {
            true => Err(refused(chunk, "two replicas would be in one failure domain")),
            false => Ok(()),
        }
    }

    /// Gives the places of replicas that are not in sync to other disks.
    pub(super) fn move_replicas(
        &mut self,
        seen: Seen<'_>,
        from: DiskUuid,
        to: &[(u32, DiskUuid)],
    ) -> Result<Applied, Refused> {
        let (volume, from) = (self.seen(seen)?, Disk(from));
        for &(chunk, target) in to {
            let (slots, old) = volume.slot(chunk, from)?;
            if old.state == ReplicaState::InSync {
                return Err(refused(chunk, "the replica to be moved is in sync"));
            }
            if self.leaves(from) && self.is_spare(volume, slots, from) {
                return Err(refused(chunk, "it has one replica more already"));
            }
            self.check_target(chunk, slots, from, target, volume.mirror)?;
        }
        self.change(seen, |volume, incarnation| {
            for &(chunk, target) in to {
                let mut slots = volume.chunks[chunk as usize].iter_mut();
                // A chunk named twice finds its replica gone the second time.
                if let Some(slot) = slots.find(|slot| slot.disk == from) {
                    *slot = stale(target, incarnation);
                }
            }
        })
    }

    /// Gives chunks one replica more, which will take the place of the one on a disk.
    pub(super) fn add_replicas(
        &mut self,
        seen: Seen<'_>,
        from: DiskUuid,
        to: &[(u32, DiskUuid)],
    ) -> Result<Applied, Refused> {
        let (volume, from) = (self.seen(seen)?, Disk(from));
        let mut once = BTreeSet::new();
        for &(chunk, target) in to {
            let (slots, _) = volume.slot(chunk, from)?;
            if volume.has_spare(slots) || !once.insert(chunk) {
                return Err(refused(chunk, "it has one replica more already"));
            }
            if !self.leaves(from) && slots.iter().any(|slot| slot.state != ReplicaState::InSync) {
                return Err(refused(chunk, "it has to heal first"));
            }
            if from == Disk(target) {
                return Err(refused(chunk, "it is there already"));
            }
            self.check_target(chunk, slots, from, target, volume.mirror)?;
        }
        self.change(seen, |volume, incarnation| {
            for &(chunk, target) in to {
                volume.chunks[chunk as usize].push(stale(target, incarnation));
            }
        })
    }

    /// Removes what a disk need not have any longer.
    pub(super) fn remove_replicas(
        &mut self,
        seen: Seen<'_>,
        disk: DiskUuid,
        chunks: &[u32],
    ) -> Result<Applied, Refused> {
        let (volume, disk) = (self.seen(seen)?, Disk(disk));
        for &chunk in chunks {
            let (slots, slot) = volume.slot(chunk, disk)?;
            if !volume.has_spare(slots) {
                return Err(refused(chunk, "it has no replica more than it needs"));
            }
            if !self.is_spare(volume, slots, disk) {
                return Err(refused(chunk, "the others are in too few failure domains"));
            }
            let others = slots
                .iter()
                .filter(|slot| slot.disk != disk && slot.state == ReplicaState::InSync);
            let domains = self.domains(others);
            let counts = slot.state == ReplicaState::InSync || !self.leaves(disk);
            if counts && domains.len() < volume.mirror as usize {
                return Err(refused(chunk, "too few others are in sync"));
            }
        }
        self.change(seen, |volume, _| {
            for &chunk in chunks {
                volume.chunks[chunk as usize].retain(|slot| slot.disk != disk);
            }
        })
    }

    /// Nobody waits any longer for replicas on a disk that is lost. The last one that is in sync stays so.
    pub(super) fn give_up(
        &mut self,
        seen: Seen<'_>,
        disk: DiskUuid,
        chunks: &[u32],
    ) -> Result<Applied, Refused> {
        let (volume, disk) = (self.seen(seen)?, Disk(disk));
        for &chunk in chunks {
            let (slots, _) = volume.slot(chunk, disk)?;
            let mut others = slots.iter().filter(|slot| slot.disk != disk);
            if !others.any(|slot| slot.state == ReplicaState::InSync) {
                return Err(refused(chunk, "no other replica is in sync"));
            }
        }
        self.change(seen, |volume, _| {
            for &chunk in chunks {
                let slots = volume.chunks[chunk as usize].iter_mut();
                for slot in slots.filter(|slot| slot.disk == disk) {
                    slot.state = ReplicaState::Stale;
                }
            }
        })
    }

    fn change(&mut self, seen: Seen<'_>, how: impl FnOnce(&mut Volume, u32)) -> Result<Applied, Refused> {
        let volume = self.volume_mut(seen.name)?;
        volume.config += 1;
        how(volume, volume.config);
        Ok(Applied::Volume(Box::new(volume.to_config())))
    }
}

fn stale(disk: DiskUuid, incarnation: u32) -> Replica {
    Replica {
        state: ReplicaState::Stale,
        ..fresh(disk, incarnation)
    }
}
