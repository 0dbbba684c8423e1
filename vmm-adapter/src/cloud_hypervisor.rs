//! Cloud Hypervisor, driven through its REST API on a Unix socket by the crate `cloud-hypervisor-client`.
//!
//! The VMM is started with nothing but its API; the VM is created and booted by requests, so that a refusal is an answer that
//! can be repeated to the user instead of a line in a log. The client is asynchronous: every call runs to its end in a small
//! runtime of its own, with a time limit.
//!
//! Deliberately absent: emulation. Cloud Hypervisor needs KVM, also where that is slow; this is said, not hidden.

use std::future::Future;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use cloud_hypervisor_client::apis::{DefaultApi, Error as ApiError};
use cloud_hypervisor_client::models::{
    ConsoleConfig, ConsoleMode, CpusConfig, DiskConfig, MemoryConfig, NetConfig, PayloadConfig, SerialConfig,
    VmConfig, VmRemoveDevice, VmState,
};
use cloud_hypervisor_client::{SocketBasedApiClient, socket_based_api_client};

use crate::accel::KvmSigns;
use crate::binary::Binary;
use crate::lifecycle::{self, Launch};
use crate::process::{POLL, Process};
use crate::runtime::{RuntimeRoot, VmDir};
use crate::spec::Accelerator;
use crate::{
    Accel, Patience, Phase, Probe, Started, Stopped, VmSpec, VmStatus, Vmm, VmmError, VmmKind, VolumeSpec,
    backend,
};

const KIND: VmmKind = VmmKind::CloudHypervisor;
const BINARY: Binary = Binary {
    kind: KIND,
    variable: "UNIBODY_CLOUD_HYPERVISOR",
    name: "cloud-hypervisor",
};
/// How long it may take to answer one request. Booting includes mapping the guest's memory.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long its API may take to appear after the start.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// The adapter for Cloud Hypervisor.
pub struct CloudHypervisor {
    root: RuntimeRoot,
}

impl CloudHypervisor {
    /// Its VMs are those under `root`.
    pub fn new(root: RuntimeRoot) -> Self {
        CloudHypervisor { root }
    }

    fn with<T>(&self, name: &str, work: impl FnOnce(&Api<'_>) -> Result<T, VmmError>) -> Result<T, VmmError> {
        let dir = self.root.vm(name);
        dir.require(KIND)?;
        work(&Api::new(&dir)?)
    }
}

impl Vmm for CloudHypervisor {
    fn kind(&self) -> VmmKind {
        KIND
    }

    fn probe(&self) -> Result<Probe, VmmError> {
        let binary = BINARY.find()?;
        let version = BINARY.version(&binary)?;
        let signs = KvmSigns::read();
        signs.device.as_ref().map_err(|error| no_kvm(error))?;
        let accel_reason =
            "Cloud Hypervisor runs on KVM only".to_owned() + slow(&signs).as_deref().unwrap_or_default();
        Ok(Probe {
            vmm: KIND,
            binary,
            version,
            accel: Accel::Kvm,
            accel_reason,
        })
    }

    fn start(&self, spec: &VmSpec) -> Result<Started, VmmError> {
        spec.check()?;
        let binary = BINARY.find()?;
        if spec.accelerator == Accelerator::Tcg {
            let problem = "accelerator = \"tcg\" asks for emulation, which it has not; run this VM under qemu, or take \"auto\"";
            return Err(VmmError::Unsupported {
                kind: KIND,
                problem: problem.to_owned(),
            });
        }
        let signs = KvmSigns::read();
        signs.device.as_ref().map_err(|error| no_kvm(error))?;
        let dir = self.root.vm(&spec.name);
        let mut command = Command::new(&binary);
        command
            .arg("--api-socket")
            .arg(format!("path={}", dir.api_socket().display()));
        let launch = Launch {
            dir: &dir,
            kind: KIND,
            spec,
            accel: Accel::Kvm,
        };
        let process = launch.run(&mut command, |process| {
            wait_for_api(&dir, process)?;
            let api = Api::new(&dir)?;
            api.call("vm.create", |client| client.create_vm(config(spec)))?;
            api.call("vm.boot", |client| client.boot_vm())
        })?;
        let notices = slow(&signs)
            .map(|why| format!("the guest runs by KVM{why}"))
            .into_iter()
            .collect();
        Ok(Started {
            process,
            accel: Accel::Kvm,
            notices,
        })
    }

    fn stop(&self, name: &str, patience: Patience<'_>) -> Result<Stopped, VmmError> {
        lifecycle::stop(&self.root, KIND, name, patience, |dir| {
            let api = Api::new(dir)?;
            match api.phase()? {
                // No guest that could answer a power button.
                Phase::Starting | Phase::Ended(_) => {
                    return api.call("vmm.shutdown", |client| client.shutdown_vmm());
                }
                Phase::Paused => api.call("vm.resume", |client| client.resume_vm())?,
                _ => {}
            }
            api.call("vm.power-button", |client| client.power_button_vm())
        })
    }

    fn kill(&self, name: &str) -> Result<Stopped, VmmError> {
        lifecycle::kill(&self.root, KIND, name)
    }

    fn status(&self, name: &str) -> Result<VmStatus, VmmError> {
        lifecycle::status(&self.root, KIND, name, |dir| Api::new(dir)?.phase())
    }

    fn pause(&self, name: &str) -> Result<(), VmmError> {
        self.with(name, |api| api.call("vm.pause", |client| client.pause_vm()))
    }

    fn resume(&self, name: &str) -> Result<(), VmmError> {
        self.with(name, |api| api.call("vm.resume", |client| client.resume_vm()))
    }

    fn add_volume(&self, name: &str, volume: &VolumeSpec) -> Result<(), VmmError> {
        let _lock = self.root.vm(name).lock()?;
        self.with(name, |api| {
            let mut spec = self.root.spec(name)?;
            spec.volumes.push(volume.clone());
            spec.check()?;
            backend::check(volume)?;
            api.call("vm.add-disk", |client| client.vm_add_disk_put(disk(volume)))?;
            api.dir.write_spec(&spec)
        })
    }

    fn remove_volume(&self, name: &str, volume: &str, patience: Patience<'_>) -> Result<(), VmmError> {
        let _lock = self.root.vm(name).lock()?;
        self.with(name, |api| {
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
            api.remove_device(volume, patience)?;
            api.dir.write_spec(&spec)
        })
    }
}

/// The API of one running VMM.
struct Api<'a> {
    dir: &'a VmDir,
    client: SocketBasedApiClient,
    runtime: tokio::runtime::Runtime,
}

impl<'a> Api<'a> {
    fn new(dir: &'a VmDir) -> Result<Self, VmmError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(VmmError::io("preparing a connection", dir.api_socket()))?;
        Ok(Api {
            dir,
            client: socket_based_api_client(dir.api_socket()),
            runtime,
        })
    }

    fn call<T, F>(
        &self,
        request: &'static str,
        make: impl FnOnce(&SocketBasedApiClient) -> F,
    ) -> Result<T, VmmError>
    where
        F: Future<Output = Result<T, ApiError>>,
    {
        let outcome = self
            .runtime
            .block_on(async { tokio::time::timeout(ANSWER_TIMEOUT, make(&self.client)).await });
        match outcome {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(ApiError::Api(error))) => Err(VmmError::Refused {
                kind: KIND,
                request,
                answer: format!("{} {}", error.code, error.body.trim()),
            }),
            Ok(Err(error)) => Err(VmmError::io("talking to the API", self.dir.api_socket())(
                std::io::Error::other(error),
            )),
            Err(_) => Err(VmmError::NoAnswer {
                kind: KIND,
                request,
                socket: self.dir.api_socket(),
                seconds: ANSWER_TIMEOUT.as_secs(),
            }),
        }
    }

    fn phase(&self) -> Result<Phase, VmmError> {
        match self.call("vm.info", |client| client.vm_info_get()) {
            Ok(info) => Ok(match info.state {
                VmState::Created => Phase::Starting,
                VmState::Running => Phase::Running,
                VmState::Paused => Phase::Paused,
                VmState::Shutdown => Phase::Ended("shutdown".to_owned()),
            }),
            // It answers, but has no VM yet.
            Err(VmmError::Refused { .. }) => Ok(Phase::Starting),
            Err(error) => Err(error),
        }
    }

    fn remove_device(&self, volume: &str, patience: Patience<'_>) -> Result<(), VmmError> {
        let id = device_id(volume);
        let device = VmRemoveDevice { id: Some(id.clone()) };
        self.call("vm.remove-device", |client| client.vm_remove_device_put(device))?;
        let deadline = patience.end();
        loop {
            let info = self.call("vm.info", |client| client.vm_info_get())?;
            if !info.device_tree.is_some_and(|tree| tree.contains_key(&id)) {
                return Ok(());
            }
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
    }
}

fn no_kvm(error: &str) -> VmmError {
    let problem = format!(
        "it needs KVM, and /dev/kvm does not open ({error}); load the kvm module or give this user access"
    );
    VmmError::Unsupported { kind: KIND, problem }
}

fn slow(signs: &KvmSigns) -> Option<String> {
    let text = "; but the processor's flags show neither vmx nor svm, so this KVM may be very slow";
    (!signs.processor).then(|| text.to_owned())
}

fn wait_for_api(dir: &VmDir, process: &Process) -> Result<(), VmmError> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        match UnixStream::connect(dir.api_socket()) {
            Ok(_) => return Ok(()),
            Err(_) if process.is_alive() && Instant::now() < deadline => std::thread::sleep(POLL),
            Err(error) => return Err(VmmError::io("connecting to the API", dir.api_socket())(error)),
        }
    }
}

fn device_id(volume: &str) -> String {
    format!("vol-{volume}")
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn disk(volume: &VolumeSpec) -> DiskConfig {
    DiskConfig {
        vhost_user: Some(true),
        vhost_socket: Some(text(&volume.socket)),
        num_queues: Some(i32::from(volume.queues)),
        id: Some(device_id(&volume.name)),
        ..DiskConfig::new()
    }
}

fn config(spec: &VmSpec) -> VmConfig {
    let vcpus = i32::try_from(spec.vcpus).unwrap_or(i32::MAX);
    let mut memory = MemoryConfig::new(i64::try_from(spec.memory.0).unwrap_or(i64::MAX));
    memory.shared = Some(true);
    let firmware = spec
        .boot
        .firmware
        .as_ref()
        .and_then(|firmware| firmware.cloud_hypervisor.as_deref());
    let payload = PayloadConfig {
        firmware: firmware.map(text),
        kernel: spec.boot.kernel.as_deref().map(text),
        initramfs: spec.boot.initramfs.as_deref().map(text),
        cmdline: spec.boot.cmdline.clone(),
        ..PayloadConfig::new()
    };
    let serial = match &spec.serial_log {
        Some(path) => SerialConfig {
            file: Some(text(path)),
            ..SerialConfig::new(ConsoleMode::File)
        },
        None => SerialConfig::new(ConsoleMode::Null),
    };
    let networks: Vec<NetConfig> = spec
        .networks
        .iter()
        .map(|network| NetConfig {
            tap: Some(network.tap.clone()),
            mac: network.mac.clone(),
            ..NetConfig::new()
        })
        .collect();
    VmConfig {
        cpus: Some(CpusConfig::new(vcpus, vcpus)),
        memory: Some(memory),
        disks: Some(spec.volumes.iter().map(disk).collect()),
        net: (!networks.is_empty()).then_some(networks),
        serial: Some(serial),
        console: Some(ConsoleConfig::new(ConsoleMode::Off)),
        ..VmConfig::new(payload)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_says_what_the_specification_says() {
        let spec = VmSpec::parse(
            "name='v'\nvcpus=3\nmemory='1G'\nserial_log='/log'\n[boot]\nkernel='/k'\ncmdline='x y'\n\
             [[volumes]]\nname='root'\nsocket='/s'\nqueues=2\n[[networks]]\ntap='tap0'",
        )
        .unwrap();
        let json = serde_json::to_value(config(&spec)).unwrap();
        let expect = |pointer: &str, value: serde_json::Value| {
            assert_eq!(json.pointer(pointer), Some(&value), "{pointer}")
        };
        expect("/cpus/boot_vcpus", 3.into());
        expect("/memory/size", (1u64 << 30).into());
        expect("/memory/shared", true.into());
        expect("/payload/kernel", "/k".into());
        expect("/payload/cmdline", "x y".into());
        expect("/disks/0/vhost_user", true.into());
        expect("/disks/0/vhost_socket", "/s".into());
        expect("/disks/0/num_queues", 2.into());
        expect("/disks/0/id", "vol-root".into());
        expect("/net/0/tap", "tap0".into());
        expect("/serial/mode", "File".into());
        expect("/serial/file", "/log".into());
        expect("/console/mode", "Off".into());
    }
}
