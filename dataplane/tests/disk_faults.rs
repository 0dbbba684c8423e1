//! The fault-injecting disk: each fault does what it says, and nothing else.

mod support;

use std::time::{Duration, Instant};

use support::{Dice, Rig, crc32c};
use unibody_dataplane::disk::faulty::{Fault, FaultHandle, FaultyDisk, Kinds, Rule};
use unibody_dataplane::disk::file::DiskFile;
use unibody_dataplane::disk::memory_disk::MemoryDisk;
use unibody_dataplane::disk::uring::UringDisk;
use unibody_dataplane::disk::{Disk, Io, IoError};
use unibody_dataplane::memory::Arena;

const DISK: u64 = 4 << 20;
const B: usize = 4096;

/// Each test runs over a synchronous and an asynchronous disk.
fn rigs() -> Vec<(Rig, FaultHandle, Option<tempfile::TempDir>)> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = DiskFile::create(&dir.path().join("disk"), DISK).unwrap();
    let disks: [(Box<dyn Disk>, _); 2] = [
        (Box::new(MemoryDisk::new(DISK).unwrap()), None),
        (Box::new(UringDisk::new(file, false).unwrap()), Some(dir)),
    ];
    disks
        .into_iter()
        .map(|(disk, dir)| {
            let (disk, handle) = FaultyDisk::new(disk);
            (Rig::new(Box::new(disk)), handle, dir)
        })
        .collect()
}

fn read_io(arena: &Arena, offset: u64, blocks: usize) -> Io {
    Io::Read {
        offset,
        len: (blocks * B) as u32,
        data: arena.payload(0),
        crcs: true,
    }
}

#[test]
fn errors_by_kind_range_and_count() {
    for (mut rig, handle, _dir) in rigs() {
        let arena = Arena::new(16).unwrap();
        handle.add(Rule {
            range: 8192..12288,
            after: 1,
            times: 2,
            ..Rule::always(Kinds::READS, Fault::Fail(IoError::Media))
        });
        let read = |rig: &mut Rig, at, blocks| rig.run(read_io(&arena, at, blocks)).result;
        assert_eq!(read(&mut rig, 0, 2), Ok(()), "outside");
        assert_eq!(read(&mut rig, 12288, 1), Ok(()), "outside");
        assert_eq!(read(&mut rig, 4096, 2), Ok(()), "spared");
        assert_eq!(read(&mut rig, 4096, 2), Err(IoError::Media));
        assert_eq!(
            rig.run(Io::Verify {
                offset: 8192,
                len: 4096
            })
            .result,
            Err(IoError::Media)
        );
        assert_eq!(read(&mut rig, 4096, 2), Ok(()), "used up");
        assert_eq!(rig.write(8192, &[1; B]).result, Ok(()), "no read");
        assert_eq!(handle.faults(), 2);

        handle.add(Rule::always(Kinds::FLUSHES, Fault::Fail(IoError::Gone)));
        handle.add(Rule::always(Kinds::WRITES, Fault::Fail(IoError::NoSpace)));
        assert_eq!(rig.run(Io::Flush).result, Err(IoError::Gone));
        assert_eq!(rig.write(0, &[2; B]).result, Err(IoError::NoSpace));
        assert_eq!(rig.read(0, B), [0; B], "a failed write does nothing");
        handle.clear();
        assert_eq!(rig.run(Io::Flush).result, Ok(()));
        assert_eq!(rig.write(0, &[2; B]).result, Ok(()));
    }
}

#[test]
fn rot_is_one_bit_always_the_same_and_summed() {
    for (mut rig, handle, _dir) in rigs() {
        let mut bytes = vec![0; 3 * B];
        Dice(3).fill(&mut bytes);
        rig.write(0, &bytes);
        handle.add(Rule {
            range: 4096..8192,
            ..Rule::always(Kinds::READS, Fault::Rot)
        });
        let arena = Arena::new(3).unwrap();
        let completion = rig.run(read_io(&arena, 0, 3));
        let rotten = arena.bytes(0, 3).to_vec();
        let bits: u32 = rotten.iter().zip(&bytes).map(|(a, b)| (a ^ b).count_ones()).sum();
        assert_eq!(bits, 1);
        assert_eq!((&rotten[..B], &rotten[2 * B..]), (&bytes[..B], &bytes[2 * B..]));
        let sums: Vec<u32> = rotten.chunks(B).map(crc32c).collect();
        assert_eq!(&completion.crcs[..3], sums);
        assert_eq!(rig.read(0, 3 * B), rotten);
        let verify = rig.run(Io::Verify {
            offset: 4096,
            len: 4096,
        });
        assert_ne!(verify.crcs[0], crc32c(&bytes[B..2 * B]));
        handle.clear();
        assert_eq!(rig.read(0, 3 * B), bytes, "the disk beneath is whole");
    }
}

#[test]
fn torn_and_lost_writes_report_success() {
    for torn in [0, 512, 4096, 4096 + 1536, 3 * 4096] {
        for (mut rig, handle, _dir) in rigs() {
            rig.write(4096, &[1; 3 * B]);
            handle.add(Rule {
                times: 1,
                ..Rule::always(Kinds::WRITES, Fault::Torn { bytes: torn })
            });
            assert_eq!(rig.write(4096, &[2; 3 * B]).result, Ok(()));
            let (new, old) = (vec![2; torn as usize], vec![1; 3 * B - torn as usize]);
            assert!(rig.read(4096, 3 * B) == [new, old].concat(), "torn after {torn}");

            handle.add(Rule::always(
                Kinds {
                    zeroes: true,
                    ..Kinds::WRITES
                },
                Fault::Lost,
            ));
            assert_eq!(rig.write(4096, &[3; B]).result, Ok(()));
            assert_eq!(
                rig.run(Io::WriteZeroes {
                    offset: 8192,
                    len: 8192
                })
                .result,
                Ok(())
            );
            assert!(!rig.read(4096, 3 * B).contains(&3) && !rig.read(8192, B).contains(&0));
            assert_eq!(handle.faults(), 3);
        }
    }
}

#[test]
fn stuck_until_cleared_and_delayed_for_as_long_as_said() {
    for (mut rig, handle, _dir) in rigs() {
        let arena = Arena::new(1).unwrap();
        handle.add(Rule {
            times: 1,
            ..Rule::always(Kinds::READS, Fault::Stuck)
        });
        rig.submit(1, read_io(&arena, 0, 1));
        for _ in 0..100 {
            rig.turn();
        }
        assert!(rig.done.is_empty() && rig.disk.in_hand() == 1 && !rig.disk.must_poll());
        handle.clear();
        rig.drain();
        assert_eq!(rig.done.pop().unwrap().result, Ok(()));

        let delay = Duration::from_millis(20);
        handle.add(Rule::always(Kinds::READS, Fault::Delay(delay)));
        let start = Instant::now();
        rig.run(read_io(&arena, 0, 1));
        assert!(start.elapsed() >= delay, "it must not come early");
        handle.clear();
    }
}

#[test]
fn what_was_not_flushed_vanishes_with_the_cache() {
    for (mut rig, handle, _dir) in rigs() {
        rig.write(0, &[1; 4 * B]);
        handle.cached(true);
        rig.write(0, &[2; B]);
        rig.run(Io::WriteZeroes {
            offset: 4096,
            len: 4096,
        });
        assert_eq!(rig.run(Io::Flush).result, Ok(()));
        rig.write(8192, &[3; B]);
        rig.run(Io::WriteZeroes {
            offset: 12288,
            len: 4096,
        });
        let arena = Arena::new(4).unwrap();
        let all = |rig: &mut Rig, arena: &Arena| {
            let crcs = rig.run(read_io(arena, 0, 4)).crcs;
            let bytes = arena.bytes(0, 4).to_vec();
            let sums: Vec<u32> = bytes.chunks(B).map(crc32c).collect();
            assert_eq!(&crcs[..4], sums);
            bytes.chunks(B).map(|block| block[0]).collect::<Vec<_>>()
        };
        assert_eq!(all(&mut rig, &arena), [2, 0, 3, 0], "the cache is seen by reads");
        handle.drop_cache();
        assert_eq!(
            all(&mut rig, &arena),
            [2, 0, 1, 1],
            "flushed stays, the rest is gone"
        );
        rig.write(8192, &[4; B]);
        handle.cached(false);
        assert_eq!(rig.run(Io::Flush).result, Ok(()));
        handle.drop_cache();
        assert_eq!(
            all(&mut rig, &arena),
            [2, 0, 4, 1],
            "switched off, it is written by the next flush"
        );
    }
}

/// Many at once, cached, flushing all the time: the last write of each block is read, then and in the end.
#[test]
fn a_cached_disk_is_a_disk() {
    for (mut rig, handle, _dir) in rigs() {
        handle.cached(true);
        let mut dice = Dice(8);
        let blocks = DISK / B as u64;
        let mut model = vec![0u8; blocks as usize];
        // Later reads look for what this round wrote, while a flush may be taking it away.
        let place = |base: u64, i: u64| (base + if i % 2 == 1 && i > 30 { i - 31 } else { i } * 5) % blocks;
        let mut arena = Arena::new(64).unwrap();
        for round in 0..40u64 {
            // 32 writes to different blocks, reads of 32 others, and a flush in between.
            let base = dice.below(blocks);
            for i in 0..64u64 {
                let block = place(base, i);
                let page = i as usize;
                if i % 2 == 0 {
                    let value = dice.next() as u8;
                    arena.bytes_mut(page, 1).fill(value);
                    model[block as usize] = value;
                    rig.submit(
                        i,
                        Io::Write {
                            offset: block * B as u64,
                            len: B as u32,
                            data: arena.payload(page),
                        },
                    );
                } else {
                    arena.bytes_mut(page, 1).fill(0xee);
                    let data = arena.payload(page);
                    rig.submit(
                        i,
                        Io::Read {
                            offset: block * B as u64,
                            len: B as u32,
                            data,
                            crcs: false,
                        },
                    );
                }
                if i == 20 || i == 50 {
                    rig.submit(100, Io::Flush);
                }
            }
            rig.drain();
            assert_eq!(rig.done.len(), 66);
            assert!(rig.done.drain(..).all(|c| c.result == Ok(())));
            for i in (1..64u64).step_by(2) {
                let block = place(base, i);
                assert_eq!(
                    arena.bytes(i as usize, 1),
                    [model[block as usize]; B],
                    "round {round}"
                );
            }
        }
        let bytes = rig.read(0, DISK as usize);
        assert!(
            bytes
                .chunks(B)
                .zip(&model)
                .all(|(block, &value)| block == [value; B])
        );
    }
}

#[test]
fn a_failing_flush_of_the_cache_is_a_failed_flush() {
    let (inner, inner_handle) = FaultyDisk::new(Box::new(MemoryDisk::new(DISK).unwrap()));
    let (outer, handle) = FaultyDisk::new(Box::new(inner));
    let mut rig = Rig::new(Box::new(outer));
    handle.cached(true);
    rig.write(0, &[1; B]);
    inner_handle.add(Rule::always(Kinds::WRITES, Fault::Fail(IoError::Media)));
    assert_eq!(rig.run(Io::Flush).result, Err(IoError::Media));
    assert_eq!(
        rig.run(Io::Flush).result,
        Ok(()),
        "and, as with real devices, the next one says nothing"
    );
}
