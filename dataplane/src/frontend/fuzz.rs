//! Entry point for fuzzing.
/// Placeholder
pub fn fuzz_chain(_data: &[u8]) {}
