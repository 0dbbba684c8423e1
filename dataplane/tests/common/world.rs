//! One volume, its owners one after the other, model disks, a model control state, and everything that can happen to
//! them. One thread, one seed, no clock: the same seed gives the same run.

use std::collections::{BTreeMap, VecDeque};

use unibody_dataplane::config::*;
use unibody_dataplane::geometry::Geometry;
use unibody_dataplane::ids::*;
use unibody_dataplane::memory::{Arena, Payload};
use unibody_dataplane::mirror::*;
use unibody_dataplane::replica::*;

use super::checker::Checker;
use super::model::{self, Block, Model};

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

struct Node {
    model: Model,
    up: bool,
    stuck: bool,
    queue: VecDeque<(usize, RequestId, Header, Request)>,
}

struct Op {
    kind: OpKind,
    first: u64,
    end: u64,
    begun: u64,
    stamp: u64,
    memory: Arena,
    answered: bool,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Stats {
    pub ops: u64,
    pub reads: u64,
    pub errors: u64,
    pub owners: u64,
    pub restarts: u64,
    pub power_losses: u64,
    pub disconnects: u64,
    pub rebuilds: u64,
    pub promotions: u64,
    pub rots: u64,
    pub replaced: u64,
    pub repaired: u64,
    pub adopted: u64,
    pub lost: u64,
    pub failed: u64,
    pub trace: u64,
}

/// Which faults a run has.
#[derive(Debug, Clone, Copy)]
pub struct Profile {
    pub copies: u64,
    pub width: u32,
    pub disconnect: u64,
    pub restart: u64,
    pub power: u64,
    pub site: u64,
    pub owner: u64,
    pub rot: u64,
    pub replace: u64,
    pub full: u64,
    pub fail: u64,
    pub stuck: u64,
    pub steps: u64,
}

impl Profile {
    pub fn draw(random: &mut Random) -> Self {
        let storm = [1, 1, 4][random.below(3) as usize];
        let mut rate = |n: u64| if random.one_in(2) { n / storm } else { 0 };
        let profile = Profile {
            disconnect: rate(300),
            restart: rate(400),
            power: rate(500),
            site: rate(900),
            owner: rate(500),
            rot: rate(150),
            replace: rate(900),
            full: rate(700),
            fail: rate(700),
            stuck: rate(900),
            copies: [1, 2, 2, 2, 3, 3][random.below(6) as usize],
            width: 1 + random.below(2) as u32,
            steps: 3_000,
        };
        if profile.rot == 0 {
            return profile;
        }
        // Rot under a good copy that a crash then tears is beyond what can be told from a crash: the rest may be adopted.
        Profile {
            restart: 0,
            power: 0,
            site: 0,
            fail: 0,
            ..profile
        }
    }
}

const SECTORS: u64 = 8;
const OPS: u32 = 12;

pub struct World {
    pub random: Random,
    pub profile: Profile,
    clock: u64,
    now: u64,
    control: VolumeConfig,
    nodes: Vec<Node>,
    owners: Vec<Mirror>,
    buried: Vec<Op>,
    ops: BTreeMap<u32, Op>,
    proposals: VecDeque<(usize, Proposal)>,
    merges: VecDeque<(usize, u32, Option<Payload>, Option<Payload>)>,
    pub checker: Checker,
    stamp: u64,
    serial: u128,
    faults: bool,
    attached: bool,
    new_owner: bool,
    hot: Vec<u64>,
    pub stats: Stats,
    pub trace: bool,
}

type Checked = Result<(), String>;

impl World {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let profile = Profile::draw(&mut random);
        let disks = profile.copies + random.below(2);
        let mut serial = 1000;
        let mut draw = || {
            serial += 1;
            serial
        };
        let nodes: Vec<_> = (0..disks)
            .map(|_| Node {
                model: Model::new(draw(), draw(), draw()),
                up: true,
                stuck: false,
                queue: VecDeque::new(),
            })
            .collect();
        let geometry = Geometry::new(64 << 10, profile.width).unwrap();
        let size = CHUNK * u64::from(profile.width);
        let chunks = (0..profile.width as usize)
            .map(|c| {
                (0..profile.copies as usize)
                    .map(|i| Slot {
                        disk: nodes[(c + i) % nodes.len()].model.uuid,
                        state: SlotState::InSync,
                        incarnation: 1,
                        boot: BootId::default(),
                        power: PowerId::default(),
                    })
                    .collect()
            })
            .collect();
        let control = VolumeConfig {
            id: VolumeId(7),
            head: LayerId(9),
            size,
            geometry,
            generation: Generation(0),
            config: 1,
            chunks,
        };
        // Few blocks, so that operations meet: in one region around extent borders, and some in another.
        let mut hot: Vec<u64> = (12..20).chain(30..34).chain(16 * 40..16 * 40 + 6).collect();
        hot.push(size / BLOCK as u64 - 1);
        World {
            random,
            profile,
            clock: 1,
            now: 0,
            control,
            nodes,
            owners: Vec::new(),
            buried: Vec::new(),
            ops: BTreeMap::new(),
            proposals: VecDeque::new(),
            merges: VecDeque::new(),
            checker: Checker::default(),
            stamp: 0,
            serial: serial + 1_000_000,
            faults: true,
            attached: false,
            new_owner: true,
            hot,
            stats: Stats::default(),
            trace: false,
        }
    }

    fn note(&mut self, what: &str) {
        if self.trace {
            println!("{} {what}", self.clock);
        }
        for byte in what.bytes() {
            self.stats.trace = (self.stats.trace ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn draw(&mut self) -> u128 {
        self.serial += 1;
        self.serial
    }

    fn node(&self, uuid: DiskUuid) -> Option<usize> {
        self.nodes.iter().position(|node| node.model.uuid == uuid)
    }

    // ---- owners ----------------------------------------------------------------------------------------------------

    fn begin_owner(&mut self) -> Checked {
        self.checker.owner_died(self.clock);
        let old: Vec<u32> = self.ops.keys().copied().collect();
        for id in old {
            let op = self.ops.remove(&id).unwrap();
            self.buried.push(op);
        }
        self.merges.clear();
        self.proposals.clear();
        self.control.generation.0 += 1;
        self.control.config += 1;
        self.attached = false;
        self.new_owner = false;
        self.stats.owners += 1;
        self.note("owner");
        let limits = Limits {
            ops: OPS,
            edges: 2,
            sync: 2,
            unstable_bytes: 1 << 20,
            ..Limits::default()
        };
        let mut mirror = Mirror::new(self.control.clone(), limits);
        let mut out = Vec::new();
        mirror.tick(self.now, &mut out);
        for node in self.nodes.iter().filter(|node| node.up) {
            mirror.disk_up(node.model.uuid, true, &mut out);
        }
        mirror.attach(&mut out);
        self.owners.push(mirror);
        self.effects(out)
    }

    fn call(&mut self, f: impl FnOnce(&mut Mirror, &mut Vec<Effect>)) -> Checked {
        let mut out = Vec::new();
        f(self.owners.last_mut().expect("an owner"), &mut out);
        self.effects(out)
    }

    fn effects(&mut self, out: Vec<Effect>) -> Checked {
        let owner = self.owners.len() - 1;
        let mut abandoned = Vec::new();
        for effect in out {
            self.clock += 1;
            if self.trace {
                println!("{}   {effect:?}", self.clock);
            }
            match effect {
                Effect::Send {
                    disk,
                    id,
                    header,
                    request,
                } => {
                    let uuid = self.owners[owner].disk(disk);
                    let node = self.node(uuid).ok_or("request to an unknown disk")?;
                    if !self.nodes[node].up {
                        return Err(format!("request to a disk that is down: {request:?}"));
                    }
                    self.nodes[node].queue.push_back((owner, id, header, request));
                }
                Effect::ZeroFill { data, len } => {
                    for at in (0..len as usize).step_by(BLOCK) {
                        model::store(data, at, &[0; 8]);
                    }
                }
                Effect::Merge { op, head, tail } => self.merges.push_back((owner, op.0, head, tail)),
                Effect::Done { op, result, released } => self.done(op.0, result, released)?,
                Effect::Release { op } => {
                    let op = self.ops.remove(&op.0).ok_or("release of an unknown operation")?;
                    if !op.answered {
                        return Err("released before it was answered".into());
                    }
                    self.buried.push(op);
                }
                Effect::Propose(proposal) => self.proposals.push_back((owner, proposal)),
                Effect::Attached { power_lost } => {
                    self.attached = true;
                    if power_lost {
                        self.checker.power_lost(self.clock);
                    }
                }
                Effect::Abandon { disk } => abandoned.push(self.owners[owner].disk(disk)),
                Effect::Fenced => return Err("fenced, but there is no other owner".into()),
                Effect::Failed => {
                    self.stats.failed += 1;
                    self.new_owner = true;
                }
                Effect::NewGeneration | Effect::Detached => {}
            }
        }
        for uuid in abandoned {
            let node = self.node(uuid).ok_or("unknown disk")?;
            self.note("abandon");
            self.nodes[node].stuck = false;
            self.disconnect(node)?;
        }
        Ok(())
    }

    // ---- operations ------------------------------------------------------------------------------------------------

    fn submit(&mut self) -> Checked {
        let Some(id) = (0..OPS).find(|id| !self.ops.contains_key(id)) else {
            return Ok(());
        };
        let block = self.hot[self.random.below(self.hot.len() as u64) as usize];
        let size = self.control.size / 512;
        let mut first = block * SECTORS;
        let mut end = (first + SECTORS * (1 + self.random.below(4))).min(size);
        let kind = match self.random.below(20) {
            0..=7 => OpKind::Read,
            8..=15 => OpKind::Write,
            16 => OpKind::Zero { unmap: true },
            17 => OpKind::Zero { unmap: false },
            _ => OpKind::Flush,
        };
        if kind == OpKind::Write && self.random.one_in(3) {
            first += self.random.below(SECTORS);
            end = (first + 1 + self.random.below(end - first)).min(end);
        }
        if matches!(kind, OpKind::Zero { .. }) && self.random.one_in(4) {
            first = 0;
            end = 16 * SECTORS * 3;
        }
        if self.random.one_in(30) && kind == OpKind::Write {
            (first, end) = (12 * SECTORS, 34 * SECTORS);
        }
        self.start(id, kind, first, end)
    }

    fn start(&mut self, id: u32, kind: OpKind, first: u64, end: u64) -> Checked {
        self.clock += 1;
        self.stamp += 1;
        let blocks = end.div_ceil(SECTORS) - first / SECTORS;
        let mut memory = Arena::new(if matches!(kind, OpKind::Read | OpKind::Write) {
            blocks as usize
        } else {
            1
        })
        .unwrap();
        let stamp = self.stamp << 20;
        let mut crcs = Vec::new();
        if kind == OpKind::Read {
            memory.bytes_mut(0, blocks as usize).fill(0xee);
        }
        let data = memory.payload(0);
        match kind {
            OpKind::Write => {
                for b in 0..blocks {
                    let block: Block = std::array::from_fn(|i| {
                        let unit = (first / SECTORS + b) * SECTORS + i as u64;
                        if unit >= first && unit < end {
                            stamp | (unit & 0xf_ffff)
                        } else {
                            0xdead_dead
                        }
                    });
                    model::store(data, b as usize * BLOCK, &block);
                    crcs.push(model::crc(&block));
                }
                for unit in first..end {
                    self.checker.begin(unit, stamp | (unit & 0xf_ffff), self.clock);
                }
            }
            OpKind::Zero { .. } => {
                for unit in first..end {
                    self.checker.begin(unit, 0, self.clock);
                }
            }
            _ => {}
        }
        self.note(&format!("submit {id} {kind:?} {first}..{end}"));
        self.stats.ops += 1;
        let op = Op {
            kind,
            first,
            end,
            begun: self.clock,
            stamp,
            memory,
            answered: false,
        };
        self.ops.insert(id, op);
        self.call(|mirror, out| {
            mirror.submit(OpId(id), kind, first * 512, (end - first) * 512, data, &crcs, out);
        })
    }

    fn done(&mut self, id: u32, result: Result<(), OpError>, released: bool) -> Checked {
        self.clock += 1;
        let now = self.clock;
        self.note(&format!("done {id} {result:?}"));
        let op = self.ops.get_mut(&id).ok_or("answer to an unknown operation")?;
        if std::mem::replace(&mut op.answered, true) {
            return Err(format!("operation {id} was answered twice"));
        }
        self.stats.errors += u64::from(result.is_err());
        match (op.kind, result) {
            (OpKind::Read, Ok(())) => {
                self.stats.reads += 1;
                let data = op.memory.payload(0);
                for unit in op.first..op.end {
                    let at = (unit - op.first) as usize;
                    let block = model::load(data, at / 8 * BLOCK);
                    self.checker.read(unit, block[at % 8], op.begun, now)?;
                }
            }
            (OpKind::Write | OpKind::Zero { .. }, result) => {
                for unit in op.first..op.end {
                    let stamp = if op.kind == OpKind::Write {
                        op.stamp | (unit & 0xf_ffff)
                    } else {
                        0
                    };
                    match result {
                        Ok(()) => self.checker.acked(unit, stamp, op.begun, now),
                        Err(_) => self.checker.failed(unit, stamp, op.begun, now),
                    }
                }
            }
            (OpKind::Flush, Ok(())) => self.checker.flushed(op.begun),
            (_, Err(_)) => {}
        }
        if released {
            let op = self.ops.remove(&id).unwrap();
            self.buried.push(op);
        }
        // What was given back is reused at once in production: spoil it.
        if let Some(op) = self
            .buried
            .last_mut()
            .filter(|op| released && op.kind == OpKind::Write)
        {
            let pages = op.memory.pages();
            op.memory.bytes_mut(0, pages).fill(0x77);
        }
        Ok(())
    }

    fn merge(&mut self) -> Checked {
        let Some((owner, id, head, tail)) = self.merges.pop_front() else {
            return Ok(());
        };
        if owner != self.owners.len() - 1 {
            return Ok(());
        }
        let Some(op) = self.ops.get(&id) else {
            return Ok(());
        };
        let data = op.memory.payload(0);
        let (first, end) = (op.first, op.end);
        let blocks = end.div_ceil(SECTORS) - first / SECTORS;
        let complete = |page: Payload, b: u64| {
            let old = model::load(page, 0);
            let mut block = model::load(data, b as usize * BLOCK);
            for (i, word) in block.iter_mut().enumerate() {
                let unit = (first / SECTORS + b) * SECTORS + i as u64;
                if unit < first || unit >= end {
                    *word = old[i];
                }
            }
            model::store(data, b as usize * BLOCK, &block);
            model::crc(&block)
        };
        let head = head.map(|page| complete(page, 0));
        let tail = tail.map(|page| complete(page, blocks - 1));
        self.call(|mirror, out| mirror.merged(OpId(id), head, tail, out))
    }

    // ---- disks -----------------------------------------------------------------------------------------------------

    /// Lets a disk carry out one request.
    fn serve(&mut self, node: usize) -> Checked {
        if !self.nodes[node].up || self.nodes[node].stuck || self.nodes[node].queue.is_empty() {
            return Ok(());
        }
        let queue = &self.nodes[node].queue;
        // The first of some owner, or one further on if it concerns another extent than all before it.
        let mut at = self.random.below(queue.len().min(6) as u64) as usize;
        while at > 0 && !Self::may_pass(queue, at) {
            at -= 1;
        }
        let (owner, id, header, request) = self.nodes[node].queue.remove(at).unwrap();
        let reply = self.nodes[node].model.handle(&header, &request);
        self.note(&format!("disk {node} {owner} {id:?}"));
        if self.trace {
            println!("     {request:?}\n     -> {reply:?}");
        }
        if owner == self.owners.len() - 1 {
            self.call(|mirror, out| mirror.replied(id, reply, out))?;
        }
        Ok(())
    }

    fn may_pass(queue: &VecDeque<(usize, RequestId, Header, Request)>, at: usize) -> bool {
        let place = |request: &Request| match request {
            Request::Write { span, .. } | Request::Zero { span, .. } | Request::Read { span, .. } => {
                Some((span.chunk.key.chunk, span.extent))
            }
            _ => None,
        };
        let (owner, _, _, request) = &queue[at];
        queue
            .iter()
            .take(at)
            .filter(|(other, ..)| other == owner)
            .all(|(_, _, _, before)| {
                place(before).is_some() && place(request).is_some() && place(before) != place(request)
            })
    }

    /// The connection breaks; some of what was sent is still carried out, nothing is answered.
    fn disconnect(&mut self, node: usize) -> Checked {
        if !self.nodes[node].up {
            return Ok(());
        }
        self.stats.disconnects += 1;
        self.nodes[node].up = false;
        self.nodes[node].stuck = false;
        let owner = self.owners.len() - 1;
        let some = self.random.below(self.nodes[node].queue.len() as u64 + 1) as usize;
        let mut left = some;
        let queue = std::mem::take(&mut self.nodes[node].queue);
        for entry in queue {
            if entry.0 != owner {
                self.nodes[node].queue.push_back(entry);
            } else if left > 0 {
                left -= 1;
                self.nodes[node].model.handle(&entry.2, &entry.3);
            }
        }
        self.note(&format!("disconnect {node}"));
        let uuid = self.nodes[node].model.uuid;
        self.call(|mirror, out| mirror.disk_down(uuid, out))
    }

    fn restart(&mut self, node: usize, power: bool) -> Checked {
        let owner = self.owners.len() - 1;
        let queue = std::mem::take(&mut self.nodes[node].queue);
        let mut half = None;
        let some = self.random.below(queue.len() as u64 + 1) as usize;
        for (i, entry) in queue.into_iter().enumerate() {
            if entry.0 != owner {
                continue;
            }
            if i < some {
                self.nodes[node].model.handle(&entry.2, &entry.3);
            } else if half.is_none() {
                half = Some((entry.2, entry.3));
            }
        }
        let (boot, span) = (self.draw(), self.draw());
        let random = &mut self.random;
        let mut below = |n: u64| random.below(n);
        if power {
            self.stats.power_losses += 1;
            self.nodes[node].model.power_loss(boot, span, &mut below);
        } else {
            self.stats.restarts += 1;
            self.nodes[node].model.restart(boot, half, &mut below);
        }
        self.note(&format!("restart {node} power {power}"));
        if self.nodes[node].up {
            self.nodes[node].up = false;
            self.nodes[node].stuck = false;
            let uuid = self.nodes[node].model.uuid;
            self.call(|mirror, out| mirror.disk_down(uuid, out))?;
        }
        Ok(())
    }

    fn up(&mut self, node: usize) -> Checked {
        if self.nodes[node].up || self.control_unknown(node) {
            return Ok(());
        }
        self.nodes[node].up = true;
        self.note(&format!("up {node}"));
        let uuid = self.nodes[node].model.uuid;
        self.call(|mirror, out| mirror.disk_up(uuid, true, out))
    }

    fn control_unknown(&self, _node: usize) -> bool {
        false
    }

    // ---- control ---------------------------------------------------------------------------------------------------

    fn decide(&mut self) -> Checked {
        let Some((owner, proposal)) = self.proposals.pop_front() else {
            return Ok(());
        };
        if owner != self.owners.len() - 1 {
            return Ok(());
        }
        let now = (proposal.generation, proposal.config) == (self.control.generation, self.control.config);
        self.note(&format!("decide {now} {:?}", proposal.change));
        if !now {
            let config = self.control.clone();
            return self.call(|mirror, out| mirror.decided(Outcome::Moved(config), out));
        }
        self.control.config += 1;
        let boots: BTreeMap<_, _> = self
            .nodes
            .iter()
            .map(|node| (node.model.uuid, node.model.boot))
            .collect();
        let (disk, chunks) = match &proposal.change {
            Change::MarkStale { disk, chunks, .. }
            | Change::StartRebuild { disk, chunks }
            | Change::MarkInSync { disk, chunks, .. } => (*disk, chunks.clone()),
        };
        for c in chunks {
            let slots = &mut self.control.chunks[c as usize];
            let in_sync = slots
                .iter()
                .filter(|slot| slot.state == SlotState::InSync)
                .count();
            let Some(slot) = slots.iter_mut().find(|slot| slot.disk == disk) else {
                continue;
            };
            match proposal.change {
                Change::MarkStale { .. } => {
                    if slot.state != SlotState::InSync || in_sync > 1 {
                        slot.state = SlotState::Stale;
                    }
                }
                Change::StartRebuild { .. } => {
                    if slot.state == SlotState::Stale {
                        slot.state = SlotState::Rebuilding;
                        self.stats.rebuilds += 1;
                    }
                }
                Change::MarkInSync { boot, power, .. } => {
                    if slot.state != SlotState::Stale && boots[&disk] == boot {
                        self.stats.promotions += u64::from(slot.state == SlotState::Rebuilding);
                        (slot.state, slot.boot, slot.power) = (SlotState::InSync, boot, power);
                    }
                }
            }
        }
        let config = self.control.clone();
        self.call(|mirror, out| mirror.decided(Outcome::Committed(config), out))
    }

    /// A replica is put on a new, empty disk.
    fn replace(&mut self) -> Checked {
        let c = self.random.below(self.control.chunks.len() as u64) as usize;
        let slots = &self.control.chunks[c];
        let i = self.random.below(slots.len() as u64) as usize;
        if slots[i].state != SlotState::Stale {
            return Ok(());
        }
        let spare = self
            .nodes
            .iter()
            .position(|node| !slots.iter().any(|slot| slot.disk == node.model.uuid));
        let fresh = spare.is_none() || self.random.one_in(2);
        let node = match spare {
            Some(node) if !fresh => node,
            _ if self.nodes.len() < 6 => {
                let (a, b, d) = (self.draw(), self.draw(), self.draw());
                self.nodes.push(Node {
                    model: Model::new(a, b, d),
                    up: false,
                    stuck: false,
                    queue: VecDeque::new(),
                });
                self.nodes.len() - 1
            }
            _ => return Ok(()),
        };
        self.stats.replaced += 1;
        self.control.config += 1;
        self.control.chunks[c][i] = Slot {
            disk: self.nodes[node].model.uuid,
            state: SlotState::Stale,
            incarnation: self.control.config,
            boot: BootId::default(),
            power: PowerId::default(),
        };
        self.note(&format!("replace {c} {i} by {node}"));
        let config = self.control.clone();
        self.call(|mirror, out| mirror.reconfigured(config, out))?;
        self.up(node)
    }

    /// A block rots where another in-sync replica has it.
    fn rot(&mut self) {
        let block = self.hot[self.random.below(self.hot.len() as u64) as usize];
        let place = self.control.geometry.piece(block, 1);
        let slots = &self.control.chunks[place.chunk as usize];
        let good: Vec<_> = slots
            .iter()
            .filter(|slot| slot.state == SlotState::InSync)
            .filter_map(|slot| self.node(slot.disk))
            .filter(|&n| {
                self.nodes[n]
                    .model
                    .is_good(place.chunk, place.extent, place.first.into())
            })
            .collect();
        if good.len() < 2 || slots.iter().any(|slot| slot.state != SlotState::InSync) {
            return;
        }
        let node = good[self.random.below(good.len() as u64) as usize];
        self.stats.rots += 1;
        self.note(&format!("rot {node} block {block}"));
        self.nodes[node]
            .model
            .rot(place.chunk, place.extent, place.first.into());
    }

    // ---- the run ---------------------------------------------------------------------------------------------------

    fn fault(&mut self) -> Checked {
        let profile = self.profile;
        let node = self.random.below(self.nodes.len() as u64) as usize;
        let happens = |random: &mut Random, rate: u64| rate > 0 && random.one_in(rate);
        if happens(&mut self.random, profile.disconnect) {
            self.disconnect(node)?;
        }
        if happens(&mut self.random, profile.restart) {
            self.restart(node, false)?;
        }
        if happens(&mut self.random, profile.power) {
            self.restart(node, true)?;
        }
        if happens(&mut self.random, profile.owner) {
            self.new_owner = true;
        }
        if happens(&mut self.random, profile.site) {
            let power = self.random.one_in(2);
            self.new_owner = true;
            for node in 0..self.nodes.len() {
                self.restart(node, power)?;
            }
        }
        if happens(&mut self.random, profile.rot) {
            self.rot();
        }
        if happens(&mut self.random, profile.replace) {
            for _ in 0..8 {
                self.replace()?;
            }
        }
        if happens(&mut self.random, profile.full) {
            self.nodes[node].model.full = true;
        }
        if happens(&mut self.random, profile.fail) {
            self.nodes[node].model.failed = true;
        }
        if happens(&mut self.random, profile.stuck) {
            self.nodes[node].stuck = true;
        }
        if self.random.one_in(60) {
            self.up(node)?;
        }
        if self.random.one_in(100) {
            self.nodes[node].model.full = false;
        }
        if self.random.one_in(200) && self.nodes[node].model.failed {
            self.restart(node, false)?;
        }
        if self.random.one_in(20) {
            self.nodes[node].model.idle();
        }
        Ok(())
    }

    fn step(&mut self) -> Checked {
        self.clock += 1;
        if self.new_owner {
            return self.begin_owner();
        }
        match self.random.below(16) {
            0..=2 if self.faults => self.submit()?,
            0..=11 => {
                let node = self.random.below(self.nodes.len() as u64) as usize;
                self.serve(node)?;
            }
            12 => self.decide()?,
            13 => self.merge()?,
            14 => {
                self.now += if self.faults {
                    1 + self.random.below(40)
                } else {
                    200
                };
                let now = self.now;
                self.call(|mirror, out| mirror.tick(now, out))?;
            }
            _ => {}
        }
        if self.faults {
            self.fault()?;
        }
        Ok(())
    }

    /// A whole run: faults, then none, then everything is in order again.
    ///
    /// # Errors
    /// What was violated.
    pub fn run(&mut self) -> Result<Stats, String> {
        for _ in 0..self.profile.steps {
            self.step()?;
        }
        self.faults = false;
        self.note("heal");
        for node in 0..self.nodes.len() {
            self.nodes[node].stuck = false;
            self.nodes[node].model.full = false;
            if self.nodes[node].model.failed {
                self.restart(node, false)?;
            }
            self.up(node)?;
        }
        for i in 0.. {
            for node in 0..self.nodes.len() {
                self.up(node)?;
                self.serve(node)?;
            }
            self.step()?;
            if i % 64 == 0 && self.healed() {
                break;
            }
            if i > 400_000 {
                return Err(format!(
                    "not in order after the faults ended: ops {:?} {:#?} {:?}",
                    self.ops
                        .iter()
                        .map(|(id, op)| (*id, op.kind, op.first, op.end))
                        .collect::<Vec<_>>(),
                    self.owners.last().map(Mirror::status),
                    self.control.chunks,
                ));
            }
        }
        self.compare()?;
        for block in self.hot.clone() {
            self.start(0, OpKind::Read, block * SECTORS, (block + 1) * SECTORS)?;
            for _ in 0..100_000 {
                if !self.ops.contains_key(&0) {
                    break;
                }
                self.step()?;
            }
            if self.ops.contains_key(&0) {
                return Err("a last read was not answered".into());
            }
        }
        let status = self.owners.last().unwrap().status();
        (self.stats.repaired, self.stats.adopted, self.stats.lost) =
            (status.read_repairs, status.blocks_adopted, status.blocks_lost);
        Ok(self.stats.clone())
    }

    fn healed(&self) -> bool {
        let Some(mirror) = self.owners.last() else {
            return false;
        };
        let status = mirror.status();
        self.ops.is_empty()
            && self.proposals.is_empty()
            && status.phase == Phase::Serving
            && !status.degraded
            && status.unavailable == 0
            && status.regions_unsettled == 0
            && self.nodes.iter().all(|node| node.queue.is_empty())
            && self
                .control
                .chunks
                .iter()
                .flatten()
                .all(|slot| slot.state == SlotState::InSync)
    }

    /// All in-sync replicas hold the same.
    fn compare(&self) -> Checked {
        for (c, slots) in self.control.chunks.iter().enumerate() {
            let images: Vec<_> = slots
                .iter()
                .filter_map(|slot| self.node(slot.disk))
                .map(|node| {
                    let (_, extents) = &self.nodes[node].model.chunks[&(c as u32)];
                    extents
                        .iter()
                        .filter(|(_, extent)| extent.image.valid != 0 || extent.image.lost != 0)
                        .map(|(at, extent)| {
                            // Where nothing lies beneath, zeros and nothing are the same.
                            let mut image = extent.image;
                            image.zero = 0;
                            for b in 0..16 {
                                if image.valid >> b & 1 == 0 {
                                    image.crcs[b] = 0;
                                }
                            }
                            (*at, image)
                        })
                        .collect::<Vec<_>>()
                })
                .collect();
            for other in &images[1..] {
                if *other != images[0] {
                    return Err(format!(
                        "replicas of chunk {c} differ: {:?} and {other:?}",
                        images[0]
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Runs a seed.
///
/// # Errors
/// What was violated.
pub fn run(seed: u64) -> Result<Stats, String> {
    World::new(seed).run()
}
