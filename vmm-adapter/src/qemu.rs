//! QEMU, driven through QMP by the crate `qapi`.
//!
//! The machine is q35 with shared memory (a memfd, so that the data plane can map it), each volume in a PCIe root port of its
//! own, because only what sits in one can be taken out of a running VM; a few ports are left empty for volumes added later.
//! Each volume's character device reconnects, so the data plane may go away and come back under the running VM.
//!
//! Deliberately absent: events. What must be waited for is asked for, which needs no connection kept open between commands
//! and does not depend on the events that a version of QEMU knows.

use std::io::BufRead;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use qapi::qmp;
use serde_json::json;

use crate::accel::KvmSigns;
use crate::binary::Binary;
use crate::lifecycle::{self, Launch};
use crate::process::{POLL, Process};
use crate::qemu_arguments::{SPARE_PORTS, arguments, chardev_id, device_id, parse_version, reconnect};
use crate::runtime::{RuntimeRoot, VmDir};
use crate::{
    Patience, Phase, Probe, Started, Stopped, VmSpec, VmStatus, Vmm, VmmError, VmmKind, VolumeSpec, backend,
};

const KIND: VmmKind = VmmKind::Qemu;
const BINARY: Binary = Binary {
    kind: KIND,
    variable: "UNIBODY_QEMU",
    name: "qemu-system-x86_64",
};
/// How long QEMU may take to answer one command.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long QEMU may take from its start to a running guest.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// The adapter for QEMU.
pub struct Qemu {
    root: RuntimeRoot,
}

type Stream = qapi::Stream<std::io::BufReader<UnixStream>, UnixStream>;

/// One connection to a running QEMU.
struct Monitor<'a> {
    dir: &'a VmDir,
    qmp: qapi::Qmp<Stream>,
    version: (i64, i64),
}

impl Qemu {
    /// Its VMs are those under `root`.
    pub fn new(root: RuntimeRoot) -> Self {
        Qemu { root }
    }

    fn with<T>(
        &self,
        name: &str,
        work: impl FnOnce(&mut Monitor<'_>) -> Result<T, VmmError>,
    ) -> Result<T, VmmError> {
        let dir = self.root.vm(name);
        dir.require(KIND)?;
        work(&mut Monitor::connect(&dir)?)
    }
}

impl Vmm for Qemu {
    fn kind(&self) -> VmmKind {
        KIND
    }

    fn probe(&self) -> Result<Probe, VmmError> {
        let binary = BINARY.find()?;
        let version = BINARY.version(&binary)?;
        let (accel, accel_reason) = KvmSigns::read().auto();
        Ok(Probe {
            vmm: KIND,
            binary,
            version,
            accel,
            accel_reason,
        })
    }

    fn start(&self, spec: &VmSpec) -> Result<Started, VmmError> {
        spec.check()?;
        let binary = BINARY.find()?;
        let version = parse_version(&BINARY.version(&binary)?);
        let (accel, notice) = KvmSigns::read()
            .choose(spec.accelerator)
            .map_err(|problem| VmmError::Unsupported { kind: KIND, problem })?;
        let dir = self.root.vm(&spec.name);
        let mut command = Command::new(&binary);
        command.args(arguments(spec, accel, &dir.api_socket(), version));
        let launch = Launch {
            dir: &dir,
            kind: KIND,
            spec,
            accel,
        };
        let process = launch.run(&mut command, |process| wait_until_running(&dir, process))?;
        Ok(Started {
            process,
            accel,
            notices: notice.into_iter().collect(),
        })
    }

    fn stop(&self, name: &str, patience: Patience<'_>) -> Result<Stopped, VmmError> {
        lifecycle::stop(&self.root, KIND, name, patience, |dir| {
            let mut monitor = Monitor::connect(dir)?;
            // A guest whose processors stand still would not see the button.
            if monitor.phase()? == Phase::Paused {
                monitor.execute("cont", &qmp::cont {})?;
            }
            monitor
                .execute("system_powerdown", &qmp::system_powerdown {})
                .map(drop)
        })
    }

    fn kill(&self, name: &str) -> Result<Stopped, VmmError> {
        lifecycle::kill(&self.root, KIND, name)
    }

    fn status(&self, name: &str) -> Result<VmStatus, VmmError> {
        lifecycle::status(&self.root, KIND, name, |dir| Monitor::connect(dir)?.phase())
    }

    fn pause(&self, name: &str) -> Result<(), VmmError> {
        self.with(name, |monitor| monitor.execute("stop", &qmp::stop {}).map(drop))
    }

    fn resume(&self, name: &str) -> Result<(), VmmError> {
        self.with(name, |monitor| monitor.execute("cont", &qmp::cont {}).map(drop))
    }

    fn add_volume(&self, name: &str, volume: &VolumeSpec) -> Result<(), VmmError> {
        let _lock = self.root.vm(name).lock()?;
        self.with(name, |monitor| {
            let mut spec = self.root.spec(name)?;
            spec.volumes.push(volume.clone());
            spec.check()?;
            backend::check(volume)?;
            monitor.add_volume(volume)?;
            monitor.dir.write_spec(&spec)
        })
    }

    fn remove_volume(&self, name: &str, volume: &str, patience: Patience<'_>) -> Result<(), VmmError> {
        let _lock = self.root.vm(name).lock()?;
        self.with(name, |monitor| {
            let mut spec = self.root.spec(name)?;
            let before = spec.volumes.len();
            spec.volumes.retain(|candidate| candidate.name != volume);
            if spec.volumes.len() == before {
                let problem = format!("VM {name} has no such volume");
                return Err(VmmError::Volume {
                    volume: volume.to_owned(),
                    problem,
                });
            }
            monitor.remove_volume(volume, patience)?;
            monitor.dir.write_spec(&spec)
        })
    }
}

impl<'a> Monitor<'a> {
    fn connect(dir: &'a VmDir) -> Result<Self, VmmError> {
        let socket = dir.api_socket();
        let stream = UnixStream::connect(&socket).map_err(VmmError::io("connecting to QMP", &socket))?;
        let io = |error| VmmError::io("talking to QMP", socket.clone())(error);
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(io)?;
        stream.set_write_timeout(Some(ANSWER_TIMEOUT)).map_err(io)?;
        let reader = std::io::BufReader::new(stream.try_clone().map_err(io)?);
        let mut qmp = qapi::Qmp::new(qapi::Stream::new(reader, stream));
        // The crate's handshake panics on a connection that closes without a greeting.
        match qmp.inner_mut().fill_buf() {
            Ok([]) => return Err(io(std::io::ErrorKind::UnexpectedEof.into())),
            Err(error) => return Err(failure(dir, "the handshake", error.into())),
            Ok(_) => {}
        }
        let greeting = qmp
            .handshake()
            .map_err(|error| failure(dir, "the handshake", error))?;
        Ok(Monitor {
            dir,
            qmp,
            version: (greeting.version.qemu.major, greeting.version.qemu.minor),
        })
    }

    fn execute<C: qapi::Command>(&mut self, request: &'static str, command: &C) -> Result<C::Ok, VmmError> {
        self.qmp
            .execute(command)
            .map_err(|error| failure(self.dir, request, error))
    }

    fn phase(&mut self) -> Result<Phase, VmmError> {
        let status = self.execute("query-status", &qmp::query_status {})?.status;
        Ok(match status {
            qmp::RunState::running => Phase::Running,
            qmp::RunState::paused => Phase::Paused,
            qmp::RunState::prelaunch | qmp::RunState::inmigrate => Phase::Starting,
            other => Phase::Ended(format!("{other:?}").replace('_', "-")),
        })
    }

    /// Names of the devices that we gave names: volumes and root ports.
    fn devices(&mut self) -> Result<Vec<String>, VmmError> {
        let list = self.execute(
            "qom-list",
            &qmp::qom_list {
                path: "/machine/peripheral".to_owned(),
            },
        )?;
        Ok(list.into_iter().map(|property| property.name).collect())
    }

    fn free_port(&mut self) -> Result<Option<String>, VmmError> {
        let devices = self.devices()?;
        let mut taken = Vec::new();
        for device in devices.iter().filter(|name| name.starts_with("vol-")) {
            let get = qmp::qom_get {
                path: format!("/machine/peripheral/{device}"),
                property: "parent_bus".to_owned(),
            };
            taken.push(
                self.execute("qom-get", &get)?
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
            );
        }
        let free = |port: &&String| !taken.iter().any(|bus| bus.rsplit('/').next() == Some(port));
        Ok(devices
            .iter()
            .filter(|name| name.starts_with("port"))
            .find(free)
            .cloned())
    }

    fn add_volume(&mut self, volume: &VolumeSpec) -> Result<(), VmmError> {
        let Some(bus) = self.free_port()? else {
            let problem = format!(
                "no free slot: QEMU keeps {SPARE_PORTS} for volumes added later; stop and start the VM to have more"
            );
            return Err(VmmError::Volume {
                volume: volume.name.clone(),
                problem,
            });
        };
        let (id, chardev) = (device_id(&volume.name), chardev_id(&volume.name));
        let (key, value) = reconnect(self.version);
        let address = json!({ "type": "unix", "data": { "path": volume.socket } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false, key: value } });
        self.execute(
            "chardev-add",
            &ChardevAdd {
                id: chardev.clone(),
                backend,
            },
        )?;
        let arguments = [("chardev", json!(chardev)), ("num-queues", json!(volume.queues))];
        let arguments = arguments
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect();
        let add = qmp::device_add {
            driver: "vhost-user-blk-pci".to_owned(),
            id: Some(id),
            bus: Some(bus),
            arguments,
        };
        let added = self.execute("device_add", &add);
        if added.is_err() {
            // Best effort: the error that matters is why the device was refused.
            let _ = self.execute("chardev-remove", &qmp::chardev_remove { id: chardev });
        }
        added.map(drop)
    }

    fn remove_volume(&mut self, volume: &str, patience: Patience<'_>) -> Result<(), VmmError> {
        let id = device_id(volume);
        self.execute("device_del", &qmp::device_del { id: id.clone() })?;
        let deadline = patience.end();
        while self.devices()?.contains(&id) {
            if patience.is_off() {
                return Err(VmmError::CalledOff);
            }
            if Instant::now() >= deadline {
                let problem = format!(
                    "the guest did not let go of it within {} s; unmount it there and try again",
                    patience.seconds()
                );
                return Err(VmmError::Volume {
                    volume: volume.to_owned(),
                    problem,
                });
            }
            std::thread::sleep(POLL);
        }
        // The device frees its character device a moment after it has disappeared.
        loop {
            match self.execute(
                "chardev-remove",
                &qmp::chardev_remove {
                    id: chardev_id(volume),
                },
            ) {
                Err(VmmError::Refused { .. }) if Instant::now() < deadline => std::thread::sleep(POLL),
                other => return other.map(drop),
            }
        }
    }
}

/// `chardev-add` with a free-form back end: the key of the reconnect time differs between versions.
#[derive(Debug, Clone, serde::Serialize)]
struct ChardevAdd {
    id: String,
    backend: serde_json::Value,
}

impl qapi::Command for ChardevAdd {
    type Ok = serde_json::Value;
    const NAME: &'static str = "chardev-add";
    const ALLOW_OOB: bool = false;
}

fn failure(dir: &VmDir, request: &'static str, error: qapi::ExecuteError) -> VmmError {
    match error {
        qapi::ExecuteError::Qapi(error) => VmmError::Refused {
            kind: KIND,
            request,
            answer: error.desc,
        },
        qapi::ExecuteError::Io(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
            ) =>
        {
            VmmError::NoAnswer {
                kind: KIND,
                request,
                socket: dir.api_socket(),
                seconds: ANSWER_TIMEOUT.as_secs(),
            }
        }
        qapi::ExecuteError::Io(error) => VmmError::io("talking to QMP", dir.api_socket())(error),
    }
}

fn wait_until_running(dir: &VmDir, process: &Process) -> Result<(), VmmError> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        let late = Instant::now() >= deadline || !process.is_alive();
        match Monitor::connect(dir).and_then(|mut monitor| monitor.phase()) {
            // A guest that is very quick may have ended already; that is its business.
            Ok(Phase::Running | Phase::Ended(_)) => return Ok(()),
            Ok(_) | Err(VmmError::Io { .. }) if !late => std::thread::sleep(POLL),
            Ok(phase) => {
                let answer = format!("the guest is still {phase:?} after {} s", START_TIMEOUT.as_secs());
                return Err(VmmError::Refused {
                    kind: KIND,
                    request: "query-status",
                    answer,
                });
            }
            Err(error) => return Err(error),
        }
    }
}
