//! The register checker: is every 512 bytes of a volume a linearizable register?
//!
//! A block of 4 KiB that is written in parts is a composition, so the unit is what a guest can write alone. Every write
//! has an id of its own, so a read tells which write it saw; id zero is zeros: never written, or trimmed.
//!
//! A value is *dead* from the moment at which it is known to be overwritten or never to have happened. A read that began
//! after the death of what it returns is a violation, and so is an id that was never written there. What kills `v`:
//! * a write that began after `v` had ended was acknowledged, or seen by a read;
//! * `v` failed (or its guest died) and a read that began later saw something else.
//!
//! A loss of power of all replicas brings back what did not die by a write that was acknowledged and then flushed, and
//! what was acknowledged and not flushed may be gone.
//!
//! Weaker than full linearizability on purpose in one place: of writes that overlap in time any order may be seen, also
//! alternating, since a killed data plane carries out what was under way twice.

use std::collections::BTreeMap;

const NEVER: u64 = u64::MAX;

#[derive(Clone, Debug)]
struct Value {
    id: u64,
    begun: u64,
    acked: u64,
    /// It failed, or its guest died.
    ended: u64,
    dead: u64,
    /// It died by a write that was flushed.
    for_good: bool,
}

impl Value {
    fn over(&self) -> u64 {
        self.acked.min(self.ended)
    }
}

/// A volume's history, judged as it happens. Times come from the caller and never go back.
#[derive(Clone, Debug, Default)]
pub struct Checker {
    units: BTreeMap<u64, Vec<Value>>,
    /// Reads of a unit that were judged.
    pub judged: u64,
}

impl Checker {
    fn unit(&mut self, unit: u64) -> &mut Vec<Value> {
        let first = Value {
            id: 0,
            begun: 0,
            acked: 0,
            ended: NEVER,
            dead: NEVER,
            for_good: false,
        };
        self.units.entry(unit).or_insert_with(|| vec![first])
    }

    /// A write of `id` was submitted.
    pub fn begin(&mut self, unit: u64, id: u64, now: u64) {
        let value = Value {
            id,
            begun: now,
            acked: NEVER,
            ended: NEVER,
            dead: NEVER,
            for_good: false,
        };
        self.unit(unit).push(value);
    }

    /// The write that began at `begun` was acknowledged. Nothing under way began before `horizon`.
    pub fn acked(&mut self, unit: u64, id: u64, begun: u64, now: u64, horizon: u64) {
        let values = self.unit(unit);
        for v in values.iter_mut() {
            if v.id == id && v.begun == begun {
                v.acked = now;
            } else if v.over() < begun {
                v.dead = v.dead.min(now);
            }
        }
        values.retain(|v| !(v.for_good && v.dead < horizon));
    }

    /// The write failed: it may have happened.
    pub fn failed(&mut self, unit: u64, id: u64, begun: u64, now: u64) {
        for v in self.unit(unit) {
            if v.id == id && v.begun == begun {
                v.ended = now;
            }
        }
    }

    /// A flush that began at `begun` was acknowledged.
    pub fn flushed(&mut self, begun: u64) {
        for values in self.units.values_mut() {
            let last = values
                .iter()
                .filter(|v| v.acked < begun)
                .map(|v| v.begun)
                .max()
                .unwrap_or(0);
            for v in values.iter_mut() {
                v.for_good |= v.over() < last && v.dead < NEVER;
            }
        }
    }

    /// The write of `unit` that began at `begun` is durable by itself.
    pub fn durable(&mut self, unit: u64, begun: u64) {
        for v in self.unit(unit) {
            v.for_good |= v.over() < begun && v.dead < NEVER;
        }
    }

    /// All replicas lost power: what was not flushed may be gone.
    pub fn power_lost(&mut self, now: u64) {
        for values in self.units.values_mut() {
            for v in values.iter_mut().filter(|v| !v.for_good) {
                v.dead = NEVER;
                if v.begun != 0 {
                    v.ended = v.ended.min(now);
                }
            }
            // What was acknowledged last and flushed can not vanish: those it killed stay dead for good. What was
            // acknowledged and not flushed is one candidate among others now.
            for v in values.iter_mut().filter(|v| !v.for_good && v.begun != 0) {
                v.acked = NEVER;
            }
        }
    }

    /// After a loss of power: this write is under way still, its owner came after the loss.
    pub fn under_way(&mut self, unit: u64, id: u64, begun: u64) {
        for v in self.unit(unit) {
            if v.id == id && v.begun == begun {
                (v.ended, v.dead) = (NEVER, NEVER);
            }
        }
    }

    /// A read that began at `begun` returned `id` at `now`.
    ///
    /// # Errors
    /// What is wrong about it.
    pub fn read(&mut self, unit: u64, id: u64, begun: u64, now: u64) -> Result<(), String> {
        self.judged += 1;
        let values = self.unit(unit);
        let mut alive = (0..values.len()).filter(|&i| values[i].id == id && values[i].dead >= begun);
        let Some(w) = alive.next() else {
            let why = match values.iter().find(|v| v.id == id) {
                Some(_) => "it was overwritten before",
                None => "it was never written there",
            };
            return Err(format!(
                "sector {unit}: a read from {begun} to {now} returned {id:#x}, but {why}; history: {values:x?}"
            ));
        };
        if alive.next().is_some() {
            return Ok(());
        }
        let saw = values[w].begun;
        for (i, v) in values.iter_mut().enumerate() {
            if i != w && (v.over() < saw || v.acked == NEVER && v.ended < begun) {
                v.dead = v.dead.min(now);
            }
        }
        Ok(())
    }

    /// Every unit that was ever written or read.
    pub fn touched(&self) -> Vec<u64> {
        self.units.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(checker: &mut Checker, id: u64, at: u64) {
        checker.begin(1, id, at);
        checker.acked(1, id, at, at + 1, 0);
    }

    #[test]
    fn a_read_sees_old_or_new_and_never_goes_back() {
        let mut checker = Checker::default();
        checker.begin(1, 10, 1);
        checker.read(1, 0, 2, 3).unwrap();
        checker.read(1, 10, 4, 5).unwrap();
        checker.read(1, 0, 6, 7).unwrap_err();
        checker.read(1, 11, 6, 7).unwrap_err();
    }

    #[test]
    fn an_acknowledged_write_stays_and_a_flushed_one_outlives_power() {
        let mut checker = Checker::default();
        written(&mut checker, 10, 1);
        checker.read(1, 0, 3, 4).unwrap_err();
        checker.flushed(5);
        written(&mut checker, 11, 6);
        checker.read(1, 10, 8, 9).unwrap_err();
        checker.power_lost(10);
        checker.read(1, 0, 11, 12).unwrap_err();
        checker.clone().read(1, 11, 11, 12).unwrap();
        checker.read(1, 10, 11, 12).unwrap();
        checker.read(1, 11, 13, 14).unwrap_err();
    }

    #[test]
    fn power_does_not_undo_a_flush_twice() {
        let mut checker = Checker::default();
        written(&mut checker, 10, 1);
        checker.flushed(5);
        checker.power_lost(6);
        checker.power_lost(7);
        checker.read(1, 0, 8, 9).unwrap_err();
        checker.read(1, 10, 8, 9).unwrap();
    }

    #[test]
    fn a_write_that_never_ended_is_decided_by_the_first_read() {
        let mut checker = Checker::default();
        checker.begin(1, 10, 1);
        checker.failed(1, 10, 1, 2);
        checker.read(1, 0, 3, 4).unwrap();
        checker.read(1, 10, 5, 6).unwrap_err();
    }

    #[test]
    fn a_read_that_overlaps_an_overwrite_may_return_either() {
        let mut checker = Checker::default();
        written(&mut checker, 10, 1);
        checker.begin(1, 11, 5);
        checker.acked(1, 11, 5, 9, 0);
        checker.read(1, 10, 8, 12).unwrap();
        checker.read(1, 10, 10, 12).unwrap_err();
    }
}
