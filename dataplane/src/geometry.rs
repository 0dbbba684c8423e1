//! Where a byte of a volume lies: wide striping, pure arithmetic.
//!
//! The address space is cut into stripe units. `width` consecutive units go to `width` different chunks, then the next
//! row begins, until the chunks of the set are full and the next set of `width` chunks takes over.

use crate::ids::{BLOCK, BLOCKS_PER_EXTENT, CHUNK, EXTENT};

/// Stripe geometry of a volume. Build it with [`Geometry::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    unit: u64,
    width: u32,
}

/// A piece of a request that lies in one extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Index of the chunk in the volume.
    pub chunk: u32,
    /// Index of the extent in the chunk.
    pub extent: u16,
    /// First block in the extent.
    pub first: u8,
    /// Blocks, at least one.
    pub count: u8,
}

/// Why a geometry is impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The stripe unit does not fit.
    #[error("stripe unit {0} must be a power of two from 64 KiB to 64 MiB")]
    Unit(u64),
    /// The width does not fit.
    #[error("stripe width {0} must be from 1 to 64")]
    Width(u32),
}

impl Geometry {
    /// A geometry of `unit` bytes (power of two, 64 KiB to 64 MiB) over `width` chunks (1 to 64).
    ///
    /// # Errors
    /// When one of them is out of range.
    pub fn new(unit: u64, width: u32) -> Result<Self, GeometryError> {
        if !unit.is_power_of_two() || unit < EXTENT as u64 || unit > CHUNK {
            return Err(GeometryError::Unit(unit));
        }
        if width == 0 || width > 64 {
            return Err(GeometryError::Width(width));
        }
        Ok(Geometry { unit, width })
    }

    /// Stripe unit, bytes.
    pub fn unit(&self) -> u64 {
        self.unit
    }

    /// Chunks a row of units is spread over.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Chunks a volume of `size` bytes needs: whole sets, so that growing never moves a byte.
    pub fn chunks(&self, size: u64) -> u32 {
        let set = CHUNK * u64::from(self.width);
        (size.div_ceil(set) * u64::from(self.width)) as u32
    }

    /// Chunk and byte offset in it of byte `offset` of the volume.
    #[inline]
    pub fn locate(&self, offset: u64) -> (u32, u64) {
        // One division: all else is a power of two, and a whole set is a multiple of the width.
        let (width, shift) = (u64::from(self.width), self.unit.trailing_zeros());
        let rows_shift = CHUNK.trailing_zeros() - shift;
        let unit = offset >> shift;
        let row = unit / width;
        let (set, column) = (row >> rows_shift, unit - row * width);
        let row_in_chunk = row & ((1 << rows_shift) - 1);
        let chunk = set * width + column;
        (chunk as u32, (row_in_chunk << shift) + (offset & (self.unit - 1)))
    }

    /// The first piece of the block-aligned range that begins at block `block` of the volume and has `blocks` blocks.
    #[inline]
    pub fn piece(&self, block: u64, blocks: u64) -> Piece {
        let (chunk, inside) = self.locate(block * BLOCK as u64);
        let in_extent = (inside % EXTENT as u64) as usize / BLOCK;
        let count = blocks.min((BLOCKS_PER_EXTENT - in_extent) as u64);
        Piece {
            chunk,
            extent: (inside / EXTENT as u64) as u16,
            first: in_extent as u8,
            count: count as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    #[test]
    fn refuses_impossible_geometries() {
        assert_eq!(Geometry::new(3 << 16, 1), Err(GeometryError::Unit(3 << 16)));
        assert_eq!(Geometry::new(1 << 15, 1), Err(GeometryError::Unit(1 << 15)));
        assert_eq!(Geometry::new(1 << 16, 0), Err(GeometryError::Width(0)));
        assert_eq!(Geometry::new(1 << 16, 65), Err(GeometryError::Width(65)));
    }

    #[test]
    fn every_extent_of_a_set_is_used_once() {
        for (unit, width) in [(EXTENT as u64, 1), (256 << 10, 3), (1 << 20, 4), (CHUNK, 2)] {
            let geometry = Geometry::new(unit, width).unwrap();
            let size = 2 * CHUNK * u64::from(width);
            let places: HashSet<_> = (0..size)
                .step_by(EXTENT)
                .map(|offset| geometry.locate(offset))
                .collect();
            assert_eq!(places.len() as u64, size / EXTENT as u64);
            assert!(
                places
                    .iter()
                    .all(|&(chunk, inside)| chunk < geometry.chunks(size) && inside < CHUNK)
            );
        }
    }

    proptest! {
        #[test]
        fn pieces_cover_a_range_in_order(unit in 16u32..=26, width in 1u32..=64, block in 0u64..1 << 24, blocks in 1u64..600) {
            let geometry = Geometry::new(1 << unit, width).unwrap();
            let (mut at, mut left) = (block, blocks);
            while left > 0 {
                let piece = geometry.piece(at, left);
                prop_assert!(piece.count >= 1 && u64::from(piece.count) <= left);
                for i in 0..u64::from(piece.count) {
                    let (chunk, inside) = geometry.locate((at + i) * BLOCK as u64);
                    prop_assert_eq!(chunk, piece.chunk);
                    prop_assert_eq!(inside, u64::from(piece.extent) * EXTENT as u64 + (u64::from(piece.first) + i) * BLOCK as u64);
                }
                at += u64::from(piece.count);
                left -= u64::from(piece.count);
            }
        }
    }
}
