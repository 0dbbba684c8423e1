//! A front end's memory in our address space: mappings and the table that turns guest addresses into pointers.
//!
//! A table is immutable. A queue holds one by `Arc` for as long as it runs, so no address it handed out can be unmapped
//! before the queue has been stopped, and a queue is stopped only when nothing is in flight. The session makes a new
//! table for each change and swaps it between stopping and starting the queues.
//!
//! Guest memory never becomes a Rust reference: only pointers leave this module.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::sigbus::Guard;

/// Most memory regions of a device.
pub const REGIONS_MAX: usize = 64;

/// Why memory offered by a front end was refused.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Not memory: touching a page of another file may wait for whoever serves it, for ever.
    #[error("shared memory must be a file in memory: a memfd, or one on tmpfs or hugetlbfs")]
    NotMemory,
    /// Offset or length are nonsense.
    #[error("a region of {len} bytes at offset {offset} does not fit into its file of {size} bytes")]
    Range {
        /// Offset in the file, bytes.
        offset: u64,
        /// Length of the region, bytes.
        len: u64,
        /// Size of the file, bytes.
        size: u64,
    },
    /// The kernel refused.
    #[error("mapping shared memory failed")]
    Io(#[from] io::Error),
    /// It lies where another region lies.
    #[error("memory region at guest address {0:#x} overlaps another one")]
    Overlap(u64),
    /// Too many.
    #[error("more than {REGIONS_MAX} memory regions")]
    TooMany,
    /// It is not there.
    #[error("no memory region at guest address {0:#x}")]
    Unknown(u64),
}

/// Part of a file, mapped shared and guarded against truncation.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: *mut u8,
    map_len: usize,
    /// First byte asked for: the mapping itself begins at a page.
    start: *mut u8,
    len: usize,
    guard: Guard,
}

// SAFETY: the mapping is shared memory that other processes change anyway; it is only used through raw pointers and
// atomics, and unmapped when the last owner drops it.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes from `offset` of `file`.
    ///
    /// # Errors
    /// When the file is no regular file, too short, or can not be mapped for reading and writing.
    pub(crate) fn new(file: &File, offset: u64, len: u64) -> Result<Self, MapError> {
        let kind = file_system(file)?;
        if !matches!(kind, TMPFS_MAGIC | HUGETLBFS_MAGIC) {
            return Err(MapError::NotMemory);
        }
        let meta = file.metadata()?;
        if !meta.file_type().is_file() {
            return Err(MapError::NotMemory);
        }
        let range = MapError::Range {
            offset,
            len,
            size: meta.size(),
        };
        if len == 0
            || len > isize::MAX as u64 / 2
            || offset.checked_add(len).is_none_or(|end| end > meta.size())
        {
            return Err(range);
        }
        // hugetlbfs reports its page size here, and maps only whole pages of it.
        let page = match meta.blksize() {
            size if size.is_power_of_two() && (4096..=1 << 30).contains(&size) && kind == HUGETLBFS_MAGIC => {
                size
            }
            _ => 4096,
        };
        let from = offset / page * page;
        let map_len = (offset - from + len).next_multiple_of(page) as usize;
        // SAFETY: a new mapping at an address the kernel chooses aliases nothing of ours.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                map_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                from as libc::off_t,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        // SAFETY: our own mapping; a core dump of this process must not hold a guest's memory.
        unsafe { libc::madvise(base, map_len, libc::MADV_DONTDUMP) };
        let guard = Guard::new(base as usize, map_len, page as usize).inspect_err(|_| {
            // SAFETY: mapped above and not handed out.
            unsafe { libc::munmap(base, map_len) };
        })?;
        let base = base.cast::<u8>();
        Ok(Mapping {
            base,
            map_len,
            start: base.wrapping_add((offset - from) as usize),
            len: len as usize,
            guard,
        })
    }

    /// First byte.
    pub(crate) fn start(&self) -> *mut u8 {
        self.start
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The file was truncated under us: the device has failed.
    pub(crate) fn poisoned(&self) -> bool {
        self.guard.poisoned()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The handler must forget the range before somebody else can get these addresses.
        self.guard.release();
        // SAFETY: our own mapping; pointers into it live no longer than the tables and regions that own it.
        unsafe { libc::munmap(self.base.cast(), self.map_len) };
    }
}

/// Memory without a name is on tmpfs too.
const TMPFS_MAGIC: i64 = 0x0102_1994;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// The kind of file system that a file is on.
fn file_system(file: &File) -> io::Result<i64> {
    // SAFETY: an all-zero statfs is a valid value of that C structure, and the call fills it for an open descriptor.
    unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        if libc::fstatfs(file.as_raw_fd(), &mut stat) != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(stat.f_type as i64)
    }
}

/// Whether `fd` is an eventfd: the only thing accepted as kick or call.
pub(crate) fn is_eventfd(fd: BorrowedFd<'_>) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]")
}

/// A region of guest memory.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    /// First guest-physical address.
    guest: u64,
    /// Address of the same byte in the front end's own address space; rings are named by these.
    user: u64,
    len: u64,
    /// Where its first byte is mapped; a copy of what the mapping says, to spare a lookup a pointer to follow.
    host: usize,
    mapping: Arc<Mapping>,
}

impl Region {
    /// `mapping` as guest memory from guest address `guest`, known to the front end as `user`.
    pub(crate) fn new(guest: u64, user: u64, mapping: Mapping) -> Self {
        Region {
            guest,
            user,
            len: mapping.len() as u64,
            host: mapping.start() as usize,
            mapping: Arc::new(mapping),
        }
    }

    fn at(&self, offset: u64) -> *mut u8 {
        self.mapping.start().wrapping_add(offset as usize)
    }
}

/// All memory of a device at one time, ordered by guest address.
#[derive(Clone, Debug, Default)]
pub struct MemoryTable {
    regions: Vec<Region>,
}

impl MemoryTable {
    /// This table and one region more.
    pub(crate) fn with(&self, region: Region) -> Result<Self, MapError> {
        let mut regions = self.regions.clone();
        if regions.len() >= REGIONS_MAX {
            return Err(MapError::TooMany);
        }
        let end = |start: u64, len: u64| start.checked_add(len);
        let (Some(guest_end), Some(_)) = (end(region.guest, region.len), end(region.user, region.len)) else {
            return Err(MapError::Overlap(region.guest));
        };
        if regions
            .iter()
            .any(|r| region.guest < r.guest + r.len && r.guest < guest_end)
        {
            return Err(MapError::Overlap(region.guest));
        }
        let at = regions.partition_point(|r| r.guest < region.guest);
        regions.insert(at, region);
        Ok(MemoryTable { regions })
    }

    /// This table without the region that begins at `guest` and has `len` bytes.
    pub(crate) fn without(&self, guest: u64, len: u64) -> Result<Self, MapError> {
        let mut regions = self.regions.clone();
        let at = regions
            .iter()
            .position(|r| r.guest == guest && r.len == len)
            .ok_or(MapError::Unknown(guest))?;
        regions.remove(at);
        Ok(MemoryTable { regions })
    }

    /// Regions in the table.
    pub fn regions(&self) -> usize {
        self.regions.len()
    }

    /// Where guest address `addr` is mapped, and how many bytes follow it there. `hint` remembers the last region.
    #[inline]
    pub(crate) fn lookup(&self, hint: &mut usize, addr: u64) -> Option<(*mut u8, u64)> {
        if let Some(found) = self.regions.get(*hint).and_then(|r| Self::inside(r, addr)) {
            return Some(found);
        }
        let at = self.regions.partition_point(|r| r.guest <= addr).checked_sub(1)?;
        let found = Self::inside(&self.regions[at], addr)?;
        *hint = at;
        Some(found)
    }

    #[inline]
    fn inside(region: &Region, addr: u64) -> Option<(*mut u8, u64)> {
        let offset = addr.wrapping_sub(region.guest);
        (addr >= region.guest && offset < region.len)
            .then(|| ((region.host + offset as usize) as *mut u8, region.len - offset))
    }

    /// The pointer to `len` bytes at guest address `addr`, if they lie in one region.
    #[inline]
    pub(crate) fn contiguous(&self, hint: &mut usize, addr: u64, len: u64) -> Option<*mut u8> {
        self.lookup(hint, addr)
            .filter(|&(_, have)| have >= len)
            .map(|(ptr, _)| ptr)
    }

    /// The pointer to `len` bytes at address `user` of the front end's own address space.
    pub(crate) fn user(&self, user: u64, len: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|r| {
            let offset = user.checked_sub(r.user)?;
            (offset.checked_add(len)? <= r.len).then(|| r.at(offset))
        })
    }

    /// Some region was truncated under us.
    pub(crate) fn poisoned(&self) -> bool {
        self.regions.iter().any(|r| r.mapping.poisoned())
    }
}
