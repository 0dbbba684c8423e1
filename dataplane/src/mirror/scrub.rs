//! The turn of each region to be verified: data that nobody reads rots unseen, until the last good copy of it is gone too.
//!
//! The regions of the volume take turns, one at a time, evenly over [`Limits::scrub_ms`]: all of a region is read and checked
//! on all replicas, compared, and what is bad or different is written anew (`sync`). The region waits meanwhile, a few
//! milliseconds every so many seconds. A region is due after half of its share of the time. While the guest has anything under
//! way it is put off by up to the other half, so that a quiet moment is taken if there is one, and a volume that has none
//! is verified all the same.
//!
//! Where the turn is, is not remembered: an owner begins at a place that its generation draws, so that one that is often
//! attached anew does not verify the same beginning each time.

use super::{Mirror, Phase};
use crate::ids::REGIONS_PER_CHUNK;

/// How far behind its time the scrub may be: a few ticks.
const DEBT_US: u64 = 1_000_000;

impl Mirror {
    /// Lets the next regions be verified if it is their turn.
    pub(super) fn scrub(&mut self) {
        let regions = self.chunks.len() as u64 * REGIONS_PER_CHUNK as u64;
        if self.limits.scrub_ms == 0 || self.phase != Phase::Serving || regions == 0 {
            return;
        }
        // In microseconds: the largest volume has more than one region a millisecond.
        let (now, share) = (self.now * 1_000, self.limits.scrub_ms * 500 / regions);
        if self.scrub_at == 0 {
            let draw = u64::from(self.config.generation.0).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            self.scrub_next = draw % regions;
            self.scrub_at = now + share;
        }
        let patience = if self.ops_live > 0 { share } else { 0 };
        // What was missed, standing still or attaching, is not made up for in a burst.
        self.scrub_at = self.scrub_at.max(now.saturating_sub(patience + DEBT_US));
        for _ in 0..self.limits.sync {
            if now < self.scrub_at + patience {
                return;
            }
            self.scrub_at += patience + share;
            let place = self.scrub_next % regions;
            self.scrub_next = place + 1;
            let c = (place / REGIONS_PER_CHUNK as u64) as u32;
            self.chunks[c as usize].check |= 1 << (place % REGIONS_PER_CHUNK as u64);
            self.queue_work(c);
        }
    }
}
