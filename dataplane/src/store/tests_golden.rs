//! The bytes of the format, frozen; damage of every kind; hostile bytes.

use super::check::{Finding, Verdict, check};
use super::codec::*;
use super::tests_disk::*;
use super::*;
use crate::disk::BlockIo;
use crate::ids::*;
use crate::replica::{ChunkRef, ExtentImage};
use proptest::prelude::*;

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..16].to_string()
}

fn record() -> ExtentRecord {
    let mut crcs = [0; 16];
    crcs[1] = 0x1122_3344;
    ExtentRecord {
        chunk: ChunkRef {
            key: ChunkKey {
                volume: VolumeId(1),
                layer: LayerId(2),
                chunk: 3,
            },
            incarnation: 4,
        },
        extent: 5,
        image: ExtentImage {
            version: Version(6),
            valid: 2,
            zero: 4,
            lost: 8,
            crcs,
        },
    }
}

#[test]
fn the_bytes_of_each_structure_are_frozen() {
    let seed = Seed::new(0x99);
    let mut b = [0xa5; RECORD];
    Record::Extent(record()).encode(&seed, 7, &mut b);
    assert_eq!(
        b[..36],
        [
            1, 0, 2, 0, 4, 0, 8, 0, 6, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0,
            5, 0, 0, 0
        ]
    );
    assert_eq!(Record::decode(&seed, 7, &b), Ok(Record::Extent(record())));
    assert_eq!(Record::decode(&seed, 8, &b), Err(RecordDamaged));
    assert_eq!(Record::decode(&Seed::new(0x98), 7, &b), Err(RecordDamaged));
    let mut all = vec![hash(&b)];
    let superblock = Superblock {
        uuid: 1,
        blocks: 4096,
        journal_blocks: 256,
        slots: 200,
        chunk_capacity: 64,
        volume_capacity: 65,
    };
    assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock));
    all.push(hash(&superblock.encode()));
    let header = CheckpointHeader {
        sequence: 1,
        tail: 2,
        tail_hash: [3; 32],
        boot: 4,
        power: 5,
        volumes: 6,
        chunks: 7,
        clean: true,
        tables: [8; 32],
        windows: [9, 10, 11, NO_WINDOW],
    };
    let mut block = [0; BLOCK];
    header.encode(&seed, 1, &mut block);
    assert_eq!(CheckpointHeader::decode(&seed, 1, &block), Some(header));
    assert_eq!(CheckpointHeader::decode(&seed, 0, &block), None);
    all.push(hash(&block));
    let chunk = ChunkEntry {
        state: ChunkState::Live,
        chunk: record().chunk,
        dirty: 1,
        in_doubt: 2,
        extents: 3,
        suspect: true,
    };
    let volume = VolumeEntry {
        used: true,
        volume: VolumeId(1),
        sealed: 2,
    };
    let entries = [
        Entry::Record {
            slot: 7,
            chunk: 1,
            extents: 9,
            bytes: &b,
        },
        Entry::Chunk {
            index: 1,
            entry: chunk,
        },
        Entry::Volume {
            index: 2,
            entry: volume,
        },
        Entry::Window { index: 3, window: 4 },
    ];
    let mut used = JOURNAL_HEADER;
    let mut block = [0xa5; BLOCK];
    for entry in &entries {
        entry.encode(&mut block[used..]);
        used += entry.size();
    }
    let head = BlockHeader {
        used: used as u32,
        count: 4,
        sequence: 5,
        flushed: 6,
        boot: 7,
        previous: [8; 32],
    };
    head.seal(&seed, &mut block);
    let (read, _) = BlockHeader::open(&seed, &block).unwrap();
    assert_eq!(read, head);
    let mut seen = Vec::new();
    assert!(read.entries(&block, |entry| seen.push(entry)));
    assert_eq!(seen, entries);
    all.push(hash(&block));
    // A change here is a change of the format: it needs a new format version.
    assert_eq!(all, GOLDEN);
}

const GOLDEN: [&str; 4] = [
    "c3073e1192eb3e45",
    "ff2517f8298d1bb1",
    "72f518cf1a49ced3",
    "8e6ec4b503713c3d",
];

/// A closed disk with a few extents.
pub(super) fn filled() -> (SimDisk, layout::Layout) {
    let (mut rig, _) = Rig::open(formatted(8 << 20, 64 << 10), 1);
    rig.ask(header(1, 0), Request::Seal);
    rig.ask(header(1, 0), Request::CreateChunk(chunk(0, 1)));
    for extent in 0..5 {
        let write = rig.stamped(0, span(chunk(0, 1), extent, 0, 3), 1);
        assert_eq!(rig.ask(header(1, 0), write), Reply::Done);
    }
    // All of it is stable.
    rig.ask(header(1, 1), Request::Flush);
    rig.close();
    assert!(rig.closed);
    let layout = rig.store.layout;
    (rig.disk, layout)
}

#[test]
fn check_finds_each_kind_of_damage() {
    let page = |l: &layout::Layout| l.page_at(0) as usize;
    let verdict = |damage: &dyn Fn(&mut SimDisk, &layout::Layout)| {
        let (mut disk, layout) = filled();
        damage(&mut disk, &layout);
        let mut all = 0;
        let report = check(&mut disk, &mut |done, _| all = done);
        (report.verdict, report.findings.first().copied())
    };
    assert_eq!(verdict(&|_, _| {}), (Verdict::Clean, None));
    assert_eq!(
        verdict(&|d, _| d.live[100] ^= 1),
        (Verdict::Damaged, Some(Finding::Superblock { copy: false }))
    );
    assert_eq!(
        verdict(&|d, l| d.live[l.copy as usize + 50] ^= 1),
        (Verdict::Damaged, Some(Finding::Superblock { copy: true }))
    );
    assert_eq!(
        verdict(&|d, l| d.live[page(l) + 60] ^= 1).1,
        Some(Finding::Record {
            slot: 0,
            stray: false
        })
    );
    let found = verdict(&|d, l| d.live[l.block_at(1, 2) as usize] ^= 1);
    assert_eq!(
        found.1,
        Some(Finding::Block {
            chunk: chunk(0, 1),
            extent: 1,
            block: 2
        })
    );
    let twice = verdict(&|d, l| {
        let seed = Seed::new(l.superblock.uuid);
        let at = page(l);
        let Ok(first) = Record::decode(&seed, 0, &d.live[at..at + RECORD]) else {
            panic!()
        };
        first.encode(&seed, 1, &mut d.live[at + RECORD..at + 2 * RECORD]);
    });
    assert_eq!(twice.1, Some(Finding::Twice { slots: [0, 1] }));
    let missing = verdict(&|d, l| {
        d.live[page(l)..page(l) + RECORD].fill(0);
        d.live[l.block_at(0, 0) as usize..][..EXTENT].fill(0);
    });
    assert!(matches!(
        missing.1,
        Some(Finding::Count {
            found: 4,
            expected: 5,
            ..
        })
    ));
    assert_eq!(verdict(&|d, _| d.live.fill(0)).0, Verdict::Unusable);
    let headers = verdict(&|d, l| {
        d.live[l.checkpoints[0] as usize + 20] ^= 1;
        d.live[l.checkpoints[1] as usize + 20] ^= 1;
    });
    assert_eq!(headers.0, Verdict::Unusable);
}

#[test]
fn a_disk_is_known_by_the_copy_of_its_superblock_too() {
    let (mut disk, _) = filled();
    let uuid = Some(DiskUuid(0x1234_5678));
    assert_eq!(Store::identify(&mut disk), uuid);
    disk.unreadable.push(0);
    assert_eq!(Store::identify(&mut disk), uuid, "the first can not be read");
    disk.unreadable.clear();
    disk.live[100] ^= 1;
    assert_eq!(Store::identify(&mut disk), uuid, "the first is damaged");
    disk.live[0] ^= 1;
    assert_eq!(Store::identify(&mut disk), None, "somebody else's");
}

#[test]
fn what_lies_behind_the_last_record_means_nothing() {
    let (mut disk, layout) = filled();
    assert!(!layout.superblock.slots.is_multiple_of(RECORDS_PER_PAGE as u64));
    disk.live[layout.data as usize - 1] ^= 1;
    disk.live[layout.page_at(layout.record_pages as u32 - 1) as usize + BLOCK - 1] ^= 1;
    let (mut rig, report) = Rig::open(disk, 2);
    assert!(report.damage.is_empty(), "{:?}", report.damage);
    rig.ask(header(2, 0), Request::Seal);
    let mut extent = 5;
    loop {
        let write = rig.stamped(0, span(chunk(0, 1), extent, 0, 1), 1);
        match rig.ask(header(2, 0), write) {
            Reply::Done => extent += 1,
            Reply::Refused(Status::NoSpace) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(u64::from(extent), layout.superblock.slots, "every slot was used");
    assert!(!rig.failed);
}

#[test]
fn a_rotten_record_is_quarantined_and_the_disk_suspect_until_settled() {
    let (mut disk, layout) = filled();
    disk.live[layout.page_at(0) as usize + 60] ^= 1;
    for boot in 2..4 {
        let (rig, report) = Rig::open(disk, boot);
        assert!(report.suspect, "also at the second opening");
        assert_eq!(report.damage.is_empty(), boot == 3, "{:?}", report.damage);
        assert_eq!(rig.store.stats().quarantined_slots, 1);
        disk = rig.disk;
        let check = check(&mut disk, &mut |_, _| {});
        assert_eq!(check.findings, [Finding::Suspect { chunk: chunk(0, 1) }]);
    }
    let (mut rig, _) = Rig::open(disk, 4);
    let Reply::Sealed(sealed) = rig.ask(header(2, 0), Request::Seal) else {
        panic!()
    };
    assert!(sealed.suspect);
    assert_eq!(sealed.chunks, [(chunk(0, 1), u64::MAX)]);
    assert_eq!(rig.read(2, span(chunk(0, 1), 0, 0, 3)).1, 7, "unknown, not zeros");
    assert_eq!(rig.read(2, span(chunk(0, 1), 1, 0, 4)).1, 8);
    for region in 0..64 {
        rig.ask(
            header(2, 0),
            Request::Settle {
                chunk: chunk(0, 1),
                region,
            },
        );
    }
    assert_eq!(rig.read(2, span(chunk(0, 1), 0, 0, 3)).0, 7);
    let Reply::Sealed(sealed) = rig.ask(header(2, 0), Request::Seal) else {
        panic!()
    };
    assert!(!sealed.suspect);
    rig.close();
    assert_eq!(check(&mut rig.disk, &mut |_, _| {}).verdict, Verdict::Clean);
}

#[test]
fn rot_in_the_journal_is_told_from_a_torn_tail() {
    for rotten in [false, true] {
        let (mut rig, _) = Rig::open(formatted(8 << 20, 64 << 10), 1);
        rig.ask(header(1, 0), Request::Seal);
        rig.ask(header(1, 0), Request::CreateChunk(chunk(0, 1)));
        for extent in 0..3 {
            let write = rig.stamped(0, span(chunk(0, 1), extent, 0, 3), 1);
            rig.ask(header(1, 0), write);
            rig.ask(header(1, 0), Request::Flush);
        }
        let last = rig.store.journal.next - 1;
        let at = rig.store.layout.journal_at(if rotten { last - 2 } else { last });
        let mut disk = rig.disk;
        disk.live[at as usize + 40] ^= 1;
        let (_, report) = Rig::open(disk, 2);
        assert_eq!(report.suspect, rotten, "{:?}", report.damage);
    }
}

#[test]
fn a_checkpoint_that_is_gone_is_missed() {
    for (blocks, unreadable) in [(0, false), (1, false), (0, true)] {
        let (mut rig, _) = Rig::open(formatted(8 << 20, 64 << 10), 1);
        rig.ask(header(1, 0), Request::Seal);
        rig.ask(header(1, 0), Request::CreateChunk(chunk(0, 1)));
        rig.close();
        let (mut rig, _) = Rig::open(rig.disk, 2);
        for generation in 2..2 + blocks {
            rig.ask(header(generation, 0), Request::Seal);
        }
        let layout = rig.store.layout;
        let mut disk = rig.disk;
        let sequence = |area: usize| {
            let at = layout.checkpoints[area] as usize;
            super::codec::get_u64(&disk.live[at..at + BLOCK], 16)
        };
        let newest = usize::from(sequence(1) > sequence(0));
        let at = layout.checkpoints[newest];
        if unreadable {
            disk.unreadable.push(at);
        } else {
            disk.live[at as usize + 300] ^= 1;
        }
        let suspect = match Store::open(&mut disk, &options(3)) {
            Ok((_, report)) => report.suspect,
            Err(e) => panic!("the other checkpoint is whole: {e}"),
        };
        // Without a block of its boot it says nothing that the other one does not: a torn write of it looks the same.
        assert_eq!(suspect, blocks > 0 || unreadable);
    }
}

#[test]
fn refuses_what_is_not_its_own() {
    let open = |disk: &mut SimDisk| Store::open(disk, &options(5)).map(|_| ());
    let format = |disk: &mut SimDisk, force| {
        let options = FormatOptions {
            uuid: DiskUuid(4),
            journal_bytes: None,
            force,
            already_zero: false,
        };
        Store::format(disk, &options)
    };
    let mut blank = SimDisk::new(8 << 20);
    assert_eq!(open(&mut blank), Err(OpenError::Blank));
    blank.live[(8 << 20) - 3000] = 1;
    assert_eq!(
        format(&mut blank, false),
        Err(FormatError::Foreign((8 << 20) - 3000))
    );
    blank.live[0] = 9;
    assert_eq!(open(&mut blank), Err(OpenError::Foreign));
    let (mut disk, layout) = filled();
    assert_eq!(format(&mut disk, false), Err(FormatError::Formatted));
    assert_eq!(open(&mut disk), Ok(()));
    let mut newer = disk.live[..BLOCK].to_vec();
    newer[8] = 2;
    let sum = blake3::hash(&newer[..BLOCK - 32]);
    newer[BLOCK - 32..].copy_from_slice(sum.as_bytes());
    disk.live[..BLOCK].copy_from_slice(&newer);
    assert_eq!(open(&mut disk), Err(OpenError::Newer(2)));
    assert_eq!(format(&mut disk, false), Err(FormatError::Formatted));
    disk.live[100] ^= 1;
    disk.live[layout.copy as usize + 100] ^= 1;
    assert_eq!(open(&mut disk), Err(OpenError::Superblock));
    assert_eq!(format(&mut disk, true), Ok(()));
    assert_eq!(open(&mut disk), Ok(()));
    let mut cut = SimDisk::new(7 << 20);
    cut.write(0, &disk.live[..7 << 20]).unwrap();
    assert!(matches!(open(&mut cut), Err(OpenError::Short { .. })));
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
        fuzz::superblock(&bytes);
        fuzz::journal_block(&bytes);
        fuzz::record(&bytes);
        fuzz::image(&bytes);
    }

    #[test]
    fn a_disk_with_random_damage_opens_or_is_refused(hits in proptest::collection::vec((0usize..700_000, any::<u8>()), 1..60)) {
        let (mut disk, _) = filled();
        for (at, byte) in hits {
            disk.live[at] = byte;
        }
        fuzz::image(&disk.live);
    }
}
