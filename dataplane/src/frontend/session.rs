//! One connection of a front end: the vhost-user messages and what they build up to, queues handed to the plane.
//!
//! Invariants: a queue runs only while its rings resolve in the present memory table; memory and eventfds change only
//! while the queue is stopped; when the connection ends, all queues are stopped before anything is unmapped.
//!
//! Absent: logging for live migration, postcopy, shared objects, device state.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::guest::{Mapping, Region, is_eventfd};
use super::inflight::{self, Log, Resumed};
use super::queue::{Queue, Setup};
use super::ring::Ring;
use super::server::Channel;
use super::{
    DeviceId, MemoryTable, Plane, RANGE_SECTORS_MAX, RANGES_MAX, REGIONS_MAX, SECTOR, Shared, count,
};

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
const F_INDIRECT: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_PROTOCOL: u64 = 1 << 30;
const F_VERSION_1: u64 = 1 << 32;

/// Segments of data a request may have, as told to the driver.
const SEG_MAX: u32 = 126;
/// Largest device configuration that vhost-user can carry, bytes.
const CONFIG_MAX: usize = 256;
/// Where the cache mode is in the configuration.
const CONFIG_WCE_AT: usize = 32;

#[derive(Default)]
struct Vring {
    size: u16,
    /// Descriptor table, available ring, used ring: addresses of the front end's address space.
    rings: Option<[u64; 3]>,
    base: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    /// The message that starts the ring has come.
    kicked: bool,
    enabled: bool,
    running: bool,
}

/// State of a connection.
pub(crate) struct Session {
    device: DeviceId,
    shared: Arc<Shared>,
    plane: Arc<dyn Plane>,
    channel: Arc<Channel>,
    features: u64,
    protocol: u64,
    memory: Arc<MemoryTable>,
    vrings: Vec<Vring>,
    log: Option<Arc<inflight::Region>>,
    /// The last refusal concerns one message only: the connection goes on.
    pub(crate) tolerable: bool,
}

impl Session {
    pub(crate) fn new(
        device: DeviceId,
        shared: Arc<Shared>,
        plane: Arc<dyn Plane>,
        channel: Arc<Channel>,
    ) -> Self {
        let queues = usize::from(shared.config.queues_max);
        Session {
            device,
            shared,
            plane,
            channel,
            features: 0,
            protocol: 0,
            memory: Arc::default(),
            vrings: std::iter::repeat_with(Vring::default).take(queues).collect(),
            log: None,
            tolerable: false,
        }
    }

    /// The front end may be told of a new configuration.
    pub(crate) fn wants_back_channel(&self) -> bool {
        self.protocol & VhostUserProtocolFeatures::BACKEND_REQ.bits() != 0
    }

    /// Messages that ask for it are acknowledged. A front end may ask before it has acknowledged any feature (QEMU does),
    /// so only the negotiated protocol counts.
    pub(crate) fn acknowledges(&self) -> bool {
        self.protocol & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    fn offered(&self) -> u64 {
        let config = &self.shared.config;
        let always = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE | F_MQ;
        let writes = if config.read_only {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        };
        always | writes | F_INDIRECT | F_EVENT_IDX | F_PROTOCOL | F_VERSION_1
    }

    /// The device's configuration space (virtio 1.2, 5.2.4).
    fn config(&self) -> [u8; CONFIG_MAX] {
        let mut space = [0u8; CONFIG_MAX];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.shared.capacity_bytes() / SECTOR).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Physical block: 2^3 sectors, aligned; best I/O sizes 8 sectors and (a stripe unit) 512.
        put(24, &[3, 0, 8, 0, 0, 2, 0, 0]);
        put(CONFIG_WCE_AT, &[u8::from(self.shared.write_back())]);
        put(34, &self.shared.config.queues_max.to_le_bytes());
        put(36, &RANGE_SECTORS_MAX.to_le_bytes());
        put(40, &(RANGES_MAX as u32).to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &RANGE_SECTORS_MAX.to_le_bytes());
        put(52, &(RANGES_MAX as u32).to_le_bytes());
        put(56, &[1]);
        space
    }

    fn refuse(&self, why: impl std::fmt::Display) -> Error {
        self.channel.report(&format!("front end refused: {why}"));
        Error::ReqHandlerError(std::io::Error::other(why.to_string()))
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let max = self.vrings.len();
        match self.vrings.get_mut(index as usize) {
            Some(vring) => Ok(vring),
            None => {
                self.channel
                    .report(&format!("front end refused: queue {index} of {max}"));
                Err(Error::InvalidParam)
            }
        }
    }

    fn stop(&mut self, index: usize) {
        let vring = &mut self.vrings[index];
        if !std::mem::take(&mut vring.running) {
            return;
        }
        if let Some(queue) = self.plane.stop_queue(self.device, index as u16) {
            vring.base = queue.next_avail();
            (vring.kick, vring.call) = queue.into_fds();
        }
    }

    fn stop_all(&mut self) {
        for index in 0..self.vrings.len() {
            self.stop(index);
        }
    }

    /// Starts the queue if all it needs is there.
    fn start(&mut self, index: usize) -> Result<()> {
        let enabled_by_default = self.features & F_PROTOCOL == 0;
        let vring = &mut self.vrings[index];
        let ready = vring.kicked && (vring.enabled || enabled_by_default) && vring.size > 0;
        let Some([desc, avail, used]) = vring.rings.filter(|_| ready && !vring.running) else {
            return Ok(());
        };
        let Some(ring) = Ring::new(&self.memory, vring.size, desc, avail, used) else {
            return Err(self.refuse(format_args!(
                "the rings of queue {index} are misaligned or outside its memory"
            )));
        };
        let log = match &self.log {
            None => None,
            Some(log) => match Log::new(Arc::clone(log), index as u16, vring.size) {
                None => {
                    return Err(
                        self.refuse(format_args!("queue {index} has no room in the in-flight region"))
                    );
                }
                log => log,
            },
        };
        let vring = &mut self.vrings[index];
        let queue = Queue::new(Setup {
            shared: Arc::clone(&self.shared),
            memory: Arc::clone(&self.memory),
            ring,
            base: vring.base,
            event_idx: self.features & F_EVENT_IDX != 0,
            kick: vring.kick.take(),
            call: vring.call.take(),
            log,
        })
        .map_err(Error::ReqHandlerError)?;
        vring.running = true;
        self.plane.start_queue(self.device, index as u16, queue);
        Ok(())
    }

    /// Swaps the memory table at a moment when nothing is in flight. Queues whose rings are gone stay stopped.
    fn swap_memory(&mut self, memory: MemoryTable) {
        self.stop_all();
        self.memory = Arc::new(memory);
        // All of them, also those whose rings were gone before: a front end may take a region away and give it back in two
        // messages, and says nothing more about the queues.
        for index in 0..self.vrings.len() {
            // Refusals are reported; the front end may give the queue new rings.
            let _ = self.start(index);
        }
    }

    fn map(&self, guest: u64, user: u64, len: u64, offset: u64, file: &File) -> Result<Region> {
        let mapping = Mapping::new(file, offset, len).map_err(|why| self.refuse(why))?;
        Ok(Region::new(guest, user, mapping))
    }

    fn eventfd(&self, fd: Option<File>) -> Result<Option<OwnedFd>> {
        match fd {
            Some(file) if !is_eventfd(file.as_fd()) => Err(self.refuse("kick and call must be eventfds")),
            fd => Ok(fd.map(OwnedFd::from)),
        }
    }

    /// Back to the state of a new connection, memory apart.
    fn reset(&mut self) {
        self.stop_all();
        self.vrings.fill_with(Vring::default);
        self.log = None;
        self.features = 0;
        // The cache mode stays: a front end may reset the device and still show the guest the mode that it chose. Who is
        // not told to flush must find each write durable; the other way round costs only time.
        self.update_write_through();
    }

    fn update_write_through(&self) {
        self.shared
            .set_write_through(self.features & F_FLUSH == 0 || !self.shared.write_back());
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop_all();
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated; the specification says to ignore it.
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.reset();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.offered();
        if unknown != 0 {
            return Err(self.refuse(format_args!("features {unknown:#x} were not offered")));
        }
        self.features = features;
        self.update_write_through();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let mut table = MemoryTable::default();
        for (region, file) in regions.iter().zip(&files) {
            let region = self.map(
                region.guest_phys_addr,
                region.user_addr,
                region.memory_size,
                region.mmap_offset,
                file,
            )?;
            table = table.with(region).map_err(|why| self.refuse(why))?;
        }
        self.swap_memory(table);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let max = self.shared.config.queue_size_max;
        let size = u16::try_from(num)
            .ok()
            .filter(|&n| n.is_power_of_two() && n <= max);
        let vring = self.vring(index)?;
        let (Some(size), false) = (size, vring.running) else {
            return Err(self.refuse(format_args!(
                "size {num} of queue {index}: a power of two up to {max}, set before it runs"
            )));
        };
        vring.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        if !flags.is_empty() {
            return Err(self.refuse("dirty logging is not supported"));
        }
        self.vring(index)?;
        let at = index as usize;
        let was_running = self.vrings[at].running;
        self.stop(at);
        self.vrings[at].rings = Some([descriptor, available, used]);
        if was_running { self.start(at) } else { Ok(()) }
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let vring = self.vring(index)?;
        let (Ok(base), false) = (u16::try_from(base), vring.running) else {
            return Err(self.refuse(format_args!(
                "base {base} of queue {index}: below 65536, set before it runs"
            )));
        };
        vring.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        self.stop(index as usize);
        let vring = &mut self.vrings[index as usize];
        vring.kicked = false;
        (vring.kick, vring.call) = (None, None);
        Ok(VhostUserVringState::new(index, u32::from(vring.base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = self.eventfd(fd)?;
        self.vring(index.into())?;
        self.stop(index.into());
        let vring = &mut self.vrings[usize::from(index)];
        vring.kick = fd;
        vring.kicked = true;
        self.start(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = self.eventfd(fd)?;
        self.vring(index.into())?;
        self.stop(index.into());
        self.vrings[usize::from(index)].call = fd;
        self.start(index.into())
    }

    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.vring(index.into()).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        use VhostUserProtocolFeatures as P;
        Ok(P::MQ
            | P::CONFIG
            | P::REPLY_ACK
            | P::CONFIGURE_MEM_SLOTS
            | P::INFLIGHT_SHMFD
            | P::RESET_DEVICE
            | P::BACKEND_REQ)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.get_protocol_features()?.bits();
        if unknown != 0 {
            return Err(self.refuse(format_args!("protocol features {unknown:#x} were not offered")));
        }
        self.protocol = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = enable;
        if enable {
            return self.start(index as usize);
        }
        self.stop(index as usize);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let (from, len) = (offset as usize, size as usize);
        from.checked_add(len)
            .and_then(|to| Some(self.config().get(from..to)?.to_vec()))
            .ok_or_else(|| self.refuse(format_args!("configuration bytes {offset} to {offset}+{size}")))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // The cache mode is the only thing a driver may change; other bytes may be sent along unchanged.
        let mut new = self.config();
        let old = new;
        let from = offset as usize;
        let known = from.checked_add(buf.len()).and_then(|to| new.get_mut(from..to));
        if let Some(part) = known {
            part.copy_from_slice(buf);
        }
        let wce = new[CONFIG_WCE_AT];
        new[CONFIG_WCE_AT] = old[CONFIG_WCE_AT];
        if from.checked_add(buf.len()).is_none_or(|to| to > CONFIG_MAX) || new != old || wce > 1 {
            self.tolerable = true;
            return Err(self.refuse("only the cache mode (0 or 1) of the configuration can be changed"));
        }
        self.shared.set_write_back(wce == 1);
        if let Some(log) = &self.log {
            log.set_write_through(wce == 0);
        }
        self.update_write_through();
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("not a GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (asked.num_queues, asked.queue_size);
        let config = &self.shared.config;
        if queues == 0 || queues > config.queues_max || size == 0 || size > config.queue_size_max {
            return Err(self.refuse(format_args!("an in-flight region for {queues} queues of {size}")));
        }
        let bytes = inflight::region_bytes(queues, size);
        let file = shared_memory(bytes, true).map_err(Error::ReqHandlerError)?;
        Ok((VhostUserInflight::new(bytes, 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, given: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = (given.num_queues, given.queue_size);
        let config = &self.shared.config;
        if queues == 0 || queues > config.queues_max || size == 0 || size > config.queue_size_max {
            return Err(self.refuse(format_args!("an in-flight region for {queues} queues of {size}")));
        }
        if self.vrings.iter().any(|vring| vring.running) {
            return Err(self.refuse("an in-flight region while a queue is running"));
        }
        let mapping =
            Mapping::new(&file, given.mmap_offset, given.mmap_size).map_err(|why| self.refuse(why))?;
        let Some(region) = inflight::Region::new(mapping, queues, size, config.instance) else {
            return Err(self.refuse("an in-flight region that is too small or misaligned"));
        };
        if region.resumed() == Resumed::Foreign {
            count(&self.shared.counters.logs_foreign);
            self.channel.report(
                "the guest was attached to another instance of this volume, whose contents are gone: \
                 all its requests fail until it is restarted",
            );
        }
        if region.resumed() == Resumed::Fresh {
            region.set_write_through(!self.shared.write_back());
        } else if region.write_through() {
            // The guest was told that it need not flush, by a process that is gone, and nobody says it again.
            self.shared.set_write_back(false);
            self.update_write_through();
        }
        self.log = Some(Arc::new(region));
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let region = self.map(
            region.guest_phys_addr,
            region.user_addr,
            region.memory_size,
            region.mmap_offset,
            &file,
        )?;
        let table = self.memory.with(region).map_err(|why| self.refuse(why))?;
        self.swap_memory(table);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let table = self
            .memory
            .without(region.guest_phys_addr, region.memory_size)
            .map_err(|why| self.refuse(why))?;
        self.swap_memory(table);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("no device state to transfer"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("no device state to transfer"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory regions"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("dirty logging is not supported"))
    }
}

/// New shared memory. `sealed`: it can not change its size, so that the front end can not pull it away under us.
pub(crate) fn shared_memory(bytes: u64, sealed: bool) -> std::io::Result<File> {
    let name = c"unibody";
    // SAFETY: a valid C string and flags; the result is checked.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: adds seals to our own descriptor.
    if sealed && unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(file)
}
