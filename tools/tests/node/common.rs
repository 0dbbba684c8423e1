//! Running the program and its nodes in a place of their own.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_unibody");
const PATIENCE: Duration = Duration::from_secs(60);

/// A directory that is removed at the end.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Place(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn str(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// A formatted disk.
    pub(crate) fn disk(&self, name: &str, size: &str) -> String {
        let path = self.str(name);
        runs(&["disk", "format", &path, "--size", size]);
        path
    }

    /// A `--volume` flag with a socket here.
    pub(crate) fn volume(&self, name: &str, options: &str) -> String {
        format!("{name},{options},socket={}", self.str(&format!("{name}.sock")))
    }
}

/// Runs the program.
pub(crate) fn output(arguments: &[&str]) -> Output {
    Command::new(PROGRAM)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Runs the program to success; what it printed.
pub(crate) fn runs(arguments: &[&str]) -> String {
    let output = output(arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{arguments:?}: {}\n{errors}",
        output.status
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the program to failure; what it said.
pub(crate) fn fails(arguments: &[&str]) -> String {
    let output = output(arguments);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{arguments:?} should have failed");
    assert!(!errors.contains("panicked"), "{arguments:?}: {errors}");
    errors
}

/// A node that runs; killed when dropped.
pub(crate) struct Node {
    child: Child,
    control: String,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Node {
    /// Starts `unibody serve` and waits until it is ready.
    pub(crate) fn start(flags: &[&str]) -> Self {
        let after = |name: &str| {
            flags
                .iter()
                .position(|flag| *flag == name)
                .map(|at| flags[at + 1].to_owned())
        };
        let control =
            after("--control").or_else(|| after("--state").map(|dir| format!("{dir}/control.sock")));
        let mut command = Command::new(PROGRAM);
        command
            .arg("serve")
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert_eq!(line, "ready\n", "the node {flags:?} did not start");
        Node {
            child,
            control: control.unwrap_or_default(),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGTERM; its exit status.
    pub(crate) fn terminate(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the node did not end");
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Runs the program against this node.
    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        runs(&[arguments, &["--control", &self.control]].concat())
    }

    /// The same, to failure.
    pub(crate) fn fails(&self, arguments: &[&str]) -> String {
        fails(&[arguments, &["--control", &self.control]].concat())
    }

    pub(crate) fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.run(&["status", "--json"])).unwrap()
    }

    /// Waits for a state of the node.
    pub(crate) fn wait(&self, what: &str, is: impl Fn(&serde_json::Value) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            if is(&status) {
                return;
            }
            assert!(
                Instant::now() < end,
                "{what}: not within {} s: {status:#}",
                PATIENCE.as_secs()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
