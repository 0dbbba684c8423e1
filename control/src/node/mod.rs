//! The agent of one node: opens disks, attaches volumes, answers the owners' proposals, serves the operator.
//!
//! One thread does all of it, one input at a time, so there is nothing to lock. What takes long (opening a disk) happens
//! on a thread of its own and comes back as an input.
//!
//! Invariant: an owner hears the outcome of a proposal only after the state is durable.

mod disks;
pub(crate) mod exports;
mod operator;
mod requests;
mod status;
mod storage;
mod volumes;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use unibody_dataplane::config::{Change, Outcome, Proposal, VolumeConfig};
use unibody_dataplane::disk::DiskKind;
use unibody_dataplane::disk::spec::{Backend, DiskSpec, SpecError};
use unibody_dataplane::frontend::{DeviceConfig, Export, ServeError};
use unibody_dataplane::ids::{DiskUuid, Generation, VolumeId};
use unibody_dataplane::plane::{DISKS_MAX, DiskIndex, DiskUp, Event, Plane, VOLUMES_MAX, VolumeIndex};
use unibody_dataplane::replica::ChunkRef;

use crate::admin::{Fault, Request, Response, VolumeSpec};
use crate::local::{ExecuteError, LocalState, OpenError};
use crate::pace::Paces;
use crate::planner::{self, PlanError};
use crate::state::{Applied, Command, Disk, NodeId, Refused, Replica, ReplicaState};

pub use disks::{DiskError, check_disk, format_disk};
pub(crate) use disks::{NodeDisk, Opened, Phase, fault_rule, is_path, open as open_disk};
pub(crate) use status::{disk_status, reactor_status, volume_status};
pub(crate) use storage::ours;

/// How often the agent looks at what is due.
const TICK: Duration = Duration::from_millis(500);
/// How long a clean end waits for I/O that does not end.
const PATIENCE: Duration = Duration::from_secs(30);
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
    notices: Vec<String>,
    paces: Paces,
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
            notices: Vec::new(),
            paces: Paces::default(),
            _door: None,
            options,
        };
        node.open_disks()?;
        node.attach_known();
        node.drop_garbage();
        node.move_replicas();
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
        let exports: Vec<_> = self
            .volumes
            .iter_mut()
            .flatten()
            .filter_map(|volume| volume.export.take())
            .collect();
        let mut unclean = Vec::new();
        if !self.end_sessions(exports, end) {
            unclean.push("a guest's requests did not end".to_owned());
        }
        let quiet: Vec<_> = self
            .volumes
            .iter()
            .flatten()
            .map(|volume| self.plane.remove_volume(volume.index))
            .collect();
        for quiet in quiet {
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

    /// Ends front ends' sessions, which take their queues back first. What is in flight there may need the outcome of a
    /// proposal, so it is not waited for in one piece.
    fn end_sessions(&mut self, exports: Vec<Export>, end: Instant) -> bool {
        let (ended, quiet) = mpsc::channel();
        let ending = std::thread::Builder::new()
            .name("sessions".into())
            .spawn(move || {
                drop(exports);
                ended.send(()).ok();
            });
        ending.is_ok() && self.wait_quiet(&quiet, end)
    }

    /// Waits until something has ended. It may still need the outcome of a proposal for that.
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

    // What happens.

    fn event(&mut self, event: Event) {
        match event {
            Event::Proposal(index, id, proposal) => self.proposal(index, id, proposal),
            Event::Distrusted(index) => {
                self.disk_mut(index).distrust = true;
                if let Err(error) = self.record_distrust(index) {
                    eprintln!("unibody: {}", chain(&error));
                }
            }
            Event::DiskFailed { disk: index, reason } => {
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
            // A node by itself asks for no links.
            Event::Dial { .. } => {}
            Event::NewGeneration(volume) => self.renew_generation(volume),
            Event::Fenced(volume) => self.say(volume, "another owner has it: all its I/O fails here"),
            Event::Failed(volume) => self.say(
                volume,
                "its last replicas forgot acknowledged writes: all I/O fails until the node is restarted",
            ),
        }
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
            match self.record_distrust(index) {
                Ok(()) => self.open_later(index, None),
                Err(error) => self.disk_mut(index).failed(chain(&error), now),
            }
        }
        self.move_replicas();
        if self.paces.due(now) {
            let volumes = self.volume_status(&self.plane.status());
            self.paces.look(now, &volumes);
        }
    }
}

/// An error with all its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
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
