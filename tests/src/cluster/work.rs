//! Guests: one on each node that believes to be the owner. What they ask for is drawn as in `sim::work`, stamped alike, and
//! judged by one checker for all. When the data plane's process dies and returns as the owner, what was under way is
//! submitted again; when another node has become the owner, the guest is killed.

use unibody_dataplane::checksum::crc32c;
use unibody_dataplane::ids::{BLOCK, CHUNK};
use unibody_dataplane::memory::{Arena, Payload};
use unibody_dataplane::mirror::{OpError, OpId, OpKind};

use super::world::{Cluster, Event};
use crate::sim::disk::{SECTOR, gather};
use crate::sim::work::{SECTORS, stamp, whose};
use crate::sim::world::{Checked, note};

/// A guest's operation.
pub(super) struct Op {
    kind: OpKind,
    first: u64,
    end: u64,
    begun: u64,
    id: u64,
    memory: Arena,
    crcs: Vec<u32>,
    answered: bool,
}

impl Op {
    /// The id that the sectors it changes have afterwards.
    fn mark(&self) -> Option<u64> {
        match self.kind {
            OpKind::Write => Some(self.id),
            OpKind::Zero { .. } => Some(0),
            OpKind::Read | OpKind::Flush => None,
        }
    }
}

impl Cluster {
    /// A guest's slot is free: it asks for something.
    pub(super) fn submit(&mut self, node: usize, slot: u32, life: u64) -> Checked {
        if life != self.sites[node].guest_life || self.left == 0 {
            return Ok(());
        }
        let delay = self.random.below(self.profile.base.think) + 1;
        self.after(delay, Event::Submit { node, slot, life });
        let quiet = self.sites[node]
            .owner
            .is_none_or(|id| self.owners[&id].leaving.is_some());
        if quiet || !self.sites[node].running() || self.sites[node].ops.contains_key(&slot) {
            return Ok(());
        }
        self.left -= 1;
        if let Some(id) = self.sites[node].owner {
            self.load.resized(self.owners[&id].size);
        }
        let (kind, first, end) = self.load.draw(&self.profile.base, &mut self.random);
        if end > u64::from(self.profile.base.width) * CHUNK / SECTOR as u64 {
            self.count("operation on what was added");
        }
        self.begin(node, slot, kind, first, end)
    }

    /// Begins an operation on sectors `first..end`.
    pub(super) fn begin(&mut self, node: usize, slot: u32, kind: OpKind, first: u64, end: u64) -> Checked {
        self.clock += 1;
        self.stats.ops += 1;
        self.ids += 1;
        let (id, begun) = (self.ids << 8 | 0xa5, self.clock);
        let blocks = (end.div_ceil(SECTORS) - first / SECTORS) as usize;
        let data = matches!(kind, OpKind::Read | OpKind::Write);
        let memory = Arena::new(if data { blocks } else { 1 }).map_err(|e| e.to_string())?;
        let op = Op {
            kind,
            first,
            end,
            begun,
            id,
            memory,
            crcs: Vec::new(),
            answered: false,
        };
        if let Some(id) = op.mark() {
            (first..end).for_each(|sector| self.checker.begin(sector, id, begun));
        }
        note!(
            self,
            "node {node} op {slot} {kind:?} {first}..{end} id {id:x} begun {begun}"
        );
        self.mark(&[10, self.now, node as u64, first, end, id]);
        self.sites[node].ops.insert(slot, op);
        self.send(node, slot)
    }

    /// Fills the operation's private memory from the guest and hands it to the mirror.
    fn send(&mut self, node: usize, slot: u32) -> Checked {
        let Some(owner) = self.sites[node].owner else {
            return Ok(());
        };
        let op = self.sites[node]
            .ops
            .get_mut(&slot)
            .expect("an operation of that slot");
        let (kind, first, end) = (op.kind, op.first, op.end);
        let pages = op.memory.pages();
        op.crcs.clear();
        let bytes = op.memory.bytes_mut(0, pages);
        match kind {
            OpKind::Read => bytes.fill(0xee),
            OpKind::Write => {
                bytes.fill(0xdd);
                for sector in first..end {
                    let at = (sector - first / SECTORS * SECTORS) as usize * SECTOR;
                    stamp(&mut bytes[at..at + SECTOR], op.id, sector);
                }
                op.crcs.extend(bytes.chunks(BLOCK).map(crc32c));
            }
            OpKind::Zero { .. } | OpKind::Flush => {}
        }
        let (data, crcs) = (op.memory.payload(0), op.crcs.clone());
        let (offset, len) = (first * SECTOR as u64, (end - first) * SECTOR as u64);
        self.mirror(owner, |mirror, out| {
            mirror.submit(OpId(slot), kind, offset, len, data, &crcs, out)
        })
    }

    /// What was under way when the data plane died is submitted again.
    pub(super) fn resubmit(&mut self, node: usize) -> Checked {
        let slots: Vec<u32> = self.sites[node].ops.keys().copied().collect();
        for slot in slots {
            if self.sites[node].ops.contains_key(&slot) {
                self.send(node, slot)?;
            }
        }
        Ok(())
    }

    /// A guest starts.
    pub(super) fn guest_starts(&mut self, node: usize) {
        let site = &mut self.sites[node];
        site.guest = true;
        site.guest_life += 1;
        let life = site.guest_life;
        for slot in 0..self.profile.base.depth {
            let delay = self.random.below(self.profile.base.think) + 1;
            self.after(delay, Event::Submit { node, slot, life });
        }
    }

    /// A guest is no more: what it had under way may have happened.
    pub(super) fn guest_dies(&mut self, node: usize) {
        self.clock += 1;
        let now = self.clock;
        let site = &mut self.sites[node];
        site.guest = false;
        site.guest_life += 1;
        for (_, op) in std::mem::take(&mut site.ops) {
            if let (Some(id), false) = (op.mark(), op.answered) {
                (op.first..op.end).for_each(|sector| self.checker.failed(sector, id, op.begun, now));
            }
            self.buried.push(op);
        }
    }

    /// The data plane is no more, its guest is: memory that was not given back stays as it is.
    pub(super) fn bury_answered(&mut self, node: usize) {
        for (slot, op) in std::mem::take(&mut self.sites[node].ops) {
            match op.answered {
                true => self.buried.push(op),
                false => drop(self.sites[node].ops.insert(slot, op)),
            }
        }
    }

    pub(super) fn op_done(
        &mut self,
        owner: u64,
        slot: u32,
        result: Result<(), OpError>,
        released: bool,
    ) -> Checked {
        self.clock += 1;
        let now = self.clock;
        let node = self.owners[&owner].node;
        note!(self, "node {node} op {slot} done {result:?} at {now}");
        self.mark(&[
            11,
            self.now,
            node as u64,
            u64::from(slot),
            u64::from(result.is_ok()),
        ]);
        let open = self
            .sites
            .iter()
            .flat_map(|site| site.ops.values())
            .filter(|op| !op.answered);
        let horizon = open.map(|op| op.begun).min().unwrap_or(now);
        let newest = self.raft.state.volumes[super::world::NAME].generation;
        if result.is_ok() && self.owners[&owner].generation < newest {
            self.count("answered by an old owner");
        }
        let op = self.sites[node]
            .ops
            .get_mut(&slot)
            .ok_or("an answer to no operation")?;
        if std::mem::replace(&mut op.answered, true) {
            return Err(format!("operation {slot} was answered twice"));
        }
        let (kind, begun, first, end) = (op.kind, op.begun, op.first, op.end);
        if let Err(error) = result {
            self.stats.ops_failed += 1;
            let excused = match error {
                OpError::TimedOut => self.profile.base.io_timeout_ms != 0,
                OpError::Gone => true,
                OpError::Io => self.profile.base.injured(),
                OpError::NoSpace => self.profile.base.device_full != 0,
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
                let op = &self.sites[node].ops[&slot];
                let bytes = op.memory.bytes(0, op.memory.pages());
                for sector in first..end {
                    let at = (sector - first) as usize * SECTOR;
                    let id = whose(&bytes[at..at + SECTOR], sector)?;
                    self.checker
                        .read(sector, id, begun, now)
                        .map_err(|e| format!("node {node}: {e}"))?;
                }
                self.stats.sectors_judged = self.checker.judged;
            }
            (OpKind::Write | OpKind::Zero { .. }, _) => {
                let id = op.mark().expect("it changes something");
                for sector in first..end {
                    match result {
                        Ok(()) => self.checker.acked(sector, id, begun, now, horizon),
                        Err(_) => self.checker.failed(sector, id, begun, now),
                    }
                }
            }
            (OpKind::Flush, Ok(())) => self.checker.flushed(begun),
            (OpKind::Read | OpKind::Flush, Err(_)) => {}
        }
        if released {
            self.op_released(node, slot)
        } else {
            Ok(())
        }
    }

    /// After a loss of power was judged: what guests have under way is not lost, it only waits.
    pub(super) fn keep_under_way(&mut self) {
        for op in self
            .sites
            .iter()
            .flat_map(|site| site.ops.values())
            .filter(|op| !op.answered)
        {
            if let Some(id) = op.mark() {
                (op.first..op.end).for_each(|sector| self.checker.under_way(sector, id, op.begun));
            }
        }
    }

    pub(super) fn op_released(&mut self, node: usize, slot: u32) -> Checked {
        let mut op = self.sites[node]
            .ops
            .remove(&slot)
            .ok_or("a release of no operation")?;
        if !op.answered {
            return Err("an operation was released before it was answered".into());
        }
        let pages = op.memory.pages();
        op.memory.bytes_mut(0, pages).fill(0x77);
        self.buried.push(op);
        Ok(())
    }

    /// Completes the edge blocks of an unaligned write with what they held.
    pub(super) fn merge(
        &mut self,
        owner: u64,
        slot: u32,
        head: Option<Payload>,
        tail: Option<Payload>,
    ) -> Checked {
        let Some(node) = self.owners.get(&owner).map(|owner| owner.node) else {
            return Ok(());
        };
        let Some(op) = self.sites[node].ops.get_mut(&slot) else {
            return Ok(());
        };
        let (first, end) = (op.first, op.end);
        let last = op.memory.pages() - 1;
        let mut complete = |page: Payload, block: usize| {
            let old = gather(page, BLOCK);
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
        self.mirror(owner, |mirror, out| mirror.merged(OpId(slot), head, tail, out))
    }
}
