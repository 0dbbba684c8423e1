//! The bytes of the format, frozen.
