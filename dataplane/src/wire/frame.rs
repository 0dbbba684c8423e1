//! Frames: how requests to replicas, their answers and the link's own words look on a connection. What they say is
//! `message`'s.
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
    BLOCK, BLOCKS_PER_EXTENT, BlockMask, ChunkKey, EXTENTS_PER_CHUNK, EXTENTS_PER_REGION, Generation,
    LayerId, REGIONS_PER_CHUNK, Version, VolumeId, block_mask,
};
use crate::replica::{ChunkRef, Header, Span};

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
pub(super) const SEALED_HEAD: usize = 56;
pub(super) const SEALED_CHUNK: usize = 20;
pub(super) const DIGEST_EXTENT: usize = IMAGE + 64 + 2;
/// Bytes of a digest.
pub(super) const DIGEST: usize = EXTENTS_PER_REGION * DIGEST_EXTENT;
/// Bytes of a disk's announcement.
pub(super) const NOTICE: usize = 48;
/// Bytes of an image, with the mask of blocks that come with it.
pub(super) const IMAGE: usize = 80;

const CRC_AT: usize = HEAD - 4;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// [`Request::Seal`](crate::replica::Request::Seal)
    Seal = 1,
    /// [`Request::CreateChunk`](crate::replica::Request::CreateChunk)
    CreateChunk = 2,
    /// [`Request::DropChunk`](crate::replica::Request::DropChunk)
    DropChunk = 3,
    /// [`Request::Write`](crate::replica::Request::Write)
    Write = 4,
    /// [`Request::Zero`](crate::replica::Request::Zero)
    Zero = 5,
    /// [`Request::Read`](crate::replica::Request::Read)
    Read = 6,
    /// [`Request::Flush`](crate::replica::Request::Flush)
    Flush = 7,
    /// [`Request::Digest`](crate::replica::Request::Digest)
    Digest = 8,
    /// [`Request::Install`](crate::replica::Request::Install)
    Install = 9,
    /// [`Request::Settle`](crate::replica::Request::Settle)
    Settle = 10,
    /// [`Request::Confirm`](crate::replica::Request::Confirm)
    Confirm = 11,
    /// [`Reply::Done`](crate::replica::Reply::Done)
    Done = 32,
    /// [`Reply::Sealed`](crate::replica::Reply::Sealed)
    Sealed = 33,
    /// [`Reply::Read`](crate::replica::Reply::Read)
    ReadReply = 34,
    /// [`Reply::Digest`](crate::replica::Reply::Digest)
    DigestReply = 35,
    /// [`Reply::Refused`](crate::replica::Reply::Refused)
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

    pub(super) fn check_meta(&self, meta: &[u8]) -> Result<(), FrameError> {
        if crc32c(meta) == self.meta_crc {
            Ok(())
        } else {
            Err(FrameError::Meta)
        }
    }

    pub(super) fn chunk(&self) -> ChunkRef {
        ChunkRef {
            key: ChunkKey {
                volume: self.volume,
                layer: LayerId(u32_at(&self.place, 0)),
                chunk: u32_at(&self.place, 4),
            },
            incarnation: u32_at(&self.place, 8),
        }
    }

    pub(super) fn put_chunk(&mut self, chunk: &ChunkRef) {
        put(&mut self.place, 0, &chunk.key.layer.0.to_le_bytes());
        put(&mut self.place, 4, &chunk.key.chunk.to_le_bytes());
        put(&mut self.place, 8, &chunk.incarnation.to_le_bytes());
    }

    pub(super) fn extent(&self) -> Result<u16, FrameError> {
        let extent = u16_at(&self.place, 12);
        (usize::from(extent) < EXTENTS_PER_CHUNK)
            .then_some(extent)
            .ok_or(FrameError::Value)
    }

    pub(super) fn span(&self) -> Result<Span, FrameError> {
        // `layout` has looked at first and count.
        Ok(Span {
            chunk: self.chunk(),
            extent: self.extent()?,
            first: self.place[14],
            count: self.place[15],
        })
    }

    pub(super) fn put_span(&mut self, span: &Span) {
        self.put_chunk(&span.chunk);
        put(&mut self.place, 12, &span.extent.to_le_bytes());
        (self.place[14], self.place[15]) = (span.first, span.count);
    }

    pub(super) fn region(&self) -> Result<u8, FrameError> {
        let region = self.place[12];
        (usize::from(region) < REGIONS_PER_CHUNK)
            .then_some(region)
            .ok_or(FrameError::Value)
    }

    pub(super) fn finish(&mut self, meta: &[u8], data: BlockMask) {
        self.meta_crc = crc32c(meta);
        self.body = (meta.len() + data.count_ones() as usize * BLOCK) as u32;
    }
}

pub(super) fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}

pub(super) fn u16_at(from: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(from[at..at + 2].try_into().expect("two bytes"))
}

pub(super) fn u32_at(from: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(from[at..at + 4].try_into().expect("four bytes"))
}

pub(super) fn u64_at(from: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(from[at..at + 8].try_into().expect("eight bytes"))
}

pub(super) fn u128_at(from: &[u8], at: usize) -> u128 {
    u128::from_le_bytes(from[at..at + 16].try_into().expect("sixteen bytes"))
}
