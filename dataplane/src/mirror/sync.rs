//! Making the replicas of one region equal: at attach, for a rebuild, for a repair, for a scrub. One mechanism.
//!
//! A task locks its region (new operations wait, those under way drain), asks all members for their digests, plans each
//! extent (`plan`), reads what must be sent into private memory, installs it, and asks again until the digests are
//! equal. If the region was in doubt anywhere it is then flushed and settled. Only then is it unlocked.
//!
//! Members are all in-sync replicas, which must all be trusted, and all rebuilding ones. A region that was found equal
//! under its lock stays equal, since every later write is required on all members; so when the last region of a
//! rebuilding replica is done and the disk was flushed, the replica is equal, flushed, and had every write since.
//!
//! A member that fails ends the task; the region is done again with those that remain. What was half installed on
//! in-sync replicas leaves the region unsettled; writing bad data anew under a record that was right already does not.
//!
//! A block that is bad again after it was written anew twice will be bad for ever: its replica is given up, if another
//! one is in sync, and else left as it is. Either way the region is free for those who read it elsewhere.

use crate::ids::{BLOCK, BLOCKS_PER_EXTENT, BlockMask, EXTENTS_PER_REGION};
use crate::memory::Arena;
use crate::planted::{self, Bug};
use crate::replica::{ExtentDigest, Reply, Request, Span, Status};

use super::chunks::{Lost, Mended};
use super::disks::{Pending, Purpose};
use super::plan::{Plan, Source, VIEWS_MAX, View, plan};
use super::{Effect, Mirror, Phase};

/// Digests of one region until they are equal; more means that something keeps going wrong, and it is put off.
const PASSES_MAX: u8 = 5;
/// How long a region that can not be made equal is put off.
const PAUSE_MS: u64 = 500;
/// How often a block is written anew before its replica is given up.
const MENDS_MAX: u8 = 2;
/// A block that stayed good for so long after it was written anew is bad for another reason.
const MENDED_MS: u64 = 60_000;

/// What a task's request was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Digest {
        slot: u8,
    },
    Read {
        slot: u8,
        extent: u8,
        first: u8,
        count: u8,
    },
    Install {
        slot: u8,
    },
    Flush {
        slot: u8,
        covers: u64,
    },
    Settle {
        slot: u8,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Idle,
    Draining,
    Digesting,
    Copying,
    Flushing,
    Settling,
    /// Given up; the region is unlocked, requests to lost disks are still out.
    Ending,
}

#[derive(Debug, Default)]
pub(super) struct Task {
    stage: Stage,
    chunk: u32,
    region: u8,
    verify: bool,
    passes: u8,
    members: u8,
    in_sync: u8,
    out: [u32; VIEWS_MAX],
    failed: bool,
    /// A read did not give what its digest promised: look again, thoroughly.
    surprised: bool,
    installed: bool,
    /// Bad data of an in-sync replica was written anew.
    mended: bool,
    /// Per slot: the first bad block that this pass writes anew.
    mending: [Option<(u16, u8)>; VIEWS_MAX],
    in_doubt: u8,
    digests: [Option<Box<[ExtentDigest; EXTENTS_PER_REGION]>>; VIEWS_MAX],
    plans: Vec<Plan>,
    reads_left: [u8; EXTENTS_PER_REGION],
}

impl Task {
    pub(super) fn busy(&self) -> bool {
        self.stage != Stage::Idle
    }

    fn waiting(&self) -> bool {
        self.out.iter().any(|&n| n > 0)
    }
}

impl Mirror {
    /// Something waits for the region: do it first.
    pub(super) fn want_region(&mut self, c: u32, region: u8) {
        if self.chunks[c as usize].unsettled >> region & 1 != 0 && !self.first.contains(&(c, region)) {
            self.first.push_back((c, region));
        }
    }

    /// The chunk has regions to be made equal.
    pub(super) fn queue_work(&mut self, c: u32) {
        if !std::mem::replace(&mut self.chunks[c as usize].queued, true) {
            self.work.push_back(c);
        }
    }

    pub(super) fn sync_idle_work(&self) -> bool {
        self.tasks_due || !self.first.is_empty() || !self.work.is_empty()
    }

    pub(super) fn start_tasks(&mut self, out: &mut Vec<Effect>) {
        if std::mem::take(&mut self.tasks_due) {
            for t in 0..self.tasks.len() {
                let (c, region) = (self.tasks[t].chunk, self.tasks[t].region);
                if self.tasks[t].stage == Stage::Draining && self.region_quiet(c, region) {
                    self.begin_digests(t, out);
                }
            }
        }
        if !matches!(self.phase, Phase::Attaching | Phase::Serving | Phase::Draining) {
            return;
        }
        for t in 0..self.tasks.len() {
            if self.tasks[t].busy() {
                continue;
            }
            let Some((c, region, verify)) = self.pick() else {
                return;
            };
            self.begin(t, c, region, verify, out);
        }
    }

    fn may_sync(&self, c: u32) -> bool {
        let chunk = &self.chunks[c as usize];
        // One that may be in sync by now, its promotion undecided, must not miss the comparison either: it would be
        // trusted later as it is.
        let required = chunk.in_sync | chunk.pending;
        chunk.ready && chunk.in_sync != 0 && required & chunk.lost == 0 && chunk.pause_until <= self.now
    }

    fn pick(&mut self) -> Option<(u32, u8, bool)> {
        for _ in 0..self.first.len() {
            let (c, region) = self.first.pop_front().expect("counted");
            let chunk = &self.chunks[c as usize];
            let wanted = chunk.unsettled & !chunk.locked & 1 << region != 0;
            if wanted && self.may_sync(c) {
                return Some((c, region, chunk.check >> region & 1 != 0));
            } else if wanted {
                // Somebody waits for it still, and says so only once.
                self.first.push_back((c, region));
            }
        }
        if self.phase == Phase::Draining {
            return None;
        }
        for _ in 0..self.work.len() {
            let c = self.work.pop_front().expect("counted");
            let chunk = &self.chunks[c as usize];
            let all = chunk.unsettled | chunk.check | chunk.compare | chunk.unclean_regions();
            if all == 0 {
                self.chunks[c as usize].queued = false;
                continue;
            }
            self.work.push_back(c);
            let urgent = chunk.unsettled & !chunk.locked;
            let rest = all & !chunk.locked;
            if !self.may_sync(c) || rest == 0 {
                continue;
            }
            let region = if urgent != 0 { urgent } else { rest }.trailing_zeros() as u8;
            return Some((c, region, chunk.check >> region & 1 != 0));
        }
        None
    }

    fn begin(&mut self, t: usize, c: u32, region: u8, verify: bool, out: &mut Vec<Effect>) {
        if self.buffer.is_none() {
            match Arena::new(self.tasks.len() * EXTENTS_PER_REGION * BLOCKS_PER_EXTENT) {
                Ok(arena) => self.buffer = Some(arena),
                Err(_) => {
                    self.chunks[c as usize].pause_until = self.now + PAUSE_MS;
                    return;
                }
            }
        }
        let task = &mut self.tasks[t];
        *task = Task {
            stage: Stage::Draining,
            chunk: c,
            region,
            verify,
            plans: std::mem::take(&mut task.plans),
            ..Task::default()
        };
        let unlocked =
            planted::on(Bug::RebuildWithoutLock) && self.chunks[c as usize].unsettled >> region & 1 == 0;
        if !unlocked {
            self.chunks[c as usize].locked |= 1 << region;
        }
        if unlocked || self.region_quiet(c, region) {
            self.begin_digests(t, out);
        }
    }

    fn begin_digests(&mut self, t: usize, out: &mut Vec<Effect>) {
        let (c, region) = (self.tasks[t].chunk, self.tasks[t].region);
        if !self.may_sync(c) {
            self.tasks[t].failed = true;
            return self.give_up(t, out);
        }
        let chunk = &self.chunks[c as usize];
        let (in_sync, active) = (chunk.in_sync, chunk.active & !chunk.lost);
        let rotten = slots(active).any(|slot| chunk.slots[usize::from(slot)].rotten);
        let task = &mut self.tasks[t];
        task.stage = Stage::Digesting;
        task.passes += 1;
        task.verify |= rotten;
        (task.in_sync, task.members) = (in_sync, in_sync | active);
        (task.surprised, task.in_doubt) = (false, 0);
        task.digests = Default::default();
        let (members, verify) = (task.members, task.verify);
        for slot in slots(members) {
            let request = Request::Digest {
                chunk: self.chunk_ref(c, slot),
                region,
                verify,
            };
            self.send_step(t, Step::Digest { slot }, slot, request, out);
        }
    }

    fn send_step(&mut self, t: usize, step: Step, slot: u8, request: Request, out: &mut Vec<Effect>) {
        self.tasks[t].out[usize::from(slot)] += 1;
        let purpose = Purpose::Task { task: t as u16, step };
        self.send_slot(self.tasks[t].chunk, slot, purpose, request, out);
    }

    pub(super) fn task_reply(
        &mut self,
        task: u16,
        step: Step,
        pending: Pending,
        reply: Option<Reply>,
        out: &mut Vec<Effect>,
    ) {
        let t = usize::from(task);
        let c = self.tasks[t].chunk;
        let slot = match step {
            Step::Digest { slot }
            | Step::Read { slot, .. }
            | Step::Install { slot }
            | Step::Flush { slot, .. }
            | Step::Settle { slot } => slot,
        };
        self.tasks[t].out[usize::from(slot)] -= 1;
        if self.tasks[t].stage == Stage::Ending {
            if !self.tasks[t].waiting() {
                self.tasks[t].stage = Stage::Idle;
            }
            return;
        }
        match (step, reply) {
            (Step::Read { .. }, Some(Reply::Read { .. })) if self.tasks[t].failed => {}
            (Step::Digest { slot }, Some(Reply::Digest { in_doubt, extents })) => {
                let task = &mut self.tasks[t];
                task.in_doubt |= u8::from(in_doubt) << slot;
                task.digests[usize::from(slot)] = Some(extents);
            }
            (
                Step::Read {
                    extent, first, count, ..
                },
                Some(Reply::Read { holes, bad, crcs, .. }),
            ) => {
                self.copied(
                    t,
                    usize::from(extent),
                    (first, count),
                    (holes, bad, crcs),
                    slot,
                    out,
                );
            }
            (Step::Install { .. } | Step::Flush { .. } | Step::Settle { .. }, Some(Reply::Done)) => {
                let d = usize::from(pending.disk);
                if let Step::Flush { covers, .. } = step {
                    self.disks[d].flushed_to = self.disks[d].flushed_to.max(covers);
                } else {
                    self.seq += 1;
                    self.disks[d].last_write = self.seq;
                }
            }
            (_, Some(Reply::Refused(status))) => {
                self.tasks[t].failed = true;
                let status = match step {
                    Step::Flush { .. } => Status::DiskFailed,
                    _ => status,
                };
                self.slot_refused(c, slot, pending.incarnation, status, out);
            }
            (_, _) => self.tasks[t].failed = true,
        }
        if self.tasks[t].failed {
            return self.give_up(t, out);
        }
        if !self.tasks[t].waiting() {
            self.next_stage(t, out);
        }
    }

    fn next_stage(&mut self, t: usize, out: &mut Vec<Effect>) {
        match self.tasks[t].stage {
            Stage::Idle | Stage::Draining | Stage::Ending => {}
            Stage::Digesting => self.plan_region(t, out),
            Stage::Copying => {
                if self.tasks[t].surprised {
                    self.tasks[t].verify = true;
                } else {
                    self.count_mends(t);
                }
                self.begin_digests(t, out);
            }
            Stage::Flushing => {
                let (c, region, in_doubt) = {
                    let task = &mut self.tasks[t];
                    task.stage = Stage::Settling;
                    (task.chunk, task.region, task.in_doubt)
                };
                if in_doubt == 0 {
                    return self.equal(t, out);
                }
                for slot in slots(in_doubt) {
                    let request = Request::Settle {
                        chunk: self.chunk_ref(c, slot),
                        region,
                    };
                    self.send_step(t, Step::Settle { slot }, slot, request, out);
                }
            }
            Stage::Settling => self.equal(t, out),
        }
    }

    fn plan_region(&mut self, t: usize, out: &mut Vec<Effect>) {
        let c = self.tasks[t].chunk;
        let rebooted = self.chunks[c as usize].rebooted;
        let task = &mut self.tasks[t];
        let mut views_at = [0u8; VIEWS_MAX];
        let mut n = 0;
        let mut suspect = false;
        for slot in slots(task.members) {
            views_at[n] = slot;
            n += 1;
            let disk = self.chunks[c as usize].slots[usize::from(slot)].disk;
            suspect |= task.in_sync >> slot & 1 != 0 && self.disks[usize::from(disk)].suspect;
        }
        let adopt = rebooted && !suspect && task.in_doubt & task.in_sync == task.in_sync;
        task.plans.clear();
        for e in 0..EXTENTS_PER_REGION {
            let views: [Option<View<'_>>; VIEWS_MAX] = std::array::from_fn(|i| {
                (i < n).then(|| {
                    let slot = usize::from(views_at[i]);
                    let disk = self.chunks[c as usize].slots[slot].disk;
                    View {
                        digest: &task.digests[slot].as_ref().expect("every member has answered")[e],
                        in_sync: task.in_sync >> slot & 1 != 0,
                        suspect: self.disks[usize::from(disk)].suspect,
                    }
                })
            });
            let views: [View<'_>; VIEWS_MAX] =
                std::array::from_fn(|i| views[i].or(views[0]).expect("a member"));
            let mut planned = plan(&views[..n], adopt).expect("an in-sync member");
            // From places among the views to slots.
            let (mut install, mut mends) = ([None; VIEWS_MAX], 0);
            for (i, (&slot, blocks)) in views_at[..n].iter().zip(planned.install).enumerate() {
                install[usize::from(slot)] = blocks;
                mends |= (planned.mends >> i & 1) << slot;
            }
            (planned.install, planned.mends) = (install, mends);
            for source in &mut planned.source {
                *source = match *source {
                    Source::None => Source::None,
                    Source::Good(i) => Source::Good(views_at[usize::from(i)]),
                    Source::Raw(i) => Source::Raw(views_at[usize::from(i)]),
                };
            }
            task.plans.push(planned);
        }
        if self.give_up_rotten(t) {
            return self.give_up(t, out);
        }
        let task = &mut self.tasks[t];
        if task
            .plans
            .iter()
            .all(|plan| plan.install.iter().all(Option::is_none))
        {
            return self.finish_region(t, out);
        }
        if task.passes >= PASSES_MAX {
            task.failed = true;
            self.chunks[c as usize].pause_until = self.now + PAUSE_MS;
            return self.give_up(t, out);
        }
        task.stage = Stage::Copying;
        for e in 0..EXTENTS_PER_REGION {
            self.copy_extent(t, e, out);
        }
    }

    /// Looks for replicas that do not keep what is written to them. True: one was given up, and the task with it.
    fn give_up_rotten(&mut self, t: usize) -> bool {
        let now = self.now;
        let task = &mut self.tasks[t];
        let (c, region, in_sync) = (task.chunk, task.region, task.in_sync);
        task.mending = [None; VIEWS_MAX];
        for slot in slots(task.members) {
            let first = task.plans.iter().enumerate().find_map(|(e, plan)| {
                let blocks = plan.install[usize::from(slot)].filter(|_| plan.mends >> slot & 1 != 0)?;
                let extent = u16::from(region) * EXTENTS_PER_REGION as u16 + e as u16;
                Some((extent, blocks.trailing_zeros() as u8))
            });
            let Some((extent, block)) = first else { continue };
            task.mending[usize::from(slot)] = Some((extent, block));
            let mended = &self.chunks[c as usize].slots[usize::from(slot)].mended;
            let again = (mended.extent, mended.block) == (extent, block)
                && mended.times >= MENDS_MAX
                && now.saturating_sub(mended.at) < MENDED_MS;
            if !again {
                continue;
            }
            if in_sync & !(1 << slot) != 0 {
                self.lose_slots(c, 1 << slot, Lost::Rotten);
                return true;
            }
            // Nobody can take its place yet: whoever has the block is read.
            for plan in &mut task.plans {
                if plan.mends >> slot & 1 != 0 {
                    plan.install[usize::from(slot)] = None;
                }
            }
            task.mending[usize::from(slot)] = None;
        }
        false
    }

    /// What a pass had to write anew is written.
    fn count_mends(&mut self, t: usize) {
        let (c, now) = (self.tasks[t].chunk, self.now);
        for slot in slots(self.tasks[t].members) {
            let Some((extent, block)) = self.tasks[t].mending[usize::from(slot)] else {
                continue;
            };
            let mended = &mut self.chunks[c as usize].slots[usize::from(slot)].mended;
            let again =
                (mended.extent, mended.block) == (extent, block) && now.saturating_sub(mended.at) < MENDED_MS;
            let times = if again { mended.times.saturating_add(1) } else { 1 };
            *mended = Mended {
                extent,
                block,
                times,
                at: now,
            };
        }
    }

    fn copy_extent(&mut self, t: usize, e: usize, out: &mut Vec<Effect>) {
        let plan = self.tasks[t].plans[e];
        if plan.install.iter().all(Option::is_none) {
            return;
        }
        if plan.changed {
            let version = self.next_version(out);
            self.tasks[t].plans[e].image.version = version;
        }
        let (c, region) = (self.tasks[t].chunk, self.tasks[t].region);
        let extent = u16::from(region) * EXTENTS_PER_REGION as u16 + e as u16;
        let wanted = plan
            .install
            .iter()
            .flatten()
            .fold(0, |all: BlockMask, blocks| all | blocks);
        self.tasks[t].reads_left[e] = 0;
        let mut b = 0;
        while b < BLOCKS_PER_EXTENT {
            if wanted >> b & 1 == 0 {
                b += 1;
                continue;
            }
            let source = plan.source[b];
            let mut end = b + 1;
            while end < BLOCKS_PER_EXTENT && wanted >> end & 1 != 0 && plan.source[end] == source {
                end += 1;
            }
            let (slot, raw) = match source {
                Source::Good(slot) => (slot, false),
                Source::Raw(slot) => (slot, true),
                Source::None => unreachable!("blocks to send have a source"),
            };
            let (first, count) = (b as u8, (end - b) as u8);
            let request = Request::Read {
                span: Span {
                    chunk: self.chunk_ref(c, slot),
                    extent,
                    first,
                    count,
                },
                raw,
                data: self.page(t, e, b),
            };
            self.tasks[t].reads_left[e] += 1;
            let step = Step::Read {
                slot,
                extent: e as u8,
                first,
                count,
            };
            self.send_step(t, step, slot, request, out);
            b = end;
        }
        if wanted == 0 {
            self.install(t, e, out);
        }
    }

    fn page(&self, t: usize, e: usize, b: usize) -> crate::memory::Payload {
        let page = (t * EXTENTS_PER_REGION + e) * BLOCKS_PER_EXTENT + b;
        self.buffer.as_ref().expect("a task has memory").payload(page)
    }

    /// A run of blocks was read: is it what the digest promised?
    fn copied(
        &mut self,
        t: usize,
        e: usize,
        (first, count): (u8, u8),
        (holes, bad, crcs): (BlockMask, BlockMask, crate::replica::Crcs),
        slot: u8,
        out: &mut Vec<Effect>,
    ) {
        let task = &mut self.tasks[t];
        task.reads_left[e] -= 1;
        let plan = &task.plans[e];
        for (b, crc) in crcs.iter().enumerate().skip(first.into()).take(count.into()) {
            let raw = plan.source[b] == Source::Raw(slot);
            let wrong = holes >> b & 1 != 0 || bad >> b & 1 != 0 && !raw || *crc != plan.image.crcs[b];
            task.surprised |= wrong;
        }
        if task.reads_left[e] == 0 && !task.surprised {
            self.install(t, e, out);
        }
    }

    fn install(&mut self, t: usize, e: usize, out: &mut Vec<Effect>) {
        let plan = self.tasks[t].plans[e];
        let (c, region) = (self.tasks[t].chunk, self.tasks[t].region);
        let extent = u16::from(region) * EXTENTS_PER_REGION as u16 + e as u16;
        self.counts.adopted += u64::from(plan.adopted.count_ones());
        self.counts.lost += u64::from(plan.lost.count_ones());
        if plan.adopted | plan.lost != 0 {
            let block = (plan.adopted | plan.lost).trailing_zeros();
            self.counts.last_damaged = Some((c, u32::from(extent) * BLOCKS_PER_EXTENT as u32 + block));
        }
        for (slot, write) in plan.install.iter().enumerate() {
            let Some(write) = *write else { continue };
            let slot = slot as u8;
            let (in_sync, mends) = (
                self.tasks[t].in_sync >> slot & 1 != 0,
                plan.mends >> slot & 1 != 0,
            );
            self.tasks[t].installed |= in_sync && !mends;
            self.tasks[t].mended |= in_sync && mends;
            self.counts.bytes_synced += u64::from(write.count_ones()) * BLOCK as u64;
            self.counts.repaired += u64::from(in_sync) * u64::from(write.count_ones());
            let request = Request::Install {
                chunk: self.chunk_ref(c, slot),
                extent,
                image: plan.image,
                write,
                data: self.page(t, e, 0),
            };
            self.send_step(t, Step::Install { slot }, slot, request, out);
        }
    }

    /// The digests are equal.
    fn finish_region(&mut self, t: usize, out: &mut Vec<Effect>) {
        let task = &self.tasks[t];
        let members = task.members;
        if task.in_doubt == 0 && !task.installed && !task.mended {
            return self.equal(t, out);
        }
        self.tasks[t].stage = Stage::Flushing;
        let covers = self.seq;
        for slot in slots(members) {
            self.send_step(t, Step::Flush { slot, covers }, slot, Request::Flush, out);
        }
    }

    fn equal(&mut self, t: usize, out: &mut Vec<Effect>) {
        let (c, region, members) = (self.tasks[t].chunk, self.tasks[t].region, self.tasks[t].members);
        let bit = 1u64 << region;
        self.counts.verified += u64::from(self.tasks[t].verify);
        let chunk = &mut self.chunks[c as usize];
        self.unsettled -= u64::from(chunk.unsettled & bit != 0);
        chunk.unsettled &= !bit;
        chunk.check &= !bit;
        chunk.compare &= !bit;
        for slot in slots(members & chunk.active) {
            chunk.slots[usize::from(slot)].clean |= bit;
        }
        self.tasks[t].stage = Stage::Idle;
        self.unlock(t);
        self.wish = true;
        let _ = out;
    }

    fn unlock(&mut self, t: usize) {
        let (c, region) = (self.tasks[t].chunk, self.tasks[t].region);
        self.chunks[c as usize].locked &= !(1 << region);
        self.tasks[t].digests = Default::default();
        self.look_region(c, region);
    }

    /// Ends a task that can not go on, once nothing of it is on its way to a replica that still counts.
    fn give_up(&mut self, t: usize, out: &mut Vec<Effect>) {
        let task = &self.tasks[t];
        let (c, region) = (task.chunk, task.region);
        for slot in slots(task.members) {
            let there = &self.chunks[c as usize].slots[usize::from(slot)];
            if task.out[usize::from(slot)] > 0 && there.used && self.disks[usize::from(there.disk)].sealed {
                return;
            }
        }
        if task.installed {
            self.unsettle(c, region);
        }
        let task = &mut self.tasks[t];
        task.stage = if task.waiting() {
            Stage::Ending
        } else {
            Stage::Idle
        };
        self.unlock(t);
        let _ = out;
    }

    /// A replica of the chunk changed its state: tasks on it begin anew.
    pub(super) fn fail_tasks(&mut self, c: u32) {
        for task in &mut self.tasks {
            let on = !matches!(task.stage, Stage::Idle | Stage::Ending) && task.chunk == c;
            task.failed |= on;
        }
        self.look = true;
    }

    pub(super) fn look_at_tasks(&mut self, out: &mut Vec<Effect>) {
        for t in 0..self.tasks.len() {
            if self.tasks[t].failed && !matches!(self.tasks[t].stage, Stage::Idle | Stage::Ending) {
                self.give_up(t, out);
            }
        }
    }
}

/// The slots of a mask.
pub(super) fn slots(mask: u8) -> impl Iterator<Item = u8> {
    (0..VIEWS_MAX as u8).filter(move |slot| mask >> slot & 1 != 0)
}
