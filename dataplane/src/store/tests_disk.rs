//! A disk for tests with a volatile cache, and a store on it that is driven one step at a time.

use super::{Effect, FormatOptions, OpenOptions, OpenReport, Store, Tag};
use crate::disk::{BlockIo, Completion, Io, IoError, Token};
use crate::ids::*;
use crate::memory::{Arena, Payload};
use crate::replica::*;

/// Splitmix64.
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// What completed is in `live`, what was flushed in `durable`.
pub(super) struct SimDisk {
    pub(super) live: Vec<u8>,
    pub(super) durable: Vec<u8>,
    /// Completed and not flushed: offset and bytes, in order, with a running number.
    cached: Vec<(u64, u64, Vec<u8>)>,
    counter: u64,
    /// Writes until the power goes.
    pub(super) fuse: Option<u64>,
    /// Blocks that can not be read.
    pub(super) unreadable: Vec<u64>,
    pub(super) writes: u64,
}

impl SimDisk {
    pub(super) fn new(bytes: usize) -> Self {
        SimDisk {
            live: vec![0; bytes],
            durable: vec![0; bytes],
            cached: Vec::new(),
            counter: 0,
            fuse: None,
            unreadable: Vec::new(),
            writes: 0,
        }
    }

    fn burn(&mut self) -> Result<(), IoError> {
        self.writes += 1;
        match &mut self.fuse {
            Some(0) => Err(IoError::Gone),
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    pub(super) fn apply(&mut self, offset: u64, bytes: &[u8]) {
        self.live[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        self.counter += 1;
        self.cached.push((self.counter, offset, bytes.to_vec()));
    }

    fn flush_to(&mut self, reach: u64) {
        for (_, offset, bytes) in self.cached.iter().filter(|c| c.0 <= reach) {
            self.durable[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
        }
        self.cached.retain(|c| c.0 > reach);
    }

    /// The power goes: of what was not flushed, and of `flying`, any sectors survive.
    pub(super) fn crash(&mut self, rng: &mut Rng, flying: Vec<(u64, Vec<u8>)>) {
        let mut cached = std::mem::take(&mut self.cached);
        cached.extend(flying.into_iter().map(|(offset, bytes)| (0, offset, bytes)));
        let mood = rng.below(4);
        for (_, offset, bytes) in cached {
            let fate = if mood == 3 { 2 } else { rng.below(3) };
            for (n, sector) in bytes.chunks(512).enumerate() {
                let survives = match fate {
                    0 => true,
                    1 => false,
                    _ => rng.below(2) == 0,
                };
                if survives {
                    let at = offset as usize + n * 512;
                    self.durable[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        self.live.copy_from_slice(&self.durable);
        self.fuse = None;
    }
}

impl BlockIo for SimDisk {
    fn size(&self) -> u64 {
        self.live.len() as u64
    }
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        let (start, end) = (offset, offset + buf.len() as u64);
        if self.unreadable.iter().any(|&u| u >= start && u < end) {
            return Err(IoError::Media);
        }
        buf.copy_from_slice(&self.live[start as usize..end as usize]);
        Ok(())
    }
    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), IoError> {
        self.burn()?;
        self.apply(offset, buf);
        Ok(())
    }
    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), IoError> {
        self.burn()?;
        self.apply(offset, &vec![0; len as usize]);
        Ok(())
    }
    fn flush(&mut self) -> Result<(), IoError> {
        self.burn()?;
        self.flush_to(u64::MAX);
        Ok(())
    }
}

/// An I/O on its way.
pub(super) struct Flying {
    token: Token,
    io: Io,
    reach: u64,
}

/// A store on a disk.
pub(super) struct Rig {
    pub(super) disk: SimDisk,
    pub(super) store: Store,
    pub(super) flying: Vec<Flying>,
    pub(super) replies: Vec<(Tag, Reply)>,
    pub(super) failed: bool,
    pub(super) closed: bool,
    pub(super) memory: Arena,
    out: Vec<Effect>,
    tag: u64,
}

pub(super) const VOLUME: VolumeId = VolumeId(5);

pub(super) fn header(generation: u32, stable: u64) -> Header {
    Header {
        volume: VOLUME,
        generation: Generation(generation),
        stable: Version(stable),
    }
}

pub(super) fn chunk(chunk: u32, incarnation: u32) -> ChunkRef {
    ChunkRef {
        key: ChunkKey {
            volume: VOLUME,
            layer: LayerId(1),
            chunk,
        },
        incarnation,
    }
}

pub(super) fn span(chunk: ChunkRef, extent: u16, first: u8, count: u8) -> Span {
    Span {
        chunk,
        extent,
        first,
        count,
    }
}

pub(super) fn formatted(bytes: usize, journal: u64) -> SimDisk {
    let mut disk = SimDisk::new(bytes);
    let options = FormatOptions {
        uuid: DiskUuid(0x1234_5678),
        journal_bytes: Some(journal),
        force: false,
        already_zero: true,
    };
    Store::format(&mut disk, &options).unwrap();
    disk
}

pub(super) fn options(boot: u128) -> OpenOptions {
    OpenOptions {
        boot: BootId(boot),
        power: PowerId(9),
        cache_bytes: 0,
    }
}

unsafe fn gather(data: Payload, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    // SAFETY: the memory is an arena's that lives as long as the rig, and no reference to it is alive here.
    let missing = unsafe {
        data.pieces(len, |ptr, n| {
            bytes.extend_from_slice(std::slice::from_raw_parts(ptr, n))
        })
    };
    assert_eq!(missing, 0);
    bytes
}

unsafe fn scatter(data: Payload, bytes: &[u8]) {
    let mut at = 0;
    // SAFETY: as in `gather`.
    let missing = unsafe {
        data.pieces(bytes.len(), |ptr, n| {
            std::ptr::copy_nonoverlapping(bytes[at..].as_ptr(), ptr, n);
            at += n;
        })
    };
    assert_eq!(missing, 0);
}

impl Rig {
    pub(super) fn open(mut disk: SimDisk, boot: u128) -> (Rig, OpenReport) {
        let (store, report) = Store::open(&mut disk, &options(boot)).unwrap();
        (Rig::with(disk, store), report)
    }

    pub(super) fn with(disk: SimDisk, store: Store) -> Rig {
        Rig {
            disk,
            store,
            flying: Vec::new(),
            replies: Vec::new(),
            failed: false,
            closed: false,
            memory: Arena::new(4096).unwrap(),
            out: Vec::new(),
            tag: 0,
        }
    }

    fn take(&mut self) {
        for effect in self.out.drain(..) {
            match effect {
                Effect::Io { token, io } => self.flying.push(Flying {
                    token,
                    io,
                    reach: self.disk.counter,
                }),
                Effect::Reply { tag, reply } => self.replies.push((tag, reply)),
                Effect::Failed(_) => self.failed = true,
                Effect::Closed => self.closed = true,
            }
        }
    }

    pub(super) fn submit(&mut self, header: Header, request: Request) -> Tag {
        self.tag += 1;
        self.store.submit(Tag(self.tag), header, request, &mut self.out);
        self.take();
        Tag(self.tag)
    }

    pub(super) fn batch(&mut self) {
        self.store.flush_batch(&mut self.out);
        self.take();
    }

    pub(super) fn tick(&mut self, now: u64) {
        self.store.tick(now, &mut self.out);
        self.take();
        self.batch();
    }

    pub(super) fn close(&mut self) {
        self.store.close(&mut self.out);
        self.take();
        self.drain();
    }

    /// Carries out one I/O that is on its way and reports its end. Returns false where the power went.
    pub(super) fn complete(&mut self, n: usize) -> bool {
        let flying = self.flying.swap_remove(n);
        self.finish(flying, None)
    }

    /// Ends an I/O with an error.
    pub(super) fn break_io(&mut self, n: usize) {
        let flying = self.flying.swap_remove(n);
        self.finish(flying, Some(IoError::Media));
    }

    fn finish(&mut self, flying: Flying, error: Option<IoError>) -> bool {
        let mut crcs = Crcs::default();
        let mut result = Ok(());
        if error.is_some() {
            result = Err(IoError::Media);
        } else {
            match flying.io {
                Io::Read {
                    offset,
                    len,
                    data,
                    crcs: wanted,
                } => {
                    let mut bytes = vec![0; len as usize];
                    result = self.disk.read(offset, &mut bytes);
                    if result.is_ok() {
                        // SAFETY: see `gather`.
                        unsafe { scatter(data, &bytes) };
                        if wanted {
                            for (crc, block) in crcs.iter_mut().zip(bytes.chunks(BLOCK)) {
                                *crc = crate::checksum::crc32c(block);
                            }
                        }
                    }
                }
                Io::Verify { offset, len } => {
                    let mut bytes = vec![0; len as usize];
                    result = self.disk.read(offset, &mut bytes);
                    for (crc, block) in crcs.iter_mut().zip(bytes.chunks(BLOCK)) {
                        *crc = crate::checksum::crc32c(block);
                    }
                }
                Io::Write { offset, len, data } => {
                    // SAFETY: see `gather`.
                    let bytes = unsafe { gather(data, len as usize) };
                    if self.disk.burn().is_err() {
                        self.flying.push(flying);
                        return false;
                    }
                    self.disk.apply(offset, &bytes);
                }
                Io::WriteZeroes { offset, len } => {
                    if self.disk.burn().is_err() {
                        self.flying.push(flying);
                        return false;
                    }
                    self.disk.apply(offset, &vec![0; len as usize]);
                }
                Io::Flush => {
                    if self.disk.burn().is_err() {
                        self.flying.push(flying);
                        return false;
                    }
                    self.disk.flush_to(flying.reach);
                }
            }
        }
        let completion = Completion {
            token: flying.token,
            result,
            crcs,
        };
        self.store.completed(completion, &mut self.out);
        self.take();
        true
    }

    /// Goes on until nothing is on its way.
    pub(super) fn drain(&mut self) {
        self.batch();
        let mut steps = 0;
        while !self.flying.is_empty() {
            self.complete(0);
            self.batch();
            steps += 1;
            assert!(steps < 1_000_000, "the store does not come to rest");
        }
    }

    /// One request, to its end.
    pub(super) fn ask(&mut self, header: Header, request: Request) -> Reply {
        let tag = self.submit(header, request);
        self.drain();
        let at = self
            .replies
            .iter()
            .position(|r| r.0 == tag)
            .expect("every request is answered");
        self.replies.remove(at).1
    }

    /// The power goes; the disk is what is left.
    pub(super) fn crash(mut self, rng: &mut Rng) -> SimDisk {
        let mut flying = Vec::new();
        for f in &self.flying {
            match f.io {
                Io::Write { offset, len, data } => {
                    // SAFETY: see `gather`.
                    let bytes = unsafe { gather(data, len as usize) };
                    flying.push((offset, bytes));
                }
                Io::WriteZeroes { offset, len } => flying.push((offset, vec![0; len as usize])),
                Io::Read { .. } | Io::Verify { .. } | Io::Flush => {}
            }
        }
        self.disk.crash(rng, flying);
        self.disk
    }

    /// A write of stamped blocks, whose memory begins at page `page` of the rig's.
    pub(super) fn stamped(&mut self, page: usize, span: Span, version: u64) -> Request {
        let mut crcs = Crcs::default();
        for b in 0..span.count {
            let bytes = self.memory.bytes_mut(page + usize::from(b), 1);
            stamp(bytes, span.chunk.key.chunk, span.extent, span.first + b, version);
            crcs[usize::from(span.first + b)] = crate::checksum::crc32c(bytes);
        }
        Request::Write {
            span,
            version: Version(version),
            crcs,
            data: self.memory.payload(page),
        }
    }

    /// Reads a block: its masks, and its bytes.
    pub(super) fn read(&mut self, generation: u32, span: Span) -> (u16, u16, Vec<u8>) {
        let data = self.memory.payload(4000);
        self.memory.bytes_mut(4000, 16).fill(0);
        match self.ask(
            header(generation, 0),
            Request::Read {
                span,
                raw: true,
                data,
            },
        ) {
            Reply::Read { holes, bad, .. } => {
                let bytes = self.memory.bytes(4000, usize::from(span.count)).to_vec();
                (holes, bad, bytes)
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Fills a block with its address and version, in every sector.
pub(super) fn stamp(bytes: &mut [u8], chunk: u32, extent: u16, block: u8, version: u64) {
    for sector in bytes.chunks_mut(16) {
        let address = 1 << 63 | u64::from(chunk) << 32 | u64::from(extent) << 8 | u64::from(block);
        sector[..8].copy_from_slice(&address.to_le_bytes());
        sector[8..].copy_from_slice(&version.to_le_bytes());
    }
}

/// The version a block holds whole; `Err` where it is a mixture; panics if it is another block's.
pub(super) fn version_of(bytes: &[u8], chunk: u32, extent: u16, block: u8) -> Result<u64, ()> {
    let address = 1 << 63 | u64::from(chunk) << 32 | u64::from(extent) << 8 | u64::from(block);
    let mut whole = None;
    for piece in bytes.chunks(16) {
        let a = u64::from_le_bytes(piece[..8].try_into().unwrap());
        let v = u64::from_le_bytes(piece[8..].try_into().unwrap());
        assert!(
            (a, v) == (0, 0) || a == address,
            "bytes of {a:x} in block {address:x}"
        );
        if whole.is_some_and(|w| w != v) {
            return Err(());
        }
        whole = Some(v);
    }
    Ok(whole.unwrap())
}
