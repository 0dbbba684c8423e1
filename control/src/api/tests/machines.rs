//! VMs, as users see them.

use std::thread::Scope;

use super::*;
use crate::cluster::vms::VmAct;

fn define(node: &Node, definition: &str) {
    node.done("PUT", "/v1/vms/m", &json!({ "definition": definition }));
}

fn state(node: &Node, wanted: &str) {
    let what = format!("the VM is {wanted}");
    node.wait(&what, |status| status["vms"][0]["state"] == wanted);
}

/// Waits until it is so on the shelf.
fn until(node: &Node, what: &str, is_so: impl Fn(&shelf::Inside) -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !is_so(&node.shelf.inside()) {
        assert!(Instant::now() < end, "not within 30 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A node with these volumes, and a VM `m` with the first of them.
fn with_volumes(names: &[&str]) -> Node {
    let node = Node::start();
    for name in names {
        node.done("POST", "/v1/volumes", &json!({ "name": name, "size": 8 << 20 }));
    }
    define(&node, &format!("m 1000000 {}", names[0]));
    node
}

fn running(names: &[&str]) -> Node {
    let node = with_volumes(names);
    node.done("POST", "/v1/vms/m/start", &json!({}));
    state(&node, "running");
    node
}

/// The volumes that it is to have, and those that the one that runs has.
fn volumes(node: &Node) -> (Value, Vec<String>) {
    let is = node.get("/v1/vms/m")["definition"]["volumes"].clone();
    let has = node.shelf.inside().running.get("m").cloned();
    (is, has.map(|has| has.volumes).unwrap_or_default())
}

/// Asks for something that does not come at once.
fn begin<'scope>(
    scope: &'scope Scope<'scope, '_>,
    node: &'scope Node,
    path: &'scope str,
    body: Value,
) -> std::thread::ScopedJoinHandle<'scope, (u16, Value)> {
    scope.spawn(move || node.send("POST", path, &body))
}

/// What is changed between the question and the answer stays changed.
#[test]
fn starting_and_stopping_a_vm_changes_nothing_else() {
    let node = Node::start();
    define(&node, "m 1");
    std::thread::scope(|scope| {
        for what in ["start", "stop"] {
            let node = &node;
            let path = format!("/v1/vms/m/{what}");
            scope.spawn(move || (0..60).for_each(|_| node.done("POST", &path, &json!({}))));
        }
        for memory in 2..60 {
            define(&node, &format!("m {memory}"));
            assert_eq!(node.cluster.view().state.vms["m"].spec.memory, memory);
        }
    });
    assert_eq!(node.cluster.view().state.vms["m"].spec.memory, 59);
}

/// It has what it was started with until it is placed anew, and to define it does not stop it.
#[test]
fn a_vm_holds_its_memory_until_it_is_placed_anew() {
    let node = Node::start();
    define(&node, &format!("m {}", 1 << 29));
    node.done("POST", "/v1/vms/m/start", &json!({}));
    state(&node, "running");
    define(&node, &format!("m {}", 1 << 20));
    let free = || node.get("/v1/status")["nodes"][0]["memory_free"].clone();
    assert_eq!(free(), json!(1 << 29));
    assert!(node.cluster.view().state.vms["m"].spec.run);
    node.done("POST", "/v1/vms/m/stop", &json!({}));
    state(&node, "stopped");
    node.done("POST", "/v1/vms/m/start", &json!({}));
    state(&node, "running");
    assert_eq!(free(), json!((1 << 30) - (1 << 20)));
}

#[test]
fn a_vm_runs_until_it_is_stopped() {
    let node = with_volumes(&["root"]);
    state(&node, "stopped");
    node.done("POST", "/v1/vms/m/start", &json!({ "node": "n1" }));
    state(&node, "running");
    assert_eq!(node.ask("DELETE", "/v1/vms/m", &node.token, None).0, 409);
    assert_eq!(node.ask("DELETE", "/v1/volumes/root", &node.token, None).0, 409);
    assert_eq!(node.ask("POST", "/v1/vms/m/stop", &node.token, None).0, 204);
    state(&node, "stopped");
    assert_eq!(node.ask("DELETE", "/v1/vms/m", &node.token, None).0, 204);
    let huge = format!("big {} root", 2u64 << 30);
    node.done("PUT", "/v1/vms/big", &json!({ "definition": huge }));
    let there = node.send("POST", "/v1/vms/big/start", &json!({ "node": "n1" }));
    assert_eq!(there.0, 409);
    node.done("POST", "/v1/vms/big/start", &json!({}));
    state(&node, "waiting");
}

#[test]
fn what_is_done_to_a_running_vm_is_kept_in_what_it_is() {
    let node = with_volumes(&["root", "data"]);
    assert_eq!(
        node.send("POST", "/v1/vms/m/pause", &json!({})).0,
        409,
        "it does not run"
    );
    node.done("POST", "/v1/vms/m/start", &json!({}));
    state(&node, "running");
    let paused = || node.shelf.inside().running["m"].paused;
    node.done("POST", "/v1/vms/m/pause", &json!({}));
    assert!(paused());
    node.done("POST", "/v1/vms/m/resume", &json!({}));
    assert!(!paused());

    let data = json!({ "volume": "data" });
    node.done("POST", "/v1/vms/m/volumes", &data);
    let both = ["root", "data"].map(str::to_owned).to_vec();
    assert_eq!(volumes(&node), (json!(both), both.clone()));
    assert_eq!(node.get("/v1/status")["vms"][0]["volumes"], json!(both));
    let restart = || {
        node.done("POST", "/v1/vms/m/stop", &json!({}));
        state(&node, "stopped");
        node.done("POST", "/v1/vms/m/start", &json!({}));
        state(&node, "running");
    };
    restart();
    assert_eq!(
        volumes(&node),
        (json!(both), both),
        "it has it at its next start too"
    );
    node.done("POST", "/v1/vms/m/volumes/remove", &data);
    let root = vec!["root".to_owned()];
    assert_eq!(volumes(&node), (json!(root), root.clone()));
    restart();
    assert_eq!(volumes(&node), (json!(root), root));
    assert_eq!(node.send("POST", "/v1/vms/m/volumes/remove", &data).0, 404);

    node.done("POST", "/v1/vms/m/kill", &json!({}));
    state(&node, "stopped");
    assert_eq!(node.get("/v1/vms/m")["process"], json!(null));
    assert_eq!(node.ask("GET", "/v1/vms/x", &node.token, None).0, 404);
}

#[test]
fn what_a_vm_does_not_take_it_does_not_get_at_its_next_start() {
    let node = running(&["root", "data"]);
    node.shelf.inside().refuses = true;
    let (status, problem) = node.send("POST", "/v1/vms/m/volumes", &json!({ "volume": "data" }));
    assert_eq!(status, 409, "{problem}");
    assert!(
        problem["error"].as_str().unwrap().starts_with("it is not done"),
        "{problem}"
    );
    assert_eq!(volumes(&node), (json!(["root"]), vec!["root".to_owned()]));
}

#[test]
fn of_volumes_that_are_added_and_removed_at_once_none_is_forgotten() {
    let names = ["root", "a", "b", "c", "d", "e", "f"];
    let node = with_volumes(&names);
    let all = |path: &str| {
        std::thread::scope(|scope| {
            for name in &names[1..] {
                let node = &node;
                scope.spawn(move || node.done("POST", path, &json!({ "volume": name })));
            }
        });
        let (is, has) = volumes(&node);
        let is: std::collections::BTreeSet<_> = serde_json::from_value::<Vec<String>>(is)
            .unwrap()
            .into_iter()
            .collect();
        (is, has.into_iter().collect())
    };
    let every: std::collections::BTreeSet<_> = names.map(str::to_owned).into();
    assert_eq!(all("/v1/vms/m/volumes"), (every.clone(), [].into()));
    assert_eq!(
        all("/v1/vms/m/volumes/remove"),
        (["root".to_owned()].into(), [].into())
    );
    node.done("POST", "/v1/vms/m/start", &json!({}));
    state(&node, "running");
    assert_eq!(
        all("/v1/vms/m/volumes"),
        (every.clone(), every),
        "of one that runs"
    );
}

#[test]
fn what_may_have_been_done_is_looked_at_before_it_is_undone() {
    let node = running(&["root", "a", "b"]);
    node.shelf.inside().lies = true;
    let (status, problem) = node.send("POST", "/v1/vms/m/volumes", &json!({ "volume": "a" }));
    assert_eq!(status, 204, "it has it: {problem}");
    let both = ["root", "a"].map(str::to_owned).to_vec();
    assert_eq!(volumes(&node), (json!(both), both));

    node.shelf.inside().mute = true;
    let (status, problem) = node.send("POST", "/v1/vms/m/volumes", &json!({ "volume": "b" }));
    assert_eq!(status, 503, "nobody knows: {problem}");
    let all = ["root", "a", "b"].map(str::to_owned).to_vec();
    assert_eq!(volumes(&node), (json!(all), all));
}

#[test]
fn a_vm_that_is_being_started_gets_what_is_added_and_loses_what_is_removed() {
    let node = with_volumes(&["root", "old", "new"]);
    define(&node, "m 1000000 root old");
    node.shelf.inside().hold_starts = true;
    node.done("POST", "/v1/vms/m/start", &json!({}));
    until(&node, "its start has begun", |shelf| shelf.starts == 1);
    std::thread::scope(|scope| {
        let new = json!({ "volume": "new" });
        let added = begin(scope, &node, "/v1/vms/m/volumes", new);
        node.wait("it is to have the new one", |status| {
            status["vms"][0]["volumes"] == json!(["root", "old", "new"])
        });
        let old = json!({ "volume": "old" });
        let removed = begin(scope, &node, "/v1/vms/m/volumes/remove", old);
        node.shelf.inside().hold_starts = false;
        for done in [added, removed] {
            assert_eq!(done.join().unwrap().0, 204);
        }
    });
    let now = ["root", "new"].map(str::to_owned).to_vec();
    assert_eq!(volumes(&node), (json!(now), now));
    assert_eq!(node.shelf.inside().starts, 1);
}

/// Lets guests do what they are asked to, so that a test that fails does not wait for them.
struct Yield<'a>(&'a Node);

impl Drop for Yield<'_> {
    fn drop(&mut self) {
        self.0.shelf.inside().stubborn = false;
    }
}

/// An hour is nothing that a stop or a kill waits for.
#[test]
fn a_vm_ends_though_its_guest_is_busy_with_something_else() {
    for what in ["stop", "kill"] {
        let node = running(&["root"]);
        node.shelf.inside().stubborn = true;
        std::thread::scope(|scope| {
            let _yield = Yield(&node);
            let off = json!({ "volume": "root", "seconds": 3600 });
            let removed = begin(scope, &node, "/v1/vms/m/volumes/remove", off);
            until(&node, "the guest is asked", |shelf| shelf.waiting == 1);
            node.done("POST", &format!("/v1/vms/m/{what}"), &json!({ "seconds": 0 }));
            state(&node, "stopped");
            removed.join().unwrap();
        });
        assert!(node.shelf.inside().running.is_empty());
    }
}

#[test]
fn a_vm_that_is_killed_while_it_starts_does_not_live_on() {
    let node = with_volumes(&["root"]);
    let mut inside = node.shelf.inside();
    (inside.hold_starts, inside.stubborn) = (true, true);
    drop(inside);
    node.done("POST", "/v1/vms/m/start", &json!({}));
    until(&node, "its start has begun", |shelf| shelf.starts == 1);
    node.done("POST", "/v1/vms/m/kill", &json!({}));
    node.shelf.inside().hold_starts = false;
    state(&node, "stopped");
    let inside = node.shelf.inside();
    assert!(inside.running.is_empty() && inside.starts == 1);
}

#[test]
fn a_guest_has_as_long_to_end_as_was_asked_for_and_less_if_that_is_asked_for_later() {
    let node = running(&["root"]);
    let stop = |body| node.done("POST", "/v1/vms/m/stop", &body);
    node.shelf.inside().stubborn = true;
    for seconds in [1234, 1000] {
        stop(json!({ "seconds": seconds }));
        until(&node, "its guest is asked", |shelf| {
            shelf.waiting == 1 && shelf.patience == Some(Duration::from_secs(seconds))
        });
    }
    stop(json!({ "seconds": 0 }));
    state(&node, "stopped");
    let long = node.send("POST", "/v1/vms/m/stop", &json!({ "seconds": 3601 }));
    assert_eq!(long.0, 400, "{long:?}");
    node.shelf.inside().stubborn = false;
    node.done("POST", "/v1/vms/m/start", &json!({}));
    state(&node, "running");
    stop(json!(null));
    state(&node, "stopped");
    assert_eq!(node.shelf.inside().patience, Some(Duration::from_secs(60)));
}

#[test]
fn a_vm_is_swapped_for_a_reason_or_not_at_all() {
    let node = running(&["root"]);
    let swap = |to: &str| node.send("POST", "/v1/vms/m/swap", &json!({ "to": to }));
    let under = || {
        let vm = node.get("/v1/vms/m");
        (vm["process"]["vmm"].clone(), vm["definition"]["vmm"].clone())
    };
    let (status, problem) = swap("broken");
    assert!(
        status == 409 && problem["error"].as_str().unwrap().contains("is broken"),
        "{problem}"
    );
    assert_eq!(under(), (json!("shelf"), json!(null)), "it was left alone");

    node.shelf.inside().refuses = true;
    assert_eq!(swap("other").0, 409);
    assert_eq!(
        under(),
        (json!("shelf"), json!(null)),
        "what could not be stopped stays what it is"
    );
    node.shelf.inside().refuses = false;

    assert_eq!(swap("shelf").0, 204);
    assert_eq!(under(), (json!("shelf"), json!("shelf")));
    assert_eq!(node.shelf.inside().starts, 1, "it is under that already");

    assert_eq!(swap("other").0, 204);
    node.wait("it runs under the other", |_| {
        under() == (json!("other"), json!("other"))
    });
    assert_eq!(node.shelf.inside().starts, 2);
}

/// A socket that takes connections, and nobody who answers.
#[test]
fn who_asks_for_a_vm_on_a_node_that_hangs_is_not_left_waiting() {
    let node = running(&["root"]);
    let hangs = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut state = (*node.cluster.view().state).clone();
    let other = NodeId(77);
    let add = Command::AddNode {
        node: other,
        store: 77,
        name: "n2".into(),
        addresses: vec![hangs.local_addr().unwrap().to_string()],
        domain: "n2".into(),
        memory: 1 << 30,
        incarnation: 1,
    };
    state.apply(&add).unwrap();
    let place = Command::PlaceVm {
        name: "m".into(),
        node: Some(other),
        epoch: state.vms["m"].epoch,
    };
    state.apply(&place).unwrap();
    let api = api(&node);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let status = LocalRequest::Vm {
        name: "m".into(),
        act: VmAct::Status,
    };
    let said = runtime.block_on(async {
        let said = api.ask(&state, other, status);
        tokio::time::timeout(Duration::from_secs(30), said).await
    });
    assert!(said.expect("a minute is too long").is_err());
    let nobody = Default::default();
    let vms = |said| show::vms(&state, said).pop().unwrap().state;
    assert_eq!(vms(Some(&nobody)), "unknown");
    assert_eq!(vms(None), "starting", "as the state has it");
}
