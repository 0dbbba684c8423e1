//! What a node knows and decides apart from moving data: disks, volumes, placement, and the agent that acts on it.
//!
//! `state` holds the rules, `planner` the placement; `local` keeps the state for one node, `raft` for a cluster; `admin` is what an operator's
//! program says, `node` is the agent.

pub mod admin;
pub mod api;
pub mod cluster;
mod durable;
mod envelope;
pub mod local;
pub mod node;
mod pace;
pub mod planner;
pub mod raft;
pub mod state;

#[cfg(test)]
mod rules;
