//! A node's part in the cluster: start or join, propose, read, watch, hold a lease.
//!
//! It runs on two threads of its own; the methods of [`Cluster`] are for plain threads and wait. Proposals go to the leader
//! from any node. Whoever proposes sees the effect in this node's own state when the answer is there.
//!
//! Invariants: a proposal is refused, or was applied exactly once, or is reported as unknown and may be proposed again with
//! the same [`RequestId`], until it is reported as forgotten; nothing a caller does can block Raft's own messages. Absent: the listening socket (see
//! [`Cluster::accept`]) and every decision about volumes and VMs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;
use unibody_dataplane::wire::handshake::{CountsNow, Handshake, PARAMS, Peer, Purpose, Token};

use super::core::{Core, PAUSE};
use super::lease::Lease;
use super::machine::{Machine, RequestId};
use super::net::{self, Gate};
use super::store::{Identity, Store, StoreError};
use crate::state::{Applied, Command, NodeId, Refused, State};

/// Most connections from other nodes that have not proven themselves yet.
const UNPROVEN_MAX: usize = 64;

/// Times and amounts.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two signs of life of the leader.
    pub heartbeat: Duration,
    /// Least and longest time that a node lets pass before it asks for votes, once the leader has been silent for the longest:
    /// until then nobody votes for another one.
    pub election: (Duration, Duration),
    /// Silence after which a voter gives its place to a learner.
    pub dead_after: Duration,
    /// What a proposal may take before it is reported as unknown.
    pub propose: Duration,
    /// Entries between two snapshots.
    pub snapshot_every: u64,
    /// Entries kept behind a snapshot for nodes that lag a little.
    pub keep_entries: u64,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            heartbeat: Duration::from_millis(300),
            election: (Duration::from_millis(750), Duration::from_millis(1250)),
            dead_after: Duration::from_secs(30),
            propose: Duration::from_secs(15),
            snapshot_every: 2000,
            keep_entries: 500,
        }
    }
}

/// How a node takes part.
#[derive(Clone)]
pub struct Options {
    /// Directory of its store.
    pub dir: PathBuf,
    /// What people call it.
    pub name: String,
    /// Where others reach it, `host:port`, the best first.
    pub addresses: Vec<String>,
    /// Its failure domain.
    pub domain: String,
    /// Bytes of memory for VMs.
    pub memory: u64,
    /// The cluster's secret.
    pub token: Token,
    /// Drawn by the process at its start; the same in all its handshakes.
    pub incarnation: u128,
    /// Times and amounts.
    pub timing: Timing,
    /// For tests.
    pub gate: Option<Gate>,
}

/// What to begin with.
#[derive(Clone, Debug)]
pub enum Start {
    /// A new cluster of this node alone.
    Init,
    /// As a new node, by way of any node that listens at one of these addresses.
    Join(Vec<String>),
    /// As the node that the store is of; if it lost its store, or was stopped before it had one, as a new node by way of
    /// these, if any.
    Resume(Vec<String>),
}

/// Why a node does not take part.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// Its store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is in its store.
    #[error("the node's store can not be read: {0}")]
    Unreadable(String),
    /// The system said no.
    #[error("the cluster's threads could not be started")]
    System(#[from] std::io::Error),
    /// Raft ended or did not start.
    #[error("this node's Raft has stopped: {0}")]
    Raft(String),
    /// Nobody to ask.
    #[error("to join, name the address of at least one node of the cluster")]
    NoSeeds,
    /// The cluster does not want it.
    #[error("the cluster refused this node: {0}")]
    Refused(Refused),
    /// The operator removed it.
    #[error("this node was removed from the cluster: join anew with an empty directory")]
    Removed,
    /// Not yet.
    #[error("this node is not a member yet: {0}")]
    NotYet(String),
}

/// Why there is no answer to a proposal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// A rule forbids it. Nothing was changed.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It may have been applied, or may be yet. The same request may be proposed again.
    #[error("it is not known whether the change was made ({0}): try again, it will not be made twice")]
    Unknown(String),
    /// So much has happened since it was first proposed that nobody remembers whether it was applied. Proposing it again
    /// under the same id is of no use: look at the state, and ask anew.
    #[error(
        "it is too long ago to tell whether the change was made: look at the state, and ask anew if it was not"
    )]
    Forgotten,
    /// Nobody has taken it. Nothing was changed.
    #[error("no leader could be reached ({0}): are most of the voters running?")]
    Unavailable(String),
    /// The command is too long. Nothing was changed.
    #[error("the change takes {0} bytes, more than 16 MiB: make it in smaller steps")]
    TooLong(usize),
    /// Only the leader may, and this node is not.
    #[error("this node does not lead the cluster")]
    NotLeader,
    /// The lease of the node concerned is not surely over. Nothing was changed.
    #[error("the node may hold a lease for another {0:?}")]
    Leased(Duration),
}

/// The applied state as this node has it.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The control state.
    pub state: Arc<State>,
    /// Log index up to which it has everything.
    pub applied: u64,
    /// Requests applied ever.
    pub count: u64,
    /// Raft's members, and where they were when they came.
    pub members: BTreeMap<NodeId, Vec<String>>,
}

impl View {
    pub(super) fn of(machine: &Machine) -> Self {
        let members = machine.membership.nodes();
        View {
            state: Arc::clone(&machine.state),
            applied: machine.applied.map_or(0, |log_id| log_id.index),
            count: machine.count(),
            members: members
                .map(|(node, contact)| (*node, contact.addresses.clone()))
                .collect(),
        }
    }
}

/// How Raft is doing here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// This node.
    pub node: NodeId,
    /// Raft's term.
    pub term: u64,
    /// Who leads, as far as is known here.
    pub leader: Option<NodeId>,
    /// Log index that is applied here.
    pub applied: u64,
    /// Log index of the last entry here.
    pub last: u64,
    /// Log index of the last snapshot here.
    pub snapshot: u64,
    /// Who votes.
    pub voters: BTreeSet<NodeId>,
    /// Who follows without a vote.
    pub learners: BTreeSet<NodeId>,
    /// A change of the voters is under way: for as long, most of the former and most of the next voters are needed.
    pub changing: bool,
    /// Milliseconds since most voters have answered the leader; `None` on others.
    pub quorum_ms: Option<u64>,
    /// Why Raft has stopped here, if it has.
    pub stopped: Option<String>,
    /// Handshakes with nodes that dialed this one.
    pub handshakes: CountsNow,
    /// Proposals that were answered, and that were reported as unknown.
    pub proposals: (u64, u64),
}

/// See the module.
pub struct Cluster {
    core: Arc<Core>,
    runtime: Option<Runtime>,
}

impl Cluster {
    /// Starts this node's part. It is not a member yet when this returns, and must be reachable to become one: connections
    /// to it go to [`Cluster::accept`]. See [`Cluster::wait_member`].
    ///
    /// # Errors
    /// When the store can not be used or Raft does not start.
    pub fn start(options: Options, start: &Start) -> Result<Self, ClusterError> {
        let open = |new| Store::open(&options.dir, new);
        let store = match start {
            Start::Init => open(Some(&[])),
            Start::Join(seeds) if seeds.is_empty() => return Err(ClusterError::NoSeeds),
            Start::Join(seeds) => open(Some(seeds)),
            Start::Resume(seeds) => match open(None) {
                Err(StoreError::Missing(_)) if !seeds.is_empty() => open(Some(seeds)),
                opened => opened,
            },
        }?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(4)
            .thread_name("cluster")
            .enable_all()
            .build()?;
        let core = runtime.block_on(Core::start(options, store))?;
        Ok(Cluster {
            core,
            runtime: Some(runtime),
        })
    }

    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        let runtime = self.runtime.as_ref().expect("it is there until the end");
        runtime.block_on(work)
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("it is there until the end")
    }

    /// Who this node is.
    pub fn identity(&self) -> &Identity {
        &self.core.identity
    }

    /// Waits until this node is part of the cluster and knows it.
    ///
    /// # Errors
    /// When it was refused or removed, or it takes longer.
    pub fn wait_member(&self, limit: Duration) -> Result<(), ClusterError> {
        self.wait(async {
            let mut views = self.core.views.clone();
            let mut refused = self.core.refused.subscribe();
            let member = views.wait_for(|view| view.state.nodes.contains_key(&self.core.identity.node));
            let outcome = tokio::select! {
                _ = member => return Ok(()),
                refused = refused.wait_for(Option::is_some) => refused.ok().and_then(|error| error.clone()),
                () = tokio::time::sleep(limit) => None,
            };
            Err(match outcome.as_deref() {
                Some(ClusterError::Refused(refused)) => ClusterError::Refused(refused.clone()),
                Some(ClusterError::Removed) => ClusterError::Removed,
                Some(other) => ClusterError::NotYet(other.to_string()),
                None => ClusterError::NotYet("nobody has let it in so far".into()),
            })
        })
    }

    /// Whether this node was removed from the cluster.
    pub fn is_removed(&self) -> bool {
        matches!(self.core.refused.borrow().as_deref(), Some(ClusterError::Removed))
    }

    /// Takes over a connection for [`Purpose::Control`] whose handshake is done.
    pub fn accept(&self, stream: TcpStream, peer: Peer) {
        let core = Arc::clone(&self.core);
        self.runtime().spawn(async move {
            let ready = stream.set_nonblocking(true).and_then(|()| {
                stream.set_nodelay(true)?;
                tokio::net::TcpStream::from_std(stream)
            });
            if let Ok(stream) = ready {
                core.serve(stream, peer).await;
            }
        });
    }

    /// Listens for nodes that have something to say to the control plane, where the node has no listener for all purposes.
    ///
    /// # Errors
    /// When the listener can not be used.
    pub fn listen(&self, listener: TcpListener) -> std::io::Result<()> {
        listener.set_nonblocking(true)?;
        let _inside = self.runtime().enter();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let core = Arc::clone(&self.core);
        self.runtime().spawn(async move {
            let unproven = Arc::new(Semaphore::new(UNPROVEN_MAX));
            loop {
                let Ok(permit) = Arc::clone(&unproven).acquire_owned().await else {
                    return;
                };
                let Ok((mut stream, _)) = listener.accept().await else {
                    // Out of descriptors, most likely: connections will end.
                    tokio::time::sleep(PAUSE).await;
                    continue;
                };
                let core = Arc::clone(&core);
                tokio::spawn(async move {
                    let handshake = Handshake::listen(core.me.local(), &[(Purpose::Control, [0; PARAMS])]);
                    let shaken = net::shake(&mut stream, handshake).await;
                    core.handshakes.count(&shaken);
                    drop(permit);
                    if let Ok(peer) = shaken {
                        core.serve(stream, peer).await;
                    }
                });
            }
        });
        Ok(())
    }

    /// A new request. It can be proposed until it has an answer, as often as needed.
    pub fn request(&self) -> RequestId {
        self.core.request()
    }

    /// Proposes a change, by way of the leader.
    ///
    /// # Errors
    /// See [`ProposeError`]: nothing was changed, or it is not known.
    pub fn propose(&self, request: RequestId, command: &Command) -> Result<Applied, ProposeError> {
        self.wait(self.core.propose(request, command))
    }

    /// The same for whoever is asynchronous already.
    pub fn propose_later(
        &self,
        request: RequestId,
        command: Command,
    ) -> impl Future<Output = Result<Applied, ProposeError>> + Send + 'static {
        let core = Arc::clone(&self.core);
        async move { core.propose(request, &command).await }
    }

    /// Proposes, as the leader, what may be done only because the lease of `node` is over: revoking its volumes, placing its
    /// VMs elsewhere.
    ///
    /// # Errors
    /// When this node does not lead, the lease is not surely over, or a rule forbids it.
    pub fn take_from(&self, node: NodeId, command: &Command) -> Result<Applied, ProposeError> {
        self.wait(self.core.take_from(node, command))
    }

    /// The applied state as this node has it. It may lag behind the leader's.
    pub fn view(&self) -> Arc<View> {
        self.core.views.borrow().clone()
    }

    /// Waits until something beyond `applied` is applied here.
    pub fn wait_beyond(&self, applied: u64, limit: Duration) -> Option<Arc<View>> {
        self.wait(async {
            let mut views = self.core.views.clone();
            let beyond = views.wait_for(|view| view.applied > applied);
            let found = tokio::time::timeout(limit, beyond).await.ok()?.ok()?;
            Some(found.clone())
        })
    }

    /// Calls `notice` with the state after each change of it that this node applies, until it answers `false`. Several changes
    /// may be one call. It must not block: it may send to a channel.
    pub fn on_change(&self, mut notice: impl FnMut(&Arc<View>) -> bool + Send + 'static) {
        let mut views = self.core.views.clone();
        self.runtime().spawn(async move {
            while views.changed().await.is_ok() {
                let view = views.borrow_and_update().clone();
                if !notice(&view) {
                    return;
                }
            }
        });
    }

    /// The applied state, once it shows everything that was committed when this was called.
    ///
    /// # Errors
    /// When no leader confirms it.
    pub fn confirmed(&self) -> Result<Arc<View>, ProposeError> {
        self.wait(self.confirmed_later())
    }

    /// The same for whoever is asynchronous already.
    pub fn confirmed_later(&self) -> impl Future<Output = Result<Arc<View>, ProposeError>> + Send + 'static {
        let core = Arc::clone(&self.core);
        async move {
            let index = core.read_index().await?;
            core.applied(index).await
        }
    }

    /// The applied state and its changes.
    pub fn views(&self) -> tokio::sync::watch::Receiver<Arc<View>> {
        self.core.views.clone()
    }

    /// Renews this node's lease.
    ///
    /// # Errors
    /// When no leader grants it; the lease it had goes on until its end.
    pub fn renew_lease(&self) -> Result<Lease, ProposeError> {
        self.wait(self.core.renew_lease())
    }

    /// On the leader: how long until a node's lease is surely over.
    ///
    /// # Errors
    /// When this node does not lead.
    pub fn lease_left(&self, node: NodeId) -> Result<Duration, ProposeError> {
        self.core.observe();
        let leases = self.core.leases();
        leases
            .left(node, Instant::now())
            .map_err(|()| ProposeError::NotLeader)
    }

    /// Whether this node leads, as far as it knows.
    pub fn is_leader(&self) -> bool {
        self.core.term_led().is_some()
    }

    /// When a node last answered this one.
    pub fn heard(&self, node: NodeId) -> Option<Instant> {
        self.core.peers.heard(node)
    }

    /// How Raft is doing.
    pub fn status(&self) -> Status {
        self.core.status()
    }

    /// Ends this node's part in good order.
    pub fn stop(mut self) {
        // It ends all the same if Raft has stopped before.
        let _ = self.wait(self.core.raft.shutdown());
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
