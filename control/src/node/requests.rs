//! What the operator asks of the agent.

use super::*;

impl Node {
    pub(super) fn request(&mut self, request: Request, reply: mpsc::Sender<Response>) {
        let null = |()| serde_json::Value::Null;
        let result = match request {
            Request::Status => {
                serde_json::to_value(self.status()).map_err(|error| NodeError::Wrong(error.to_string()))
            }
            Request::VolumeCreate(spec) => self.create_new(&spec).map(null),
            Request::VolumeResize { name, size } => self.resize(&name, size).map(null),
            Request::VolumeDelete { name } => self.delete(&name).map(null),
            Request::DiskAdd { spec } => match self.add(&spec) {
                Ok(index) => return self.open_later(index, Some(reply)),
                Err(error) => Err(error),
            },
            Request::DiskFail { disk } => self.fail(&disk).map(null),
            Request::DiskReturn { disk } => match self.return_disk(&disk).and_then(|index| {
                self.record_distrust(index)?;
                Ok(index)
            }) {
                Ok(index) => return self.open_later(index, Some(reply)),
                Err(error) => Err(error),
            },
            Request::DiskReplace { disk, spec } => match self.replace(&disk, &spec) {
                Ok(index) => return self.open_later(index, Some(reply)),
                Err(error) => Err(error),
            },
            Request::DiskFault { disk, fault } => self.fault(&disk, &fault).map(null),
        };
        respond(&reply, result);
    }

    pub(super) fn create_new(&mut self, spec: &VolumeSpec) -> Result<(), NodeError> {
        if self.control.state().volumes.contains_key(&spec.name) {
            return Err(Refused::VolumeExists(spec.name.clone()).into());
        }
        self.serve_volume(spec)
    }

    pub(super) fn find_disk(&mut self, name: &str) -> Result<&mut NodeDisk, NodeError> {
        let names: Vec<_> = self.disks.iter().map(|disk| disk.name.clone()).collect();
        let found = self.disks.iter_mut().find(|disk| disk.name == name);
        found.ok_or_else(|| {
            NodeError::Wrong(format!("there is no disk {name}; there are {}", names.join(", ")))
        })
    }

    pub(super) fn add(&mut self, spec: &str) -> Result<DiskIndex, NodeError> {
        let spec: DiskSpec = spec.parse()?;
        if self.options.state.is_none() && matches!(spec.backend, Backend::Path(_)) {
            return Err(NodeError::Wrong(
                "this node keeps no state, so it can not use a disk that keeps data: start it with --state"
                    .into(),
            ));
        }
        self.add_slot(spec)
    }

    pub(super) fn fail(&mut self, name: &str) -> Result<(), NodeError> {
        let disk = self.find_disk(name)?;
        if disk.phase != Phase::Online {
            return Err(NodeError::Wrong(format!("disk {name} is not in service")));
        }
        disk.by_hand = true;
        disk.phase = Phase::Leaving;
        let index = disk.index;
        self.plane.fail_disk(index);
        Ok(())
    }

    pub(super) fn return_disk(&mut self, name: &str) -> Result<DiskIndex, NodeError> {
        let disk = self.find_disk(name)?;
        match disk.phase {
            Phase::Failed(_) if disk.kind == DiskKind::Memory => Err(NodeError::Wrong(format!(
                "disk {name} was in memory and is gone: replace it with another"
            ))),
            Phase::Failed(_) => {
                disk.by_hand = false;
                Ok(disk.index)
            }
            Phase::Leaving => Err(NodeError::Wrong(format!(
                "the last I/O of disk {name} has not ended; try again"
            ))),
            Phase::Online | Phase::Opening => Err(NodeError::Wrong(format!("disk {name} is in service"))),
        }
    }

    pub(super) fn replace(&mut self, name: &str, spec: &str) -> Result<DiskIndex, NodeError> {
        let old = self.find_disk(name)?;
        if !matches!(old.phase, Phase::Failed(_)) {
            return Err(NodeError::Wrong(format!(
                "disk {name} is in service: take it out first (`disk fail {name}`)"
            )));
        }
        let (uuid, domain) = (old.uuid, old.domain());
        if let Some(uuid) = uuid.filter(|uuid| !self.control.state().disks.contains_key(&Disk(*uuid))) {
            return Err(Refused::NoDisk(Disk(uuid)).into());
        }
        let mut spec: DiskSpec = spec.parse()?;
        spec.domain.get_or_insert(domain);
        let index = self.add_slot(spec)?;
        if let Some(uuid) = uuid {
            if let Err(error) = self.control.execute(&Command::DiskOut { disk: uuid }) {
                // Nothing was changed: the new disk is not taken either.
                self.disks.pop();
                return Err(error.into());
            }
            for volume in self.volumes.iter().flatten() {
                if let Some(record) = self.control.state().volumes.get(&volume.name) {
                    self.plane.reconfigured(volume.index, record.to_config());
                }
            }
        }
        Ok(index)
    }

    pub(super) fn fault(&mut self, name: &str, fault: &Fault) -> Result<(), NodeError> {
        let disk = self.find_disk(name)?;
        let Some(handle) = &disk.faults else {
            return Err(NodeError::Wrong(
                "this node injects no faults: start it with `serve --faults`".into(),
            ));
        };
        handle.clear();
        let media = faulty::Fault::Fail(IoError::Media);
        let rule = match fault {
            Fault::None => return Ok(()),
            Fault::ReadErrors => Rule::always(Kinds::READS, media),
            Fault::WriteErrors => Rule::always(Kinds::WRITES, media),
            Fault::FlushErrors => Rule::always(Kinds::FLUSHES, media),
            Fault::Rot => Rule {
                times: ROTTEN_READS,
                ..Rule::always(Kinds::READS, faulty::Fault::Rot)
            },
            Fault::Delay(ms) => Rule::always(Kinds::ALL, faulty::Fault::Delay(Duration::from_millis(*ms))),
            Fault::Stuck => Rule::always(Kinds::ALL, faulty::Fault::Stuck),
        };
        handle.add(rule);
        Ok(())
    }
}
