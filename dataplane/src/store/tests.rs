//! Single behaviours of a store.

use super::tests_disk::*;
use super::*;
use crate::ids::*;
use crate::replica::{ExtentImage, Status};

fn rig() -> Rig {
    let (mut rig, report) = Rig::open(formatted(16 << 20, 256 << 10), 1);
    assert!(report.clean && report.damage.is_empty());
    assert!(matches!(rig.ask(header(1, 0), Request::Seal), Reply::Sealed(_)));
    assert_eq!(
        rig.ask(header(1, 0), Request::CreateChunk(chunk(0, 1))),
        Reply::Done
    );
    rig
}

#[test]
fn writes_and_reads_back() {
    let mut rig = rig();
    let s = span(chunk(0, 1), 3, 2, 4);
    let write = rig.stamped(0, s, 7);
    assert_eq!(rig.ask(header(1, 0), write), Reply::Done);
    let (holes, bad, bytes) = rig.read(1, span(chunk(0, 1), 3, 0, 16));
    assert_eq!((holes, bad), (!0b11_1100, 0));
    assert_eq!(version_of(&bytes[2 * BLOCK..3 * BLOCK], 0, 3, 2), Ok(7));
}

#[test]
fn refuses_strangers() {
    let mut rig = rig();
    let s = span(chunk(0, 1), 0, 0, 1);
    let write = rig.stamped(0, s, 1);
    let refused = |status| Reply::Refused(status);
    assert_eq!(rig.ask(header(2, 0), write), refused(Status::StaleGeneration));
    assert!(matches!(rig.ask(header(3, 0), Request::Seal), Reply::Sealed(_)));
    assert_eq!(rig.ask(header(1, 0), write), refused(Status::StaleGeneration));
    assert_eq!(
        rig.ask(header(2, 0), Request::Seal),
        refused(Status::StaleGeneration)
    );
    let late = rig.stamped(0, span(chunk(0, 2), 0, 0, 1), 1);
    assert_eq!(rig.ask(header(3, 0), late), refused(Status::NoChunk));
    let nonsense = rig.stamped(0, s, 1);
    let Request::Write {
        version, crcs, data, ..
    } = nonsense
    else {
        panic!()
    };
    let span = span(chunk(0, 1), 0, 10, 7);
    let wide = Request::Write {
        span,
        version,
        crcs,
        data,
    };
    assert_eq!(rig.ask(header(3, 0), wide), refused(Status::Invalid));
}

#[test]
fn a_full_disk_refuses_and_changes_nothing() {
    let mut rig = rig();
    let mut version = 0;
    let full = loop {
        version += 1;
        let write = rig.stamped(0, span(chunk(0, 1), version as u16, 0, 1), version);
        match rig.ask(header(1, 0), write) {
            Reply::Done => {}
            Reply::Refused(Status::NoSpace) => break version,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(rig.store.stats().free_bytes, 0);
    assert_eq!(rig.read(1, span(chunk(0, 1), full as u16, 0, 1)).0, 1);
    // Room comes back only when the trim is stable.
    let zero = Request::Zero {
        span: span(chunk(0, 1), 1, 0, 16),
        version: Version(full),
    };
    assert_eq!(rig.ask(header(1, 0), zero), Reply::Done);
    rig.tick(10);
    rig.drain();
    assert_eq!(rig.store.stats().free_bytes, 0);
    assert_eq!(rig.ask(header(1, full), Request::Flush), Reply::Done);
    rig.tick(20);
    rig.drain();
    assert_eq!(rig.store.stats().free_bytes, EXTENT as u64);
    let write = rig.stamped(0, span(chunk(0, 1), full as u16, 5, 1), full + 1);
    assert_eq!(rig.ask(header(1, full), write), Reply::Done);
}

#[test]
fn a_dropped_chunk_gives_all_its_room_back() {
    let mut rig = rig();
    let free = rig.store.stats().free_bytes;
    for extent in 0..100 {
        let write = rig.stamped(0, span(chunk(0, 1), extent, 0, 2), 1);
        assert_eq!(rig.ask(header(1, 0), write), Reply::Done);
    }
    assert_eq!(
        rig.ask(header(1, 0), Request::DropChunk(chunk(0, 1))),
        Reply::Done
    );
    rig.drain();
    assert_eq!(rig.store.stats().free_bytes, free);
    assert_eq!(rig.store.stats().chunks, 0);
    let reply = rig.ask(header(1, 0), Request::CreateChunk(chunk(0, 2)));
    assert_eq!(reply, Reply::Done);
    assert_eq!(rig.read(1, span(chunk(0, 2), 5, 0, 2)).0, 3);
}

#[test]
fn a_seal_waits_for_older_operations() {
    let mut rig = rig();
    let write = rig.stamped(0, span(chunk(0, 1), 0, 0, 1), 1);
    assert_eq!(rig.ask(header(1, 0), write), Reply::Done);
    let write = rig.stamped(0, span(chunk(0, 1), 0, 0, 1), 2);
    rig.submit(header(1, 0), write);
    let data = rig.flying.len() - 1;
    rig.submit(header(2, 0), Request::Seal);
    rig.batch();
    // All but the data write.
    while rig.flying.len() > 1 {
        let n = if data == 0 { rig.flying.len() - 1 } else { 0 };
        rig.complete(n);
        rig.batch();
    }
    assert!(rig.replies.is_empty());
    rig.drain();
    assert_eq!(rig.replies.len(), 2);
    assert_eq!(rig.replies[0].1, Reply::Done);
}

#[test]
fn rot_is_named_and_repaired_by_an_install() {
    let mut rig = rig();
    let s = span(chunk(0, 1), 9, 4, 3);
    let write = rig.stamped(0, s, 7);
    let Request::Write { crcs, .. } = write else {
        panic!()
    };
    assert_eq!(rig.ask(header(1, 0), write), Reply::Done);
    let slot = rig.store.tables.chunks[0].map.as_ref().unwrap()[9];
    let at = rig.store.layout.block_at(slot, 5);
    rig.disk.live[at as usize + 77] ^= 4;
    assert_eq!(rig.read(1, s).1, 1 << 5);
    rig.disk.unreadable.push(rig.store.layout.block_at(slot, 6));
    assert_eq!(rig.read(1, s).1, 3 << 5);
    let digest = Request::Digest {
        chunk: chunk(0, 1),
        region: 0,
        verify: true,
    };
    let Reply::Digest { in_doubt, extents } = rig.ask(header(1, 0), digest) else {
        panic!()
    };
    assert!(!in_doubt);
    assert_eq!((extents[9].bad, extents[9].unreadable), (3 << 5, 1 << 6));
    assert_eq!(extents[9].image.version, Version(7));
    let mut image = ExtentImage {
        version: Version(8),
        valid: 0b11 << 4,
        zero: 1,
        lost: 1 << 6,
        crcs,
    };
    image.crcs[6] = 0;
    let data = rig.memory.payload(100);
    stamp(rig.memory.bytes_mut(105, 1), 0, 9, 5, 7);
    let install = Request::Install {
        chunk: chunk(0, 1),
        extent: 9,
        image,
        write: 1 << 5,
        data,
    };
    assert_eq!(rig.ask(header(1, 0), install), Reply::Done);
    assert_eq!(rig.read(1, s).1, 1 << 6);
    let gone = ExtentImage::default();
    let install = Request::Install {
        chunk: chunk(0, 1),
        extent: 9,
        image: gone,
        write: 0,
        data,
    };
    let free = rig.store.stats().free_bytes;
    assert_eq!(rig.ask(header(1, 0), install), Reply::Done);
    assert_eq!(rig.read(1, s).0, s.mask());
    assert_eq!(rig.store.stats().free_bytes, free + EXTENT as u64);
}

#[test]
fn a_failed_write_or_flush_ends_the_disk() {
    for what in 0..3 {
        let mut rig = rig();
        let write = rig.stamped(0, span(chunk(0, 1), 0, 0, 1), 1);
        assert_eq!(rig.ask(header(1, 0), write), Reply::Done);
        let again = rig.stamped(0, span(chunk(0, 1), 0, 0, 1), 2);
        rig.submit(header(1, 0), again);
        rig.submit(header(1, 0), Request::Flush);
        rig.batch();
        assert_eq!(rig.flying.len(), 3);
        rig.break_io(what);
        assert!(rig.failed);
        rig.drain();
        assert_eq!(rig.replies.len(), 2);
        assert!(
            rig.replies
                .iter()
                .all(|r| r.1 == Reply::Refused(Status::DiskFailed))
        );
        assert_eq!(
            rig.ask(header(1, 0), Request::Flush),
            Reply::Refused(Status::DiskFailed)
        );
        assert!(rig.store.idle());
    }
}

/// Many more record pages than frames, many requests at once, a ring that wraps again and again.
#[test]
fn works_with_a_small_cache_and_a_small_journal() {
    let (mut rig, _) = Rig::open(formatted(128 << 20, 64 << 10), 1);
    rig.ask(header(1, 0), Request::Seal);
    for c in 0..2 {
        rig.ask(header(1, 0), Request::CreateChunk(chunk(c, 1)));
    }
    let mut rng = Rng(1);
    let mut versions = std::collections::BTreeMap::new();
    for version in 1..6000u64 {
        let (c, extent) = (rng.below(2) as u32, rng.below(800) as u16);
        let page = version as usize % 64;
        if version % 64 == 0 {
            rig.drain();
        }
        let write = rig.stamped(page, span(chunk(c, 1), extent, 3, 1), version);
        rig.submit(header(1, 0), write);
        versions.insert((c, extent), version);
        if !rig.flying.is_empty() && rng.below(2) == 0 {
            rig.complete(rng.below(rig.flying.len() as u64) as usize);
            rig.batch();
        }
    }
    rig.drain();
    assert!(rig.replies.iter().all(|r| r.1 == Reply::Done) && rig.replies.len() == 5999);
    let stats = rig.store.stats();
    assert!(stats.checkpoints > 10 && stats.cache_misses > 100, "{stats:?}");
    rig.close();
    for boot in 2..4 {
        let (mut again, report) = Rig::open(rig.disk, boot);
        assert!(report.damage.is_empty());
        again.ask(header(boot as u32, 0), Request::Seal);
        for (&(c, extent), &version) in &versions {
            let (holes, bad, bytes) = again.read(boot as u32, span(chunk(c, 1), extent, 3, 1));
            assert_eq!(
                (holes, bad, version_of(&bytes, c, extent, 3)),
                (0, 0, Ok(version))
            );
        }
        rig = again;
    }
}

/// Idle chunks are marked clean once what was written there is stable, and a crash then leaves nothing in doubt; without
/// that, what was written is.
#[test]
fn idle_chunks_become_clean() {
    for (wait, stable) in [(false, 1), (true, 0), (true, 1)] {
        let mut rig = rig();
        let write = rig.stamped(0, span(chunk(0, 1), 20, 0, 1), 1);
        rig.ask(header(1, 0), write);
        // Any request brings the news of what is stable.
        rig.ask(header(1, stable), Request::Flush);
        rig.tick(if wait { background::CLEAN_AFTER_MS } else { 10 });
        rig.drain();
        rig.ask(header(1, 0), Request::Flush);
        let disk = rig.crash(&mut Rng(3));
        let (_, report) = Rig::open(disk, 2);
        assert_eq!(report.in_doubt_regions, u64::from(!wait || stable == 0));
        assert!(!report.clean);
    }
}

/// A closed disk has nothing in doubt, but for what another replica may not have: its owner may be gone, and the replica too.
#[test]
fn what_was_not_stable_when_the_disk_was_closed_is_in_doubt() {
    for stable in [0, 1] {
        let mut rig = rig();
        let write = rig.stamped(0, span(chunk(0, 1), 20, 0, 1), 1);
        rig.ask(header(1, 0), write);
        rig.ask(header(1, stable), Request::Flush);
        rig.close();
        let (_, report) = Rig::open(rig.disk, 2);
        assert_eq!(report.in_doubt_regions, u64::from(stable == 0));
        assert!(report.clean && report.replayed_blocks == 0);
    }
}

/// What the state machine itself costs: run by hand, with `--ignored --nocapture`, in release.
#[test]
#[ignore = "a measurement, not a test"]
fn cost_of_a_cached_write_and_read() {
    let (mut rig, _) = Rig::open(formatted(128 << 20, 64 << 20), 1);
    rig.ask(header(1, 0), Request::Seal);
    rig.ask(header(1, 0), Request::CreateChunk(chunk(0, 1)));
    let s = span(chunk(0, 1), 0, 0, 1);
    let write = rig.stamped(0, s, 7);
    rig.ask(header(1, 0), write);
    let data = rig.memory.payload(0);
    let Request::Write { crcs, .. } = write else {
        panic!()
    };
    for (name, request) in [
        ("write", write),
        (
            "read",
            Request::Read {
                span: s,
                raw: false,
                data,
            },
        ),
    ] {
        let mut out = Vec::with_capacity(1024);
        let mut done = Vec::with_capacity(1024);
        let start = std::time::Instant::now();
        let rounds = 3_000u32;
        for _ in 0..rounds {
            for n in 0..32u16 {
                let mut request = request;
                match &mut request {
                    Request::Write { span, .. } | Request::Read { span, .. } => {
                        span.first = (n % 16) as u8;
                    }
                    _ => {}
                }
                rig.store
                    .submit(Tag(u64::from(n)), header(1, 0), request, &mut out);
            }
            rig.store.flush_batch(&mut out);
            loop {
                for effect in out.drain(..) {
                    if let Effect::Io { token, io } = effect {
                        assert!(
                            !matches!(io, Io::Verify { .. }),
                            "the journal is large enough for no checkpoint"
                        );
                        done.push(Completion {
                            token,
                            result: Ok(()),
                            crcs,
                        });
                    }
                }
                if done.is_empty() {
                    break;
                }
                for completion in done.drain(..) {
                    rig.store.completed(completion, &mut out);
                }
                rig.store.flush_batch(&mut out);
            }
        }
        println!(
            "{name}: {} ns",
            start.elapsed().as_nanos() / u128::from(rounds * 32)
        );
    }
}
