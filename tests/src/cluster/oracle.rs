//! A whole run, and what must hold when its faults have ended.

use std::collections::BTreeSet;

use unibody_control::cluster::goes;
use unibody_control::state::{Replica, ReplicaState};
use unibody_dataplane::config::SlotState;
use unibody_dataplane::ids::{ChunkKey, REGIONS_PER_CHUNK, Version};
use unibody_dataplane::mirror::{OpKind, Phase};
use unibody_dataplane::replica::{ChunkRef, ExtentImage, Header, Reply, Request};
use unibody_dataplane::store::{Verdict, check};

use super::world::{Cluster, Event, Job, NAME};
use crate::sim::trace::brief;
use crate::sim::work::SECTORS;
use crate::sim::world::Checked;

/// Virtual time within which everything must be in order again.
const HEAL_MS: u64 = 180_000;
/// Virtual time within which the load must have ended.
const LOAD_MS: u64 = 120_000;

impl Cluster {
    /// The whole run.
    pub(super) fn run(&mut self) -> Checked {
        for node in 0..self.sites.len() {
            let life = self.sites[node].life;
            self.after(0, Event::Start { node, life });
            self.after(1_000 + node as u64, Event::Tick { node });
        }
        self.after(2_000, Event::Elect);
        self.after(1_000_000, Event::Fault);
        while self.left > 0 && self.now < LOAD_MS * 1000 {
            self.step()?;
        }
        self.left = 0;
        // A node that has gone is declared so first.
        while self.hush {
            self.step()?;
        }
        self.heal()?;
        let until = self.now + HEAL_MS * 1000;
        let mut quiet = 0;
        while quiet < 2 {
            let second = self.now + 1_000_000;
            while self.now < second {
                self.step()?;
            }
            quiet = if self.healed() { quiet + 1 } else { 0 };
            if self.now > until {
                return Err(self.ailing());
            }
        }
        self.read_everything()?;
        self.verified()?;
        self.compare()?;
        self.close_and_check()
    }

    fn healed(&self) -> bool {
        let Some(id) = self.serving() else { return false };
        let status = self.owners[&id].mirror.status();
        let alive = self.sites.iter().filter(|site| site.gone.is_none());
        self.owners.len() == 1
            && self.raft.asks.is_empty()
            && self.drives.iter().all(|drive| !drive.failed)
            && self.sites.iter().all(|site| site.ops.is_empty())
            && alive
                .clone()
                .all(|site| site.up && site.applied == self.raft.log.len())
            && status.unavailable == 0
            && !status.degraded
            && status.regions_unsettled == 0
            && self.raft.state.volumes[NAME]
                .chunks
                .iter()
                .all(|slots| self.placed(slots))
    }

    /// As many copies as there are to be, all in sync, none on a disk that was taken out if there is another place.
    fn placed(&self, slots: &[Replica]) -> bool {
        let state = &self.raft.state;
        slots.len() == state.volumes[NAME].mirror as usize
            && slots.iter().all(|slot| {
                let leaves = state.disks[&slot.disk].out;
                slot.state == ReplicaState::InSync && !(leaves && goes(state, slot.disk))
            })
    }

    fn ailing(&self) -> String {
        let owners: Vec<_> = self
            .owners
            .values()
            .map(|o| (o.node, o.generation, o.mirror.status()))
            .collect();
        let sites: Vec<_> = self
            .sites
            .iter()
            .map(|s| (s.up, s.gone, s.applied, s.ops.len()))
            .collect();
        format!(
            "not in order {HEAL_MS} ms after the faults ended: owners {owners:?}, nodes {sites:?} of {}, asks {:?}, volume {:?}",
            self.raft.log.len(),
            self.raft.asks,
            self.raft.state.volumes[NAME]
        )
    }

    /// Every block that was ever touched, against its history.
    fn read_everything(&mut self) -> Checked {
        let mut blocks: Vec<u64> = self
            .checker
            .touched()
            .iter()
            .map(|sector| sector / SECTORS)
            .collect();
        blocks.dedup();
        let mut at = 0;
        while at < blocks.len() {
            let mut end = at + 1;
            while end < blocks.len() && end - at < 16 && blocks[end] == blocks[end - 1] + 1 {
                end += 1;
            }
            let owner = self.serving().ok_or("the owner went while everything was read")?;
            let node = self.owners[&owner].node;
            self.begin(
                node,
                0,
                OpKind::Read,
                blocks[at] * SECTORS,
                (blocks[end - 1] + 1) * SECTORS,
            )?;
            let until = self.now + 60_000_000;
            while self.sites[node].ops.contains_key(&0) {
                self.step()?;
                if self.now > until {
                    return Err("a last read was not answered".into());
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Where data rots, the scrub has been everywhere since the last of it.
    fn verified(&mut self) -> Checked {
        if self.victim.is_none() {
            return Ok(());
        }
        let id = self
            .serving()
            .ok_or("the owner went before everything was verified")?;
        let regions = self.raft.state.volumes[NAME].chunks.len() * REGIONS_PER_CHUNK;
        let enough = self.owners[&id].mirror.status().regions_verified + regions as u64 + 2;
        let until = self.now + HEAL_MS * 1000;
        while self
            .owners
            .get(&id)
            .is_some_and(|owner| owner.mirror.status().regions_verified < enough)
        {
            self.step()?;
            if self.now > until {
                return Err("the scrub does not come round".into());
            }
        }
        Ok(())
    }

    /// Asks a store directly.
    fn ask_directly(&mut self, drive: usize, request: Request) -> Result<Reply, String> {
        let config = self.raft.state.volumes[NAME].to_config();
        let header = Header {
            volume: config.id,
            generation: config.generation,
            stable: Version::ZERO,
        };
        self.asked = None;
        self.ask_store(drive, header, request, Job::Oracle)?;
        let until = self.now + 60_000_000;
        loop {
            if let Some(reply) = self.asked.take() {
                return Ok(reply);
            }
            self.step()?;
            if self.now > until {
                return Err(format!("disk {drive} does not answer"));
            }
        }
    }

    /// The replicas hold the same, and what they hold is sound.
    fn compare(&mut self) -> Checked {
        let config = self.raft.state.volumes[NAME].to_config();
        let touched = self.checker.touched();
        let places = touched.iter().map(|sector| config.geometry.locate(sector * 512));
        let mut regions: Vec<(u32, u8)> = places.map(|(chunk, at)| (chunk, (at >> 20) as u8)).collect();
        regions.sort_unstable();
        regions.dedup();
        for (chunk, region) in regions {
            let mut first: Option<(usize, Vec<ExtentImage>)> = None;
            for slot in &config.chunks[chunk as usize] {
                let drive = self.drive(slot.disk).ok_or("a replica on an unknown disk")?;
                // The scrub gives up a replica whose blocks do not stay good, and there may be no other place.
                if self.victim == Some(drive) && slot.state == SlotState::Stale {
                    continue;
                }
                let key = ChunkKey {
                    volume: config.id,
                    layer: config.head,
                    chunk,
                };
                let chunk = ChunkRef {
                    key,
                    incarnation: slot.incarnation,
                };
                let reply = self.ask_directly(
                    drive,
                    Request::Digest {
                        chunk,
                        region,
                        verify: true,
                    },
                )?;
                let Reply::Digest { extents, .. } = &reply else {
                    return Err(format!("disk {drive} answers a digest with {}", brief(&reply)));
                };
                if extents.iter().any(|extent| extent.bad != 0) {
                    return Err(format!(
                        "disk {drive} has bad blocks after healing: {}",
                        brief(&reply)
                    ));
                }
                // Absent and zero read alike where there is one layer: a slot may have been freed in between.
                let images: Vec<_> = extents
                    .iter()
                    .map(|extent| match extent.image {
                        image if image.valid | image.lost != 0 => ExtentImage { zero: 0, ..image },
                        _ => ExtentImage::default(),
                    })
                    .collect();
                match &first {
                    Some((other, there)) if *there != images => {
                        return Err(format!(
                            "{key:?} region {region}: disks {other} and {drive} differ: {there:x?} and {images:x?}"
                        ));
                    }
                    Some(_) => {}
                    None => first = Some((drive, images)),
                }
            }
        }
        Ok(())
    }

    /// Everything is closed, and every disk is sound.
    fn close_and_check(&mut self) -> Checked {
        let id = self.serving().ok_or("the owner went before the end")?;
        let owner = self.owners.get_mut(&id).expect("it serves");
        owner.leaving = Some(self.now);
        self.mirror(id, |mirror, out| mirror.detach(out))?;
        let until = self.now + 60_000_000;
        while self
            .owners
            .get(&id)
            .is_some_and(|owner| owner.mirror.phase() != Phase::Detached)
        {
            self.step()?;
            if self.now > until {
                return Err("the volume does not detach".into());
            }
        }
        let mut asked = BTreeSet::new();
        while self
            .drives
            .iter()
            .any(|drive| drive.store.is_some() && !drive.failed)
        {
            // Each opening once; a process that was just starting may open a disk only now.
            for drive in 0..self.drives.len() {
                let there = &self.drives[drive];
                if there.store.is_some() && !there.failed && asked.insert((drive, there.turn)) {
                    self.store(drive, |store, out| store.close(out))?;
                }
            }
            self.step()?;
            if self.now > until + 60_000_000 {
                return Err("a disk does not close".into());
            }
        }
        for (n, drive) in self.drives.iter_mut().enumerate() {
            // What rotted in a slot that is free meanwhile nobody makes good.
            if drive.gone || self.sites[drive.node].gone.is_some() || self.victim == Some(n) {
                continue;
            }
            let report = check(&mut drive.disk, &mut |_, _| {});
            if report.verdict != Verdict::Clean || report.findings_total > 0 {
                return Err(format!("disk {n} is not sound at the end: {report:?}"));
            }
        }
        Ok(())
    }
}
