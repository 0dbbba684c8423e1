//! What runs a node's VMs: their definitions as the cluster keeps them, and the VMMs of this machine.
//!
//! A definition is what `unibody vm start` reads from a file, but without sockets, since a volume is served on whichever node
//! the VM is placed; `vmm` at its top chooses the VMM, otherwise the first that is installed runs it.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use unibody_control::cluster::vms::{VmAct, VmChange, VmHost, VmNeeds};
use unibody_vmm_adapter::{Patience, Phase, RuntimeRoot, VmSpec, Vmm, VmmError, VmmKind, VolumeSpec, find};

/// As the cluster keeps it.
#[derive(Serialize, Deserialize)]
struct Definition {
    vmm: Option<VmmKind>,
    spec: VmSpec,
}

/// See the module.
pub(crate) struct Host(pub(crate) RuntimeRoot);

fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    let texts: Vec<_> = sources.map(ToString::to_string).collect();
    texts.join(": ")
}

impl Host {
    /// The VM of this name, if its VMM lives.
    fn find(&self, name: &str) -> Result<Option<Box<dyn Vmm>>, String> {
        find(&self.0, name).map_err(|error| chain(&error))
    }

    /// What the VM of this name was started as, with what was changed since.
    fn spec(&self, name: &str) -> Result<VmSpec, String> {
        self.0.spec(name).map_err(|error| chain(&error))
    }

    fn try_stop(&self, name: &str, patience: Duration, off: &AtomicBool) -> Result<(), VmmError> {
        match find(&self.0, name)? {
            Some(vmm) if patience.is_zero() => vmm.kill(name).map(drop),
            Some(vmm) => vmm.stop(name, Patience::unless(off, patience)).map(drop),
            None => Ok(()),
        }
    }
}

/// Which VMMs there are here: those that can be used, and of the others, why not.
pub(crate) fn vmms(root: &RuntimeRoot) -> serde_json::Value {
    let say = |kind: VmmKind| match kind.adapter(root.clone()).probe() {
        Ok(probe) => serde_json::json!(probe),
        Err(error) => serde_json::json!({ "vmm": kind, "error": chain(&error) }),
    };
    VmmKind::ALL.into_iter().map(say).collect()
}

/// What the process of a VM does.
pub(crate) fn process(vmm: &dyn Vmm, name: &str) -> Result<serde_json::Value, VmmError> {
    Ok(serde_json::json!({ "vmm": vmm.kind(), "status": vmm.status(name)? }))
}

impl Definition {
    /// What it asks for, and it as a text.
    fn told(&self) -> Result<(VmNeeds, String), String> {
        let spec = &self.spec;
        let needs = VmNeeds {
            name: spec.name.clone(),
            memory: spec.memory.0,
            volumes: spec.volumes.iter().map(|volume| volume.name.clone()).collect(),
        };
        let text = serde_json::to_string(self).map_err(|error| error.to_string())?;
        Ok((needs, text))
    }
}

/// How many queues another volume of a VM gets: so many as are asked for, or as many as the most that one of them has.
pub(crate) fn queues(asked: Option<u16>, spec: &VmSpec) -> u16 {
    let most = spec.volumes.iter().map(|volume| volume.queues).max();
    asked.or(most).unwrap_or(1)
}

/// Stands for the socket of a volume, which nobody knows before the VM has a place.
fn unknown(number: usize) -> PathBuf {
    PathBuf::from(format!("/{number}"))
}

/// The first VMM that is installed here.
pub(crate) fn any_vmm(root: &RuntimeRoot) -> Option<Box<dyn Vmm>> {
    let mut adapters = VmmKind::ALL.into_iter().map(|kind| kind.adapter(root.clone()));
    adapters.find(|vmm| vmm.probe().is_ok())
}

impl VmHost for Host {
    fn check(&self, text: &str) -> Result<(VmNeeds, String), String> {
        let mut table: toml::Table = toml::from_str(text).map_err(|error| error.to_string())?;
        let vmm = match table.remove("vmm") {
            Some(toml::Value::String(name)) => Some(name.parse()?),
            Some(_) => return Err("vmm: a name is needed".into()),
            None => None,
        };
        let volumes = table.get_mut("volumes").and_then(toml::Value::as_array_mut);
        for (number, volume) in volumes.into_iter().flatten().enumerate() {
            let Some(volume) = volume.as_table_mut() else {
                continue;
            };
            let unknown = unknown(number).to_string_lossy().into_owned();
            if volume.insert("socket".into(), unknown.into()).is_some() {
                return Err("volumes: leave out the socket: it is where the VM is placed".into());
            }
        }
        let spec = VmSpec::parse(&toml::to_string(&table).map_err(|error| error.to_string())?)
            .map_err(|error| chain(&error))?;
        Definition { vmm, spec }.told()
    }

    fn amend(&self, definition: &str, change: &VmChange) -> Result<(VmNeeds, String), String> {
        let mut definition: Definition =
            serde_json::from_str(definition).map_err(|error| format!("its definition: {error}"))?;
        let like_others = queues(None, &definition.spec);
        let volumes = &mut definition.spec.volumes;
        match change {
            VmChange::Vmm(name) => definition.vmm = Some(name.parse()?),
            VmChange::AddVolume(volume) => volumes.push(VolumeSpec {
                name: volume.volume.clone(),
                socket: PathBuf::new(),
                queues: volume.queues.unwrap_or(like_others),
                readonly: volume.readonly,
            }),
            VmChange::RemoveVolume(name) => volumes.retain(|volume| volume.name != *name),
        }
        for (number, volume) in volumes.iter_mut().enumerate() {
            volume.socket = unknown(number);
        }
        definition.spec.check().map_err(|error| chain(&error))?;
        definition.told()
    }

    fn start(&self, definition: &str, volumes: &[(String, PathBuf)]) -> Result<(), String> {
        let Definition { vmm, mut spec } =
            serde_json::from_str(definition).map_err(|error| format!("its definition: {error}"))?;
        for volume in &mut spec.volumes {
            let found = volumes.iter().find(|(name, _)| *name == volume.name);
            let (_, socket) = found.ok_or_else(|| format!("volume {} is not here", volume.name))?;
            volume.socket = std::path::absolute(socket).map_err(|error| error.to_string())?;
        }
        spec.check().map_err(|error| chain(&error))?;
        // What is left of an earlier run: its guest has ended, or it would count as running.
        self.try_stop(&spec.name, Duration::ZERO, &AtomicBool::new(false))
            .map_err(|error| chain(&error))?;
        let adapter = match vmm {
            Some(kind) => kind.adapter(self.0.clone()),
            None => any_vmm(&self.0).ok_or("neither Cloud Hypervisor nor QEMU is installed on its node")?,
        };
        let started = adapter.start(&spec).map_err(|error| chain(&error))?;
        for notice in started.notices {
            eprintln!("unibody: VM {}: {notice}", spec.name);
        }
        Ok(())
    }

    fn stop(&self, name: &str, patience: Duration, off: &AtomicBool) -> Result<(), String> {
        self.try_stop(name, patience, off).map_err(|error| chain(&error))
    }

    fn act(
        &self,
        name: &str,
        act: &VmAct,
        socket: Option<&Path>,
        off: &AtomicBool,
    ) -> Result<serde_json::Value, String> {
        let Some(vmm) = self.find(name)? else {
            return match act {
                VmAct::Status
                | VmAct::Kill
                | VmAct::Stop { .. }
                | VmAct::AddVolume(_)
                | VmAct::RemoveVolume { .. } => Ok(serde_json::Value::Null),
                VmAct::Pause | VmAct::Resume => Err(format!(
                    "VM {name} does not run now: see `unibody vm status {name}`"
                )),
            };
        };
        let patience = Patience::unless(off, act.patience());
        let done = match act {
            VmAct::Status => {
                let mut process = process(&*vmm, name).map_err(|error| chain(&error))?;
                let volumes = self.spec(name)?.volumes.into_iter().map(|volume| volume.name);
                process["volumes"] = volumes.collect();
                return Ok(process);
            }
            VmAct::Kill => vmm.kill(name).map(drop),
            VmAct::Stop { .. } => vmm.stop(name, patience).map(drop),
            VmAct::Pause => vmm.pause(name),
            VmAct::Resume => vmm.resume(name),
            VmAct::AddVolume(volume) => {
                let spec = self.spec(name)?;
                if spec.volumes.iter().any(|has| has.name == volume.volume) {
                    // It was part of the definition at this start already.
                    return Ok(serde_json::Value::Null);
                }
                let socket = socket.ok_or_else(|| format!("volume {} is not here", volume.volume))?;
                let volume = VolumeSpec {
                    name: volume.volume.clone(),
                    socket: std::path::absolute(socket).map_err(|error| error.to_string())?,
                    queues: queues(volume.queues, &spec),
                    readonly: volume.readonly,
                };
                vmm.add_volume(name, &volume)
            }
            VmAct::RemoveVolume { volume, .. } => {
                match self.spec(name)?.volumes.iter().any(|has| has.name == *volume) {
                    true => vmm.remove_volume(name, volume, patience),
                    // It became part of the definition after this start.
                    false => Ok(()),
                }
            }
        };
        done.map(|()| serde_json::Value::Null)
            .map_err(|error| chain(&error))
    }

    fn vmms(&self) -> serde_json::Value {
        vmms(&self.0)
    }

    fn running(&self) -> Result<Vec<String>, String> {
        let mut running = Vec::new();
        for name in self.0.names().map_err(|error| chain(&error))? {
            let Some(vmm) = self.find(&name)? else { continue };
            // One whose VMM does not answer may still run.
            let ended = vmm
                .status(&name)
                .is_ok_and(|status| matches!(status.phase, Phase::Ended(_)));
            if !ended {
                running.push(name);
            }
        }
        Ok(running)
    }
}

/// A definition from a file, as the API takes it: with the VMM of choice at its top.
pub(crate) fn definition(path: &Path, vmm: Option<VmmKind>) -> anyhow::Result<(String, String)> {
    use anyhow::Context;
    let text =
        std::fs::read_to_string(path).with_context(|| format!("{} can not be read", path.display()))?;
    let mut table: toml::Table =
        toml::from_str(&text).with_context(|| format!("{} is not a VM's specification", path.display()))?;
    if let Some(vmm) = vmm {
        table.insert("vmm".into(), vmm.to_string().into());
    }
    let name = table
        .get("name")
        .and_then(toml::Value::as_str)
        .unwrap_or_default();
    Ok((name.to_owned(), toml::to_string(&table)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        name = "web1"
        memory = "1G"
        [boot]
        kernel = "/boot/vmlinuz"
        [[volumes]]
        name = "root"
    "#;

    fn host() -> Host {
        Host(RuntimeRoot::new("/nonexistent"))
    }

    #[test]
    fn a_definition_says_what_a_vm_needs() {
        let (needs, definition) = host().check(&format!("vmm = \"qemu\"\n{TEXT}")).unwrap();
        assert_eq!(
            (needs.name.as_str(), needs.memory, needs.volumes),
            ("web1", 1 << 30, vec!["root".to_owned()])
        );
        let Definition { vmm, .. } = serde_json::from_str(&definition).unwrap();
        assert_eq!(vmm, Some(VmmKind::Qemu));
    }

    #[test]
    fn what_only_one_node_would_understand_is_refused() {
        let socket = format!("{TEXT}socket = \"/run/x.sock\"");
        assert!(
            host()
                .check(&socket)
                .unwrap_err()
                .contains("leave out the socket")
        );
        let relative = TEXT.replace("/boot", "boot");
        let error = host().check(&relative).unwrap_err();
        assert!(error.contains("absolute path"), "{error}");
        assert!(host().check("vmm = 7").unwrap_err().contains("vmm"));
        assert!(host().check(&format!("{TEXT}speed = 3")).is_err());
    }

    #[test]
    fn a_definition_keeps_what_is_changed_about_a_vm() {
        let (_, definition) = host().check(TEXT).unwrap();
        let volume = unibody_control::cluster::vms::VmVolume {
            volume: "data".into(),
            readonly: true,
            queues: None,
        };
        let add = VmChange::AddVolume(volume);
        let (needs, definition) = host().amend(&definition, &add).unwrap();
        assert_eq!(needs.volumes, ["root", "data"]);
        let twice = host().amend(&definition, &add).unwrap_err();
        assert!(twice.contains("twice"), "{twice}");
        let (_, definition) = host().amend(&definition, &VmChange::Vmm("qemu".into())).unwrap();
        let (needs, definition) = host()
            .amend(&definition, &VmChange::RemoveVolume("root".into()))
            .unwrap();
        assert_eq!(needs.volumes, ["data"]);
        let Definition { vmm, spec } = serde_json::from_str(&definition).unwrap();
        assert_eq!((vmm, spec.volumes[0].readonly), (Some(VmmKind::Qemu), true));
        assert!(host().amend(&definition, &VmChange::Vmm("xen".into())).is_err());
    }

    #[test]
    fn a_volume_that_is_added_has_as_many_queues_as_the_others() {
        let queues_of = |text: &str, asked| {
            let (_, definition) = host().check(text).unwrap();
            let volume = unibody_control::cluster::vms::VmVolume {
                volume: "data".into(),
                readonly: false,
                queues: asked,
            };
            let (_, definition) = host().amend(&definition, &VmChange::AddVolume(volume))?;
            let Definition { spec, .. } = serde_json::from_str(&definition).unwrap();
            Ok::<_, String>(spec.volumes.last().unwrap().queues)
        };
        let four = format!("vcpus = 4{TEXT}queues = 4");
        assert_eq!(queues_of(TEXT, None), Ok(1));
        assert_eq!(queues_of(&four, None), Ok(4));
        assert_eq!(queues_of(&four, Some(2)), Ok(2));
        assert!(queues_of(TEXT, Some(2)).is_err(), "more than it has virtual CPUs");
    }

    #[test]
    fn a_vm_does_not_start_without_its_volumes() {
        let (_, definition) = host().check(TEXT).unwrap();
        let error = host().start(&definition, &[]).unwrap_err();
        assert!(error.contains("volume root"), "{error}");
    }
}
