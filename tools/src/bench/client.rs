//! A polled vhost-user-blk client on libblkio: drives an exported volume without a VM.

use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

/// Longest wait for one request of the synchronous helpers: longer than any time-out of a data plane.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Completions taken at once: all of the deepest queue.
pub(crate) const TAKE: usize = 128;

/// One queue of a connection to an exported volume, and its own part of the shared memory.
pub(crate) struct Client {
    // Order matters: the queue ends before its connection, which ends with the last of its queues.
    queue: Blkioq,
    memory: MemoryRegion,
    /// Where the queue's own part of the memory begins, and how long it is.
    base: usize,
    len: usize,
    _device: Arc<Blkio>,
    path: PathBuf,
    capacity: u64,
}

// SAFETY: the raw pointers inside lead to memory that is mapped in the whole process, and the client is used by one
// thread at a time. Clients of one connection share nothing that is used before its end: queues are independent of each
// other, their parts of the memory do not overlap, and whoever drops the last one has the connection to itself.
unsafe impl Send for Client {}

impl Client {
    /// Connects to `socket`, with `memory` bytes to do I/O in and up to `depth` requests at a time.
    pub(crate) fn connect(socket: &Path, depth: usize, memory: usize) -> Result<Self> {
        let mut queues = Self::connect_queues(socket, 1, depth, memory)?;
        queues.pop().context("no queue")
    }

    /// Connects to `socket` as one front end with several queues; `depth` and `memory` are of each.
    pub(crate) fn connect_queues(socket: &Path, count: u16, depth: usize, len: usize) -> Result<Vec<Self>> {
        let path = socket.to_path_buf();
        let wrong = || {
            format!(
                "{} can not be used as a vhost-user-blk device: is a node serving it?",
                path.display()
            )
        };
        let text = socket.to_str().context("a socket's path must be UTF-8")?;
        let mut blkio = Blkio::new("virtio-blk-vhost-user").with_context(wrong)?;
        blkio.set_str("path", text).with_context(wrong)?;
        blkio.connect().with_context(wrong)?;
        let capacity = blkio.get_u64("capacity").with_context(wrong)?;
        let offered = blkio.get_i32("max-queues").with_context(wrong)?;
        if i32::from(count) > offered {
            bail!(
                "{} offers {offered} queues: serve the volume with queues={count}, or ask for fewer",
                path.display()
            );
        }
        blkio.set_i32("num-queues", 0).with_context(wrong)?;
        blkio
            .set_i32("num-poll-queues", i32::from(count))
            .with_context(wrong)?;
        // The driver underneath knows no indirect descriptors: a request takes three.
        let size = (3 * depth).next_power_of_two().max(64) as i32;
        blkio.set_i32("queue-size", size).with_context(wrong)?;
        let mut started = blkio.start().with_context(wrong)?;
        let memory = blkio
            .alloc_mem_region((usize::from(count) * len).next_multiple_of(1 << 21))
            .with_context(wrong)?;
        blkio.map_mem_region(&memory).with_context(wrong)?;
        let device = Arc::new(blkio);
        let clients = started.poll_queues.drain(..).enumerate();
        Ok(clients
            .map(|(number, queue)| Client {
                queue,
                memory,
                base: number * len,
                len,
                _device: Arc::clone(&device),
                path: path.clone(),
                capacity,
            })
            .collect())
    }

    /// The socket.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the device.
    pub(crate) fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Its shared memory from `offset` on, `len` bytes. No request may be using them.
    pub(crate) fn memory(&mut self, offset: usize, len: usize) -> &mut [u8] {
        let start = self.address(offset, len);
        // SAFETY: inside the region and in the part of this client alone (asserted there), which lives as long as the
        // client; the caller keeps requests away.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    fn address(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset + len <= self.len && self.base + self.len <= self.memory.len,
            "outside the shared memory"
        );
        (self.memory.addr as *mut u8).wrapping_add(self.base + offset)
    }

    /// Queues a read into the shared memory at `memory`; `tag` comes back with its completion.
    pub(crate) fn read(&mut self, at: u64, memory: usize, len: usize, tag: usize) {
        let to = self.address(memory, len);
        self.queue.read(at, to, len, tag, ReqFlags::empty());
    }

    /// Queues a write.
    pub(crate) fn write(&mut self, at: u64, memory: usize, len: usize, tag: usize) {
        let from = self.address(memory, len);
        self.queue.write(at, from, len, tag, ReqFlags::empty());
    }

    /// Queues a discard.
    pub(crate) fn discard(&mut self, at: u64, len: u64, tag: usize) {
        self.queue.discard(at, len, tag, ReqFlags::empty());
    }

    /// Queues a flush.
    pub(crate) fn flush(&mut self, tag: usize) {
        self.queue.flush(tag, ReqFlags::empty());
    }

    /// Submits what is queued and hands what has completed to `sink` as (tag, result: zero or a negative errno).
    pub(crate) fn poll(&mut self, mut sink: impl FnMut(usize, i32)) -> Result<usize> {
        let mut room = [const { MaybeUninit::<Completion>::uninit() }; TAKE];
        let got = self
            .queue
            .do_io(&mut room, 0, None, None)
            .with_context(|| format!("the connection to {} broke", self.path.display()))?;
        for slot in &room[..got] {
            // SAFETY: `do_io` filled that many.
            let done = unsafe { slot.assume_init_ref() };
            sink(done.user_data, done.ret);
        }
        Ok(got)
    }

    /// Waits for everything of `count` requests. Fails if one of them failed.
    pub(crate) fn finish(&mut self, count: usize) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        let (mut left, mut failed) = (count, 0);
        while left > 0 {
            left -= self.poll(|_, result| failed += usize::from(result < 0))?;
            if Instant::now() > end {
                bail!(
                    "{} answered nothing for {} s",
                    self.path.display(),
                    PATIENCE.as_secs()
                );
            }
        }
        if failed > 0 {
            bail!(
                "{} answered {failed} of {count} requests with an I/O error",
                self.path.display()
            );
        }
        Ok(())
    }
}
