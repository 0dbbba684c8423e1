//! Waiting for a node to be left by everything, or for the state to show that something can not leave it.

use std::time::Duration;

use anyhow::{Result, bail};
use unibody_control::api::types::{ClusterStatus, NodeSummary, VmSummary, VolumeSummary};

use crate::output::{Out, size};
use crate::progress::Bar;
use crate::target::Client;

/// Between two looks at a node that is being drained.
const LOOK: Duration = Duration::from_millis(500);

/// What is still on a node: replicas, volumes and VMs.
fn left_on(status: &ClusterStatus, name: &str) -> u64 {
    let disks = status.disks.iter().filter(|disk| disk.node == name);
    let replicas: u64 = disks.map(|disk| disk.replicas).sum();
    let volumes = status.volumes.iter().filter(|volume| is_of(volume, name)).count() as u64;
    replicas + volumes + vms_on(status, name).count() as u64
}

fn is_of(volume: &VolumeSummary, node: &str) -> bool {
    volume.owner.as_deref() == Some(node)
}

fn vms_on<'a>(status: &'a ClusterStatus, node: &'a str) -> impl Iterator<Item = &'a VmSummary> {
    status
        .vms
        .iter()
        .filter(move |vm| vm.node.as_deref() == Some(node))
}

/// What can not leave a node, and what would help; `None` while anything still can.
fn stuck(status: &ClusterStatus, name: &str) -> Option<String> {
    let others = || {
        let other = |node: &&NodeSummary| node.name != name && !node.draining;
        status.nodes.iter().filter(other)
    };
    let mut stays = Vec::new();
    let disks = status.disks.iter().filter(|disk| disk.node == name);
    for disk in disks.filter(|disk| disk.replicas > 0) {
        if !disk.stuck {
            return None;
        }
        stays.push(format!(
            "{} replicas on disk {} need a disk with room in another failure domain: give the cluster one with \
             `unibody disk add`, or another node",
            disk.replicas, disk.disk.name
        ));
    }
    let ends = |vm: &VmSummary| matches!(vm.state.as_str(), "stopping" | "unknown");
    for vm in vms_on(status, name) {
        if ends(vm) || others().any(|node| node.memory_free >= vm.memory) {
            return None;
        }
        stays.push(format!(
            "VM {} needs {} of memory, which no other node has free: stop it or another, or add a node",
            vm.name,
            size(vm.memory)
        ));
    }
    let with_vm = |volume: &VolumeSummary| {
        let vm = volume.vm.as_deref();
        vms_on(status, name).any(|other| Some(other.name.as_str()) == vm)
    };
    let mut volumes = status.volumes.iter().filter(|volume| is_of(volume, name));
    if let Some(volume) = volumes.find(|volume| !with_vm(volume)) {
        if others().next().is_some() {
            return None;
        }
        stays.push(format!(
            "volume {} is attached to it, and there is no other node that is not drained",
            volume.volume.name
        ));
    }
    (!stays.is_empty()).then(|| stays.join("; "))
}

/// Waits until nothing is left on a node that is drained.
pub(crate) fn wait_empty(client: &Client, name: &str, out: Out) -> Result<()> {
    let mut bar = Bar::new(&format!("draining {name}"), out);
    let mut most = 0;
    loop {
        let status = client.status()?;
        let Some(node) = status.nodes.iter().find(|node| node.name == name) else {
            bail!("node {name} was removed meanwhile");
        };
        if !node.draining {
            bail!("node {name} is used again: somebody has ended the draining");
        }
        let left = left_on(&status, name);
        most = left.max(most);
        if left == 0 {
            bar.end();
            return Ok(());
        }
        bar.show(most - left, most);
        // What was not confirmed may be long past.
        if let Some(why) = stuck(&status, name).filter(|_| status.confirmed) {
            bar.end();
            bail!(
                "node {name} can not be emptied as things are: {why}. What can leave it has left it. It goes on by itself when \
                 there is room; `unibody node drain {name} --off` ends the draining"
            );
        }
        std::thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use unibody_control::api::types::DiskSummary;

    fn node(name: &str, draining: bool, memory_free: u64) -> NodeSummary {
        NodeSummary {
            name: name.into(),
            draining,
            memory_free,
            ..NodeSummary::default()
        }
    }

    fn disk(replicas: u64, stuck: bool) -> DiskSummary {
        let mut disk = DiskSummary {
            node: "n1".into(),
            replicas,
            stuck,
            ..DiskSummary::default()
        };
        disk.disk.name = "d.img".into();
        disk
    }

    fn vm(memory: u64, state: &str) -> VmSummary {
        VmSummary {
            name: "web".into(),
            node: Some("n1".into()),
            memory,
            state: state.into(),
            ..VmSummary::default()
        }
    }

    fn volume(vm: Option<&str>) -> VolumeSummary {
        let mut volume = VolumeSummary {
            owner: Some("n1".into()),
            vm: vm.map(str::to_owned),
            ..VolumeSummary::default()
        };
        volume.volume.name = "v".into();
        volume
    }

    #[test]
    fn a_node_is_stuck_when_nothing_that_is_left_on_it_can_leave() {
        let mut status = ClusterStatus {
            nodes: vec![node("n1", true, 9), node("n2", false, 5), node("n3", true, 9)],
            ..ClusterStatus::default()
        };
        assert_eq!(stuck(&status, "n1"), None, "it is empty");
        status.disks = vec![disk(3, true), disk(0, false)];
        let why = stuck(&status, "n1").unwrap();
        assert!(
            why.contains("3 replicas on disk d.img") && why.contains("disk add"),
            "{why}"
        );
        status.disks[1].replicas = 1;
        assert_eq!(stuck(&status, "n1"), None, "one disk is being emptied");
        status.disks.pop();

        status.vms = vec![vm(6, "running")];
        status.volumes = vec![volume(Some("web"))];
        let why = stuck(&status, "n1").unwrap();
        assert!(
            why.contains("d.img") && why.contains("VM web needs 6 B of memory"),
            "{why}"
        );
        status.vms[0].state = "stopping".into();
        assert_eq!(stuck(&status, "n1"), None, "it ends");
        status.vms[0] = vm(5, "running");
        assert_eq!(stuck(&status, "n1"), None, "there is room for it");
        status.vms.clear();

        assert_eq!(stuck(&status, "n1"), None, "the volume goes");
        status.nodes[1].draining = true;
        let why = stuck(&status, "n1").unwrap();
        assert!(why.contains("volume v is attached"), "{why}");
    }
}
