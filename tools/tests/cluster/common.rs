//! Nodes as real processes, each on a machine of its own ([`Net`]).

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::net::{Net, address};

const PROGRAM: &str = env!("CARGO_BIN_EXE_unibody");
const PATIENCE: Duration = Duration::from_secs(90);
const LOOK: Duration = Duration::from_millis(50);

/// Nodes `n1`, `n2` and so on.
pub(crate) struct Cluster {
    dir: tempfile::TempDir,
    pub(crate) net: Net,
    children: Vec<Option<Child>>,
    /// Stands still, and would only be waited for.
    still: Option<usize>,
}

/// Looks until something is so.
pub(crate) fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(
            Instant::now() < end,
            "not within {} s: {what}",
            PATIENCE.as_secs()
        );
        std::thread::sleep(LOOK);
    }
}

impl Cluster {
    /// Starts as many nodes as there are machines; the first `disks` of them have a disk each.
    pub(crate) fn start(net: Net, nodes: usize, disks: usize) -> Self {
        let mut cluster = Cluster {
            dir: tempfile::tempdir().unwrap(),
            net,
            children: Vec::new(),
            still: None,
        };
        for node in 1..=nodes {
            cluster.children.push(None);
            cluster.join(node, node <= disks);
        }
        until("all nodes and disks are there", || {
            let Some(status) = cluster.status(1) else {
                return false;
            };
            let votes = |node: &Value| matches!(node["role"].as_str(), Some("leader" | "voter"));
            let online = |disk: &Value| disk["state"] == "online";
            status["nodes"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|node| votes(node))
                .count()
                == nodes
                && status["disks"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter(|disk| online(disk))
                    .count()
                    == disks
        });
        cluster
    }

    fn str(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn home(&self, node: usize) -> String {
        self.str(&format!("n{node}"))
    }

    pub(crate) fn disk(&self, node: usize) -> String {
        self.str(&format!("d{node}.img"))
    }

    fn command(&self, node: usize, arguments: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.net.space(node), PROGRAM])
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    fn output(&self, node: usize, arguments: &[&str]) -> Output {
        self.command(node, arguments).output().unwrap()
    }

    /// Runs the program on a node's machine, for that node. It has to succeed.
    pub(crate) fn run(&self, node: usize, arguments: &[&str]) -> String {
        let home = self.home(node);
        let output = self.output(node, &[arguments, &["--node-dir", &home]].concat());
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {error}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// What a node says of the cluster, if it answers.
    pub(crate) fn status(&self, node: usize) -> Option<Value> {
        self.children[node - 1]
            .as_ref()
            .filter(|_| self.still != Some(node))?;
        let home = self.home(node);
        let output = self.output(node, &["status", "--json", "--node-dir", &home]);
        serde_json::from_slice(&output.stdout).ok()
    }

    /// The newest that any node says of the volume.
    pub(crate) fn volume(&self) -> Option<Value> {
        let said = (1..=self.children.len()).filter_map(|node| self.status(node));
        said.filter_map(|status| status["volumes"].as_array()?.first().cloned())
            .max_by_key(|volume| (volume["generation"].as_u64(), volume["socket"].is_string()))
    }

    /// Number of the node that owns the volume.
    pub(crate) fn owner(&self) -> Option<usize> {
        let volume = self.volume()?;
        volume["owner"].as_str()?.strip_prefix('n')?.parse().ok()
    }

    fn spawn(&mut self, node: usize, arguments: &[&str]) {
        let log = self.str(&format!("n{node}.log"));
        let log = File::options().create(true).append(true).open(log).unwrap();
        let child = self
            .command(node, arguments)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.children[node - 1] = Some(child);
    }

    /// Makes a node with an empty disk, or none; the first founds the cluster.
    pub(crate) fn join(&mut self, node: usize, disk: bool) {
        if node > self.children.len() {
            self.children.push(None);
        }
        let (home, path, name) = (self.home(node), self.disk(node), format!("n{node}"));
        let listen = format!("{}:7400", address(node));
        let mut arguments = vec!["node"];
        let token;
        match node {
            1 => arguments.push("init"),
            _ => {
                until("the first node has a token", || {
                    Path::new(&self.home(1)).join("cluster.redb").exists()
                });
                let output = self.output(1, &["node", "token", "--dir", &self.home(1)]);
                token = String::from_utf8(output.stdout).unwrap();
                arguments.extend(["join", token.trim()]);
            }
        }
        arguments.extend([
            "--dir",
            &home,
            "--name",
            &name,
            "--listen",
            &listen,
            "--out-after",
            "3600",
        ]);
        if disk {
            let made = self.output(node, &["disk", "format", &path, "--size", "1G"]);
            assert!(made.status.success());
            arguments.extend(["--disk", &path]);
        }
        self.spawn(node, &arguments);
    }

    /// Starts a node that was there before.
    pub(crate) fn revive(&mut self, node: usize) {
        let home = self.home(node);
        self.spawn(node, &["node", "run", "--dir", &home]);
    }

    pub(crate) fn kill(&mut self, node: usize) {
        if let Some(mut child) = self.children[node - 1].take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Makes a node stand still.
    pub(crate) fn stop(&mut self, node: usize) {
        self.still = Some(node);
        self.signal(node, "-STOP");
    }

    /// Lets it go on.
    pub(crate) fn go_on(&mut self, node: usize) {
        self.signal(node, "-CONT");
        self.still = None;
    }

    fn signal(&self, node: usize, signal: &str) {
        let child = self.children[node - 1].as_ref().expect("it runs");
        let sent = Command::new("kill")
            .args([signal, &child.id().to_string()])
            .status();
        assert!(sent.unwrap().success());
    }

    /// Waits until all replicas of the volume are in sync and its owner serves it.
    pub(crate) fn healed(&self) {
        until("full redundancy is back", || {
            self.volume().is_some_and(|volume| {
                volume["state"] == "healthy"
                    && volume["in_sync"] == volume["replicas"]
                    && volume["socket"].is_string()
            })
        });
    }

    /// Ends all nodes and checks their disks. An owner that is left without the others' replicas and without a majority says
    /// that it ends as after a crash; it ends by itself all the same.
    pub(crate) fn end(mut self) {
        let running: Vec<usize> = (1..=self.children.len())
            .filter(|node| self.children[node - 1].is_some())
            .collect();
        for &node in &running {
            self.signal(node, "-TERM");
        }
        for &node in &running {
            let mut child = self.children[node - 1].take().unwrap();
            let status = child.wait().unwrap();
            assert!(status.code().is_some(), "n{node} ended with {status}");
            let disk = self.disk(node);
            if Path::new(&disk).exists() {
                let checked = self.output(node, &["disk", "check", &disk]);
                let said = String::from_utf8_lossy(&checked.stdout);
                assert!(checked.status.success(), "n{node}: {said}");
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in 1..=self.children.len() {
            self.kill(node);
            if std::thread::panicking() {
                let said = std::fs::read_to_string(self.str(&format!("n{node}.log"))).unwrap_or_default();
                eprintln!("--- n{node} said:\n{said}");
            }
        }
    }
}
