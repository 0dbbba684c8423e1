//! The consensus as its users see it: a log of commands that are committed in order or lost, a leader that may change or be
//! missing, answers that may be lost, nodes that learn at their own pace; and the leases that the leader grants.
//!
//! Rules (those of `control/src/raft`): who heard no outcome asks again until it does. A lease counts from when it was asked
//! for, by the node's clock, once the node has applied all that was committed when it was granted. What is taken from a node
//! because its lease is over is proposed by the leader itself, which grants the node nothing until the outcome is known; it
//! waits lease and margin from the last grant, and from when it began to lead.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use unibody_control::cluster::{Life, disk_duties};
use unibody_control::state::Applied;
use unibody_control::state::{Command, Disk, NodeId, ReplicaState, State};
use unibody_dataplane::config::Outcome;
use unibody_dataplane::planted::{self, Bug};

use super::world::{Answer, Cluster, Event, NAME};
use crate::sim::world::{Checked, note};

/// Microseconds.
pub(super) const LEASE: u64 = 6_000_000;
const MARGIN: u64 = 1_000_000;
const RENEW: u64 = 1_500_000;
/// After so long without an outcome it is asked again.
const PATIENCE: u64 = 1_500_000;
/// A node that is gone is declared so after that time.
const OUT: u64 = 4_000_000;

/// What the outcome of a proposal is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The mirror of an owner asked.
    Owner(u64),
    /// A node wants to be the owner.
    Attach,
    /// A disk was opened.
    Boot(usize),
    /// Nobody waits for the answer.
    Nothing,
}

/// A proposal whose outcome is not known to whoever made it.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) node: usize,
    pub(super) life: u64,
    pub(super) command: Arc<Command>,
    pub(super) purpose: Purpose,
}

#[derive(Debug)]
struct Entry {
    token: Option<u64>,
    command: Arc<Command>,
    /// The node that is barred from leases until this is decided.
    bars: Option<usize>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Consensus {
    /// All that was committed.
    pub(super) log: Vec<Arc<Command>>,
    /// After all of it.
    pub(super) state: State,
    pending: VecDeque<Entry>,
    term: u64,
    pub(super) leader: Option<usize>,
    /// When the leader began to lead, by its own clock.
    since: u64,
    grants: BTreeMap<usize, u64>,
    barred: BTreeSet<usize>,
    pub(super) asks: BTreeMap<u64, Ask>,
    /// No quorum before that time.
    pub(super) stalled_until: u64,
    /// Under the present owner all in-sync replicas of some chunk had lost power.
    pub(super) forgot: bool,
}

impl Cluster {
    /// Whether the consensus reaches from one node to another.
    fn talk(&self, a: usize, b: usize) -> bool {
        let well = |n: usize| self.sites[n].running() && !self.sites[n].isolated;
        a == b && well(a) || well(a) && well(b) && !self.blocked(a, b) && !self.blocked(b, a)
    }

    fn quorum(&self, leader: usize) -> bool {
        let heard = (0..self.sites.len()).filter(|&n| self.talk(leader, n)).count();
        self.now >= self.raft.stalled_until && heard > self.sites.len() / 2
    }

    /// The leader, if it can lead.
    fn leading(&self) -> Option<usize> {
        self.raft.leader.filter(|&leader| self.quorum(leader))
    }

    /// What an operator does at once.
    pub(super) fn commit_now(&mut self, command: Command) {
        let answer = self.raft.state.apply(&command);
        assert!(answer.is_ok(), "an operator's command is possible: {answer:?}");
        self.raft.log.push(Arc::new(command));
    }

    /// Proposes until the outcome is known.
    pub(super) fn ask(&mut self, node: usize, command: Command, purpose: Purpose) -> u64 {
        let token = self.fresh();
        let (life, command) = (self.sites[node].life, Arc::new(command));
        self.raft.asks.insert(
            token,
            Ask {
                node,
                life,
                command,
                purpose,
            },
        );
        self.ask_once(token, node);
        token
    }

    fn ask_once(&mut self, token: u64, from: usize) {
        let delay = self.delay(self.profile.consensus);
        let command = self.raft.asks[&token].command.clone();
        self.after(delay, Event::Proposed { token, from, command });
        let patience = PATIENCE + self.random.below(PATIENCE);
        self.after(patience, Event::AskAgain { token });
    }

    pub(super) fn ask_again(&mut self, token: u64) -> Checked {
        let Some(ask) = self.raft.asks.get(&token) else {
            return Ok(());
        };
        let (node, purpose) = (ask.node, ask.purpose);
        let wanted = match purpose {
            Purpose::Owner(owner) => self.owners.contains_key(&owner),
            _ => self.sites[node].life == ask.life,
        };
        if !wanted {
            self.raft.asks.remove(&token);
            return Ok(());
        }
        if !self.sites[node].running() {
            self.after(PATIENCE, Event::AskAgain { token });
            return Ok(());
        }
        if let (true, Purpose::Owner(_)) = (planted::on(Bug::UndecidedIsRefused), purpose) {
            let config = self.sites[node].state.volumes[NAME].to_config();
            return self.outcome(token, Ok(Applied::Outcome(Outcome::Moved(config))));
        }
        self.count("proposed again");
        self.ask_once(token, node);
        Ok(())
    }

    pub(super) fn proposed(&mut self, token: u64, from: usize, command: Arc<Command>) {
        // Who sent it may have gone; the message is there all the same.
        let heard = self
            .leading()
            .is_some_and(|leader| !self.sites[from].isolated && !self.blocked(from, leader));
        if heard {
            self.append(Entry {
                token: Some(token),
                command,
                bars: None,
            });
        }
    }

    fn append(&mut self, entry: Entry) {
        self.raft.pending.push_back(entry);
        let (term, delay) = (self.raft.term, self.delay(self.profile.consensus));
        self.after(delay, Event::Committed { term });
    }

    pub(super) fn committed(&mut self, term: u64) -> Checked {
        if term != self.raft.term {
            return Ok(());
        }
        if self.leading().is_none() {
            self.after(200_000, Event::Committed { term });
            return Ok(());
        }
        match self.raft.pending.pop_front() {
            Some(entry) => self.commit(entry),
            None => Ok(()),
        }
    }

    fn commit(&mut self, entry: Entry) -> Checked {
        self.raft.forgot |= self.forgot();
        let answer = self.raft.state.apply(&entry.command);
        self.raft.log.push(entry.command.clone());
        note!(
            self,
            "commit {} {:?} {}",
            self.raft.log.len(),
            entry.command,
            if answer.is_ok() { "ok" } else { "refused" }
        );
        self.mark(&[6, self.now, self.raft.log.len() as u64, u64::from(answer.is_ok())]);
        self.raft.state.check()?;
        if let Some(node) = entry.bars {
            self.raft.barred.remove(&node);
        }
        if answer.is_ok() {
            self.judge(&entry.command)?;
        }
        if let Ok(Applied::Outcome(outcome)) = &answer {
            match outcome {
                Outcome::Moved(_) => self.count("proposal overtaken"),
                Outcome::Fenced => self.count("proposal of an old owner"),
                Outcome::Committed(_) => {}
            }
        }
        let upto = self.raft.log.len();
        for node in 0..self.sites.len() {
            if self.raft.leader.is_some_and(|leader| self.talk(leader, node)) {
                let lag = self.random.below(self.profile.lag);
                let life = self.sites[node].life;
                self.after(lag, Event::Apply { node, life, upto });
            }
        }
        if let Some(token) = entry.token
            && let Some(ask) = self.raft.asks.get(&token)
        {
            let lost = self.faulty && self.random.one_in(self.profile.lost_answer);
            let heard = self.raft.leader.is_some_and(|leader| self.talk(leader, ask.node));
            if lost || !heard {
                self.count("outcome unknown");
            } else {
                let delay = self.delay(self.profile.consensus);
                self.after(delay, Event::Outcome { token, answer });
            }
        }
        Ok(())
    }

    /// What must not be, at a commit.
    fn judge(&mut self, command: &Command) -> Checked {
        if matches!(command, Command::Attach { .. } | Command::Handover { .. }) {
            self.raft.forgot = false;
        }
        let Command::Revoke { generation, .. } = command else {
            return Ok(());
        };
        let owner = self.owners.values().find(|owner| owner.generation == *generation);
        let Some(node) = owner.map(|owner| owner.node) else {
            self.count("dead owner revoked");
            return Ok(());
        };
        self.count("live owner revoked");
        if self.sites[node].isolated {
            self.count("owner cut off from the quorum revoked");
        }
        if self.sites[node].paused != 0 {
            self.count("owner that stood still revoked");
        }
        let clock = self.sites[node].clock(self.now);
        if clock < self.sites[node].lease_until {
            return Err(format!("node {node} was revoked under its lease: it is {clock}"));
        }
        Ok(())
    }

    pub(super) fn outcome(&mut self, token: u64, answer: Answer) -> Checked {
        let Some(ask) = self.raft.asks.remove(&token) else {
            return Ok(());
        };
        if self.sites[ask.node].life != ask.life {
            return Ok(());
        }
        match ask.purpose {
            Purpose::Owner(owner) => self.decided(owner, answer),
            Purpose::Attach => self.attached(ask.node, answer),
            Purpose::Boot(_) | Purpose::Nothing => Ok(()),
        }
    }

    /// A node applies what it has heard of.
    pub(super) fn apply(&mut self, node: usize, life: u64, upto: usize) -> Checked {
        if self.sites[node].life != life || !self.sites[node].up {
            return Ok(());
        }
        let site = &mut self.sites[node];
        let before = site.applied;
        while site.applied < upto {
            let _ = site.state.apply(&self.raft.log[site.applied]);
            site.applied += 1;
        }
        let caught_up = site.applied > before && site.applied == self.raft.log.len();
        if caught_up && site.state != self.raft.state {
            return Err(format!(
                "node {node} has another state than the leader at the same index"
            ));
        }
        if let Some((sent, upto)) = site.grant.take() {
            self.granted(node, sent, upto);
        }
        Ok(())
    }

    pub(super) fn elect(&mut self) -> Checked {
        let delay = self.random.range(300_000, 900_000);
        self.after(delay, Event::Elect);
        if self.leading().is_some() || self.now < self.raft.stalled_until {
            return Ok(());
        }
        self.raft.leader = None;
        self.new_leader()
    }

    /// Somebody who can leads from now on. What was not committed is committed now, as Raft does, or lost.
    pub(super) fn new_leader(&mut self) -> Checked {
        let fit: Vec<usize> = (0..self.sites.len()).filter(|&n| self.quorum(n)).collect();
        if fit.is_empty() {
            return Ok(());
        }
        let leader = self.random.pick(&fit);
        self.count("new leader");
        self.raft.term += 1;
        self.raft.leader = Some(leader);
        let kept = self.random.below(self.raft.pending.len() as u64 + 1) as usize;
        let mut pending = std::mem::take(&mut self.raft.pending);
        pending.truncate(kept);
        for entry in pending {
            self.commit(entry)?;
        }
        self.raft.barred.clear();
        self.raft.grants.clear();
        self.raft.since = self.sites[leader].clock(self.now);
        if planted::on(Bug::NewLeaderForgetsLeases) {
            self.raft.since = self.raft.since.saturating_sub(LEASE + MARGIN);
        }
        note!(self, "leader {leader} term {}", self.raft.term);
        Ok(())
    }

    // ---- leases ----------------------------------------------------------------------------------------------------

    /// Whether the node may take it that nobody else was made the owner of its volume.
    pub(super) fn leased(&self, node: usize) -> bool {
        self.sites[node].clock(self.now) < self.sites[node].lease_until
    }

    pub(super) fn renew(&mut self, node: usize, life: u64, sent: u64) {
        let Some(leader) = self.leading().filter(|&leader| self.talk(node, leader)) else {
            return;
        };
        if self.raft.barred.contains(&node) && !planted::on(Bug::GrantWhileRevoking) {
            self.count("lease refused");
            return;
        }
        let clock = self.sites[leader].clock(self.now);
        self.raft.grants.insert(node, clock);
        let upto = self.raft.log.len();
        let delay = self.delay(self.profile.consensus);
        self.after(
            delay,
            Event::Granted {
                node,
                life,
                sent,
                upto,
            },
        );
    }

    pub(super) fn granted(&mut self, node: usize, sent: u64, upto: usize) {
        let now = self.now;
        let site = &mut self.sites[node];
        if site.applied < upto && !planted::on(Bug::LeaseBeforeApplied) {
            site.grant = Some((sent, upto));
            return;
        }
        let from = if planted::on(Bug::LeaseFromAnswer) {
            site.clock(now)
        } else {
            sent
        };
        site.lease_until = site.lease_until.max(from + LEASE);
    }

    /// What a node does for the cluster: it renews its lease and, as the leader, looks after the others.
    pub(super) fn keep(&mut self, node: usize) -> Checked {
        let clock = self.sites[node].clock(self.now);
        let life = self.sites[node].life;
        if clock >= self.sites[node].renew_at {
            self.sites[node].renew_at = clock + RENEW;
            let delay = self.delay(self.profile.consensus);
            self.after(
                delay,
                Event::Renew {
                    node,
                    life,
                    sent: clock,
                },
            );
        }
        if let Some(leader) = self.leading()
            && self.talk(leader, node)
        {
            let upto = self.raft.log.len();
            let lag = self.random.below(self.profile.lag);
            self.after(lag, Event::Apply { node, life, upto });
            if leader == node {
                self.lead(node, clock);
            }
        }
        Ok(())
    }

    fn lead(&mut self, leader: usize, clock: u64) {
        let state = &self.sites[leader].state;
        let Some(volume) = state.volumes.get(NAME) else {
            return;
        };
        let (generation, owner) = (volume.generation, volume.owner);
        if let Some(owner) = owner {
            let owner = owner.0 as usize - 1;
            let last = self
                .raft
                .grants
                .get(&owner)
                .map_or(self.raft.since, |&at| at.max(self.raft.since));
            let wait = if planted::on(Bug::RevokeEarly) {
                LEASE / 3
            } else {
                LEASE + MARGIN
            };
            if clock >= last + wait && !self.raft.barred.contains(&owner) {
                self.raft.barred.insert(owner);
                let command = Command::Revoke {
                    name: NAME.into(),
                    generation,
                };
                self.append(Entry {
                    token: None,
                    command: Arc::new(command),
                    bars: Some(owner),
                });
                return;
            }
        }
        if !self.raft.pending.is_empty() {
            return;
        }
        let life = |node: NodeId| {
            let node = node.0 as usize - 1;
            match self.sites[node].gone {
                Some(since) if self.now - since > OUT => Life::Lost,
                _ if self.talk(leader, node) => Life::Alive,
                _ => Life::Silent,
            }
        };
        for command in disk_duties(&self.sites[leader].state, &life) {
            match command {
                // What is on a disk that nobody needs does not matter, and there may be a use for its number.
                Command::ForgetDisk { .. } => continue,
                Command::Move { .. } => self.count("replicas moved"),
                Command::AddReplicas { .. } => self.count("replicas added"),
                Command::RemoveReplicas { .. } => self.count("replicas removed"),
                Command::GiveUp { .. } => self.count("replicas given up"),
                _ => {}
            }
            self.append(Entry {
                token: None,
                command: Arc::new(command),
                bars: None,
            });
        }
    }

    /// A node was declared gone for good: nobody waits any longer for what is on it.
    pub(super) fn declared(&self, node: usize) -> bool {
        let state = &self.raft.state;
        let mut drives = self
            .drives
            .iter()
            .filter(|drive| drive.node == node && !drive.gone);
        drives.all(|drive| {
            let disk = Disk(drive.uuid);
            let mut slots = state.volumes[NAME].chunks.iter().flatten();
            state.disks[&disk].out
                && !slots.any(|slot| slot.disk == disk && slot.state != ReplicaState::Stale)
        })
    }
}
