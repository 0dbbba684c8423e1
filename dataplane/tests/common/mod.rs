//! What the mirror's simulation is made of.
#![allow(dead_code, missing_docs, unreachable_pub)]

pub mod checker;
pub mod model;
pub mod world;
