//! How a node's proposals reach Raft: in the order in which they were made, as many together as are waiting, and again until
//! the outcome is known.
//!
//! Invariants: every proposal is answered once, with what was decided; one that may have been decided is proposed again under
//! the same number and so has its effect once. What was proposed together is one entry of the log: a disk that takes the
//! replicas of a thousand volumes with it costs a few.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::raft::{Cluster, ProposeError};
use crate::state::{Applied, Command, Refused};

/// Most commands in an entry.
const TOGETHER: usize = 256;
/// Pause before something is proposed again.
const PAUSE: Duration = Duration::from_millis(100);

type Answer = Box<dyn FnOnce(Result<Applied, Refused>) + Send>;

/// Takes proposals from any thread.
#[derive(Clone)]
pub(crate) struct Proposer(mpsc::UnboundedSender<(Command, Answer)>);

impl Proposer {
    /// Runs on `runtime` until the last handle is gone.
    pub(crate) fn start(cluster: Arc<Cluster>, runtime: &tokio::runtime::Runtime) -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        runtime.spawn(run(cluster, receiver));
        Proposer(sender)
    }

    /// Proposes; `answer` is called on another thread once it is decided, however long that takes. Bounded by the callers:
    /// each has at most one proposal out for each thing it cares for.
    pub(crate) fn propose(
        &self,
        command: Command,
        answer: impl FnOnce(Result<Applied, Refused>) + Send + 'static,
    ) {
        // Without a receiver the node is ending, and nobody waits for the answer.
        self.0.send((command, Box::new(answer))).ok();
    }
}

async fn run(cluster: Arc<Cluster>, mut proposals: mpsc::UnboundedReceiver<(Command, Answer)>) {
    while let Some(first) = proposals.recv().await {
        let mut together = vec![first];
        while together.len() < TOGETHER
            && let Ok(more) = proposals.try_recv()
        {
            together.push(more);
        }
        let (commands, answers): (Vec<_>, Vec<_>) = together.into_iter().unzip();
        for (answer, outcome) in answers.into_iter().zip(decide(&cluster, commands).await) {
            answer(outcome);
        }
    }
}

async fn decide(cluster: &Arc<Cluster>, mut commands: Vec<Command>) -> Vec<Result<Applied, Refused>> {
    if commands.len() == 1 {
        let command = commands.pop().expect("there is one");
        return vec![decide_one(cluster, command).await.unwrap_or_else(Err)];
    }
    match decide_one(cluster, Command::Batch(commands.clone())).await {
        Ok(Ok(Applied::Batch(outcomes))) if outcomes.len() == commands.len() => outcomes,
        // Too long together, or refused as a whole: one by one.
        _ => {
            let mut outcomes = Vec::new();
            for command in commands {
                outcomes.push(decide_one(cluster, command).await.unwrap_or_else(Err));
            }
            outcomes
        }
    }
}

/// `Err`: it is too long to be proposed.
async fn decide_one(cluster: &Arc<Cluster>, command: Command) -> Result<Result<Applied, Refused>, Refused> {
    let request = cluster.request();
    loop {
        match cluster.propose_later(request, command.clone()).await {
            Ok(applied) => return Ok(Ok(applied)),
            Err(ProposeError::Refused(refused)) => return Ok(Err(refused)),
            Err(ProposeError::TooLong(bytes)) => {
                return Err(Refused::TooMany {
                    what: format!("bytes in a change ({bytes} were asked for)").into(),
                    max: 16 << 20,
                });
            }
            Err(
                ProposeError::Unknown(_)
                | ProposeError::Unavailable(_)
                | ProposeError::NotLeader
                | ProposeError::Leased(_),
            ) => tokio::time::sleep(PAUSE).await,
        }
    }
}
