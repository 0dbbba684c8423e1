//! Entry points for fuzzing: arbitrary bytes in, no panic and no allocation beyond what the bytes' own length allows.

use super::codec::{BlockHeader, CheckpointHeader, Record, Seed, Superblock};
use super::layout::Layout;
use super::{OpenOptions, Store, check};
use crate::disk::{BlockIo, IoError};
use crate::ids::{BLOCK, BootId, PowerId};

fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut block = bytes[..bytes.len().min(BLOCK)].to_vec();
    block.resize(BLOCK, 0);
    block
}

/// A superblock, with and without its checksum made right.
pub fn superblock(bytes: &[u8]) {
    let mut block = padded(bytes);
    for _ in 0..2 {
        if let Ok(superblock) = Superblock::decode(&block) {
            let _ = Layout::new(superblock);
        }
        let hash = blake3::hash(&block[..BLOCK - 32]);
        block[BLOCK - 32..].copy_from_slice(hash.as_bytes());
    }
}

/// A journal block and a checkpoint header, as they are and with the block's checksum made right.
pub fn journal_block(bytes: &[u8]) {
    let seed = Seed::new(1);
    let mut block = padded(bytes);
    let _ = CheckpointHeader::decode(&seed, 0, &block);
    if let Some((header, _)) = BlockHeader::open(&seed, &block) {
        header.entries(&block, |_| {});
    }
    let used = u32::from_le_bytes([block[12], block[13], block[14], block[15]]).clamp(128, BLOCK as u32);
    let count = u32::from_le_bytes([block[16], block[17], block[18], block[19]]);
    let header = BlockHeader {
        used,
        count,
        sequence: 1,
        flushed: 0,
        boot: 1,
        previous: [0; 32],
    };
    header.seal(&seed, &mut block);
    let (header, _) = BlockHeader::open(&seed, &block).expect("sealed just now");
    header.entries(&block, |_| {});
}

/// An extent record, also without its checksum being looked at.
pub fn record(bytes: &[u8]) {
    let block = padded(bytes);
    let _ = Record::decode(&Seed::new(1), 0, &block[..128]);
    let _ = Record::decode_trusted(block[..128].try_into().expect("128 bytes"));
}

/// A whole disk: checked, then opened.
pub fn image(bytes: &[u8]) {
    let mut disk = Image(bytes[..bytes.len() / BLOCK * BLOCK].to_vec());
    let _ = check(&mut disk, &mut |_, _| {});
    let options = OpenOptions {
        boot: BootId(7),
        power: PowerId(7),
        cache_bytes: 0,
    };
    let _ = Store::open(&mut disk, &options);
}

/// A disk in memory that keeps everything.
struct Image(Vec<u8>);

impl BlockIo for Image {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        let from = self
            .0
            .get(offset as usize..offset as usize + buf.len())
            .ok_or(IoError::Media)?;
        buf.copy_from_slice(from);
        Ok(())
    }
    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), IoError> {
        let to = self
            .0
            .get_mut(offset as usize..offset as usize + buf.len())
            .ok_or(IoError::Media)?;
        to.copy_from_slice(buf);
        Ok(())
    }
    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), IoError> {
        self.0
            .get_mut(offset as usize..(offset + len) as usize)
            .ok_or(IoError::Media)?
            .fill(0);
        Ok(())
    }
    fn flush(&mut self) -> Result<(), IoError> {
        Ok(())
    }
}
