//! The agent's disks: opening, failing, returning, and moving replicas off those that leave.

use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::Instant;

use super::disks::{self, DiskError, NodeDisk, Opened, Phase};
use super::*;
use crate::state::State;

impl Node {
    pub(super) fn open_disks(&mut self) -> Result<(), NodeError> {
        let specs = self.options.disks.clone();
        for spec in specs {
            self.add_slot(spec)?;
        }
        let (cache, faults) = (self.options.cache_bytes, self.options.faults);
        let salts = &self.salts();
        // Side by side: recovery reads a good deal of each disk.
        let opened: Vec<Result<Opened, DiskError>> = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .disks
                .iter()
                .map(|disk| scope.spawn(move || disks::open(&disk.name, &disk.spec, cache, faults, salts)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("opening a disk does not panic"))
                .collect()
        });
        let there: Vec<DiskUuid> = opened.iter().flatten().map(|opened| opened.uuid).collect();
        let known = &self.control.state().disks;
        let missing = known
            .iter()
            .any(|(disk, record)| !record.out && !there.contains(&disk.0));
        for (number, opened) in opened.into_iter().enumerate() {
            let index = self.disks[number].index;
            match opened {
                Ok(opened) => self.bring_up(index, opened)?,
                // A disk that the state knows is not there: it may be this one, and its mirrors do without it. It is tried again.
                Err(error) if missing && !there.is_empty() => {
                    let why = chain(&NodeError::from(error));
                    self.notices
                        .push(format!("the node starts without a disk: {why}"));
                    self.disk_mut(index).failed(why, Instant::now());
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    pub(super) fn add_slot(&mut self, spec: DiskSpec) -> Result<DiskIndex, NodeError> {
        if self.disks.len() >= DISKS_MAX {
            return Err(NodeError::Wrong(format!("a node has at most {DISKS_MAX} disks")));
        }
        let same = |disk: &NodeDisk| {
            disks::is_path(&spec).is_some() && disks::is_path(&disk.spec) == disks::is_path(&spec)
        };
        if let Some(twin) = self.disks.iter().find(|disk| same(disk)) {
            return Err(NodeError::Wrong(format!("disk {} is given twice", twin.name)));
        }
        let index = DiskIndex(self.disks.len() as u16);
        self.disks.push(NodeDisk::new(index, spec));
        Ok(index)
    }

    pub(super) fn disk_mut(&mut self, index: DiskIndex) -> &mut NodeDisk {
        &mut self.disks[usize::from(index.0)]
    }

    pub(super) fn bring_up(&mut self, index: DiskIndex, opened: Opened) -> Result<(), NodeError> {
        let (up, bytes) = (opened.up(index), opened.bytes);
        if let Some(twin) = self
            .disks
            .iter()
            .find(|disk| disk.uuid == Some(up.uuid) && disk.index != index && disk.up.is_some())
        {
            let name = self.disks[usize::from(index.0)].name.clone();
            return Err(NodeError::Wrong(format!(
                "{name} and {} are copies of one disk: use only one of them",
                twin.name
            )));
        }
        let domain = self.disks[usize::from(index.0)].domain();
        let served = self.disks[usize::from(index.0)].uuid == Some(up.uuid);
        if !ours(self.control.state(), up.uuid, served, &opened.chunks) {
            let name = &self.disks[usize::from(index.0)].name;
            return Err(NodeError::Wrong(format!(
                "{name} holds replicas of volumes that this node's state knows nothing of; they were not touched. Is --state \
                 the right directory, and up to date? If the disk's contents may be destroyed, format it with --force"
            )));
        }
        let known = self.control.state().disks.get(&Disk(up.uuid));
        if known.is_none_or(|record| record.domain != domain || record.bytes != bytes) {
            self.control.execute(&Command::AddDisk {
                disk: up.uuid,
                node: NodeId::LOCAL,
                domain,
                bytes,
            })?;
        }
        self.plane
            .add_disk(up, opened.service)
            .map_err(NodeError::Plane)?;
        self.notices.extend(opened.notices);
        let disk = self.disk_mut(index);
        disk.found = opened.chunks;
        disk.phase = Phase::Online;
        disk.uuid = Some(up.uuid);
        disk.kind = opened.kind;
        disk.up = Some(up);
        disk.faults = opened.faults;
        Ok(())
    }

    /// Gives back the space of replicas that were found on a disk and have no place there any more. Only once the volumes
    /// have their owners: what is dropped in the name of an earlier generation stays.
    pub(super) fn drop_garbage(&mut self) {
        let state = self.control.state();
        for disk in self.disks.iter_mut().filter(|disk| disk.up.is_some()) {
            let mut garbage: BTreeMap<Generation, Vec<ChunkRef>> = BTreeMap::new();
            for chunk in disk.found.drain(..) {
                if let Some(generation) = disk.uuid.and_then(|uuid| state.orphan(uuid, &chunk)) {
                    garbage.entry(generation).or_default().push(chunk);
                }
            }
            for (generation, chunks) in garbage {
                self.plane.drop_chunks(disk.index, chunks, generation);
            }
        }
    }

    /// Opens a disk where nobody waits for it.
    pub(super) fn open_later(&mut self, index: DiskIndex, reply: Option<mpsc::Sender<Response>>) {
        let (cache, faults, sender) = (self.options.cache_bytes, self.options.faults, self.sender.clone());
        let salts = self.salts();
        let disk = self.disk_mut(index);
        disk.phase = Phase::Opening;
        let (name, spec) = (disk.name.clone(), disk.spec.clone());
        let opening = std::thread::Builder::new()
            .name(format!("open{}", index.0))
            .spawn(move || {
                let opened = disks::open(&name, &spec, cache, faults, &salts);
                sender.send(Input::Opened(index, Box::new(opened), reply)).ok();
            });
        if let Err(error) = opening {
            self.disk_mut(index)
                .failed(format!("it could not be opened: {error}"), Instant::now());
        }
    }

    pub(super) fn opened(
        &mut self,
        index: DiskIndex,
        opened: Result<Opened, DiskError>,
        reply: Option<mpsc::Sender<Response>>,
    ) {
        let result = match opened {
            Ok(opened) => self.bring_up(index, opened),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = &result {
            let text = chain(error);
            eprintln!("unibody: {text}");
            self.disk_mut(index).failed(text, Instant::now());
        }
        if let Some(reply) = reply {
            respond(&reply, result.map(|()| serde_json::Value::Null));
        }
        self.drop_garbage();
        self.move_replicas();
    }

    /// Records that a disk failed by itself: it may have lost what it completed, though the machine kept its power. Until
    /// that is durable it does not come back.
    pub(super) fn record_distrust(&mut self, index: DiskIndex) -> Result<(), NodeError> {
        let disk = self.disk_mut(index);
        if let (true, Some(uuid)) = (disk.distrust, disk.uuid) {
            let salt = disks::random();
            self.control.execute(&Command::Distrust { disk: uuid, salt })?;
        }
        self.disk_mut(index).distrust = false;
        Ok(())
    }

    /// What distinguishes the spans of power of the disks that failed by themselves.
    pub(super) fn salts(&self) -> disks::Salts {
        self.control
            .state()
            .disks
            .iter()
            .map(|(disk, record)| (disk.0, record.distrust))
            .collect()
    }

    /// Gives the places on disks that were taken out to others, as far as their replicas are out of sync, and forgets the
    /// disks that have none left.
    pub(super) fn move_replicas(&mut self) {
        let disks = &self.control.state().disks;
        let out: Vec<DiskUuid> = disks
            .iter()
            .filter(|(_, record)| record.out)
            .map(|(disk, _)| disk.0)
            .collect();
        for from in out {
            self.move_from(from, false);
            if !self.control.state().has_replicas(from)
                && let Err(error) = self.control.execute(&Command::ForgetDisk { disk: from })
            {
                eprintln!("unibody: {}", chain(&error));
            }
        }
    }

    /// Gives the places of replicas that a disk had no room for to other disks.
    pub(super) fn move_full(&mut self) {
        let disks: Vec<DiskUuid> = self.control.state().disks.keys().map(|disk| disk.0).collect();
        disks.into_iter().for_each(|disk| self.move_from(disk, true));
    }

    pub(super) fn move_from(&mut self, from: DiskUuid, full: bool) {
        let names: Vec<_> = self
            .volumes
            .iter()
            .flatten()
            .map(|volume| (volume.name.clone(), volume.index))
            .collect();
        for (name, index) in names {
            let to = planner::plan_moves(self.control.state(), &name, from, full);
            if to.is_empty() {
                continue;
            }
            let volume = &self.control.state().volumes[&name];
            let (generation, config) = (volume.generation, volume.config);
            let command = Command::Move {
                name,
                generation,
                config,
                from,
                to,
            };
            match self.execute_volume(&command) {
                Ok(config) => self.plane.reconfigured(index, config),
                Err(error) => eprintln!("unibody: {}", chain(&error)),
            }
        }
    }
}

/// What a disk holds is this state's to keep or to give back: the state knows the disk (or this process had it in service
/// before it was replaced), and handed out the numbers of all volumes on it. Under an empty, another or an older state
/// everything on a disk would look like garbage.
pub(crate) fn ours(state: &State, disk: DiskUuid, served: bool, found: &[ChunkRef]) -> bool {
    let known = served || state.disks.contains_key(&Disk(disk));
    found
        .iter()
        .all(|chunk| known && state.has_named(chunk.key.volume))
}

#[cfg(test)]
mod tests {
    use super::*;
    use unibody_dataplane::ids::{ChunkKey, LayerId};

    #[test]
    fn only_what_this_state_made_is_its_own() {
        let disk = DiskUuid(7);
        let replica = |volume| ChunkRef {
            key: ChunkKey {
                volume: VolumeId(volume),
                layer: LayerId(1),
                chunk: 0,
            },
            incarnation: 1,
        };
        let mut state = State::default();
        let first = 1;
        assert!(ours(&state, disk, false, &[]), "an empty disk is anybody's");
        assert!(
            !ours(&state, disk, false, &[replica(first)]),
            "a state that lost everything"
        );
        let add = Command::AddDisk {
            disk,
            node: NodeId::LOCAL,
            domain: "d".into(),
            bytes: 1 << 30,
        };
        state.apply(&add).unwrap();
        assert!(
            !ours(&state, disk, false, &[replica(first)]),
            "a state from before the volume"
        );
        let create = Command::CreateVolume {
            name: "v".into(),
            size: 1 << 20,
            mirror: 1,
            stripe_unit: 1 << 18,
            stripe_width: 1,
            read_only: false,
            instance: 5,
            chunks: vec![vec![disk]],
        };
        state.apply(&create).unwrap();
        assert!(ours(&state, disk, false, &[replica(first)]));
        assert!(!ours(&state, disk, false, &[replica(first), replica(first + 1)]));
        let other = DiskUuid(8);
        assert!(
            !ours(&state, other, false, &[replica(first)]),
            "another state's disk"
        );
        assert!(
            ours(&state, other, true, &[replica(first)]),
            "replaced, and now it returns"
        );
    }
}
