//! A foreign driver, polled: libblkio's virtio-blk-vhost-user.

use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use unibody_dataplane::frontend::{DeviceConfig, DeviceId, Export};

use crate::plane::TestPlane;

pub(crate) fn config(bytes: u64) -> DeviceConfig {
    DeviceConfig {
        capacity_bytes: bytes,
        queues_max: 4,
        queue_size_max: 256,
        read_only: false,
        serial: "unibody-test".into(),
        instance: 7,
    }
}

struct Client {
    _blkio: Blkio,
    queue: Blkioq,
    memory: MemoryRegion,
}

fn connect(path: &Path, memory: usize) -> Client {
    let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
    blkio.set_str("path", path.to_str().unwrap()).unwrap();
    blkio.connect().unwrap();
    blkio.set_i32("num-queues", 0).unwrap();
    blkio.set_i32("num-poll-queues", 1).unwrap();
    blkio.set_i32("poll-queue-size", 256).ok();
    let mut started = blkio.start().unwrap();
    let memory = blkio.alloc_mem_region(memory).unwrap();
    blkio.map_mem_region(&memory).unwrap();
    let queue = started.poll_queues.remove(0);
    Client {
        _blkio: blkio,
        queue,
        memory,
    }
}

impl Client {
    fn wait(&mut self, n: usize) -> Vec<Completion> {
        let mut done = Vec::new();
        let end = Instant::now() + Duration::from_secs(20);
        while done.len() < n {
            assert!(Instant::now() < end, "{} of {n} requests completed", done.len());
            let mut room = [const { MaybeUninit::<Completion>::uninit() }; 128];
            let got = self.queue.do_io(&mut room, 0, None, None).unwrap();
            for slot in &room[..got] {
                // SAFETY: `do_io` filled that many.
                done.push(unsafe { slot.assume_init_read() });
            }
        }
        done
    }
}

#[test]
fn a_foreign_driver_reads_back_what_it_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let plane = TestPlane::new(8 << 20, false);
    let export = Export::new(DeviceId(1), config(8 << 20), &path, plane.clone()).unwrap();
    let mut client = connect(&path, 4 << 20);
    let base = client.memory.addr as *mut u8;
    for round in 0..64usize {
        // SAFETY: the region is ours and idle between rounds.
        let memory = unsafe { std::slice::from_raw_parts_mut(base, 2 << 20) };
        for (i, byte) in memory.iter_mut().enumerate() {
            *byte = (i / 4096 * 7 + i % 4096 + round) as u8;
        }
        for i in 0..64usize {
            client.queue.write(
                (i * 8192) as u64,
                memory[i * 4096..].as_ptr(),
                4096,
                i,
                ReqFlags::empty(),
            );
        }
        assert!(client.wait(64).iter().all(|c| c.ret == 0));
        for i in 0..64usize {
            let to = base.wrapping_add((2 << 20) + i * 4096);
            client
                .queue
                .read((i * 8192) as u64, to, 4096, i, ReqFlags::empty());
        }
        assert!(client.wait(64).iter().all(|c| c.ret == 0));
        // SAFETY: as above.
        let read = unsafe { std::slice::from_raw_parts(base.wrapping_add(2 << 20), 64 * 4096) };
        assert!(read == &memory[..64 * 4096], "round {round}");
    }
    client.queue.write_zeroes(0, 1 << 20, 0, ReqFlags::empty());
    client.queue.discard(1 << 20, 1 << 20, 1, ReqFlags::empty());
    client.queue.flush(2, ReqFlags::empty());
    client.queue.read(8 << 20, base, 4096, 3, ReqFlags::empty());
    let mut done = client.wait(4);
    done.sort_by_key(|c| c.user_data);
    assert_eq!(
        done.iter().map(|c| c.ret == 0).collect::<Vec<_>>(),
        [true, true, true, false]
    );
    let data = plane.control.data.lock().unwrap();
    assert!(data[..2 << 20].iter().all(|&b| b == 0) && data[2 << 20] == 0);
    assert_eq!(
        export
            .shared()
            .counters
            .requests_out_of_range
            .load(Ordering::Relaxed),
        1
    );
}

/// Requests a second against a device that does nothing, both sides polling. Run in release, alone:
/// with `SOCKET` set it measures whoever serves there:
/// `cargo test --release --test frontend_e2e -- --ignored --nocapture null_speed`.
#[test]
#[ignore = "a measurement"]
fn null_speed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.sock");
    let foreign = std::env::var_os("SOCKET");
    let ours = foreign.is_none().then(|| {
        let plane = TestPlane::new(0, true);
        Export::new(DeviceId(1), config(1 << 30), &path, plane).unwrap()
    });
    let mut client = connect(foreign.as_ref().map_or(path.as_path(), Path::new), 1 << 20);
    let seconds = std::env::var("SECONDS_EACH").map_or(1, |s| s.parse().unwrap());
    for depth in [1usize, 32, 128] {
        for write in [false, true] {
            let base = client.memory.addr as *mut u8;
            let mut random = 88172645463325252u64;
            let mut submit = |queue: &mut Blkioq, tag: usize| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let at = (random % (1 << 18)) << 12;
                let buffer = base.wrapping_add(tag * 4096);
                if write {
                    queue.write(at, buffer, 4096, tag, ReqFlags::empty());
                } else {
                    queue.read(at, buffer, 4096, tag, ReqFlags::empty());
                }
            };
            for tag in 0..depth {
                submit(&mut client.queue, tag);
            }
            let start = Instant::now();
            let mut n = 0u64;
            while start.elapsed() < Duration::from_secs(seconds) {
                for _ in 0..64 {
                    let mut room = [const { MaybeUninit::<Completion>::uninit() }; 128];
                    let got = client.queue.do_io(&mut room, 0, None, None).unwrap();
                    for slot in &room[..got] {
                        // SAFETY: `do_io` filled that many.
                        let done = unsafe { slot.assume_init_read() };
                        assert_eq!(done.ret, 0);
                        submit(&mut client.queue, done.user_data);
                    }
                    n += got as u64;
                }
            }
            let rate = n as f64 / start.elapsed().as_secs_f64();
            client.wait(depth);
            println!(
                "depth {depth} {}: {:.0} k/s",
                if write { "write" } else { "read" },
                rate / 1e3
            );
        }
    }
    drop(client);
    drop(ours);
}
