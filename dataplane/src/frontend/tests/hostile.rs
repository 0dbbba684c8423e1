//! Chains no honest driver makes.

use super::*;
use crate::frontend::fuzz::{MEMORY, fuzz_chain};
use proptest::prelude::*;

/// Offers descriptor 0 and tells what came of it: the status byte if answered, the counters that moved.
fn offer_zero(guest: &Guest) -> (Option<u8>, Vec<&'static str>, Queue) {
    guest.write(STATUS_AT, &[0xff]);
    guest.offer(0, 0);
    guest.set_avail_idx(1);
    let before = guest.shared.counters.list();
    let mut queue = guest.queue(0, false, None);
    assert!(poll(&mut queue).is_empty(), "a bad chain became a request");
    queue.publish();
    let after = guest.shared.counters.list();
    let moved = before
        .iter()
        .zip(&after)
        .filter(|(b, a)| b != a)
        .map(|(b, _)| b.0)
        .collect();
    let answered = (guest.used_idx() == 1).then(|| status(guest, 0));
    (answered, moved, queue)
}

const HEADER: u64 = GUEST + HEADER_AT;
const STATUS: u64 = GUEST + STATUS_AT;
const BUFFER: u64 = GUEST + BUFFER_AT;

/// (address, length, flags, next), and whether it is answered, and what counts it.
type Case = (&'static str, Vec<(u64, u32, u16, u16)>, bool, &'static str);

#[test]
fn bad_chains_are_answered_or_break_the_queue() {
    let cases: Vec<Case> = vec![
        (
            "loop",
            vec![(HEADER, 16, NEXT, 1), (BUFFER, 512, NEXT, 0)],
            false,
            "chains_too_long",
        ),
        (
            "loop of one",
            vec![(HEADER, 16, NEXT, 0)],
            false,
            "chains_too_long",
        ),
        (
            "next out of range",
            vec![(HEADER, 16, NEXT, 16)],
            false,
            "chains_malformed",
        ),
        ("no status", vec![(HEADER, 16, 0, 0)], false, "chains_malformed"),
        (
            "status read-only",
            vec![(HEADER, 16, NEXT, 1), (STATUS, 1, 0, 0)],
            false,
            "chains_malformed",
        ),
        (
            "header write-only",
            vec![(HEADER, 16, NEXT | WRITE, 1), (STATUS, 1, WRITE, 0)],
            true,
            "chains_malformed",
        ),
        (
            "header short",
            vec![(HEADER, 15, NEXT, 1), (STATUS, 1, WRITE, 0)],
            true,
            "chains_malformed",
        ),
        (
            "readable after writable",
            vec![
                (HEADER, 16, NEXT, 1),
                (BUFFER, 512, NEXT | WRITE, 2),
                (BUFFER, 512, NEXT, 3),
                (STATUS, 1, WRITE, 0),
            ],
            true,
            "chains_malformed",
        ),
        (
            "data in a read",
            vec![
                (HEADER, 16, NEXT, 1),
                (BUFFER, 512, NEXT, 2),
                (STATUS, 1, WRITE, 0),
            ],
            true,
            "chains_malformed",
        ),
        (
            "header unmapped",
            vec![(GUEST - 16, 16, NEXT, 1), (STATUS, 1, WRITE, 0)],
            true,
            "chains_unmapped",
        ),
        (
            "header overlaps the start",
            vec![(GUEST - 8, 16, NEXT, 1), (STATUS, 1, WRITE, 0)],
            true,
            "chains_unmapped",
        ),
        (
            "data beyond the end",
            vec![
                (HEADER, 16, NEXT, 1),
                (GUEST + MEMORY - 256, 512, NEXT | WRITE, 2),
                (STATUS, 1, WRITE, 0),
            ],
            true,
            "chains_unmapped",
        ),
        (
            "address overflow",
            vec![
                (HEADER, 16, NEXT, 1),
                (u64::MAX - 100, 512, NEXT | WRITE, 2),
                (STATUS, 1, WRITE, 0),
            ],
            true,
            "chains_unmapped",
        ),
        (
            "huge length",
            vec![
                (HEADER, 16, NEXT, 1),
                (BUFFER, u32::MAX, NEXT | WRITE, 2),
                (STATUS, 1, WRITE, 0),
            ],
            true,
            "chains_unmapped",
        ),
        (
            "status unmapped",
            vec![(HEADER, 16, NEXT, 1), (GUEST + MEMORY, 1, WRITE, 0)],
            false,
            "chains_unmapped",
        ),
        (
            "status empty",
            vec![(HEADER, 16, NEXT, 1), (STATUS, 0, WRITE, 0)],
            false,
            "chains_malformed",
        ),
        (
            "odd length",
            vec![
                (HEADER, 16, NEXT, 1),
                (BUFFER, 500, NEXT | WRITE, 2),
                (STATUS, 1, WRITE, 0),
            ],
            true,
            "requests_out_of_range",
        ),
        (
            "no data",
            vec![(HEADER, 16, NEXT, 1), (STATUS, 1, WRITE, 0)],
            true,
            "requests_out_of_range",
        ),
        (
            "indirect and next",
            vec![(BUFFER, 32, INDIRECT | NEXT, 1), (STATUS, 1, WRITE, 0)],
            false,
            "chains_malformed",
        ),
        (
            "indirect of odd size",
            vec![(BUFFER, 33, INDIRECT, 0)],
            false,
            "chains_malformed",
        ),
        (
            "indirect empty",
            vec![(BUFFER, 0, INDIRECT, 0)],
            false,
            "chains_malformed",
        ),
        (
            "indirect unmapped",
            vec![(GUEST + MEMORY - 16, 32, INDIRECT, 0)],
            false,
            "chains_unmapped",
        ),
        (
            "indirect huge",
            vec![(BUFFER, !15, INDIRECT, 0)],
            false,
            "chains_malformed",
        ),
    ];
    for (name, descs, answered, counted) in cases {
        let guest = Guest::new(16, false).unwrap();
        header(&guest, HEADER_AT, 0, 0);
        for (i, &(addr, len, flags, next)) in descs.iter().enumerate() {
            guest.desc(0, i as u16, addr, len, flags, next);
        }
        let (status, moved, queue) = offer_zero(&guest);
        if answered {
            assert_eq!((status, moved), (Some(1), vec![counted]), "{name}");
        } else {
            assert_eq!((status, queue.broken()), (None, true), "{name}");
            assert_eq!(moved, vec![counted, "queues_broken"], "{name}");
        }
    }
}

#[test]
fn indirect_tables_loop_and_nest_in_vain() {
    for (name, table, counted) in [
        (
            "loop",
            vec![(HEADER, 16, NEXT, 1), (BUFFER, 0, NEXT, 0)],
            "chains_too_long",
        ),
        (
            "nested",
            vec![(BUFFER, 32, INDIRECT, 0), (STATUS, 1, WRITE, 0)],
            "chains_malformed",
        ),
        (
            "next out of the table",
            vec![(HEADER, 16, NEXT, 2), (STATUS, 1, WRITE, 0)],
            "chains_malformed",
        ),
    ] {
        let guest = Guest::new(16, false).unwrap();
        header(&guest, HEADER_AT, 4, 0);
        for (i, (addr, len, flags, next)) in table.into_iter().enumerate() {
            guest.desc(BUFFER_AT, i as u16, addr, len, flags, next);
        }
        guest.desc(0, 0, BUFFER, 32, INDIRECT, 0);
        let (status, moved, queue) = offer_zero(&guest);
        assert_eq!(
            (status, queue.broken(), moved),
            (None, true, vec![counted, "queues_broken"]),
            "{name}"
        );
    }
}

#[test]
fn bad_positions_and_heads_break_the_queue() {
    // The index jumps by more than the queue holds.
    let guest = Guest::new(16, false).unwrap();
    let mut queue = guest.queue(0, false, None);
    simple(&guest, 0, 4, 0, 0);
    guest.set_avail_idx(17);
    assert!(poll(&mut queue).is_empty() && queue.broken());
    // A head beyond the table, behind a good one.
    let guest = Guest::new(16, false).unwrap();
    let mut queue = guest.queue(0, false, None);
    simple(&guest, 0, 4, 0, 0);
    guest.offer(1, 16);
    guest.set_avail_idx(2);
    assert_eq!(poll(&mut queue).len(), 1);
    assert!(queue.broken());
    // The same head twice.
    let guest = Guest::new(16, false).unwrap();
    let mut queue = guest.queue(0, false, None);
    simple(&guest, 0, 4, 0, 0);
    guest.offer(0, 0);
    guest.set_avail_idx(1);
    let request = poll(&mut queue)[0];
    guest.offer(1, 0);
    guest.set_avail_idx(2);
    assert!(poll(&mut queue).is_empty() && queue.broken());
    // What was taken before can still be completed.
    queue.complete(request.head, Completion::Ok);
    queue.publish();
    assert_eq!((guest.used_idx(), counter(&guest, "queues_broken")), (1, 1));
}

#[test]
fn requests_stay_inside_the_device() {
    const SECTORS: u64 = (1 << 20) / 512;
    for (kind, sector, len, good) in [
        (0, SECTORS - 1, 512, true),
        (0, SECTORS, 512, false),
        (1, SECTORS - 1, 1024, false),
        (1, u64::MAX, 512, false),
        (0, u64::MAX / 512, 512, false),
    ] {
        let guest = Guest::new(16, false).unwrap();
        let mut queue = guest.queue(0, false, None);
        simple(&guest, 0, kind, sector, len);
        guest.offer(0, 0);
        guest.set_avail_idx(1);
        assert_eq!(poll(&mut queue).len() == 1, good, "{kind} {sector} {len}");
        assert_eq!(counter(&guest, "requests_out_of_range"), u64::from(!good));
    }
    for (sector, sectors, flags, status_expected) in [
        (SECTORS, 1u32, 0u32, 1),
        (u64::MAX, 1, 0, 1),
        (0, 1 << 22, 0, 1),
        (0, 1, 2, 2),
        (0, 1, 1, 2),
    ] {
        let guest = Guest::new(16, false).unwrap();
        let mut queue = guest.queue(0, false, None);
        simple(&guest, 0, 11, 0, 16);
        guest.write(BUFFER_AT, &sector.to_le_bytes());
        guest.write(BUFFER_AT + 8, &sectors.to_le_bytes());
        guest.write(BUFFER_AT + 12, &flags.to_le_bytes());
        guest.offer(0, 0);
        guest.set_avail_idx(1);
        assert!(poll(&mut queue).is_empty());
        assert_eq!(status(&guest, 0), status_expected);
    }
    let guest = Guest::new(16, true).unwrap();
    let mut queue = guest.queue(0, false, None);
    simple(&guest, 0, 1, 0, 512);
    guest.offer(0, 0);
    guest.set_avail_idx(1);
    assert!(poll(&mut queue).is_empty());
    assert_eq!((status(&guest, 0), counter(&guest, "requests_read_only")), (1, 1));
}

#[test]
fn truncated_memory_fails_its_device_only() {
    let guest = Guest::new(16, false).unwrap();
    let other = Guest::new(16, false).unwrap();
    let mut queue = guest.queue(0, false, None);
    let mut healthy = other.queue(0, false, None);
    for guest in [&guest, &other] {
        simple(guest, 0, 0, 0, 512);
        simple(guest, 3, 0, 0, 512);
        guest.offer(0, 0);
        guest.set_avail_idx(1);
    }
    let (request, fine) = (poll(&mut queue)[0], poll(&mut healthy)[0]);
    // The rings stay, the buffers go.
    guest.file.set_len(0xc000).unwrap();
    let seg = queue.segs(&request)[0];
    // SAFETY: mapped; the hole behind it is what the handler covers.
    assert_eq!(unsafe { seg.ptr.read_volatile() }, 0);
    guest.offer(1, 3);
    guest.set_avail_idx(2);
    assert!(poll(&mut queue).is_empty());
    assert_eq!(counter(&guest, "memory_truncated"), 1);
    queue.complete(request.head, Completion::Ok);
    queue.publish();
    assert_eq!(
        status(&guest, 0),
        1,
        "a request that met the hole must not succeed"
    );
    healthy.complete(fine.head, Completion::Ok);
    healthy.publish();
    assert_eq!((status(&other, 0), counter(&other, "memory_truncated")), (0, 0));
}

/// The page goes while the request is carried out, and nobody polls before it is completed.
#[test]
fn a_request_that_met_a_hole_fails_at_once() {
    let guest = Guest::new(16, false).unwrap();
    let mut queue = guest.queue(0, false, None);
    simple(&guest, 0, 0, 0, 512);
    guest.offer(0, 0);
    guest.set_avail_idx(1);
    let request = poll(&mut queue)[0];
    guest.file.set_len(0xc000).unwrap();
    let seg = queue.segs(&request)[0];
    assert!(!queue.poisoned());
    // SAFETY: mapped; the hole behind it is what the handler covers.
    unsafe { seg.ptr.write_volatile(1) };
    queue.complete(request.head, Completion::Ok);
    queue.publish();
    assert_eq!(
        counter(&guest, "requests_failed") + counter(&guest, "memory_truncated"),
        1
    );
    assert!(queue.poisoned());
}

/// Each hole that is covered is a mapping of this process, and the kernel allows it a limited number.
#[test]
fn truncating_often_uses_up_no_mappings() {
    const BYTES: u64 = 8 << 30;
    let file = crate::frontend::session::shared_memory(BYTES, false).unwrap();
    let mapping = crate::frontend::guest::Mapping::new(&file, 0, BYTES).unwrap();
    let maps = || {
        std::fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .count()
    };
    file.set_len(0).unwrap();
    let before = maps();
    for at in (0..BYTES as usize).step_by((64 << 20) + 4096) {
        // SAFETY: inside the mapping; what is not there is covered by the handler.
        assert_eq!(unsafe { mapping.start().wrapping_add(at).read_volatile() }, 0);
    }
    assert!(mapping.poisoned());
    // Other tests of this process map things as well, but not a hundred.
    assert!(maps() < before + 60, "{} mappings more", maps() - before);
}

#[test]
fn other_bus_errors_still_end_the_process() {
    if std::env::var_os("UNIBODY_TEST_SIGBUS").is_some() {
        let _guest = Guest::new(16, false).unwrap();
        let file = crate::frontend::session::shared_memory(4096, false).unwrap();
        // SAFETY: a new mapping; reading it after the truncation is meant to raise SIGBUS.
        unsafe {
            use std::os::fd::AsRawFd;
            let p = libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            );
            file.set_len(0).unwrap();
            p.cast::<u8>().read_volatile();
        }
        return;
    }
    use std::os::unix::process::ExitStatusExt;
    let name = "frontend::tests::hostile::other_bus_errors_still_end_the_process";
    let status = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name])
        .env("UNIBODY_TEST_SIGBUS", "1")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.signal(), Some(libc::SIGBUS));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn no_bytes_harm_the_queue(data in proptest::collection::vec(any::<u8>(), 0..700)) {
        fuzz_chain(&data);
    }
}
