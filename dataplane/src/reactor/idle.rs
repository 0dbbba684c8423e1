//! When a reactor that finds nothing to do goes to sleep.
//!
//! While there was work within the last [`SPIN`] it polls on; then it sleeps. Waking by an eventfd costs some 50 us, so
//! polling for about as long bounds what is wasted to what a wake-up would have cost (the classic competitive argument).
//! While it has requests in hand that a disk or a peer is to answer, work is sure to come, and it polls for up to
//! [`SPIN_IN_HAND`]: about as long as a disk without moving parts takes.
//! The clock is only read on turns without work. On a core that others want ([`crowd`](super::crowd)) it sleeps at once: they
//! would have to wait for the end of the polling, and the one it polls for may be among them.

use std::time::{Duration, Instant};

/// How long a reactor polls on after the last work it saw.
pub const SPIN: Duration = Duration::from_micros(64);
/// The same while requests are in hand.
pub const SPIN_IN_HAND: Duration = Duration::from_micros(1000);

/// What a reactor that found no work could wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prospect {
    /// Others want the core.
    Shared,
    /// Requests are in hand: answers will come.
    InHand,
    /// Nothing that would be known of.
    Nothing,
}

/// What to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// Go on polling.
    Spin,
    /// Arm the watches, look once more, sleep.
    Sleep,
}

/// See the module.
#[derive(Debug, Default)]
pub struct IdlePolicy {
    idle_since: Option<Instant>,
}

impl IdlePolicy {
    /// To be told at the end of each turn whether it found work; the others are called only if it found none, `now` only on
    /// a core of its own.
    #[inline]
    pub fn turn(
        &mut self,
        worked: bool,
        prospect: impl FnOnce() -> Prospect,
        now: impl FnOnce() -> Instant,
    ) -> Idle {
        if worked {
            self.idle_since = None;
            return Idle::Spin;
        }
        let spin = match prospect() {
            Prospect::Shared => return Idle::Sleep,
            Prospect::InHand => SPIN_IN_HAND,
            Prospect::Nothing => SPIN,
        };
        let now = now();
        let since = *self.idle_since.get_or_insert(now);
        if now.saturating_duration_since(since) < spin {
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
        for (prospect, spell) in [(Prospect::Nothing, SPIN), (Prospect::InHand, SPIN_IN_HAND)] {
            let mut policy = IdlePolicy::default();
            let mut idle = |at| policy.turn(false, || prospect, || start + at);
            let instant = Duration::from_micros(1);
            assert_eq!(idle(Duration::ZERO), Idle::Spin);
            assert_eq!(idle(spell - instant), Idle::Spin);
            assert_eq!(idle(spell), Idle::Sleep);
            assert_eq!(
                policy.turn(
                    true,
                    || unreachable!("there is work"),
                    || unreachable!("no clock on a busy turn")
                ),
                Idle::Spin
            );
            let mut idle = |at| policy.turn(false, || prospect, || start + at);
            assert_eq!(idle(spell + instant), Idle::Spin);
            assert_eq!(idle(2 * spell), Idle::Spin);
            assert_eq!(idle(2 * spell + instant), Idle::Sleep);
        }
    }

    #[test]
    fn does_not_poll_where_others_wait() {
        let mut policy = IdlePolicy::default();
        let no_clock = || unreachable!("no clock on a shared core");
        assert_eq!(policy.turn(true, || Prospect::Shared, no_clock), Idle::Spin);
        assert_eq!(policy.turn(false, || Prospect::Shared, no_clock), Idle::Sleep);
    }
}
