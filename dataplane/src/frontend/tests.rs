//! Handcrafted rings against the queue.

mod differential;
mod hostile;
mod recovery;
mod wakeup;

use super::fuzz::{DATA_AT, GUEST, Guest};
use super::{Completion, Kind, Queue, Request};

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

pub(super) const HEADER_AT: u64 = DATA_AT;
pub(super) const STATUS_AT: u64 = DATA_AT + 0x800;
pub(super) const BUFFER_AT: u64 = DATA_AT + 0x1000;

/// Writes a request header at an offset of the guest's memory.
pub(super) fn header(guest: &Guest, at: u64, kind: u32, sector: u64) {
    guest.write(at, &kind.to_le_bytes());
    guest.write(at + 4, &[0; 4]);
    guest.write(at + 8, &sector.to_le_bytes());
}

/// Makes a three-descriptor request of `len` bytes beginning with descriptor `head`.
pub(super) fn simple(guest: &Guest, head: u16, kind: u32, sector: u64, len: u32) {
    let slot = u64::from(head);
    header(guest, HEADER_AT + slot * 16, kind, sector);
    guest.write(STATUS_AT + slot, &[0xff]);
    let data = if kind == 0 || kind == 8 {
        WRITE | NEXT
    } else {
        NEXT
    };
    guest.desc(0, head, GUEST + HEADER_AT + slot * 16, 16, NEXT, head + 1);
    guest.desc(0, head + 1, GUEST + BUFFER_AT + slot * 0x200, len, data, head + 2);
    guest.desc(0, head + 2, GUEST + STATUS_AT + slot, 1, WRITE, 0);
}

pub(super) fn poll(queue: &mut Queue) -> Vec<Request> {
    let mut out = Vec::new();
    queue.poll(1000, |request| out.push(request));
    out
}

pub(super) fn status(guest: &Guest, head: u16) -> u8 {
    guest.read(STATUS_AT + u64::from(head), 1)[0]
}

pub(super) fn counter(guest: &Guest, name: &str) -> u64 {
    let list = guest.shared.counters.list();
    list.iter().find(|(n, _)| *n == name).unwrap().1
}

#[test]
fn requests_of_all_kinds_come_out_and_go_back() {
    let guest = Guest::new(32, false).unwrap();
    let mut queue = guest.queue(0, false, None);
    simple(&guest, 0, 0, 8, 1024);
    simple(&guest, 3, 1, 16, 512);
    simple(&guest, 6, 4, 0, 0);
    simple(&guest, 9, 11, 0, 32);
    simple(&guest, 12, 13, 0, 16);
    simple(&guest, 15, 8, 0, 20);
    simple(&guest, 18, 99, 0, 0);
    let mut ranges = Vec::new();
    for (sector, sectors, flags) in [(0u64, 8u32, 0u32), (100, 0, 0)] {
        ranges.extend(sector.to_le_bytes());
        ranges.extend(sectors.to_le_bytes());
        ranges.extend(flags.to_le_bytes());
    }
    guest.write(BUFFER_AT + 9 * 0x200, &ranges);
    ranges[12] = 1;
    guest.write(BUFFER_AT + 12 * 0x200, &ranges[..16]);
    for (i, head) in [0, 3, 6, 9, 12, 15, 18].into_iter().enumerate() {
        guest.offer(i as u16, head);
    }
    assert!(poll(&mut queue).is_empty());
    guest.set_avail_idx(7);
    let requests = poll(&mut queue);
    let kinds: Vec<_> = requests
        .iter()
        .map(|r| (r.head, r.kind, r.sector, r.len))
        .collect();
    let expected = [
        (0, Kind::In, 8, 1024),
        (3, Kind::Out, 16, 512),
        (6, Kind::Flush, 0, 0),
        (9, Kind::Discard, 0, 2),
        (12, Kind::WriteZeroes, 0, 1),
    ];
    assert_eq!(kinds, expected);
    assert_eq!(queue.segs(&requests[0]).len(), 1);
    assert_eq!(queue.segs(&requests[0])[0].len, 1024);
    assert_eq!(queue.ranges(&requests[3])[0].sectors, 8);
    assert_eq!(queue.ranges(&requests[3])[1].sector, 100);
    assert!(queue.ranges(&requests[4])[0].unmap());
    for (request, end) in requests.iter().zip([
        Completion::Ok,
        Completion::IoErr,
        Completion::Ok,
        Completion::Unsupported,
        Completion::Ok,
    ]) {
        queue.complete(request.head, end);
    }
    assert_eq!(guest.used_idx(), 0, "nothing is visible before publish");
    assert_eq!(queue.in_flight(), 7);
    queue.publish();
    assert_eq!((queue.in_flight(), guest.used_idx()), (0, 7));
    assert_eq!(
        [0, 3, 6, 9, 12, 15, 18].map(|head| status(&guest, head)),
        [0, 1, 0, 2, 0, 0, 2]
    );
    assert_eq!(guest.read(BUFFER_AT + 15 * 0x200, 8), b"serial\0\0");
    let used: Vec<_> = (0..7).map(|i| guest.used(i)).collect();
    assert_eq!(
        used,
        [(15, 21), (18, 0), (0, 1025), (3, 0), (6, 1), (9, 0), (12, 1)]
    );
}

#[test]
fn kicks_and_calls_are_suppressed_as_the_driver_asks() {
    for event_idx in [false, true] {
        let guest = Guest::new(16, false).unwrap();
        let mut queue = guest.queue(0, event_idx, None);
        let parked = |guest: &Guest| {
            if event_idx {
                guest.avail_event() == 0x7fff
            } else {
                guest.no_notify()
            }
        };
        assert!(parked(&guest));
        assert!(!queue.arm());
        assert!(!parked(&guest));
        simple(&guest, 0, 4, 0, 0);
        guest.offer(0, 0);
        guest.set_avail_idx(1);
        assert!(queue.arm(), "work that came before arming is seen");
        queue.disarm();
        assert!(parked(&guest));
        // Without an eventfd nobody is called, whatever the driver wants.
        let request = poll(&mut queue)[0];
        queue.complete(request.head, Completion::Ok);
        assert_eq!(queue.publish(), None);
    }
}

#[test]
fn calls_follow_event_idx_and_flags() {
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    let eventfd = || {
        // SAFETY: makes a new descriptor that nobody else owns.
        unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, 0)) }
    };
    for event_idx in [false, true] {
        let guest = Guest::new(16, false).unwrap();
        let fd = eventfd();
        let raw = fd.as_raw_fd();
        let mut queue = guest.queue_calling(event_idx, fd);
        let mut n = 0;
        let mut one = |queue: &mut Queue| {
            simple(&guest, 0, 4, 0, 0);
            guest.offer(n, 0);
            n += 1;
            guest.set_avail_idx(n);
            let request = poll(queue)[0];
            queue.complete(request.head, Completion::Ok);
            queue.publish()
        };
        // Once in any case: an earlier holder of the queue may have died before it made the call it owed.
        guest.set_no_interrupt(true);
        guest.set_used_event(9);
        assert_eq!(queue.publish(), Some(raw));
        assert_eq!(queue.publish(), None);
        guest.set_no_interrupt(false);
        guest.set_used_event(0);
        assert_eq!(one(&mut queue), Some(raw));
        guest.set_no_interrupt(true);
        guest.set_used_event(5);
        assert_eq!(one(&mut queue), None);
        assert_eq!(one(&mut queue), None);
        guest.set_no_interrupt(false);
        guest.set_used_event(3);
        assert_eq!(one(&mut queue), Some(raw));
        queue.owe_call();
        assert_eq!(
            queue.publish(),
            Some(raw),
            "one that could not be made is made good"
        );
    }
}

#[test]
fn positions_wrap() {
    let guest = Guest::new(4, false).unwrap();
    let mut queue = guest.queue(0, true, None);
    simple(&guest, 0, 4, 0, 0);
    for i in 0..70_000u32 {
        guest.offer(i as u16, 0);
        guest.set_avail_idx((i + 1) as u16);
        let request = poll(&mut queue)[0];
        queue.complete(request.head, Completion::Ok);
        queue.publish();
        queue.keep_disarmed();
        let ahead = guest.avail_event().wrapping_sub((i + 1) as u16);
        assert!(ahead > 0x2000, "the driver would kick in {ahead} requests");
    }
    assert_eq!(guest.used_idx(), 70_000u32 as u16);
}
