//! How a node's proposals reach Raft: in the order in which they were made, as many together as are waiting, and again until
//! the outcome is known.
//!
//! Invariants: every proposal is answered once, with what was decided; one that may have been decided is proposed again under
//! the same number and so has its effect once. Only if nobody remembers that number any more (the node was cut off for long) it
//! gets another one: every command that comes here names the generation, configuration or placement that it is for, or
//! changes nothing the second time. What was proposed together is one entry of the log: a disk that takes the
//! replicas of a thousand volumes with it costs a few.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::raft::{Cluster, ProposeError, RequestId};
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

async fn decide_one(cluster: &Arc<Cluster>, command: Command) -> Result<Result<Applied, Refused>, Refused> {
    decide_as(cluster, cluster.request(), command).await
}

/// `Err`: it is too long to be proposed.
async fn decide_as(
    cluster: &Arc<Cluster>,
    mut request: RequestId,
    command: Command,
) -> Result<Result<Applied, Refused>, Refused> {
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
            // Also if this node lags: then its state gets there.
            Err(ProposeError::Forgotten) => {
                tokio::time::sleep(PAUSE).await;
                request = cluster.request();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::{Options, REMEMBERED, Start, Timing};
    use crate::state::BATCH_MAX;
    use unibody_dataplane::wire::handshake::Token;

    /// A node that was cut off with a proposal out comes back when its number is forgotten.
    #[test]
    fn a_proposal_that_nobody_remembers_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let options = Options {
            dir: dir.path().to_path_buf(),
            name: "n1".into(),
            addresses: vec!["127.0.0.1:1".into()],
            domain: "d".into(),
            memory: 0,
            token: Token::new(b"secret"),
            incarnation: 1,
            timing: Timing::default(),
            gate: None,
        };
        let cluster = Arc::new(Cluster::start(options, &Start::Init).unwrap());
        cluster.wait_member(Duration::from_secs(60)).unwrap();
        let node = cluster.identity().node;
        let old = cluster.request();
        let nothing = Command::Drain { node, on: false };
        let many = Command::Batch(vec![nothing; BATCH_MAX]);
        for _ in 0..=REMEMBERED / BATCH_MAX as u64 {
            cluster.propose(cluster.request(), &many).unwrap();
        }
        let command = Command::Drain { node, on: true };
        assert!(matches!(
            cluster.propose(old, &command),
            Err(ProposeError::Forgotten)
        ));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let decided = decide_as(&cluster, old, command);
        let decided =
            runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), decided).await });
        assert_eq!(decided.expect("it is decided"), Ok(Ok(Applied::Done)));
        assert!(cluster.view().state.nodes[&node].drain);
    }
}
