//! Which replicas a request will ask, said before it is begun, so that what they will look at can be fetched meanwhile.
//!
//! A hint and no more: nothing is locked or changed, and whoever acts on it must be right if it is wrong.

use super::{DiskIndex, Mirror};
use crate::ids::BLOCK;
use crate::replica::ChunkRef;

impl Mirror {
    /// The replicas that an operation at byte `offset` will ask, as far as that is known before: for a write all, for a
    /// read one. Only a hint.
    #[inline]
    pub fn foresee(&self, offset: u64, write: bool, mut visit: impl FnMut(DiskIndex, ChunkRef, u16)) {
        let place = self.config.geometry.piece(offset / BLOCK as u64, 1);
        let Some(chunk) = self.chunks.get(place.chunk as usize) else {
            return;
        };
        let mut slots = chunk.readable();
        if !write {
            slots &= slots.wrapping_neg();
        }
        while slots != 0 {
            let slot = slots.trailing_zeros() as u8;
            slots &= slots - 1;
            let disk = DiskIndex(chunk.slots[usize::from(slot)].disk);
            visit(disk, self.chunk_ref(place.chunk, slot), place.extent);
        }
    }
}
