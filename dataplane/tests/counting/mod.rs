//! Counts what each thread allocates. Whoever includes this has its allocator replaced.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts what each thread allocates, by a slot that the thread takes at its first allocation.
struct Counting;

const THREADS: usize = 256;
static COUNTS: [AtomicU64; THREADS] = [const { AtomicU64::new(0) }; THREADS];
static TIDS: [AtomicU64; THREADS] = [const { AtomicU64::new(0) }; THREADS];
static NEXT: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static SLOT: Cell<usize> = const { Cell::new(usize::MAX) };
}

fn count() {
    // A thread that is ending has no slot any more; it is not the one we look at.
    let slot = SLOT.try_with(|slot| {
        if slot.get() == usize::MAX {
            let fresh = NEXT.fetch_add(1, Ordering::Relaxed) as usize % THREADS;
            slot.set(fresh);
            // SAFETY: no pointers are passed.
            TIDS[fresh].store(unsafe { libc::gettid() } as u64, Ordering::Relaxed);
        }
        slot.get()
    });
    if let Ok(slot) = slot {
        COUNTS[slot].fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: everything is passed on to the system's allocator; counting neither allocates nor touches the memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's obligations are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations so far of all threads called `name`.
pub(crate) fn allocations_of(name: &str) -> u64 {
    let (mut found, mut sum) = (0, 0);
    for entry in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if comm.trim() == name {
            let tid: u64 = entry.file_name().to_str().unwrap().parse().unwrap();
            let slot = TIDS
                .iter()
                .position(|slot| slot.load(Ordering::Relaxed) == tid)
                .expect("it has allocated");
            found += 1;
            sum += COUNTS[slot].load(Ordering::Relaxed);
        }
    }
    assert!(found > 0, "there is no thread {name}");
    sum
}
