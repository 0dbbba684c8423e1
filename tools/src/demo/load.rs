//! A load in the background that remembers what was acknowledged: random stamped writes, and reads that are checked at once.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::bench::client::Client;
use crate::bench::stamp;

/// The part of the volume that is loaded, bytes: enough to see, little enough to verify in a moment.
const SPAN: u64 = 96 << 20;
const SEED: u64 = 0x5eed;
const DEPTH: usize = 16;

/// See the module.
pub(super) struct Load {
    stop: Arc<AtomicBool>,
    requests: Arc<AtomicU64>,
    thread: JoinHandle<Result<Written>>,
}

/// For each block of the span the sequence number of its last acknowledged write.
pub(super) struct Written {
    blocks: Vec<u64>,
    longest: Duration,
}

impl Written {
    /// The time that the slowest request took.
    pub(super) fn longest_ms(&self) -> f64 {
        self.longest.as_secs_f64() * 1000.0
    }

    /// Reads everything that was written back and compares. How many blocks that were.
    pub(super) fn verify(&self, socket: &Path) -> Result<usize> {
        let mut client = Client::connect(socket, DEPTH, DEPTH * stamp::BLOCK)?;
        let written = self
            .blocks
            .iter()
            .enumerate()
            .filter(|(_, sequence)| **sequence > 0);
        let written: Vec<_> = written.collect();
        for some in written.chunks(DEPTH) {
            for (tag, (block, _)) in some.iter().enumerate() {
                client.read(
                    (block * stamp::BLOCK) as u64,
                    tag * stamp::BLOCK,
                    stamp::BLOCK,
                    tag,
                );
            }
            client.finish(some.len())?;
            for (tag, &(block, &sequence)) in some.iter().enumerate() {
                let at = (block * stamp::BLOCK) as u64;
                let found = stamp::check(client.memory(tag * stamp::BLOCK, stamp::BLOCK), at, SEED);
                ensure!(
                    found == Some(sequence),
                    "the block at byte {at} is not what was written last: {found:?}, not {sequence}"
                );
            }
        }
        Ok(written.len())
    }
}

impl Load {
    pub(super) fn start(socket: &Path) -> Result<Self> {
        let mut client = Client::connect(socket, DEPTH, DEPTH * stamp::BLOCK)?;
        let (stop, requests) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ask, count) = (Arc::clone(&stop), Arc::clone(&requests));
        let thread = std::thread::spawn(move || {
            let mut written = Written {
                blocks: vec![0; (SPAN / stamp::BLOCK as u64) as usize],
                longest: Duration::ZERO,
            };
            let mut busy = vec![false; written.blocks.len()];
            let mut flights = vec![(0usize, 0u64, Instant::now()); DEPTH];
            let mut idle: Vec<usize> = (0..DEPTH).collect();
            let (mut random, mut sequence) = (SEED, 0u64);
            let mut done = Vec::new();
            loop {
                let stopping = ask.load(Ordering::Relaxed);
                if stopping && idle.len() == DEPTH {
                    return Ok(written);
                }
                while let (false, Some(&tag)) = (stopping, idle.last()) {
                    random = random
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    let block = (random >> 33) as usize % busy.len();
                    if busy[block] {
                        continue;
                    }
                    idle.pop();
                    busy[block] = true;
                    let at = (block * stamp::BLOCK) as u64;
                    let write = random >> 63 == 0 || written.blocks[block] == 0;
                    if write {
                        sequence += 1;
                        stamp::fill(
                            client.memory(tag * stamp::BLOCK, stamp::BLOCK),
                            at,
                            sequence,
                            SEED,
                        );
                        client.write(at, tag * stamp::BLOCK, stamp::BLOCK, tag);
                    } else {
                        client.read(at, tag * stamp::BLOCK, stamp::BLOCK, tag);
                    }
                    flights[tag] = (block, if write { sequence } else { 0 }, Instant::now());
                }
                done.clear();
                client.poll(|tag, result| done.push((tag, result)))?;
                for &(tag, result) in &done {
                    let (block, sequence, began) = flights[tag];
                    ensure!(result == 0, "the volume answered with an I/O error");
                    if sequence > 0 {
                        written.blocks[block] = sequence;
                    } else {
                        let at = (block * stamp::BLOCK) as u64;
                        let found = stamp::check(client.memory(tag * stamp::BLOCK, stamp::BLOCK), at, SEED);
                        ensure!(found == Some(written.blocks[block]), "wrong data at byte {at}");
                    }
                    written.longest = written.longest.max(began.elapsed());
                    busy[block] = false;
                    idle.push(tag);
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Load {
            stop,
            requests,
            thread,
        })
    }

    /// Requests that were answered.
    pub(super) fn so_far(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Ends it; what it wrote, or the first thing that was wrong.
    pub(super) fn finish(self) -> Result<Written> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the load died"))?
    }
}
