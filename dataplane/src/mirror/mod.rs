//! One volume's replication on its owner: requests, answers and ticks in, effects out.
//!
//! What it promises (design, section 6): a write is acknowledged when every required replica has it; nothing is
//! acknowledged between the loss of a required replica and the commit that removes it; operations on a block are
//! serial; before the first I/O to a region its in-sync replicas are equal; a replica is promoted only when it is equal,
//! flushed and has had every write since.
//!
//! How it is cut:
//! * `locks`: the conflict queue. Operations become pieces of at most one extent; a piece holds its blocks, shared for
//!   reads and alone for writes, in order of arrival.
//! * `ops`: what a guest asks for, and its pieces' way to the replicas and back.
//! * `disks`: sealing, loss, silence and flushing of the disks that replicas are on.
//! * `chunks`: which replicas of a chunk are trusted, at attach, after a return and after a new configuration.
//! * `propose`: what is asked of the control state, one proposal at a time.
//! * `renew`: a new generation under a running guest, before the versions of the present one are used up.
//! * `foresee`: which replicas a request will ask, so that memory can be fetched ahead.
//! * `scrub`: the turn of each region to be verified.
//! * `sync` and `plan`: making the replicas of one region equal, for attach, rebuild and repair alike.
//!
//! Bounds: `Limits::ops` operations, [`WINDOW`] pieces for each, a request per piece and replica, `Limits::sync` regions
//! being made equal with 1 MiB of private memory each, `Limits::edges` unaligned pieces. Tables grow to their bound
//! once and stay. What waits in the conflict queue is bounded by the pieces.
//!
//! Deliberately absent: clocks, threads, randomness, hashing with a random order, network, knowledge of local and remote.

mod chunks;
mod disks;
mod foresee;
mod locks;
mod ops;
mod plan;
mod propose;
mod renew;
mod scrub;
mod slab;
mod sync;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use crate::config::{Outcome, Proposal, VolumeConfig};
use crate::ids::{DiskUuid, Generation, Version};
use crate::memory::{Arena, Payload};
use crate::replica::{Header, Reply, Request};

use chunks::Chunk;
use disks::Disk;
use locks::Table;
use ops::{Op, Piece};
use slab::Slab;
use sync::Task;

/// Pieces of one operation that are under way at a time: enough for 1 MiB at any block offset.
pub const WINDOW: u32 = 17;

/// Names an operation to whoever submitted it: a dense index below [`Limits::ops`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u32);

/// A disk of this volume: index into the mirror's table, see [`Mirror::disk`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskIndex(pub u16);

/// Names a request to a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u32);

/// What a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpKind {
    /// Read whole blocks into the payload.
    Read,
    /// Write; the payload is private memory that covers all blocks touched.
    Write,
    /// Make a range read as zeros.
    Zero {
        /// The guest only hints (discard): a range that covers no whole block is dropped. Without it the range must be
        /// whole blocks; the driver writes zeros for the rest.
        unmap: bool,
    },
    /// Make everything acknowledged so far durable.
    Flush,
}

/// Why an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpError {
    /// No replica has a valid copy of a block of the range.
    Io,
    /// No replica has room.
    NoSpace,
    /// No replica could be reached, or no change committed, for [`Limits::io_timeout_ms`].
    TimedOut,
    /// This owner serves no longer: detached, fenced, or its replicas forgot acknowledged writes.
    Gone,
    /// Outside the volume, unaligned, too long, or an id in use.
    Invalid,
}

/// What the driver is to do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send a request to a disk, after all earlier ones to that disk; answer with [`Mirror::replied`].
    Send {
        /// To which disk.
        disk: DiskIndex,
        /// What to call the answer.
        id: RequestId,
        /// Goes with it.
        header: Header,
        /// The request.
        request: Request,
    },
    /// Fill with zeros: blocks of a read that hold no data.
    ZeroFill {
        /// Where.
        data: Payload,
        /// Bytes.
        len: u32,
    },
    /// Complete an unaligned write's private buffer with what its edge blocks hold, then call [`Mirror::merged`] with
    /// the same edges. May come once with both edges or once for each.
    Merge {
        /// The write.
        op: OpId,
        /// Content of the block the write begins in (and ends in, if it is the same one).
        head: Option<Payload>,
        /// Content of the block the write ends in.
        tail: Option<Payload>,
    },
    /// Answer the operation. Comes exactly once for each.
    Done {
        /// Which.
        op: OpId,
        /// How it ended.
        result: Result<(), OpError>,
        /// Its memory and its id are free again; else [`Effect::Release`] will say so.
        released: bool,
    },
    /// No request carries the memory of this operation any more.
    Release {
        /// Which.
        op: OpId,
    },
    /// Ask the control state; answer with [`Mirror::decided`].
    Propose(Proposal),
    /// I/O is being served.
    Attached {
        /// Some chunk has no replica left from the recorded spans of power: acknowledged, unflushed writes may be gone.
        /// Under a guest that was not restarted since, the driver fails the device.
        power_lost: bool,
    },
    /// A disk is silent: cut it off, then call [`Mirror::disk_down`] once it can touch no memory of ours.
    Abandon {
        /// Which.
        disk: DiskIndex,
    },
    /// A quarter of the versions of this generation are used: take the next one for this owner and say so with
    /// [`Mirror::renewed`]. Comes again from time to time until then.
    NewGeneration,
    /// Another owner has the volume. All operations have failed; no more I/O.
    Fenced,
    /// The last replicas of a chunk forgot acknowledged writes: all I/O fails until the volume is attached anew.
    Failed,
    /// Quiet and flushed: the answer to [`Mirror::detach`].
    Detached,
}

/// How much, how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Operations at a time; their ids are below it.
    pub ops: u32,
    /// Pieces of unaligned writes that read their edges at a time.
    pub edges: u16,
    /// Regions being made equal at a time, 1 to 64.
    pub sync: u16,
    /// An operation without progress for so long fails; zero: waits for ever.
    pub io_timeout_ms: u64,
    /// A disk that leaves requests unanswered for so long is lost.
    pub silent_ms: u64,
    /// At attach, how long to wait for replicas that others can replace.
    pub attach_wait_ms: u64,
    /// How long acknowledged writes may stay unflushed.
    pub unstable_ms: u64,
    /// How many acknowledged bytes may stay unflushed.
    pub unstable_bytes: u64,
    /// Every region is verified once in so long, see `scrub`; zero: none is.
    pub scrub_ms: u64,
    /// So many versions of a generation are used before the next one is asked for, and twice as many at most.
    pub versions: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            ops: 256,
            edges: 8,
            sync: 4,
            io_timeout_ms: 10_000,
            silent_ms: 3_000,
            attach_wait_ms: 2_000,
            unstable_ms: 1_000,
            unstable_bytes: 64 << 20,
            scrub_ms: 0,
            versions: 1 << (Version::COUNTER_BITS - 2),
        }
    }
}

/// Where the mirror is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not attached yet.
    New,
    /// Replicas are being sealed; operations wait.
    Attaching,
    /// Serving.
    Serving,
    /// Ending: no new operations.
    Draining,
    /// Ended.
    Detached,
    /// Another owner took over.
    Fenced,
    /// Acknowledged writes are gone.
    Failed,
}

/// What a person or a metric wants to know. Counters count since `new`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MirrorStatus {
    /// Life.
    pub phase: Phase,
    /// Replicas in sync and reachable.
    pub in_sync: u32,
    /// Replicas in sync as committed, but lost.
    pub lost: u32,
    /// Stale replicas.
    pub stale: u32,
    /// Rebuilding replicas.
    pub rebuilding: u32,
    /// Chunks without a reachable in-sync replica, or not ready.
    pub unavailable: u32,
    /// Some chunk has fewer in-sync replicas than slots.
    pub degraded: bool,
    /// Regions to be compared before their first I/O.
    pub regions_unsettled: u64,
    /// Regions of rebuilding replicas still to copy.
    pub regions_to_rebuild: u64,
    /// Bytes sent to replicas to make them equal.
    pub bytes_synced: u64,
    /// Blocks found bad by reads and answered from elsewhere.
    pub read_repairs: u64,
    /// Regions that were read and compared on all replicas, because it was their turn or a read had found a bad block.
    pub regions_verified: u64,
    /// Blocks of in-sync replicas that were found bad or different, and written anew.
    pub blocks_repaired: u64,
    /// Generations that were taken under a running guest.
    pub renewals: u64,
    /// Blocks whose content was adopted after all replicas lost power (one content for all, reported).
    pub blocks_adopted: u64,
    /// Blocks recorded lost.
    pub blocks_lost: u64,
    /// Address in the volume (chunk, block in chunk) of the last block adopted or lost.
    pub last_damaged: Option<(u32, u32)>,
    /// Operations failed for want of a valid copy.
    pub errors_io: u64,
    /// Operations failed for want of room.
    pub errors_no_space: u64,
    /// Operations failed by time.
    pub errors_timeout: u64,
    /// Answers that belong to no request, or do not fit it.
    pub answers_odd: u64,
    /// Everything up to here is flushed on all in-sync replicas.
    pub stable: Version,
    /// Operations under way.
    pub ops: u32,
}

/// One volume's replication. See the module.
#[derive(Debug)]
pub struct Mirror {
    config: VolumeConfig,
    limits: Limits,
    phase: Phase,
    now: u64,
    started: u64,
    disks: Vec<Disk>,
    chunks: Vec<Chunk>,
    ops: Vec<Op>,
    ops_live: u32,
    pieces: Slab<Piece>,
    requests: Slab<disks::Pending>,
    table: Table,
    runnable: VecDeque<u32>,
    // Writes under way in order of version.
    oldest: u32,
    newest: u32,
    counter: u64,
    // A new generation, see `renew`: the one that replicas obey, requests that wait for it.
    generation: Generation,
    asked_generation: bool,
    quiescing: bool,
    held: VecDeque<(RequestId, Request)>,
    /// Reads need no confirmation.
    leased: bool,
    confirms: u32,
    // Flushing: `seq` counts answers to writes, see `disks`.
    seq: u64,
    stable: Version,
    candidate: Option<(u64, Version)>,
    unstable: u64,
    unstable_since: Option<u64>,
    flush_ops: VecDeque<(u32, u64)>,
    flush_wait: VecDeque<u32>,
    // Unaligned writes.
    edges: Option<Arena>,
    edges_free: Vec<u16>,
    edges_wait: VecDeque<u32>,
    // Making equal.
    tasks: Vec<Task>,
    buffer: Option<Arena>,
    first: VecDeque<(u32, u8)>,
    work: VecDeque<u32>,
    /// The region whose turn it is next, and since when it is due.
    scrub_next: u64,
    scrub_at: u64,
    // Control.
    proposed: Option<Proposal>,
    wish: bool,
    look: bool,
    retry_at: u64,
    power_lost: bool,
    creating: u32,
    tasks_due: bool,
    /// Chunks that are not ready, regions that are unsettled: while there are any, `stable` stays.
    all_ready: bool,
    unsettled: u64,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    bytes_synced: u64,
    read_repairs: u64,
    verified: u64,
    repaired: u64,
    renewals: u64,
    adopted: u64,
    lost: u64,
    last_damaged: Option<(u32, u32)>,
    io: u64,
    no_space: u64,
    timeout: u64,
    odd: u64,
}

impl Mirror {
    /// A mirror for the volume as committed. Nothing happens before [`Mirror::attach`].
    pub fn new(config: VolumeConfig, limits: Limits) -> Self {
        let limits = Limits {
            sync: limits.sync.clamp(1, 64),
            edges: limits.edges.max(1),
            ..limits
        };
        let mut mirror = Mirror {
            config: VolumeConfig {
                chunks: Vec::new(),
                ..config.clone()
            },
            limits,
            phase: Phase::New,
            now: 0,
            started: 0,
            disks: Vec::new(),
            chunks: Vec::new(),
            ops: (0..limits.ops).map(|_| Op::default()).collect(),
            ops_live: 0,
            pieces: Slab::default(),
            requests: Slab::default(),
            table: Table::default(),
            runnable: VecDeque::new(),
            oldest: slab::NIL,
            newest: slab::NIL,
            counter: 0,
            generation: config.generation,
            asked_generation: false,
            quiescing: false,
            held: VecDeque::new(),
            leased: true,
            confirms: 0,
            seq: 0,
            stable: Version::ZERO,
            candidate: None,
            unstable: 0,
            unstable_since: None,
            flush_ops: VecDeque::new(),
            flush_wait: VecDeque::new(),
            edges: None,
            edges_free: Vec::new(),
            edges_wait: VecDeque::new(),
            tasks: (0..limits.sync).map(|_| Task::default()).collect(),
            buffer: None,
            first: VecDeque::new(),
            work: VecDeque::new(),
            scrub_next: 0,
            scrub_at: 0,
            proposed: None,
            wish: false,
            look: false,
            retry_at: 0,
            power_lost: false,
            creating: 0,
            tasks_due: false,
            all_ready: false,
            unsettled: 0,
            counts: Counts::default(),
        };
        mirror.take_config(config, &mut Vec::new());
        mirror
    }

    /// The configuration it follows.
    pub fn config(&self) -> &VolumeConfig {
        &self.config
    }

    /// Where it is in its life.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// No operation is in hand and no request is out: nobody uses memory of it or of its operations, and no answer to it
    /// is on its way.
    pub fn is_quiet(&self) -> bool {
        self.ops_live == 0 && self.requests.live() == 0
    }

    /// The uuid of a disk of the table. The table only grows; [`Mirror::disks`] tells how far.
    pub fn disk(&self, index: DiskIndex) -> DiskUuid {
        self.disks[usize::from(index.0)].uuid
    }

    /// The disks of the table, in order of their index.
    pub fn disks(&self) -> impl Iterator<Item = DiskUuid> {
        self.disks.iter().map(|disk| disk.uuid)
    }

    /// Begins: seals every replica, compares what may differ, then serves. Operations may be submitted at once.
    pub fn attach(&mut self, out: &mut Vec<Effect>) {
        assert_eq!(self.phase, Phase::New, "a mirror is attached once");
        self.phase = Phase::Attaching;
        self.started = self.now;
        for d in 0..self.disks.len() {
            self.seal(d, out);
        }
        self.look = true;
        self.pump(out);
    }

    /// The outcome of the proposal that is out.
    pub fn decided(&mut self, outcome: Outcome, out: &mut Vec<Effect>) {
        self.outcome(outcome, out);
        self.pump(out);
    }

    /// The control state changed by another's hand: resize, a slot on another disk, more or fewer copies.
    ///
    /// A configuration older than the one followed is ignored.
    pub fn reconfigured(&mut self, config: VolumeConfig, out: &mut Vec<Effect>) {
        if config.generation != self.config.generation {
            if config.generation > self.config.generation {
                self.end(Phase::Fenced, out);
            }
            return;
        }
        if config.config > self.config.config {
            self.take_config(config, out);
            self.pump(out);
        }
    }

    /// The answer to a request. Answers to requests that are unknown (any more) are counted and ignored.
    pub fn replied(&mut self, id: RequestId, reply: Reply, out: &mut Vec<Effect>) {
        self.answer(id, reply, out);
        self.pump(out);
    }

    /// Milliseconds of the caller's clock; to be called about every 100 ms, more often does no harm.
    pub fn tick(&mut self, now_ms: u64, out: &mut Vec<Effect>) {
        if now_ms.saturating_sub(self.now) > self.limits.silent_ms / 2 {
            self.stood_still(now_ms);
        }
        self.now = self.now.max(now_ms);
        self.watch_disks(out);
        self.watch_flush(out);
        self.watch_ops(out);
        if self.now >= self.retry_at {
            self.retry_at = self.now + 1_000;
            self.retry();
            self.asked_generation = false;
            self.watch_versions(out);
        }
        self.scrub();
        self.look |= self.phase == Phase::Attaching;
        self.wish = true;
        self.pump(out);
    }

    /// Ends: waits for operations under way, flushes, then [`Effect::Detached`].
    pub fn detach(&mut self, out: &mut Vec<Effect>) {
        match self.phase {
            Phase::New => {
                self.phase = Phase::Detached;
                out.push(Effect::Detached);
            }
            Phase::Attaching | Phase::Serving => {
                let attached = self.phase == Phase::Serving;
                self.phase = Phase::Draining;
                self.stop_renewing();
                for op in 0..self.limits.ops {
                    if !attached {
                        self.cancel(op, OpError::Gone, out);
                    }
                }
                self.begin_round(out);
                self.pump(out);
            }
            Phase::Draining | Phase::Detached | Phase::Fenced | Phase::Failed => {}
        }
    }

    /// Does what became possible, until nothing is.
    fn pump(&mut self, out: &mut Vec<Effect>) {
        loop {
            while let Some(p) = self.runnable.pop_front() {
                self.run(p, out);
            }
            if self.look {
                self.look = false;
                self.look_at_chunks(out);
                continue;
            }
            if self.sync_idle_work() {
                self.start_tasks(out);
            }
            if self.wish {
                self.wish = false;
                self.propose(out);
            }
            if self.quiescing {
                self.switch_generation(out);
            } else if !self.held.is_empty() {
                self.let_through(out);
            }
            if self.runnable.is_empty() && !self.look {
                break;
            }
        }
        if self.phase == Phase::Draining {
            self.drain(out);
        }
    }

    fn drain(&mut self, out: &mut Vec<Effect>) {
        if self.ops_live > 0 || self.tasks.iter().any(Task::busy) || self.proposed.is_some() {
            return;
        }
        let waiting = self
            .disks
            .iter()
            .any(|d| d.counted > 0 && d.last_write > d.flushed_to);
        if waiting {
            // Only a reachable disk can still be flushed; the others are proposed stale by the next owner.
            let mut sent = false;
            for d in 0..self.disks.len() {
                if self.disks[d].sealed {
                    sent |= self.flush_disk(d, out);
                }
            }
            if sent {
                return;
            }
        }
        if self.requests.live() == 0 && !self.tell_stable(out) {
            self.phase = Phase::Detached;
            out.push(Effect::Detached);
        }
    }

    /// Ends at once: every operation fails.
    fn end(&mut self, phase: Phase, out: &mut Vec<Effect>) {
        if matches!(self.phase, Phase::Fenced | Phase::Failed | Phase::Detached) {
            return;
        }
        self.phase = phase;
        out.push(if phase == Phase::Fenced {
            Effect::Fenced
        } else {
            Effect::Failed
        });
        for op in 0..self.limits.ops {
            self.cancel(op, OpError::Gone, out);
        }
        self.quiescing = false;
        self.drop_held(None, out);
        self.pump(out);
    }

    fn header(&self) -> Header {
        Header {
            volume: self.config.id,
            generation: self.generation,
            stable: self.stable,
        }
    }

    fn next_version(&mut self, out: &mut Vec<Effect>) -> Version {
        self.counter += 1;
        self.watch_versions(out);
        Version::new(self.generation, self.counter)
    }

    /// A summary of the present state. Walks all chunks: not for the hot path.
    pub fn status(&self) -> MirrorStatus {
        let mut status = MirrorStatus {
            phase: self.phase,
            in_sync: 0,
            lost: 0,
            stale: 0,
            rebuilding: 0,
            unavailable: 0,
            degraded: false,
            regions_unsettled: 0,
            regions_to_rebuild: 0,
            bytes_synced: self.counts.bytes_synced,
            read_repairs: self.counts.read_repairs,
            regions_verified: self.counts.verified,
            blocks_repaired: self.counts.repaired,
            renewals: self.counts.renewals,
            blocks_adopted: self.counts.adopted,
            blocks_lost: self.counts.lost,
            last_damaged: self.counts.last_damaged,
            errors_io: self.counts.io,
            errors_no_space: self.counts.no_space,
            errors_timeout: self.counts.timeout,
            answers_odd: self.counts.odd,
            stable: self.stable,
            ops: self.ops_live,
        };
        for chunk in &self.chunks {
            chunk.count(&mut status);
        }
        status
    }
}
