//! Between nodes: proving who one is, framing, and the link that carries an owner's requests to the replicas of a peer.
//!
//! * `handshake`: mutual proof of the cluster's token, before anything else is read
//!
//! * `frame`: the bytes of requests and answers
//!
//! Formats: `docs/formats/wire.md`.

pub mod frame;
#[doc(hidden)]
pub mod fuzz;
pub mod handshake;
