//! The memory that I/O is done in: segments, payloads and page arenas.
//!
//! A `Payload` names bytes without owning or reading them: the cores pass payloads on, only disk back ends and the
//! frontend look inside. That is how the cores stay free of I/O and how guest memory never becomes a Rust reference.
//!
//! Rule: whoever creates a payload keeps its segments and their memory alive, and does not reuse them, until every
//! request that carried it has been answered.

use std::ptr::NonNull;

use crate::ids::BLOCK;

/// Consecutive bytes of this process's address space, in private or in guest memory.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seg {
    /// First byte.
    pub ptr: *mut u8,
    /// Bytes.
    pub len: u32,
}

// SAFETY: a segment is an address and a length; it is only ever dereferenced in unsafe code that argues for itself.
unsafe impl Send for Seg {}
// SAFETY: as above, sharing the numbers is harmless.
unsafe impl Sync for Seg {}

/// Names the bytes of a request: a list of segments and how many bytes of it to skip. The length is the request's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    segs: *const Seg,
    count: u32,
    skip: u32,
}

// SAFETY: a payload is a name; the memory behind it is kept by the request's owner until the request is answered, on
// whichever thread that happens (module rule).
unsafe impl Send for Payload {}

impl Payload {
    /// No bytes.
    pub const NONE: Payload = Payload {
        segs: std::ptr::null(),
        count: 0,
        skip: 0,
    };

    /// Names the bytes of `segs`. The list itself must stay where it is, see the module's rule.
    pub fn new(segs: &[Seg]) -> Self {
        Payload {
            segs: segs.as_ptr(),
            count: segs.len() as u32,
            skip: 0,
        }
    }

    /// The same bytes from `bytes` on.
    #[inline]
    pub fn advance(self, bytes: usize) -> Self {
        Payload {
            skip: self.skip + bytes as u32,
            ..self
        }
    }

    /// Calls `visit(ptr, len)` for the pieces of the first `len` bytes, in order.
    ///
    /// Returns the bytes that were missing: zero if the payload is long enough.
    ///
    /// # Safety
    /// The segment list is alive and unchanged (module rule). The pieces are only named here, not dereferenced.
    #[inline]
    pub unsafe fn pieces(self, len: usize, mut visit: impl FnMut(*mut u8, usize)) -> usize {
        let (mut skip, mut left) = (self.skip as usize, len);
        for i in 0..self.count as usize {
            if left == 0 {
                break;
            }
            // SAFETY: `i` is below the list's length and the caller keeps the list alive.
            let seg = unsafe { *self.segs.add(i) };
            let have = seg.len as usize;
            if skip >= have {
                skip -= have;
                continue;
            }
            let take = left.min(have - skip);
            visit(seg.ptr.wrapping_add(skip), take);
            skip = 0;
            left -= take;
        }
        left
    }

    /// The address of the first `len` bytes if they lie in one piece.
    ///
    /// # Safety
    /// As for [`Payload::pieces`].
    #[inline]
    pub unsafe fn contiguous(self, len: usize) -> Option<NonNull<u8>> {
        let mut found = None;
        // SAFETY: passed on to the caller.
        unsafe {
            self.pieces(len, |ptr, n| {
                if n == len {
                    found = NonNull::new(ptr);
                }
            });
        }
        found
    }
}

/// Asks for the cache line at `ptr`, with `WRITE` to change it. Whatever the address, nothing else happens.
#[inline]
pub(crate) fn prefetch<const WRITE: bool>(ptr: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_ET0, _MM_HINT_T0, _mm_prefetch};
        if WRITE {
            _mm_prefetch::<_MM_HINT_ET0>(ptr.cast());
        } else {
            _mm_prefetch::<_MM_HINT_T0>(ptr.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = ptr;
}

/// Page-aligned private memory, taken once and kept: I/O buffers and metadata pages.
///
/// A page that is being read or written by a device belongs to the device: the owner of the arena neither reads nor
/// writes it until that I/O has completed.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    segs: Box<[Seg]>,
}

// SAFETY: the arena owns its mapping; it moves between threads as a whole.
unsafe impl Send for Arena {}

impl Arena {
    /// Takes `pages` pages of 4 KiB, zeroed. Untouched pages cost no memory.
    ///
    /// # Errors
    /// When the kernel has no address space or memory for it.
    pub fn new(pages: usize) -> std::io::Result<Self> {
        let len = pages.max(1) * BLOCK;
        // SAFETY: a fresh private anonymous mapping aliases nothing.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let base = NonNull::new(p.cast::<u8>()).expect("mmap without MAP_FIXED does not return null");
        let pages = pages.max(1);
        let segs = (0..pages)
            .map(|i| Seg {
                ptr: base.as_ptr().wrapping_add(i * BLOCK),
                len: ((pages - i) * BLOCK).min(1 << 30) as u32,
            })
            .collect();
        Ok(Arena { base, segs })
    }

    /// Pages of the arena.
    pub fn pages(&self) -> usize {
        self.segs.len()
    }

    /// The whole mapping, for registering it with a device.
    pub fn span(&self) -> (*mut u8, usize) {
        (self.base.as_ptr(), self.segs.len() * BLOCK)
    }

    /// Names the bytes from the start of `page` to the end of the arena.
    #[inline]
    pub fn payload(&self, page: usize) -> Payload {
        Payload::new(&self.segs[page..=page])
    }

    /// The bytes of `count` pages from `page`. No device may be writing them.
    #[inline]
    pub fn bytes(&self, page: usize, count: usize) -> &[u8] {
        assert!(page + count <= self.segs.len());
        // SAFETY: inside the mapping (asserted); the arena's owner keeps devices away while it looks (type's rule), and
        // `&self` keeps `bytes_mut` away.
        unsafe { std::slice::from_raw_parts(self.segs[page].ptr, count * BLOCK) }
    }

    /// The bytes of `count` pages from `page`, to change. No device may be using them.
    #[inline]
    pub fn bytes_mut(&mut self, page: usize, count: usize) -> &mut [u8] {
        assert!(page + count <= self.segs.len());
        // SAFETY: as in `bytes`; `&mut self` makes it the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.segs[page].ptr, count * BLOCK) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it once the arena is dropped (module rule).
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.segs.len() * BLOCK) };
    }
}
