//! The process of a VMM: started so that it outlives us, recognised again, signalled without a race.
//!
//! Invariants: a process is named by id and start time; a signal goes through a pidfd that was opened before the start time
//! was compared, so it cannot reach a process that took the id over in between.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::Patience;

/// How often a waiting command looks again.
pub(crate) const POLL: Duration = Duration::from_millis(20);

/// A process, named so that no other can be taken for it until the next boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// When it was started, in clock ticks since boot.
    pub start_ticks: u64,
}

impl Process {
    /// The living process with this id.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (state, start_ticks) = parse_stat(&stat)?;
        (!matches!(state, 'Z' | 'X')).then_some(Process { pid, start_ticks })
    }

    /// Whether it still runs. One that has ended but was not collected by its parent does not.
    pub fn is_alive(&self) -> bool {
        Process::of(self.pid) == Some(*self)
    }

    /// Kills it at once. A process that has already ended is no error.
    pub(crate) fn kill(&self) -> io::Result<()> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(());
        };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => return Ok(()),
            other => other?,
        };
        if !self.is_alive() {
            return Ok(());
        }
        match pidfd_send_signal(&fd, Signal::KILL) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Waits until it has ended; false if it has not while there is patience.
    pub(crate) fn wait(&self, patience: Patience<'_>) -> bool {
        let deadline = patience.end();
        while self.is_alive() {
            if Instant::now() >= deadline || patience.is_off() {
                return false;
            }
            std::thread::sleep(POLL);
        }
        true
    }
}

/// State and start time from the text of `/proc/<pid>/stat`. The name in it may hold spaces and parentheses.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat[stat.rfind(')')? + 1..].split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// Starts a program in a session of its own, its output going to `log`, so that it lives on when we end.
pub(crate) fn spawn_detached(command: &mut Command, log: &File) -> io::Result<Process> {
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log.try_clone()?);
    // SAFETY: the closure runs in the child between fork and exec, where only async-signal-safe calls are allowed and no lock
    // or allocation of another thread may be relied on. It makes the single system call setsid and turns its number into an
    // io::Error, which allocates nothing; it captures nothing.
    unsafe {
        command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from));
    }
    let mut child = command.spawn()?;
    let process = Process::of(child.id());
    // As long as we live we are its parent: without this wait its entry would linger after its end.
    std::thread::spawn(move || child.wait());
    process.ok_or_else(|| io::Error::other("it ended at once"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_forge_the_fields() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20 21";
        assert_eq!(parse_stat(&format!("12 (a) Z 9 (b c) {tail}")), Some(('S', 777)));
        assert_eq!(parse_stat("12 (a) S 1 2"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn a_detached_process_has_its_own_session_and_can_be_killed() {
        let dir = tempfile::tempdir().unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let process = spawn_detached(Command::new("sleep").arg("60"), &log).unwrap();
        assert!(process.is_alive());
        let session = rustix::process::getsid(Pid::from_raw(process.pid as i32)).unwrap();
        assert_eq!(session.as_raw_nonzero().get() as u32, process.pid);
        let other = Process {
            start_ticks: process.start_ticks + 1,
            ..process
        };
        other.kill().unwrap();
        assert!(
            process.is_alive(),
            "a kill of another incarnation must not hit this one"
        );
        assert!(!process.wait(Duration::ZERO.into()));
        process.kill().unwrap();
        assert!(process.wait(Duration::from_secs(10).into()));
        process.kill().unwrap();
    }
}
