//! A device that sleeps when idle and a driver that kicks only when asked: no request may be left lying.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use super::*;

#[test]
fn arming_loses_no_wakeup() {
    const REQUESTS: u16 = 60_000;
    for event_idx in [false, true] {
        let guest = Guest::new(4, false).unwrap();
        simple(&guest, 0, 4, 0, 0);
        let (kick, kicked) = channel();
        let stuck = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let mut queue = guest.queue(0, event_idx, None);
            let (guest, stuck) = (&guest, &stuck);
            scope.spawn(move || {
                let mut done = 0;
                while done < REQUESTS {
                    let mut any = false;
                    for request in poll(&mut queue) {
                        queue.complete(request.head, Completion::Ok);
                        done += 1;
                        any = true;
                    }
                    queue.publish();
                    if any || queue.arm() {
                        queue.disarm();
                        continue;
                    }
                    // Asleep until the kick. The bound only turns a hang into a failure.
                    match kicked.recv_timeout(Duration::from_secs(5)) {
                        Ok(()) | Err(RecvTimeoutError::Disconnected) => {}
                        Err(RecvTimeoutError::Timeout) => {
                            stuck.store(true, Ordering::Release);
                            return;
                        }
                    }
                    queue.disarm();
                }
            });
            for i in 0..REQUESTS {
                guest.offer(i, 0);
                let old = i;
                guest.set_avail_idx(i + 1);
                fence(Ordering::SeqCst);
                let wanted = if event_idx {
                    (i + 1).wrapping_sub(guest.avail_event()).wrapping_sub(1) < (i + 1).wrapping_sub(old)
                } else {
                    !guest.no_notify()
                };
                if wanted {
                    let _ = kick.send(());
                }
                while guest.used_idx() != i + 1 {
                    if stuck.load(Ordering::Acquire) {
                        return;
                    }
                    std::hint::spin_loop();
                }
            }
        });
        assert!(
            !stuck.load(Ordering::Acquire),
            "a request was offered and nobody woke (event_idx {event_idx})"
        );
    }
}
