//! A new generation under a running guest, before the versions of the present one are used up.
//!
//! Past [`Limits::versions`] the owner asks for the next generation ([`Effect::NewGeneration`]); I/O goes on meanwhile. Past
//! twice that it waits: no request goes out before the new generation is there, so a version is never used twice and none
//! is beyond what its bits can count.
//!
//! The control state hands the next generation to the same owner. From then on proposals are made in its name, for those of
//! the old one are refused. Replicas know only the old one yet: requests wait at the door (`send`) until every disk that is
//! trusted has answered what is out, so that no request of the old generation comes after the seal of the new one; then
//! each disk is sealed anew and gets what waited for it, in order. A write that waited keeps its version, which is older
//! than all of the new generation and newer than all that went before it.
//!
//! Disks that are lost are not waited for: what they still have is answered to nobody, and they are sealed when they
//! return. A seal that was on its way under the old generation counts for nothing when it is answered, and is repeated.
//!
//! Deliberately absent: comparing replicas. The owner stays the same and so does what it knows of them.

use std::collections::VecDeque;

use super::disks::Purpose;
use super::{DiskIndex, Effect, Mirror, Phase, RequestId};
use crate::config::VolumeConfig;
use crate::replica::Request;

impl Mirror {
    /// The control state has given this owner the next generation, as it was asked to: I/O goes on under it.
    pub fn renewed(&mut self, config: VolumeConfig, out: &mut Vec<Effect>) {
        if config.generation > self.config.generation
            && matches!(self.phase, Phase::Attaching | Phase::Serving | Phase::Draining)
        {
            self.quiescing = true;
            self.take_config(config, out);
        }
        self.pump(out);
    }

    /// Whether a request to the disk has to wait. Seals do not: a disk that returns meanwhile is not made to wait.
    #[inline]
    pub(super) fn must_wait(&self, disk: u16, purpose: Purpose) -> bool {
        let disk = &self.disks[usize::from(disk)];
        (self.quiescing || disk.resealing || disk.held > 0) && purpose != Purpose::Seal
    }

    /// It waits.
    pub(super) fn hold(&mut self, disk: u16, id: RequestId, request: Request) {
        self.disks[usize::from(disk)].held += 1;
        self.held.push_back((id, request));
    }

    /// A version was used: asks for the next generation, or waits for it, when it is time.
    #[inline]
    pub(super) fn watch_versions(&mut self, out: &mut Vec<Effect>) {
        if self.counter < self.limits.versions || !matches!(self.phase, Phase::Attaching | Phase::Serving) {
            return;
        }
        if !self.asked_generation && self.config.generation == self.generation {
            self.asked_generation = true;
            out.push(Effect::NewGeneration);
        }
        // One that is leaving does not come here: it takes no more requests, and for those in hand there are versions.
        self.quiescing |= self.counter >= 2 * self.limits.versions;
    }

    /// Goes over to the new generation once nothing of the old one is out.
    pub(super) fn switch_generation(&mut self, out: &mut Vec<Effect>) {
        let quiet = self.disks.iter().all(|disk| !disk.sealed || disk.out == 0);
        if !self.quiescing || self.config.generation == self.generation || !quiet {
            return;
        }
        (self.quiescing, self.asked_generation) = (false, false);
        (self.generation, self.counter) = (self.config.generation, 0);
        self.counts.renewals += 1;
        let now = self.now;
        // What waited for this is not late.
        self.ops.iter_mut().for_each(|op| op.progress = now);
        for d in 0..self.disks.len() {
            self.disks[d].resealing = self.disks[d].sealed;
            if self.disks[d].sealed {
                self.seal(d, out);
            }
        }
    }

    /// Sends what waited and need not wait any longer; what is for a disk that was lost ends as if it had been lost on it.
    pub(super) fn let_through(&mut self, out: &mut Vec<Effect>) {
        let mut moved = !self.held.is_empty();
        while std::mem::take(&mut moved) {
            // What ends may make others wait: they come behind those that wait already.
            let mut kept = VecDeque::new();
            for (id, request) in std::mem::take(&mut self.held) {
                let disk = self.pending_disk(id);
                let state = &mut self.disks[usize::from(disk)];
                if self.quiescing || state.resealing {
                    kept.push_back((id, request));
                    continue;
                }
                moved = true;
                state.held -= 1;
                if state.sealed {
                    self.emit(disk, id, request, out);
                } else {
                    self.unsent(id, out);
                }
            }
            kept.append(&mut self.held);
            self.held = kept;
        }
    }

    /// Ends what waits for a disk, or for any of them.
    pub(super) fn drop_held(&mut self, of: Option<usize>, out: &mut Vec<Effect>) {
        if self.held.is_empty() {
            return;
        }
        let mut kept = VecDeque::new();
        for (id, request) in std::mem::take(&mut self.held) {
            let disk = usize::from(self.pending_disk(id));
            if of.is_none_or(|d| d == disk) {
                self.disks[disk].held -= 1;
                self.unsent(id, out);
            } else {
                kept.push_back((id, request));
            }
        }
        kept.append(&mut self.held);
        self.held = kept;
    }

    /// The owner leaves: what is in hand is finished under the present generation, unless the next one is there already.
    pub(super) fn stop_renewing(&mut self) {
        if self.quiescing && self.config.generation == self.generation {
            self.quiescing = false;
        }
    }

    /// A request goes out.
    #[inline]
    pub(super) fn emit(&mut self, disk: u16, id: RequestId, request: Request, out: &mut Vec<Effect>) {
        let state = &mut self.disks[usize::from(disk)];
        if state.out == 0 {
            state.progress = self.now;
        }
        state.out += 1;
        state.heard = match request {
            Request::Seal => crate::ids::Version::ZERO,
            _ => self.stable,
        };
        out.push(Effect::Send {
            disk: DiskIndex(disk),
            id,
            header: self.header(),
            request,
        });
    }
}
