//! The toolbox of the polled loop: one io_uring, mailboxes, eventfds, pinning and the policy of when to sleep.
//!
//! The loop itself is not here. Invariants that it gets from here:
//! * One [`Ring`] per reactor, used only by the reactor's thread; at most one `io_uring_enter` per turn.
//! * Nothing between threads but bounded lock-free [`Mailbox`](mailbox)es and [`Waker`](mailbox::Waker)s.
//! * A reactor that goes to sleep is woken by whatever came after it last looked (argued in [`mailbox`]).
//!
//! Deliberately absent: async, timers beyond "wake me at", and any knowledge of disks or devices.

mod bell;
pub mod crowd;
pub mod eventfd;
pub mod idle;
pub mod mailbox;
pub mod pin;
pub mod ring;

pub use eventfd::EventFd;
pub use idle::{Idle, IdlePolicy, Prospect};
pub use ring::{Event, Kind, Ring, RingFull, RingStats, Tag};

/// What [`bell`] is built on; its loom test puts loom's in their place.
mod atomics {
    pub(crate) use std::sync::atomic::{AtomicBool, Ordering, fence};
}
