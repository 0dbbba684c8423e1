//! A disk that keeps nothing: everything completes at once, reads leave their memory as it is.
//!
//! It measures what lies above the disk. It is never put under a store, which would not find its own superblock.

use std::io;

use super::{Busy, Completion, Disk, DiskInfo, DiskKind, Io, Token};
use crate::reactor::Ring;

/// See the module.
#[derive(Debug)]
pub struct NullDisk {
    info: DiskInfo,
}

impl NullDisk {
    /// A disk that looks `bytes` large.
    pub fn new(bytes: u64) -> Self {
        NullDisk {
            info: DiskInfo {
                kind: DiskKind::Null,
                path: None,
                bytes: bytes / crate::ids::BLOCK as u64 * crate::ids::BLOCK as u64,
                memory_align: 1,
                volatile_cache: false,
                direct: false,
                iopoll: false,
            },
        }
    }
}

impl Disk for NullDisk {
    fn info(&self) -> &DiskInfo {
        &self.info
    }

    fn attach(&mut self, _: &mut Ring, _: u32) -> io::Result<()> {
        Ok(())
    }

    unsafe fn submit(
        &mut self,
        _: &mut Ring,
        token: Token,
        io: Io,
        done: &mut Vec<Completion>,
    ) -> Result<(), Busy> {
        io.check(self.info.bytes);
        done.push(Completion::new(token, Ok(())));
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
