//! The process dies at each change of the shared log and comes back.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::*;
use crate::frontend::Resumed;
use crate::frontend::guest::Mapping;
use crate::frontend::inflight::{CRASH_AFTER, Log, Region, region_bytes};
use crate::frontend::session::shared_memory;

const SIZE: u16 = 16;

fn log(file: &std::fs::File, instance: u128) -> Log {
    let mapping = Mapping::new(file, 0, region_bytes(1, SIZE)).unwrap();
    Log::new(
        Arc::new(Region::new(mapping, 1, SIZE, instance).unwrap()),
        0,
        SIZE,
    )
    .unwrap()
}

/// The driver's side: sixteen one-descriptor slots, each request with an id of its own as its sector.
struct Driver {
    guest: Guest,
    avail: u16,
    seen: u16,
    next_id: u64,
    in_slot: [Option<u64>; 5],
    completed: Vec<u64>,
}

impl Driver {
    /// Looks at what came back, then offers requests in all free slots.
    fn step(&mut self, limit: u64) {
        while self.seen != self.guest.used_idx() {
            let head = self.guest.used(self.seen).0 as usize;
            let id = self.in_slot[head / 3]
                .take()
                .expect("a head came back that was not out");
            assert_eq!(status(&self.guest, head as u16), 0);
            self.completed.push(id);
            self.seen = self.seen.wrapping_add(1);
        }
        for slot in 0..self.in_slot.len() {
            if self.in_slot[slot].is_none() && self.next_id < limit {
                let head = slot as u16 * 3;
                simple(&self.guest, head, 1, self.next_id, 512);
                self.in_slot[slot] = Some(self.next_id);
                self.next_id += 1;
                self.guest.offer(self.avail, head);
                self.avail = self.avail.wrapping_add(1);
                self.guest.set_avail_idx(self.avail);
            }
        }
    }
}

/// One life of the device. Completes out of order and in uneven batches.
fn live(driver: &mut Driver, queue: &mut Queue, executed: &mut Vec<u64>, limit: u64, seed: &mut u64) {
    let mut pending = Vec::new();
    while driver.completed.len() < limit as usize {
        driver.step(limit);
        *seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        queue.poll(1 + (*seed >> 60) as usize % 5, |request| {
            executed.push(request.sector);
            pending.push(request.head);
        });
        let n = (*seed >> 50) as usize % (pending.len() + 1);
        for _ in 0..n {
            let head = pending.swap_remove((*seed >> 40) as usize % pending.len());
            queue.complete(head, Completion::Ok);
        }
        queue.publish();
    }
}

#[test]
fn killed_anywhere_each_request_is_answered_once() {
    const REQUESTS: u64 = 40;
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !info.to_string().contains("killed here") {
            quiet(info);
        }
    }));
    let mut resumed = 0;
    for first in 1..=250u32 {
        let file = shared_memory(region_bytes(1, SIZE), true).unwrap();
        let mut driver = Driver {
            guest: Guest::new(SIZE, false).unwrap(),
            avail: 0,
            seen: 0,
            next_id: 0,
            in_slot: [None; 5],
            completed: Vec::new(),
        };
        let mut executed = Vec::new();
        let mut seed = u64::from(first);
        for life in 0u32.. {
            assert!(life < 500, "no progress");
            let done_before = driver.completed.clone();
            let executed_before = executed.len();
            let mut queue = driver
                .guest
                .queue(driver.guest.used_idx(), true, Some(log(&file, 9)));
            assert_eq!(
                queue.resumed(),
                if life == 0 { Resumed::Fresh } else { Resumed::Same }
            );
            CRASH_AFTER.set(if life == 0 {
                first
            } else {
                20 + (first * 7 + life * 13) % 97
            });
            let lived = catch_unwind(AssertUnwindSafe(|| {
                live(&mut driver, &mut queue, &mut executed, REQUESTS, &mut seed);
            }));
            CRASH_AFTER.set(0);
            // What the driver had seen completed when this life began was not touched again.
            assert!(
                executed[executed_before..]
                    .iter()
                    .all(|id| !done_before.contains(id))
            );
            match lived {
                Ok(()) => break,
                Err(panic) => {
                    let text = panic.downcast_ref::<&str>().map_or_else(
                        || panic.downcast_ref::<String>().cloned().unwrap_or_default(),
                        |s| (*s).to_owned(),
                    );
                    assert!(text.contains("killed here"), "{text}");
                }
            }
        }
        resumed += counter(&driver.guest, "requests_resumed");
        driver.completed.sort_unstable();
        assert_eq!(
            driver.completed,
            (0..REQUESTS).collect::<Vec<_>>(),
            "first life {first}"
        );
        let mut ids = executed;
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), REQUESTS as usize);
    }
    assert!(resumed > 1000, "the test never resumed anything: {resumed}");
}

#[test]
fn resumed_requests_come_in_the_order_they_were_taken() {
    let file = shared_memory(region_bytes(1, SIZE), true).unwrap();
    let guest = Guest::new(SIZE, false).unwrap();
    let mut queue = guest.queue(0, false, Some(log(&file, 9)));
    for (i, head) in [9, 0, 6, 3].into_iter().enumerate() {
        simple(&guest, head, 1, u64::from(head), 512);
        guest.offer(i as u16, head);
    }
    guest.set_avail_idx(3);
    assert_eq!(poll(&mut queue).len(), 3);
    queue.complete(0, Completion::Ok);
    queue.publish();
    drop(queue);
    guest.set_avail_idx(4);
    // The base a front end gives is of no use then: some count only what was returned, some all that was offered.
    for base in [1, 4] {
        let mut queue = guest.queue(base, false, Some(log(&file, 9)));
        let heads: Vec<_> = poll(&mut queue).iter().map(|r| r.head).collect();
        assert_eq!(heads, [9, 6, 3]);
    }
}

#[test]
fn a_log_of_another_instance_fails_everything() {
    let file = shared_memory(region_bytes(1, SIZE), true).unwrap();
    let guest = Guest::new(SIZE, false).unwrap();
    // Made for one instance and never used: another may take it.
    drop(log(&file, 1));
    assert_eq!(log(&file, 2).resumed(), Resumed::Fresh);
    let mut queue = guest.queue(0, false, Some(log(&file, 2)));
    simple(&guest, 0, 1, 0, 512);
    guest.offer(0, 0);
    guest.set_avail_idx(1);
    assert_eq!(poll(&mut queue).len(), 1);
    drop(queue);
    assert_eq!(log(&file, 2).resumed(), Resumed::Same);
    let mut queue = guest.queue(0, false, Some(log(&file, 3)));
    assert_eq!(queue.resumed(), Resumed::Foreign);
    simple(&guest, 3, 1, 0, 512);
    guest.offer(1, 3);
    guest.set_avail_idx(2);
    assert!(poll(&mut queue).is_empty());
    queue.publish();
    assert_eq!(
        (guest.used_idx(), status(&guest, 0), status(&guest, 3)),
        (2, 1, 1)
    );
    assert_eq!(counter(&guest, "requests_failed"), 2);
}

#[test]
fn scribbled_logs_do_no_harm() {
    let mut seed = 1u64;
    for _ in 0..500 {
        let file = shared_memory(region_bytes(1, SIZE), false).unwrap();
        use std::os::unix::fs::FileExt;
        let bytes: Vec<u8> = (0..region_bytes(1, SIZE))
            .map(|_| {
                seed = seed
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                (seed >> 56) as u8 & (seed >> 48) as u8
            })
            .collect();
        file.write_all_at(&bytes, 0).unwrap();
        let guest = Guest::new(SIZE, false).unwrap();
        let mut queue = guest.queue(0, false, Some(log(&file, 3)));
        for request in poll(&mut queue) {
            queue.complete(request.head, Completion::Ok);
        }
        queue.publish();
    }
}
