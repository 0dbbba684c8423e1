//! The processes and files of a demo. None of them outlives it, however it ends: in good order, by an error, by Ctrl-C or by
//! a panic. (Only SIGKILL leaves them behind.)

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use unibody_vmm_adapter::{RuntimeRoot, find};

/// Everything that is to be ended and removed.
#[derive(Default)]
struct Things {
    children: BTreeMap<u32, Child>,
    /// Runtime directories of VMs, whose processes are nobody's children.
    vms: Vec<PathBuf>,
    dir: Option<PathBuf>,
}

static THINGS: Mutex<Things> = Mutex::new(Things {
    children: BTreeMap::new(),
    vms: Vec::new(),
    dir: None,
});

fn things() -> MutexGuard<'static, Things> {
    THINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends and removes everything when dropped.
pub(super) struct Tidy;

impl Drop for Tidy {
    fn drop(&mut self) {
        tidy(&mut things());
    }
}

/// From now on everything is tidied up at the end; `dir` too, if there is one.
pub(super) fn begin(dir: Option<&Path>) -> Result<Tidy> {
    things().dir = dir.map(Path::to_path_buf);
    let stop = unibody_control::node::stop_on_signals().context("signals can not be caught")?;
    std::thread::spawn(move || {
        if stop.recv().is_ok() {
            tidy(&mut things());
            eprintln!("unibody: interrupted; everything of the demo was ended");
            std::process::exit(130);
        }
    });
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        say(panic);
        // Locked only if this very module has panicked.
        if let Ok(mut things) = THINGS.try_lock() {
            tidy(&mut things);
        }
    }));
    Ok(Tidy)
}

fn tidy(things: &mut Things) {
    for child in things.children.values_mut() {
        // It may have ended already.
        child.kill().ok();
        child.wait().ok();
    }
    things.children.clear();
    for root in std::mem::take(&mut things.vms) {
        kill_vms(&RuntimeRoot::new(root));
    }
    if let Some(dir) = things.dir.take() {
        std::fs::remove_dir_all(dir).ok();
    }
}

fn kill_vms(root: &RuntimeRoot) {
    for name in root.names().unwrap_or_default() {
        if let Ok(Some(vmm)) = find(root, &name) {
            vmm.kill(&name).ok();
        }
    }
}

/// The VMs of this runtime directory end with the demo.
pub(super) fn own_vms(root: &Path) {
    things().vms.push(root.to_path_buf());
}

/// A node, as a process of its own: this very program with other arguments.
pub(super) struct Process {
    pid: u32,
    output: Option<BufReader<ChildStdout>>,
    log: PathBuf,
}

impl Process {
    /// Starts one; what it complains of goes to the end of `log`.
    pub(super) fn start<'a>(arguments: impl IntoIterator<Item = &'a str>, log: &Path) -> Result<Self> {
        let program = std::env::current_exe().context("this program can not find itself")?;
        let errors = File::options().create(true).append(true).open(log)?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors);
        let mut child = command.spawn().context("the node can not be started")?;
        let output = child.stdout.take().map(BufReader::new);
        let pid = child.id();
        things().children.insert(pid, child);
        Ok(Process {
            pid,
            output,
            log: log.to_path_buf(),
        })
    }

    /// Waits until it serves.
    pub(super) fn ready(&mut self) -> Result<()> {
        let lines = self.output.take().context("it was waited for before")?.lines();
        let ready = lines.map_while(Result::ok).any(|line| line == "ready");
        let said = || std::fs::read_to_string(&self.log).unwrap_or_default();
        ensure!(ready, "the node did not start: {}", said().trim_end());
        Ok(())
    }

    fn child(&self) -> Result<Child> {
        things().children.remove(&self.pid).context("the node is gone")
    }

    /// Ends it as the loss of power does.
    pub(super) fn kill(self) -> Result<()> {
        let mut child = self.child()?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Asks it to end.
    pub(super) fn terminate(&self) -> Result<()> {
        let pid = Pid::from_raw(self.pid as i32).context("that is no process")?;
        kill_process(pid, Signal::TERM).context("the node is gone")
    }

    /// Waits until one that was asked has ended, which it must in good order.
    pub(super) fn ended(self) -> Result<()> {
        // It stays where it is until it has: somebody may press Ctrl-C meanwhile.
        loop {
            let ended = things()
                .children
                .get_mut(&self.pid)
                .context("the node is gone")?
                .try_wait()?;
            if let Some(status) = ended {
                things().children.remove(&self.pid);
                ensure!(status.success(), "the node did not end cleanly: {status}");
                return Ok(());
            }
            std::thread::sleep(super::LOOK);
        }
    }
}
