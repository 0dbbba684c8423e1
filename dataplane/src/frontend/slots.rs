//! The memory of a queue's requests in flight: one slot for each descriptor head, and room for long segment lists.
//!
//! It is one private mapping that costs memory only where it was touched, so that an idle queue costs next to nothing.
//! Slots and lists stay where they are until the queue is dropped: the payloads of requests point into them.

use std::io;
use std::ptr::NonNull;

use crate::memory::Seg;

/// Most segments of a request. The device promises 126 (SEG_MAX); the rest is for buffers cut by region borders.
pub const SEGS_MAX: usize = 132;
/// Segments kept in the slot itself: more live in the slot's list.
const INLINE: usize = 2;

/// Where a head is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    /// The driver's.
    Free = 0,
    /// Taken and not completed.
    Taken = 1,
    /// Completed, not yet published.
    Completed = 2,
}

/// A head's request. One cache line.
#[repr(C, align(64))]
pub(crate) struct Slot {
    inline: [Seg; INLINE],
    /// Where the status byte goes.
    pub(crate) status: *mut u8,
    /// Bytes the device writes if the request succeeds, status included.
    pub(crate) written: u32,
    pub(crate) count: u32,
    pub(crate) state: State,
}

/// All slots of a queue.
pub(crate) struct Slots {
    base: NonNull<Slot>,
    lists: NonNull<Seg>,
    size: u16,
    bytes: usize,
}

// SAFETY: the slots own their mapping; guest pointers in them are as good on one thread as on another.
unsafe impl Send for Slots {}

impl Slots {
    /// Slots for a queue of `size`.
    pub(crate) fn new(size: u16) -> io::Result<Self> {
        let slots = usize::from(size) * size_of::<Slot>();
        let bytes = (slots + usize::from(size) * SEGS_MAX * size_of::<Seg>()).next_multiple_of(4096);
        // SAFETY: a fresh private anonymous mapping aliases nothing.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast::<u8>()).expect("mmap without MAP_FIXED does not return null");
        // SAFETY: the list area begins inside the mapping.
        let lists = unsafe { base.add(slots) };
        Ok(Slots {
            base: base.cast(),
            lists: lists.cast(),
            size,
            bytes,
        })
    }

    #[inline]
    pub(crate) fn ptr(&self, head: u16) -> *mut Slot {
        assert!(head < self.size);
        // SAFETY: inside the mapping (asserted).
        unsafe { self.base.add(usize::from(head)).as_ptr() }
    }

    /// The slot of `head`, which is below the queue's size.
    #[inline]
    pub(crate) fn get(&mut self, head: u16) -> &mut Slot {
        // SAFETY: in the mapping and aligned; zeroed memory is a valid slot (null pointers, `State::Free`). Payloads read
        // only the segments, which change only between completing one request of this head and taking the next.
        unsafe { &mut *self.ptr(head) }
    }

    /// Where the segments of `head` are if there are `count` of them.
    #[inline]
    fn list(&self, head: u16, count: usize) -> *mut Seg {
        let slot = self.ptr(head);
        if count <= INLINE {
            // SAFETY: a field of a slot inside the mapping.
            return unsafe { (&raw mut (*slot).inline).cast() };
        }
        // SAFETY: `ptr` asserted the head; the list area has SEGS_MAX entries for each.
        unsafe { self.lists.add(usize::from(head) * SEGS_MAX).as_ptr() }
    }

    /// Appends a segment to the list of `head`; false if it is full.
    #[inline]
    pub(crate) fn push(&mut self, head: u16, seg: Seg) -> bool {
        let count = self.get(head).count as usize;
        if count >= SEGS_MAX {
            return false;
        }
        if count == INLINE {
            let (from, to) = (self.list(head, INLINE), self.list(head, INLINE + 1));
            // SAFETY: both lists have room for INLINE entries and do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(from, to, INLINE) };
        }
        // SAFETY: `count` is below the list's room.
        unsafe { self.list(head, count + 1).add(count).write(seg) };
        self.get(head).count = count as u32 + 1;
        true
    }

    /// The segments of `head`.
    #[inline]
    pub(crate) fn segs(&self, head: u16) -> &[Seg] {
        // SAFETY: `push` wrote so many entries there; `&self` keeps it away while they are looked at.
        unsafe {
            let count = (*self.ptr(head)).count as usize;
            std::slice::from_raw_parts(self.list(head, count), count)
        }
    }

    /// Shortens the last segment of `head` by its last byte and tells where that byte is; `None` if there is none.
    #[inline]
    pub(crate) fn pop_byte(&mut self, head: u16) -> Option<*mut u8> {
        let count = self.get(head).count as usize;
        let last = count.checked_sub(1)?;
        // SAFETY: entry `last` was written by `push`.
        let seg = unsafe { &mut *self.list(head, count).add(last) };
        seg.len = seg.len.checked_sub(1)?;
        let byte = seg.ptr.wrapping_add(seg.len as usize);
        if seg.len == 0 {
            // A list that shrinks to what fits inline moves back there.
            if count == INLINE + 1 {
                let (from, to) = (self.list(head, count), self.list(head, INLINE));
                // SAFETY: as in `push`, the other way.
                unsafe { std::ptr::copy_nonoverlapping(from, to, INLINE) };
            }
            self.get(head).count = last as u32;
        }
        Some(byte)
    }

    /// Room for `bytes` bytes of copied ranges in the list of `head`, whose segments are gone afterwards.
    pub(crate) fn scratch(&mut self, head: u16) -> *mut u8 {
        self.get(head).count = 0;
        self.list(head, INLINE + 1).cast()
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        // SAFETY: our own mapping; a queue is dropped only when no payload of it is in use.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}
