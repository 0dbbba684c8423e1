//! What the control threads want done. Rare, so plain; never blocking, so in steps where it takes time.

use std::sync::mpsc;

use crate::config::VolumeConfig;
use crate::mirror::{Limits, Mirror, Phase};
use crate::plane::{Command, DiskIndex, DiskService, DiskUp, Event, ShardStatus, VolumeIndex};

use super::ops::Names;
use super::{Home, Route, Served, Shard, Volume};

/// Requests of one volume in hand.
const VOLUME_OPS: u32 = 256;
/// Each volume is verified once in two weeks.
const SCRUB_MS: u64 = 14 * 24 * 3_600_000;

impl Shard {
    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::AddDisk(up, service, reply) => {
                reply.send(self.add_disk(up, service)).ok();
            }
            Command::DiskUp(up) => self.disk_up(up),
            Command::DiskDown(disk) => self.disk_down(disk),
            Command::FailDisk(disk) => match &mut self.homes[usize::from(disk.0)] {
                Home::Store(served) => {
                    served.ending.get_or_insert_with(|| "taken out of service".into());
                    served.store.remove(&mut self.store_effects);
                    self.apply_store(disk);
                }
                Home::Null => {
                    self.homes[usize::from(disk.0)] = Home::Absent;
                    self.tell(Event::DiskFailed {
                        disk,
                        reason: "taken out of service".into(),
                    });
                }
                // It has failed by itself meanwhile, and that was told.
                Home::Absent => {}
            },
            Command::CloseDisk(disk, reply) => match &mut self.homes[usize::from(disk.0)] {
                Home::Store(served) => {
                    served.closing = Some(reply);
                    served.store.close(&mut self.store_effects);
                    self.apply_store(disk);
                    self.touch(disk);
                }
                home => {
                    *home = Home::Absent;
                    reply.send(true).ok();
                }
            },
            Command::DropChunks(disk, chunks, generation) => {
                if let Home::Store(served) = &mut self.homes[usize::from(disk.0)] {
                    served
                        .drops
                        .extend(chunks.into_iter().map(|chunk| (chunk, generation)));
                }
            }
            Command::AddVolume(index, config, disks) => self.add_volume(index, config, disks),
            Command::Decided(index, outcome) => {
                self.with_mirror(index, |mirror, out| mirror.decided(outcome, out))
            }
            Command::Reconfigured(index, config) => {
                self.with_mirror(index, |mirror, out| mirror.reconfigured(config, out));
                self.connect(index);
            }
            Command::Renewed(index, config) => {
                self.with_mirror(index, |mirror, out| mirror.renewed(config, out));
                self.connect(index);
            }
            Command::RemoveVolume(index, reply) => self.remove_volume(index, reply),
            Command::StartQueue(key, volume, queue) => self.queues.start(key, volume, queue, self.now),
            Command::StopQueue(key, reply) => {
                self.queues.stop(key, reply);
                // It may be quiet already.
                self.publish_queues();
            }
            Command::Ask(node, reply) => {
                reply.send(self.add_asker(node)).ok();
            }
            Command::Dialed(fd, peer) => self.dialed(fd, peer),
            Command::Accepted(fd, peer, reactor) => self.accepted(fd, peer, reactor),
            Command::ForgetNode(node) => self.forget_node(node),
            Command::Status(reply) => {
                reply.send(self.status()).ok();
            }
            Command::Stop => self.stopping = true,
        }
    }

    fn add_disk(&mut self, up: DiskUp, service: DiskService) -> std::io::Result<()> {
        let home = &mut self.homes[usize::from(up.index.0)];
        assert!(matches!(home, Home::Absent), "a disk's number is given once");
        *home = match service {
            DiskService::Null => Home::Null,
            DiskService::Store(store, mut disk) => {
                disk.attach(&mut self.ring, u32::from(up.index.0))?;
                if disk.info().direct && !self.buffers_registered {
                    let (base, bytes) = self.buffers.small_span();
                    // SAFETY: the pool's own private mapping, which lives as long as the shard; the ring is an earlier field
                    // of it and so dropped first. Refused, requests only cost more.
                    self.buffers_registered = unsafe { self.ring.register_memory(base, bytes) };
                }
                self.stores.push(up.index);
                Home::Store(Box::new(Served {
                    store,
                    disk,
                    waiting: Default::default(),
                    touched: false,
                    drops: Default::default(),
                    ending: None,
                    closed: false,
                    closing: None,
                }))
            }
        };
        Ok(())
    }

    fn disk_up(&mut self, up: DiskUp) {
        self.disks[usize::from(up.index.0)] = Some(up);
        self.offer_disk(up.index, Some(&up));
        for position in 0..self.present.len() {
            self.connect(self.present[position]);
        }
    }

    /// Looks again for the disks that volumes have no way to.
    pub(super) fn connect_lost(&mut self) {
        for position in 0..self.present.len() {
            let index = self.present[position];
            let lost = |volume: &Volume| volume.routes.iter().any(Option::is_none);
            if self.volumes[usize::from(index.0)].as_deref().is_some_and(lost) {
                self.connect(index);
            }
        }
    }

    fn disk_down(&mut self, disk: DiskIndex) {
        let Some(up) = self.disks[usize::from(disk.0)].take() else {
            return;
        };
        self.offer_disk(disk, None);
        for position in 0..self.present.len() {
            let index = self.present[position];
            if let Some(volume) = &mut self.volumes[usize::from(index.0)] {
                for route in &mut volume.routes {
                    if *route == Some(Route::Near(disk)) {
                        *route = None;
                    }
                }
            }
            self.with_mirror(index, |mirror, out| mirror.disk_down(up.uuid, out));
        }
    }

    /// Makes the disks of a volume's table known to it, as far as they are up, here or at the other end of a link.
    pub(super) fn connect(&mut self, index: VolumeIndex) {
        let Some(volume) = &mut self.volumes[usize::from(index.0)] else {
            return;
        };
        let mut fresh = Vec::new();
        for (number, uuid) in volume.mirror.disks().enumerate() {
            if volume.routes.len() <= number {
                volume.routes.push(None);
            }
            let route = &mut volume.routes[number];
            // A disk that moved here from another node is taken only once the mirror heard that it went there: it may be
            // another opening, which has to be sealed.
            if route.is_some() {
                continue;
            }
            if let Some(up) = self.disks.iter().flatten().find(|up| up.uuid == uuid) {
                *route = Some(Route::Near(up.index));
                fresh.push((uuid, true));
            } else if let Some(far) = self.links.reach(uuid) {
                *route = Some(far);
                fresh.push((uuid, false));
            }
        }
        let known = |route: &Option<Route>| match route {
            Some(Route::Near(disk)) => self.disks[usize::from(disk.0)],
            // Of a disk that is away nothing is known, so nothing is assumed of it; one of another node answers late.
            Some(Route::Far { .. }) | None => None,
        };
        let all = |is: &dyn Fn(DiskUp) -> bool| {
            !volume.routes.is_empty() && volume.routes.iter().all(|route| known(route).is_some_and(is))
        };
        let (inline, null) = (all(&|up| up.inline), all(&|up| up.null));
        (volume.inline, volume.null) = (inline, null);
        for (uuid, near) in fresh {
            self.with_mirror(index, |mirror, out| mirror.disk_up(uuid, near, out));
        }
    }

    fn add_volume(&mut self, index: VolumeIndex, config: VolumeConfig, disks: Vec<DiskUp>) {
        for up in disks {
            self.disks[usize::from(up.index.0)] = Some(up);
        }
        let limits = Limits {
            ops: VOLUME_OPS,
            scrub_ms: SCRUB_MS,
            ..Limits::default()
        };
        self.volumes[usize::from(index.0)] = Some(Box::new(Volume {
            id: config.id,
            mirror: Mirror::new(config, limits),
            names: Names::new(VOLUME_OPS),
            routes: Vec::new(),
            inline: false,
            null: false,
            large: 0,
            removing: None,
        }));
        self.present.push(index);
        let now = self.now;
        let leased = self.leased;
        self.with_mirror(index, |mirror, out| {
            mirror.set_leased(leased, out);
            mirror.tick(now, out);
        });
        self.connect(index);
        self.with_mirror(index, |mirror, out| mirror.attach(out));
    }

    fn remove_volume(&mut self, index: VolumeIndex, reply: mpsc::Sender<()>) {
        if let Some(volume) = &mut self.volumes[usize::from(index.0)] {
            volume.removing = Some(reply);
            self.with_mirror(index, |mirror, out| mirror.detach(out));
        }
    }

    /// Forgets volumes that are quiet and were to go.
    pub(super) fn forget_volumes(&mut self) {
        for position in (0..self.present.len()).rev() {
            let index = self.present[position];
            let slot = &mut self.volumes[usize::from(index.0)];
            // Its memory and its number may be used again, so nothing of it may be on its way to a disk or back.
            let over = slot.as_ref().is_some_and(|volume| {
                volume.removing.is_some()
                    && volume.mirror.is_quiet()
                    && volume.names.in_hand() == 0
                    && matches!(
                        volume.mirror.phase(),
                        Phase::Detached | Phase::Fenced | Phase::Failed
                    )
            });
            if over {
                self.present.swap_remove(position);
                if let Some(reply) = slot.take().and_then(|volume| volume.removing) {
                    reply.send(()).ok();
                }
            }
        }
    }

    fn status(&self) -> ShardStatus {
        let mut reactor = self.stats;
        reactor.enters = self.ring.stats().enters;
        (reactor.queues_polled, reactor.queues_idle) = self.queues.counts();
        reactor.buffers_lent = self
            .volumes
            .iter()
            .flatten()
            .map(|volume| u64::from(volume.large))
            .sum();
        ShardStatus {
            links: self.links.status(),
            reactor,
            disks: self
                .stores
                .iter()
                .filter_map(|disk| match &self.homes[usize::from(disk.0)] {
                    Home::Store(served) => Some((*disk, served.store.stats())),
                    _ => None,
                })
                .collect(),
            volumes: self
                .present
                .iter()
                .filter_map(|&index| {
                    Some((
                        index,
                        self.volumes[usize::from(index.0)].as_ref()?.mirror.status(),
                    ))
                })
                .collect(),
        }
    }
}
