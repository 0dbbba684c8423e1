//! VMs: what is to run, and where.
//!
//! The definition is a text for whoever runs VMs; here count its memory, its volumes and its place. A placement is a
//! promise of memory, and its number (`epoch`) makes sure that two who place at once do not both succeed. That the VM
//! runs nowhere else is known to whoever places it; what fences a VM left behind is the generation of its volumes.

use std::borrow::Cow;
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{Applied, DefinitionDigest, NodeId, Refused, State, VmSpec, is_name};

/// Most VMs.
pub const VMS_MAX: usize = 1 << 14;
/// Longest definition, bytes.
pub const DEFINITION_MAX: usize = 1 << 16;
/// Most volumes of a VM.
pub const VM_VOLUMES_MAX: usize = 64;

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// What it is.
    pub spec: VmSpec,
    /// Where it belongs now.
    pub node: Option<NodeId>,
    /// Counts its placements.
    pub epoch: u32,
    /// Most bytes that it was defined with since it was placed: so much it may have there, whatever it is defined as now.
    /// Since format 3.
    #[serde(default)]
    pub held: u64,
    /// If it is not to run: seconds that its guest may take to shut down, if whoever stopped it said so. Since format 4.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u32>,
}

impl Vm {
    /// Bytes that are promised to it where it is.
    pub fn memory(&self) -> u64 {
        self.spec.memory.max(self.held)
    }
}

impl State {
    /// The VM that a volume belongs to.
    pub fn user_of(&self, volume: &str) -> Option<&str> {
        let mut vms = self.vms.iter();
        let found = vms.find(|(_, vm)| vm.spec.volumes.iter().any(|used| used == volume));
        found.map(|(name, _)| name.as_str())
    }

    /// Bytes of a node's memory that are not promised to VMs placed there.
    pub fn memory_free(&self, node: NodeId) -> u64 {
        self.memory_free_without(node, "")
    }

    fn memory_free_without(&self, node: NodeId, name: &str) -> u64 {
        let placed = self
            .vms
            .iter()
            .filter(|(other, vm)| vm.node == Some(node) && *other != name);
        let used = placed.fold(0u64, |sum, (_, vm)| sum.saturating_add(vm.memory()));
        let has = self.nodes.get(&node).map_or(0, |node| node.memory);
        has.saturating_sub(used)
    }

    pub(super) fn create_vm(&mut self, name: &str, spec: &VmSpec) -> Result<Applied, Refused> {
        if !is_name(name) {
            return Err(Refused::Name(name.to_owned()));
        }
        if self.vms.contains_key(name) {
            return Err(Refused::VmExists(name.to_owned()));
        }
        super::room(self.vms.len(), VMS_MAX, "VMs")?;
        self.check_vm(name, spec)?;
        let vm = Vm {
            spec: spec.clone(),
            node: None,
            epoch: 0,
            held: 0,
            seconds: None,
        };
        self.vms.insert(name.to_owned(), vm);
        Ok(Applied::Done)
    }

    pub(super) fn update_vm(&mut self, name: &str, spec: &VmSpec) -> Result<Applied, Refused> {
        self.define_vm(name, spec.clone(), |vm| vm.spec.memory)
    }

    pub(super) fn describe_vm(
        &mut self,
        name: &str,
        of: Option<DefinitionDigest>,
        definition: &str,
        memory: u64,
        volumes: &[String],
    ) -> Result<Applied, Refused> {
        let vm = self.vms.get(name).ok_or_else(|| Refused::NoVm(name.to_owned()))?;
        if of.is_some_and(|of| of != DefinitionDigest::of(&vm.spec.definition)) {
            return Err(Refused::Overtaken {
                name: name.to_owned(),
            });
        }
        let spec = VmSpec {
            definition: definition.to_owned(),
            memory,
            volumes: volumes.to_vec(),
            run: vm.spec.run,
        };
        self.define_vm(name, spec, Vm::memory)
    }

    /// `held` says what it holds where it is, once it is defined anew.
    fn define_vm(&mut self, name: &str, spec: VmSpec, held: fn(&Vm) -> u64) -> Result<Applied, Refused> {
        let vm = self.vms.get(name).ok_or_else(|| Refused::NoVm(name.to_owned()))?;
        self.check_vm(name, &spec)?;
        // What a VM has already it may keep, even on a node that has less memory than it had.
        if let Some(node) = vm.node.filter(|_| spec.memory > vm.memory()) {
            self.check_memory(node, name, spec.memory)?;
        }
        if let Some(vm) = self.vms.get_mut(name) {
            vm.spec = spec;
            vm.held = vm.node.map_or(0, |_| held(vm));
        }
        Ok(Applied::Done)
    }

    pub(super) fn run_vm(&mut self, name: &str, run: bool, seconds: Option<u32>) -> Result<Applied, Refused> {
        let vm = self.vms.get_mut(name);
        let vm = vm.ok_or_else(|| Refused::NoVm(name.to_owned()))?;
        vm.spec.run = run;
        vm.seconds = seconds.filter(|_| !run);
        Ok(Applied::Done)
    }

    pub(super) fn delete_vm(&mut self, name: &str) -> Result<Applied, Refused> {
        let vm = self.vms.get(name).ok_or_else(|| Refused::NoVm(name.to_owned()))?;
        if vm.node.is_some() {
            return Err(Refused::VmPlaced(name.to_owned()));
        }
        self.vms.remove(name);
        Ok(Applied::Done)
    }

    pub(super) fn place_vm(
        &mut self,
        name: &str,
        node: Option<NodeId>,
        epoch: u32,
    ) -> Result<Applied, Refused> {
        let vm = self.vms.get(name).ok_or_else(|| Refused::NoVm(name.to_owned()))?;
        if vm.epoch != epoch {
            return Err(Refused::Overtaken {
                name: name.to_owned(),
            });
        }
        if let Some(id) = node.filter(|_| node != vm.node) {
            let record = self.nodes.get(&id).ok_or(Refused::NoNode(id))?;
            if record.drain {
                return Err(Refused::Draining(id));
            }
            self.check_memory(id, name, vm.spec.memory)?;
        }
        if let Some(vm) = self.vms.get_mut(name) {
            // Where it goes it is started as it is defined now; where it stays it may be running still.
            vm.held = match node.is_some() && node == vm.node {
                true => vm.memory(),
                false => node.map_or(0, |_| vm.spec.memory),
            };
            vm.node = node;
            vm.epoch = vm.epoch.wrapping_add(1);
        }
        Ok(Applied::Done)
    }

    fn check_memory(&self, node: NodeId, name: &str, wanted: u64) -> Result<(), Refused> {
        let free = self.memory_free_without(node, name);
        match wanted <= free {
            true => Ok(()),
            false => Err(Refused::Memory { node, free, wanted }),
        }
    }

    fn check_vm(&self, name: &str, spec: &VmSpec) -> Result<(), Refused> {
        check_spec(spec)?;
        for volume in &spec.volumes {
            self.volume(volume)?;
            if let Some(vm) = self.user_of(volume).filter(|vm| *vm != name) {
                return Err(Refused::VolumeInUse {
                    volume: volume.clone(),
                    vm: vm.to_owned(),
                });
            }
        }
        Ok(())
    }

    /// What must hold of the VMs of every state.
    pub(super) fn check_vms(&self) -> Result<(), String> {
        let mut used = BTreeSet::new();
        for (name, vm) in &self.vms {
            let fail = |why: &str| Err(format!("VM {name}: {why}"));
            if !is_name(name) || check_spec(&vm.spec).is_err() {
                return fail("impossible name or definition");
            }
            if vm.node.is_some_and(|node| !self.nodes.contains_key(&node)) {
                return fail("on a node that there is not");
            }
            for volume in &vm.spec.volumes {
                if !self.volumes.contains_key(volume) || !used.insert(volume) {
                    return fail("a volume that there is not, or of another VM too");
                }
            }
        }
        Ok(())
    }
}

fn check_spec(spec: &VmSpec) -> Result<(), Refused> {
    let wrong = |why| Err(Refused::Vm(Cow::Borrowed(why)));
    if spec.definition.len() > DEFINITION_MAX {
        return wrong("it is longer than 64 KiB");
    }
    let json = serde_json::from_str::<serde::de::IgnoredAny>(&spec.definition);
    if json.is_err() || !spec.definition.trim_start().starts_with('{') {
        return wrong("it is no JSON object");
    }
    if spec.volumes.len() > VM_VOLUMES_MAX {
        return wrong("it has more than 64 volumes");
    }
    let distinct: BTreeSet<_> = spec.volumes.iter().collect();
    if distinct.len() != spec.volumes.len() {
        return wrong("it names a volume twice");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Command;

    fn describe(of: Option<&str>, definition: &str) -> Command {
        Command::DescribeVm {
            name: "m".into(),
            of: of.map(DefinitionDigest::of),
            definition: definition.into(),
            memory: 1,
            volumes: Vec::new(),
        }
    }

    fn vm() -> State {
        let mut state = State::default();
        let vm = VmSpec {
            definition: "{}".into(),
            memory: 1,
            volumes: Vec::new(),
            run: true,
        };
        let name = "m".into();
        state.apply(&Command::CreateVm { name, vm }).unwrap();
        state
    }

    #[test]
    fn of_two_who_change_the_same_definition_the_second_has_to_look_again() {
        let mut state = vm();
        state.apply(&describe(Some("{}"), "{\"a\":1}")).unwrap();
        let before = state.clone();
        let late = state.apply(&describe(Some("{}"), "{\"b\":1}"));
        assert_eq!(late, Err(Refused::Overtaken { name: "m".into() }));
        assert_eq!(state, before);
        state.apply(&describe(None, "{\"c\":1}")).unwrap();
        assert_eq!(state.vms["m"].spec.definition, "{\"c\":1}");
    }

    #[test]
    fn how_long_a_guest_has_to_end_counts_until_it_is_to_run_again() {
        let mut state = vm();
        let mut run = |run, seconds| {
            let name = "m".into();
            state.apply(&Command::RunVm { name, run, seconds }).unwrap();
            state.vms["m"].seconds
        };
        assert_eq!(run(false, Some(5)), Some(5));
        assert_eq!(run(false, Some(0)), Some(0));
        assert_eq!(run(true, Some(5)), None);
        assert_eq!(run(false, None), None);
    }
}
