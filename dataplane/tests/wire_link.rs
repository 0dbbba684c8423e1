//! Both ends of a link against each other in memory: requests, answers, connections cut at any byte, disks that take their
//! time or go away. What is read is what was written, nothing is answered twice, and no memory is touched out of turn.

use std::collections::{BTreeMap, VecDeque};

use proptest::prelude::*;
use unibody_dataplane::checksum::crc32c;
use unibody_dataplane::ids::{
    BLOCK, BootId, ChunkKey, DiskUuid, Generation, LayerId, PowerId, Version, VolumeId,
};
use unibody_dataplane::memory::{Arena, Payload};
use unibody_dataplane::replica::{ChunkRef, Crcs, Header, Reply, Request, Span, Status};
use unibody_dataplane::wire::asker::{Asker, Effect};
use unibody_dataplane::wire::handshake::SessionKey;
use unibody_dataplane::wire::server::{CREDITS, Job, Offer, Server};
use unibody_dataplane::wire::stream::Batch;

const DISKS: u16 = 3;
const BLOCKS: usize = 6;
const MEMORIES: usize = 400;

const HEADER: Header = Header {
    volume: VolumeId(1),
    generation: Generation(1),
    stable: Version(0),
};

fn chunk() -> ChunkRef {
    ChunkRef {
        key: ChunkKey {
            volume: VolumeId(1),
            layer: LayerId(1),
            chunk: 0,
        },
        incarnation: 1,
    }
}

fn span(first: u8, count: u8) -> Span {
    Span {
        chunk: chunk(),
        extent: 0,
        first,
        count,
    }
}

/// The bytes of a batch, without the sending.
fn bytes(batch: &Batch) -> Vec<u8> {
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
struct Want {
    disk: u16,
    first: u8,
    count: u8,
    /// Zero: a read.
    stamp: u8,
    memory: usize,
}

struct World {
    asker: Asker,
    server: Server,
    memory: Arena,
    free: Vec<usize>,
    /// By tag.
    wants: BTreeMap<u64, Want>,
    next_tag: u64,
    /// What the disks hold: a stamp per block.
    disks: [[u8; BLOCKS]; DISKS as usize],
    /// What must be read.
    truth: [[u8; BLOCKS]; DISKS as usize],
    /// With the connection each came by.
    jobs: VecDeque<(u8, Job)>,
    ready: Vec<Job>,
    effects: Vec<Effect>,
    connections: u8,
    open: bool,
    to_server: VecDeque<u8>,
    to_asker: VecDeque<u8>,
    answers: u64,
    carried_out: u64,
}

impl World {
    fn new() -> Self {
        let mut server = Server::new().unwrap();
        for disk in 0..DISKS {
            server.offer(disk, Some(offer(disk, 1)));
        }
        World {
            asker: Asker::new().unwrap(),
            server,
            memory: Arena::new(MEMORIES * 16).unwrap(),
            free: (0..MEMORIES).collect(),
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

    fn connect(&mut self) {
        self.connections += 1;
        let key = SessionKey([self.connections; 32]);
        self.asker.begin(&key);
        self.server.begin(&key);
        self.open = true;
    }

    fn cut(&mut self) {
        self.to_server.clear();
        self.to_asker.clear();
        self.asker.end(&mut self.effects);
        self.server.end();
        self.open = false;
        self.take();
    }

    /// The owner's rule: one write at a time on a block, no read beside it.
    fn is_free(&self, disk: u16, first: u8, count: u8) -> bool {
        self.wants
            .values()
            .all(|want| want.disk != disk || want.first + want.count <= first || first + count <= want.first)
    }

    fn want(&mut self, disk: u16, first: u8, count: u8, stamp: u8) {
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
        if self.asker.ask(tag, u32::from(disk), disk, HEADER, request) {
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
        }
    }

    fn carry(&mut self, mut bytes_to_move: usize) {
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

    fn take(&mut self) {
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
        for memory in self.free.iter().filter(|_| self.answers > 0) {
            let room = self.memory.bytes(memory * 16, 16);
            let untouched = (0..16).all(|n| matches!(room[n * BLOCK], 0 | 0xaa));
            assert!(untouched, "memory given back is not written to");
        }
    }

    /// No answer will come for what this disk was asked.
    fn forget(&mut self, disk: u16) {
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

    fn check(&mut self, want: Want, reply: Reply) {
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
    fn work(&mut self, which: usize) {
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
    fn flood(&mut self) {
        for n in 0..500 {
            let data = self.memory.payload(0);
            let request = Request::Read {
                span: span(0, 1),
                raw: false,
                data,
            };
            assert!(self.asker.ask(1 << 50 | n, 0, (n % 2) as u16, HEADER, request));
        }
        for _ in 0..20 {
            self.carry(1 << 20);
        }
    }

    fn settle(&mut self) {
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

fn offer(disk: u16, boot: u128) -> Offer {
    Offer {
        uuid: DiskUuid(u128::from(disk) + 1),
        boot: BootId(boot),
        power: PowerId(1),
    }
}

fn put(from: &mut VecDeque<u8>, to: *mut u8, room: usize) -> usize {
    let now = room.min(from.len());
    for (n, byte) in from.drain(..now).enumerate() {
        // SAFETY: the end of the link gave out room for so many bytes.
        unsafe { to.add(n).write(byte) };
    }
    now
}

fn peek(data: Payload) -> u8 {
    // SAFETY: a request's memory, kept until it is answered.
    let block = unsafe { std::slice::from_raw_parts(data.contiguous(BLOCK).unwrap().as_ptr(), BLOCK) };
    assert!(block.iter().all(|&b| b == block[0]));
    block[0]
}

fn poke(data: Payload, stamp: u8) {
    // SAFETY: as above, and nobody else uses it now.
    unsafe { data.contiguous(BLOCK).unwrap().as_ptr().write_bytes(stamp, BLOCK) };
}

#[derive(Clone, Debug)]
enum Move {
    Want(u16, u8, u8, u8),
    Carry(usize),
    Work(usize),
    Cut,
    Connect,
    Abandon(u16),
    Reopen(u16),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        12 => (0..DISKS, 0..BLOCKS as u8, 1..4u8, prop_oneof![Just(0), 1..250u8]).prop_map(|(disk, first, count, stamp)| {
            Move::Want(disk, first, count.min(BLOCKS as u8 - first), stamp)
        }),
        8 => (1usize..40_000).prop_map(Move::Carry),
        8 => any::<usize>().prop_map(Move::Work),
        1 => Just(Move::Cut),
        3 => Just(Move::Connect),
        1 => (0..DISKS).prop_map(Move::Abandon),
        1 => (0..DISKS).prop_map(Move::Reopen),
    ];
    prop::collection::vec(one, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn what_is_read_is_what_was_written_over_any_number_of_connections(moves in moves()) {
        let mut world = World::new();
        world.connect();
        world.carry(1 << 20);
        let mut boots = [1; DISKS as usize];
        for step in moves {
            match step {
                Move::Want(disk, first, count, stamp) => world.want(disk, first, count, stamp),
                Move::Carry(bytes) => world.carry(bytes),
                Move::Work(which) => world.work(which),
                Move::Cut if world.open => world.cut(),
                Move::Connect if !world.open => world.connect(),
                Move::Abandon(disk) => {
                    if world.asker.abandon(u32::from(disk), disk, &mut world.effects) && world.open {
                        world.cut();
                    }
                    world.take();
                }
                Move::Reopen(disk) => {
                    // What a disk had in hand is over before it goes.
                    while world.jobs.iter().any(|(_, job)| job.disk == disk) {
                        let at = world.jobs.iter().position(|(_, job)| job.disk == disk).unwrap();
                        world.work(at);
                    }
                    boots[usize::from(disk)] += 1;
                    world.server.offer(disk, None);
                    world.server.offer(disk, Some(offer(disk, boots[usize::from(disk)])));
                }
                Move::Cut | Move::Connect => {}
            }
        }
        world.settle();
        // Everything is still what it should be.
        for disk in 0..DISKS {
            world.want(disk, 0, BLOCKS as u8, 0);
        }
        world.settle();
        prop_assert!(world.server.quiet());
        // No credit was lost and none was made.
        world.flood();
        prop_assert_eq!(world.jobs.len(), CREDITS);
        prop_assert_eq!(world.server.counts().mismatches + world.asker.counts().mismatches, 0);
        prop_assert_eq!(world.server.counts().bad_frames + world.asker.counts().bad_frames, 0);
    }
}

/// Five hundred requests with not one carried out: no more go out than there are credits, and for one disk half of them.
#[test]
fn no_more_requests_go_out_than_there_are_credits() {
    let mut world = World::new();
    world.connect();
    world.carry(1 << 20);
    world.flood();
    assert_eq!(world.jobs.len(), CREDITS);
    for disk in 0..2 {
        assert_eq!(
            world.jobs.iter().filter(|(_, job)| job.disk == disk).count(),
            CREDITS / 2
        );
    }
    // The third disk is not held up for ever: one answer, one credit.
    let (_, job) = world.jobs.pop_front().unwrap();
    let mut out = Vec::new();
    world
        .server
        .answered(job.slot, Reply::Refused(Status::Invalid), &mut out);
    assert!(out.is_empty());
}

/// A disk that does not answer any more, over two connections: the requests of the second wait for those of the first, the
/// other disks go on.
#[test]
fn a_new_session_waits_for_the_old_one_disk_by_disk() {
    let mut world = World::new();
    world.connect();
    world.carry(1 << 20);
    world.want(0, 0, 1, 7);
    world.want(1, 0, 1, 8);
    world.carry(1 << 20);
    assert_eq!(world.jobs.len(), 2);
    // The first disk has stopped.
    let stuck = world.jobs.pop_front().unwrap();
    world.cut();
    world.connect();
    world.carry(1 << 20);
    world.carry(1 << 20);
    // The old job of the second disk holds up the new one only as long as it is there.
    assert_eq!(world.jobs.len(), 1);
    world.work(0);
    assert_eq!((world.jobs.len(), world.carried_out), (1, 1));
    world.work(0);
    world.carry(1 << 20);
    assert_eq!((world.answers, world.wants.len()), (1, 1));
    assert_eq!(world.asker.counts().resent, 2);
    world.jobs.push_back(stuck);
    world.settle();
    assert_eq!((world.answers, world.carried_out), (2, 4));
}

/// What is damaged on the way is not carried out, and not believed.
#[test]
fn damaged_data_ends_the_connection_or_is_a_bad_block() {
    let mut world = World::new();
    world.connect();
    world.carry(1 << 20);
    world.want(0, 0, 1, 7);
    let all = bytes(world.asker.gather(&mut world.effects).unwrap());
    world.asker.sent(all.len(), &mut world.effects);
    let mut damaged: VecDeque<u8> = all.into();
    *damaged.back_mut().unwrap() ^= 1;
    let (ptr, room) = world.server.room();
    let now = put(&mut damaged, ptr, room);
    assert!(world.server.received(now, &mut world.ready).is_err());
    assert!(world.ready.is_empty());
    assert_eq!(world.server.counts().mismatches, 1);
    world.cut();
    world.settle();
    assert_eq!(world.disks[0][0], 7);

    // On the way back it costs the block.
    let data = world.memory.payload(0);
    let request = Request::Read {
        span: span(0, 1),
        raw: false,
        data,
    };
    world.asker.ask(1 << 40, 0, 0, HEADER, request);
    world.carry(1 << 20);
    let (_, job) = world.jobs.pop_front().unwrap();
    let Request::Read { data, .. } = job.request else {
        unreachable!()
    };
    poke(data, 7);
    let mut crcs = Crcs::default();
    crcs[0] = crc32c(&[7; BLOCK]);
    let reply = Reply::Read {
        holes: 0,
        bad: 0,
        lost: 0,
        crcs,
    };
    world.server.answered(job.slot, reply, &mut world.ready);
    let all = bytes(world.server.gather().unwrap());
    let mut damaged: VecDeque<u8> = all.into();
    *damaged.back_mut().unwrap() ^= 1;
    let (ptr, room) = world.asker.room();
    let now = put(&mut damaged, ptr, room);
    world.asker.received(now, &mut world.effects).unwrap();
    let [
        Effect::Answer {
            reply: Reply::Read { bad, .. },
            ..
        },
    ] = &world.effects[..]
    else {
        panic!("{:?}", world.effects)
    };
    assert_eq!(*bad, 1);
    assert_eq!(world.asker.counts().mismatches, 1);
}

/// A disk that is given up while its request is being sent: the memory is still being read, so the end of the connection is
/// waited for.
#[test]
fn what_is_being_sent_is_not_let_go() {
    let mut world = World::new();
    world.connect();
    world.carry(1 << 20);
    world.want(1, 0, 4, 9);
    let all = bytes(world.asker.gather(&mut world.effects).unwrap());
    assert!(!world.asker.sent(1_000, &mut world.effects));
    assert!(
        world.asker.abandon(1, 1, &mut world.effects),
        "the connection has to be ended"
    );
    assert_eq!(world.effects, []);
    // As it would be if the rest went out after all.
    assert!(world.asker.sent(all.len() - 1_000, &mut world.effects));
    assert_eq!(world.effects, [Effect::Abandoned { group: 1, disk: 1 }]);
    world.effects.clear();
    // The same where the connection ends instead.
    world.want(2, 0, 4, 9);
    world.asker.gather(&mut world.effects).unwrap();
    assert!(world.asker.abandon(2, 2, &mut world.effects));
    assert_eq!(world.effects, []);
    world.asker.end(&mut world.effects);
    assert_eq!(world.effects, [Effect::Abandoned { group: 2, disk: 2 }]);
}

/// Sealing a disk with a hundred thousand chunks of a volume: an answer far longer than any buffer, in pieces.
#[test]
fn a_long_sealing_arrives_whole() {
    use unibody_dataplane::replica::Sealed;
    let mut world = World::new();
    world.connect();
    world.carry(1 << 20);
    assert!(world.asker.ask(7, 0, 0, HEADER, Request::Seal));
    world.carry(1 << 20);
    let (_, job) = world.jobs.pop_front().unwrap();
    assert_eq!(job.request, Request::Seal);
    let mut sealed = Sealed {
        disk: DiskUuid(1),
        boot: BootId(1),
        power: PowerId(1),
        suspect: true,
        chunks: Vec::new(),
    };
    for n in 0..100_000 {
        let mut chunk = chunk();
        chunk.key.chunk = n;
        sealed.chunks.push((chunk, u64::from(n) << 20 | 1));
    }
    let reply = Reply::Sealed(Box::new(sealed));
    world.server.answered(job.slot, reply.clone(), &mut world.ready);
    let mut all: VecDeque<u8> = bytes(world.server.gather().unwrap()).into();
    assert!(world.server.sent(all.len()));
    assert!(all.len() > 2_000_000);
    while !all.is_empty() {
        let (ptr, room) = world.asker.room();
        let now = put(&mut all, ptr, room.min(77_777));
        world.asker.received(now, &mut world.effects).unwrap();
    }
    assert_eq!(world.effects, [Effect::Answer { tag: 7, reply }]);
    // More than a frame may hold is refused instead.
    assert!(world.asker.ask(8, 0, 0, HEADER, Request::Seal));
    world.effects.clear();
    let all = bytes(world.asker.gather(&mut world.effects).unwrap());
    world.asker.sent(all.len(), &mut world.effects);
    let (ptr, room) = world.server.room();
    let now = put(&mut all.into(), ptr, room);
    world.server.received(now, &mut world.ready).unwrap();
    let job = world.ready.pop().unwrap();
    let chunks = vec![(chunk(), 0); unibody_dataplane::wire::frame::SEALED_MAX + 1];
    let sealed = Sealed {
        disk: DiskUuid(1),
        boot: BootId(1),
        power: PowerId(1),
        suspect: false,
        chunks,
    };
    world
        .server
        .answered(job.slot, Reply::Sealed(Box::new(sealed)), &mut world.ready);
    let mut all: VecDeque<u8> = bytes(world.server.gather().unwrap()).into();
    let (ptr, room) = world.asker.room();
    let now = put(&mut all, ptr, room);
    world.asker.received(now, &mut world.effects).unwrap();
    let reply = Reply::Refused(Status::Invalid);
    assert_eq!(world.effects, [Effect::Answer { tag: 8, reply }]);
}

/// A disk is opened anew while a request for it is on its way: the new one does not know what the old one had promised, and
/// gets none of it.
#[test]
fn a_disk_opened_anew_gets_nothing_that_was_meant_for_the_old_one() {
    let mut world = World::new();
    world.connect();
    world.carry(1 << 20);
    world.want(0, 0, 1, 7);
    let mut all: VecDeque<u8> = bytes(world.asker.gather(&mut world.effects).unwrap()).into();
    world.asker.sent(all.len(), &mut world.effects);
    world.server.offer(0, None);
    world.server.offer(0, Some(offer(0, 2)));
    let (ptr, room) = world.server.room();
    let now = put(&mut all, ptr, room);
    world.server.received(now, &mut world.ready).unwrap();
    assert!(world.ready.is_empty());
    assert_eq!(world.server.counts().refused, 1);
    let all = bytes(world.server.gather().unwrap());
    let mut all: VecDeque<u8> = all.into();
    let (ptr, room) = world.asker.room();
    let now = put(&mut all, ptr, room);
    world.asker.received(now, &mut world.effects).unwrap();
    // The news comes first: the old one is down, with its request; what is answered after that is late.
    let [Effect::Down(uuid), Effect::Up(notice), ..] = &world.effects[..] else {
        panic!("{:?}", world.effects)
    };
    assert_eq!((*uuid, notice.boot), (DiskUuid(1), BootId(2)));
    let answers = world
        .effects
        .iter()
        .filter(|effect| matches!(effect, Effect::Answer { .. }))
        .count();
    assert_eq!((answers, world.asker.counts().late), (0, 1));
}
