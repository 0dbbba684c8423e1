//! Chunks and volumes of a disk in memory: the tables, where each extent of a chunk lies, and how a chunk is found.
//!
//! Sized when the disk is opened; only creating a chunk allocates (its map). No iteration follows a hash order.

use super::codec::{ChunkEntry, ChunkState, VolumeEntry};
use crate::ids::{ChunkKey, EXTENTS_PER_CHUNK, Version, VolumeId};
use crate::replica::ChunkRef;

/// In a chunk's map: the extent has no slot.
pub(super) const ABSENT: u32 = u32::MAX;
/// In a chunk's map: the extent's record has no valid block, its slot may be freed.
pub(super) const EMPTY: u32 = 1 << 31;

/// Where the extents of a chunk lie.
pub(super) type Map = Box<[u32; EXTENTS_PER_CHUNK]>;

/// A chunk and what is known of it only while the disk is open.
#[derive(Debug, Default)]
pub(super) struct Chunk {
    /// As it would be written.
    pub(super) entry: ChunkEntry,
    /// Slot of each extent; there while the entry is in use.
    pub(super) map: Option<Map>,
    /// Regions whose dirty mark is durable: writes may go there.
    pub(super) marked: u64,
    /// Extents marked [`EMPTY`].
    pub(super) empties: u32,
    /// The journal must complete this for the last dirty mark to be written.
    pub(super) mark_need: u64,
    /// Where the freeing of extents looks next.
    pub(super) free_cursor: u16,
    /// Writes under way.
    pub(super) writers: u32,
    /// Extents being freed.
    pub(super) freeing: u32,
    /// Counts writes begun, to see whether there was one since.
    pub(super) writes: u64,
    /// The newest version written since it was last clean. Only what is stable can be clean: else one replica would
    /// forget a write that another never had, and no owner would compare them (decision 0010).
    pub(super) newest: Version,
    /// When the last write ended, as of the last tick.
    pub(super) written_ms: u64,
    /// Its cleaning waits for a flush.
    pub(super) cleaning: bool,
}

/// A volume's seal and what is known of it only while the disk is open.
#[derive(Debug)]
pub(super) struct Volume {
    pub(super) entry: VolumeEntry,
    /// The highest stable version heard of.
    pub(super) stable: Version,
    /// Chunk entries in use that belong to it.
    pub(super) chunks: u32,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) chunks: Vec<Chunk>,
    pub(super) volumes: Vec<Volume>,
    chunk_index: Index,
    volume_index: Index,
    free_chunks: Vec<u32>,
    free_volumes: Vec<u32>,
}

fn chunk_hash(key: ChunkKey) -> u64 {
    let a = u64::from(key.volume.0) << 32 | u64::from(key.chunk);
    (a ^ u64::from(key.layer.0).rotate_left(20)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn volume_hash(volume: VolumeId) -> u64 {
    u64::from(volume.0).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl Tables {
    /// Tables with these entries; no chunk has a map yet.
    pub(super) fn new(chunks: Vec<ChunkEntry>, volumes: Vec<VolumeEntry>) -> Self {
        let mut tables = Tables {
            chunk_index: Index::new(chunks.len()),
            volume_index: Index::new(volumes.len()),
            free_chunks: Vec::with_capacity(chunks.len()),
            free_volumes: Vec::with_capacity(volumes.len()),
            chunks: chunks
                .into_iter()
                .map(|entry| Chunk {
                    entry,
                    ..Chunk::default()
                })
                .collect(),
            volumes: volumes
                .into_iter()
                .map(|entry| Volume {
                    entry,
                    stable: Version::ZERO,
                    chunks: 0,
                })
                .collect(),
        };
        for i in (0..tables.volumes.len()).rev() {
            let entry = tables.volumes[i].entry;
            if entry.used {
                tables.volume_index.insert(volume_hash(entry.volume), i as u32);
            } else {
                tables.free_volumes.push(i as u32);
            }
        }
        for i in (0..tables.chunks.len()).rev() {
            let entry = tables.chunks[i].entry;
            match entry.state {
                ChunkState::Free => tables.free_chunks.push(i as u32),
                ChunkState::Live | ChunkState::Dropping => {
                    tables.chunks[i].map = Some(Box::new([ABSENT; EXTENTS_PER_CHUNK]));
                    if entry.state == ChunkState::Live {
                        tables.chunk_index.insert(chunk_hash(entry.chunk.key), i as u32);
                    }
                    if let Some(v) = tables.volume(entry.chunk.key.volume) {
                        tables.volumes[v as usize].chunks += 1;
                    }
                }
            }
        }
        tables
    }

    /// The live chunk with this key, in whatever incarnation.
    #[inline]
    pub(super) fn chunk(&self, key: ChunkKey) -> Option<u32> {
        self.chunk_index.find(chunk_hash(key), |i| {
            self.chunks[i as usize].entry.chunk.key == key
        })
    }

    /// The volume's entry.
    #[inline]
    pub(super) fn volume(&self, volume: VolumeId) -> Option<u32> {
        self.volume_index.find(volume_hash(volume), |i| {
            self.volumes[i as usize].entry.volume == volume
        })
    }

    /// A new live chunk; `None` when the table is full.
    pub(super) fn create(&mut self, chunk: ChunkRef) -> Option<u32> {
        let i = self.free_chunks.pop()?;
        let entry = ChunkEntry {
            state: ChunkState::Live,
            chunk,
            ..ChunkEntry::default()
        };
        let map = Some(Box::new([ABSENT; EXTENTS_PER_CHUNK]));
        self.chunks[i as usize] = Chunk {
            entry,
            map,
            ..Chunk::default()
        };
        self.chunk_index.insert(chunk_hash(chunk.key), i);
        if let Some(v) = self.volume(chunk.key.volume) {
            self.volumes[v as usize].chunks += 1;
        }
        Some(i)
    }

    /// Room for one more chunk.
    pub(super) fn has_room(&self) -> bool {
        !self.free_chunks.is_empty()
    }

    /// The chunk is no longer served; its extents are to be freed.
    pub(super) fn begin_drop(&mut self, i: u32) {
        let chunk = &mut self.chunks[i as usize];
        chunk.entry.state = ChunkState::Dropping;
        let key = chunk.entry.chunk.key;
        self.chunk_index.remove(chunk_hash(key), i, |j| {
            chunk_hash(self.chunks[j as usize].entry.chunk.key)
        });
    }

    /// The last extent of a dropped chunk is freed.
    pub(super) fn end_drop(&mut self, i: u32) {
        let volume = self.chunks[i as usize].entry.chunk.key.volume;
        self.chunks[i as usize] = Chunk::default();
        self.free_chunks.push(i);
        if let Some(v) = self.volume(volume) {
            self.volumes[v as usize].chunks -= 1;
        }
    }

    /// The volume's entry, made if need be. When the table is full, the first volume that has no chunk here makes room:
    /// there is one, since there are more entries than chunks.
    pub(super) fn volume_or_new(&mut self, volume: VolumeId) -> u32 {
        if let Some(v) = self.volume(volume) {
            return v;
        }
        let v = self.free_volumes.pop().unwrap_or_else(|| {
            let v = self
                .volumes
                .iter()
                .position(|v| v.chunks == 0)
                .expect("more volumes than chunks") as u32;
            let old = self.volumes[v as usize].entry.volume;
            self.volume_index.remove(volume_hash(old), v, |j| {
                volume_hash(self.volumes[j as usize].entry.volume)
            });
            v
        });
        self.volumes[v as usize] = Volume {
            entry: VolumeEntry {
                used: true,
                volume,
                sealed: 0,
            },
            stable: Version::ZERO,
            // A disk that lost its tables may have chunks of a volume it does not know.
            chunks: self
                .chunks
                .iter()
                .filter(|c| c.entry.state != ChunkState::Free && c.entry.chunk.key.volume == volume)
                .count() as u32,
        };
        self.volume_index.insert(volume_hash(volume), v);
        v
    }
}

/// Open addressing over entry numbers; the entries themselves are in the tables.
#[derive(Debug)]
struct Index {
    places: Vec<u32>,
    shift: u32,
}

const VACANT: u32 = u32::MAX;

impl Index {
    fn new(entries: usize) -> Self {
        let bits = (entries * 2).next_power_of_two().trailing_zeros().max(1);
        Index {
            places: vec![VACANT; 1 << bits],
            shift: 64 - bits,
        }
    }

    #[inline]
    fn find(&self, hash: u64, is: impl Fn(u32) -> bool) -> Option<u32> {
        let mut at = (hash >> self.shift) as usize;
        loop {
            let found = self.places[at];
            if found == VACANT {
                return None;
            }
            if is(found) {
                return Some(found);
            }
            at = (at + 1) & (self.places.len() - 1);
        }
    }

    fn insert(&mut self, hash: u64, entry: u32) {
        let mut at = (hash >> self.shift) as usize;
        while self.places[at] != VACANT {
            at = (at + 1) & (self.places.len() - 1);
        }
        self.places[at] = entry;
    }

    fn remove(&mut self, hash: u64, entry: u32, hash_of: impl Fn(u32) -> u64) {
        let mask = self.places.len() - 1;
        let mut hole = (hash >> self.shift) as usize;
        while self.places[hole] != entry {
            assert!(self.places[hole] != VACANT, "entry {entry} is in the index");
            hole = (hole + 1) & mask;
        }
        // What follows without a gap moves up, unless it would then stand before its own home.
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let moved = self.places[at];
            if moved == VACANT {
                break;
            }
            let home = (hash_of(moved) >> self.shift) as usize;
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.places[hole] = moved;
                hole = at;
            }
        }
        self.places[hole] = VACANT;
    }
}
