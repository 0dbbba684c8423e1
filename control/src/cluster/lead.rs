//! The thread that does what the leader has to do, on every node, in case it leads.
//!
//! It has nothing to do with the rest of the agent, so that a proposal that waits for a majority holds up nothing here.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::balancing::{self, Reports};
use super::leader::{self, Duty, Life};
use crate::raft::{Cluster, ProposeError};
use crate::state::{Command, Refused, State};

/// How often it looks, if nothing changes before.
const TICK: Duration = Duration::from_millis(200);
/// Silence after which a node counts as silent.
const SILENT: Duration = Duration::from_secs(3);
/// Pause after something was proposed: a duty that the state refuses again and again must not fill the log.
const PAUSE: Duration = Duration::from_millis(50);
/// How often it looks at the balance of disks.
const BALANCE: Duration = Duration::from_millis(500);
/// Duties carried out by one entry of the log.
const TOGETHER: usize = 64;

/// Starts the thread. It ends when the cluster does.
pub(crate) fn start(
    cluster: &Arc<Cluster>,
    out_after: Duration,
    reports: &Arc<Reports>,
) -> std::io::Result<()> {
    let (cluster, reports) = (Arc::downgrade(cluster), Arc::clone(reports));
    std::thread::Builder::new()
        .name("lead".into())
        .spawn(move || run(&cluster, out_after, &reports))?;
    Ok(())
}

fn run(cluster: &Weak<Cluster>, out_after: Duration, reports: &Reports) {
    let mut past = Past::default();
    while let Some(cluster) = cluster.upgrade() {
        let view = cluster.view();
        if !cluster.is_leader() {
            past = Past::default();
            cluster.wait_beyond(view.applied, TICK);
            continue;
        }
        match lead(&cluster, &view.state, &mut past, out_after, reports) {
            Ok(0) => drop(cluster.wait_beyond(view.applied, TICK)),
            Ok(_) => std::thread::sleep(PAUSE),
            Err(error) => {
                // Somebody was faster, or it is not known: it is looked at again.
                if !matches!(error, ProposeError::Refused(Refused::Overtaken { .. })) {
                    eprintln!("unibody: {error}");
                }
                std::thread::sleep(TICK);
            }
        }
    }
}

/// What is remembered while it leads.
#[derive(Default)]
struct Past {
    /// Since when nothing was heard of a node.
    gone_since: BTreeMap<crate::state::NodeId, Instant>,
    /// When the balance was looked at last.
    balanced: Option<Instant>,
}

/// Answers how much was proposed.
fn lead(
    cluster: &Cluster,
    state: &State,
    past: &mut Past,
    out_after: Duration,
    reports: &Reports,
) -> Result<usize, ProposeError> {
    let now = Instant::now();
    let me = cluster.identity().node;
    let mut life = BTreeMap::new();
    for &node in state.nodes.keys() {
        let heard = cluster.heard(node);
        if node == me || heard.is_some_and(|heard| now.duration_since(heard) < SILENT) {
            past.gone_since.remove(&node);
            life.insert(node, Life::Alive);
            continue;
        }
        let since = *past.gone_since.entry(node).or_insert(now);
        let over = cluster.lease_left(node).is_ok_and(|left| left.is_zero());
        let judged = match over {
            false => Life::Silent,
            true if now.duration_since(since) >= out_after => Life::Lost,
            true => Life::Gone,
        };
        life.insert(node, judged);
    }
    if life.values().any(|life| matches!(life, Life::Gone | Life::Lost)) {
        // One who is cut off from all others must not conclude that they are all gone: what it proposes now would be carried
        // out when they are back.
        cluster.confirmed()?;
    }
    let mut commands = Vec::new();
    let duties = leader::duties(state, &life);
    let mut count = duties.len();
    for duty in duties {
        match duty {
            Duty::Take(node, command) => drop(cluster.take_from(node, &command)?),
            Duty::Do(command) => commands.push(command),
        }
    }
    // After everything that is more urgent.
    if count == 0 && past.balanced.is_none_or(|at| now.duration_since(at) >= BALANCE) {
        past.balanced = Some(now);
        let life = |node| life.get(&node).copied().unwrap_or(Life::Silent);
        commands = balancing::duties(state, &life, reports.last().as_ref());
        count = commands.len();
    }
    // What is a batch already stays one.
    let single = |command: &Command| !matches!(command, Command::Batch(_));
    let runs = commands.chunk_by(|one, next| single(one) && single(next));
    for together in runs.flat_map(|run| run.chunks(TOGETHER)) {
        let command = match together {
            [one] => one.clone(),
            several => Command::Batch(several.to_vec()),
        };
        cluster.propose(cluster.request(), &command)?;
    }
    Ok(count)
}
