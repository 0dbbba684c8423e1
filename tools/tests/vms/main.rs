//! VMs of a cluster: real nodes, real VMMs, our own guest, which tells whether it finds its data.

mod common;

use common::{Cluster, can_run, vm, volume, wait};
use unibody_vmm_adapter::VmmKind;

/// The number of a node called `n1` and so on.
fn number(node: &serde_json::Value) -> usize {
    node.as_str().unwrap()[1..].parse().unwrap()
}

#[test]
fn a_vm_is_defined_started_listed_everywhere_stopped_and_deleted() {
    // Of the two, QEMU has the power button that our guest knows.
    if !can_run(
        "a_vm_is_defined_started_listed_everywhere_stopped_and_deleted",
        VmmKind::Qemu,
    ) {
        return;
    }
    let cluster = Cluster::start(2, "256M");
    cluster.create_volume("web");
    let spec = cluster.definition("web", "64M");
    cluster.run(1, &["vm", "define", &spec, "--vmm", "qemu"]);
    let known = cluster.status(2);
    assert_eq!(
        (&vm(&known, "web")["state"], &vm(&known, "web")["node"]),
        (&"stopped".into(), &().into())
    );
    assert!(
        cluster.fails(1, &["volume", "delete", "web"]).contains("web"),
        "a VM has it"
    );

    cluster.run(1, &["vm", "start", "web", "--on", "n2"]);
    assert_eq!(cluster.guest_says("web"), "wrote");
    for node in [1, 2] {
        let line = cluster.run(node, &["vm", "list"]);
        assert!(
            line.contains("web") && line.contains("n2") && line.contains("running"),
            "{line}"
        );
    }
    assert!(cluster.vmm(2, "web").is_some() && cluster.vmm(1, "web").is_none());
    assert_eq!(
        volume(&cluster.status(1), "web")["owner"],
        "n2",
        "the volume is where the VM is"
    );
    assert!(
        cluster.fails(1, &["vm", "delete", "web"]).contains("web"),
        "it runs"
    );
    let elsewhere = cluster.fails(1, &["vm", "start", "web", "--on", "n1"]);
    assert!(elsewhere.contains("n2"), "{elsewhere}");

    cluster.run(1, &["vm", "stop", "web"]);
    assert_eq!(cluster.guest_says("web"), "stopped");
    assert!(cluster.vmm(2, "web").is_none());
    cluster.run(1, &["vm", "start", "web", "--on", "n1"]);
    assert_eq!(cluster.guest_says("web"), "verified", "its data has come with it");
    cluster.run(2, &["vm", "stop", "web"]);
    cluster.run(2, &["vm", "delete", "web"]);
    assert!(cluster.run(1, &["vm", "list", "--json"]).trim() == "[]");
    cluster.run(1, &["volume", "delete", "web"]);
}

#[test]
fn a_vm_is_worked_on_from_any_node_and_stays_what_it_became() {
    let name = "a_vm_is_worked_on_from_any_node_and_stays_what_it_became";
    if !can_run(name, VmmKind::Qemu) {
        return;
    }
    let cluster = Cluster::start(2, "256M");
    cluster.create_volume("web");
    cluster.create_volume("data");
    let spec = cluster.definition("web", "64M");
    cluster.run(1, &["vm", "start", &spec, "--vmm", "qemu", "--on", "n2"]);
    assert_eq!(cluster.guest_says("web"), "wrote");
    // The first node is asked, the second one does it.
    let of = |arguments: &[&str]| -> serde_json::Value {
        let text = cluster.run(1, &[&["vm"], arguments, &["--json"]].concat());
        serde_json::from_str(&text).unwrap()
    };
    let phase = || of(&["status", "web"])["process"]["status"]["phase"].clone();
    of(&["pause", "web"]);
    assert_eq!(phase(), "paused");
    of(&["resume", "web"]);
    assert_eq!(phase(), "running");
    let here = cluster.fails(1, &["vm", "pause", "nobody"]);
    assert!(
        here.contains("nobody") && !here.contains("/run/"),
        "it is the cluster's: {here}"
    );
    let by_itself = cluster.fails(1, &["vm", "status", "web", "--control", "nobody.sock"]);
    assert!(
        by_itself.contains("by itself") && by_itself.contains("--node-dir"),
        "{by_itself}"
    );

    of(&["add-volume", "web", "data"]);
    let used = |status: &serde_json::Value| {
        let data = volume(status, "data");
        data["vm"] == "web" && data["owner"] == "n2" && data["counters"]["connected"] == 1
    };
    cluster.wait(1, "the guest has the other volume", used);

    let last = if can_run(name, VmmKind::CloudHypervisor) {
        of(&["swap", "web", "--to", "cloud-hypervisor"]);
        assert_eq!(
            cluster.next_guest_says("web"),
            "verified",
            "the same data under the other VMM"
        );
        cluster.wait(1, "it has both volumes there too", used);
        let swapped = of(&["status", "web"]);
        assert_eq!(
            (&swapped["process"]["vmm"], &swapped["node"]),
            (&"cloud-hypervisor".into(), &"n2".into())
        );
        "cloud-hypervisor"
    } else {
        "qemu"
    };
    of(&["kill", "web"]);
    assert!(cluster.vmm(2, "web").is_none());
    // What was added stays, what is taken from one that is stopped is not there at its next start.
    assert_eq!(
        of(&["status", "web"])["volumes"],
        serde_json::json!(["web", "data"])
    );
    of(&["remove-volume", "web", "data"]);
    cluster.run(2, &["vm", "start", "web", "--on", "n1"]);
    assert_eq!(cluster.guest_says("web"), "verified");
    let now = of(&["status", "web"]);
    assert_eq!(
        (&now["process"]["vmm"], &now["volumes"]),
        (&last.into(), &serde_json::json!(["web"]))
    );
    cluster.run(1, &["vm", "kill", "web"]);
    cluster.run(1, &["volume", "delete", "data"]);
}

#[test]
fn a_vm_runs_elsewhere_when_its_node_is_killed_and_what_is_left_behind_ends() {
    let Some(_) = VmmKind::ALL
        .into_iter()
        .find(|vmm| can_run("a_vm_runs_elsewhere", *vmm))
    else {
        return;
    };
    let mut cluster = Cluster::start(3, "256M");
    cluster.create_volume("web");
    let spec = cluster.definition("web", "64M");
    cluster.run(1, &["vm", "start", &spec, "--on", "n2"]);
    assert_eq!(cluster.guest_says("web"), "wrote");
    let before = volume(&cluster.status(1), "web")["generation"].as_u64().unwrap();

    cluster.kill(2);
    let moved = cluster.wait(3, "the VM runs elsewhere", |status| {
        let vm = vm(status, "web");
        vm["state"] == "running" && vm["node"] != "n2"
    });
    let to = number(&vm(&moved, "web")["node"]);
    assert_eq!(cluster.guest_says("web"), "verified");
    let of_volume = volume(&moved, "web");
    assert_eq!(of_volume["owner"], vm(&moved, "web")["node"]);
    assert!(
        of_volume["generation"].as_u64().unwrap() > before,
        "the former owner is fenced"
    );
    let runs = cluster.vmm(to, "web").expect("it runs there");
    assert!(
        cluster.vmm(2, "web").is_some(),
        "nobody was there to end the process that was left behind"
    );

    cluster.restart(2);
    wait("the process that was left behind ends", || {
        cluster.vmm(2, "web").is_none().then_some(())
    });
    cluster.wait_whole(1);
    let after = cluster.status(2);
    assert_eq!(
        (number(&vm(&after, "web")["node"]), &vm(&after, "web")["state"]),
        (to, &"running".into())
    );
    assert_eq!(cluster.vmm(to, "web"), Some(runs), "the VM itself was left alone");
    assert!(cluster.guest_is_silent("web"));
}

#[test]
fn a_vm_that_fits_nowhere_waits() {
    let Some(_) = VmmKind::ALL
        .into_iter()
        .find(|vmm| can_run("a_vm_that_fits_nowhere_waits", *vmm))
    else {
        return;
    };
    let cluster = Cluster::start(2, "100M");
    let specs = ["a", "b", "c"].map(|name| {
        cluster.run(1, &["volume", "create", name, "--size", "64M", "--mirror", "1"]);
        cluster.definition(name, "64M")
    });
    cluster.run(1, &["vm", "start", &specs[0], "--on", "n1"]);
    cluster.run(1, &["vm", "define", &specs[1]]);
    let full = cluster.fails(1, &["vm", "start", "b", "--on", "n1"]);
    assert!(full.contains("memory"), "{full}");
    let said = cluster.run(1, &["vm", "start", "b"]);
    assert!(said.contains("n2"), "where there is room: {said}");

    // The command waits as well.
    let mut third = cluster.begin(1, &["vm", "start", &specs[2]]);
    let waits = cluster.wait(2, "the third VM waits", |status| {
        vm(status, "c")["state"] == "waiting"
    });
    assert!(vm(&waits, "c")["node"].is_null());
    let free = |status: &serde_json::Value| {
        let nodes = status["nodes"].as_array().unwrap().iter();
        nodes
            .map(|node| node["memory_free"].as_u64().unwrap() >> 20)
            .collect::<Vec<_>>()
    };
    assert_eq!(free(&waits), [36, 36], "promised once");
    cluster.kill_vmm(1, "a");
    let mut stop = cluster.begin(1, &["vm", "stop", "b"]);
    cluster.wait(2, "the second one is to stop", |status| {
        vm(status, "b")["state"] == "stopping"
    });
    // Under Cloud Hypervisor our guest does not hear that it is asked to.
    if cluster.vmm(2, "b").is_some() {
        cluster.kill_vmm(2, "b");
    }
    assert!(stop.wait().unwrap().success());
    assert!(
        third.wait().unwrap().success(),
        "it runs as soon as there is room"
    );
    let runs = cluster.status(1);
    assert_eq!(
        (&vm(&runs, "c")["node"], &vm(&runs, "b")["state"]),
        (&"n2".into(), &"stopped".into())
    );
    cluster.wait(1, "a VM whose process died runs again", |status| {
        vm(status, "a")["state"] == "running"
    });
}

#[test]
fn a_drained_node_is_left_by_everything_and_can_be_removed() {
    if !can_run(
        "a_drained_node_is_left_by_everything_and_can_be_removed",
        VmmKind::Qemu,
    ) {
        return;
    }
    let mut cluster = Cluster::start(3, "256M");
    cluster.create_volume("web");
    cluster.create_volume("data");
    let spec = cluster.definition("web", "64M");
    cluster.run(1, &["vm", "start", &spec, "--vmm", "qemu", "--on", "n2"]);
    cluster.run(1, &["volume", "attach", "data", "--on", "n2"]);
    assert_eq!(cluster.guest_says("web"), "wrote");
    let early = cluster.fails(1, &["node", "remove", "n2"]);
    assert!(early.contains("drain"), "{early}");

    cluster.run(3, &["node", "drain", "n2"]);
    let said = cluster.next_guest_says("web");
    assert_eq!(said, "verified", "it runs elsewhere");
    let empty = cluster.wait(3, "nothing is left on the node", |status| {
        let disks = status["disks"].as_array().unwrap();
        let volumes = ["web", "data"].map(|name| &volume(status, name)["owner"]);
        disks
            .iter()
            .all(|disk| disk["node"] != "n2" || disk["replicas"] == 0)
            && volumes.iter().all(|owner| owner.is_string() && **owner != "n2")
    });
    assert_ne!(vm(&empty, "web")["node"], "n2");
    cluster.wait_whole(1);
    wait("the node can be removed", || {
        let status = cluster.status(1);
        let mut disks = status["disks"].as_array().unwrap().iter();
        disks
            .all(|disk| disk["node"] != "n2" || disk["leaving"] == false)
            .then_some(())
    });
    cluster.run(1, &["node", "remove", "n2"]);
    assert!(!cluster.run(3, &["node", "list"]).contains("n2"));
    cluster.wait_end(2);
    cluster.wait_whole(3);
    cluster.wait(1, "the VM runs on", |status| {
        vm(status, "web")["state"] == "running"
    });
}

#[test]
fn when_all_nodes_were_killed_everything_comes_back_by_itself() {
    let Some(_) = VmmKind::ALL
        .into_iter()
        .find(|vmm| can_run("when_all_nodes_were_killed", *vmm))
    else {
        return;
    };
    let mut cluster = Cluster::start(3, "256M");
    for (name, node) in [("kept", "n2"), ("lost", "n3")] {
        cluster.create_volume(name);
        let spec = cluster.definition(name, "64M");
        cluster.run(1, &["vm", "start", &spec, "--on", node]);
        assert_eq!(cluster.guest_says(name), "wrote");
    }
    cluster.create_volume("data");
    let kept = cluster.vmm(2, "kept");
    (1..=3).for_each(|node| cluster.kill(node));
    // As the reboot of its machine does.
    cluster.kill_vmm(3, "lost");
    assert_eq!(cluster.vmm(2, "kept"), kept, "VMs outlive the nodes' processes");

    (1..=3).for_each(|node| cluster.restart(node));
    assert_eq!(cluster.guest_says("lost"), "verified");
    cluster.wait(1, "both run", |status| {
        ["kept", "lost"]
            .iter()
            .all(|name| vm(status, name)["state"] == "running")
    });
    cluster.wait_whole(2);
    let after = cluster.status(3);
    assert_eq!(
        (&vm(&after, "kept")["node"], &vm(&after, "lost")["node"]),
        (&"n2".into(), &"n3".into())
    );
    assert_eq!(cluster.vmm(2, "kept"), kept, "a VM that ran on was not restarted");
    assert!(cluster.guest_is_silent("kept"));
    cluster.wait(1, "the kept VM has its volume again", |status| {
        volume(status, "kept")["counters"]["connected"] == 1
    });
}
