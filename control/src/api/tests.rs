//! Tests of the API: a whole node, and what its users see over HTTP.

mod machines;
mod metrics;
mod node;
mod shelf;

use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;
use crate::state::ReplicaState;
use node::Node;

#[test]
fn without_the_token_nothing_is_told_and_nothing_done() {
    let node = Node::start();
    for path in ["/v1/status", "/metrics", "/v1/openapi.json", "/nothing"] {
        for token in ["", "x", &node.token[1..]] {
            let (status, body) = node.ask("GET", path, token, None);
            assert_eq!(status, 401, "{path}: {body}");
            assert!(body.contains("unibody node token"), "{body}");
        }
    }
    let new = json!({ "name": "v", "size": 1 << 20, "mirror": 1 }).to_string();
    assert_eq!(node.ask("POST", "/v1/volumes", "", Some(&new)).0, 401);
    assert_eq!(node.get("/v1/status")["volumes"], json!([]));
}

#[test]
fn a_volume_lives_and_its_changes_are_streamed() {
    let node = Node::start();
    let stream = ureq::get(format!("http://{}/v1/watch", node.address))
        .header("authorization", format!("Bearer {}", node.token))
        .call()
        .unwrap();
    let mut lines = BufReader::new(stream.into_body().into_reader()).lines();
    let mut next = move || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    let first = next();
    assert_eq!(
        first["nodes"]["n1"]["id"],
        node.get("/v1/status")["nodes"][0]["id"]
    );
    assert_eq!(first["disks"].as_object().unwrap().len(), 2);

    let new = json!({ "name": "v", "size": 64 << 20, "near": "n1" });
    node.done("POST", "/v1/volumes", &new);
    let made = std::iter::repeat_with(&mut next).find(|line| line["volumes"]["v"].is_object());
    assert_eq!(made.unwrap()["volumes"]["v"]["size"], 64 << 20);
    let (status, problem) = node.send("POST", "/v1/volumes", &new);
    assert_eq!(
        (status, problem["error"].as_str()),
        (409, Some("there is a volume v already"))
    );

    let (status, attached) = node.send("POST", "/v1/volumes/v/attach", &json!({ "node": "n1" }));
    assert_eq!((status, &attached["node"]), (200, &json!("n1")));
    assert!(std::path::Path::new(attached["socket"].as_str().unwrap()).exists());
    node.done("POST", "/v1/volumes/v/resize", &json!({ "size": 128 << 20 }));
    node.wait("it has its new size", |status| {
        status["volumes"][0]["size"] == 128 << 20
    });
    assert_eq!(
        node.send("POST", "/v1/volumes/v/resize", &json!({ "size": 64 << 20 }))
            .0,
        400
    );

    assert_eq!(node.ask("DELETE", "/v1/volumes/v", &node.token, None).0, 204);
    let gone = std::iter::repeat_with(&mut next).find(|line| line["volumes"]["v"].is_null());
    assert!(gone.is_some_and(|line| line["volumes"].as_object().unwrap().contains_key("v")));
    assert_eq!(node.ask("DELETE", "/v1/volumes/v", &node.token, None).0, 404);
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let node = Node::start();
    let before = node.get("/v1/status");
    let refused = [
        ("POST", "/v1/volumes", json!({ "name": "v" }), 422),
        ("POST", "/v1/volumes", json!({ "name": "v", "size": "1G" }), 422),
        (
            "POST",
            "/v1/volumes",
            json!({ "name": "v", "size": 4096, "speed": 9 }),
            422,
        ),
        ("POST", "/v1/volumes", json!({ "name": "v", "size": 0 }), 400),
        (
            "POST",
            "/v1/volumes",
            json!({ "name": "v", "size": u64::MAX }),
            400,
        ),
        (
            "POST",
            "/v1/volumes",
            json!({ "name": "v", "size": 1u64 << 50 }),
            400,
        ),
        (
            "POST",
            "/v1/volumes",
            json!({ "name": "v", "size": 4096, "mirror": 0 }),
            400,
        ),
        (
            "POST",
            "/v1/volumes",
            json!({ "name": "v", "size": 4096, "mirror": 3 }),
            409,
        ),
        (
            "POST",
            "/v1/volumes",
            json!({ "name": "v", "size": 4096, "stripe_unit": 5 }),
            400,
        ),
        (
            "POST",
            "/v1/volumes",
            json!({ "name": "v", "size": 4096, "near": "n9" }),
            404,
        ),
        ("POST", "/v1/volumes", json!({ "name": "a/b", "size": 4096 }), 400),
        ("POST", "/v1/volumes/v/attach", json!({}), 404),
        ("PUT", "/v1/vms/m", json!({ "definition": "m" }), 400),
        ("PUT", "/v1/vms/m", json!({ "definition": "other 1" }), 400),
        ("PUT", "/v1/vms/m", json!({ "definition": "m 1 nothing" }), 404),
        ("POST", "/v1/vms/m/start", json!({}), 404),
        ("DELETE", "/v1/nodes/n9", json!({}), 404),
        ("DELETE", "/v1/nodes/n1", json!({}), 409),
        ("DELETE", "/v1/disks/0", json!({}), 404),
        (
            "POST",
            "/v1/nodes/n1/command",
            json!({ "command": "explode" }),
            422,
        ),
        (
            "POST",
            "/v1/nodes/n1/command",
            json!({ "command": "disk-fail", "disk": "x" }),
            409,
        ),
        (
            "POST",
            "/v1/nodes/n1/command",
            json!({ "command": "disk-add", "spec": "d.img" }),
            409,
        ),
        ("POST", "/v1/nothing", json!({}), 404),
    ];
    for (method, path, body, wanted) in refused {
        let (status, problem) = node.send(method, path, &body);
        assert_eq!(status, wanted, "{method} {path} {body}: {problem}");
        assert!(
            problem["error"].as_str().is_some_and(|text| !text.is_empty()),
            "{path}: {problem}"
        );
    }
    let long = "x".repeat(BODY_MAX + 1);
    assert_eq!(node.ask("POST", "/v1/volumes", &node.token, Some(&long)).0, 413);
    assert_eq!(node.ask("POST", "/v1/volumes", &node.token, Some("{")).0, 400);
    let after = node.get("/v1/status");
    for what in ["nodes", "volumes", "vms"] {
        assert_eq!(after[what], before[what]);
    }
    assert_eq!(after["disks"].as_array().unwrap().len(), 2);
}

#[test]
fn a_disk_that_can_not_be_used_is_not_kept_and_another_is() {
    let node = Node::start();
    let add = json!({ "command": "disk-add", "spec": "/nonexistent/d.img" });
    let (status, problem) = node.send("POST", "/v1/nodes/n1/command", &add);
    assert_eq!(status, 409, "{problem}");
    assert_eq!(node.get("/v1/status")["disks"].as_array().unwrap().len(), 2);
    let add = json!({ "command": "disk-add", "spec": "mem:128M,domain=c" });
    let (status, disk) = node.send("POST", "/v1/nodes/n1/command", &add);
    assert_eq!((status, &disk["state"]), (200, &json!("online")), "{disk}");
    let path = format!("/v1/disks/{}", disk["uuid"].as_str().unwrap());
    node.done("DELETE", &path, &json!({}));
    node.wait("the removed disk is gone", |status| {
        status["disks"].as_array().unwrap().len() == 2
    });
}

/// Volumes `one` and `two`, of one and of two copies, on two of three disks.
fn with_copies() -> Node {
    let node = Node::start();
    for (name, mirror) in [("one", 1), ("two", 2)] {
        let new = json!({ "name": name, "size": 8 << 20, "mirror": mirror, "stripe_width": 1 });
        node.done("POST", "/v1/volumes", &new);
    }
    let add = json!({ "command": "disk-add", "spec": "mem:256M,domain=c" });
    assert_eq!(node.send("POST", "/v1/nodes/n1/command", &add).0, 200);
    node.wait("the volumes are healthy", |status| healthy(status, 2));
    node
}

fn healthy(status: &Value, volumes: usize) -> bool {
    let all = status["volumes"].as_array().unwrap();
    let whole = |volume: &&Value| {
        volume["state"] == "healthy"
            && volume["in_sync"] == volume["mirror"]
            && volume["replicas"] == volume["mirror"]
    };
    all.iter().filter(whole).count() == volumes
}

#[test]
fn a_disk_in_service_is_removed_when_everything_on_it_is_elsewhere() {
    let node = with_copies();
    let disk = node.cluster.view().state.volumes["one"].chunks[0][0].disk;
    let path = format!("/v1/disks/{disk}");
    let (status, problem) = node.send("POST", &format!("{path}/give-up"), &json!(null));
    assert_eq!(status, 409, "its copies can be moved: {problem}");
    node.done("DELETE", &path, &json!({}));
    node.wait("the removed disk is gone", |status| {
        status["disks"].as_array().unwrap().len() == 2 && healthy(status, 2)
    });
}

#[test]
fn a_disk_with_the_only_copies_is_given_up_only_if_that_is_asked_for() {
    let node = with_copies();
    let disks = node.cluster.view().state.volumes["two"].chunks[0].clone();
    let name_of = |disk: &str| {
        let status = node.get("/v1/status");
        let disks = status["disks"].as_array().unwrap().clone();
        let found = disks.into_iter().find(|found| found["uuid"] == disk).unwrap();
        found["name"].as_str().unwrap().to_owned()
    };
    let fail = |disk: &str| {
        let request = json!({ "command": "disk-fail", "disk": name_of(disk) });
        assert_eq!(node.send("POST", "/v1/nodes/n1/command", &request).0, 200);
    };
    let [first, second] = [&disks[0], &disks[1]].map(|slot| slot.disk.to_string());
    // Nobody may make either stale before: so it is in the state as after a loss of power of all.
    let name = "two".to_owned();
    node.done("POST", "/v1/volumes/two/attach", &json!({}));
    [&first, &second].into_iter().for_each(|disk| fail(disk));
    node.wait("the disks are out of service", |status| {
        let all = status["disks"].as_array().unwrap();
        all.iter().filter(|disk| disk["state"] == "failed").count() == 2
    });
    let state = node.cluster.view().state.clone();
    let in_sync = |disk: &str| {
        let mut slots = state.volumes[&name].chunks.iter().flatten();
        slots.any(|slot| slot.disk.to_string() == disk && slot.state == ReplicaState::InSync)
    };
    let last = if in_sync(&first) { &first } else { &second };
    let path = format!("/v1/disks/{last}");
    let (status, problem) = node.ask("DELETE", &path, &node.token, None);
    assert_eq!(status, 409, "{problem}");
    assert!(
        problem.contains("1 chunks of volume two") && problem.contains("--lost"),
        "{problem}"
    );
    assert!(!node.cluster.view().state.disks.values().any(|disk| disk.out));
    let (status, given_up) = node.send("POST", &format!("{path}/give-up"), &json!(null));
    assert_eq!(status, 200, "{given_up}");
    assert_eq!(given_up["unreadable"]["two"], 1);
    node.wait("it is leaving", |status| {
        let all = status["disks"].as_array().unwrap();
        all.iter()
            .any(|disk| disk["uuid"] == **last && disk["leaving"] == true)
    });
}

/// The state may name an owner that has not heard of it: whoever asks it to let the volume go asks again.
#[test]
fn a_node_says_whether_it_has_a_volume_to_let_go() {
    let node = Node::start();
    let let_go = json!({ "command": "let-go", "volume": "v", "to": null });
    let answer = node.send("POST", "/v1/nodes/n1/command", &let_go);
    assert_eq!(answer, (200, json!(false)));
}

#[test]
fn what_is_for_a_node_whose_address_leads_here_is_not_passed_on_in_a_circle() {
    let node = Node::start();
    let add = Command::AddNode {
        node: NodeId(77),
        store: 77,
        name: "n2".into(),
        addresses: vec![node.address.clone()],
        domain: "n2".into(),
        memory: 0,
        incarnation: 1,
    };
    node.cluster.propose(node.cluster.request(), &add).unwrap();
    let (status, problem) = node.send("POST", "/v1/nodes/n2/command", &json!({ "command": "status" }));
    let error = problem["error"].as_str().unwrap();
    assert!(
        status == 409 && error.contains("its address leads to node n1"),
        "{problem}"
    );
    let seen = node.get("/v1/status");
    let alive = |name: &str| {
        let nodes = seen["nodes"].as_array().unwrap();
        nodes.iter().find(|node| node["name"] == name).unwrap()["alive"].clone()
    };
    assert_eq!((alive("n1"), alive("n2")), (json!(true), json!(false)));
}

/// As its handlers see it.
fn api(node: &Node) -> Api {
    Api(Arc::new(Inner {
        agent: node.handle.clone(),
        cluster: Arc::clone(&node.cluster),
        host: node.shelf.clone(),
        token: String::new(),
        me: node.cluster.identity().node,
    }))
}

#[test]
fn a_watcher_hears_something_also_while_nothing_happens() {
    use futures_util::StreamExt;

    let node = Node::start();
    let api = api(&node);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let lines = show::changes(api, Duration::from_millis(20))
        .take(20)
        .collect::<Vec<_>>();
    let lines = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(30), lines).await });
    let last = lines.expect("twenty lines").pop().unwrap().unwrap();
    let last: Value = serde_json::from_slice(&last).unwrap();
    assert!(last["applied"].as_u64().unwrap() > 0);
}

#[test]
fn a_disk_that_another_node_has_opened_is_taken_out_of_service_here() {
    let node = Node::start();
    let disk = node.cluster.view().state.disks.keys().next().unwrap().0;
    let other = NodeId(77);
    let commands = [
        Command::AddNode {
            node: other,
            store: 77,
            name: "n2".into(),
            addresses: vec!["127.0.0.1:1".into()],
            domain: "n2".into(),
            memory: 0,
            incarnation: 1,
        },
        Command::AddDisk {
            disk,
            node: other,
            domain: String::new(),
            bytes: 1 << 28,
        },
        Command::DiskUp { disk, boot: 5 },
    ];
    for command in commands {
        node.cluster.propose(node.cluster.request(), &command).unwrap();
    }
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let (status, said) = node.send("POST", "/v1/nodes/n1/command", &json!({ "command": "status" }));
        assert_eq!(status, 200, "{said}");
        let disks = said["disks"].as_array().unwrap();
        let found = disks.iter().find(|found| found["uuid"] == disk.to_string());
        if found.unwrap()["state"] == "failed" {
            break;
        }
        assert!(Instant::now() < end, "it stays in service: {said}");
        std::thread::sleep(Duration::from_millis(20));
    }
    let record = &node.cluster.view().state.disks[&crate::state::Disk(disk)];
    assert_eq!((record.node, record.boot), (other, 5), "it does not insist");
}

/// The text is a promise to programs that were made from it: who changes it says so by changing the file.
#[test]
fn the_openapi_text_is_the_one_that_is_checked_in() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/formats/openapi.json");
    let now = document();
    if std::env::var_os("UNIBODY_WRITE_OPENAPI").is_some() {
        std::fs::write(&path, &now).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == now,
        "docs/formats/openapi.json is old: set UNIBODY_WRITE_OPENAPI=1 and run this test"
    );
    let document: Value = serde_json::from_str(&now).unwrap();
    for path in [
        "/v1/status",
        "/v1/volumes/{name}/attach",
        "/v1/nodes/{node}/command",
        "/metrics",
    ] {
        assert!(document["paths"][path].is_object(), "{path}");
    }
}
