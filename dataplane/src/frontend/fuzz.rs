//! A small guest made of shared memory, and the entry point for fuzzing with it.
//!
//! Tests use the same guest with handcrafted rings.

#[cfg(test)]
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::guest::{Mapping, Region};
use super::inflight::Log;
use super::queue::{Completion, Queue, Setup};
use super::ring::Ring;
use super::session::shared_memory;
use super::{DeviceConfig, MemoryTable, Shared};

/// Where the guest's memory begins for the guest.
pub(crate) const GUEST: u64 = 0x10_0000;
/// Where it begins for the front end.
const USER: u64 = 0x7000_0000_0000;
/// Bytes of it.
pub(crate) const MEMORY: u64 = 0x4_0000;
const DESC_AT: u64 = 0;
const AVAIL_AT: u64 = 0x4000;
const USED_AT: u64 = 0x8000;
/// Where tests put buffers: offset in the memory.
pub(crate) const DATA_AT: u64 = 0x1_0000;

/// Memory with rings, and the driver's side of them.
pub(crate) struct Guest {
    #[cfg(test)]
    pub(crate) file: File,
    pub(crate) table: Arc<MemoryTable>,
    pub(crate) shared: Arc<Shared>,
    size: u16,
}

impl Guest {
    pub(crate) fn new(size: u16, read_only: bool) -> std::io::Result<Self> {
        let file = shared_memory(MEMORY, false)?;
        let mapping = Mapping::new(&file, 0, MEMORY).map_err(std::io::Error::other)?;
        let table = MemoryTable::default()
            .with(Region::new(GUEST, USER, mapping))
            .map_err(std::io::Error::other)?;
        let config = DeviceConfig {
            capacity_bytes: 1 << 20,
            queues_max: 1,
            queue_size_max: 256,
            read_only,
            serial: "serial".into(),
            instance: 1,
        };
        Ok(Guest {
            #[cfg(test)]
            file,
            table: Arc::new(table),
            shared: Arc::new(Shared::new(config)),
            size,
        })
    }

    pub(crate) fn queue(&self, base: u16, event_idx: bool, log: Option<Log>) -> Queue {
        self.queue_with(base, event_idx, log, None)
    }

    fn queue_with(&self, base: u16, event_idx: bool, log: Option<Log>, call: Option<OwnedFd>) -> Queue {
        let ring = Ring::new(
            &self.table,
            self.size,
            USER + DESC_AT,
            USER + AVAIL_AT,
            USER + USED_AT,
        );
        Queue::new(Setup {
            shared: Arc::clone(&self.shared),
            memory: Arc::clone(&self.table),
            ring: ring.expect("the rings lie inside the memory"),
            base,
            event_idx,
            kick: None,
            call,
            log,
        })
        .expect("memory for a small queue")
    }

    fn at(&self, offset: u64, len: u64) -> *mut u8 {
        self.table
            .user(USER + offset, len)
            .expect("offsets of tests are inside the memory")
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        let to = self.at(offset, bytes.len() as u64);
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: `at` checked that so many bytes are mapped.
            unsafe { to.add(i).write_volatile(*byte) };
        }
    }

    #[cfg(test)]
    pub(crate) fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let from = self.at(offset, len);
        // SAFETY: as in `write`.
        (0..len as usize)
            .map(|i| unsafe { from.add(i).read_volatile() })
            .collect()
    }

    fn word(&self, offset: u64) -> &AtomicU16 {
        // SAFETY: mapped as long as the table; the rings are aligned.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    /// Writes descriptor `i` of the table at `table` (an offset; zero: the ring's).
    pub(crate) fn desc(&self, table: u64, i: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0u8; 16];
        raw[..8].copy_from_slice(&addr.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + u64::from(i) * 16, &raw);
    }

    /// Puts `head` at `position` of the available ring.
    pub(crate) fn offer(&self, position: u16, head: u16) {
        let at = AVAIL_AT + 4 + u64::from(position % self.size) * 2;
        self.word(at).store(head.to_le(), Ordering::Relaxed);
    }

    /// Lets the device see all heads below `idx`.
    pub(crate) fn set_avail_idx(&self, idx: u16) {
        self.word(AVAIL_AT + 2).store(idx.to_le(), Ordering::Release);
    }
}

#[cfg(test)]
impl Guest {
    pub(crate) fn queue_calling(&self, event_idx: bool, call: OwnedFd) -> Queue {
        self.queue_with(0, event_idx, None, Some(call))
    }

    pub(crate) fn addresses() -> [u64; 3] {
        [GUEST + DESC_AT, GUEST + AVAIL_AT, GUEST + USED_AT]
    }

    pub(crate) fn used_idx(&self) -> u16 {
        u16::from_le(self.word(USED_AT + 2).load(Ordering::Acquire))
    }

    /// Head and length at `position` of the used ring.
    pub(crate) fn used(&self, position: u16) -> (u32, u32) {
        let raw = self.read(USED_AT + 4 + u64::from(position % self.size) * 8, 8);
        let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
        (word(0), word(4))
    }

    pub(crate) fn no_notify(&self) -> bool {
        self.word(USED_AT).load(Ordering::Relaxed) != 0
    }

    pub(crate) fn avail_event(&self) -> u16 {
        let at = USED_AT + 4 + u64::from(self.size) * 8;
        u16::from_le(self.word(at).load(Ordering::Relaxed))
    }

    pub(crate) fn set_used_event(&self, position: u16) {
        let at = AVAIL_AT + 4 + u64::from(self.size) * 2;
        self.word(at).store(position.to_le(), Ordering::Relaxed);
    }

    pub(crate) fn set_no_interrupt(&self, on: bool) {
        self.word(AVAIL_AT)
            .store(u16::from(on).to_le(), Ordering::Relaxed);
    }
}

/// Feeds `data` to a queue as descriptors, headers and ring positions. Whatever it holds, the queue must neither panic nor
/// touch memory that is not the guest's, and must answer each head at most once.
pub fn fuzz_chain(data: &[u8]) {
    const SIZE: u16 = 16;
    const DESC_BYTES: usize = 8;
    thread_local! {
        static WORLD: Guest = Guest::new(SIZE, false).expect("memory for the fuzzer's guest");
    }
    WORLD.with(|guest| {
        guest.write(0, &[0; 0xc000]);
        let (descs, rest) = data.split_at(data.len().min(DESC_BYTES * 32));
        // Sixteen descriptors of the ring, sixteen of a table at DATA_AT.
        for (i, d) in descs.chunks_exact(DESC_BYTES).enumerate() {
            let half = |at: usize| u16::from_le_bytes([d[at], d[at + 1]]);
            let mut addr = GUEST + DATA_AT + u64::from(half(0));
            if d[7] & 0x80 != 0 {
                // Near the ends of the memory and of the address space.
                let edges = [GUEST - 8, GUEST + MEMORY - 8, u64::MAX - 8, 0];
                addr = edges[usize::from(d[7] & 3)].wrapping_add(u64::from(d[0] & 15));
            }
            let len = if d[7] & 0x40 != 0 {
                u32::from(half(2)) << 16
            } else {
                u32::from(half(2))
            };
            let table = if i < usize::from(SIZE) { 0 } else { DATA_AT };
            guest.desc(
                table,
                i as u16 % SIZE,
                addr,
                len,
                u16::from(d[4] & 7),
                u16::from(d[5] % 20),
            );
        }
        let (heads, bytes) = rest.split_at(rest.len().min(usize::from(SIZE)));
        guest.write(DATA_AT + 0x200, &bytes[..bytes.len().min(0x4000)]);
        for (i, &head) in heads.iter().enumerate() {
            guest.offer(i as u16, u16::from(head) % (SIZE + 1));
        }
        guest.set_avail_idx(heads.len() as u16);
        let mut queue = guest.queue(0, data.len().is_multiple_of(2), None);
        let mut requests = Vec::new();
        queue.poll(usize::from(SIZE), |request| requests.push(request));
        for request in requests.iter().rev() {
            let bytes: u64 = queue.segs(request).iter().map(|seg| u64::from(seg.len)).sum();
            if matches!(request.kind, super::Kind::In | super::Kind::Out) {
                assert_eq!(bytes, u64::from(request.len));
                for seg in queue.segs(request) {
                    // SAFETY: the segments of a request are mapped, which is what is tested here.
                    unsafe {
                        seg.ptr.read_volatile();
                        seg.ptr.add(seg.len as usize - 1).read_volatile();
                    }
                }
            }
            queue.complete(request.head, Completion::Ok);
        }
        queue.publish();
        assert_eq!(queue.in_flight(), 0);
    });
}
