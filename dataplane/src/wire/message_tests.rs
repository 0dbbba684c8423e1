//! Round trips of everything that can be said, what is refused, and the bytes as they are frozen.

use proptest::prelude::*;

use super::super::frame::{HEAD, Layout, Sequence};
use super::super::handshake::SessionKey;
use super::*;

const KEY: SessionKey = SessionKey([3; 32]);
const VOLUME: VolumeId = VolumeId(7);

fn chunk() -> impl Strategy<Value = ChunkRef> {
    (any::<u32>(), any::<u32>(), any::<u32>()).prop_map(|(layer, chunk, incarnation)| ChunkRef {
        key: ChunkKey {
            volume: VOLUME,
            layer: LayerId(layer),
            chunk,
        },
        incarnation,
    })
}

fn span() -> impl Strategy<Value = Span> {
    (chunk(), 0u16..1024, 0u8..16, 1u8..=16).prop_map(|(chunk, extent, first, count)| Span {
        chunk,
        extent,
        first,
        count: count.min(16 - first),
    })
}

fn crcs_of(span: Span, seed: u32) -> Crcs {
    let mut crcs = Crcs::default();
    for b in span.first..span.first + span.count {
        crcs[usize::from(b)] = seed.wrapping_mul(u32::from(b) + 1);
    }
    crcs
}

fn image() -> impl Strategy<Value = ExtentImage> {
    (any::<u64>(), any::<[u16; 3]>(), any::<Crcs>()).prop_map(|(version, masks, crcs)| ExtentImage {
        version: Version(version),
        valid: masks[0],
        zero: masks[1],
        lost: masks[2],
        crcs,
    })
}

fn request() -> impl Strategy<Value = Request> {
    let data = Payload::NONE;
    prop_oneof![
        Just(Request::Seal),
        Just(Request::Flush),
        Just(Request::Confirm),
        chunk().prop_map(Request::CreateChunk),
        chunk().prop_map(Request::DropChunk),
        (span(), any::<u64>(), any::<u32>()).prop_map(move |(span, version, seed)| Request::Write {
            span,
            version: Version(version),
            crcs: crcs_of(span, seed),
            data
        }),
        (span(), any::<u64>()).prop_map(|(span, version)| Request::Zero {
            span,
            version: Version(version)
        }),
        (span(), any::<bool>()).prop_map(move |(span, raw)| Request::Read { span, raw, data }),
        (chunk(), 0u8..64, any::<bool>()).prop_map(|(chunk, region, verify)| Request::Digest {
            chunk,
            region,
            verify
        }),
        (chunk(), 0u16..1024, image(), any::<u16>()).prop_map(move |(chunk, extent, image, write)| {
            Request::Install {
                chunk,
                extent,
                image,
                write,
                data,
            }
        }),
        (chunk(), 0u8..64).prop_map(|(chunk, region)| Request::Settle { chunk, region }),
    ]
}

fn reply() -> impl Strategy<Value = (Reply, Span, BlockMask)> {
    let status = prop_oneof![
        Just(Status::StaleGeneration),
        Just(Status::NoChunk),
        Just(Status::NoSpace),
        Just(Status::DiskFailed),
        Just(Status::Invalid)
    ];
    let digest =
        (image(), any::<u16>(), any::<Crcs>(), any::<u16>()).prop_map(|(image, bad, found, unreadable)| {
            ExtentDigest {
                image,
                bad,
                found,
                unreadable,
            }
        });
    let plain = prop_oneof![
        Just(Reply::Done),
        status.prop_map(Reply::Refused),
        (any::<bool>(), prop::collection::vec(digest, 16)).prop_map(|(in_doubt, extents)| Reply::Digest {
            in_doubt,
            extents: Box::new(extents.try_into().unwrap()),
        }),
        (
            any::<[u128; 3]>(),
            any::<bool>(),
            prop::collection::vec((chunk(), any::<u64>()), 0..20)
        )
            .prop_map(|(ids, suspect, chunks)| Reply::Sealed(Box::new(Sealed {
                disk: DiskUuid(ids[0]),
                boot: BootId(ids[1]),
                power: PowerId(ids[2]),
                suspect,
                chunks,
            }))),
    ];
    let read = (span(), any::<[u16; 4]>(), any::<u32>()).prop_map(|(span, masks, seed)| {
        let asked = span.mask();
        let holes = asked & masks[0];
        let bad = asked & !holes & masks[1];
        let present = asked & !holes & (!bad | masks[3]);
        let reply = Reply::Read {
            holes,
            bad,
            lost: bad & masks[2],
            crcs: crcs_of(span, seed),
        };
        (reply, span, present >> span.first)
    });
    prop_oneof![(plain, span()).prop_map(|(reply, span)| (reply, span, 0)), read]
}

proptest! {
    #[test]
    fn requests_come_back_as_they_were(
        request in request(), generation in 0..1u32 << 24, stable in any::<u64>(), tag in any::<u32>(),
        disk in any::<u16>(), turn in any::<u32>(), earlier in 0u32..3,
    ) {
        let header = Header { volume: VOLUME, generation: Generation(generation), stable: Version(stable) };
        let mut meta = [0xee; META_MAX];
        let (mut head, len, data) = encode_request(&header, &request, &mut meta).unwrap();
        (head.tag, head.disk, head.turn) = (tag, disk, turn);
        let key = SessionKey(std::array::from_fn(|n| n as u8));
        let (mut ours, mut theirs) = (Sequence::new(&key, true), Sequence::new(&key, true));
        for _ in 0..earlier {
            ours.seal(&mut [0; HEAD]);
            theirs.seal(&mut [0; HEAD]);
        }
        let mut bytes = [0; HEAD];
        head.encode(&mut ours, &mut bytes);
        let got = Head::decode(&mut theirs, &bytes).unwrap();
        prop_assert_eq!(got, head);
        prop_assert_eq!(got.header(), header);
        let layout = got.layout().unwrap();
        prop_assert_eq!(layout, Layout { meta: len, data: data.1 });
        prop_assert_eq!(decode_request(&got, &meta[..len], Payload::NONE), Ok(request));
        // The same frame again, one of the other direction, or of another connection is none.
        prop_assert_eq!(Head::decode(&mut theirs, &bytes), Err(FrameError::Check));
        for mut other in [Sequence::new(&key, false), Sequence::new(&KEY, true)] {
            for _ in 0..earlier {
                other.seal(&mut [0; HEAD]);
            }
            prop_assert_eq!(Head::decode(&mut other, &bytes), Err(FrameError::Check));
        }
    }

    #[test]
    fn answers_come_back_as_they_were((reply, span, present) in reply()) {
        let mut meta = Vec::new();
        let head = encode_reply(&reply, Some(&span), present, &mut meta).unwrap();
        let mut bytes = [0; HEAD];
        head.encode(&mut Sequence::new(&KEY, false), &mut bytes);
        let got = Head::decode(&mut Sequence::new(&KEY, false), &bytes).unwrap();
        let layout = got.layout().unwrap();
        prop_assert_eq!(layout, Layout { meta: meta.len(), data: present });
        prop_assert_eq!(decode_reply(&got, &meta, VOLUME), Ok(reply));
    }

    /// One byte changed anywhere in header or content, and nothing is understood.
    #[test]
    fn no_changed_frame_is_taken(request in request(), at in any::<prop::sample::Index>(), flip in 1u8..) {
        let header = Header { volume: VOLUME, generation: Generation(1), stable: Version(2) };
        let mut meta = [0; META_MAX];
        let (head, len, _) = encode_request(&header, &request, &mut meta).unwrap();
        let mut bytes = [0; HEAD];
        head.encode(&mut Sequence::new(&KEY, true), &mut bytes);
        let at = at.index(HEAD + len);
        if at < HEAD { bytes[at] ^= flip } else { meta[at - HEAD] ^= flip }
        let got = Head::decode(&mut Sequence::new(&KEY, true), &bytes);
        prop_assert!(got.and_then(|got| decode_request(&got, &meta[..len], Payload::NONE)).is_err());
    }

    #[test]
    fn arbitrary_bytes_are_refused_or_said_again(mut bytes in prop::collection::vec(any::<u8>(), 64..700), kind in 0usize..19, body in 0u32..400) {
        const KINDS: [u8; 19] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 32, 33, 34, 35, 36, 64, 65, 66];
        bytes[4] = KINDS[kind];
        bytes[8..12].copy_from_slice(&body.to_le_bytes());
        super::super::fuzz::wire_frame(&bytes);
    }
}

#[test]
fn lengths_are_judged_by_the_header_alone() {
    let with = |kind: Kind, body: u32, place: [u8; 2]| {
        let mut head = Head::new(kind);
        head.body = body;
        head.place[14..].copy_from_slice(&place);
        head.layout()
    };
    assert!(with(Kind::Write, 8 + 4 + 4096, [0, 1]).is_ok());
    assert_eq!(with(Kind::Write, 8 + 4 + 8192, [0, 1]), Err(FrameError::Length));
    assert_eq!(with(Kind::Write, u32::MAX, [0, 16]), Err(FrameError::Length));
    assert_eq!(
        with(Kind::Write, 8 + 68 + 17 * 4096, [0, 17]),
        Err(FrameError::Value)
    );
    assert_eq!(with(Kind::Write, 8 + 4 + 4096, [16, 1]), Err(FrameError::Value));
    assert_eq!(with(Kind::Write, 8, [0, 0]), Err(FrameError::Value));
    assert_eq!(with(Kind::Flush, 1, [0, 0]), Err(FrameError::Length));
    let sealed = |chunks: usize| with(Kind::Sealed, (SEALED_HEAD + chunks * SEALED_CHUNK) as u32, [0, 0]);
    assert!(sealed(SEALED_MAX).is_ok());
    assert_eq!(sealed(SEALED_MAX + 1), Err(FrameError::Length));
    assert_eq!(with(Kind::Sealed, 57, [0, 0]), Err(FrameError::Length));
    assert_eq!(with(Kind::Sealed, 3, [0, 0]), Err(FrameError::Length));
}

#[test]
fn what_can_not_be_said_is_not_encoded() {
    let header = Header {
        volume: VOLUME,
        generation: Generation(1),
        stable: Version::ZERO,
    };
    let chunk = ChunkRef {
        key: ChunkKey {
            volume: VolumeId(8),
            layer: LayerId(0),
            chunk: 0,
        },
        incarnation: 0,
    };
    let mut meta = [0; META_MAX];
    assert!(encode_request(&header, &Request::CreateChunk(chunk), &mut meta).is_none());
    let span = Span {
        chunk: ChunkRef {
            key: ChunkKey {
                volume: VOLUME,
                ..chunk.key
            },
            ..chunk
        },
        extent: 0,
        first: 9,
        count: 8,
    };
    let zero = Request::Zero {
        span,
        version: Version(1),
    };
    assert!(encode_request(&header, &zero, &mut meta).is_none());
}

#[test]
fn the_bytes_are_those_of_the_format() {
    let chunk = ChunkRef {
        key: ChunkKey {
            volume: VOLUME,
            layer: LayerId(0x0102_0304),
            chunk: 0x0506_0708,
        },
        incarnation: 0x090a_0b0c,
    };
    let span = Span {
        chunk,
        extent: 0x0203,
        first: 4,
        count: 2,
    };
    let image = ExtentImage {
        version: Version(0x1122_3344_5566_7788),
        valid: 0x00f0,
        zero: 0x0f00,
        lost: 0xf000,
        crcs: crcs_of(span, 99),
    };
    let header = Header {
        volume: VOLUME,
        generation: Generation(0x000a_0b0c),
        stable: Version(0x0d0e_0f10_1112_1314),
    };
    let data = Payload::NONE;
    let requests = [
        Request::Seal,
        Request::CreateChunk(chunk),
        Request::DropChunk(chunk),
        Request::Write {
            span,
            version: Version(5),
            crcs: crcs_of(span, 77),
            data,
        },
        Request::Zero {
            span,
            version: Version(6),
        },
        Request::Read {
            span,
            raw: true,
            data,
        },
        Request::Flush,
        Request::Digest {
            chunk,
            region: 63,
            verify: true,
        },
        Request::Install {
            chunk,
            extent: 9,
            image,
            write: 0x0030,
            data,
        },
        Request::Settle { chunk, region: 1 },
        Request::Confirm,
    ];
    let digest = ExtentDigest {
        image,
        bad: 3,
        found: crcs_of(span, 55),
        unreadable: 1,
    };
    let replies = [
        (Reply::Done, 0),
        (
            Reply::Sealed(Box::new(Sealed {
                disk: DiskUuid(1),
                boot: BootId(2),
                power: PowerId(3),
                suspect: true,
                chunks: vec![(chunk, 0x8000_0000_0000_0001)],
            })),
            0,
        ),
        (
            Reply::Read {
                holes: 0x20,
                bad: 0,
                lost: 0,
                crcs: crcs_of(span, 33),
            },
            1,
        ),
        (
            Reply::Digest {
                in_doubt: true,
                extents: Box::new([digest; EXTENTS_PER_REGION]),
            },
            0,
        ),
        (Reply::Refused(Status::NoSpace), 0),
    ];
    let mut sequence = Sequence::new(&KEY, true);
    let mut all = blake3::Hasher::new();
    let mut bytes = [0; HEAD];
    for request in requests {
        let mut meta = [0; META_MAX];
        let (mut head, len, _) = encode_request(&header, &request, &mut meta).unwrap();
        (head.tag, head.disk, head.turn) = (0x2122_2324, 0x2526, 0x2728_292a);
        head.encode(&mut sequence, &mut bytes);
        all.update(&bytes);
        all.update(&meta[..len]);
    }
    for (reply, present) in replies {
        let mut meta = Vec::new();
        let mut head = encode_reply(&reply, Some(&span), present, &mut meta).unwrap();
        (head.tag, head.credits) = (0x2122_2324, 0x3132);
        head.encode(&mut sequence, &mut bytes);
        all.update(&bytes);
        all.update(&meta);
    }
    let notice = Notice {
        disk: 2,
        turn: 3,
        up: true,
        uuid: DiskUuid(4),
        boot: BootId(5),
        power: PowerId(6),
    };
    let mut meta = [0; META_MAX];
    let (head, len) = notice.encode(&mut meta);
    head.encode(&mut sequence, &mut bytes);
    all.update(&bytes);
    all.update(&meta[..len]);
    for kind in [Kind::Welcome, Kind::Credits] {
        let mut head = Head::new(kind);
        head.credits = 256;
        head.encode(&mut sequence, &mut bytes);
        all.update(&bytes);
    }
    // One header in full, so that a difference can be found.
    let mut first = [0; HEAD];
    let mut head = Head::new(Kind::Flush);
    (head.volume, head.stable, head.tag, head.disk) = (VOLUME, Version(2), 9, 1);
    head.encode(&mut Sequence::new(&KEY, true), &mut first);
    assert_eq!(first.map(|b| format!("{b:02x}")).concat(), GOLDEN_HEAD);
    assert_eq!(all.finalize().to_hex()[..32].to_string(), GOLDEN);
}

const GOLDEN_HEAD: &str = "556246310700000000000000000000000700000000000000020000000000000009000000010000000000000000000000000000000000000000000000b666de04";
const GOLDEN: &str = "6f36588f6667a197660dbfe8e3aa9e3f";
