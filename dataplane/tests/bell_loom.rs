//! All interleavings (of two preemptions at most) of a reactor going to sleep and two senders: no message is left with the reactor asleep.

mod atomics {
    pub(crate) use loom::sync::atomic::{AtomicBool, Ordering, fence};
}
#[path = "../src/reactor/bell.rs"]
mod bell;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};

#[test]
fn no_message_is_slept_through() {
    let mut model = loom::model::Builder::new();
    // Two preemptions a run: enough for every known way to lose a wake-up, and a second instead of half a minute.
    model.preemption_bound = Some(2);
    model.check(|| {
        let bell = Arc::new(bell::Bell::new());
        let messages = [Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0))];
        let rings = Arc::new(AtomicUsize::new(0));
        let senders = messages.clone().map(|message| {
            let (bell, rings) = (Arc::clone(&bell), Arc::clone(&rings));
            loom::thread::spawn(move || {
                message.store(1, Ordering::Relaxed);
                if bell.must_wake() {
                    rings.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        bell.arm();
        let seen: Vec<bool> = messages.iter().map(|m| m.load(Ordering::Relaxed) == 1).collect();
        let sleeps = !seen.contains(&true);
        if !sleeps {
            bell.disarm();
        }
        for sender in senders {
            sender.join().unwrap();
        }
        assert!(
            !sleeps || rings.load(Ordering::Relaxed) >= 1,
            "asleep, with messages and no bell"
        );
    });
}
