//! Bounded lock-free mailboxes into a reactor, and how a sleeping reactor is woken.
//!
//! Sleep and wake, with no lost wake-up (Dekker's pattern):
//!
//! ```text
//! reactor                                   sender
//!   asleep = true                             push the message
//!   fence(SeqCst)                             fence(SeqCst)
//!   look at all mailboxes and queues          if asleep: asleep = false, raise the eventfd
//!   something there: asleep = false, work
//!   else: block in the ring, which watches the eventfd
//! ```
//!
//! Of two `SeqCst` fences one comes first. If the reactor's does, the sender sees `asleep` and raises the eventfd; the
//! watch reports it even if the reactor has not blocked yet. If the sender's does, the reactor's look sees the message.
//! The flag is taken by a swap, so a burst of messages costs one wake-up.
//!
//! Guests are woken for by their kick eventfd, which the ring watches as well; the loop re-enables notifications before
//! the same last look.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use crossbeam_queue::ArrayQueue;

use super::bell::Bell;
use super::eventfd::EventFd;

/// The door bell of one reactor, shared by all who send to it.
#[derive(Debug)]
#[repr(align(128))]
pub struct Waker {
    bell: Bell,
    event: EventFd,
}

impl Waker {
    /// A bell for one reactor; awake.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Waker {
            bell: Bell::new(),
            event: EventFd::new()?,
        }))
    }

    /// After a message was pushed: does the reactor have to be woken? If so it is the caller who must raise
    /// [`Waker::fd`], at once or with the turn's submit ([`Ring::notify`](super::ring::Ring::notify)).
    #[inline]
    #[must_use = "true obliges to raise the eventfd"]
    pub fn must_wake(&self) -> bool {
        self.bell.must_wake()
    }

    /// Raises the eventfd, owed after [`Waker::must_wake`]: a system call, for when a ring has no room for it.
    pub fn raise(&self) {
        self.event.raise();
    }

    /// Wakes the reactor if it sleeps. A system call at most.
    #[inline]
    pub fn wake(&self) {
        if self.must_wake() {
            self.raise();
        }
    }

    /// The reactor is about to sleep; after this it must look at everything once more.
    #[inline]
    pub fn arm(&self) {
        self.bell.arm();
    }

    /// The reactor is up.
    #[inline]
    pub fn disarm(&self) {
        self.bell.disarm();
    }

    /// What the reactor's ring watches.
    pub fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

#[derive(Debug)]
struct Shared<T> {
    queue: ArrayQueue<T>,
    waker: Arc<Waker>,
}

/// The sending end; any number of them.
#[derive(Debug)]
pub struct Sender<T>(Arc<Shared<T>>);

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Sender(Arc::clone(&self.0))
    }
}

/// The receiving end, the reactor's.
#[derive(Debug)]
pub struct Receiver<T>(Arc<Shared<T>>);

/// A mailbox with room for `capacity` messages to the reactor behind `waker`.
pub fn mailbox<T: Send>(capacity: usize, waker: &Arc<Waker>) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        queue: ArrayQueue::new(capacity),
        waker: Arc::clone(waker),
    });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

impl<T> Sender<T> {
    /// Sends and wakes. For threads without a ring.
    ///
    /// # Errors
    /// The message back if the mailbox is full.
    pub fn send(&self, message: T) -> Result<(), T> {
        self.0.queue.push(message)?;
        self.0.waker.wake();
        Ok(())
    }

    /// Only pushes. The sender owes a [`Waker::must_wake`] (once after a batch) on [`Sender::waker`].
    ///
    /// # Errors
    /// The message back if the mailbox is full.
    #[inline]
    pub fn push(&self, message: T) -> Result<(), T> {
        self.0.queue.push(message)
    }

    /// The receiver's bell.
    #[inline]
    pub fn waker(&self) -> &Waker {
        &self.0.waker
    }
}

impl<T> Receiver<T> {
    /// The next message.
    #[inline]
    pub fn receive(&self) -> Option<T> {
        self.0.queue.pop()
    }

    /// Nothing there.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.0.queue.is_empty()
    }
}
