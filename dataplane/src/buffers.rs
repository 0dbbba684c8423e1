//! Private page-aligned buffers for the data of requests: taken once, lent out, never allocated in service.
//!
//! Two sizes, a block and an extent. A request gets as many as it touches extents of its volume, cut where the extents
//! are, so that each extent's part lies in one piece; they are named by one segment list that stays where it is until
//! the buffers are given back. The last given back are lent first: they are still in the cache.
//!
//! Invariants: a buffer is lent to one request at a time; take and give cost the same for each piece and allocate
//! nothing; nothing is cleared in between, the borrower overwrites what it uses.

use std::io;

use crate::ids::{BLOCK, EXTENT};
use crate::memory::{Arena, Payload, Seg};

/// Longest request, bytes.
pub const REQUEST_MAX: usize = 1024 * 1024;
/// Buffers a request can need: it may begin inside an extent.
pub const PIECES_MAX: usize = REQUEST_MAX / EXTENT + 1;

const PAGES: usize = EXTENT / BLOCK;
const NO_SEG: Seg = Seg {
    ptr: std::ptr::null_mut(),
    len: 0,
};

/// Buffers that are lent; give them back.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "buffers that are not given back are lost to the pool"]
pub struct Lent(u16);

#[derive(Debug)]
struct Loan {
    segs: [Seg; PIECES_MAX],
    pages: [u32; PIECES_MAX],
    count: usize,
}

/// See the module.
#[derive(Debug)]
pub struct BufferPool {
    arena: Arena,
    blocks: Vec<u32>,
    extents: Vec<u32>,
    extents_from: u32,
    loans: Box<[Loan]>,
    free: Vec<u16>,
}

impl BufferPool {
    /// A pool of `blocks` buffers of 4 KiB and `extents` of 64 KiB, for at most `loans` requests at a time.
    ///
    /// # Errors
    /// When the kernel has no memory for it.
    pub fn new(blocks: u32, extents: u32, loans: u16) -> io::Result<Self> {
        // Extents begin at whole extents of the arena.
        let extents_from = blocks.next_multiple_of(PAGES as u32);
        let arena = Arena::new(extents_from as usize + extents as usize * PAGES)?;
        let idle = || Loan {
            segs: [NO_SEG; PIECES_MAX],
            pages: [0; PIECES_MAX],
            count: 0,
        };
        Ok(BufferPool {
            arena,
            blocks: (0..blocks).rev().collect(),
            extents: (0..extents)
                .rev()
                .map(|i| extents_from + i * PAGES as u32)
                .collect(),
            extents_from,
            loans: (0..loans).map(|_| idle()).collect(),
            free: (0..loans).rev().collect(),
        })
    }

    /// The whole memory, for registering it with a ring.
    pub fn span(&self) -> (*mut u8, usize) {
        self.arena.span()
    }

    /// The memory of the small buffers, for the same: registered memory is resident, and the large ones would be most of it.
    pub fn small_span(&self) -> (*mut u8, usize) {
        (self.arena.span().0, self.extents_from as usize * BLOCK)
    }

    /// Buffers for `len` bytes (at most [`REQUEST_MAX`]) at byte `offset` of a volume. `None`: none are left, wait.
    #[inline]
    pub fn take(&mut self, offset: u64, len: u32) -> Option<Lent> {
        assert!(len > 0 && len as usize <= REQUEST_MAX, "a request of {len} bytes");
        let id = self.free.pop()?;
        let (mut at, mut left) = ((offset % EXTENT as u64) as usize, len as usize);
        let mut count = 0;
        while left > 0 {
            let piece = left.min(EXTENT - at);
            let small = if piece <= BLOCK { self.blocks.pop() } else { None };
            let Some(page) = small.or_else(|| self.extents.pop()) else {
                self.loans[usize::from(id)].count = count;
                self.give(Lent(id));
                return None;
            };
            let ptr = self.arena.span().0.wrapping_add(page as usize * BLOCK);
            let loan = &mut self.loans[usize::from(id)];
            loan.segs[count] = Seg {
                ptr,
                len: piece as u32,
            };
            loan.pages[count] = page;
            count += 1;
            left -= piece;
            at = 0;
        }
        self.loans[usize::from(id)].count = count;
        Some(Lent(id))
    }

    /// The lent memory in order. The list stays where it is until the buffers are given back.
    #[inline]
    pub fn segs(&self, lent: &Lent) -> &[Seg] {
        let loan = &self.loans[usize::from(lent.0)];
        &loan.segs[..loan.count]
    }

    /// Names the lent memory.
    #[inline]
    pub fn payload(&self, lent: &Lent) -> Payload {
        Payload::new(self.segs(lent))
    }

    /// How many of the lent buffers are large ones.
    #[inline]
    pub fn large(&self, lent: &Lent) -> u32 {
        let loan = &self.loans[usize::from(lent.0)];
        let large = loan.pages[..loan.count]
            .iter()
            .filter(|&&page| page >= self.extents_from);
        large.count() as u32
    }

    /// Takes buffers back. No I/O may be using them.
    #[inline]
    pub fn give(&mut self, lent: Lent) {
        let loan = &mut self.loans[usize::from(lent.0)];
        for &page in loan.pages[..loan.count].iter().rev() {
            if page < self.extents_from {
                self.blocks.push(page);
            } else {
                self.extents.push(page);
            }
        }
        loan.count = 0;
        self.free.push(lent.0);
    }

    /// Buffers of 4 KiB and of 64 KiB, and loans, that are left.
    pub fn left(&self) -> (usize, usize, usize) {
        (self.blocks.len(), self.extents.len(), self.free.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_whole_request_off_the_extent_takes_seventeen() {
        let mut pool = BufferPool::new(4, 17, 4).unwrap();
        let lent = pool.take(8192, REQUEST_MAX as u32).unwrap();
        let lens: Vec<_> = pool.segs(&lent).iter().map(|seg| seg.len as usize).collect();
        assert_eq!(lens.len(), PIECES_MAX);
        assert_eq!((lens[0], lens[16]), (EXTENT - 8192, 8192));
        assert_eq!(pool.take(0, 8192), None);
        assert_eq!(pool.left(), (4, 0, 3), "a refused request keeps nothing");
        pool.give(lent);
        assert_eq!(pool.left(), (4, 17, 4));
    }

    #[test]
    fn the_last_given_is_lent_first() {
        let mut pool = BufferPool::new(8, 0, 8).unwrap();
        let lent = pool.take(0, 4096).unwrap();
        let _other = pool.take(0, 4096).unwrap();
        let ptr = pool.segs(&lent)[0].ptr;
        pool.give(lent);
        let again = pool.take(0, 512).unwrap();
        assert_eq!(pool.segs(&again)[0].ptr, ptr);
    }

    #[test]
    fn blocks_overflow_into_extents() {
        let mut pool = BufferPool::new(1, 1, 3).unwrap();
        let small = pool.take(0, 4096).unwrap();
        let large = pool.take(0, 4096).unwrap();
        assert_eq!(pool.take(0, 4096), None);
        pool.give(large);
        pool.give(small);
        assert_eq!(pool.left(), (1, 1, 3));
    }

    proptest! {
        /// No two loans ever share a byte, every loan is page-aligned, inside the pool and cut at the extents, and
        /// everything comes back.
        #[test]
        fn loans_never_overlap(steps in prop::collection::vec((0u64..40, 1u32..=256, any::<bool>()), 1..80)) {
            let mut pool = BufferPool::new(10, 40, 20).unwrap();
            let full = pool.left();
            let (base, bytes) = pool.span();
            let mut lent = Vec::new();
            for (block, blocks, give) in steps {
                if give && !lent.is_empty() {
                    pool.give(lent.swap_remove(block as usize % lent.len()));
                } else if let Some(loan) = pool.take(block * 4096, blocks * 4096) {
                    let sum: usize = pool.segs(&loan).iter().map(|seg| seg.len as usize).sum();
                    prop_assert_eq!(sum, blocks as usize * 4096);
                    let first = pool.segs(&loan)[0].len as usize;
                    prop_assert!(first <= EXTENT - (block * 4096 % EXTENT as u64) as usize);
                    lent.push(loan);
                }
                let mut ranges: Vec<_> = lent.iter().flat_map(|loan| pool.segs(loan)).map(|seg| (seg.ptr as usize, seg.len as usize)).collect();
                ranges.sort_unstable();
                prop_assert!(ranges.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
                prop_assert!(ranges.iter().all(|r| r.0 % 4096 == 0 && r.0 >= base as usize && r.0 + r.1 <= base as usize + bytes));
            }
            lent.drain(..).for_each(|loan| pool.give(loan));
            prop_assert_eq!(pool.left(), full);
        }
    }
}
