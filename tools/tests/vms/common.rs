//! A cluster of real processes on this machine, and VMs of our own guest on it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use unibody_vmm_adapter::{Process, RuntimeRoot, VmmKind, find, guest};

const PROGRAM: &str = env!("CARGO_BIN_EXE_unibody");
const PATIENCE: Duration = Duration::from_secs(90);
const LOOK: Duration = Duration::from_millis(50);

/// Whether this VMM and our guest are there; if not, says so.
pub(crate) fn can_run(test: &str, vmm: VmmKind) -> bool {
    let probe = vmm.adapter(RuntimeRoot::new("/nonexistent")).probe();
    let there = probe.is_ok() && !guest::KERNEL.is_empty();
    if !there {
        eprintln!("SKIPPED {test}: it needs {vmm} and gcc");
    }
    there
}

fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Looks until something is there.
pub(crate) fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            Instant::now() < end,
            "{what}: not within {} s",
            PATIENCE.as_secs()
        );
        std::thread::sleep(LOOK);
    }
}

/// Nodes `n1`, `n2` and so on, each with a disk. Nothing of it is left at the end.
pub(crate) struct Cluster {
    dir: tempfile::TempDir,
    nodes: Vec<Option<Child>>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for child in self.nodes.iter_mut().flatten() {
            child.kill().ok();
            child.wait().ok();
        }
        for node in 1..=self.nodes.len() {
            let root = self.runtime(node);
            for name in root.names().unwrap_or_default() {
                if let Ok(Some(vmm)) = find(&root, &name) {
                    vmm.kill(&name).ok();
                }
            }
            if std::thread::panicking() {
                let said = std::fs::read_to_string(self.path(&format!("n{node}.log"))).unwrap_or_default();
                eprintln!("--- n{node} said:\n{said}");
            }
        }
    }
}

impl Cluster {
    /// As many nodes, with so much memory for VMs each; waits until they do their part.
    pub(crate) fn start(nodes: usize, memory: &str) -> Self {
        let mut cluster = Cluster {
            dir: tempfile::tempdir().unwrap(),
            nodes: Vec::new(),
        };
        std::fs::write(cluster.path("guest"), guest::KERNEL).unwrap();
        let listeners: Vec<_> = (0..nodes)
            .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let ports: Vec<_> = listeners
            .iter()
            .map(|listener| listener.local_addr().unwrap().to_string())
            .collect();
        drop(listeners);
        for (node, listen) in (1..=nodes).zip(&ports) {
            let disk = cluster.str(&format!("d{node}.img"));
            assert!(
                program(&["disk", "format", &disk, "--size", "1G"])
                    .output()
                    .unwrap()
                    .status
                    .success()
            );
            let home = cluster.home(node);
            let token = (node > 1).then(|| cluster.run(1, &["node", "token", "--dir", &cluster.home(1)]));
            let mut arguments = vec!["node"];
            match &token {
                Some(token) => arguments.extend(["join", token.trim()]),
                None => arguments.push("init"),
            }
            let name = format!("n{node}");
            arguments.extend([
                "--dir", &home, "--name", &name, "--listen", listen, "--disk", &disk, "--memory", memory,
            ]);
            let child = cluster.spawn(node, &arguments);
            cluster.nodes.push(Some(child));
        }
        cluster.wait(1, "all nodes are there, and an odd number has a vote", |status| {
            let count = |kind: &str, is: &dyn Fn(&Value) -> bool| {
                status[kind]
                    .as_array()
                    .unwrap()
                    .iter()
                    .filter(|one| is(one))
                    .count()
            };
            let votes = count("nodes", &|node| {
                matches!(node["role"].as_str(), Some("leader" | "voter"))
            });
            let disks = count("disks", &|disk| disk["state"] == "online");
            votes == nodes - (nodes + 1) % 2 && disks == nodes
        });
        cluster
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn str(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn home(&self, node: usize) -> String {
        self.str(&format!("n{node}"))
    }

    fn spawn(&self, node: usize, arguments: &[&str]) -> Child {
        let log = self.path(&format!("n{node}.log"));
        let log = File::options().create(true).append(true).open(log).unwrap();
        let mut child = program(arguments)
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.any(|line| line.unwrap() == "ready");
        if !ready {
            child.kill().ok();
            child.wait().ok();
        }
        assert!(ready, "n{node} did not start");
        child
    }

    /// SIGKILL. The VMs of the node run on.
    pub(crate) fn kill(&mut self, node: usize) {
        let mut child = self.nodes[node - 1].take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Runs a node that was killed again.
    pub(crate) fn restart(&mut self, node: usize) {
        let child = self.spawn(node, &["node", "run", "--dir", &self.home(node)]);
        self.nodes[node - 1] = Some(child);
    }

    /// Waits until a node's process has ended by itself.
    pub(crate) fn wait_end(&mut self, node: usize) {
        let child = self.nodes[node - 1].as_mut().unwrap();
        wait("the process ends", || child.try_wait().unwrap());
    }

    fn output(&self, node: usize, arguments: &[&str]) -> Output {
        program(arguments)
            .env("UNIBODY_NODE", self.home(node))
            .output()
            .unwrap()
    }

    /// Runs the program in the background, asking this node.
    pub(crate) fn begin(&self, node: usize, arguments: &[&str]) -> Child {
        let mut command = program(arguments);
        command
            .env("UNIBODY_NODE", self.home(node))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.spawn().unwrap()
    }

    /// Runs the program to success, asking this node; what it printed.
    pub(crate) fn run(&self, node: usize, arguments: &[&str]) -> String {
        let output = self.output(node, arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs the program to failure; what it said.
    pub(crate) fn fails(&self, node: usize, arguments: &[&str]) -> String {
        let output = self.output(node, arguments);
        assert!(!output.status.success(), "{arguments:?} should have failed");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// The status as a node shows it.
    pub(crate) fn status(&self, node: usize) -> Value {
        serde_json::from_str(&self.run(node, &["status", "--json"])).unwrap()
    }

    /// Waits for a status.
    pub(crate) fn wait(&self, node: usize, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        wait(what, || Some(self.status(node)).filter(&is))
    }

    /// Waits until every copy of everything is in sync.
    pub(crate) fn wait_whole(&self, node: usize) {
        self.wait(node, "everything is in sync", |status| {
            let mut volumes = status["volumes"].as_array().unwrap().iter();
            volumes.all(|volume| {
                volume["state"] == "healthy"
                    && volume["in_sync"] == volume["replicas"]
                    && volume["regions_to_heal"] == 0
            })
        });
    }

    pub(crate) fn create_volume(&self, name: &str) {
        self.run(1, &["volume", "create", name, "--size", "128M"]);
    }

    /// Writes the definition of a VM on the volume of its name; its path.
    pub(crate) fn definition(&self, name: &str, memory: &str) -> String {
        let path = self.path(&format!("{name}.toml"));
        let text = format!(
            "name = '{name}'\nmemory = '{memory}'\nserial_log = '{}'\n[boot]\nkernel = '{}'\ncmdline = 'live {name}'\n\
             [[volumes]]\nname = '{name}'\n",
            self.str(&format!("{name}.serial")),
            self.str("guest"),
        );
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Waits for the next thing that the guest of a VM says: `wrote`, `verified` or `stopped`.
    pub(crate) fn guest_says(&self, name: &str) -> String {
        let serial = self.path(&format!("{name}.serial"));
        let said = wait("the guest says something", || guest::verdict(&serial)).unwrap();
        // Not removed: the VMM has it open.
        File::options()
            .write(true)
            .open(serial)
            .unwrap()
            .set_len(0)
            .unwrap();
        said.split(' ').next().unwrap().to_owned()
    }

    /// What a guest says that was shut down and started again: the log may still end with the end of the one before.
    pub(crate) fn next_guest_says(&self, name: &str) -> String {
        match self.guest_says(name).as_str() {
            "stopped" => self.guest_says(name),
            said => said.to_owned(),
        }
    }

    /// Whether the guest has said anything since.
    pub(crate) fn guest_is_silent(&self, name: &str) -> bool {
        guest::verdict(&self.path(&format!("{name}.serial"))).is_none()
    }

    fn runtime(&self, node: usize) -> RuntimeRoot {
        RuntimeRoot::new(self.path(&format!("n{node}/vms")))
    }

    /// The process of a VM on a node, if it lives.
    pub(crate) fn vmm(&self, node: usize, name: &str) -> Option<Process> {
        self.runtime(node)
            .running(name)
            .unwrap()
            .map(|state| state.process)
    }

    /// Kills the process of a VM.
    pub(crate) fn kill_vmm(&self, node: usize, name: &str) {
        find(&self.runtime(node), name)
            .unwrap()
            .unwrap()
            .kill(name)
            .unwrap();
    }
}

/// A VM in a status.
pub(crate) fn vm<'a>(status: &'a Value, name: &str) -> &'a Value {
    of(status, "vms", name)
}

/// A volume in a status.
pub(crate) fn volume<'a>(status: &'a Value, name: &str) -> &'a Value {
    of(status, "volumes", name)
}

fn of<'a>(status: &'a Value, kind: &str, name: &str) -> &'a Value {
    let mut all = status[kind].as_array().unwrap().iter();
    all.find(|one| one["name"] == name).unwrap_or(&Value::Null)
}
