//! The control state of one node, kept in a directory: what a Raft log will keep for a cluster.
//!
//! The whole state is one JSON file, replaced atomically (written beside, flushed, renamed, directory flushed) before a
//! change is published, with a format version and a blake3 checksum. The directory is locked while a node runs.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use crate::durable;
use crate::envelope::{self, Unreadable};
use crate::state::{Applied, Command, FORMAT, Refused, State};

const FILE: &str = "state.json";
const MAGIC: &str = "unibody state";

/// Why the state can not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The system said no.
    #[error("{doing} {path} failed")]
    System {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another node runs on it.
    #[error("{0} is in use by a running node: stop that one, or give this one a --state of its own")]
    InUse(PathBuf),
    /// Not one of our files.
    #[error("{path} is not a state file of Unibody: {why}. Nothing was changed; move it away to start anew")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// From the future.
    #[error("{path} has format {found}, this program knows {FORMAT}: use the newer program")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// Bits have changed.
    #[error("{path} is damaged: {why}. Nothing was changed; restore it from a backup")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// Why a change did not happen.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// A rule forbids it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// It could not be made durable; the state is as it was.
    #[error("the node's state could not be written to {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// See the module.
#[derive(Debug)]
pub struct LocalState {
    state: State,
    home: Option<(PathBuf, File)>,
}

impl LocalState {
    /// A state that is forgotten with the process: for disks that keep nothing.
    pub fn in_memory() -> Self {
        LocalState {
            state: State::default(),
            home: None,
        }
    }

    /// Opens the state in `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// When it is in use, foreign, newer or damaged, or the system refuses.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let system = |doing, path: &Path| {
            let path = path.to_path_buf();
            move |source| OpenError::System { doing, path, source }
        };
        durable::make_directory(dir).map_err(system("making the directory", dir))?;
        let lock_path = dir.join("lock");
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(system("opening", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(OpenError::InUse(dir.to_path_buf())),
            Err(fs::TryLockError::Error(source)) => return Err(system("locking", &lock_path)(source)),
        }
        let path = dir.join(FILE);
        let state = match fs::read(&path) {
            Ok(bytes) => decode(&bytes).map_err(|error| refused(error, &path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => State::default(),
            Err(source) => return Err(system("reading", &path)(source)),
        };
        Ok(LocalState {
            state,
            home: Some((path, lock)),
        })
    }

    /// The state as it is now, durable.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Changes the state durably.
    ///
    /// # Errors
    /// When a rule forbids it or it can not be written; then nothing was changed.
    ///
    /// If the system can not say whether the change is durable, the process ends: whoever went on would act on a state that
    /// the next start may not find. That start reads what is there, as after a crash.
    pub fn execute(&mut self, command: &Command) -> Result<Applied, ExecuteError> {
        let mut next = self.state.clone();
        let applied = next.apply(command)?;
        if let Some((path, _)) = &self.home {
            durable::replace(path, &encode(&next)).map_err(|source| ExecuteError::Write {
                path: path.clone(),
                source,
            })?;
        }
        self.state = next;
        Ok(applied)
    }
}

fn encode(state: &State) -> Vec<u8> {
    envelope::seal(MAGIC, state)
}

fn decode(bytes: &[u8]) -> Result<State, Unreadable> {
    let mut state: State = envelope::open(MAGIC, bytes)?;
    state.upgrade();
    state.check().map_err(Unreadable::Damaged)?;
    Ok(state)
}

fn refused(unreadable: Unreadable, path: &Path) -> OpenError {
    let path = path.to_path_buf();
    match unreadable {
        Unreadable::Foreign { why, .. } => OpenError::Foreign { path, why },
        Unreadable::Newer(found) => OpenError::Newer { path, found },
        Unreadable::Damaged(why) => OpenError::Damaged { path, why },
    }
}

/// A state file's bytes, for fuzzing: as they are, and as a state in an intact envelope. Never panics unless a state that
/// can be read does not survive being written.
pub fn fuzz_state(bytes: &[u8]) {
    let sealed = std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| serde_json::value::RawValue::from_string(text.to_owned()).ok())
        .map(|state| envelope::seal_raw(MAGIC, &state));
    for bytes in std::iter::once(bytes).chain(sealed.as_deref()) {
        if let Ok(state) = decode(bytes) {
            assert!(
                decode(&encode(&state)).is_ok_and(|again| again == state),
                "a state that can be read can be written"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::NodeId;
    use unibody_dataplane::ids::DiskUuid;

    fn add_disk(n: u128) -> Command {
        Command::AddDisk {
            disk: DiskUuid(n),
            node: NodeId::LOCAL,
            domain: format!("d{n}"),
            bytes: 1 << 30,
        }
    }

    #[test]
    fn what_was_executed_is_there_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let mut local = LocalState::open(dir.path()).unwrap();
        local.execute(&add_disk(1)).unwrap();
        local.execute(&add_disk(2)).unwrap();
        let before = local.state().clone();
        drop(local);
        assert_eq!(LocalState::open(dir.path()).unwrap().state(), &before);
    }

    #[test]
    fn two_nodes_can_not_share_a_state() {
        let dir = tempfile::tempdir().unwrap();
        let _first = LocalState::open(dir.path()).unwrap();
        assert!(matches!(LocalState::open(dir.path()), Err(OpenError::InUse(_))));
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let mut state = State::default();
        state.apply(&add_disk(7)).unwrap();
        let bytes = encode(&state);
        assert_eq!(decode(&bytes).ok(), Some(state.clone()));
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            // White space and the case of hexadecimal digits do not matter; anything else must be refused.
            if let Ok(read) = decode(&changed) {
                assert_eq!(read, state, "byte {at} changed the state unnoticed");
            }
        }
        for len in 0..bytes.len() - 1 {
            assert!(
                decode(&bytes[..len]).is_err(),
                "a file cut to {len} bytes was taken"
            );
        }
    }

    #[test]
    fn a_newer_format_is_refused_as_such() {
        let text = String::from_utf8(encode(&State::default())).unwrap();
        let newer = text.replacen("\"format\":4", "\"format\":5", 1);
        assert!(matches!(decode(newer.as_bytes()), Err(Unreadable::Newer(5))));
    }

    #[test]
    fn the_files_of_every_format_are_read_and_the_present_one_is_as_it_was() {
        let mut state = State::default();
        state.apply(&add_disk(0xabc)).unwrap();
        let instance = 5;
        let chunks = vec![vec![DiskUuid(0xabc)]];
        let create = Command::CreateVolume {
            name: "v".into(),
            size: 1 << 20,
            mirror: 1,
            stripe_unit: 1 << 18,
            stripe_width: 1,
            read_only: false,
            instance,
            chunks,
        };
        state.apply(&create).unwrap();
        let golden = include_str!("../golden/state-4.json");
        assert_eq!(
            String::from_utf8(encode(&state)).unwrap(),
            golden,
            "the format changed: raise FORMAT and keep reading the old one"
        );
        assert_eq!(decode(golden.as_bytes()).ok(), Some(state.clone()));
        for before in [
            include_str!("../golden/state-1.json"),
            include_str!("../golden/state-2.json"),
            include_str!("../golden/state-3.json"),
        ] {
            assert_eq!(decode(before.as_bytes()).ok(), Some(state.clone()));
        }
    }
}
