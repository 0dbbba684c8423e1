//! What this node answers to others.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use unibody_dataplane::wire::handshake::Peer;

use super::Types;
use super::core::Core;
use super::frame::{End, Link};
use super::machine::{Machine, Request};
use super::net::{self, Call, Reply};
use super::proposals::Written;
use crate::envelope::Unreadable;
use crate::state::{Command, FORMAT, NodeId};

/// Most connections from other nodes at once.
const INBOUND_MAX: usize = 1024;

impl Core {
    pub(super) async fn serve(self: Arc<Self>, stream: tokio::net::TcpStream, peer: Peer) {
        if self.inbound.fetch_add(1, Ordering::Relaxed) < INBOUND_MAX {
            let link = Link::new(stream, peer.key, End::Listener);
            // However it ended, the peer dials again if it has anything to say.
            let _ = net::serve(link, peer.node.into(), Arc::clone(&self)).await;
        }
        self.inbound.fetch_sub(1, Ordering::Relaxed);
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
