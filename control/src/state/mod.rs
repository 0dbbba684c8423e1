//! The control state: which nodes, disks, volumes and VMs there are, where every chunk lies, and the rules of changing that.
//!
//! [`State::apply`] is the only way to change it. It is pure and deterministic: equal commands on equal states give equal
//! states and answers, so that a Raft log of commands can drive it as well as one node's file. A command that is refused
//! changes nothing. The rules that no caller may be trusted with are listed where they are enforced: `volumes` (replicas
//! and owners), `moves`, `nodes`, `disks`, `vms`. `command` has what can be asked, `ids` the form of identities in JSON.
//!
//! Absent: clocks, randomness, hash order, I/O. Placement is planned elsewhere (`planner`) and comes inside the commands;
//! who is alive is judged elsewhere (`raft`) and comes as commands too.

mod command;
mod disks;
mod ids;
mod moves;
mod nodes;
mod vms;
mod volumes;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use command::{Applied, BATCH_MAX, Command, Refused, VmSpec};
pub use disks::{DISKS_MAX, DiskRecord};
pub(crate) use ids::hex_u128;
pub use ids::{DefinitionDigest, Disk, NodeId};
pub use nodes::{ADDRESSES_MAX, NODES_MAX, Node};
pub use vms::{DEFINITION_MAX, VM_VOLUMES_MAX, VMS_MAX, Vm};
pub use volumes::{Replica, ReplicaState, VOLUME_BYTES_MAX, VOLUMES_MAX, Volume};

/// Version of the serialised form of states and commands.
pub const FORMAT: u32 = 4;

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// [`FORMAT`].
    pub format: u32,
    next_volume: u32,
    next_layer: u32,
    /// Nodes; none: one node alone, without a cluster.
    #[serde(default)]
    pub nodes: BTreeMap<NodeId, Node>,
    /// Disks by identity.
    pub disks: BTreeMap<Disk, DiskRecord>,
    /// Volumes by name. Shared with earlier copies of the state until they change.
    pub volumes: BTreeMap<String, Arc<Volume>>,
    /// VMs by name.
    #[serde(default)]
    pub vms: BTreeMap<String, Vm>,
}

impl Default for State {
    fn default() -> Self {
        State {
            format: FORMAT,
            next_volume: 1,
            next_layer: 1,
            nodes: BTreeMap::new(),
            disks: BTreeMap::new(),
            volumes: BTreeMap::new(),
            vms: BTreeMap::new(),
        }
    }
}

/// Whether a volume, node or VM may be called so.
pub fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    name.len() <= 64 && name.chars().all(fits) && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// Whether there may be one more.
fn room(have: usize, max: usize, what: &'static str) -> Result<(), Refused> {
    let refused = || Refused::TooMany {
        what: Cow::Borrowed(what),
        max: max as u64,
    };
    (have < max).then_some(()).ok_or_else(refused)
}

impl State {
    /// Changes the state, or says why not; then nothing was changed.
    ///
    /// # Errors
    /// When a rule forbids it.
    pub fn apply(&mut self, command: &Command) -> Result<Applied, Refused> {
        let seen = |name, generation, config| moves::Seen {
            name,
            generation,
            config,
        };
        match command {
            Command::AddNode { .. } => self.add_node(command),
            Command::NodeUp {
                node,
                addresses,
                memory,
                incarnation,
            } => self.node_up(*node, addresses, *memory, *incarnation),
            Command::RemoveNode { node } => self.remove_node(*node),
            Command::Drain { node, on } => self.drain(*node, *on),
            Command::AddDisk {
                disk,
                node,
                domain,
                bytes,
            } => self.add_disk(*disk, *node, domain, *bytes),
            Command::DiskUp { disk, boot } => {
                self.disk_mut(*disk)?.boot = *boot;
                Ok(Applied::Done)
            }
            Command::DiskOut { disk } => {
                self.disk_mut(*disk)?.out = true;
                self.give_up_on(Disk(*disk));
                Ok(Applied::Done)
            }
            Command::DiskLeave { disk } => {
                self.disk_mut(*disk)?.out = true;
                Ok(Applied::Done)
            }
            Command::Distrust { disk, salt } => {
                self.disk_mut(*disk)?.distrust = *salt;
                Ok(Applied::Done)
            }
            Command::ForgetDisk { disk } => self.forget_disk(*disk),
            Command::CreateVolume { .. } => self.create_volume(command),
            Command::ResizeVolume { name, size, chunks } => self.resize_volume(name, *size, chunks),
            Command::DeleteVolume { name } => self.delete_volume(name),
            Command::Renew { name, instance } => {
                self.volume_mut(name)?.instance = *instance;
                Ok(Applied::Done)
            }
            Command::Attach {
                name,
                node,
                generation,
            } => self.attach(name, *node, *generation),
            Command::Release {
                name,
                node,
                generation,
            } => self.let_go(name, Some(*node), *generation),
            Command::Revoke { name, generation } => self.let_go(name, None, *generation),
            Command::Handover { name, generation, to } => self.hand_over(name, *generation, *to),
            Command::Propose { name, proposal } => self.propose(name, proposal).map(Applied::Outcome),
            Command::Move {
                name,
                generation,
                config,
                from,
                to,
            } => self.move_replicas(seen(name, *generation, *config), *from, to),
            Command::AddReplicas {
                name,
                generation,
                config,
                from,
                to,
            } => self.add_replicas(seen(name, *generation, *config), *from, to),
            Command::RemoveReplicas {
                name,
                generation,
                config,
                disk,
                chunks,
            } => self.remove_replicas(seen(name, *generation, *config), *disk, chunks),
            Command::GiveUp {
                name,
                generation,
                config,
                disk,
                chunks,
            } => self.give_up(seen(name, *generation, *config), *disk, chunks),
            Command::CreateVm { name, vm } => self.create_vm(name, vm),
            Command::UpdateVm { name, vm } => self.update_vm(name, vm),
            Command::DescribeVm {
                name,
                of,
                definition,
                memory,
                volumes,
            } => self.describe_vm(name, *of, definition, *memory, volumes),
            Command::RunVm { name, run, seconds } => self.run_vm(name, *run, *seconds),
            Command::DeleteVm { name } => self.delete_vm(name),
            Command::PlaceVm { name, node, epoch } => self.place_vm(name, *node, *epoch),
            Command::Batch(commands) => self.batch(commands),
        }
    }

    fn batch(&mut self, commands: &[Command]) -> Result<Applied, Refused> {
        let nested = |command: &Command| matches!(command, Command::Batch(_));
        if commands.len() > BATCH_MAX || commands.iter().any(nested) {
            return Err(Refused::TooMany {
                what: Cow::Borrowed("commands in a batch, and no batch in a batch"),
                max: BATCH_MAX as u64,
            });
        }
        let answers = commands.iter().map(|command| self.apply(command)).collect();
        Ok(Applied::Batch(answers))
    }

    /// What must hold of every state; the message names the first rule that does not.
    ///
    /// # Errors
    /// When the state could not have come from [`State::apply`]: a foreign or damaged file.
    pub fn check(&self) -> Result<(), String> {
        if self.format != FORMAT {
            return Err(format!("format {} is not {FORMAT}", self.format));
        }
        self.check_nodes()?;
        self.check_volumes()?;
        self.check_vms()
    }

    /// Brings a state that was read to the present format.
    pub(crate) fn upgrade(&mut self) {
        // What format 2 added reads as empty from format 1.
        if self.format < 3 {
            for vm in self.vms.values_mut().filter(|vm| vm.node.is_some()) {
                vm.held = vm.spec.memory;
            }
        }
        // What format 4 added reads as absent from format 3. A newer one is not made older: it is refused.
        self.format = self.format.max(FORMAT);
    }
}
