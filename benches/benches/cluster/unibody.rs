//! Three nodes of the release build, each a process of its own, all on this machine.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::{Contender, Outcome, SPAN, Work, processor_seconds};

pub(crate) struct Nodes {
    program: PathBuf,
    children: Vec<Child>,
    socket: String,
}

fn done(program: &Path, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .expect("the program runs");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "unibody {args:?}: {error}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

impl Nodes {
    /// Starts them, with a filled volume on all three that is attached to the first.
    pub(crate) fn start(dir: &Path) -> Self {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/unibody");
        let program = std::env::var_os("UNIBODY").map_or(program, PathBuf::from);
        assert!(
            program.exists(),
            "{} is not there: cargo build --release -p unibody-tools",
            program.display()
        );
        let mut nodes = Nodes {
            program,
            children: Vec::new(),
            socket: String::new(),
        };
        let place = |name: &str| dir.join(name).display().to_string();
        for n in 1..=3 {
            let (home, disk) = (place(&format!("n{n}")), place(&format!("d{n}")));
            done(&nodes.program, &["disk", "format", &disk, "--size", "3G"]);
            let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
            let listen = free.local_addr().expect("it is bound").to_string();
            drop(free);
            let first = place("n1");
            let mut command = Command::new(&nodes.program);
            match n {
                1 => command.args(["node", "init"]),
                _ => {
                    let token = done(&nodes.program, &["node", "token", "--dir", &first]);
                    command.args(["node", "join", &token])
                }
            };
            let name = format!("n{n}");
            command.args([
                "--dir", &home, "--name", &name, "--listen", &listen, "--disk", &disk,
            ]);
            // All share the core that the load does not use.
            command.args(["--cores", "0"]).stdout(Stdio::piped());
            let mut child = command.spawn().expect("the program runs");
            let lines = BufReader::new(child.stdout.take().expect("it is piped")).lines();
            let ready = lines.map_while(Result::ok).any(|line| line == "ready");
            nodes.children.push(child);
            assert!(ready, "node {n} did not start");
        }
        let first = place("n1");
        let size = (2 * SPAN).to_string();
        done(
            &nodes.program,
            &[
                "volume",
                "create",
                "v",
                "--size",
                &size,
                "--near",
                "n1",
                "--node-dir",
                &first,
            ],
        );
        nodes.socket = done(
            &nodes.program,
            &["volume", "attach", "v", "--on", "n1", "--node-dir", &first],
        );
        let span = SPAN.to_string();
        done(
            &nodes.program,
            &["bench", &nodes.socket, "--fill", "--bs", "128K", "--size", &span],
        );
        nodes
    }
}

impl Contender for Nodes {
    fn run(&mut self, work: Work) -> Outcome {
        let (depth, seconds, span) = (work.depth.to_string(), work.seconds.to_string(), SPAN.to_string());
        let daemons = self.daemons();
        let before = processor_seconds(&daemons);
        let args = [
            "bench",
            &self.socket,
            "--rw",
            work.rw,
            "--bs",
            "4K",
            "--iodepth",
            &depth,
            "--runtime",
            &seconds,
            "--ramp",
            "0",
            "--size",
            &span,
            "--core",
            "1",
            "--json",
        ];
        let text = done(&self.program, &args);
        let spent = processor_seconds(&daemons) - before;
        outcome(&text, work, spent)
    }

    fn daemons(&self) -> Vec<u32> {
        self.children.iter().map(Child::id).collect()
    }
}

/// What fio's JSON, or what has its shape, says.
pub(crate) fn outcome(text: &str, work: Work, spent: f64) -> Outcome {
    let begin = text.find('{').expect("fio prints JSON");
    let result: Value = serde_json::from_str(&text[begin..]).expect("fio prints JSON");
    let direction = if work.rw.contains("read") { "read" } else { "write" };
    let said = &result["jobs"][0][direction];
    let number = |value: &Value| value.as_f64().expect("fio says a number");
    let iops = number(&said["iops"]);
    Outcome {
        iops,
        p50: number(&said["clat_ns"]["percentile"]["50.000000"]) / 1000.0,
        each: iops * work.seconds / spent,
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for child in &mut self.children {
            // Whether it has ended before does not matter here.
            child.kill().ok();
            child.wait().ok();
        }
    }
}
