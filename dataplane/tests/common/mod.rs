//! What the mirror's simulation is made of.
#![allow(clippy::needless_range_loop, clippy::derivable_impls)]
#![allow(dead_code, missing_docs, unreachable_pub)]

pub mod checker;
pub mod model;
pub mod world;
