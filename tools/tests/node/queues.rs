//! Several queues of one device, and what a device answers, through the real data plane.

use super::common::{Node, Place, fails, runs};

/// Requests to the same few blocks come from four queues at once; every read has to find a block as some write made it.
fn four_queues(cores: &str) {
    let place = Place::new();
    let volumes = ["v", "w"].map(|name| place.volume(name, "size=64M,mirror=2,queues=4"));
    let node = Node::start(&[
        "--cores",
        cores,
        "--disk",
        "mem:256M",
        "--disk",
        "mem:256M",
        "--control",
        &place.str("control.sock"),
        "--volume",
        &volumes[0],
        "--volume",
        &volumes[1],
    ]);
    // Neighbours in number, so on different reactors where there are two.
    for socket in ["v.sock", "w.sock"].map(|name| place.str(name)) {
        let queues = ["bench", &socket, "--queues", "4", "--size", "256K"];
        runs(&[&queues[..], &["--fill"]].concat());
        let mixed = [
            "--rw",
            "randrw",
            "--rwmix",
            "50",
            "--verify",
            "--runtime",
            "1",
            "--json",
        ];
        let report: serde_json::Value = serde_json::from_str(&runs(&[&queues[..], &mixed].concat())).unwrap();
        let job = &report["jobs"][0];
        assert!(
            job["verified_blocks"].as_u64().unwrap() > 0 && job["write"]["total_ios"].as_u64().unwrap() > 0,
            "{report}"
        );
        runs(&[&queues[..], &["--verify-only"]].concat());
        let more = fails(&["bench", &socket, "--queues", "5"]);
        assert!(more.contains("queues=5"), "{more}");
    }
    assert_eq!(node.terminate(), Some(0));
}

#[test]
fn four_queues_of_a_device_on_one_reactor() {
    four_queues("0");
}

#[test]
fn four_queues_of_a_device_on_a_node_of_two_reactors() {
    if std::thread::available_parallelism().unwrap().get() < 2 {
        eprintln!("SKIPPED four_queues_of_a_device_on_a_node_of_two_reactors: it needs two cores");
        return;
    }
    four_queues("0,1");
}

#[test]
fn a_file_starts_the_same_node_as_flags() {
    let place = Place::new();
    let (a, b) = (place.disk("a.img", "128M"), place.disk("b.img", "128M"));
    let state = place.str("state");
    let file = place.str("node.toml");
    // Not the first, which it would be without a word.
    let core = std::thread::available_parallelism().unwrap().get() - 1;
    let volume = place.volume("v", "size=64M,mirror=2,width=2,unit=64K");
    std::fs::write(
        &file,
        format!(
            "cores = [{core}]\ndisks = ['{a}', '{b}']\nvolumes = ['{volume}']\nstate = '{state}'\ncache = '16M'\n"
        ),
    )
    .unwrap();
    let look = |node: &Node| {
        let status = node.status();
        let cores: Vec<_> = status["reactors"].as_array().unwrap().iter().collect();
        assert!(cores.len() == 1 && cores[0]["core"] == core, "{cores:?}");
        let volume = &status["volumes"][0];
        let of = |key: &str| volume[key].as_u64().unwrap();
        assert_eq!((of("size"), of("mirror")), (64 << 20, 2), "{volume}");
        assert_eq!((of("stripe_width"), of("stripe_unit")), (2, 64 << 10), "{volume}");
        assert_eq!(status["disks"].as_array().unwrap().len(), 2);
    };
    let node = Node::start(&["--config", &file, "--control", &format!("{state}/control.sock")]);
    look(&node);
    runs(&["bench", &place.str("v.sock"), "--fill", "--bs", "64K"]);
    assert_eq!(node.terminate(), Some(0));
    // And flags are the same node.
    let core = core.to_string();
    let node = Node::start(&[
        "--cores", &core, "--disk", &a, "--disk", &b, "--state", &state, "--volume", &volume, "--cache",
        "16M",
    ]);
    look(&node);
    runs(&["bench", &place.str("v.sock"), "--verify-only", "--bs", "64K"]);
    assert_eq!(node.terminate(), Some(0));
    std::fs::write(&file, "colour = 'red'\n").unwrap();
    assert!(fails(&["serve", "--config", &file]).contains("is not a serve file"));
}

#[test]
fn a_read_only_volume_says_so_and_a_discarded_one_has_nothing_left() {
    let place = Place::new();
    let (a, state) = (place.disk("a.img", "128M"), place.str("state"));
    let socket = place.str("v.sock");
    let flags = |options: &str| {
        let volume = place.volume("v", options);
        let flags = ["--disk", &a, "--state", &state, "--volume", &volume].map(str::to_owned);
        flags.to_vec()
    };
    let start = |options: &str| {
        let flags = flags(options);
        Node::start(&flags.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let node = start("size=1M,mirror=1");
    runs(&["bench", &socket, "--fill", "--bs", "64K"]);
    assert_eq!(node.terminate(), Some(0));

    // The front end of the load generator believes what the device says, and does not write.
    let node = start("readonly");
    let refused = fails(&["bench", &socket, "--fill", "--bs", "64K"]);
    assert!(refused.contains("read-only"), "{refused}");
    assert_eq!(node.terminate(), Some(0));

    let node = start("mirror=1");
    // One slot: all of the volume, again and again.
    let trim = [
        "bench",
        &socket,
        "--rw",
        "trim",
        "--bs",
        "1M",
        "--runtime",
        "0.2",
        "--ramp",
        "0",
    ];
    runs(&trim);
    let not_stamped = fails(&["bench", &socket, "--verify-only", "--bs", "64K"]);
    assert!(not_stamped.contains("wrong data at byte 0"), "{not_stamped}");
    assert_eq!(node.terminate(), Some(0));
}
