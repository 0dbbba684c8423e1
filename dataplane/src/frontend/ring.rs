//! The three parts of a split virtqueue (virtio 1.2, 2.7) as raw memory that somebody else writes at the same time.
//!
//! Every access is a single atomic or volatile one through a pointer resolved when the queue was started. Nothing read
//! here may be believed twice: callers copy a value and check the copy. Which values make sense is `queue`'s business.

use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use super::guest::MemoryTable;

/// A descriptor goes on at `next`.
pub(crate) const DESC_NEXT: u16 = 1;
/// A descriptor's memory is written by the device.
pub(crate) const DESC_WRITE: u16 = 2;
/// A descriptor names a table of descriptors.
pub(crate) const DESC_INDIRECT: u16 = 4;
/// Bytes of a descriptor.
pub(crate) const DESC_SIZE: usize = 16;

const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// A copy of a descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Desc {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

/// Copies 16 bytes that another process may be writing.
///
/// # Safety
/// The 16 bytes at `ptr` are mapped.
#[inline]
pub(crate) unsafe fn read16(ptr: *const u8) -> [u64; 2] {
    if ptr.addr().is_multiple_of(8) {
        let words = ptr.cast::<u64>();
        // SAFETY: mapped (caller) and aligned (just checked); volatile, since the other side may write it now.
        unsafe { [words.read_volatile(), words.add(1).read_volatile()] }
    } else {
        let mut bytes = [0u8; 16];
        for (i, byte) in bytes.iter_mut().enumerate() {
            // SAFETY: mapped (caller).
            *byte = unsafe { ptr.add(i).read_volatile() };
        }
        let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
        [word(0), word(8)]
    }
}

impl Desc {
    /// Copies the descriptor at `ptr`.
    ///
    /// # Safety
    /// As for [`read16`].
    #[inline]
    pub(crate) unsafe fn read(ptr: *const u8) -> Self {
        // SAFETY: passed on.
        let [addr, rest] = unsafe { read16(ptr) };
        let rest = u64::from_le(rest);
        Desc {
            addr: u64::from_le(addr),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }
}

/// Resolved pointers to a queue's rings.
#[derive(Debug)]
pub(crate) struct Ring {
    desc: *const u8,
    avail: *mut u8,
    used: *mut u8,
    mask: u16,
}

impl Ring {
    /// Resolves the rings of a queue of `size` (a power of two) at these addresses of the front end's address space.
    /// `None` if a part is not in shared memory as a whole or is misaligned. `memory` must outlive the ring.
    pub(crate) fn new(memory: &MemoryTable, size: u16, desc: u64, avail: u64, used: u64) -> Option<Self> {
        let n = u64::from(size);
        let desc = memory.user(desc, n * 16)?;
        let avail = memory.user(avail, n * 2 + 6)?;
        let used = memory.user(used, n * 8 + 6)?;
        let aligned =
            desc.addr().is_multiple_of(16) && avail.addr().is_multiple_of(2) && used.addr().is_multiple_of(4);
        (aligned && size.is_power_of_two()).then_some(Ring {
            desc,
            avail,
            used,
            mask: size - 1,
        })
    }

    /// Entries of the queue.
    #[inline]
    pub(crate) fn size(&self) -> u16 {
        self.mask + 1
    }

    #[inline]
    fn u16_at(&self, base: *mut u8, offset: usize) -> &AtomicU16 {
        // SAFETY: callers pass offsets within the ring parts, whose mapping and alignment `new` checked and the queue's
        // memory table keeps; an atomic tolerates writes by the other side.
        unsafe { AtomicU16::from_ptr(base.add(offset).cast()) }
    }

    /// Where descriptor `index` is. `index` is below the queue's size.
    #[inline]
    pub(crate) fn desc_ptr(&self, index: u16) -> *const u8 {
        debug_assert!(index <= self.mask);
        self.desc.wrapping_add(usize::from(index) * DESC_SIZE)
    }

    /// Copies descriptor `index`, which is below the queue's size.
    #[inline]
    pub(crate) fn desc(&self, index: u16) -> Desc {
        assert!(index <= self.mask);
        // SAFETY: inside the table (asserted), which is mapped.
        unsafe { Desc::read(self.desc_ptr(index)) }
    }

    /// The driver's index: how many heads it made available so far. What it wrote before is visible afterwards.
    #[inline]
    pub(crate) fn avail_idx(&self) -> u16 {
        u16::from_le(self.u16_at(self.avail, 2).load(Ordering::Acquire))
    }

    /// The head at `position` of the available ring, unchecked.
    #[inline]
    pub(crate) fn head(&self, position: u16) -> u16 {
        let at = 4 + usize::from(position & self.mask) * 2;
        u16::from_le(self.u16_at(self.avail, at).load(Ordering::Relaxed))
    }

    /// The driver wants no interrupts (meaningless with EVENT_IDX).
    #[inline]
    pub(crate) fn no_interrupt(&self) -> bool {
        u16::from_le(self.u16_at(self.avail, 0).load(Ordering::Relaxed)) & NO_INTERRUPT != 0
    }

    /// The used position after which the driver wants an interrupt (EVENT_IDX).
    #[inline]
    pub(crate) fn used_event(&self) -> u16 {
        let at = 4 + usize::from(self.size()) * 2;
        u16::from_le(self.u16_at(self.avail, at).load(Ordering::Relaxed))
    }

    /// The device's index as it stands in memory.
    #[inline]
    pub(crate) fn used_idx(&self) -> u16 {
        u16::from_le(self.u16_at(self.used, 2).load(Ordering::Acquire))
    }

    /// Fills the used element at `position`; seen by the driver once the index passes it.
    #[inline]
    pub(crate) fn set_used(&self, position: u16, head: u16, len: u32) {
        let at = 4 + usize::from(position & self.mask) * 8;
        for (offset, value) in [(at, u32::from(head)), (at + 4, len)] {
            // SAFETY: inside the used ring, mapped and aligned to 4 (checked in `new`).
            let word = unsafe { AtomicU32::from_ptr(self.used.add(offset).cast()) };
            word.store(value.to_le(), Ordering::Relaxed);
        }
    }

    /// Hands all used elements below `idx` to the driver.
    #[inline]
    pub(crate) fn set_used_idx(&self, idx: u16) {
        self.u16_at(self.used, 2).store(idx.to_le(), Ordering::Release);
    }

    /// Asks the driver (not) to kick; without EVENT_IDX.
    #[inline]
    pub(crate) fn set_no_notify(&self, on: bool) {
        let flags: u16 = if on { NO_NOTIFY } else { 0 };
        self.u16_at(self.used, 0).store(flags.to_le(), Ordering::Relaxed);
    }

    /// Asks the driver to kick when it makes the head at this position available (EVENT_IDX).
    #[inline]
    pub(crate) fn set_avail_event(&self, position: u16) {
        let at = 4 + usize::from(self.size()) * 8;
        self.u16_at(self.used, at)
            .store(position.to_le(), Ordering::Relaxed);
    }
}

// SAFETY: the pointers stay valid on any thread while the queue holds its memory table, and every access is atomic or
// volatile.
unsafe impl Send for Ring {}
