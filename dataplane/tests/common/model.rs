//! A model of a disk that holds replicas: the obligations of `replica.rs` and nothing else, with losses.
//!
//! Blocks are eight numbers, one per 512 bytes. Between flushes changes are kept as a log: a loss of power keeps a prefix
//! of the records and any subset of the data.

use std::collections::{BTreeMap, BTreeSet};

use unibody_dataplane::ids::*;
use unibody_dataplane::memory::Payload;
use unibody_dataplane::replica::*;

pub type Block = [u64; 8];

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    pub image: ExtentImage,
    pub data: [Block; 16],
}

impl Default for Extent {
    fn default() -> Self {
        Extent {
            image: ExtentImage::default(),
            data: [[0; 8]; 16],
        }
    }
}

pub fn crc(block: &Block) -> u32 {
    let mut h = 0xcbf2_9ce4_8422_2325u64;
    for &word in block {
        h = (h ^ word).wrapping_mul(0x0100_0000_01b3);
        h ^= h >> 29;
    }
    (h >> 32) as u32
}

pub fn load(data: Payload, at: usize) -> Block {
    let mut block = [0; 8];
    // SAFETY: the test's buffers live as long as the world, and nothing else runs.
    let missing = unsafe {
        data.advance(at).pieces(BLOCK, |ptr, len| {
            assert_eq!(len, BLOCK);
            for (i, word) in block.iter_mut().enumerate() {
                *word = ptr.add(i * 512).cast::<u64>().read_unaligned();
            }
        })
    };
    assert_eq!(missing, 0);
    block
}

pub fn store(data: Payload, at: usize, block: &Block) {
    // SAFETY: as in `load`.
    let missing = unsafe {
        data.advance(at).pieces(BLOCK, |ptr, len| {
            assert_eq!(len, BLOCK);
            for (i, word) in block.iter().enumerate() {
                ptr.add(i * 512).cast::<u64>().write_unaligned(*word);
            }
        })
    };
    assert_eq!(missing, 0);
}

/// One change of one extent: what it was before.
#[derive(Clone, Debug)]
struct Change {
    at: (u32, u16),
    after: Extent,
    written: BlockMask,
}

#[derive(Clone, Debug)]
pub struct Model {
    pub uuid: DiskUuid,
    pub boot: BootId,
    pub power: PowerId,
    pub sealed: Generation,
    pub chunks: BTreeMap<u32, (ChunkRef, BTreeMap<u16, Extent>)>,
    durable: BTreeMap<u32, (ChunkRef, BTreeMap<u16, Extent>)>,
    log: Vec<Change>,
    /// The highest version written in each dirty region.
    dirty: BTreeMap<(u32, u8), Version>,
    stable: Version,
    doubt: BTreeSet<(u32, u8)>,
    pub full: bool,
    pub failed: bool,
}

impl Model {
    pub fn new(uuid: u128, boot: u128, power: u128) -> Self {
        Model {
            uuid: DiskUuid(uuid),
            boot: BootId(boot),
            power: PowerId(power),
            sealed: Generation(0),
            chunks: BTreeMap::new(),
            durable: BTreeMap::new(),
            log: Vec::new(),
            dirty: BTreeMap::new(),
            stable: Version::ZERO,
            doubt: BTreeSet::new(),
            full: false,
            failed: false,
        }
    }

    fn region(extent: u16) -> u8 {
        (usize::from(extent) / EXTENTS_PER_REGION) as u8
    }

    fn held(&self, chunk: &ChunkRef) -> bool {
        self.chunks
            .get(&chunk.key.chunk)
            .is_some_and(|(there, _)| there == chunk)
    }

    fn change(&mut self, c: u32, extent: u16, written: BlockMask, after: Extent) {
        let mark = self.dirty.entry((c, Self::region(extent))).or_default();
        *mark = after.image.version.max(*mark);
        self.log.push(Change {
            at: (c, extent),
            after: after.clone(),
            written,
        });
        self.chunks.get_mut(&c).unwrap().1.insert(extent, after);
    }

    fn bad(&self, c: u32, extent: u16, mask: BlockMask) -> BlockMask {
        let Some(there) = self.chunks[&c].1.get(&extent) else {
            return 0;
        };
        (0..16)
            .filter(|&b| {
                (mask & there.image.valid) >> b & 1 != 0 && crc(&there.data[b]) != there.image.crcs[b]
            })
            .fold(0, |all, b| all | 1 << b)
    }

    /// Carries out a request.
    pub fn handle(&mut self, header: &Header, request: &Request) -> Reply {
        if self.failed {
            return Reply::Refused(Status::DiskFailed);
        }
        if let Request::Seal = request {
            if header.generation < self.sealed {
                return Reply::Refused(Status::StaleGeneration);
            }
            self.sealed = header.generation;
            let chunks = self.chunks.values().map(|(there, _)| {
                let marks = self
                    .dirty
                    .keys()
                    .chain(&self.doubt)
                    .filter(|(c, _)| *c == there.key.chunk);
                (*there, marks.fold(0u64, |mask, (_, region)| mask | 1 << region))
            });
            return Reply::Sealed(Box::new(Sealed {
                disk: self.uuid,
                boot: self.boot,
                power: self.power,
                suspect: false,
                chunks: chunks.collect(),
            }));
        }
        if header.generation != self.sealed {
            return Reply::Refused(Status::StaleGeneration);
        }
        self.stable = self.stable.max(header.stable);
        let chunk = match request {
            Request::CreateChunk(chunk) | Request::DropChunk(chunk) => *chunk,
            Request::Write { span, .. } | Request::Zero { span, .. } | Request::Read { span, .. } => {
                span.chunk
            }
            Request::Digest { chunk, .. }
            | Request::Install { chunk, .. }
            | Request::Settle { chunk, .. } => *chunk,
            Request::Seal | Request::Flush => {
                self.flush();
                return Reply::Done;
            }
            Request::Confirm => return Reply::Done,
        };
        let c = chunk.key.chunk;
        match request {
            Request::CreateChunk(_) => {
                if !self.held(&chunk) {
                    self.log.retain(|change| change.at.0 != c);
                    self.chunks.insert(c, (chunk, BTreeMap::new()));
                    self.durable.insert(c, (chunk, BTreeMap::new()));
                }
                return Reply::Done;
            }
            Request::DropChunk(_) => {
                if self
                    .chunks
                    .get(&c)
                    .is_some_and(|(there, _)| there.incarnation <= chunk.incarnation)
                {
                    self.log.retain(|change| change.at.0 != c);
                    self.chunks.remove(&c);
                    self.durable.remove(&c);
                    self.dirty.retain(|at, _| at.0 != c);
                    self.doubt.retain(|at| at.0 != c);
                }
                return Reply::Done;
            }
            _ => {}
        }
        if !self.held(&chunk) {
            return Reply::Refused(Status::NoChunk);
        }
        match *request {
            Request::Write {
                span,
                version,
                crcs,
                data,
            } => {
                if self.full {
                    return Reply::Refused(Status::NoSpace);
                }
                let mut extent = self.extent(c, span.extent);
                assert!(
                    extent.image.version <= version,
                    "versions do not go back: {span:?} {version:?}"
                );
                for b in usize::from(span.first)..usize::from(span.first + span.count) {
                    extent.data[b] = load(data, (b - usize::from(span.first)) * BLOCK);
                    assert_eq!(
                        crc(&extent.data[b]),
                        crcs[b],
                        "data fits its checksum: {span:?} {version:?}"
                    );
                    extent.image.crcs[b] = crcs[b];
                }
                let mask = span.mask();
                extent.image.version = version;
                extent.image.valid |= mask;
                extent.image.zero &= !mask;
                extent.image.lost &= !mask;
                self.change(c, span.extent, mask, extent);
                Reply::Done
            }
            Request::Zero { span, version } => {
                let mut extent = self.extent(c, span.extent);
                assert!(extent.image.version <= version, "versions do not go back");
                extent.image.version = version;
                extent.image.valid &= !span.mask();
                extent.image.lost &= !span.mask();
                extent.image.zero |= span.mask();
                for b in 0..16 {
                    if span.mask() >> b & 1 != 0 {
                        extent.image.crcs[b] = 0;
                        // What is cut is zeroed before it may be valid again.
                        extent.data[b] = [0; 8];
                    }
                }
                self.change(c, span.extent, 0, extent);
                Reply::Done
            }
            Request::Read { span, raw, data } => {
                let extent = self.extent(c, span.extent);
                let mask = span.mask();
                let wrong = self.bad(c, span.extent, mask);
                let lost = extent.image.lost & mask;
                let mut crcs = [0; 16];
                for b in 0..16 {
                    if (extent.image.valid & mask) >> b & 1 != 0 {
                        crcs[b] = crc(&extent.data[b]);
                        if raw || wrong >> b & 1 == 0 {
                            store(data, (b - usize::from(span.first)) * BLOCK, &extent.data[b]);
                        }
                    }
                }
                Reply::Read {
                    holes: mask & !extent.image.valid & !lost,
                    bad: wrong | lost,
                    lost,
                    crcs,
                }
            }
            Request::Digest { region, verify, .. } => {
                let in_doubt = self.doubt.contains(&(c, region));
                let mut extents = Box::new([ExtentDigest::default(); EXTENTS_PER_REGION]);
                for (e, digest) in extents.iter_mut().enumerate() {
                    let at = u16::from(region) * EXTENTS_PER_REGION as u16 + e as u16;
                    let extent = self.extent(c, at);
                    digest.image = extent.image;
                    if verify || in_doubt {
                        digest.bad = self.bad(c, at, !0);
                        for b in 0..16 {
                            if digest.bad >> b & 1 != 0 {
                                digest.found[b] = crc(&extent.data[b]);
                            }
                        }
                    }
                }
                Reply::Digest { in_doubt, extents }
            }
            Request::Install {
                extent: at,
                image,
                write,
                data,
                ..
            } => {
                let mut extent = self.extent(c, at);
                for b in 0..16 {
                    if write >> b & 1 != 0 {
                        extent.data[b] = load(data, b * BLOCK);
                        assert_eq!(
                            crc(&extent.data[b]),
                            image.crcs[b],
                            "installed data fits its checksum"
                        );
                    }
                }
                extent.image = image;
                for b in 0..16 {
                    if image.valid >> b & 1 == 0 {
                        extent.data[b] = [0; 8];
                    }
                }
                self.change(c, at, write, extent);
                Reply::Done
            }
            Request::Settle { region, .. } => {
                // What a crash left without its record is durably zeroed before it may be valid again.
                if self.doubt.remove(&(c, region)) {
                    for side in [&mut self.chunks, &mut self.durable] {
                        let Some((_, extents)) = side.get_mut(&c) else {
                            continue;
                        };
                        for (_, extent) in extents.iter_mut().filter(|(at, _)| Self::region(**at) == region) {
                            for b in (0..16).filter(|b| extent.image.valid >> b & 1 == 0) {
                                extent.data[b] = [0; 8];
                            }
                        }
                    }
                }
                Reply::Done
            }
            _ => unreachable!("answered above"),
        }
    }

    fn extent(&self, c: u32, extent: u16) -> Extent {
        self.chunks[&c].1.get(&extent).cloned().unwrap_or_default()
    }

    fn flush(&mut self) {
        self.durable = self.chunks.clone();
        self.log.clear();
    }

    /// The disk forgets, when idle and flushed, that regions changed, if all replicas have what changed there.
    pub fn idle(&mut self) {
        if self.log.is_empty() {
            let stable = self.stable;
            self.dirty.retain(|_, version| *version > stable);
        }
    }

    /// The process ends and begins again: what was completed is there. A request may be half done.
    pub fn restart(
        &mut self,
        boot: u128,
        half: Option<(Header, Request)>,
        random: &mut dyn FnMut(u64) -> u64,
    ) {
        if let Some((header, request @ Request::Write { span, crcs, data, .. })) = half
            && header.generation == self.sealed
            && self.held(&span.chunk)
        {
            if random(2) == 0 {
                // The record landed, the data did not.
                let before = self.extent(span.chunk.key.chunk, span.extent);
                let _ = (crcs, data);
                self.handle(&header, &request);
                let there = self
                    .chunks
                    .get_mut(&span.chunk.key.chunk)
                    .unwrap()
                    .1
                    .get_mut(&span.extent);
                if let Some(there) = there {
                    there.data = before.data;
                }
            } else {
                let there = &mut self.chunks.get_mut(&span.chunk.key.chunk).unwrap().1;
                if let Some(there) = there.get_mut(&span.extent) {
                    for b in usize::from(span.first)..usize::from(span.first + span.count) {
                        there.data[b] = load(data, (b - usize::from(span.first)) * BLOCK);
                    }
                    self.dirty
                        .entry((span.chunk.key.chunk, Self::region(span.extent)))
                        .or_default();
                }
            }
        }
        self.boot = BootId(boot);
        self.failed = false;
        self.doubt.extend(std::mem::take(&mut self.dirty).into_keys());
    }

    /// The power fails: of what was not flushed a prefix of the records and any of the data survives.
    pub fn power_loss(&mut self, boot: u128, power: u128, random: &mut dyn FnMut(u64) -> u64) {
        let log = std::mem::take(&mut self.log);
        let kept = random(log.len() as u64 + 1) as usize;
        self.chunks = self.durable.clone();
        for (i, change) in log.iter().enumerate() {
            let Some((_, extents)) = self.chunks.get_mut(&change.at.0) else {
                continue;
            };
            let there = extents.entry(change.at.1).or_default();
            if i < kept {
                there.image = change.after.image;
            }
            for b in 0..16 {
                let cut = change.after.image.valid >> b & 1 == 0;
                if cut || change.written >> b & 1 != 0 && random(4) != 0 {
                    there.data[b] = change.after.data[b];
                }
            }
        }
        for (_, extents) in self.chunks.values_mut() {
            extents.retain(|_, extent| extent.image.version != Version::ZERO);
        }
        self.durable = self.chunks.clone();
        self.power = PowerId(power);
        self.restart(boot, None, random);
    }

    /// A block rots.
    pub fn rot(&mut self, c: u32, extent: u16, b: usize) {
        if let Some(there) = self
            .chunks
            .get_mut(&c)
            .and_then(|(_, extents)| extents.get_mut(&extent))
            && there.image.valid >> b & 1 != 0
        {
            there.data[b][0] ^= 0x5555_0000_0000_0000;
        }
    }

    pub fn is_good(&self, c: u32, extent: u16, b: usize) -> bool {
        self.chunks
            .get(&c)
            .and_then(|(_, extents)| extents.get(&extent))
            .is_some_and(|there| {
                there.image.valid >> b & 1 != 0 && crc(&there.data[b]) == there.image.crcs[b]
            })
    }
}
