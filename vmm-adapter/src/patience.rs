//! How long something waits for a guest.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// So long, unless it is called off.
#[derive(Clone, Copy, Debug)]
pub struct Patience<'a> {
    timeout: Duration,
    off: Option<&'a AtomicBool>,
}

impl From<Duration> for Patience<'_> {
    fn from(timeout: Duration) -> Self {
        Patience { timeout, off: None }
    }
}

impl<'a> Patience<'a> {
    /// So long, and no longer once `off` is set.
    pub fn unless(off: &'a AtomicBool, timeout: Duration) -> Self {
        Patience {
            timeout,
            off: Some(off),
        }
    }

    /// When it ends.
    pub(crate) fn end(self) -> Instant {
        // A wait without end is one of many years.
        const LONGEST: Duration = Duration::from_secs(1 << 32);
        Instant::now() + self.timeout.min(LONGEST)
    }

    pub(crate) fn seconds(self) -> u64 {
        self.timeout.as_secs()
    }

    pub(crate) fn is_off(self) -> bool {
        self.off.is_some_and(|off| off.load(Ordering::Relaxed))
    }
}
