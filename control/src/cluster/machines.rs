//! The VMs that the state places on this node: each is started once its volumes are served here, and ended when the state
//! wants it elsewhere or not at all. Those that were started before a restart of this process are found and kept.
//!
//! Invariant: a VM goes on only under the placement it was started for. One that was moved away and back while this process
//! was not there knows an old state of its volumes, and is ended like any other that was moved. The number of the placement is
//! in `placed/NAME` in the node's directory, from after the VM's start until before the next one.
//!
//! One thing at a time is done with a VM. What users ask of one that is being started or stopped waits until that is over, so it
//! finds the VM as it is then. What the state wants does not wait for a guest: an act that does is called off for the VM's end.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::vms::{VmAct, VmHost};
use super::volumes::Volumes;
use super::{Ground, Input, LocalAnswer};
use crate::state::{Command, NodeId, State};

/// How long a guest may take to shut down, if nobody said.
const SHUTDOWN: Duration = Duration::from_secs(60);
/// How often it is looked what runs.
const LOOK: Duration = Duration::from_secs(2);
/// Pauses between attempts to start a VM grow to this.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// Most things that users ask of a VM at a time.
const ASKED_MAX: usize = 16;

/// What a user asks of a VM, and where the answer goes.
pub(crate) struct Asked {
    pub(crate) act: VmAct,
    pub(crate) reply: tokio::sync::oneshot::Sender<LocalAnswer>,
}

impl Asked {
    fn answer(self, answer: LocalAnswer) {
        // A user who has hung up does not want to know.
        self.reply.send(answer).ok();
    }
}

/// Work on a VM.
struct Work {
    /// By then it kills the VM, if its guest has not ended it before.
    kills: Option<Instant>,
    /// It need not wait for the guest any longer.
    off: Arc<AtomicBool>,
}

#[derive(Default)]
struct Machine {
    /// What is under way.
    work: Option<Work>,
    /// What comes after it.
    asked: VecDeque<Asked>,
    /// Attempts to start it that failed, and when to try again.
    failures: u32,
    not_before: Option<Instant>,
}

/// VMs that run here, and the placements that they were started for, as far as that is known.
pub(crate) type Running = BTreeMap<String, Option<u32>>;

/// See the module.
pub(crate) struct Machines {
    host: Arc<dyn VmHost>,
    machines: BTreeMap<String, Machine>,
    /// What ran when it was looked last, and since which placement; `None` before.
    running: Option<Running>,
    /// Their names, also while it is looked anew.
    names: Vec<String>,
    looking: bool,
    /// Something was done since the present look began: what it finds may be old.
    old: bool,
    look_at: Option<Instant>,
}

impl Machines {
    pub(crate) fn new(host: Arc<dyn VmHost>) -> Self {
        Machines {
            host,
            machines: BTreeMap::new(),
            running: None,
            names: Vec::new(),
            looking: false,
            old: false,
            look_at: None,
        }
    }

    pub(crate) fn tick(&mut self, ground: &Ground) {
        let due = self.look_at.is_none_or(|at| Instant::now() >= at);
        if due && !self.looking {
            self.looking = true;
            let (host, dir) = (Arc::clone(&self.host), ground.dir.clone());
            ground.aside("vms", move || {
                let running = host.running();
                Input::Machines(running.map(|names| {
                    let with = |name: String| {
                        let placement = placement(&dir, &name);
                        (name, placement)
                    };
                    names.into_iter().map(with).collect()
                }))
            });
        }
    }

    pub(crate) fn found(&mut self, running: Result<Running, String>) {
        self.looking = false;
        if std::mem::take(&mut self.old) {
            // A VM that has just been started may be missing in it, and must not be started again.
            return;
        }
        self.look_at = Some(Instant::now() + LOOK);
        match running {
            Ok(running) => {
                self.names = running.keys().cloned().collect();
                self.running = Some(running);
            }
            Err(error) => eprintln!("unibody: which VMs run can not be seen: {error}"),
        }
    }

    /// Those that ran when it was looked at last.
    pub(crate) fn running(&self) -> Vec<String> {
        self.names.clone()
    }

    /// Ends all at once: this node is no longer one of the cluster.
    pub(crate) fn end_all(&self) {
        for name in self.host.running().unwrap_or_default() {
            let off = AtomicBool::new(false);
            if let Err(error) = self.host.stop(&name, Duration::ZERO, &off) {
                eprintln!("unibody: VM {name}: {error}");
            }
        }
    }

    pub(crate) fn worked(&mut self, name: &str, outcome: Result<(), String>) {
        let machine = self.machines.entry(name.to_owned()).or_default();
        machine.work = None;
        // What runs now is looked at before anything else is done.
        self.running = None;
        self.look_at = None;
        self.old = self.looking;
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
        for (name, &placement) in &running {
            if let Some(patience) = ends(state, ground.me, name, placement) {
                self.end(ground, name, patience);
            }
        }
        for (name, vm) in &state.vms {
            if vm.node != Some(ground.me) || running.contains_key(name) {
                continue;
            }
            if ends(state, ground.me, name, Some(vm.epoch)).is_some() {
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
                let (definition, epoch, dir) = (vm.spec.definition.clone(), vm.epoch, ground.dir.clone());
                self.work(ground, name, None, move |host, name, _| {
                    forget_placement(&dir, name)?;
                    host.start(&definition, &sockets)?;
                    record_placement(&dir, name, epoch)
                });
            }
        }
        let known = |name: &String| state.vms.contains_key(name) || running.contains_key(name);
        self.machines
            .retain(|name, machine| machine.work.is_some() || !machine.asked.is_empty() || known(name));
        // What the state wants goes first, and what is asked finds it done.
        let asked = |machine: &Machine| machine.work.is_none() && !machine.asked.is_empty();
        let ready = self.machines.iter().filter(|(_, machine)| asked(machine));
        let ready: Vec<String> = ready.map(|(name, _)| name.clone()).collect();
        for name in ready {
            self.go_on(ground, volumes, &name);
        }
    }

    /// Does what users ask of a VM, aside; one thing at a time, but for what must not wait.
    pub(crate) fn act(&mut self, ground: &Ground, volumes: &Volumes, name: &str, asked: Asked) {
        if asked.act.is_for_any_time() {
            let (host, name) = (Arc::clone(&self.host), name.to_owned());
            ground.aside("vm", move || {
                let answer = host.act(&name, &asked.act, None, &AtomicBool::new(false));
                asked.answer(answer);
                Input::Changed
            });
            return;
        }
        let machine = self.machines.entry(name.to_owned()).or_default();
        if machine.asked.len() >= ASKED_MAX {
            let why = format!("too much is asked of VM {name} at once: try again later");
            return asked.answer(Err(why));
        }
        machine.asked.push_back(asked);
        if machine.work.is_none() {
            self.go_on(ground, volumes, name);
        }
    }

    /// Begins what is asked next.
    fn go_on(&mut self, ground: &Ground, volumes: &Volumes, name: &str) {
        let machine = self.machines.entry(name.to_owned()).or_default();
        // Whoever has hung up takes it for not done.
        machine.asked.retain(|asked| !asked.reply.is_closed());
        let Some(asked) = machine.asked.pop_front() else {
            return;
        };
        let socket = match &asked.act {
            VmAct::AddVolume(volume) => volumes.socket(&ground.dir, &volume.volume),
            _ => None,
        };
        let off = Arc::new(AtomicBool::new(false));
        let stops = matches!(asked.act, VmAct::Stop { .. });
        machine.work = Some(Work {
            kills: stops.then(|| Instant::now() + asked.act.patience()),
            off: Arc::clone(&off),
        });
        let (host, inputs, name) = (Arc::clone(&self.host), ground.inputs.clone(), name.to_owned());
        ground.aside("vm", move || {
            let answer = host.act(&name, &asked.act, socket.as_deref(), &off);
            // Before the user knows: what is asked next must not find this under way.
            inputs.send(Input::Machine(name, Ok(()))).ok();
            asked.answer(answer);
            Input::Changed
        });
    }

    /// Says which VMMs there are.
    pub(crate) fn vmms(&self, ground: &Ground, reply: tokio::sync::oneshot::Sender<LocalAnswer>) {
        let host = Arc::clone(&self.host);
        ground.aside("vmms", move || {
            reply.send(Ok(host.vmms())).ok();
            Input::Changed
        });
    }

    /// A VM that was to end has ended: its place is free.
    fn leave(&mut self, ground: &Ground, name: &str, epoch: u32) {
        let machine = self.machines.entry(name.to_owned()).or_default();
        if machine.work.is_some() {
            return;
        }
        machine.work = Some(Work {
            kills: None,
            off: Arc::default(),
        });
        let command = Command::PlaceVm {
            name: name.to_owned(),
            node: None,
            epoch,
        };
        let name = name.to_owned();
        // Refused: it was placed anew meanwhile, and the state says where.
        ground.propose(command, move |_| Input::Machine(name, Ok(())));
    }

    /// Ends a VM. What its guest is asked meanwhile, and a slower end, are called off for it.
    fn end(&mut self, ground: &Ground, name: &str, patience: Duration) {
        let kills = Instant::now() + patience;
        let machine = self.machines.entry(name.to_owned()).or_default();
        match &machine.work {
            Some(work) if work.kills.is_none_or(|at| at > kills) => work.off.store(true, Ordering::Relaxed),
            Some(_) => {}
            None => self.work(ground, name, Some(kills), move |host, name, off| {
                host.stop(name, patience, off)
            }),
        }
    }

    fn work(
        &mut self,
        ground: &Ground,
        name: &str,
        kills: Option<Instant>,
        work: impl FnOnce(&dyn VmHost, &str, &AtomicBool) -> Result<(), String> + Send + 'static,
    ) {
        let machine = self.machines.entry(name.to_owned()).or_default();
        if machine.work.is_some() || machine.not_before.is_some_and(|at| Instant::now() < at) {
            return;
        }
        let off = Arc::new(AtomicBool::new(false));
        machine.work = Some(Work {
            kills,
            off: Arc::clone(&off),
        });
        let (host, name) = (Arc::clone(&self.host), name.to_owned());
        ground.aside("vm", move || {
            let outcome = work(&*host, &name, &off);
            // What was called off has not failed: what it was called off for need not wait.
            let called_off = off.load(Ordering::Relaxed);
            Input::Machine(name, if called_off { Ok(()) } else { outcome })
        });
    }
}

/// How long a VM that runs on this node since a placement may take to end; `None`: it goes on.
fn ends(state: &State, me: NodeId, name: &str, placement: Option<u32>) -> Option<Duration> {
    let placed = state
        .vms
        .get(name)
        .filter(|vm| vm.node == Some(me) && placement == Some(vm.epoch));
    match placed {
        // One that was moved is ended at once: its volumes had another owner, and it can only fail.
        None => Some(Duration::ZERO),
        Some(vm) if !vm.spec.run => {
            let seconds = vm.seconds.map(|seconds| Duration::from_secs(seconds.into()));
            Some(seconds.unwrap_or(SHUTDOWN))
        }
        Some(vm) => leaves(state, me, vm.spec.memory).then_some(SHUTDOWN),
    }
}

/// Whether a VM has to leave a node because that is being drained, and has somewhere to go.
fn leaves(state: &State, node: NodeId, memory: u64) -> bool {
    let drained = |id: &NodeId| state.nodes.get(id).is_some_and(|node| node.drain);
    let room = |id: &NodeId| !drained(id) && state.memory_free(*id) >= memory;
    drained(&node) && state.nodes.keys().any(room)
}

fn placement_file(dir: &Path, name: &str) -> PathBuf {
    dir.join("placed").join(name)
}

/// The placement that a VM was started for. Not known if this process ended in the middle of a start.
fn placement(dir: &Path, name: &str) -> Option<u32> {
    let text = std::fs::read_to_string(placement_file(dir, name)).ok()?;
    text.parse().ok()
}

fn forget_placement(dir: &Path, name: &str) -> Result<(), String> {
    let path = placement_file(dir, name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("{} can not be removed: {error}", path.display()))
        }
        _ => Ok(()),
    }
}

fn record_placement(dir: &Path, name: &str, epoch: u32) -> Result<(), String> {
    let path = placement_file(dir, name);
    let written =
        std::fs::create_dir_all(dir.join("placed")).and_then(|()| std::fs::write(&path, epoch.to_string()));
    written.map_err(|error| format!("{} can not be written: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::VmSpec;

    const A: NodeId = NodeId(1);
    const B: NodeId = NodeId(2);

    /// Two nodes, and a VM that runs on the first.
    fn state() -> State {
        let mut state = State::default();
        for node in [A, B] {
            let add = Command::AddNode {
                node,
                store: u128::from(node.0),
                name: format!("n{}", node.0),
                addresses: vec![format!("127.0.0.1:{}", node.0)],
                domain: format!("d{}", node.0),
                memory: 1 << 30,
                incarnation: 1,
            };
            state.apply(&add).unwrap();
        }
        let vm = VmSpec {
            definition: "{}".into(),
            memory: 1 << 29,
            volumes: Vec::new(),
            run: true,
        };
        let name = "m".to_owned();
        state.apply(&Command::CreateVm { name, vm }).unwrap();
        place(&mut state, Some(A));
        state
    }

    fn place(state: &mut State, node: Option<NodeId>) {
        let (name, epoch) = ("m".to_owned(), state.vms["m"].epoch);
        state.apply(&Command::PlaceVm { name, node, epoch }).unwrap();
    }

    #[test]
    fn a_vm_goes_on_only_under_the_placement_that_it_was_started_for() {
        let mut state = state();
        let first = Some(state.vms["m"].epoch);
        assert_eq!(ends(&state, A, "m", first), None);
        assert_eq!(
            ends(&state, A, "m", None),
            Some(Duration::ZERO),
            "begun by a process that died"
        );
        assert_eq!(ends(&state, A, "other", first), Some(Duration::ZERO), "deleted");
        place(&mut state, Some(B));
        assert_eq!(ends(&state, A, "m", first), Some(Duration::ZERO), "moved");
        place(&mut state, Some(A));
        assert_eq!(
            ends(&state, A, "m", first),
            Some(Duration::ZERO),
            "moved away and back: it does not know what was written meanwhile"
        );
        assert_eq!(ends(&state, A, "m", Some(state.vms["m"].epoch)), None);
    }

    #[test]
    fn a_vm_that_is_to_stop_or_to_leave_is_asked_to() {
        let mut state = state();
        let placement = Some(state.vms["m"].epoch);
        let drain = |node, on| Command::Drain { node, on };
        state.apply(&drain(A, true)).unwrap();
        assert_eq!(ends(&state, A, "m", placement), Some(SHUTDOWN));
        state.apply(&drain(B, true)).unwrap();
        assert_eq!(ends(&state, A, "m", placement), None, "it has nowhere to go");
        state.apply(&drain(A, false)).unwrap();
        let mut stop = |seconds| {
            let name = "m".to_owned();
            let run = false;
            state.apply(&Command::RunVm { name, run, seconds }).unwrap();
            ends(&state, A, "m", placement)
        };
        assert_eq!(stop(None), Some(SHUTDOWN));
        assert_eq!(
            stop(Some(300)),
            Some(Duration::from_secs(300)),
            "as long as was asked for"
        );
        assert_eq!(stop(Some(0)), Some(Duration::ZERO), "at once");
    }

    #[test]
    fn a_placement_is_remembered_from_one_process_to_the_next() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(placement(dir.path(), "m"), None);
        forget_placement(dir.path(), "m").unwrap();
        record_placement(dir.path(), "m", 7).unwrap();
        assert_eq!(placement(dir.path(), "m"), Some(7));
        forget_placement(dir.path(), "m").unwrap();
        assert_eq!(placement(dir.path(), "m"), None);
    }

    struct Nothing;

    impl VmHost for Nothing {
        fn check(&self, _: &str) -> Result<(super::super::vms::VmNeeds, String), String> {
            Err("there is none".into())
        }

        fn start(&self, _: &str, _: &[(String, PathBuf)]) -> Result<(), String> {
            Ok(())
        }

        fn stop(&self, _: &str, _: Duration, _: &AtomicBool) -> Result<(), String> {
            Ok(())
        }

        fn amend(
            &self,
            _: &str,
            _: &super::super::vms::VmChange,
        ) -> Result<(super::super::vms::VmNeeds, String), String> {
            Err("there is none".into())
        }

        fn act(
            &self,
            _: &str,
            _: &VmAct,
            _: Option<&Path>,
            _: &AtomicBool,
        ) -> Result<serde_json::Value, String> {
            Err("there is none".into())
        }

        fn vmms(&self) -> serde_json::Value {
            serde_json::Value::Null
        }

        fn running(&self) -> Result<Vec<String>, String> {
            Ok(Vec::new())
        }
    }

    #[test]
    fn what_was_seen_before_something_was_done_does_not_count() {
        let mut machines = Machines::new(Arc::new(Nothing));
        machines.looking = true;
        machines.worked("m", Ok(()));
        machines.found(Ok(Running::new()));
        assert!(machines.running.is_none(), "it would be started a second time");
        machines.looking = true;
        machines.found(Ok(Running::from([("m".to_owned(), None)])));
        assert_eq!(machines.running(), ["m"]);
        machines.worked("m", Ok(()));
        assert_eq!(machines.running(), ["m"], "to look anew is no end");
    }
}
