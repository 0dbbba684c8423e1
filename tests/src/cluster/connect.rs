//! Connections of a link: how one begins, ends and is followed by the next, and which disks a peer tells of.

use std::collections::BTreeMap;

use unibody_dataplane::planted::{self, Bug};

use super::link::{Link, Message};
use super::world::{Cluster, Event};
use crate::sim::world::{Checked, note};

/// A peer that can not be reached for so long is lost, microseconds.
const AWAY: u64 = 3_000_000;

impl Cluster {
    /// The connection ends, as the owner's end sees it; the other end reads on what has come.
    pub(super) fn snap(&mut self, from: usize, to: usize) {
        let session = self.fresh();
        let now = self.now;
        let link = self.link(from, to);
        if link.open {
            link.away_since = now;
        }
        (link.open, link.ready) = (false, false);
        link.session = session;
        link.stalled_there.clear();
        link.stalled_back.clear();
        let mut again: Vec<u32> = (0..link.asked.len() as u32)
            .filter(|&p| link.asked[p as usize].is_some())
            .collect();
        again.sort_by_key(|&p| link.asked[p as usize].as_ref().map(|asked| asked.order));
        if planted::on(Bug::ResendOutOfOrder) {
            again.reverse();
        }
        for &place in &again {
            let asked = link.asked[place as usize].as_mut().expect("filtered");
            asked.again |= asked.sent;
            asked.sent = false;
        }
        link.waiting = again.into();
        let delay = self.random.range(500, 200_000);
        self.after(delay, Event::Connect { from, to, session });
    }

    pub(super) fn ended(&mut self, from: usize, to: usize, session: u64) {
        let link = self.link(from, to);
        if link.session == session && link.open {
            self.snap(from, to);
        }
    }

    pub(super) fn connect(&mut self, from: usize, to: usize, session: u64) -> Checked {
        if self.link(from, to).session != session || !self.sites[from].up || self.link(from, to).open {
            return Ok(());
        }
        let reached = self.sites[from].paused == 0
            && self.sites[to].running()
            && !self.blocked(from, to)
            && !self.blocked(to, from);
        if !reached {
            let delay = self.random.range(50_000, 300_000);
            self.after(delay, Event::Connect { from, to, session });
            return Ok(());
        }
        let drives = self.drives.iter().enumerate();
        let drives = drives
            .filter(|(_, d)| d.node == to && d.store.is_some())
            .map(|(i, d)| (i, d.turn))
            .collect();
        let life = self.sites[to].life;
        let link = self.link(from, to);
        link.served = session;
        link.held.clear();
        link.open = true;
        self.transmit(from, to, Message::Welcome { life, drives });
        Ok(())
    }

    pub(super) fn welcome(
        &mut self,
        from: usize,
        to: usize,
        life: u64,
        drives: Vec<(usize, u64)>,
    ) -> Checked {
        self.mark(&[5, self.now, from as u64, to as u64, life]);
        note!(self, "welcome {from}>{to} life {life} {drives:?}");
        let link = self.link(from, to);
        if link.peer.is_some_and(|peer| peer != life) {
            self.count("the peer is another process");
        }
        let link = self.link(from, to);
        (link.peer, link.ready) = (Some(life), true);
        self.count("connected");
        self.offered(from, to, drives)
    }

    /// The peer's disks are these now.
    pub(super) fn offered(&mut self, from: usize, to: usize, drives: Vec<(usize, u64)>) -> Checked {
        let now: BTreeMap<usize, u64> = drives.into_iter().collect();
        let before = self.link(from, to).up.clone();
        for (drive, turn) in before {
            if now.get(&drive) == Some(&turn) {
                continue;
            }
            if let (true, Some(&turn)) = (planted::on(Bug::NewPeerIsOld), now.get(&drive)) {
                let link = self.link(from, to);
                link.up.insert(drive, turn);
                link.asked
                    .iter_mut()
                    .flatten()
                    .filter(|a| a.drive == drive)
                    .for_each(|a| a.turn = turn);
                continue;
            }
            self.far_down(from, to, drive)?;
        }
        for (drive, turn) in now {
            self.link(from, to).up.insert(drive, turn);
            if let Some(owner) = self.sites[from].owner {
                self.disk_up(owner, drive, false)?;
            }
        }
        self.gather(from, to);
        Ok(())
    }

    fn far_down(&mut self, from: usize, to: usize, drive: usize) -> Checked {
        let link = self.link(from, to);
        link.up.remove(&drive);
        for asked in &mut link.asked {
            if asked.as_ref().is_some_and(|asked| asked.drive == drive) {
                *asked = None;
            }
        }
        match self.sites[from].owner {
            Some(owner) => self.disk_down(owner, drive),
            None => Ok(()),
        }
    }

    /// Nobody waits any more for what an owner asked of a disk.
    pub(super) fn abandon_far(&mut self, owner: u64, from: usize, to: usize, drive: usize) -> Checked {
        self.snap(from, to);
        for asked in &mut self.link(from, to).asked {
            if asked
                .as_ref()
                .is_some_and(|asked| asked.owner == owner && asked.drive == drive)
            {
                *asked = None;
            }
        }
        self.disk_down(owner, drive)
    }

    /// An owner is no more: nobody waits for its answers.
    pub(super) fn forget_asked(&mut self, owner: u64, from: usize) {
        for to in 0..self.sites.len() {
            let Some(link) = self.links.get_mut(&(from, to)) else {
                continue;
            };
            let out = link
                .asked
                .iter()
                .flatten()
                .any(|asked| asked.owner == owner && asked.sent);
            for asked in &mut link.asked {
                if asked.as_ref().is_some_and(|asked| asked.owner == owner) {
                    *asked = None;
                }
            }
            if out {
                self.snap(from, to);
            }
        }
    }

    /// Peers that are away for too long are lost.
    pub(super) fn look_at_links(&mut self, from: usize) -> Checked {
        for to in 0..self.sites.len() {
            let now = self.now;
            let Some(link) = self.links.get(&(from, to)) else {
                continue;
            };
            if link.open || link.up.is_empty() || now - link.away_since < AWAY {
                continue;
            }
            let up: Vec<usize> = link.up.keys().copied().collect();
            self.count("a peer was away for too long");
            for drive in up {
                self.far_down(from, to, drive)?;
            }
        }
        Ok(())
    }

    /// A node's process is gone: its ends of all links are.
    pub(super) fn drop_links(&mut self, node: usize, heard: bool) {
        for other in 0..self.sites.len() {
            if other == node {
                continue;
            }
            let session = self.fresh();
            let link = self.link(node, other);
            let served = link.served;
            *link = Link {
                session,
                served,
                last_there: link.last_there,
                last_back: link.last_back,
                ..Link::default()
            };
            link.held.clear();
            let link = self.link(other, node);
            link.served = 0;
            link.held.clear();
            let session = link.session;
            if link.open && heard && !self.blocked(node, other) {
                let delay = self.delay(self.profile.message);
                self.after(
                    delay,
                    Event::Ended {
                        from: other,
                        to: node,
                        session,
                    },
                );
            }
        }
    }

    /// A node's process runs: it connects, and who believed in an old connection hears that it is none.
    pub(super) fn raise_links(&mut self, node: usize) {
        for other in 0..self.sites.len() {
            if other == node {
                continue;
            }
            self.snap(node, other);
            let session = self.link(other, node).session;
            let delay = self.random.range(1_000, 300_000);
            self.after(
                delay,
                Event::Ended {
                    from: other,
                    to: node,
                    session,
                },
            );
        }
    }

    /// The peers hear of a disk that was opened or is gone.
    pub(super) fn tell_peers(&mut self, drive: usize) {
        let there = &self.drives[drive];
        let (node, turn) = (there.node, there.store.is_some().then_some(there.turn));
        for other in 0..self.sites.len() {
            if other != node && self.link(other, node).served != 0 {
                self.transmit(other, node, Message::Notice { drive, turn });
            }
        }
    }
}
