//! A file or block device as a disk: opening it exclusively, learning what it can, and plain sequential access.
//!
//! Invariant: a [`DiskFile`] holds the only lock on its file (and on a block device the kernel's exclusive claim, so that
//! neither a mount nor another Unibody has it). It is opened past the page cache where the file system allows that.
//!
//! Deliberately absent: the hot path, see [`uring`](super::uring).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{BlockIo, DiskInfo, DiskKind, IoError};
use crate::ids::BLOCK;
use crate::memory::Arena;

/// Why a disk could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not there.
    #[error("{0}: no such file or device; to make a new disk there, run `unibody disk format` with a size")]
    NotFound(PathBuf),
    /// To be made, but there already.
    #[error("{0}: exists already; nothing was changed")]
    Exists(PathBuf),
    /// Somebody has it.
    #[error("{0}: in use by another process, or mounted; stop that first")]
    InUse(PathBuf),
    /// A directory, pipe or character device.
    #[error("{0}: neither a regular file nor a block device")]
    Kind(PathBuf),
    /// Not one block.
    #[error("{path}: {bytes} bytes are too small for a disk")]
    TooSmall {
        /// Which.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Sectors larger than a block.
    #[error("{path}: its sectors of {sector} bytes are larger than the 4096 that Unibody writes at least")]
    Sector {
        /// Which.
        path: PathBuf,
        /// Its logical block size.
        sector: u64,
    },
    /// Anything else.
    #[error("{path}: {doing} failed")]
    System {
        /// Which.
        path: PathBuf,
        /// What was tried.
        doing: &'static str,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// An open disk file.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    info: DiskInfo,
}

const BLKGETSIZE64: libc::Ioctl = 0x8008_1272u32 as libc::Ioctl;
const BLKSSZGET: libc::Ioctl = 0x1268;
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// How often and how long a disk that seems in use is tried again: 1 s together.
const GHOST_TRIES: u32 = 50;
const GHOST_PAUSE: Duration = Duration::from_millis(20);

impl Drop for DiskFile {
    fn drop(&mut self) {
        // A ring that is being torn down may hold the file open for a while; the lock ends here.
        // SAFETY: no pointer is passed.
        unsafe { libc::flock(self.file.as_raw_fd(), libc::LOCK_UN) };
    }
}

impl DiskFile {
    /// Opens what is there. One that is in use is waited for, a second at most.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let meta = std::fs::metadata(path).map_err(|e| system(path, "looking at it", e))?;
        let kind = if meta.file_type().is_block_device() {
            DiskKind::BlockDevice
        } else if meta.is_file() {
            DiskKind::File
        } else {
            return Err(OpenError::Kind(path.to_owned()));
        };
        // The kernel lets go of the files of a ring only some time after its process has died: a node that is started
        // again at once must not take its predecessor's ghost for another owner.
        let mut patience = GHOST_TRIES;
        loop {
            match Self::claim(path, kind) {
                Err(OpenError::InUse(_)) if patience > 0 => patience -= 1,
                claimed => return claimed,
            }
            std::thread::sleep(GHOST_PAUSE);
        }
    }

    fn claim(path: &Path, kind: DiskKind) -> Result<Self, OpenError> {
        // On a block device O_EXCL without O_CREAT is the kernel's exclusive claim.
        let exclusive = if kind == DiskKind::BlockDevice {
            libc::O_EXCL
        } else {
            0
        };
        let (file, direct) = match open(path, exclusive | libc::O_DIRECT) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => (
                open(path, exclusive).map_err(|e| system(path, "opening it", e))?,
                false,
            ),
            Err(e) => return Err(system(path, "opening it", e)),
            Ok(file) => (file, true),
        };
        Self::from_open(path, file, kind, direct)
    }

    /// Makes a new sparse file of `bytes`, which must not exist yet.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn create(path: &Path, bytes: u64) -> Result<Self, OpenError> {
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| system(path, "making it", e))?;
        let opened = file
            .set_len(bytes)
            .map_err(|e| system(path, "setting its size", e))
            .and_then(|()| Self::open(path));
        if opened.is_err() {
            // It was made by this call and holds nothing; should this fail as well, an empty file stays behind.
            let _ = std::fs::remove_file(path);
        }
        opened
    }

    fn from_open(path: &Path, file: File, kind: DiskKind, mut direct: bool) -> Result<Self, OpenError> {
        // SAFETY: no pointer is passed.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            return Err(system(path, "locking it", io::Error::last_os_error()));
        }
        let bytes = match kind {
            DiskKind::BlockDevice => device_size(&file),
            _ => file.metadata().map(|meta| meta.len()),
        }
        .map_err(|e| system(path, "asking for its size", e))?;
        if bytes < BLOCK as u64 {
            return Err(OpenError::TooSmall {
                path: path.to_owned(),
                bytes,
            });
        }
        let mut memory_align = 1;
        if direct {
            let (memory, offset) = direct_alignment(&file, kind);
            if offset > BLOCK as u64 && kind == DiskKind::BlockDevice {
                return Err(OpenError::Sector {
                    path: path.to_owned(),
                    sector: offset,
                });
            }
            if offset == 0 || offset > BLOCK as u64 || memory > BLOCK as u64 {
                // Accepted, but not carried out past the page cache (tmpfs), or not in our units.
                direct = false;
                // SAFETY: no pointer is passed; clears O_DIRECT of our own open file.
                if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, 0) } != 0 {
                    return Err(system(
                        path,
                        "switching direct I/O off",
                        io::Error::last_os_error(),
                    ));
                }
            } else {
                memory_align = memory.max(1) as u32;
            }
        }
        let volatile_cache = match kind {
            DiskKind::BlockDevice => device_cache(&file),
            _ => !on_tmpfs(&file),
        };
        let info = DiskInfo {
            kind,
            path: Some(path.to_owned()),
            bytes: bytes / BLOCK as u64 * BLOCK as u64,
            memory_align,
            volatile_cache,
            direct,
            iopoll: false,
        };
        Ok(DiskFile { file, info })
    }

    /// What it is.
    pub fn info(&self) -> &DiskInfo {
        &self.info
    }

    /// Its descriptor.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn open(path: &Path, flags: i32) -> io::Result<File> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
}

fn system(path: &Path, doing: &'static str, source: io::Error) -> OpenError {
    let path = path.to_owned();
    match source.raw_os_error() {
        Some(libc::ENOENT) => OpenError::NotFound(path),
        Some(libc::EEXIST) => OpenError::Exists(path),
        Some(libc::EBUSY | libc::EWOULDBLOCK | libc::ETXTBSY) => OpenError::InUse(path),
        _ => OpenError::System { path, doing, source },
    }
}

fn device_size(file: &File) -> io::Result<u64> {
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes a u64.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) } {
        0 => Ok(bytes),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Alignment of memory and of offsets for direct I/O; an offset alignment of zero: not supported.
fn direct_alignment(file: &File, kind: DiskKind) -> (u64, u64) {
    // SAFETY: all zeros is a valid `statx`.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let empty = c"";
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor; the buffer is writable.
    let told = unsafe {
        libc::statx(
            file.as_raw_fd(),
            empty.as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    } == 0
        && stat.stx_mask & libc::STATX_DIOALIGN != 0;
    if told {
        return (
            u64::from(stat.stx_dio_mem_align),
            u64::from(stat.stx_dio_offset_align),
        );
    }
    if on_tmpfs(file) {
        return (0, 0);
    }
    if kind == DiskKind::BlockDevice {
        let mut sector = 0i32;
        // SAFETY: BLKSSZGET writes an int.
        if unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut sector) } == 0 && sector > 0 {
            return (sector as u64, sector as u64);
        }
    }
    // An older kernel does not tell. Pages are always right where direct I/O works at all.
    (BLOCK as u64, BLOCK as u64)
}

fn on_tmpfs(file: &File) -> bool {
    // SAFETY: all zeros is a valid `statfs`.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the buffer is writable.
    let told = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut stat) } == 0;
    told && stat.f_type as i64 == TMPFS_MAGIC
}

/// Whether a device has a volatile write cache. What can not be found out counts as yes.
fn device_cache(file: &File) -> bool {
    let Ok(meta) = file.metadata() else { return true };
    let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
    let dir = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    // A partition has no queue of its own.
    ["queue/write_cache", "../queue/write_cache"]
        .iter()
        .find_map(|name| std::fs::read_to_string(dir.join(name)).ok())
        .is_none_or(|cache| cache.trim() != "write through")
}

/// What an errno of a disk means to a store.
pub(crate) fn io_error(errno: i32) -> IoError {
    match errno {
        libc::ENOSPC | libc::EDQUOT => IoError::NoSpace,
        libc::ENODEV | libc::ENXIO | libc::EBADF | libc::ESHUTDOWN | libc::ENOTCONN => IoError::Gone,
        _ => IoError::Media,
    }
}

fn from_system(error: &io::Error) -> IoError {
    error.raw_os_error().map_or(IoError::Media, io_error)
}

/// Bytes copied at a time, pages.
const ASIDE_PAGES: usize = 256;

/// [`BlockIo`] on a file or block device. Whatever is read or written goes through an aligned buffer of its own.
#[derive(Debug)]
pub struct FileBlocks {
    disk: DiskFile,
    aside: Arena,
}

impl FileBlocks {
    /// Sequential access to `disk`.
    ///
    /// # Errors
    /// When there is no memory for the buffer.
    pub fn new(disk: DiskFile) -> io::Result<Self> {
        Ok(FileBlocks {
            disk,
            aside: Arena::new(ASIDE_PAGES)?,
        })
    }

    /// The disk.
    pub fn disk(&self) -> &DiskFile {
        &self.disk
    }

    /// The disk, for the reactor.
    pub fn into_disk(self) -> DiskFile {
        self.disk
    }

    fn check(&self, offset: u64, len: u64) {
        let (block, bytes) = (BLOCK as u64, self.disk.info.bytes);
        assert!(
            offset.is_multiple_of(block)
                && len.is_multiple_of(block)
                && offset <= bytes
                && len <= bytes - offset,
            "{len} bytes at {offset}: not whole blocks of a disk of {bytes} bytes"
        );
    }

    fn fallocate(&self, mode: i32, offset: u64, len: u64) -> bool {
        // SAFETY: no pointer is passed.
        unsafe { libc::fallocate(self.disk.fd(), mode, offset as i64, len as i64) == 0 }
    }
}

impl BlockIo for FileBlocks {
    fn size(&self) -> u64 {
        self.disk.info.bytes
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        self.check(offset, buf.len() as u64);
        for (i, piece) in buf.chunks_mut(ASIDE_PAGES * BLOCK).enumerate() {
            let aside = self.aside.bytes_mut(0, piece.len() / BLOCK);
            let at = offset + (i * ASIDE_PAGES * BLOCK) as u64;
            self.disk
                .file
                .read_exact_at(aside, at)
                .map_err(|e| from_system(&e))?;
            piece.copy_from_slice(aside);
        }
        Ok(())
    }

    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), IoError> {
        self.check(offset, buf.len() as u64);
        for (i, piece) in buf.chunks(ASIDE_PAGES * BLOCK).enumerate() {
            let aside = self.aside.bytes_mut(0, piece.len() / BLOCK);
            aside.copy_from_slice(piece);
            let at = offset + (i * ASIDE_PAGES * BLOCK) as u64;
            self.disk
                .file
                .write_all_at(aside, at)
                .map_err(|e| from_system(&e))?;
        }
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), IoError> {
        self.check(offset, len);
        if len == 0 || self.known_zero(offset, len) {
            return Ok(());
        }
        if ZERO_MODES.iter().any(|&mode| self.fallocate(mode, offset, len)) {
            return Ok(());
        }
        let mut at = 0;
        while at < len {
            let n = (len - at).min((ASIDE_PAGES * BLOCK) as u64);
            let zeros = self.aside.bytes_mut(0, n as usize / BLOCK);
            zeros.fill(0);
            self.disk
                .file
                .write_all_at(zeros, offset + at)
                .map_err(|e| from_system(&e))?;
            at += n;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), IoError> {
        self.disk.file.sync_data().map_err(|e| from_system(&e))
    }

    fn known_zero(&mut self, offset: u64, len: u64) -> bool {
        if self.disk.info.kind != DiskKind::File {
            return false;
        }
        // SAFETY: no pointer is passed; our own descriptor's position is used for nothing else.
        let data = unsafe { libc::lseek(self.disk.fd(), offset as i64, libc::SEEK_DATA) };
        match data {
            // ENXIO: no data from here to the end of the file.
            -1 => io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO),
            at => at as u64 >= offset + len,
        }
    }
}

/// Ways to make a range read as zeros without writing them, best first: giving the space back, then keeping it.
pub(crate) const ZERO_MODES: [i32; 2] = [
    libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
    libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
];
