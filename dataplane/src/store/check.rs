//! Checking a disk offline: every structure, every record, every block that holds data and every one that must be zero.
//! Nothing is written, and memory does not grow with the disk's data.

use std::collections::BTreeMap;
use std::fmt;

use super::codec::{ChunkState, RECORD, RECORDS_PER_PAGE, Record, Superblock};
use super::layout::Layout;
use super::load::{LoadError, load};
use super::slots::WINDOW;
use crate::disk::{BlockIo, IoError};
use crate::ids::{BLOCK, DiskUuid, EXTENT, EXTENTS_PER_REGION};
use crate::replica::ChunkRef;

/// Findings that are listed; more are only counted.
pub const FINDINGS_MAX: usize = 10_000;

/// Something that is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// Nothing of the disk can be believed.
    Unusable(&'static str),
    /// A superblock is damaged, the other one is not.
    Superblock {
        /// It is the one at the end.
        copy: bool,
    },
    /// A checkpoint header can not be read.
    CheckpointHeader {
        /// 0: A, 1: B.
        area: usize,
    },
    /// The tables of a checkpoint do not match its header.
    Tables {
        /// 0: A, 1: B.
        area: usize,
    },
    /// A journal block that had been flushed is gone.
    JournalRot {
        /// Its sequence.
        sequence: u64,
    },
    /// A record is damaged, or belongs to no chunk.
    Record {
        /// Its slot.
        slot: u32,
        /// It is intact, but of no chunk that the disk has.
        stray: bool,
    },
    /// Two records claim the same extent.
    Twice {
        /// Their slots.
        slots: [u32; 2],
    },
    /// A chunk has another number of extents than its entry says.
    Count {
        /// The chunk.
        chunk: ChunkRef,
        /// Extents found.
        found: u32,
        /// Extents there should be.
        expected: u32,
    },
    /// A block's data does not match its checksum, outside the regions that a crash left in doubt.
    Block {
        /// The chunk.
        chunk: ChunkRef,
        /// The extent.
        extent: u16,
        /// The block.
        block: u8,
    },
    /// A block without data of an extent is not zero, outside the regions that a crash left in doubt: if it became valid
    /// and a crash took its data, these bytes could be taken for it.
    Hole {
        /// The chunk.
        chunk: ChunkRef,
        /// The extent.
        extent: u16,
        /// The block.
        block: u8,
    },
    /// A free slot is not zero: its next extent could come by the bytes of another volume.
    FreeSlot {
        /// The slot.
        slot: u32,
        /// The first such block.
        block: u8,
    },
    /// A block can not be read.
    Unreadable {
        /// First byte on the disk.
        offset: u64,
    },
    /// An opening found damage that may have taken extents of this chunk, and it was not settled since with the other
    /// replicas.
    Suspect {
        /// The chunk.
        chunk: ChunkRef,
    },
    /// Two chunk table entries name one chunk.
    ChunkTwice {
        /// The chunk.
        chunk: ChunkRef,
    },
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let area = |n: usize| if n == 0 { "A" } else { "B" };
        match *self {
            Finding::Unusable(why) => f.write_str(why),
            Finding::Superblock { copy } => {
                write!(
                    f,
                    "the superblock at the {} is damaged",
                    if copy { "end" } else { "start" }
                )
            }
            Finding::CheckpointHeader { area: a } => {
                write!(f, "checkpoint header {} can not be read", area(a))
            }
            Finding::Tables { area: a } => write!(f, "the tables of checkpoint {} are damaged", area(a)),
            Finding::JournalRot { sequence } => {
                write!(
                    f,
                    "journal block {sequence} had been flushed and is damaged: later changes are lost"
                )
            }
            Finding::Record { slot, stray: false } => write!(f, "the record of slot {slot} is damaged"),
            Finding::Record { slot, stray: true } => {
                write!(f, "the record of slot {slot} belongs to no chunk of this disk")
            }
            Finding::Twice { slots: [a, b] } => write!(f, "slots {a} and {b} claim the same extent"),
            Finding::Count {
                chunk,
                found,
                expected,
            } => {
                write!(f, "{chunk:?} has {found} extents and should have {expected}")
            }
            Finding::Block { chunk, extent, block } => {
                write!(
                    f,
                    "{chunk:?} extent {extent} block {block}: the data does not match its checksum"
                )
            }
            Finding::Hole { chunk, extent, block } => {
                write!(
                    f,
                    "{chunk:?} extent {extent} block {block}: it has no data and is not zero"
                )
            }
            Finding::FreeSlot { slot, block } => {
                write!(f, "slot {slot} is free and its block {block} is not zero")
            }
            Finding::Unreadable { offset } => write!(f, "the disk can not read the block at byte {offset}"),
            Finding::Suspect { chunk } => {
                write!(
                    f,
                    "{chunk:?} may have lost extents by damage found earlier: it is settled when its volume is attached with an intact replica"
                )
            }
            Finding::ChunkTwice { chunk } => write!(f, "{chunk:?} is in the chunk table twice"),
        }
    }
}

/// Findings as they come in: so many are kept, all are counted.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) kept: Vec<Finding>,
    pub(super) total: u64,
}

impl Findings {
    pub(super) fn push(&mut self, finding: Finding) {
        self.total += 1;
        if self.kept.len() < FINDINGS_MAX {
            self.kept.push(finding);
        }
    }
}

/// The outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Nothing is wrong.
    Clean,
    /// Something is wrong; the disk can be opened.
    Damaged,
    /// The disk can not be opened.
    Unusable,
}

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckReport {
    /// The outcome.
    pub verdict: Verdict,
    /// What is wrong, at most [`FINDINGS_MAX`].
    pub findings: Vec<Finding>,
    /// How much is wrong, listed or not.
    pub findings_total: u64,
    /// The disk, if its superblock could be read.
    pub uuid: Option<DiskUuid>,
    /// It had been closed.
    pub closed: bool,
    /// Journal blocks that an opening would replay.
    pub journal_blocks: u64,
    /// Replicas held.
    pub chunks: u64,
    /// Extents held.
    pub extents: u64,
    /// Blocks of data read and checked.
    pub blocks: u64,
    /// Blocks that do not match in regions that a crash left dirty or in doubt: to be settled with the other replicas,
    /// no damage.
    pub in_doubt: u64,
    /// Slots quarantined earlier.
    pub quarantined: u64,
}

/// Checks a whole disk. `progress(done, all)` counts slots.
pub fn check(io: &mut dyn BlockIo, progress: &mut dyn FnMut(u64, u64)) -> CheckReport {
    let mut report = CheckReport {
        verdict: Verdict::Clean,
        findings: Vec::new(),
        findings_total: 0,
        uuid: None,
        closed: false,
        journal_blocks: 0,
        chunks: 0,
        extents: 0,
        blocks: 0,
        in_doubt: 0,
        quarantined: 0,
    };
    let mut findings = Findings::default();
    let usable = walk(io, &mut report, &mut findings, progress);
    if let Err(e) = usable {
        report.verdict = Verdict::Unusable;
        findings.push(Finding::Unusable(match e {
            LoadError::Io(_) => "the disk failed",
            LoadError::Blank => "the disk is blank",
            LoadError::Foreign => "the disk begins with something that is not Unibody's",
            LoadError::Newer(_) => "the disk has a newer format than this program knows",
            LoadError::Superblock => "both superblocks are damaged",
            LoadError::Short { .. } => "the disk is shorter than its format says",
            LoadError::Checkpoints => "neither checkpoint is intact",
        }));
    } else if findings.total > 0 {
        report.verdict = Verdict::Damaged;
    }
    report.findings_total = findings.total;
    report.findings = findings.kept;
    report
}

fn walk(
    io: &mut dyn BlockIo,
    report: &mut CheckReport,
    findings: &mut Findings,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), LoadError> {
    let loaded = load(io, findings)?;
    report.uuid = Some(DiskUuid(loaded.layout.superblock.uuid));
    report.closed = loaded.header.clean;
    report.journal_blocks = loaded.replayed;
    let mut copy = vec![0; BLOCK];
    let same = io.read(loaded.layout.copy, &mut copy).is_ok()
        && Superblock::decode(&copy) == Ok(loaded.layout.superblock);
    if !same {
        findings.push(Finding::Superblock { copy: true });
    }
    let mut places = BTreeMap::new();
    for (i, entry) in loaded.chunks.iter().enumerate() {
        if entry.state != ChunkState::Free && places.insert(entry.chunk, i).is_some() {
            findings.push(Finding::ChunkTwice { chunk: entry.chunk });
        }
    }
    report.chunks = places.len() as u64;
    // Where each extent was seen: chunks in use are few against slots, so a map per chunk is small.
    let mut seen: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    let mut found = vec![0u32; loaded.chunks.len()];
    let slots = loaded.layout.superblock.slots;
    let mut data = vec![0; EXTENT];
    loaded.scan(io, |io, first, page, _| {
        let mut free = Vec::with_capacity(RECORDS_PER_PAGE);
        for (slot, bytes) in loaded.layout.slots_of(first).zip(page.chunks_exact(RECORD)) {
            let record = match Record::decode(&loaded.seed, slot, bytes) {
                Ok(Record::Free) => {
                    // Of the announced windows an opening zeroes what is free.
                    if !loaded.windows.contains(&(slot / WINDOW)) {
                        free.push(slot);
                    }
                    continue;
                }
                Ok(Record::Quarantined) => {
                    report.quarantined += 1;
                    continue;
                }
                Ok(Record::Extent(record)) => record,
                Err(_) => {
                    findings.push(Finding::Record { slot, stray: false });
                    continue;
                }
            };
            let Some(&place) = places.get(&record.chunk) else {
                findings.push(Finding::Record { slot, stray: true });
                continue;
            };
            let at =
                &mut seen.entry(place).or_insert_with(|| vec![u32::MAX; 1024])[usize::from(record.extent)];
            if *at != u32::MAX {
                findings.push(Finding::Twice { slots: [*at, slot] });
            }
            *at = slot;
            found[place] += 1;
            report.extents += 1;
            let entry = &loaded.chunks[place];
            let region = usize::from(record.extent) / EXTENTS_PER_REGION;
            let doubtful =
                (entry.dirty | entry.in_doubt) >> region & 1 == 1 || entry.state == ChunkState::Dropping;
            let offset = loaded.layout.block_at(slot, 0);
            if record.image.valid == 0 && (doubtful || io.known_zero(offset, EXTENT as u64)) {
                continue;
            }
            let whole = readable(io.read(offset, &mut data))?;
            for (b, block) in data.chunks_exact_mut(BLOCK).enumerate() {
                let valid = record.image.valid >> b & 1 == 1;
                if !valid && doubtful {
                    continue;
                }
                report.blocks += u64::from(valid);
                let offset = offset + (b * BLOCK) as u64;
                let (chunk, extent, b) = (record.chunk, record.extent, b as u8);
                if !whole && !readable(io.read(offset, block))? {
                    findings.push(Finding::Unreadable { offset });
                } else if !valid {
                    if *block != ZERO {
                        findings.push(Finding::Hole {
                            chunk,
                            extent,
                            block: b,
                        });
                    }
                } else if crate::checksum::crc32c(block) == record.image.crcs[usize::from(b)] {
                } else if doubtful {
                    report.in_doubt += 1;
                } else {
                    findings.push(Finding::Block {
                        chunk,
                        extent,
                        block: b,
                    });
                }
            }
        }
        for run in free.chunk_by(|a, b| a + 1 == *b) {
            free_slots(io, &loaded.layout, run, &mut data, findings)?;
        }
        progress(u64::from(loaded.layout.slots_of(first).end), slots);
        Ok(())
    })?;
    for (entry, found) in loaded.chunks.iter().zip(found) {
        if entry.state == ChunkState::Live && entry.suspect {
            findings.push(Finding::Suspect { chunk: entry.chunk });
        }
        if entry.state != ChunkState::Free && entry.extents != found && !entry.suspect {
            findings.push(Finding::Count {
                chunk: entry.chunk,
                found,
                expected: entry.extents,
            });
        }
    }
    Ok(())
}

const ZERO: [u8; BLOCK] = [0; BLOCK];

/// Whether a read yielded something; a disk that failed ends the check.
fn readable(read: Result<(), IoError>) -> Result<bool, IoError> {
    match read {
        Ok(()) => Ok(true),
        Err(IoError::Media) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Free slots next to each other: each must be zero. What was never written, or given back, is not read.
fn free_slots(
    io: &mut dyn BlockIo,
    layout: &Layout,
    run: &[u32],
    data: &mut [u8],
    findings: &mut Findings,
) -> Result<(), IoError> {
    if io.known_zero(layout.block_at(run[0], 0), (run.len() * EXTENT) as u64) {
        return Ok(());
    }
    for &slot in run {
        let offset = layout.block_at(slot, 0);
        if io.known_zero(offset, EXTENT as u64) {
            continue;
        }
        let whole = readable(io.read(offset, data))?;
        let mut full = false;
        for (b, block) in data.chunks_exact_mut(BLOCK).enumerate() {
            let offset = offset + (b * BLOCK) as u64;
            if !whole && !readable(io.read(offset, block))? {
                findings.push(Finding::Unreadable { offset });
            } else if *block != ZERO && !full {
                full = true;
                findings.push(Finding::FreeSlot { slot, block: b as u8 });
            }
        }
    }
    Ok(())
}
