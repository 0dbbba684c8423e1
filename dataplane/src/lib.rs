//! The I/O path of Unibody: from a guest's descriptor to a disk's block and back.
//!
//! It knows nothing of Raft, virtual machines or HTTP. `docs/life-of-a-write.md` and `docs/life-of-a-read.md` walk
//! through it file by file.

pub mod buffers;
pub mod checksum;
pub mod config;
pub mod disk;
pub mod frontend;
pub mod geometry;
pub mod ids;
pub mod memory;
pub mod mirror;
pub mod plane;
pub mod planted;
pub mod reactor;
pub mod replica;
mod shard;
pub mod store;
pub mod wire;
