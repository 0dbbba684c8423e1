//! One reactor's work: what it owns and what it does in a turn.
//!
//! A turn: take messages, poll the guests' queues, carry requests from the owners to the replicas and answers back until
//! nothing moves, give the kernel what it is to do, publish what was completed. Run to completion: nothing in a turn
//! blocks, takes a lock, or (in steady state) allocates.
//!
//! * `ops`: a guest's request from descriptor to completion: buffers, copies, windows of large requests
//! * `route`: requests from owners to replicas, replies back, on this reactor and across
//! * `links`: the connections to and from other nodes
//! * `command`: what the control threads want done
//!
//! Invariant: memory that a request carries stays its owner's until the mirror has released it, however late.

mod command;
mod links;
mod ops;
mod queues;
mod route;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::buffers::BufferPool;
use crate::disk::{Completion, Disk, Io, Token};
use crate::ids::{Generation, Version, VolumeId};
use crate::memory::Payload;
use crate::mirror::{self, Mirror};
use crate::plane::{
    Command, DISKS_MAX, DiskIndex, DiskUp, Event, Lease, ReactorStats, VOLUMES_MAX, VolumeIndex,
};
use crate::reactor::crowd::Crowd;
use crate::reactor::mailbox::{Receiver, Sender, Waker};
use crate::reactor::{self, Idle, IdlePolicy, Prospect, Ring};
use crate::replica::{ChunkRef, Header, Reply, Request};
use crate::store::{self, Store};

use links::Links;
use ops::Ops;
use queues::Queues;

/// Requests a reactor's ring takes a turn.
const RING_ENTRIES: u32 = 1024;
/// Guests' requests in hand on one reactor. More wait in the guests' queues.
const OPS_MAX: usize = 4096;
/// Memory for data in flight, by size of buffer.
const SMALL_BUFFERS: u32 = 4096;
const LARGE_BUFFERS: u32 = 1024;
/// How often stores and mirrors are told the time.
const TICK: Duration = Duration::from_millis(50);
/// The same when the reactor is idle.
const TICK_IDLE: Duration = Duration::from_millis(500);
/// How often volumes look again for disks that they had to give up.
const CONNECT: Duration = Duration::from_millis(1000);

/// Of so many turns in a row that found nothing one looks at the clock.
const IDLE_BLIND: u32 = 8;

/// What comes through a reactor's mailbox.
pub(crate) enum Message {
    /// From a control thread.
    Command(Box<Command>),
    /// From an owner on another reactor to a replica here.
    Request {
        tag: u64,
        disk: DiskIndex,
        header: Header,
        request: Request,
    },
    /// The answer.
    Reply { tag: u64, reply: Reply },
}

/// Who asked.
#[derive(Clone, Copy)]
enum To {
    /// A volume; the mirror's own number for the request.
    Volume { volume: VolumeIndex, request: u32 },
    /// A peer; the slot of its request.
    Link { link: u16, slot: u16 },
}

/// Where an answer goes: to whom on which reactor.
#[derive(Clone, Copy)]
struct Address {
    shard: usize,
    to: To,
}

impl Address {
    /// Nobody asked.
    const NOBODY: store::Tag = store::Tag(u64::MAX);
    const LINK: u64 = 1 << 63;

    fn pack(self) -> u64 {
        let shard = (self.shard as u64) << 48;
        match self.to {
            To::Volume { volume, request } => shard | u64::from(volume.0) << 32 | u64::from(request),
            To::Link { link, slot } => Self::LINK | shard | u64::from(link) << 32 | u64::from(slot),
        }
    }

    fn unpack(tag: u64) -> Self {
        let shard = (tag >> 48) as usize & 0x7fff;
        let to = if tag & Self::LINK == 0 {
            To::Volume {
                volume: VolumeIndex((tag >> 32) as u16),
                request: tag as u32,
            }
        } else {
            To::Link {
                link: (tag >> 32) as u16,
                slot: tag as u16,
            }
        };
        Address { shard, to }
    }
}

/// The way to a replica's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route {
    /// A disk of this node.
    Near(DiskIndex),
    /// A disk of the node at the other end of a link, by that node's number for it, in one stay.
    Far { link: u16, disk: u16, stay: u32 },
}

/// A store with its device, on its own reactor.
struct Served {
    store: Box<Store>,
    disk: Box<dyn Disk>,
    /// I/Os the device had no room for yet. Bounded by what a store has outstanding.
    waiting: VecDeque<(Token, Io)>,
    /// Replicas that nobody will ask for again, and in whose name they are dropped.
    drops: VecDeque<(ChunkRef, Generation)>,
    /// Something was asked of the store since its batch was last closed.
    touched: bool,
    /// Why it has failed; it is let go when its last I/O has ended.
    ending: Option<String>,
    closed: bool,
    /// Who waits for it to be closed.
    closing: Option<mpsc::Sender<bool>>,
}

/// Replicas dropped a tick.
const DROPS: usize = 64;

impl Served {
    /// Drops some of the replicas that nobody will ask for again.
    fn drop_some(&mut self, out: &mut Vec<store::Effect>) {
        for _ in 0..DROPS {
            let Some((chunk, generation)) = self.drops.pop_front() else {
                return;
            };
            let header = Header {
                volume: chunk.key.volume,
                generation,
                stable: Version::ZERO,
            };
            self.store.submit(Address::NOBODY, header, Request::Seal, out);
            self.store
                .submit(Address::NOBODY, header, Request::DropChunk(chunk), out);
        }
    }
}

/// A disk as a replica's home.
enum Home {
    /// Not here, or gone.
    Absent,
    /// On this reactor, with a store.
    Store(Box<Served>),
    /// On this reactor, keeping nothing.
    Null,
}

/// A volume and its owner.
struct Volume {
    mirror: Mirror,
    id: VolumeId,
    /// The mirror's names for its operations.
    names: ops::Names,
    /// For each disk of the mirror's table, the way to it.
    routes: Vec<Option<Route>>,
    /// Every disk it can use ends I/O within the call, so that reads may go to guest memory directly.
    inline: bool,
    /// Every disk it can use keeps nothing, so that writes need not be copied.
    null: bool,
    /// Large buffers in use for it.
    large: u32,
    /// Somebody waits for it to be let go.
    removing: Option<mpsc::Sender<()>>,
}

/// What the mirror says of an operation's window.
#[derive(Clone, Copy)]
enum Finish {
    Done { ok: bool, released: bool },
    Released,
}

/// See the module.
pub(crate) struct Shard {
    number: usize,
    ring: Ring,
    waker: Arc<Waker>,
    inbox: Receiver<Message>,
    peers: Vec<Sender<Message>>,
    /// What a peer's mailbox had no room for. Bounded by the requests in flight.
    outboxes: Vec<VecDeque<Message>>,
    events: mpsc::Sender<Event>,
    lease: Arc<Lease>,
    /// What the mirrors were told of it.
    leased: bool,

    homes: Vec<Home>,
    /// The disks among `homes` that have a store.
    stores: Vec<DiskIndex>,
    /// All disks of the node that can be reached, wherever they are.
    disks: Vec<Option<DiskUp>>,
    volumes: Vec<Option<Box<Volume>>>,
    /// Indexes of the volumes that are there.
    present: Vec<VolumeIndex>,
    /// After the disks, which may have I/O in the memory of links.
    links: Links,
    queues: Queues,
    ops: Ops,
    buffers: BufferPool,
    /// The ring knows the small ones: direct I/O needs not pin their pages each time.
    buffers_registered: bool,

    // Work of this turn, kept to be reused.
    mirror_effects: Vec<mirror::Effect>,
    store_effects: Vec<store::Effect>,
    done: Vec<Completion>,
    completions: VecDeque<(DiskIndex, Completion)>,
    replies: VecDeque<(Address, Reply)>,
    touched: Vec<DiskIndex>,
    finished: VecDeque<(VolumeIndex, mirror::OpId, Finish)>,
    merges: Vec<(mirror::OpId, Option<Payload>, Option<Payload>)>,
    ring_events: Vec<reactor::Event>,

    crowd: Arc<Crowd>,
    started: Instant,
    /// The bell is not watched: whoever sleeps would not hear it.
    deaf: bool,
    now: u64,
    next_tick: u64,
    next_connect: u64,
    stopping: bool,
    /// Turns without work since the last with some.
    idle_turns: u32,
    stats: ReactorStats,
}

/// Where a reactor runs.
pub(crate) struct Seat {
    /// Its number among the reactors.
    pub(crate) number: usize,
    pub(crate) core: usize,
    pub(crate) crowd: Arc<Crowd>,
}

impl Shard {
    pub(crate) fn new(
        Seat { number, core, crowd }: Seat,
        waker: Arc<Waker>,
        inbox: Receiver<Message>,
        peers: Vec<Sender<Message>>,
        events: mpsc::Sender<Event>,
        lease: Arc<Lease>,
    ) -> io::Result<Self> {
        let mut ring = Ring::new(RING_ENTRIES)?;
        ring.watch(waker.fd(), queues::wake_tag())
            .map_err(io::Error::other)?;
        let ring_events = Vec::with_capacity(ring.events_max());
        Ok(Shard {
            number,
            ring,
            waker,
            inbox,
            outboxes: peers.iter().map(|_| VecDeque::new()).collect(),
            peers,
            events,
            lease,
            leased: true,
            homes: (0..DISKS_MAX).map(|_| Home::Absent).collect(),
            stores: Vec::new(),
            disks: vec![None; DISKS_MAX],
            volumes: (0..VOLUMES_MAX).map(|_| None).collect(),
            present: Vec::new(),
            links: Links::new(),
            queues: Queues::new(),
            ops: Ops::new(OPS_MAX),
            buffers: BufferPool::new(SMALL_BUFFERS, LARGE_BUFFERS, OPS_MAX as u16)?,
            buffers_registered: false,
            mirror_effects: Vec::with_capacity(1024),
            store_effects: Vec::with_capacity(1024),
            done: Vec::with_capacity(1024),
            completions: VecDeque::with_capacity(1024),
            replies: VecDeque::with_capacity(1024),
            touched: Vec::with_capacity(DISKS_MAX),
            finished: VecDeque::with_capacity(OPS_MAX),
            merges: Vec::new(),
            ring_events,
            crowd,
            started: Instant::now(),
            deaf: false,
            now: 0,
            next_tick: 0,
            next_connect: 0,
            stopping: false,
            idle_turns: 0,
            stats: ReactorStats {
                core,
                ..ReactorStats::default()
            },
        })
    }

    /// The loop, until it is told to stop.
    pub(crate) fn run(mut self) {
        let mut idle = IdlePolicy::default();
        while !self.stopping {
            let worked = self.turn();
            self.stats.turns += 1;
            self.stats.busy_turns += u64::from(worked);
            self.idle_turns = if worked {
                0
            } else {
                self.idle_turns.wrapping_add(1)
            };
            // Looking at the clock takes as long as looking for work: most idle turns do only the latter.
            let blind = !self.idle_turns.is_multiple_of(IDLE_BLIND);
            if !blind
                && idle.turn(worked, || self.prospect(), Instant::now) == Idle::Sleep
                && self.may_sleep()
            {
                self.sleep();
            }
        }
        self.close_links();
    }

    /// One turn; true if there was anything to do.
    fn turn(&mut self) -> bool {
        if self.deaf {
            self.deaf = self.ring.watch(self.waker.fd(), queues::wake_tag()).is_err();
        }
        let mut worked = self.take_messages();
        worked |= self.take_ring_events();
        worked |= self.poll_queues();
        worked |= self.poll_disks();
        worked |= self.links.has_news() || !self.replies.is_empty();
        if worked {
            self.carry();
        }
        // The clock is read once a turn at most, and on few of them: a tick may be late by some microseconds.
        let look = self.idle_turns.is_multiple_of(IDLE_BLIND);
        if !worked && look || self.stats.turns.is_multiple_of(64) {
            self.now = self.started.elapsed().as_millis() as u64;
            if self.now >= self.next_tick {
                self.tick();
            }
        }
        if worked || self.queues.any_dirty() {
            self.publish_queues();
        }
        self.send_outboxes();
        self.poll_links();
        self.submit();
        worked
    }

    fn submit(&mut self) {
        if let Err(error) = self.ring.submit() {
            // Without its ring a reactor can neither finish nor fail what it has in hand.
            panic!("io_uring has failed: {error}");
        }
    }

    fn take_messages(&mut self) -> bool {
        let mut worked = false;
        // Bounded, so that a flood of messages does not starve the queues.
        for _ in 0..256 {
            let Some(message) = self.inbox.receive() else {
                break;
            };
            worked = true;
            match message {
                Message::Command(command) => self.command(*command),
                Message::Request {
                    tag,
                    disk,
                    header,
                    request,
                } => self.serve(tag, disk, &header, &request),
                Message::Reply { tag, reply } => self.replies.push_back((Address::unpack(tag), reply)),
            }
        }
        worked
    }

    fn take_ring_events(&mut self) -> bool {
        let mut events = std::mem::take(&mut self.ring_events);
        self.ring.reap(&mut events);
        let worked = !events.is_empty();
        for event in events.drain(..) {
            match event.tag.kind {
                reactor::Kind::Disk => {
                    let index = DiskIndex(event.tag.owner as u16);
                    if let Home::Store(served) = &mut self.homes[usize::from(index.0)] {
                        served
                            .disk
                            .complete(&mut self.ring, event.tag.index, event.result, &mut self.done);
                        self.completions
                            .extend(self.done.drain(..).map(|done| (index, done)));
                    }
                }
                reactor::Kind::Kick => self.kicked(event),
                reactor::Kind::Call => self.called(event),
                reactor::Kind::Connection => self.connection_event(event),
                reactor::Kind::Wake if !event.more => {
                    // The watch ended (the kernel may drop one under pressure): watch again.
                    self.deaf = true;
                }
                _ => {}
            }
        }
        self.ring_events = events;
        worked
    }

    /// Tells stores and mirrors the time.
    fn tick(&mut self) {
        self.next_tick = self.now + TICK.as_millis() as u64;
        for position in 0..self.stores.len() {
            let disk = self.stores[position];
            if let Home::Store(served) = &mut self.homes[usize::from(disk.0)] {
                served.store.tick(self.now, &mut self.store_effects);
                served.drop_some(&mut self.store_effects);
                self.apply_store(disk);
                self.touch(disk);
            }
        }
        self.look_at_lease();
        for position in 0..self.present.len() {
            let index = self.present[position];
            let now = self.now;
            self.with_mirror(index, |mirror, out| mirror.tick(now, out));
        }
        if self.now >= self.next_connect {
            self.next_connect = self.now + CONNECT.as_millis() as u64;
            self.connect_lost();
        }
        self.carry();
        self.publish_queues();
        self.forget_volumes();
    }

    fn served(&self) -> impl Iterator<Item = &Served> {
        self.stores
            .iter()
            .filter_map(|disk| match &self.homes[usize::from(disk.0)] {
                Home::Store(served) => Some(&**served),
                _ => None,
            })
    }

    /// Requests that a disk or a peer is to answer.
    fn has_in_hand(&self) -> bool {
        self.ops.active() > 0 || self.served().any(|served| !served.store.idle())
    }

    fn prospect(&self) -> Prospect {
        if self.crowd.is_shared() {
            Prospect::Shared
        } else if self.has_in_hand() {
            Prospect::InHand
        } else {
            Prospect::Nothing
        }
    }

    /// Nothing is in hand that would not announce itself by the ring or the bell.
    fn may_sleep(&self) -> bool {
        !self.deaf
            && !self.queues.any_dirty()
            && self.outboxes.iter().all(VecDeque::is_empty)
            && self.links.may_sleep()
            && self.replies.is_empty()
            && !self
                .served()
                .any(|served| served.disk.must_poll() || !served.waiting.is_empty())
    }

    /// Arms everything that can wake us, looks once more, and blocks.
    fn sleep(&mut self) {
        self.waker.arm();
        let found = self.arm_queues();
        if found || !self.inbox.is_empty() {
            self.waker.disarm();
            return;
        }
        self.stats.sleeps += 1;
        self.now = self.started.elapsed().as_millis() as u64;
        let wait = if self.has_in_hand() { TICK } else { TICK_IDLE };
        if let Err(error) = self.ring.wait(Some(wait)) {
            panic!("io_uring has failed: {error}");
        }
        self.waker.disarm();
    }
}
