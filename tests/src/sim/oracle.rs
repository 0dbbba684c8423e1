//! A whole run, and what must hold when its faults have ended.

use unibody_dataplane::config::SlotState;
use unibody_dataplane::ids::{ChunkKey, EXTENTS_PER_REGION, REGIONS_PER_CHUNK, Version};
use unibody_dataplane::mirror::{OpKind, Phase};
use unibody_dataplane::replica::{ChunkRef, ExtentImage, Header, Reply, Request};
use unibody_dataplane::store::{Tag, Verdict, check};

use super::profile::Damage;
use super::trace::brief;
use super::work::SECTORS;
use super::world::{Checked, Event, World};

/// Virtual time within which everything must be in order again.
const HEAL_MS: u64 = 120_000;
/// Virtual time within which the load must have ended.
const LOAD_MS: u64 = 900_000;

impl World {
    /// The whole run.
    pub(super) fn run(&mut self) -> Checked {
        self.after(0, Event::Start { owner: 0 });
        self.after(1_000, Event::Tick);
        self.after(10_000, Event::Fault);
        self.begin_slots();
        while self.guest.left > 0 {
            self.step()?;
            if self.now > LOAD_MS * 1000 {
                break;
            }
        }
        self.heal_and_judge()
    }

    /// No more faults, and then the oracle.
    pub(super) fn heal_and_judge(&mut self) -> Checked {
        self.heal();
        let until = self.now + HEAL_MS * 1000;
        let mut quiet = 0;
        while quiet < 3 {
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
        self.mended()?;
        self.compare()?;
        self.gather();
        self.close_and_check()?;
        self.stats.device_ios = self.nodes.iter().map(|node| node.disk.done).sum();
        Ok(())
    }

    /// A disk is too small for everything: full redundancy may be impossible.
    fn cramped(&self) -> bool {
        self.profile.disk_bytes < 8 << 20
    }

    pub(super) fn healed(&self) -> bool {
        let Some(mirror) = &self.mirror else { return false };
        let status = mirror.status();
        let order = status.phase == Phase::Serving && self.guest.ops.is_empty() && status.unavailable == 0;
        order && (self.cramped() || !status.degraded && status.regions_unsettled == 0 && self.all_in_sync())
    }

    fn all_in_sync(&self) -> bool {
        self.config()
            .chunks
            .iter()
            .flatten()
            .all(|slot| slot.state == SlotState::InSync)
    }

    pub(super) fn ailing(&self) -> String {
        let ops: Vec<_> = self.guest.ops.iter().map(|(slot, op)| (*slot, op.kind)).collect();
        let disks: Vec<_> = self
            .nodes
            .iter()
            .map(|n| {
                (
                    n.uuid,
                    n.store.is_some(),
                    n.up,
                    n.gone,
                    n.failed,
                    n.store.as_ref().map(|s| s.idle()),
                )
            })
            .collect();
        format!(
            "not in order {HEAL_MS} ms after the faults ended: operations {ops:?}, mirror {:?}, slots {:?}, disks {disks:?}",
            self.mirror.as_ref().map(|mirror| mirror.status()),
            self.config().chunks
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
            self.begin(
                0,
                OpKind::Read,
                blocks[at] * SECTORS,
                (blocks[end - 1] + 1) * SECTORS,
            )?;
            let until = self.now + 60_000_000;
            while self.guest.ops.contains_key(&0) {
                self.step()?;
                if self.now > until {
                    return Err("a last read was not answered".into());
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Bad blocks that reads met, and that another replica had, were made good.
    fn mended(&mut self) -> Checked {
        let until = self.now + 3_000_000;
        while !self.met.is_empty() && self.now < until {
            self.step()?;
        }
        let config = self.config();
        for (node, chunk, extent, block) in std::mem::take(&mut self.met) {
            let slots = &config.chunks[chunk as usize];
            let in_sync = slots.iter().filter(|slot| slot.state == SlotState::InSync);
            let uuid = self.nodes[node].uuid;
            let slot = in_sync.clone().find(|slot| slot.disk == uuid);
            let (Some(slot), true, Damage::Within) = (slot, in_sync.count() > 1, self.profile.damage) else {
                continue;
            };
            let key = ChunkKey {
                volume: config.id,
                layer: config.head,
                chunk,
            };
            let request = Request::Digest {
                chunk: ChunkRef {
                    key,
                    incarnation: slot.incarnation,
                },
                region: (usize::from(extent) / EXTENTS_PER_REGION) as u8,
                verify: true,
            };
            self.count("mended blocks");
            if let Reply::Digest { extents, .. } = self.ask(node, request)?
                && extents[usize::from(extent) % EXTENTS_PER_REGION].bad >> block & 1 == 1
            {
                return Err(format!(
                    "disk {node} chunk {chunk} extent {extent} block {block}: read, found bad, and never made good"
                ));
            }
        }
        Ok(())
    }

    /// Asks a store directly.
    fn ask(&mut self, node: usize, request: Request) -> Result<Reply, String> {
        let config = self.config();
        let header = Header {
            volume: config.id,
            generation: config.generation,
            stable: Version::ZERO,
        };
        self.tag += 1;
        let tag = self.tag;
        self.nodes[node]
            .tags
            .insert(tag, (u64::MAX, unibody_dataplane::mirror::RequestId(0)));
        self.asked = None;
        self.store(node, |store, out| store.submit(Tag(tag), header, request, out))?;
        let until = self.now + 60_000_000;
        loop {
            if let Some(reply) = self.asked.take() {
                return Ok(reply);
            }
            self.step()?;
            if self.now > until {
                return Err(format!("disk {node} does not answer"));
            }
        }
    }

    /// In-sync replicas hold the same, and what they hold is sound.
    fn compare(&mut self) -> Checked {
        let config = self.config();
        let layout: Vec<(u32, u64)> = self
            .checker
            .touched()
            .iter()
            .map(|s| config.geometry.locate(s * 512))
            .collect();
        let mut regions: Vec<(u32, u8)> = layout.iter().map(|&(c, at)| (c, (at >> 20) as u8)).collect();
        regions.sort_unstable();
        regions.dedup();
        for (chunk, region) in regions {
            assert!(usize::from(region) < REGIONS_PER_CHUNK);
            let mut first: Option<(usize, Vec<ExtentImage>)> = None;
            for slot in config.chunks[chunk as usize]
                .iter()
                .filter(|slot| slot.state == SlotState::InSync)
            {
                let node = self.node(slot.disk).ok_or("a slot on an unknown disk")?;
                let key = ChunkKey {
                    volume: config.id,
                    layer: config.head,
                    chunk,
                };
                let chunk = ChunkRef {
                    key,
                    incarnation: slot.incarnation,
                };
                let verify = self.profile.damage == Damage::None;
                let reply = self.ask(
                    node,
                    Request::Digest {
                        chunk,
                        region,
                        verify,
                    },
                )?;
                let Reply::Digest { extents, .. } = &reply else {
                    return Err(format!("disk {node} answers a digest with {}", brief(&reply)));
                };
                if verify && extents.iter().any(|extent| extent.bad != 0) {
                    return Err(format!(
                        "disk {node} has bad blocks after healing: {}",
                        brief(&reply)
                    ));
                }
                let images: Vec<_> = extents
                    .iter()
                    .map(|extent| match extent.image {
                        // Absent and zero read alike where there is one layer: a slot may have been freed in between.
                        image if image.valid | image.lost != 0 => ExtentImage { zero: 0, ..image },
                        _ => ExtentImage::default(),
                    })
                    .collect();
                match &first {
                    Some((other, there)) if *there != images => {
                        let differ = (0..images.len()).find(|&i| there[i] != images[i]).unwrap_or(0);
                        return Err(format!(
                            "chunk {key:?} region {region}: disks {other} and {node} differ in extent {differ}: {:x?} and {:x?}",
                            there[differ], images[differ]
                        ));
                    }
                    Some(_) => {}
                    None => first = Some((node, images)),
                }
            }
        }
        Ok(())
    }

    /// Everything is closed, and every disk is sound.
    fn close_and_check(&mut self) -> Checked {
        self.mirror(|mirror, out| mirror.detach(out))?;
        let until = self.now + 60_000_000;
        while self
            .mirror
            .as_ref()
            .is_some_and(|mirror| mirror.phase() != Phase::Detached)
        {
            self.step()?;
            if self.now > until {
                return Err("the volume does not detach".into());
            }
        }
        for node in 0..self.nodes.len() {
            self.store(node, |store, out| store.close(out))?;
        }
        while self.nodes.iter().any(|node| node.store.is_some() && !node.failed) {
            self.step()?;
            if self.now > until + 60_000_000 {
                return Err("a disk does not close".into());
            }
        }
        for (n, node) in self.nodes.iter_mut().enumerate() {
            let sound = self.profile.damage == Damage::None;
            if node.gone || !sound {
                continue;
            }
            let report = check(&mut node.disk, &mut |_, _| {});
            if report.verdict != Verdict::Clean || report.findings_total > 0 {
                return Err(format!("disk {n} is not sound at the end: {report:?}"));
            }
        }
        Ok(())
    }
}
