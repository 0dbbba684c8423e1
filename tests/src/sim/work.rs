//! Guests: what they ask for, what they remember, and what the driver of the data plane does with their memory.
//!
//! Every sector written carries the id of its write and its own address, so that a read tells whose bytes it got.
//! After a kill of the data plane what is under way is submitted again, as the vhost-user in-flight log has it; after a
//! loss of power the guest begins anew. Memory given back is spoiled at once, and kept until the end of the run.

use std::collections::BTreeMap;

use unibody_dataplane::checksum::crc32c;
use unibody_dataplane::config::SlotState;
use unibody_dataplane::ids::BLOCK;
use unibody_dataplane::memory::{Arena, Payload};
use unibody_dataplane::mirror::{OpError, OpId, OpKind};

use super::disk::SECTOR;
use super::profile::{Damage, Profile};
use super::random::Random;
use super::world::{Checked, Event, World, note};

/// Sectors of a block.
pub(crate) const SECTORS: u64 = (BLOCK / SECTOR) as u64;

/// A guest's operation.
pub(super) struct Op {
    pub(super) kind: OpKind,
    first: u64,
    end: u64,
    begun: u64,
    id: u64,
    memory: Arena,
    crcs: Vec<u32>,
    answered: bool,
    /// The configuration in which it was submitted, if that has one copy left of all that it touches.
    alone: Option<(u64, u32)>,
}

/// A guest's slots and what is left to do.
pub(crate) struct Guest {
    pub(super) ops: BTreeMap<u32, Op>,
    buried: Vec<Arena>,
    pub(super) left: u64,
    pub(super) life: u64,
    ids: u64,
    hot: Vec<u64>,
    blocks: u64,
    last: u64,
}

impl Guest {
    pub(crate) fn new(profile: &Profile, size: u64, random: &mut Random) -> Self {
        let blocks = profile.spread * 16;
        let border = |random: &mut Random| {
            (random.below(profile.spread.max(2)) * 16 + random.below(3)).min(blocks - 1)
        };
        Guest {
            ops: BTreeMap::new(),
            buried: Vec::new(),
            left: profile.ops,
            life: 0,
            ids: 0,
            hot: (0..profile.hot).map(|_| border(random)).collect(),
            blocks,
            last: size / BLOCK as u64 - 1,
        }
    }

    /// The device has this size now, as far as the guest knows.
    pub(crate) fn resized(&mut self, size: u64) {
        self.last = size / BLOCK as u64 - 1;
    }

    pub(crate) fn draw(&self, profile: &Profile, random: &mut Random) -> (OpKind, u64, u64) {
        let (reads, flushes, zeros) = profile.mix;
        let dice = random.below(100);
        let kind = match dice {
            d if d < reads => OpKind::Read,
            d if d < reads + flushes => return (OpKind::Flush, 0, 0),
            d if d < reads + flushes + zeros => OpKind::Zero {
                unmap: random.one_in(2),
            },
            _ => OpKind::Write,
        };
        let block = match random.below(16) {
            0 => self.last,
            1..=9 => random.pick(&self.hot),
            _ => random.below(self.blocks),
        };
        let long = random.one_in(12);
        let count = if long {
            random.pick(&[16, 32, 100, 256])
        } else {
            random.pick(&[1, 1, 1, 2, 3, 5])
        };
        let end = (block + count).min(if block == self.last {
            self.last + 1
        } else {
            self.blocks
        });
        let (mut first, mut end) = (block * SECTORS, end * SECTORS);
        if kind == OpKind::Write && random.one_in(3) {
            first += random.below(SECTORS);
            end = (first + 1 + random.below(end - first)).min(end);
        }
        (kind, first, end)
    }
}

pub(crate) fn stamp(bytes: &mut [u8], id: u64, sector: u64) {
    bytes.fill(id as u8);
    bytes[..8].copy_from_slice(&id.to_le_bytes());
    bytes[8..16].copy_from_slice(&sector.to_le_bytes());
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// The id of the write that a sector's bytes come from.
pub(crate) fn whose(bytes: &[u8], sector: u64) -> Result<u64, String> {
    let id = word(bytes, 0);
    if bytes.iter().all(|&b| b == 0) {
        return Ok(0);
    }
    let mut expected = [0; SECTOR];
    stamp(&mut expected, id, sector);
    if bytes != expected {
        return Err(format!(
            "sector {sector} returned bytes that nobody wrote there: id {id:#x}, address {}, then {:x?}",
            word(bytes, 8),
            &bytes[16..24]
        ));
    }
    Ok(id)
}

/// Fills with zeros what a payload names.
pub(crate) fn fill_zeros(data: Payload, len: u32) {
    // SAFETY: memory of an operation that has not been released; no device reads into holes.
    let missing = unsafe { data.pieces(len as usize, |ptr, n| ptr.write_bytes(0, n)) };
    assert_eq!(missing, 0, "a hole lies within the read's memory");
}

impl World {
    /// A slot is free: its guest asks for something.
    pub(super) fn submit(&mut self, slot: u32, life: u64) -> Checked {
        if life != self.guest.life || self.guest.left == 0 {
            return Ok(());
        }
        let mut delay = self.random.below(self.profile.think) + 1;
        if self.random.one_in(self.profile.pause) {
            delay += 7_000_000;
            self.count("pause");
        }
        self.after(delay, Event::Submit { slot, life });
        if self.guest.ops.contains_key(&slot) {
            return Ok(());
        }
        self.guest.left -= 1;
        let (kind, first, end) = self.guest.draw(&self.profile, &mut self.random);
        self.begin(slot, kind, first, end)
    }

    /// Begins an operation on sectors `first..end`.
    pub(super) fn begin(&mut self, slot: u32, kind: OpKind, first: u64, end: u64) -> Checked {
        self.clock += 1;
        self.stats.ops += 1;
        self.guest.ids += 1;
        let (id, begun) = (self.guest.ids << 8 | 0xa5, self.clock);
        let blocks = (end.div_ceil(SECTORS) - first / SECTORS) as usize;
        let data = matches!(kind, OpKind::Read | OpKind::Write);
        let memory = Arena::new(if data { blocks } else { 1 }).map_err(|e| e.to_string())?;
        match kind {
            OpKind::Write => (first..end).for_each(|s| self.checker.begin(s, id, begun)),
            OpKind::Zero { .. } => (first..end).for_each(|s| self.checker.begin(s, 0, begun)),
            OpKind::Read | OpKind::Flush => {}
        }
        note!(self, "op {slot} {kind:?} {first}..{end} id {id:x} begun {begun}");
        self.mark(&[10, self.now, first, end, id]);
        let op = Op {
            kind,
            first,
            end,
            begun,
            id,
            memory,
            crcs: Vec::new(),
            answered: false,
            alone: None,
        };
        self.guest.ops.insert(slot, op);
        self.send(slot)
    }

    /// Fills the operation's private memory from the guest and hands it to the mirror.
    fn send(&mut self, slot: u32) -> Checked {
        if self.mirror.is_none() || self.leaving > 0 {
            return Ok(());
        }
        let alone = self.alone(&self.guest.ops[&slot]);
        let op = self.guest.ops.get_mut(&slot).expect("an operation of that slot");
        op.alone = alone;
        let (kind, first, end) = (op.kind, op.first, op.end);
        let pages = op.memory.pages();
        op.crcs.clear();
        match kind {
            OpKind::Read => op.memory.bytes_mut(0, pages).fill(0xee),
            OpKind::Write => {
                let base = first / SECTORS * SECTORS;
                let bytes = op.memory.bytes_mut(0, pages);
                bytes.fill(0xdd);
                for sector in first..end {
                    let at = (sector - base) as usize * SECTOR;
                    stamp(&mut bytes[at..at + SECTOR], op.id, sector);
                }
                op.crcs.extend(bytes.chunks(BLOCK).map(crc32c));
            }
            OpKind::Zero { .. } | OpKind::Flush => {}
        }
        let (data, crcs) = (op.memory.payload(0), op.crcs.clone());
        let (offset, len) = (first * SECTOR as u64, (end - first) * SECTOR as u64);
        self.mirror(|mirror, out| mirror.submit(OpId(slot), kind, offset, len, data, &crcs, out))
    }

    /// Whether the owner believes that all chunks of a write have one copy left of two or more, and since when.
    fn alone(&self, op: &Op) -> Option<(u64, u32)> {
        let config = self.mirror.as_ref().filter(|_| self.attached)?.config();
        let one = |sector: u64| {
            let slots = &config.chunks[config.geometry.locate(sector * SECTOR as u64).0 as usize];
            slots.len() > 1
                && slots
                    .iter()
                    .filter(|slot| slot.state == SlotState::InSync)
                    .count()
                    == 1
        };
        let all = op.kind == OpKind::Write && (op.first..op.end).all(one);
        all.then_some((self.owner, config.config))
    }

    /// What was under way when the data plane died is submitted again.
    pub(super) fn resubmit(&mut self) -> Checked {
        let slots: Vec<u32> = self.guest.ops.keys().copied().collect();
        for slot in slots {
            self.send(slot)?;
        }
        Ok(())
    }

    /// The data plane died; with `guest` the guest did too, and starts anew.
    pub(super) fn guest_after_crash(&mut self, guest: bool) {
        self.clock += 1;
        let now = self.clock;
        for (slot, op) in std::mem::take(&mut self.guest.ops) {
            if op.answered {
                self.guest.buried.push(op.memory);
            } else if guest {
                for sector in op.first..op.end {
                    let id = if op.kind == OpKind::Write { op.id } else { 0 };
                    self.checker.failed(sector, id, op.begun, now);
                }
                self.guest.buried.push(op.memory);
            } else {
                self.guest.ops.insert(slot, op);
            }
        }
        if guest {
            self.guest.life += 1;
            self.begin_slots();
        }
    }

    /// Every slot begins to ask.
    pub(super) fn begin_slots(&mut self) {
        for slot in 0..self.profile.depth {
            let delay = self.random.below(self.profile.think) + 1;
            let life = self.guest.life;
            self.after(delay, Event::Submit { slot, life });
        }
    }

    pub(super) fn op_done(&mut self, slot: u32, result: Result<(), OpError>, released: bool) -> Checked {
        self.clock += 1;
        let now = self.clock;
        note!(self, "op {slot} done {result:?} at {now}");
        self.mark(&[11, self.now, u64::from(slot), u64::from(result.is_ok())]);
        let horizon = self
            .guest
            .ops
            .values()
            .filter(|op| !op.answered)
            .map(|op| op.begun)
            .min();
        let there = self.guest.ops.get(&slot).ok_or("an answer to no operation")?;
        // With one copy left a write is flushed before it is acknowledged.
        let durable = result.is_ok() && there.alone.is_some() && self.alone(there) == there.alone;
        let op = self.guest.ops.get_mut(&slot).ok_or("an answer to no operation")?;
        if std::mem::replace(&mut op.answered, true) {
            return Err(format!("operation {slot} was answered twice"));
        }
        let (kind, begun, id) = (op.kind, op.begun, op.id);
        if let Err(error) = result {
            self.stats.ops_failed += 1;
            let p = &self.profile;
            let excused = match error {
                OpError::Io => p.damage == Damage::Beyond || p.injured(),
                OpError::NoSpace => p.disk_bytes < 8 << 20 || p.device_full != 0,
                OpError::TimedOut => p.io_timeout_ms != 0,
                OpError::Gone => self.failed || self.leaving > 0,
                OpError::Invalid => false,
            };
            if !excused {
                return Err(format!(
                    "operation {slot} {kind:?} failed without excuse: {error:?}"
                ));
            }
        }
        match (kind, result) {
            (OpKind::Read, Ok(())) => {
                let bytes = op.memory.bytes(0, op.memory.pages());
                for sector in op.first..op.end {
                    let at = (sector - op.first) as usize * SECTOR;
                    let id = whose(&bytes[at..at + SECTOR], sector)?;
                    self.checker.read(sector, id, begun, now)?;
                }
                self.stats.sectors_judged = self.checker.judged;
            }
            (OpKind::Write | OpKind::Zero { .. }, _) => {
                let id = if kind == OpKind::Write { id } else { 0 };
                for sector in op.first..op.end {
                    match result {
                        Ok(()) => {
                            self.checker.acked(sector, id, begun, now, horizon.unwrap_or(now));
                            if durable {
                                self.checker.durable(sector, begun);
                            }
                        }
                        Err(_) => self.checker.failed(sector, id, begun, now),
                    }
                }
            }
            (OpKind::Flush, Ok(())) => self.checker.flushed(begun),
            (OpKind::Read | OpKind::Flush, Err(_)) => {}
        }
        if released { self.op_released(slot) } else { Ok(()) }
    }

    pub(super) fn op_released(&mut self, slot: u32) -> Checked {
        let mut op = self.guest.ops.remove(&slot).ok_or("a release of no operation")?;
        if !op.answered {
            return Err("an operation was released before it was answered".into());
        }
        let pages = op.memory.pages();
        op.memory.bytes_mut(0, pages).fill(0x77);
        self.guest.buried.push(op.memory);
        Ok(())
    }

    /// Completes the edge blocks of an unaligned write with what they held.
    pub(super) fn merge(&mut self, slot: u32, head: Option<Payload>, tail: Option<Payload>) -> Checked {
        let Some(op) = self.guest.ops.get_mut(&slot) else {
            return Ok(());
        };
        let (first, end) = (op.first, op.end);
        let last = op.memory.pages() - 1;
        let mut complete = |page: Payload, block: usize| {
            let mut old = Vec::with_capacity(BLOCK);
            // SAFETY: the mirror keeps the page until `merged`, and no device is writing it.
            let missing = unsafe {
                page.pieces(BLOCK, |ptr, n| {
                    old.extend_from_slice(std::slice::from_raw_parts(ptr, n))
                })
            };
            assert_eq!(missing, 0, "an edge is a block");
            let bytes = op.memory.bytes_mut(block, 1);
            for (i, there) in bytes.chunks_mut(SECTOR).enumerate() {
                let sector = (first / SECTORS + block as u64) * SECTORS + i as u64;
                if sector < first || sector >= end {
                    there.copy_from_slice(&old[i * SECTOR..(i + 1) * SECTOR]);
                }
            }
            crc32c(bytes)
        };
        let head = head.map(|page| complete(page, 0));
        let tail = tail.map(|page| complete(page, last));
        self.count("edges merged");
        self.mirror(|mirror, out| mirror.merged(OpId(slot), head, tail, out))
    }
}
