//! From a disk's name to a disk: first for sequential access (formatting, checking, recovery), then for the reactor.

use std::io;
use std::path::PathBuf;

use super::file::{DiskFile, FileBlocks, OpenError};
use super::memory_disk::MemoryDisk;
use super::null::NullDisk;
use super::spec::Backend;
use super::uring::UringDisk;
use super::{BlockIo, Disk, DiskInfo};

/// An open disk that no reactor drives yet. Its lock is held through to the end of the [`Disk`] made from it.
#[derive(Debug)]
pub enum OpenDisk {
    /// A file or block device.
    File(FileBlocks),
    /// Memory, fresh and all zeros.
    Memory(MemoryDisk),
    /// Keeps nothing.
    Null(NullDisk),
}

impl OpenDisk {
    /// Opens what `backend` names; for memory, makes it.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(backend: &Backend) -> Result<Self, OpenError> {
        let system = |name: String, doing| {
            move |source| OpenError::System {
                path: PathBuf::from(name),
                doing,
                source,
            }
        };
        match backend {
            Backend::Path(path) => FileBlocks::new(DiskFile::open(path)?)
                .map(OpenDisk::File)
                .map_err(system(
                    path.display().to_string(),
                    "taking memory for its buffers",
                )),
            &Backend::Memory(bytes) => MemoryDisk::new(bytes)
                .map(OpenDisk::Memory)
                .map_err(system(format!("mem:{bytes}"), "taking its memory")),
            &Backend::Null(bytes) => Ok(OpenDisk::Null(NullDisk::new(bytes))),
        }
    }

    /// What it is.
    pub fn info(&self) -> &DiskInfo {
        match self {
            OpenDisk::File(file) => file.disk().info(),
            OpenDisk::Memory(memory) => Disk::info(memory),
            OpenDisk::Null(null) => null.info(),
        }
    }

    /// Sequential access; `None` for a disk that keeps nothing.
    pub fn blocks(&mut self) -> Option<&mut dyn BlockIo> {
        match self {
            OpenDisk::File(file) => Some(file),
            OpenDisk::Memory(memory) => Some(memory),
            OpenDisk::Null(_) => None,
        }
    }

    /// The disk for a reactor. `iopoll`: poll the device for completions if it can do that.
    ///
    /// # Errors
    /// When there is no memory for its buffers.
    pub fn into_disk(self, iopoll: bool) -> io::Result<Box<dyn Disk>> {
        Ok(match self {
            OpenDisk::File(file) => Box::new(UringDisk::new(file.into_disk(), iopoll)?),
            OpenDisk::Memory(memory) => Box::new(memory),
            OpenDisk::Null(null) => Box::new(null),
        })
    }
}
