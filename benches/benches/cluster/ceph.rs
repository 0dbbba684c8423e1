//! Ceph as Debian has it: one monitor, one manager, three OSDs (BlueStore on files on tmpfs), pool of size 2, driven by fio's rbd
//! engine. No authentication, and no cache in the client, which would answer writes that no daemon has seen.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::unibody::outcome;
use super::{Contender, Outcome, SPAN, Work, processor_seconds};

pub(crate) struct Ceph {
    dir: PathBuf,
}

const DAEMONS: [&str; 5] = ["mon.a", "mgr.x", "osd.0", "osd.1", "osd.2"];
/// Time for all of it to be there.
const PATIENCE: Duration = Duration::from_secs(60);

impl Ceph {
    /// Starts it with a filled image, if it is installed.
    pub(crate) fn start(dir: &Path) -> Option<Self> {
        let fio = Command::new("fio").arg("--enghelp").output().ok()?;
        let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
        if !String::from_utf8_lossy(&fio.stdout).contains("rbd")
            || !["ceph-mon", "ceph-mgr", "ceph-osd"].into_iter().all(has)
        {
            return None;
        }
        let ceph = Ceph {
            dir: dir.join("ceph"),
        };
        let place = |name: &str| ceph.dir.join(name).display().to_string();
        fs::create_dir(&ceph.dir).expect("the directory can be written");
        let (fsid, dir) = (uuid(), ceph.dir.display());
        let monitor = "[v2:127.0.0.1:43300,v1:127.0.0.1:46789]";
        let conf = format!(
            "[global]\nfsid = {fsid}\nmon host = {monitor}\nauth cluster required = none\nauth service required = none\n\
             auth client required = none\nosd pool default size = 2\nosd crush chooseleaf type = 0\n\
             osd objectstore = bluestore\nbluestore block size = 3221225472\nrun dir = {dir}\npid file = {dir}/$name.pid\n\
             log file = {dir}/$name.log\nadmin socket = {dir}/$name.asok\nmon data = {dir}/mon\nosd data = {dir}/osd$id\n\
             mgr data = {dir}/mgr\n[client]\nrbd cache = false\nadmin socket =\nlog file =\n"
        );
        fs::write(place("ceph.conf"), conf).expect("the directory can be written");
        for name in ["mon", "mgr", "osd0", "osd1", "osd2"] {
            fs::create_dir(place(name)).expect("the directory can be written");
        }
        let map = place("monmap");
        ceph.done(
            "monmaptool",
            &["--create", "--addv", "a", monitor, "--fsid", &fsid, &map],
        );
        ceph.done("ceph-mon", &["--mkfs", "-i", "a", "--monmap", &map]);
        ceph.done("ceph-mon", &["-i", "a"]);
        ceph.done("ceph-mgr", &["-i", "x"]);
        for id in ["0", "1", "2"] {
            let uuid = uuid();
            ceph.done("ceph", &["osd", "new", &uuid]);
            ceph.done("ceph-osd", &["-i", id, "--mkfs", "--osd-uuid", &uuid]);
            ceph.done("ceph-osd", &["-i", id]);
        }
        ceph.until("osd stat", "3 up");
        ceph.done("ceph", &["osd", "pool", "create", "rbd", "32"]);
        ceph.until("pg stat", "33 active+clean");
        let size = format!("{}B", 2 * SPAN);
        ceph.done("rbd", &["create", "v", "--size", &size]);
        let span = SPAN.to_string();
        ceph.fio(&[
            "--rw=write",
            "--bs=128k",
            "--iodepth=8",
            &format!("--size={span}"),
        ]);
        Some(ceph)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("CEPH_CONF", self.dir.join("ceph.conf"));
        command
    }

    fn done(&self, program: &str, args: &[&str]) -> String {
        let output = self
            .command(program)
            .args(args)
            .output()
            .expect("the program runs");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {args:?}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn until(&self, question: &str, answer: &str) {
        let begun = Instant::now();
        let words: Vec<&str> = question.split(' ').collect();
        while !self.done("ceph", &words).contains(answer) {
            assert!(
                begun.elapsed() < PATIENCE,
                "Ceph does not say {answer:?} to {question:?}"
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn fio(&self, args: &[&str]) -> String {
        let fixed = [
            "--name=v",
            "--ioengine=rbd",
            "--pool=rbd",
            "--rbdname=v",
            "--output-format=json",
        ];
        self.done("fio", &[&fixed, args].concat())
    }
}

fn uuid() -> String {
    let text = fs::read_to_string("/proc/sys/kernel/random/uuid").expect("Linux has it");
    text.trim().to_owned()
}

impl Contender for Ceph {
    fn run(&mut self, work: Work) -> Outcome {
        let daemons = self.daemons();
        let before = processor_seconds(&daemons);
        let text = self.fio(&[
            &format!("--rw={}", work.rw),
            "--bs=4k",
            &format!("--iodepth={}", work.depth),
            &format!("--size={SPAN}"),
            &format!("--runtime={}", work.seconds),
            "--time_based",
        ]);
        outcome(&text, work, processor_seconds(&daemons) - before)
    }

    fn daemons(&self) -> Vec<u32> {
        let pid = |name: &str| {
            let text = fs::read_to_string(self.dir.join(format!("{name}.pid"))).ok()?;
            text.trim().parse().ok()
        };
        DAEMONS.iter().filter_map(|name| pid(name)).collect()
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        for pid in self.daemons() {
            // One that has ended already is no matter.
            Command::new("kill").args(["-9", &pid.to_string()]).status().ok();
        }
    }
}
