//! Disks of a node: formatting, checking, opening, and what is remembered of each.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use unibody_dataplane::disk::faulty::{self, FaultHandle, FaultyDisk, Kinds, Rule};
use unibody_dataplane::disk::file::OpenError as FileError;
use unibody_dataplane::disk::open::OpenDisk;
use unibody_dataplane::disk::spec::{Backend, DiskSpec};
use unibody_dataplane::disk::{Disk, DiskKind, IoError};
use unibody_dataplane::ids::{BootId, DiskUuid, PowerId};
use unibody_dataplane::plane::{DiskIndex, DiskService, DiskUp};
use unibody_dataplane::replica::ChunkRef;
use unibody_dataplane::store::{
    CheckReport, FormatError, FormatOptions, OpenError as StoreError, OpenOptions as StoreOptions,
    OpenReport, Store, check,
};

use crate::admin::Fault;

/// First pause before a disk that failed by itself is tried again; each later one is twice as long.
const RETRY_FIRST: Duration = Duration::from_secs(5);
/// Attempts before it is left to the operator.
const RETRIES_MAX: u32 = 6;
/// Reads that return flipped bits after `disk fault rot`.
const ROTTEN_READS: u64 = 50;

/// Why a disk can not be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The device or file.
    #[error(transparent)]
    Open(#[from] FileError),
    /// What is on it.
    #[error("{name} can not be used")]
    Store {
        /// The disk.
        name: String,
        /// Why not.
        source: StoreError,
    },
    /// Formatting.
    #[error("formatting {name} failed")]
    Format {
        /// The disk.
        name: String,
        /// Why.
        source: FormatError,
    },
    /// The system.
    #[error("{doing} {name} failed")]
    System {
        /// What was being done.
        doing: &'static str,
        /// To which disk.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// A disk of this kind keeps no format.
    #[error("{0} is not a file or block device")]
    NotAFile(String),
}

/// A number that nobody else has.
pub(crate) fn random() -> u128 {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .expect("the system has /dev/urandom");
    u128::from_le_bytes(bytes)
}

/// The span of power this machine is in: a disk that has the same one recorded has lost nothing since.
fn host_power() -> PowerId {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    // Without it every opening counts as a loss of power: slower, never wrong.
    u128::from_str_radix(&digits, 16).map_or_else(|_| PowerId(random()), PowerId)
}

/// Formats a file or block device; with `size` the file is made, or grown to it.
///
/// # Errors
/// When it is in use, holds something and `force` is not given, or can not be written.
pub fn format_disk(
    path: &Path,
    size: Option<u64>,
    journal: Option<u64>,
    force: bool,
) -> Result<DiskUuid, DiskError> {
    let name = path.display().to_string();
    if let Some(size) = size {
        let system = |source| DiskError::System {
            doing: "making",
            name: name.clone(),
            source,
        };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(system)?;
        let meta = file.metadata().map_err(system)?;
        if meta.file_type().is_file() && meta.len() < size {
            file.set_len(size).map_err(system)?;
        }
    }
    let mut disk = OpenDisk::open(&Backend::Path(path.to_path_buf()))?;
    let uuid = DiskUuid(random());
    let options = FormatOptions {
        uuid,
        journal_bytes: journal,
        force,
        already_zero: false,
    };
    let blocks = disk.blocks().ok_or_else(|| DiskError::NotAFile(name.clone()))?;
    Store::format(blocks, &options).map_err(|source| DiskError::Format { name, source })?;
    Ok(uuid)
}

/// Verifies a whole disk that no node is using.
///
/// # Errors
/// When it can not be opened.
pub fn check_disk(path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<CheckReport, DiskError> {
    let mut disk = OpenDisk::open(&Backend::Path(path.to_path_buf()))?;
    let blocks = disk
        .blocks()
        .ok_or_else(|| DiskError::NotAFile(path.display().to_string()))?;
    Ok(check(blocks, progress))
}

/// For each disk what distinguishes its spans of power beside the machine's.
pub(crate) type Salts = BTreeMap<DiskUuid, u128>;

/// A disk ready for its reactor.
pub(crate) struct Opened {
    pub(crate) uuid: DiskUuid,
    pub(crate) boot: BootId,
    pub(crate) power: PowerId,
    pub(crate) bytes: u64,
    pub(crate) kind: DiskKind,
    pub(crate) inline: bool,
    pub(crate) service: DiskService,
    pub(crate) faults: Option<FaultHandle>,
    pub(crate) notices: Vec<String>,
    /// Replicas found on it.
    pub(crate) chunks: Vec<ChunkRef>,
}

impl Opened {
    pub(crate) fn up(&self, index: DiskIndex) -> DiskUp {
        DiskUp {
            index,
            uuid: self.uuid,
            boot: self.boot,
            power: self.power,
            inline: self.inline,
            null: self.kind == DiskKind::Null,
        }
    }
}

/// Opens a disk: takes its lock, recovers its store. May take seconds; call it where nobody waits.
pub(crate) fn open(
    name: &str,
    spec: &DiskSpec,
    cache_bytes: usize,
    faults: bool,
    salts: &Salts,
) -> Result<Opened, DiskError> {
    let mut disk = OpenDisk::open(&spec.backend)?;
    let info = disk.info().clone();
    let boot = BootId(random());
    if info.kind == DiskKind::Null {
        let (uuid, power) = (DiskUuid(random()), PowerId(random()));
        let (bytes, kind) = (info.bytes, info.kind);
        let service = DiskService::Null;
        return Ok(Opened {
            uuid,
            boot,
            power,
            bytes,
            kind,
            inline: true,
            service,
            faults: None,
            notices: Vec::new(),
            chunks: Vec::new(),
        });
    }
    let memory = info.kind == DiskKind::Memory;
    let blocks = disk
        .blocks()
        .ok_or_else(|| DiskError::NotAFile(name.to_owned()))?;
    if memory {
        let options = FormatOptions {
            uuid: DiskUuid(random()),
            journal_bytes: None,
            force: true,
            already_zero: true,
        };
        Store::format(blocks, &options).map_err(|source| DiskError::Format {
            name: name.to_owned(),
            source,
        })?;
    }
    let salt = Store::identify(blocks)
        .and_then(|uuid| salts.get(&uuid))
        .copied()
        .unwrap_or(0);
    let power = if memory {
        PowerId(random())
    } else {
        PowerId(host_power().0 ^ salt)
    };
    let options = StoreOptions {
        boot,
        power,
        cache_bytes,
    };
    let (store, report): (Store, OpenReport) =
        Store::open(blocks, &options).map_err(|source| DiskError::Store {
            name: name.to_owned(),
            source,
        })?;
    let device = disk.into_disk(true).map_err(|source| DiskError::System {
        doing: "taking memory for",
        name: name.to_owned(),
        source,
    })?;
    let (device, handle): (Box<dyn Disk>, _) = if faults {
        let (device, handle) = FaultyDisk::new(device);
        (Box::new(device), Some(handle))
    } else {
        (device, None)
    };
    let notices = report
        .damage
        .iter()
        .map(|damage| format!("{name}: {damage}"))
        .collect();
    Ok(Opened {
        chunks: store.chunks().collect(),
        uuid: store.uuid(),
        boot,
        power,
        bytes: store.stats().capacity_bytes,
        kind: info.kind,
        inline: memory && !faults,
        service: DiskService::Store(Box::new(store), device),
        faults: handle,
        notices,
    })
}

/// What the fault injector is to do; nothing for no fault.
pub(crate) fn fault_rule(fault: &Fault) -> Option<Rule> {
    let media = faulty::Fault::Fail(IoError::Media);
    Some(match fault {
        Fault::None => return None,
        Fault::ReadErrors => Rule::always(Kinds::READS, media),
        Fault::WriteErrors => Rule::always(Kinds::WRITES, media),
        Fault::FlushErrors => Rule::always(Kinds::FLUSHES, media),
        Fault::Rot => Rule {
            times: ROTTEN_READS,
            ..Rule::always(Kinds::READS, faulty::Fault::Rot)
        },
        Fault::Delay(ms) => Rule::always(Kinds::ALL, faulty::Fault::Delay(Duration::from_millis(*ms))),
        Fault::Stuck => Rule::always(Kinds::ALL, faulty::Fault::Stuck),
    })
}

/// What a disk is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// In service.
    Online,
    /// Told to leave service; its last I/O has not ended.
    Leaving,
    /// Out of service, and why.
    Failed(String),
    /// Being opened.
    Opening,
}

/// A disk of this node.
pub(crate) struct NodeDisk {
    pub(crate) name: String,
    pub(crate) spec: DiskSpec,
    pub(crate) index: DiskIndex,
    pub(crate) phase: Phase,
    pub(crate) uuid: Option<DiskUuid>,
    pub(crate) kind: DiskKind,
    pub(crate) up: Option<DiskUp>,
    pub(crate) faults: Option<FaultHandle>,
    /// Taken out by hand: it is not tried again by itself.
    pub(crate) by_hand: bool,
    /// It failed by itself and that could not be recorded yet.
    pub(crate) distrust: bool,
    /// Replicas found on it when it was opened, until it is known which have a place there.
    pub(crate) found: Vec<ChunkRef>,
    /// Times it failed, by itself or by hand.
    pub(crate) failures: u64,
    retries: u32,
    retry_at: Option<Instant>,
}

impl NodeDisk {
    pub(crate) fn new(index: DiskIndex, spec: DiskSpec) -> Self {
        let name = match &spec.backend {
            Backend::Path(path) => path.display().to_string(),
            Backend::Memory(_) => format!("mem{}", index.0),
            Backend::Null(_) => format!("null{}", index.0),
        };
        NodeDisk {
            name,
            spec,
            index,
            phase: Phase::Opening,
            uuid: None,
            kind: DiskKind::File,
            up: None,
            faults: None,
            by_hand: false,
            distrust: false,
            found: Vec::new(),
            failures: 0,
            retries: 0,
            retry_at: None,
        }
    }

    /// Failure domain: as named, or the disk's own.
    pub(crate) fn domain(&self) -> String {
        self.spec.domain.clone().unwrap_or_else(|| self.name.clone())
    }

    /// It keeps its data when the process ends.
    pub(crate) fn keeps_data(&self) -> bool {
        matches!(self.kind, DiskKind::File | DiskKind::BlockDevice)
    }

    pub(crate) fn failed(&mut self, reason: String, now: Instant) {
        self.phase = Phase::Failed(reason);
        self.up = None;
        self.failures += 1;
        let again = !self.by_hand && self.keeps_data() && self.retries < RETRIES_MAX;
        self.retry_at = again.then(|| now + RETRY_FIRST * (1 << self.retries));
        self.retries += 1;
    }

    /// It failed by itself, and it is time to try it again.
    pub(crate) fn due(&self, now: Instant) -> bool {
        matches!(self.phase, Phase::Failed(_)) && self.retry_at.is_some_and(|at| now >= at)
    }
}

/// Path of a disk file, for messages.
pub(crate) fn is_path(spec: &DiskSpec) -> Option<&PathBuf> {
    match &spec.backend {
        Backend::Path(path) => Some(path),
        _ => None,
    }
}
