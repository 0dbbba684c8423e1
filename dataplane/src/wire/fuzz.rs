//! Arbitrary bytes as what a peer sends; for the fuzz targets and the replay of their corpora.

use super::frame::{
    HEAD, Head, META_MAX, Notice, Sequence, decode_reply, decode_request, encode_reply, encode_request,
};
use super::handshake::SessionKey;
use crate::checksum::crc32c;
use crate::ids::VolumeId;
use crate::memory::Payload;
use crate::replica::Request;

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
        let again = encode_reply(&reply, span.as_ref(), layout.data, &mut again_meta)
            .expect("what was decoded can be encoded");
        assert_eq!(decode_reply(&again, &again_meta, volume), Ok(reply));
        assert_eq!(again.body, head.body);
    } else if let Ok(notice) = Notice::decode(&head, meta) {
        let (again, len) = notice.encode(&mut again_meta);
        assert_eq!(Notice::decode(&again, &again_meta[..len]), Ok(notice));
    }
}

/// The span that a read's answer belongs to.
fn read_span(head: &Head, volume: VolumeId) -> Option<crate::replica::Span> {
    let mut ask = *head;
    (ask.kind, ask.flags, ask.body, ask.meta_crc) = (super::frame::Kind::Read, 0, 0, crc32c(&[]));
    ask.volume = volume;
    ask.place[12..14].fill(0);
    match decode_request(&ask, &[], Payload::NONE) {
        Ok(Request::Read { span, .. }) => Some(span),
        _ => None,
    }
}

/// The header with the right check as a first frame.
fn seal(bytes: &[u8; HEAD]) -> [u8; HEAD] {
    let mut sealed = *bytes;
    Sequence::new(&KEY, true).seal(&mut sealed);
    sealed
}
