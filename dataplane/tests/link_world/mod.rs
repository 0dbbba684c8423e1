//! Both ends of a link in one place, with an owner that knows what it must read and disks that hold a stamp for each block.

use std::collections::{BTreeMap, VecDeque};

use unibody_dataplane::checksum::crc32c;
use unibody_dataplane::ids::{
    BLOCK, BootId, ChunkKey, DiskUuid, Generation, LayerId, PowerId, Version, VolumeId,
};
use unibody_dataplane::memory::{Arena, Payload};
use unibody_dataplane::replica::{ChunkRef, Crcs, Header, Reply, Request, Span, Status};
use unibody_dataplane::wire::asker::{Asker, Effect};
use unibody_dataplane::wire::handshake::SessionKey;
use unibody_dataplane::wire::server::{Job, Offer, Server};
use unibody_dataplane::wire::stream::Batch;

pub(crate) const DISKS: u16 = 3;
pub(crate) const BLOCKS: usize = 6;
pub(crate) const MEMORIES: usize = 400;

pub(crate) const HEADER: Header = Header {
    volume: VolumeId(1),
    generation: Generation(1),
    stable: Version(0),
};

pub(crate) fn chunk() -> ChunkRef {
    ChunkRef {
        key: ChunkKey {
            volume: VolumeId(1),
            layer: LayerId(1),
            chunk: 0,
        },
        incarnation: 1,
    }
}

pub(crate) fn span(first: u8, count: u8) -> Span {
    Span {
        chunk: chunk(),
        extent: 0,
        first,
        count,
    }
}

/// The bytes of a batch, without the sending.
pub(crate) fn bytes(batch: &Batch) -> Vec<u8> {
    let mut all = Vec::new();
    for piece in batch.pieces() {
        // SAFETY: the batch names memory that its owner keeps until it was sent.
        all.extend_from_slice(unsafe {
            std::slice::from_raw_parts(piece.iov_base.cast::<u8>(), piece.iov_len)
        });
    }
    all
}

/// One thing a guest wants: a run of blocks of one disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Want {
    pub(crate) disk: u16,
    pub(crate) first: u8,
    pub(crate) count: u8,
    /// Zero: a read.
    pub(crate) stamp: u8,
    pub(crate) memory: usize,
}

pub(crate) struct World {
    pub(crate) asker: Asker,
    pub(crate) server: Server,
    pub(crate) memory: Arena,
    pub(crate) free: Vec<usize>,
    /// The stay of each disk of which the owner has heard.
    pub(crate) stays: [u32; DISKS as usize],
    /// By tag.
    pub(crate) wants: BTreeMap<u64, Want>,
    pub(crate) next_tag: u64,
    /// What the disks hold: a stamp per block.
    pub(crate) disks: [[u8; BLOCKS]; DISKS as usize],
    /// What must be read.
    pub(crate) truth: [[u8; BLOCKS]; DISKS as usize],
    /// With the connection each came by.
    pub(crate) jobs: VecDeque<(u8, Job)>,
    pub(crate) ready: Vec<Job>,
    pub(crate) effects: Vec<Effect>,
    pub(crate) connections: u8,
    pub(crate) open: bool,
    pub(crate) to_server: VecDeque<u8>,
    pub(crate) to_asker: VecDeque<u8>,
    pub(crate) answers: u64,
    pub(crate) carried_out: u64,
}

impl World {
    pub(crate) fn new() -> Self {
        let mut server = Server::new().unwrap();
        for disk in 0..DISKS {
            server.offer(disk, Some(offer(disk, 1)));
        }
        World {
            asker: Asker::new().unwrap(),
            server,
            memory: Arena::new(MEMORIES * 16).unwrap(),
            free: (0..MEMORIES).collect(),
            stays: [0; DISKS as usize],
            wants: BTreeMap::new(),
            next_tag: 0,
            disks: Default::default(),
            truth: Default::default(),
            jobs: VecDeque::new(),
            ready: Vec::new(),
            effects: Vec::new(),
            connections: 0,
            open: false,
            to_server: VecDeque::new(),
            to_asker: VecDeque::new(),
            answers: 0,
            carried_out: 0,
        }
    }

    pub(crate) fn connect(&mut self) {
        self.connections += 1;
        let key = SessionKey([self.connections; 32]);
        self.asker.begin(&key);
        self.server.begin(&key);
        self.open = true;
    }

    pub(crate) fn cut(&mut self) {
        self.to_server.clear();
        self.to_asker.clear();
        self.asker.end(&mut self.effects);
        self.server.end();
        self.open = false;
        self.take();
    }

    /// The owner's rule: one write at a time on a block, no read beside it.
    pub(crate) fn is_free(&self, disk: u16, first: u8, count: u8) -> bool {
        self.wants
            .values()
            .all(|want| want.disk != disk || want.first + want.count <= first || first + count <= want.first)
    }

    pub(crate) fn want(&mut self, disk: u16, first: u8, count: u8, stamp: u8) {
        let (Some(&memory), true) = (self.free.first(), self.is_free(disk, first, count)) else {
            return;
        };
        let tag = self.next_tag;
        let span = span(first, count);
        let room = self.memory.bytes_mut(memory * 16, 16);
        room.fill(if stamp == 0 { 0xee } else { stamp });
        let data = self.memory.payload(memory * 16);
        let request = if stamp == 0 {
            Request::Read {
                span,
                raw: false,
                data,
            }
        } else {
            let mut crcs = Crcs::default();
            for b in first..first + count {
                crcs[usize::from(b)] = crc32c(&[stamp; BLOCK]);
            }
            Request::Write {
                span,
                version: Version(1),
                crcs,
                data,
            }
        };
        let stay = self.stays[usize::from(disk)];
        if self
            .asker
            .ask(tag, u32::from(disk), (disk, stay), HEADER, request)
        {
            self.next_tag += 1;
            self.free.remove(0);
            let want = Want {
                disk,
                first,
                count,
                stamp,
                memory,
            };
            self.wants.insert(tag, want);
        } else {
            self.memory.bytes_mut(memory * 16, 16).fill(0xaa);
        }
    }

    pub(crate) fn carry(&mut self, mut bytes_to_move: usize) {
        if !self.open {
            return;
        }
        if let Some(batch) = self.asker.gather(&mut self.effects) {
            let all = bytes(batch);
            // Some go, then the others.
            let some = bytes_to_move.min(all.len() - 1);
            assert!(!self.asker.sent(some, &mut self.effects));
            self.to_server.extend(&all);
            assert!(self.asker.sent(all.len() - some, &mut self.effects));
        }
        if let Some(batch) = self.server.gather() {
            let all = bytes(batch);
            self.to_asker.extend(&all);
            assert!(self.server.sent(all.len()));
        }
        while bytes_to_move > 0 && !(self.to_server.is_empty() && self.to_asker.is_empty()) {
            let (ptr, room) = self.server.room();
            let now = put(&mut self.to_server, ptr, room.min(bytes_to_move));
            self.server.received(now, &mut self.ready).unwrap();
            let (ptr, room) = self.asker.room();
            let then = put(&mut self.to_asker, ptr, room.min(bytes_to_move));
            self.asker.received(then, &mut self.effects).unwrap();
            bytes_to_move = bytes_to_move.saturating_sub(now + then);
            self.take();
        }
        self.take();
    }

    pub(crate) fn take(&mut self) {
        let connection = self.connections;
        self.jobs
            .extend(self.ready.drain(..).map(|job| (connection, job)));
        for effect in std::mem::take(&mut self.effects) {
            match effect {
                Effect::Answer { tag, reply } => {
                    self.answers += 1;
                    let want = self.wants.remove(&tag).expect("answered once");
                    self.check(want, reply);
                    self.memory.bytes_mut(want.memory * 16, 16).fill(0xaa);
                    self.free.push(want.memory);
                }
                Effect::Abandoned { group, disk } => {
                    assert_eq!(group, u32::from(disk));
                    self.forget(disk);
                }
                Effect::Down(uuid) => self.forget(uuid.0 as u16 - 1),
                Effect::Up(_) => {}
            }
        }
        for (notice, stay) in self.asker.disks() {
            self.stays[usize::from(notice.disk)] = stay;
        }
        for memory in self.free.iter().filter(|_| self.answers > 0) {
            let room = self.memory.bytes(memory * 16, 16);
            let untouched = (0..16).all(|n| matches!(room[n * BLOCK], 0 | 0xaa));
            assert!(untouched, "memory given back is not written to");
        }
    }

    /// No answer will come for what this disk was asked.
    pub(crate) fn forget(&mut self, disk: u16) {
        let gone: Vec<u64> = self
            .wants
            .iter()
            .filter(|(_, want)| want.disk == disk)
            .map(|(&tag, _)| tag)
            .collect();
        for tag in gone {
            let want = self.wants.remove(&tag).unwrap();
            // It may have been carried out or not: whatever is read first is the truth.
            if want.stamp != 0 {
                for b in want.first..want.first + want.count {
                    self.truth[usize::from(disk)][usize::from(b)] = 0xff;
                }
            }
            self.memory.bytes_mut(want.memory * 16, 16).fill(0xaa);
            self.free.push(want.memory);
        }
    }

    pub(crate) fn check(&mut self, want: Want, reply: Reply) {
        let blocks = usize::from(want.first)..usize::from(want.first + want.count);
        let truth = &mut self.truth[usize::from(want.disk)][blocks];
        if want.stamp != 0 {
            match reply {
                Reply::Done => truth.fill(want.stamp),
                Reply::Refused(Status::DiskFailed) => truth.fill(0xff),
                other => panic!("{other:?}"),
            }
            return;
        }
        let (holes, bad) = match reply {
            Reply::Read { holes, bad, .. } => (holes, bad),
            Reply::Refused(Status::DiskFailed) => return,
            other => panic!("{other:?}"),
        };
        assert_eq!(bad, 0);
        let room = self.memory.bytes(want.memory * 16, 16);
        for (n, truth) in truth.iter_mut().enumerate() {
            let block = &room[n * BLOCK..(n + 1) * BLOCK];
            let hole = holes >> (usize::from(want.first) + n) & 1 == 1;
            let found = if hole { 0 } else { block[0] };
            if hole {
                assert_eq!(block, [0xee; BLOCK], "a hole's memory is left alone");
            } else {
                assert_eq!(block, [found; BLOCK]);
            }
            if *truth == 0xff {
                *truth = found;
            }
            assert_eq!(*truth, found);
        }
        assert!(room[usize::from(want.count) * BLOCK..].iter().all(|&b| b == 0xee));
    }

    /// A disk does one of the things it was told.
    pub(crate) fn work(&mut self, which: usize) {
        if self.jobs.is_empty() {
            return;
        }
        // In order for each disk, as far as the disk can know it: what came by one connection.
        let (connection, Job { disk, .. }) = self.jobs[which % self.jobs.len()];
        let same = |&(other, job): &(u8, Job)| other == connection && job.disk == disk;
        let at = self.jobs.iter().position(same).unwrap();
        let (_, job) = self.jobs.remove(at).unwrap();
        self.carried_out += 1;
        let blocks = &mut self.disks[usize::from(disk)];
        let reply = match job.request {
            Request::Write { span, data, .. } => {
                for n in 0..usize::from(span.count) {
                    blocks[usize::from(span.first) + n] = peek(data.advance(n * BLOCK));
                }
                Reply::Done
            }
            Request::Read { span, data, .. } => {
                let (mut holes, mut crcs) = (0, Crcs::default());
                for n in 0..span.count {
                    let b = usize::from(span.first + n);
                    if blocks[b] == 0 {
                        holes |= 1 << b;
                    } else {
                        poke(data.advance(usize::from(n) * BLOCK), blocks[b]);
                        crcs[b] = crc32c(&[blocks[b]; BLOCK]);
                    }
                }
                Reply::Read {
                    holes,
                    bad: 0,
                    lost: 0,
                    crcs,
                }
            }
            other => panic!("{other:?}"),
        };
        self.server.answered(job.slot, reply, &mut self.ready);
        self.take();
    }

    /// More requests than there are credits, for two disks, with nothing carried out.
    pub(crate) fn flood(&mut self) {
        for n in 0..500 {
            let data = self.memory.payload(0);
            let request = Request::Read {
                span: span(0, 1),
                raw: false,
                data,
            };
            let disk = (n % 2) as u16;
            let far = (disk, self.stays[usize::from(disk)]);
            assert!(self.asker.ask(1 << 50 | n, 0, far, HEADER, request));
        }
        for _ in 0..20 {
            self.carry(1 << 20);
        }
    }

    pub(crate) fn settle(&mut self) {
        if !self.open {
            self.connect();
        }
        for _ in 0..10_000 {
            self.carry(1 << 20);
            self.work(0);
            if self.wants.is_empty() && self.jobs.is_empty() && self.asker.pending() == 0 {
                return;
            }
        }
        panic!("{} wants are never answered", self.wants.len());
    }
}

pub(crate) fn offer(disk: u16, boot: u128) -> Offer {
    Offer {
        uuid: DiskUuid(u128::from(disk) + 1),
        boot: BootId(boot),
        power: PowerId(1),
    }
}

pub(crate) fn put(from: &mut VecDeque<u8>, to: *mut u8, room: usize) -> usize {
    let now = room.min(from.len());
    for (n, byte) in from.drain(..now).enumerate() {
        // SAFETY: the end of the link gave out room for so many bytes.
        unsafe { to.add(n).write(byte) };
    }
    now
}

pub(crate) fn peek(data: Payload) -> u8 {
    // SAFETY: a request's memory, kept until it is answered.
    let block = unsafe { std::slice::from_raw_parts(data.contiguous(BLOCK).unwrap().as_ptr(), BLOCK) };
    assert!(block.iter().all(|&b| b == block[0]));
    block[0]
}

pub(crate) fn poke(data: Payload, stamp: u8) {
    // SAFETY: as above, and nobody else uses it now.
    unsafe { data.contiguous(BLOCK).unwrap().as_ptr().write_bytes(stamp, BLOCK) };
}
