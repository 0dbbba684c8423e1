//! Calls between nodes: one request and one reply at a time on each connection, several connections to a peer.
//!
//! Invariants:
//! * A connection carries frames only after both ends proved that they know the cluster's token, and to the node it was meant
//!   for.
//! * A call that failed after anything was sent may have had its effect ([`CallError::Lost`]); the connection is dropped.
//! * Everything is bounded: frames, connections each way, idle connections, time.
//!
//! Deliberately absent: the listening socket. The node has one for all purposes and hands over what is meant for here.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use openraft::error::{
    Fatal, NetworkError, RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable,
};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, Snapshot, SnapshotMeta, Vote};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use unibody_dataplane::wire::handshake::{
    Handshake, HandshakeError, Incarnation, Local, MESSAGE_MAX, PARAMS, Peer, Purpose, Token,
};

use super::frame::{End, Link};
use super::machine::{Receipt, Request};
use super::{Contact, Types};
use crate::state::{Command, FORMAT, NodeId, hex_u128};

/// Longest snapshot, bytes.
pub(super) const SNAPSHOT_MAX: u64 = 1 << 30;
/// Bytes of a snapshot in one frame.
const PIECE: usize = 1 << 20;
/// Most connections to one peer at once.
const LINKS_MAX: usize = 32;
/// Most of them kept while idle, and for how long.
const IDLE_MAX: usize = 4;
const IDLE_TIME: Duration = Duration::from_secs(20);
/// How long a peer's silence between calls is borne.
pub(super) const QUIET_MAX: Duration = Duration::from_secs(60);
/// Most a handshake may take.
pub(super) const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// Whether a message may go from one node to another. For tests that cut the network; production has none.
pub type Gate = Arc<dyn Fn(NodeId, NodeId) -> bool + Send + Sync>;

/// What one node asks of another.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Call {
    /// Raft's entries, in the format of this number.
    Append {
        format: u32,
        rpc: AppendEntriesRequest<Types>,
    },
    Vote(VoteRequest<NodeId>),
    /// A snapshot; its bytes follow in frames of their own.
    Snapshot {
        vote: Vote<NodeId>,
        meta: SnapshotMeta<NodeId, Contact>,
        bytes: u64,
    },
    /// For the leader: apply this.
    Propose {
        format: u32,
        request: Request,
    },
    /// For the leader: let this node in (`command` is its `AddNode`).
    Join {
        format: u32,
        command: Command,
    },
    /// For the leader: renew the caller's lease.
    Lease {
        #[serde(with = "hex_u128")]
        incarnation: u128,
    },
    /// For the leader: how far must a state have got to show everything committed by now?
    Read,
}

/// What it is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Reply {
    Append(AppendEntriesResponse<NodeId>),
    Vote(VoteResponse<NodeId>),
    Snapshot {
        vote: Vote<NodeId>,
    },
    /// Applied at this index, or answered before.
    Receipt {
        index: u64,
        receipt: Receipt,
    },
    /// The state must have got here.
    Index(u64),
    /// Ask the leader.
    NotLeader {
        leader: Option<NodeId>,
        addresses: Vec<String>,
    },
    /// Not now; nothing was done.
    Busy(String),
    /// It may or may not have been done.
    Unknown(String),
}

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// Nothing was sent.
    #[error("node {0} could not be reached: {1}")]
    Unreached(String, String),
    /// The call may have had its effect.
    #[error("node {0} did not answer: {1}")]
    Lost(String, String),
}

/// Runs a handshake on a socket.
pub(super) async fn shake(stream: &mut TcpStream, mut handshake: Handshake) -> Result<Peer, HandshakeError> {
    let talk = async {
        let mut room = [0; MESSAGE_MAX];
        loop {
            stream.write_all(&handshake.output()).await?;
            let wants = handshake.wants();
            if wants == 0 {
                break;
            }
            let got = stream.read(&mut room[..wants]).await?;
            if got == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            if let Err(error) = handshake.input(&room[..got]) {
                // It has failed already, whatever becomes of telling why.
                let _ = stream.write_all(&handshake.output()).await;
                let _ = stream.shutdown().await;
                return Err(error);
            }
        }
        handshake.finish().ok_or(HandshakeError::Malformed("unfinished"))
    };
    match tokio::time::timeout(HANDSHAKE_MAX, talk).await {
        Ok(result) => result,
        Err(_) => Err(HandshakeError::TimedOut),
    }
}

/// Who this node is to others.
#[derive(Clone, Debug)]
pub(super) struct Me {
    pub(super) node: NodeId,
    pub(super) incarnation: u128,
    pub(super) token: Token,
}

impl Me {
    pub(super) fn local(&self) -> Local {
        let mut nonce = [0; 32];
        super::fill_random(&mut nonce);
        Local {
            node: self.node.into(),
            incarnation: Incarnation(self.incarnation),
            token: self.token.clone(),
            nonce,
        }
    }
}

#[derive(Default)]
struct Entry {
    addresses: Vec<String>,
    idle: Vec<(Instant, Link<TcpStream>)>,
    heard: Option<Instant>,
    links: Arc<AtomicUsize>,
}

/// One of the connections to a peer that are counted.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The other nodes: where they are, connections to them, when they were last heard.
pub(super) struct Peers {
    me: Me,
    gate: Option<Gate>,
    book: Mutex<BTreeMap<NodeId, Entry>>,
}

impl Peers {
    pub(super) fn new(me: Me, gate: Option<Gate>) -> Self {
        Peers {
            me,
            gate,
            book: Mutex::default(),
        }
    }

    fn with<T>(&self, node: NodeId, act: impl FnOnce(&mut Entry) -> T) -> T {
        // A thread that panicked in here left a list of connections, whole.
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        act(book.entry(node).or_default())
    }

    /// The nodes there are, and where. Others are forgotten.
    pub(super) fn know(&self, nodes: BTreeMap<NodeId, Vec<String>>) {
        let mut book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        book.retain(|node, _| nodes.contains_key(node));
        for (node, addresses) in nodes {
            let entry = book.entry(node).or_default();
            if entry.addresses != addresses {
                entry.addresses = addresses;
                entry.idle.clear();
            }
        }
    }

    /// Where a node is, if nothing better is known.
    pub(super) fn hint(&self, node: NodeId, addresses: &[String]) {
        self.with(node, |entry| {
            if entry.addresses.is_empty() {
                entry.addresses = addresses.to_vec();
            }
        });
    }

    pub(super) fn addresses(&self, node: NodeId) -> Vec<String> {
        self.with(node, |entry| entry.addresses.clone())
    }

    pub(super) fn all(&self) -> Vec<NodeId> {
        let book = self.book.lock().unwrap_or_else(PoisonError::into_inner);
        book.keys().copied().collect()
    }

    /// When a node last answered us, and not only that it could not.
    pub(super) fn heard(&self, node: NodeId) -> Option<Instant> {
        self.with(node, |entry| entry.heard)
    }

    fn may(&self, from: NodeId, to: NodeId) -> bool {
        self.gate.as_ref().is_none_or(|gate| gate(from, to))
    }

    async fn dial(&self, address: &str, expect: Option<NodeId>) -> Result<(Peer, Link<TcpStream>), String> {
        let connect = tokio::time::timeout(HANDSHAKE_MAX, TcpStream::connect(address));
        let connected = connect.await.map_err(|_| "no connection in time".to_owned())?;
        let mut stream = connected.map_err(|error| error.to_string())?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let expect = expect.map(Into::into);
        let handshake = Handshake::dial(self.me.local(), Purpose::Control, [0; PARAMS], expect);
        let peer = shake(&mut stream, handshake)
            .await
            .map_err(|error| error.to_string())?;
        let link = Link::new(stream, peer.key, End::Dialer);
        Ok((peer, link))
    }

    /// Calls a node.
    pub(super) async fn call(
        &self,
        to: NodeId,
        call: &Call,
        tail: &[u8],
        limit: Duration,
    ) -> Result<Reply, CallError> {
        let unreached = |why: String| CallError::Unreached(to.to_string(), why);
        if !self.may(self.me.node, to) {
            return Err(unreached("cut off".into()));
        }
        let links = self.with(to, |entry| Arc::clone(&entry.links));
        if links.fetch_add(1, Ordering::Relaxed) >= LINKS_MAX {
            links.fetch_sub(1, Ordering::Relaxed);
            return Err(unreached("too many calls at once".into()));
        }
        let _counted = Counted(links);
        let deadline = tokio::time::Instant::now() + limit;
        let kept = self.with(to, |entry| {
            entry.idle.retain(|(since, _)| since.elapsed() < IDLE_TIME);
            entry.idle.pop()
        });
        let mut link = match kept {
            Some((_, link)) => link,
            None => {
                let dialed = tokio::time::timeout_at(deadline, self.reach(to)).await;
                dialed
                    .map_err(|_| unreached("no connection in time".into()))?
                    .map_err(unreached)?
            }
        };
        let reply = tokio::time::timeout_at(deadline, converse(&mut link, call, tail)).await;
        let reply = reply.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        match reply {
            Ok(_) if !self.may(to, self.me.node) => Err(CallError::Lost(to.to_string(), "cut off".into())),
            Ok(reply) => {
                // One whose Raft has died, or can not read what it is sent, does not count as there: it must be replaced.
                let there = !matches!(reply, Reply::Unknown(_) | Reply::Busy(_));
                self.with(to, |entry| {
                    if there {
                        entry.heard = Some(Instant::now());
                    }
                    if entry.idle.len() < IDLE_MAX {
                        entry.idle.push((Instant::now(), link));
                    }
                });
                Ok(reply)
            }
            Err(error) => {
                // The others lead to the same end.
                self.with(to, |entry| entry.idle.clear());
                Err(CallError::Lost(to.to_string(), error.to_string()))
            }
        }
    }

    async fn reach(&self, to: NodeId) -> Result<Link<TcpStream>, String> {
        let mut last = "its address is not known".to_owned();
        for address in self.addresses(to) {
            match self.dial(&address, Some(to)).await {
                Ok((_, link)) => return Ok(link),
                Err(error) => last = format!("{address}: {error}"),
            }
        }
        Err(last)
    }

    /// Calls whoever listens at an address.
    pub(super) async fn call_address(
        &self,
        address: &str,
        call: &Call,
        limit: Duration,
    ) -> Result<Reply, CallError> {
        let talk = async {
            let (_, mut link) = self
                .dial(address, None)
                .await
                .map_err(|why| CallError::Unreached(address.to_owned(), why))?;
            converse(&mut link, call, &[])
                .await
                .map_err(|error| CallError::Lost(address.to_owned(), error.to_string()))
        };
        match tokio::time::timeout(limit, talk).await {
            Ok(result) => result,
            Err(_) => Err(CallError::Lost(address.to_owned(), "not in time".into())),
        }
    }
}

async fn converse(link: &mut Link<TcpStream>, call: &Call, tail: &[u8]) -> io::Result<Reply> {
    link.send(&serde_json::to_vec(call)?).await?;
    for piece in tail.chunks(PIECE) {
        link.send(piece).await?;
    }
    let reply = link.receive().await?;
    Ok(serde_json::from_slice(&reply)?)
}

/// A call's bytes, as a peer that has proven itself may send them, for fuzzing. Never panics unless a call that can be read
/// does not survive being written.
pub fn fuzz_call(bytes: &[u8]) {
    if let Ok(call) = serde_json::from_slice::<Call>(bytes) {
        let text = serde_json::to_string(&call).expect("a call can be written");
        let again: Call = serde_json::from_str(&text).expect("a call that was written can be read");
        assert_eq!(
            serde_json::to_string(&again).expect("a call can be written"),
            text,
            "a call changed on its way"
        );
    }
}

/// What is done with a call.
pub(super) trait Serve: Send + Sync + 'static {
    fn serve(&self, from: NodeId, call: Call, tail: Vec<u8>) -> impl Future<Output = Reply> + Send;
}

/// Serves one connection until it ends.
pub(super) async fn serve(
    mut link: Link<TcpStream>,
    from: NodeId,
    server: Arc<impl Serve>,
) -> io::Result<()> {
    loop {
        let Ok(message) = tokio::time::timeout(QUIET_MAX, link.receive()).await else {
            return Ok(());
        };
        let call: Call = serde_json::from_slice(&message?)?;
        let mut tail = Vec::new();
        if let Call::Snapshot { bytes, .. } = &call {
            if *bytes > SNAPSHOT_MAX {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a snapshot longer than 1 GiB",
                ));
            }
            while (tail.len() as u64) < *bytes {
                let piece = tokio::time::timeout(QUIET_MAX, link.receive()).await??;
                if piece.is_empty() || tail.len() + piece.len() > *bytes as usize {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                tail.extend_from_slice(&piece);
            }
        }
        let reply = server.serve(from, call, tail).await;
        link.send(&serde_json::to_vec(&reply)?).await?;
    }
}

/// Raft's way to its peers.
pub(super) struct Network(pub(super) Arc<Peers>);

impl RaftNetworkFactory<Types> for Network {
    type Network = Client;

    async fn new_client(&mut self, target: NodeId, contact: &Contact) -> Client {
        self.0.hint(target, &contact.addresses);
        Client {
            peers: Arc::clone(&self.0),
            target,
        }
    }
}

/// Raft's way to one peer.
pub(super) struct Client {
    peers: Arc<Peers>,
    target: NodeId,
}

type Rpc<T> = Result<T, RPCError<NodeId, Contact, RaftError<NodeId>>>;

impl Client {
    async fn rpc<T>(&self, call: &Call, option: RPCOption, take: impl FnOnce(Reply) -> Option<T>) -> Rpc<T> {
        match self.peers.call(self.target, call, &[], option.hard_ttl()).await {
            Ok(Reply::Busy(why) | Reply::Unknown(why)) => {
                Err(RPCError::Network(NetworkError::new(&io::Error::other(why))))
            }
            Ok(reply) => take(reply).ok_or_else(|| {
                RPCError::Network(NetworkError::new(&io::Error::other("a reply to another call")))
            }),
            Err(error @ CallError::Unreached(..)) => Err(RPCError::Unreachable(Unreachable::new(&error))),
            Err(error) => Err(RPCError::Network(NetworkError::new(&error))),
        }
    }
}

impl RaftNetwork<Types> for Client {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Rpc<AppendEntriesResponse<NodeId>> {
        let take = |reply| match reply {
            Reply::Append(response) => Some(response),
            _ => None,
        };
        let format = FORMAT;
        self.rpc(&Call::Append { format, rpc }, option, take).await
    }

    async fn vote(&mut self, rpc: VoteRequest<NodeId>, option: RPCOption) -> Rpc<VoteResponse<NodeId>> {
        let take = |reply| match reply {
            Reply::Vote(response) => Some(response),
            _ => None,
        };
        self.rpc(&Call::Vote(rpc), option, take).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<NodeId>,
        snapshot: Snapshot<Types>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<NodeId>, StreamingError<Types, Fatal<NodeId>>> {
        let call = Call::Snapshot {
            vote,
            meta: snapshot.meta,
            bytes: snapshot.snapshot.len() as u64,
        };
        let sending = self
            .peers
            .call(self.target, &call, &snapshot.snapshot, option.hard_ttl());
        let reply = tokio::select! {
            closed = cancel => return Err(StreamingError::Closed(closed)),
            reply = sending => reply,
        };
        match reply {
            Ok(Reply::Snapshot { vote }) => Ok(SnapshotResponse { vote }),
            Ok(_) => Err(StreamingError::Network(NetworkError::new(&io::Error::other(
                "the snapshot was not taken",
            )))),
            Err(error) => Err(StreamingError::Unreachable(Unreachable::new(&error))),
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(Duration::from_millis(200)))
    }
}
