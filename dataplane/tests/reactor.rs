//! The reactor's tools: watches, notifications, timeouts, and above all that no wake-up is lost.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use unibody_dataplane::memory::Arena;
use unibody_dataplane::reactor::mailbox::{Waker, mailbox};
use unibody_dataplane::reactor::{Event, EventFd, Kind, Ring, RingFull, Tag};

const LONG: Option<Duration> = Some(Duration::from_secs(20));

fn kick(index: u32) -> Tag {
    Tag {
        kind: Kind::Kick,
        owner: 0x00ab_cdef,
        index,
    }
}

fn events(ring: &mut Ring) -> Vec<Event> {
    let mut events = Vec::new();
    ring.reap(&mut events);
    events
}

/// Waits for the next events, 20 s at most.
fn next(ring: &mut Ring) -> Vec<Event> {
    let start = Instant::now();
    loop {
        ring.wait(LONG).unwrap();
        let events = events(ring);
        if !events.is_empty() {
            return events;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "nothing came");
    }
}

#[test]
fn a_watch_reports_every_write_without_being_read() {
    let mut ring = Ring::new(8).unwrap();
    let event = EventFd::new().unwrap();
    event.raise();
    ring.watch(event.as_raw_fd(), kick(u32::MAX)).unwrap();
    let first = next(&mut ring);
    assert_eq!(
        (first[0].tag, first[0].more),
        (kick(u32::MAX), true),
        "what came before is reported"
    );
    for _ in 0..50 {
        ring.submit().unwrap();
        assert_eq!(events(&mut ring), []);
        event.raise();
        assert_eq!(next(&mut ring)[0].tag, kick(u32::MAX));
    }
    ring.unwatch(kick(u32::MAX)).unwrap();
    let mut last = Vec::new();
    while !last.iter().any(|e: &Event| e.tag == kick(u32::MAX)) {
        last.extend(next(&mut ring));
    }
    let last = last.into_iter().find(|e| e.tag == kick(u32::MAX)).unwrap();
    assert_eq!((last.result, last.more), (-libc::ECANCELED, false));
    event.raise();
    ring.wait(Some(Duration::from_millis(5))).unwrap();
    assert!(events(&mut ring).iter().all(|e| e.tag == Tag::NOBODY));
}

#[test]
fn notifications_go_out_with_the_turn() {
    let mut ring = Ring::new(8).unwrap();
    let (a, b) = (EventFd::new().unwrap(), EventFd::new().unwrap());
    for _ in 0..3 {
        // SAFETY: both stay open past the submit.
        unsafe {
            ring.notify(a.as_raw_fd()).unwrap();
            ring.notify(b.as_raw_fd()).unwrap();
        }
    }
    assert_eq!((a.take(), b.take()), (0, 0));
    let before = ring.stats().enters;
    assert!(ring.submit().unwrap());
    assert_eq!(ring.stats().enters - before, 1, "one system call for all six");
    assert_eq!((a.take(), b.take()), (3, 3));
    assert_eq!(events(&mut ring), [], "and no completions");
    assert!(!ring.submit().unwrap(), "nothing to do, no system call");
    // SAFETY: a number that is not open is refused by the kernel.
    unsafe { ring.notify(1 << 20).unwrap() };
    ring.submit().unwrap();
    assert_eq!(events(&mut ring).len(), 1);
    assert_eq!(ring.stats().unwanted_errors, 1);
}

#[test]
fn a_full_queue_is_said() {
    let mut ring = Ring::new(4).unwrap();
    let event = EventFd::new().unwrap();
    assert_eq!(ring.room(), 4);
    for i in 0..4 {
        ring.watch(event.as_raw_fd(), kick(i)).unwrap();
    }
    assert_eq!(ring.watch(event.as_raw_fd(), kick(9)), Err(RingFull));
    ring.submit().unwrap();
    assert_eq!(ring.room(), 4);
}

#[test]
fn waiting_ends_with_the_time() {
    let mut ring = Ring::new(4).unwrap();
    let start = Instant::now();
    ring.wait(Some(Duration::from_millis(20))).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(19), "it must sleep");
    assert_eq!((ring.stats().waits, events(&mut ring).len()), (1, 0));
}

/// More watches fire than the completion queue holds: none is lost.
#[test]
fn an_overflowing_completion_queue_loses_nothing() {
    let mut ring = Ring::new(4).unwrap();
    let all: Vec<EventFd> = (0..100).map(|_| EventFd::new().unwrap()).collect();
    assert!(ring.events_max() < all.len());
    for (i, event) in all.iter().enumerate() {
        while ring.watch(event.as_raw_fd(), kick(i as u32)).is_err() {
            ring.submit().unwrap();
        }
    }
    ring.submit().unwrap();
    all.iter().for_each(EventFd::raise);
    let mut seen = vec![false; all.len()];
    while seen.contains(&false) {
        for event in next(&mut ring) {
            seen[event.tag.index as usize] = true;
            if !event.more {
                let fd = all[event.tag.index as usize].as_raw_fd();
                while ring.watch(fd, event.tag).is_err() {
                    ring.submit().unwrap();
                }
            }
        }
    }
}

#[test]
fn registered_memory_is_found_and_forgotten() {
    let mut ring = Ring::new(4).unwrap();
    let (a, b) = (Arena::new(4).unwrap(), Arena::new(2).unwrap());
    let ((pa, la), (pb, lb)) = (a.span(), b.span());
    // SAFETY: both outlive the ring's knowledge of them.
    assert!(unsafe { ring.register_memory(pa, la) && ring.register_memory(pb, lb) });
    let (ia, ib) = (
        ring.registered(pa, la).unwrap(),
        ring.registered(pb.wrapping_add(4096), 4096).unwrap(),
    );
    assert_ne!(ia, ib);
    assert_eq!(ring.registered(pa.wrapping_add(1), la), None, "one byte too far");
    assert_eq!(ring.registered(pa.wrapping_sub(1), 2), None);
    assert!(ring.unregister_memory(pa));
    assert_eq!((ring.registered(pa, 1), ring.registered(pb, 1)), (None, Some(ib)));
    // SAFETY: as above.
    assert!(unsafe { ring.register_memory(pa, la) });
}

/// Senders with all sorts of pauses against a reactor that sleeps whenever it may, without a time limit that could hide
/// a lost wake-up: each wait is 20 s, and if one of them ran out, the test fails.
#[test]
fn no_wake_up_is_lost() {
    const SENDERS: u64 = 3;
    const MESSAGES: u64 = 20_000;
    let waker = Waker::new().unwrap();
    let (sender, receiver) = mailbox::<u64>(16, &waker);
    let stalled = Arc::new(AtomicBool::new(false));
    let received = Arc::new(AtomicU64::new(0));
    std::thread::scope(|scope| {
        for id in 0..SENDERS {
            let (sender, stalled, received) = (sender.clone(), Arc::clone(&stalled), Arc::clone(&received));
            scope.spawn(move || {
                for number in 0..MESSAGES {
                    let mut message = id << 32 | number;
                    while let Err(back) = sender.send(message) {
                        message = back;
                        if stalled.load(Ordering::Relaxed) {
                            return;
                        }
                        std::thread::yield_now();
                    }
                    // Let the reactor fall asleep now and then, at every possible distance from the next message.
                    if number % 64 == id {
                        let seen = received.load(Ordering::Relaxed);
                        for _ in 0..(number / 64 * 37) % 3000 {
                            std::hint::spin_loop();
                        }
                        if number % 1024 == id && seen != 0 {
                            std::thread::sleep(Duration::from_micros(number % 300));
                        }
                    }
                }
            });
        }
        let mut ring = Ring::new(8).unwrap();
        let wake = Tag {
            kind: Kind::Wake,
            owner: 0,
            index: 0,
        };
        ring.watch(waker.fd(), wake).unwrap();
        let mut next = [0; SENDERS as usize];
        let mut batch = Vec::new();
        let mut sleeps = 0;
        while received.load(Ordering::Relaxed) < SENDERS * MESSAGES {
            let mut worked = false;
            while let Some(message) = receiver.receive() {
                let (id, number) = ((message >> 32) as usize, message & 0xffff_ffff);
                assert_eq!(number, next[id], "in order, each once");
                next[id] += 1;
                received.fetch_add(1, Ordering::Relaxed);
                worked = true;
            }
            if worked {
                continue;
            }
            waker.arm();
            if receiver.is_empty() {
                let start = Instant::now();
                ring.wait(LONG).unwrap();
                sleeps += 1;
                if start.elapsed() >= Duration::from_secs(19) {
                    stalled.store(true, Ordering::Relaxed);
                    panic!("a wake-up was lost: {:?}", receiver.receive());
                }
            }
            waker.disarm();
            batch.clear();
            ring.reap(&mut batch);
            if batch.iter().any(|event| !event.more) {
                ring.watch(waker.fd(), wake).unwrap();
            }
        }
        assert!(
            sleeps > 10,
            "the reactor slept {sleeps} times only: nothing was tested"
        );
    });
}

#[test]
fn a_mailbox_is_bounded_and_wakes_once() {
    let waker = Waker::new().unwrap();
    let (sender, receiver) = mailbox(2, &waker);
    assert_eq!(
        (sender.push(1), sender.push(2), sender.push(3)),
        (Ok(()), Ok(()), Err(3))
    );
    assert!(!waker.must_wake(), "awake");
    waker.arm();
    assert!(waker.must_wake());
    assert!(!waker.must_wake(), "once is enough");
    assert_eq!(
        (receiver.receive(), receiver.receive(), receiver.receive()),
        (Some(1), Some(2), None)
    );
}

/// A reactor that waits for nothing costs nothing: a second of sleep with a tick takes next to no system calls.
#[test]
fn an_idle_reactor_sleeps() {
    let mut ring = Ring::new(1024).unwrap();
    let all: Vec<EventFd> = (0..1000).map(|_| EventFd::new().unwrap()).collect();
    for (i, event) in all.iter().enumerate() {
        ring.watch(event.as_raw_fd(), kick(i as u32)).unwrap();
    }
    ring.submit().unwrap();
    let before = ring.stats();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        ring.wait(Some(Duration::from_millis(250))).unwrap();
        assert_eq!(events(&mut ring), []);
    }
    let enters = ring.stats().enters - before.enters;
    assert!(enters <= 5, "{enters} wake-ups in a second");
}
