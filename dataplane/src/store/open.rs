//! Opening a disk: replay into memory, scan the records, one checkpoint that starts a new chain, then serve.
//!
//! Plain sequential code; a crash anywhere in it leaves a disk that opens the same way again: pages are only changed to
//! what the journal says, and the journal holds until the new header is durable. Damage is made durable (suspect chunks)
//! before its trace (a rotten record) is overwritten.

use std::collections::{BTreeMap, VecDeque};

use super::background::CLEANING_MAX;
use super::cache::{Cache, FRAMES_MIN};
use super::checkpoint::{self, Checkpoint};
use super::codec::{
    CHUNK_ENTRY, CheckpointHeader, ChunkState, NO_WINDOW, RECORD, RECORDS_PER_PAGE, Record, VOLUME_ENTRY,
    WINDOWS,
};
use super::flush::Flusher;
use super::journal::{self, Journal};
use super::layout::{CHUNKS_PER_BLOCK, VOLUMES_PER_BLOCK};
use super::load::{LoadError, Loaded, load};
use super::ops::{List, Ops};
use super::slots::{Slots, WINDOW};
use super::stats::Counters;
use super::tables::{ABSENT, EMPTY, Tables};
use super::window::Windows;
use super::{DOOR_MAX, Store};
use crate::disk::{BlockIo, IoError};
use crate::ids::{BLOCK, BootId, EXTENT, PowerId, Version};
use crate::memory::Arena;

/// How to open.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Drawn anew for each opening.
    pub boot: BootId,
    /// The host's present span of power.
    pub power: PowerId,
    /// Memory for record pages, at least 32 KiB; 4 KiB of it covers 2 MiB of data.
    pub cache_bytes: usize,
}

/// Sentences about damage in an [`OpenReport`].
const DAMAGE_MAX: usize = 1000;

/// What was found when the disk was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// The disk had been closed.
    pub clean: bool,
    /// Boot of the opening before this one.
    pub previous_boot: BootId,
    /// Span of power of the opening before this one.
    pub previous_power: PowerId,
    /// Journal blocks replayed.
    pub replayed_blocks: u64,
    /// Record pages brought home.
    pub pages_home: u64,
    /// Replicas held, ones that are being dropped included.
    pub chunks: u64,
    /// Extents held.
    pub extents: u64,
    /// Regions in doubt now.
    pub in_doubt_regions: u64,
    /// Damage was found now or earlier, and is not settled.
    pub suspect: bool,
    /// Damage, as sentences for people: at most a thousand.
    pub damage: Vec<String>,
}

/// Why a disk can not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// It is blank.
    #[error("the disk is blank: format it first")]
    Blank,
    /// It holds something else.
    #[error(
        "the disk begins with something that is not Unibody's: is it the right disk? Format it with force to destroy its contents"
    )]
    Foreign,
    /// It was written by a newer program.
    #[error("the disk has format {0}, newer than this program knows: upgrade the program")]
    Newer(u32),
    /// Both superblocks are damaged.
    #[error("both superblocks of the disk are damaged: replace or format it and let its replicas be rebuilt")]
    Superblock,
    /// It shrank.
    #[error("the disk has {found} bytes and its format needs {needed}: was it cut off?")]
    Short {
        /// Bytes needed.
        needed: u64,
        /// Bytes found.
        found: u64,
    },
    /// Neither checkpoint is intact.
    #[error("neither checkpoint of the disk is intact: replace or format it and let its replicas be rebuilt")]
    Checkpoints,
    /// It is being opened with the boot id of an earlier opening.
    #[error("the boot id was used for this disk before: draw a new one")]
    BootReused,
    /// There is no memory for it.
    #[error("no memory for the disk's cache: give it less")]
    Memory,
    /// The disk failed.
    #[error("the disk failed while it was opened: {0:?}")]
    Io(IoError),
    /// What was written reads back differently.
    #[error("the disk returned something else than was written to it: replace it")]
    ReadBack,
}

impl From<IoError> for OpenError {
    fn from(e: IoError) -> Self {
        OpenError::Io(e)
    }
}

impl From<LoadError> for OpenError {
    fn from(e: LoadError) -> Self {
        match e {
            LoadError::Io(e) => OpenError::Io(e),
            LoadError::Blank => OpenError::Blank,
            LoadError::Foreign => OpenError::Foreign,
            LoadError::Newer(version) => OpenError::Newer(version),
            LoadError::Superblock => OpenError::Superblock,
            LoadError::Short { needed, found } => OpenError::Short { needed, found },
            LoadError::Checkpoints => OpenError::Checkpoints,
        }
    }
}

/// What the scan of the records yields.
struct Scanned {
    tables: Tables,
    slots: Slots,
    /// Damaged, to be marked so.
    damaged: Vec<u32>,
    quarantined: u64,
    extents: u64,
    pages_home: u64,
}

impl Store {
    /// Which disk it is: the one that [`Store::open`] would open, be it by the copy of its superblock.
    pub fn identify(io: &mut dyn BlockIo) -> Option<super::DiskUuid> {
        let (layout, _) = super::load::superblock(io, &mut super::check::Findings::default()).ok()?;
        Some(super::DiskUuid(layout.superblock.uuid))
    }

    /// Opens a disk.
    ///
    /// # Errors
    /// See [`OpenError`]. An error leaves the disk as good as it was.
    pub fn open(io: &mut dyn BlockIo, options: &OpenOptions) -> Result<(Store, OpenReport), OpenError> {
        let mut findings = super::check::Findings::default();
        let mut loaded = load(io, &mut findings)?;
        if loaded.header.boot == options.boot.0 {
            return Err(OpenError::BootReused);
        }
        // A killed process may have left journal blocks in the device's cache: durable before any page that holds them.
        io.flush()?;
        let mut scanned = scan(io, &mut loaded, &mut findings)?;
        read_back(io, &loaded)?;
        let damaged = loaded.rot || !scanned.damaged.is_empty();
        let mut report = OpenReport {
            clean: loaded.header.clean,
            previous_boot: BootId(loaded.header.boot),
            previous_power: PowerId(loaded.header.power),
            replayed_blocks: loaded.replayed,
            pages_home: scanned.pages_home,
            extents: scanned.extents,
            damage: findings
                .kept
                .iter()
                .take(DAMAGE_MAX)
                .map(ToString::to_string)
                .collect(),
            ..OpenReport::default()
        };
        let mut dropping = 0;
        let mut missed = damaged;
        for chunk in &mut scanned.tables.chunks {
            let entry = &mut chunk.entry;
            if entry.state == ChunkState::Free {
                continue;
            }
            let found = chunk
                .map
                .iter()
                .flat_map(|map| map.iter())
                .filter(|&&slot| slot != ABSENT)
                .count() as u32;
            if damaged || found != entry.extents {
                if found != entry.extents {
                    missed = true;
                    if report.damage.len() < DAMAGE_MAX {
                        report.damage.push(format!(
                            "chunk {:?} has {found} extents and should have {}",
                            entry.chunk, entry.extents
                        ));
                    }
                }
                entry.extents = found;
                entry.suspect = true;
                entry.in_doubt = u64::MAX;
            }
            entry.in_doubt |= entry.dirty;
            entry.dirty = 0;
            dropping += usize::from(entry.state == ChunkState::Dropping);
            report.chunks += 1;
            report.in_doubt_regions += u64::from(entry.in_doubt.count_ones());
            report.suspect |= entry.suspect;
        }
        report.suspect |= damaged;
        if missed {
            // Records are gone, and which is not known: any slot without one may hold an extent's bytes.
            loaded.windows = (0..scanned.slots.windows()).collect();
        }
        zero_windows(io, &loaded, &scanned.slots)?;
        let area = 1 - loaded.area;
        let sequence = loaded.header.sequence + 1;
        let tail = loaded.next_sequence;
        let tail_hash = loaded.seed.chain_start(options.boot.0, tail);
        commit(io, &loaded, &scanned.tables, area, |volumes, chunks, tables| {
            CheckpointHeader {
                sequence,
                tail,
                tail_hash,
                boot: options.boot.0,
                power: options.power.0,
                volumes,
                chunks,
                clean: false,
                tables,
                windows: [NO_WINDOW; WINDOWS],
            }
        })?;
        quarantine(io, &loaded, &scanned.damaged)?;
        if loaded.superblock_lost {
            io.write(0, &loaded.layout.superblock.encode())?;
            io.flush()?;
        }
        let frames = (options.cache_bytes / BLOCK)
            .min(loaded.layout.record_pages as usize)
            .max(FRAMES_MIN);
        let arena =
            Arena::new(frames + journal::BUFFERS + checkpoint::PAGES).map_err(|_| OpenError::Memory)?;
        let ring = loaded.layout.superblock.journal_blocks;
        let store = Store {
            cache: Cache::new(frames, loaded.layout.record_pages),
            journal: Journal::new(frames, ring, tail, options.boot.0, tail_hash),
            checkpoint: Checkpoint::new(frames + journal::BUFFERS, 1 - area, sequence + 1, frames),
            seed: loaded.seed,
            layout: loaded.layout,
            boot: options.boot,
            power: options.power,
            arena,
            tables: scanned.tables,
            slots: scanned.slots,
            windows: Windows::new(),
            quarantined: scanned.quarantined,
            ops: Ops::new(),
            ready: List::EMPTY,
            journal_wait: List::EMPTY,
            frame_wait: List::EMPTY,
            door: VecDeque::with_capacity(DOOR_MAX),
            flusher: Flusher::new(),
            seals: 0,
            now_ms: 0,
            hand: 0,
            free_work: dropping > 0,
            failed: None,
            closing: false,
            closed: false,
            counters: Counters {
                dropping,
                ..Counters::default()
            },
        };
        const { assert!(CLEANING_MAX > 0) };
        Ok((store, report))
    }
}

/// Reads all records, brings home what the journal changed, and finds out where every extent lies.
fn scan(
    io: &mut dyn BlockIo,
    loaded: &mut Loaded,
    findings: &mut super::check::Findings,
) -> Result<Scanned, OpenError> {
    let mut places = BTreeMap::new();
    for (i, entry) in loaded.chunks.iter().enumerate() {
        if entry.state != ChunkState::Free {
            places.entry(entry.chunk).or_insert(i);
        }
    }
    let mut scanned = Scanned {
        tables: Tables::new(loaded.chunks.clone(), loaded.volumes.clone()),
        slots: Slots::new(loaded.layout.superblock.slots),
        damaged: Vec::new(),
        quarantined: 0,
        extents: 0,
        pages_home: 0,
    };
    let s = &mut scanned;
    loaded.scan(io, |io, first, page, changed| {
        for (slot, bytes) in loaded.layout.slots_of(first).zip(page.chunks_exact(RECORD)) {
            let record = match Record::decode(&loaded.seed, slot, bytes) {
                Ok(Record::Free) => continue,
                Ok(Record::Extent(record)) => Some(record),
                Ok(Record::Quarantined) => {
                    s.slots.mark(slot);
                    s.quarantined += 1;
                    continue;
                }
                Err(_) => None,
            };
            s.slots.mark(slot);
            let placed = record.and_then(|r| places.get(&r.chunk).map(|&p| (r, p)));
            let Some((record, place)) = placed else {
                findings.push(super::Finding::Record {
                    slot,
                    stray: record.is_some(),
                });
                s.damaged.push(slot);
                continue;
            };
            let chunk = &mut s.tables.chunks[place];
            let map = chunk.map.as_mut().expect("chunks in use have a map");
            let present = &mut map[usize::from(record.extent)];
            if *present != ABSENT {
                let other = *present & !EMPTY;
                findings.push(super::Finding::Twice { slots: [other, slot] });
                let version = match loaded.read_record(io, other)? {
                    Ok(Record::Extent(r)) => r.image.version,
                    _ => Version::ZERO,
                };
                if version >= record.image.version {
                    s.damaged.push(slot);
                    continue;
                }
                s.damaged.push(other);
                chunk.empties -= u32::from(*present & EMPTY != 0);
                s.extents -= 1;
            }
            let empty = record.image.valid | record.image.lost == 0;
            chunk.empties += u32::from(empty);
            *present = if empty { slot | EMPTY } else { slot };
            s.extents += 1;
        }
        if changed {
            io.write(loaded.layout.page_at(first / RECORDS_PER_PAGE as u32), page)?;
            s.pages_home += 1;
        }
        Ok(())
    })?;
    scanned.quarantined += scanned.damaged.len() as u64;
    io.flush()?;
    Ok(scanned)
}

/// Zeroes the free slots of the windows: a write whose record was lost may have reached them. Durable with the commit.
fn zero_windows(io: &mut dyn BlockIo, loaded: &Loaded, slots: &Slots) -> Result<(), IoError> {
    for &window in loaded.windows.range(..slots.windows()) {
        let first = window * WINDOW;
        let end = (u64::from(first) + u64::from(WINDOW)).min(loaded.layout.superblock.slots) as u32;
        let mut slot = first;
        while slot < end {
            let mut next = slot;
            while next < end && slots.is_free(next) {
                next += 1;
            }
            if next > slot {
                io.write_zeroes(
                    loaded.layout.block_at(slot, 0),
                    u64::from(next - slot) * EXTENT as u64,
                )?;
            }
            slot = next + 1;
        }
    }
    Ok(())
}

/// Compares the pages that were brought home with what they should be.
fn read_back(io: &mut dyn BlockIo, loaded: &Loaded) -> Result<(), OpenError> {
    let mut page = vec![0; BLOCK];
    let mut held = None;
    for (&slot, record) in &loaded.overlay {
        let number = slot / RECORDS_PER_PAGE as u32;
        if held != Some(number) {
            io.read(loaded.layout.page_at(number), &mut page)?;
            held = Some(number);
        }
        let at = slot as usize % RECORDS_PER_PAGE * RECORD;
        if page[at..at + RECORD] != record[..] {
            return Err(OpenError::ReadBack);
        }
    }
    Ok(())
}

/// Writes tables and header to an area; durable when it returns.
fn commit(
    io: &mut dyn BlockIo,
    loaded: &Loaded,
    tables: &Tables,
    area: usize,
    header: impl FnOnce(u32, u32, [u8; 32]) -> CheckpointHeader,
) -> Result<(), IoError> {
    let volumes = tables
        .volumes
        .iter()
        .rposition(|v| v.entry.used)
        .map_or(0, |i| i + 1);
    let chunks = tables
        .chunks
        .iter()
        .rposition(|c| c.entry.state != ChunkState::Free)
        .map_or(0, |i| i + 1);
    let mut hasher = loaded.seed.table_hasher();
    let base = loaded.layout.checkpoints[area] + BLOCK as u64;
    let mut block = vec![0; BLOCK];
    for (n, entries) in tables.volumes[..volumes].chunks(VOLUMES_PER_BLOCK).enumerate() {
        block.fill(0);
        for (place, volume) in block.chunks_exact_mut(VOLUME_ENTRY).zip(entries) {
            volume.entry.encode(place);
        }
        hasher.update(&block);
        io.write(base + (n * BLOCK) as u64, &block)?;
    }
    let base = base + loaded.layout.volume_blocks * BLOCK as u64;
    for (n, entries) in tables.chunks[..chunks].chunks(CHUNKS_PER_BLOCK).enumerate() {
        block.fill(0);
        for (place, chunk) in block.chunks_exact_mut(CHUNK_ENTRY).zip(entries) {
            chunk.entry.encode(place);
        }
        hasher.update(&block);
        io.write(base + (n * BLOCK) as u64, &block)?;
    }
    io.flush()?;
    let hash = *hasher.finalize().as_bytes();
    header(volumes as u32, chunks as u32, hash).encode(&loaded.seed, area as u32, &mut block);
    io.write(loaded.layout.checkpoints[area], &block)?;
    io.flush()
}

/// Marks damaged records, so that the next opening knows that they were seen.
fn quarantine(io: &mut dyn BlockIo, loaded: &Loaded, damaged: &[u32]) -> Result<(), IoError> {
    let mut page = vec![0; BLOCK];
    for &slot in damaged {
        let offset = loaded.layout.page_at(slot / RECORDS_PER_PAGE as u32);
        match io.read(offset, &mut page) {
            Ok(()) => {}
            // The whole page is damaged; each of its slots is in the list.
            Err(IoError::Media) => page.fill(0xff),
            Err(e) => return Err(e),
        }
        let at = slot as usize % RECORDS_PER_PAGE * RECORD;
        Record::Quarantined.encode(&loaded.seed, slot, &mut page[at..at + RECORD]);
        io.write(offset, &page)?;
    }
    if damaged.is_empty() { Ok(()) } else { io.flush() }
}
