//! When a reactor that finds nothing to do goes to sleep.
//!
//! While there was work within the last [`SPIN`] it polls on; then it sleeps. Waking by an eventfd costs some 50 us, so
//! polling for about as long bounds what is wasted to what a wake-up would have cost (the classic competitive argument).
//! The clock is only read on turns without work.

use std::time::{Duration, Instant};

/// How long a reactor polls on after the last work it saw.
pub const SPIN: Duration = Duration::from_micros(64);

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Go on polling.
    Spin,
    /// Arm the watches, look once more, sleep.
    Sleep,
}

/// See the module.
#[derive(Debug)]
pub struct IdlePolicy {
    spin: Duration,
    idle_since: Option<Instant>,
}

impl Default for IdlePolicy {
    fn default() -> Self {
        Self::new(SPIN)
    }
}

impl IdlePolicy {
    /// Polls on for `spin` after the last work.
    pub fn new(spin: Duration) -> Self {
        IdlePolicy {
            spin,
            idle_since: None,
        }
    }

    /// To be told at the end of each turn whether it found work; `now` is called only if it did not.
    #[inline]
    pub fn turn(&mut self, worked: bool, now: impl FnOnce() -> Instant) -> Idle {
        if worked {
            self.idle_since = None;
            return Idle::Spin;
        }
        let now = now();
        let since = *self.idle_since.get_or_insert(now);
        if now.saturating_duration_since(since) < self.spin {
            std::hint::spin_loop();
            Idle::Spin
        } else {
            Idle::Sleep
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sleeps_only_after_a_whole_spell_without_work() {
        let start = Instant::now();
        let at = |us| move || start + Duration::from_micros(us);
        let mut policy = IdlePolicy::new(Duration::from_micros(50));
        assert_eq!(policy.turn(false, at(0)), Idle::Spin);
        assert_eq!(policy.turn(false, at(49)), Idle::Spin);
        assert_eq!(policy.turn(false, at(50)), Idle::Sleep);
        assert_eq!(
            policy.turn(true, || unreachable!("no clock on a busy turn")),
            Idle::Spin
        );
        assert_eq!(policy.turn(false, at(60)), Idle::Spin);
        assert_eq!(policy.turn(false, at(109)), Idle::Spin);
        assert_eq!(policy.turn(false, at(110)), Idle::Sleep);
    }
}
