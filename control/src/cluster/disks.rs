//! The disks of this node: opened, recorded in the state, put into service, tried again after a failure.
//!
//! A disk is put into service only once its present boot is recorded: a replica is counted in sync only with the boot that
//! the state knows.

use std::sync::Arc;
use std::time::Instant;

use unibody_dataplane::disk::DiskKind;
use unibody_dataplane::disk::spec::DiskSpec;
use unibody_dataplane::plane::{DISKS_MAX, DiskIndex, DiskUp, ShardStatus};

use super::{AgentError, Ground, Input};
use crate::admin::{DiskStatus, Fault};
use crate::node::{self, DiskError, NodeDisk, Opened, Phase};
use crate::state::{Applied, Command, Disk, Refused, State};

/// What was proposed about a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// Its place, size and boot.
    Boot,
    /// That it failed by itself.
    Distrust,
}

/// A disk, and what waits.
struct Bay {
    disk: NodeDisk,
    /// Opened, and not in service before its boot is recorded.
    waiting: Option<Opened>,
    /// A proposal about it is out.
    recording: bool,
    /// It is not this node's any more, and only keeps its number.
    gone: bool,
}

/// See the module.
pub(crate) struct Disks {
    bays: Vec<Bay>,
    /// The state when it was last looked at.
    seen: Arc<State>,
    cache_bytes: usize,
    faults: bool,
}

impl Disks {
    pub(crate) fn new(cache_bytes: usize, faults: bool) -> Self {
        Disks {
            bays: Vec::new(),
            seen: Arc::default(),
            cache_bytes,
            faults,
        }
    }

    pub(crate) fn add(&mut self, spec: DiskSpec) -> Result<DiskIndex, AgentError> {
        if self.bays.len() >= DISKS_MAX {
            return Err(AgentError::Wrong(format!("a node has at most {DISKS_MAX} disks")));
        }
        let same = |bay: &&Bay| {
            !bay.gone
                && node::is_path(&spec).is_some()
                && node::is_path(&bay.disk.spec) == node::is_path(&spec)
        };
        if let Some(twin) = self.bays.iter().find(same) {
            return Err(AgentError::Wrong(format!(
                "disk {} is given twice",
                twin.disk.name
            )));
        }
        let index = DiskIndex(self.bays.len() as u16);
        self.bays.push(Bay {
            disk: NodeDisk::new(index, spec),
            waiting: None,
            recording: false,
            gone: false,
        });
        Ok(index)
    }

    fn bay(&mut self, index: DiskIndex) -> &mut Bay {
        &mut self.bays[usize::from(index.0)]
    }

    /// Those that can be reached.
    pub(crate) fn ups(&self) -> Vec<DiskUp> {
        self.bays.iter().filter_map(|bay| bay.disk.up).collect()
    }

    /// Opens a disk where nobody waits for it.
    pub(crate) fn open(&mut self, ground: &Ground, state: &Arc<State>, index: DiskIndex) {
        let (cache, faults, state) = (self.cache_bytes, self.faults, Arc::clone(state));
        let bay = self.bay(index);
        bay.disk.phase = Phase::Opening;
        let (name, spec) = (bay.disk.name.clone(), bay.disk.spec.clone());
        ground.aside("open", move || {
            let salts = state
                .disks
                .iter()
                .map(|(disk, record)| (disk.0, record.distrust))
                .collect();
            let opened = node::open_disk(&name, &spec, cache, faults, &salts);
            Input::Opened(index, Box::new(opened))
        });
    }

    pub(crate) fn opened(
        &mut self,
        ground: &Ground,
        state: &State,
        index: DiskIndex,
        opened: Result<Opened, DiskError>,
    ) {
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => return self.out_of_service(index, &node::chain(&error)),
        };
        let twin = self.bays.iter().find(|bay| {
            bay.disk.uuid == Some(opened.uuid) && bay.disk.index != index && bay.disk.up.is_some()
        });
        if let Some(twin) = twin {
            let why = format!("it is a copy of {}: use only one of them", twin.disk.name);
            return self.out_of_service(index, &why);
        }
        // A state that lags behind knows it when the disk is tried again.
        if !node::ours(state, opened.uuid, false, &opened.chunks) {
            let why = "it holds replicas of volumes that this cluster knows nothing of; they were not touched. Is it \
                       another cluster's, or was it taken out of this one? If its contents may be destroyed, format it \
                       with --force";
            return self.out_of_service(index, why);
        }
        let bay = self.bay(index);
        bay.disk.uuid = Some(opened.uuid);
        bay.disk.kind = opened.kind;
        let domain = bay.disk.spec.domain.clone().unwrap_or_default();
        let (disk, boot, bytes) = (opened.uuid, opened.boot.0, opened.bytes);
        bay.waiting = Some(opened);
        bay.recording = true;
        let add = Command::AddDisk {
            disk,
            node: ground.me,
            domain,
            bytes,
        };
        let record = Command::DiskUp { disk, boot };
        let (inputs, proposer) = (ground.inputs.clone(), ground.proposer.clone());
        let say = move |outcome| {
            inputs
                .send(Input::DiskRecorded(index, Record::Boot, outcome))
                .ok();
        };
        ground.proposer.propose(add, move |outcome| match outcome {
            Ok(_) => proposer.propose(record, say),
            refused => say(refused),
        });
    }

    fn out_of_service(&mut self, index: DiskIndex, why: &str) {
        let disk = &mut self.bay(index).disk;
        eprintln!("unibody: disk {} is not in service: {why}", disk.name);
        disk.failed(why.to_owned(), Instant::now());
    }

    pub(crate) fn recorded(
        &mut self,
        ground: &Ground,
        index: DiskIndex,
        record: Record,
        outcome: &Result<Applied, Refused>,
    ) {
        let bay = self.bay(index);
        bay.recording = false;
        if record == Record::Distrust {
            // Refused: the disk is unknown, and whoever makes it known again opens it first.
            bay.disk.distrust = false;
            return;
        }
        let Some(opened) = bay.waiting.take() else { return };
        if let Err(refused) = outcome {
            let why = refused.to_string();
            // Its store is dropped without having been used: as after a crash.
            drop(opened);
            return self.out_of_service(index, &why);
        }
        let up = opened.up(index);
        if let Err(error) = ground.plane.add_disk(up, opened.service) {
            return self.out_of_service(index, &error.to_string());
        }
        for notice in &opened.notices {
            eprintln!("unibody: {notice}");
        }
        let disk = &mut self.bay(index).disk;
        disk.phase = Phase::Online;
        disk.up = Some(up);
        disk.faults = opened.faults;
        disk.found = opened.chunks;
    }

    pub(crate) fn distrusted(&mut self, ground: &Ground, index: DiskIndex) {
        self.bay(index).disk.distrust = true;
        self.record_distrust(ground, index);
    }

    fn record_distrust(&mut self, ground: &Ground, index: DiskIndex) {
        let bay = self.bay(index);
        let Some(disk) = bay.disk.uuid else { return };
        if bay.recording {
            return;
        }
        bay.recording = true;
        let salt = crate::raft::random();
        ground.propose(Command::Distrust { disk, salt }, move |outcome| {
            Input::DiskRecorded(index, Record::Distrust, outcome)
        });
    }

    pub(crate) fn failed(&mut self, ground: &Ground, index: DiskIndex, reason: String) {
        let disk = &mut self.bay(index).disk;
        eprintln!("unibody: disk {} is out of service: {reason}", disk.name);
        disk.failed(reason, Instant::now());
        ground.plane.disk_down(index);
    }

    pub(crate) fn silent(&mut self, ground: &Ground, index: DiskIndex) {
        let disk = &mut self.bay(index).disk;
        if disk.phase == Phase::Online {
            disk.phase = Phase::Leaving;
            eprintln!(
                "unibody: disk {} answers nothing and is taken out of service",
                disk.name
            );
            ground.plane.fail_disk(index);
        }
    }

    /// Records again what the state does not have right, lets disks go that it has forgotten, and gives back the space of
    /// replicas that have no place on a disk any more.
    pub(crate) fn look(&mut self, ground: &Ground, state: &Arc<State>) {
        self.left_behind(state);
        for number in 0..self.bays.len() {
            let bay = &mut self.bays[number];
            let (Some(up), Some(uuid), false) = (bay.disk.up, bay.disk.uuid, bay.recording) else {
                continue;
            };
            let index = bay.disk.index;
            match state.disks.get(&Disk(uuid)) {
                // Two copies of one disk would record their boots against each other without end.
                Some(record) if record.node != ground.me && bay.disk.phase == Phase::Online => {
                    eprintln!(
                        "unibody: disk {} is taken out of service: node {} has opened a disk with the same contents since; use only one of them",
                        bay.disk.name, record.node
                    );
                    bay.disk.by_hand = true;
                    bay.disk.phase = Phase::Leaving;
                    ground.plane.fail_disk(index);
                }
                Some(record) if record.node != ground.me => {}
                // A proposal of an earlier process came late and overwrote what this one had recorded.
                Some(record) if record.boot != up.boot.0 => {
                    bay.recording = true;
                    let record = Command::DiskUp {
                        disk: uuid,
                        boot: up.boot.0,
                    };
                    ground.propose(record, move |outcome| {
                        Input::DiskRecorded(index, Record::Boot, outcome)
                    });
                }
                Some(_) => {}
                // It was recorded before it was put into service: so it was taken out, and everything on it has moved.
                None if self.seen.disks.contains_key(&Disk(uuid)) => {
                    bay.gone = true;
                    ground.plane.fail_disk(index);
                }
                None => {}
            }
        }
        self.seen = Arc::clone(state);
        for bay in self.bays.iter_mut().filter(|bay| bay.disk.up.is_some()) {
            if bay.disk.found.is_empty() {
                continue;
            }
            let Some(uuid) = bay.disk.uuid else { continue };
            let mut garbage = std::collections::BTreeMap::<_, Vec<_>>::new();
            for chunk in bay.disk.found.drain(..) {
                if let Some(generation) = state.orphan(uuid, &chunk) {
                    garbage.entry(generation).or_default().push(chunk);
                }
            }
            for (generation, chunks) in garbage {
                ground.plane.drop_chunks(bay.disk.index, chunks, generation);
            }
        }
    }

    /// Replicas that had a place on a disk here when the state was last looked at and may have none now.
    fn left_behind(&mut self, state: &State) {
        if self.seen.volumes == state.volumes {
            return;
        }
        for (name, before) in &self.seen.volumes {
            let now = state.volumes.get(name);
            if now.is_some_and(|now| Arc::ptr_eq(now, before)) {
                continue;
            }
            for bay in self.bays.iter_mut().filter(|bay| bay.disk.up.is_some()) {
                if let Some(uuid) = bay.disk.uuid {
                    let placed = before.replicas_on(uuid);
                    bay.disk
                        .found
                        .extend(placed.filter(|chunk| state.orphan(uuid, chunk).is_some()));
                }
            }
        }
    }

    /// Lets a disk go that could not be used, or that is not this node's any more; what is left are the names of the others.
    ///
    /// # Errors
    /// When it is in service.
    pub(crate) fn forget(&mut self, name: &str) -> Result<(), AgentError> {
        let bay = self.find(name)?;
        if !matches!(bay.disk.phase, Phase::Failed(_)) {
            return Err(AgentError::Wrong(format!(
                "disk {name} is in service: take it out with `unibody disk remove`"
            )));
        }
        bay.gone = true;
        Ok(())
    }

    /// What the node is to open when it is started the next time.
    pub(crate) fn specs(&self) -> Vec<String> {
        let here = self.bays.iter().filter(|bay| !bay.gone);
        here.map(|bay| bay.disk.spec.to_string()).collect()
    }

    pub(crate) fn tick(&mut self, ground: &Ground, state: &Arc<State>) {
        let now = Instant::now();
        for number in 0..self.bays.len() {
            let bay = &self.bays[number];
            let index = bay.disk.index;
            if bay.gone {
                continue;
            }
            if bay.disk.distrust {
                self.record_distrust(ground, index);
            } else if bay.disk.due(now) && !bay.recording {
                self.open(ground, state, index);
            }
        }
    }

    fn find(&mut self, name: &str) -> Result<&mut Bay, AgentError> {
        let names: Vec<_> = self
            .bays
            .iter()
            .filter(|bay| !bay.gone)
            .map(|bay| bay.disk.name.clone())
            .collect();
        let found =
            self.bays.iter_mut().filter(|bay| !bay.gone).find(|bay| {
                bay.disk.name == name || bay.disk.uuid.is_some_and(|uuid| uuid.to_string() == name)
            });
        found.ok_or_else(|| {
            AgentError::Wrong(format!(
                "there is no disk {name} here; there are {}",
                names.join(", ")
            ))
        })
    }

    pub(crate) fn fail(&mut self, ground: &Ground, name: &str) -> Result<(), AgentError> {
        let disk = &mut self.find(name)?.disk;
        if disk.phase != Phase::Online {
            return Err(AgentError::Wrong(format!("disk {name} is not in service")));
        }
        disk.by_hand = true;
        disk.phase = Phase::Leaving;
        ground.plane.fail_disk(disk.index);
        Ok(())
    }

    pub(crate) fn put_back(
        &mut self,
        ground: &Ground,
        state: &Arc<State>,
        name: &str,
    ) -> Result<(), AgentError> {
        let bay = self.find(name)?;
        let index = bay.disk.index;
        match bay.disk.phase {
            Phase::Failed(_) if bay.disk.kind == DiskKind::Memory => Err(AgentError::Wrong(format!(
                "disk {name} was in memory and is gone: add another"
            ))),
            Phase::Failed(_) if bay.disk.distrust => Err(AgentError::Wrong(format!(
                "that disk {name} failed by itself is not recorded yet: is the cluster without a leader?"
            ))),
            Phase::Failed(_) => {
                bay.disk.by_hand = false;
                self.open(ground, state, index);
                Ok(())
            }
            Phase::Leaving => Err(AgentError::Wrong(format!(
                "the last I/O of disk {name} has not ended; try again"
            ))),
            Phase::Online | Phase::Opening => Err(AgentError::Wrong(format!("disk {name} is in service"))),
        }
    }

    pub(crate) fn fault(&mut self, name: &str, fault: &Fault) -> Result<(), AgentError> {
        let Some(handle) = &self.find(name)?.disk.faults else {
            return Err(AgentError::Wrong(
                "this node injects no faults: make it with --faults".into(),
            ));
        };
        handle.clear();
        if let Some(rule) = node::fault_rule(fault) {
            handle.add(rule);
        }
        Ok(())
    }

    pub(crate) fn status(&self, state: &State, shards: &[ShardStatus]) -> Vec<DiskStatus> {
        let of = |bay: &Bay| {
            let mut status = node::disk_status(&bay.disk, state, shards);
            if let Some(domain) = bay.disk.uuid.and_then(|uuid| state.domain_of(Disk(uuid))) {
                status.domain = domain.to_owned();
            }
            status
        };
        self.bays.iter().filter(|bay| !bay.gone).map(of).collect()
    }

    /// Flushes all disks and marks them clean. False: one failed.
    pub(crate) fn close(&mut self, ground: &Ground, end: Instant) -> bool {
        let online = self.bays.iter().filter(|bay| bay.disk.phase == Phase::Online);
        let closing: Vec<_> = online
            .map(|bay| ground.plane.close_disk(bay.disk.index))
            .collect();
        closing.into_iter().all(|closed| {
            let left = end.saturating_duration_since(Instant::now());
            closed.recv_timeout(left).unwrap_or(false)
        })
    }
}
