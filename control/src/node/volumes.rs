//! The agent's volumes: attaching, serving, creating, growing, deleting.

use super::*;

impl Node {
    /// Every volume the state knows has an owner from the start, served or not: what is degraded heals.
    pub(super) fn attach_known(&mut self) {
        let names: Vec<_> = self.control.state().volumes.keys().cloned().collect();
        for name in names {
            if let Err(error) = self.attach(&name) {
                self.notices
                    .push(format!("volume {name} is not served: {}", chain(&error)));
            }
        }
    }

    /// A number for one more volume.
    pub(super) fn volume_number(&self) -> Result<VolumeIndex, NodeError> {
        let number = self
            .volumes
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.volumes.len());
        if number < VOLUMES_MAX {
            Ok(VolumeIndex(number as u16))
        } else {
            Err(NodeError::Wrong(format!(
                "a node has at most {VOLUMES_MAX} volumes"
            )))
        }
    }

    pub(super) fn attach(&mut self, name: &str) -> Result<(), NodeError> {
        let index = self.volume_number()?;
        let instance = self.instance(name)?;
        let generation = self.control.state().volumes[name].generation;
        let config = self.execute_volume(&Command::Attach {
            name: name.to_owned(),
            node: NodeId::LOCAL,
            generation,
        })?;
        if usize::from(index.0) == self.volumes.len() {
            self.volumes.push(None);
        }
        let (name, id) = (name.to_owned(), config.id);
        self.volumes[usize::from(index.0)] = Some(NodeVolume {
            name,
            id,
            index,
            socket: None,
            export: None,
            instance,
        });
        let ups: Vec<DiskUp> = self.disks.iter().filter_map(|disk| disk.up).collect();
        self.plane.add_volume(index, config, ups);
        Ok(())
    }

    /// The owner of a volume runs out of versions: it goes on under the next generation. If that can not be recorded it asks
    /// again in a while, and there are as many versions left before I/O has to wait.
    pub(super) fn renew_generation(&mut self, index: VolumeIndex) {
        let found = self.volumes.get(usize::from(index.0)).and_then(Option::as_ref);
        let Some(volume) = found else { return };
        let name = volume.name.clone();
        // It may have been deleted.
        let Some(record) = self.control.state().volumes.get(&name) else {
            return;
        };
        let generation = record.generation;
        let command = Command::Attach {
            name,
            node: NodeId::LOCAL,
            generation,
        };
        match self.execute_volume(&command) {
            Ok(config) => self.plane.renewed(index, config),
            Err(error) => eprintln!("unibody: {}", chain(&error)),
        }
    }

    /// What names a volume's contents to front ends: a guest that goes on after a restart of this process is served only if
    /// it is the same. Drawn anew for each process if the contents do not outlive it, and for good if power was lost under
    /// every in-sync replica of a chunk: writes that the guest was promised may be gone.
    pub(super) fn instance(&mut self, name: &str) -> Result<u128, NodeError> {
        let record = &self.control.state().volumes[name];
        let disk = |uuid: Disk| {
            self.disks
                .iter()
                .find(|disk| disk.uuid == Some(uuid.0) && disk.keeps_data())
        };
        let every_chunk = |good: &dyn Fn(&Replica, &NodeDisk) -> bool| {
            record.chunks.iter().all(|slots| {
                let in_sync = slots.iter().filter(|slot| slot.state == ReplicaState::InSync);
                in_sync
                    .filter_map(|slot| Some((slot, disk(slot.disk)?)))
                    .any(|(slot, disk)| good(slot, disk))
            })
        };
        if !every_chunk(&|_, _| true) {
            return Ok(disks::random());
        }
        let powered = |slot: &Replica, disk: &NodeDisk| {
            slot.power == 0 || disk.up.is_none_or(|up| up.power.0 == slot.power)
        };
        if every_chunk(&powered) {
            return Ok(record.instance);
        }
        let instance = disks::random();
        self.control.execute(&Command::Renew {
            name: name.to_owned(),
            instance,
        })?;
        Ok(instance)
    }

    pub(super) fn execute_volume(&mut self, command: &Command) -> Result<VolumeConfig, NodeError> {
        match self.control.execute(command)? {
            Applied::Volume(config) => Ok(*config),
            other => unreachable!("{command:?} answers with a volume, not {other:?}"),
        }
    }

    pub(super) fn find_volume(&mut self, name: &str) -> Result<&mut NodeVolume, NodeError> {
        let found = self
            .volumes
            .iter_mut()
            .flatten()
            .find(|volume| volume.name == name);
        found.ok_or_else(|| Refused::NoVolume(name.to_owned()).into())
    }

    /// Makes a volume exist as `spec` says, and serves it if that has a socket.
    pub(super) fn serve_volume(&mut self, spec: &VolumeSpec) -> Result<(), NodeError> {
        match self.control.state().volumes.get(&spec.name) {
            None => self.create(spec)?,
            Some(record) => {
                let wrong = |what: &str, has: u64, asked: u64| {
                    Err(NodeError::Wrong(format!(
                        "volume {} exists with {what} {has}, not {asked}: leave it out, or use another name",
                        spec.name
                    )))
                };
                let wanted = [
                    ("size", record.size, spec.size),
                    ("mirror", record.mirror.into(), spec.mirror.map(u64::from)),
                    (
                        "width",
                        record.stripe_width.into(),
                        spec.stripe_width.map(u64::from),
                    ),
                    ("unit", record.stripe_unit, spec.stripe_unit),
                ];
                let differs =
                    |&(_, has, asked): &(_, u64, Option<u64>)| asked.is_some_and(|asked| asked != has);
                if let Some((what, has, Some(asked))) = wanted.into_iter().find(differs) {
                    return wrong(what, has, asked);
                }
            }
        }
        let Some(socket) = &spec.socket else { return Ok(()) };
        let record = &self.control.state().volumes[&spec.name];
        let (capacity_bytes, read_only) = (record.size, record.read_only || spec.read_only);
        let queues_max = spec.queues.unwrap_or(1);
        let sessions = Arc::clone(&self.sessions);
        let volume = self.find_volume(&spec.name)?;
        if volume.export.is_some() {
            return Err(NodeError::Wrong(format!(
                "volume {} is served already",
                spec.name
            )));
        }
        let config = DeviceConfig {
            capacity_bytes,
            queues_max,
            queue_size_max: QUEUE_SIZE,
            read_only,
            serial: spec.name.clone(),
            instance: volume.instance,
        };
        let export =
            Export::new(exports::device(volume.index), config, socket, sessions).map_err(|source| {
                NodeError::Serve {
                    name: spec.name.clone(),
                    source,
                }
            })?;
        volume.export = Some(export);
        volume.socket = Some(socket.clone());
        Ok(())
    }

    pub(super) fn create(&mut self, spec: &VolumeSpec) -> Result<(), NodeError> {
        // Before anything durable is done.
        self.volume_number()?;
        let size = spec.size.ok_or_else(|| {
            NodeError::Wrong(format!(
                "there is no volume {}: to create it, say its size",
                spec.name
            ))
        })?;
        let mirror = spec.mirror.unwrap_or(2);
        let stripe_width = spec
            .stripe_width
            .unwrap_or_else(|| planner::default_width(self.control.state()));
        let stripe_unit = spec.stripe_unit.unwrap_or(256 << 10);
        let geometry = unibody_dataplane::geometry::Geometry::new(stripe_unit, stripe_width)
            .map_err(|error| Refused::Geometry(error.to_string()))?;
        let chunks = planner::plan_chunks(self.control.state(), geometry.chunks(size), mirror)?;
        let keeps_nothing = |uuid: &DiskUuid| {
            self.disks
                .iter()
                .any(|disk| disk.uuid == Some(*uuid) && disk.kind == DiskKind::Null)
        };
        if mirror > 1 && chunks.iter().flatten().any(keeps_nothing) {
            return Err(NodeError::Wrong(
                "a volume on a null disk keeps nothing, so it can not be mirrored: use mirror=1".into(),
            ));
        }
        self.execute_volume(&Command::CreateVolume {
            name: spec.name.clone(),
            size,
            mirror,
            stripe_unit,
            stripe_width,
            read_only: spec.read_only,
            instance: disks::random(),
            chunks,
        })?;
        self.attach(&spec.name)?;
        Ok(())
    }

    pub(super) fn resize(&mut self, name: &str, size: u64) -> Result<(), NodeError> {
        let state = self.control.state();
        let volume = state
            .volumes
            .get(name)
            .ok_or_else(|| Refused::NoVolume(name.to_owned()))?;
        let more = volume
            .geometry()
            .chunks(size)
            .saturating_sub(volume.chunks.len() as u32);
        let chunks = planner::plan_chunks(state, more, volume.mirror)?;
        let config = self.execute_volume(&Command::ResizeVolume {
            name: name.to_owned(),
            size,
            chunks,
        })?;
        let plane = Arc::clone(&self.plane);
        let volume = self.find_volume(name)?;
        plane.reconfigured(volume.index, config);
        if let Some(export) = &volume.export {
            export.resize(size);
        }
        Ok(())
    }

    pub(super) fn delete(&mut self, name: &str) -> Result<(), NodeError> {
        let plane = Arc::clone(&self.plane);
        let volume = self.find_volume(name)?;
        if volume.export.as_ref().is_some_and(Export::connected) {
            return Err(NodeError::Wrong(format!(
                "volume {name} is in use by a VM: stop that first"
            )));
        }
        let index = volume.index;
        let record = self.control.state().volumes[name].clone();
        // First of all durable: until then the volume goes on as if nobody had asked.
        self.control.execute(&Command::DeleteVolume {
            name: name.to_owned(),
        })?;
        let volume = self.find_volume(name)?;
        // No volume can be called so: the name is free for another.
        volume.name = format!("(deleted) {name}");
        let export = volume.export.take();
        let end = Instant::now() + PATIENCE;
        let quiet = self.end_sessions(export.into_iter().collect(), end);
        if !quiet || !self.wait_quiet(&plane.remove_volume(index), end) {
            // Its number stays taken; the space is given back at the next start.
            return Err(NodeError::Wrong(format!(
                "volume {name} is deleted, but its last I/O has not ended: a disk hangs, see `unibody status`"
            )));
        }
        self.volumes[usize::from(index.0)] = None;
        // A disk that is away now is told when it comes back.
        for disk in self.disks.iter().filter(|disk| disk.phase == Phase::Online) {
            if let Some(uuid) = disk.uuid {
                let chunks = record.replicas_on(uuid).collect();
                plane.drop_chunks(disk.index, chunks, Generation::LAST);
            }
        }
        Ok(())
    }
}
