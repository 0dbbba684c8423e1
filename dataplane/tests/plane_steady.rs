//! A whole data plane under load, from the guest's queue to the disks: what it must not do in steady state is counted.
//!
//! Allocations of the reactor's thread are counted by the allocator, copies and system calls by the reactor's own
//! counters. Volumes on memory disks need no system call at all while they are polled.

mod counting;

use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::Arc;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use counting::allocations_of;
use unibody_dataplane::config::{Change, Outcome, Slot, SlotState, VolumeConfig};
use unibody_dataplane::disk::memory_disk::MemoryDisk;
use unibody_dataplane::frontend::{self, DeviceConfig, DeviceId, Export, Queue};
use unibody_dataplane::geometry::Geometry;
use unibody_dataplane::ids::{BootId, DiskUuid, Generation, LayerId, PowerId, VolumeId};
use unibody_dataplane::plane::{DiskIndex, DiskService, DiskUp, Event, Plane, QueueKey, VolumeIndex};
use unibody_dataplane::store::{FormatOptions, OpenOptions, Store};

struct Sessions(Arc<Plane>);

impl frontend::Plane for Sessions {
    fn start_queue(&self, device: DeviceId, index: u16, queue: Queue) {
        self.0.start_queue(
            QueueKey {
                device: device.0,
                index,
            },
            VolumeIndex(0),
            Box::new(queue),
        );
    }

    fn stop_queue(&self, device: DeviceId, index: u16) -> Option<Queue> {
        self.0
            .stop_queue(
                QueueKey {
                    device: device.0,
                    index,
                },
                VolumeIndex(0),
            )
            .map(|queue| *queue)
    }

    fn report(&self, _: DeviceId, message: &str) {
        panic!("{message}");
    }
}

const SIZE: u64 = 64 << 20;

fn disk(number: u16) -> (DiskUp, DiskService) {
    let mut device = MemoryDisk::new(256 << 20).unwrap();
    let uuid = DiskUuid(u128::from(number) + 1);
    let options = FormatOptions {
        uuid,
        journal_bytes: None,
        force: false,
        already_zero: true,
    };
    Store::format(&mut device, &options).unwrap();
    let (boot, power) = (BootId(7), PowerId(8));
    let (store, _) = Store::open(
        &mut device,
        &OpenOptions {
            boot,
            power,
            cache_bytes: 16 << 20,
        },
    )
    .unwrap();
    let up = DiskUp {
        index: DiskIndex(number),
        uuid,
        boot,
        power,
        inline: true,
        null: false,
    };
    (up, DiskService::Store(Box::new(store), Box::new(device)))
}

fn config(disks: &[DiskUp]) -> VolumeConfig {
    let geometry = Geometry::new(256 << 10, 1).unwrap();
    let slot = |up: &DiskUp| Slot {
        disk: up.uuid,
        state: SlotState::InSync,
        incarnation: 1,
        boot: BootId::default(),
        power: PowerId::default(),
    };
    VolumeConfig {
        id: VolumeId(1),
        head: LayerId(1),
        size: SIZE,
        geometry,
        generation: Generation(1),
        config: 1,
        chunks: vec![disks.iter().map(slot).collect(); geometry.chunks(SIZE) as usize],
    }
}

/// Says yes to everything.
fn decide(plane: Arc<Plane>, events: std::sync::mpsc::Receiver<Event>, mut config: VolumeConfig) {
    for event in events {
        if let Event::Proposal(index, _, proposal) = event {
            config.config += 1;
            if let Change::MarkInSync {
                disk,
                chunks,
                boot,
                power,
            } = proposal.change
            {
                for slot in chunks
                    .iter()
                    .flat_map(|&c| config.chunks[c as usize].clone())
                    .filter(|s| s.disk == disk)
                {
                    let _ = slot;
                }
                for &chunk in &chunks {
                    for slot in config.chunks[chunk as usize]
                        .iter_mut()
                        .filter(|slot| slot.disk == disk)
                    {
                        (slot.boot, slot.power) = (boot, power);
                    }
                }
            }
            plane.decided(index, Outcome::Committed(config.clone()));
        }
    }
}

struct Client {
    queue: Blkioq,
    memory: MemoryRegion,
    _blkio: Blkio,
}

impl Client {
    fn connect(path: &Path) -> Self {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_str("path", path.to_str().unwrap()).unwrap();
        blkio.connect().unwrap();
        blkio.set_i32("num-queues", 0).unwrap();
        blkio.set_i32("num-poll-queues", 1).unwrap();
        let mut started = blkio.start().unwrap();
        let memory = blkio.alloc_mem_region(2 << 20).unwrap();
        blkio.map_mem_region(&memory).unwrap();
        Client {
            queue: started.poll_queues.remove(0),
            memory,
            _blkio: blkio,
        }
    }

    /// `count` requests of `len` bytes, 32 at a time, spread over the volume.
    fn load(&mut self, write: bool, count: usize, len: usize) {
        let slots = SIZE as usize / len;
        let (mut begun, mut ended) = (0, 0);
        while ended < count {
            while begun < count && begun - ended < 32 {
                let at = (begun * 7919 % slots * len) as u64;
                let tag = begun % 32;
                let buffer = (self.memory.addr + tag * len) as *mut u8;
                if write {
                    self.queue.write(at, buffer, len, tag, ReqFlags::empty());
                } else {
                    self.queue.read(at, buffer, len, tag, ReqFlags::empty());
                }
                begun += 1;
            }
            let mut room = [const { MaybeUninit::<Completion>::uninit() }; 32];
            let got = self.queue.do_io(&mut room, 0, None, None).unwrap();
            for slot in &room[..got] {
                // SAFETY: `do_io` filled that many.
                assert_eq!(unsafe { slot.assume_init_ref() }.ret, 0);
            }
            ended += got;
        }
    }
}

#[test]
fn in_steady_state_nothing_is_allocated_and_each_write_is_copied_once() {
    let core = unibody_dataplane::reactor::pin::allowed_cores()[0];
    let (plane, events) = Plane::start(&[core]).unwrap();
    let plane = Arc::new(plane);
    let mut ups = Vec::new();
    for number in 0..2 {
        let (up, service) = disk(number);
        plane.add_disk(up, service).unwrap();
        ups.push(up);
    }
    let config = config(&ups);
    let decider = {
        let (plane, config) = (Arc::clone(&plane), config.clone());
        std::thread::spawn(move || decide(plane, events, config))
    };
    plane.add_volume(VolumeIndex(0), config, ups);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let device = DeviceConfig {
        capacity_bytes: SIZE,
        queues_max: 1,
        queue_size_max: 256,
        read_only: false,
        serial: "steady".into(),
        instance: 1,
    };
    let export = Export::new(DeviceId(0), device, &path, Arc::new(Sessions(Arc::clone(&plane)))).unwrap();
    let mut client = Client::connect(&path);
    // Everything is touched once: extents taken, tables grown, chunks marked dirty.
    client.load(true, (SIZE / 65536) as usize, 65536);
    for len in [4096, 65536] {
        client.load(true, 40_000, len);
        client.load(false, 20_000, len);
    }
    for (write, len) in [(true, 4096), (false, 4096), (true, 65536), (false, 65536)] {
        let stats = || plane.status().remove(0).reactor;
        // The first status request allocates the answer, so it comes before the count.
        let before_stats = stats();
        client.load(write, 1000, len);
        let before = allocations_of("reactor0");
        client.load(write, 20_000, len);
        let allocated = allocations_of("reactor0") - before;
        assert_eq!(
            allocated, 0,
            "{allocated} allocations in 20,000 requests (write: {write}, {len} bytes)"
        );
        let after = stats();
        let (copied, requests) = (
            after.copied_in - before_stats.copied_in,
            after.requests - before_stats.requests,
        );
        assert_eq!(requests, 21_000);
        assert_eq!(
            copied,
            if write { 21_000 * len as u64 } else { 0 },
            "each byte written is copied once, none read"
        );
        assert_eq!(
            after.copied_out, before_stats.copied_out,
            "reads land in the guest's memory"
        );
    }
    drop(client);
    drop(export);
    assert!(plane.remove_volume(VolumeIndex(0)).recv().is_ok());
    drop(plane);
    // The decider holds the plane until the events end, so it is left to end with the process.
    drop(decider);
}
