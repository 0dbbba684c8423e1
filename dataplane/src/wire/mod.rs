//! Between nodes: proving who one is, framing, and the link that carries an owner's requests to the replicas of a peer.
//!
//! * `handshake`: mutual proof of the cluster's token, before anything else is read
//!
//! Formats: `docs/formats/wire.md`.

pub mod handshake;
