//! The VMs that the state places on this node: each is started once its volumes are served here, and ended when the state
//! wants it elsewhere or not at all. Those that were started before a restart of this process are found and kept.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::vms::VmHost;
use super::volumes::Volumes;
use super::{Ground, Input};
use crate::state::{Command, NodeId, State};

/// How long a guest may take to shut down.
const SHUTDOWN: Duration = Duration::from_secs(60);
/// How often it is looked what runs.
const LOOK: Duration = Duration::from_secs(2);
/// Pauses between attempts to start a VM grow to this.
const PAUSE_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, Default)]
struct Machine {
    /// Work on it is under way.
    busy: bool,
    /// Attempts to start it that failed, and when to try again.
    failures: u32,
    not_before: Option<Instant>,
}

/// See the module.
pub(crate) struct Machines {
    host: Arc<dyn VmHost>,
    machines: BTreeMap<String, Machine>,
    /// What ran when it was looked last; `None` before.
    running: Option<Vec<String>>,
    looking: bool,
    look_at: Option<Instant>,
}

impl Machines {
    pub(crate) fn new(host: Arc<dyn VmHost>) -> Self {
        Machines {
            host,
            machines: BTreeMap::new(),
            running: None,
            looking: false,
            look_at: None,
        }
    }

    pub(crate) fn tick(&mut self, ground: &Ground) {
        let due = self.look_at.is_none_or(|at| Instant::now() >= at);
        if due && !self.looking {
            self.looking = true;
            let host = Arc::clone(&self.host);
            ground.aside("vms", move || Input::Machines(host.running()));
        }
    }

    pub(crate) fn found(&mut self, running: Result<Vec<String>, String>) {
        self.looking = false;
        self.look_at = Some(Instant::now() + LOOK);
        match running {
            Ok(running) => self.running = Some(running),
            Err(error) => eprintln!("unibody: which VMs run can not be seen: {error}"),
        }
    }

    /// Those that ran when it was looked at last.
    pub(crate) fn running(&self) -> Vec<String> {
        self.running.clone().unwrap_or_default()
    }

    pub(crate) fn worked(&mut self, name: &str, outcome: Result<(), String>) {
        let machine = self.machines.entry(name.to_owned()).or_default();
        machine.busy = false;
        // What runs now is looked at before anything else is done.
        self.running = None;
        self.look_at = None;
        match outcome {
            Ok(()) => machine.failures = 0,
            Err(error) => {
                eprintln!("unibody: VM {name}: {error}");
                machine.failures += 1;
                let pause = Duration::from_secs(1 << machine.failures.min(5)).min(PAUSE_MAX);
                machine.not_before = Some(Instant::now() + pause);
            }
        }
    }

    /// Compares what the state says with what runs.
    pub(crate) fn look(&mut self, ground: &Ground, state: &State, volumes: &Volumes) {
        let Some(running) = self.running.clone() else {
            return;
        };
        let stays = |name: &String| {
            let vm = state.vms.get(name).filter(|vm| vm.node == Some(ground.me));
            vm.is_some_and(|vm| vm.spec.run && !leaves(state, ground.me, vm.spec.memory))
        };
        for name in &running {
            if !stays(name) {
                // One that was moved is ended at once: its volumes have another owner, and it can only fail.
                let moved = state.vms.get(name).is_none_or(|vm| vm.node != Some(ground.me));
                let patience = if moved { Duration::ZERO } else { SHUTDOWN };
                self.work(ground, name, move |host, name| host.stop(name, patience));
            }
        }
        for (name, vm) in &state.vms {
            if vm.node != Some(ground.me) || running.contains(name) {
                continue;
            }
            if !stays(name) {
                self.leave(ground, name, vm.epoch);
                continue;
            }
            let sockets: Option<Vec<(String, PathBuf)>> = vm
                .spec
                .volumes
                .iter()
                .map(|volume| Some((volume.clone(), volumes.socket(&ground.dir, volume)?)))
                .collect();
            if let Some(sockets) = sockets {
                let definition = vm.spec.definition.clone();
                self.work(ground, name, move |host, _| host.start(&definition, &sockets));
            }
        }
        let known = |name: &String| state.vms.contains_key(name) || running.contains(name);
        self.machines.retain(|name, machine| machine.busy || known(name));
    }

    /// A VM that was to end has ended: its place is free.
    fn leave(&mut self, ground: &Ground, name: &str, epoch: u32) {
        let machine = self.machines.entry(name.to_owned()).or_default();
        if machine.busy {
            return;
        }
        machine.busy = true;
        let command = Command::PlaceVm {
            name: name.to_owned(),
            node: None,
            epoch,
        };
        let name = name.to_owned();
        // Refused: it was placed anew meanwhile, and the state says where.
        ground.propose(command, move |_| Input::Machine(name, Ok(())));
    }

    fn work(
        &mut self,
        ground: &Ground,
        name: &str,
        work: impl FnOnce(&dyn VmHost, &str) -> Result<(), String> + Send + 'static,
    ) {
        let machine = self.machines.entry(name.to_owned()).or_default();
        if machine.busy || machine.not_before.is_some_and(|at| Instant::now() < at) {
            return;
        }
        machine.busy = true;
        let (host, name) = (Arc::clone(&self.host), name.to_owned());
        ground.aside("vm", move || {
            let outcome = work(&*host, &name);
            Input::Machine(name, outcome)
        });
    }
}

/// Whether a VM has to leave a node because that is being drained, and has somewhere to go.
fn leaves(state: &State, node: NodeId, memory: u64) -> bool {
    let drained = |id: &NodeId| state.nodes.get(id).is_some_and(|node| node.drain);
    let room = |id: &NodeId| !drained(id) && state.memory_free(*id) >= memory;
    drained(&node) && state.nodes.keys().any(room)
}
