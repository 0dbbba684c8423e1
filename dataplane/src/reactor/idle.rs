//! When a reactor that finds nothing to do goes to sleep.
//!
//! While there was work within the last [`SPIN`] it polls on; then it sleeps. Waking by an eventfd costs some 50 us, so
//! polling for about as long bounds what is wasted to what a wake-up would have cost (the classic competitive argument).
//! The clock is only read on turns without work. On a core that others want ([`crowd`](super::crowd)) it sleeps at once: they
//! would have to wait for the end of the polling, and the one it polls for may be among them.

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

    /// To be told at the end of each turn whether it found work, and whether the core is shared; `now` is called only if it
    /// found none on a core of its own.
    #[inline]
    pub fn turn(&mut self, worked: bool, shared: bool, now: impl FnOnce() -> Instant) -> Idle {
        if worked {
            self.idle_since = None;
            return Idle::Spin;
        }
        if shared {
            return Idle::Sleep;
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
        assert_eq!(policy.turn(false, false, at(0)), Idle::Spin);
        assert_eq!(policy.turn(false, false, at(49)), Idle::Spin);
        assert_eq!(policy.turn(false, false, at(50)), Idle::Sleep);
        assert_eq!(
            policy.turn(true, false, || unreachable!("no clock on a busy turn")),
            Idle::Spin
        );
        assert_eq!(policy.turn(false, false, at(60)), Idle::Spin);
        assert_eq!(policy.turn(false, false, at(109)), Idle::Spin);
        assert_eq!(policy.turn(false, false, at(110)), Idle::Sleep);
    }
    #[test]
    fn does_not_poll_where_others_wait() {
        let mut policy = IdlePolicy::new(Duration::from_micros(50));
        let no_clock = || unreachable!("no clock on a shared core");
        assert_eq!(policy.turn(true, true, no_clock), Idle::Spin);
        assert_eq!(policy.turn(false, true, no_clock), Idle::Sleep);
    }
}
