//! Identities as the control state writes them: JSON keys and values of a fixed form.
//!
//! The data plane's own types know nothing of serialisation; here they get theirs. 128-bit numbers are 32 hexadecimal
//! digits, because a JSON number holds 53 bits in most programs. A list of placements names every disk once.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use unibody_dataplane::ids::DiskUuid;
use unibody_dataplane::wire::handshake;

/// Identity of a disk as a map key: 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Disk(pub DiskUuid);

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Disk {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Disk {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Disk(disk_uuid::deserialize(deserializer)?))
    }
}

/// A node of the cluster. Drawn at random when its store is made, below 2^53, and never reused: a node that lost its store
/// is a new node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The only node of a state that is kept by one node alone, without a cluster.
    pub const LOCAL: NodeId = NodeId(0);
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:014x}", self.0)
    }
}

impl From<u64> for NodeId {
    fn from(node: u64) -> Self {
        NodeId(node)
    }
}

impl From<handshake::NodeId> for NodeId {
    fn from(node: handshake::NodeId) -> Self {
        NodeId(node.0)
    }
}

impl From<NodeId> for handshake::NodeId {
    fn from(node: NodeId) -> Self {
        handshake::NodeId(node.0)
    }
}

/// Stands for the definition of a VM: who changes one says from which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DefinitionDigest(#[serde(with = "hex_u128")] pub u128);

impl DefinitionDigest {
    /// The first half of its BLAKE3.
    pub fn of(definition: &str) -> Self {
        let hash = blake3::hash(definition.as_bytes());
        let (first, _) = hash.as_bytes().split_first_chunk().expect("it has 32 bytes");
        DefinitionDigest(u128::from_be_bytes(*first))
    }
}

fn hex(text: &str) -> Option<u128> {
    let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits.then(|| u128::from_str_radix(text, 16).ok())?
}

/// A 128-bit number.
pub(crate) mod hex_u128 {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(value: &u128, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{value:032x}"))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u128, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        hex(&text).ok_or_else(|| D::Error::custom("32 hexadecimal digits are needed"))
    }
}

/// A disk's identity as a value.
pub(crate) mod disk_uuid {
    use super::*;

    pub(crate) fn serialize<S: Serializer>(value: &DiskUuid, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DiskUuid, D::Error> {
        hex_u128::deserialize(deserializer).map(DiskUuid)
    }
}

/// Disks named once, then by their place in the list.
#[derive(Default)]
struct Table {
    disks: Vec<Disk>,
    places: BTreeMap<Disk, u32>,
}

impl Table {
    fn place(&mut self, disk: DiskUuid) -> u32 {
        *self.places.entry(Disk(disk)).or_insert_with(|| {
            self.disks.push(Disk(disk));
            self.disks.len() as u32 - 1
        })
    }
}

fn look_up<E: serde::de::Error>(disks: &[Disk], place: u32) -> Result<DiskUuid, E> {
    let disk = disks.get(place as usize);
    disk.map(|disk| disk.0)
        .ok_or_else(|| E::custom("a place beyond the list of disks"))
}

/// For each chunk its disks.
pub(crate) mod placement {
    use super::*;

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Form {
        disks: Vec<Disk>,
        chunks: Vec<Vec<u32>>,
    }

    pub(crate) fn serialize<S: Serializer>(
        chunks: &[Vec<DiskUuid>],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let mut table = Table::default();
        let chunks = chunks
            .iter()
            .map(|disks| disks.iter().map(|&disk| table.place(disk)).collect())
            .collect();
        let disks = table.disks;
        Form { disks, chunks }.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Vec<DiskUuid>>, D::Error> {
        let form = Form::deserialize(deserializer)?;
        let chunk = |places: &Vec<u32>| places.iter().map(|&place| look_up(&form.disks, place)).collect();
        form.chunks.iter().map(chunk).collect()
    }
}

/// For each of some chunks a new disk.
pub(crate) mod moves {
    use super::*;

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Form {
        disks: Vec<Disk>,
        chunks: Vec<(u32, u32)>,
    }

    pub(crate) fn serialize<S: Serializer>(
        moves: &[(u32, DiskUuid)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let mut table = Table::default();
        let chunks = moves
            .iter()
            .map(|&(chunk, disk)| (chunk, table.place(disk)))
            .collect();
        let disks = table.disks;
        Form { disks, chunks }.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(u32, DiskUuid)>, D::Error> {
        let form = Form::deserialize(deserializer)?;
        let one = |&(chunk, place): &(u32, u32)| Ok((chunk, look_up(&form.disks, place)?));
        form.chunks.iter().map(one).collect()
    }
}

/// An owner's proposal.
pub(crate) mod proposal {
    use super::*;
    use unibody_dataplane::config::{Change, Proposal};
    use unibody_dataplane::ids::{BootId, Generation, PowerId};

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Form {
        generation: u32,
        config: u32,
        disk: Disk,
        chunks: Vec<u32>,
        change: What,
    }

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    enum What {
        MarkStale {
            no_space: bool,
        },
        StartRebuild {},
        MarkInSync {
            #[serde(with = "hex_u128")]
            boot: u128,
            #[serde(with = "hex_u128")]
            power: u128,
        },
    }

    pub(crate) fn serialize<S: Serializer>(proposal: &Proposal, serializer: S) -> Result<S::Ok, S::Error> {
        let (disk, chunks, change) = match &proposal.change {
            Change::MarkStale {
                disk,
                chunks,
                no_space,
            } => (disk, chunks, What::MarkStale { no_space: *no_space }),
            Change::StartRebuild { disk, chunks } => (disk, chunks, What::StartRebuild {}),
            Change::MarkInSync {
                disk,
                chunks,
                boot,
                power,
            } => (
                disk,
                chunks,
                What::MarkInSync {
                    boot: boot.0,
                    power: power.0,
                },
            ),
        };
        Form {
            generation: proposal.generation.0,
            config: proposal.config,
            disk: Disk(*disk),
            chunks: chunks.clone(),
            change,
        }
        .serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Proposal, D::Error> {
        let form = Form::deserialize(deserializer)?;
        let (disk, chunks) = (form.disk.0, form.chunks);
        let change = match form.change {
            What::MarkStale { no_space } => Change::MarkStale {
                disk,
                chunks,
                no_space,
            },
            What::StartRebuild {} => Change::StartRebuild { disk, chunks },
            What::MarkInSync { boot, power } => Change::MarkInSync {
                disk,
                chunks,
                boot: BootId(boot),
                power: PowerId(power),
            },
        };
        Ok(Proposal {
            generation: Generation(form.generation),
            config: form.config,
            change,
        })
    }
}
