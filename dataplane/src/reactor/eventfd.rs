//! Eventfds: how a sleeping reactor is reached.
//!
//! A reactor never reads one: it watches it with an edge-triggered multishot poll ([`Ring::watch`]), which reports every
//! write whatever the counter's value. The counter is 64 bits wide and raised at most once a sleep, so it can not fill.
//!
//! [`Ring::watch`]: super::ring::Ring::watch

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// A non-blocking eventfd of our own.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new one, at zero.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointer is passed.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is fresh and nobody else's.
        Ok(EventFd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Adds one: a system call, for threads without a ring. A reactor uses [`Ring::notify`](super::ring::Ring::notify).
    pub fn raise(&self) {
        let one = 1u64;
        // SAFETY: eight readable bytes. The only failure is a full counter, and then the reader has been woken already.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Takes the count, zero if it was not raised.
    pub fn take(&self) -> u64 {
        let mut count = 0u64;
        // SAFETY: eight writable bytes; the descriptor is non-blocking, and on failure `count` stays zero.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
        count
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
