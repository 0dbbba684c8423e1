//! Placeholder crate text, replaced as the modules land.
