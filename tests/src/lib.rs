//! Tests that cross crates: the deterministic simulator of a node's data plane, the register checker, and guests.
//!
//! `docs/testing.md` tells what is simulated and how to replay a seed.

pub mod checker;
pub mod cluster;
pub mod guest;
pub mod node;
pub mod sim;
