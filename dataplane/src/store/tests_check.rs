//! What must be zero on a disk: free slots and blocks without data. The check looks, and an opening sees to it.

use super::check::{CheckReport, FINDINGS_MAX, Finding, Findings, Verdict, check};
use super::layout::Layout;
use super::tests_disk::*;
use super::tests_golden::filled;
use super::*;
use crate::disk::{BlockIo, IoError};
use crate::ids::*;

fn checked(disk: &mut dyn BlockIo) -> CheckReport {
    check(disk, &mut |_, _| {})
}

fn found(disk: &mut SimDisk) -> Vec<Finding> {
    let report = checked(disk);
    let damaged = report.verdict == Verdict::Damaged;
    assert_eq!(damaged, !report.findings.is_empty(), "{report:?}");
    report.findings
}

/// A disk with an extent that has three blocks and one that has none, not closed.
fn in_use() -> Rig {
    let (mut rig, _) = Rig::open(formatted(8 << 20, 64 << 10), 1);
    rig.ask(header(1, 0), Request::Seal);
    rig.ask(header(1, 0), Request::CreateChunk(chunk(0, 1)));
    for extent in [1, 2] {
        let write = rig.stamped(0, span(chunk(0, 1), extent, 0, 3), 1);
        assert_eq!(rig.ask(header(1, 0), write), Reply::Done);
    }
    let span = span(chunk(0, 1), 2, 0, 16);
    let version = Version(2);
    assert_eq!(
        rig.ask(header(1, 0), Request::Zero { span, version }),
        Reply::Done
    );
    rig
}

#[test]
fn a_free_slot_that_is_not_zero_is_found_wherever_it_is() {
    let (_, layout) = filled();
    let last = layout.superblock.slots as u32 - 1;
    for (slot, block) in [(5, 0), (6, 15), (31, 7), (32, 0), (77, 3), (last, 15)] {
        let (mut disk, layout) = filled();
        let at = layout.block_at(slot, block) as usize;
        disk.live[at + BLOCK - 1] = 1;
        assert_eq!(found(&mut disk), [Finding::FreeSlot { slot, block }]);
        // Once per slot, however much of it is not zero.
        disk.live[at..layout.block_at(slot, 0) as usize + EXTENT].fill(7);
        disk.live[layout.block_at(40, 2) as usize] = 1;
        let both = [
            Finding::FreeSlot { slot, block },
            Finding::FreeSlot { slot: 40, block: 2 },
        ];
        let mut all = found(&mut disk);
        all.sort_by_key(|finding| !matches!(finding, Finding::FreeSlot { slot: s, .. } if *s == slot));
        assert_eq!(all, both);
        disk.live[layout.block_at(40, 2) as usize] = 0;
        disk.unreadable.push(at as u64);
        assert_eq!(found(&mut disk)[0], Finding::Unreadable { offset: at as u64 });
    }
}

#[test]
fn a_block_without_data_that_is_not_zero_is_found_where_nothing_is_in_doubt() {
    for (extent, block) in [(1, 3), (1, 15), (2, 0), (2, 9)] {
        let mut rig = in_use();
        let slot = u32::from(extent) - 1;
        let at = rig.store.layout.block_at(slot, block) as usize;
        rig.disk.live[at] = 1;
        assert_eq!(found(&mut rig.disk), [], "the region is dirty");
        rig.disk.live[at] = 0;
        rig.ask(header(1, 2), Request::Flush);
        rig.close();
        assert!(rig.closed);
        assert_eq!(found(&mut rig.disk), []);
        rig.disk.live[at + 9] = 1;
        let chunk = chunk(0, 1);
        assert_eq!(found(&mut rig.disk), [Finding::Hole { chunk, extent, block }]);
        rig.disk.unreadable.push(at as u64);
        assert_eq!(found(&mut rig.disk), [Finding::Unreadable { offset: at as u64 }]);
    }
}

/// What a crash may have left in the slots of an announced window is no damage: an opening zeroes it.
#[test]
fn the_windows_of_a_crash_are_zeroed_by_the_opening_and_checked_from_then_on() {
    let mut rig = in_use();
    let at = rig.store.layout.block_at(9, 4) as usize;
    rig.disk.live[at..at + BLOCK].fill(3);
    assert_eq!(found(&mut rig.disk), []);
    let (mut rig, report) = Rig::open(rig.disk, 2);
    assert!(!report.suspect, "{:?}", report.damage);
    assert!(rig.disk.durable[at..at + BLOCK].iter().all(|&byte| byte == 0));
    rig.disk.live[at] = 3;
    assert_eq!(found(&mut rig.disk), [Finding::FreeSlot { slot: 9, block: 4 }]);
}

/// Damage takes records, and their slots look free: no slot may be reused with what they held.
#[test]
fn an_opening_that_found_records_missing_zeroes_every_free_slot() {
    let (mut closed, layout) = filled();
    // A page of records as it was before: zero.
    closed.live[layout.page_at(0) as usize..][..BLOCK].fill(0);
    let counted = closed;
    // The newest checkpoint is gone, and with it the journal that it vouched for.
    let (disk, _) = filled();
    let (mut rig, _) = Rig::open(disk, 2);
    rig.ask(header(2, 0), Request::Seal);
    for extent in 20..25 {
        let write = rig.stamped(0, span(chunk(0, 1), extent, 0, 3), 2);
        assert_eq!(rig.ask(header(2, 0), write), Reply::Done);
    }
    let mut rotten = rig.disk;
    let sequence = |area: usize| {
        let at = layout.checkpoints[area] as usize;
        codec::get_u64(&rotten.live[at..at + BLOCK], 16)
    };
    let newest = layout.checkpoints[usize::from(sequence(1) > sequence(0))];
    rotten.live[newest as usize + 300] ^= 1;
    for mut disk in [counted, rotten] {
        let slots = |disk: &mut SimDisk| {
            let full = |finding: &Finding| matches!(finding, Finding::FreeSlot { .. });
            found(disk).iter().filter(|finding| full(finding)).count()
        };
        assert_eq!(slots(&mut disk), 5, "there is something to be adopted");
        let (mut rig, report) = Rig::open(disk, 3);
        assert!(report.suspect);
        assert_eq!(slots(&mut rig.disk), 0);
        rig.disk.live.copy_from_slice(&rig.disk.durable);
        assert_eq!(slots(&mut rig.disk), 0, "durably");
    }
}

/// A disk that knows what was never written on it, and counts what is read.
struct Thin {
    disk: SimDisk,
    read: usize,
}

impl BlockIo for Thin {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        self.read += buf.len();
        self.disk.read(offset, buf)
    }
    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), IoError> {
        unreachable!("a check writes nothing")
    }
    fn write_zeroes(&mut self, _: u64, _: u64) -> Result<(), IoError> {
        unreachable!("a check writes nothing")
    }
    fn flush(&mut self) -> Result<(), IoError> {
        unreachable!("a check writes nothing")
    }
    fn known_zero(&mut self, offset: u64, len: u64) -> bool {
        let range = offset as usize..(offset + len) as usize;
        self.disk.live[range].iter().all(|&byte| byte == 0)
    }
}

#[test]
fn what_was_never_written_is_not_read() {
    let (disk, layout): (SimDisk, Layout) = filled();
    let mut thin = Thin { disk, read: 0 };
    let report = checked(&mut thin);
    assert_eq!((report.verdict, report.extents), (Verdict::Clean, 5));
    // The metadata once, and beyond it only what is there.
    let most = layout.data as usize + 5 * EXTENT + 2 * BLOCK;
    assert!(thin.read <= most, "{} bytes read, {most} would do", thin.read);
    thin.disk.live[layout.block_at(100, 8) as usize] = 1;
    let report = checked(&mut thin);
    assert_eq!(report.findings, [Finding::FreeSlot { slot: 100, block: 8 }]);
}

#[test]
fn findings_are_bounded_and_all_are_counted() {
    let mut findings = Findings::default();
    for slot in 0..FINDINGS_MAX as u32 + 5 {
        findings.push(Finding::FreeSlot { slot, block: 0 });
    }
    assert_eq!(
        (findings.kept.len(), findings.total),
        (FINDINGS_MAX, FINDINGS_MAX as u64 + 5)
    );
}
