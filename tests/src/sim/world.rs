//! The world of a run: events in virtual time, messages between mirror and stores, the control state.
//!
//! An event carries the epoch of whom it is for; what outlived its process is dropped when it fires. Messages between
//! the mirror and one disk stay in order in both directions; everything else may overtake.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};

use unibody_control::planner;
use unibody_control::state::{Applied, Command, NodeId, State};
use unibody_dataplane::config::{Outcome, Proposal, VolumeConfig};
use unibody_dataplane::disk::{Completion, Io};
use unibody_dataplane::ids::{BootId, DiskUuid, PowerId};
use unibody_dataplane::memory::Payload;
use unibody_dataplane::mirror::{self, Mirror, RequestId};
use unibody_dataplane::replica::{Header, Reply, Request, Span};
use unibody_dataplane::store::{self, FormatOptions, Store, Tag};

use super::disk::{Mishap, VirtualDisk};
use super::profile::{Damage, Profile};
use super::random::Random;
use super::script::Crash;
use super::trace::{brief, brief_io, brief_request, weight};
use super::work::Guest;
use crate::checker::Checker;

/// The volume's name.
pub(super) const NAME: &str = "v";

/// Nothing, or what was violated.
pub(crate) type Checked = Result<(), String>;

/// What a run did and reached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Stats {
    pub events: u64,
    pub ops: u64,
    pub ops_failed: u64,
    pub sectors_judged: u64,
    pub device_ios: u64,
    pub virtual_ms: u64,
    /// Faults and rare branches by name.
    pub seen: BTreeMap<&'static str, u64>,
}

/// What happens.
#[derive(Debug)]
pub(super) enum Event {
    /// A request reaches a store.
    Deliver {
        node: usize,
        boot: u64,
        line: u64,
        owner: u64,
        id: RequestId,
        header: Header,
        request: Request,
    },
    /// A round of the store ends.
    Batch {
        node: usize,
        boot: u64,
    },
    /// A device I/O ends.
    Done {
        node: usize,
        boot: u64,
        serial: u64,
    },
    /// An answer reaches the mirror.
    Answer {
        node: usize,
        line: u64,
        owner: u64,
        id: RequestId,
        reply: Reply,
    },
    /// The control state decides.
    Decide {
        owner: u64,
        proposal: Proposal,
    },
    /// The decision is heard of.
    Decided {
        owner: u64,
        outcome: Outcome,
    },
    /// The driver has merged edges.
    Merged {
        owner: u64,
        op: u32,
        head: Option<Payload>,
        tail: Option<Payload>,
    },
    Tick,
    /// A guest's slot submits its next operation.
    Submit {
        slot: u32,
        life: u64,
    },
    /// A disk is opened again.
    Open {
        node: usize,
        boot: u64,
    },
    /// A disk that was cut off is reached again.
    Reach {
        node: usize,
        line: u64,
    },
    /// The data plane starts.
    Start {
        owner: u64,
    },
    Fault,
    /// The driver cuts a silent disk off.
    Abandon {
        node: usize,
        line: u64,
    },
    /// A disk that was copied from is destroyed, and then the power goes.
    Betrayal {
        disk: DiskUuid,
        power: bool,
    },
    /// A clean restart goes on.
    Leave {
        owner: u64,
        patience: u64,
    },
}

/// A disk and what serves it.
pub(super) struct Node {
    pub(super) disk: VirtualDisk,
    pub(super) uuid: DiskUuid,
    pub(super) power: PowerId,
    pub(super) store: Option<Store>,
    /// Counts openings and deaths.
    pub(super) boot: u64,
    /// Counts connections with the mirror.
    pub(super) line: u64,
    /// The mirror believes it up.
    pub(super) up: bool,
    /// Cut off: answers are dropped until the store has answered all.
    pub(super) cut: bool,
    /// Leaves I/O unanswered.
    pub(super) stuck: bool,
    /// Replaced.
    pub(super) gone: bool,
    pub(super) tags: BTreeMap<u64, (u64, RequestId)>,
    pub(super) reads: BTreeMap<u64, Span>,
    pub(super) last_in: u64,
    pub(super) last_out: u64,
    pub(super) batched: bool,
    pub(super) failed: bool,
}

/// See the module.
pub struct World {
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
    pub(super) control: State,
    pub(super) nodes: Vec<Node>,
    pub(super) mirror: Option<Mirror>,
    pub(super) owner: u64,
    pub(super) tag: u64,
    pub(super) guest: Guest,
    pub(super) checker: Checker,
    /// Faults happen.
    pub(super) faulty: bool,
    /// Some disk lost power since the last attachment.
    pub(super) power_was_lost: bool,
    pub(super) attached: bool,
    pub(super) failed: bool,
    /// Clean restart: 1 detaching, 2 closing.
    pub(super) leaving: u8,
    /// Answer to the oracle's own question.
    pub(super) asked: Option<Reply>,
    /// The disk that integrity faults are confined to.
    pub(super) victim: usize,
    /// Blocks of it that are weak by now.
    pub(super) weak: u64,
    /// Bad blocks that the owner met when no fault happened any more: disk, chunk, extent, block.
    pub(super) met: BTreeSet<(usize, u32, u16, u8)>,
    /// I/Os that changed or flushed a disk, and at which of them the run is cut.
    pub(super) points: u64,
    pub(super) crash: Option<Crash>,
    /// Statistics.
    pub stats: Stats,
}

macro_rules! note {
    ($world:expr, $($arg:tt)*) => {
        if $world.trace {
            println!("{:>10} {}", $world.now, format!($($arg)*));
        }
    };
}
pub(crate) use note;

impl World {
    /// A world before its first event.
    pub fn new(profile: Profile, trace: bool) -> Self {
        let mut random = Random::new(profile.seed);
        let mut control = State::default();
        let mut nodes = Vec::new();
        for _ in 0..profile.disks {
            nodes.push(Self::fresh_node(&profile, &mut random, &mut control));
        }
        let size = u64::from(profile.width) * unibody_dataplane::ids::CHUNK;
        let chunks = planner::plan_chunks(&control, profile.width, profile.mirror).expect("disks enough");
        control
            .apply(&Command::CreateVolume {
                name: NAME.into(),
                size,
                mirror: profile.mirror,
                stripe_unit: profile.unit,
                stripe_width: profile.width,
                read_only: false,
                instance: 1,
                chunks,
            })
            .expect("a possible volume");
        let victim = random.below(profile.disks) as usize;
        let guest = Guest::new(&profile, size, &mut random);
        World {
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
            control,
            nodes,
            mirror: None,
            owner: 0,
            tag: 0,
            guest,
            checker: Checker::default(),
            faulty: true,
            power_was_lost: false,
            attached: false,
            failed: false,
            leaving: 0,
            asked: None,
            victim,
            weak: 0,
            met: BTreeSet::new(),
            points: 0,
            crash: None,
            stats: Stats::default(),
        }
    }

    pub(super) fn fresh_node(profile: &Profile, random: &mut Random, control: &mut State) -> Node {
        let uuid = DiskUuid(random.name());
        let mut disk = VirtualDisk::new(profile.disk_bytes, profile.volatile);
        let options = FormatOptions {
            uuid,
            journal_bytes: Some(profile.journal_bytes),
            force: false,
            already_zero: true,
        };
        Store::format(&mut disk, &options).expect("a blank disk can be formatted");
        let command = Command::AddDisk {
            disk: uuid,
            node: NodeId::LOCAL,
            domain: format!("{uuid}"),
            bytes: profile.disk_bytes,
        };
        control.apply(&command).expect("a disk can be added");
        Node {
            disk,
            uuid,
            power: PowerId(random.name()),
            store: None,
            boot: 0,
            line: 0,
            up: false,
            cut: false,
            stuck: false,
            gone: false,
            tags: BTreeMap::new(),
            reads: BTreeMap::new(),
            last_in: 0,
            last_out: 0,
            batched: false,
            failed: false,
        }
    }

    /// Hash of everything that happened.
    pub fn hash(&self) -> [u8; 32] {
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

    pub(super) fn message_delay(&mut self) -> u64 {
        let (least, spread) = self.profile.message;
        least + self.random.below(spread)
    }

    pub(super) fn config(&self) -> VolumeConfig {
        self.control.volumes[NAME].to_config()
    }

    /// Runs the first event.
    pub(super) fn step(&mut self) -> Checked {
        let Reverse((time, _, place)) = self.heap.pop().ok_or("nothing is left to happen")?;
        let event = self.events[place].take().expect("an event happens once");
        self.spare.push(place);
        self.now = time;
        self.stats.events += 1;
        self.handle(event)
    }

    fn handle(&mut self, event: Event) -> Checked {
        match event {
            Event::Deliver {
                node,
                boot,
                line,
                owner,
                id,
                header,
                request,
            } => {
                let there = &mut self.nodes[node];
                if there.boot != boot || there.line != line || there.cut || owner != self.owner {
                    return Ok(());
                }
                self.tag += 1;
                let tag = self.tag;
                there.tags.insert(tag, (owner, id));
                if let Request::Read { span, raw: false, .. } = &request
                    && !self.faulty
                {
                    there.reads.insert(tag, *span);
                }
                self.mark(&[1, self.now, node as u64, u64::from(id.0)]);
                self.store(node, |store, out| store.submit(Tag(tag), header, request, out))
            }
            Event::Batch { node, boot } => {
                if self.nodes[node].boot == boot {
                    self.store(node, |store, out| store.flush_batch(out))?;
                    self.nodes[node].batched = false;
                }
                Ok(())
            }
            Event::Done { node, boot, serial } => self.io_done(node, boot, serial),
            Event::Answer {
                node,
                line,
                owner,
                id,
                reply,
            } => {
                if self.nodes[node].line != line || owner != self.owner {
                    return Ok(());
                }
                note!(self, "answer {node} {id:?} {}", brief(&reply));
                self.mark(&[3, self.now, node as u64, u64::from(id.0), weight(&reply)]);
                self.mirror(|mirror, out| mirror.replied(id, reply, out))
            }
            Event::Decide { owner, proposal } => {
                // The owner may be dead by now: what it proposed is committed all the same, if nobody attached since.
                let command = Command::Propose {
                    name: NAME.into(),
                    proposal,
                };
                let before = self.config();
                let Ok(Applied::Outcome(outcome)) = self.control.apply(&command) else {
                    return Err("a proposal was refused".into());
                };
                let kind = match outcome {
                    Outcome::Committed(_) => 1,
                    Outcome::Moved(_) => 2,
                    Outcome::Fenced => 3,
                };
                note!(self, "decided {kind} {command:?}");
                self.mark(&[4, self.now, owner, kind]);
                self.betray(&before, &command);
                let delay = self.message_delay() * 3;
                self.after(delay, Event::Decided { owner, outcome });
                Ok(())
            }
            Event::Decided { owner, outcome } => {
                if owner != self.owner {
                    return Ok(());
                }
                self.mirror(|mirror, out| mirror.decided(outcome, out))
            }
            Event::Merged {
                owner,
                op,
                head,
                tail,
            } => {
                if owner != self.owner {
                    return Ok(());
                }
                self.merge(op, head, tail)
            }
            Event::Tick => self.tick(),
            Event::Submit { slot, life } => self.submit(slot, life),
            Event::Open { node, boot } => self.open(node, boot),
            Event::Reach { node, line } => self.reach(node, line),
            Event::Start { owner } => self.start(owner),
            Event::Fault => self.fault(),
            Event::Abandon { node, line } => {
                if self.nodes[node].line == line {
                    self.lose_disk(node, false)
                } else {
                    Ok(())
                }
            }
            Event::Betrayal { disk, power } => self.betrayal(disk, power),
            Event::Leave { owner, patience } => self.go_on_leaving(owner, patience),
        }
    }

    fn tick(&mut self) -> Checked {
        let now_ms = self.now / 1000;
        self.stats.virtual_ms = now_ms;
        for node in 0..self.nodes.len() {
            self.store(node, |store, out| store.tick(now_ms, out))?;
        }
        self.mirror(|mirror, out| mirror.tick(now_ms, out))?;
        self.agent()?;
        let delay = self.random.range(50_000, 100_000);
        self.after(delay, Event::Tick);
        Ok(())
    }

    // ---- stores ----------------------------------------------------------------------------------------------------

    pub(super) fn store(
        &mut self,
        node: usize,
        f: impl FnOnce(&mut Store, &mut Vec<store::Effect>),
    ) -> Checked {
        let Some(store) = &mut self.nodes[node].store else {
            return Ok(());
        };
        let mut out = Vec::new();
        f(store, &mut out);
        let boot = self.nodes[node].boot;
        for effect in out {
            match effect {
                store::Effect::Io { token, io } => {
                    let mishap = self.mishap(node, &io);
                    let mut delay = self.profile.latency.0 + self.random.below(self.profile.latency.1);
                    if self.faulty && self.random.one_in(self.profile.slow) {
                        delay *= 100;
                        self.count("slow I/O");
                    }
                    let serial = self.nodes[node].disk.submit(token, io, mishap, &mut self.random);
                    note!(self, "io {node} {serial} {token:x?} {} {mishap:?}", brief_io(&io));
                    self.after(delay, Event::Done { node, boot, serial });
                }
                store::Effect::Reply { tag, reply } => {
                    let there = &mut self.nodes[node];
                    let (owner, id) = there
                        .tags
                        .remove(&tag.0)
                        .ok_or("a store answered a request twice")?;
                    if let (Some(span), Reply::Read { bad, lost, .. }) = (there.reads.remove(&tag.0), &reply)
                    {
                        let bad = bad & !lost;
                        let blocks = (0..16).filter(|b| bad >> b & 1 == 1);
                        let at = |b| (node, span.chunk.key.chunk, span.extent, b);
                        self.met.extend(blocks.map(at));
                    }
                    let there = &mut self.nodes[node];
                    let line = there.line;
                    if owner == u64::MAX {
                        self.asked = Some(reply);
                        continue;
                    }
                    if there.cut || owner != self.owner {
                        continue;
                    }
                    let time = (self.now + self.message_delay()).max(self.nodes[node].last_out + 1);
                    self.nodes[node].last_out = time;
                    self.at(
                        time,
                        Event::Answer {
                            node,
                            line,
                            owner,
                            id,
                            reply,
                        },
                    );
                }
                store::Effect::Failed(failure) => {
                    note!(self, "disk {node} failed {failure:?}");
                    self.count("disk ended itself");
                    self.nodes[node].failed = true;
                    let delay = self.random.range(1_000, 2_000_000);
                    self.after(delay, Event::Open { node, boot });
                }
                store::Effect::Closed => self.nodes[node].failed = true,
            }
        }
        if !self.nodes[node].batched {
            self.nodes[node].batched = true;
            self.after(1, Event::Batch { node, boot });
        }
        Ok(())
    }

    fn mishap(&mut self, node: usize, io: &Io) -> Option<Mishap> {
        if !self.faulty {
            return None;
        }
        let strays = self.profile.damage == Damage::Within && node == self.victim;
        let profile = self.profile;
        let (name, mishap) = profile.mishap(io, strays, &mut self.random)?;
        self.count(name);
        Some(mishap)
    }

    fn io_done(&mut self, node: usize, boot: u64, serial: u64) -> Checked {
        let there = &mut self.nodes[node];
        if there.boot != boot || !there.disk.is_flying(serial) {
            return Ok(());
        }
        if there.stuck {
            self.after(50_000, Event::Done { node, boot, serial });
            return Ok(());
        }
        if there.disk.forgets(serial) {
            // A failed flush is as good as a loss of power: what had completed may be gone. Whoever opens the disk again
            // is obliged to say so by another span of power.
            there.power = PowerId(self.random.name());
            self.power_was_lost = true;
        }
        let there = &mut self.nodes[node];
        let point = there.disk.is_change(serial);
        let completion: Completion = there.disk.complete(serial, &mut self.random);
        note!(self, "io done {node} {serial} {:?}", completion.result);
        self.mark(&[2, self.now, node as u64, serial, u64::from(completion.crcs[0])]);
        self.points += u64::from(point);
        if let Some(crash) = self.crash.filter(|crash| point && crash.at == self.points) {
            // Done, and nobody was told.
            return self.crash(crash.power, false);
        }
        self.store(node, |store, out| store.completed(completion, out))
    }

    // ---- the mirror ------------------------------------------------------------------------------------------------

    pub(super) fn mirror(&mut self, f: impl FnOnce(&mut Mirror, &mut Vec<mirror::Effect>)) -> Checked {
        let Some(mirror) = &mut self.mirror else {
            return Ok(());
        };
        let mut out = Vec::new();
        f(mirror, &mut out);
        for effect in out {
            match effect {
                mirror::Effect::Send {
                    disk,
                    id,
                    header,
                    request,
                } => {
                    let uuid = self.mirror.as_ref().expect("it spoke").disk(disk);
                    let node = self.node(uuid).ok_or("a request to an unknown disk")?;
                    if !self.nodes[node].up {
                        return Err(format!("a request to a disk that is down: {request:?}"));
                    }
                    note!(self, "send {node} {id:?} {}", brief_request(&request));
                    let (boot, line, owner) = (self.nodes[node].boot, self.nodes[node].line, self.owner);
                    let time = (self.now + self.message_delay()).max(self.nodes[node].last_in + 1);
                    self.nodes[node].last_in = time;
                    self.at(
                        time,
                        Event::Deliver {
                            node,
                            boot,
                            line,
                            owner,
                            id,
                            header,
                            request,
                        },
                    );
                }
                mirror::Effect::ZeroFill { data, len } => super::work::fill_zeros(data, len),
                mirror::Effect::Merge { op, head, tail } => {
                    let delay = self.message_delay();
                    let owner = self.owner;
                    self.after(
                        delay,
                        Event::Merged {
                            owner,
                            op: op.0,
                            head,
                            tail,
                        },
                    );
                }
                mirror::Effect::Done { op, result, released } => self.op_done(op.0, result, released)?,
                mirror::Effect::Release { op } => self.op_released(op.0)?,
                mirror::Effect::Propose(proposal) => {
                    let delay = self.message_delay() * 5 + self.random.below(self.profile.decision);
                    let owner = self.owner;
                    self.after(delay, Event::Decide { owner, proposal });
                }
                mirror::Effect::Attached { power_lost } => {
                    note!(self, "attached {power_lost}");
                    self.mark(&[5, self.now, u64::from(power_lost)]);
                    self.attached = true;
                    self.count("attached");
                    if power_lost {
                        self.unflushed_lost("at attach")?;
                    }
                }
                mirror::Effect::Abandon { disk } => {
                    let uuid = self.mirror.as_ref().expect("it spoke").disk(disk);
                    let node = self.node(uuid).ok_or("an unknown disk is abandoned")?;
                    self.count("abandoned disk");
                    let line = self.nodes[node].line;
                    self.after(0, Event::Abandon { node, line });
                }
                mirror::Effect::Fenced => return Err("fenced by nobody".into()),
                mirror::Effect::Failed => {
                    note!(self, "failed");
                    self.count("last copy forgot writes");
                    self.failed = true;
                }
                mirror::Effect::NewGeneration => return Err("a new generation after so few writes".into()),
                mirror::Effect::Detached => self.attached = false,
            }
        }
        if std::mem::take(&mut self.failed) {
            self.unflushed_lost("in service")?;
            self.crash(false, true)?;
        }
        Ok(())
    }

    /// The mirror says that acknowledged writes may be gone: only true if power was lost.
    fn unflushed_lost(&mut self, when: &str) -> Checked {
        if !self.power_was_lost {
            return Err(format!(
                "acknowledged writes were given up {when}, though no disk lost power"
            ));
        }
        if self.profile.volatile || self.profile.flush_error != 0 {
            self.clock += 1;
            self.checker.power_lost(self.clock);
        }
        Ok(())
    }

    pub(super) fn node(&self, uuid: DiskUuid) -> Option<usize> {
        self.nodes.iter().position(|node| node.uuid == uuid)
    }

    pub(super) fn new_boot(&mut self) -> BootId {
        BootId(self.random.name())
    }
}
