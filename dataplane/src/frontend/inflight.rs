//! The shared log of requests in flight (vhost-user, "Inflight I/O tracking", split virtqueues).
//!
//! The front end keeps this memory when our process dies and hands it to the next one, which finds in it exactly the
//! requests that were taken from the available ring and not yet returned.
//!
//! Layout: for each queue 16 bytes and 16 per descriptor as in the specification, rounded up to 64; behind them 64 bytes
//! of ours, which name the volume's instance and remember a guest's choice of write-through. A region that belongs to another instance (a memory disk that lost its
//! contents, another volume) must not be resumed: the guest would not notice that its writes are gone.
//!
//! The other side can write here at any time: nothing read decides more than which heads of its own are done again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::guest::Mapping;

const QUEUE_HEADER: usize = 16;
const ENTRY: usize = 16;
const TRAILER: usize = 64;
const MAGIC: u64 = u64::from_le_bytes(*b"UNIBODYI");
const VERSION: u16 = 1;

/// Where tests let the process die: between any two changes of the log.
#[cfg(test)]
pub(crate) fn crash_point() {
    CRASH_AFTER.with(|left| {
        let n = left.get();
        left.set(n.saturating_sub(1));
        assert!(n != 1, "killed here");
    });
}
#[cfg(not(test))]
#[inline(always)]
pub(crate) fn crash_point() {}

#[cfg(test)]
thread_local! {
    /// Crash points left to live; zero: for ever.
    pub(crate) static CRASH_AFTER: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

/// What the log that came with a connection says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumed {
    /// No log, or one in which nothing was ever started.
    Fresh,
    /// A log of this instance of the volume: requests in flight are done again.
    Same,
    /// A log of another instance: the contents the guest relies on are not here. All requests fail until a reset.
    Foreign,
}

fn queue_bytes(size: u16) -> usize {
    (QUEUE_HEADER + ENTRY * usize::from(size)).next_multiple_of(64)
}

/// Bytes of the log for `queues` queues of `size` descriptors.
pub(crate) fn region_bytes(queues: u16, size: u16) -> u64 {
    (queue_bytes(size) * usize::from(queues) + TRAILER) as u64
}

/// The log of a device.
#[derive(Debug)]
pub(crate) struct Region {
    mapping: Mapping,
    queues: u16,
    size: u16,
    resumed: Resumed,
}

impl Region {
    /// Takes a mapped log of `queues` queues of `size`; `None` if it is too small or misaligned. `instance` is the
    /// volume's.
    pub(crate) fn new(mapping: Mapping, queues: u16, size: u16, instance: u128) -> Option<Self> {
        if (mapping.len() as u64) < region_bytes(queues, size) || !mapping.start().addr().is_multiple_of(16) {
            return None;
        }
        let mut region = Region {
            mapping,
            queues,
            size,
            resumed: Resumed::Fresh,
        };
        let used_before =
            (0..queues).any(|i| region.u16_at(region.queue_at(i) + 8).load(Ordering::Relaxed) != 0);
        let ours = region.u64_at(region.trailer()).load(Ordering::Relaxed) == MAGIC.to_le();
        let same = ours && region.instance() == instance;
        region.resumed = match (used_before, same) {
            (false, _) => Resumed::Fresh,
            (true, true) => Resumed::Same,
            (true, false) => Resumed::Foreign,
        };
        if region.resumed == Resumed::Fresh {
            let at = region.trailer();
            region
                .u64_at(at + 16)
                .store((instance as u64).to_le(), Ordering::Relaxed);
            region
                .u64_at(at + 24)
                .store(((instance >> 64) as u64).to_le(), Ordering::Relaxed);
            region.u64_at(at).store(MAGIC.to_le(), Ordering::Release);
        }
        Some(region)
    }

    pub(crate) fn resumed(&self) -> Resumed {
        self.resumed
    }

    pub(crate) fn queues(&self) -> u16 {
        self.queues
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The guest does not flush.
    pub(crate) fn write_through(&self) -> bool {
        self.u8_at(self.trailer() + 32).load(Ordering::Acquire) != 0
    }

    /// Remembers for a later process whether the guest flushes.
    pub(crate) fn set_write_through(&self, on: bool) {
        self.u8_at(self.trailer() + 32)
            .store(u8::from(on), Ordering::Release);
    }

    fn trailer(&self) -> usize {
        queue_bytes(self.size) * usize::from(self.queues)
    }

    fn queue_at(&self, index: u16) -> usize {
        queue_bytes(self.size) * usize::from(index)
    }

    fn instance(&self) -> u128 {
        let word = |offset| {
            u128::from(u64::from_le(
                self.u64_at(self.trailer() + offset).load(Ordering::Relaxed),
            ))
        };
        word(16) | word(24) << 64
    }

    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset + len <= self.mapping.len() && offset.is_multiple_of(len));
        self.mapping.start().wrapping_add(offset)
    }

    #[inline]
    fn u8_at(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: inside the mapping (asserted in `at`), which lives as long as `self`; atomics tolerate foreign writes.
        unsafe { AtomicU8::from_ptr(self.at(offset, 1)) }
    }

    #[inline]
    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as in `u8_at`; aligned, since the region's start is and `at` checks the offset.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    #[inline]
    fn u64_at(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as in `u16_at`.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }
    }
}

/// The part of one queue.
#[derive(Debug)]
pub(crate) struct Log {
    region: Arc<Region>,
    base: usize,
    size: u16,
    counter: u64,
}

/// Requests to do again, and where to go on.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Heads in the order in which they were taken.
    pub(crate) heads: Vec<u16>,
    /// The log had been used before: the available position follows from it.
    pub(crate) used_before: bool,
}

impl Log {
    /// The log of queue `index`, of `size` descriptors; `None` if the region has no room for it.
    pub(crate) fn new(region: Arc<Region>, index: u16, size: u16) -> Option<Self> {
        (index < region.queues() && size <= region.size()).then(|| Log {
            base: region.queue_at(index),
            size,
            region,
            counter: 0,
        })
    }

    pub(crate) fn resumed(&self) -> Resumed {
        self.region.resumed()
    }

    pub(crate) fn poisoned(&self) -> bool {
        self.region.mapping.poisoned()
    }

    #[inline]
    fn entry(&self, head: u16) -> usize {
        self.base + QUEUE_HEADER + ENTRY * usize::from(head)
    }

    /// Brings the log up to date with `used_idx`, the used index in the ring, and lists what was in flight.
    pub(crate) fn recover(&mut self, used_idx: u16) -> Recovered {
        let region = &self.region;
        let logged = region.u16_at(self.base + 14);
        if region.u16_at(self.base + 8).load(Ordering::Acquire) == 0 {
            region
                .u16_at(self.base + 10)
                .store(self.size.to_le(), Ordering::Relaxed);
            logged.store(used_idx.to_le(), Ordering::Relaxed);
            region
                .u16_at(self.base + 8)
                .store(VERSION.to_le(), Ordering::Release);
            return Recovered::default();
        }
        // The last batch was handed to the driver but perhaps not ticked off.
        let batch = used_idx.wrapping_sub(u16::from_le(logged.load(Ordering::Relaxed)));
        if batch <= self.size {
            let mut head = u16::from_le(region.u16_at(self.base + 12).load(Ordering::Relaxed));
            for _ in 0..batch {
                if head >= self.size {
                    break;
                }
                region.u8_at(self.entry(head)).store(0, Ordering::Relaxed);
                head = u16::from_le(region.u16_at(self.entry(head) + 6).load(Ordering::Relaxed));
            }
        }
        logged.store(used_idx.to_le(), Ordering::Release);
        let mut heads: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| region.u8_at(self.entry(head)).load(Ordering::Relaxed) != 0)
            .map(|head| {
                (
                    u64::from_le(region.u64_at(self.entry(head) + 8).load(Ordering::Relaxed)),
                    head,
                )
            })
            .collect();
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |&(counter, _)| counter.wrapping_add(1));
        Recovered {
            heads: heads.into_iter().map(|(_, head)| head).collect(),
            used_before: true,
        }
    }

    /// `head` was taken from the available ring.
    #[inline]
    pub(crate) fn taken(&mut self, head: u16) {
        let at = self.entry(head);
        self.region
            .u64_at(at + 8)
            .store(self.counter.to_le(), Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        crash_point();
        self.region.u8_at(at).store(1, Ordering::Release);
    }

    /// `head` is in the used ring, which the driver does not see yet.
    #[inline]
    pub(crate) fn used(&self, head: u16) {
        let last = self.region.u16_at(self.base + 12);
        self.region
            .u16_at(self.entry(head) + 6)
            .store(last.load(Ordering::Relaxed), Ordering::Relaxed);
        crash_point();
        last.store(head.to_le(), Ordering::Release);
        crash_point();
    }

    /// `head` was handed to the driver.
    #[inline]
    pub(crate) fn returned(&self, head: u16) {
        crash_point();
        self.region.u8_at(self.entry(head)).store(0, Ordering::Release);
    }

    /// All of the batch up to `used_idx` was handed to the driver and ticked off.
    #[inline]
    pub(crate) fn batch_done(&self, used_idx: u16) {
        crash_point();
        self.region
            .u16_at(self.base + 14)
            .store(used_idx.to_le(), Ordering::Release);
    }
}
