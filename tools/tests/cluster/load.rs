//! A load on the volume that judges what it reads: stamped blocks, every block a register (`unibody_tests::checker`).
//!
//! A request that gets no answer is waited for until the volume has a new generation, since only then is it sure that nothing
//! of it is carried out later; then the load goes where the volume is now. Writes without an answer may have happened.
//!
//! The connection to where it was first can be kept ([`Load::haunt`]): what is asked there after others have written is answered
//! with what is true now, or not at all.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use unibody_tests::checker::Checker;

use crate::client::Client;
use crate::common::Cluster;

const BLOCK: usize = 4096;
/// Blocks in use, spread over the whole volume.
const BLOCKS: u64 = 192;
const DEPTH: usize = 8;
/// Silence after which it is asked where the volume is.
const SILENCE: Duration = Duration::from_millis(500);

/// Where the volume is: its generation, and its socket if it is served.
type Place = (u64, Option<PathBuf>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Write(u64),
    Read,
    Flush,
}

#[derive(Clone, Copy)]
struct Request {
    kind: Kind,
    block: u64,
    begun: u64,
}

/// What the load did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Done {
    pub(crate) writes: u64,
    pub(crate) reads: u64,
    pub(crate) errors: u64,
    pub(crate) moves: u64,
    /// Longest time without any answer, while it was not over.
    pub(crate) gap: Duration,
    /// Requests that a former owner was asked and refused.
    pub(crate) refused: u64,
}

/// See the module.
pub(crate) struct Load {
    signals: Arc<Signals>,
    thread: std::thread::JoinHandle<(Checker, Done)>,
}

/// Between a load and who began it.
#[derive(Default)]
struct Signals {
    stop: AtomicBool,
    answers: AtomicU64,
    /// The former owner is to be asked.
    haunt: AtomicBool,
    /// Requests that it was asked.
    haunted: AtomicU64,
}

/// A connection to a former owner.
struct Ghost {
    client: Client,
    slots: [Option<Request>; DEPTH],
}

struct Run {
    cluster: Arc<Mutex<Cluster>>,
    checker: Checker,
    done: Done,
    clock: u64,
    random: u64,
    next: u64,
    size: u64,
}

impl Load {
    /// Begins.
    pub(crate) fn start(cluster: &Arc<Mutex<Cluster>>) -> Self {
        let signals = Arc::new(Signals::default());
        let run = Run {
            cluster: Arc::clone(cluster),
            checker: Checker::default(),
            done: Done::default(),
            clock: 0,
            random: 0x9e37_79b9_7f4a_7c15,
            next: 1,
            size: 0,
        };
        let theirs = Arc::clone(&signals);
        let thread = std::thread::spawn(move || run.until(&theirs));
        Load { signals, thread }
    }

    /// From now on the former owner is asked as well, whether it lives or stands still. Its first requests are there when this
    /// returns.
    pub(crate) fn haunt(&self) {
        self.signals.haunt.store(true, Ordering::Relaxed);
        crate::common::until("the former owner is asked", || {
            assert!(!self.thread.is_finished(), "the load has found something");
            self.signals.haunted.load(Ordering::Relaxed) >= DEPTH as u64
        });
    }

    /// Waits until so many more requests were answered.
    pub(crate) fn answers(&self, more: u64) {
        let wanted = self.answered() + more;
        crate::common::until("the load goes on", || {
            assert!(!self.thread.is_finished(), "the load has found something");
            self.answered() >= wanted
        });
    }

    /// Requests answered so far.
    pub(crate) fn answered(&self) -> u64 {
        self.signals.answers.load(Ordering::Relaxed)
    }

    /// Ends, after everything was read once more.
    pub(crate) fn end(self) -> Done {
        self.signals.stop.store(true, Ordering::Relaxed);
        let (checker, done) = self.thread.join().expect("what was read is right");
        assert!(
            checker.judged > 0 && done.writes > 0 && done.reads > 0,
            "{done:?}"
        );
        eprintln!("{done:?}");
        done
    }
}

impl Run {
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn now(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn place(&self) -> Option<Place> {
        let volume = self.cluster.lock().unwrap().volume()?;
        let socket = volume["socket"].as_str().map(PathBuf::from);
        Some((volume["generation"].as_u64()?, socket))
    }

    /// Connects where the volume is, once that is under a generation beyond `old`.
    fn connect(&mut self, old: u64) -> (u64, Client) {
        loop {
            if let Some((generation, Some(socket))) = self.place()
                && generation > old
                && let Ok(client) = Client::connect(&socket, 2 * DEPTH, 2 * BLOCK * DEPTH)
            {
                self.size = client.capacity();
                return (generation, client);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn until(mut self, signals: &Signals) -> (Checker, Done) {
        let mut ghost: Option<Ghost> = None;
        let (mut generation, mut client) = self.connect(0);
        let mut slots: [Option<Request>; DEPTH] = [None; DEPTH];
        // What is to be read once more at the end, last first.
        let mut last: Option<Vec<u64>> = None;
        let mut heard = Instant::now();
        loop {
            if signals.stop.load(Ordering::Relaxed) && last.is_none() {
                last = Some((0..BLOCKS).collect());
            }
            for (slot, request) in slots.iter_mut().enumerate() {
                if request.is_none() {
                    *request = self.begin(&mut client, slot, last.as_mut());
                }
            }
            if slots.iter().all(Option::is_none) {
                return (self.checker, self.done);
            }
            if let Some(ghost) = ghost.as_mut().filter(|_| signals.haunt.load(Ordering::Relaxed)) {
                let asked = self.haunt(ghost);
                signals.haunted.fetch_add(asked, Ordering::Relaxed);
            }
            let mut ended = Vec::new();
            let polled = client.poll(|slot, result| ended.push((slot, result)));
            for &(slot, result) in &ended {
                let request = slots[slot].take().expect("an answer to something");
                let haunting = ghost.iter().flat_map(|ghost| ghost.slots.iter().flatten());
                let others = slots.iter().flatten().chain(haunting);
                let horizon = others.map(|other| other.begun).min();
                self.end(&mut client, slot, request, result, horizon);
                if let (Some(last), Kind::Read, true) = (&mut last, request.kind, result < 0) {
                    last.push(request.block);
                }
            }
            if !ended.is_empty() {
                signals.answers.fetch_add(ended.len() as u64, Ordering::Relaxed);
                self.done.gap = self.done.gap.max(heard.elapsed());
                heard = Instant::now();
                continue;
            }
            if polled.is_ok() && heard.elapsed() < SILENCE {
                std::thread::sleep(Duration::from_micros(50));
                continue;
            }
            let moved = self.place().is_some_and(|(now, _)| now > generation);
            if !moved {
                std::thread::sleep(Duration::from_millis(20));
                continue;
            }
            // Nothing of the old generation is carried out any more once the new one is served.
            let former = {
                let place = self.connect(generation);
                generation = place.0;
                std::mem::replace(&mut client, place.1)
            };
            ghost.get_or_insert(Ghost {
                client: former,
                slots: [None; DEPTH],
            });
            self.done.moves += 1;
            for request in slots.iter_mut().filter_map(Option::take) {
                match request.kind {
                    Kind::Write(id) => {
                        let now = self.now();
                        self.checker.failed(request.block, id, request.begun, now);
                    }
                    Kind::Read => {
                        if let Some(last) = &mut last {
                            last.push(request.block);
                        }
                    }
                    Kind::Flush => {}
                }
            }
        }
    }

    /// Asks a former owner as much as it takes, and judges what it answers. Answers how much it was asked. It has been asked
    /// things before: those have the lower tags, and nobody wants to know.
    fn haunt(&mut self, ghost: &mut Ghost) -> u64 {
        let mut ended = Vec::new();
        // A connection that broke answers nothing wrong.
        let _ = ghost.client.poll(|tag, result| ended.push((tag, result)));
        for (tag, result) in ended {
            let Some(request) = tag.checked_sub(DEPTH).and_then(|slot| ghost.slots[slot].take()) else {
                continue;
            };
            if result < 0 {
                self.done.refused += 1;
                continue;
            }
            assert!(
                request.kind == Kind::Read,
                "a former owner has acknowledged a write"
            );
            let now = self.now();
            self.judge(&mut ghost.client, tag, request, now);
        }
        let mut asked = 0;
        for slot in 0..DEPTH {
            if ghost.slots[slot].is_some() {
                continue;
            }
            let (tag, block, begun) = (DEPTH + slot, self.random() % BLOCKS, self.now());
            let (at, memory) = (self.at(block), tag * BLOCK);
            // What it writes must never be seen: the checker is not told of it.
            let kind = if slot % 2 == 0 {
                Kind::Read
            } else {
                Kind::Write(u64::MAX)
            };
            if kind == Kind::Read {
                ghost.client.read(at, memory, BLOCK, tag);
            } else {
                ghost.client.memory(memory, BLOCK).fill(0xff);
                ghost.client.write(at, memory, BLOCK, tag);
            }
            ghost.slots[slot] = Some(Request { kind, block, begun });
            asked += 1;
        }
        asked
    }

    fn at(&self, block: u64) -> u64 {
        block * (self.size / BLOCKS) / BLOCK as u64 * BLOCK as u64
    }

    fn begin(&mut self, client: &mut Client, slot: usize, last: Option<&mut Vec<u64>>) -> Option<Request> {
        let memory = slot * BLOCK;
        let (kind, block) = match last {
            Some(last) => (Kind::Read, last.pop()?),
            None => {
                let block = self.random() % BLOCKS;
                match self.random() % 20 {
                    0 => (Kind::Flush, block),
                    1..10 => (Kind::Read, block),
                    _ => {
                        self.next += 1;
                        (Kind::Write(self.next), block)
                    }
                }
            }
        };
        let begun = self.now();
        match kind {
            Kind::Write(id) => {
                for words in client.memory(memory, BLOCK).chunks_exact_mut(16) {
                    words[..8].copy_from_slice(&id.to_le_bytes());
                    words[8..].copy_from_slice(&block.to_le_bytes());
                }
                self.checker.begin(block, id, begun);
                client.write(self.at(block), memory, BLOCK, slot);
            }
            Kind::Read => client.read(self.at(block), memory, BLOCK, slot),
            Kind::Flush => client.flush(slot),
        }
        Some(Request { kind, block, begun })
    }

    fn end(&mut self, client: &mut Client, slot: usize, request: Request, result: i32, horizon: Option<u64>) {
        let now = self.now();
        let Request { kind, block, begun } = request;
        if result < 0 {
            self.done.errors += 1;
            if let Kind::Write(id) = kind {
                self.checker.failed(block, id, begun, now);
            }
            return;
        }
        match kind {
            Kind::Write(id) => {
                self.done.writes += 1;
                self.checker.acked(block, id, begun, now, horizon.unwrap_or(now));
            }
            Kind::Read => {
                self.done.reads += 1;
                self.judge(client, slot, request, now);
            }
            Kind::Flush => self.checker.flushed(begun),
        }
    }

    /// What was read is what it may be.
    fn judge(&mut self, client: &mut Client, slot: usize, request: Request, now: u64) {
        let Request { block, begun, .. } = request;
        let bytes = client.memory(slot * BLOCK, BLOCK);
        let first: [u8; 16] = bytes[..16].try_into().unwrap();
        assert!(
            bytes.chunks_exact(16).all(|words| words == first),
            "block {block} is of two writes"
        );
        let id = u64::from_le_bytes(first[..8].try_into().unwrap());
        let of = u64::from_le_bytes(first[8..].try_into().unwrap());
        assert!(
            id == 0 || of == block,
            "block {block} has the bytes of block {of}"
        );
        self.checker
            .read(block, id, begun, now)
            .unwrap_or_else(|wrong| panic!("{wrong}"));
    }
}
