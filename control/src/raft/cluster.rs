//! A node's part in the cluster: start or join, propose, read, watch, hold a lease.
//!
//! It runs on two threads of its own; the methods of [`Cluster`] are for plain threads and wait. Proposals go to the leader
//! from any node. Whoever proposes sees the effect in this node's own state when the answer is there.
//!
//! Invariants: a proposal is refused, or was applied exactly once, or is reported as unknown and may be proposed again with
//! the same [`RequestId`]; nothing a caller does can block Raft's own messages. Absent: the listening socket (see
//! [`Cluster::accept`]) and every decision about volumes and VMs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use openraft::error::{ClientWriteError, RaftError};
use openraft::{ChangeMembers, Config, ServerState, SnapshotPolicy};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, watch};
use unibody_dataplane::wire::handshake::{Counts, CountsNow, Handshake, PARAMS, Peer, Purpose, Token};

use super::frame::{End, Link};
use super::keeper::{self, Change, Seen, Sight};
use super::lease::{LEASE, Lease, Leases};
use super::machine::{Machine, Receipt, Request, RequestId};
use super::net::{self, Call, CallError, Gate, Me, Network, Peers, Reply};
use super::store::{Identity, LogStore, MachineStore, Store, StoreError};
use super::{Contact, Raft, Types};
use crate::envelope::Unreadable;
use crate::state::{Applied, Command, FORMAT, NodeId, Refused, State};

/// Longest command, bytes of JSON.
const COMMAND_MAX: usize = 16 << 20;
/// Most connections from other nodes at once.
const INBOUND_MAX: usize = 1024;
/// Most of them that have not proven themselves yet.
const UNPROVEN_MAX: usize = 64;
/// Most proposals that this node takes as leader at once.
const PROPOSALS_MAX: usize = 256;
/// Entries by which a node may lag and still become a voter.
const LAG_MAX: u64 = 64;
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(50);

/// Times and amounts.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two signs of life of the leader.
    pub heartbeat: Duration,
    /// Least and longest silence of the leader before an election.
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
            election: (Duration::from_millis(1500), Duration::from_millis(3000)),
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
    /// As the node that the store is of.
    Resume,
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

struct Core {
    raft: Raft,
    peers: Arc<Peers>,
    me: Me,
    identity: Identity,
    options: Options,
    views: watch::Receiver<Arc<View>>,
    leases: Mutex<Leases>,
    /// Why this node will never be a member, once that is known.
    refused: watch::Sender<Option<Arc<ClusterError>>>,
    proposals: Semaphore,
    inbound: Arc<AtomicUsize>,
    handshakes: Counts,
    answered: AtomicU64,
    unknown: AtomicU64,
}

/// What became of a proposal at the leader.
enum Written {
    Receipt(u64, Receipt),
    NotLeader(Option<NodeId>),
    Busy(String),
    Unknown(String),
}

impl Cluster {
    /// Starts this node's part. It is not a member yet when this returns, and must be reachable to become one: connections
    /// to it go to [`Cluster::accept`]. See [`Cluster::wait_member`].
    ///
    /// # Errors
    /// When the store can not be used or Raft does not start.
    pub fn start(options: Options, start: &Start) -> Result<Self, ClusterError> {
        let seeds = match start {
            Start::Init => Some(&[][..]),
            Start::Join(seeds) => Some(&seeds[..]),
            Start::Resume => None,
        };
        let store = Store::open(&options.dir, seeds)?;
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
        self.wait(async {
            let index = self.core.read_index().await?;
            self.core.applied(index).await
        })
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

impl Core {
    async fn start(options: Options, store: Store) -> Result<Arc<Self>, ClusterError> {
        let machine = store
            .machine()
            .map_err(|trouble| ClusterError::Unreadable(trouble.to_string()))?;
        let identity = store.identity.clone();
        let me = Me {
            node: identity.node,
            incarnation: options.incarnation,
            token: options.token.clone(),
        };
        let peers = Arc::new(Peers::new(me.clone(), options.gate.clone()));
        let (sender, views) = watch::channel(Arc::new(View::of(&machine)));
        let raft = Raft::new(
            identity.node,
            Arc::new(config(&options.timing)?),
            Network(Arc::clone(&peers)),
            LogStore(store.clone()),
            MachineStore::new(store, machine, sender),
        )
        .await
        .map_err(|error| ClusterError::Raft(error.to_string()))?;
        let core = Arc::new(Core {
            raft,
            peers,
            me,
            identity,
            options,
            views,
            leases: Mutex::default(),
            refused: watch::Sender::new(None),
            proposals: Semaphore::new(PROPOSALS_MAX),
            inbound: Arc::default(),
            handshakes: Counts::default(),
            answered: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
        });
        if core.identity.seeds.is_empty() {
            let initialized = core.raft.is_initialized().await;
            if !initialized.map_err(|error| ClusterError::Raft(error.to_string()))? {
                let contact = Contact {
                    addresses: core.options.addresses.clone(),
                };
                let members = BTreeMap::from([(core.identity.node, contact)]);
                let begun = core.raft.initialize(members).await;
                begun.map_err(|error| ClusterError::Raft(error.to_string()))?;
            }
        }
        tokio::spawn(Arc::clone(&core).keep_book());
        tokio::spawn(Arc::clone(&core).observe_always());
        tokio::spawn(Arc::clone(&core).keep_members());
        tokio::spawn(Arc::clone(&core).announce());
        Ok(core)
    }

    // Tasks.

    /// Peers are where the state says, and where the membership says if that is all there is.
    async fn keep_book(self: Arc<Self>) {
        let mut views = self.views.clone();
        loop {
            let view = views.borrow_and_update().clone();
            let mut nodes = view.members.clone();
            let known = view.state.nodes.iter();
            nodes.extend(known.map(|(node, record)| (*node, record.addresses.clone())));
            nodes.remove(&self.identity.node);
            self.peers.know(nodes);
            if views.changed().await.is_err() {
                return;
            }
        }
    }

    async fn observe_always(self: Arc<Self>) {
        let mut metrics = self.raft.metrics();
        while metrics.changed().await.is_ok() {
            self.observe();
        }
    }

    /// Becomes a member, and says where this node is and that its process is a new one.
    async fn announce(self: Arc<Self>) {
        let me = self.identity.node;
        let mut was_member = false;
        loop {
            let view = self.views.borrow().clone();
            match view.state.nodes.get(&me) {
                Some(record) => {
                    was_member = true;
                    let options = &self.options;
                    if record.incarnation == options.incarnation
                        && record.addresses == options.addresses
                        && record.memory == options.memory
                    {
                        let mut views = self.views.clone();
                        let gone = views.wait_for(|view| !view.state.nodes.contains_key(&me));
                        if gone.await.is_err() {
                            return;
                        }
                        continue;
                    }
                    let command = Command::NodeUp {
                        node: me,
                        addresses: options.addresses.clone(),
                        memory: options.memory,
                        incarnation: options.incarnation,
                    };
                    // Whatever went wrong, the next round tries again; `NoNode` shows in the view or not at all.
                    if let Err(ProposeError::Refused(Refused::NoNode(_))) =
                        self.propose(self.request(), &command).await
                    {
                        return self.is_refused(ClusterError::Removed);
                    }
                }
                None if was_member => return self.is_refused(ClusterError::Removed),
                None if self.identity.seeds.is_empty() => {
                    match self.propose(self.request(), &self.add_me()).await {
                        Err(ProposeError::Refused(refused)) => {
                            return self.is_refused(ClusterError::Refused(refused));
                        }
                        Err(_) | Ok(_) => {}
                    }
                }
                // Let in before; the log that says so comes.
                None if view.applied > 0 => {}
                None => match self.join().await {
                    Ok(()) => {
                        let mut views = self.views.clone();
                        let member = views.wait_for(|view| view.state.nodes.contains_key(&me));
                        // If it does not come, we ask again.
                        let _ = tokio::time::timeout(self.options.timing.propose, member).await;
                    }
                    Err(Some(refused)) => return self.is_refused(ClusterError::Refused(refused)),
                    Err(None) => {}
                },
            }
            tokio::time::sleep(PAUSE * 4).await;
        }
    }

    fn is_refused(&self, error: ClusterError) {
        self.refused.send_replace(Some(Arc::new(error)));
    }

    fn add_me(&self) -> Command {
        Command::AddNode {
            node: self.identity.node,
            store: self.identity.store,
            name: self.options.name.clone(),
            addresses: self.options.addresses.clone(),
            domain: self.options.domain.clone(),
            memory: self.options.memory,
            incarnation: self.options.incarnation,
        }
    }

    /// Asks to be let in.
    async fn join(&self) -> Result<(), Option<Refused>> {
        let mut doors: Vec<String> = self.identity.seeds.clone();
        let mut tried = 0;
        while tried < doors.len() && tried < 2 * NODES_ASKED {
            let call = Call::Join {
                format: FORMAT,
                command: self.add_me(),
            };
            let limit = self.options.timing.propose;
            let reply = self.peers.call_address(&doors[tried], &call, limit).await;
            tried += 1;
            match reply {
                Ok(Reply::Receipt {
                    receipt: Receipt::Refused(refused),
                    ..
                }) => return Err(Some(refused)),
                Ok(Reply::Receipt { .. }) => return Ok(()),
                Ok(Reply::NotLeader { addresses, .. }) => doors.extend(addresses),
                _ => {}
            }
        }
        Err(None)
    }

    /// The leader's upkeep of the membership.
    async fn keep_members(self: Arc<Self>) {
        let mut leading: Option<(u64, Instant)> = None;
        loop {
            tokio::time::sleep(self.options.timing.heartbeat).await;
            let term = self.term_led();
            if leading.map(|(term, _)| term) != term {
                leading = term.map(|term| (term, Instant::now()));
            }
            let Some((_, since)) = leading else { continue };
            let sight = self.sight(since);
            // A change that fails (leadership lost, another under way) is made in a later round if it is still wanted.
            match keeper::next(&sight) {
                None => {}
                Some(Change::AddLearner(node)) => {
                    let addresses = self
                        .view()
                        .state
                        .nodes
                        .get(&node)
                        .map(|node| node.addresses.clone());
                    if let Some(addresses) = addresses {
                        self.raft
                            .add_learner(node, Contact { addresses }, false)
                            .await
                            .ok();
                    }
                }
                Some(Change::Voters(voters)) => {
                    self.raft.change_membership(voters, true).await.ok();
                }
                Some(Change::Forget(node)) => {
                    let change = ChangeMembers::RemoveNodes(BTreeSet::from([node]));
                    self.raft.change_membership(change, false).await.ok();
                }
            }
        }
    }

    fn sight(&self, since: Instant) -> Sight {
        let metrics = self.raft.metrics().borrow().clone();
        let membership = metrics.membership_config.membership();
        let last = metrics.last_log_index.unwrap_or(0);
        let dead_after = self.options.timing.dead_after;
        let seen = |node: &NodeId| {
            let itself = *node == self.identity.node;
            let heard = self.peers.heard(*node);
            let silent = heard.map_or(since, |heard| heard.max(since)).elapsed();
            let replication = metrics.replication.as_ref();
            let matched = replication.and_then(|all| all.get(node).copied().flatten());
            Seen {
                domain: String::new(),
                heard: itself || (heard.is_some() && silent < dead_after / 3),
                dead: !itself && silent >= dead_after,
                caught_up: itself || matched.is_some_and(|log_id| log_id.index + LAG_MAX >= last),
            }
        };
        let view = self.view();
        Sight {
            leader: self.identity.node,
            nodes: view
                .state
                .nodes
                .iter()
                .map(|(node, record)| {
                    let domain = record.domain.clone();
                    (*node, Seen { domain, ..seen(node) })
                })
                .collect(),
            voters: membership.voter_ids().collect(),
            learners: membership.learner_ids().collect(),
        }
    }

    // Proposals.

    fn view(&self) -> Arc<View> {
        self.views.borrow().clone()
    }

    fn request(&self) -> RequestId {
        RequestId {
            id: super::random(),
            since: self.view().count,
        }
    }

    fn leader(&self) -> Option<NodeId> {
        self.raft.metrics().borrow().current_leader
    }

    async fn propose(&self, id: RequestId, command: &Command) -> Result<Applied, ProposeError> {
        let request = Request {
            request: id,
            term: None,
            command: command.clone(),
        };
        let bytes = serde_json::to_vec(&request).map_or(usize::MAX, |bytes| bytes.len());
        if bytes > COMMAND_MAX {
            return Err(ProposeError::TooLong(bytes));
        }
        let answer = self.propose_until(request).await;
        let counter = match &answer {
            Err(ProposeError::Unknown(_)) => &self.unknown,
            _ => &self.answered,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        answer
    }

    async fn propose_until(&self, request: Request) -> Result<Applied, ProposeError> {
        let deadline = Instant::now() + self.options.timing.propose;
        let (mut maybe, mut why) = (false, String::from("nobody leads"));
        let mut hint = None;
        let mut round = 0;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(match maybe {
                    true => ProposeError::Unknown(why),
                    false => ProposeError::Unavailable(why),
                });
            }
            let written = match hint
                .take()
                .or_else(|| self.leader())
                .or_else(|| self.anyone(round))
            {
                None => Written::Busy("nobody leads".into()),
                Some(leader) if leader == self.identity.node => {
                    match tokio::time::timeout(left, self.write(request.clone())).await {
                        Ok(written) => written,
                        Err(_) => Written::Unknown("not committed in time".into()),
                    }
                }
                Some(leader) => self.ask(leader, &request, left).await,
            };
            round += 1;
            match written {
                Written::Receipt(_, Receipt::Expired) => {
                    return Err(match maybe {
                        true => ProposeError::Unknown("it is too old to tell".into()),
                        false => ProposeError::Unavailable("this node's state is too old".into()),
                    });
                }
                Written::Receipt(index, receipt) => {
                    let view = self.applied(index).await?;
                    return Ok(receipt.open(&request.command, &view.state)?);
                }
                // Once: whoever was named may not lead any more.
                Written::NotLeader(leader) => hint = leader.filter(|_| round % 2 == 1),
                Written::Busy(text) => why = text,
                Written::Unknown(text) => (maybe, why) = (true, text),
            }
            tokio::time::sleep(PAUSE.min(left)).await;
        }
    }

    /// Where nobody is known to lead, each peer in turn may know more.
    fn anyone(&self, round: usize) -> Option<NodeId> {
        let all = self.peers.all();
        (!all.is_empty()).then(|| all[round % all.len()])
    }

    async fn ask(&self, leader: NodeId, request: &Request, left: Duration) -> Written {
        let call = Call::Propose {
            format: FORMAT,
            request: request.clone(),
        };
        match self.peers.call(leader, &call, &[], left).await {
            Ok(Reply::Receipt { index, receipt }) => Written::Receipt(index, receipt),
            Ok(Reply::NotLeader { leader, .. }) => Written::NotLeader(leader),
            Ok(Reply::Busy(why)) => Written::Busy(why),
            Ok(Reply::Unknown(why)) => Written::Unknown(why),
            Ok(_) => Written::Unknown("a reply to another call".into()),
            Err(error @ CallError::Unreached(..)) => Written::Busy(error.to_string()),
            Err(error) => Written::Unknown(error.to_string()),
        }
    }

    /// Proposes to this node's own Raft.
    async fn write(&self, request: Request) -> Written {
        if self.term_led().is_none() {
            return Written::NotLeader(self.leader());
        }
        let Ok(_permit) = self.proposals.try_acquire() else {
            return Written::Busy("the leader has too many proposals at once".into());
        };
        match self.raft.client_write(request).await {
            Ok(done) => Written::Receipt(done.log_id.index, done.data),
            // It may have been in the log already when leadership was lost.
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
                Written::Unknown("leadership changed".into())
            }
            Err(error) => Written::Unknown(error.to_string()),
        }
    }

    /// The state here, once it shows everything up to `index`.
    async fn applied(&self, index: u64) -> Result<Arc<View>, ProposeError> {
        let mut views = self.views.clone();
        let there = views.wait_for(|view| view.applied >= index);
        match tokio::time::timeout(self.options.timing.propose, there).await {
            Ok(Ok(view)) => Ok(view.clone()),
            _ => Err(ProposeError::Unknown(
                "this node has not heard of its own change".into(),
            )),
        }
    }

    // Leadership, reads, leases.

    /// The term in which this node leads, as far as it knows.
    fn term_led(&self) -> Option<u64> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let leads = metrics.state == ServerState::Leader && metrics.current_leader == Some(metrics.id);
        leads.then_some(metrics.current_term)
    }

    fn leases(&self) -> std::sync::MutexGuard<'_, Leases> {
        // Whoever panicked holding it left a whole entry.
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn observe(&self) {
        let term = self.term_led();
        self.leases().leads(term, Instant::now());
    }

    /// As leader: how far a state must have got to show everything committed by now.
    async fn read_here(&self) -> Result<u64, ProposeError> {
        let confirm = self.raft.ensure_linearizable();
        match tokio::time::timeout(self.options.timing.propose, confirm).await {
            Ok(Ok(log_id)) => Ok(log_id.map_or(0, |log_id| log_id.index)),
            Ok(Err(RaftError::APIError(_))) => Err(ProposeError::NotLeader),
            Ok(Err(error)) => Err(ProposeError::Unavailable(error.to_string())),
            Err(_) => Err(ProposeError::Unavailable("the voters do not answer".into())),
        }
    }

    async fn read_index(&self) -> Result<u64, ProposeError> {
        let mut why = ProposeError::Unavailable("nobody leads".into());
        let deadline = Instant::now() + self.options.timing.propose;
        while Instant::now() < deadline {
            let reply = match self.leader() {
                None => None,
                Some(leader) if leader == self.identity.node => match self.read_here().await {
                    Ok(index) => return Ok(index),
                    Err(error) => {
                        why = error;
                        None
                    }
                },
                Some(leader) => {
                    let limit = self.options.timing.propose;
                    self.peers.call(leader, &Call::Read, &[], limit).await.ok()
                }
            };
            if let Some(Reply::Index(index)) = reply {
                return Ok(index);
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(why)
    }

    async fn renew_lease(&self) -> Result<Lease, ProposeError> {
        let asked = Instant::now();
        let incarnation = self.me.incarnation;
        let index = match self.leader() {
            None => Err(ProposeError::Unavailable("nobody leads".into())),
            Some(leader) if leader == self.identity.node => self.grant(self.identity.node, incarnation).await,
            Some(leader) => match self
                .peers
                .call(leader, &Call::Lease { incarnation }, &[], LEASE / 3)
                .await
            {
                Ok(Reply::Index(index)) => Ok(index),
                Ok(Reply::Busy(why) | Reply::Unknown(why)) => Err(ProposeError::Unavailable(why)),
                Ok(_) => Err(ProposeError::Unavailable("the leader has changed".into())),
                Err(error) => Err(ProposeError::Unavailable(error.to_string())),
            },
        }?;
        // Whatever was taken from this node before the lease was granted must be known here before it counts.
        self.applied(index).await?;
        Ok(Lease { until: asked + LEASE })
    }

    /// As leader: grants a lease to a node, which counts once its state has got to the index returned.
    async fn grant(&self, node: NodeId, incarnation: u128) -> Result<u64, ProposeError> {
        let term = self.term_led().ok_or(ProposeError::NotLeader)?;
        let index = self.read_here().await?;
        let view = self.applied(index).await?;
        if view.state.nodes.get(&node).map(|node| node.incarnation) != Some(incarnation) {
            return Err(ProposeError::Unavailable(
                "the cluster does not know this process yet".into(),
            ));
        }
        self.observe();
        match self.leases().grant(node, term, Instant::now()) {
            true => Ok(index),
            false => Err(ProposeError::Unavailable(
                "something is being taken from the node".into(),
            )),
        }
    }

    async fn take_from(&self, node: NodeId, command: &Command) -> Result<Applied, ProposeError> {
        self.observe();
        let term = self.term_led().ok_or(ProposeError::NotLeader)?;
        let barred = self.leases().bar(node, Instant::now());
        barred.map_err(|left| left.map_or(ProposeError::NotLeader, ProposeError::Leased))?;
        let request = Request {
            request: self.request(),
            term: Some(term),
            command: command.clone(),
        };
        match self.write(request).await {
            Written::Receipt(_, Receipt::Expired) => {
                self.leases().unbar(node);
                Err(ProposeError::NotLeader)
            }
            Written::Receipt(index, receipt) => {
                // Before it may have leases again: what was taken is committed, so that they are granted beyond it.
                self.leases().unbar(node);
                let view = self.applied(index).await?;
                Ok(receipt.open(command, &view.state)?)
            }
            // Nothing was proposed.
            Written::Busy(why) => {
                self.leases().unbar(node);
                Err(ProposeError::Unavailable(why))
            }
            Written::NotLeader(_) => Err(ProposeError::NotLeader),
            // It stays barred as long as this node leads in this term.
            Written::Unknown(why) => Err(ProposeError::Unknown(why)),
        }
    }

    // Others.

    async fn serve(self: Arc<Self>, stream: tokio::net::TcpStream, peer: Peer) {
        if self.inbound.fetch_add(1, Ordering::Relaxed) < INBOUND_MAX {
            let link = Link::new(stream, peer.key, End::Listener);
            // However it ended, the peer dials again if it has anything to say.
            let _ = net::serve(link, peer.node.into(), Arc::clone(&self)).await;
        }
        self.inbound.fetch_sub(1, Ordering::Relaxed);
    }

    fn status(&self) -> Status {
        let metrics = self.raft.metrics().borrow().clone();
        let membership = metrics.membership_config.membership();
        Status {
            node: self.identity.node,
            term: metrics.current_term,
            leader: metrics.current_leader,
            applied: self.view().applied,
            last: metrics.last_log_index.unwrap_or(0),
            snapshot: metrics.snapshot.map_or(0, |log_id| log_id.index),
            voters: membership.voter_ids().collect(),
            learners: membership.learner_ids().collect(),
            quorum_ms: metrics.millis_since_quorum_ack,
            stopped: metrics.running_state.err().map(|error| error.to_string()),
            handshakes: self.handshakes.now(),
            proposals: (
                self.answered.load(Ordering::Relaxed),
                self.unknown.load(Ordering::Relaxed),
            ),
        }
    }

    async fn proposed(&self, request: Request) -> Reply {
        match self.write(request).await {
            Written::Receipt(index, receipt) => Reply::Receipt { index, receipt },
            Written::NotLeader(leader) => Reply::NotLeader {
                leader,
                addresses: leader.map_or_else(Vec::new, |leader| self.peers.addresses(leader)),
            },
            Written::Busy(why) => Reply::Busy(why),
            Written::Unknown(why) => Reply::Unknown(why),
        }
    }
}

/// Most doors a node knocks at in one round of joining.
const NODES_ASKED: usize = 16;

fn newer(format: u32) -> Option<Reply> {
    (format > FORMAT).then(|| Reply::Busy(Unreadable::Newer(format).to_string()))
}

impl net::Serve for Core {
    async fn serve(&self, from: NodeId, call: Call, tail: Vec<u8>) -> Reply {
        let foreign = || Reply::Busy("it was sent in another node's name".into());
        let unknown = |error: &dyn std::fmt::Display| Reply::Unknown(error.to_string());
        match call {
            Call::Append { format, rpc } => match newer(format) {
                Some(reply) => reply,
                None if rpc.vote.leader_id.node_id != from => foreign(),
                None => match self.raft.append_entries(rpc).await {
                    Ok(response) => Reply::Append(response),
                    Err(error) => unknown(&error),
                },
            },
            Call::Vote(rpc) if rpc.vote.leader_id.node_id != from => foreign(),
            Call::Vote(rpc) => match self.raft.vote(rpc).await {
                Ok(response) => Reply::Vote(response),
                Err(error) => unknown(&error),
            },
            Call::Snapshot { vote, .. } if vote.leader_id.node_id != from => foreign(),
            Call::Snapshot { vote, meta, .. } => {
                // Raft stops for good at a snapshot that can not be installed: look first.
                let looked = tokio::task::spawn_blocking(move || (Machine::decode(&tail).err(), tail)).await;
                match looked {
                    Ok((None, tail)) => {
                        let snapshot = Box::new(tail);
                        let snapshot = openraft::Snapshot::<Types> { meta, snapshot };
                        match self.raft.install_full_snapshot(vote, snapshot).await {
                            Ok(response) => Reply::Snapshot { vote: response.vote },
                            Err(error) => unknown(&error),
                        }
                    }
                    Ok((Some(why), _)) => Reply::Busy(why.to_string()),
                    Err(error) => unknown(&error),
                }
            }
            Call::Propose { format, request } => match newer(format) {
                Some(reply) => reply,
                None => self.proposed(request).await,
            },
            Call::Join { format, command } => match newer(format) {
                Some(reply) => reply,
                None => match &command {
                    Command::AddNode { node, .. } if *node == from => {
                        let request = Request {
                            request: self.request(),
                            term: None,
                            command,
                        };
                        self.proposed(request).await
                    }
                    _ => foreign(),
                },
            },
            Call::Lease { incarnation } => match self.grant(from, incarnation).await {
                Ok(index) => Reply::Index(index),
                Err(error) => Reply::Busy(error.to_string()),
            },
            Call::Read => match self.term_led() {
                Some(_) => match self.read_here().await {
                    Ok(index) => Reply::Index(index),
                    Err(error) => Reply::Busy(error.to_string()),
                },
                None => Reply::NotLeader {
                    leader: self.leader(),
                    addresses: Vec::new(),
                },
            },
        }
    }
}

fn config(timing: &Timing) -> Result<Config, ClusterError> {
    let ms = |time: Duration| time.as_millis() as u64;
    let config = Config {
        cluster_name: "unibody".into(),
        heartbeat_interval: ms(timing.heartbeat),
        election_timeout_min: ms(timing.election.0),
        election_timeout_max: ms(timing.election.1),
        install_snapshot_timeout: 60_000,
        max_payload_entries: 256,
        replication_lag_threshold: timing.snapshot_every * 2,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(timing.snapshot_every),
        max_in_snapshot_log_to_keep: timing.keep_entries,
        ..Config::default()
    };
    config
        .validate()
        .map_err(|error| ClusterError::Raft(error.to_string()))
}
