//! Connections: orderly ones by the vhost crate's frontend, disorderly ones by hand.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use unibody_dataplane::frontend::{DeviceId, Export, ServeError};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use crate::blkio_client::config;
use crate::plane::TestPlane;

const GUEST: u64 = 0x4000_0000;
const USER: u64 = 0x5000_0000;
const MEMORY: u64 = 1 << 20;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const SIZE: u16 = 16;

/// Guest memory that is written by file, as nothing here is fast.
struct Driver {
    memory: File,
    avail: u16,
}

impl Driver {
    fn new() -> Self {
        let memory = tempfile::tempfile_in("/dev/shm").unwrap();
        memory.set_len(MEMORY).unwrap();
        Driver { memory, avail: 0 }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    fn u16_at(&self, at: u64) -> u16 {
        let mut raw = [0; 2];
        self.memory.read_exact_at(&mut raw, at).unwrap();
        u16::from_le_bytes(raw)
    }

    /// Offers a write of one sector from `data_at` (an address of the guest) with head `slot * 3`.
    fn write_sector(&mut self, slot: u16, sector: u64, data_at: u64) {
        let (head, meta) = (slot * 3, 0x3000 + u64::from(slot) * 64);
        self.put(meta, &1u32.to_le_bytes());
        self.put(meta + 8, &sector.to_le_bytes());
        self.put(meta + 16, &[0xff]);
        for (i, (addr, len, flags)) in [
            (GUEST + meta, 16u32, 1u16),
            (data_at, 512, 1),
            (GUEST + meta + 16, 1, 2),
        ]
        .into_iter()
        .enumerate()
        {
            let mut raw = addr.to_le_bytes().to_vec();
            raw.extend(len.to_le_bytes());
            raw.extend(flags.to_le_bytes());
            raw.extend((head + i as u16 + 1).to_le_bytes());
            self.put((u64::from(head) + i as u64) * 16, &raw);
        }
        self.put(AVAIL + 4 + u64::from(self.avail % SIZE) * 2, &head.to_le_bytes());
        self.avail += 1;
        self.put(AVAIL + 2, &self.avail.to_le_bytes());
    }

    fn used(&self) -> u16 {
        self.u16_at(USED + 2)
    }

    fn status(&self, slot: u16) -> u8 {
        (self.u16_at(0x3000 + u64::from(slot) * 64 + 16) & 0xff) as u8
    }
}

fn wait(what: &str, mut until: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !until() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn region(file: &File, guest: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: guest,
        memory_size: MEMORY,
        userspace_addr: USER + (guest - GUEST),
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

fn negotiate(path: &Path) -> Frontend {
    let mut frontend = Frontend::connect(path, 4).unwrap();
    frontend.set_owner().unwrap();
    let features = frontend.get_features().unwrap();
    frontend.set_features(features & !(1 << 29)).unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    assert!(
        protocol
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD | VhostUserProtocolFeatures::RESET_DEVICE)
    );
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    frontend
}

fn start(frontend: &mut Frontend, driver: &Driver, base: u16) {
    frontend.set_mem_table(&[region(&driver.memory, GUEST)]).unwrap();
    frontend.set_vring_num(0, SIZE).unwrap();
    let rings = VringConfigData {
        queue_max_size: SIZE,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: USER,
        used_ring_addr: USER + USED,
        avail_ring_addr: USER + AVAIL,
        log_addr: None,
    };
    frontend.set_vring_addr(0, &rings).unwrap();
    frontend.set_vring_base(0, base).unwrap();
    frontend.set_vring_call(0, &EventFd::new(0).unwrap()).unwrap();
    frontend.set_vring_kick(0, &EventFd::new(0).unwrap()).unwrap();
    frontend.set_vring_enable(0, true).unwrap();
}

#[test]
fn sockets_are_private_and_not_stolen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let plane = TestPlane::new(1 << 20, false);
    // A stale socket of a dead process is replaced.
    drop(UnixListener::bind(&path).unwrap());
    let export = Export::new(DeviceId(1), config(1 << 20), &path, plane.clone()).unwrap();
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let second = Export::new(DeviceId(2), config(1 << 20), &path, plane.clone());
    assert!(matches!(second, Err(ServeError::InUse(_))));
    drop(export);
    assert!(!path.exists());
    std::fs::write(&path, "mine").unwrap();
    let over_a_file = Export::new(DeviceId(2), config(1 << 20), &path, plane.clone());
    assert!(matches!(over_a_file, Err(ServeError::NotASocket(_))));
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}

#[test]
fn a_hundred_reconnects_and_half_messages() {
    let dir = tempfile::tempdir().unwrap();
    let (path, other) = (dir.path().join("a.sock"), dir.path().join("b.sock"));
    let plane = TestPlane::new(1 << 20, false);
    let export = Export::new(DeviceId(1), config(1 << 20), &path, plane.clone()).unwrap();
    let _other = Export::new(DeviceId(2), config(1 << 20), &other, plane.clone()).unwrap();
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for i in 0..100u32 {
        let mut stream = UnixStream::connect(&path).unwrap();
        // GET_FEATURES, then a SET_FEATURES that breaks off somewhere, or nonsense.
        stream.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        stream.read_exact(&mut [0; 20]).unwrap();
        let half = [2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7];
        match i % 3 {
            0 => stream.write_all(&half[..1 + i as usize % 18]).unwrap(),
            1 => stream.write_all(&[0xee; 40]).unwrap(),
            _ => stream
                .write_all(&[2, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0x7f])
                .unwrap(),
        }
    }
    // Half a message that stays half holds up its own device only.
    let mut stuck = UnixStream::connect(&path).unwrap();
    stuck.write_all(&[2, 0, 0]).unwrap();
    let mut frontend = negotiate(&other);
    let mut driver = Driver::new();
    start(&mut frontend, &driver, 0);
    driver.write_sector(0, 1, GUEST);
    wait("the other device answers", || driver.used() == 1);
    assert_eq!(driver.status(0), 0);
    drop(stuck);
    drop(frontend);
    // And the first one is as good as new.
    let mut frontend = negotiate(&path);
    let mut driver = Driver::new();
    start(&mut frontend, &driver, 0);
    driver.write_sector(0, 1, GUEST);
    wait("the device answers", || driver.used() == 1);
    assert_eq!(frontend.get_vring_base(0).unwrap(), 1);
    drop((frontend, driver));
    wait("all connections end", || !export.connected());
    assert_eq!(export.shared().counters.connections.load(Ordering::Relaxed), 102);
    // Other tests of this process open and close descriptors as well.
    wait("no descriptors are left behind", || descriptors() < before + 60);
}

#[test]
fn memory_is_taken_away_only_when_nothing_is_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let plane = TestPlane::new(1 << 20, false);
    let _export = Export::new(DeviceId(1), config(1 << 20), &path, plane.clone()).unwrap();
    let mut frontend = negotiate(&path);
    let mut driver = Driver::new();
    start(&mut frontend, &driver, 0);
    let extra = tempfile::tempfile_in("/dev/shm").unwrap();
    extra.set_len(MEMORY).unwrap();
    extra.write_all_at(&[0x5a; 512], 0).unwrap();
    let there = region(&extra, GUEST + MEMORY);
    frontend.add_mem_region(&there).unwrap();
    plane.control.hold.store(true, Ordering::Relaxed);
    driver.write_sector(0, 3, GUEST + MEMORY);
    wait("the request is taken", || {
        plane.control.taken.load(Ordering::Relaxed) == 1
    });
    let removing = std::thread::spawn(move || {
        frontend.remove_mem_region(&there).unwrap();
        frontend
    });
    std::thread::sleep(Duration::from_millis(30));
    assert!(!removing.is_finished(), "memory went away under a request");
    assert_eq!(driver.used(), 0);
    plane.control.hold.store(false, Ordering::Relaxed);
    let mut frontend = removing.join().unwrap();
    wait("the request is answered", || driver.used() == 1);
    assert_eq!(
        (driver.status(0), plane.control.data.lock().unwrap()[3 * 512]),
        (0, 0x5a)
    );
    // The same address is nobody's now.
    driver.write_sector(1, 4, GUEST + MEMORY);
    wait("the second request is answered", || driver.used() == 2);
    assert_eq!(driver.status(1), 1);
    assert!(
        frontend
            .remove_mem_region(&region(&extra, GUEST + MEMORY))
            .is_err()
    );
}

#[test]
fn a_log_takes_requests_to_the_next_process() {
    let dir = tempfile::tempdir().unwrap();
    let (path, next) = (dir.path().join("a.sock"), dir.path().join("b.sock"));
    let plane = TestPlane::new(1 << 20, false);
    let export = Export::new(DeviceId(1), config(1 << 20), &path, plane.clone()).unwrap();
    let mut frontend = negotiate(&path);
    let mut driver = Driver::new();
    let asked = VhostUserInflight::new(0, 0, 4, SIZE);
    let (log, file) = frontend.get_inflight_fd(&asked).unwrap();
    frontend.set_inflight_fd(&log, file.as_raw_fd()).unwrap();
    start(&mut frontend, &driver, 0);
    driver.put(0x8000, &[0x77; 512]);
    driver.write_sector(0, 1, GUEST + 0x8000);
    wait("the first is done", || driver.used() == 1);
    // This process takes two more and never answers them.
    plane.control.hold.store(true, Ordering::Relaxed);
    driver.write_sector(1, 2, GUEST + 0x8000);
    driver.write_sector(2, 3, GUEST + 0x8000);
    wait("two are taken", || {
        plane.control.taken.load(Ordering::Relaxed) == 3
    });
    std::mem::forget((export, frontend));
    for instance in [7, 8] {
        let again = TestPlane::new(1 << 20, false);
        let mut config = config(1 << 20);
        config.instance = instance;
        let export = Export::new(DeviceId(1), config, &next, again.clone()).unwrap();
        let mut frontend = negotiate(&next);
        frontend.set_inflight_fd(&log, file.as_raw_fd()).unwrap();
        start(&mut frontend, &driver, driver.used());
        if instance == 7 {
            wait("both are resumed", || driver.used() == 3);
            assert_eq!((driver.status(1), driver.status(2)), (0, 0));
            let data = again.control.data.lock().unwrap();
            assert_eq!((data[512], data[2 * 512], data[3 * 512]), (0, 0x77, 0x77));
        } else {
            // Contents that were lost must not be passed off as the ones the guest knows.
            driver.write_sector(3, 5, GUEST + 0x8000);
            wait("it is answered", || driver.used() == 4);
            assert_eq!(
                (driver.status(3), again.control.data.lock().unwrap()[5 * 512]),
                (1, 0)
            );
            assert!(!again.control.reports.lock().unwrap().is_empty());
            // Attached anew, it works.
            frontend.reset_device().unwrap();
            let mut driver = Driver::new();
            frontend.set_features(frontend.get_features().unwrap()).unwrap();
            start(&mut frontend, &driver, 0);
            driver.write_sector(0, 5, GUEST + 0x8000);
            wait("it works after a reset", || driver.used() == 1);
            assert_eq!(driver.status(0), 0);
        }
        drop(frontend);
        drop(export);
    }
    plane.control.hold.store(false, Ordering::Relaxed);
    std::mem::forget(Arc::clone(&plane));
}

#[test]
fn configuration_cache_mode_and_resize() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let plane = TestPlane::new(1 << 20, false);
    let export = Export::new(DeviceId(1), config(1 << 20), &path, plane.clone()).unwrap();
    let mut frontend = negotiate(&path);
    let flags = VhostUserConfigFlags::WRITABLE;
    let space = |frontend: &mut Frontend| frontend.get_config(0, 60, flags, &[0; 60]).unwrap().1;
    let now = space(&mut frontend);
    assert_eq!(now[..8], 2048u64.to_le_bytes());
    assert_eq!(
        (&now[20..24], now[24], now[32], &now[34..36]),
        (&[0, 2, 0, 0][..], 3, 1, &[4, 0][..])
    );
    assert!(!export.shared().write_through());
    frontend.set_config(32, flags, &[0]).unwrap();
    assert!(export.shared().write_through());
    // Anything else is refused, and the connection goes on.
    assert!(frontend.set_config(0, flags, &[9]).is_err());
    frontend.set_config(32, flags, &[1]).unwrap();
    assert!(!export.shared().write_through());
    // A driver without FLUSH believes in write-through.
    let features = frontend.get_features().unwrap();
    frontend.set_features(features & !(1 << 9)).unwrap();
    assert!(export.shared().write_through());
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    frontend.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    export.resize(4 << 20);
    let mut notice = [0; 12];
    ours.read_exact(&mut notice).unwrap();
    assert_eq!(notice, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(space(&mut frontend)[..8], 8192u64.to_le_bytes());
    // Features that were not offered end the connection.
    assert!(frontend.set_features(1 << 60).is_err());
    wait("the connection is closed", || !export.connected());
}

#[test]
fn a_region_with_rings_may_be_taken_and_given_back_in_two_messages() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let plane = TestPlane::new(1 << 20, false);
    let _export = Export::new(DeviceId(1), config(1 << 20), &path, plane.clone()).unwrap();
    let mut frontend = negotiate(&path);
    let mut driver = Driver::new();
    start(&mut frontend, &driver, 0);
    driver.write_sector(0, 1, GUEST);
    wait("the first is answered", || driver.used() == 1);
    frontend
        .remove_mem_region(&region(&driver.memory, GUEST))
        .unwrap();
    driver.write_sector(1, 2, GUEST);
    frontend.add_mem_region(&region(&driver.memory, GUEST)).unwrap();
    // No further message, as QEMU sends none: the queue goes on by itself.
    wait("the second is answered", || driver.used() == 2);
}

#[test]
fn a_guest_that_does_not_flush_is_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let (path, next) = (dir.path().join("a.sock"), dir.path().join("b.sock"));
    let plane = TestPlane::new(1 << 20, false);
    let export = Export::new(DeviceId(1), config(1 << 20), &path, plane.clone()).unwrap();
    let mut frontend = negotiate(&path);
    let mut driver = Driver::new();
    let asked = VhostUserInflight::new(0, 0, 4, SIZE);
    let (log, file) = frontend.get_inflight_fd(&asked).unwrap();
    frontend.set_inflight_fd(&log, file.as_raw_fd()).unwrap();
    start(&mut frontend, &driver, 0);
    frontend
        .set_config(32, VhostUserConfigFlags::WRITABLE, &[0])
        .unwrap();
    driver.write_sector(0, 1, GUEST);
    wait("it is answered", || driver.used() == 1);
    assert!(export.shared().write_through());
    // The process dies, and the front end repeats everything but the configuration.
    std::mem::forget(frontend);
    let again = Export::new(DeviceId(1), config(1 << 20), &next, plane.clone()).unwrap();
    let mut frontend = negotiate(&next);
    assert!(!again.shared().write_through());
    frontend.set_inflight_fd(&log, file.as_raw_fd()).unwrap();
    assert!(again.shared().write_through());
    // A reset does not say that the guest flushes now; only the guest does.
    frontend.reset_device().unwrap();
    frontend.set_features(frontend.get_features().unwrap()).unwrap();
    assert!(again.shared().write_through());
    frontend
        .set_config(32, VhostUserConfigFlags::WRITABLE, &[1])
        .unwrap();
    assert!(!again.shared().write_through());
    std::mem::forget(export);
}

#[test]
fn files_that_are_no_memory_and_odd_queues_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let plane = TestPlane::new(1 << 20, false);
    let export = Export::new(DeviceId(1), config(1 << 20), &path, plane.clone()).unwrap();
    let short = tempfile::tempfile_in("/dev/shm").unwrap();
    short.set_len(100).unwrap();
    // Large enough, but whoever touches it may have to wait for a disk, or for a file system of the front end's own.
    let slow = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    slow.set_len(MEMORY).unwrap();
    for file in [File::open("/dev/zero").unwrap(), short, slow] {
        let frontend = negotiate(&path);
        assert!(frontend.set_mem_table(&[region(&file, GUEST)]).is_err());
    }
    let driver = Driver::new();
    let overlapping = [
        region(&driver.memory, GUEST),
        region(&driver.memory, GUEST + 4096),
    ];
    assert!(negotiate(&path).set_mem_table(&overlapping).is_err());
    for num in [0, 3, 512] {
        assert!(negotiate(&path).set_vring_num(1, num).is_err());
    }
    wait("all refused connections end", || !export.connected());
    assert!(export.shared().counters.messages_refused.load(Ordering::Relaxed) >= 6);
}
