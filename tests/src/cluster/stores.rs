//! The disks of the cluster: what is asked of their stores, and their I/O.

use unibody_dataplane::disk::{Io, Token};
use unibody_dataplane::ids::PowerId;
use unibody_dataplane::mirror::RequestId;
use unibody_dataplane::replica::{Header, Reply, Request, Status};
use unibody_dataplane::store::{self, Store, Tag};

use super::world::{Cluster, Event, Job};
use crate::sim::world::{Checked, note};

impl Cluster {
    /// Gives a store a request.
    pub(super) fn ask_store(&mut self, drive: usize, header: Header, request: Request, job: Job) -> Checked {
        let tag = self.fresh();
        self.mark(&[1, self.now, drive as u64, tag]);
        if self.drives[drive].store.is_none() {
            return self.job_done(drive, job, Reply::Refused(Status::DiskFailed));
        }
        self.drives[drive].jobs.insert(tag, job);
        self.store(drive, |store, out| store.submit(Tag(tag), header, request, out))
    }

    pub(super) fn store(
        &mut self,
        drive: usize,
        f: impl FnOnce(&mut Store, &mut Vec<store::Effect>),
    ) -> Checked {
        let Some(store) = &mut self.drives[drive].store else {
            return Ok(());
        };
        let mut out = Vec::new();
        f(store, &mut out);
        let turn = self.drives[drive].turn;
        for effect in out {
            match effect {
                store::Effect::Io { token, io } => self.begin_io(drive, token, io),
                store::Effect::Reply { tag, reply } => {
                    let job = self.drives[drive].jobs.remove(&tag.0);
                    let job = job.ok_or("a store answered a request twice")?;
                    self.job_done(drive, job, reply)?;
                }
                store::Effect::Failed(failure) => {
                    if !self.profile.base.injured() {
                        return Err(format!("disk {drive} failed without cause: {failure:?}"));
                    }
                    note!(self, "disk {drive} failed {failure:?}");
                    self.count("disk ended itself");
                    self.drives[drive].failed = true;
                    let delay = self.random.range(1_000, 2_000_000);
                    self.after(delay, Event::Distrust { drive, turn });
                }
                store::Effect::Closed => self.drives[drive].failed = true,
            }
        }
        if !self.drives[drive].batched {
            self.drives[drive].batched = true;
            self.after(1, Event::Batch { drive, turn });
        }
        Ok(())
    }

    fn begin_io(&mut self, drive: usize, token: Token, io: Io) {
        let mut delay = self.delay(self.profile.base.latency);
        if self.faulty && self.random.one_in(self.profile.base.slow) {
            delay *= 100;
            self.count("slow I/O");
            let there = &mut self.drives[drive];
            there.slow_until = there.slow_until.max(self.now + delay);
        }
        let turn = self.drives[drive].turn;
        let mishap = if self.faulty && !self.hush {
            let base = self.profile.base;
            base.mishap(&io, false, &mut self.random)
        } else {
            None
        };
        if let Some((name, _)) = mishap {
            self.count(name);
        }
        let mishap = mishap.map(|(_, mishap)| mishap);
        let serial = self.drives[drive]
            .disk
            .submit(token, io, mishap, &mut self.random);
        self.after(delay, Event::Done { drive, turn, serial });
    }

    /// A device I/O ends.
    pub(super) fn io_done(&mut self, drive: usize, turn: u64, serial: u64) -> Checked {
        let there = &mut self.drives[drive];
        if there.turn != turn || !there.disk.is_flying(serial) {
            return Ok(());
        }
        if there.stuck_until > self.now {
            let (until, later) = (there.stuck_until, self.random.below(1_000));
            self.at(until + later, Event::Done { drive, turn, serial });
            return Ok(());
        }
        if there.disk.forgets(serial) {
            // As good as a loss of power: what had completed may be gone. Whoever opens the disk again says so.
            there.power = PowerId(self.random.name());
            self.count("flush error that forgot");
        }
        let completion = self.drives[drive].disk.complete(serial, &mut self.random);
        self.stats.device_ios += 1;
        self.mark(&[2, self.now, drive as u64, serial, u64::from(completion.crcs[0])]);
        self.store(drive, |store, out| store.completed(completion, out))
    }

    fn job_done(&mut self, drive: usize, job: Job, reply: Reply) -> Checked {
        match job {
            Job::Local { owner, id } => {
                let turn = self.drives[drive].turn;
                let delay = self.random.range(1, 50);
                let time = (self.now + delay).max(self.drives[drive].last_out + 1);
                self.drives[drive].last_out = time;
                self.at(
                    time,
                    Event::LocalAnswer {
                        drive,
                        turn,
                        owner,
                        id,
                        reply,
                    },
                );
                Ok(())
            }
            Job::Remote {
                from,
                to,
                session,
                place,
                order,
                request,
                memory,
            } => self.far_done((from, to), session, (place, order), drive, request, memory, reply),
            Job::Oracle => {
                self.asked = Some(reply);
                Ok(())
            }
        }
    }

    /// An owner asks a disk of its own node.
    pub(super) fn send_local(
        &mut self,
        owner: u64,
        drive: usize,
        id: RequestId,
        header: Header,
        request: Request,
    ) {
        let turn = self.drives[drive].turn;
        let delay = self.random.range(1, 50);
        let time = (self.now + delay).max(self.drives[drive].last_in + 1);
        self.drives[drive].last_in = time;
        note!(
            self,
            "local {owner} disk {drive} {id:?} {}",
            crate::sim::trace::brief_request(&request)
        );
        self.at(
            time,
            Event::Local {
                drive,
                turn,
                owner,
                id,
                header,
                request,
            },
        );
    }
}
