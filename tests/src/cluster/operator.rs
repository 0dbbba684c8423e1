//! What an operator does meanwhile: takes disks out, puts disks in, grows the volume, drains nodes.

use unibody_control::planner;
use unibody_control::state::{Command, Disk};
use unibody_dataplane::ids::CHUNK;

use super::world::{Cluster, NAME};
use crate::sim::world::{Checked, note};

impl Cluster {
    /// A disk is taken out that could go on, and an empty one put in beside it.
    pub(super) fn retire(&mut self, drive: usize) -> Checked {
        let disk = self.drives[drive].uuid;
        let leaves = self.raft.state.disks[&Disk(disk)].out;
        if self.drives[drive].store.is_none() || leaves || self.drives.len() > 12 {
            return Ok(());
        }
        note!(self, "disk {drive} is taken out");
        self.count("disk taken out");
        self.commit_now(Command::DiskLeave { disk });
        self.add_drive(self.drives[drive].node);
        self.open_drive(self.drives.len() - 1)
    }

    /// An operator grows the volume.
    pub(super) fn resize(&mut self) {
        let state = &self.raft.state;
        let (volume, width) = (&state.volumes[NAME], self.profile.base.width);
        let Ok(chunks) = planner::plan_chunks(state, width, volume.mirror) else {
            return;
        };
        if volume.chunks.len() >= 4 * width as usize {
            return;
        }
        let size = volume.size + u64::from(width) * CHUNK;
        note!(self, "resized to {size}");
        self.count("volume resized");
        self.commit_now(Command::ResizeVolume {
            name: NAME.into(),
            size,
            chunks,
        });
    }

    /// An operator puts another disk into a node.
    pub(super) fn expand(&mut self, node: usize) -> Checked {
        if !self.sites[node].up || self.drives.len() > 12 {
            return Ok(());
        }
        self.count("disk added");
        self.add_drive(node);
        self.open_drive(self.drives.len() - 1)
    }

    /// An operator drains a node, which takes its disks out; or lets it take part again, with an empty disk.
    pub(super) fn drain(&mut self, site: usize) -> Checked {
        let node = self.sites[site].id;
        let on = !self.raft.state.nodes[&node].drain;
        if self.sites[site].gone.is_some() || on && self.drives.len() > 12 {
            return Ok(());
        }
        self.commit_now(Command::Drain { node, on });
        if on {
            self.count("node drained");
            return Ok(());
        }
        self.add_drive(site);
        match self.sites[site].up {
            true => self.open_drive(self.drives.len() - 1),
            false => Ok(()),
        }
    }

    /// Nothing is drained any more.
    pub(super) fn end_drains(&mut self) -> Checked {
        for site in 0..self.sites.len() {
            if self.raft.state.nodes[&self.sites[site].id].drain {
                self.drain(site)?;
            }
        }
        Ok(())
    }
}
