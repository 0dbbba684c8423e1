//! One disk: format, journal, recovery and the replica's obligations of [`crate::replica`].
//!
//! A state machine without I/O, clock, chance or hash order: requests, completions and ticks go in, effects come out.
//! Data never passes through it; checksums come with writes and with read completions. `docs/formats/disk.md` is the
//! format. A write's way: [`submit`](Store::submit) (this file) -> `write.rs` -> `journal.rs` -> `complete.rs`.
//!
//! Rules that hold everywhere:
//! * A write is answered when its data and every journal block up to its own have been written.
//! * A slot is reused only when its data is zero and its freeing is journaled, both durably.
//! * A region is written only while its dirty mark is durable.
//! * A record page goes home only after the journal entries it holds are durable; the journal is freed only after the
//!   pages are durable and were read back.
//! * The first failed write or flush ends the disk for this boot.
//!
//! Absent on purpose: retrying a failed write, reading ahead, any policy of replication.

mod background;
mod cache;
pub mod check;
mod checkpoint;
pub mod codec;
mod complete;
mod control;
mod digest;
mod flush;
pub mod format;
mod free;
pub mod fuzz;
mod install;
mod journal;
pub mod layout;
mod load;
pub mod open;
mod ops;
mod read;
mod slots;
mod stats;
mod tables;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_check;
#[cfg(test)]
mod tests_crash;
#[cfg(test)]
mod tests_disk;
#[cfg(test)]
mod tests_golden;
mod window;
mod write;

use std::collections::VecDeque;

use crate::disk::{Completion, Io, Token};
use crate::ids::{BLOCK, BootId, DiskUuid, PowerId};
use crate::memory::{Arena, prefetch};
use crate::replica::{Header, Reply, Request, Status};

pub use check::{CheckReport, Finding, Verdict, check};
pub use format::{FormatError, FormatOptions};
pub use open::{OpenError, OpenOptions, OpenReport};
pub use stats::StoreStats;

use cache::Cache;
use checkpoint::Checkpoint;
use codec::{ChunkState, Entry, Seed};
use flush::Flusher;
use journal::{Journal, Room};
use layout::Layout;
use ops::{List, Ops, Step};
use slots::Slots;
use stats::Counters;
use tables::Tables;
use window::Windows;

/// Requests that wait for an operation to become free. Whoever submits keeps fewer than this many unanswered; beyond,
/// requests are refused as [`Status::Invalid`].
pub const DOOR_MAX: usize = 65_536;

/// Names a request to whoever submitted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// Why a disk ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// A flush failed: what was written since the last one may be lost.
    #[error("a flush failed")]
    Flush,
    /// A journal block could not be written.
    #[error("a journal block could not be written")]
    Journal,
    /// Data could not be written.
    #[error("data could not be written")]
    Data,
    /// Records or tables could not be written.
    #[error("records or tables could not be written")]
    Metadata,
    /// Records could not be read, or did not check.
    #[error("records could not be read")]
    MetadataRead,
    /// A checkpoint read back something else than it wrote.
    #[error("a checkpoint read back something else than it wrote")]
    ReadBack,
    /// It was taken out of service.
    #[error("taken out of service")]
    Removed,
}

/// What a store wants done.
#[derive(Debug)]
pub enum Effect {
    /// Do an I/O and answer with [`Store::completed`].
    Io {
        /// Its name.
        token: Token,
        /// What to do.
        io: Io,
    },
    /// A request has ended.
    Reply {
        /// Its name.
        tag: Tag,
        /// How.
        reply: Reply,
    },
    /// The disk has ended: said once. Requests are answered [`Status::DiskFailed`] from now on.
    Failed(Failure),
    /// The disk is closed: nothing is under way and nothing more will come.
    Closed,
}

/// One open disk.
#[derive(Debug)]
pub struct Store {
    seed: Seed,
    layout: Layout,
    boot: BootId,
    power: PowerId,
    arena: Arena,
    tables: Tables,
    slots: Slots,
    windows: Windows,
    quarantined: u64,
    cache: Cache,
    journal: Journal,
    ops: Ops,
    ready: List,
    /// Wait for room in the journal.
    journal_wait: List,
    /// Wait for a frame.
    frame_wait: List,
    door: VecDeque<(Tag, Header, Request)>,
    flusher: Flusher,
    checkpoint: Checkpoint,
    /// Seals that wait or may wait for older operations.
    seals: usize,
    now_ms: u64,
    /// Where the background looks next in the chunk table.
    hand: u32,
    /// A freeing ended or a chunk was dropped since the background looked.
    free_work: bool,
    failed: Option<Failure>,
    closing: bool,
    closed: bool,
    counters: Counters,
}

/// What a token stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Data = 1,
    Verify,
    Page,
    Journal,
    Flush,
    Home,
    HomeVerify,
    Table,
}

#[inline]
fn token(kind: Kind, extent: u8, first: u8, count: u8, index: u32) -> Token {
    let high =
        u64::from(kind as u8) << 24 | u64::from(extent) << 16 | u64::from(first) << 8 | u64::from(count);
    Token(high << 32 | u64::from(index))
}

impl Store {
    /// The disk's name.
    pub fn uuid(&self) -> DiskUuid {
        DiskUuid(self.layout.superblock.uuid)
    }

    /// This opening's name.
    pub fn boot(&self) -> BootId {
        self.boot
    }

    /// The span of power it was opened in.
    pub fn power(&self) -> PowerId {
        self.power
    }

    /// Memory of the store's that its I/O goes to, for registering it with a device.
    pub fn memory(&self) -> (*mut u8, usize) {
        self.arena.span()
    }

    /// Nothing is under way: no request unanswered, no I/O outstanding.
    pub fn idle(&self) -> bool {
        let quiet = self.ops.under_way() == 0
            && self.door.is_empty()
            && self.journal.in_flight == 0
            && !self.flusher.in_flight
            && self.counters.loading == 0;
        if self.failed.is_some() {
            return quiet && !self.checkpoint.io_under_way();
        }
        quiet && !self.journal.pending() && self.checkpoint.idle()
    }

    /// The replicas held, without those that are being dropped.
    pub fn chunks(&self) -> impl Iterator<Item = crate::replica::ChunkRef> {
        let live = |chunk: &&tables::Chunk| chunk.entry.state == ChunkState::Live;
        self.tables
            .chunks
            .iter()
            .filter(live)
            .map(|chunk| chunk.entry.chunk)
    }

    /// Ends the disk, as if it had failed: what is under way is answered when its last I/O has ended, and nothing is
    /// carried out any more.
    pub fn remove(&mut self, out: &mut Vec<Effect>) {
        self.fail(Failure::Removed, out);
    }

    /// A request for this extent comes soon: what it will look at first is fetched from memory meanwhile.
    #[inline]
    pub fn foresee(&self, chunk: &crate::replica::ChunkRef, extent: u16) {
        let slot = self
            .tables
            .chunk(chunk.key)
            .and_then(|place| self.tables.chunks[place as usize].map.as_ref())
            .map_or(tables::ABSENT, |map| map[usize::from(extent)]);
        if slot == tables::ABSENT {
            return;
        }
        let slot = slot & !tables::EMPTY;
        if let Some(frame) = self.cache.peek(slot / codec::RECORDS_PER_PAGE as u32) {
            let at = slot as usize % codec::RECORDS_PER_PAGE * codec::RECORD;
            // An address and no reference: the frame may be loading, and then it is the device's.
            let record = self.arena.span().0.wrapping_add(frame as usize * BLOCK + at);
            prefetch::<false>(record);
            prefetch::<false>(record.wrapping_add(codec::RECORD - 1));
        }
    }

    /// Takes a request. It is answered by an [`Effect::Reply`], at once or later. Follow a round of calls by
    /// [`Store::flush_batch`]: until then a batch may stay open.
    #[inline]
    pub fn submit(&mut self, tag: Tag, header: Header, request: Request, out: &mut Vec<Effect>) {
        self.take(tag, &header, &request, out);
    }

    /// As [`Store::submit`]; a request is large, and copied only once this way.
    #[inline]
    pub fn take(&mut self, tag: Tag, header: &Header, request: &Request, out: &mut Vec<Effect>) {
        if self.failed.is_some() || self.closing {
            out.push(refused(tag, Status::DiskFailed));
            return;
        }
        if self.door.is_empty() && self.admit(tag, header, request, out) {
            self.pump(out);
        } else if self.door.len() < DOOR_MAX {
            self.door.push_back((tag, *header, *request));
        } else {
            self.counters.refused += 1;
            out.push(refused(tag, Status::Invalid));
        }
    }

    /// Lets a request in; false: no operation is free.
    #[inline]
    fn admit(&mut self, tag: Tag, header: &Header, request: &Request, out: &mut Vec<Effect>) -> bool {
        let (place, extent, mask, exclusive) = match self.judge(header, request) {
            Ok(found) => found,
            Err(status) => {
                self.counters.refused += 1;
                out.push(refused(tag, status));
                return true;
            }
        };
        let Some(i) = self.ops.take(tag.0, header, request) else {
            return false;
        };
        if mask == 0 {
            self.ops[i].place = place;
            self.advance(i, out);
        } else if self.ops.order(i, place, extent, mask, exclusive) {
            self.advance(i, out);
        } else {
            self.ops[i].step = Step::Ordered;
        }
        true
    }

    /// Whether a request may be carried out, and which blocks of which chunk it is about (no blocks: not about one
    /// extent).
    #[inline]
    fn judge(&mut self, header: &Header, request: &Request) -> Result<(u32, u16, u16, bool), Status> {
        let volume = self.tables.volume(header.volume);
        let sealed = volume.map(|v| self.tables.volumes[v as usize].entry.sealed);
        if let Request::Seal = request {
            let too_old = sealed.is_some_and(|s| header.generation.0 < s);
            return if too_old {
                Err(Status::StaleGeneration)
            } else {
                Ok((ops::NIL, 0, 0, false))
            };
        }
        let (Some(v), Some(s)) = (volume, sealed) else {
            return Err(Status::StaleGeneration);
        };
        if s != header.generation.0 {
            return Err(Status::StaleGeneration);
        }
        let volume = &mut self.tables.volumes[v as usize];
        volume.stable = volume.stable.max(header.stable);
        let (chunk, extent, mask, exclusive) = match request {
            Request::Write { span, version, .. } | Request::Zero { span, version } => {
                if version.0 == 0 {
                    return Err(Status::Invalid);
                }
                let mask = span_mask(span.first, span.count)?;
                // What a zeroing does depends on whether the extent is there: it waits for a write that will make it.
                let whole = matches!(request, Request::Zero { .. });
                (span.chunk, span.extent, if whole { u16::MAX } else { mask }, true)
            }
            Request::Read { span, .. } => {
                (span.chunk, span.extent, span_mask(span.first, span.count)?, false)
            }
            Request::Install {
                chunk,
                extent,
                image,
                write,
                ..
            } => {
                let agree = codec::masks_agree(image.valid, image.zero, image.lost);
                let empty = image.valid | image.zero | image.lost == 0;
                if !agree || write & !image.valid != 0 || (image.version.0 == 0 && !empty) {
                    return Err(Status::Invalid);
                }
                (*chunk, *extent, u16::MAX, true)
            }
            Request::Digest { chunk, region, .. } | Request::Settle { chunk, region } => {
                if *region >= 64 {
                    return Err(Status::Invalid);
                }
                (*chunk, 0, 0, false)
            }
            Request::CreateChunk(chunk) | Request::DropChunk(chunk) => {
                let ours = chunk.key.volume == header.volume;
                return if ours {
                    Ok((ops::NIL, 0, 0, false))
                } else {
                    Err(Status::Invalid)
                };
            }
            Request::Flush | Request::Confirm => return Ok((ops::NIL, 0, 0, false)),
            Request::Seal => unreachable!("handled above"),
        };
        if chunk.key.volume != header.volume || extent >= 1024 {
            return Err(Status::Invalid);
        }
        let place = self.tables.chunk(chunk.key).ok_or(Status::NoChunk)?;
        if self.tables.chunks[place as usize].entry.chunk != chunk {
            return Err(Status::NoChunk);
        }
        Ok((place, extent, mask, exclusive))
    }

    /// Begins an operation, or goes on with it after what it waited for.
    #[inline]
    fn advance(&mut self, i: u32, out: &mut Vec<Effect>) {
        // Matched in place: a request is large, and each step takes what it needs of it.
        match self.ops[i].request {
            None => self.advance_free(i, out),
            Some(Request::Write { .. }) => self.begin_write(i, out),
            Some(Request::Read { .. }) => self.begin_read(i, out),
            Some(Request::Zero { .. }) => self.begin_zero(i, out),
            Some(Request::Flush) => self.begin_flush(i),
            Some(Request::Confirm) => self.end(i, Reply::Done, out),
            Some(Request::Digest { .. }) => self.go_on_digest(i, out),
            Some(Request::Install { .. }) => self.begin_install(i, out),
            Some(Request::Settle { .. }) => self.begin_settle(i, out),
            Some(Request::Seal) => self.begin_seal(i, out),
            Some(Request::CreateChunk(_)) => self.begin_create(i, out),
            Some(Request::DropChunk(_)) => self.begin_drop(i, out),
        }
    }

    /// Ends an operation with its answer.
    #[inline]
    fn end(&mut self, i: u32, reply: Reply, out: &mut Vec<Effect>) {
        let op = &mut self.ops[i];
        if op.request.is_some() {
            out.push(Effect::Reply {
                tag: Tag(op.tag),
                reply,
            });
        }
        if op.writing {
            op.writing = false;
            let chunk = &mut self.tables.chunks[op.place as usize];
            chunk.writers -= 1;
            chunk.written_ms = self.now_ms;
        }
        let seal = matches!(op.request, Some(Request::Seal));
        self.ops.leave(i, &mut self.ready);
        if self.seals > 0 {
            self.tell_seals(i);
            self.seals -= usize::from(seal);
        }
        self.ops.give(i);
    }

    fn refuse(&mut self, i: u32, status: Status, out: &mut Vec<Effect>) {
        self.counters.refused += 1;
        self.end(i, Reply::Refused(status), out);
    }

    /// Goes on with everything that can.
    #[inline]
    fn pump(&mut self, out: &mut Vec<Effect>) {
        loop {
            if let Some(i) = self.ops.pop(&mut self.ready) {
                self.advance(i, out);
            } else if let Some(&(tag, header, request)) = self.door.front() {
                if !self.admit(tag, &header, &request, out) {
                    break;
                }
                self.door.pop_front();
            } else {
                break;
            }
            if self.failed.is_some() {
                break;
            }
        }
    }

    /// Makes room in the journal for `size` bytes; false: the operation must wait in `journal_wait`.
    #[inline]
    fn make_room(&mut self, size: usize, out: &mut Vec<Effect>) -> bool {
        match self.journal.room(size) {
            Room::Here => true,
            Room::AfterClose => {
                self.close_batch(out);
                true
            }
            Room::None => false,
        }
    }

    /// Writes the open batch.
    fn close_batch(&mut self, out: &mut Vec<Effect>) {
        let (sequence, page) = self.journal.close(&self.seed, &mut self.arena);
        self.counters.journal_blocks += 1;
        out.push(Effect::Io {
            token: Token(u64::from(Kind::Journal as u8) << 56 | sequence & ((1 << 56) - 1)),
            io: Io::Write {
                offset: self.layout.journal_at(sequence),
                len: BLOCK as u32,
                data: self.arena.payload(page),
            },
        });
    }

    /// Everything submitted so far has been: writes the batch unless enough are on their way, and sends a flush if one
    /// is wanted. To be called after every round of other calls.
    #[inline]
    pub fn flush_batch(&mut self, out: &mut Vec<Effect>) {
        if self.failed.is_some() {
            return;
        }
        if self.free_work && !self.closing {
            self.free_work = false;
            self.free_dropped(out);
            self.pump(out);
        }
        self.pace_checkpoint(out);
        if self.journal.pending() && self.journal.in_flight < journal::IN_FLIGHT_NORMAL {
            self.close_batch(out);
        }
        self.send_flush(out);
        self.pump_close(out);
    }

    /// Journals a chunk's entry as it stands; room was made. Returns what the journal must complete.
    fn journal_chunk(&mut self, place: u32) -> u64 {
        let entry = self.tables.chunks[place as usize].entry;
        self.journal
            .append(&mut self.arena, &Entry::Chunk { index: place, entry })
    }

    /// The chunk of an operation, if it is still the replica that was meant.
    #[inline]
    fn alive(&self, place: u32, chunk: &crate::replica::ChunkRef) -> bool {
        let entry = &self.tables.chunks[place as usize].entry;
        entry.state == ChunkState::Live && entry.chunk == *chunk
    }

    /// Ends the disk.
    fn fail(&mut self, reason: Failure, out: &mut Vec<Effect>) {
        if self.failed.is_some() {
            return;
        }
        self.failed = Some(reason);
        out.push(Effect::Failed(reason));
        self.ready = List::EMPTY;
        self.journal_wait = List::EMPTY;
        self.frame_wait = List::EMPTY;
        self.journal.forget();
        self.flusher.forget();
        for frame in &mut self.cache.frames {
            frame.waiters = List::EMPTY;
        }
        // Memory of a request belongs to the device until its I/O has ended: those are answered then.
        let mut i = 0;
        while i < ops::OPS_MAX as u32 {
            if self.ops.is_used(i) && self.ops[i].ios == 0 {
                self.end(i, Reply::Refused(Status::DiskFailed), out);
                self.ready = List::EMPTY;
            }
            i += 1;
        }
        while let Some((tag, ..)) = self.door.pop_front() {
            out.push(refused(tag, Status::DiskFailed));
        }
    }

    /// An I/O has ended.
    #[inline]
    pub fn completed(&mut self, completion: Completion, out: &mut Vec<Effect>) {
        self.complete(completion, out);
        if self.failed.is_none() {
            self.pump(out);
        }
    }
}

fn refused(tag: Tag, status: Status) -> Effect {
    Effect::Reply {
        tag,
        reply: Reply::Refused(status),
    }
}

#[inline]
fn span_mask(first: u8, count: u8) -> Result<u16, Status> {
    if count == 0 || u32::from(first) + u32::from(count) > 16 {
        return Err(Status::Invalid);
    }
    Ok(crate::ids::block_mask(first, count))
}
