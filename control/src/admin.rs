//! What an operator's program says to a running node: one JSON object a line over the node's control socket.
//!
//! The socket is mode 0600, so whoever can open it is the user who runs the node. Each line is answered by one line:
//! `{"ok": ...}` or `{"error": "..."}`. Lines are bounded; a client that sends more is cut off.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Longest line either side accepts, bytes.
pub const LINE_MAX: u64 = 64 << 20;

/// What a volume is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeSpec {
    /// Its name: letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// Bytes; absent for a volume that exists already.
    #[serde(default)]
    pub size: Option<u64>,
    /// Copies of each chunk, 1 to 3.
    #[serde(default)]
    pub mirror: Option<u32>,
    /// Chunks a row of stripe units is spread over.
    #[serde(default)]
    pub stripe_width: Option<u32>,
    /// Stripe unit, bytes.
    #[serde(default)]
    pub stripe_unit: Option<u64>,
    /// Where to serve it; absent: not served.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// Request queues offered to the guest.
    #[serde(default)]
    pub queues: Option<u16>,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
}

/// A fault to switch on in front of a disk (for drills and tests).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Fault {
    /// No fault.
    None,
    /// Reads fail.
    ReadErrors,
    /// Writes fail.
    WriteErrors,
    /// Flushes fail.
    FlushErrors,
    /// The next fifty reads return flipped bits.
    Rot,
    /// Every I/O takes so much longer, milliseconds.
    Delay(u64),
    /// Nothing is answered.
    Stuck,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Everything there is to know: [`NodeStatus`].
    Status,
    /// Create a volume, and serve it if a socket is given.
    VolumeCreate(VolumeSpec),
    /// Grow a volume.
    VolumeResize {
        /// The volume.
        name: String,
        /// New size, bytes.
        size: u64,
    },
    /// Delete a volume and everything in it.
    VolumeDelete {
        /// The volume.
        name: String,
    },
    /// Give a node another disk.
    DiskAdd {
        /// As after `--disk`.
        spec: String,
    },
    /// Take a disk out of service at once, as if it had died.
    DiskFail {
        /// Its name.
        disk: String,
    },
    /// Put a failed disk back: it gets exactly what it missed.
    DiskReturn {
        /// Its name.
        disk: String,
    },
    /// Give a failed disk's place to another disk of the node.
    DiskReplace {
        /// The failed disk's name.
        disk: String,
        /// The new one, as after `--disk`.
        spec: String,
    },
    /// Switch a fault on or off in front of a disk.
    DiskFault {
        /// Its name.
        disk: String,
        /// The fault.
        fault: Fault,
    },
}

/// State of a disk for people and scripts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct DiskStatus {
    /// Name: the path, or `mem0`, `null0`, ...
    pub name: String,
    /// Identity, hexadecimal.
    pub uuid: String,
    /// Failure domain.
    pub domain: String,
    /// `online`, `failed` or `missing`.
    pub state: String,
    /// Why it failed.
    #[serde(default)]
    pub reason: Option<String>,
    /// Back end: `memory`, `null`, `file`, `block`.
    pub kind: String,
    /// Bytes for data.
    pub capacity: u64,
    /// Of these, unused.
    pub free: u64,
    /// Damage was found when it was opened.
    pub suspect: bool,
    /// Regions (1 MiB) dirty now.
    pub dirty_regions: u64,
    /// Regions in doubt.
    pub in_doubt_regions: u64,
    /// Further counters by name.
    pub counters: std::collections::BTreeMap<String, u64>,
}

/// State of a volume for people and scripts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VolumeStatus {
    /// Name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Copies.
    pub mirror: u32,
    /// Stripe unit, bytes.
    pub stripe_unit: u64,
    /// Stripe width, chunks.
    pub stripe_width: u32,
    /// Where it is served.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub socket: Option<PathBuf>,
    /// `healthy`, `degraded`, `healing`, `moving` (all copies are there, some get another disk), `unavailable` or `offline`.
    pub state: String,
    /// Replicas placed: while some are moved more than wanted.
    pub replicas: u64,
    /// Of these, in sync.
    pub in_sync: u64,
    /// Of these, being rebuilt.
    pub rebuilding: u64,
    /// Of these, stale.
    pub stale: u64,
    /// Regions (1 MiB) still to be compared or copied.
    pub regions_to_heal: u64,
    /// Seconds until that is done, at the pace of the last half minute; absent while there is none.
    #[serde(default)]
    pub heal_seconds: Option<u64>,
    /// Further counters by name.
    pub counters: std::collections::BTreeMap<String, u64>,
}

/// State of a reactor for people and scripts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReactorStatus {
    /// The core it is pinned to.
    pub core: usize,
    /// Counters by name.
    pub counters: std::collections::BTreeMap<String, u64>,
}

/// State of a node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NodeStatus {
    /// Its disks.
    pub disks: Vec<DiskStatus>,
    /// Its volumes.
    pub volumes: Vec<VolumeStatus>,
    /// Its reactors.
    pub reactors: Vec<ReactorStatus>,
    /// VMs of the cluster that run on it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vms: Vec<String>,
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// Done; what was asked for, or null.
    Ok(serde_json::Value),
    /// Not done, and why.
    Error(String),
}

/// Why a call to a node failed.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens there.
    #[error("no node answers at {path}: start one with `unibody serve`, or name its socket with --control")]
    NoNode {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("the node at {path} did not answer: look at its output, and at `status` to see what was done")]
    Lost {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The answer makes no sense.
    #[error(
        "the node at {path} answered something else than this program understands: are both of one version?"
    )]
    Garbled {
        /// The socket.
        path: PathBuf,
        /// Where it broke.
        source: serde_json::Error,
    },
    /// The node said no.
    #[error("{0}")]
    Refused(String),
}

/// Sends one request to the node at `socket` and waits up to ten minutes for its answer.
///
/// # Errors
/// When there is no node, it went away, or it refused.
pub fn call(socket: &Path, request: &Request) -> Result<serde_json::Value, CallError> {
    let path = socket.to_path_buf();
    let stream = UnixStream::connect(socket).map_err(|source| CallError::NoNode {
        path: path.clone(),
        source,
    })?;
    let lost = |source| CallError::Lost {
        path: path.clone(),
        source,
    };
    stream
        .set_read_timeout(Some(Duration::from_secs(600)))
        .map_err(lost)?;
    let mut line = serde_json::to_vec(request).expect("requests have string keys only");
    line.push(b'\n');
    (&stream).write_all(&line).map_err(lost)?;
    let mut answer = String::new();
    BufReader::new(stream.take(LINE_MAX))
        .read_line(&mut answer)
        .map_err(lost)?;
    if answer.is_empty() {
        return Err(lost(std::io::ErrorKind::UnexpectedEof.into()));
    }
    match serde_json::from_str(&answer).map_err(|source| CallError::Garbled { path, source })? {
        Response::Ok(value) => Ok(value),
        Response::Error(message) => Err(CallError::Refused(message)),
    }
}
