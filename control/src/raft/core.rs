//! What runs behind a [`super::Cluster`]: its parts, its start, and its tasks.
//!
//! Four tasks: where the peers are, whether this node leads, becoming and staying a member, and (as leader) the membership.
//! Each lives as long as the runtime. What they decide is pure and elsewhere (`keeper`, `lease`); what others ask of this
//! node is in `answers`, what this node asks of the leader in `proposals`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use openraft::error::Fatal;
use openraft::{ChangeMembers, Config, SnapshotPolicy};
use tokio::sync::{Semaphore, watch};
use unibody_dataplane::wire::handshake::Counts;

use super::cluster::{ClusterError, Options, ProposeError, Status, Timing, View};
use super::keeper::{self, Change, Seen, Sight};
use super::lease::Leases;
use super::machine::Receipt;
use super::net::{Call, Me, Network, Peers, Reply};
use super::store::{Identity, LogStore, MachineStore, Store};
use super::{Contact, Raft};
use crate::state::{Command, FORMAT, Node, NodeId, Refused};

/// Most proposals that this node takes as leader at once.
const PROPOSALS_MAX: usize = 256;
/// Entries by which a node may lag and still become a voter.
const LAG_MAX: u64 = 64;
/// Between two attempts.
pub(super) const PAUSE: Duration = Duration::from_millis(50);
/// Most doors a node knocks at in one round of joining.
const NODES_ASKED: usize = 16;

pub(super) struct Core {
    pub(super) raft: Raft,
    pub(super) peers: Arc<Peers>,
    pub(super) me: Me,
    pub(super) identity: Identity,
    pub(super) options: Options,
    pub(super) views: watch::Receiver<Arc<View>>,
    pub(super) leases: Mutex<Leases>,
    /// Why this node will never be a member, once that is known.
    pub(super) refused: watch::Sender<Option<Arc<ClusterError>>>,
    pub(super) proposals: Semaphore,
    pub(super) inbound: Arc<AtomicUsize>,
    pub(super) handshakes: Counts,
    pub(super) answered: AtomicU64,
    pub(super) unknown: AtomicU64,
}

impl Core {
    pub(super) async fn start(options: Options, store: Store) -> Result<Arc<Self>, ClusterError> {
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
            let ended = metrics.borrow().running_state.clone().err();
            if let Some(error) = ended.filter(|error| !matches!(error, Fatal::Stopped)) {
                // Without it the node would neither learn what was taken from it nor be missed. As after a crash, others
                // take over, and it comes back when it is started anew.
                eprintln!(
                    "unibody: the control state in {} can not go on: {error}; mend that and start the node again",
                    self.options.dir.display()
                );
                std::process::abort();
            }
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
                    let as_it_is = |record: &Node| {
                        record.incarnation == options.incarnation
                            && record.addresses == options.addresses
                            && record.memory == options.memory
                    };
                    if as_it_is(record) {
                        let mut views = self.views.clone();
                        // What a process before this one said may come late, and is said otherwise then.
                        let changed = views.wait_for(|view| !view.state.nodes.get(&me).is_some_and(as_it_is));
                        if changed.await.is_err() {
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
                // It votes until another set of voters is agreed on: without it the others may be too few for that.
                None if !view.state.nodes.is_empty() && self.votes() => {}
                None if was_member => return self.is_refused(ClusterError::Removed),
                // The founder is the first node of every state that has any.
                None if self.identity.seeds.is_empty() && !view.state.nodes.is_empty() => {
                    return self.is_refused(ClusterError::Removed);
                }
                None if self.identity.seeds.is_empty() => {
                    if let Err(ProposeError::Refused(refused)) =
                        self.propose(self.request(), &self.add_me()).await
                    {
                        return self.is_refused(ClusterError::Refused(refused));
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

    /// Whether this node is a voter, as far as it knows.
    fn votes(&self) -> bool {
        let metrics = self.raft.metrics().borrow().clone();
        let membership = metrics.membership_config.membership();
        membership.voter_ids().any(|voter| voter == self.identity.node)
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
            // A change that fails (leadership lost, another under way) is made in a later round if it is still wanted. One
            // who does not lead any more may wait for ever for its fate.
            if let Some(change) = keeper::next(&sight) {
                let limit = self.options.timing.propose;
                tokio::time::timeout(limit, self.change(change)).await.ok();
            }
        }
    }

    async fn change(&self, change: Change) {
        match change {
            Change::AddLearner(node) => {
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
            Change::Voters(voters) => {
                self.raft.change_membership(voters, true).await.ok();
            }
            Change::Forget(node) => {
                let change = ChangeMembers::RemoveNodes(BTreeSet::from([node]));
                self.raft.change_membership(change, false).await.ok();
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

    pub(super) fn status(&self) -> Status {
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
            changing: membership.get_joint_config().len() > 1,
            quorum_ms: metrics.millis_since_quorum_ack,
            stopped: metrics.running_state.err().map(|error| error.to_string()),
            handshakes: self.handshakes.now(),
            proposals: (
                self.answered.load(Ordering::Relaxed),
                self.unknown.load(Ordering::Relaxed),
            ),
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
