//! Disks of a node that rot, fail, hang, fill up, are replaced and return, as users meet it.

use super::common::{Node, Place, fails, runs};

/// A node with faults to be injected, and a volume that is mirrored on its two disks.
fn two_disks(place: &Place) -> (Node, [String; 2]) {
    let disks = [place.disk("a.img", "256M"), place.disk("b.img", "256M")];
    let node = Node::start(&[
        "--faults",
        "--disk",
        &disks[0],
        "--disk",
        &disks[1],
        "--state",
        &place.str("state"),
        "--volume",
        &place.volume("v", "size=64M,mirror=2"),
    ]);
    (node, disks)
}

#[test]
fn rot_is_repaired() {
    let place = Place::new();
    let (node, [a, _]) = two_disks(&place);
    let socket = place.str("v.sock");
    runs(&["bench", &socket, "--fill", "--bs", "64K", "--size", "16M"]);
    node.run(&["disk", "fault", &a, "rot"]);
    runs(&["bench", &socket, "--verify-only", "--bs", "4K", "--size", "16M"]);
    let volume = &node.status()["volumes"][0];
    assert!(
        volume["counters"]["read_repairs"].as_u64().unwrap() > 0,
        "{volume}"
    );
    assert_eq!(node.terminate(), Some(0));
}

#[test]
fn a_failing_disk_is_dropped_without_an_error_and_comes_back() {
    let place = Place::new();
    let (node, [_, b]) = two_disks(&place);
    let socket = place.str("v.sock");
    runs(&["bench", &socket, "--fill", "--bs", "64K", "--size", "16M"]);
    node.run(&["disk", "fault", &b, "write-errors"]);
    // Another seed: what the failing disk has is not what is asked for.
    let second = ["--bs", "64K", "--size", "16M", "--seed", "2"];
    runs(&[&["bench", &socket, "--fill"], &second[..]].concat());
    runs(&[&["bench", &socket, "--verify-only"], &second[..]].concat());
    node.wait("the failing disk was dropped", |status| {
        status["disks"][1]["counters"]["failures"] != 0
    });
    // A disk that failed by itself is tried again by itself, and gets what it missed.
    node.wait("redundancy is back", |status| {
        let volume = &status["volumes"][0];
        volume["state"] == "healthy" && volume["in_sync"] == 4
    });
    let volume = &node.status()["volumes"][0];
    assert!(
        volume["counters"]["bytes_synced"].as_u64().unwrap() > 0,
        "{volume}"
    );
    assert_eq!(node.terminate(), Some(0));
}

#[test]
fn a_full_disk_refuses_and_loses_nothing() {
    let place = Place::new();
    let node = Node::start(&[
        "--disk",
        "mem:64M",
        "--control",
        &place.str("control.sock"),
        "--volume",
        &place.volume("v", "size=256M,mirror=1"),
    ]);
    let socket = place.str("v.sock");
    runs(&["bench", &socket, "--fill", "--bs", "64K", "--size", "32M"]);
    fails(&[
        "bench", &socket, "--fill", "--bs", "64K", "--offset", "32M", "--size", "200M",
    ]);
    runs(&["bench", &socket, "--verify-only", "--bs", "64K", "--size", "32M"]);
    // What fits where something was keeps fitting.
    runs(&["bench", &socket, "--fill", "--bs", "64K", "--size", "32M"]);
    assert!(
        node.status()["volumes"][0]["counters"]["errors_no_space"]
            .as_u64()
            .unwrap()
            > 0
    );
    assert_eq!(node.terminate(), Some(0));
}

#[test]
fn disks_of_two_reactors_work_together() {
    let place = Place::new();
    let cores = std::thread::available_parallelism().unwrap().get();
    if cores < 2 {
        eprintln!("SKIPPED disks_of_two_reactors_work_together: it needs two cores");
        return;
    }
    let node = Node::start(&[
        "--cores",
        "0,1",
        "--disk",
        "mem:256M",
        "--disk",
        "mem:256M",
        "--control",
        &place.str("control.sock"),
        "--volume",
        &place.volume("v", "size=64M,mirror=2"),
        "--volume",
        &place.volume("w", "size=64M,mirror=2"),
    ]);
    for socket in [place.str("v.sock"), place.str("w.sock")] {
        runs(&["bench", &socket, "--fill", "--bs", "64K"]);
        runs(&[
            "bench",
            &socket,
            "--rw",
            "randrw",
            "--verify",
            "--runtime",
            "1",
            "--iodepth",
            "8",
        ]);
        runs(&["bench", &socket, "--verify-only", "--bs", "128K"]);
    }
    assert_eq!(node.terminate(), Some(0));
}

#[test]
fn a_hung_disk_holds_up_no_request_of_the_guest() {
    let place = Place::new();
    let (node, [_, b]) = two_disks(&place);
    let socket = place.str("v.sock");
    node.wait("both replicas are known to be good", |status| {
        status["volumes"][0]["state"] == "healthy"
    });
    let lent = |status: serde_json::Value| status["reactors"][0]["counters"]["buffers_lent"].clone();
    for seed in ["2", "3"] {
        // Regions that are dirty already: what is written then goes straight to the device.
        runs(&["bench", &socket, "--fill", "--bs", "2M"]);
        node.run(&["disk", "fault", &b, "stuck"]);
        // Larger than a window: the first window's memory is with the hung disk when the second begins.
        runs(&["bench", &socket, "--fill", "--bs", "2M", "--seed", seed]);
        runs(&["bench", &socket, "--verify-only", "--bs", "64K", "--seed", seed]);
        assert_eq!(node.status()["disks"][1]["state"], "leaving");
        assert_eq!(
            lent(node.status()),
            0,
            "what the disk keeps is not the volume's any more"
        );
        node.run(&["disk", "fault", &b, "none"]);
        node.wait("its last I/O has ended and it is tried again", |status| {
            status["volumes"][0]["state"] == "healthy"
        });
        runs(&["bench", &socket, "--verify-only", "--bs", "64K", "--seed", seed]);
        assert_eq!(lent(node.status()), 0);
    }
    assert_eq!(node.terminate(), Some(0));
}

/// A discard has no memory that the hung disk could still have.
#[test]
fn a_hung_disk_holds_up_no_discard() {
    let place = Place::new();
    let (node, [_, b]) = two_disks(&place);
    let socket = place.str("v.sock");
    runs(&["bench", &socket, "--fill", "--bs", "64K"]);
    node.run(&["disk", "fault", &b, "stuck"]);
    // Of a single block: the rest of the extent stays, so the device has to write zeros.
    runs(&["bench", &socket, "--rw", "trim", "--bs", "4K", "--runtime", "5"]);
    assert_eq!(node.status()["disks"][1]["state"], "leaving");
    node.run(&["disk", "fault", &b, "none"]);
    node.wait("the disk is back", |status| {
        status["volumes"][0]["state"] == "healthy"
    });
    assert_eq!(node.terminate(), Some(0));
}

/// A volume whose only disk hangs keeps what its requests have of the reactor's memory, and leaves enough to the others.
#[test]
fn a_volume_that_hangs_does_not_starve_the_others() {
    let place = Place::new();
    let (a, b) = (place.disk("a.img", "256M"), place.disk("b.img", "256M"));
    let node = Node::start(&[
        "--faults",
        "--disk",
        &a,
        "--state",
        &place.str("state"),
        "--volume",
        &place.volume("v", "size=64M,mirror=1"),
    ]);
    let (v, w) = (place.str("v.sock"), place.str("w.sock"));
    // The second volume goes where there is more room: to the second disk.
    node.run(&["disk", "add", &b]);
    node.run(&[
        "volume",
        "create",
        "w",
        "--size",
        "64M",
        "--mirror",
        "1",
        "--stripe-width",
        "1",
        "--socket",
        &w,
    ]);
    node.wait("both volumes serve", |status| {
        let volumes = status["volumes"].as_array().unwrap();
        volumes.iter().all(|volume| volume["state"] == "healthy")
    });
    node.run(&["disk", "fault", &a, "stuck"]);
    // Twice as many requests as the reactor has large buffers for. They fail in the end.
    let hangs = std::thread::spawn(move || {
        fails(&["bench", &v, "--fill", "--bs", "1M", "--iodepth", "128"]);
    });
    let requests = |status: &serde_json::Value| status["reactors"][0]["counters"]["requests"].as_u64();
    node.wait("they are taken", |status| requests(status) >= Some(32));
    runs(&["bench", &w, "--fill", "--bs", "1M", "--iodepth", "8"]);
    assert!(!hangs.is_finished(), "the first volume still hangs");
    runs(&["bench", &w, "--verify-only", "--bs", "64K"]);
    hangs.join().unwrap();
    node.run(&["disk", "fault", &a, "none"]);
    node.wait("the last I/O has ended", |status| {
        status["disks"][0]["state"] != "leaving"
    });
    assert_eq!(node.terminate(), Some(0));
}

#[test]
fn a_replaced_disk_is_not_forgotten_by_a_crash() {
    let place = Place::new();
    let (a, b) = (place.disk("a.img", "256M"), place.disk("b.img", "256M"));
    let (c, d) = (place.disk("c.img", "256M"), place.disk("d.img", "256M"));
    let state = place.str("state");
    let (in_b, volume) = (format!("{b},domain=b"), place.volume("v", "size=64M,mirror=2"));
    let node = Node::start(&[
        "--disk", &a, "--disk", &in_b, "--state", &state, "--volume", &volume,
    ]);
    runs(&["bench", &place.str("v.sock"), "--fill", "--bs", "64K"]);
    node.run(&["disk", "fail", &a]);
    node.wait("it is out", |status| status["disks"][0]["state"] == "failed");
    // In the domain of the other copy there is no place for what was on it yet.
    let in_b_too = format!("{c},domain=b");
    node.run(&["disk", "replace", &a, &in_b_too]);
    node.kill();
    let node = Node::start(&[
        "--disk", &in_b, "--disk", &in_b_too, "--disk", &d, "--state", &state, "--volume", &volume,
    ]);
    node.wait("its replicas are elsewhere", |status| {
        status["volumes"][0]["state"] == "healthy"
    });
    runs(&["bench", &place.str("v.sock"), "--verify-only", "--bs", "64K"]);
    assert_eq!(node.terminate(), Some(0));
}

#[test]
fn what_was_moved_off_a_disk_gives_its_space_back_when_the_disk_returns() {
    let place = Place::new();
    let (a, b, c) = (
        place.disk("a.img", "256M"),
        place.disk("b.img", "256M"),
        place.disk("c.img", "256M"),
    );
    let node = Node::start(&[
        "--disk",
        &a,
        "--disk",
        &b,
        "--state",
        &place.str("state"),
        "--volume",
        &place.volume("v", "size=64M,mirror=2"),
    ]);
    let empty = node.status()["disks"][0]["free"].as_u64().unwrap();
    runs(&["bench", &place.str("v.sock"), "--fill", "--bs", "64K"]);
    assert_eq!(
        node.status()["disks"][0]["free"].as_u64(),
        Some(empty - (64 << 20))
    );
    node.run(&["disk", "fail", &a]);
    node.wait("it is out", |status| status["disks"][0]["state"] == "failed");
    let in_a = format!("{c},domain=elsewhere");
    node.run(&["disk", "replace", &a, &in_a]);
    node.wait("the replacement has everything", |status| {
        status["volumes"][0]["state"] == "healthy"
    });
    node.run(&["disk", "return", &a]);
    node.wait("the space is back", |status| {
        status["disks"][0]["free"].as_u64() == Some(empty)
    });
    runs(&["bench", &place.str("v.sock"), "--verify-only", "--bs", "64K"]);
    assert_eq!(node.terminate(), Some(0));
}

/// The state directory is the map of what lies on the disks. Under another one everything there would look like garbage.
#[test]
fn under_another_state_nothing_on_the_disks_is_touched() {
    let place = Place::new();
    let (a, b) = (place.disk("a.img", "256M"), place.disk("b.img", "256M"));
    let (state, other) = (place.str("state"), place.str("other"));
    let volume = place.volume("v", "size=64M,mirror=2");
    let flags = |state: &str| {
        let flags = ["--disk", &a, "--disk", &b, "--state", state, "--volume", &volume];
        flags.map(str::to_owned)
    };
    let start = |state: &str| Node::start(&flags(state).each_ref().map(String::as_str));
    let socket = place.str("v.sock");
    let node = start(&state);
    runs(&["bench", &socket, "--fill", "--bs", "64K", "--size", "16M"]);
    assert_eq!(node.terminate(), Some(0));

    let refused = flags(&other);
    let said = fails(&[&["serve"], &refused.each_ref().map(String::as_str)[..]].concat());
    assert!(
        said.contains("knows nothing of") && said.contains("--state"),
        "{said}"
    );

    let node = start(&state);
    runs(&["bench", &socket, "--verify-only", "--bs", "4K", "--size", "16M"]);
    assert_eq!(node.terminate(), Some(0));
}

#[test]
fn a_node_starts_without_a_disk_that_died_and_takes_it_back() {
    let place = Place::new();
    let (a, b) = (place.disk("a.img", "256M"), place.disk("b.img", "256M"));
    let (state, volume) = (place.str("state"), place.volume("v", "size=64M,mirror=2"));
    let flags = ["--disk", &a, "--disk", &b, "--state", &state, "--volume", &volume];
    let socket = place.str("v.sock");
    let node = Node::start(&flags);
    runs(&["bench", &socket, "--fill", "--bs", "64K", "--size", "16M"]);
    assert_eq!(node.terminate(), Some(0));

    let away = place.str("away.img");
    std::fs::rename(&b, &away).unwrap();
    let node = Node::start(&flags);
    runs(&["bench", &socket, "--verify-only", "--bs", "4K", "--size", "16M"]);
    let second = ["--bs", "64K", "--size", "16M", "--seed", "2"];
    runs(&[&["bench", &socket, "--fill"], &second[..]].concat());
    let status = node.status();
    assert_eq!(status["volumes"][0]["state"], "degraded", "{status}");
    assert_eq!(status["disks"][1]["state"], "failed", "{status}");
    std::fs::rename(&away, &b).unwrap();
    node.wait("redundancy is back", |status| {
        status["volumes"][0]["state"] == "healthy"
    });
    runs(&[&["bench", &socket, "--verify-only"], &second[..]].concat());
    assert_eq!(node.terminate(), Some(0));

    // Nothing that the state knows of is missing: a typing error.
    let wrong = place.str("c.img");
    let said = fails(&[&["serve", "--disk", &wrong], &flags[..]].concat());
    assert!(said.contains("c.img"), "{said}");
}
