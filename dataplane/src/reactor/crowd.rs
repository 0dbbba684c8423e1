//! Whether a reactor has its core to itself.
//!
//! Polling while idle is free on a core that nobody else wants. Where others do (several nodes on one machine, more reactors
//! than cores, the kernel's own workers), it takes from them, and often from the very thread that is waited for. The kernel
//! counts for how long a thread was ready to run and had to wait for its core; a thread beside the reactors looks at that
//! now and then, so that a reactor has only a flag to read.
//!
//! Deliberately absent: any judgement of who the others are.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(100);
/// A core is shared when a thread waited for it for more than this part of the time.
const PART: u32 = 16;
/// How long it is then taken to be shared: without polling there is less waiting to be seen.
const HOLD: Duration = Duration::from_secs(3);

/// What a reactor knows of its core; see the module.
#[derive(Debug, Default)]
pub struct Crowd(AtomicBool);

impl Crowd {
    /// Others want the core.
    #[inline]
    pub fn is_shared(&self) -> bool {
        // A hint that orders nothing.
        self.0.load(Ordering::Relaxed)
    }
}

/// How long the calling thread has waited for its core, as the kernel counts it.
///
/// # Errors
/// When the kernel does not count that.
pub fn own_waiting() -> io::Result<Waiting> {
    let waiting = Waiting(File::open("/proc/thread-self/schedstat")?);
    waiting.so_far()?;
    Ok(waiting)
}

/// See [`own_waiting`].
#[derive(Debug)]
pub struct Waiting(File);

impl Waiting {
    /// The second number of `schedstat`: nanoseconds ready to run and not running (Linux, `Documentation/scheduler/sched-stats.rst`).
    fn so_far(&self) -> io::Result<Duration> {
        let mut bytes = [0; 96];
        let length = self.0.read_at(&mut bytes, 0)?;
        std::str::from_utf8(&bytes[..length])
            .ok()
            .and_then(|text| text.split_ascii_whitespace().nth(1)?.parse().ok())
            .map(Duration::from_nanos)
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// What was seen of one thread.
#[derive(Debug, Default)]
struct Judge {
    last: Option<(Instant, Duration)>,
    shared_until: Option<Instant>,
}

impl Judge {
    /// The thread had waited for so long by `now`: is its core shared?
    fn look(&mut self, waited: Duration, now: Instant) -> bool {
        if let Some((then, before)) = self.last.replace((now, waited))
            && waited.saturating_sub(before) * PART > now.saturating_duration_since(then)
        {
            self.shared_until = Some(now + HOLD);
        }
        self.shared_until.is_some_and(|until| now < until)
    }
}

/// Looks after the reactors of a process, on a thread of its own, until dropped.
#[derive(Debug)]
pub struct Lookout {
    over: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Lookout {
    /// Begins.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(threads: Vec<(Waiting, Arc<Crowd>)>) -> io::Result<Self> {
        let over = Arc::new((Mutex::new(false), Condvar::new()));
        let ends = Arc::clone(&over);
        let mut threads: Vec<_> = threads
            .into_iter()
            .map(|(waiting, crowd)| (waiting, crowd, Judge::default()))
            .collect();
        let thread = std::thread::Builder::new()
            .name("lookout".into())
            .spawn(move || {
                let (over, changed) = &*ends;
                let mut is_over = over.lock().expect("nobody panics with it");
                while !*is_over {
                    for (waiting, crowd, judge) in &mut threads {
                        // A thread that has ended waits no more.
                        let shared = waiting
                            .so_far()
                            .is_ok_and(|waited| judge.look(waited, Instant::now()));
                        crowd.0.store(shared, Ordering::Relaxed);
                    }
                    is_over = changed
                        .wait_timeout(is_over, LOOK)
                        .expect("nobody panics with it")
                        .0;
                }
            })?;
        Ok(Lookout {
            over,
            thread: Some(thread),
        })
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        *self.over.0.lock().expect("nobody panics with it") = true;
        self.over.1.notify_all();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reactor::pin::{allowed_cores, spawn_pinned};

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_core_is_shared_while_its_thread_waits_and_for_a_while_after() {
        let (start, mut judge) = (Instant::now(), Judge::default());
        assert!(!judge.look(500 * MS, start), "what was before is not known");
        assert!(!judge.look(506 * MS, start + 100 * MS), "a sixteenth is not much");
        assert!(judge.look(513 * MS, start + 200 * MS));
        assert!(judge.look(513 * MS, start + 200 * MS + HOLD - MS));
        assert!(!judge.look(513 * MS, start + 200 * MS + HOLD));
    }

    #[test]
    fn two_threads_that_poll_on_one_core_see_each_other() {
        let core = *allowed_cores().last().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let crowds = [Arc::new(Crowd::default()), Arc::new(Crowd::default())];
        let mut looked_after = Vec::new();
        let mut threads = Vec::new();
        for crowd in &crowds {
            let (send, receive) = std::sync::mpsc::channel();
            let stop = Arc::clone(&stop);
            threads.push(
                spawn_pinned("polls", core, move || {
                    send.send(own_waiting()).unwrap();
                    while !stop.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                })
                .unwrap(),
            );
            looked_after.push((receive.recv().unwrap().unwrap(), Arc::clone(crowd)));
        }
        let lookout = Lookout::start(looked_after).unwrap();
        let patience = Instant::now() + Duration::from_secs(60);
        while !crowds.iter().all(|crowd| crowd.is_shared()) {
            assert!(Instant::now() < patience, "nobody noticed");
            std::thread::sleep(MS);
        }
        stop.store(true, Ordering::Relaxed);
        drop(lookout);
        for thread in threads {
            thread.join().unwrap();
        }
    }
}
