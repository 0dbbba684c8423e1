//! Machinery for the tests that cross crates.

pub mod guest;
