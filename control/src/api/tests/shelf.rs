//! VMs that run nowhere, for tests: what is started runs until it is stopped. A definition is `NAME MEMORY VOLUME...`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cluster::vms::{VmAct, VmChange, VmHost, VmNeeds};

/// One that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Running {
    pub(super) vmm: String,
    pub(super) volumes: Vec<String>,
    pub(super) paused: bool,
}

/// What there is, and how it behaves.
#[derive(Default)]
pub(super) struct Inside {
    pub(super) running: BTreeMap<String, Running>,
    /// Starts begun.
    pub(super) starts: u32,
    /// No start goes on.
    pub(super) hold_starts: bool,
    /// Guests do nothing that they are asked to.
    pub(super) stubborn: bool,
    /// Guests that are asked to do something, and do not.
    pub(super) waiting: u32,
    /// How long the guest of the last stop had.
    pub(super) patience: Option<Duration>,
    /// No act is done.
    pub(super) refuses: bool,
    /// What is done is said to have failed.
    pub(super) lies: bool,
    /// Nothing is said of what runs.
    pub(super) mute: bool,
}

#[derive(Default)]
pub(super) struct Shelf(Mutex<Inside>);

impl Shelf {
    pub(super) fn inside(&self) -> MutexGuard<'_, Inside> {
        self.0.lock().unwrap()
    }

    /// Waits for a guest to do what it is asked to; whether it has.
    fn guest(&self, patience: Duration, off: &AtomicBool) -> Result<bool, String> {
        let end = Instant::now() + patience;
        self.inside().waiting += 1;
        let done = loop {
            if !self.inside().stubborn {
                break Ok(true);
            }
            if off.load(Ordering::Relaxed) {
                break Err("called off".into());
            }
            if Instant::now() >= end {
                break Ok(false);
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        self.inside().waiting -= 1;
        done
    }
}

impl VmHost for Shelf {
    fn check(&self, text: &str) -> Result<(VmNeeds, String), String> {
        let mut words = text.split(' ').map(str::to_owned);
        let (name, memory) = (words.next(), words.next());
        let (Some(name), Some(Ok(memory))) = (name, memory.map(|memory| memory.parse())) else {
            return Err("that is no VM".into());
        };
        let volumes: Vec<String> = words.collect();
        let definition = json!({ "name": name, "memory": memory, "volumes": volumes }).to_string();
        let needs = VmNeeds {
            name,
            memory,
            volumes,
        };
        Ok((needs, definition))
    }

    fn start(&self, definition: &str, volumes: &[(String, PathBuf)]) -> Result<(), String> {
        assert!(volumes.iter().all(|(_, socket)| socket.exists()));
        let definition: Value = serde_json::from_str(definition).unwrap();
        self.inside().starts += 1;
        while self.inside().hold_starts {
            std::thread::sleep(Duration::from_millis(5));
        }
        let running = Running {
            vmm: definition["vmm"].as_str().unwrap_or("shelf").to_owned(),
            volumes: volumes.iter().map(|(name, _)| name.clone()).collect(),
            paused: false,
        };
        let name = definition["name"].as_str().unwrap();
        self.inside().running.insert(name.to_owned(), running);
        Ok(())
    }

    fn stop(&self, name: &str, patience: Duration, off: &AtomicBool) -> Result<(), String> {
        self.inside().patience = Some(patience);
        if self.inside().running.contains_key(name) {
            self.guest(patience, off)?;
            self.inside().running.remove(name);
        }
        Ok(())
    }

    fn amend(&self, definition: &str, change: &VmChange) -> Result<(VmNeeds, String), String> {
        let mut definition: Value = serde_json::from_str(definition).unwrap();
        let volumes = definition["volumes"].as_array_mut().unwrap();
        match change {
            VmChange::AddVolume(volume) => volumes.push(json!(volume.volume)),
            VmChange::RemoveVolume(name) => volumes.retain(|volume| volume != name),
            VmChange::Vmm(name) => definition["vmm"] = json!(name),
        }
        let needs = VmNeeds {
            name: definition["name"].as_str().unwrap().to_owned(),
            memory: definition["memory"].as_u64().unwrap(),
            volumes: serde_json::from_value(definition["volumes"].clone()).unwrap(),
        };
        Ok((needs, definition.to_string()))
    }

    fn act(&self, name: &str, act: &VmAct, socket: Option<&Path>, off: &AtomicBool) -> Result<Value, String> {
        let Some(mut now) = self.inside().running.get(name).cloned() else {
            return Ok(Value::Null);
        };
        if let VmAct::Status = act {
            return match self.inside().mute {
                true => Err("it does not answer".into()),
                false => Ok(json!({ "vmm": now.vmm, "volumes": now.volumes })),
            };
        }
        if self.inside().refuses {
            return Err("it is not done".into());
        }
        match act {
            VmAct::Status => unreachable!("answered above"),
            VmAct::Kill => drop(self.inside().running.remove(name)),
            VmAct::Stop { .. } => self.stop(name, act.patience(), off)?,
            VmAct::Pause => now.paused = true,
            VmAct::Resume => now.paused = false,
            VmAct::AddVolume(volume) if now.volumes.contains(&volume.volume) => {}
            VmAct::AddVolume(volume) => {
                assert!(socket.is_some_and(Path::exists));
                now.volumes.push(volume.volume.clone());
            }
            VmAct::RemoveVolume { volume, .. } => {
                if now.volumes.contains(volume) && !self.guest(act.patience(), off)? {
                    return Err("the guest is stubborn".into());
                }
                now.volumes.retain(|has| has != volume);
            }
        }
        if let Some(running) = self.inside().running.get_mut(name) {
            *running = now;
        }
        match self.inside().lies {
            true => Err("the answer got lost".into()),
            false => Ok(Value::Null),
        }
    }

    fn vmms(&self) -> Value {
        json!([{ "vmm": "shelf" }, { "vmm": "other" }, { "vmm": "broken", "error": "it is broken" }])
    }

    fn running(&self) -> Result<Vec<String>, String> {
        Ok(self.inside().running.keys().cloned().collect())
    }
}
