//! The reactor's io_uring: one for everything the reactor waits for.
//!
//! Requests are queued by [`Ring::push`] and go to the kernel together, by the one `io_uring_enter` of a turn:
//! [`Ring::submit`] while polling, [`Ring::wait`] when going to sleep. Both leave out the system call where there is
//! nothing to submit and nothing to be had. Completions are routed by a [`Tag`].
//!
//! Invariants: used by one thread only, the one that made it; the submission queue being full is back-pressure
//! ([`RingFull`]), never a hidden system call.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

/// Who a completion is for.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Nobody waits for it: a notification that failed, a watch that was taken off.
    Nobody = 0,
    /// A disk; the tag's index is the disk's own.
    Disk = 1,
    /// A watched eventfd of a device queue.
    Kick = 2,
    /// The reactor's own wake-up.
    Wake = 3,
    /// A connection.
    Connection = 4,
    /// Anything else the loop has a use for.
    Other = 5,
    /// A call to the driver of a device queue.
    Call = 6,
}

/// Routes a completion: `owner` is one of its kind (24 bits), `index` means something to that owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag {
    /// What sort of owner.
    pub kind: Kind,
    /// Which of them, below 2^24.
    pub owner: u32,
    /// The owner's own number.
    pub index: u32,
}

impl Tag {
    /// For completions that nobody waits for.
    pub const NOBODY: Tag = Tag {
        kind: Kind::Nobody,
        owner: 0,
        index: 0,
    };

    #[inline]
    fn pack(self) -> u64 {
        debug_assert!(self.owner < 1 << 24);
        (self.kind as u64) << 56 | u64::from(self.owner & 0x00ff_ffff) << 32 | u64::from(self.index)
    }

    #[inline]
    fn unpack(data: u64) -> Self {
        let kind = match data >> 56 {
            1 => Kind::Disk,
            2 => Kind::Kick,
            3 => Kind::Wake,
            4 => Kind::Connection,
            5 => Kind::Other,
            6 => Kind::Call,
            _ => Kind::Nobody,
        };
        Tag {
            kind,
            owner: (data >> 32) as u32 & 0x00ff_ffff,
            index: data as u32,
        }
    }
}

/// A completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Who it is for.
    pub tag: Tag,
    /// The system call's result, negative: an errno.
    pub result: i32,
    /// More will come for the same request (a watch is still on).
    pub more: bool,
}

/// The submission queue is full: submit, then try again next turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the submission queue is full")]
pub struct RingFull;

/// What a ring has done, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingStats {
    /// Calls of `io_uring_enter`.
    pub enters: u64,
    /// Of these: calls that were allowed to block.
    pub waits: u64,
    /// Requests queued.
    pub requests: u64,
    /// Completions taken.
    pub completions: u64,
    /// Completions for nobody that were errors (a notification that could not be delivered).
    pub unwanted_errors: u64,
}

/// Files that can be registered with one ring.
pub const FILES_MAX: u32 = 256;
/// Spans of memory that can be registered with one ring, each at most 1 GiB.
pub const SPANS_MAX: u32 = 64;
const SPAN_BYTES_MAX: usize = 1 << 30;

static ONE: u64 = 1;

/// Registered memory, or a free place if it has no bytes.
#[derive(Clone, Copy, Default)]
struct Span {
    base: usize,
    bytes: usize,
    /// Base of the registration it is a part of.
    of: usize,
}

/// See the module.
pub struct Ring {
    inner: IoUring,
    stats: RingStats,
    /// Registered memory; the position is the kernel's index.
    spans: Vec<Span>,
    files: Vec<bool>,
    taskrun_flag: bool,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring with room for `entries` requests a turn (rounded up to a power of two) and four times as many completions.
    /// To be called on the thread that will use it.
    ///
    /// # Errors
    /// When the kernel refuses: io_uring switched off (`kernel.io_uring_disabled`), or no memory.
    pub fn new(entries: u32) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder
            .setup_clamp()
            .setup_cqsize(entries.saturating_mul(4))
            .setup_coop_taskrun()
            .setup_taskrun_flag();
        // Completions are worked off where we ask for them and nowhere else: fewer interruptions, warmer caches.
        let deferred = builder
            .clone()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(entries);
        let (inner, taskrun_flag) = match deferred.or_else(|_| builder.build(entries)) {
            Ok(inner) => (inner, true),
            Err(_) => (IoUring::builder().setup_clamp().build(entries)?, false),
        };
        Self::from_inner(inner, taskrun_flag)
    }

    /// A ring whose completions are polled from the device; it takes reads and writes on O_DIRECT files only.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn new_iopoll(entries: u32) -> io::Result<Self> {
        let inner = IoUring::builder()
            .setup_clamp()
            .setup_iopoll()
            .setup_single_issuer()
            .build(entries)?;
        Self::from_inner(inner, false)
    }

    fn from_inner(inner: IoUring, taskrun_flag: bool) -> io::Result<Self> {
        // Both tables need kernel 5.19; without them everything works, a little slower.
        let files = match inner.submitter().register_files_sparse(FILES_MAX) {
            Ok(()) => vec![false; FILES_MAX as usize],
            Err(_) => Vec::new(),
        };
        let spans = match inner.submitter().register_buffers_sparse(SPANS_MAX) {
            Ok(()) => vec![Span::default(); SPANS_MAX as usize],
            Err(_) => Vec::new(),
        };
        Ok(Ring {
            inner,
            stats: RingStats::default(),
            spans,
            files,
            taskrun_flag,
        })
    }

    /// Counters.
    pub fn stats(&self) -> RingStats {
        self.stats
    }

    /// Requests that can be pushed before the next submit.
    pub fn room(&mut self) -> usize {
        let queue = self.inner.submission();
        queue.capacity() - queue.len()
    }

    /// Completions that fit into the queue; a good capacity for the vector given to [`Ring::reap`].
    pub fn events_max(&self) -> usize {
        self.inner.params().cq_entries() as usize
    }

    /// Queues a request; its completion will carry `tag`.
    ///
    /// # Errors
    /// [`RingFull`]: nothing was queued.
    ///
    /// # Safety
    /// All memory and descriptors the request names stay valid until its completion was taken, memory that it writes is
    /// not referenced by anyone meanwhile, and all this holds as well if the ring is dropped before.
    #[inline]
    pub unsafe fn push(&mut self, entry: squeue::Entry, tag: Tag) -> Result<(), RingFull> {
        let entry = entry.user_data(tag.pack());
        // SAFETY: the caller's obligation, word for word.
        unsafe { self.inner.submission().push(&entry) }.map_err(|_| RingFull)?;
        self.stats.requests += 1;
        Ok(())
    }

    /// One turn's system call, left out if nothing is queued and the kernel holds nothing back for us. True: it was made.
    ///
    /// # Errors
    /// Only what means that the ring can not be used any more.
    #[inline]
    pub fn submit(&mut self) -> io::Result<bool> {
        let queue = self.inner.submission();
        let needed = !queue.is_empty() || queue.taskrun() || queue.cq_overflow();
        drop(queue);
        if needed {
            self.stats.enters += 1;
            forgiving(self.inner.submit())?;
        }
        Ok(needed)
    }

    /// Polls an IOPOLL ring for completions, and submits.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn submit_and_poll(&mut self) -> io::Result<()> {
        self.stats.enters += 1;
        forgiving(self.inner.submit())
    }

    /// Submits, then blocks until there is a completion, `timeout` has passed or a signal came. `None`: no time limit.
    ///
    /// # Errors
    /// As [`Ring::submit`].
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if !self.inner.completion().is_empty() {
            return self.submit().map(drop);
        }
        self.stats.enters += 1;
        self.stats.waits += 1;
        match timeout {
            None => forgiving(self.inner.submit_and_wait(1)),
            Some(timeout) => {
                let timeout = types::Timespec::from(timeout);
                let args = types::SubmitArgs::new().timespec(&timeout);
                forgiving(self.inner.submitter().submit_with_args(1, &args))
            }
        }
    }

    /// Appends all completions that have arrived. Give it a vector of [`Ring::events_max`] and nothing is allocated.
    #[inline]
    pub fn reap(&mut self, events: &mut Vec<Event>) -> usize {
        let before = events.len();
        for entry in self.inner.completion() {
            let event = Event {
                tag: Tag::unpack(entry.user_data()),
                result: entry.result(),
                more: cqueue::more(entry.flags()),
            };
            if event.tag.kind == Kind::Nobody && event.result < 0 {
                self.stats.unwanted_errors += 1;
            }
            events.push(event);
        }
        let count = events.len() - before;
        self.stats.completions += count as u64;
        count
    }

    /// Reports every write to an eventfd, with `tag`, until an event comes without `more`: then watch again.
    /// A write that came before is reported at once.
    ///
    /// # Errors
    /// [`RingFull`].
    pub fn watch(&mut self, fd: RawFd, tag: Tag) -> Result<(), RingFull> {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32)
            .multi(true)
            .build();
        // SAFETY: no memory is named; the kernel takes its own reference to the file when the request is submitted. A
        // descriptor closed before that makes the watch fail or watch another file: spurious events, no more.
        unsafe { self.push(entry, tag) }
    }

    /// Takes the watch with this tag off. A last event with the tag (`ECANCELED`) comes.
    ///
    /// # Errors
    /// [`RingFull`].
    pub fn unwatch(&mut self, tag: Tag) -> Result<(), RingFull> {
        let entry = opcode::PollRemove::new(tag.pack()).build();
        // SAFETY: neither memory nor a descriptor is named.
        unsafe { self.push(entry, Tag::NOBODY) }
    }

    /// Adds one to an eventfd, with the turn's submit. Nothing is reported unless it fails, and then it is counted.
    ///
    /// On a descriptor without `O_NONBLOCK` the kernel hands the write to a worker thread, which is slower; it is not
    /// ours to change a flag of the peer's file.
    ///
    /// # Errors
    /// [`RingFull`].
    ///
    /// # Safety
    /// `fd` stays open until the next submit: its number could otherwise belong to another file by then.
    #[inline]
    pub unsafe fn notify(&mut self, fd: RawFd) -> Result<(), RingFull> {
        let entry = opcode::Write::new(types::Fd(fd), (&raw const ONE).cast(), 8)
            .build()
            .flags(squeue::Flags::SKIP_SUCCESS);
        // SAFETY: the eight bytes are static and only read; the descriptor is the caller's obligation.
        unsafe { self.push(entry, Tag::NOBODY) }
    }

    /// As [`Ring::notify`], but its end is reported with `tag`: for descriptors that may block the write for ever.
    ///
    /// # Errors
    /// [`RingFull`].
    ///
    /// # Safety
    /// `fd` stays open until the completion.
    #[inline]
    pub unsafe fn notify_as(&mut self, fd: RawFd, tag: Tag) -> Result<(), RingFull> {
        let entry = opcode::Write::new(types::Fd(fd), (&raw const ONE).cast(), 8).build();
        // SAFETY: the eight bytes are static and only read; the descriptor is the caller's obligation.
        unsafe { self.push(entry, tag) }
    }

    /// Ends a request early, if it can be. Its completion comes in any case.
    ///
    /// # Errors
    /// [`RingFull`].
    pub fn cancel(&mut self, tag: Tag) -> Result<(), RingFull> {
        let entry = opcode::AsyncCancel::new(tag.pack()).build();
        // SAFETY: neither memory nor a descriptor is named.
        unsafe { self.push(entry, Tag::NOBODY) }
    }

    /// Registers a file: requests on it save the look-up. `None`: no table or no room, use the descriptor itself.
    pub fn register_file(&mut self, fd: RawFd) -> Option<u32> {
        let slot = self.files.iter().position(|used| !used)?;
        self.inner
            .submitter()
            .register_files_update(slot as u32, &[fd])
            .ok()?;
        self.files[slot] = true;
        Some(slot as u32)
    }

    /// Gives a registered file's place back.
    pub fn unregister_file(&mut self, slot: u32) {
        if self.inner.submitter().register_files_update(slot, &[-1]).is_ok() {
            self.files[slot as usize] = false;
        }
    }

    /// Registers private memory: direct I/O into it saves the pinning of its pages each time. All of it is made resident
    /// now. False: not done (no table, no room, locked-memory limit); the memory can be used all the same.
    ///
    /// # Safety
    /// The mapping stays as it is until [`Ring::unregister_memory`] or until the ring is dropped, and belongs to this
    /// process alone (it is no guest's).
    pub unsafe fn register_memory(&mut self, base: *mut u8, bytes: usize) -> bool {
        let parts = bytes.div_ceil(SPAN_BYTES_MAX);
        if self.spans.iter().filter(|span| span.bytes == 0).count() < parts {
            return false;
        }
        for part in 0..parts {
            let from = part * SPAN_BYTES_MAX;
            let len = (bytes - from).min(SPAN_BYTES_MAX);
            let slot = self
                .spans
                .iter()
                .position(|span| span.bytes == 0)
                .expect("counted above");
            if self.set_span(slot, base.wrapping_add(from), len).is_err() {
                self.unregister_memory(base);
                return false;
            }
            self.spans[slot] = Span {
                base: base as usize + from,
                bytes: len,
                of: base as usize,
            };
        }
        true
    }

    /// Takes memory registered from `base` on off the ring. True: the ring knows nothing of it any more.
    pub fn unregister_memory(&mut self, base: *mut u8) -> bool {
        for slot in 0..self.spans.len() {
            if self.spans[slot].bytes == 0 || self.spans[slot].of != base as usize {
                continue;
            }
            if self.set_span(slot, std::ptr::null_mut(), 0).is_err() {
                return false;
            }
            self.spans[slot].bytes = 0;
        }
        true
    }

    fn set_span(&self, slot: usize, base: *mut u8, len: usize) -> io::Result<()> {
        let iov = libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        };
        // SAFETY: an empty entry frees the slot; any other is the memory that `register_memory`'s caller vouches for.
        unsafe {
            self.inner
                .submitter()
                .register_buffers_update(slot as u32, &[iov], None)
        }
    }

    /// The kernel's index of the registered memory that holds these bytes, if it does.
    #[inline]
    pub fn registered(&self, ptr: *const u8, len: usize) -> Option<u16> {
        let at = ptr as usize;
        debug_assert!(len > 0);
        self.spans
            .iter()
            .position(|span| {
                at >= span.base && at - span.base < span.bytes && len <= span.bytes - (at - span.base)
            })
            .map(|index| index as u16)
    }

    /// Completions are worked off only inside our own system calls.
    pub fn is_deferred(&self) -> bool {
        self.taskrun_flag
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.inner.as_raw_fd()
    }
}

/// A signal, a timeout and a momentary lack of room are not failures of the ring: the loop looks and comes again.
fn forgiving(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Ok(_) => Ok(()),
        Err(e) => match e.raw_os_error() {
            Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => Ok(()),
            _ => Err(e),
        },
    }
}
