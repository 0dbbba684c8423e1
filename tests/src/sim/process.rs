//! Death and return: of a disk, of the data plane's process, of the node's power; and the agent that moves replicas.

use unibody_control::planner;
use unibody_control::state::{Applied, Command, NodeId};
use unibody_dataplane::config::{Change, Slot, SlotState, VolumeConfig};
use unibody_dataplane::ids::{DiskUuid, PowerId};
use unibody_dataplane::mirror::{Limits, Mirror, Phase};
use unibody_dataplane::store::{OpenOptions, Store, layout::Layout};

use super::profile::Damage;
use super::world::{Checked, Event, NAME, World, note};

impl World {
    /// The data plane starts: opens its disks, attaches the volume, takes up what the guest has under way.
    pub(super) fn start(&mut self, owner: u64) -> Checked {
        if owner != self.owner || self.mirror.is_some() {
            return Ok(());
        }
        note!(self, "start {owner}");
        self.mark(&[6, self.now, owner]);
        self.leaving = 0;
        for node in 0..self.nodes.len() {
            if self.faulty && self.random.one_in(self.profile.absent) {
                self.count("disk away at the start");
                let boot = self.nodes[node].boot;
                let delay = self.random.range(1_000, 6_000_000);
                self.after(delay, Event::Open { node, boot });
                continue;
            }
            self.open_disk(node)?;
        }
        let attach = Command::Attach {
            name: NAME.into(),
            node: NodeId::LOCAL,
            generation: self.control.volumes[NAME].generation,
        };
        let Ok(Applied::Volume(config)) = self.control.apply(&attach) else {
            return Err("the control state refused an owner".into());
        };
        let limits = Limits {
            ops: self.profile.depth + 1,
            edges: 2,
            sync: 2,
            unstable_bytes: 1 << 20,
            scrub_ms: self.profile.scrub_ms,
            io_timeout_ms: self.profile.io_timeout_ms,
            ..Limits::default()
        };
        self.mirror = Some(Mirror::new(*config, limits));
        let now_ms = self.now / 1000;
        self.mirror(|mirror, out| mirror.tick(now_ms, out))?;
        for node in 0..self.nodes.len() {
            if self.nodes[node].store.is_some() && self.nodes[node].up {
                let uuid = self.nodes[node].uuid;
                self.mirror(|mirror, out| mirror.disk_up(uuid, true, out))?;
            }
        }
        self.mirror(|mirror, out| mirror.attach(out))?;
        self.resubmit()
    }

    /// Opens a disk and tells the mirror, if there is one.
    pub(super) fn open_disk(&mut self, node: usize) -> Checked {
        let (boot, crashing) = (
            self.new_boot(),
            self.faulty && self.random.one_in(self.profile.open_crash),
        );
        let calls = self.random.below(120);
        let there = &mut self.nodes[node];
        if there.gone || there.store.is_some() {
            return Ok(());
        }
        there.boot += 1;
        there.line += 1;
        there.disk.set_fuse(crashing.then_some(calls));
        let options = OpenOptions {
            boot,
            power: there.power,
            cache_bytes: self.profile.cache_bytes,
        };
        let opened = Store::open(&mut there.disk, &options);
        let blown = there.disk.blown();
        there.disk.set_fuse(None);
        match opened {
            Ok((store, report)) => {
                there.store = Some(store);
                (there.up, there.cut, there.failed, there.batched) = (true, false, false, false);
                (there.tags, there.reads) = Default::default();
                note!(self, "open {node} {report:?}");
                self.mark(&[
                    7,
                    self.now,
                    node as u64,
                    report.replayed_blocks,
                    report.in_doubt_regions,
                ]);
                self.add("journal blocks replayed", report.replayed_blocks);
                self.add("regions in doubt", report.in_doubt_regions);
                self.add("clean openings", u64::from(report.clean));
                self.add("damage found at opening", u64::from(!report.damage.is_empty()));
                if !report.damage.is_empty() && self.profile.damage == Damage::None {
                    return Err(format!("disk {node} was found damaged: {:?}", report.damage));
                }
                let uuid = self.nodes[node].uuid;
                self.mirror(|mirror, out| mirror.disk_up(uuid, true, out))
            }
            Err(error) if blown => {
                note!(self, "open {node} crashed: {error}");
                self.count("crash while opening");
                if self.random.one_in(3) && self.profile.power != 0 {
                    self.cut_power(node);
                }
                let boot = self.nodes[node].boot;
                let delay = self.random.range(1_000, 300_000);
                self.after(delay, Event::Open { node, boot });
                Ok(())
            }
            Err(error) => {
                if self.profile.damage == Damage::Within && node == self.victim {
                    self.count("disk beyond opening");
                    return self.replace(node);
                }
                Err(format!("disk {node} does not open: {error}"))
            }
        }
    }

    pub(super) fn open(&mut self, node: usize, boot: u64) -> Checked {
        if self.nodes[node].boot != boot || self.mirror.is_none() {
            return Ok(());
        }
        self.drop_store(node, false)?;
        self.open_disk(node)
    }

    fn cut_power(&mut self, node: usize) {
        let power = PowerId(self.random.name());
        let there = &mut self.nodes[node];
        there.disk.power_loss(&mut self.random);
        there.power = power;
        self.power_was_lost = true;
    }

    /// What served a disk is gone, with its I/O under way.
    fn drop_store(&mut self, node: usize, power: bool) -> Checked {
        if power {
            self.cut_power(node);
        } else {
            self.nodes[node].disk.kill(&mut self.random);
        }
        let there = &mut self.nodes[node];
        let up = std::mem::take(&mut there.up);
        there.store = None;
        there.boot += 1;
        there.line += 1;
        (there.cut, there.stuck, there.failed, there.batched) = (false, false, false, false);
        (there.tags, there.reads) = Default::default();
        let uuid = there.uuid;
        if up {
            self.mirror(|mirror, out| mirror.disk_down(uuid, out))?;
        }
        Ok(())
    }

    /// A disk is gone for a while.
    pub(super) fn lose_disk(&mut self, node: usize, power: bool) -> Checked {
        if self.nodes[node].store.is_none() || self.nodes[node].gone {
            return Ok(());
        }
        note!(self, "lose disk {node} power={power}");
        self.mark(&[8, self.now, node as u64, u64::from(power)]);
        self.drop_store(node, power)?;
        let boot = self.nodes[node].boot;
        let delay = self.random.range(1_000, 4_000_000);
        self.after(delay, Event::Open { node, boot });
        Ok(())
    }

    /// The connection of a disk breaks.
    fn disconnect(&mut self, node: usize) {
        let there = &mut self.nodes[node];
        if there.store.is_none() || !there.up || there.cut {
            return;
        }
        there.cut = true;
        there.line += 1;
        let line = there.line;
        self.count("disconnect");
        self.after(1_000, Event::Reach { node, line });
    }

    pub(super) fn reach(&mut self, node: usize, line: u64) -> Checked {
        let there = &mut self.nodes[node];
        if there.line != line || there.store.is_none() {
            return Ok(());
        }
        let uuid = there.uuid;
        if there.cut {
            if !there.tags.is_empty() {
                self.after(5_000, Event::Reach { node, line });
                return Ok(());
            }
            (there.cut, there.up) = (false, false);
            self.mirror(|mirror, out| mirror.disk_down(uuid, out))?;
            let delay = self.random.range(1_000, 500_000);
            self.after(delay, Event::Reach { node, line });
            return Ok(());
        }
        if !there.up {
            there.up = true;
            self.mirror(|mirror, out| mirror.disk_up(uuid, true, out))?;
        }
        Ok(())
    }

    /// The data plane dies: killed, or with the node's power. With the power, or if it was failed, the guest dies too.
    pub(super) fn crash(&mut self, power: bool, guest: bool) -> Checked {
        note!(self, "crash power={power} guest={guest}");
        self.mark(&[9, self.now, u64::from(power)]);
        let power_id = PowerId(self.random.name());
        for there in &mut self.nodes {
            if power {
                there.disk.power_loss(&mut self.random);
                there.power = power_id;
            } else {
                there.disk.kill(&mut self.random);
            }
        }
        if self.mirror.is_some() {
            self.gather();
        }
        for there in &mut self.nodes {
            there.store = None;
            there.boot += 1;
            there.line += 1;
            (there.up, there.cut, there.stuck, there.failed, there.batched) =
                (false, false, false, false, false);
            (there.tags, there.reads) = Default::default();
        }
        self.mirror = None;
        self.attached = false;
        self.owner += 1;
        if power {
            self.power_was_lost = true;
        }
        self.guest_after_crash(power || guest);
        if power && self.profile.volatile {
            self.clock += 1;
            self.checker.power_lost(self.clock);
        }
        let owner = self.owner;
        let delay = self.random.range(10_000, 500_000);
        self.after(delay, Event::Start { owner });
        Ok(())
    }

    /// A clean restart begins.
    fn leave(&mut self) -> Checked {
        if self.leaving > 0
            || self
                .mirror
                .as_ref()
                .is_none_or(|mirror| mirror.phase() != Phase::Serving)
        {
            return Ok(());
        }
        self.count("clean restart");
        self.leaving = 1;
        let owner = self.owner;
        self.after(10_000, Event::Leave { owner, patience: 500 });
        self.mirror(|mirror, out| mirror.detach(out))
    }

    pub(super) fn go_on_leaving(&mut self, owner: u64, patience: u64) -> Checked {
        if owner != self.owner {
            return Ok(());
        }
        let detached = self
            .mirror
            .as_ref()
            .is_some_and(|mirror| mirror.phase() == Phase::Detached);
        if detached && self.leaving == 1 {
            self.leaving = 2;
            for node in 0..self.nodes.len() {
                self.store(node, |store, out| store.close(out))?;
            }
        }
        let closed = self.nodes.iter().all(|node| node.store.is_none() || node.failed);
        if detached && closed && self.leaving == 2 || patience == 0 {
            self.count(if patience == 0 {
                "impatient restart"
            } else {
                "closed"
            });
            return self.crash(false, false);
        }
        self.after(
            10_000,
            Event::Leave {
                owner,
                patience: patience - 1,
            },
        );
        Ok(())
    }

    /// A disk is taken away for good and an empty one put in, if every chunk has a copy elsewhere.
    pub(super) fn replace(&mut self, node: usize) -> Checked {
        let (uuid, serving) = (self.nodes[node].uuid, |world: &Self, disk| {
            world.node(disk).is_some_and(|n| {
                let there = &world.nodes[n];
                !there.gone && (there.store.is_some() && there.up && !there.failed || world.mirror.is_none())
            })
        });
        let safe = self.config().chunks.iter().all(|slots| {
            !slots.iter().any(|slot| slot.disk == uuid)
                || slots.iter().any(|slot| {
                    slot.disk != uuid && slot.state == SlotState::InSync && serving(self, slot.disk)
                })
        });
        if !safe || self.nodes[node].gone || self.nodes.len() > 8 {
            return Ok(());
        }
        note!(self, "replace {node}");
        self.count("disk replaced");
        self.drop_store(node, false)?;
        self.nodes[node].gone = true;
        let out = Command::DiskOut { disk: uuid };
        self.control.apply(&out).map_err(|e| e.to_string())?;
        let profile = self.profile;
        let fresh = Self::fresh_node(&profile, &mut self.random, &mut self.control);
        self.nodes.push(fresh);
        if self.mirror.is_some() {
            self.open_disk(self.nodes.len() - 1)?;
        }
        Ok(())
    }

    /// After a promotion: the fate of the disk that was copied from.
    pub(super) fn betray(&mut self, before: &VolumeConfig, command: &Command) {
        let Command::Propose { proposal, .. } = command else {
            return;
        };
        let Change::MarkInSync { disk, chunks, .. } = &proposal.change else {
            return;
        };
        let after = self.config();
        let source = chunks.iter().find_map(|&c| {
            let slots = &before.chunks[c as usize];
            let was = slots.iter().find(|slot| slot.disk == *disk)?;
            let is = after.chunks[c as usize].iter().find(|slot| slot.disk == *disk)?;
            if (was.state, is.state) != (SlotState::Rebuilding, SlotState::InSync) {
                return None;
            }
            let other = slots
                .iter()
                .find(|slot| slot.state == SlotState::InSync && slot.disk != *disk)?;
            Some(other.disk)
        });
        if let Some(disk) = source
            && self.faulty
            && self.random.one_in(self.profile.betrayal)
        {
            let delay = self.random.below(2_000);
            self.after(delay, Event::Betrayal { disk, power: false });
        }
    }

    pub(super) fn betrayal(&mut self, disk: DiskUuid, power: bool) -> Checked {
        if !self.faulty {
            return Ok(());
        }
        if power {
            self.count("power lost");
            return self.crash(true, false);
        }
        let Some(node) = self.node(disk) else {
            return Ok(());
        };
        self.replace(node)?;
        if self.nodes[node].gone {
            self.count("disk copied from destroyed");
            let delay = self.random.below(30_000);
            self.after(delay, Event::Betrayal { disk, power: true });
        }
        Ok(())
    }

    /// Gives the places of replicas on disks that are out, or full, to others.
    pub(super) fn agent(&mut self) -> Checked {
        for node in 0..self.nodes.len() {
            let uuid = self.nodes[node].uuid;
            let moves = planner::plan_moves(&self.control, NAME, uuid, !self.nodes[node].gone);
            if moves.is_empty() {
                continue;
            }
            let volume = &self.control.volumes[NAME];
            let command = Command::Move {
                name: NAME.into(),
                generation: volume.generation,
                config: volume.config,
                from: uuid,
                to: moves,
            };
            note!(self, "{command:?}");
            self.count("replicas moved");
            let Ok(Applied::Volume(config)) = self.control.apply(&command) else {
                return Err("the control state refused what its planner proposed".into());
            };
            self.mirror(|mirror, out| mirror.reconfigured(*config, out))?;
        }
        Ok(())
    }

    /// Ten milliseconds of bad luck.
    pub(super) fn fault(&mut self) -> Checked {
        if !self.faulty {
            return Ok(());
        }
        self.after(10_000, Event::Fault);
        let mut p = self.profile;
        let node = self.random.below(self.nodes.len() as u64) as usize;
        // A disk destroyed for good and, before its replicas are committed stale, the power of the others: no owner may
        // decide that alone, and there is no command yet by which an operator does.
        let owed = |slot: &Slot| {
            slot.state == SlotState::InSync && self.node(slot.disk).is_none_or(|n| self.nodes[n].gone)
        };
        if self.config().chunks.iter().flatten().any(owed) {
            (p.power, p.disk_loss, p.flush_error) = (0, 0, 0);
        }
        let mut happens = |rate: u64| rate != 0 && self.random.below(rate) < 10;
        let (kill, power, restart) = (happens(p.kill), happens(p.power), happens(p.restart));
        let (loss, cut, replace) = (happens(p.disk_loss), happens(p.disconnect), happens(p.replace));
        let (stuck, rot) = (happens(p.stuck), happens(p.rot));
        if rot {
            self.rot();
        }
        if stuck && self.nodes[node].store.is_some() {
            self.count("stuck disk");
            self.nodes[node].stuck = true;
        }
        if cut {
            self.disconnect(node);
        }
        if loss {
            let power = p.power != 0 && self.random.one_in(2);
            self.count(if power { "disk lost power" } else { "disk lost" });
            self.lose_disk(node, power)?;
        }
        if replace {
            self.replace(node)?;
        }
        if restart {
            self.leave()?;
        }
        // Mostly where there is something to lose; sometimes in the middle of an attachment.
        if (kill || power) && (self.attached || self.random.one_in(8)) {
            self.count(if power { "power lost" } else { "killed" });
            self.crash(power, false)?;
        }
        Ok(())
    }

    /// Something rots, within what the profile allows.
    fn rot(&mut self) {
        let within = self.profile.damage == Damage::Within;
        let node = if within {
            self.victim
        } else {
            self.random.below(self.nodes.len() as u64) as usize
        };
        let there = &mut self.nodes[node];
        if there.gone {
            return;
        }
        let layout = Layout::plan(
            there.uuid.0,
            self.profile.disk_bytes,
            Some(self.profile.journal_bytes),
        );
        let data = layout.expect("it was formatted").data / 4096;
        let anywhere = within && self.random.one_in(3);
        let used: Vec<u64> = there
            .disk
            .used()
            .into_iter()
            .filter(|&block| anywhere || block >= data)
            .collect();
        if used.is_empty() {
            return;
        }
        let block = used[self.random.below(used.len() as u64) as usize];
        if within && self.profile.weak > 0 {
            if block >= data && self.weak < self.profile.weak {
                note!(self, "weak {node} {block:x}");
                self.weak += 1;
                self.nodes[node].disk.weaken(block);
                self.count("weak block");
            }
            return;
        }
        note!(self, "rot {node} {block:x}");
        let what = self.nodes[node]
            .disk
            .decay(block, block >= data, &mut self.random);
        self.count(what);
    }

    /// Faults stop.
    pub(super) fn heal(&mut self) {
        note!(self, "heal");
        self.faulty = false;
        for there in &mut self.nodes {
            there.stuck = false;
        }
    }

    /// Sums up what the code under test counts, before it is gone.
    pub(super) fn gather(&mut self) {
        let Some(mirror) = &self.mirror else { return };
        let status = mirror.status();
        self.add("read repairs", status.read_repairs);
        self.add("blocks adopted", status.blocks_adopted);
        self.add("blocks lost", status.blocks_lost);
        self.add("operations timed out", status.errors_timeout);
        self.add("operations without room", status.errors_no_space);
        self.add("operations failed", status.errors_io);
        self.add("bytes made equal", status.bytes_synced);
        for node in 0..self.nodes.len() {
            let Some(stats) = self.nodes[node].store.as_ref().map(Store::stats) else {
                continue;
            };
            self.add("checkpoints", stats.checkpoints);
            self.add("chunks marked clean", stats.cleaned);
            self.add("slots freed", stats.freed);
            self.add("checksum mismatches", stats.mismatches);
            self.add("record pages loaded", stats.cache_misses);
            self.add("device flushes", stats.device_flushes);
        }
    }
}
