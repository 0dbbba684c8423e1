//! The register checker: is every unit of a volume (512 bytes here) a linearizable register?
//!
//! Every write carries an id of its own, so a read tells which write it saw; zeros are what trims and unwritten units
//! read as. A value is *dead* from the moment at which it is known to be overwritten: a later write was acknowledged or
//! seen. A read that began after its value died is a violation, and so is a value that was never written there.
//!
//! Writes that failed or whose owner died may have happened or not, until a read that began later tells.
//! After a loss of power on all replicas what was acknowledged but never flushed may be gone: values that died only by
//! unflushed writes may come back, until a read tells.

use std::collections::BTreeMap;

const NEVER: u64 = u64::MAX;

#[derive(Clone, Debug)]
struct Value {
    /// Zero: reads as zeros.
    id: u64,
    begun: u64,
    /// When it was acknowledged; `NEVER` for under way or failed.
    acked: u64,
    /// It failed, or its owner died, at this time.
    ended: u64,
    /// First time at which a read that returned it ended.
    seen: u64,
    /// No read that begins later may return it.
    dead: u64,
    /// Nor after a loss of power.
    dead_for_good: bool,
}

/// A volume's history, judged as it happens. Times come from the caller and never go back.
#[derive(Default)]
pub struct Checker {
    units: BTreeMap<u64, Vec<Value>>,
}

impl Checker {
    fn unit(&mut self, unit: u64) -> &mut Vec<Value> {
        self.units.entry(unit).or_insert_with(|| {
            vec![Value {
                id: 0,
                begun: 0,
                acked: 0,
                ended: NEVER,
                seen: NEVER,
                dead: NEVER,
                dead_for_good: false,
            }]
        })
    }

    /// A write of `id` to a unit is submitted. Id zero: zeros; then `op` tells it from other zeros.
    pub fn begin(&mut self, unit: u64, id: u64, now: u64) {
        self.unit(unit).push(Value {
            id,
            begun: now,
            acked: NEVER,
            ended: NEVER,
            seen: NEVER,
            dead: NEVER,
            dead_for_good: false,
        });
    }

    /// The write that began at `begun` was acknowledged.
    pub fn acked(&mut self, unit: u64, id: u64, begun: u64, now: u64) {
        let values = self.unit(unit);
        let Some(w) = values.iter().position(|v| v.id == id && v.begun == begun) else {
            return;
        };
        values[w].acked = now;
        for v in values.iter_mut() {
            if v.acked < begun || v.seen < begun || v.ended < begun && v.seen != NEVER {
                v.dead = v.dead.min(now);
            }
        }
        values.retain(|v| !(v.dead < NEVER && v.dead_for_good && v.dead + 1_000_000 < now));
    }

    /// The write failed: it may have happened.
    pub fn failed(&mut self, unit: u64, id: u64, begun: u64, now: u64) {
        for v in self.unit(unit) {
            if v.id == id && v.begun == begun {
                v.ended = now;
            }
        }
    }

    /// The owner died: what was under way may have happened.
    pub fn owner_died(&mut self, now: u64) {
        for v in self.units.values_mut().flatten() {
            if v.acked == NEVER && v.ended == NEVER {
                v.ended = now;
            }
        }
    }

    /// A flush that began at `begun` was acknowledged.
    pub fn flushed(&mut self, begun: u64) {
        for values in self.units.values_mut() {
            let latest = values.iter().filter(|v| v.acked < begun).map(|v| v.begun).max();
            for v in values.iter_mut() {
                let overwritten =
                    latest.is_some_and(|begun| v.acked < begun || v.ended < begun && v.dead < NEVER);
                v.dead_for_good |= overwritten;
            }
        }
    }

    /// All replicas lost power: what was not flushed may be gone.
    pub fn power_lost(&mut self, now: u64) {
        for values in self.units.values_mut() {
            for v in values.iter_mut() {
                if !v.dead_for_good {
                    v.dead = NEVER;
                    v.seen = NEVER;
                    if v.id != 0 || v.begun != 0 {
                        (v.acked, v.ended) = (NEVER, now);
                    }
                }
            }
        }
    }

    /// A read that began at `begun` returned `id`.
    ///
    /// # Errors
    /// What is wrong about it.
    pub fn read(&mut self, unit: u64, id: u64, begun: u64, now: u64) -> Result<(), String> {
        let values = self.unit(unit);
        let mut alive = values
            .iter()
            .enumerate()
            .filter(|(_, v)| v.id == id && v.dead >= begun);
        let Some((w, _)) = alive.next() else {
            let known: Vec<_> = values.iter().filter(|v| v.id == id).collect();
            return Err(format!(
                "unit {unit}: a read that began at {begun} returned {id} at {now}; {}; history {values:?}",
                if known.is_empty() {
                    "never written there"
                } else {
                    "overwritten before"
                },
            ));
        };
        if alive.next().is_some() {
            return Ok(());
        }
        let saw = values[w].clone();
        for (i, v) in values.iter_mut().enumerate() {
            if i == w {
                v.seen = v.seen.min(now);
                continue;
            }
            // It came before what was seen, or ended without effect.
            if v.acked < saw.begun || v.seen < begun || v.ended < begun && v.acked == NEVER {
                v.dead = v.dead.min(now);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_may_see_either_of_two_concurrent_writes_but_not_go_back() {
        let mut checker = Checker::default();
        checker.begin(1, 10, 1);
        checker.read(1, 0, 2, 3).unwrap();
        checker.read(1, 10, 4, 5).unwrap();
        checker.read(1, 0, 6, 7).unwrap_err();
        checker.read(1, 11, 6, 7).unwrap_err();
    }

    #[test]
    fn an_acknowledged_write_stays() {
        let mut checker = Checker::default();
        checker.begin(1, 10, 1);
        checker.acked(1, 10, 1, 2);
        checker.read(1, 0, 3, 4).unwrap_err();
        checker.read(1, 10, 3, 4).unwrap();
        checker.flushed(3);
        checker.begin(1, 11, 5);
        checker.acked(1, 11, 5, 6);
        checker.power_lost(7);
        checker.read(1, 0, 8, 9).unwrap_err();
        checker.read(1, 10, 8, 9).unwrap();
        checker.read(1, 11, 10, 11).unwrap_err();
    }

    #[test]
    fn an_unfinished_write_is_decided_by_the_first_read() {
        let mut checker = Checker::default();
        checker.begin(1, 10, 1);
        checker.owner_died(2);
        checker.read(1, 0, 3, 4).unwrap();
        checker.read(1, 10, 5, 6).unwrap_err();
    }
}
