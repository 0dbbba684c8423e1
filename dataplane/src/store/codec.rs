//! The bytes of every structure on a disk: superblock, checkpoint header, table entries, records, journal blocks.
//!
//! Little-endian, fixed places, no padding that is not written as zero; `docs/formats/disk.md` is the normative text.
//! Decoding never trusts a byte: what does not check is an error value, never a panic. Absent on purpose: I/O and policy.

use crate::checksum::crc32c;
use crate::ids::{
    BLOCK, BLOCKS_PER_EXTENT, BlockMask, ChunkKey, EXTENTS_PER_CHUNK, LayerId, Version, VolumeId,
};
use crate::replica::{ChunkRef, Crcs, ExtentImage};

/// The format this program writes, and the newest it reads.
pub const FORMAT_VERSION: u32 = 1;
/// Bytes of an extent record.
pub const RECORD: usize = 128;
/// Records of a page.
pub const RECORDS_PER_PAGE: usize = BLOCK / RECORD;
/// Bytes of a chunk table entry.
pub const CHUNK_ENTRY: usize = 64;
/// Bytes of a volume table entry.
pub const VOLUME_ENTRY: usize = 16;
/// Bytes of a journal block's header.
pub const JOURNAL_HEADER: usize = 128;
/// Bytes of the longest journal entry.
pub const ENTRY_MAX: usize = ENTRY_HEADER + RECORD;

/// Windows at a time.
pub const WINDOWS: usize = 4;
/// No window.
pub const NO_WINDOW: u32 = u32::MAX;

const ENTRY_HEADER: usize = 16;
pub(super) const SUPER_MAGIC: u64 = u64::from_le_bytes(*b"UniBodyD");
const HEADER_MAGIC: u64 = u64::from_le_bytes(*b"UniBodyC");
const JOURNAL_MAGIC: u64 = u64::from_le_bytes(*b"UniBodyJ");

pub(super) fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
pub(super) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}
pub(super) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
fn get_u128(bytes: &[u8], at: usize) -> u128 {
    u128::from_le_bytes(bytes[at..at + 16].try_into().expect("sixteen bytes"))
}
fn get_hash(bytes: &[u8], at: usize) -> [u8; 32] {
    bytes[at..at + 32].try_into().expect("thirty-two bytes")
}
fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// What seeds the checksums of one disk: its uuid, so that a structure of another disk, or of this one before it was
/// formatted anew, never checks.
#[derive(Clone, Debug)]
pub struct Seed {
    key: [u8; 32],
    uuid: [u8; 16],
}

impl Seed {
    /// The seed of the disk `uuid`.
    pub fn new(uuid: u128) -> Self {
        let bytes = uuid.to_le_bytes();
        let mut key = [0; 32];
        key[..16].copy_from_slice(&bytes);
        key[16..].copy_from_slice(b"unibody disk v1\0");
        Seed { key, uuid: bytes }
    }

    /// Keyed hash of `bytes`, in which the 32 bytes at `hole` count as zero.
    fn hash(&self, bytes: &[u8], hole: usize) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&bytes[..hole]);
        hasher.update(&[0; 32]);
        hasher.update(&bytes[hole + 32..]);
        *hasher.finalize().as_bytes()
    }

    /// The same where those bytes are zero: in one call, which hashes four times as fast.
    fn hash_whole(&self, bytes: &[u8]) -> [u8; 32] {
        *blake3::keyed_hash(&self.key, bytes).as_bytes()
    }

    /// A hasher over the tables of a checkpoint.
    pub fn table_hasher(&self) -> blake3::Hasher {
        blake3::Hasher::new_keyed(&self.key)
    }

    /// What the first block of a new chain names as its predecessor.
    pub fn chain_start(&self, boot: u128, sequence: u64) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(b"chain");
        hasher.update(&boot.to_le_bytes());
        hasher.update(&sequence.to_le_bytes());
        *hasher.finalize().as_bytes()
    }

    fn record_crc(&self, slot: u32, bytes: &[u8]) -> u32 {
        let mut seeded = [0; 20 + RECORD];
        seeded[..16].copy_from_slice(&self.uuid);
        seeded[16..20].copy_from_slice(&slot.to_le_bytes());
        seeded[20..20 + bytes.len()].copy_from_slice(bytes);
        crc32c(&seeded[..20 + bytes.len()])
    }
}

/// The superblock: what the disk is and where its areas lie. Offsets and sizes are in blocks of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// The disk's name for life.
    pub uuid: u128,
    /// Blocks of the disk that the format uses; the copy of the superblock is the last of them.
    pub blocks: u64,
    /// Journal ring, blocks.
    pub journal_blocks: u64,
    /// Data extents, and as many records.
    pub slots: u64,
    /// Entries of the chunk table.
    pub chunk_capacity: u32,
    /// Entries of the volume table.
    pub volume_capacity: u32,
}

/// Why a superblock is not one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SuperError {
    /// All zero: a blank disk.
    Blank,
    /// Another magic: somebody else's disk.
    Foreign,
    /// Ours, of a newer format.
    Newer(u32),
    /// Ours, but the checksum or a field is wrong.
    Damaged,
}

impl Superblock {
    /// As a block.
    pub fn encode(&self) -> [u8; BLOCK] {
        let mut b = [0; BLOCK];
        put(&mut b, 0, &SUPER_MAGIC.to_le_bytes());
        put(&mut b, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut b, 16, &self.uuid.to_le_bytes());
        put(&mut b, 32, &self.blocks.to_le_bytes());
        put(&mut b, 40, &self.journal_blocks.to_le_bytes());
        put(&mut b, 48, &self.slots.to_le_bytes());
        put(&mut b, 56, &self.chunk_capacity.to_le_bytes());
        put(&mut b, 60, &self.volume_capacity.to_le_bytes());
        let hash = blake3::hash(&b[..BLOCK - 32]);
        put(&mut b, BLOCK - 32, hash.as_bytes());
        b
    }

    /// From a block.
    ///
    /// # Errors
    /// See [`SuperError`]. Whether the areas fit is [`super::layout::Layout`]'s business.
    pub fn decode(b: &[u8]) -> Result<Self, SuperError> {
        let magic = get_u64(b, 0);
        if magic != SUPER_MAGIC {
            let blank = b.iter().all(|&x| x == 0);
            return Err(if blank {
                SuperError::Blank
            } else {
                SuperError::Foreign
            });
        }
        let version = get_u32(b, 8);
        let intact = blake3::hash(&b[..BLOCK - 32]).as_bytes()[..] == b[BLOCK - 32..BLOCK];
        if intact && version > FORMAT_VERSION {
            return Err(SuperError::Newer(version));
        }
        if !intact || version != FORMAT_VERSION {
            return Err(SuperError::Damaged);
        }
        Ok(Superblock {
            uuid: get_u128(b, 16),
            blocks: get_u64(b, 32),
            journal_blocks: get_u64(b, 40),
            slots: get_u64(b, 48),
            chunk_capacity: get_u32(b, 56),
            volume_capacity: get_u32(b, 60),
        })
    }
}

/// No sequence of checkpoints or journal blocks gets so far in the life of a disk; what says so is not believed.
pub(super) const SEQUENCE_MAX: u64 = 1 << 62;

/// The head of a checkpoint area: written last, so that an intact one vouches for tables, pages and tail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointHeader {
    /// Counts checkpoints; the higher intact one holds.
    pub sequence: u64,
    /// First journal block that must be replayed.
    pub tail: u64,
    /// What that block names as its predecessor.
    pub tail_hash: [u8; 32],
    /// Boot whose chain it is.
    pub boot: u128,
    /// Span of power of that boot.
    pub power: u128,
    /// Entries (from the first) of the volume table that are written.
    pub volumes: u32,
    /// Entries (from the first) of the chunk table that are written.
    pub chunks: u32,
    /// The disk was closed: the journal is empty, and only what was not stable is dirty.
    pub clean: bool,
    /// Hash of the written table blocks.
    pub tables: [u8; 32],
    /// Windows that slots were taken from, see `window.rs`.
    pub windows: [u32; WINDOWS],
}

impl CheckpointHeader {
    /// As a block of area `area` (0 or 1).
    pub fn encode(&self, seed: &Seed, area: u32, b: &mut [u8]) {
        b[..BLOCK].fill(0);
        put(b, 0, &HEADER_MAGIC.to_le_bytes());
        put(b, 8, &FORMAT_VERSION.to_le_bytes());
        put(b, 12, &area.to_le_bytes());
        put(b, 16, &self.sequence.to_le_bytes());
        put(b, 24, &self.tail.to_le_bytes());
        put(b, 32, &self.tail_hash);
        put(b, 64, &self.boot.to_le_bytes());
        put(b, 80, &self.power.to_le_bytes());
        put(b, 96, &self.volumes.to_le_bytes());
        put(b, 100, &self.chunks.to_le_bytes());
        put(b, 104, &u32::from(self.clean).to_le_bytes());
        put(b, 112, &self.tables);
        for (n, window) in self.windows.iter().enumerate() {
            put(b, 144 + 4 * n, &window.to_le_bytes());
        }
        let hash = seed.hash(&b[..BLOCK], BLOCK - 32);
        put(b, BLOCK - 32, &hash);
    }

    /// From a block of area `area`; `None` where it does not check.
    pub fn decode(seed: &Seed, area: u32, b: &[u8]) -> Option<Self> {
        let good = get_u64(b, 0) == HEADER_MAGIC
            && get_u32(b, 8) == FORMAT_VERSION
            && get_u32(b, 12) == area
            && get_u64(b, 16) <= SEQUENCE_MAX
            && get_u64(b, 24) <= SEQUENCE_MAX
            && seed.hash(&b[..BLOCK], BLOCK - 32)[..] == b[BLOCK - 32..BLOCK];
        good.then(|| CheckpointHeader {
            sequence: get_u64(b, 16),
            tail: get_u64(b, 24),
            tail_hash: get_hash(b, 32),
            boot: get_u128(b, 64),
            power: get_u128(b, 80),
            volumes: get_u32(b, 96),
            chunks: get_u32(b, 100),
            clean: get_u32(b, 104) != 0,
            tables: get_hash(b, 112),
            windows: std::array::from_fn(|n| get_u32(b, 144 + 4 * n)),
        })
    }
}

/// What a chunk table entry is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChunkState {
    /// Unused.
    #[default]
    Free,
    /// A replica that is served.
    Live,
    /// Dropped: its extents are being freed.
    Dropping,
}

/// A chunk table entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkEntry {
    /// What it is.
    pub state: ChunkState,
    /// The replica.
    pub chunk: ChunkRef,
    /// Regions that may hold writes that are not durable.
    pub dirty: u64,
    /// Regions whose blocks must be verified before they are believed.
    pub in_doubt: u64,
    /// Extents that have a record.
    pub extents: u32,
    /// Damage was found: in regions in doubt, a missing block is unknown and not a hole.
    pub suspect: bool,
}

impl Default for ChunkEntry {
    fn default() -> Self {
        ChunkEntry {
            state: ChunkState::Free,
            chunk: ChunkRef {
                key: ChunkKey {
                    volume: VolumeId(0),
                    layer: LayerId(0),
                    chunk: 0,
                },
                incarnation: 0,
            },
            dirty: 0,
            in_doubt: 0,
            extents: 0,
            suspect: false,
        }
    }
}

impl ChunkEntry {
    /// As the 64 bytes of an entry.
    pub fn encode(&self, b: &mut [u8]) {
        b[..CHUNK_ENTRY].fill(0);
        let state = match self.state {
            ChunkState::Free => return,
            ChunkState::Live => 1u16,
            ChunkState::Dropping => 2,
        };
        put(b, 0, &state.to_le_bytes());
        put(b, 2, &u16::from(self.suspect).to_le_bytes());
        put(b, 4, &self.chunk.key.volume.0.to_le_bytes());
        put(b, 8, &self.chunk.key.layer.0.to_le_bytes());
        put(b, 12, &self.chunk.key.chunk.to_le_bytes());
        put(b, 16, &self.chunk.incarnation.to_le_bytes());
        put(b, 20, &self.extents.to_le_bytes());
        put(b, 24, &self.dirty.to_le_bytes());
        put(b, 32, &self.in_doubt.to_le_bytes());
    }

    /// From the 64 bytes of an entry; `None` where they make no sense.
    pub fn decode(b: &[u8]) -> Option<Self> {
        let state = match get_u16(b, 0) {
            0 => return b[..CHUNK_ENTRY].iter().all(|&x| x == 0).then(ChunkEntry::default),
            1 => ChunkState::Live,
            2 => ChunkState::Dropping,
            _ => return None,
        };
        let extents = get_u32(b, 20);
        (extents as usize <= EXTENTS_PER_CHUNK).then(|| ChunkEntry {
            state,
            suspect: get_u16(b, 2) != 0,
            chunk: ChunkRef {
                key: ChunkKey {
                    volume: VolumeId(get_u32(b, 4)),
                    layer: LayerId(get_u32(b, 8)),
                    chunk: get_u32(b, 12),
                },
                incarnation: get_u32(b, 16),
            },
            extents,
            dirty: get_u64(b, 24),
            in_doubt: get_u64(b, 32),
        })
    }
}

/// A volume table entry: the generation a volume is sealed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeEntry {
    /// In use.
    pub used: bool,
    /// The volume.
    pub volume: VolumeId,
    /// Generations below are refused.
    pub sealed: u32,
}

impl VolumeEntry {
    /// An unused entry.
    pub const FREE: VolumeEntry = VolumeEntry {
        used: false,
        volume: VolumeId(0),
        sealed: 0,
    };

    /// As the 16 bytes of an entry.
    pub fn encode(&self, b: &mut [u8]) {
        b[..VOLUME_ENTRY].fill(0);
        if self.used {
            put(b, 0, &1u32.to_le_bytes());
            put(b, 4, &self.volume.0.to_le_bytes());
            put(b, 8, &self.sealed.to_le_bytes());
        }
    }

    /// From the 16 bytes of an entry; `None` where they make no sense.
    pub fn decode(b: &[u8]) -> Option<Self> {
        match get_u32(b, 0) {
            0 => Some(VolumeEntry::FREE),
            1 => Some(VolumeEntry {
                used: true,
                volume: VolumeId(get_u32(b, 4)),
                sealed: get_u32(b, 8),
            }),
            _ => None,
        }
    }
}

/// What a record says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// The slot is free (all bytes zero).
    Free,
    /// The slot holds an extent.
    Extent(ExtentRecord),
    /// The slot's record was found damaged; the slot is never used again.
    Quarantined,
}

/// The record of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentRecord {
    /// The replica it belongs to.
    pub chunk: ChunkRef,
    /// Which extent of the chunk.
    pub extent: u16,
    /// Its contents.
    pub image: ExtentImage,
}

/// The record's checksum or a field is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordDamaged;

/// The masks of a record do not contradict each other.
pub fn masks_agree(valid: BlockMask, zero: BlockMask, lost: BlockMask) -> bool {
    valid & zero == 0 && valid & lost == 0 && zero & lost == 0
}

impl Record {
    /// As the 128 bytes of `slot`'s place.
    #[inline]
    pub fn encode(&self, seed: &Seed, slot: u32, b: &mut [u8]) {
        let b: &mut [u8; RECORD] = (&mut b[..RECORD]).try_into().expect("a record's room");
        *b = [0; RECORD];
        match self {
            Record::Free => return,
            Record::Quarantined => put(b, 0, &2u16.to_le_bytes()),
            Record::Extent(r) => {
                put(b, 0, &1u16.to_le_bytes());
                put(b, 2, &r.image.valid.to_le_bytes());
                put(b, 4, &r.image.zero.to_le_bytes());
                put(b, 6, &r.image.lost.to_le_bytes());
                put(b, 8, &r.image.version.0.to_le_bytes());
                put(b, 16, &r.chunk.key.volume.0.to_le_bytes());
                put(b, 20, &r.chunk.key.layer.0.to_le_bytes());
                put(b, 24, &r.chunk.key.chunk.to_le_bytes());
                put(b, 28, &r.chunk.incarnation.to_le_bytes());
                put(b, 32, &r.extent.to_le_bytes());
                for (i, crc) in r.image.crcs.iter().enumerate() {
                    put(b, 60 + 4 * i, &crc.to_le_bytes());
                }
            }
        }
        let crc = seed.record_crc(slot, &b[..124]);
        put(b, 124, &crc.to_le_bytes());
    }

    /// From the 128 bytes of `slot`'s place.
    ///
    /// # Errors
    /// Checksum or fields are wrong: rot, or another place's record.
    #[inline]
    pub fn decode(seed: &Seed, slot: u32, b: &[u8]) -> Result<Self, RecordDamaged> {
        let b: &[u8; RECORD] = b[..RECORD].try_into().expect("a record's bytes");
        if b.iter().all(|&x| x == 0) {
            return Ok(Record::Free);
        }
        if seed.record_crc(slot, &b[..124]) != get_u32(b, 124) {
            return Err(RecordDamaged);
        }
        Self::decode_trusted(b).ok_or(RecordDamaged)
    }

    /// The fields alone, for a page whose checksums were checked when it was loaded.
    #[inline]
    pub fn decode_trusted(b: &[u8; RECORD]) -> Option<Self> {
        match get_u16(b, 0) {
            0 => return Some(Record::Free),
            1 => {}
            2 => return Some(Record::Quarantined),
            _ => return None,
        }
        let (valid, zero, lost) = (get_u16(b, 2), get_u16(b, 4), get_u16(b, 6));
        let extent = get_u16(b, 32);
        if !masks_agree(valid, zero, lost) || usize::from(extent) >= EXTENTS_PER_CHUNK {
            return None;
        }
        let mut crcs: Crcs = [0; BLOCKS_PER_EXTENT];
        for (i, crc) in crcs.iter_mut().enumerate() {
            *crc = get_u32(b, 60 + 4 * i);
        }
        Some(Record::Extent(ExtentRecord {
            chunk: ChunkRef {
                key: ChunkKey {
                    volume: VolumeId(get_u32(b, 16)),
                    layer: LayerId(get_u32(b, 20)),
                    chunk: get_u32(b, 24),
                },
                incarnation: get_u32(b, 28),
            },
            extent,
            image: ExtentImage {
                version: Version(get_u64(b, 8)),
                valid,
                zero,
                lost,
                crcs,
            },
        }))
    }
}

/// One change in the journal: always the whole new state, so that replaying it twice changes nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry<'a> {
    /// A slot's record, and the number of extents of its chunk from then on.
    Record {
        /// The slot.
        slot: u32,
        /// Index of its chunk in the chunk table.
        chunk: u32,
        /// Extents of that chunk after the change.
        extents: u32,
        /// The record as it stands at its place.
        bytes: &'a [u8; RECORD],
    },
    /// A chunk table entry.
    Chunk {
        /// Its index.
        index: u32,
        /// Its new state.
        entry: ChunkEntry,
    },
    /// A volume table entry.
    Volume {
        /// Its index.
        index: u32,
        /// Its new state.
        entry: VolumeEntry,
    },
    /// Slots of this window may be taken from now on.
    Window {
        /// Which of the windows it replaces.
        index: u32,
        /// The window.
        window: u32,
    },
}

impl Entry<'_> {
    /// Bytes it takes in a block.
    #[inline]
    pub fn size(&self) -> usize {
        ENTRY_HEADER
            + match self {
                Entry::Record { .. } => RECORD,
                Entry::Chunk { .. } => CHUNK_ENTRY,
                Entry::Volume { .. } => VOLUME_ENTRY,
                Entry::Window { .. } => 0,
            }
    }

    /// Writes it at the start of `b`.
    #[inline]
    pub fn encode(&self, b: &mut [u8]) {
        let (kind, index, chunk, extents) = match *self {
            Entry::Record {
                slot, chunk, extents, ..
            } => (1u32, slot, chunk, extents),
            Entry::Chunk { index, .. } => (2, index, 0, 0),
            Entry::Volume { index, .. } => (3, index, 0, 0),
            Entry::Window { index, window } => (4, index, window, 0),
        };
        put(b, 0, &kind.to_le_bytes());
        put(b, 4, &index.to_le_bytes());
        put(b, 8, &chunk.to_le_bytes());
        put(b, 12, &extents.to_le_bytes());
        let body = &mut b[ENTRY_HEADER..];
        match self {
            Entry::Record { bytes, .. } => body[..RECORD].copy_from_slice(&bytes[..]),
            Entry::Chunk { entry, .. } => entry.encode(body),
            Entry::Volume { entry, .. } => entry.encode(body),
            Entry::Window { .. } => {}
        }
    }
}

/// The head of a journal block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHeader {
    /// Bytes used, header included.
    pub used: u32,
    /// Entries.
    pub count: u32,
    /// Place in the chain; the block lies at `sequence % ring`.
    pub sequence: u64,
    /// All blocks before this one were known flushed when this block was written.
    pub flushed: u64,
    /// Boot that wrote it.
    pub boot: u128,
    /// Hash of the block before.
    pub previous: [u8; 32],
}

impl BlockHeader {
    /// Completes a block whose entries stand in `b` from [`JOURNAL_HEADER`] on: writes the header, clears the rest,
    /// returns the block's hash.
    pub fn seal(&self, seed: &Seed, b: &mut [u8]) -> [u8; 32] {
        b[..JOURNAL_HEADER].fill(0);
        put(b, 0, &JOURNAL_MAGIC.to_le_bytes());
        put(b, 8, &FORMAT_VERSION.to_le_bytes());
        put(b, 12, &self.used.to_le_bytes());
        put(b, 16, &self.count.to_le_bytes());
        put(b, 24, &self.sequence.to_le_bytes());
        put(b, 32, &self.flushed.to_le_bytes());
        put(b, 40, &self.boot.to_le_bytes());
        put(b, 56, &self.previous);
        b[self.used as usize..BLOCK].fill(0);
        let hash = seed.hash_whole(&b[..self.used as usize]);
        put(b, 96, &hash);
        hash
    }

    /// Reads and checks a block; also returns its hash.
    pub fn open(seed: &Seed, b: &[u8]) -> Option<(Self, [u8; 32])> {
        let used = get_u32(b, 12);
        let good = get_u64(b, 0) == JOURNAL_MAGIC
            && get_u32(b, 8) == FORMAT_VERSION
            && (JOURNAL_HEADER..=BLOCK).contains(&(used as usize))
            && get_u64(b, 24) <= SEQUENCE_MAX;
        if !good {
            return None;
        }
        let hash = get_hash(b, 96);
        if seed.hash(&b[..used as usize], 96) != hash {
            return None;
        }
        let header = BlockHeader {
            used,
            count: get_u32(b, 16),
            sequence: get_u64(b, 24),
            flushed: get_u64(b, 32),
            boot: get_u128(b, 40),
            previous: get_hash(b, 56),
        };
        Some((header, hash))
    }

    /// Calls `visit` for each entry of a checked block; false where they make no sense.
    pub fn entries<'a>(&self, b: &'a [u8], mut visit: impl FnMut(Entry<'a>)) -> bool {
        let mut rest = &b[JOURNAL_HEADER..self.used as usize];
        for _ in 0..self.count {
            if rest.len() < ENTRY_HEADER {
                return false;
            }
            let (kind, index) = (get_u32(rest, 0), get_u32(rest, 4));
            let (chunk, extents) = (get_u32(rest, 8), get_u32(rest, 12));
            let body = &rest[ENTRY_HEADER..];
            let (entry, size) = match kind {
                1 if body.len() >= RECORD => {
                    let bytes = body[..RECORD].try_into().expect("length checked");
                    (
                        Some(Entry::Record {
                            slot: index,
                            chunk,
                            extents,
                            bytes,
                        }),
                        RECORD,
                    )
                }
                2 if body.len() >= CHUNK_ENTRY => (
                    ChunkEntry::decode(body).map(|entry| Entry::Chunk { index, entry }),
                    CHUNK_ENTRY,
                ),
                3 if body.len() >= VOLUME_ENTRY => (
                    VolumeEntry::decode(body).map(|entry| Entry::Volume { index, entry }),
                    VOLUME_ENTRY,
                ),
                4 => (Some(Entry::Window { index, window: chunk }), 0),
                _ => return false,
            };
            let Some(entry) = entry else { return false };
            visit(entry);
            rest = &body[size..];
        }
        rest.is_empty()
    }
}
