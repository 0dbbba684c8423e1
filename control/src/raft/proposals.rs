//! What this node asks of the leader, which may be itself: proposals, confirmed reads, leases.
//!
//! Invariant: an answer other than [`ProposeError::Unknown`] is certain. An attempt that may have reached a log is never
//! followed by a claim that nothing was changed.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use openraft::ServerState;
use openraft::error::{ClientWriteError, RaftError};

use super::cluster::{ProposeError, View};
use super::core::{Core, PAUSE};
use super::lease::{LEASE, Lease, Leases};
use super::machine::{Receipt, Request, RequestId};
use super::net::{Call, CallError, Reply};
use crate::state::{Applied, Command, FORMAT, NodeId};

/// Longest command, bytes of JSON.
const COMMAND_MAX: usize = 16 << 20;

/// What became of a proposal at the leader.
pub(super) enum Written {
    Receipt(u64, Receipt),
    NotLeader(Option<NodeId>),
    Busy(String),
    Unknown(String),
}

impl Core {
    pub(super) fn view(&self) -> Arc<View> {
        self.views.borrow().clone()
    }

    pub(super) fn request(&self) -> RequestId {
        RequestId {
            id: super::random(),
            since: self.view().count,
        }
    }

    pub(super) fn leader(&self) -> Option<NodeId> {
        self.raft.metrics().borrow().current_leader
    }

    pub(super) async fn propose(&self, id: RequestId, command: &Command) -> Result<Applied, ProposeError> {
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

    pub(super) async fn propose_until(&self, request: Request) -> Result<Applied, ProposeError> {
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
                Some(leader) => {
                    let asked = self.unless_led_by_another(self.ask(leader, &request, left));
                    asked
                        .await
                        .unwrap_or_else(|| Written::Unknown("the leader has changed".into()))
                }
            };
            round += 1;
            match written {
                Written::Receipt(_, Receipt::Expired) => return Err(ProposeError::Forgotten),
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

    /// What a call to the leader answers; nothing if this node hears meanwhile of another leader, or of none: one that lost its
    /// power does not say so, and whoever waited for it would wait to the end.
    async fn unless_led_by_another<T>(&self, call: impl Future<Output = T>) -> Option<T> {
        let mut metrics = self.raft.metrics();
        let before = metrics.borrow().current_leader;
        tokio::select! {
            biased;
            answer = call => Some(answer),
            _ = metrics.wait_for(|now| now.current_leader != before) => None,
        }
    }

    /// Where nobody is known to lead, each peer in turn may know more.
    pub(super) fn anyone(&self, round: usize) -> Option<NodeId> {
        let all = self.peers.all();
        (!all.is_empty()).then(|| all[round % all.len()])
    }

    pub(super) async fn ask(&self, leader: NodeId, request: &Request, left: Duration) -> Written {
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
    pub(super) async fn write(&self, request: Request) -> Written {
        let Some(term) = self.term_led() else {
            return Written::NotLeader(self.leader());
        };
        let Ok(_permit) = self.proposals.try_acquire() else {
            return Written::Busy("the leader has too many proposals at once".into());
        };
        // One who does not lead any more may wait for ever for the fate of its entries: the new leader may not reach it.
        let mut metrics = self.raft.metrics();
        let lost = metrics.wait_for(|now| now.current_term != term || now.state != ServerState::Leader);
        let written = tokio::select! {
            biased;
            written = self.raft.client_write(request) => written,
            _ = lost => return Written::Unknown("leadership changed".into()),
        };
        match written {
            Ok(done) => Written::Receipt(done.log_id.index, done.data),
            // It may have been in the log already when leadership was lost.
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
                Written::Unknown("leadership changed".into())
            }
            Err(error) => Written::Unknown(error.to_string()),
        }
    }

    /// The state here, once it shows everything up to `index`.
    pub(super) async fn applied(&self, index: u64) -> Result<Arc<View>, ProposeError> {
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
    pub(super) fn term_led(&self) -> Option<u64> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let leads = metrics.state == ServerState::Leader && metrics.current_leader == Some(metrics.id);
        leads.then_some(metrics.current_term)
    }

    pub(super) fn leases(&self) -> std::sync::MutexGuard<'_, Leases> {
        // Whoever panicked holding it left a whole entry.
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn observe(&self) {
        let term = self.term_led();
        self.leases().leads(term, Instant::now());
    }

    /// As leader: how far a state must have got to show everything committed by now.
    pub(super) async fn read_here(&self) -> Result<u64, ProposeError> {
        let confirm = self.raft.ensure_linearizable();
        match tokio::time::timeout(self.options.timing.propose, confirm).await {
            Ok(Ok(log_id)) => Ok(log_id.map_or(0, |log_id| log_id.index)),
            Ok(Err(RaftError::APIError(_))) => Err(ProposeError::NotLeader),
            Ok(Err(error)) => Err(ProposeError::Unavailable(error.to_string())),
            Err(_) => Err(ProposeError::Unavailable("the voters do not answer".into())),
        }
    }

    pub(super) async fn read_index(&self) -> Result<u64, ProposeError> {
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
                    let called = self.peers.call(leader, &Call::Read, &[], limit);
                    self.unless_led_by_another(called).await.and_then(Result::ok)
                }
            };
            if let Some(Reply::Index(index)) = reply {
                return Ok(index);
            }
            tokio::time::sleep(PAUSE).await;
        }
        Err(why)
    }

    pub(super) async fn renew_lease(&self) -> Result<Lease, ProposeError> {
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
    pub(super) async fn grant(&self, node: NodeId, incarnation: u128) -> Result<u64, ProposeError> {
        let term = self.term_led().ok_or(ProposeError::NotLeader)?;
        let ticket = self.leases().ticket();
        let index = self.read_here().await?;
        let view = self.applied(index).await?;
        if view.state.nodes.get(&node).map(|node| node.incarnation) != Some(incarnation) {
            return Err(ProposeError::Unavailable(
                "the cluster does not know this process yet".into(),
            ));
        }
        self.observe();
        match self.leases().grant(node, term, ticket, Instant::now()) {
            true => Ok(index),
            false => Err(ProposeError::Unavailable(
                "something is being taken from the node".into(),
            )),
        }
    }

    pub(super) async fn take_from(&self, node: NodeId, command: &Command) -> Result<Applied, ProposeError> {
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
}
