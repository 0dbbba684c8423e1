//! Tests that cross crates: the deterministic simulator of a node's data plane and the register checker.
//!
//! `docs/testing.md` tells what is simulated and how to replay a seed.

pub mod checker;
pub mod sim;
