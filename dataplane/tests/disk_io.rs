//! Every back end against a plain model: random I/O, many at a time, through every shape of memory.

mod support;

use std::path::{Path, PathBuf};

use support::{Dice, Rig, crc32c};
use unibody_dataplane::disk::file::{DiskFile, FileBlocks, OpenError};
use unibody_dataplane::disk::memory_disk::MemoryDisk;
use unibody_dataplane::disk::open::OpenDisk;
use unibody_dataplane::disk::spec::Backend;
use unibody_dataplane::disk::uring::UringDisk;
use unibody_dataplane::disk::{BlockIo, Busy, Completion, Disk, DiskKind, Io, IoError, QUEUE_MAX, Token};
use unibody_dataplane::ids::{BLOCK, EXTENT};
use unibody_dataplane::memory::{Arena, Payload, Seg};
use unibody_dataplane::reactor::Ring;

const DISK: u64 = 8 << 20;

fn on_disk() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn on_tmpfs() -> Option<tempfile::TempDir> {
    let dir = tempfile::tempdir_in("/dev/shm").ok();
    if dir.is_none() {
        eprintln!("SKIPPED: no /dev/shm here, so nothing was tested on tmpfs");
    }
    dir
}

fn uring(dir: &Path, iopoll: bool) -> Box<dyn Disk> {
    let file = DiskFile::create(&dir.join("disk"), DISK).unwrap();
    Box::new(UringDisk::new(file, iopoll).unwrap())
}

/// One request of the random run: its slice of the arena and its memory's shape.
struct Slot {
    io: Option<Io>,
    segs: Vec<Seg>,
    blocks: std::ops::Range<u64>,
    expect: Vec<u8>,
}

/// Cuts memory at `base` into pieces: one, a few aligned ones, or many crooked ones.
fn shape(dice: &mut Dice, base: *mut u8, len: usize) -> Vec<Seg> {
    let step = match dice.below(4) {
        0 => len,
        1 => BLOCK,
        2 => 512 * (1 + dice.below(9) as usize),
        _ => 1 + dice.below(3000) as usize,
    };
    let shift = match dice.below(3) {
        0 => 1 + dice.below(600) as usize,
        _ => 0,
    };
    (0..len)
        .step_by(step)
        .map(|at| Seg {
            ptr: base.wrapping_add(shift + at),
            len: step.min(len - at) as u32,
        })
        .collect()
}

/// Random reads, writes, zeroes, verifies and flushes, up to 64 at a time, never two on one block at a time if one of
/// them changes it (that is the store's promise). Everything read must be what the model says, checksums included.
fn random_run(rig: &mut Rig, seed: u64, rounds: usize) {
    const SLOTS: usize = 64;
    const ROOM: usize = EXTENT + BLOCK;
    let mut dice = Dice(seed);
    let mut model = vec![0u8; DISK as usize];
    let arena = Arena::new(SLOTS * ROOM / BLOCK).unwrap();
    let (base, bytes) = arena.span();
    if dice.below(2) == 0 {
        // SAFETY: the arena outlives its registration, which ends below.
        unsafe { rig.ring.register_memory(base, bytes) };
    }
    let mut slots: Vec<Slot> = (0..SLOTS)
        .map(|_| Slot {
            io: None,
            segs: Vec::new(),
            blocks: 0..0,
            expect: Vec::new(),
        })
        .collect();
    let mut ended = 0;
    let mut begun = 0;
    while ended < rounds {
        for i in 0..SLOTS {
            if slots[i].io.is_some() || begun == rounds || dice.below(3) == 0 {
                continue;
            }
            let count = 1 + dice.below(16);
            let first = dice.below(DISK / BLOCK as u64 - count + 1);
            let kind = dice.below(10);
            let changes = (4..9).contains(&kind);
            let blocks = if kind == 9 { 0..0 } else { first..first + count };
            let clash = slots.iter().any(|s| match s.io {
                Some(io) => {
                    let other = matches!(io, Io::Write { .. } | Io::WriteZeroes { .. });
                    (changes || other) && s.blocks.start < blocks.end && blocks.start < s.blocks.end
                }
                None => false,
            });
            if clash {
                continue;
            }
            let (offset, len) = (first * BLOCK as u64, count as u32 * BLOCK as u32);
            let memory = base.wrapping_add(i * ROOM);
            slots[i].segs = shape(&mut dice, memory, len as usize);
            slots[i].blocks = blocks;
            let data = Payload::new(&slots[i].segs);
            let range = offset as usize..(offset + u64::from(len)) as usize;
            let io = match kind {
                0..=2 => Io::Read {
                    offset,
                    len,
                    data,
                    crcs: dice.below(4) > 0,
                },
                3 => Io::Verify { offset, len },
                4..=7 => {
                    dice.fill(&mut model[range.clone()]);
                    let mut at = range.start;
                    for seg in &slots[i].segs {
                        let piece = &model[at..at + seg.len as usize];
                        // SAFETY: the slot's part of the arena is idle.
                        unsafe { seg.ptr.copy_from_nonoverlapping(piece.as_ptr(), piece.len()) };
                        at += seg.len as usize;
                    }
                    Io::Write { offset, len, data }
                }
                8 => {
                    model[range.clone()].fill(0);
                    Io::WriteZeroes { offset, len }
                }
                _ => Io::Flush,
            };
            slots[i].expect = model[range].to_vec();
            slots[i].io = Some(io);
            begun += 1;
            rig.submit(i as u64, io);
        }
        rig.turn();
        if rig.done.is_empty() && begun == rounds {
            rig.drain();
        }
        for completion in std::mem::take(&mut rig.done) {
            let slot = &mut slots[completion.token.0 as usize];
            let io = slot.io.take().expect("completed once");
            assert_eq!(completion.result, Ok(()), "{io:?}");
            let sums: Vec<u32> = slot.expect.chunks(BLOCK).map(crc32c).collect();
            match io {
                Io::Read { crcs, .. } => {
                    // SAFETY: the read has ended; nobody else uses the slot's memory.
                    let read: Vec<u8> = slot
                        .segs
                        .iter()
                        .flat_map(|s| unsafe { std::slice::from_raw_parts(s.ptr, s.len as usize) })
                        .copied()
                        .collect();
                    assert!(read == slot.expect, "{io:?} read something else");
                    if crcs {
                        assert_eq!(&completion.crcs[..sums.len()], sums);
                    }
                }
                Io::Verify { .. } => assert_eq!(&completion.crcs[..sums.len()], sums),
                _ => {}
            }
            ended += 1;
        }
    }
    assert_eq!(rig.disk.in_hand(), 0);
    assert!(
        rig.read(0, DISK as usize) == model,
        "the disk differs from the model in the end"
    );
    assert!(rig.ring.unregister_memory(base));
}

#[test]
fn memory_disk_is_a_disk() {
    for seed in 0..4 {
        random_run(
            &mut Rig::new(Box::new(MemoryDisk::new(DISK).unwrap())),
            seed,
            2000,
        );
    }
}

#[test]
fn file_is_a_disk() {
    for seed in 0..4 {
        let dir = on_disk();
        random_run(&mut Rig::new(uring(dir.path(), false)), seed, 2000);
    }
}

#[test]
fn file_polled_is_a_disk() {
    let dir = on_disk();
    let mut rig = Rig::new(uring(dir.path(), true));
    random_run(&mut rig, 9, 1000);
    eprintln!("completions polled from the device: {}", rig.disk.info().iopoll);
}

#[test]
fn tmpfs_file_is_a_disk() {
    let Some(dir) = on_tmpfs() else { return };
    let mut rig = Rig::new(uring(dir.path(), true));
    let info = rig.disk.info();
    assert!(!info.iopoll && !info.volatile_cache && info.kind == DiskKind::File);
    for seed in 0..2 {
        random_run(&mut rig, seed, 1000);
        rig.run(Io::WriteZeroes {
            offset: 0,
            len: DISK as u32,
        });
    }
}

/// A ring with almost no room: everything has to wait for it, and nothing is lost.
#[test]
fn a_tiny_ring_is_enough() {
    let dir = on_disk();
    let mut rig = Rig::with_ring(uring(dir.path(), false), Ring::new(2).unwrap());
    random_run(&mut rig, 5, 500);
}

struct LoopDevice(PathBuf);

impl LoopDevice {
    fn new(file: &Path) -> Option<Self> {
        let out = std::process::Command::new("losetup")
            .args(["--direct-io=on", "--show", "-f"])
            .arg(file)
            .output();
        match out {
            Ok(out) if out.status.success() => {
                Some(LoopDevice(String::from_utf8(out.stdout).unwrap().trim().into()))
            }
            other => {
                eprintln!(
                    "SKIPPED: no loop device to be had here ({other:?}), so no block device was tested"
                );
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup")
            .arg("-d")
            .arg(&self.0)
            .status();
    }
}

#[test]
fn block_device_is_a_disk() {
    let dir = on_disk();
    let path = dir.path().join("backing");
    std::fs::File::create(&path).unwrap().set_len(DISK).unwrap();
    let Some(device) = LoopDevice::new(&path) else {
        return;
    };
    let file = DiskFile::open(&device.0).unwrap();
    assert_eq!(
        (file.info().kind, file.info().bytes, file.info().direct),
        (DiskKind::BlockDevice, DISK, true)
    );
    assert!(
        matches!(DiskFile::open(&device.0), Err(OpenError::InUse(_))),
        "a device is opened once"
    );
    let mut rig = Rig::new(Box::new(UringDisk::new(file, true).unwrap()));
    random_run(&mut rig, 3, 1000);
}

#[test]
fn a_disk_is_opened_once() {
    let dir = on_disk();
    let path = dir.path().join("disk");
    let first = DiskFile::create(&path, DISK).unwrap();
    assert!(matches!(DiskFile::open(&path), Err(OpenError::InUse(_))));
    let disk = UringDisk::new(first, false).unwrap();
    assert!(
        matches!(DiskFile::open(&path), Err(OpenError::InUse(_))),
        "the lock goes along"
    );
    drop(disk);
    DiskFile::open(&path).unwrap();
}

#[test]
fn what_can_not_be_a_disk_is_refused() {
    let dir = on_disk();
    let path = dir.path().join("disk");
    let open = |path: &Path| DiskFile::open(path).unwrap_err();
    assert!(matches!(open(&path), OpenError::NotFound(_)));
    assert!(matches!(open(dir.path()), OpenError::Kind(_)));
    assert!(matches!(open(Path::new("/dev/null")), OpenError::Kind(_)));
    std::fs::write(&path, [0; 4095]).unwrap();
    assert!(matches!(open(&path), OpenError::TooSmall { bytes: 4095, .. }));
    assert!(matches!(DiskFile::create(&path, DISK), Err(OpenError::Exists(_))));
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 4095, "and left alone");
    std::fs::write(&path, [7; 9000]).unwrap();
    assert_eq!(
        DiskFile::open(&path).unwrap().info().bytes,
        8192,
        "whole blocks only"
    );
}

#[test]
fn full_is_said_and_nothing_is_lost() {
    let dir = on_disk();
    let mut rig = Rig::new(uring(dir.path(), false));
    let arena = Arena::new(1).unwrap();
    let read = Io::Read {
        offset: 0,
        len: BLOCK as u32,
        data: arena.payload(0),
        crcs: false,
    };
    for token in 0..QUEUE_MAX {
        rig.submit(token as u64, read);
    }
    // SAFETY: the arena outlives the drain below.
    let refused = unsafe { rig.disk.submit(&mut rig.ring, Token(9999), read, &mut rig.done) };
    assert_eq!(refused, Err(Busy));
    rig.drain();
    let mut tokens: Vec<u64> = rig.done.iter().map(|c| c.token.0).collect();
    tokens.sort_unstable();
    assert_eq!(tokens, (0..QUEUE_MAX as u64).collect::<Vec<_>>());
}

#[test]
fn a_file_cut_short_is_a_media_error() {
    let dir = on_disk();
    let mut rig = Rig::new(uring(dir.path(), false));
    std::fs::File::options()
        .write(true)
        .open(dir.path().join("disk"))
        .unwrap()
        .set_len(EXTENT as u64)
        .unwrap();
    let arena = Arena::new(16).unwrap();
    let read = |offset| Io::Read {
        offset,
        len: EXTENT as u32,
        data: arena.payload(0),
        crcs: true,
    };
    assert_eq!(rig.run(read(0)).result, Ok(()));
    assert_eq!(rig.run(read(EXTENT as u64)).result, Err(IoError::Media));
    assert_eq!(
        rig.run(read(EXTENT as u64 / 2)).result,
        Err(IoError::Media),
        "half of it is not enough"
    );
    assert_eq!(
        rig.run(Io::Verify {
            offset: DISK / 2,
            len: 4096
        })
        .result,
        Err(IoError::Media)
    );
}

#[test]
#[should_panic(expected = "outside a disk")]
fn outside_is_a_bug() {
    let mut rig = Rig::new(Box::new(MemoryDisk::new(DISK).unwrap()));
    rig.submit(
        0,
        Io::Verify {
            offset: DISK - BLOCK as u64,
            len: 2 * BLOCK as u32,
        },
    );
}

#[test]
#[should_panic(expected = "misshapen")]
fn part_of_a_block_is_a_bug() {
    let mut rig = Rig::new(Box::new(MemoryDisk::new(DISK).unwrap()));
    rig.submit(0, Io::WriteZeroes { offset: 0, len: 512 });
}

/// Sequential access on every back end: the same model, simpler.
fn sequential(disk: &mut dyn BlockIo) {
    let (mut dice, mut model) = (Dice(1), vec![0u8; DISK as usize]);
    assert_eq!(disk.size(), DISK);
    for _ in 0..60 {
        let blocks = 1 + dice.below(600);
        let first = dice.below(DISK / BLOCK as u64 - blocks);
        let (at, len) = (first * BLOCK as u64, blocks as usize * BLOCK);
        let range = at as usize..at as usize + len;
        match dice.below(3) {
            0 => {
                model[range.clone()].fill(0);
                disk.write_zeroes(at, len as u64).unwrap();
            }
            _ => {
                dice.fill(&mut model[range.clone()]);
                disk.write(at, &model[range.clone()]).unwrap();
                assert!(!disk.known_zero(at, len as u64));
            }
        }
        let mut back = vec![1; len + 1];
        disk.read(at, &mut back[1..]).unwrap();
        assert!(back[1..] == model[range]);
    }
    disk.flush().unwrap();
    let mut back = vec![1; DISK as usize];
    disk.read(0, &mut back).unwrap();
    assert!(back == model);
}

#[test]
fn sequential_access() {
    sequential(&mut MemoryDisk::new(DISK).unwrap());
    for dir in [Some(on_disk()), on_tmpfs()].into_iter().flatten() {
        let path = dir.path().join("disk");
        let mut blocks = FileBlocks::new(DiskFile::create(&path, DISK).unwrap()).unwrap();
        assert!(blocks.known_zero(0, DISK), "a fresh file is all hole");
        sequential(&mut blocks);
        drop(blocks);
        let mut open = OpenDisk::open(&Backend::Path(path)).unwrap();
        assert_eq!(open.blocks().unwrap().size(), DISK);
        assert_eq!(open.into_disk(false).unwrap().info().bytes, DISK);
    }
}

/// The memory of a zeroed range goes back where the file system can do that.
#[test]
fn large_zeroes_give_space_back() {
    use std::os::unix::fs::MetadataExt;
    let dir = on_disk();
    let mut rig = Rig::new(uring(dir.path(), false));
    let used = || std::fs::metadata(dir.path().join("disk")).unwrap().blocks() * 512;
    let completion: Completion = rig.write(0, &vec![1; 1 << 20]);
    assert_eq!(completion.result, Ok(()));
    rig.run(Io::Flush);
    let before = used();
    assert!(before >= 1 << 20);
    assert_eq!(
        rig.run(Io::WriteZeroes {
            offset: 0,
            len: 1 << 20
        })
        .result,
        Ok(())
    );
    rig.run(Io::Flush);
    if used() >= before {
        eprintln!("SKIPPED: this file system does not deallocate");
    }
    assert!(rig.read(0, 1 << 20).iter().all(|&byte| byte == 0));
}
