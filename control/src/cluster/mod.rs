//! The agent of a node in a cluster: it makes its data plane be what the committed state says of this node.
//!
//! One thread does all of it, one input at a time, so there is nothing to lock; what takes long happens on threads of its own
//! and comes back as an input. After each input that may matter it compares what the state wants here with what is here, and
//! begins what is missing. So a lost message, a crash or a change by another's hand are all the same case.
//!
//! * `config`: what the node remembers of itself, and the token to join by
//! * `door`: the one port of the node
//! * `peers`: where the other nodes are, and the connections to their disks
//! * `disks`, `volumes`, `machines`: what the state says of this node's disks, volumes and VMs, and what is done about it
//! * `proposer`: how proposals reach Raft
//! * `leader`, `leaving`, `balancing`, `lead`: what is done for the whole cluster by the node that leads, and its thread
//! * `vms`: what runs the VMs, from outside
//!
//! Invariants:
//! * A volume is served only under a generation that this process asked for: never one of an earlier process.
//! * The data plane's lease is set only after everything was looked at that was committed when the lease was granted.
//! * An owner hears the outcome of a proposal only when it is committed, and hears of each exactly once.

mod balancing;
mod config;
mod disks;
mod door;
mod lead;
mod leader;
mod leaving;
mod machines;
mod peers;
mod proposer;
pub mod vms;
mod volumes;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use unibody_dataplane::disk::spec::{Backend, DiskSpec, SpecError};
use unibody_dataplane::ids::VolumeId;
use unibody_dataplane::plane::{DiskIndex, Event, Plane, VolumeIndex};
use unibody_dataplane::wire::handshake::{self, Counts, Incarnation, Local};

use crate::admin::{Fault, NodeStatus};
use crate::node::{self, DiskError, exports::Sessions};
use crate::pace::Paces;
use crate::raft::{Cluster, ClusterError, Lease, Options, Start, View};
use crate::state::{Applied, Command, NodeId, Refused};

pub(crate) use balancing::{Reports, Told};
pub use config::{ConfigError, JoinToken, NodeConfig, NodeSetup};
use disks::Disks;
use door::Inside;
pub use leader::Life;
pub use leaving::{disks as disk_duties, goes};
use machines::{Asked, Machines};
use peers::Peers;
use proposer::Proposer;
use vms::{VmAct, VmHost};
use volumes::Volumes;

/// How often the agent looks at what is due.
const TICK: Duration = Duration::from_millis(200);
/// Between two renewals of the lease.
const RENEW: Duration = Duration::from_millis(1500);
/// How long a node may take to become a member.
const JOINING: Duration = Duration::from_secs(60);
/// How long a clean end waits for I/O that does not end.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a clean end waits for a majority, which may have ended already.
const LAST: Duration = Duration::from_secs(3);
/// Connections of users that wait to be served.
const USERS_MAX: usize = 256;

/// Why a node does not run, or does not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// What it remembers of itself.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its part in the cluster.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A disk's name.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A reactor.
    #[error("the reactors can not be started")]
    Plane(#[source] std::io::Error),
    /// Its port.
    #[error("the node can not listen at {address}: choose another with --listen")]
    Listen {
        /// Where.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// The system.
    #[error("a thread can not be started")]
    System(#[from] std::io::Error),
    /// A rule.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Anything an operator got wrong.
    #[error("{0}")]
    Wrong(String),
}

/// What users ask of one certain node, by way of its API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum LocalRequest {
    /// What it knows of its disks, volumes and reactors: [`NodeStatus`].
    Status,
    /// Use another disk.
    DiskAdd {
        /// As after `--disk`.
        spec: String,
    },
    /// Take a disk out of service at once, as if it had died.
    DiskFail {
        /// Its name.
        disk: String,
    },
    /// Put a failed disk back.
    DiskReturn {
        /// Its name.
        disk: String,
    },
    /// Let go of a disk that is not in service, for good.
    DiskForget {
        /// Its name.
        disk: String,
    },
    /// Switch a fault on or off in front of a disk.
    DiskFault {
        /// Its name.
        disk: String,
        /// The fault.
        fault: Fault,
    },
    /// Let a volume go, to another node or to whoever wants it. Answers whether the node has it: its owner may not have heard yet.
    LetGo {
        /// The volume.
        volume: String,
        /// Its next owner.
        #[schema(value_type = Option<u64>)]
        to: Option<NodeId>,
    },
    /// Do something to a VM that runs on it.
    Vm {
        /// The VM.
        name: String,
        /// What.
        act: VmAct,
    },
    /// Which VMMs it has.
    Vmms,
}

impl LocalRequest {
    /// How long the guest may take that this is about.
    pub(crate) fn patience(&self) -> Duration {
        match self {
            LocalRequest::Vm { act, .. } => act.patience(),
            _ => Duration::ZERO,
        }
    }
}

/// The answer to a [`LocalRequest`]: a value, or what is wrong and what to do.
pub type LocalAnswer = Result<serde_json::Value, String>;

pub(crate) enum Input {
    Plane(Event),
    /// The state has changed.
    Changed,
    /// A disk was opened, or was not.
    Opened(DiskIndex, Box<Result<node::Opened, DiskError>>),
    /// A proposal about a disk was decided.
    DiskRecorded(DiskIndex, disks::Record, Result<Applied, Refused>),
    /// A volume was taken, or was not.
    Taken(String, Result<Applied, Refused>),
    /// An owner's proposal was decided.
    Decided(VolumeIndex, (VolumeId, u32), Result<Applied, Refused>),
    /// The front ends and the owner of a volume have ended.
    Quiet(VolumeIndex),
    /// A volume's contents have a new name.
    Renamed(VolumeIndex, u128, Result<Applied, Refused>),
    /// The next generation of a volume was taken for its present owner, or was not.
    Renewed(VolumeIndex, (VolumeId, u32), Result<Applied, Refused>),
    /// The lease was renewed.
    Leased(Lease),
    /// Work on a VM has ended.
    Machine(String, Result<(), String>),
    /// The VMs that run here.
    Machines(Result<machines::Running, String>),
    Request(LocalRequest, tokio::sync::oneshot::Sender<LocalAnswer>),
    Stop,
}

/// Asks the agent from any thread.
#[derive(Clone)]
pub struct AgentHandle(mpsc::Sender<Input>);

impl AgentHandle {
    /// Asks, and waits for the answer.
    pub async fn ask(&self, request: LocalRequest) -> LocalAnswer {
        let gone = || Err("the node is shutting down".to_owned());
        let (sender, receiver) = tokio::sync::oneshot::channel();
        if self.0.send(Input::Request(request, sender)).is_err() {
            return gone();
        }
        receiver.await.unwrap_or_else(|_| gone())
    }

    /// Ends the node cleanly.
    pub fn stop(&self) {
        // It may have ended already.
        self.0.send(Input::Stop).ok();
    }
}

/// What all parts of the agent use.
pub(crate) struct Ground {
    pub(crate) dir: PathBuf,
    pub(crate) me: NodeId,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) plane: Arc<Plane>,
    pub(crate) proposer: Proposer,
    pub(crate) inputs: mpsc::Sender<Input>,
}

impl Ground {
    /// Runs something that may take long; what it has to say is an input.
    pub(crate) fn aside(&self, name: &str, work: impl FnOnce() -> Input + Send + 'static) {
        let inputs = self.inputs.clone();
        let started = std::thread::Builder::new().name(name.into()).spawn(move || {
            // The agent may have ended, and then nobody wants to know.
            inputs.send(work()).ok();
        });
        if let Err(error) = started {
            eprintln!("unibody: a thread can not be started: {error}");
        }
    }

    /// Proposes; the outcome is an input.
    pub(crate) fn propose(
        &self,
        command: Command,
        input: impl FnOnce(Result<Applied, Refused>) -> Input + Send + 'static,
    ) {
        let inputs = self.inputs.clone();
        self.proposer.propose(command, move |outcome| {
            inputs.send(input(outcome)).ok();
        });
    }
}

/// See the module.
pub struct Agent {
    ground: Ground,
    config: NodeConfig,
    view: Arc<View>,
    disks: Disks,
    volumes: Volumes,
    machines: Machines,
    paces: Paces,
    peers: Peers,
    inputs: mpsc::Receiver<Input>,
    runtime: Option<tokio::runtime::Runtime>,
    address: SocketAddr,
    users: Option<tokio::sync::mpsc::Receiver<TcpStream>>,
    reports: Arc<Reports>,
}

impl Agent {
    /// Starts a node: takes part in the cluster, opens its disks, and begins to do what the state says.
    ///
    /// # Errors
    /// When it can not listen, can not use its store or a disk, or the cluster does not want it.
    pub fn start(
        dir: &Path,
        config: NodeConfig,
        start: &Start,
        host: Arc<dyn VmHost>,
    ) -> Result<Self, AgentError> {
        let listener = TcpListener::bind(&config.listen).map_err(|source| AgentError::Listen {
            address: config.listen.clone(),
            source,
        })?;
        let specs = config
            .disks
            .iter()
            .map(|spec| spec.parse())
            .collect::<Result<Vec<_>, SpecError>>()?;
        let incarnation = crate::raft::random();
        let cluster = Arc::new(Cluster::start(
            Options {
                dir: dir.to_path_buf(),
                name: config.name.clone(),
                addresses: vec![config.address.clone()],
                domain: config.domain.clone(),
                memory: config.memory,
                token: config.wire_token(),
                incarnation,
                timing: crate::raft::Timing::default(),
                gate: None,
            },
            start,
        )?);
        let node = cluster.identity().node;
        let me = Local {
            node: handshake::NodeId(node.0),
            incarnation: Incarnation(incarnation),
            token: config.wire_token(),
            nonce: [0; 32],
        };
        let (plane, events) = Plane::start(&config.cores).map_err(AgentError::Plane)?;
        // Until it has a lease it has none.
        plane.set_lease(Instant::now());
        let plane = Arc::new(plane);
        let (http, users) = tokio::sync::mpsc::channel(USERS_MAX);
        let inside = Inside {
            cluster: Arc::clone(&cluster),
            plane: Arc::clone(&plane),
            me: me.clone(),
            http,
            counts: Counts::default(),
        };
        let address = door::open(listener, Arc::new(inside))?;
        cluster.wait_member(JOINING)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("agent-io")
            .enable_all()
            .build()?;
        let (sender, inputs) = mpsc::channel();
        let ground = Ground {
            dir: dir.to_path_buf(),
            me: node,
            proposer: Proposer::start(Arc::clone(&cluster), &runtime),
            cluster: Arc::clone(&cluster),
            plane: Arc::clone(&plane),
            inputs: sender.clone(),
        };
        watch(&cluster, events, &sender)?;
        let reports = Arc::new(Reports::default());
        lead::start(&cluster, Duration::from_secs(config.out_after_s), &reports)?;
        let sessions = Arc::new(Sessions(plane));
        std::fs::create_dir_all(dir.join("volumes"))?;
        let mut agent = Agent {
            volumes: Volumes::new(sessions),
            disks: Disks::new(config.cache_bytes, config.faults),
            machines: Machines::new(host),
            paces: Paces::default(),
            view: cluster.view(),
            ground,
            config,
            peers: Peers::new(me),
            inputs,
            runtime: Some(runtime),
            address,
            users: Some(users),
            reports,
        };
        for spec in specs {
            let index = agent.disks.add(spec)?;
            agent.disks.open(&agent.ground, &agent.view.state, index);
        }
        agent.look();
        Ok(agent)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// For whoever asks it things.
    pub fn handle(&self) -> AgentHandle {
        AgentHandle(self.ground.inputs.clone())
    }

    /// Its part in the cluster.
    pub fn cluster(&self) -> Arc<Cluster> {
        Arc::clone(&self.ground.cluster)
    }

    /// Where the leader looks for what nodes say of their disks.
    pub(crate) fn reports(&self) -> Arc<Reports> {
        Arc::clone(&self.reports)
    }

    /// What it was made from.
    pub fn config(&self) -> &NodeConfig {
        &self.config
    }

    /// What is not of other nodes and has come to the node's port. Can be taken once.
    pub fn users(&mut self) -> Option<tokio::sync::mpsc::Receiver<TcpStream>> {
        self.users.take()
    }

    /// The runtime to serve users on.
    pub fn runtime(&self) -> tokio::runtime::Handle {
        let runtime = self.runtime.as_ref().expect("it is there until the end");
        runtime.handle().clone()
    }

    /// Works until it is told to stop, then ends cleanly: everything flushed, volumes let go, disks marked clean. VMs run on.
    ///
    /// # Errors
    /// When a disk could not be closed cleanly, or the node was removed.
    pub fn run(mut self) -> Result<(), AgentError> {
        let mut next_tick = Instant::now() + TICK;
        while !self.ground.cluster.is_removed() {
            let patience = next_tick.saturating_duration_since(Instant::now());
            match self.inputs.recv_timeout(patience) {
                Ok(Input::Stop) => return self.shut_down(),
                Ok(input) => self.input(input),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    next_tick = Instant::now() + TICK;
                    self.tick();
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => unreachable!("the agent keeps a sender"),
            }
        }
        // Nobody will come back to end them.
        self.machines.end_all();
        self.shut_down()?;
        Err(ClusterError::Removed.into())
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Plane(event) => self.event(event),
            Input::Changed => {}
            Input::Opened(index, opened) => {
                self.disks.opened(&self.ground, &self.view.state, index, *opened);
            }
            Input::DiskRecorded(index, record, outcome) => {
                self.disks.recorded(&self.ground, index, record, &outcome);
            }
            Input::Taken(name, outcome) => {
                let ups = self.disks.ups();
                self.volumes.taken(&self.ground, &name, outcome, ups);
            }
            Input::Decided(index, of, outcome) => {
                self.volumes.decided(&self.ground, index, of, outcome);
            }
            Input::Renewed(index, of, outcome) => {
                self.volumes.generation_renewed(&self.ground, index, of, outcome);
            }
            Input::Quiet(index) => self.volumes.quiet(&self.ground, index),
            Input::Renamed(index, instance, outcome) => {
                self.volumes.renamed(index, instance, &outcome);
            }
            Input::Leased(lease) => {
                // Everything that was taken from this node before the lease was granted has been looked at now.
                self.look();
                self.ground.plane.set_lease(lease.until);
                return;
            }
            Input::Machine(name, outcome) => self.machines.worked(&name, outcome),
            Input::Machines(running) => self.machines.found(running),
            Input::Request(LocalRequest::Vm { name, act }, reply) => {
                self.machines
                    .act(&self.ground, &self.volumes, &name, Asked { act, reply });
            }
            Input::Request(LocalRequest::Vmms, reply) => self.machines.vmms(&self.ground, reply),
            Input::Request(request, reply) => {
                // A user who has hung up does not want to know.
                reply.send(self.request(request)).ok();
            }
            Input::Stop => unreachable!("seen by the caller"),
        }
        self.look();
    }

    fn event(&mut self, event: Event) {
        match event {
            Event::Proposal(index, id, proposal) => self.volumes.propose(&self.ground, index, id, proposal),
            Event::Distrusted(index) => self.disks.distrusted(&self.ground, index),
            Event::DiskFailed { disk, reason } => self.disks.failed(&self.ground, disk, reason),
            Event::Silent(index) => self.disks.silent(&self.ground, index),
            Event::Attached { volume, power_lost } => {
                self.volumes.attached(&self.ground, volume, power_lost);
            }
            Event::Dial {
                node,
                reactor,
                reason: _,
            } => self.peers.dial(&self.ground, NodeId(node.0), reactor),
            Event::NewGeneration(index) => self.volumes.renew_generation(&self.ground, index),
            Event::Fenced(index) => self.volumes.lost(&self.ground, index, "another owner has it"),
            Event::Failed(index) => self.volumes.lost(
                &self.ground,
                index,
                "its last replicas forgot acknowledged writes: it is attached anew, and the guest sees a failed disk",
            ),
        }
    }

    /// Compares what the state says of this node with what is here.
    fn look(&mut self) {
        self.view = self.ground.cluster.view();
        let view = Arc::clone(&self.view);
        self.peers.look(&self.ground, &view.state);
        self.disks.look(&self.ground, &view.state);
        self.volumes.look(&self.ground, &view.state);
        self.machines.look(&self.ground, &view.state, &self.volumes);
        self.remember_disks();
    }

    fn tick(&mut self) {
        self.disks.tick(&self.ground, &self.view.state);
        self.machines.tick(&self.ground);
        let now = Instant::now();
        if self.paces.due(now) {
            let shards = self.ground.plane.status();
            let volumes = self.volumes.status(&self.ground.dir, &self.view.state, &shards);
            self.paces.look(now, &volumes);
        }
        self.look();
    }

    fn request(&mut self, request: LocalRequest) -> LocalAnswer {
        let done = |()| serde_json::Value::Null;
        let wrong = |error: AgentError| node::chain(&error);
        match request {
            LocalRequest::Status => serde_json::to_value(self.status()).map_err(|error| error.to_string()),
            LocalRequest::DiskAdd { spec } => self.add_disk(&spec).map(done).map_err(wrong),
            LocalRequest::DiskFail { disk } => self.disks.fail(&self.ground, &disk).map(done).map_err(wrong),
            LocalRequest::DiskReturn { disk } => {
                let state = Arc::clone(&self.view.state);
                self.disks
                    .put_back(&self.ground, &state, &disk)
                    .map(done)
                    .map_err(wrong)
            }
            LocalRequest::DiskForget { disk } => self.disks.forget(&disk).map(done).map_err(wrong),
            LocalRequest::DiskFault { disk, fault } => {
                self.disks.fault(&disk, &fault).map(done).map_err(wrong)
            }
            LocalRequest::LetGo { volume, to } => self
                .volumes
                .let_go(&self.ground, &volume, to)
                .map(serde_json::Value::from)
                .map_err(wrong),
            LocalRequest::Vm { .. } | LocalRequest::Vmms => {
                unreachable!("takes long, and is begun by the caller")
            }
        }
    }

    /// Begins to open another disk.
    fn add_disk(&mut self, text: &str) -> Result<(), AgentError> {
        let spec: DiskSpec = text.parse()?;
        if let Backend::Path(path) = &spec.backend
            && !path.is_absolute()
        {
            return Err(AgentError::Wrong(format!(
                "{} is relative to nothing that the node knows: give the whole path",
                path.display()
            )));
        }
        let index = self.disks.add(spec)?;
        self.disks.open(&self.ground, &self.view.state, index);
        Ok(())
    }

    /// Remembers which disks to open at the next start.
    fn remember_disks(&mut self) {
        let disks = self.disks.specs();
        if self.config.disks == disks {
            return;
        }
        self.config.disks = disks;
        if let Err(error) = self.config.save(&self.ground.dir) {
            eprintln!("unibody: {}", node::chain(&error));
        }
    }

    fn status(&self) -> NodeStatus {
        let shards = self.ground.plane.status();
        let mut volumes = self.volumes.status(&self.ground.dir, &self.view.state, &shards);
        self.paces.tell(&mut volumes);
        NodeStatus {
            disks: self.disks.status(&self.view.state, &shards),
            volumes,
            reactors: shards.iter().map(node::reactor_status).collect(),
            vms: self.machines.running(),
        }
    }

    fn shut_down(mut self) -> Result<(), AgentError> {
        let end = Instant::now() + PATIENCE;
        self.volumes.let_all_go(&self.ground);
        while self.volumes.any() && Instant::now() < end {
            match self.inputs.recv_timeout(TICK) {
                Ok(Input::Plane(
                    event @ (Event::Proposal(..) | Event::Distrusted(_) | Event::DiskFailed { .. }),
                )) => {
                    self.event(event);
                }
                Ok(Input::Decided(index, of, outcome)) => {
                    self.volumes.decided(&self.ground, index, of, outcome);
                }
                // An owner whose proposal was refused meanwhile waits to hear under which generation.
                Ok(Input::Renewed(index, of, outcome)) => {
                    self.volumes.generation_renewed(&self.ground, index, of, outcome);
                }
                Ok(Input::Quiet(index)) => self.volumes.quiet(&self.ground, index),
                _ => {}
            }
        }
        let quiet = !self.volumes.any();
        let closed = quiet && self.disks.close(&self.ground, end);
        let mut majority = false;
        if let Some(runtime) = self.runtime.take() {
            // What was proposed last, so that others need not wait for the lease to end.
            let cluster = Arc::clone(&self.ground.cluster);
            let confirmed =
                runtime.block_on(async move { tokio::time::timeout(LAST, cluster.confirmed_later()).await });
            majority = matches!(confirmed, Ok(Ok(_)));
            runtime.shutdown_timeout(Duration::from_secs(2));
        }
        if closed {
            Ok(())
        } else if !majority {
            // One of the last of a cluster that is stopped as a whole: nobody is left who could let it drop its peers' copies.
            eprintln!(
                "unibody: the other nodes are gone, and the node ends as if it had crashed: nothing is lost"
            );
            Ok(())
        } else {
            // Closing would mark clean what an owner has not made equal: the disks are left as a crash would.
            Err(AgentError::Wrong(
                "the node did not become quiet, and ends as if it had crashed".into(),
            ))
        }
    }
}

/// Everything that happens elsewhere becomes an input.
fn watch(
    cluster: &Arc<Cluster>,
    events: mpsc::Receiver<Event>,
    inputs: &mpsc::Sender<Input>,
) -> std::io::Result<()> {
    let forward = inputs.clone();
    std::thread::Builder::new().name("events".into()).spawn(move || {
        events
            .into_iter()
            .all(|event| forward.send(Input::Plane(event)).is_ok())
    })?;
    let forward = inputs.clone();
    cluster.on_change(move |_| forward.send(Input::Changed).is_ok());
    let (forward, renewing) = (inputs.clone(), Arc::downgrade(cluster));
    std::thread::Builder::new().name("lease".into()).spawn(move || {
        while let Some(cluster) = renewing.upgrade() {
            let begun = Instant::now();
            let renewed = cluster.renew_lease();
            drop(cluster);
            if let Ok(lease) = renewed
                && forward.send(Input::Leased(lease)).is_err()
            {
                return;
            }
            std::thread::sleep(
                RENEW
                    .saturating_sub(begun.elapsed())
                    .max(Duration::from_millis(100)),
            );
        }
    })?;
    Ok(())
}
