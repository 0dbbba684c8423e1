//! The words of the data plane as types: sizes, names and versions.
//!
//! Everything here is plain data. A number that means something different from another number has a type of its own,
//! so that a chunk can not be mistaken for an extent.

use std::fmt;

/// Unit of checksum and of atomicity, bytes.
pub const BLOCK: usize = 4096;
/// Unit of allocation on a disk, bytes.
pub const EXTENT: usize = 64 * 1024;
/// Blocks of an extent: one bit each in a `u16`.
pub const BLOCKS_PER_EXTENT: usize = EXTENT / BLOCK;
/// Unit of placement, bytes: a piece of a volume's striped address space, kept as several replicas.
pub const CHUNK: u64 = 64 * 1024 * 1024;
/// Extents of a chunk.
pub const EXTENTS_PER_CHUNK: usize = CHUNK as usize / EXTENT;
/// Unit of dirty marks, of reconciling and of rebuilding, bytes.
pub const REGION: usize = 1024 * 1024;
/// Extents of a region.
pub const EXTENTS_PER_REGION: usize = REGION / EXTENT;
/// Regions of a chunk: one bit each in a `u64`.
pub const REGIONS_PER_CHUNK: usize = CHUNK as usize / REGION;

/// A virtual disk. Never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeId(pub u32);

/// One level of a volume's contents (the head, later snapshots). Unique in the cluster, never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(pub u32);

/// Counts the owners of a volume; the control state hands out the next one. 24 bits are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u32);

impl Generation {
    /// The last there can be: generations are counted in 24 bits.
    pub const LAST: Generation = Generation((1 << 24) - 1);
}

/// Orders every write of a volume across its owners: `generation << 40 | counter`. Zero: never written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

impl Version {
    /// Bits of the counter. A new generation is taken before half of its range is used.
    pub const COUNTER_BITS: u32 = 40;
    /// The version no write has.
    pub const ZERO: Version = Version(0);

    /// The version of the `counter`-th write of an owner.
    pub fn new(generation: Generation, counter: u64) -> Self {
        assert!(counter < 1 << Self::COUNTER_BITS && generation.0 < 1 << 24);
        Version(u64::from(generation.0) << Self::COUNTER_BITS | counter)
    }

    /// The owner that issued it.
    pub fn generation(self) -> Generation {
        Generation((self.0 >> Self::COUNTER_BITS) as u32)
    }

    /// Its place in that owner's order.
    pub fn counter(self) -> u64 {
        self.0 & ((1 << Self::COUNTER_BITS) - 1)
    }
}

/// Names a chunk of one layer of one volume, and the incarnation of the replica that is meant.
///
/// The incarnation is the configuration number at which the slot was given to the disk: a message for an earlier
/// incarnation of a replica never touches the present one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkKey {
    /// The volume.
    pub volume: VolumeId,
    /// The layer of that volume.
    pub layer: LayerId,
    /// Index of the chunk in the volume's striped address space.
    pub chunk: u32,
}

/// A disk, for life: drawn when it is formatted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskUuid(pub u128);

/// One opening of a disk: drawn anew each time. Two equal boot ids mean that the disk's process has forgotten nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BootId(pub u128);

/// One span of power of a disk (the host's boot). Two equal power ids mean that everything the device completed is still
/// there, flushed or not, even where the boot id changed because the process was killed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PowerId(pub u128);

macro_rules! hex_display {
    ($($t:ty),*) => {$(
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }
    )*};
}
hex_display!(DiskUuid, BootId, PowerId);

/// A set of blocks of one extent: bit `i` is block `i`.
pub type BlockMask = u16;

/// The mask of `count` blocks from block `first`.
#[inline]
pub fn block_mask(first: u8, count: u8) -> BlockMask {
    debug_assert!(usize::from(first) + usize::from(count) <= BLOCKS_PER_EXTENT);
    (((1u32 << count) - 1) << first) as BlockMask
}

/// Calls `visit(first, count)` for each run of a mask.
#[inline]
pub fn mask_runs(mut mask: BlockMask, mut visit: impl FnMut(u8, u8)) {
    while mask != 0 {
        let first = mask.trailing_zeros();
        let count = (mask >> first).trailing_ones();
        visit(first as u8, count as u8);
        mask &= !block_mask(first as u8, count as u8);
    }
}
