//! Arbitrary bytes as what a peer sends; for the fuzz targets and the replay of their corpora.

use super::LinkCounts;
use super::asker::{Asker, Effect};
use super::frame::{HEAD, Head, META_MAX, Sequence};
use super::handshake::SessionKey;
use super::message::{Notice, decode_reply, decode_request, encode_reply, encode_request};
use super::server::{Offer, Server};
use crate::checksum::crc32c;
use crate::ids::{BLOCKS_PER_EXTENT, BootId, ChunkKey, DiskUuid, LayerId, PowerId, VolumeId};
use crate::memory::{Arena, Payload};
use crate::replica::{ChunkRef, Reply, Request, Span};

const KEY: SessionKey = SessionKey([3; 32]);

/// A frame whose magic, header check and content checksum are made right, so that what lies behind them is reached: it is
/// refused, or what it says is encoded to the same bytes again.
pub fn wire_frame(data: &[u8]) {
    if data.len() < HEAD {
        return;
    }
    let (raw, rest) = data.split_at(HEAD);
    // As it is, nearly everything is refused at the door.
    let mut bytes: [u8; HEAD] = raw.try_into().expect("cut above");
    let mut as_it_is = Sequence::new(&KEY, true);
    if let Ok(head) = Head::decode(&mut as_it_is, &bytes) {
        let _ = head.layout();
    }
    let mut template = [0; HEAD];
    Head::new(super::frame::Kind::Seal).encode(&mut Sequence::new(&KEY, true), &mut template);
    bytes[..4].copy_from_slice(&template[..4]);
    bytes[5] = 0;
    // The length that the kind wants, where the rest has as much.
    let mut sealed = seal(&bytes);
    let Ok(head) = Head::decode(&mut Sequence::new(&KEY, true), &sealed) else {
        return;
    };
    let Ok(layout) = head.layout() else {
        return;
    };
    if layout.meta > rest.len() {
        return;
    }
    let meta = &rest[..layout.meta];
    bytes[12..16].copy_from_slice(&crc32c(meta).to_le_bytes());
    sealed = seal(&bytes);
    let head = Head::decode(&mut Sequence::new(&KEY, true), &sealed).expect("only its checksum changed");
    let volume = head.volume;
    let mut again_meta = [0; META_MAX];
    if let Ok(request) = decode_request(&head, meta, Payload::NONE) {
        let (mut again, len, _) = encode_request(&head.header(), &request, &mut again_meta)
            .expect("what was decoded can be encoded");
        (again.tag, again.disk, again.turn, again.credits) = (head.tag, head.disk, head.turn, head.credits);
        assert_eq!(
            decode_request(&again, &again_meta[..len], Payload::NONE),
            Ok(request)
        );
        assert_eq!(again.body, head.body);
    } else if let Ok(reply) = decode_reply(&head, meta, volume) {
        let span = read_span(&head, volume);
        let mut again_meta = Vec::new();
        let again = encode_reply(&reply, Some(&span), layout.data, &mut again_meta)
            .expect("what was decoded can be encoded");
        assert_eq!(decode_reply(&again, &again_meta, volume), Ok(reply));
        assert_eq!(again.body, head.body);
    } else if let Ok(notice) = Notice::decode(&head, meta) {
        let (again, len) = notice.encode(&mut again_meta);
        assert_eq!(Notice::decode(&again, &again_meta[..len]), Ok(notice));
    }
}

/// The span of the read that an answer with these blocks belongs to. Whose it is, the answer does not say.
fn read_span(head: &Head, volume: VolumeId) -> Span {
    let key = ChunkKey {
        volume,
        layer: LayerId(0),
        chunk: 0,
    };
    Span {
        chunk: ChunkRef { key, incarnation: 0 },
        extent: 0,
        first: head.place[14],
        count: head.place[15],
    }
}

/// The header with the right check as a first frame.
fn seal(bytes: &[u8; HEAD]) -> [u8; HEAD] {
    let mut sealed = *bytes;
    Sequence::new(&KEY, true).seal(&mut sealed);
    sealed
}

/// The frames in `data` (each: a header, then as many bytes as it announces), with their checks made right, in pieces.
fn stream(data: &[u8], from_dialer: bool) -> Vec<u8> {
    let mut sequence = Sequence::new(&KEY, from_dialer);
    let mut all = Vec::new();
    let mut left = data;
    while left.len() >= HEAD {
        let (raw, rest) = left.split_at(HEAD);
        let mut head: [u8; HEAD] = raw.try_into().expect("cut above");
        let mut template = [0; HEAD];
        Head::new(super::frame::Kind::Seal).encode(&mut Sequence::new(&KEY, true), &mut template);
        head[..4].copy_from_slice(&template[..4]);
        let body = u32::from_le_bytes(head[8..12].try_into().expect("four bytes")) as usize;
        let body = &rest[..body.min(rest.len())];
        // Content of every length that a small frame can have; which one it is the kind says.
        let seen = Head::decode(&mut sequence.clone(), &sealed_by(&sequence, &head));
        let meta = seen
            .and_then(|head| head.layout())
            .map_or(body.len(), |layout| layout.meta);
        head[12..16].copy_from_slice(&crc32c(&body[..meta.min(body.len())]).to_le_bytes());
        sequence.seal(&mut head);
        all.extend_from_slice(&head);
        all.extend_from_slice(body);
        left = &rest[body.len()..];
    }
    all
}

fn sealed_by(sequence: &Sequence, head: &[u8; HEAD]) -> [u8; HEAD] {
    let mut sealed = *head;
    sequence.clone().seal(&mut sealed);
    sealed
}

/// Gives an end what came, in pieces so small that what a frame leads to is done before the next has come, until it has
/// had enough.
fn feed<E>(all: &[u8], mut give: impl FnMut(&[u8]) -> Result<(), E>) {
    for piece in all.chunks(16) {
        if give(piece).is_err() {
            return;
        }
    }
}

/// What a peer sends to the replica's end of a link; disks answer with what the request wants.
pub fn wire_server(data: &[u8]) {
    serve(data);
}

fn serve(data: &[u8]) -> LinkCounts {
    let mut server = Server::new().expect("memory for a link");
    for disk in 0..4 {
        let (uuid, boot, power) = (DiskUuid(1), BootId(2), PowerId(3));
        server.offer(disk, Some(Offer { uuid, boot, power }));
    }
    server.begin(&KEY);
    let mut out = Vec::new();
    let flush = |server: &mut Server| {
        while let Some(bytes) = server.gather().map(|batch| sum(batch)) {
            server.sent(bytes);
        }
    };
    flush(&mut server);
    feed(&stream(data, true), |bytes| {
        let (room, len) = server.room();
        assert!(bytes.len() <= len);
        // SAFETY: the server gave out room for more.
        unsafe { room.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        let result = server.received(bytes.len(), &mut out);
        for job in std::mem::take(&mut out) {
            let reply = match job.request {
                Request::Read { span, .. } => Reply::Read {
                    holes: span.mask(),
                    bad: 0,
                    lost: 0,
                    crcs: Default::default(),
                },
                _ => Reply::Done,
            };
            server.answered(job.slot, reply, &mut out);
        }
        flush(&mut server);
        result
    });
    server.end();
    assert!(server.quiet());
    server.counts()
}

/// What a peer sends to the owner's end of a link that has asked for one of everything.
pub fn wire_asker(data: &[u8]) {
    ask(data);
}

fn ask(data: &[u8]) -> usize {
    let mut answers = 0;
    let mut asker = Asker::new().expect("memory for a link");
    let mut effects = Vec::new();
    let memory = Arena::new(BLOCKS_PER_EXTENT).expect("memory for a request");
    asker.begin(&KEY);
    let mut tag = 0;
    feed(&stream(data, false), |bytes| {
        let (room, len) = asker.room();
        assert!(bytes.len() <= len);
        // SAFETY: the asker gave out room for more.
        unsafe { room.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        let result = asker.received(bytes.len(), &mut effects);
        for effect in effects.drain(..) {
            answers += usize::from(matches!(effect, Effect::Answer { .. }));
            let Effect::Up(notice) = effect else { continue };
            // It may have gone again in the same breath.
            let known = asker.disks().find(|(known, _)| known.disk == notice.disk);
            let stay = known.map_or(0, |(_, stay)| stay);
            let header = Head::new(super::frame::Kind::Flush).header();
            let key = ChunkKey {
                volume: header.volume,
                layer: LayerId(0),
                chunk: 0,
            };
            let chunk = ChunkRef { key, incarnation: 0 };
            let span = Span {
                chunk,
                extent: 0,
                first: 3,
                count: 4,
            };
            let data = memory.payload(0);
            let read = Request::Read {
                span,
                raw: true,
                data,
            };
            let (region, verify) = (0, false);
            let digest = Request::Digest {
                chunk,
                region,
                verify,
            };
            for request in [Request::Flush, read, Request::Seal, digest] {
                tag += 1;
                asker.ask(tag, 0, (notice.disk, stay), header, request);
            }
        }
        while let Some(bytes) = asker.gather(&mut effects).map(|batch| sum(batch)) {
            asker.sent(bytes, &mut effects);
        }
        result
    });
    asker.end(&mut effects);
    asker.lose(&mut effects);
    assert_eq!(asker.pending(), 0);
    answers
}

fn sum(batch: &super::stream::Batch) -> usize {
    batch.pieces().iter().map(|piece| piece.iov_len).sum()
}

/// What somebody sends to a listener.
pub fn wire_handshake(data: &[u8]) {
    use super::handshake::{Handshake, Incarnation, Local, NodeId, PARAMS, Purpose, Token};
    let local = |node| Local {
        node: NodeId(node),
        incarnation: Incarnation(u128::from(node)),
        token: Token::new(b"secret"),
        nonce: [7; 32],
    };
    let ends = [
        Handshake::listen(local(1), &[(Purpose::Data, [0; PARAMS])]),
        Handshake::dial(local(2), Purpose::Data, [0; PARAMS], None),
    ];
    for mut end in ends {
        let mut left = data;
        while end.wants() > 0 && !left.is_empty() {
            let (now, rest) = left.split_at(end.wants().min(left.len()));
            left = rest;
            if end.input(now).is_err() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn corpus(name: &str) -> Vec<u8> {
        std::fs::read(format!(
            "{}/../tests/fuzz/corpus/{name}",
            env!("CARGO_MANIFEST_DIR")
        ))
        .unwrap()
    }

    /// The fuzzers begin with inputs that get all the way.
    #[test]
    fn kept_inputs_reach_what_they_are_for() {
        let counts = serve(&corpus("wire_server/one-of-each"));
        assert_eq!((counts.requests, counts.bad_frames, counts.refused), (10, 0, 0));
        let counts = serve(&corpus("wire_server/wrong-checksum"));
        assert_eq!((counts.requests, counts.bad_frames, counts.mismatches), (0, 1, 1));
        let counts = serve(&corpus("wire_server/no-such-disk"));
        assert_eq!((counts.requests, counts.bad_frames, counts.refused), (2, 1, 2));
        assert_eq!(serve(&corpus("wire_server/an-answer")).bad_frames, 1);
        assert_eq!(ask(&corpus("wire_asker/one-of-each")), 4);
    }
}
