//! The volumes that this node owns: taken under a generation of this process, served, healed, let go.
//!
//! The state says who the owner is; being named is not enough to serve, since the name may be left from an earlier process. So
//! a volume that names this node and is not here is taken anew, under the next generation.
//!
//! A volume is served at `volumes/NAME.sock` in the node's directory, mode 0600, from when its owner is attached until it
//! begins to let go.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use unibody_dataplane::config::{Outcome, Proposal};
use unibody_dataplane::frontend::{DeviceConfig, Export};
use unibody_dataplane::ids::VolumeId;
use unibody_dataplane::plane::{DiskUp, ShardStatus, VOLUMES_MAX, VolumeIndex};

use super::{AgentError, Ground, Input};
use crate::admin::VolumeStatus;
use crate::node::{self, exports, exports::Sessions};
use crate::state::{Applied, Command, Node, NodeId, Refused, State};

/// Requests in a queue.
const QUEUE_SIZE: u16 = 1024;
/// Queues offered to a guest.
const QUEUES: u16 = 4;
/// How long a node that is being drained keeps a volume that it was given all the same: there may be nobody else for it.
const KEPT: Duration = Duration::from_secs(60);

/// What follows when a volume has become quiet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// Nobody owns it.
    Release,
    /// Another node owns it.
    HandOver(NodeId),
    /// Nothing: it is not ours any more.
    Nothing,
}

/// Where a volume here is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its owner seals and compares.
    Attaching,
    /// Its owner does I/O; it can be served.
    Attached,
    /// It gets a new name for its contents before it is served: writes that guests were promised may be gone.
    Renewing,
    Ending(After),
}

/// Whether a new generation is being taken for the same owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Renewal {
    No,
    Asked,
    /// And a proposal of the owner was refused meanwhile, which tells nothing about it: it was made in the name of the old one.
    Refused,
}

struct Held {
    name: String,
    id: VolumeId,
    index: VolumeIndex,
    generation: u32,
    /// The generation that it was taken under.
    since: u32,
    config: u32,
    size: u64,
    stage: Stage,
    /// It is not let go before then because the node is being drained.
    kept_until: Option<Instant>,
    instance: Option<u128>,
    /// Its next generation is asked for, under a running guest.
    renewal: Renewal,
    /// It has ended, and is let go when it is known under which generation.
    quiet: bool,
    export: Option<Export>,
    /// Serving it failed, and was said.
    complained: bool,
}

/// See the module.
pub(crate) struct Volumes {
    sessions: Arc<Sessions>,
    /// By their number in the data plane. Numbers are given in turn: something about a volume that has ended may still be on
    /// its way, under its number.
    held: Vec<Option<Held>>,
    next: usize,
    /// Being taken: a proposal is out.
    taking: BTreeMap<String, ()>,
}

impl Volumes {
    pub(crate) fn new(sessions: Arc<Sessions>) -> Self {
        Volumes {
            sessions,
            held: Vec::new(),
            next: 0,
            taking: BTreeMap::new(),
        }
    }

    fn find(&self, name: &str) -> Option<&Held> {
        self.held.iter().flatten().find(|held| held.name == name)
    }

    fn held(&mut self, index: VolumeIndex) -> Option<&mut Held> {
        self.held.get_mut(usize::from(index.0))?.as_mut()
    }

    /// Whether any volume is here.
    pub(crate) fn any(&self) -> bool {
        self.held.iter().any(Option::is_some)
    }

    /// Where a volume is served on this machine, once it is.
    pub(crate) fn socket(&self, dir: &Path, name: &str) -> Option<PathBuf> {
        let held = self.find(name)?;
        held.export.as_ref().map(|_| socket(dir, name))
    }

    /// Compares what the state says with what is here.
    pub(crate) fn look(&mut self, ground: &Ground, state: &State) {
        for number in 0..self.held.len() {
            let Some(held) = &mut self.held[number] else {
                continue;
            };
            let record = state
                .volumes
                .get(&held.name)
                .filter(|record| record.id == held.id.0);
            let ours = record.is_some_and(|record| {
                record.owner == Some(ground.me) && record.generation == held.generation
            });
            let renewed = held.renewal != Renewal::No
                && record.is_some_and(|record| {
                    record.owner == Some(ground.me) && record.generation == held.generation + 1
                });
            if renewed {
                // The answer to what this node asked for is on its way.
                continue;
            }
            if let (true, Some(record)) = (ours, record) {
                if record.config > held.config {
                    held.config = record.config;
                    ground.plane.reconfigured(held.index, record.to_config());
                }
                let user = state.user_of(&held.name).and_then(|vm| state.vms[vm].node);
                let idle = !held.export.as_ref().is_some_and(Export::connected);
                let drained = state.nodes.get(&ground.me).is_some_and(|node| node.drain);
                let kept = held.kept_until.is_some_and(|until| Instant::now() < until);
                let after = leaves(user, ground.me, drained && !kept);
                if let Some(after) = after.filter(|_| idle && held.stage == Stage::Attached) {
                    let index = held.index;
                    self.end(ground, index, after);
                    continue;
                }
                if record.size > held.size {
                    held.size = record.size;
                    if let Some(export) = &held.export {
                        export.resize(record.size);
                    }
                }
            } else if !matches!(held.stage, Stage::Ending(After::Nothing)) {
                let config = record.map(|record| record.to_config());
                let index = held.index;
                // Its owner hears that there is another one, so that nothing waits for replicas that obey that one.
                if let Some(config) = config {
                    ground.plane.reconfigured(index, config);
                }
                self.end(ground, index, After::Nothing);
            }
        }
        for (name, record) in &state.volumes {
            // Each taking is one more generation, of which there is an end: not for one that there is no room for.
            let room = self.held.iter().flatten().count() + self.taking.len() < VOLUMES_MAX;
            if record.owner == Some(ground.me)
                && room
                && self.find(name).is_none()
                && !self.taking.contains_key(name)
            {
                self.taking.insert(name.clone(), ());
                let command = Command::Attach {
                    name: name.clone(),
                    node: ground.me,
                    generation: record.generation,
                };
                let name = name.clone();
                ground.propose(command, move |outcome| Input::Taken(name, outcome));
            }
        }
        self.serve(ground, state);
    }

    /// A volume was taken: begin to own it.
    pub(crate) fn taken(
        &mut self,
        ground: &Ground,
        name: &str,
        outcome: Result<Applied, Refused>,
        ups: Vec<DiskUp>,
    ) {
        self.taking.remove(name);
        // Refused: somebody was faster, and the state says who.
        let Ok(Applied::Volume(config)) = outcome else {
            return;
        };
        if self.find(name).is_some() {
            return;
        }
        let Some(free) = free_number(&self.held, self.next) else {
            eprintln!("unibody: volume {name} is not served: a node has at most {VOLUMES_MAX} volumes");
            return;
        };
        self.next = free + 1;
        if free >= self.held.len() {
            self.held.resize_with(free + 1, || None);
        }
        let drained = |node: &Node| node.drain.then(|| Instant::now() + KEPT);
        let kept_until = ground
            .cluster
            .view()
            .state
            .nodes
            .get(&ground.me)
            .and_then(drained);
        let index = VolumeIndex(free as u16);
        self.held[free] = Some(Held {
            name: name.to_owned(),
            id: config.id,
            index,
            generation: config.generation.0,
            since: config.generation.0,
            config: config.config,
            size: config.size,
            stage: Stage::Attaching,
            kept_until,
            instance: None,
            renewal: Renewal::No,
            quiet: false,
            export: None,
            complained: false,
        });
        ground.plane.add_volume(index, *config, ups);
    }

    /// An owner asks for a change.
    pub(crate) fn propose(&mut self, ground: &Ground, index: VolumeIndex, id: VolumeId, proposal: Proposal) {
        let Some(held) = self.held(index).filter(|held| held.id == id) else {
            return;
        };
        let (name, generation) = (held.name.clone(), held.generation);
        ground.propose(Command::Propose { name, proposal }, move |outcome| {
            Input::Decided(index, (id, generation), outcome)
        });
    }

    pub(crate) fn decided(
        &mut self,
        ground: &Ground,
        index: VolumeIndex,
        (id, generation): (VolumeId, u32),
        outcome: Result<Applied, Refused>,
    ) {
        let of = |held: &&mut Held| held.id == id && (held.since..=held.generation).contains(&generation);
        let Some(held) = self.held(index).filter(of) else {
            return;
        };
        let outcome = match outcome {
            Ok(Applied::Outcome(outcome)) => outcome,
            // The volume was deleted.
            _ => Outcome::Fenced,
        };
        if outcome == Outcome::Fenced && held.renewal == Renewal::Asked {
            held.renewal = Renewal::Refused;
            return;
        }
        if let Outcome::Committed(config) | Outcome::Moved(config) = &outcome {
            held.config = held.config.max(config.config);
        }
        ground.plane.decided(index, outcome);
    }

    /// The owner of a volume serves I/O.
    pub(crate) fn attached(&mut self, ground: &Ground, index: VolumeIndex, power_lost: bool) {
        let Some(held) = self.held(index).filter(|held| held.stage == Stage::Attaching) else {
            return;
        };
        if !power_lost {
            held.stage = Stage::Attached;
            return;
        }
        eprintln!(
            "unibody: volume {}: power was lost under it: writes that were not flushed may be gone",
            held.name
        );
        held.stage = Stage::Renewing;
        let (name, instance) = (held.name.clone(), crate::raft::random());
        ground.propose(Command::Renew { name, instance }, move |outcome| {
            Input::Renamed(index, instance, outcome)
        });
    }

    pub(crate) fn renamed(&mut self, index: VolumeIndex, instance: u128, outcome: &Result<Applied, Refused>) {
        if let Some(held) = self.held(index).filter(|held| held.stage == Stage::Renewing)
            && outcome.is_ok()
        {
            held.instance = Some(instance);
            held.stage = Stage::Attached;
        }
    }

    /// Serves what can be served and is not yet.
    fn serve(&mut self, ground: &Ground, state: &State) {
        for held in self.held.iter_mut().flatten() {
            if held.stage != Stage::Attached || held.export.is_some() {
                continue;
            }
            let Some(record) = state.volumes.get(&held.name) else {
                continue;
            };
            let device = DeviceConfig {
                capacity_bytes: record.size,
                queues_max: QUEUES,
                queue_size_max: QUEUE_SIZE,
                read_only: record.read_only,
                serial: held.name.clone(),
                instance: held.instance.unwrap_or(record.instance),
            };
            let path = socket(&ground.dir, &held.name);
            let sessions = Arc::clone(&self.sessions);
            match Export::new(exports::device(held.index), device, &path, sessions) {
                Ok(export) => held.export = Some(export),
                Err(error) if !held.complained => {
                    held.complained = true;
                    eprintln!(
                        "unibody: volume {} can not be served: {}",
                        held.name,
                        node::chain(&error)
                    );
                }
                Err(_) => {}
            }
        }
    }

    /// The owner of a volume runs out of versions: the next generation is taken for it, and its guest notices nothing.
    pub(crate) fn renew_generation(&mut self, ground: &Ground, index: VolumeIndex) {
        let Some(held) = self
            .held(index)
            .filter(|held| held.renewal == Renewal::No && !matches!(held.stage, Stage::Ending(_)))
        else {
            return;
        };
        held.renewal = Renewal::Asked;
        let (of, generation) = ((held.id, held.generation), held.generation);
        let command = Command::Attach {
            name: held.name.clone(),
            node: ground.me,
            generation,
        };
        ground.propose(command, move |outcome| Input::Renewed(index, of, outcome));
    }

    /// The outcome of that.
    pub(crate) fn generation_renewed(
        &mut self,
        ground: &Ground,
        index: VolumeIndex,
        of: (VolumeId, u32),
        outcome: Result<Applied, Refused>,
    ) {
        let Some(held) = self.held(index).filter(|held| (held.id, held.generation) == of) else {
            return;
        };
        let refused = std::mem::replace(&mut held.renewal, Renewal::No) == Renewal::Refused;
        let quiet = held.quiet;
        let config = match outcome {
            Ok(Applied::Volume(config)) => Some(*config),
            // It may have been taken all the same, and the number of the proposal forgotten.
            _ => {
                let view = ground.cluster.view();
                let record = view.state.volumes.get(&held.name);
                let ours = record.filter(|record| {
                    (record.id, record.owner, record.generation)
                        == (held.id.0, Some(ground.me), held.generation + 1)
                });
                ours.map(|record| record.to_config())
            }
        };
        if let Some(config) = config {
            (held.generation, held.config) = (config.generation.0, config.config);
            ground.plane.renewed(index, config.clone());
            if refused {
                ground.plane.decided(index, Outcome::Moved(config));
            }
        } else if refused {
            ground.plane.decided(index, Outcome::Fenced);
        }
        if quiet {
            self.quiet(ground, index);
        }
    }

    /// The owner in the data plane has ended by itself.
    pub(crate) fn lost(&mut self, ground: &Ground, index: VolumeIndex, why: &str) {
        if let Some(held) = self.held(index) {
            eprintln!("unibody: volume {}: {why}", held.name);
            self.end(ground, index, After::Nothing);
        }
    }

    /// Lets a volume go, as an operator or another node asked; false if it is not here.
    pub(crate) fn let_go(
        &mut self,
        ground: &Ground,
        name: &str,
        to: Option<NodeId>,
    ) -> Result<bool, AgentError> {
        let Some(held) = self.find(name) else {
            return Ok(false);
        };
        if held.export.as_ref().is_some_and(Export::connected) {
            return Err(AgentError::Wrong(format!(
                "volume {name} is in use by a VM here: stop that first"
            )));
        }
        let index = held.index;
        self.end(ground, index, to.map_or(After::Release, After::HandOver));
        Ok(true)
    }

    pub(crate) fn let_all_go(&mut self, ground: &Ground) {
        let all: Vec<_> = self.held.iter().flatten().map(|held| held.index).collect();
        for index in all {
            self.end(ground, index, After::Release);
        }
    }

    /// Begins to end a volume: its sessions, then its owner. [`Input::Quiet`] says when both are over.
    fn end(&mut self, ground: &Ground, index: VolumeIndex, after: After) {
        let Some(held) = self.held(index) else { return };
        if let Stage::Ending(before) = &mut held.stage {
            // What is not ours any more is not given to anybody.
            if after == After::Nothing {
                *before = after;
            }
            return;
        }
        held.stage = Stage::Ending(after);
        let (export, plane) = (held.export.take(), Arc::clone(&ground.plane));
        ground.aside("ending", move || {
            // The session takes its queues back first; what is in flight may need proposals to be decided.
            drop(export);
            // A reactor that has ended has let go of everything.
            plane.remove_volume(index).recv().ok();
            Input::Quiet(index)
        });
    }

    pub(crate) fn quiet(&mut self, ground: &Ground, index: VolumeIndex) {
        // Let go under the generation before, it would stay this node's if its renewal is decided first.
        if let Some(held) = self.held(index).filter(|held| held.renewal != Renewal::No) {
            held.quiet = true;
            return;
        }
        let Some(held) = self.held.get_mut(usize::from(index.0)).and_then(Option::take) else {
            return;
        };
        let (name, generation) = (held.name, held.generation);
        let command = match held.stage {
            Stage::Ending(After::Release) => Command::Release {
                name,
                node: ground.me,
                generation,
            },
            Stage::Ending(After::HandOver(to)) => Command::Handover { name, generation, to },
            _ => return,
        };
        // Until that is decided the state names this node, and it must not be taken anew meanwhile.
        let name = command.volume().unwrap_or_default().to_owned();
        self.taking.insert(name.clone(), ());
        ground.propose(command, move |outcome| {
            Input::Taken(name, outcome.map(|_| Applied::Done))
        });
    }

    pub(crate) fn status(&self, dir: &Path, state: &State, shards: &[ShardStatus]) -> Vec<VolumeStatus> {
        let held = self.held.iter().flatten();
        held.filter_map(|held| {
            let record = state.volumes.get(&held.name)?;
            let mut status =
                node::volume_status(&held.name, record, held.index, held.export.as_ref(), shards);
            status.socket = held.export.as_ref().map(|_| socket(dir, &held.name));
            Some(status)
        })
        .collect()
    }
}

/// The next number from `next` on that no volume has.
fn free_number<T>(held: &[Option<T>], next: usize) -> Option<usize> {
    let mut numbers = (next..VOLUMES_MAX).chain(0..next.min(VOLUMES_MAX));
    numbers.find(|&number| held.get(number).is_none_or(Option::is_none))
}

/// Where an idle volume of this node goes, if it is to go: `user` is where the VM is that uses it.
fn leaves(user: Option<NodeId>, me: NodeId, drained: bool) -> Option<After> {
    match user {
        // The VM that uses it belongs elsewhere, and it goes there with it.
        Some(node) if node != me => Some(After::HandOver(node)),
        // Whoever leads gives it to another node.
        None if drained => Some(After::Release),
        _ => None,
    }
}

fn socket(dir: &Path, name: &str) -> PathBuf {
    dir.join("volumes").join(format!("{name}.sock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_given_again_as_late_as_possible() {
        let mut held: Vec<Option<()>> = vec![None; 3];
        assert_eq!(free_number(&held, 0), Some(0));
        assert_eq!(free_number(&held, 1), Some(1), "0 was had last");
        held = vec![Some(()); VOLUMES_MAX];
        assert_eq!(free_number(&held, 7), None);
        held[5] = None;
        for next in [0, 5, 6, VOLUMES_MAX] {
            assert_eq!(free_number(&held, next), Some(5));
        }
    }

    #[test]
    fn a_volume_goes_with_its_vm_or_leaves_a_drained_node() {
        let (a, b) = (NodeId(1), NodeId(2));
        assert_eq!(leaves(Some(b), a, false), Some(After::HandOver(b)));
        assert_eq!(leaves(Some(a), a, true), None, "its VM has nowhere to go");
        assert_eq!(leaves(None, a, true), Some(After::Release));
        assert_eq!(leaves(None, a, false), None);
    }
}
