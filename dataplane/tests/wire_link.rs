//! Both ends of a link against each other in memory: requests, answers, connections cut at any byte, disks that take their
//! time or go away. What is read is what was written, nothing is answered twice, and no memory is touched out of turn.

mod link_world;

use std::collections::VecDeque;

use link_world::{BLOCKS, DISKS, HEADER, World, bytes, chunk, offer, poke, put, span};
use proptest::prelude::*;
use unibody_dataplane::checksum::crc32c;
use unibody_dataplane::ids::{BLOCK, BootId, DiskUuid, PowerId};
use unibody_dataplane::replica::{Crcs, Reply, Request, Status};
use unibody_dataplane::wire::asker::Effect;
use unibody_dataplane::wire::server::CREDITS;

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
    world.asker.ask(1 << 40, 0, (0, 1), HEADER, request);
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
    assert!(world.asker.ask(7, 0, (0, 1), HEADER, Request::Seal));
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
    assert!(world.asker.ask(8, 0, (0, 1), HEADER, Request::Seal));
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

/// A disk goes and comes while a batch with one of its requests is being sent. Its end waits for the send; what its owner asks
/// meanwhile ends with it, and is not sent later from memory that is another's by then; and the disk that came stays.
#[test]
fn what_is_asked_of_a_disk_that_is_ending_ends_with_it() {
    let mut world = World::new();
    world.connect();
    world.carry(1 << 20);
    world.want(0, 0, 1, 7);
    let all = bytes(world.asker.gather(&mut world.effects).unwrap());
    assert!(!world.asker.sent(1_000, &mut world.effects));
    for news in [None, Some(offer(0, 2))] {
        world.server.offer(0, news);
        let batch = bytes(world.server.gather().unwrap());
        assert!(world.server.sent(batch.len()));
        let mut batch: VecDeque<u8> = batch.into();
        let (ptr, room) = world.asker.room();
        let now = put(&mut batch, ptr, room);
        world.asker.received(now, &mut world.effects).unwrap();
        assert_eq!(world.effects, [], "its memory is being read");
    }
    world.want(0, 1, 1, 8);
    assert!(world.asker.sent(all.len() - 1_000, &mut world.effects));
    let [Effect::Down(uuid), Effect::Up(notice)] = &world.effects[..] else {
        panic!("{:?}", world.effects)
    };
    assert_eq!((*uuid, notice.boot), (DiskUuid(1), BootId(2)));
    world.take();
    assert!(world.wants.is_empty());
    assert!(
        world.asker.gather(&mut world.effects).is_none(),
        "a request is sent whose owner was told that it is over"
    );
    // The first went out whole, and is answered late.
    world.to_server.extend(&all);
    world.settle();
    assert_eq!(world.asker.counts().late, 1);
    assert!(world.asker.disks().any(|(notice, _)| notice.uuid == DiskUuid(1)));
    for block in [0, 1] {
        world.want(0, block, 1, 0);
    }
    world.settle();
    assert_eq!(world.asker.counts().mismatches, 0);
}

/// A disk goes and comes, and its owner asks once more before it has heard of it: the request would outlive what ends now, in
/// memory that its owner takes back, and reach a boot that was told nothing.
#[test]
fn who_has_not_heard_that_a_disk_went_and_came_is_refused() {
    for another_process in [false, true] {
        let mut world = World::new();
        world.connect();
        world.carry(1 << 20);
        world.want(0, 0, 1, 7);
        world.settle();
        if another_process {
            world.cut();
            world.asker.lose(&mut world.effects);
            world.connect();
        }
        world.server.offer(0, None);
        world.server.offer(0, Some(offer(0, 2)));
        let mut batch: VecDeque<u8> = bytes(world.server.gather().unwrap()).into();
        let (ptr, room) = world.asker.room();
        let now = put(&mut batch, ptr, room);
        world.asker.received(now, &mut world.effects).unwrap();
        assert!(matches!(world.effects[0], Effect::Down(uuid) if uuid == DiskUuid(1)));
        let pending = world.asker.pending();
        world.want(0, 0, 1, 0);
        assert!(
            world.wants.is_empty(),
            "asked of a disk that its owner never sealed"
        );
        assert_eq!(world.asker.pending(), pending);
        // Now it has heard.
        let sent: usize = world.server.gather().map_or(0, |batch| bytes(batch).len());
        assert!(world.server.sent(sent));
        world.take();
        world.want(0, 0, 1, 0);
        assert_eq!(world.wants.len(), 1);
    }
}

/// The same where the request waited for one of an earlier connection.
#[test]
fn a_held_request_is_not_for_a_disk_that_was_opened_anew() {
    let mut world = World::new();
    world.connect();
    world.carry(1 << 20);
    world.want(0, 0, 1, 7);
    world.carry(1 << 20);
    assert_eq!(world.jobs.len(), 1);
    world.cut();
    world.connect();
    for _ in 0..3 {
        world.carry(1 << 20);
    }
    assert_eq!(world.jobs.len(), 1, "the same again waits for the first");
    world.server.offer(0, None);
    world.server.offer(0, Some(offer(0, 2)));
    world.work(0);
    assert!(world.jobs.is_empty());
    assert_eq!(world.server.counts().refused, 1);
}
