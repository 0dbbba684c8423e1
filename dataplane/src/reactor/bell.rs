//! The flag by which a sleeping reactor is found, see [`mailbox`](super::mailbox) for the protocol.
//!
//! It is apart so that the loom test can run these very lines: the atomics come from the parent module.

use super::atomics::{AtomicBool, Ordering, fence};

/// Up, or about to sleep.
#[derive(Debug)]
pub(crate) struct Bell(AtomicBool);

impl Bell {
    pub(crate) fn new() -> Self {
        Bell(AtomicBool::new(false))
    }

    /// The reactor is about to sleep; after this it must look at everything once more.
    #[inline]
    pub(crate) fn arm(&self) {
        self.0.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The reactor is up.
    #[inline]
    pub(crate) fn disarm(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// After a message was pushed: must its sender wake the reactor?
    #[inline]
    pub(crate) fn must_wake(&self) -> bool {
        fence(Ordering::SeqCst);
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::Relaxed)
    }
}
