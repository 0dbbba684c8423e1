//! Which replicas of a chunk are trusted: at attach, after a loss and a return, after a new configuration.
//!
//! A replica in sync as committed is *lost* from the moment something is wrong with it until it is trusted again or
//! committed stale. While it is lost nothing that needs it is acknowledged. It is trusted again
//! * with the boot it had: it has forgotten nothing;
//! * when no replica of the chunk kept its boot: with the span of power it had, or, if none has even that and all have
//!   answered, all together; then the chunk is not ready until its doubtful regions were compared.
//!
//! At attach every replica begins lost, with the boot that the configuration recorded: both cases are one.
//!
//! A chunk whose replicas have no recorded boot was never written: its replicas are created, their boots recorded, and
//! only then does it take its first write. So a recorded replica that is not there is a replica that lost its data.

use crate::config::{Change, SLOTS_MAX, SlotState, VolumeConfig};
use crate::ids::{BootId, ChunkKey, PowerId};
use crate::planted::{self, Bug};
use crate::replica::{ChunkRef, Request, Sealed};

use super::disks::Purpose;
use super::ops::Stage;
use super::sync::slots;
use super::{Effect, Mirror, MirrorStatus, Phase};

/// Why a replica is not trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Lost {
    #[default]
    No,
    /// Its disk is away, or back and not looked at yet.
    Disk,
    /// It has to become stale.
    Data,
    /// It has to become stale: no room.
    NoSpace,
    /// It has to become stale: what is written to it does not stay.
    Rotten,
    /// It has to become stale: its disk may have forgotten something, and another's has not.
    Doubted,
}

impl Lost {
    /// The replica belongs on another disk.
    pub(super) fn elsewhere(self) -> bool {
        matches!(self, Lost::NoSpace | Lost::Rotten)
    }
}

/// The bad block of a replica that was written anew last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mended {
    pub(super) extent: u16,
    pub(super) block: u8,
    /// How often in a row.
    pub(super) times: u8,
    pub(super) at: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) used: bool,
    pub(super) disk: u16,
    pub(super) incarnation: u32,
    pub(super) state: SlotState,
    /// Boot and power with which it was last trusted.
    boot: BootId,
    power: PowerId,
    /// Boot that is recorded.
    pub(super) recorded: BootId,
    pub(super) lost: Lost,
    /// The control state would not drop it; asked again later.
    pub(super) refused: bool,
    /// Its promotion is proposed: required, not read.
    pub(super) pending: bool,
    /// Rebuilding: the chunk is there, regions in `clean` are equal and take every write.
    pub(super) active: bool,
    pub(super) clean: u64,
    /// Rebuilding and all clean: the flush that its promotion waits for.
    pub(super) flush_want: Option<u64>,
    pub(super) not_before: u64,
    creating: bool,
    present: bool,
    doubtful: u64,
    counted: bool,
    leaving: bool,
    pub(super) mended: Mended,
    /// It was dropped as rotten: no copy to it is believed unread.
    pub(super) rotten: bool,
}

impl Default for Slot {
    fn default() -> Self {
        Slot {
            used: false,
            disk: 0,
            incarnation: 0,
            state: SlotState::Stale,
            boot: BootId::default(),
            power: PowerId::default(),
            recorded: BootId::default(),
            lost: Lost::No,
            refused: false,
            pending: false,
            active: false,
            clean: 0,
            flush_want: None,
            not_before: 0,
            creating: false,
            present: false,
            doubtful: 0,
            counted: false,
            leaving: false,
            mended: Mended::default(),
            rotten: false,
        }
    }
}

#[derive(Clone, Debug, Default)]
pub(super) struct Chunk {
    pub(super) slots: [Slot; SLOTS_MAX],
    pub(super) ready: bool,
    /// It was ready once under this owner: acknowledged writes may depend on it.
    served: bool,
    /// Regions to be made equal before their next use.
    pub(super) unsettled: u64,
    /// Regions being made equal.
    pub(super) locked: u64,
    /// Regions to be verified, and regions to be compared, in the background.
    pub(super) check: u64,
    pub(super) compare: u64,
    /// Every in-sync replica has another boot than the one it was trusted with: content may be adopted.
    pub(super) rebooted: bool,
    pub(super) queued: bool,
    /// Making regions equal is put off until then.
    pub(super) pause_until: u64,
    // Masks of slots, derived from the slots.
    pub(super) in_sync: u8,
    pub(super) lost: u8,
    pub(super) pending: u8,
    pub(super) active: u8,
    pub(super) reachable: u8,
    copies: u8,
}

impl Chunk {
    /// Regions that hold operations back.
    #[inline]
    pub(super) fn hold(&self) -> u64 {
        if self.ready {
            self.unsettled | self.locked
        } else {
            !0
        }
    }

    /// Slots required for a write to the region, and those of them that can be sent to.
    #[inline]
    pub(super) fn targets(&self, region: u8) -> (u8, u8) {
        let mut need = self.in_sync | self.pending;
        if self.active != 0 {
            let mut left = self.active;
            while left != 0 {
                let slot = left.trailing_zeros();
                left &= left - 1;
                if self.slots[slot as usize].clean >> region & 1 != 0 {
                    need |= 1 << slot;
                }
            }
        }
        if planted::on(Bug::PendingPromotionForgotten) {
            need &= !self.pending;
        }
        (need, need & !self.lost)
    }

    /// Slots to read from.
    #[inline]
    pub(super) fn readable(&self) -> u8 {
        self.in_sync & !self.lost
    }

    /// Nobody is left who may have what these slots could not give: one that is in sync and lost for the moment may.
    pub(super) fn all_asked(&self, tried: u8) -> bool {
        tried != 0 && self.readable() != 0 && self.in_sync & !tried == 0
    }

    /// The slot of the last in-sync replica of a chunk that ought to have more.
    #[inline]
    pub(super) fn sole(&self) -> Option<u8> {
        (self.copies > 1 && self.in_sync.count_ones() == 1).then(|| self.in_sync.trailing_zeros() as u8)
    }

    /// Regions that some rebuilding replica still needs.
    pub(super) fn unclean_regions(&self) -> u64 {
        self.slots
            .iter()
            .filter(|slot| slot.active)
            .fold(0, |regions, slot| regions | !slot.clean)
    }

    pub(super) fn unclean(&mut self, slots: u8, region: u8) {
        for (i, slot) in self.slots.iter_mut().enumerate() {
            if slots >> i & 1 != 0 && slot.active {
                slot.clean &= !(1 << region);
                slot.flush_want = None;
            }
        }
    }

    pub(super) fn count(&self, status: &mut MirrorStatus) {
        let mut in_sync = 0;
        for slot in self.slots.iter().filter(|slot| slot.used) {
            match slot.state {
                SlotState::InSync if slot.lost == Lost::No => {
                    status.in_sync += 1;
                    in_sync += 1;
                }
                SlotState::InSync => status.lost += 1,
                SlotState::Stale => status.stale += 1,
                SlotState::Rebuilding => {
                    status.rebuilding += 1;
                    status.regions_to_rebuild += u64::from((!slot.clean).count_ones());
                }
            }
        }
        status.unavailable += u32::from(in_sync == 0 || !self.ready);
        status.degraded |= in_sync < self.copies;
        status.regions_unsettled += u64::from(self.unsettled.count_ones());
    }
}

/// Replicas being created at a time.
const CREATING_MAX: u32 = 64;

impl Mirror {
    pub(super) fn chunk_ref(&self, c: u32, slot: u8) -> ChunkRef {
        ChunkRef {
            key: ChunkKey {
                volume: self.config.id,
                layer: self.config.head,
                chunk: c,
            },
            incarnation: self.chunks[c as usize].slots[usize::from(slot)].incarnation,
        }
    }

    /// Derives the chunk's masks from its slots.
    pub(super) fn refresh(&mut self, c: u32) {
        let chunk = &mut self.chunks[c as usize];
        (
            chunk.in_sync,
            chunk.lost,
            chunk.pending,
            chunk.active,
            chunk.reachable,
            chunk.copies,
        ) = (0, 0, 0, 0, 0, 0);
        for (i, slot) in chunk.slots.iter_mut().enumerate() {
            let bit = 1u8 << i;
            if !slot.used && !slot.counted {
                continue;
            }
            let disk = &mut self.disks[usize::from(slot.disk)];
            let mut counted = false;
            if slot.used {
                chunk.copies += 1;
                if slot.state == SlotState::InSync {
                    chunk.in_sync |= bit;
                    counted = true;
                }
                if slot.lost != Lost::No {
                    chunk.lost |= bit;
                }
                if slot.pending {
                    chunk.pending |= bit;
                    counted = true;
                }
                if slot.active {
                    chunk.active |= bit;
                    counted = true;
                }
                if disk.sealed && slot.present {
                    chunk.reachable |= bit;
                }
            }
            let leaving = counted && slot.lost != Lost::No;
            disk.counted = disk.counted + u32::from(counted) - u32::from(slot.counted);
            disk.leaving = disk.leaving + u32::from(leaving) - u32::from(slot.leaving);
            if slot.leaving && !leaving && disk.leaving == 0 {
                disk.lost_unflushed = false;
            }
            (slot.counted, slot.leaving) = (counted, leaving);
        }
        self.look = true;
    }

    /// Follows a committed configuration.
    pub(super) fn take_config(&mut self, config: VolumeConfig, out: &mut Vec<Effect>) {
        for (c, slots) in config.chunks.iter().enumerate() {
            if self.config.chunks.get(c) == Some(slots) {
                continue;
            }
            if c >= self.chunks.len() {
                self.chunks.push(Chunk::default());
            }
            self.take_slots(c as u32, slots, out);
        }
        self.config = config;
        self.look = true;
        self.wish = true;
    }

    fn take_slots(&mut self, c: u32, slots: &[crate::config::Slot], out: &mut Vec<Effect>) {
        let c_ = c as usize;
        let mut kept = 0u8;
        let mut new = Vec::new();
        for slot in slots.iter().take(SLOTS_MAX) {
            let disk = self.disk_index(slot.disk);
            let at = self.chunks[c_]
                .slots
                .iter()
                .position(|there| there.used && there.disk == disk && there.incarnation == slot.incarnation);
            match at {
                Some(i) => {
                    kept |= 1 << i;
                    self.take_state(c, i, slot);
                }
                None => new.push((disk, slot)),
            }
        }
        for i in 0..SLOTS_MAX {
            let there = self.chunks[c_].slots[i];
            if there.used && kept >> i & 1 == 0 {
                if there.present && self.disks[usize::from(there.disk)].sealed {
                    let request = Request::DropChunk(self.chunk_ref(c, i as u8));
                    self.send_slot(c, i as u8, Purpose::Drop, request, out);
                }
                self.chunks[c_].slots[i].used = false;
                self.fail_tasks(c);
                self.refresh(c);
                self.chunks[c_].slots[i] = Slot::default();
            }
        }
        for (disk, slot) in new {
            let Some(i) = self.chunks[c_].slots.iter().position(|there| !there.used) else {
                continue;
            };
            self.chunks[c_].slots[i] = Slot {
                used: true,
                disk,
                incarnation: slot.incarnation,
                state: slot.state,
                boot: slot.boot,
                power: slot.power,
                recorded: slot.boot,
                lost: if slot.state == SlotState::InSync {
                    Lost::Disk
                } else {
                    Lost::No
                },
                ..Slot::default()
            };
        }
        self.refresh(c);
    }

    fn take_state(&mut self, c: u32, i: usize, new: &crate::config::Slot) {
        let slot = &mut self.chunks[c as usize].slots[i];
        let old = slot.state;
        slot.recorded = new.boot;
        slot.state = new.state;
        match (old, new.state) {
            (SlotState::Rebuilding, SlotState::InSync) => {
                // It was lost while its promotion was undecided, or it is trusted.
                (slot.boot, slot.power, slot.rotten) = (new.boot, new.power, false);
                (slot.active, slot.clean, slot.flush_want) = (false, 0, None);
            }
            (SlotState::Stale, SlotState::InSync) => {
                slot.lost = Lost::Data;
            }
            (_, SlotState::Stale | SlotState::Rebuilding) if old != new.state => {
                if new.state == SlotState::Stale && slot.lost.elsewhere() {
                    slot.not_before = self.now + 60_000;
                }
                slot.lost = Lost::No;
                (slot.active, slot.clean, slot.flush_want) = (false, 0, None);
                (slot.refused, slot.creating) = (false, false);
            }
            _ => {}
        }
    }

    /// A disk told what it holds: its replicas are looked at.
    pub(super) fn replicas_found(&mut self, d: u16, sealed: &Sealed, out: &mut Vec<Effect>) {
        for chunk in &mut self.chunks {
            for slot in chunk.slots.iter_mut().filter(|slot| slot.used && slot.disk == d) {
                (slot.present, slot.creating) = (false, false);
            }
        }
        for &(there, doubtful) in &sealed.chunks {
            let ours = there.key.volume == self.config.id && there.key.layer == self.config.head;
            let c = there.key.chunk as usize;
            let slot = self.chunks.get_mut(c).filter(|_| ours).and_then(|chunk| {
                chunk
                    .slots
                    .iter_mut()
                    .find(|slot| slot.used && slot.disk == d && slot.incarnation == there.incarnation)
            });
            if let Some(slot) = slot {
                slot.present = true;
                slot.doubtful |= doubtful;
            }
        }
        for c in 0..self.chunks.len() {
            if self.chunks[c]
                .slots
                .iter()
                .any(|slot| slot.used && slot.disk == d)
            {
                self.refresh(c as u32);
            }
        }
        self.look = true;
        self.wish = true;
        let _ = out;
    }

    /// A disk is lost, and with it every replica on it.
    pub(super) fn lose_replicas(&mut self, d: u16) {
        for c in 0..self.chunks.len() {
            let mut found = false;
            for slot in self.chunks[c]
                .slots
                .iter_mut()
                .filter(|slot| slot.used && slot.disk == d)
            {
                found = true;
                slot.creating = false;
                (slot.active, slot.flush_want) = (false, None);
                if slot.state == SlotState::InSync || slot.pending {
                    if slot.lost == Lost::No {
                        slot.lost = Lost::Disk;
                    }
                } else {
                    slot.clean = 0;
                }
            }
            if found {
                self.refresh(c as u32);
                self.fail_tasks(c as u32);
            }
        }
        self.wish = true;
        self.look = true;
    }

    /// Single replicas are lost, their disks are not.
    pub(super) fn lose_slots(&mut self, c: u32, slots: u8, why: Lost) {
        for (i, slot) in self.chunks[c as usize].slots.iter_mut().enumerate() {
            if slots >> i & 1 != 0 && slot.used {
                slot.lost = why;
                slot.rotten |= why == Lost::Rotten;
                (slot.active, slot.clean, slot.flush_want) = (false, 0, None);
            }
        }
        self.refresh(c);
        self.fail_tasks(c);
        self.wish = true;
    }

    /// Looks at every chunk, and at every piece under way, after something changed.
    pub(super) fn look_at_chunks(&mut self, out: &mut Vec<Effect>) {
        if !matches!(self.phase, Phase::Attaching | Phase::Serving | Phase::Draining) {
            return;
        }
        let mut all = true;
        for c in 0..self.chunks.len() as u32 {
            self.advance(c, out);
            all &= self.chunks[c as usize].ready;
        }
        self.all_ready = all;
        if self.phase == Phase::Attaching && all {
            self.phase = Phase::Serving;
            out.push(Effect::Attached {
                power_lost: self.power_lost,
            });
            for p in 0..self.pieces.len() {
                if self.pieces.is_used(p) && self.pieces[p].stage == Stage::Waiting {
                    let (c, region) = self.place(p);
                    self.look_region(c, region);
                }
            }
            self.flush_progress(out);
        }
        for p in 0..self.pieces.len() {
            if self.pieces.is_used(p) {
                if self.pieces[p].stage == Stage::Flushing {
                    let disk = self.pieces[p].flush_disk;
                    let chunk = &self.chunks[self.pieces[p].chunk as usize];
                    let there =
                        slots(chunk.readable()).any(|slot| chunk.slots[usize::from(slot)].disk == disk);
                    // It may be lost, or it was replaced: nobody waits for its flush then.
                    if !there {
                        self.flush_wait.retain(|&q| q != p);
                        self.unwritten(p);
                    }
                }
                self.look_at_piece(p, out);
            }
        }
        self.look_at_tasks(out);
        self.flush_progress(out);
        self.wish = true;
    }

    fn advance(&mut self, c: u32, out: &mut Vec<Effect>) {
        let chunk = &self.chunks[c as usize];
        if chunk.in_sync & chunk.lost != 0 {
            self.accept(c, out);
        }
        let chunk = &self.chunks[c as usize];
        if !chunk.ready && chunk.in_sync != 0 && chunk.in_sync & chunk.lost == 0 {
            self.prepare(c, out);
        }
        // Rebuilding replicas on disks that are there begin with an empty or an old chunk.
        for i in 0..SLOTS_MAX {
            let slot = &self.chunks[c as usize].slots[i];
            let begin = slot.used
                && slot.state == SlotState::Rebuilding
                && !slot.active
                && !slot.pending
                && slot.lost == Lost::No
                && self.disks[usize::from(slot.disk)].sealed;
            if begin {
                self.create(c, i, out);
            }
        }
    }

    /// Decides which lost replicas are trusted again.
    fn accept(&mut self, c: u32, out: &mut Vec<Effect>) {
        let fresh = self.is_fresh(c);
        let chunk = &mut self.chunks[c as usize];
        let trusted = chunk.in_sync & !chunk.lost;
        let (mut back, mut kept, mut silent, mut clean) = (0u8, 0u8, 0u8, 0u8);
        let mut changed = false;
        for (i, slot) in chunk.slots.iter_mut().enumerate() {
            let bit = 1u8 << i;
            // Nothing is acknowledged before they are dropped: when no better one is left they go on.
            let last = trusted == 0 && (slot.present || !self.disks[usize::from(slot.disk)].sealed);
            let has_all = matches!(slot.lost, Lost::NoSpace | Lost::Rotten | Lost::Doubted);
            let counts = slot.lost == Lost::Disk || has_all && last;
            if chunk.in_sync & bit == 0 || !counts {
                continue;
            }
            let disk = &self.disks[usize::from(slot.disk)];
            if !disk.sealed {
                silent |= bit;
                continue;
            }
            if !slot.present && !fresh {
                slot.lost = Lost::Data;
                changed = true;
                continue;
            }
            let leaving = self
                .proposed
                .as_ref()
                .is_some_and(|proposal| match &proposal.change {
                    Change::MarkStale {
                        disk: uuid, chunks, ..
                    } => *uuid == disk.uuid && chunks.contains(&c),
                    _ => false,
                });
            let same = slot.boot == disk.boot || planted::on(Bug::OldBootIsSame);
            if trusted != 0 {
                // Others serve: only a replica that forgot nothing goes on with them.
                // One whose MarkStale is out waits for the outcome.
                if (same || fresh) && !leaving {
                    (slot.boot, slot.power, slot.lost) = (disk.boot, disk.power, Lost::No);
                    changed = true;
                }
                continue;
            }
            back |= bit;
            if same || slot.power == disk.power || fresh {
                kept |= bit;
            }
            if !disk.suspect {
                clean |= bit;
            }
        }
        if trusted == 0 && back != 0 {
            let waited = self.phase != Phase::Attaching
                || self.now.saturating_sub(self.started) >= self.limits.attach_wait_ms;
            let all = silent == 0 || planted::on(Bug::SkipSeal);
            // What may have forgotten something does not go on without one that has not, and that may come yet.
            if all || kept & clean != 0 && waited {
                let sure = if kept == 0 { back } else { kept };
                let (chosen, power_lost) = match sure & clean {
                    // One that lost power knows what was flushed.
                    0 => (sure | back & clean, kept == 0 || back & clean != 0),
                    sound => (sound, kept == 0),
                };
                self.choose(c, chosen, back, power_lost, out);
                changed = true;
            }
        }
        if changed {
            self.refresh(c);
            self.wish = true;
        }
    }

    /// A chunk without a trusted replica goes on with those in `chosen`.
    fn choose(&mut self, c: u32, chosen: u8, back: u8, power_lost: bool, out: &mut Vec<Effect>) {
        let served = self.chunks[c as usize].served;
        let mut unflushed = false;
        let mut rebooted = true;
        let mut same = true;
        for i in 0..SLOTS_MAX {
            let slot = &mut self.chunks[c as usize].slots[i];
            if back >> i & 1 == 0 {
                continue;
            }
            let disk = &self.disks[usize::from(slot.disk)];
            unflushed |= disk.lost_unflushed;
            if chosen >> i & 1 == 0 {
                // It has to become stale; if the control state drops the chosen ones instead, it is looked at again.
                if slot.boot == disk.boot {
                    slot.lost = Lost::Doubted;
                }
                continue;
            }
            rebooted &= slot.boot != disk.boot;
            same &= slot.boot == disk.boot;
            (slot.boot, slot.power, slot.lost) = (disk.boot, disk.power, Lost::No);
        }
        let chunk = &mut self.chunks[c as usize];
        if served && power_lost && unflushed {
            return self.fail(out);
        }
        self.power_lost |= power_lost;
        if served && same {
            return;
        }
        chunk.rebooted = rebooted;
        chunk.ready = false;
        self.all_ready = false;
        self.candidate = self.candidate.map(|(want, _)| (want, self.stable));
        if rebooted {
            chunk.compare = !0;
        }
        for p in 0..self.pieces.len() {
            let piece = &mut self.pieces[p];
            let holds = !matches!(piece.stage, Stage::Waiting | Stage::Ready | Stage::Ended);
            if self.pieces.is_used(p) && self.pieces[p].chunk == c && holds {
                let piece = &mut self.pieces[p];
                if piece.stage == Stage::Flushing {
                    self.flush_wait.retain(|&q| q != p);
                    self.unwritten(p);
                }
                self.pieces[p].again = true;
            }
        }
        self.look = true;
    }

    fn is_fresh(&self, c: u32) -> bool {
        let chunk = &self.chunks[c as usize];
        !chunk.served
            && chunk.slots.iter().any(|slot| {
                slot.used && slot.state == SlotState::InSync && slot.recorded == BootId::default()
            })
    }

    /// All in-sync replicas are trusted: create what was never there, then serve.
    fn prepare(&mut self, c: u32, out: &mut Vec<Effect>) {
        let fresh = self.is_fresh(c);
        let mut missing = false;
        for i in 0..SLOTS_MAX {
            let slot = &self.chunks[c as usize].slots[i];
            if slot.used && slot.state == SlotState::InSync && !slot.present {
                self.create(c, i, out);
                missing = true;
            }
        }
        if missing || fresh {
            self.wish = true;
            return;
        }
        let chunk = &mut self.chunks[c as usize];
        chunk.ready = true;
        chunk.served = true;
        let mut regions = 0;
        for slot in &mut chunk.slots {
            if slot.used && slot.state == SlotState::InSync {
                regions |= std::mem::take(&mut slot.doubtful);
                if self.disks[usize::from(slot.disk)].suspect {
                    regions = !0;
                }
            }
        }
        if planted::on(Bug::SkipReconcile) {
            (chunk.compare, regions) = (0, 0);
        }
        self.add_unsettled(c, regions);
        self.queue_work(c);
        for region in 0..64 {
            self.look_region(c, region);
        }
    }

    /// A region may go on, or be wanted now.
    pub(super) fn look_region(&mut self, c: u32, region: u8) {
        if !self.chunks[c as usize].ready || self.pieces.live() == 0 {
            return;
        }
        if self.chunks[c as usize].hold() >> region & 1 == 0 {
            self.wake_region(c, region);
        } else if self.region_wanted(c, region) {
            self.want_region(c, region);
        }
    }

    /// The region's replicas may differ: nothing touches it before they were made equal.
    pub(super) fn unsettle(&mut self, c: u32, region: u8) {
        self.add_unsettled(c, 1 << region);
        self.queue_work(c);
    }

    /// What is stable does not grow before the regions were made equal.
    fn add_unsettled(&mut self, c: u32, regions: u64) {
        let chunk = &mut self.chunks[c as usize];
        self.unsettled += u64::from((regions & !chunk.unsettled).count_ones());
        chunk.unsettled |= regions;
        if regions != 0
            && let Some((_, version)) = &mut self.candidate
        {
            *version = self.stable;
        }
    }

    fn create(&mut self, c: u32, i: usize, out: &mut Vec<Effect>) {
        let slot = &self.chunks[c as usize].slots[i];
        if slot.creating || self.creating >= CREATING_MAX {
            return;
        }
        self.chunks[c as usize].slots[i].creating = true;
        self.creating += 1;
        let request = Request::CreateChunk(self.chunk_ref(c, i as u8));
        let purpose = Purpose::Create {
            chunk: c,
            slot: i as u8,
        };
        self.send_slot(c, i as u8, purpose, request, out);
    }

    pub(super) fn created(&mut self, c: u32, slot: u8, incarnation: u32, done: bool, full: bool) {
        self.creating -= 1;
        let chunk = &mut self.chunks[c as usize];
        let there = &mut chunk.slots[usize::from(slot)];
        self.look |= self.creating == 0 || self.creating == CREATING_MAX / 2;
        if !there.used || there.incarnation != incarnation || !there.creating {
            return;
        }
        there.creating = false;
        if done {
            there.present = true;
            if there.state == SlotState::Rebuilding && there.lost == Lost::No {
                there.active = true;
                there.clean = if planted::on(Bug::PromoteWithoutCompare) {
                    !0
                } else {
                    0
                };
                self.queue_work(c);
            }
        } else if full {
            there.lost = Lost::NoSpace;
        } else if self.disks[usize::from(there.disk)].sealed {
            there.lost = Lost::Data;
        }
        self.refresh(c);
        self.wish = true;
    }

    /// Puts right what was put off.
    pub(super) fn retry(&mut self) {
        for chunk in &mut self.chunks {
            for slot in &mut chunk.slots {
                slot.refused = false;
            }
        }
        self.look = true;
    }
}
