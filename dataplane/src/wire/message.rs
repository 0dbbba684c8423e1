//! Requests, answers and announcements as frames, and frames as these.
//!
//! Invariants: encoding and decoding are inverse to each other; a value that no replica could mean is refused here, so that
//! it never reaches one.

use super::frame::{
    DIGEST_EXTENT, FrameError, Head, IMAGE, Kind, META_MAX, NOTICE, SEALED_CHUNK, SEALED_HEAD, SEALED_MAX,
    put, u16_at, u32_at, u64_at, u128_at,
};
use crate::ids::{
    BlockMask, BootId, ChunkKey, DiskUuid, EXTENTS_PER_REGION, Generation, LayerId, PowerId, Version,
    VolumeId, block_mask,
};
use crate::memory::Payload;
use crate::replica::{
    ChunkRef, Crcs, ExtentDigest, ExtentImage, Header, Reply, Request, Sealed, Span, Status,
};

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

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
