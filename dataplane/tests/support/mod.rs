//! A reactor in miniature for tests: one ring, one disk, submit and collect.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

use std::time::Duration;

use unibody_dataplane::disk::{Completion, Disk, Io, Token};
use unibody_dataplane::memory::Arena;
use unibody_dataplane::reactor::{Event, Kind, Ring};

pub struct Rig {
    pub ring: Ring,
    pub disk: Box<dyn Disk>,
    pub done: Vec<Completion>,
    events: Vec<Event>,
}

pub const OWNER: u32 = 7;

impl Rig {
    pub fn new(disk: Box<dyn Disk>) -> Self {
        Self::with_ring(disk, Ring::new(1024).expect("io_uring"))
    }

    pub fn with_ring(mut disk: Box<dyn Disk>, mut ring: Ring) -> Self {
        disk.attach(&mut ring, OWNER).expect("attach");
        let events = Vec::with_capacity(ring.events_max());
        Rig {
            ring,
            disk,
            done: Vec::with_capacity(4096),
            events,
        }
    }

    pub fn submit(&mut self, token: u64, io: Io) {
        // SAFETY: tests keep their arenas until everything completed.
        unsafe { self.disk.submit(&mut self.ring, Token(token), io, &mut self.done) }.expect("room");
    }

    /// One turn of a polled loop.
    pub fn turn(&mut self) {
        self.disk.poll(&mut self.ring, &mut self.done);
        self.ring.submit().expect("submit");
        self.collect();
    }

    fn collect(&mut self) {
        self.ring.reap(&mut self.events);
        for event in self.events.drain(..) {
            assert_eq!((event.tag.kind, event.tag.owner), (Kind::Disk, OWNER));
            self.disk
                .complete(&mut self.ring, event.tag.index, event.result, &mut self.done);
        }
    }

    /// Until nothing is in hand; sleeps where a reactor would.
    pub fn drain(&mut self) {
        for _ in 0..1_000_000 {
            if self.disk.in_hand() == 0 {
                return;
            }
            self.disk.poll(&mut self.ring, &mut self.done);
            if self.disk.must_poll() {
                self.ring.submit().expect("submit");
            } else if self.disk.in_hand() > 0 {
                self.ring.wait(Some(Duration::from_millis(100))).expect("wait");
            }
            self.collect();
        }
        panic!("{} I/Os never ended", self.disk.in_hand());
    }

    /// One I/O from beginning to end.
    pub fn run(&mut self, io: Io) -> Completion {
        assert!(self.done.is_empty());
        self.submit(1 << 40, io);
        self.drain();
        let completion = self.done.pop().expect("completed");
        assert!(self.done.is_empty() && completion.token == Token(1 << 40));
        completion
    }

    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        let arena = Arena::new(len / 4096).unwrap();
        let io = Io::Read {
            offset,
            len: len as u32,
            data: arena.payload(0),
            crcs: false,
        };
        assert_eq!(self.run(io).result, Ok(()));
        arena.bytes(0, len / 4096).to_vec()
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Completion {
        let mut arena = Arena::new(bytes.len() / 4096).unwrap();
        arena.bytes_mut(0, bytes.len() / 4096).copy_from_slice(bytes);
        self.run(Io::Write {
            offset,
            len: bytes.len() as u32,
            data: arena.payload(0),
        })
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.disk.detach(&mut self.ring);
        }
    }
}

/// A fixed, seeded source of numbers.
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            let number = self.next().to_le_bytes();
            piece.copy_from_slice(&number[..piece.len()]);
        }
    }
}

pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
        })
    })
}
