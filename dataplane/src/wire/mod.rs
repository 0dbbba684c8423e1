//! Between nodes: proving who one is, framing, and the link that carries an owner's requests to the replicas of a peer.
//!
//! * `handshake`: mutual proof of the cluster's token, before anything else is read
//!
//! * `frame` and `message`: the bytes of requests and answers
//! * `stream`: frames gathered into one send, and what came cut into frames
//! * `asker`: the owner's end of a link: requests out, answers in
//! * `server`: the replica's end: requests in, answers out
//! * `socket`: what the kernel is told about a connection
//!
//! A link leads from one reactor of an owner's node to one reactor of a replica's node and outlives its connections.
//!
//! Formats: `docs/formats/wire.md`.

pub mod asker;
mod blocking;
pub mod frame;
#[doc(hidden)]
pub mod fuzz;
pub mod handshake;
pub mod message;
pub mod server;
pub mod socket;
pub mod stream;

/// What one end of a link has seen, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounts {
    /// Connections it has had.
    pub sessions: u64,
    /// Requests asked, or received.
    pub requests: u64,
    /// Requests sent again over a later connection.
    pub resent: u64,
    /// Answers that nobody waited for any more.
    pub late: u64,
    /// Requests refused here, without asking a disk.
    pub refused: u64,
    /// Blocks of data that did not match their checksum on arrival.
    pub mismatches: u64,
    /// Connections ended because of what came.
    pub bad_frames: u64,
    /// Requests that had to wait for a credit.
    pub waits: u64,
    /// Bytes sent.
    pub bytes_sent: u64,
    /// Bytes received.
    pub bytes_received: u64,
}
