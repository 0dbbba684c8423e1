//! A virtual disk: sparse memory with a volatile cache, virtual latency and faults.
//!
//! * What was written is in `now`. Of a disk with a volatile cache, what is durable is in `durable`, and `cached` lists
//!   the writes between the two in order: a loss of power keeps any subset of them, torn at 512 bytes.
//! * An I/O takes effect when it completes, never when it is submitted; its memory is looked at at either instant, drawn
//!   for each, so that memory reused too early is found out.
//! * A killed process leaves any subset of its I/O under way done, in whole blocks; a loss of power tears those too.
//! * Rot, latent errors, lost and misdirected writes change what is read, not what is answered.
//!
//! Absent: time. The world draws when an I/O completes and calls [`VirtualDisk::complete`].

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use unibody_dataplane::checksum::crc32c;
use unibody_dataplane::disk::{BlockIo, Completion, Io, IoError, Token};
use unibody_dataplane::ids::BLOCK;
use unibody_dataplane::memory::Payload;

use super::random::Random;

/// Bytes that a device writes atomically.
pub const SECTOR: usize = 512;

/// A block's bytes.
type Bytes = [u8; BLOCK];
/// `None` reads as zeros.
type Content = Option<Rc<Bytes>>;

/// What goes wrong with one I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mishap {
    /// Answered as an error; a write may be done in part.
    Fails(IoError),
    /// A write is answered as done and is not.
    Lost,
    /// A write lands that many blocks further on.
    Misdirected(u64),
}

/// An I/O under way.
#[derive(Debug)]
struct Flying {
    token: Token,
    io: Io,
    early: Option<Vec<u8>>,
    /// For a flush: how many writes it covers.
    covers: u64,
    mishap: Option<Mishap>,
}

#[derive(Debug)]
struct Cached {
    order: u64,
    block: u64,
    data: Content,
}

/// One disk. See the module.
#[derive(Debug)]
pub struct VirtualDisk {
    now: Vec<Content>,
    durable: Vec<Content>,
    cached: Vec<Cached>,
    order: u64,
    volatile: bool,
    flying: BTreeMap<u64, Flying>,
    serial: u64,
    unreadable: BTreeSet<u64>,
    weak: BTreeSet<u64>,
    /// Calls of [`BlockIo`] until the device is gone.
    fuse: Option<u64>,
    /// I/Os completed, and calls made.
    pub done: u64,
}

pub(crate) fn gather(data: Payload, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    // SAFETY: the store keeps the memory of an I/O until its completion, which has not been handed over yet; one thread.
    let missing = unsafe {
        data.pieces(len, |ptr, n| {
            bytes.extend_from_slice(std::slice::from_raw_parts(ptr, n))
        })
    };
    assert_eq!(missing, 0, "the memory of a write is as long as the write");
    bytes
}

pub(crate) fn scatter(data: Payload, bytes: &[u8]) {
    let mut at = 0;
    // SAFETY: as in `gather`; nobody holds a reference to memory that a device is reading into.
    let missing = unsafe {
        data.pieces(bytes.len(), |ptr, n| {
            ptr.copy_from_nonoverlapping(bytes[at..].as_ptr(), n);
            at += n;
        })
    };
    assert_eq!(missing, 0, "the memory of a read is as long as the read");
}

fn content(bytes: &[u8]) -> Content {
    if bytes.iter().all(|&b| b == 0) {
        return None;
    }
    Some(Rc::new(bytes.try_into().expect("a block")))
}

fn torn(old: &Content, new: &Content, random: &mut Random) -> Content {
    let zero = [0; BLOCK];
    let mut bytes = old.as_ref().map_or(zero, |b| **b);
    let new = new.as_ref().map_or(zero, |b| **b);
    let mask = random.draw();
    for s in 0..BLOCK / SECTOR {
        if mask >> s & 1 == 1 {
            bytes[s * SECTOR..(s + 1) * SECTOR].copy_from_slice(&new[s * SECTOR..(s + 1) * SECTOR]);
        }
    }
    content(&bytes)
}

impl VirtualDisk {
    /// A blank disk of `bytes`.
    pub fn new(bytes: u64, volatile: bool) -> Self {
        let blocks = (bytes / BLOCK as u64) as usize;
        VirtualDisk {
            now: vec![None; blocks],
            durable: if volatile { vec![None; blocks] } else { Vec::new() },
            cached: Vec::new(),
            order: 0,
            volatile,
            flying: BTreeMap::new(),
            serial: 0,
            unreadable: BTreeSet::new(),
            weak: BTreeSet::new(),
            fuse: None,
            done: 0,
        }
    }

    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.now.len() as u64
    }

    /// Begins an I/O; its name is for [`VirtualDisk::complete`].
    pub fn submit(&mut self, token: Token, io: Io, mishap: Option<Mishap>, random: &mut Random) -> u64 {
        let early = match io {
            Io::Write { len, data, .. } if random.one_in(2) => Some(gather(data, len as usize)),
            _ => None,
        };
        self.serial += 1;
        let covers = self.order;
        self.flying.insert(
            self.serial,
            Flying {
                token,
                io,
                early,
                covers,
                mishap,
            },
        );
        self.serial
    }

    /// Whether the I/O is still under way.
    pub fn is_flying(&self, serial: u64) -> bool {
        self.flying.contains_key(&serial)
    }

    /// Whether the I/O changes the disk, or makes changes durable.
    pub fn is_change(&self, serial: u64) -> bool {
        self.flying
            .get(&serial)
            .is_some_and(|f| matches!(f.io, Io::Write { .. } | Io::WriteZeroes { .. } | Io::Flush))
    }

    /// Whether the I/O is a flush that will fail and lose what it was to save.
    pub fn forgets(&self, serial: u64) -> bool {
        self.flying
            .get(&serial)
            .is_some_and(|f| f.io == Io::Flush && f.mishap.is_some() && self.volatile)
    }

    fn put(&mut self, block: u64, mut data: Content) {
        let Some(there) = self.now.get_mut(block as usize) else {
            return;
        };
        if let Some(bytes) = data.as_mut().filter(|_| self.weak.contains(&block)) {
            Rc::make_mut(bytes)[BLOCK / 2] ^= 1;
        }
        self.unreadable.remove(&block);
        *there = data.clone();
        self.order += 1;
        if self.volatile {
            self.cached.push(Cached {
                order: self.order,
                block,
                data,
            });
        }
    }

    /// The blocks that an I/O would change.
    fn changes(flying: &Flying) -> Vec<(u64, Content)> {
        match flying.io {
            Io::Write { offset, len, data } => {
                let bytes = flying.early.clone().unwrap_or_else(|| gather(data, len as usize));
                let first = offset / BLOCK as u64;
                bytes
                    .chunks(BLOCK)
                    .enumerate()
                    .map(|(i, b)| (first + i as u64, content(b)))
                    .collect()
            }
            Io::WriteZeroes { offset, len } => {
                let first = offset / BLOCK as u64;
                (first..first + u64::from(len) / BLOCK as u64)
                    .map(|b| (b, None))
                    .collect()
            }
            Io::Read { .. } | Io::Verify { .. } | Io::Flush => Vec::new(),
        }
    }

    fn settle(&mut self, covers: u64) {
        let durable = &mut self.durable;
        self.cached.retain(|cached| {
            if cached.order <= covers {
                durable[cached.block as usize] = cached.data.clone();
            }
            cached.order > covers
        });
    }

    /// Ends an I/O. What is read is what is there now.
    pub fn complete(&mut self, serial: u64, random: &mut Random) -> Completion {
        let flying = self.flying.remove(&serial).expect("an I/O ends once");
        self.done += 1;
        let mut completion = Completion {
            token: flying.token,
            result: Ok(()),
            crcs: [0; 16],
        };
        if let Some(Mishap::Fails(error)) = flying.mishap {
            completion.result = Err(error);
            if flying.io == Io::Flush {
                // What a failed flush was to save may be forgotten silently.
                let lost: Vec<_> = self.cached.drain(..).collect();
                for cached in lost {
                    if random.one_in(2) {
                        self.durable[cached.block as usize] = cached.data;
                    }
                }
                if self.volatile {
                    self.now = self.durable.clone();
                }
            } else if random.one_in(2) {
                for (block, data) in Self::changes(&flying) {
                    if random.one_in(2) {
                        let old = self.now[block as usize].clone();
                        self.put(block, torn(&old, &data, random));
                    }
                }
            }
            return completion;
        }
        match flying.io {
            Io::Write { .. } | Io::WriteZeroes { .. } => {
                let away = match flying.mishap {
                    Some(Mishap::Lost) => return completion,
                    Some(Mishap::Misdirected(by)) => by,
                    _ => 0,
                };
                for (block, data) in Self::changes(&flying) {
                    self.put(block + away, data);
                }
            }
            Io::Read { offset, len, .. } | Io::Verify { offset, len } => {
                let mut bytes = vec![0; len as usize];
                if let Err(error) = self.fill(offset, &mut bytes) {
                    completion.result = Err(error);
                    return completion;
                }
                let sums = match flying.io {
                    Io::Read { data, crcs, .. } => {
                        scatter(data, &bytes);
                        crcs
                    }
                    _ => true,
                };
                if sums {
                    for (crc, block) in completion.crcs.iter_mut().zip(bytes.chunks(BLOCK)) {
                        *crc = crc32c(block);
                    }
                }
            }
            Io::Flush => self.settle(flying.covers),
        }
        completion
    }

    fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        let first = offset / BLOCK as u64;
        for (i, bytes) in buf.chunks_mut(BLOCK).enumerate() {
            let block = first + i as u64;
            if self.unreadable.contains(&block) {
                return Err(IoError::Media);
            }
            match self.now.get(block as usize) {
                Some(Some(data)) => bytes.copy_from_slice(&data[..]),
                Some(None) => bytes.fill(0),
                None => return Err(IoError::Media),
            }
        }
        Ok(())
    }

    /// The process that had the disk is gone: of its I/O under way any subset happens. The writers' memory is still there.
    pub fn kill(&mut self, random: &mut Random) {
        for flying in std::mem::take(&mut self.flying).into_values() {
            if flying.io == Io::Flush {
                if random.one_in(2) && flying.mishap.is_none() {
                    self.settle(flying.covers);
                }
                continue;
            }
            let share = random.below(3);
            for (block, data) in Self::changes(&flying) {
                if share == 2 || share == 1 && random.one_in(2) {
                    self.put(block, data);
                }
            }
        }
        self.fuse = None;
    }

    /// Power is gone and comes back. True if something that had completed may be lost.
    pub fn power_loss(&mut self, random: &mut Random) -> bool {
        for flying in std::mem::take(&mut self.flying).into_values() {
            let share = random.below(4);
            for (block, data) in Self::changes(&flying) {
                let old = self.now[block as usize].clone();
                match share {
                    0 => {}
                    1 => self.put(block, data),
                    _ if random.one_in(2) => self.put(block, torn(&old, &data, random)),
                    _ => {}
                }
            }
        }
        self.fuse = None;
        if !self.volatile {
            return false;
        }
        let share = random.below(4);
        for cached in std::mem::take(&mut self.cached) {
            let there = &mut self.durable[cached.block as usize];
            match share {
                0 => {}
                1 if random.one_in(8) => {}
                1 => *there = cached.data,
                _ => match random.below(4) {
                    0 => *there = cached.data,
                    1 => *there = torn(there, &cached.data, random),
                    _ => {}
                },
            }
        }
        self.now = self.durable.clone();
        true
    }

    /// Flips a bit of a block that holds something. False: it holds nothing.
    pub fn rot(&mut self, block: u64, random: &mut Random) -> bool {
        let Some(data) = self.now[block as usize].clone() else {
            return false;
        };
        let mut bytes = *data;
        let bit = random.below(BLOCK as u64 * 8) as usize;
        bytes[bit / 8] ^= 1 << (bit % 8);
        self.now[block as usize] = content(&bytes);
        if self.volatile && !self.cached.iter().any(|cached| cached.block == block) {
            self.durable[block as usize] = content(&bytes);
        }
        true
    }

    /// A block rots, and again after each time it is written.
    pub fn weaken(&mut self, block: u64) {
        if self.weak.insert(block) {
            let there = self.now[block as usize].clone();
            self.put(block, there);
        }
    }

    /// A block can not be read until it is written.
    pub fn spoil(&mut self, block: u64) {
        self.unreadable.insert(block);
    }

    /// A block that holds something can not be read any more, or (of metadata always) reads as something else.
    pub(crate) fn decay(&mut self, block: u64, data: bool, random: &mut Random) -> &'static str {
        if data && random.one_in(3) {
            self.spoil(block);
            return "latent error";
        }
        self.rot(block, random);
        if data { "rot of data" } else { "rot of metadata" }
    }

    /// The blocks that hold something, in order.
    pub fn used(&self) -> Vec<u64> {
        (0..self.blocks())
            .filter(|&b| self.now[b as usize].is_some())
            .collect()
    }

    /// The disk is gone after that many further calls of [`BlockIo`]; `None`: never.
    pub fn set_fuse(&mut self, calls: Option<u64>) {
        self.fuse = calls;
    }

    /// The fuse has blown.
    pub fn blown(&self) -> bool {
        self.fuse == Some(0)
    }

    fn call(&mut self) -> Result<(), IoError> {
        self.done += 1;
        match &mut self.fuse {
            Some(0) => Err(IoError::Gone),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl BlockIo for VirtualDisk {
    fn size(&self) -> u64 {
        self.blocks() * BLOCK as u64
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        self.call()?;
        self.fill(offset, buf)
    }

    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), IoError> {
        self.call()?;
        for (i, bytes) in buf.chunks(BLOCK).enumerate() {
            self.put(offset / BLOCK as u64 + i as u64, content(bytes));
        }
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), IoError> {
        self.call()?;
        let first = offset / BLOCK as u64;
        for block in first..first + len / BLOCK as u64 {
            if self.now[block as usize].is_some() || self.unreadable.contains(&block) {
                self.put(block, None);
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), IoError> {
        self.call()?;
        self.settle(self.order);
        Ok(())
    }
}
