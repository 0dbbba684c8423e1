//! Who is there? Both ends of a fresh connection prove that they know the cluster's token, before anything is obeyed.
//!
//! Three messages, each of a fixed size: the dialer says what it wants with a nonce (`Hello`), the listener answers with its
//! own nonce and its proof (`Answer`), the dialer proves itself (`Proof`). A proof is BLAKE3, keyed by the token, over the
//! prover's role and every byte of the first two messages: nonces, nodes, incarnations, purpose, versions, parameters. So a
//! proof is worth nothing in another connection, in the other direction, or after any of it was changed on the way. Either
//! end may say why it gives up (`Refusal`); that is not proven, ends the attempt and does nothing else.
//!
//! Invariants:
//! * Never more than [`Handshake::wants`] bytes are asked for, at most [`MESSAGE_MAX`] are kept, and nothing is read past
//!   the last message: what follows belongs to the purpose.
//! * No byte of the peer has an effect other than on the handshake itself before it proved itself.
//! * A key and a nonce make one proof: nonces come from the caller and must be fresh and random.
//!
//! Deliberately absent: sockets, time and randomness (the driver's; [`run`] is one for blocking sockets), secrecy of what
//! follows (the key binds frames to the connection, it does not encrypt them), and identity of single nodes: whoever knows
//! the token can name itself as any node.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

pub use super::blocking::run;

/// Lowest version of the wire spoken here.
pub const VERSION_MIN: u16 = 1;
/// Highest version of the wire spoken here.
pub const VERSION_MAX: u16 = 1;

const MAGIC: [u8; 8] = *b"UniBodyW";
const HEAD: usize = 16;
const IDENTITY: usize = 8 + 8 + 16 + 32 + PARAMS;
const PROOF: usize = 32;
/// Bytes of a purpose's own parameters.
pub const PARAMS: usize = 32;
/// Longest message, bytes.
pub const MESSAGE_MAX: usize = HEAD + IDENTITY + PROOF;

const HELLO: u8 = 1;
const ANSWER: u8 = 2;
const PROVE: u8 = 3;
const REFUSAL: u8 = 4;

/// A node of the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One run of a node's process: drawn at its start. Two equal ones mean that it has forgotten nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Incarnation(pub u128);

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Purpose {
    /// The control plane.
    Control = 1,
    /// Requests to replicas.
    Data = 2,
}

impl Purpose {
    fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Purpose::Control),
            2 => Some(Purpose::Data),
            _ => None,
        }
    }
}

/// The secret that all nodes of a cluster share. It must not be guessable (32 random bytes): a listener's proof lets anybody
/// who dials it try tokens at home.
#[derive(Clone)]
pub struct Token([u8; 32]);

impl Token {
    /// From the secret's bytes, as the operator gave them.
    pub fn new(secret: &[u8]) -> Self {
        Token(blake3::derive_key(
            "unibody 2026-01 cluster token, wire handshake",
            secret,
        ))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// A secret of this connection alone, known to both ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SessionKey(pub [u8; 32]);

impl fmt::Debug for SessionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionKey(..)")
    }
}

/// What one end brings.
#[derive(Clone, Debug)]
pub struct Local {
    /// This node.
    pub node: NodeId,
    /// This process.
    pub incarnation: Incarnation,
    /// The cluster's secret.
    pub token: Token,
    /// Random bytes, never used before.
    pub nonce: [u8; 32],
}

/// Parameters of a purpose: what they say is the purpose's affair. They are proven like everything else.
pub type Params = [u8; PARAMS];

/// Who is at the other end, proven.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The node it says it is (see the module on what that is worth).
    pub node: NodeId,
    /// Its process.
    pub incarnation: Incarnation,
    /// What the connection is for.
    pub purpose: Purpose,
    /// The version both speak.
    pub version: u16,
    /// Its parameters.
    pub params: Params,
    /// The connection's secret.
    pub key: SessionKey,
}

/// Why one end gave up, as the other is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Refusal {
    /// No version in common.
    Version = 1,
    /// This listener does not serve the purpose.
    Purpose = 2,
    /// The proof is wrong.
    Token = 3,
    /// Dialed one node, reached another.
    Node = 4,
    /// It dialed itself.
    Itself = 5,
    /// Not a message that may come now.
    Malformed = 6,
    /// No room for another connection.
    Busy = 7,
}

impl Refusal {
    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            1 => Refusal::Version,
            2 => Refusal::Purpose,
            3 => Refusal::Token,
            4 => Refusal::Node,
            5 => Refusal::Itself,
            6 => Refusal::Malformed,
            7 => Refusal::Busy,
            _ => return None,
        })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::Version => "it speaks no version that we speak",
            Refusal::Purpose => "it does not serve this purpose there",
            Refusal::Token => "our proof is not from its cluster's token",
            Refusal::Node => "it wanted another node",
            Refusal::Itself => "it is this very process",
            Refusal::Malformed => "it does not understand what we sent",
            Refusal::Busy => "it has no room for another connection",
        })
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The other end's proof is not from our token.
    #[error("the peer does not know this cluster's token: check that both nodes were given the same one")]
    WrongToken,
    /// The other end's dialects and ours have nothing in common.
    #[error(
        "the peer speaks versions {min} to {max} of the wire, this program {VERSION_MIN} to {VERSION_MAX}: upgrade the older one"
    )]
    WrongVersion {
        /// Its lowest.
        min: u16,
        /// Its highest.
        max: u16,
    },
    /// It wants something that is not to be had here.
    #[error("the peer wants purpose {code}, which is not served on this address: check the port")]
    WrongPurpose {
        /// What it asked for.
        code: u8,
    },
    /// Another node is at this address.
    #[error("node {wanted} was dialed but node {found} answered: check the address")]
    WrongNode {
        /// Who was dialed.
        wanted: NodeId,
        /// Who answered.
        found: NodeId,
    },
    /// The connection leads back to this process.
    #[error("the address leads back to this very node: check it")]
    Itself,
    /// What came is not a handshake.
    #[error("what came is no handshake of Unibody ({0}): check the address")]
    Malformed(&'static str),
    /// The other end gave up.
    #[error("the peer refused: {0}")]
    Refused(Refusal),
    /// It took too long.
    #[error("the handshake was not over in time")]
    TimedOut,
    /// The connection broke.
    #[error("the connection broke during the handshake: {0}")]
    Io(#[from] io::Error),
}

/// How often it ended how. Shared by all who accept and dial.
#[derive(Debug, Default)]
pub struct Counts([AtomicU64; 9]);

/// A copy of [`Counts`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CountsNow {
    /// Peers that proved themselves.
    pub accepted: u64,
    /// [`HandshakeError::WrongToken`], and the peers' saying so of us.
    pub wrong_token: u64,
    /// [`HandshakeError::WrongVersion`], and the peers' saying so of us.
    pub wrong_version: u64,
    /// [`HandshakeError::WrongPurpose`], and the peers' saying so of us.
    pub wrong_purpose: u64,
    /// [`HandshakeError::WrongNode`] and [`HandshakeError::Itself`], and the peers' saying so of us.
    pub wrong_node: u64,
    /// [`HandshakeError::Malformed`], and the peers' saying so of us.
    pub malformed: u64,
    /// The peers had no room.
    pub busy: u64,
    /// [`HandshakeError::TimedOut`].
    pub timed_out: u64,
    /// [`HandshakeError::Io`].
    pub broken: u64,
}

impl Counts {
    /// Counts one end of a handshake.
    pub fn count<T>(&self, outcome: &Result<T, HandshakeError>) {
        use HandshakeError as E;
        let place = match outcome {
            Ok(_) => 0,
            Err(E::WrongToken | E::Refused(Refusal::Token)) => 1,
            Err(E::WrongVersion { .. } | E::Refused(Refusal::Version)) => 2,
            Err(E::WrongPurpose { .. } | E::Refused(Refusal::Purpose)) => 3,
            Err(E::WrongNode { .. } | E::Itself | E::Refused(Refusal::Node | Refusal::Itself)) => 4,
            Err(E::Malformed(_) | E::Refused(Refusal::Malformed)) => 5,
            Err(E::Refused(Refusal::Busy)) => 6,
            Err(E::TimedOut) => 7,
            Err(E::Io(_)) => 8,
        };
        self.0[place].fetch_add(1, Ordering::Relaxed);
    }

    /// The present numbers.
    pub fn now(&self) -> CountsNow {
        let at = |place: usize| self.0[place].load(Ordering::Relaxed);
        CountsNow {
            accepted: at(0),
            wrong_token: at(1),
            wrong_version: at(2),
            wrong_purpose: at(3),
            wrong_node: at(4),
            malformed: at(5),
            busy: at(6),
            timed_out: at(7),
            broken: at(8),
        }
    }
}

/// Where the end stands.
#[derive(Debug)]
enum State {
    /// Dialer: the hello is out.
    AwaitAnswer {
        purpose: Purpose,
        expect: Option<NodeId>,
    },
    /// Listener: nothing came yet.
    AwaitHello {
        serves: Vec<(Purpose, Params)>,
    },
    /// Listener: the answer is out.
    AwaitProof {
        peer: Peer,
        proof: blake3::Hash,
    },
    /// Over: everything that may follow is the purpose's.
    Done(Peer),
    Failed,
}

/// One end of a handshake: bytes in, bytes out. See the module.
///
/// Send [`Handshake::output`], read exactly [`Handshake::wants`] bytes, give them to [`Handshake::input`], and again, until
/// it wants nothing. Then send what is still to be sent and take the peer by [`Handshake::finish`]. After an error too there may be something to be sent:
/// it tells the other end why.
#[derive(Debug)]
pub struct Handshake {
    local: Local,
    state: State,
    /// What came of the message under way.
    message: [u8; MESSAGE_MAX],
    have: usize,
    output: Vec<u8>,
    /// Both first messages as sent, without the proof.
    transcript: [u8; 2 * (HEAD + IDENTITY)],
}

impl Handshake {
    /// The end that dialed. With `expect`, no other node will do.
    pub fn dial(local: Local, purpose: Purpose, params: Params, expect: Option<NodeId>) -> Self {
        let mut handshake = Self::new(local, State::AwaitAnswer { purpose, expect });
        let hello = handshake.identity(HELLO, purpose as u8, VERSION_MIN, VERSION_MAX, &params);
        handshake.transcript[..hello.len()].copy_from_slice(&hello);
        handshake.output.extend_from_slice(&hello);
        handshake
    }

    /// The end that was dialed: for each purpose that is served here, the parameters to tell.
    pub fn listen(local: Local, serves: &[(Purpose, Params)]) -> Self {
        let serves = serves.to_vec();
        Self::new(local, State::AwaitHello { serves })
    }

    fn new(local: Local, state: State) -> Self {
        Handshake {
            local,
            state,
            message: [0; MESSAGE_MAX],
            have: 0,
            output: Vec::with_capacity(MESSAGE_MAX),
            transcript: [0; 2 * (HEAD + IDENTITY)],
        }
    }

    /// Instead of an answer: there is no room for another connection. Send [`Handshake::output`] and hang up.
    pub fn refuse_busy(&mut self) {
        self.refuse(Refusal::Busy);
        self.state = State::Failed;
    }

    /// What is to be sent, all of it; afterwards nothing is left.
    pub fn output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// How many bytes are to be read next. Zero: none, it is over.
    pub fn wants(&self) -> usize {
        match self.state {
            State::Done(_) | State::Failed => 0,
            _ if self.have < HEAD => HEAD - self.have,
            _ => HEAD + self.body() - self.have,
        }
    }

    /// Length of the body that belongs to the head that came; of a head that does not fit, none.
    fn body(&self) -> usize {
        match (&self.state, self.message[8]) {
            (State::AwaitAnswer { .. }, ANSWER) => IDENTITY + PROOF,
            (State::AwaitHello { .. }, HELLO) => IDENTITY,
            (State::AwaitProof { .. }, PROVE) => PROOF,
            _ => 0,
        }
    }

    /// Takes bytes from the peer: at most as many as are wanted.
    ///
    /// # Errors
    /// The handshake has failed: send what is to be sent and hang up.
    pub fn input(&mut self, bytes: &[u8]) -> Result<(), HandshakeError> {
        assert!(bytes.len() <= self.wants(), "no more than is wanted");
        self.message[self.have..self.have + bytes.len()].copy_from_slice(bytes);
        let head_was_there = self.have >= HEAD;
        self.have += bytes.len();
        let result = if self.have < HEAD {
            Ok(())
        } else {
            let head = if head_was_there { Ok(()) } else { self.head() };
            match head {
                Ok(()) if self.have == HEAD + self.body() => self.take_message(),
                head => head,
            }
        };
        if let Err(error) = &result {
            if let Some(reason) = reason(error) {
                self.refuse(reason);
            }
            self.state = State::Failed;
        }
        result
    }

    /// The proven peer, once nothing is wanted any more.
    pub fn finish(self) -> Option<Peer> {
        match self.state {
            State::Done(peer) => Some(peer),
            _ => None,
        }
    }

    /// Looks at the head of a message before its body is waited for.
    fn head(&self) -> Result<(), HandshakeError> {
        let head = &self.message[..HEAD];
        if head[..8] != MAGIC {
            return Err(HandshakeError::Malformed("foreign magic"));
        }
        let (kind, code) = (head[8], head[9]);
        let (min, max) = (u16_at(head, 10), u16_at(head, 12));
        match (&self.state, kind) {
            (_, REFUSAL) => match Refusal::from_code(code) {
                Some(Refusal::Version) => Err(HandshakeError::WrongVersion { min, max }),
                Some(reason) => Err(HandshakeError::Refused(reason)),
                None => Err(HandshakeError::Malformed("unknown refusal")),
            },
            (State::AwaitHello { serves }, HELLO) => {
                // The version first: what a later one means by the rest is not known here.
                if min > max {
                    return Err(HandshakeError::Malformed("versions"));
                }
                if max < VERSION_MIN || min > VERSION_MAX {
                    return Err(HandshakeError::WrongVersion { min, max });
                }
                if serves.iter().all(|(purpose, _)| *purpose as u8 != code) {
                    return Err(HandshakeError::WrongPurpose { code });
                }
                Ok(())
            }
            (State::AwaitAnswer { purpose, .. }, ANSWER) => {
                if min != max {
                    return Err(HandshakeError::Malformed("version"));
                }
                if !(VERSION_MIN..=VERSION_MAX).contains(&min) {
                    return Err(HandshakeError::WrongVersion { min, max });
                }
                if code != *purpose as u8 {
                    return Err(HandshakeError::WrongPurpose { code });
                }
                Ok(())
            }
            (State::AwaitProof { peer, .. }, PROVE) => {
                if head[..HEAD] != self::head(PROVE, peer.purpose as u8, 0, 0) {
                    return Err(HandshakeError::Malformed("proof"));
                }
                Ok(())
            }
            _ => Err(HandshakeError::Malformed("unexpected message")),
        }
    }

    fn take_message(&mut self) -> Result<(), HandshakeError> {
        self.have = 0;
        match std::mem::replace(&mut self.state, State::Failed) {
            State::AwaitHello { serves } => self.take_hello(&serves),
            State::AwaitAnswer { purpose, expect } => self.take_answer(purpose, expect),
            State::AwaitProof { peer, proof } => {
                // Comparing hashes of blake3 takes the same time wherever they differ.
                if proof != self.proof_at(HEAD) {
                    return Err(HandshakeError::WrongToken);
                }
                self.state = State::Done(peer);
                Ok(())
            }
            State::Done(_) | State::Failed => unreachable!("nothing is wanted in this state"),
        }
    }

    fn take_hello(&mut self, serves: &[(Purpose, Params)]) -> Result<(), HandshakeError> {
        let hello = &self.message[..HEAD + IDENTITY];
        let purpose = Purpose::from_code(hello[9]).ok_or(HandshakeError::Malformed("purpose"))?;
        let (_, params) = serves
            .iter()
            .find(|(served, _)| *served == purpose)
            .ok_or(HandshakeError::WrongPurpose { code: hello[9] })?;
        let version = u16_at(hello, 12).min(VERSION_MAX);
        self.transcript[..hello.len()].copy_from_slice(hello);
        let answer = self.identity(ANSWER, purpose as u8, version, version, params);
        self.transcript[HEAD + IDENTITY..].copy_from_slice(&answer);
        self.not_myself()?;
        self.output.extend_from_slice(&answer);
        let own = self.prove(b"listener");
        self.output.extend_from_slice(own.as_bytes());
        self.state = State::AwaitProof {
            peer: self.peer(purpose, version),
            proof: self.prove(b"dialer"),
        };
        Ok(())
    }

    fn take_answer(&mut self, purpose: Purpose, expect: Option<NodeId>) -> Result<(), HandshakeError> {
        self.transcript[HEAD + IDENTITY..].copy_from_slice(&self.message[..HEAD + IDENTITY]);
        if self.prove(b"listener") != self.proof_at(HEAD + IDENTITY) {
            return Err(HandshakeError::WrongToken);
        }
        self.not_myself()?;
        let peer = self.peer(purpose, u16_at(&self.message, 10));
        if let Some(wanted) = expect.filter(|wanted| *wanted != peer.node) {
            let found = peer.node;
            return Err(HandshakeError::WrongNode { wanted, found });
        }
        let own = self.prove(b"dialer");
        self.output.extend_from_slice(&head(PROVE, purpose as u8, 0, 0));
        self.output.extend_from_slice(own.as_bytes());
        self.state = State::Done(peer);
        Ok(())
    }

    fn not_myself(&self) -> Result<(), HandshakeError> {
        if incarnation_at(&self.message) == self.local.incarnation {
            return Err(HandshakeError::Itself);
        }
        Ok(())
    }

    /// Who sent the message at hand. To be believed only once proven.
    fn peer(&self, purpose: Purpose, version: u16) -> Peer {
        Peer {
            node: NodeId(u64_at(&self.message, HEAD)),
            incarnation: incarnation_at(&self.message),
            purpose,
            version,
            params: array_at(&self.message, HEAD + 64),
            key: SessionKey(*self.prove(b"session").as_bytes()),
        }
    }

    fn prove(&self, role: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.local.token.0);
        // No role is the beginning of another one with its length before it.
        hasher.update(&[role.len() as u8]);
        hasher.update(role);
        hasher.update(&self.transcript);
        hasher.finalize()
    }

    fn proof_at(&self, at: usize) -> blake3::Hash {
        blake3::Hash::from_bytes(array_at(&self.message, at))
    }

    fn identity(&self, kind: u8, code: u8, min: u16, max: u16, params: &Params) -> [u8; HEAD + IDENTITY] {
        let mut bytes = [0; HEAD + IDENTITY];
        bytes[..HEAD].copy_from_slice(&head(kind, code, min, max));
        bytes[16..24].copy_from_slice(&self.local.node.0.to_le_bytes());
        // 24: eight bytes of zeros
        bytes[32..48].copy_from_slice(&self.local.incarnation.0.to_le_bytes());
        bytes[48..80].copy_from_slice(&self.local.nonce);
        bytes[80..].copy_from_slice(params);
        bytes
    }

    fn refuse(&mut self, reason: Refusal) {
        self.output.clear();
        let message = head(REFUSAL, reason as u8, VERSION_MIN, VERSION_MAX);
        self.output.extend_from_slice(&message);
    }
}

/// What the other end is told of our error, if anything.
fn reason(error: &HandshakeError) -> Option<Refusal> {
    match error {
        HandshakeError::WrongToken => Some(Refusal::Token),
        HandshakeError::WrongVersion { .. } => Some(Refusal::Version),
        HandshakeError::WrongPurpose { .. } => Some(Refusal::Purpose),
        HandshakeError::WrongNode { .. } => Some(Refusal::Node),
        HandshakeError::Itself => Some(Refusal::Itself),
        HandshakeError::Malformed(_) => Some(Refusal::Malformed),
        HandshakeError::Refused(_) | HandshakeError::TimedOut | HandshakeError::Io(_) => None,
    }
}

fn head(kind: u8, code: u8, min: u16, max: u16) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..8].copy_from_slice(&MAGIC);
    (head[8], head[9]) = (kind, code);
    head[10..12].copy_from_slice(&min.to_le_bytes());
    head[12..14].copy_from_slice(&max.to_le_bytes());
    head
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("N bytes")
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

fn incarnation_at(message: &[u8]) -> Incarnation {
    Incarnation(u128::from_le_bytes(array_at(message, 32)))
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
