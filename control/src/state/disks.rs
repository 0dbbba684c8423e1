//! Disks: which there are, on which nodes, in which failure domains.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use unibody_dataplane::ids::DiskUuid;

use super::ids::hex_u128;
use super::volumes::Replica;
use super::{Applied, Disk, NodeId, Refused, State};

/// Most disks.
pub const DISKS_MAX: usize = 1 << 12;

/// What is known of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRecord {
    /// Where it is.
    #[serde(default)]
    pub node: NodeId,
    /// Failure domain; empty: that of its node. See [`State::domain_of`].
    pub domain: String,
    /// Bytes for data.
    pub bytes: u64,
    /// It leaves for good: nothing is placed on it any more, and what is on it gets another place.
    pub out: bool,
    /// Boot in which its node opened it last; zero: the node does not say.
    #[serde(default, with = "hex_u128")]
    pub boot: u128,
    /// Drawn anew when the disk may have lost what it completed without the machine losing power (a failed flush): its
    /// spans of power before and after must not look like one.
    #[serde(with = "hex_u128")]
    pub distrust: u128,
}

impl State {
    /// The failure domain that a disk is in.
    pub fn domain_of(&self, disk: Disk) -> Option<&str> {
        self.disks.get(&disk).map(|record| self.domain_of_record(record))
    }

    /// The failure domains that some replicas are in.
    pub(crate) fn domains<'a>(
        &'a self,
        replicas: impl Iterator<Item = &'a Replica>,
    ) -> BTreeSet<Option<&'a str>> {
        replicas.map(|slot| self.domain_of(slot.disk)).collect()
    }

    pub(super) fn domain_of_record<'a>(&'a self, record: &'a DiskRecord) -> &'a str {
        match self.nodes.get(&record.node) {
            Some(node) if record.domain.is_empty() => &node.domain,
            _ => &record.domain,
        }
    }

    /// A disk on which something may be placed: not taken out, on a node that is not being drained.
    pub fn usable(&self, disk: DiskUuid) -> Option<&DiskRecord> {
        self.disks
            .get(&Disk(disk))
            .filter(|record| !record.out && self.nodes.get(&record.node).is_none_or(|node| !node.drain))
    }

    pub(super) fn add_disk(
        &mut self,
        disk: DiskUuid,
        node: NodeId,
        domain: &str,
        bytes: u64,
    ) -> Result<Applied, Refused> {
        if !self.has_node(node) {
            return Err(Refused::NoNode(node));
        }
        super::nodes::check_text(domain, 0, "a failure domain has at most 64 printable characters")?;
        let known = self.disks.get(&Disk(disk));
        if known.is_none() {
            super::room(self.disks.len(), DISKS_MAX, "disks")?;
        }
        let record = DiskRecord {
            node,
            domain: domain.to_owned(),
            bytes,
            out: known.is_some_and(|record| record.out),
            boot: known.map_or(0, |record| record.boot),
            distrust: known.map_or(0, |record| record.distrust),
        };
        self.check_domain(disk, self.domain_of_record(&record))?;
        self.disks.insert(Disk(disk), record);
        Ok(Applied::Done)
    }

    pub(super) fn disk_mut(&mut self, disk: DiskUuid) -> Result<&mut DiskRecord, Refused> {
        self.disks.get_mut(&Disk(disk)).ok_or(Refused::NoDisk(Disk(disk)))
    }

    /// A disk may change its domain only where no chunk on it has another replica there; what leaves does not count. One that
    /// keeps it may share it with the successor of a replica.
    fn check_domain(&self, disk: DiskUuid, domain: &str) -> Result<(), Refused> {
        if self.domain_of(Disk(disk)) == Some(domain) {
            return Ok(());
        }
        let after = |other: Disk| match other.0 == disk {
            true => Some(domain),
            false => self.domain_of(other),
        };
        let clashes = |volume: &super::Volume, slots: &Vec<Replica>| {
            slots.iter().any(|slot| slot.disk.0 == disk) && !self.apart_as(volume, slots, after)
        };
        let clash = self
            .volumes
            .iter()
            .find(|(_, volume)| volume.chunks.iter().any(|slots| clashes(volume, slots)));
        match clash {
            Some((volume, _)) => Err(Refused::Domain {
                disk: Disk(disk),
                domain: domain.to_owned(),
                volume: volume.clone(),
            }),
            None => Ok(()),
        }
    }

    pub(super) fn forget_disk(&mut self, disk: DiskUuid) -> Result<Applied, Refused> {
        if !self.disks.contains_key(&Disk(disk)) {
            return Err(Refused::NoDisk(Disk(disk)));
        }
        if let Some(name) = self.volume_on(disk) {
            return Err(Refused::DiskInUse(Disk(disk), name.to_owned()));
        }
        self.disks.remove(&Disk(disk));
        Ok(Applied::Done)
    }

    /// A volume that has replicas on a disk.
    pub(super) fn volume_on(&self, disk: DiskUuid) -> Option<&str> {
        let on_it = |slot: &Replica| slot.disk == Disk(disk);
        let mut volumes = self.volumes.iter();
        let found = volumes.find(|(_, volume)| volume.chunks.iter().flatten().any(on_it));
        found.map(|(name, _)| name.as_str())
    }
}
