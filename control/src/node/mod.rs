//! The agent of one node: opens disks, attaches volumes, answers the owners' proposals, serves the operator.
//!
//! One thread does all of it, one input at a time, so there is nothing to lock. What takes long (opening a disk) happens
//! on a thread of its own and comes back as an input.
//!
//! Invariant: an owner hears the outcome of a proposal only after the state is durable.

mod disks;
mod exports;
mod operator;
mod status;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use unibody_dataplane::config::{Change, Outcome, Proposal, VolumeConfig};
use unibody_dataplane::disk::faulty::{self, Kinds, Rule};
use unibody_dataplane::disk::spec::{Backend, DiskSpec, SpecError};
use unibody_dataplane::disk::{DiskKind, IoError};
use unibody_dataplane::frontend::{DeviceConfig, Export, ServeError};
use unibody_dataplane::ids::{DiskUuid, VolumeId};
use unibody_dataplane::plane::{DISKS_MAX, DiskIndex, DiskUp, Event, Plane, VOLUMES_MAX, VolumeIndex};

use crate::admin::{Fault, Request, Response, VolumeSpec};
use crate::local::{ExecuteError, LocalState, OpenError};
use crate::planner::{self, PlanError};
use crate::state::{Applied, Command, Disk, NodeId, Refused, Replica, ReplicaState};

pub use disks::{DiskError, check_disk, format_disk};
use disks::{NodeDisk, Opened, Phase};

/// How often the agent looks at what is due.
const TICK: Duration = Duration::from_millis(500);
/// How long a clean end waits for I/O that does not end.
const PATIENCE: Duration = Duration::from_secs(30);
/// Reads that return flipped bits after `disk fault rot`.
const ROTTEN_READS: u64 = 50;
/// Requests in a queue.
const QUEUE_SIZE: u16 = 1024;

/// What a node is started with.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// One reactor on each.
    pub cores: Vec<usize>,
    /// Its disks.
    pub disks: Vec<DiskSpec>,
    /// Volumes to create if they are not there, and to serve.
    pub volumes: Vec<VolumeSpec>,
    /// Where the control state is kept; without one it ends with the process.
    pub state: Option<PathBuf>,
    /// Control socket.
    pub control: Option<PathBuf>,
    /// Memory for extent records, for each disk, bytes.
    pub cache_bytes: usize,
    /// Put the fault injector in front of every disk.
    pub faults: bool,
}

/// Why a node can not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The control state.
    #[error(transparent)]
    State(#[from] OpenError),
    /// A change of it.
    #[error(transparent)]
    Execute(#[from] ExecuteError),
    /// No place.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A disk's name.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A reactor.
    #[error("the reactors can not be started")]
    Plane(#[source] std::io::Error),
    /// A volume's socket.
    #[error("volume {name} can not be served")]
    Serve {
        /// The volume.
        name: String,
        /// Why not.
        source: ServeError,
    },
    /// The control socket.
    #[error("no control socket at {path}")]
    Control {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A thread.
    #[error("a thread can not be started")]
    Thread(#[source] std::io::Error),
    /// Anything an operator got wrong.
    #[error("{0}")]
    Wrong(String),
}

impl From<Refused> for NodeError {
    fn from(refused: Refused) -> Self {
        NodeError::Execute(refused.into())
    }
}

/// Something happened.
pub(crate) enum Input {
    Plane(Event),
    Request(Request, mpsc::Sender<Response>),
    Opened(
        DiskIndex,
        Box<Result<Opened, DiskError>>,
        Option<mpsc::Sender<Response>>,
    ),
    Stop,
}

/// A volume that is attached here.
struct NodeVolume {
    name: String,
    id: VolumeId,
    index: VolumeIndex,
    socket: Option<PathBuf>,
    export: Option<Export>,
    /// Its contents do not outlive this process.
    instance: u128,
}

/// See the module.
pub struct Node {
    options: NodeOptions,
    control: LocalState,
    plane: Arc<Plane>,
    sessions: Arc<exports::Sessions>,
    disks: Vec<NodeDisk>,
    volumes: Vec<Option<NodeVolume>>,
    inputs: mpsc::Receiver<Input>,
    /// Inputs that came while the agent waited for an owner to become quiet.
    backlog: VecDeque<Input>,
    sender: mpsc::Sender<Input>,
    /// Disks whose replicas are to go elsewhere, and where to if it can be chosen.
    leaving: Vec<(DiskUuid, Option<DiskUuid>)>,
    notices: Vec<String>,
    _door: Option<operator::Door>,
}

/// Catches SIGTERM and SIGINT; the receiver hears of them.
///
/// # Errors
/// When the system refuses.
pub fn stop_on_signals() -> std::io::Result<mpsc::Receiver<()>> {
    let mut signals =
        signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT])?;
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in signals.forever() {
                if sender.send(()).is_err() {
                    return;
                }
            }
        })?;
    Ok(receiver)
}

impl Node {
    /// Opens everything and begins to serve; returns when all sockets accept.
    ///
    /// # Errors
    /// When anything that was asked for is not possible.
    pub fn start(options: NodeOptions) -> Result<Self, NodeError> {
        let control = match &options.state {
            Some(dir) => LocalState::open(dir)?,
            None => LocalState::in_memory(),
        };
        let (plane, events) = Plane::start(&options.cores).map_err(NodeError::Plane)?;
        let plane = Arc::new(plane);
        let (sender, inputs) = mpsc::channel();
        let forward = sender.clone();
        std::thread::Builder::new()
            .name("events".into())
            .spawn(move || {
                events
                    .into_iter()
                    .all(|event| forward.send(Input::Plane(event)).is_ok())
            })
            .map_err(NodeError::Thread)?;
        let mut node = Node {
            control,
            sessions: Arc::new(exports::Sessions(Arc::clone(&plane))),
            plane,
            disks: Vec::new(),
            volumes: Vec::new(),
            inputs,
            backlog: VecDeque::new(),
            sender,
            leaving: Vec::new(),
            notices: Vec::new(),
            _door: None,
            options,
        };
        node.open_disks()?;
        node.attach_known()?;
        for spec in node.options.volumes.clone() {
            node.serve_volume(&spec)?;
        }
        if let Some(path) = &node.options.control {
            let door = operator::listen(path, node.sender.clone()).map_err(|source| NodeError::Control {
                path: path.clone(),
                source,
            })?;
            node._door = Some(door);
        }
        Ok(node)
    }

    /// What the operator should know about the start.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Serves until `stop` says otherwise, then ends cleanly: everything flushed, disks marked clean.
    ///
    /// # Errors
    /// When a disk could not be closed cleanly.
    pub fn run(mut self, stop: mpsc::Receiver<()>) -> Result<(), NodeError> {
        let sender = self.sender.clone();
        std::thread::Builder::new()
            .name("stop".into())
            .spawn(move || {
                stop.recv().ok();
                sender.send(Input::Stop).ok();
            })
            .map_err(NodeError::Thread)?;
        let mut next_tick = Instant::now() + TICK;
        loop {
            let patience = next_tick.saturating_duration_since(Instant::now());
            match self
                .backlog
                .pop_front()
                .map_or_else(|| self.inputs.recv_timeout(patience), Ok)
            {
                Ok(Input::Plane(event)) => self.event(event),
                Ok(Input::Request(request, reply)) => self.request(request, reply),
                Ok(Input::Opened(index, opened, reply)) => self.opened(index, *opened, reply),
                Ok(Input::Stop) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    next_tick = Instant::now() + TICK;
                    self.tick();
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => unreachable!("the node keeps a sender"),
            }
        }
        self.shut_down()
    }

    fn shut_down(mut self) -> Result<(), NodeError> {
        let end = Instant::now() + PATIENCE;
        let left = |end: Instant| end.saturating_duration_since(Instant::now());
        for volume in self.volumes.iter_mut().flatten() {
            // Ends the session, which takes the queues back first.
            volume.export = None;
        }
        let leaving: Vec<_> = self
            .volumes
            .iter()
            .flatten()
            .map(|volume| self.plane.remove_volume(volume.index))
            .collect();
        let mut unclean = Vec::new();
        for quiet in leaving {
            if !self.wait_quiet(&quiet, end) {
                unclean.push("a volume did not become quiet".to_owned());
            }
        }
        if !unclean.is_empty() {
            // Closing would mark clean what an owner has not made equal: leave the disks as a crash would.
            return Err(NodeError::Wrong(unclean.join("; ")));
        }
        let online: Vec<_> = self
            .disks
            .iter()
            .filter(|disk| disk.phase == Phase::Online)
            .collect();
        let closing: Vec<_> = online
            .iter()
            .map(|disk| (&disk.name, self.plane.close_disk(disk.index)))
            .collect();
        for (name, closed) in closing {
            if !closed.recv_timeout(left(end)).unwrap_or(false) {
                unclean.push(format!("{name} was not closed cleanly"));
            }
        }
        if unclean.is_empty() {
            Ok(())
        } else {
            Err(NodeError::Wrong(unclean.join("; ")))
        }
    }

    /// Waits until an owner has ended. It may still need the outcome of a proposal for that.
    fn wait_quiet(&mut self, quiet: &mpsc::Receiver<()>, end: Instant) -> bool {
        while quiet
            .recv_timeout(Duration::from_millis(2))
            .is_err_and(|e| e == mpsc::RecvTimeoutError::Timeout)
        {
            while let Ok(input) = self.inputs.try_recv() {
                match input {
                    Input::Plane(event) => self.event(event),
                    other => self.backlog.push_back(other),
                }
            }
            if Instant::now() > end {
                return false;
            }
        }
        true
    }

    // Disks.

    fn open_disks(&mut self) -> Result<(), NodeError> {
        let specs = self.options.disks.clone();
        for spec in specs {
            self.add_slot(spec)?;
        }
        let (cache, faults) = (self.options.cache_bytes, self.options.faults);
        let salts = &self.salts();
        // Side by side: recovery reads a good deal of each disk.
        let opened: Vec<Result<Opened, DiskError>> = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .disks
                .iter()
                .map(|disk| scope.spawn(move || disks::open(&disk.name, &disk.spec, cache, faults, salts)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("opening a disk does not panic"))
                .collect()
        });
        for (number, opened) in opened.into_iter().enumerate() {
            let index = self.disks[number].index;
            self.bring_up(index, opened?)?;
        }
        Ok(())
    }

    fn add_slot(&mut self, spec: DiskSpec) -> Result<DiskIndex, NodeError> {
        if self.disks.len() >= DISKS_MAX {
            return Err(NodeError::Wrong(format!("a node has at most {DISKS_MAX} disks")));
        }
        let same = |disk: &NodeDisk| {
            disks::is_path(&spec).is_some() && disks::is_path(&disk.spec) == disks::is_path(&spec)
        };
        if let Some(twin) = self.disks.iter().find(|disk| same(disk)) {
            return Err(NodeError::Wrong(format!("disk {} is given twice", twin.name)));
        }
        let index = DiskIndex(self.disks.len() as u16);
        self.disks.push(NodeDisk::new(index, spec));
        Ok(index)
    }

    fn disk_mut(&mut self, index: DiskIndex) -> &mut NodeDisk {
        &mut self.disks[usize::from(index.0)]
    }

    fn bring_up(&mut self, index: DiskIndex, opened: Opened) -> Result<(), NodeError> {
        let (up, bytes) = (opened.up(index), opened.bytes);
        if let Some(twin) = self
            .disks
            .iter()
            .find(|disk| disk.uuid == Some(up.uuid) && disk.index != index && disk.up.is_some())
        {
            let name = self.disks[usize::from(index.0)].name.clone();
            return Err(NodeError::Wrong(format!(
                "{name} and {} are copies of one disk: use only one of them",
                twin.name
            )));
        }
        let domain = self.disks[usize::from(index.0)].domain();
        let known = self.control.state().disks.get(&Disk(up.uuid));
        if known.is_none_or(|record| record.domain != domain || record.bytes != bytes) {
            self.control.execute(&Command::AddDisk {
                disk: up.uuid,
                node: NodeId::LOCAL,
                domain,
                bytes,
            })?;
        }
        let state = self.control.state();
        let garbage = opened
            .chunks
            .iter()
            .filter(|chunk| !state.has_volume(chunk))
            .copied()
            .collect();
        self.plane
            .add_disk(up, opened.service)
            .map_err(NodeError::Plane)?;
        self.plane.drop_chunks(index, garbage);
        self.notices.extend(opened.notices);
        let disk = self.disk_mut(index);
        disk.phase = Phase::Online;
        disk.uuid = Some(up.uuid);
        disk.kind = opened.kind;
        disk.up = Some(up);
        disk.faults = opened.faults;
        Ok(())
    }

    /// Opens a disk where nobody waits for it.
    fn open_later(&mut self, index: DiskIndex, reply: Option<mpsc::Sender<Response>>) {
        let (cache, faults, sender) = (self.options.cache_bytes, self.options.faults, self.sender.clone());
        let salts = self.salts();
        let disk = self.disk_mut(index);
        disk.phase = Phase::Opening;
        let (name, spec) = (disk.name.clone(), disk.spec.clone());
        let opening = std::thread::Builder::new()
            .name(format!("open{}", index.0))
            .spawn(move || {
                let opened = disks::open(&name, &spec, cache, faults, &salts);
                sender.send(Input::Opened(index, Box::new(opened), reply)).ok();
            });
        if let Err(error) = opening {
            self.disk_mut(index)
                .failed(format!("it could not be opened: {error}"), Instant::now());
        }
    }

    fn opened(
        &mut self,
        index: DiskIndex,
        opened: Result<Opened, DiskError>,
        reply: Option<mpsc::Sender<Response>>,
    ) {
        let result = match opened {
            Ok(opened) => self.bring_up(index, opened),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = &result {
            let text = chain(error);
            eprintln!("unibody: {text}");
            self.disk_mut(index).failed(text, Instant::now());
        }
        if let Some(reply) = reply {
            respond(&reply, result.map(|()| serde_json::Value::Null));
        }
        self.move_replicas();
    }

    // Volumes.

    /// Every volume the state knows has an owner from the start, served or not: what is degraded heals.
    fn attach_known(&mut self) -> Result<(), NodeError> {
        let names: Vec<_> = self.control.state().volumes.keys().cloned().collect();
        names.iter().try_for_each(|name| self.attach(name).map(drop))
    }

    fn attach(&mut self, name: &str) -> Result<VolumeIndex, NodeError> {
        let instance = self.instance(name)?;
        let generation = self.control.state().volumes[name].generation;
        let config = self.execute_volume(&Command::Attach {
            name: name.to_owned(),
            node: NodeId::LOCAL,
            generation,
        })?;
        let number = self
            .volumes
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.volumes.len());
        if number >= VOLUMES_MAX {
            return Err(NodeError::Wrong(format!(
                "a node has at most {VOLUMES_MAX} volumes"
            )));
        }
        if number == self.volumes.len() {
            self.volumes.push(None);
        }
        let index = VolumeIndex(number as u16);
        let (name, id) = (name.to_owned(), config.id);
        self.volumes[number] = Some(NodeVolume {
            name,
            id,
            index,
            socket: None,
            export: None,
            instance,
        });
        let ups: Vec<DiskUp> = self.disks.iter().filter_map(|disk| disk.up).collect();
        self.plane.add_volume(index, config, ups);
        Ok(index)
    }

    /// What names a volume's contents to front ends: a guest that goes on after a restart of this process is served only if
    /// it is the same. Drawn anew for each process if the contents do not outlive it, and for good if power was lost under
    /// every in-sync replica of a chunk: writes that the guest was promised may be gone.
    fn instance(&mut self, name: &str) -> Result<u128, NodeError> {
        let record = &self.control.state().volumes[name];
        let disk = |uuid: Disk| {
            self.disks
                .iter()
                .find(|disk| disk.uuid == Some(uuid.0) && disk.keeps_data())
        };
        let every_chunk = |good: &dyn Fn(&Replica, &NodeDisk) -> bool| {
            record.chunks.iter().all(|slots| {
                let in_sync = slots.iter().filter(|slot| slot.state == ReplicaState::InSync);
                in_sync
                    .filter_map(|slot| Some((slot, disk(slot.disk)?)))
                    .any(|(slot, disk)| good(slot, disk))
            })
        };
        if !every_chunk(&|_, _| true) {
            return Ok(disks::random());
        }
        let powered = |slot: &Replica, disk: &NodeDisk| {
            slot.power == 0 || disk.up.is_none_or(|up| up.power.0 == slot.power)
        };
        if every_chunk(&powered) {
            return Ok(record.instance);
        }
        let instance = disks::random();
        self.control.execute(&Command::Renew {
            name: name.to_owned(),
            instance,
        })?;
        Ok(instance)
    }

    fn execute_volume(&mut self, command: &Command) -> Result<VolumeConfig, NodeError> {
        match self.control.execute(command)? {
            Applied::Volume(config) => Ok(*config),
            other => unreachable!("{command:?} answers with a volume, not {other:?}"),
        }
    }

    fn find_volume(&mut self, name: &str) -> Result<&mut NodeVolume, NodeError> {
        let found = self
            .volumes
            .iter_mut()
            .flatten()
            .find(|volume| volume.name == name);
        found.ok_or_else(|| Refused::NoVolume(name.to_owned()).into())
    }

    /// Makes a volume exist as `spec` says, and serves it if that has a socket.
    fn serve_volume(&mut self, spec: &VolumeSpec) -> Result<(), NodeError> {
        match self.control.state().volumes.get(&spec.name) {
            None => self.create(spec)?,
            Some(record) => {
                let wrong = |what: &str, has: u64, asked: u64| {
                    Err(NodeError::Wrong(format!(
                        "volume {} exists with {what} {has}, not {asked}: leave it out, or use another name",
                        spec.name
                    )))
                };
                match (spec.size, spec.mirror) {
                    (Some(size), _) if size != record.size => return wrong("size", record.size, size),
                    (_, Some(mirror)) if mirror != record.mirror => {
                        return wrong("mirror", u64::from(record.mirror), u64::from(mirror));
                    }
                    _ => {}
                }
            }
        }
        let Some(socket) = &spec.socket else { return Ok(()) };
        let record = &self.control.state().volumes[&spec.name];
        let (capacity_bytes, read_only) = (record.size, record.read_only || spec.read_only);
        let queues_max = spec.queues.unwrap_or(1);
        let sessions = Arc::clone(&self.sessions);
        let volume = self.find_volume(&spec.name)?;
        if volume.export.is_some() {
            return Err(NodeError::Wrong(format!(
                "volume {} is served already",
                spec.name
            )));
        }
        let config = DeviceConfig {
            capacity_bytes,
            queues_max,
            queue_size_max: QUEUE_SIZE,
            read_only,
            serial: spec.name.clone(),
            instance: volume.instance,
        };
        let export =
            Export::new(exports::device(volume.index), config, socket, sessions).map_err(|source| {
                NodeError::Serve {
                    name: spec.name.clone(),
                    source,
                }
            })?;
        volume.export = Some(export);
        volume.socket = Some(socket.clone());
        Ok(())
    }

    fn create(&mut self, spec: &VolumeSpec) -> Result<(), NodeError> {
        let size = spec.size.ok_or_else(|| {
            NodeError::Wrong(format!(
                "there is no volume {}: to create it, say its size",
                spec.name
            ))
        })?;
        let mirror = spec.mirror.unwrap_or(2);
        let stripe_width = spec
            .stripe_width
            .unwrap_or_else(|| planner::default_width(self.control.state()));
        let stripe_unit = spec.stripe_unit.unwrap_or(256 << 10);
        let geometry = unibody_dataplane::geometry::Geometry::new(stripe_unit, stripe_width)
            .map_err(|error| Refused::Geometry(error.to_string()))?;
        let chunks = planner::plan_chunks(self.control.state(), geometry.chunks(size), mirror)?;
        let keeps_nothing = |uuid: &DiskUuid| {
            self.disks
                .iter()
                .any(|disk| disk.uuid == Some(*uuid) && disk.kind == DiskKind::Null)
        };
        if mirror > 1 && chunks.iter().flatten().any(keeps_nothing) {
            return Err(NodeError::Wrong(
                "a volume on a null disk keeps nothing, so it can not be mirrored: use mirror=1".into(),
            ));
        }
        self.execute_volume(&Command::CreateVolume {
            name: spec.name.clone(),
            size,
            mirror,
            stripe_unit,
            stripe_width,
            read_only: spec.read_only,
            instance: disks::random(),
            chunks,
        })?;
        self.attach(&spec.name)?;
        Ok(())
    }

    fn resize(&mut self, name: &str, size: u64) -> Result<(), NodeError> {
        let state = self.control.state();
        let volume = state
            .volumes
            .get(name)
            .ok_or_else(|| Refused::NoVolume(name.to_owned()))?;
        let more = volume
            .geometry()
            .chunks(size)
            .saturating_sub(volume.chunks.len() as u32);
        let chunks = planner::plan_chunks(state, more, volume.mirror)?;
        let config = self.execute_volume(&Command::ResizeVolume {
            name: name.to_owned(),
            size,
            chunks,
        })?;
        let plane = Arc::clone(&self.plane);
        let volume = self.find_volume(name)?;
        plane.reconfigured(volume.index, config);
        if let Some(export) = &volume.export {
            export.resize(size);
        }
        Ok(())
    }

    fn delete(&mut self, name: &str) -> Result<(), NodeError> {
        let plane = Arc::clone(&self.plane);
        let volume = self.find_volume(name)?;
        if volume.export.as_ref().is_some_and(Export::connected) {
            return Err(NodeError::Wrong(format!(
                "volume {name} is in use by a VM: stop that first"
            )));
        }
        volume.export = None;
        let index = volume.index;
        if !self.wait_quiet(&plane.remove_volume(index), Instant::now() + PATIENCE) {
            return Err(NodeError::Wrong(format!(
                "volume {name} does not become quiet: see `unibody status`, then try again"
            )));
        }
        self.volumes[usize::from(index.0)] = None;
        let record = self.control.state().volumes[name].clone();
        self.control.execute(&Command::DeleteVolume {
            name: name.to_owned(),
        })?;
        // A disk that is away now is told when it comes back.
        for disk in self.disks.iter().filter(|disk| disk.phase == Phase::Online) {
            if let Some(uuid) = disk.uuid {
                plane.drop_chunks(disk.index, record.replicas_on(uuid).collect());
            }
        }
        Ok(())
    }

    // What happens.

    fn event(&mut self, event: Event) {
        match event {
            Event::Proposal(index, id, proposal) => self.proposal(index, id, proposal),
            Event::DiskFailed {
                disk: index,
                reason,
                distrust,
            } => {
                self.distrust(index, distrust);
                let disk = self.disk_mut(index);
                eprintln!("unibody: disk {} is out of service: {reason}", disk.name);
                disk.failed(reason, Instant::now());
                self.plane.disk_down(index);
            }
            Event::Silent(index) => {
                let disk = self.disk_mut(index);
                if disk.phase == Phase::Online {
                    disk.phase = Phase::Leaving;
                    eprintln!(
                        "unibody: disk {} answers nothing and is taken out of service",
                        disk.name
                    );
                    self.plane.fail_disk(index);
                }
            }
            Event::Attached {
                volume,
                power_lost: true,
            } => {
                self.say(
                    volume,
                    "the machine lost power under it: writes that were not flushed may be gone",
                );
            }
            Event::Attached { .. } => {}
            Event::NewGeneration(volume) => self.say(
                volume,
                "restart the node soon: half of this owner's versions are used",
            ),
            Event::Fenced(volume) => self.say(volume, "another owner has it: all its I/O fails here"),
            Event::Failed(volume) => self.say(
                volume,
                "its last replicas forgot acknowledged writes: all I/O fails until the node is restarted",
            ),
        }
    }

    /// A disk that failed by itself may have lost what it completed, though the machine kept its power.
    fn distrust(&mut self, index: DiskIndex, distrust: bool) {
        let Some(disk) = self.disk_mut(index).uuid.filter(|_| distrust) else {
            return;
        };
        let salt = disks::random();
        if let Err(error) = self.control.execute(&Command::Distrust { disk, salt }) {
            eprintln!("unibody: {}", chain(&error));
        }
    }

    /// What distinguishes the spans of power of the disks that failed by themselves.
    fn salts(&self) -> disks::Salts {
        self.control
            .state()
            .disks
            .iter()
            .map(|(disk, record)| (disk.0, record.distrust))
            .collect()
    }

    fn say(&self, volume: VolumeIndex, what: &str) {
        let name = self
            .volumes
            .get(usize::from(volume.0))
            .and_then(Option::as_ref)
            .map_or("?", |volume| &volume.name);
        eprintln!("unibody: volume {name}: {what}");
    }

    fn proposal(&mut self, index: VolumeIndex, id: VolumeId, proposal: Proposal) {
        let found = self
            .volumes
            .get(usize::from(index.0))
            .and_then(Option::as_ref)
            .filter(|volume| volume.id == id);
        let Some(name) = found.map(|volume| volume.name.clone()) else {
            return;
        };
        let full = matches!(proposal.change, Change::MarkStale { no_space: true, .. });
        match self.control.execute(&Command::Propose {
            name: name.clone(),
            proposal,
        }) {
            Ok(Applied::Outcome(outcome)) => self.plane.decided(index, outcome),
            Ok(other) => unreachable!("a proposal is answered with an outcome, not {other:?}"),
            Err(ExecuteError::Refused(_)) => self.plane.decided(index, Outcome::Fenced),
            Err(error @ ExecuteError::Write { .. }) => {
                // Nothing was decided: the owner goes on waiting, and nothing is acknowledged meanwhile. Ask it again.
                eprintln!("unibody: {}", chain(&error));
                let record = &self.control.state().volumes[&name];
                let config = record.to_config();
                self.plane.decided(index, Outcome::Moved(config));
            }
        }
        if full {
            self.move_full();
        }
        self.move_replicas();
    }

    fn tick(&mut self) {
        let now = Instant::now();
        let due: Vec<DiskIndex> = self
            .disks
            .iter()
            .filter(|disk| disk.due(now))
            .map(|disk| disk.index)
            .collect();
        for index in due {
            self.open_later(index, None);
        }
        self.move_replicas();
    }

    /// Gives the places on disks that are to go to others, as far as their replicas are out of sync.
    fn move_replicas(&mut self) {
        for (from, preferred) in self.leaving.clone() {
            self.move_from(from, false, preferred);
            if self.control.execute(&Command::ForgetDisk { disk: from }).is_ok() {
                self.leaving.retain(|(disk, _)| *disk != from);
            }
        }
    }

    /// Gives the places of replicas that a disk had no room for to other disks.
    fn move_full(&mut self) {
        let disks: Vec<DiskUuid> = self.control.state().disks.keys().map(|disk| disk.0).collect();
        disks
            .into_iter()
            .for_each(|disk| self.move_from(disk, true, None));
    }

    fn move_from(&mut self, from: DiskUuid, full: bool, preferred: Option<DiskUuid>) {
        let names: Vec<_> = self
            .volumes
            .iter()
            .flatten()
            .map(|volume| (volume.name.clone(), volume.index))
            .collect();
        for (name, index) in names {
            let to = planner::plan_moves(self.control.state(), &name, from, full, preferred);
            if to.is_empty() {
                continue;
            }
            let volume = &self.control.state().volumes[&name];
            let (generation, config) = (volume.generation, volume.config);
            let command = Command::Move {
                name,
                generation,
                config,
                from,
                to,
            };
            match self.execute_volume(&command) {
                Ok(config) => self.plane.reconfigured(index, config),
                Err(error) => eprintln!("unibody: {}", chain(&error)),
            }
        }
    }

    // The operator.

    fn request(&mut self, request: Request, reply: mpsc::Sender<Response>) {
        let null = |()| serde_json::Value::Null;
        let result = match request {
            Request::Status => {
                serde_json::to_value(self.status()).map_err(|error| NodeError::Wrong(error.to_string()))
            }
            Request::VolumeCreate(spec) => self.create_new(&spec).map(null),
            Request::VolumeResize { name, size } => self.resize(&name, size).map(null),
            Request::VolumeDelete { name } => self.delete(&name).map(null),
            Request::DiskAdd { spec } => match self.add(&spec) {
                Ok(index) => return self.open_later(index, Some(reply)),
                Err(error) => Err(error),
            },
            Request::DiskFail { disk } => self.fail(&disk).map(null),
            Request::DiskReturn { disk } => match self.return_disk(&disk) {
                Ok(index) => return self.open_later(index, Some(reply)),
                Err(error) => Err(error),
            },
            Request::DiskReplace { disk, spec } => match self.replace(&disk, &spec) {
                Ok(index) => return self.open_later(index, Some(reply)),
                Err(error) => Err(error),
            },
            Request::DiskFault { disk, fault } => self.fault(&disk, &fault).map(null),
        };
        respond(&reply, result);
    }

    fn create_new(&mut self, spec: &VolumeSpec) -> Result<(), NodeError> {
        if self.control.state().volumes.contains_key(&spec.name) {
            return Err(Refused::VolumeExists(spec.name.clone()).into());
        }
        self.serve_volume(spec)
    }

    fn find_disk(&mut self, name: &str) -> Result<&mut NodeDisk, NodeError> {
        let names: Vec<_> = self.disks.iter().map(|disk| disk.name.clone()).collect();
        let found = self.disks.iter_mut().find(|disk| disk.name == name);
        found.ok_or_else(|| {
            NodeError::Wrong(format!("there is no disk {name}; there are {}", names.join(", ")))
        })
    }

    fn add(&mut self, spec: &str) -> Result<DiskIndex, NodeError> {
        let spec: DiskSpec = spec.parse()?;
        if self.options.state.is_none() && matches!(spec.backend, Backend::Path(_)) {
            return Err(NodeError::Wrong(
                "this node keeps no state, so it can not use a disk that keeps data: start it with --state"
                    .into(),
            ));
        }
        self.add_slot(spec)
    }

    fn fail(&mut self, name: &str) -> Result<(), NodeError> {
        let disk = self.find_disk(name)?;
        if disk.phase != Phase::Online {
            return Err(NodeError::Wrong(format!("disk {name} is not in service")));
        }
        disk.by_hand = true;
        disk.phase = Phase::Leaving;
        let index = disk.index;
        self.plane.fail_disk(index);
        Ok(())
    }

    fn return_disk(&mut self, name: &str) -> Result<DiskIndex, NodeError> {
        let disk = self.find_disk(name)?;
        match disk.phase {
            Phase::Failed(_) if disk.kind == DiskKind::Memory => Err(NodeError::Wrong(format!(
                "disk {name} was in memory and is gone: replace it with another"
            ))),
            Phase::Failed(_) => {
                disk.by_hand = false;
                Ok(disk.index)
            }
            Phase::Leaving => Err(NodeError::Wrong(format!(
                "the last I/O of disk {name} has not ended; try again"
            ))),
            Phase::Online | Phase::Opening => Err(NodeError::Wrong(format!("disk {name} is in service"))),
        }
    }

    fn replace(&mut self, name: &str, spec: &str) -> Result<DiskIndex, NodeError> {
        let old = self.find_disk(name)?;
        if !matches!(old.phase, Phase::Failed(_)) {
            return Err(NodeError::Wrong(format!(
                "disk {name} is in service: take it out first (`disk fail {name}`)"
            )));
        }
        let (uuid, domain) = (old.uuid, old.domain());
        let mut spec: DiskSpec = spec.parse()?;
        spec.domain.get_or_insert(domain);
        let index = self.add_slot(spec)?;
        if let Some(uuid) = uuid {
            self.control.execute(&Command::DiskOut { disk: uuid })?;
            for volume in self.volumes.iter().flatten() {
                if let Some(record) = self.control.state().volumes.get(&volume.name) {
                    self.plane.reconfigured(volume.index, record.to_config());
                }
            }
            self.leaving.push((uuid, None));
        }
        Ok(index)
    }

    fn fault(&mut self, name: &str, fault: &Fault) -> Result<(), NodeError> {
        let disk = self.find_disk(name)?;
        let Some(handle) = &disk.faults else {
            return Err(NodeError::Wrong(
                "this node injects no faults: start it with `serve --faults`".into(),
            ));
        };
        handle.clear();
        let media = faulty::Fault::Fail(IoError::Media);
        let rule = match fault {
            Fault::None => return Ok(()),
            Fault::ReadErrors => Rule::always(Kinds::READS, media),
            Fault::WriteErrors => Rule::always(Kinds::WRITES, media),
            Fault::FlushErrors => Rule::always(Kinds::FLUSHES, media),
            Fault::Rot => Rule {
                times: ROTTEN_READS,
                ..Rule::always(Kinds::READS, faulty::Fault::Rot)
            },
            Fault::Delay(ms) => Rule::always(Kinds::ALL, faulty::Fault::Delay(Duration::from_millis(*ms))),
            Fault::Stuck => Rule::always(Kinds::ALL, faulty::Fault::Stuck),
        };
        handle.add(rule);
        Ok(())
    }
}

/// An error with all its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn respond(reply: &mpsc::Sender<Response>, result: Result<serde_json::Value, NodeError>) {
    let response = match result {
        Ok(value) => Response::Ok(value),
        Err(error) => Response::Error(chain(&error)),
    };
    // A client that has hung up does not want to know.
    reply.send(response).ok();
}
