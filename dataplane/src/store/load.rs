//! Reading a disk's metadata: what opening and checking have in common. Nothing is written here.

use std::collections::{BTreeMap, BTreeSet};

use super::check::{Finding, Findings};
use super::codec::{
    BlockHeader, CHUNK_ENTRY, CheckpointHeader, ChunkEntry, Entry, RECORD, RECORDS_PER_PAGE, Record,
    RecordDamaged, Seed, SuperError, Superblock, VOLUME_ENTRY, VolumeEntry,
};
use super::layout::{CHUNKS_PER_BLOCK, Layout, VOLUMES_PER_BLOCK};
use super::slots::WINDOW;
use crate::disk::{BlockIo, IoError};
use crate::ids::BLOCK;

/// Bytes read at once.
const STRIDE: usize = 1 << 20;

/// Why nothing of a disk can be believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LoadError {
    Io(IoError),
    Blank,
    Foreign,
    Newer(u32),
    Superblock,
    Short { needed: u64, found: u64 },
    Checkpoints,
}

impl From<IoError> for LoadError {
    fn from(e: IoError) -> Self {
        LoadError::Io(e)
    }
}

/// A disk's metadata with the journal replayed over it, in memory.
pub(super) struct Loaded {
    pub(super) layout: Layout,
    pub(super) seed: Seed,
    /// The superblock at the start must be written anew.
    pub(super) superblock_lost: bool,
    pub(super) header: CheckpointHeader,
    pub(super) area: usize,
    pub(super) chunks: Vec<ChunkEntry>,
    pub(super) volumes: Vec<VolumeEntry>,
    /// Records that the journal changed.
    pub(super) overlay: BTreeMap<u32, [u8; RECORD]>,
    /// Windows that slots may have been taken from: their free slots may hold anything.
    pub(super) windows: BTreeSet<u32>,
    /// Blocks replayed.
    pub(super) replayed: u64,
    /// Higher than any block that was ever written.
    pub(super) next_sequence: u64,
    /// Tables or journal are rotten: the present state may be an old one.
    pub(super) rot: bool,
}

/// Reads superblock, checkpoint and journal.
pub(super) fn load(io: &mut dyn BlockIo, findings: &mut Findings) -> Result<Loaded, LoadError> {
    let (layout, superblock_lost) = superblock(io, findings)?;
    let seed = Seed::new(layout.superblock.uuid);
    let mut rot = false;
    let mut headers = [None; 2];
    let mut block = vec![0; BLOCK];
    for (area, header) in headers.iter_mut().enumerate() {
        match io.read(layout.checkpoints[area], &mut block) {
            Ok(()) => *header = CheckpointHeader::decode(&seed, area as u32, &block),
            Err(IoError::Media) => {
                findings.push(Finding::CheckpointHeader { area });
                rot = true;
            }
            Err(e) => return Err(e.into()),
        }
    }
    let mut order = [0, 1];
    order.sort_by_key(|&a| std::cmp::Reverse(headers[a].map_or(0, |h: CheckpointHeader| h.sequence)));
    for area in order {
        let Some(header) = headers[area] else { continue };
        let Some((volumes, chunks)) = tables(io, &layout, &seed, area, &header)? else {
            findings.push(Finding::Tables { area });
            rot = true;
            continue;
        };
        let mut loaded = Loaded {
            layout,
            seed,
            superblock_lost,
            header,
            area,
            chunks,
            volumes,
            overlay: BTreeMap::new(),
            windows: header.windows.into_iter().collect(),
            replayed: 0,
            next_sequence: header.tail + 1,
            rot,
        };
        replay(io, &mut loaded, findings)?;
        return Ok(loaded);
    }
    Err(LoadError::Checkpoints)
}

/// The superblock, or where that is lost its copy: then true.
pub(super) fn superblock(io: &mut dyn BlockIo, findings: &mut Findings) -> Result<(Layout, bool), LoadError> {
    let block = BLOCK as u64;
    let size = io.size() / block * block;
    if size < 2 * block {
        return Err(LoadError::Blank);
    }
    let mut first = vec![0; BLOCK];
    let found = match io.read(0, &mut first) {
        Ok(()) => Superblock::decode(&first),
        Err(IoError::Media) => Err(SuperError::Damaged),
        Err(e) => return Err(e.into()),
    };
    let (superblock, lost) = match found {
        Ok(superblock) => (superblock, false),
        Err(SuperError::Foreign) => return Err(LoadError::Foreign),
        Err(SuperError::Newer(version)) => return Err(LoadError::Newer(version)),
        Err(why) => {
            let mut last = vec![0; BLOCK];
            match io.read(size - block, &mut last) {
                Ok(()) => {}
                Err(IoError::Media) => last.fill(0),
                Err(e) => return Err(e.into()),
            }
            match Superblock::decode(&last) {
                Ok(superblock) => {
                    findings.push(Finding::Superblock { copy: false });
                    (superblock, true)
                }
                Err(SuperError::Newer(version)) => return Err(LoadError::Newer(version)),
                Err(_) if why == SuperError::Blank => return Err(LoadError::Blank),
                Err(_) => return Err(LoadError::Superblock),
            }
        }
    };
    let needed = superblock.blocks.saturating_mul(block);
    if needed > size {
        return Err(LoadError::Short { needed, found: size });
    }
    let layout = Layout::new(superblock).ok_or(LoadError::Superblock)?;
    Ok((layout, lost))
}

type TableEntries = (Vec<VolumeEntry>, Vec<ChunkEntry>);

fn tables(
    io: &mut dyn BlockIo,
    layout: &Layout,
    seed: &Seed,
    area: usize,
    header: &CheckpointHeader,
) -> Result<Option<TableEntries>, LoadError> {
    let superblock = &layout.superblock;
    if header.volumes > superblock.volume_capacity || header.chunks > superblock.chunk_capacity {
        return Ok(None);
    }
    let mut volumes = vec![VolumeEntry::FREE; superblock.volume_capacity as usize];
    let mut chunks = vec![ChunkEntry::default(); superblock.chunk_capacity as usize];
    let mut hasher = seed.table_hasher();
    let base = layout.checkpoints[area] + BLOCK as u64;
    let mut block = vec![0; BLOCK];
    let mut sane = true;
    let read = |io: &mut dyn BlockIo, offset: u64, block: &mut [u8]| match io.read(offset, block) {
        Ok(()) => Ok(true),
        Err(IoError::Media) => Ok(false),
        Err(e) => Err(LoadError::from(e)),
    };
    for (n, places) in volumes[..header.volumes as usize]
        .chunks_mut(VOLUMES_PER_BLOCK)
        .enumerate()
    {
        sane &= read(io, base + (n * BLOCK) as u64, &mut block)?;
        hasher.update(&block);
        for (place, bytes) in places.iter_mut().zip(block.chunks_exact(VOLUME_ENTRY)) {
            match VolumeEntry::decode(bytes) {
                Some(entry) => *place = entry,
                None => sane = false,
            }
        }
    }
    let base = base + layout.volume_blocks * BLOCK as u64;
    for (n, places) in chunks[..header.chunks as usize]
        .chunks_mut(CHUNKS_PER_BLOCK)
        .enumerate()
    {
        sane &= read(io, base + (n * BLOCK) as u64, &mut block)?;
        hasher.update(&block);
        for (place, bytes) in places.iter_mut().zip(block.chunks_exact(CHUNK_ENTRY)) {
            match ChunkEntry::decode(bytes) {
                Some(entry) => *place = entry,
                None => sane = false,
            }
        }
    }
    let intact = sane && *hasher.finalize().as_bytes() == header.tables;
    Ok(intact.then_some((volumes, chunks)))
}

/// Follows the chain from the tail. It ends at the first block that does not continue it: a tail that was cut off, or
/// rot, if an intact later block says that this one had been flushed, or is of a later boot.
fn replay(io: &mut dyn BlockIo, loaded: &mut Loaded, findings: &mut Findings) -> Result<(), LoadError> {
    let ring = loaded.layout.superblock.journal_blocks;
    let header = loaded.header;
    let (mut sequence, mut hash) = (header.tail, header.tail_hash);
    let mut block = vec![0; BLOCK];
    let mut nonsense = false;
    while sequence < header.tail.saturating_add(ring) {
        match io.read(loaded.layout.journal_at(sequence), &mut block) {
            Ok(()) => {}
            Err(IoError::Media) => break,
            Err(e) => return Err(e.into()),
        }
        let Some((head, own)) = BlockHeader::open(&loaded.seed, &block) else {
            break;
        };
        if head.sequence != sequence || head.boot != header.boot || head.previous != hash {
            break;
        }
        let mut fits = true;
        let (chunks, volumes, overlay) = (&mut loaded.chunks, &mut loaded.volumes, &mut loaded.overlay);
        let windows = &mut loaded.windows;
        let slots = loaded.layout.superblock.slots;
        let read = head.entries(&block, |entry| match entry {
            Entry::Record {
                slot,
                chunk,
                extents,
                bytes,
            } => match chunks.get_mut(chunk as usize) {
                Some(entry) if u64::from(slot) < slots => {
                    entry.extents = extents;
                    overlay.insert(slot, *bytes);
                }
                _ => fits = false,
            },
            Entry::Chunk { index, entry } => match chunks.get_mut(index as usize) {
                Some(place) => *place = entry,
                None => fits = false,
            },
            Entry::Volume { index, entry } => match volumes.get_mut(index as usize) {
                Some(place) => *place = entry,
                None => fits = false,
            },
            // No more are kept than the disk has, whatever the journal says.
            Entry::Window { window, .. } if u64::from(window) * u64::from(WINDOW) < slots => {
                windows.insert(window);
            }
            Entry::Window { .. } => fits = false,
        });
        if !read || !fits {
            nonsense = true;
            break;
        }
        hash = own;
        sequence += 1;
        loaded.replayed += 1;
    }
    let stopped = sequence;
    let mut highest = stopped;
    let mut rotten = nonsense;
    let mut at = 0;
    let mut stride = vec![0; STRIDE];
    while at < ring {
        let count = (ring - at).min((STRIDE / BLOCK) as u64);
        let bytes = &mut stride[..count as usize * BLOCK];
        match io.read(loaded.layout.journal + at * BLOCK as u64, bytes) {
            Ok(()) => {}
            // Block by block, so that one bad block does not hide what the others say.
            Err(IoError::Media) => {
                for (n, one) in bytes.chunks_exact_mut(BLOCK).enumerate() {
                    match io.read(loaded.layout.journal + (at + n as u64) * BLOCK as u64, one) {
                        Ok(()) => {}
                        Err(IoError::Media) => one.fill(0),
                        Err(e) => return Err(e.into()),
                    }
                }
            }
            Err(e) => return Err(e.into()),
        }
        for one in bytes.chunks_exact(BLOCK) {
            if let Some((head, _)) = BlockHeader::open(&loaded.seed, one) {
                highest = highest.max(head.sequence);
                // A later boot begins its chain above everything before, and not before its own checkpoint is durable: if
                // there is a block of it, that checkpoint is gone, and with it what this one does not know.
                rotten |= head.sequence > stopped && (head.boot != header.boot || head.flushed > stopped);
            }
        }
        at += count;
    }
    if rotten {
        findings.push(Finding::JournalRot { sequence: stopped });
        loaded.rot = true;
    }
    loaded.next_sequence = highest.saturating_add(1);
    Ok(())
}

impl Loaded {
    /// Visits all records in order, as they are after replay: `visit(io, first slot, page bytes, changed)` for each page.
    pub(super) fn scan(
        &self,
        io: &mut dyn BlockIo,
        mut visit: impl FnMut(&mut dyn BlockIo, u32, &[u8], bool) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        let pages = self.layout.record_pages;
        let mut page = 0;
        let mut stride = vec![0; STRIDE];
        while page < pages {
            let count = (pages - page).min((STRIDE / BLOCK) as u64) as usize;
            let bytes = &mut stride[..count * BLOCK];
            let offset = self.layout.page_at(page as u32);
            match io.read(offset, bytes) {
                Ok(()) => {}
                Err(IoError::Media) => {
                    for (n, one) in bytes.chunks_exact_mut(BLOCK).enumerate() {
                        match io.read(offset + (n * BLOCK) as u64, one) {
                            Ok(()) => {}
                            // Not zero and not right: every slot of the page counts as damaged.
                            Err(IoError::Media) => one.fill(0xff),
                            Err(e) => return Err(e),
                        }
                    }
                }
                Err(e) => return Err(e),
            }
            for (n, one) in bytes.chunks_exact_mut(BLOCK).enumerate() {
                let first = (page as u32 + n as u32) * RECORDS_PER_PAGE as u32;
                let mut changed = false;
                for (slot, record) in self.overlay.range(first..first + RECORDS_PER_PAGE as u32) {
                    let at = (slot - first) as usize * RECORD;
                    changed |= one[at..at + RECORD] != record[..];
                    one[at..at + RECORD].copy_from_slice(record);
                }
                visit(io, first, one, changed)?;
            }
            page += count as u64;
        }
        Ok(())
    }

    /// One record, as it is after replay.
    pub(super) fn read_record(
        &self,
        io: &mut dyn BlockIo,
        slot: u32,
    ) -> Result<Result<Record, RecordDamaged>, IoError> {
        if let Some(bytes) = self.overlay.get(&slot) {
            return Ok(Record::decode(&self.seed, slot, bytes));
        }
        let mut page = vec![0; BLOCK];
        io.read(self.layout.page_at(slot / RECORDS_PER_PAGE as u32), &mut page)?;
        let at = slot as usize % RECORDS_PER_PAGE * RECORD;
        Ok(Record::decode(&self.seed, slot, &page[at..at + RECORD]))
    }
}
