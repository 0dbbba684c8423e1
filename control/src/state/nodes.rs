//! Nodes: who takes part, where they listen, what they offer.
//!
//! A state without nodes is that of one node alone, kept in a file: its disks and volumes belong to [`NodeId::LOCAL`]. With
//! the first node that is over, and nothing of the local one may be left.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use unibody_dataplane::ids::DiskUuid;

use super::ids::hex_u128;
use super::{Applied, Command, Disk, NodeId, Refused, State, is_name};

/// Most nodes.
pub const NODES_MAX: usize = 256;
/// Most addresses of a node.
pub const ADDRESSES_MAX: usize = 8;
const TEXT_MAX: usize = 64;
const ADDRESS_MAX: usize = 256;

/// What is known of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// What people call it.
    pub name: String,
    /// Identity of its store; another one under the same id is refused.
    #[serde(with = "hex_u128")]
    pub store: u128,
    /// Where it listens, `host:port`, the best first.
    pub addresses: Vec<String>,
    /// Failure domain of its disks, unless they name their own.
    pub domain: String,
    /// Bytes of memory for VMs.
    pub memory: u64,
    /// Drawn at the last start of its process that it reported.
    #[serde(with = "hex_u128")]
    pub incarnation: u128,
    /// Nothing new goes to it.
    pub drain: bool,
}

impl State {
    /// Whether there is such a node. Without a cluster there is the local one.
    pub fn has_node(&self, node: NodeId) -> bool {
        match self.nodes.is_empty() {
            true => node == NodeId::LOCAL,
            false => self.nodes.contains_key(&node),
        }
    }

    pub(super) fn add_node(&mut self, command: &Command) -> Result<Applied, Refused> {
        let Command::AddNode {
            node,
            store,
            name,
            addresses,
            domain,
            memory,
            incarnation,
        } = command
        else {
            unreachable!("the caller has looked");
        };
        let known = self.nodes.get(node);
        if known.is_some_and(|known| known.store != *store) {
            return Err(Refused::Amnesia(*node));
        }
        if known.is_none() {
            super::room(self.nodes.len(), NODES_MAX, "nodes")?;
            if self.nodes.is_empty() && !(self.disks.is_empty() && self.volumes.is_empty()) {
                return Err(Refused::Node(Cow::Borrowed(
                    "disks or volumes of a node without a cluster are in this state",
                )));
            }
        }
        if *node == NodeId::LOCAL || node.0 >= 1 << 53 {
            return Err(Refused::Node(Cow::Borrowed("its id is out of range")));
        }
        if !is_name(name) {
            return Err(Refused::Name(name.clone()));
        }
        if self
            .nodes
            .iter()
            .any(|(id, other)| id != node && other.name == *name)
        {
            return Err(Refused::NodeExists(name.clone()));
        }
        check_addresses(addresses)?;
        check_text(domain, 1, "a failure domain has 1 to 64 printable characters")?;
        let record = Node {
            name: name.clone(),
            store: *store,
            addresses: addresses.clone(),
            domain: domain.clone(),
            memory: *memory,
            incarnation: *incarnation,
            drain: known.is_some_and(|known| known.drain),
        };
        if known.is_some_and(|known| known.domain != *domain) {
            self.check_node_domain(*node, domain)?;
        }
        self.nodes.insert(*node, record);
        Ok(Applied::Done)
    }

    pub(super) fn node_up(
        &mut self,
        node: NodeId,
        addresses: &[String],
        memory: u64,
        incarnation: u128,
    ) -> Result<Applied, Refused> {
        check_addresses(addresses)?;
        let record = self.nodes.get_mut(&node).ok_or(Refused::NoNode(node))?;
        addresses.clone_into(&mut record.addresses);
        (record.memory, record.incarnation) = (memory, incarnation);
        Ok(Applied::Done)
    }

    /// Another domain for a node, where its disks follow: every chunk has its replicas in distinct domains afterwards.
    fn check_node_domain(&self, node: NodeId, domain: &str) -> Result<(), Refused> {
        let follows = |disk: &Disk| {
            let record = &self.disks[disk];
            record.node == node && record.domain.is_empty()
        };
        let after = |disk: Disk| match follows(&disk) {
            true => Some(domain),
            false => self.domain_of(disk),
        };
        for (name, volume) in &self.volumes {
            for slots in &volume.chunks {
                if let Some(disk) = slots.iter().map(|slot| slot.disk).find(follows)
                    && !self.apart_as(volume, slots, after)
                {
                    return Err(Refused::Domain {
                        disk,
                        domain: domain.to_owned(),
                        volume: name.clone(),
                    });
                }
            }
        }
        Ok(())
    }

    pub(super) fn remove_node(&mut self, node: NodeId) -> Result<Applied, Refused> {
        if !self.nodes.contains_key(&node) {
            return Err(Refused::NoNode(node));
        }
        let refuse = |why: String| Err(Refused::NodeInUse { node, why });
        if self.nodes.len() == 1 {
            return refuse("it is the last one".into());
        }
        let disks: Vec<DiskUuid> = self
            .disks
            .iter()
            .filter(|(_, record)| record.node == node)
            .map(|(disk, _)| disk.0)
            .collect();
        if let Some((disk, volume)) = disks.iter().find_map(|&disk| Some((disk, self.volume_on(disk)?))) {
            return refuse(format!(
                "its disk {disk} holds replicas of volume {volume}: drain it first"
            ));
        }
        if let Some((volume, _)) = self.volumes.iter().find(|(_, volume)| volume.owner == Some(node)) {
            return refuse(format!("volume {volume} is attached there: detach it first"));
        }
        if let Some((vm, _)) = self.vms.iter().find(|(_, vm)| vm.node == Some(node)) {
            return refuse(format!("VM {vm} is placed there: move or stop it first"));
        }
        disks.iter().for_each(|disk| {
            self.disks.remove(&Disk(*disk));
        });
        self.nodes.remove(&node);
        Ok(Applied::Done)
    }

    pub(super) fn drain(&mut self, node: NodeId, on: bool) -> Result<Applied, Refused> {
        self.nodes.get_mut(&node).ok_or(Refused::NoNode(node))?.drain = on;
        Ok(Applied::Done)
    }

    /// What must hold of the nodes and disks of every state.
    pub(super) fn check_nodes(&self) -> Result<(), String> {
        let mut names = std::collections::BTreeSet::new();
        for (id, node) in &self.nodes {
            let sound = is_name(&node.name)
                && names.insert(&node.name)
                && check_addresses(&node.addresses).is_ok()
                && check_text(&node.domain, 1, "").is_ok()
                && *id != NodeId::LOCAL
                && id.0 < 1 << 53;
            if !sound {
                return Err(format!("node {id}: impossible name, id, addresses or domain"));
            }
        }
        match self.disks.iter().find(|(_, record)| !self.has_node(record.node)) {
            Some((disk, _)) => Err(format!("disk {}: on a node that there is not", disk.0)),
            None => Ok(()),
        }
    }
}

/// A text of one line that people choose.
pub(super) fn check_text(text: &str, least: usize, why: &'static str) -> Result<(), Refused> {
    let fits = text.len() >= least && text.len() <= TEXT_MAX && !text.chars().any(char::is_control);
    fits.then_some(()).ok_or(Refused::Node(Cow::Borrowed(why)))
}

fn check_addresses(addresses: &[String]) -> Result<(), Refused> {
    let is_address = |address: &String| {
        let parts = address.rsplit_once(':');
        address.len() <= ADDRESS_MAX
            && !address.chars().any(|c| c.is_control() || c == ' ')
            && parts.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
    };
    let fits = !addresses.is_empty() && addresses.len() <= ADDRESSES_MAX && addresses.iter().all(is_address);
    fits.then_some(()).ok_or(Refused::Node(Cow::Borrowed(
        "one to eight addresses of the form host:port are needed",
    )))
}
