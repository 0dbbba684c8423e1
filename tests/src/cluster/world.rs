//! The cluster of a run: events in virtual time, nodes, and the disks' stores.
//!
//! An event carries the count of whom it is for (opening of a disk, life of a process, session of a connection); what
//! outlived that is dropped when it fires. What is for a process that stands still waits until it goes on.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::sync::Arc;

use unibody_control::planner;
use unibody_control::state::{Applied, Command, NodeId, Refused, State};
use unibody_dataplane::ids::{BootId, DiskUuid, PowerId};
use unibody_dataplane::memory::{Arena, Payload};
use unibody_dataplane::mirror::{Mirror, RequestId};
use unibody_dataplane::replica::{Header, Reply, Request};
use unibody_dataplane::store::{FormatOptions, Store};

use super::agent::Owner;
use super::consensus::Consensus;
use super::link::Link;
use super::profile::Profile;
use super::work::Op;
use crate::checker::Checker;
use crate::sim::disk::VirtualDisk;
use crate::sim::profile::Damage;
use crate::sim::random::Random;
use crate::sim::work::Guest;
use crate::sim::world::{Checked, Stats};

/// The volume's name.
pub(super) const NAME: &str = "v";
/// Time between two looks of a node's agent.
const TICK: u64 = 100_000;

/// What a proposal came to.
pub(super) type Answer = Result<Applied, Refused>;

/// What happens.
#[derive(Debug)]
pub(super) enum Event {
    /// A request of an owner reaches a disk of its own node.
    Local {
        drive: usize,
        turn: u64,
        owner: u64,
        id: RequestId,
        header: Header,
        request: Request,
    },
    /// The answer of a disk of its own node reaches an owner.
    LocalAnswer {
        drive: usize,
        turn: u64,
        owner: u64,
        id: RequestId,
        reply: Reply,
    },
    /// A round of a store ends.
    Batch { drive: usize, turn: u64 },
    /// A device I/O ends.
    Done { drive: usize, turn: u64, serial: u64 },
    /// The process gives up a disk that ended itself.
    Distrust { drive: usize, turn: u64 },
    /// A message on a connection.
    Wire {
        from: usize,
        to: usize,
        session: u64,
        message: super::link::Message,
    },
    /// The owner's end tries to connect.
    Connect { from: usize, to: usize, session: u64 },
    /// The owner's end hears that the connection has ended.
    Ended { from: usize, to: usize, session: u64 },
    /// A disk was silent for too long.
    Abandon { owner: u64, drive: usize },
    /// A proposal reaches the leader, perhaps long after whoever made it has gone.
    Proposed {
        token: u64,
        from: usize,
        command: Arc<Command>,
    },
    /// The leader's log has reached a quorum.
    Committed { term: u64 },
    /// The outcome reaches who proposed.
    Outcome { token: u64, answer: Answer },
    /// No outcome was heard of for long.
    AskAgain { token: u64 },
    /// A node learns what was committed.
    Apply { node: usize, life: u64, upto: usize },
    /// A node asks the leader for a lease.
    Renew { node: usize, life: u64, sent: u64 },
    /// A lease is granted; it counts when so much was applied.
    Granted {
        node: usize,
        life: u64,
        sent: u64,
        upto: usize,
    },
    /// A new leader is looked for, if there is need.
    Elect,
    /// A node's agent looks around.
    Tick { node: usize },
    /// The guest's memory has its edges.
    Merged {
        owner: u64,
        op: u32,
        head: Option<Payload>,
        tail: Option<Payload>,
    },
    /// A guest's slot submits its next operation.
    Submit { node: usize, slot: u32, life: u64 },
    /// A disk is opened.
    Open { drive: usize, turn: u64 },
    /// A node's process starts.
    Start { node: usize, life: u64 },
    /// A process that stood still goes on.
    Resume { node: usize, pause: u64 },
    /// A partition ends.
    Mend { cut: u64 },
    /// A node hears of the consensus again.
    Rejoin { node: usize },
    /// Ten milliseconds of bad luck.
    Fault,
}

/// Who waits for the answer of a disk.
#[derive(Debug)]
pub(super) enum Job {
    Local {
        owner: u64,
        id: RequestId,
    },
    Remote {
        from: usize,
        to: usize,
        session: u64,
        place: u32,
        order: u64,
        request: Request,
        memory: Option<Arena>,
    },
    Oracle,
}

/// A disk and what serves it.
pub(super) struct Drive {
    pub(super) disk: VirtualDisk,
    pub(super) uuid: DiskUuid,
    pub(super) node: usize,
    pub(super) power: PowerId,
    pub(super) boot: BootId,
    pub(super) store: Option<Store>,
    /// Counts openings and deaths.
    pub(super) turn: u64,
    /// Destroyed.
    pub(super) gone: bool,
    /// It has ended itself, or was closed.
    pub(super) failed: bool,
    pub(super) batched: bool,
    /// Something that was asked of it takes until then, or its process gives it up first.
    pub(super) slow_until: u64,
    /// It completes nothing until then.
    pub(super) stuck_until: u64,
    pub(super) jobs: BTreeMap<u64, Job>,
    pub(super) last_in: u64,
    pub(super) last_out: u64,
}

/// A node.
pub(super) struct Site {
    pub(super) id: NodeId,
    /// Its process runs.
    pub(super) up: bool,
    /// Counts starts and deaths of its process.
    pub(super) life: u64,
    /// It stands still, until this pause is over; zero: it does not.
    pub(super) paused: u64,
    pub(super) backlog: VecDeque<Event>,
    /// Gone for good, since then.
    pub(super) gone: Option<u64>,
    /// Its clock's error in millionths, and its offset.
    drift: i64,
    offset: u64,
    pub(super) power: PowerId,
    /// What it has applied.
    pub(super) state: State,
    pub(super) applied: usize,
    /// Cut off from the consensus.
    pub(super) isolated: bool,
    /// By its own clock.
    pub(super) lease_until: u64,
    pub(super) renew_at: u64,
    pub(super) grant: Option<(u64, usize)>,
    pub(super) owner: Option<u64>,
    /// An attachment is being asked for.
    pub(super) attaching: Option<u64>,
    /// A guest runs here.
    pub(super) guest: bool,
    /// Counts guests.
    pub(super) guest_life: u64,
    pub(super) ops: BTreeMap<u32, Op>,
}

impl Site {
    /// The node's own clock.
    pub(super) fn clock(&self, now: u64) -> u64 {
        self.offset + now.wrapping_add_signed(now as i64 * self.drift / 1_000_000)
    }

    pub(super) fn running(&self) -> bool {
        self.up && self.paused == 0
    }
}

/// See the module.
pub(super) struct Cluster {
    pub(super) random: Random,
    pub(super) profile: Profile,
    /// Microseconds.
    pub(super) now: u64,
    /// Counts what the checker must tell apart.
    pub(super) clock: u64,
    serial: u64,
    heap: BinaryHeap<Reverse<(u64, u64, usize)>>,
    events: Vec<Option<Event>>,
    spare: Vec<usize>,
    hasher: blake3::Hasher,
    pub(super) trace: bool,
    pub(super) sites: Vec<Site>,
    pub(super) drives: Vec<Drive>,
    /// By owner's node and replica's node.
    pub(super) links: BTreeMap<(usize, usize), Link>,
    pub(super) raft: Consensus,
    pub(super) owners: BTreeMap<u64, Owner>,
    /// Partitions: directions in which nothing goes, by their number.
    pub(super) cuts: BTreeMap<u64, BTreeSet<(usize, usize)>>,
    /// Names what is drawn one after the other.
    pub(super) number: u64,
    /// Draws the load.
    pub(super) load: Guest,
    pub(super) left: u64,
    pub(super) ids: u64,
    pub(super) buried: Vec<Op>,
    pub(super) old_mirrors: Vec<Mirror>,
    pub(super) checker: Checker,
    /// Faults happen.
    pub(super) faulty: bool,
    /// A node is gone for good and not declared so yet: nothing else may happen.
    pub(super) hush: bool,
    /// The disk whose data rots.
    pub(super) victim: Option<usize>,
    pub(super) asked: Option<Reply>,
    pub(super) stats: Stats,
}

impl Cluster {
    /// A cluster before its first event.
    pub(super) fn new(profile: Profile, trace: bool) -> Self {
        let mut random = Random::new(profile.seed);
        let size = u64::from(profile.base.width) * unibody_dataplane::ids::CHUNK;
        let load = Guest::new(&profile.base, size, &mut random);
        let mut cluster = Cluster {
            random,
            profile,
            now: 0,
            clock: 1,
            serial: 0,
            heap: BinaryHeap::new(),
            events: Vec::new(),
            spare: Vec::new(),
            hasher: blake3::Hasher::new(),
            trace,
            sites: Vec::new(),
            drives: Vec::new(),
            links: BTreeMap::new(),
            raft: Consensus::default(),
            owners: BTreeMap::new(),
            cuts: BTreeMap::new(),
            number: 0,
            load,
            left: profile.base.ops,
            ids: 0,
            buried: Vec::new(),
            old_mirrors: Vec::new(),
            checker: Checker::default(),
            faulty: true,
            hush: false,
            victim: None,
            asked: None,
            stats: Stats::default(),
        };
        for node in 0..profile.nodes {
            cluster.add_site(node);
        }
        let width = profile.base.width;
        let chunks =
            planner::plan_chunks(&cluster.raft.state, width, profile.base.mirror).expect("nodes enough");
        cluster.commit_now(Command::CreateVolume {
            name: NAME.into(),
            size,
            mirror: profile.base.mirror,
            stripe_unit: profile.base.unit,
            stripe_width: width,
            read_only: false,
            instance: 1,
            chunks: chunks.clone(),
        });
        if profile.base.damage == Damage::Within {
            let disks = chunks.concat();
            let victim = cluster.random.pick(&disks);
            cluster.victim = cluster.drive(victim);
        }
        cluster
    }

    fn add_site(&mut self, node: usize) {
        let (id, store) = (NodeId(node as u64 + 1), self.random.name());
        self.commit_now(Command::AddNode {
            node: id,
            store,
            name: format!("n{node}"),
            addresses: vec![format!("10.0.0.{node}:1")],
            domain: format!("n{node}"),
            memory: 1,
            incarnation: 1,
        });
        self.sites.push(Site {
            id,
            up: false,
            life: 0,
            paused: 0,
            backlog: VecDeque::new(),
            gone: None,
            drift: self.random.range(0, 1000) as i64 - 500,
            offset: self.random.below(1 << 40),
            power: PowerId(self.random.name()),
            state: State::default(),
            applied: 0,
            isolated: false,
            lease_until: 0,
            renew_at: 0,
            grant: None,
            owner: None,
            attaching: None,
            guest: false,
            guest_life: 0,
            ops: BTreeMap::new(),
        });
        for other in 0..self.profile.nodes {
            if other != node {
                self.links.insert((node, other), Link::default());
            }
        }
        for _ in 0..self.random.range(1, self.profile.disks) {
            self.add_drive(node);
        }
    }

    /// A blank disk, formatted, as part of a node.
    pub(super) fn add_drive(&mut self, node: usize) {
        let uuid = DiskUuid(self.random.name());
        let base = self.profile.base;
        let mut disk = VirtualDisk::new(base.disk_bytes, base.volatile);
        let options = FormatOptions {
            uuid,
            journal_bytes: Some(base.journal_bytes),
            force: false,
            already_zero: true,
        };
        Store::format(&mut disk, &options).expect("a blank disk can be formatted");
        self.commit_now(Command::AddDisk {
            disk: uuid,
            node: self.sites[node].id,
            domain: String::new(),
            bytes: base.disk_bytes,
        });
        self.drives.push(Drive {
            disk,
            uuid,
            node,
            power: self.sites[node].power,
            boot: BootId::default(),
            store: None,
            turn: 0,
            gone: false,
            failed: false,
            batched: false,
            slow_until: 0,
            stuck_until: 0,
            jobs: BTreeMap::new(),
            last_in: 0,
            last_out: 0,
        });
    }

    /// Hash of everything that happened.
    pub(super) fn hash(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }

    pub(super) fn count(&mut self, what: &'static str) {
        *self.stats.seen.entry(what).or_default() += 1;
    }

    pub(super) fn add(&mut self, what: &'static str, n: u64) {
        *self.stats.seen.entry(what).or_default() += n;
    }

    pub(super) fn mark(&mut self, words: &[u64]) {
        for word in words {
            self.hasher.update(&word.to_le_bytes());
        }
    }

    pub(super) fn fresh(&mut self) -> u64 {
        self.number += 1;
        self.number
    }

    pub(super) fn at(&mut self, time: u64, event: Event) {
        self.serial += 1;
        let place = self.spare.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[place] = Some(event);
        self.heap.push(Reverse((time, self.serial, place)));
    }

    pub(super) fn after(&mut self, delay: u64, event: Event) {
        self.at(self.now + delay, event);
    }

    pub(super) fn delay(&mut self, (least, spread): (u64, u64)) -> u64 {
        least + self.random.below(spread)
    }

    pub(super) fn drive(&self, uuid: DiskUuid) -> Option<usize> {
        self.drives.iter().position(|drive| drive.uuid == uuid)
    }

    /// Whether nothing goes from one node to another.
    pub(super) fn blocked(&self, from: usize, to: usize) -> bool {
        self.cuts.values().any(|cut| cut.contains(&(from, to)))
    }

    /// Runs the first event.
    pub(super) fn step(&mut self) -> Checked {
        let Reverse((time, _, place)) = self.heap.pop().ok_or("nothing is left to happen")?;
        let event = self.events[place].take().expect("an event happens once");
        self.spare.push(place);
        self.now = time;
        self.stats.events += 1;
        self.stats.virtual_ms = time / 1000;
        match self.whose(&event) {
            Some(node) if self.sites[node].paused != 0 => {
                self.sites[node].backlog.push_back(event);
                Ok(())
            }
            _ => self.handle(event),
        }
    }

    /// The node whose process an event is for.
    fn whose(&self, event: &Event) -> Option<usize> {
        match event {
            Event::Local { drive, .. }
            | Event::LocalAnswer { drive, .. }
            | Event::Batch { drive, .. }
            | Event::Done { drive, .. }
            | Event::Distrust { drive, .. } => Some(self.drives[*drive].node),
            Event::Wire {
                from, to, message, ..
            } => Some(if message.is_answer() { *from } else { *to }),
            Event::Ended { from, .. } => Some(*from),
            Event::Outcome { token, .. } => self.raft.asks.get(token).map(|ask| ask.node),
            Event::Apply { node, .. } | Event::Granted { node, .. } => Some(*node),
            Event::Merged { owner, .. } => self.owners.get(owner).map(|owner| owner.node),
            _ => None,
        }
    }

    pub(super) fn handle(&mut self, event: Event) -> Checked {
        match event {
            Event::Local {
                drive,
                turn,
                owner,
                id,
                header,
                request,
            } => {
                if self.drives[drive].turn != turn {
                    return Ok(());
                }
                self.ask_store(drive, header, request, Job::Local { owner, id })
            }
            Event::LocalAnswer {
                drive,
                turn,
                owner,
                id,
                reply,
            } => {
                if self.drives[drive].turn != turn {
                    return Ok(());
                }
                self.mark(&[3, self.now, owner, u64::from(id.0)]);
                self.replied(owner, drive, id, reply)
            }
            Event::Batch { drive, turn } => {
                if self.drives[drive].turn == turn {
                    self.store(drive, |store, out| store.flush_batch(out))?;
                    self.drives[drive].batched = false;
                }
                Ok(())
            }
            Event::Done { drive, turn, serial } => self.io_done(drive, turn, serial),
            Event::Distrust { drive, turn } => {
                if self.drives[drive].turn == turn {
                    self.lose_drive(drive, false)
                } else {
                    Ok(())
                }
            }
            Event::Wire {
                from,
                to,
                session,
                message,
            } => self.wire(from, to, session, message),
            Event::Connect { from, to, session } => self.connect(from, to, session),
            Event::Ended { from, to, session } => {
                self.ended(from, to, session);
                Ok(())
            }
            Event::Abandon { owner, drive } => self.abandon(owner, drive),
            Event::Proposed { token, from, command } => {
                self.proposed(token, from, command);
                Ok(())
            }
            Event::Committed { term } => self.committed(term),
            Event::Outcome { token, answer } => self.outcome(token, answer),
            Event::AskAgain { token } => self.ask_again(token),
            Event::Apply { node, life, upto } => self.apply(node, life, upto),
            Event::Renew { node, life, sent } => {
                self.renew(node, life, sent);
                Ok(())
            }
            Event::Granted {
                node,
                life,
                sent,
                upto,
            } => {
                if self.sites[node].life == life {
                    self.granted(node, sent, upto);
                }
                Ok(())
            }
            Event::Elect => self.elect(),
            Event::Tick { node } => self.tick(node),
            Event::Merged {
                owner,
                op,
                head,
                tail,
            } => self.merge(owner, op, head, tail),
            Event::Submit { node, slot, life } => self.submit(node, slot, life),
            Event::Open { drive, turn } => self.open(drive, turn),
            Event::Start { node, life } => self.start(node, life),
            Event::Resume { node, pause } => self.resume(node, pause),
            Event::Mend { cut } => self.mend(cut),
            Event::Rejoin { node } => {
                self.sites[node].isolated = false;
                Ok(())
            }
            Event::Fault => self.fault(),
        }
    }

    fn tick(&mut self, node: usize) -> Checked {
        let jitter = self.random.below(TICK / 4);
        self.after(TICK + jitter, Event::Tick { node });
        if !self.sites[node].running() {
            return Ok(());
        }
        let now_ms = self.sites[node].clock(self.now) / 1000;
        for drive in 0..self.drives.len() {
            if self.drives[drive].node == node {
                self.store(drive, |store, out| store.tick(now_ms, out))?;
            }
        }
        self.look_at_links(node)?;
        self.keep(node)?;
        self.agent(node)
    }
}
