//! Death and return: of disks, processes and power; partitions, pauses, and what happens when.

use std::collections::BTreeSet;

use unibody_control::state::{Command, ReplicaState};
use unibody_dataplane::ids::{BLOCK, BootId, PowerId};
use unibody_dataplane::mirror::Phase;
use unibody_dataplane::store::{OpenOptions, Store, layout::Layout};

use super::world::{Cluster, Event, NAME};
use crate::sim::world::{Checked, note};

impl Cluster {
    /// A node's process starts.
    pub(super) fn start(&mut self, node: usize, life: u64) -> Checked {
        if self.sites[node].life != life || self.sites[node].up || self.sites[node].gone.is_some() {
            return Ok(());
        }
        note!(self, "node {node} starts");
        self.mark(&[12, self.now, node as u64]);
        let site = &mut self.sites[node];
        site.up = true;
        site.life += 1;
        (site.lease_until, site.renew_at, site.grant, site.attaching) = (0, 0, None, None);
        for drive in 0..self.drives.len() {
            if self.drives[drive].node == node {
                self.open_drive(drive)?;
            }
        }
        self.raise_links(node);
        Ok(())
    }

    pub(super) fn open_drive(&mut self, drive: usize) -> Checked {
        let there = &mut self.drives[drive];
        if there.gone || there.store.is_some() {
            return Ok(());
        }
        there.turn += 1;
        there.boot = BootId(self.random.name());
        let options = OpenOptions {
            boot: there.boot,
            power: there.power,
            cache_bytes: self.profile.base.cache_bytes,
        };
        let (store, report) =
            Store::open(&mut there.disk, &options).map_err(|e| format!("disk {drive} does not open: {e}"))?;
        if !report.damage.is_empty() {
            return Err(format!("disk {drive} was found damaged: {:?}", report.damage));
        }
        there.store = Some(store);
        (there.failed, there.batched) = (false, false);
        let node = there.node;
        note!(self, "disk {drive} of node {node} opened");
        self.add("journal blocks replayed", report.replayed_blocks);
        self.report_boot(drive);
        self.tell_peers(drive);
        match self.sites[node].owner {
            Some(owner) => self.disk_up(owner, drive, true),
            None => Ok(()),
        }
    }

    pub(super) fn open(&mut self, drive: usize, turn: u64) -> Checked {
        if self.drives[drive].turn != turn || !self.sites[self.drives[drive].node].up {
            return Ok(());
        }
        self.open_drive(drive)
    }

    /// What served a disk is gone, with its I/O under way.
    fn drop_store(&mut self, drive: usize, power: Option<PowerId>) {
        let there = &mut self.drives[drive];
        match power {
            Some(power) => {
                there.disk.power_loss(&mut self.random);
                there.power = power;
            }
            None => there.disk.kill(&mut self.random),
        }
        there.store = None;
        there.turn += 1;
        (there.failed, there.batched) = (false, false);
        there.jobs.clear();
    }

    /// A disk is gone for a while.
    pub(super) fn lose_drive(&mut self, drive: usize, power: bool) -> Checked {
        if self.drives[drive].store.is_none() {
            return Ok(());
        }
        let power = power.then(|| PowerId(self.random.name()));
        self.drop_store(drive, power);
        self.tell_peers(drive);
        let turn = self.drives[drive].turn;
        let delay = self.random.range(1_000, 4_000_000);
        self.after(delay, Event::Open { drive, turn });
        match self.sites[self.drives[drive].node].owner {
            Some(owner) => self.disk_down(owner, drive),
            None => Ok(()),
        }
    }

    /// A node's process dies, or the node loses power.
    pub(super) fn stop(&mut self, node: usize, power: bool) -> Checked {
        let site = &mut self.sites[node];
        if !site.up && !power {
            return Ok(());
        }
        note!(self, "node {node} dies, power {power}");
        self.mark(&[13, self.now, node as u64, u64::from(power)]);
        let was_up = std::mem::take(&mut self.sites[node].up);
        let power_id = power.then(|| PowerId(self.random.name()));
        for drive in 0..self.drives.len() {
            if self.drives[drive].node == node {
                self.drop_store(drive, power_id);
            }
        }
        let site = &mut self.sites[node];
        site.life += 1;
        site.paused = 0;
        site.backlog.clear();
        if let Some(power) = power_id {
            site.power = power;
        }
        if was_up {
            self.drop_links(node, !power);
        }
        if let Some(owner) = self.sites[node].owner {
            self.end_owner(owner, power)?;
        }
        if power {
            self.guest_dies(node);
        }
        let life = self.sites[node].life;
        let most = self.random.pick(&[300_000, 3_000_000, 12_000_000]);
        let delay = self.random.range(10_000, most);
        self.after(delay, Event::Start { node, life });
        Ok(())
    }

    pub(super) fn resume(&mut self, node: usize, pause: u64) -> Checked {
        if self.sites[node].paused != pause {
            return Ok(());
        }
        note!(self, "node {node} goes on");
        self.sites[node].paused = 0;
        while let Some(event) = self.sites[node].backlog.pop_front() {
            self.handle(event)?;
            if self.sites[node].paused != 0 {
                return Ok(());
            }
        }
        for other in (0..self.sites.len()).filter(|&other| other != node) {
            self.unstall(node, other)?;
            self.unstall(other, node)?;
        }
        Ok(())
    }

    fn pause(&mut self, node: usize) {
        if !self.sites[node].running() {
            return;
        }
        self.count("process stood still");
        let pause = self.fresh();
        self.sites[node].paused = pause;
        let most = self.random.pick(&[500_000, 5_000_000, 15_000_000]);
        let delay = self.random.range(50_000, most);
        self.after(delay, Event::Resume { node, pause });
    }

    pub(super) fn mend(&mut self, cut: u64) -> Checked {
        let Some(pairs) = self.cuts.remove(&cut) else {
            return Ok(());
        };
        let mut both: BTreeSet<(usize, usize)> = pairs.clone();
        both.extend(pairs.iter().map(|&(a, b)| (b, a)));
        for (from, to) in both {
            self.unstall(from, to)?;
        }
        Ok(())
    }

    fn cut(&mut self) {
        let nodes = self.sites.len();
        let a = self.random.below(nodes as u64) as usize;
        let b = (a + 1 + self.random.below(nodes as u64 - 1) as usize) % nodes;
        let others: Vec<usize> = match self.random.one_in(2) {
            true => vec![b],
            false => (0..nodes).filter(|&n| n != a).collect(),
        };
        let way = self.random.below(3);
        let mut pairs = BTreeSet::new();
        for other in others {
            if way != 1 {
                pairs.insert((a, other));
            }
            if way != 2 {
                pairs.insert((other, a));
            }
        }
        self.count(if way == 0 {
            "partition"
        } else {
            "one-way partition"
        });
        let cut = self.fresh();
        self.cuts.insert(cut, pairs);
        let most = self.random.pick(&[500_000, 4_000_000, 12_000_000]);
        let delay = self.random.range(50_000, most);
        self.after(delay, Event::Mend { cut });
    }

    /// Every chunk that the disks are needed for has another copy that is believed by all, and no disk is about to be found
    /// silent: that would be a second loss at the same time.
    fn spare(&self, lost: &[usize]) -> bool {
        let quiet = self.owners.values().all(|owner| {
            let status = owner.mirror.status();
            !owner.proposing && status.lost == 0 && status.phase == Phase::Serving
        });
        let slow = self.drives.iter().any(|drive| drive.slow_until > self.now);
        let there = |uuid| {
            self.drive(uuid)
                .filter(|&d| self.drives[d].store.is_some() && !self.drives[d].failed && !lost.contains(&d))
        };
        quiet
            && !slow
            && self.cuts.is_empty()
            && self.raft.asks.is_empty()
            && self
                .sites
                .iter()
                .all(|site| site.running() || site.gone.is_some())
            && self.raft.state.volumes[NAME].chunks.iter().all(|slots| {
                slots
                    .iter()
                    .any(|slot| slot.state == ReplicaState::InSync && there(slot.disk.0).is_some())
            })
    }

    /// A disk is destroyed, declared so, and an empty one put in.
    fn destroy(&mut self, drive: usize) -> Checked {
        if self.drives[drive].gone
            || self.drives[drive].store.is_none()
            || self.drives.len() > 12
            || !self.spare(&[drive])
        {
            return Ok(());
        }
        note!(self, "disk {drive} destroyed");
        self.count("disk destroyed");
        let node = self.drives[drive].node;
        self.lose_drive(drive, true)?;
        self.drives[drive].gone = true;
        let disk = self.drives[drive].uuid;
        self.commit_now(Command::DiskOut { disk });
        self.add_drive(node);
        self.open_drive(self.drives.len() - 1)
    }

    /// The owner hears nobody, and nobody hears it.
    fn exile(&mut self) {
        let Some(id) = self.serving() else { return };
        let owner = self.owners[&id].node;
        let others = (0..self.sites.len()).filter(|&other| other != owner);
        let pairs = others.flat_map(|other| [(owner, other), (other, owner)]);
        let pairs = pairs.collect();
        self.count("owner cut off from all");
        let cut = self.fresh();
        self.cuts.insert(cut, pairs);
        let delay = self.random.range(12_000_000, 20_000_000);
        self.after(delay, Event::Mend { cut });
    }

    /// A node is gone for good. Until that is declared nothing else happens.
    fn lose_node(&mut self, node: usize) -> Checked {
        let on: Vec<usize> = (0..self.drives.len())
            .filter(|&d| self.drives[d].node == node)
            .collect();
        if self.sites.iter().any(|site| site.gone.is_some()) || !self.spare(&on) {
            return Ok(());
        }
        note!(self, "node {node} is gone for good");
        self.count("node gone for good");
        self.stop(node, true)?;
        self.sites[node].gone = Some(self.now);
        self.hush = true;
        Ok(())
    }

    /// Data of the victim rots.
    fn rot(&mut self) {
        let Some(victim) = self.victim else { return };
        let base = self.profile.base;
        let there = &mut self.drives[victim];
        let layout = Layout::plan(there.uuid.0, base.disk_bytes, Some(base.journal_bytes));
        let data = layout.expect("it was formatted").data / BLOCK as u64;
        let mut used = there.disk.used();
        used.retain(|&block| block >= data);
        if used.is_empty() {
            return;
        }
        let block = self.random.pick(&used);
        note!(self, "rot {victim} {block:x}");
        let what = self.drives[victim].disk.decay(block, true, &mut self.random);
        self.count(what);
    }

    /// Ten milliseconds of bad luck.
    pub(super) fn fault(&mut self) -> Checked {
        if !self.faulty {
            return Ok(());
        }
        self.after(10_000, Event::Fault);
        if self.hush {
            let declared = (0..self.sites.len()).all(|n| self.sites[n].gone.is_none() || self.declared(n));
            self.hush = !declared;
            return Ok(());
        }
        let p = self.profile;
        let node = self.random.below(self.sites.len() as u64) as usize;
        let drive = self.random.below(self.drives.len() as u64) as usize;
        let owner = self.serving().map(|id| self.owners[&id].node);
        // Mostly where there is something to lose.
        let node = if self.random.one_in(2) {
            owner.unwrap_or(node)
        } else {
            node
        };
        // Where data rots, nothing else takes the other copies away.
        let (node, lost) = match self.victim {
            Some(victim) => (self.drives[victim].node, victim),
            None => (node, drive),
        };
        let mut happens = |rate: u64| rate != 0 && self.random.below(rate) < 10;
        let (kill, power, blackout) = (happens(p.kill), happens(p.power), happens(p.blackout));
        let (pause, cut, isolate, snap) = (
            happens(p.pause),
            happens(p.cut),
            happens(p.isolate),
            happens(p.snap),
        );
        let (leader, stall, leave) = (happens(p.leader), happens(p.stall), happens(p.leave));
        let (loss, destroy, gone) = (happens(p.disk_loss), happens(p.destroy), happens(p.gone));
        if happens(p.base.rot) {
            self.rot();
        }
        let mut happens = |rate: u64| rate != 0 && self.random.below(rate) < 10;
        let (retire, zombie, stuck) = (happens(p.retire), happens(p.zombie), happens(p.base.stuck));
        let (resize, expand, drain) = (happens(p.resize), happens(p.expand), happens(p.drain));
        if stuck && self.drives[drive].store.is_some() {
            self.count("stuck disk");
            let until = self.now + self.random.range(100_000, 12_000_000);
            let there = &mut self.drives[drive];
            there.stuck_until = until;
            there.slow_until = there.slow_until.max(until);
        }
        if resize {
            self.resize();
        }
        if expand {
            self.expand(node)?;
        }
        if drain {
            self.drain(node)?;
        }
        if zombie && self.cuts.is_empty() {
            self.exile();
        }
        if retire {
            self.retire(drive)?;
        }
        if cut {
            self.cut();
        }
        if isolate && !self.sites[node].isolated {
            self.count("cut off from the quorum only");
            self.sites[node].isolated = true;
            let delay = self.random.range(500_000, 15_000_000);
            self.after(delay, Event::Rejoin { node });
        }
        if snap {
            let to = (node + 1 + self.random.below(self.sites.len() as u64 - 1) as usize) % self.sites.len();
            if self.sites[node].up {
                self.count("connection broken");
                self.snap(node, to);
            }
        }
        if leader {
            self.new_leader()?;
        }
        if stall {
            self.count("no quorum for a while");
            self.raft.stalled_until = self.now + self.random.range(500_000, 20_000_000);
        }
        if leave
            && let Some(id) = self.serving()
            && self.sites[self.owners[&id].node].running()
        {
            self.count("asked to let go");
            self.owners.get_mut(&id).expect("it serves").leaving = Some(self.now);
            self.mirror(id, |mirror, out| mirror.detach(out))?;
        }
        if loss {
            let power = self.random.one_in(2);
            self.count(if power { "disk lost power" } else { "disk lost" });
            self.lose_drive(lost, power)?;
        }
        if destroy {
            self.destroy(drive)?;
        }
        if gone {
            self.lose_node(node)?;
        }
        if pause {
            self.pause(node);
        }
        if kill && self.sites[node].up {
            self.count("process killed");
            self.stop(node, false)?;
        }
        if power && self.sites[node].up {
            self.count("node lost power");
            self.stop(node, true)?;
        }
        if blackout {
            let power = self.random.one_in(2);
            self.count(if power {
                "all nodes lost power"
            } else {
                "all nodes killed"
            });
            for node in 0..self.sites.len() {
                if self.sites[node].gone.is_none() {
                    self.stop(node, power)?;
                }
            }
        }
        Ok(())
    }

    /// Faults stop.
    pub(super) fn heal(&mut self) -> Checked {
        note!(self, "heal");
        self.faulty = false;
        self.raft.stalled_until = 0;
        for drive in &mut self.drives {
            drive.stuck_until = 0;
        }
        for node in 0..self.sites.len() {
            self.sites[node].isolated = false;
            let pause = self.sites[node].paused;
            if pause != 0 {
                self.resume(node, pause)?;
            }
        }
        self.end_drains()?;
        let cuts: Vec<u64> = self.cuts.keys().copied().collect();
        for cut in cuts {
            self.mend(cut)?;
        }
        Ok(())
    }
}
