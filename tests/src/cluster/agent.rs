//! What a node makes of the committed state: it becomes the owner where it is to be, follows as the owner, and ends when
//! somebody else is; and what it does for its mirror.

use std::collections::BTreeSet;

use unibody_control::state::{Applied, Command, Disk, Replica, ReplicaState};
use unibody_dataplane::config::Outcome;
use unibody_dataplane::config::VolumeConfig;
use unibody_dataplane::mirror::{self, Limits, Mirror, OpId, Phase, RequestId};
use unibody_dataplane::planted::{self, Bug};
use unibody_dataplane::replica::{Reply, Status};

use super::consensus::Purpose;
use super::world::{Answer, Cluster, Event, NAME};
use crate::sim::world::{Checked, note};

/// A node's belief that it is the owner.
pub(super) struct Owner {
    pub(super) node: usize,
    pub(super) generation: u32,
    pub(super) mirror: Mirror,
    /// Of the volume, as it knows it.
    pub(super) size: u64,
    /// Disks that the mirror believes up.
    up: BTreeSet<usize>,
    pub(super) attached: bool,
    /// It lets go, since then.
    pub(super) leaving: Option<u64>,
    /// How it came to its end, if it has.
    over: Option<Over>,
    pub(super) proposing: bool,
    /// Its guest is older than itself.
    old_guest: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Fenced,
    Failed,
    Detached,
    /// Its guest has seen writes that are gone.
    Lost,
}

impl Cluster {
    /// Looks at what was committed.
    pub(super) fn agent(&mut self, node: usize) -> Checked {
        let now_ms = self.sites[node].clock(self.now) / 1000;
        let Some(volume) = self.sites[node].state.volumes.get(NAME).cloned() else {
            return Ok(());
        };
        let me = self.sites[node].id;
        for drive in 0..self.drives.len() {
            let there = &self.drives[drive];
            let known = self.sites[node].state.disks.get(&Disk(there.uuid));
            // An older report may have been committed late.
            let wrong =
                there.node == node && there.store.is_some() && known.is_some_and(|d| d.boot != there.boot.0);
            let asked = |ask: &super::consensus::Ask| {
                ask.purpose == Purpose::Boot(drive) && ask.life == self.sites[node].life
            };
            if wrong && !self.raft.asks.values().any(asked) && !planted::on(Bug::BootReportedOnce) {
                self.count("boot reported again");
                self.report_boot(drive);
            }
        }
        if let Some(id) = self.sites[node].owner {
            let owner = &self.owners[&id];
            let generation = owner.generation;
            let gone =
                volume.generation > generation || volume.generation == generation && volume.owner != Some(me);
            if gone && self.random.one_in(3) {
                self.count("owner heard that it is none");
                return self.end_owner(id, true);
            }
            if owner.leaving.is_some_and(|since| self.now - since > 20_000_000) {
                self.count("impatient release");
                return self.end_owner(id, true);
            }
            if volume.generation == generation {
                let config = volume.to_config();
                let owner = self.owners.get_mut(&id).expect("looked at");
                if std::mem::replace(&mut owner.size, config.size) != config.size {
                    self.count("owner heard of a new size");
                }
                self.mirror(id, |mirror, out| mirror.reconfigured(config, out))?;
            }
            return self.mirror(id, |mirror, out| mirror.tick(now_ms, out));
        }
        if self.sites[node]
            .attaching
            .is_some_and(|token| self.raft.asks.contains_key(&token))
        {
            return Ok(());
        }
        if volume.owner != Some(me) && self.sites[node].guest {
            self.guest_dies(node);
        }
        let wanted = volume.owner == Some(me) || volume.owner.is_none() && self.random.one_in(5);
        if wanted {
            let command = Command::Attach {
                name: NAME.into(),
                node: me,
                generation: volume.generation,
            };
            let token = self.ask(node, command, Purpose::Attach);
            self.sites[node].attaching = Some(token);
        }
        Ok(())
    }

    /// The answer to a wish to be the owner.
    pub(super) fn attached(&mut self, node: usize, answer: Answer) -> Checked {
        self.sites[node].attaching = None;
        match answer {
            Ok(Applied::Volume(config)) if self.sites[node].owner.is_none() => {
                self.start_owner(node, *config)
            }
            Ok(_) => Ok(()),
            Err(_) => {
                self.count("attachment refused");
                Ok(())
            }
        }
    }

    fn start_owner(&mut self, node: usize, config: VolumeConfig) -> Checked {
        let base = self.profile.base;
        let limits = Limits {
            ops: base.depth + 1,
            edges: 2,
            sync: 2,
            unstable_bytes: 1 << 20,
            io_timeout_ms: base.io_timeout_ms,
            scrub_ms: base.scrub_ms,
            ..Limits::default()
        };
        let id = self.fresh();
        note!(
            self,
            "owner {id} on node {node} generation {}",
            config.generation.0
        );
        self.mark(&[7, self.now, id, node as u64, u64::from(config.generation.0)]);
        if self
            .owners
            .values()
            .any(|owner| owner.generation < config.generation.0)
        {
            self.count("owner beside an old one");
        }
        let generation = config.generation.0;
        let size = config.size;
        let mirror = Mirror::new(config, limits);
        let up = BTreeSet::new();
        self.owners.insert(
            id,
            Owner {
                node,
                generation,
                mirror,
                size,
                up,
                attached: false,
                leaving: None,
                over: None,
                proposing: false,
                old_guest: self.sites[node].guest,
            },
        );
        self.sites[node].owner = Some(id);
        let now_ms = self.sites[node].clock(self.now) / 1000;
        self.mirror(id, |mirror, out| mirror.tick(now_ms, out))?;
        let near: Vec<usize> = (0..self.drives.len())
            .filter(|&d| self.drives[d].node == node && self.drives[d].store.is_some())
            .collect();
        for drive in near {
            self.disk_up(id, drive, true)?;
        }
        let far: Vec<usize> = self
            .links
            .iter()
            .filter(|((from, _), _)| *from == node)
            .flat_map(|(_, link)| link.up.keys().copied())
            .collect();
        for drive in far {
            self.disk_up(id, drive, false)?;
        }
        self.mirror(id, |mirror, out| mirror.attach(out))?;
        if self.sites[node].guest {
            self.count("guest outlived the data plane");
            return self.resubmit(node);
        }
        self.guest_starts(node);
        Ok(())
    }

    /// An owner is no more; with `guest` its guest dies too.
    pub(super) fn end_owner(&mut self, id: u64, guest: bool) -> Checked {
        let Some(owner) = self.owners.remove(&id) else {
            return Ok(());
        };
        note!(self, "owner {id} ends, guest too: {guest}");
        let status = owner.mirror.status();
        self.add("bytes made equal", status.bytes_synced);
        self.add("blocks adopted", status.blocks_adopted);
        self.add("operations failed", status.errors_io);
        self.add("read repairs", status.read_repairs);
        self.add("blocks repaired by the scrub", status.blocks_repaired);
        if status.blocks_lost > 0 && self.victim.is_some() {
            return Err(format!(
                "{} blocks were lost though one copy was good",
                status.blocks_lost
            ));
        }
        self.add("answers nobody knew", status.answers_odd);
        let node = owner.node;
        if self.sites[node].owner == Some(id) {
            self.sites[node].owner = None;
        }
        self.forget_asked(id, node);
        // Disks of its own node may be using its memory still.
        self.old_mirrors.push(owner.mirror);
        match guest {
            true => self.guest_dies(node),
            false => self.bury_answered(node),
        }
        Ok(())
    }

    pub(super) fn disk_up(&mut self, id: u64, drive: usize, near: bool) -> Checked {
        let Some(owner) = self.owners.get_mut(&id) else {
            return Ok(());
        };
        if !owner.up.insert(drive) {
            return Ok(());
        }
        let uuid = self.drives[drive].uuid;
        self.mirror(id, |mirror, out| mirror.disk_up(uuid, near, out))
    }

    pub(super) fn disk_down(&mut self, id: u64, drive: usize) -> Checked {
        let Some(owner) = self.owners.get_mut(&id) else {
            return Ok(());
        };
        if !owner.up.remove(&drive) {
            return Ok(());
        }
        let uuid = self.drives[drive].uuid;
        self.mirror(id, |mirror, out| mirror.disk_down(uuid, out))
    }

    /// A replica has answered.
    pub(super) fn replied(&mut self, id: u64, drive: usize, request: RequestId, reply: Reply) -> Checked {
        let Some(owner) = self.owners.get(&id) else {
            return Ok(());
        };
        if reply == Reply::Refused(Status::StaleGeneration) {
            let newest = self.raft.state.volumes[NAME].generation;
            if newest == owner.generation {
                return Err(format!("disk {drive} refuses the newest owner as an old one"));
            }
            self.count("zombie refused");
        }
        note!(
            self,
            "answer to {id} from disk {drive} {request:?} {}",
            crate::sim::trace::brief(&reply)
        );
        let read = matches!(reply, Reply::Read { .. });
        if read && !self.believes(id) {
            self.count("read to be confirmed");
        }
        self.mirror(id, |mirror, out| mirror.replied(request, reply, out))
    }

    /// The outcome of what the mirror proposed.
    pub(super) fn decided(&mut self, id: u64, answer: Answer) -> Checked {
        let outcome = match answer {
            Ok(Applied::Outcome(outcome)) => outcome,
            other => return Err(format!("a proposal was answered by {other:?}")),
        };
        let Some(owner) = self.owners.get_mut(&id) else {
            return Ok(());
        };
        owner.proposing = false;
        if outcome == Outcome::Fenced {
            self.count("proposal refused: fenced");
        }
        self.mirror(id, |mirror, out| mirror.decided(outcome, out))
    }

    /// Whether an owner may believe one replica: a lease, and nothing applied that says otherwise.
    fn believes(&self, id: u64) -> bool {
        let owner = &self.owners[&id];
        let site = &self.sites[owner.node];
        let volume = &site.state.volumes.get(NAME);
        let mine = volume.is_some_and(|v| {
            v.generation < owner.generation || v.generation == owner.generation && v.owner == Some(site.id)
        });
        mine && self.leased(owner.node) || planted::on(Bug::LeaseIgnored)
    }

    /// Lets an owner's mirror do something. Whether it has a lease is looked at each time, with a fresh clock.
    pub(super) fn mirror(
        &mut self,
        id: u64,
        f: impl FnOnce(&mut Mirror, &mut Vec<mirror::Effect>),
    ) -> Checked {
        if !self.owners.contains_key(&id) {
            return Ok(());
        }
        let leased = self.believes(id);
        let mut out = Vec::new();
        let owner = self.owners.get_mut(&id).expect("looked at");
        let stale = planted::on(Bug::LeaseLookedAtLate) && self.random.below(40) != 0;
        if !stale {
            owner.mirror.set_leased(leased, &mut out);
        }
        f(&mut owner.mirror, &mut out);
        for effect in out {
            self.carry_out(id, effect)?;
        }
        self.see_to_end(id)
    }

    fn carry_out(&mut self, id: u64, effect: mirror::Effect) -> Checked {
        let Some(owner) = self.owners.get_mut(&id) else {
            return Ok(());
        };
        let node = owner.node;
        match effect {
            mirror::Effect::Send {
                disk,
                id: request,
                header,
                request: what,
            } => {
                let uuid = owner.mirror.disk(disk);
                let drive = self.drive(uuid).ok_or("a request to an unknown disk")?;
                if !self.owners[&id].up.contains(&drive) {
                    return Err(format!("a request to a disk that is down: {what:?}"));
                }
                let there = self.drives[drive].node;
                if there != node {
                    return self.send_far(id, (node, there), drive, request, header, what);
                }
                self.send_local(id, drive, request, header, what);
            }
            mirror::Effect::ZeroFill { data, len } => crate::sim::work::fill_zeros(data, len),
            mirror::Effect::Merge { op, head, tail } => {
                let delay = self.random.range(1, 100);
                self.after(
                    delay,
                    Event::Merged {
                        owner: id,
                        op: op.0,
                        head,
                        tail,
                    },
                );
            }
            mirror::Effect::Done {
                op: OpId(op),
                result,
                released,
            } => self.op_done(id, op, result, released)?,
            mirror::Effect::Release { op } => self.op_released(node, op.0)?,
            mirror::Effect::Propose(proposal) => {
                owner.proposing = true;
                self.ask(
                    node,
                    Command::Propose {
                        name: NAME.into(),
                        proposal,
                    },
                    Purpose::Owner(id),
                );
            }
            mirror::Effect::Attached { power_lost } => {
                owner.attached = true;
                self.count("attached");
                self.mark(&[8, self.now, id, u64::from(power_lost)]);
                note!(self, "attached {id} power lost: {power_lost}");
                if power_lost {
                    self.unflushed_lost("at attach")?;
                    let owner = self.owners.get_mut(&id).expect("it spoke");
                    if owner.old_guest {
                        owner.over = Some(Over::Lost);
                    }
                }
            }
            mirror::Effect::Abandon { disk } => {
                let uuid = owner.mirror.disk(disk);
                let drive = self.drive(uuid).ok_or("an unknown disk is abandoned")?;
                self.count("abandoned disk");
                self.after(0, Event::Abandon { owner: id, drive });
            }
            mirror::Effect::Fenced => {
                self.count("fenced");
                self.owners.get_mut(&id).expect("it spoke").over = Some(Over::Fenced);
            }
            mirror::Effect::Failed => {
                self.count("last copy forgot writes");
                self.owners.get_mut(&id).expect("it spoke").over = Some(Over::Failed);
            }
            mirror::Effect::NewGeneration => return Err("a new generation after so few writes".into()),
            mirror::Effect::Detached => {
                self.owners.get_mut(&id).expect("it spoke").over = Some(Over::Detached)
            }
        }
        Ok(())
    }

    fn see_to_end(&mut self, id: u64) -> Checked {
        let Some(owner) = self.owners.get(&id) else {
            return Ok(());
        };
        let (node, generation) = (owner.node, owner.generation);
        let Some(over) = owner.over else { return Ok(()) };
        let volume = &self.raft.state.volumes[NAME];
        if over == Over::Fenced
            && volume.generation == generation
            && volume.owner == Some(self.sites[node].id)
        {
            return Err("fenced by nobody".into());
        }
        if over == Over::Failed {
            self.unflushed_lost("in service")?;
        }
        self.end_owner(id, true)?;
        if over == Over::Detached {
            let (name, me) = (NAME.into(), self.sites[node].id);
            let to = self.random.below(self.sites.len() as u64) as usize;
            let command = if self.random.one_in(2) && self.sites[to].gone.is_none() {
                self.count("handed over");
                Command::Handover {
                    name,
                    generation,
                    to: self.sites[to].id,
                }
            } else {
                self.count("released");
                Command::Release {
                    name,
                    node: me,
                    generation,
                }
            };
            let token = self.ask(node, command, Purpose::Nothing);
            self.sites[node].attaching = Some(token);
        }
        Ok(())
    }

    /// An owner says that acknowledged writes may be gone: only true if all in-sync replicas of a chunk lost power.
    fn unflushed_lost(&mut self, when: &str) -> Checked {
        let lost = self.raft.forgot || self.forgot();
        if !lost {
            return Err(format!(
                "acknowledged writes were given up {when}, though an in-sync replica kept its power"
            ));
        }
        self.count("all in-sync replicas of a chunk lost power");
        if self.profile.base.volatile {
            self.clock += 1;
            self.checker.power_lost(self.clock);
            self.keep_under_way();
        }
        Ok(())
    }

    /// All in-sync replicas of some chunk have lost power since that was last recorded of them.
    pub(super) fn forgot(&self) -> bool {
        let Some(volume) = self.raft.state.volumes.get(NAME) else {
            return false;
        };
        let lost = |slot: &Replica| {
            let drive = self.drive(slot.disk.0);
            drive.is_none_or(|d| self.drives[d].power.0 != slot.power)
        };
        let in_sync = |slot: &&Replica| slot.state == ReplicaState::InSync;
        volume
            .chunks
            .iter()
            .any(|slots| slots.iter().filter(in_sync).all(lost))
    }

    /// A disk has been silent for too long: nothing it answers counts any more.
    pub(super) fn abandon(&mut self, id: u64, drive: usize) -> Checked {
        let Some(owner) = self.owners.get(&id).filter(|owner| owner.up.contains(&drive)) else {
            return Ok(());
        };
        let (node, there) = (owner.node, self.drives[drive].node);
        match there == node {
            true => self.lose_drive(drive, false),
            false => self.abandon_far(id, node, there, drive),
        }
    }

    /// The owner whose word counts: of the newest generation, serving.
    pub(super) fn serving(&self) -> Option<u64> {
        let volume = &self.raft.state.volumes[NAME];
        let found = self
            .owners
            .iter()
            .find(|(_, owner)| owner.generation == volume.generation)?;
        (found.1.mirror.phase() == Phase::Serving).then_some(*found.0)
    }

    /// A disk was opened: the cluster hears of its boot.
    pub(super) fn report_boot(&mut self, drive: usize) {
        let there = &self.drives[drive];
        let command = Command::DiskUp {
            disk: there.uuid,
            boot: there.boot.0,
        };
        let node = there.node;
        self.ask(node, command, Purpose::Boot(drive));
    }
}
