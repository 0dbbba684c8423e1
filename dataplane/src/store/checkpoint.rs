//! Bringing record pages and tables home, so that journal space is free again; and closing, which ends with one.
//!
//! Rounds of pages: copy, make the journal entries they hold durable, write the copies, flush, read back and compare.
//! Then the tables go to the area that does not hold, are made durable together with every journal block that they
//! reflect, and the header that names the new tail makes it all valid. Only when that is durable, the tail moves.
//! Requests go on meanwhile: what they change after the copy stays dirty for the next checkpoint, and lies behind the
//! new tail. Tables may be ahead of the tail, since replay writes whole new states in order.

use super::codec::{CHUNK_ENTRY, CheckpointHeader, ChunkState, NO_WINDOW, VOLUME_ENTRY, WINDOWS};
use super::layout::{CHUNKS_PER_BLOCK, VOLUMES_PER_BLOCK};
use super::{Effect, Failure, Kind, Store, token};
use crate::disk::{Completion, Io};
use crate::ids::BLOCK;
use crate::planted::{self, Bug};

/// Pages copied and written in one round.
pub(super) const ROUND: usize = 64;
/// Table blocks written at once.
pub(super) const TABLE_BLOCKS: usize = 16;
/// Pages of the arena that a checkpoint uses: copies, table blocks, the header.
pub(super) const PAGES: usize = ROUND + TABLE_BLOCKS + 1;
/// Pages next to each other that are written and read back as one.
const RUN: usize = 16;

/// How far a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Idle,
    /// The journal entries in the copies become durable.
    RoundJournal,
    /// The copies are being written.
    RoundWrite,
    /// They become durable.
    RoundFlush,
    /// They are being read back.
    RoundVerify,
    /// The tables are being written.
    Tables,
    /// They, and the journal that they reflect, become durable.
    TablesFlush,
    /// The header is being written.
    Header,
    /// It becomes durable.
    HeaderFlush,
}

/// A checkpoint under way, and which area is next.
#[derive(Debug)]
pub(super) struct Checkpoint {
    phase: Phase,
    first_page: usize,
    /// Area the next checkpoint goes to, and its sequence.
    area: usize,
    sequence: u64,
    tail: u64,
    tail_hash: [u8; 32],
    /// The windows as they were at the tail.
    windows: [u32; WINDOWS],
    /// Dirty frames at the start, in the order of their pages, and how many of them are done.
    frames: Vec<u32>,
    done: usize,
    /// The present round: frame, page, checksum of the copy.
    round: Vec<(u32, u32, u32)>,
    ios: usize,
    volumes: u32,
    chunks: u32,
    /// The table block to be written next.
    block: u64,
    hasher: blake3::Hasher,
    last: bool,
}

impl Checkpoint {
    pub(super) fn new(first_page: usize, area: usize, sequence: u64, frames: usize) -> Self {
        Checkpoint {
            phase: Phase::Idle,
            first_page,
            area,
            sequence,
            tail: 0,
            tail_hash: [0; 32],
            windows: [NO_WINDOW; WINDOWS],
            frames: Vec::with_capacity(frames),
            done: 0,
            round: Vec::with_capacity(ROUND),
            ios: 0,
            volumes: 0,
            chunks: 0,
            block: 0,
            hasher: blake3::Hasher::new(),
            last: false,
        }
    }

    pub(super) fn idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    pub(super) fn io_under_way(&self) -> bool {
        self.ios > 0
    }
}

impl Store {
    /// Begins a checkpoint when half of the ring or of the page frames is used up.
    #[inline]
    pub(super) fn pace_checkpoint(&mut self, out: &mut Vec<Effect>) {
        let due = self.journal.ring_used() * 2 > self.journal.ring()
            || self.cache.dirty * 2 > self.cache.frames.len()
            || (!self.frame_wait.is_empty() && self.cache.dirty > 0);
        if due && self.checkpoint.idle() {
            self.begin_checkpoint(out);
        }
    }

    fn begin_checkpoint(&mut self, out: &mut Vec<Effect>) {
        if self.journal.pending() {
            self.close_batch(out);
        }
        let cp = &mut self.checkpoint;
        (cp.tail, cp.tail_hash) = self.journal.position();
        cp.windows = self.windows.all;
        cp.frames.clear();
        cp.done = 0;
        if !planted::on(Bug::FreeJournalEarly) {
            let frames = &self.cache.frames;
            cp.frames
                .extend((0..frames.len() as u32).filter(|&f| frames[f as usize].dirty));
            cp.frames.sort_unstable_by_key(|&f| frames[f as usize].page);
        }
        self.next_round(out);
    }

    /// Copies the next pages, or goes on to the tables.
    fn next_round(&mut self, out: &mut Vec<Effect>) {
        let cp = &mut self.checkpoint;
        if cp.done == cp.frames.len() {
            return self.begin_tables(out);
        }
        let count = (cp.frames.len() - cp.done).min(ROUND);
        cp.round.clear();
        for k in 0..count {
            let frame = cp.frames[cp.done + k];
            let mut page = [0; BLOCK];
            page.copy_from_slice(self.arena.bytes(frame as usize, 1));
            let crc = crate::checksum::crc32c(&page);
            self.arena.bytes_mut(cp.first_page + k, 1).copy_from_slice(&page);
            cp.round
                .push((frame, self.cache.frames[frame as usize].page, crc));
            self.cache.begin_write(frame);
        }
        cp.done += count;
        cp.phase = Phase::RoundJournal;
        if self.journal.pending() {
            self.close_batch(out);
        }
        self.flusher.checkpoint = Some(self.journal.next);
    }

    /// The flush that the checkpoint waited for has ended.
    pub(super) fn checkpoint_flushed(&mut self, out: &mut Vec<Effect>) {
        match self.checkpoint.phase {
            Phase::RoundJournal => {
                self.checkpoint.phase = Phase::RoundWrite;
                self.each_run(Kind::Home, out);
            }
            Phase::RoundFlush => {
                self.checkpoint.phase = Phase::RoundVerify;
                self.each_run(Kind::HomeVerify, out);
            }
            Phase::TablesFlush => self.write_header(out),
            Phase::HeaderFlush => self.end_checkpoint(out),
            phase => unreachable!("no flush is awaited in {phase:?}"),
        }
    }

    /// Writes the copies of the round, or reads them back, neighbours together.
    fn each_run(&mut self, kind: Kind, out: &mut Vec<Effect>) {
        let cp = &mut self.checkpoint;
        let mut k = 0;
        while k < cp.round.len() {
            let page = cp.round[k].1;
            let mut n = 1;
            while n < RUN && k + n < cp.round.len() && cp.round[k + n].1 == page + n as u32 {
                n += 1;
            }
            let (offset, len) = (self.layout.page_at(page), (n * BLOCK) as u32);
            let io = if kind == Kind::Home {
                Io::Write {
                    offset,
                    len,
                    data: self.arena.payload(cp.first_page + k),
                }
            } else {
                Io::Verify { offset, len }
            };
            cp.ios += 1;
            self.counters.pages_home += if kind == Kind::Home { n as u64 } else { 0 };
            out.push(Effect::Io {
                token: token(kind, 0, 0, n as u8, k as u32),
                io,
            });
            k += n;
        }
    }

    /// An I/O of the checkpoint has ended.
    pub(super) fn checkpoint_completed(
        &mut self,
        kind: u8,
        index: u32,
        completion: &Completion,
        out: &mut Vec<Effect>,
    ) {
        self.checkpoint.ios -= 1;
        if self.failed.is_some() {
            return;
        }
        if completion.result.is_err() {
            return self.fail(Failure::Metadata, out);
        }
        if kind == Kind::HomeVerify as u8 {
            let count = (completion.token.0 >> 32) as u8;
            for n in 0..usize::from(count) {
                if self.checkpoint.round[index as usize + n].2 != completion.crcs[n] {
                    return self.fail(Failure::ReadBack, out);
                }
            }
        }
        if self.checkpoint.ios > 0 {
            return;
        }
        match self.checkpoint.phase {
            Phase::RoundWrite => {
                self.checkpoint.phase = Phase::RoundFlush;
                self.flusher.checkpoint = Some(0);
            }
            Phase::RoundVerify => {
                for k in 0..self.checkpoint.round.len() {
                    self.cache.frames[self.checkpoint.round[k].0 as usize].writing = false;
                }
                self.ops.append(&mut self.ready, &mut self.frame_wait);
                self.next_round(out);
            }
            Phase::Tables => self.write_tables(out),
            Phase::Header => {
                self.checkpoint.phase = Phase::HeaderFlush;
                self.flusher.checkpoint = Some(0);
            }
            phase => unreachable!("no I/O is under way in {phase:?}"),
        }
    }

    fn begin_tables(&mut self, out: &mut Vec<Effect>) {
        let volumes = self
            .tables
            .volumes
            .iter()
            .rposition(|v| v.entry.used)
            .map_or(0, |i| i + 1);
        let used = |c: &super::tables::Chunk| c.entry.state != ChunkState::Free;
        let chunks = self.tables.chunks.iter().rposition(used).map_or(0, |i| i + 1);
        let cp = &mut self.checkpoint;
        (cp.volumes, cp.chunks) = (volumes as u32, chunks as u32);
        cp.block = 0;
        cp.hasher = self.seed.table_hasher();
        cp.phase = Phase::Tables;
        self.write_tables(out);
    }

    /// Writes the next blocks of the tables, or ends them.
    fn write_tables(&mut self, out: &mut Vec<Effect>) {
        let cp = &mut self.checkpoint;
        let volume_blocks = u64::from(cp.volumes).div_ceil(VOLUMES_PER_BLOCK as u64);
        let blocks = volume_blocks + u64::from(cp.chunks).div_ceil(CHUNKS_PER_BLOCK as u64);
        if cp.block == blocks {
            cp.phase = Phase::TablesFlush;
            if self.journal.pending() {
                self.close_batch(out);
            }
            self.flusher.checkpoint = Some(self.journal.next);
            return;
        }
        let first = cp.first_page + ROUND;
        let in_volumes = cp.block < volume_blocks;
        let end = if in_volumes { volume_blocks } else { blocks };
        let count = ((end - cp.block) as usize).min(TABLE_BLOCKS);
        let bytes = self.arena.bytes_mut(first, count);
        bytes.fill(0);
        let base = self.layout.checkpoints[cp.area] + BLOCK as u64;
        let offset = if in_volumes {
            let from = cp.block as usize * VOLUMES_PER_BLOCK;
            let entries = self.tables.volumes[..cp.volumes as usize].iter().skip(from);
            for (place, volume) in bytes.chunks_exact_mut(VOLUME_ENTRY).zip(entries) {
                volume.entry.encode(place);
            }
            base + cp.block * BLOCK as u64
        } else {
            let block = cp.block - volume_blocks;
            let from = block as usize * CHUNKS_PER_BLOCK;
            let entries = self.tables.chunks[..cp.chunks as usize].iter().skip(from);
            for (place, chunk) in bytes.chunks_exact_mut(CHUNK_ENTRY).zip(entries) {
                chunk.entry.encode(place);
            }
            base + (self.layout.volume_blocks + block) * BLOCK as u64
        };
        cp.hasher.update(bytes);
        cp.block += count as u64;
        cp.ios += 1;
        let io = Io::Write {
            offset,
            len: (count * BLOCK) as u32,
            data: self.arena.payload(first),
        };
        out.push(Effect::Io {
            token: token(Kind::Table, 0, 0, 0, 0),
            io,
        });
    }

    fn write_header(&mut self, out: &mut Vec<Effect>) {
        let cp = &mut self.checkpoint;
        let header = CheckpointHeader {
            sequence: cp.sequence,
            tail: cp.tail,
            tail_hash: cp.tail_hash,
            boot: self.boot.0,
            power: self.power.0,
            volumes: cp.volumes,
            chunks: cp.chunks,
            clean: cp.last,
            tables: *cp.hasher.finalize().as_bytes(),
            windows: cp.windows,
        };
        let page = cp.first_page + ROUND + TABLE_BLOCKS;
        header.encode(&self.seed, cp.area as u32, self.arena.bytes_mut(page, 1));
        cp.phase = Phase::Header;
        cp.ios += 1;
        let offset = self.layout.checkpoints[cp.area];
        let io = Io::Write {
            offset,
            len: BLOCK as u32,
            data: self.arena.payload(page),
        };
        out.push(Effect::Io {
            token: token(Kind::Table, 0, 0, 0, 0),
            io,
        });
    }

    fn end_checkpoint(&mut self, out: &mut Vec<Effect>) {
        let cp = &mut self.checkpoint;
        self.journal.tail = cp.tail;
        cp.area = 1 - cp.area;
        cp.sequence += 1;
        cp.phase = Phase::Idle;
        self.counters.checkpoints += 1;
        self.ops.append(&mut self.ready, &mut self.journal_wait);
        self.ops.append(&mut self.ready, &mut self.frame_wait);
        if cp.last {
            self.closed = true;
            out.push(Effect::Closed);
        }
    }

    /// Closes the disk: requests under way end, new ones are refused, all is brought home and marked clean. Drive the
    /// store until [`Effect::Closed`] (or until it is idle after [`Effect::Failed`]).
    pub fn close(&mut self, out: &mut Vec<Effect>) {
        self.closing = true;
        self.flush_batch(out);
    }

    /// When the last request has ended, begins the checkpoint that closes.
    pub(super) fn pump_close(&mut self, out: &mut Vec<Effect>) {
        if !self.closing || self.closed || self.checkpoint.last || !self.idle() {
            return;
        }
        // Nothing is under way: the flush before the header makes every write durable. What is stable is not dirty then; of
        // the rest another replica may know nothing, and no owner would compare them.
        for place in 0..self.tables.chunks.len() {
            let stable = self.stable_of(place as u32);
            let chunk = &mut self.tables.chunks[place];
            if chunk.newest <= stable || planted::on(Bug::CleanAboveStable) {
                chunk.entry.dirty = 0;
                chunk.marked = 0;
            }
        }
        // Free slots are durably zero then, too.
        self.windows = super::window::Windows::new();
        self.checkpoint.last = true;
        self.begin_checkpoint(out);
        self.send_flush(out);
    }
}
