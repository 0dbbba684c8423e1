//! A node as its users meet it: the real program, real files, real signals.

mod common;
mod disks;
mod queues;
mod vm;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use common::{Node, Place, fails, output, runs};

/// Runs a demo; it fails itself if it does not keep its promises. What is asserted is that it got to make them.
fn demo(flags: &[&str], of_vm: [&str; 2]) {
    let place = Place::new();
    let output = runs(&[&["demo", "--dir", &place.str("demo")], flags].concat());
    assert!(
        output.contains("blocks verified") && output.contains("pass an offline check"),
        "{output}"
    );
    if output.contains("no VM: ") {
        eprintln!("SKIPPED the VM of the demo:\n{output}");
    } else {
        assert!(of_vm.iter().all(|said| output.contains(said)), "{output}");
    }
}

#[test]
fn the_demo_keeps_all_its_promises() {
    demo(&[], ["its guest wrote ", "its guest verified "]);
}

#[test]
fn the_demo_of_one_node_keeps_all_its_promises() {
    demo(&["--alone"], [": wrote ", ": verified "]);
}

#[test]
fn serves_ends_cleanly_and_keeps_its_data() {
    let place = Place::new();
    let (a, b) = (place.disk("a.img", "256M"), place.disk("b.img", "256M"));
    let flags = [
        "--disk",
        &a,
        "--disk",
        &b,
        "--state",
        &place.str("state"),
        "--volume",
        &place.volume("v", "size=64M,mirror=2"),
    ];
    let node = Node::start(&flags);
    let mode = std::fs::metadata(place.path("v.sock"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600, "the socket is for its owner alone");
    runs(&["bench", &place.str("v.sock"), "--fill", "--bs", "64K"]);
    assert_eq!(node.terminate(), Some(0));
    for disk in [&a, &b] {
        let report: serde_json::Value =
            serde_json::from_str(&runs(&["disk", "check", disk, "--json"])).unwrap();
        assert_eq!(
            (report["verdict"].as_str(), report["closed"].as_bool()),
            (Some("clean"), Some(true)),
            "{report}"
        );
        assert!(
            report["blocks"].as_u64().unwrap() >= 64 * 256,
            "both copies are whole: {report}"
        );
    }
    let node = Node::start(&flags);
    runs(&["bench", &place.str("v.sock"), "--verify-only", "--bs", "64K"]);
    node.kill();
    let node = Node::start(&flags);
    runs(&["bench", &place.str("v.sock"), "--verify-only", "--bs", "64K"]);
    assert_eq!(node.terminate(), Some(0));
    rots(&a);
    for (disk, code, verdict) in [(&a, 1, "damaged"), (&b, 0, "clean")] {
        let output = output(&["disk", "check", disk, "--json"]);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["verdict"], verdict, "{report}");
    }
    let node = Node::start(&flags);
    runs(&["bench", &place.str("v.sock"), "--verify-only", "--bs", "64K"]);
    assert_eq!(node.terminate(), Some(0));
}

/// Turns a bit of a block of data: of the last block of the file that has any.
fn rots(disk: &str) {
    let mut bytes = std::fs::read(disk).unwrap();
    let last = bytes
        .rchunks_exact(4096)
        .position(|block| block.iter().filter(|&&byte| byte == 0).count() < 64)
        .expect("random data has few zeros");
    let at = bytes.len() - 4096 * last - 2048;
    bytes[at] ^= 1;
    std::fs::write(disk, bytes).unwrap();
}

#[test]
fn what_is_wrong_is_said_with_what_to_do() {
    let place = Place::new();
    let blank = place.str("blank.img");
    std::fs::File::create(&blank).unwrap().set_len(64 << 20).unwrap();
    let state = place.str("state");
    let serve = |more: &[&str]| fails(&[&["serve", "--cores", "0"], more].concat());
    let says = |text: String, what: &str| assert!(text.contains(what), "{what:?} is not said: {text}");
    says(serve(&[]), "--disk");
    says(serve(&["--disk", &blank]), "--state");
    says(serve(&["--disk", &blank, "--state", &state]), "format");
    says(serve(&["--disk", "mem:64M,color=red"]), "domain=");
    says(serve(&["--disk", "mem:64M", "--cores", "4095"]), "core");
    says(serve(&["--disk", "mem:64M", "--volume", "v"]), "size");
    says(
        serve(&["--disk", "mem:64M", "--volume", "v,size=1M,mirror=2"]),
        "failure domains",
    );
    says(
        serve(&["--disk", "mem:64M", "--volume", "v,size=1M,mirror=4"]),
        "copies",
    );
    says(
        serve(&[
            "--disk",
            "null:64M",
            "--disk",
            "null:64M",
            "--volume",
            "v,size=1M,mirror=2",
        ]),
        "mirror=1",
    );
    let foreign = place.str("foreign.img");
    std::fs::write(&foreign, vec![7; 64 << 20]).unwrap();
    says(fails(&["disk", "format", &foreign]), "--force");
    assert!(
        std::fs::read(&foreign).unwrap().iter().all(|&byte| byte == 7),
        "a refused format left the file alone"
    );
    says(fails(&["disk", "check", &foreign]), "");
    for (absent, what) in [
        (place.str("absent.img"), "absent.img"),
        (foreign.clone(), "foreign.img"),
    ] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_unibody"))
            .args(["disk", "check", &absent, "--json"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{what}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["verdict"], "unusable", "{what}: {report}");
    }
    let error = std::process::Command::new(env!("CARGO_BIN_EXE_unibody"))
        .args(["status", "--json", "--control", &place.str("nobody.sock")])
        .output()
        .unwrap();
    let error: serde_json::Value = serde_json::from_slice(&error.stdout).unwrap();
    says(error["error"].to_string(), "unibody serve");
    let usage = std::process::Command::new(env!("CARGO_BIN_EXE_unibody"))
        .args(["status", "--json", "--colour"])
        .output()
        .unwrap();
    assert_eq!(usage.status.code(), Some(2));
    let usage: serde_json::Value = serde_json::from_slice(&usage.stdout).unwrap();
    says(usage["error"].to_string(), "unexpected argument '--colour'");
    says(fails(&["status", "--colour"]), "unexpected argument '--colour'");
    assert!(runs(&["status", "--json", "--help"]).contains("Usage:"));
    says(
        fails(&["status", "--control", &place.str("nobody.sock")]),
        "unibody serve",
    );
    says(
        fails(&["bench", &place.str("nobody.sock")]),
        "is a node serving it?",
    );
}

#[test]
fn what_is_done_is_told_to_scripts_and_a_volume_is_not_taken_for_another() {
    let place = Place::new();
    let json = |text: String| -> serde_json::Value { serde_json::from_str(&text).unwrap() };
    let formatted = json(runs(&[
        "disk",
        "format",
        &place.str("a.img"),
        "--size",
        "256M",
        "--json",
    ]));
    assert_eq!(formatted["disk"].as_str().unwrap().len(), 32, "{formatted}");
    let (disk, state) = (place.str("a.img"), place.str("state"));
    let flags = ["--disk", &disk, "--state", &state];
    let made = "v,size=16M,mirror=1,width=2,unit=64K";
    let node = Node::start(&[&flags[..], &["--volume", made]].concat());
    let tell = |arguments: &[&str]| json(node.run(&[arguments, &["--json"]].concat()));
    assert_eq!(
        tell(&["volume", "create", "w", "--size", "16M", "--mirror", "1"])["volume"],
        "w"
    );
    assert_eq!(
        tell(&["volume", "resize", "w", "--size", "32M"])["size"],
        32 << 20
    );
    assert_eq!(tell(&["volume", "delete", "w"])["deleted"], true);
    assert_eq!(tell(&["disk", "add", "mem:64M"])["kind"], "memory");
    assert_eq!(tell(&["status"])["volumes"][0]["name"], "v");
    assert_eq!(node.terminate(), Some(0));
    for (other, what) in [
        ("v,size=32M", "size"),
        ("v,mirror=2", "mirror"),
        ("v,width=1", "width"),
        ("v,unit=128K", "unit"),
    ] {
        let said = fails(&[&["serve"], &flags[..], &["--volume", other]].concat());
        assert!(said.contains(&format!("exists with {what}")), "{other}: {said}");
    }
    assert_eq!(
        Node::start(&[&flags[..], &["--volume", made]].concat()).terminate(),
        Some(0)
    );
}

#[test]
fn a_disk_and_a_state_belong_to_one_node() {
    let place = Place::new();
    let disk = place.disk("a.img", "64M");
    let state = place.str("state");
    let node = Node::start(&["--disk", &disk, "--state", &state]);
    assert!(fails(&["serve", "--disk", &disk, "--state", &place.str("other")]).contains("in use"));
    assert!(fails(&["serve", "--disk", "mem:64M", "--state", &state]).contains("in use"));
    assert!(fails(&["disk", "check", &disk]).contains("in use"));
    assert!(fails(&["disk", "format", &disk, "--force"]).contains("in use"));
    assert_eq!(node.terminate(), Some(0));
}

#[test]
fn a_volume_grows_and_a_deleted_one_gives_its_space_back() {
    let place = Place::new();
    let node = Node::start(&["--disk", "mem:256M", "--control", &place.str("control.sock")]);
    let free = |node: &Node| node.status()["disks"][0]["free"].as_u64().unwrap();
    let empty = free(&node);
    node.run(&[
        "volume",
        "create",
        "v",
        "--size",
        "32M",
        "--mirror",
        "1",
        "--socket",
        &place.str("v.sock"),
    ]);
    let again = node.fails(&["volume", "create", "v", "--size", "32M", "--mirror", "1"]);
    assert!(again.contains("already"), "{again}");
    runs(&["bench", &place.str("v.sock"), "--fill", "--bs", "64K"]);
    assert_eq!(free(&node), empty - (32 << 20), "thin: exactly what was written");
    let shrink = node.fails(&["volume", "resize", "v", "--size", "16M"]);
    assert!(shrink.contains("can not shrink"), "{shrink}");
    node.run(&["volume", "resize", "v", "--size", "100M"]);
    runs(&["bench", &place.str("v.sock"), "--fill", "--bs", "64K"]);
    runs(&["bench", &place.str("v.sock"), "--verify-only", "--bs", "64K"]);
    runs(&[
        "bench",
        &place.str("v.sock"),
        "--rw",
        "trim",
        "--bs",
        "64K",
        "--runtime",
        "1",
    ]);
    node.run(&["volume", "delete", "v"]);
    assert!(!place.path("v.sock").exists());
    node.wait("the space is back", |status| {
        status["disks"][0]["free"].as_u64() == Some(empty)
    });
    assert_eq!(node.terminate(), Some(0));
}

#[test]
fn an_idle_node_sleeps() {
    let place = Place::new();
    let mut flags = vec![
        "--disk".to_owned(),
        "mem:128M".to_owned(),
        "--control".to_owned(),
        place.str("control.sock"),
    ];
    for number in 0..50 {
        flags.extend([
            "--volume".to_owned(),
            place.volume(&format!("v{number}"), "size=1M,mirror=1"),
        ]);
    }
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let node = Node::start(&flags);
    runs(&["bench", &place.str("v7.sock"), "--runtime", "0.5", "--ramp", "0"]);
    std::thread::sleep(Duration::from_millis(500));
    let turns = |node: &Node| {
        node.status()["reactors"][0]["counters"]["turns"]
            .as_u64()
            .unwrap()
    };
    let before = turns(&node);
    std::thread::sleep(Duration::from_secs(2));
    let after = turns(&node);
    // Two ticks a second, the two status requests, and the few turns of polling after each. A polling loop makes millions.
    assert!(
        after - before < 100_000,
        "{} turns in 2 s without work",
        after - before
    );
    // The first kick wakes it.
    runs(&["bench", &place.str("v7.sock"), "--runtime", "0.2", "--ramp", "0"]);
    assert_eq!(node.terminate(), Some(0));
}

/// The path of a request makes no system call but `io_uring_enter`: traced on the reactor's thread under load.
#[test]
fn under_load_the_reactor_makes_no_system_call_but_io_uring_enter() {
    let place = Place::new();
    let disk = place.disk("a.img", "256M");
    let node = Node::start(&[
        "--disk",
        &disk,
        "--state",
        &place.str("state"),
        "--volume",
        &place.volume("v", "size=64M,mirror=1"),
    ]);
    let socket = place.str("v.sock");
    runs(&["bench", &socket, "--fill", "--bs", "64K"]);
    let reactor = std::fs::read_dir(format!("/proc/{}/task", node.pid()))
        .unwrap()
        .flatten()
        .find(|task| std::fs::read_to_string(task.path().join("comm")).unwrap().trim() == "reactor0")
        .expect("a reactor");
    let load = {
        let socket = socket.clone();
        std::thread::spawn(move || {
            runs(&[
                "bench",
                &socket,
                "--rw",
                "randrw",
                "--runtime",
                "4",
                "--ramp",
                "0",
            ])
        })
    };
    // Past the beginning of the load: queues are started by then.
    std::thread::sleep(Duration::from_secs(1));
    let trace = place.str("trace");
    let strace = std::process::Command::new("timeout")
        .args([
            "-s",
            "INT",
            "1",
            "strace",
            "-qq",
            "-o",
            &trace,
            "-p",
            reactor.file_name().to_str().unwrap(),
        ])
        .status()
        .expect("strace is installed by `cargo xtask test`");
    assert_ne!(strace.code(), Some(127), "timeout and strace are there");
    load.join().unwrap();
    let text = std::fs::read_to_string(&trace).unwrap();
    let calls: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_once('('))
        .map(|call| call.0)
        .collect();
    assert!(calls.len() > 10, "nothing was traced: {text}");
    // `restart_syscall` is what a stop by the tracer does to a wait.
    let others: Vec<_> = calls
        .iter()
        .filter(|call| !matches!(**call, "io_uring_enter" | "restart_syscall"))
        .collect();
    assert!(
        others.is_empty(),
        "system calls on the path of a request: {others:?}"
    );
    assert_eq!(node.terminate(), Some(0));
}
