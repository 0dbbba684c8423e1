//! vhost-user-blk: hands volumes to virtual machine monitors and reads requests out of guest memory.
//!
//! Two halves meet at [`Queue`]. The control half (`server`, `session`) speaks the vhost-user protocol on one small thread
//! for each device, maps guest memory and builds queues. The data half is the queue itself: a plain struct that one
//! reactor thread polls, without lock, allocation or system call. A queue changes hands through [`Plane`], and only
//! when nothing of it is in flight.
//!
//! Everything a front end sends or writes is hostile until checked: it is copied once, then checked, then used. What is
//! wrong is counted in [`Counters`] and harms only its own device.
//!
//! Deliberately absent: packed rings, live-migration logging, postcopy, in-band notifications, virtio-blk zones, and any
//! I/O: the reactor does what a [`Request`] says.

mod fuzz;
mod guest;
mod inflight;
mod queue;
mod request;
mod ring;
mod server;
mod session;
mod sigbus;
mod slots;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub use fuzz::fuzz_chain;
pub use guest::{MapError, MemoryTable, REGIONS_MAX};
pub use inflight::Resumed;
pub use queue::{Completion, Queue};
pub use request::{Kind, RANGES_MAX, Range, Request};
pub use server::{Export, ServeError};
pub use sigbus::MAPPINGS_MAX;
pub use slots::SEGS_MAX;

/// Bytes of a sector, the unit of addresses in requests.
pub const SECTOR: u64 = 512;
/// Most data bytes of one request; more is refused with an I/O error.
pub const REQUEST_BYTES_MAX: u64 = 64 << 20;
/// Most sectors of one discard or write-zeroes range (1 GiB).
pub const RANGE_SECTORS_MAX: u32 = 1 << 21;
/// Bytes of the serial number that GET_ID returns.
pub const SERIAL_BYTES: usize = 20;
/// Largest queue that can be configured.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// Most queues of a device.
pub const QUEUES_MAX: u16 = 64;

/// Names an exported device in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

/// What a device is to its front end.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// Size, bytes; a multiple of 512. [`Export::resize`] changes it later.
    pub capacity_bytes: u64,
    /// Queues offered, 1 to [`QUEUES_MAX`].
    pub queues_max: u16,
    /// Largest queue accepted, a power of two up to [`QUEUE_SIZE_MAX`].
    pub queue_size_max: u16,
    /// Refuse everything that changes data.
    pub read_only: bool,
    /// What GET_ID returns, cut to [`SERIAL_BYTES`].
    pub serial: String,
    /// Names the contents: a front end that resumes requests of another instance is failed. Kept with durable contents,
    /// drawn anew whenever contents do not survive the process.
    pub instance: u128,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a front end did that it should not do, and what became of it. All grow only; read them any time.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }
        impl Counters {
            /// Names and present values.
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.load(Ordering::Relaxed)),)*]
            }
        }
    };
}

counters! {
    /// Connections accepted.
    connections,
    /// Messages refused, or broken off, by the session.
    messages_refused,
    /// Chains without header, status byte or readable descriptors, answered with an error where possible.
    chains_malformed,
    /// Chains with an address outside the guest's memory.
    chains_unmapped,
    /// Chains longer than allowed or looping.
    chains_too_long,
    /// Requests beyond the end of the device, of odd length or too large.
    requests_out_of_range,
    /// Writes to a read-only device.
    requests_read_only,
    /// Requests of an unknown kind or with unknown flags.
    requests_unsupported,
    /// Requests failed because memory was truncated or the log was foreign.
    requests_failed,
    /// Queues stopped for good: a head out of range or twice, an index too far, an answer that can not be placed.
    queues_broken,
    /// Devices whose memory was truncated under them.
    memory_truncated,
    /// Requests resumed from a log after a reconnect.
    requests_resumed,
    /// Connections whose log belonged to another instance of the volume.
    logs_foreign,
}

/// Adds one to a counter.
#[inline]
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What session and queues of a device share. Written rarely.
#[derive(Debug)]
pub struct Shared {
    /// Fixed properties.
    pub(crate) config: DeviceConfig,
    capacity: AtomicU64,
    write_back: AtomicBool,
    write_through: AtomicBool,
    /// See [`Counters`].
    pub counters: Counters,
}

impl Shared {
    pub(crate) fn new(config: DeviceConfig) -> Self {
        Shared {
            capacity: AtomicU64::new(config.capacity_bytes),
            write_back: AtomicBool::new(true),
            write_through: AtomicBool::new(false),
            counters: Counters::default(),
            config,
        }
    }

    /// Size of the device now, bytes.
    #[inline]
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    pub(crate) fn set_capacity(&self, bytes: u64) {
        self.capacity.store(bytes, Ordering::Relaxed);
    }

    /// The guest believes that a completed write is durable: each write must be flushed before it is completed. So if the
    /// guest turned the write cache off, or its driver knows no flush.
    #[inline]
    pub fn write_through(&self) -> bool {
        self.write_through.load(Ordering::Relaxed)
    }

    /// The cache mode the driver chose: it flushes by itself.
    pub(crate) fn write_back(&self) -> bool {
        self.write_back.load(Ordering::Relaxed)
    }

    pub(crate) fn set_write_back(&self, on: bool) {
        self.write_back.store(on, Ordering::Relaxed);
    }

    pub(crate) fn set_write_through(&self, on: bool) {
        self.write_through.store(on, Ordering::Relaxed);
    }
}

/// The data plane as the sessions see it. Called from session threads.
pub trait Plane: Send + Sync {
    /// Begin to poll `queue`. There is none of this device and index running.
    fn start_queue(&self, device: DeviceId, index: u16, queue: Queue);

    /// Take no new requests from the queue, wait until those in flight are completed and published, and give it back.
    /// Blocks the session's thread only. `None` if no such queue is running (the plane is shutting down).
    fn stop_queue(&self, device: DeviceId, index: u16) -> Option<Queue>;

    /// Something the operator should see; at most one a second for each device.
    fn report(&self, device: DeviceId, message: &str);
}
