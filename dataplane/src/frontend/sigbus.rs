//! Survives a front end that truncates the file behind memory it shared with us.
//!
//! Touching a page that is gone raises SIGBUS, which would end the process and with it every other device. The handler
//! installed here looks the address up in a lock-free table of shared mappings; if it is one of them, all of that mapping
//! is covered with private zero pages, so that it can not fault again, and is marked poisoned: its device fails from then
//! on, nobody else notices. Any other SIGBUS goes to whoever handled it before.
//!
//! Invariants: the handler only loads and stores atomics and calls mmap and sigaction (plain system calls here); a slot's
//! range is registered before its memory is first touched and removed before it is unmapped.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicUsize, Ordering};

/// Most shared mappings of this process: memory regions and in-flight regions of all devices.
pub const MAPPINGS_MAX: usize = 32_768;

struct Slot {
    /// Zero: free. One: being filled.
    start: AtomicUsize,
    end: AtomicUsize,
    page: AtomicUsize,
    poisoned: AtomicBool,
}

static SLOTS: [Slot; MAPPINGS_MAX] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        poisoned: AtomicBool::new(false),
    }
}; MAPPINGS_MAX];

/// Slots at and above this were never used: the handler need not look there.
static SLOTS_USED: AtomicUsize = AtomicUsize::new(0);
/// Grows whenever some mapping becomes poisoned, so that queues notice with one load.
static POISONINGS: AtomicU32 = AtomicU32::new(0);
/// What handled SIGBUS before us. Leaked: the handler may run at any time.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

/// How many mappings were ever poisoned. Changes rarely; a queue compares it at each poll.
#[inline]
pub(crate) fn poisonings() -> u32 {
    POISONINGS.load(Ordering::Acquire)
}

/// A range known to the handler. Its owner calls [`Guard::release`] just before it unmaps the range.
#[derive(Debug)]
pub(crate) struct Guard(usize);

impl Guard {
    /// Registers `len` bytes at `start`, mapped in pages of `page` bytes.
    ///
    /// # Errors
    /// When the handler can not be installed or the table is full.
    pub(crate) fn new(start: usize, len: usize, page: usize) -> io::Result<Self> {
        install()?;
        for (i, slot) in SLOTS.iter().enumerate() {
            if slot
                .start
                .compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                slot.poisoned.store(false, Ordering::Relaxed);
                slot.page.store(page, Ordering::Relaxed);
                slot.start.store(start, Ordering::Release);
                slot.end.store(start + len, Ordering::Release);
                SLOTS_USED.fetch_max(i + 1, Ordering::AcqRel);
                return Ok(Guard(i));
            }
        }
        Err(io::Error::other(format!(
            "more than {MAPPINGS_MAX} shared mappings"
        )))
    }

    /// Forgets the range. Called once, before it is unmapped: afterwards the addresses may be somebody else's.
    pub(crate) fn release(&mut self) {
        // The end first: a handler that looks at the slot now finds an empty range, also if the slot is taken anew meanwhile.
        SLOTS[self.0].end.store(0, Ordering::Release);
        SLOTS[self.0].start.store(0, Ordering::Release);
    }

    /// The file behind the mapping was truncated under us.
    pub(crate) fn poisoned(&self) -> bool {
        SLOTS[self.0].poisoned.load(Ordering::Acquire)
    }
}

fn install() -> io::Result<()> {
    static DONE: OnceLock<Option<i32>> = OnceLock::new();
    let failed = *DONE.get_or_init(|| {
        // SAFETY: an all-zero sigaction is a valid value of that C structure.
        let (mut new, mut old): (libc::sigaction, libc::sigaction) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        // SAFETY: only asks for the present action into our own variable.
        if unsafe { libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut old) } != 0 {
            return io::Error::last_os_error().raw_os_error();
        }
        PREVIOUS.store(Box::into_raw(Box::new(old)), Ordering::Release);
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
        new.sa_sigaction = handler as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `new` is fully set up and the handler is async-signal-safe (module rule).
        if unsafe { libc::sigaction(libc::SIGBUS, &new, std::ptr::null_mut()) } != 0 {
            return io::Error::last_os_error().raw_os_error();
        }
        None
    });
    failed.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: errno is thread-local and always there; the interrupted code must find it unchanged.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler; SIGBUS fills in the address.
    let address = unsafe { (*info).si_addr() } as usize;
    if !cover(address) {
        // Not ours: the instruction faults again and meets the previous action.
        // SAFETY: PREVIOUS was set before the handler was installed and is never freed.
        unsafe {
            libc::sigaction(
                libc::SIGBUS,
                PREVIOUS.load(Ordering::Acquire),
                std::ptr::null_mut(),
            )
        };
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Covers the hole at `address` if it lies in a registered mapping.
fn cover(address: usize) -> bool {
    for slot in &SLOTS[..SLOTS_USED.load(Ordering::Acquire)] {
        let end = slot.end.load(Ordering::Acquire);
        let start = slot.start.load(Ordering::Acquire);
        let page = slot.page.load(Ordering::Relaxed);
        // Filled in this order, emptied in the other: an end that is still the same belongs to this start.
        if start <= 1 || address < start || address >= end || slot.end.load(Ordering::Acquire) != end {
            continue;
        }
        slot.poisoned.store(true, Ordering::Release);
        POISONINGS.fetch_add(1, Ordering::AcqRel);
        // SAFETY: the range lies in a mapping that stays mapped while it is registered, and whoever owns it touches it
        // only through raw pointers and atomics, which tolerate that its contents change.
        // One mapping in the place of one: however often the file is truncated, no more of them are used up.
        return unsafe { patch(start, end - start) || patch(address / page * page, page) };
    }
    false
}

/// Puts private zero pages over a range.
///
/// # Safety
/// The range is part of a registered mapping.
unsafe fn patch(from: usize, len: usize) -> bool {
    // SAFETY: the caller's obligation: the range is ours to map over.
    let patched = unsafe {
        libc::mmap(
            from as *mut libc::c_void,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
            -1,
            0,
        )
    };
    patched != libc::MAP_FAILED
}
