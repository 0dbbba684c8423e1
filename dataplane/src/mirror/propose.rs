//! What is asked of the control state: one proposal at a time, derived from the chunks' present state.
//!
//! Nothing is queued: when the outcome of one is known the chunks are looked at again. So a proposal that was overtaken
//! by events is simply never made.

use crate::config::{Change, Outcome, Proposal, SlotState};
use crate::ids::BootId;
use crate::planted::{self, Bug};

use super::chunks::Lost;
use super::sync::slots;
use super::{Effect, Mirror, Phase};

/// Most chunks in a promotion.
const PROMOTE_MAX: usize = 64;
/// Most chunks in another change.
const CHANGE_MAX: usize = 4096;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Wish {
    Stale { no_space: bool },
    First,
    Promote,
    Rebuild,
    Renew,
}

impl Mirror {
    pub(super) fn propose(&mut self, out: &mut Vec<Effect>) {
        if self.proposed.is_some()
            || !matches!(self.phase, Phase::Attaching | Phase::Serving | Phase::Draining)
        {
            return;
        }
        let mut best: Option<(Wish, u16)> = None;
        for c in 0..self.chunks.len() {
            for i in 0..self.chunks[c].slots.len() {
                if let Some(wish) = self.wish_for(c, i, out) {
                    let disk = self.chunks[c].slots[i].disk;
                    if best.is_none_or(|(least, _)| wish < least) {
                        best = Some((wish, disk));
                    }
                }
            }
        }
        let Some((wish, disk)) = best else { return };
        let limit = if wish == Wish::Promote {
            PROMOTE_MAX
        } else {
            CHANGE_MAX
        };
        let mut chunks = Vec::new();
        for c in 0..self.chunks.len() {
            for i in 0..self.chunks[c].slots.len() {
                if chunks.len() < limit
                    && self.chunks[c].slots[i].disk == disk
                    && self.wish_for(c, i, out) == Some(wish)
                {
                    chunks.push(c as u32);
                    if wish == Wish::Promote {
                        self.chunks[c].slots[i].pending = true;
                        self.refresh(c as u32);
                    }
                }
            }
        }
        let state = &self.disks[usize::from(disk)];
        let (uuid, boot, power) = (state.uuid, state.boot, state.power);
        let change = match wish {
            Wish::Stale { no_space } => Change::MarkStale {
                disk: uuid,
                chunks,
                no_space,
            },
            Wish::Rebuild => Change::StartRebuild { disk: uuid, chunks },
            Wish::First | Wish::Promote | Wish::Renew => Change::MarkInSync {
                disk: uuid,
                chunks,
                boot,
                power,
            },
        };
        let proposal = Proposal {
            generation: self.config.generation,
            config: self.config.config,
            change,
        };
        self.proposed = Some(proposal.clone());
        out.push(Effect::Propose(proposal));
    }

    /// What the slot needs of the control state, if anything.
    fn wish_for(&mut self, c: usize, i: usize, out: &mut Vec<Effect>) -> Option<Wish> {
        let chunk = &self.chunks[c];
        let slot = &chunk.slots[i];
        if !slot.used || slot.pending {
            return None;
        }
        let disk = &self.disks[usize::from(slot.disk)];
        let trusted = chunk.in_sync & !chunk.lost;
        let no_space = slot.lost.elsewhere();
        match slot.state {
            SlotState::InSync if slot.lost != Lost::No => {
                // While those that are left may have forgotten something, what they lack may be on this one.
                let whole = |slot: u8| !self.disks[usize::from(chunk.slots[usize::from(slot)].disk)].suspect;
                let needed = slot.lost == Lost::Disk && chunk.unsettled != 0 && !slots(trusted).any(whole);
                (trusted != 0 && !slot.refused && !needed).then_some(Wish::Stale { no_space })
            }
            SlotState::Rebuilding if slot.lost != Lost::No => {
                (!slot.refused).then_some(Wish::Stale { no_space })
            }
            _ if self.phase == Phase::Draining => None,
            SlotState::InSync if disk.sealed && slot.recorded != disk.boot && !slot.refused => {
                if slot.recorded == BootId::default() && !chunk.ready {
                    return self.all_present(c).then_some(Wish::First);
                }
                // Not before it was said that power was lost: the next owner could not tell any more.
                let said = self.phase == Phase::Serving;
                (said && chunk.ready && chunk.unsettled == 0 && chunk.in_sync & chunk.lost == 0)
                    .then_some(Wish::Renew)
            }
            SlotState::InSync => None,
            SlotState::Rebuilding => {
                let complete =
                    slot.active && slot.clean == !0 && chunk.ready && chunk.unsettled == 0 && !slot.refused;
                if !complete {
                    return None;
                }
                let (d, want) = (usize::from(slot.disk), slot.flush_want);
                let Some(want) = want else {
                    let want = self.seq;
                    self.chunks[c].slots[i].flush_want = Some(want);
                    if !planted::on(Bug::PromoteWithoutFlush) && self.flush_disk(d, out) {
                        return None;
                    }
                    return Some(Wish::Promote);
                };
                (self.is_flushed(d, want) || planted::on(Bug::PromoteWithoutFlush)).then_some(Wish::Promote)
            }
            SlotState::Stale => {
                (disk.sealed && chunk.ready && trusted != 0 && !slot.refused && self.now >= slot.not_before)
                    .then_some(Wish::Rebuild)
            }
        }
    }

    pub(super) fn outcome(&mut self, outcome: Outcome, out: &mut Vec<Effect>) {
        let Some(proposal) = self.proposed.take() else {
            self.counts.odd += 1;
            return;
        };
        let (config, committed) = match outcome {
            Outcome::Committed(config) => (config, true),
            Outcome::Moved(config) => (config, false),
            // It was this owner that took the next generation meanwhile.
            Outcome::Fenced if proposal.generation < self.config.generation => (self.config.clone(), false),
            Outcome::Fenced => return self.end(Phase::Fenced, out),
        };
        if config.generation > self.config.generation {
            return self.end(Phase::Fenced, out);
        }
        let (uuid, chunks) = match &proposal.change {
            Change::MarkStale { disk, chunks, .. }
            | Change::StartRebuild { disk, chunks }
            | Change::MarkInSync { disk, chunks, .. } => (*disk, chunks),
        };
        if config.config >= self.config.config {
            self.take_config(config, out);
        }
        let disk = self.disk_index(uuid);
        for &c in chunks {
            let Some(chunk) = self.chunks.get_mut(c as usize) else {
                continue;
            };
            for slot in chunk
                .slots
                .iter_mut()
                .filter(|slot| slot.used && slot.disk == disk)
            {
                slot.pending = false;
                let happened = match &proposal.change {
                    Change::MarkStale { .. } => slot.state == SlotState::Stale,
                    Change::StartRebuild { .. } => slot.state != SlotState::Stale,
                    Change::MarkInSync { boot, .. } => {
                        slot.state == SlotState::InSync && slot.recorded == *boot
                    }
                };
                // Asked again after a while, not in a circle.
                slot.refused |= committed && !happened;
                if slot.state == SlotState::Rebuilding && slot.lost == Lost::Disk {
                    // Lost while its promotion was undecided, and not promoted: begin again when it is back.
                    (slot.lost, slot.clean) = (Lost::No, 0);
                }
                if slot.state == SlotState::Rebuilding {
                    slot.flush_want = None;
                }
            }
            self.refresh(c);
        }
        self.look = true;
        self.wish = true;
    }

    fn all_present(&self, c: usize) -> bool {
        let chunk = &self.chunks[c];
        chunk.in_sync & chunk.lost == 0 && chunk.in_sync & !chunk.reachable == 0
    }
}
