//! What an owner says to a replica and what it hears back.
//!
//! The same messages go to a store on this reactor, through a mailbox to one on another, and (in a cluster) over the
//! wire. Every request touches at most one extent, or one region for a digest; the mirror splits larger ones.
//!
//! Obligations of a replica:
//! * A request of a generation below the one it was sealed with is refused (`Status::StaleGeneration`), and so is one of
//!   a higher generation for which no `Seal` came first.
//! * `Seal` is answered once the generation is durable and every operation of a lower generation has ended.
//! * A write or zero is answered once the device has both data and record; `Flush` once all answered before it is durable.
//! * Operations on one extent take effect in the order they came; operations on different extents in any order.
//! * A chunk (or incarnation) it does not hold is `Status::NoChunk`, never zeros.
//! * A region's dirty mark is cleared only when everything in the region is durable and no version written there is above
//!   the `stable` of the latest header. A write that only this replica has is found by its dirty mark alone.
//! * After a failed flush, journal write or data write it answers `Status::DiskFailed` to everything, for ever.

use crate::ids::{
    BLOCKS_PER_EXTENT, BlockMask, BootId, ChunkKey, DiskUuid, EXTENTS_PER_REGION, Generation, PowerId,
    Version, VolumeId,
};
use crate::memory::Payload;

/// Checksums (CRC-32C, iSCSI polynomial) of the blocks of one extent; entry `i` belongs to block `i` of the extent.
pub type Crcs = [u32; BLOCKS_PER_EXTENT];

/// Comes with every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The volume spoken for.
    pub volume: VolumeId,
    /// The speaker's generation.
    pub generation: Generation,
    /// Every write up to here is acknowledged and flushed on all in-sync replicas, or known to be on none; and no region
    /// waits to be made equal. Stays as it is while one does.
    pub stable: Version,
}

/// A replica of a chunk, exactly: see [`ChunkKey`] for why the incarnation is part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkRef {
    /// Which chunk.
    pub key: ChunkKey,
    /// Configuration number at which the slot was given to this disk.
    pub incarnation: u32,
}

/// Blocks of one extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The replica.
    pub chunk: ChunkRef,
    /// Index of the extent in its chunk, below `EXTENTS_PER_CHUNK`.
    pub extent: u16,
    /// First block in the extent.
    pub first: u8,
    /// Blocks, at least one; `first + count <= 16`.
    pub count: u8,
}

impl Span {
    /// The blocks as a mask.
    #[inline]
    pub fn mask(&self) -> BlockMask {
        crate::ids::block_mask(self.first, self.count)
    }
}

/// What a record says of an extent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtentImage {
    /// The last write that touched it; zero: the extent is absent.
    pub version: Version,
    /// Blocks that hold data.
    pub valid: BlockMask,
    /// Blocks that are known to be zero (trimmed or written with zeroes), as against never written in this layer.
    pub zero: BlockMask,
    /// Blocks of which no valid copy was left anywhere: an error until overwritten.
    pub lost: BlockMask,
    /// Checksums of the valid blocks; zero elsewhere.
    pub crcs: Crcs,
}

/// One extent in a region's digest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExtentDigest {
    /// The record.
    pub image: ExtentImage,
    /// Valid blocks that were read and did not match their checksum (only a verifying digest looks), or whose state is
    /// unknown because the disk is suspect.
    pub bad: BlockMask,
    /// Checksums of what the device really returned for the blocks in `bad`; `unreadable` ones have none.
    pub found: Crcs,
    /// Blocks in `bad` that the device could not read at all, or of which nothing is known.
    pub unreadable: BlockMask,
}

/// A request. `Payload` memory stays the sender's until the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Refuse all generations below the header's from now on. Answer: `Reply::Sealed`.
    Seal,
    /// Hold a new, empty replica. Idempotent for the same incarnation; an older incarnation is dropped first.
    CreateChunk(ChunkRef),
    /// Forget a replica of this or an older incarnation and free its space. Idempotent.
    DropChunk(ChunkRef),
    /// Store blocks. `crcs[i]` is the checksum of block `i` of the extent; `data` begins with block `span.first`.
    Write {
        /// Where.
        span: Span,
        /// The write's version.
        version: Version,
        /// Checksums, indexed by block of the extent.
        crcs: Crcs,
        /// `span.count` blocks.
        data: Payload,
    },
    /// Make blocks read as zeros and give back space where a whole extent is empty.
    Zero {
        /// Where.
        span: Span,
        /// The operation's version.
        version: Version,
    },
    /// Read blocks into `data`. Blocks that are holes or bad are left untouched there and named in the answer.
    Read {
        /// Where.
        span: Span,
        /// Return what the device has even where its checksum is wrong (`Reply::Read::crcs` tells what was found).
        raw: bool,
        /// Room for `span.count` blocks.
        data: Payload,
    },
    /// Make everything answered so far durable.
    Flush,
    /// Say that the header's generation is still the one that the replica was sealed with. Reads of an owner that can not be
    /// sure of its lease are believed only after all required replicas said so.
    Confirm,
    /// Tell what a region holds. With `verify`, or where the region is in doubt, every valid block is read and checked.
    Digest {
        /// The replica.
        chunk: ChunkRef,
        /// Index of the region in its chunk.
        region: u8,
        /// Read all data, in doubt or not (scrub).
        verify: bool,
    },
    /// Make an extent exactly `image`, whatever version it has (resync, repair, adoption). Blocks in `write` come with
    /// the request; other blocks valid in `image` are already there with the same checksum.
    Install {
        /// The replica.
        chunk: ChunkRef,
        /// Index of the extent in its chunk.
        extent: u16,
        /// What it becomes; version zero makes it absent.
        image: ExtentImage,
        /// Blocks whose data is sent.
        write: BlockMask,
        /// A whole extent's room: block `i` at byte `i * 4096`; only blocks in `write` matter.
        data: Payload,
    },
    /// The region was compared with all in-sync replicas, equalised and flushed: it is no longer in doubt. Before that
    /// is durable, what is not valid of its extents is zero, durably.
    Settle {
        /// The replica.
        chunk: ChunkRef,
        /// Index of the region in its chunk.
        region: u8,
    },
}

/// Why a request was not carried out. One byte; the value says who has to act.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// The owner is no longer the owner, or forgot to seal.
    StaleGeneration,
    /// The replica is not here: the owner's map is old, or the disk lost it.
    NoChunk,
    /// No room; nothing was changed.
    NoSpace,
    /// The disk has failed and answers nothing else any more.
    DiskFailed,
    /// The request breaks the rules of this module (a bug or a hostile peer); nothing was changed.
    Invalid,
}

/// What a sealed replica says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sealed {
    /// The disk that answers.
    pub disk: DiskUuid,
    /// Its present boot.
    pub boot: BootId,
    /// Its present span of power.
    pub power: PowerId,
    /// Damage was found when it was opened (rot in journal or records): its holes are unknown and it is no source while
    /// an undamaged in-sync replica exists.
    pub suspect: bool,
    /// The replicas of the volume that it holds, with the mask of regions that are dirty or in doubt.
    pub chunks: Vec<(ChunkRef, u64)>,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Done (`CreateChunk`, `DropChunk`, `Write`, `Zero`, `Install`, `Settle`, `Flush`, `Confirm`).
    Done,
    /// To `Seal`.
    Sealed(Box<Sealed>),
    /// To `Read`. All masks are within the span asked for.
    Read {
        /// Blocks without data here: they read as zeros.
        holes: BlockMask,
        /// Blocks with no believable data: checksum mismatch, media error, recorded lost, or unknown on a suspect disk.
        bad: BlockMask,
        /// Of `bad`: recorded lost, so that no replica can help.
        lost: BlockMask,
        /// Checksums of the data that was read, indexed by block of the extent.
        crcs: Crcs,
    },
    /// To `Digest`.
    Digest {
        /// The replica had the region in doubt (and so verified it).
        in_doubt: bool,
        /// The extents of the region in order.
        extents: Box<[ExtentDigest; EXTENTS_PER_REGION]>,
    },
    /// Not carried out.
    Refused(Status),
}
