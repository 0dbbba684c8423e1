//! What a guest asks for: operations, their pieces, the pieces' way to the replicas and back.
//!
//! A piece lies in one extent. It takes its blocks (`locks`), goes to the replicas, and ends when every required replica
//! has answered. What is required is looked up again whenever something changed, so that a replica that is lost holds
//! the piece up until the control state has dropped it, and not a moment less.
//!
//! A piece that has ended may still have requests out, to a lost disk: its operation is answered, its memory is not free.
//! A read is not answered before: it may be the guest's memory that is still being written.

use crate::geometry::Piece as Place;
use crate::ids::{BLOCK, BlockMask, EXTENTS_PER_REGION, Version, block_mask};
use crate::memory::{Arena, Payload};
use crate::planted::{self, Bug};
use crate::replica::{Crcs, Reply, Request, Span, Status};

use super::chunks::Lost;
use super::disks::{Pending, Purpose};
use super::slab::NIL;
use super::{Effect, Mirror, OpError, OpId, OpKind, Phase, WINDOW};

/// Most bytes of a read or write.
pub(super) const LEN_MAX: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum PieceKind {
    #[default]
    Read,
    Write,
    Zero,
}

/// Where a piece is on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Stage {
    /// In its extent's queue.
    #[default]
    Waiting,
    /// Holds its blocks, runs next.
    Ready,
    /// Waits for memory for its edges.
    EdgeWait,
    /// Edges are being read.
    EdgeRead,
    /// The driver merges.
    Merging,
    /// At the replicas.
    Sent,
    /// Read, and without a lease: every required replica is asked whether this owner is still the owner.
    Confirming,
    /// Written everywhere, the last replica is being flushed.
    Flushing,
    /// Ended, but requests are still out.
    Ended,
}

/// How many requests a disk of this node may have out before one of another node is read instead. The way there costs both
/// nodes more than the disk's own work, and a disk does some tens of requests at a time anyway.
pub(super) const FAR: u32 = 32;

/// Edges of an unaligned write.
const HEAD: u8 = 1;
const TAIL: u8 = 2;

#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) op: u32,
    pub(super) chunk: u32,
    pub(super) extent: u16,
    pub(super) first: u8,
    pub(super) count: u8,
    pub(super) kind: PieceKind,
    pub(super) stage: Stage,
    /// Slots whose answer is required and missing.
    pub(super) need: u8,
    /// Slots with a request out.
    pub(super) sent: u8,
    acked: u8,
    no_space: u8,
    /// Requests out, to present and to former slots.
    pub(super) out: u8,
    /// Slots a read was tried at.
    tried: u8,
    bad: BlockMask,
    lost: BlockMask,
    /// Goes back to the queue once nothing is out.
    pub(super) again: bool,
    pub(super) version: Version,
    /// The first version it was sent with: as long as it is under way some replica may have that one alone.
    pub(super) since: Version,
    crcs: Crcs,
    /// Bytes of the operation's payload before this piece.
    skip: u32,
    /// Flush of `flush_disk` that must end first.
    pub(super) want: u64,
    pub(super) flush_disk: u16,
    edges: u8,
    edges_left: u8,
    edge_slot: u16,
    /// Names the confirmation that is under way, so that answers to others are recognised.
    turn: u32,
    pub(super) next: u32,
    older: u32,
    newer: u32,
}

impl Piece {
    /// A write that covers a block in part.
    pub(super) fn has_edges(&self) -> bool {
        self.edges != 0
    }
}

impl Default for Piece {
    fn default() -> Self {
        Piece {
            op: 0,
            chunk: 0,
            extent: 0,
            first: 0,
            count: 1,
            kind: PieceKind::Read,
            stage: Stage::Waiting,
            need: 0,
            sent: 0,
            acked: 0,
            no_space: 0,
            out: 0,
            tried: 0,
            bad: 0,
            lost: 0,
            again: false,
            version: Version::ZERO,
            since: Version::ZERO,
            crcs: [0; 16],
            skip: 0,
            want: 0,
            flush_disk: 0,
            edges: 0,
            edges_left: 0,
            edge_slot: u16::MAX,
            turn: 0,
            next: NIL,
            older: NIL,
            newer: NIL,
        }
    }
}

/// An operation. `live` until it is answered and its memory free.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    pub(super) live: bool,
    answered: bool,
    kind: OpKind,
    data: Payload,
    /// Blocks of the volume still to be cut into pieces.
    next: u64,
    end: u64,
    head: bool,
    tail: bool,
    result: Option<OpError>,
    /// Pieces under way, and pieces that ended with requests out.
    left: u32,
    held: u32,
    /// When something last went forward.
    pub(super) progress: u64,
}

impl Default for Op {
    fn default() -> Self {
        Op {
            live: false,
            answered: false,
            kind: OpKind::Flush,
            data: Payload::NONE,
            next: 0,
            end: 0,
            head: false,
            tail: false,
            result: None,
            left: 0,
            held: 0,
            progress: 0,
        }
    }
}

impl Mirror {
    /// Begins an operation on bytes `offset..offset + len` of the volume.
    ///
    /// Reads and writes are at most 1 MiB. Reads are whole blocks. For a write, `data` is private memory that covers all
    /// blocks touched, guest bytes in place, and `crcs` has one checksum for each (those of unaligned edge blocks are not
    /// looked at). What breaks these rules is answered with [`OpError::Invalid`]; an id in use is a caller's bug.
    #[allow(clippy::too_many_arguments)]
    pub fn submit(
        &mut self,
        id: OpId,
        kind: OpKind,
        offset: u64,
        len: u64,
        data: Payload,
        crcs: &[u32],
        out: &mut Vec<Effect>,
    ) {
        let op = id.0;
        assert!(
            op < self.limits.ops && !self.ops[op as usize].live,
            "operation ids are dense and unique"
        );
        let block = BLOCK as u64;
        let (aligned, end) = (
            offset.is_multiple_of(block) && len.is_multiple_of(block),
            offset.saturating_add(len),
        );
        let valid = match kind {
            OpKind::Read => aligned && len <= LEN_MAX,
            OpKind::Write => {
                offset.is_multiple_of(512)
                    && len.is_multiple_of(512)
                    && len <= LEN_MAX
                    && crcs.len() as u64 >= end.div_ceil(block) - offset / block
            }
            OpKind::Zero { unmap } => unmap || aligned,
            OpKind::Flush => true,
        };
        if !valid || kind != OpKind::Flush && end > self.config.size {
            return done(id, Err(OpError::Invalid), out);
        }
        if !matches!(self.phase, Phase::New | Phase::Attaching | Phase::Serving) {
            return done(id, Err(OpError::Gone), out);
        }
        let (first, last) = match kind {
            OpKind::Zero { .. } => (offset.div_ceil(block), end / block),
            _ => (offset / block, end.div_ceil(block)),
        };
        if kind != OpKind::Flush && first >= last {
            return done(id, Ok(()), out);
        }
        self.ops_live += 1;
        self.ops[op as usize] = Op {
            live: true,
            kind,
            data,
            next: first,
            end: last,
            head: kind == OpKind::Write && !offset.is_multiple_of(block),
            tail: kind == OpKind::Write && !end.is_multiple_of(block),
            progress: self.now,
            ..Op::default()
        };
        if kind == OpKind::Flush {
            self.ops[op as usize].left = 1;
            self.submit_flush(op, out);
        } else {
            self.feed(op, crcs);
        }
        self.pump(out);
    }

    /// Cuts the operation into pieces, as many as may be under way.
    fn feed(&mut self, id: u32, crcs: &[u32]) {
        let first = self.ops[id as usize].next;
        while self.ops[id as usize].left < WINDOW {
            let op = &mut self.ops[id as usize];
            if op.next >= op.end || op.result.is_some() {
                op.next = op.end;
                return;
            }
            let place: Place = self.config.geometry.piece(op.next, op.end - op.next);
            let from = (op.next - first) as usize;
            let begins = op.next == first;
            op.next += u64::from(place.count);
            op.left += 1;
            let ends = op.next == op.end;
            // One unaligned block is its own head and tail: the driver completes both sides from the head.
            let single = begins && ends && place.count == 1;
            let mut edges = 0;
            if op.kind == OpKind::Write {
                edges |= if begins && (op.head || single && op.tail) {
                    HEAD
                } else {
                    0
                };
                edges |= if ends && op.tail && !single { TAIL } else { 0 };
            }
            let kind = match op.kind {
                OpKind::Read => PieceKind::Read,
                OpKind::Write => PieceKind::Write,
                OpKind::Zero { .. } | OpKind::Flush => PieceKind::Zero,
            };
            let p = self.pieces.take();
            let piece = &mut self.pieces[p];
            *piece = Piece {
                op: id,
                chunk: place.chunk,
                extent: place.extent,
                first: place.first,
                count: place.count,
                kind,
                skip: (from * BLOCK) as u32,
                edges,
                bad: block_mask(place.first, place.count),
                ..Piece::default()
            };
            if kind == PieceKind::Write {
                let (at, n) = (usize::from(place.first), usize::from(place.count));
                piece.crcs[at..at + n].copy_from_slice(&crcs[from..from + n]);
            }
            self.enter(p);
        }
    }

    /// A piece holds its blocks: send it on its way.
    pub(super) fn run(&mut self, p: u32, out: &mut Vec<Effect>) {
        if self.pieces[p].stage != Stage::Ready {
            return;
        }
        if matches!(self.phase, Phase::Fenced | Phase::Failed) {
            return self.finish(p, Some(OpError::Gone), out);
        }
        let (c, region) = self.place(p);
        if !self.chunks[c as usize].ready {
            // Its replicas were lost and came back between its turn in the queue and now.
            self.step_back(p);
            return self.look_region(c, region);
        }
        let piece = &mut self.pieces[p];
        match piece.kind {
            PieceKind::Read => {
                piece.stage = Stage::Sent;
                self.send_read(p, out);
            }
            PieceKind::Write if piece.edges != 0 => self.read_edges(p, out),
            PieceKind::Write | PieceKind::Zero => {
                piece.stage = Stage::Sent;
                self.send_write(p, out);
            }
        }
    }

    fn span(&self, p: u32, slot: u8) -> Span {
        let piece = &self.pieces[p];
        Span {
            chunk: self.chunk_ref(piece.chunk, slot),
            extent: piece.extent,
            first: piece.first,
            count: piece.count,
        }
    }

    fn piece_data(&self, p: u32) -> Payload {
        let piece = &self.pieces[p];
        self.ops[piece.op as usize].data.advance(piece.skip as usize)
    }

    // ---- writes ----------------------------------------------------------------------------------------------------

    fn send_write(&mut self, p: u32, out: &mut Vec<Effect>) {
        let (chunk, region) = self.place(p);
        let (need, send) = self.chunks[chunk as usize].targets(region);
        self.pieces[p].need = need;
        self.send_to(p, send, out);
        if send == 0 {
            self.settle(p, out);
        }
    }

    pub(super) fn place(&self, p: u32) -> (u32, u8) {
        let piece = &self.pieces[p];
        (
            piece.chunk,
            (usize::from(piece.extent) / EXTENTS_PER_REGION) as u8,
        )
    }

    fn send_to(&mut self, p: u32, slots: u8, out: &mut Vec<Effect>) {
        if slots == 0 {
            return;
        }
        if self.pieces[p].version == Version::ZERO {
            self.pieces[p].version = self.next_version(out);
            self.list(p);
        }
        let data = self.piece_data(p);
        let mut left = slots;
        while left != 0 {
            let slot = left.trailing_zeros() as u8;
            left &= left - 1;
            let span = self.span(p, slot);
            let piece = &mut self.pieces[p];
            piece.sent |= 1 << slot;
            piece.out += 1;
            let request = if piece.kind == PieceKind::Zero {
                Request::Zero {
                    span,
                    version: piece.version,
                }
            } else {
                Request::Write {
                    span,
                    version: piece.version,
                    crcs: piece.crcs,
                    data,
                }
            };
            let chunk = piece.chunk;
            self.send_slot(chunk, slot, Purpose::Piece { piece: p, slot }, request, out);
        }
    }

    /// Decides what becomes of a write whose answers or whose replicas changed.
    pub(super) fn settle(&mut self, p: u32, out: &mut Vec<Effect>) {
        if self.pieces[p].stage != Stage::Sent || self.pieces[p].kind == PieceKind::Read {
            return;
        }
        let (c, region) = self.place(p);
        let (required, _) = self.chunks[c as usize].targets(region);
        let chunk = &self.chunks[c as usize];
        let (lost, in_sync, pending) = (chunk.lost, chunk.in_sync, chunk.pending);
        let piece = &mut self.pieces[p];
        piece.need &= required;
        if planted::on(Bug::AckAtFirst) && piece.acked & in_sync != 0 {
            piece.need = 0;
        }
        if planted::on(Bug::AckBeforeCommit) && piece.acked != 0 {
            piece.need &= !lost;
        }
        if piece.need == 0 && required != 0 {
            return self.written(p, out);
        }
        if piece.sent & !lost != 0 {
            return;
        }
        if piece.again {
            // Only to lost disks is anything out; the piece is done over once its chunk is ready again. Some may have it, and
            // it may end undone.
            (piece.again, piece.need, piece.acked, piece.no_space) = (false, 0, 0, 0);
            if piece.since != Version::ZERO {
                self.unsettle(c, region);
            }
            self.unlist(p);
            self.step_back(p);
            self.look_region(c, region);
            return;
        }
        let refused = piece.no_space & piece.need;
        if refused != 0 && piece.need & !refused & lost == 0 {
            // A replica whose promotion is undecided counts as in sync: it may be already.
            let have = piece.acked & (in_sync | pending);
            if have != 0 {
                // Who has no room is given up for one that has the write and is in sync. While that one is lost or
                // undecided, the control state may yet drop it instead.
                let (holds, fulls) = (have & in_sync & !lost, refused & !lost);
                if holds != 0 && fulls != 0 {
                    self.lose_slots(c, fulls, Lost::NoSpace);
                }
                return;
            }
            if piece.need == refused {
                // Nobody who counts has room, and nobody who counts was changed. What a rebuilding replica took is
                // copied again.
                let acked = piece.acked;
                if acked != 0 {
                    self.chunks[c as usize].unclean(acked, region);
                    self.queue_work(c);
                    self.look_region(c, region);
                    self.wish = true;
                }
                return self.finish(p, Some(OpError::NoSpace), out);
            }
        }
        let missing = piece.need & !lost & !piece.no_space;
        if missing != 0 {
            // A replica is back: all get the write anew. Under its old version it could follow a newer write to other
            // blocks of the extent, and the versions of the replicas would part.
            // Its place among those under way it keeps: what has only its old version must stay dirty.
            (piece.acked, piece.no_space, piece.version) = (0, 0, Version::ZERO);
            self.send_write(p, out);
        }
    }

    fn written(&mut self, p: u32, out: &mut Vec<Effect>) {
        let c = self.pieces[p].chunk;
        if let Some(slot) = self.chunks[c as usize].sole()
            && !planted::on(Bug::SoleCopyUnflushed)
        {
            let disk = self.chunks[c as usize].slots[usize::from(slot)].disk;
            let want = self.seq;
            // It may have been flushed while the write waited for a replica that is gone now.
            if !self.is_flushed(usize::from(disk), want) {
                let piece = &mut self.pieces[p];
                (piece.stage, piece.want, piece.flush_disk) = (Stage::Flushing, want, disk);
                self.flush_wait.push_back(p);
                self.flush_disk(usize::from(disk), out);
                return;
            }
        }
        self.finish(p, None, out);
    }

    /// The only replica of a write that waits for its flush was lost: it is written again.
    pub(super) fn unwritten(&mut self, p: u32) {
        let (c, region) = self.place(p);
        let (need, _) = self.chunks[c as usize].targets(region);
        let piece = &mut self.pieces[p];
        (piece.stage, piece.need, piece.acked) = (Stage::Sent, need, 0);
    }

    // ---- reads -----------------------------------------------------------------------------------------------------

    fn send_read(&mut self, p: u32, out: &mut Vec<Effect>) {
        if self.pieces[p].out > 0 {
            return;
        }
        let (c, tried) = (self.pieces[p].chunk, self.pieces[p].tried);
        let mut candidates = self.chunks[c as usize].readable() & !tried;
        if planted::on(Bug::ReadFromStale) {
            candidates |= self.chunks[c as usize].reachable & !tried;
        }
        let Some(slot) = self.least_loaded(c, candidates) else {
            if self.chunks[c as usize].all_asked(tried) {
                self.finish(p, Some(OpError::Io), out);
            }
            // Else it waits for a replica, or for the operation's time to run out.
            return;
        };
        // Only blocks that are still missing: a store reads straight into this memory, also where its bytes turn out bad.
        let run = self.missing_run(p);
        let whole = self.span(p, slot);
        let first = run.trailing_zeros() as u8;
        let span = Span {
            first,
            count: run.count_ones() as u8,
            ..whole
        };
        let data = self
            .piece_data(p)
            .advance(usize::from(first - whole.first) * BLOCK);
        let piece = &mut self.pieces[p];
        piece.sent = 1 << slot;
        piece.out = 1;
        piece.tried |= 1 << slot;
        let request = Request::Read {
            span,
            raw: planted::on(Bug::AnswerBadBlock),
            data,
        };
        self.send_slot(c, slot, Purpose::Piece { piece: p, slot }, request, out);
    }

    /// The replica to read from.
    fn least_loaded(&self, c: u32, mut candidates: u8) -> Option<u8> {
        let mut best: Option<(u32, u8)> = None;
        while candidates != 0 {
            let slot = candidates.trailing_zeros() as u8;
            candidates &= candidates - 1;
            let disk = &self.disks[usize::from(self.chunks[c as usize].slots[usize::from(slot)].disk)];
            let load = disk.out + if disk.near { 0 } else { FAR };
            if best.is_none_or(|(least, _)| load < least) {
                best = Some((load, slot));
            }
        }
        best.map(|(_, slot)| slot)
    }

    fn read_reply(&mut self, p: u32, masks: (BlockMask, BlockMask, BlockMask), out: &mut Vec<Effect>) {
        let (holes, bad, lost) = masks;
        let asked = self.missing_run(p);
        let piece = &mut self.pieces[p];
        let bad = if planted::on(Bug::AnswerBadBlock) { 0 } else { bad };
        let holes = holes & asked;
        piece.bad &= !asked | bad & !lost;
        piece.lost |= asked & bad & lost;
        if piece.bad & asked == 0 {
            // Further runs begin with all replicas.
            piece.tried = 0;
        }
        let (bad, lost, c) = (piece.bad, piece.lost, piece.chunk);
        if holes != 0 {
            self.zero_runs(p, holes, out);
        }
        if bad != 0 {
            if !planted::on(Bug::SkipReadRepair) {
                self.check_region(p);
            }
            self.counts.read_repairs += u64::from(bad.count_ones());
            return self.send_read(p, out);
        }
        if lost != 0 {
            return self.finish(p, Some(OpError::Io), out);
        }
        if self.leased || planted::on(Bug::ReadUnconfirmed) {
            return self.finish(p, None, out);
        }
        // Another owner may have sealed a replica before this one answered. Whoever writes as a later owner has sealed a
        // replica that is required here, so asking all of them after the read tells.
        let chunk = &self.chunks[c as usize];
        let required = chunk.in_sync | chunk.pending;
        self.confirms = self.confirms.wrapping_add(1);
        let piece = &mut self.pieces[p];
        (piece.stage, piece.need, piece.turn) = (Stage::Confirming, required, self.confirms);
        self.confirm(p, out);
    }

    /// Asks the replicas that have not confirmed yet.
    fn confirm(&mut self, p: u32, out: &mut Vec<Effect>) {
        let c = self.pieces[p].chunk;
        let chunk = &self.chunks[c as usize];
        let (required, lost) = (chunk.in_sync | chunk.pending, chunk.lost);
        let piece = &mut self.pieces[p];
        piece.need &= required;
        if piece.need == 0 {
            return self.finish(p, None, out);
        }
        let turn = piece.turn;
        let mut ask = piece.need & !lost & !piece.sent;
        while ask != 0 {
            let slot = ask.trailing_zeros() as u8;
            ask &= ask - 1;
            self.pieces[p].sent |= 1 << slot;
            let purpose = Purpose::Confirm { piece: p, slot, turn };
            self.send_slot(c, slot, purpose, Request::Confirm, out);
        }
    }

    /// The answer to a [`Request::Confirm`]. It carried no memory, so nobody had to wait for it: the piece may have ended.
    pub(super) fn confirmed(&mut self, pending: Pending, reply: Option<Reply>, out: &mut Vec<Effect>) {
        let Purpose::Confirm { piece: p, slot, turn } = pending.purpose else {
            return;
        };
        let piece = &self.pieces[p];
        if !self.pieces.is_used(p) || piece.stage != Stage::Confirming || piece.turn != turn {
            return;
        }
        let c = piece.chunk;
        let (chunk, bit) = (&self.chunks[c as usize], 1 << slot);
        let present = chunk.slots[usize::from(slot)].incarnation == pending.incarnation;
        let good = present && chunk.lost & bit == 0 && reply == Some(Reply::Done);
        self.pieces[p].sent &= !bit;
        if good {
            self.pieces[p].need &= !bit;
        } else if let Some(Reply::Refused(status)) = reply {
            self.slot_refused(c, slot, pending.incarnation, status, out);
        }
        self.look_at_piece(p, out);
    }

    /// The control state has confirmed, or can no longer confirm for sure, that this owner is the owner: whether reads may
    /// be answered by one replica. An owner begins with a lease.
    pub fn set_leased(&mut self, leased: bool, out: &mut Vec<Effect>) {
        self.leased = leased;
        if leased {
            for p in 0..self.pieces.len() {
                let piece = &self.pieces[p];
                if self.pieces.is_used(p) && piece.stage == Stage::Confirming && !piece.again {
                    // What it still asks is asked in vain.
                    self.finish(p, None, out);
                }
            }
        }
        self.pump(out);
    }

    /// The first run of blocks that a read is still missing.
    fn missing_run(&self, p: u32) -> BlockMask {
        let bad = self.pieces[p].bad;
        let first = bad.trailing_zeros();
        let count = (!(bad >> first)).trailing_zeros();
        block_mask(first as u8, count as u8)
    }

    fn check_region(&mut self, p: u32) {
        let (c, region) = self.place(p);
        self.chunks[c as usize].check |= 1 << region;
        self.queue_work(c);
    }

    fn zero_runs(&mut self, p: u32, mut holes: BlockMask, out: &mut Vec<Effect>) {
        let first = self.pieces[p].first;
        let data = self.piece_data(p);
        while holes != 0 {
            let from = holes.trailing_zeros();
            let run = (!(holes >> from)).trailing_zeros();
            out.push(Effect::ZeroFill {
                data: data.advance((from as usize - usize::from(first)) * BLOCK),
                len: run * BLOCK as u32,
            });
            holes &= !block_mask(from as u8, run as u8);
        }
    }

    /// Something about the chunk's replicas changed: look at a piece that is under way again.
    pub(super) fn look_at_piece(&mut self, p: u32, out: &mut Vec<Effect>) {
        match (self.pieces[p].kind, self.pieces[p].stage) {
            (_, Stage::Confirming) if !self.pieces[p].again => self.confirm(p, out),
            (_, Stage::Confirming) => {
                // What was read may be made equal to something else now: all of it is read again.
                let piece = &mut self.pieces[p];
                (piece.again, piece.tried) = (false, 0);
                piece.bad = block_mask(piece.first, piece.count);
                self.step_back(p);
                let (c, region) = self.place(p);
                self.look_region(c, region);
            }
            (PieceKind::Read, Stage::Sent) if self.pieces[p].out == 0 => {
                if self.pieces[p].again {
                    self.pieces[p].again = false;
                    self.pieces[p].tried = 0;
                    self.step_back(p);
                    let (c, region) = self.place(p);
                    self.look_region(c, region);
                } else {
                    self.send_read(p, out);
                }
            }
            (_, Stage::Sent) => self.settle(p, out),
            (_, Stage::EdgeRead) if self.pieces[p].out == 0 => {
                if self.pieces[p].again {
                    self.pieces[p].again = false;
                    self.give_edges(p, out);
                    self.step_back(p);
                    let (c, region) = self.place(p);
                    self.look_region(c, region);
                } else {
                    self.send_edges(p, out);
                }
            }
            (_, Stage::EdgeWait) if self.pieces[p].again => {
                self.pieces[p].again = false;
                self.edges_wait.retain(|&q| q != p);
                self.step_back(p);
                let (c, region) = self.place(p);
                self.look_region(c, region);
            }
            // The driver has it: `merged` looks whether the chunk is ready.
            (_, Stage::Merging) => self.pieces[p].again = false,
            _ => {}
        }
    }

    // ---- unaligned edges -------------------------------------------------------------------------------------------

    fn read_edges(&mut self, p: u32, out: &mut Vec<Effect>) {
        if self.edges.is_none() {
            match Arena::new(2 * usize::from(self.limits.edges)) {
                Ok(arena) => {
                    self.edges = Some(arena);
                    self.edges_free = (0..self.limits.edges).rev().collect();
                }
                Err(_) => return self.finish(p, Some(OpError::Io), out),
            }
        }
        let Some(slot) = self.edges_free.pop() else {
            self.pieces[p].stage = Stage::EdgeWait;
            self.edges_wait.push_back(p);
            return;
        };
        let piece = &mut self.pieces[p];
        (piece.edge_slot, piece.edges_left, piece.stage, piece.tried) =
            (slot, piece.edges, Stage::EdgeRead, 0);
        self.send_edges(p, out);
    }

    fn edge_page(&self, p: u32, edge: u8) -> usize {
        usize::from(self.pieces[p].edge_slot) * 2 + usize::from(edge == TAIL)
    }

    fn send_edges(&mut self, p: u32, out: &mut Vec<Effect>) {
        let (c, tried) = (self.pieces[p].chunk, self.pieces[p].tried);
        let readable = self.chunks[c as usize].readable();
        let Some(slot) = self.least_loaded(c, readable & !tried) else {
            if self.chunks[c as usize].all_asked(tried) {
                self.give_edges(p, out);
                self.finish(p, Some(OpError::Io), out);
            }
            return;
        };
        self.pieces[p].tried |= 1 << slot;
        for edge in [HEAD, TAIL] {
            if self.pieces[p].edges_left & edge == 0 {
                continue;
            }
            let mut span = self.span(p, slot);
            if edge == TAIL {
                span.first += span.count - 1;
            }
            span.count = 1;
            let page = self.edge_page(p, edge);
            let data = self.edges.as_ref().expect("edge memory is there").payload(page);
            self.pieces[p].out += 1;
            self.pieces[p].sent |= 1 << slot;
            let purpose = Purpose::Edge { piece: p, slot, edge };
            let request = Request::Read {
                span,
                raw: false,
                data,
            };
            self.send_slot(c, slot, purpose, request, out);
        }
    }

    fn edge_reply(&mut self, p: u32, edge: u8, hole: bool, bad: bool, out: &mut Vec<Effect>) {
        if !bad {
            self.pieces[p].edges_left &= !edge;
            if hole {
                let page = self.edge_page(p, edge);
                self.edges
                    .as_mut()
                    .expect("edge memory is there")
                    .bytes_mut(page, 1)
                    .fill(0);
            }
        }
        if self.pieces[p].out > 0 {
            return;
        }
        if self.pieces[p].again {
            return self.look_at_piece(p, out);
        }
        if self.pieces[p].edges_left != 0 {
            self.check_region(p);
            return self.send_edges(p, out);
        }
        self.pieces[p].stage = Stage::Merging;
        let payload = |mirror: &Self, edge: u8| {
            (mirror.pieces[p].edges & edge != 0).then(|| {
                let page = mirror.edge_page(p, edge);
                mirror.edges.as_ref().expect("edge memory is there").payload(page)
            })
        };
        out.push(Effect::Merge {
            op: OpId(self.pieces[p].op),
            head: payload(self, HEAD),
            tail: payload(self, TAIL),
        });
    }

    /// The driver completed the edge blocks that [`Effect::Merge`] named; these are their checksums now.
    pub fn merged(&mut self, op: OpId, head: Option<u32>, tail: Option<u32>, out: &mut Vec<Effect>) {
        let edges = if head.is_some() { HEAD } else { 0 } | if tail.is_some() { TAIL } else { 0 };
        let found = (0..self.pieces.len()).find(|&p| {
            let piece = &self.pieces[p];
            self.pieces.is_used(p)
                && piece.op == op.0
                && piece.edges == edges
                && piece.stage == Stage::Merging
        });
        // An operation that was given up meanwhile is not looked for.
        if let Some(p) = found {
            let piece = &mut self.pieces[p];
            if let Some(crc) = head {
                piece.crcs[usize::from(piece.first)] = crc;
            }
            if let Some(crc) = tail {
                piece.crcs[usize::from(piece.first + piece.count - 1)] = crc;
            }
            (piece.edges, piece.stage, piece.sent, piece.tried) = (0, Stage::Ready, 0, 0);
            self.give_edges(p, out);
            let c = self.pieces[p].chunk;
            if self.chunks[c as usize].ready {
                self.run(p, out);
            } else {
                self.step_back(p);
                let (c, region) = self.place(p);
                self.look_region(c, region);
            }
        }
        self.pump(out);
    }

    fn give_edges(&mut self, p: u32, out: &mut Vec<Effect>) {
        let slot = std::mem::replace(&mut self.pieces[p].edge_slot, u16::MAX);
        if slot == u16::MAX {
            return;
        }
        self.edges_free.push(slot);
        if let Some(next) = self.edges_wait.pop_front() {
            self.pieces[next].stage = Stage::Ready;
            self.read_edges(next, out);
        }
    }

    // ---- answers ---------------------------------------------------------------------------------------------------

    /// A request of a piece was answered, or ended without an answer (its disk is gone).
    pub(super) fn piece_reply(&mut self, pending: Pending, reply: Option<Reply>, out: &mut Vec<Effect>) {
        let (p, slot) = match pending.purpose {
            Purpose::Piece { piece, slot } | Purpose::Edge { piece, slot, .. } => (piece, slot),
            _ => return,
        };
        let bit = 1 << slot;
        let c = self.pieces[p].chunk;
        let present = self.chunks[c as usize].slots[usize::from(slot)].incarnation == pending.incarnation;
        let piece = &mut self.pieces[p];
        piece.out -= 1;
        piece.sent &= !bit;
        if let Some(Reply::Refused(status)) = reply {
            self.refused(c, slot, pending.incarnation, status, p, out);
        }
        if self.pieces[p].stage == Stage::Ended {
            self.tasks_due = true; // Its region may be waited for.
            return self.let_go(p, out);
        }
        if let Purpose::Edge { edge, .. } = pending.purpose {
            return match reply {
                Some(Reply::Read { holes, bad, .. }) => {
                    self.edge_reply(p, edge, holes != 0, bad != 0, out);
                }
                _ => {
                    // As for a read: the replica is gone, not the block.
                    self.pieces[p].tried &= !bit;
                    self.edge_reply(p, edge, false, true, out);
                }
            };
        }
        match (self.pieces[p].kind, reply) {
            (PieceKind::Read, Some(Reply::Read { holes, bad, lost, .. })) => {
                if present {
                    return self.read_reply(p, (holes, bad, lost), out);
                }
                self.look_at_piece(p, out);
            }
            (PieceKind::Read, _) => {
                // The replica is gone, not the blocks: it may be asked again once it is back.
                self.pieces[p].tried &= !bit;
                self.look_at_piece(p, out);
            }
            (_, Some(Reply::Done)) => {
                self.seq += 1;
                let disk = usize::from(pending.disk);
                self.disks[disk].last_write = self.seq;
                let bytes = u64::from(self.pieces[p].count) * BLOCK as u64;
                self.count_unstable(bytes, out);
                if present && self.chunks[c as usize].lost & bit == 0 {
                    let piece = &mut self.pieces[p];
                    piece.acked |= bit;
                    piece.need &= !bit;
                }
                self.settle(p, out);
            }
            _ => self.settle(p, out),
        }
    }

    fn refused(&mut self, c: u32, slot: u8, incarnation: u32, status: Status, p: u32, out: &mut Vec<Effect>) {
        if status == Status::NoSpace
            && self.chunks[c as usize].slots[usize::from(slot)].incarnation == incarnation
        {
            self.pieces[p].no_space |= 1 << slot;
            return;
        }
        self.slot_refused(c, slot, incarnation, status, out);
    }

    /// Adds a write to those under way, unless it is there.
    fn list(&mut self, p: u32) {
        let newest = self.newest;
        let piece = &mut self.pieces[p];
        if piece.since != Version::ZERO {
            return;
        }
        (piece.since, piece.older, piece.newer) = (piece.version, newest, NIL);
        if newest == NIL {
            self.oldest = p;
        } else {
            self.pieces[newest].newer = p;
        }
        self.newest = p;
    }

    fn unlist(&mut self, p: u32) {
        let piece = &mut self.pieces[p];
        if piece.since == Version::ZERO {
            return;
        }
        (piece.version, piece.since) = (Version::ZERO, Version::ZERO);
        let (older, newer) = (piece.older, piece.newer);
        if older == NIL {
            self.oldest = newer;
        } else {
            self.pieces[older].newer = newer;
        }
        if newer == NIL {
            self.newest = older;
        } else {
            self.pieces[newer].older = older;
        }
    }

    /// A piece that holds its blocks has ended.
    pub(super) fn finish(&mut self, p: u32, error: Option<OpError>, out: &mut Vec<Effect>) {
        self.unlist(p);
        self.leave(p);
        self.ended(p, error, out);
    }

    fn ended(&mut self, p: u32, error: Option<OpError>, out: &mut Vec<Effect>) {
        let (op, busy) = (self.pieces[p].op, self.pieces[p].out > 0);
        self.pieces[p].stage = Stage::Ended;
        self.ops[op as usize].left -= 1;
        if busy {
            self.ops[op as usize].held += 1;
        } else {
            self.pieces.give(p);
        }
        self.ops[op as usize].progress = self.now;
        if error.is_some() && self.ops[op as usize].result.is_none() {
            self.ops[op as usize].result = error;
        }
        self.feed(op, &[]);
        self.maybe_done(op, out);
    }

    /// The operation is answered when no piece of it is under way.
    pub(super) fn maybe_done(&mut self, id: u32, out: &mut Vec<Effect>) {
        let op = &mut self.ops[id as usize];
        if op.left > 0 || op.next < op.end || op.answered {
            return;
        }
        let read = op.kind == OpKind::Read;
        if read && op.held > 0 {
            return;
        }
        op.answered = true;
        let (result, released) = (op.result, op.held == 0);
        match result {
            Some(OpError::Io) => self.counts.io += 1,
            Some(OpError::NoSpace) => self.counts.no_space += 1,
            Some(OpError::TimedOut) => self.counts.timeout += 1,
            _ => {}
        }
        if released {
            self.ops[id as usize].live = false;
            self.ops_live -= 1;
        }
        out.push(Effect::Done {
            op: OpId(id),
            result: result.map_or(Ok(()), Err),
            released,
        });
    }

    /// A request of a piece that had ended is over.
    fn let_go(&mut self, p: u32, out: &mut Vec<Effect>) {
        if self.pieces[p].out > 0 {
            return;
        }
        let id = self.pieces[p].op;
        if self.pieces[p].edge_slot != u16::MAX {
            self.give_edges(p, out);
        }
        self.pieces.give(p);
        let op = &mut self.ops[id as usize];
        op.held -= 1;
        if op.held > 0 {
            return;
        }
        if op.answered {
            op.live = false;
            self.ops_live -= 1;
            out.push(Effect::Release { op: OpId(id) });
        } else {
            self.maybe_done(id, out);
        }
    }

    /// Ends a flush operation that waits.
    pub(super) fn flush_done(&mut self, id: u32, error: Option<OpError>, out: &mut Vec<Effect>) {
        let op = &mut self.ops[id as usize];
        op.left = 0;
        op.result = error;
        self.maybe_done(id, out);
    }

    // ---- giving up -------------------------------------------------------------------------------------------------

    pub(super) fn watch_ops(&mut self, out: &mut Vec<Effect>) {
        // While the next generation is waited for nothing is late.
        if self.limits.io_timeout_ms == 0 || self.ops_live == 0 || self.quiescing {
            return;
        }
        for id in 0..self.limits.ops {
            let op = &self.ops[id as usize];
            if op.live && !op.answered && self.now.saturating_sub(op.progress) > self.limits.io_timeout_ms {
                self.cancel(id, OpError::TimedOut, out);
            }
        }
    }

    /// Fails an operation. A write that reached some replicas leaves its region to be compared before the next I/O.
    pub(super) fn cancel(&mut self, id: u32, error: OpError, out: &mut Vec<Effect>) {
        let op = &mut self.ops[id as usize];
        if !op.live || op.answered {
            return;
        }
        op.result = Some(op.result.unwrap_or(error));
        op.next = op.end;
        if op.kind == OpKind::Flush {
            self.flush_ops.retain(|&(op, _)| op != id);
            return self.flush_done(id, Some(error), out);
        }
        for p in 0..self.pieces.len() {
            if !self.pieces.is_used(p) || self.pieces[p].op != id {
                continue;
            }
            let (c, region) = self.place(p);
            match self.pieces[p].stage {
                Stage::Ended => {}
                Stage::Waiting => {
                    self.stop_waiting(p);
                    self.ended(p, Some(error), out);
                }
                // Runs next, sees the phase, or goes its way.
                Stage::Ready => {}
                Stage::EdgeWait => {
                    self.edges_wait.retain(|&q| q != p);
                    self.finish(p, Some(error), out);
                }
                Stage::EdgeRead | Stage::Merging => {
                    if self.pieces[p].out == 0 {
                        self.give_edges(p, out);
                    }
                    self.finish(p, Some(error), out);
                }
                Stage::Confirming => self.finish(p, Some(error), out),
                Stage::Sent if self.pieces[p].kind == PieceKind::Read => {
                    self.finish(p, Some(error), out);
                }
                Stage::Sent => {
                    if self.pieces[p].version != Version::ZERO {
                        self.unsettle(c, region);
                    }
                    self.finish(p, Some(error), out);
                }
                Stage::Flushing => {
                    self.flush_wait.retain(|&q| q != p);
                    self.finish(p, Some(error), out);
                }
            }
        }
    }
}

fn done(op: OpId, result: Result<(), OpError>, out: &mut Vec<Effect>) {
    out.push(Effect::Done {
        op,
        result,
        released: true,
    });
}
