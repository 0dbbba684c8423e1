//! The disks that the replicas are on: sealing, loss, silence, flushing, and the requests that are out.
//!
//! A disk is up when the driver says so and trusted when it has answered `Seal`: nothing else is sent before. When the
//! driver says that it is down, every request to it has ended and none touches memory of ours any more.
//!
//! Flushing: `seq` counts the writes that any replica answered. A flush of a disk covers all up to the `seq` at which it
//! was sent; at most one is out per disk and all who wait share it.

use crate::ids::{BootId, DiskUuid, Generation, PowerId, Version};
use crate::planted::{self, Bug};
use crate::replica::{Reply, Request, Sealed, Status};

use super::chunks::Lost;
use super::slab::NIL;
use super::sync::Step;
use super::{DiskIndex, Effect, Mirror, OpError, Phase, RequestId};

/// What a request was for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Purpose {
    #[default]
    Nothing,
    Seal,
    Flush {
        covers: u64,
    },
    Create {
        chunk: u32,
        slot: u8,
    },
    Drop,
    Piece {
        piece: u32,
        slot: u8,
    },
    Edge {
        piece: u32,
        slot: u8,
        edge: u8,
    },
    Confirm {
        piece: u32,
        slot: u8,
        turn: u32,
    },
    Task {
        task: u16,
        step: Step,
    },
}

/// A request that is out. `turn` grows each time its place is used again, so that an old answer is recognised.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pending {
    turn: u16,
    pub(super) disk: u16,
    /// In whose name it was asked; only of a seal it is looked at.
    generation: Generation,
    pub(super) incarnation: u32,
    pub(super) purpose: Purpose,
}

/// Bits of a request id that are its place.
const PLACE_BITS: u32 = 20;

/// Where a request is kept.
#[inline]
fn place(id: RequestId) -> u32 {
    id.0 & ((1 << PLACE_BITS) - 1)
}

#[derive(Clone, Debug)]
pub(super) struct Disk {
    pub(super) uuid: DiskUuid,
    up: bool,
    pub(super) sealed: bool,
    /// It is sealed, and being sealed with the next generation (`renew`).
    pub(super) resealing: bool,
    /// Requests that wait until they may go out.
    pub(super) held: u32,
    pub(super) boot: BootId,
    pub(super) power: PowerId,
    pub(super) suspect: bool,
    /// On this node: preferred for reads.
    pub(super) near: bool,
    /// Requests out.
    pub(super) out: u32,
    pub(super) progress: u64,
    abandoned: bool,
    /// Replicas here whose flush counts: in sync, or rebuilding.
    pub(super) counted: u32,
    /// Those of them that are lost, and not dropped or trusted again yet.
    pub(super) leaving: u32,
    pub(super) last_write: u64,
    pub(super) flushed_to: u64,
    flushing: bool,
    flush_again: bool,
    /// What it was last told of `stable`; a seal tells nothing, and may have reached a boot that knows nothing yet.
    pub(super) heard: Version,
    /// It was lost with acknowledged writes unflushed.
    pub(super) lost_unflushed: bool,
}

impl Mirror {
    pub(super) fn disk_index(&mut self, uuid: DiskUuid) -> u16 {
        if let Some(i) = self.disks.iter().position(|disk| disk.uuid == uuid) {
            return i as u16;
        }
        self.disks.push(Disk {
            uuid,
            up: false,
            sealed: false,
            resealing: false,
            held: 0,
            boot: BootId::default(),
            power: PowerId::default(),
            suspect: false,
            near: true,
            out: 0,
            progress: 0,
            abandoned: false,
            counted: 0,
            leaving: 0,
            last_write: 0,
            flushed_to: 0,
            flushing: false,
            flush_again: false,
            heard: Version::ZERO,
            lost_unflushed: false,
        });
        self.disks.len() as u16 - 1
    }

    /// A disk became reachable. Disks that the volume does not use are remembered, for a later configuration.
    pub fn disk_up(&mut self, uuid: DiskUuid, near: bool, out: &mut Vec<Effect>) {
        let d = usize::from(self.disk_index(uuid));
        self.disks[d].near = near;
        if self.disks[d].up {
            return;
        }
        self.disks[d].up = true;
        self.seal(d, out);
        self.pump(out);
    }

    /// A disk is unreachable: no request to it will be answered, and none touches memory of this volume any more.
    pub fn disk_down(&mut self, uuid: DiskUuid, out: &mut Vec<Effect>) {
        let d = usize::from(self.disk_index(uuid));
        self.disks[d].up = false;
        self.disks[d].abandoned = false;
        self.lose_disk(d, out);
        self.drop_held(Some(d), out);
        for i in 0..self.requests.len() {
            if self.requests.is_used(i) && usize::from(self.requests[i].disk) == d {
                let pending = self.requests[i];
                self.free_request(i);
                self.over(pending, None, out);
            }
        }
        self.pump(out);
    }

    pub(super) fn seal(&mut self, d: usize, out: &mut Vec<Effect>) {
        if self.disks[d].up
            && !matches!(
                self.phase,
                Phase::New | Phase::Detached | Phase::Fenced | Phase::Failed
            )
        {
            self.send(d as u16, 0, Purpose::Seal, Request::Seal, out);
        }
    }

    /// Sends a request to a disk.
    pub(super) fn send(
        &mut self,
        disk: u16,
        incarnation: u32,
        purpose: Purpose,
        request: Request,
        out: &mut Vec<Effect>,
    ) {
        let i = self.requests.take();
        assert!(i < 1 << PLACE_BITS, "requests are bounded by the pieces");
        let pending = &mut self.requests[i];
        pending.turn = pending.turn.wrapping_add(1);
        (pending.disk, pending.incarnation, pending.purpose) = (disk, incarnation, purpose);
        pending.generation = self.generation;
        let turn = u32::from(pending.turn) & 0xfff;
        let id = RequestId(turn << PLACE_BITS | i);
        if self.must_wait(disk, purpose) {
            self.hold(disk, id, request);
        } else {
            self.emit(disk, id, request, out);
        }
    }

    /// The disk that a request which is out or held is for.
    pub(super) fn pending_disk(&self, id: RequestId) -> u16 {
        self.requests[place(id)].disk
    }

    /// A request that was held ends without having been sent.
    pub(super) fn unsent(&mut self, id: RequestId, out: &mut Vec<Effect>) {
        let i = place(id);
        let pending = self.requests[i];
        self.requests[i].purpose = Purpose::Nothing;
        self.requests.give(i);
        self.over(pending, None, out);
    }

    /// Sends a request to the replica in a slot.
    #[inline]
    pub(super) fn send_slot(
        &mut self,
        c: u32,
        slot: u8,
        purpose: Purpose,
        request: Request,
        out: &mut Vec<Effect>,
    ) {
        let there = &self.chunks[c as usize].slots[usize::from(slot)];
        let (disk, incarnation) = (there.disk, there.incarnation);
        self.send(disk, incarnation, purpose, request, out);
    }

    fn free_request(&mut self, i: u32) {
        let disk = usize::from(self.requests[i].disk);
        self.disks[disk].out -= 1;
        self.disks[disk].progress = self.now;
        self.requests[i].purpose = Purpose::Nothing;
        self.requests.give(i);
    }

    pub(super) fn answer(&mut self, id: RequestId, reply: Reply, out: &mut Vec<Effect>) {
        let i = place(id);
        if !self.requests.is_used(i) || u32::from(self.requests[i].turn) & 0xfff != id.0 >> PLACE_BITS {
            self.counts.odd += 1;
            return;
        }
        let pending = self.requests[i];
        self.free_request(i);
        match reply {
            Reply::Refused(Status::StaleGeneration) => {
                self.over(pending, None, out);
                self.end(Phase::Fenced, out);
            }
            Reply::Refused(Status::DiskFailed) => {
                self.lose_disk(usize::from(pending.disk), out);
                self.over(pending, None, out);
            }
            reply => self.over(pending, Some(reply), out),
        }
    }

    /// A request ended, with an answer or because its disk is gone.
    fn over(&mut self, pending: Pending, reply: Option<Reply>, out: &mut Vec<Effect>) {
        let d = usize::from(pending.disk);
        match pending.purpose {
            Purpose::Nothing | Purpose::Drop => {}
            Purpose::Seal => match reply {
                // The generation has changed since: what the disk has obeyed is not enough any more.
                Some(Reply::Sealed(_)) if pending.generation != self.generation => self.seal(d, out),
                Some(Reply::Sealed(sealed)) => self.sealed(d, &sealed, out),
                Some(_) => {
                    self.counts.odd += 1;
                    // It obeys nobody that is known: what waits for it would wait for ever.
                    self.lose_disk(d, out);
                }
                None => {}
            },
            Purpose::Flush { covers } => {
                self.disks[d].flushing = false;
                match reply {
                    Some(Reply::Done) => self.flushed(d, covers, out),
                    Some(_) => self.lose_disk(d, out),
                    None => {}
                }
            }
            Purpose::Create { chunk, slot } => {
                let done = reply == Some(Reply::Done);
                let full = reply == Some(Reply::Refused(Status::NoSpace));
                self.created(chunk, slot, pending.incarnation, done, full);
            }
            Purpose::Piece { .. } | Purpose::Edge { .. } => self.piece_reply(pending, reply, out),
            Purpose::Confirm { .. } => self.confirmed(pending, reply, out),
            Purpose::Task { task, step } => self.task_reply(task, step, pending, reply, out),
        }
    }

    fn sealed(&mut self, d: usize, sealed: &Sealed, out: &mut Vec<Effect>) {
        if !self.disks[d].up {
            return;
        }
        let disk = &mut self.disks[d];
        // What it had answered and not flushed may be gone with its boot, and with the same one it may have done what it
        // could not answer any more: it is asked for a flush in any case.
        self.seq += 1;
        disk.last_write = self.seq;
        if self.phase == Phase::Serving {
            // And soon, so that nothing counts as unflushed for long.
            self.unstable_since.get_or_insert(self.now);
        }
        (disk.sealed, disk.boot, disk.power, disk.suspect) =
            (true, sealed.boot, sealed.power, sealed.suspect);
        disk.resealing = false;
        if planted::on(Bug::OldBootIsSame) {
            disk.lost_unflushed = false;
        }
        self.replicas_found(d as u16, sealed, out);
    }

    /// The disk serves nothing any more, until it is sealed again.
    pub(super) fn lose_disk(&mut self, d: usize, out: &mut Vec<Effect>) {
        let disk = &mut self.disks[d];
        if disk.sealed {
            (disk.sealed, disk.resealing) = (false, false);
            // Lost once more before that was settled: a flush since then has not brought back what was gone.
            let still = disk.lost_unflushed && disk.leaving > 0;
            disk.lost_unflushed = still || disk.counted > 0 && disk.last_write > disk.flushed_to;
            self.lose_replicas(d as u16);
        }
        let _ = out;
    }

    /// A replica refused for a reason that is not room.
    pub(super) fn slot_refused(
        &mut self,
        c: u32,
        slot: u8,
        incarnation: u32,
        status: Status,
        out: &mut Vec<Effect>,
    ) {
        let there = &self.chunks[c as usize].slots[usize::from(slot)];
        if there.incarnation != incarnation {
            return;
        }
        match status {
            Status::StaleGeneration => self.end(Phase::Fenced, out),
            Status::DiskFailed => {
                let disk = usize::from(there.disk);
                self.lose_disk(disk, out);
            }
            Status::NoChunk | Status::Invalid => self.lose_slots(c, 1 << slot, Lost::Data),
            Status::NoSpace => self.lose_slots(c, 1 << slot, Lost::NoSpace),
        }
    }

    /// The process was stopped, or its machine: nobody has looked at what disks answered meanwhile, and what was asked since is
    /// not as old as the clock makes it. They are waited for anew.
    pub(super) fn stood_still(&mut self, now: u64) {
        for disk in &mut self.disks {
            disk.progress = now;
        }
    }

    pub(super) fn watch_disks(&mut self, out: &mut Vec<Effect>) {
        for d in 0..self.disks.len() {
            let disk = &mut self.disks[d];
            if disk.out == 0
                || disk.abandoned
                || self.now.saturating_sub(disk.progress) < self.limits.silent_ms
            {
                continue;
            }
            disk.abandoned = true;
            out.push(Effect::Abandon {
                disk: DiskIndex(d as u16),
            });
            self.lose_disk(d, out);
        }
    }

    // ---- flushing --------------------------------------------------------------------------------------------------

    /// Sees to it that all answered writes of the disk get flushed. Says whether there is something to wait for.
    pub(super) fn flush_disk(&mut self, d: usize, out: &mut Vec<Effect>) -> bool {
        let seq = self.seq;
        let disk = &mut self.disks[d];
        if !disk.sealed {
            return false;
        }
        if disk.last_write <= disk.flushed_to {
            // Nothing is to be flushed: said now, since a write answered later must not make older flushes wait for it.
            disk.flushed_to = seq;
            return false;
        }
        if disk.flushing {
            disk.flush_again = true;
            return true;
        }
        (disk.flushing, disk.flush_again) = (true, false);
        let covers = self.seq;
        self.send(d as u16, 0, Purpose::Flush { covers }, Request::Flush, out);
        true
    }

    /// Tells the disks what is stable, now that nothing is under way: what they do not know to be stable stays dirty when
    /// they are closed. Says whether there is something to wait for.
    pub(super) fn tell_stable(&mut self, out: &mut Vec<Effect>) -> bool {
        self.begin_round(out);
        self.flush_progress(out);
        let mut told = false;
        for d in 0..self.disks.len() {
            let disk = &self.disks[d];
            if disk.sealed && disk.counted > 0 && disk.heard < self.stable {
                let covers = self.seq;
                self.disks[d].flushing = true;
                self.send(d as u16, 0, Purpose::Flush { covers }, Request::Flush, out);
                told = true;
            }
        }
        told
    }

    pub(super) fn is_flushed(&self, d: usize, want: u64) -> bool {
        self.disks[d].flushed_to >= want || self.disks[d].last_write <= self.disks[d].flushed_to
    }

    fn flushed(&mut self, d: usize, covers: u64, out: &mut Vec<Effect>) {
        if !self.disks[d].sealed {
            return;
        }
        let disk = &mut self.disks[d];
        disk.flushed_to = disk.flushed_to.max(covers);
        if std::mem::take(&mut disk.flush_again) {
            self.flush_disk(d, out);
        }
        for _ in 0..self.flush_wait.len() {
            let p = self.flush_wait.pop_front().expect("counted");
            let (disk, want) = (usize::from(self.pieces[p].flush_disk), self.pieces[p].want);
            if disk == d && self.is_flushed(d, want) {
                self.finish(p, None, out);
            } else {
                self.flush_wait.push_back(p);
            }
        }
        self.wish = true;
        self.flush_progress(out);
    }

    pub(super) fn submit_flush(&mut self, op: u32, out: &mut Vec<Effect>) {
        if planted::on(Bug::FlushEarly) {
            return self.flush_done(op, None, out);
        }
        self.flush_ops.push_back((op, self.seq));
        self.begin_round(out);
        self.flush_progress(out);
    }

    /// Flushes every disk; what is answered now is stable when all have done it.
    pub(super) fn begin_round(&mut self, out: &mut Vec<Effect>) {
        if self.candidate.is_none() {
            let version = if !self.all_ready || self.unsettled > 0 {
                // A replica may have a write of an earlier owner, or one that failed, that others lack: its dirty mark
                // is what tells, and must stay.
                self.stable
            } else if self.oldest == NIL {
                Version::new(self.generation, self.counter)
            } else {
                Version(self.pieces[self.oldest].since.0 - 1)
            };
            self.candidate = Some((self.seq, version));
            self.unstable = 0;
            self.unstable_since = None;
        }
        for d in 0..self.disks.len() {
            if self.disks[d].counted > 0 {
                self.flush_disk(d, out);
            }
        }
    }

    /// Answers the flushes that all disks have done.
    pub(super) fn flush_progress(&mut self, out: &mut Vec<Effect>) {
        let done = |mirror: &Self, want: u64| {
            (0..mirror.disks.len()).all(|d| {
                let disk = &mirror.disks[d];
                // What it lost no flush of it brings back: it may not stay in sync, and flushes wait until that is decided.
                let forgot = disk.leaving > 0 && disk.lost_unflushed;
                disk.counted == 0 || mirror.is_flushed(d, want) && !forgot
            })
        };
        while let Some(&(op, want)) = self.flush_ops.front() {
            if self.phase == Phase::Attaching || !done(self, want) {
                break;
            }
            self.flush_ops.pop_front();
            self.flush_done(op, None, out);
        }
        if let Some((want, version)) = self.candidate
            && done(self, want)
        {
            self.stable = self.stable.max(version);
            self.candidate = None;
        }
    }

    pub(super) fn count_unstable(&mut self, bytes: u64, out: &mut Vec<Effect>) {
        self.unstable += bytes;
        if self.unstable_since.is_none() {
            self.unstable_since = Some(self.now);
        }
        if self.unstable > self.limits.unstable_bytes && self.candidate.is_none() {
            self.begin_round(out);
        }
    }

    pub(super) fn watch_flush(&mut self, out: &mut Vec<Effect>) {
        if let Some(since) = self.unstable_since
            && self.now.saturating_sub(since) >= self.limits.unstable_ms
            && self.candidate.is_none()
        {
            self.begin_round(out);
        }
        // A disk that was lost while it flushed, and trusted again, has to be asked again.
        let wanted = self.flush_ops.front().map(|&(_, want)| want);
        if let Some(want) = wanted
            .into_iter()
            .chain(self.candidate.map(|(want, _)| want))
            .min()
        {
            for d in 0..self.disks.len() {
                if self.disks[d].counted > 0 && !self.disks[d].flushing && !self.is_flushed(d, want) {
                    self.flush_disk(d, out);
                }
            }
        }
        self.flush_progress(out);
    }

    /// Acknowledged writes are gone for good: the guest must see it.
    pub(super) fn fail(&mut self, out: &mut Vec<Effect>) {
        let _ = OpError::Gone;
        self.end(Phase::Failed, out);
    }
}
