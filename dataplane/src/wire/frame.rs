//! Frames: how requests to replicas, their answers and the link's own words look on a connection.
//!
//! A frame is a header of 64 bytes, then `meta` (what the message says beside its header), then whole blocks of data. The
//! header alone tells how long both are, so a frame that is longer than its kind allows is refused before anything is done
//! about it. Its check mixes the connection's secret and the number of the frame: a frame of another connection, a lost or a
//! repeated one never checks. `meta` has a checksum in the header; blocks are checked against the checksums that travel in
//! `meta`, which come from whoever made the data, not from the sender of the frame.
//!
//! Invariants: encoding and decoding are inverse to each other; nothing is decoded that a sender could not have encoded;
//! neither touches a block of data.
//!
//! Deliberately absent: connections, buffers, and what any of it means ([`replica`](crate::replica) says that).
//! The format is `docs/formats/wire.md`.

use crate::checksum::crc32c;
use crate::ids::{
    BLOCK, BLOCKS_PER_EXTENT, BlockMask, BootId, ChunkKey, DiskUuid, EXTENTS_PER_CHUNK, EXTENTS_PER_REGION,
    Generation, LayerId, PowerId, REGIONS_PER_CHUNK, Version, VolumeId, block_mask,
};
use crate::memory::Payload;
use crate::replica::{
    ChunkRef, Crcs, ExtentDigest, ExtentImage, Header, Reply, Request, Sealed, Span, Status,
};

use super::handshake::SessionKey;

/// Bytes of a header.
pub const HEAD: usize = 64;
/// Longest `meta` of a frame that is neither a digest nor a sealing, bytes.
pub const META_MAX: usize = 80;
/// Most replicas of one volume that a disk tells of when it is sealed: 16 TiB of one volume.
pub const SEALED_MAX: usize = 1 << 18;
/// Longest frame without its header, bytes.
pub const BODY_MAX: usize = SEALED_HEAD + SEALED_MAX * SEALED_CHUNK;

const MAGIC: u32 = u32::from_le_bytes(*b"UbF1");
const SEALED_HEAD: usize = 56;
const SEALED_CHUNK: usize = 20;
const DIGEST_EXTENT: usize = IMAGE + 64 + 2;
/// Bytes of a digest.
const DIGEST: usize = EXTENTS_PER_REGION * DIGEST_EXTENT;
/// Bytes of a disk's announcement.
const NOTICE: usize = 48;
/// Bytes of an image, with the mask of blocks that come with it.
const IMAGE: usize = 80;

const CRC_AT: usize = HEAD - 4;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// [`Request::Seal`]
    Seal = 1,
    /// [`Request::CreateChunk`]
    CreateChunk = 2,
    /// [`Request::DropChunk`]
    DropChunk = 3,
    /// [`Request::Write`]
    Write = 4,
    /// [`Request::Zero`]
    Zero = 5,
    /// [`Request::Read`]
    Read = 6,
    /// [`Request::Flush`]
    Flush = 7,
    /// [`Request::Digest`]
    Digest = 8,
    /// [`Request::Install`]
    Install = 9,
    /// [`Request::Settle`]
    Settle = 10,
    /// [`Request::Confirm`]
    Confirm = 11,
    /// [`Reply::Done`]
    Done = 32,
    /// [`Reply::Sealed`]
    Sealed = 33,
    /// [`Reply::Read`]
    ReadReply = 34,
    /// [`Reply::Digest`]
    DigestReply = 35,
    /// [`Reply::Refused`]
    Refused = 36,
    /// A disk of the listener can be reached, or not any more.
    Disk = 64,
    /// All disks were told: requests may come, as many as it gives credits.
    Welcome = 65,
    /// Nothing but credits.
    Credits = 66,
}

impl Kind {
    fn from_code(code: u8) -> Option<Self> {
        use Kind::*;
        const ALL: [Kind; 19] = [
            Seal,
            CreateChunk,
            DropChunk,
            Write,
            Zero,
            Read,
            Flush,
            Digest,
            Install,
            Settle,
            Confirm,
            Done,
            Sealed,
            ReadReply,
            DigestReply,
            Refused,
            Disk,
            Welcome,
            Credits,
        ];
        ALL.into_iter().find(|kind| *kind as u8 == code)
    }

    /// It asks a replica for something.
    pub fn is_request(self) -> bool {
        (self as u8) < 32
    }

    /// It answers a request.
    pub fn is_reply(self) -> bool {
        (32..64).contains(&(self as u8))
    }
}

/// Why a frame is not one. The connection it came by is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// It does not begin like one.
    #[error("what came is no frame")]
    Magic,
    /// The header's check is wrong: another connection's, damaged, or one was lost before it.
    #[error("the check of a frame's header is wrong")]
    Check,
    /// Its kind is unknown, or may not come here.
    #[error("a frame of a kind that may not come here")]
    Kind,
    /// Its length is not one that its kind can have.
    #[error("a frame whose length does not fit its kind")]
    Length,
    /// The checksum of what it says is wrong.
    #[error("the checksum of a frame's content is wrong")]
    Meta,
    /// A block of data is not what its checksum says.
    #[error("a block of data does not match its checksum")]
    Data,
    /// A value that nobody could have meant.
    #[error("a frame with a value out of range")]
    Value,
}

/// Seals and checks the headers of one direction of a connection, in order.
#[derive(Clone, Debug)]
pub struct Sequence {
    seed: u32,
    number: u32,
}

impl Sequence {
    /// The frames that the dialer sends (`from_dialer`), or the listener.
    pub fn new(key: &SessionKey, from_dialer: bool) -> Self {
        let at = if from_dialer { 0 } else { 4 };
        Sequence {
            seed: u32::from_le_bytes(key.0[at..at + 4].try_into().expect("four bytes")),
            number: 0,
        }
    }

    /// Puts the check of the next frame into its header.
    pub(super) fn seal(&mut self, head: &mut [u8; HEAD]) {
        let check = self.next(head);
        put(head, CRC_AT, &check.to_le_bytes());
    }

    /// The check of the next frame's header.
    fn next(&mut self, head: &mut [u8; HEAD]) -> u32 {
        self.number = self.number.wrapping_add(1);
        // The secret and the number stand where the check will be.
        let mixed = self.seed ^ self.number.rotate_left(8);
        put(head, CRC_AT, &mixed.to_le_bytes());
        crc32c(head)
    }
}

/// A header, checked but for the meaning of its values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// What the frame is.
    pub kind: Kind,
    /// Depends on the kind: verify and raw of requests, the status of a refusal, in doubt of a digest, up of a disk.
    pub flags: u16,
    /// Bytes that follow.
    pub body: u32,
    /// Checksum of the part of them that is no data.
    pub meta_crc: u32,
    /// The volume spoken for.
    pub volume: VolumeId,
    /// The speaker's generation.
    pub generation: Generation,
    /// See [`Header::stable`].
    pub stable: Version,
    /// The asker's name for the request; comes back with the answer.
    pub tag: u32,
    /// The disk: the listener's number for it.
    pub disk: u16,
    /// Which service of that disk, as the listener announced it: another one is refused.
    pub turn: u32,
    /// Requests that may be sent beyond those that might be before.
    pub credits: u16,
    /// Depends on the kind: chunk and span of requests, masks of a read's answer.
    pub place: [u8; 16],
}

/// How the body of a frame is cut: both come from the checked header alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes that are no data.
    pub meta: usize,
    /// Blocks of data, by their place in the request's payload. They follow without gaps.
    pub data: BlockMask,
}

impl Head {
    /// A header without content.
    pub fn new(kind: Kind) -> Self {
        Head {
            kind,
            flags: 0,
            body: 0,
            meta_crc: 0,
            volume: VolumeId(0),
            generation: Generation(0),
            stable: Version::ZERO,
            tag: 0,
            disk: 0,
            turn: 0,
            credits: 0,
            place: [0; 16],
        }
    }

    /// Its bytes; the next of `sequence`.
    pub fn encode(&self, sequence: &mut Sequence, to: &mut [u8; HEAD]) {
        *to = [0; HEAD];
        put(to, 0, &MAGIC.to_le_bytes());
        to[4] = self.kind as u8;
        put(to, 6, &self.flags.to_le_bytes());
        put(to, 8, &self.body.to_le_bytes());
        put(to, 12, &self.meta_crc.to_le_bytes());
        put(to, 16, &self.volume.0.to_le_bytes());
        put(to, 20, &self.generation.0.to_le_bytes());
        put(to, 24, &self.stable.0.to_le_bytes());
        put(to, 32, &self.tag.to_le_bytes());
        put(to, 36, &self.disk.to_le_bytes());
        put(to, 38, &self.credits.to_le_bytes());
        put(to, 40, &self.turn.to_le_bytes());
        put(to, 44, &self.place);
        sequence.seal(to);
    }

    /// The header in these bytes, if it is the next of `sequence`.
    ///
    /// # Errors
    /// Magic, check, kind.
    pub fn decode(sequence: &mut Sequence, from: &[u8; HEAD]) -> Result<Self, FrameError> {
        if u32_at(from, 0) != MAGIC {
            return Err(FrameError::Magic);
        }
        let mut copy = *from;
        if sequence.next(&mut copy) != u32_at(from, CRC_AT) {
            return Err(FrameError::Check);
        }
        let head = Head {
            kind: Kind::from_code(from[4]).ok_or(FrameError::Kind)?,
            flags: u16_at(from, 6),
            body: u32_at(from, 8),
            meta_crc: u32_at(from, 12),
            volume: VolumeId(u32_at(from, 16)),
            generation: Generation(u32_at(from, 20)),
            stable: Version(u64_at(from, 24)),
            tag: u32_at(from, 32),
            disk: u16_at(from, 36),
            credits: u16_at(from, 38),
            turn: u32_at(from, 40),
            place: from[44..60].try_into().expect("sixteen bytes"),
        };
        Ok(head)
    }

    /// How long the parts of the body are.
    ///
    /// # Errors
    /// The body is longer or shorter than such a frame can be, or a value that its length depends on is out of range.
    pub fn layout(&self) -> Result<Layout, FrameError> {
        let body = self.body as usize;
        let (first, count) = (self.place[14], self.place[15]);
        let spanned = || {
            let fits = count >= 1 && usize::from(first) + usize::from(count) <= BLOCKS_PER_EXTENT;
            fits.then_some(usize::from(count)).ok_or(FrameError::Value)
        };
        let layout = |meta, data| Layout { meta, data };
        let layout = match self.kind {
            Kind::Write => layout(8 + 4 * spanned()?, block_mask(0, count)),
            Kind::Zero => {
                spanned()?;
                layout(8, 0)
            }
            Kind::Read => {
                spanned()?;
                layout(0, 0)
            }
            Kind::Install => layout(IMAGE, u16_at(&self.place, 14)),
            Kind::ReadReply => {
                let present = u16_at(&self.place, 6);
                if spanned()? < BLOCKS_PER_EXTENT && present >> count != 0 {
                    return Err(FrameError::Value);
                }
                layout(4 * usize::from(count), present)
            }
            Kind::DigestReply => layout(DIGEST, 0),
            Kind::Sealed => {
                let chunks = body.checked_sub(SEALED_HEAD).ok_or(FrameError::Length)?;
                if chunks % SEALED_CHUNK != 0 || chunks / SEALED_CHUNK > SEALED_MAX {
                    return Err(FrameError::Length);
                }
                layout(body, 0)
            }
            Kind::Disk => layout(NOTICE, 0),
            Kind::Seal
            | Kind::CreateChunk
            | Kind::DropChunk
            | Kind::Flush
            | Kind::Confirm
            | Kind::Digest
            | Kind::Settle => layout(0, 0),
            Kind::Done | Kind::Refused | Kind::Welcome | Kind::Credits => layout(0, 0),
        };
        if layout.meta + layout.data.count_ones() as usize * BLOCK != body {
            return Err(FrameError::Length);
        }
        Ok(layout)
    }

    /// What comes with every request.
    pub fn header(&self) -> Header {
        Header {
            volume: self.volume,
            generation: self.generation,
            stable: self.stable,
        }
    }

    fn check_meta(&self, meta: &[u8]) -> Result<(), FrameError> {
        if crc32c(meta) == self.meta_crc {
            Ok(())
        } else {
            Err(FrameError::Meta)
        }
    }

    fn chunk(&self) -> ChunkRef {
        ChunkRef {
            key: ChunkKey {
                volume: self.volume,
                layer: LayerId(u32_at(&self.place, 0)),
                chunk: u32_at(&self.place, 4),
            },
            incarnation: u32_at(&self.place, 8),
        }
    }

    fn put_chunk(&mut self, chunk: &ChunkRef) {
        put(&mut self.place, 0, &chunk.key.layer.0.to_le_bytes());
        put(&mut self.place, 4, &chunk.key.chunk.to_le_bytes());
        put(&mut self.place, 8, &chunk.incarnation.to_le_bytes());
    }

    fn extent(&self) -> Result<u16, FrameError> {
        let extent = u16_at(&self.place, 12);
        (usize::from(extent) < EXTENTS_PER_CHUNK)
            .then_some(extent)
            .ok_or(FrameError::Value)
    }

    fn span(&self) -> Result<Span, FrameError> {
        // `layout` has looked at first and count.
        Ok(Span {
            chunk: self.chunk(),
            extent: self.extent()?,
            first: self.place[14],
            count: self.place[15],
        })
    }

    fn put_span(&mut self, span: &Span) {
        self.put_chunk(&span.chunk);
        put(&mut self.place, 12, &span.extent.to_le_bytes());
        (self.place[14], self.place[15]) = (span.first, span.count);
    }

    fn region(&self) -> Result<u8, FrameError> {
        let region = self.place[12];
        (usize::from(region) < REGIONS_PER_CHUNK)
            .then_some(region)
            .ok_or(FrameError::Value)
    }

    fn finish(&mut self, meta: &[u8], data: BlockMask) {
        self.meta_crc = crc32c(meta);
        self.body = (meta.len() + data.count_ones() as usize * BLOCK) as u32;
    }
}

/// Room for the longest `meta` that goes with every day's frames.
pub type Meta = [u8; META_MAX];

/// A request as header and `meta`: the length of the latter, and the data that follows (a payload, and which of its
/// blocks). `None`: it can not be said (its chunk is another volume's than its header, or a value is out of range).
pub fn encode_request(
    header: &Header,
    request: &Request,
    meta: &mut Meta,
) -> Option<(Head, usize, (Payload, BlockMask))> {
    let kind = match request {
        Request::Seal => Kind::Seal,
        Request::CreateChunk(_) => Kind::CreateChunk,
        Request::DropChunk(_) => Kind::DropChunk,
        Request::Write { .. } => Kind::Write,
        Request::Zero { .. } => Kind::Zero,
        Request::Read { .. } => Kind::Read,
        Request::Flush => Kind::Flush,
        Request::Confirm => Kind::Confirm,
        Request::Digest { .. } => Kind::Digest,
        Request::Install { .. } => Kind::Install,
        Request::Settle { .. } => Kind::Settle,
    };
    let mut head = Head::new(kind);
    (head.volume, head.generation, head.stable) = (header.volume, header.generation, header.stable);
    let (mut len, mut data) = (0, (Payload::NONE, 0));
    let chunk = match request {
        Request::Seal | Request::Flush | Request::Confirm => None,
        Request::CreateChunk(chunk) | Request::DropChunk(chunk) => {
            head.put_chunk(chunk);
            Some(chunk)
        }
        Request::Write {
            span,
            version,
            crcs,
            data: payload,
        } => {
            head.put_span(span);
            put(meta, 0, &version.0.to_le_bytes());
            len = 8 + put_crcs(&mut meta[8..], span, crcs)?;
            data = (*payload, block_mask(0, span.count));
            Some(&span.chunk)
        }
        Request::Zero { span, version } => {
            head.put_span(span);
            put(meta, 0, &version.0.to_le_bytes());
            len = 8;
            Some(&span.chunk)
        }
        Request::Read { span, raw, .. } => {
            head.put_span(span);
            head.flags = u16::from(*raw);
            Some(&span.chunk)
        }
        Request::Digest {
            chunk,
            region,
            verify,
        } => {
            head.put_chunk(chunk);
            head.place[12] = *region;
            head.flags = u16::from(*verify);
            Some(chunk)
        }
        Request::Install {
            chunk,
            extent,
            image,
            write,
            data: payload,
        } => {
            head.put_chunk(chunk);
            put(&mut head.place, 12, &extent.to_le_bytes());
            put(&mut head.place, 14, &write.to_le_bytes());
            put_image(meta, image);
            len = IMAGE;
            data = (*payload, *write);
            Some(chunk)
        }
        Request::Settle { chunk, region } => {
            head.put_chunk(chunk);
            head.place[12] = *region;
            Some(chunk)
        }
    };
    if chunk.is_some_and(|chunk| chunk.key.volume != header.volume) {
        return None;
    }
    head.finish(&meta[..len], data.1);
    head.layout().ok()?;
    Some((head, len, data))
}

/// The request in a frame; its data will be, or has been, put to `data`.
///
/// # Errors
/// It is no request, its content does not check, or a value is out of range.
pub fn decode_request(head: &Head, meta: &[u8], data: Payload) -> Result<Request, FrameError> {
    let layout = head.layout()?;
    assert_eq!(meta.len(), layout.meta, "the caller cuts as the layout says");
    head.check_meta(meta)?;
    if head.generation > Generation::LAST {
        return Err(FrameError::Value);
    }
    let chunk = head.chunk();
    Ok(match head.kind {
        Kind::Seal => Request::Seal,
        Kind::CreateChunk => Request::CreateChunk(chunk),
        Kind::DropChunk => Request::DropChunk(chunk),
        Kind::Write => {
            let span = head.span()?;
            Request::Write {
                crcs: crcs_at(&meta[8..], span.first, span.count),
                span,
                version: Version(u64_at(meta, 0)),
                data,
            }
        }
        Kind::Zero => Request::Zero {
            span: head.span()?,
            version: Version(u64_at(meta, 0)),
        },
        Kind::Read => Request::Read {
            span: head.span()?,
            raw: flag(head.flags)?,
            data,
        },
        Kind::Flush => Request::Flush,
        Kind::Confirm => Request::Confirm,
        Kind::Digest => Request::Digest {
            chunk,
            region: head.region()?,
            verify: flag(head.flags)?,
        },
        Kind::Install => Request::Install {
            chunk,
            extent: head.extent()?,
            image: image_at(meta),
            write: layout.data,
            data,
        },
        Kind::Settle => Request::Settle {
            chunk,
            region: head.region()?,
        },
        _ => return Err(FrameError::Kind),
    })
}

/// An answer without data as header and content (appended to `meta`). For a read: `span` and which of its blocks follow as
/// data, by their place in the span. `None`: it is longer than a frame may be.
pub fn encode_reply(
    reply: &Reply,
    span: Option<&Span>,
    present: BlockMask,
    meta: &mut Vec<u8>,
) -> Option<Head> {
    meta.clear();
    let mut head = Head::new(Kind::Done);
    let mut data = 0;
    match reply {
        Reply::Done => {}
        Reply::Refused(status) => {
            head.kind = Kind::Refused;
            head.flags = match status {
                Status::StaleGeneration => 1,
                Status::NoChunk => 2,
                Status::NoSpace => 3,
                Status::DiskFailed => 4,
                Status::Invalid => 5,
            };
        }
        Reply::Read {
            holes,
            bad,
            lost,
            crcs,
        } => {
            let span = span?;
            head.kind = Kind::ReadReply;
            for (at, mask) in [(0, *holes), (2, *bad), (4, *lost), (6, present)] {
                put(&mut head.place, at, &mask.to_le_bytes());
            }
            (head.place[14], head.place[15]) = (span.first, span.count);
            let mut room = [0; 64];
            let len = put_crcs(&mut room, span, crcs)?;
            meta.extend_from_slice(&room[..len]);
            data = present;
        }
        Reply::Digest { in_doubt, extents } => {
            head.kind = Kind::DigestReply;
            head.flags = u16::from(*in_doubt);
            for extent in extents.iter() {
                let mut image = [0; IMAGE];
                put_image(&mut image, &extent.image);
                put(&mut image, 14, &extent.bad.to_le_bytes());
                meta.extend_from_slice(&image);
                for crc in extent.found {
                    meta.extend_from_slice(&crc.to_le_bytes());
                }
                meta.extend_from_slice(&extent.unreadable.to_le_bytes());
            }
        }
        Reply::Sealed(sealed) => {
            if sealed.chunks.len() > SEALED_MAX {
                return None;
            }
            head.kind = Kind::Sealed;
            for id in [sealed.disk.0, sealed.boot.0, sealed.power.0] {
                meta.extend_from_slice(&id.to_le_bytes());
            }
            meta.extend_from_slice(&u64::from(sealed.suspect).to_le_bytes());
            for (chunk, regions) in &sealed.chunks {
                meta.extend_from_slice(&chunk.key.layer.0.to_le_bytes());
                meta.extend_from_slice(&chunk.key.chunk.to_le_bytes());
                meta.extend_from_slice(&chunk.incarnation.to_le_bytes());
                meta.extend_from_slice(&regions.to_le_bytes());
            }
        }
    }
    head.finish(meta, data);
    head.layout().ok()?;
    Some(head)
}

/// The answer in a frame, to a request of `volume`. A read's blocks are checked and placed by the caller.
///
/// # Errors
/// It is no answer, its content does not check, or a value is out of range.
pub fn decode_reply(head: &Head, meta: &[u8], volume: VolumeId) -> Result<Reply, FrameError> {
    let layout = head.layout()?;
    assert_eq!(meta.len(), layout.meta, "the caller cuts as the layout says");
    head.check_meta(meta)?;
    Ok(match head.kind {
        Kind::Done => Reply::Done,
        Kind::Refused => Reply::Refused(match head.flags {
            1 => Status::StaleGeneration,
            2 => Status::NoChunk,
            3 => Status::NoSpace,
            4 => Status::DiskFailed,
            5 => Status::Invalid,
            _ => return Err(FrameError::Value),
        }),
        Kind::ReadReply => {
            let (first, count) = (head.place[14], head.place[15]);
            let asked = block_mask(first, count);
            let [holes, bad, lost] = [0, 2, 4].map(|at| u16_at(&head.place, at));
            let present = layout.data << first;
            // Every block is a hole, bad, or there; what is bad may be there as well.
            let odd = (holes | bad | lost) & !asked != 0
                || holes & (bad | present) != 0
                || lost & !bad != 0
                || holes | bad | present != asked;
            if odd {
                return Err(FrameError::Value);
            }
            Reply::Read {
                holes,
                bad,
                lost,
                crcs: crcs_at(meta, first, count),
            }
        }
        Kind::DigestReply => {
            let mut extents = Box::new([ExtentDigest::default(); EXTENTS_PER_REGION]);
            for (extent, bytes) in extents.iter_mut().zip(meta.chunks_exact(DIGEST_EXTENT)) {
                extent.image = image_at(bytes);
                extent.bad = u16_at(bytes, 14);
                for (b, crc) in extent.found.iter_mut().enumerate() {
                    *crc = u32_at(bytes, IMAGE + 4 * b);
                }
                extent.unreadable = u16_at(bytes, DIGEST_EXTENT - 2);
            }
            Reply::Digest {
                in_doubt: flag(head.flags)?,
                extents,
            }
        }
        Kind::Sealed => {
            let chunk = |bytes: &[u8]| {
                let key = ChunkKey {
                    volume,
                    layer: LayerId(u32_at(bytes, 0)),
                    chunk: u32_at(bytes, 4),
                };
                let incarnation = u32_at(bytes, 8);
                (ChunkRef { key, incarnation }, u64_at(bytes, 12))
            };
            Reply::Sealed(Box::new(Sealed {
                disk: DiskUuid(u128_at(meta, 0)),
                boot: BootId(u128_at(meta, 16)),
                power: PowerId(u128_at(meta, 32)),
                suspect: match u64_at(meta, 48) {
                    0 => false,
                    1 => true,
                    _ => return Err(FrameError::Value),
                },
                chunks: meta[SEALED_HEAD..]
                    .chunks_exact(SEALED_CHUNK)
                    .map(chunk)
                    .collect(),
            }))
        }
        _ => return Err(FrameError::Kind),
    })
}

/// A disk of the listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice {
    /// The listener's number for it.
    pub disk: u16,
    /// Which service of it: grows with each opening.
    pub turn: u32,
    /// It can be reached.
    pub up: bool,
    /// Which disk.
    pub uuid: DiskUuid,
    /// Its present boot.
    pub boot: BootId,
    /// Its present span of power.
    pub power: PowerId,
}

impl Notice {
    /// As a frame.
    pub fn encode(&self, meta: &mut Meta) -> (Head, usize) {
        let mut head = Head::new(Kind::Disk);
        (head.disk, head.turn, head.flags) = (self.disk, self.turn, u16::from(self.up));
        for (at, id) in [(0, self.uuid.0), (16, self.boot.0), (32, self.power.0)] {
            put(meta, at, &id.to_le_bytes());
        }
        head.finish(&meta[..NOTICE], 0);
        (head, NOTICE)
    }

    /// From a frame.
    ///
    /// # Errors
    /// Its content does not check, or a value is out of range.
    pub fn decode(head: &Head, meta: &[u8]) -> Result<Self, FrameError> {
        if head.kind != Kind::Disk || meta.len() != NOTICE {
            return Err(FrameError::Kind);
        }
        head.check_meta(meta)?;
        Ok(Notice {
            disk: head.disk,
            turn: head.turn,
            up: flag(head.flags)?,
            uuid: DiskUuid(u128_at(meta, 0)),
            boot: BootId(u128_at(meta, 16)),
            power: PowerId(u128_at(meta, 32)),
        })
    }
}

fn flag(flags: u16) -> Result<bool, FrameError> {
    match flags {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(FrameError::Value),
    }
}

/// The checksums of a span's blocks; `None` if the span is none.
fn put_crcs(to: &mut [u8], span: &Span, crcs: &Crcs) -> Option<usize> {
    let (first, count) = (usize::from(span.first), usize::from(span.count));
    for (n, crc) in crcs.get(first..first + count)?.iter().enumerate() {
        put(to, 4 * n, &crc.to_le_bytes());
    }
    Some(4 * count)
}

fn crcs_at(from: &[u8], first: u8, count: u8) -> Crcs {
    let mut crcs = Crcs::default();
    for n in 0..usize::from(count) {
        crcs[usize::from(first) + n] = u32_at(from, 4 * n);
    }
    crcs
}

/// Version, three masks, two bytes that a digest has a use for, checksums.
fn put_image(to: &mut [u8], image: &ExtentImage) {
    put(to, 0, &image.version.0.to_le_bytes());
    put(to, 8, &image.valid.to_le_bytes());
    put(to, 10, &image.zero.to_le_bytes());
    put(to, 12, &image.lost.to_le_bytes());
    put(to, 14, &[0; 2]);
    for (n, crc) in image.crcs.iter().enumerate() {
        put(to, 16 + 4 * n, &crc.to_le_bytes());
    }
}

fn image_at(from: &[u8]) -> ExtentImage {
    let mut image = ExtentImage {
        version: Version(u64_at(from, 0)),
        valid: u16_at(from, 8),
        zero: u16_at(from, 10),
        lost: u16_at(from, 12),
        ..ExtentImage::default()
    };
    for (n, crc) in image.crcs.iter_mut().enumerate() {
        *crc = u32_at(from, 16 + 4 * n);
    }
    image
}

fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}

fn u16_at(from: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(from[at..at + 2].try_into().expect("two bytes"))
}

fn u32_at(from: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(from[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(from: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(from[at..at + 8].try_into().expect("eight bytes"))
}

fn u128_at(from: &[u8], at: usize) -> u128 {
    u128::from_le_bytes(from[at..at + 16].try_into().expect("sixteen bytes"))
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
