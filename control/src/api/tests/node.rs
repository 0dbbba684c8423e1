//! A whole node, for tests of what its users see over HTTP.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::shelf::Shelf;
use crate::api::serve;
use crate::cluster::{Agent, AgentError, AgentHandle, NodeConfig, NodeSetup};
use crate::raft::{Cluster, Start};

/// A node by itself that is a whole cluster.
pub(super) struct Node {
    _dir: tempfile::TempDir,
    pub(super) address: String,
    pub(super) token: String,
    pub(super) handle: AgentHandle,
    pub(super) cluster: Arc<Cluster>,
    pub(super) shelf: Arc<Shelf>,
    running: Option<JoinHandle<Result<(), AgentError>>>,
}

impl Node {
    pub(super) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = {
            let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            free.local_addr().unwrap().to_string()
        };
        let setup = NodeSetup {
            name: "n1".into(),
            listen: address.clone(),
            address: address.clone(),
            domain: None,
            memory: 1 << 30,
            cores: vec![0],
            cache_bytes: 1 << 20,
            disks: vec!["mem:256M,domain=a".into(), "mem:256M,domain=b".into()],
            faults: false,
            out_after: Duration::from_secs(600),
        };
        let config = NodeConfig::make(dir.path(), setup, None).unwrap();
        let token = config.api_token();
        let shelf = Arc::new(Shelf::default());
        let mut agent = Agent::start(dir.path(), config, &Start::Init, shelf.clone()).unwrap();
        serve(&mut agent, shelf.clone());
        let node = Node {
            _dir: dir,
            address,
            token,
            handle: agent.handle(),
            cluster: agent.cluster(),
            shelf,
            running: Some(std::thread::spawn(move || agent.run())),
        };
        node.wait("its disks are in service", |status| {
            let disks = status["disks"].as_array().unwrap();
            disks.len() == 2 && disks.iter().all(|disk| disk["state"] == "online")
        });
        node
    }

    pub(super) fn ask(&self, method: &str, path: &str, token: &str, body: Option<&str>) -> (u16, String) {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .build()
            .into();
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address))
            .header("authorization", format!("Bearer {token}"))
            .header("content-type", "application/json");
        let mut answer = match body {
            Some(body) => agent.run(request.body(body.to_owned()).unwrap()),
            None => agent.run(request.body(()).unwrap()),
        }
        .unwrap();
        (
            answer.status().as_u16(),
            answer.body_mut().read_to_string().unwrap(),
        )
    }

    pub(super) fn get(&self, path: &str) -> Value {
        let (status, body) = self.ask("GET", path, &self.token, None);
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    }

    pub(super) fn send(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let (status, body) = self.ask(method, path, &self.token, Some(&body.to_string()));
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    pub(super) fn done(&self, method: &str, path: &str, body: &Value) {
        let answer = self.send(method, path, body);
        assert!((200..300).contains(&answer.0), "{method} {path}: {answer:?}");
    }

    pub(super) fn wait(&self, what: &str, is_so: impl Fn(&Value) -> bool) {
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let status = self.get("/v1/status");
            if is_so(&status) {
                return;
            }
            assert!(Instant::now() < end, "not within 30 s: {what}: {status}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.handle.stop();
        let ended = self.running.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}
