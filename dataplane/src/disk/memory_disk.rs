//! A disk in this process's memory: fast, honest about everything but power.
//!
//! Every I/O completes inside `submit`, by one copy; checksums are taken in the same pass. What was never written reads
//! as zeros and costs no memory (in large pages where the system has them: a random access to small ones costs as much
//! for the translation as for the bytes); a large range of zeros gives its memory back.
//!
//! Writes go past the caches, so they are ordered only for this thread. The disk is used by one thread at a time, and
//! `detach` and flushes order them for all.

use std::io;
use std::ptr::NonNull;

use super::{BlockIo, Busy, Completion, Disk, DiskInfo, DiskKind, Io, IoError, Token};
use crate::checksum;
use crate::ids::BLOCK;
use crate::reactor::Ring;
use crate::replica::Crcs;

/// From this many bytes on, zeroing gives memory back to the system; below, a plain fill is faster.
const PUNCH_MIN: usize = 256 * 1024;

/// See the module.
#[derive(Debug)]
pub struct MemoryDisk {
    base: NonNull<u8>,
    info: DiskInfo,
}

// SAFETY: the disk owns its mapping and moves between threads as a whole.
unsafe impl Send for MemoryDisk {}

impl MemoryDisk {
    /// A disk of `bytes`, rounded down to whole blocks, all zeros.
    ///
    /// # Errors
    /// When there is no address space for it, or it has not one block.
    pub fn new(bytes: u64) -> io::Result<Self> {
        let bytes = bytes / BLOCK as u64 * BLOCK as u64;
        let len = usize::try_from(bytes).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: a fresh private anonymous mapping aliases nothing.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: advice on our own fresh mapping. Refused, it changes nothing but speed.
        unsafe { libc::madvise(base, len, libc::MADV_HUGEPAGE) };
        Ok(MemoryDisk {
            base: NonNull::new(base.cast()).expect("mmap without MAP_FIXED does not return null"),
            info: DiskInfo {
                kind: DiskKind::Memory,
                path: None,
                bytes,
                memory_align: 1,
                volatile_cache: false,
                direct: false,
                iopoll: false,
            },
        })
    }

    /// The address of a range that was checked to lie inside.
    #[inline]
    fn at(&self, offset: u64) -> *mut u8 {
        self.base.as_ptr().wrapping_add(offset as usize)
    }

    fn zero(&mut self, offset: u64, len: usize) {
        if len >= PUNCH_MIN {
            // SAFETY: whole pages of our own private anonymous mapping, which reads as zeros afterwards; the caller
            // checked the range, `&mut self` keeps everybody else away.
            let punched = unsafe { libc::madvise(self.at(offset).cast(), len, libc::MADV_DONTNEED) };
            if punched == 0 {
                return;
            }
        }
        // SAFETY: a range of our own mapping, checked by the caller; `&mut self` keeps everybody else away.
        unsafe { self.at(offset).write_bytes(0, len) };
    }

    fn check_range(&self, offset: u64, len: u64) {
        assert!(
            offset <= self.info.bytes && len <= self.info.bytes - offset,
            "{len} bytes at {offset} are outside a disk of {} bytes",
            self.info.bytes
        );
    }
}

impl Drop for MemoryDisk {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours; every I/O on it ended inside `submit`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.info.bytes as usize) };
    }
}

impl Disk for MemoryDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn attach(&mut self, _: &mut Ring, _: u32) -> io::Result<()> {
        Ok(())
    }

    fn detach(&mut self, _: &mut Ring) {
        checksum::stream_fence();
    }

    #[inline]
    unsafe fn submit(
        &mut self,
        _: &mut Ring,
        token: Token,
        io: Io,
        done: &mut Vec<Completion>,
    ) -> Result<(), Busy> {
        io.check(self.info.bytes);
        let mut crcs = Crcs::default();
        match io {
            Io::Read {
                offset,
                len,
                data,
                crcs: true,
            } => {
                let sums = &mut crcs[..len as usize / BLOCK];
                // SAFETY: `check` keeps the source inside our mapping, which nobody changes meanwhile (`&mut self`);
                // the caller keeps the payload. Payloads never lie in a disk's memory.
                unsafe { checksum::copy_out(self.at(offset), data, sums) };
            }
            Io::Read {
                offset,
                len,
                data,
                crcs: false,
            } => {
                // SAFETY: as above.
                unsafe { checksum::scatter(self.at(offset), data, len as usize) };
            }
            Io::Verify { offset, len } => {
                for (i, crc) in crcs[..len as usize / BLOCK].iter_mut().enumerate() {
                    // SAFETY: inside our mapping (checked), private, and not changed while we look.
                    let block = unsafe { std::slice::from_raw_parts(self.at(offset).add(i * BLOCK), BLOCK) };
                    *crc = checksum::crc32c(block);
                }
            }
            // SAFETY: as for reads, the other way round.
            Io::Write { offset, len, data } => unsafe {
                checksum::gather_streaming(data, len as usize, self.at(offset))
            },
            Io::WriteZeroes { offset, len } => self.zero(offset, len as usize),
            Io::Flush => checksum::stream_fence(),
        }
        done.push(Completion {
            token,
            result: Ok(()),
            crcs,
        });
        Ok(())
    }

    fn complete(&mut self, _: &mut Ring, _: u32, _: i32, _: &mut Vec<Completion>) {}

    fn poll(&mut self, _: &mut Ring, _: &mut Vec<Completion>) -> bool {
        false
    }

    fn in_hand(&self) -> usize {
        0
    }
}

impl BlockIo for MemoryDisk {
    fn size(&self) -> u64 {
        self.info.bytes
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        self.check_range(offset, buf.len() as u64);
        // SAFETY: the source is inside our mapping (checked), the target is the caller's exclusive slice.
        unsafe { checksum::copy(self.at(offset), buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), IoError> {
        self.check_range(offset, buf.len() as u64);
        // SAFETY: as in `read`, the other way round.
        unsafe { checksum::copy(buf.as_ptr(), self.at(offset), buf.len()) };
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), IoError> {
        self.check_range(offset, len);
        let block = BLOCK as u64;
        assert!(
            offset.is_multiple_of(block) && len.is_multiple_of(block),
            "zeroing {len} bytes at {offset}: not whole blocks"
        );
        self.zero(offset, len as usize);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), IoError> {
        Ok(())
    }
}
