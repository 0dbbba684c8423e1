//! A request that is carried out a second time changes nothing: that is what lets a link send again what was not answered.
//!
//! What may come twice is what an owner has unanswered: requests that do not touch each other's blocks, again in the same
//! order, after all of them have ended. A store that got everything once and one that got some of it twice say the same.

use proptest::prelude::*;
use unibody_dataplane::checksum::crc32c;
use unibody_dataplane::disk::Disk;
use unibody_dataplane::disk::memory_disk::MemoryDisk;
use unibody_dataplane::ids::{
    BLOCK, BootId, ChunkKey, DiskUuid, Generation, LayerId, PowerId, Version, VolumeId,
};
use unibody_dataplane::memory::Arena;
use unibody_dataplane::reactor::Ring;
use unibody_dataplane::replica::{ChunkRef, Crcs, ExtentImage, Header, Reply, Request, Span};
use unibody_dataplane::store::{Effect, FormatOptions, OpenOptions, Store, Tag};

const EXTENTS: u16 = 3;

fn chunk(number: u32, incarnation: u32) -> ChunkRef {
    ChunkRef {
        key: ChunkKey {
            volume: VolumeId(1),
            layer: LayerId(1),
            chunk: number,
        },
        incarnation,
    }
}

/// A store with its disk, asked one thing at a time.
struct Replica {
    store: Store,
    disk: MemoryDisk,
    ring: Ring,
    memory: Arena,
    stable: Version,
}

impl Replica {
    fn new() -> Self {
        let mut disk = MemoryDisk::new(64 << 20).unwrap();
        let options = FormatOptions {
            uuid: DiskUuid(1),
            journal_bytes: None,
            force: false,
            already_zero: true,
        };
        Store::format(&mut disk, &options).unwrap();
        let options = OpenOptions {
            boot: BootId(1),
            power: PowerId(1),
            cache_bytes: 1 << 20,
        };
        let (store, _) = Store::open(&mut disk, &options).unwrap();
        let mut replica = Replica {
            store,
            disk,
            ring: Ring::new(8).unwrap(),
            memory: Arena::new(16).unwrap(),
            stable: Version::ZERO,
        };
        assert!(matches!(replica.ask(Request::Seal), Reply::Sealed(_)));
        replica.ask(Request::CreateChunk(chunk(0, 1)));
        replica
    }

    fn ask(&mut self, request: Request) -> Reply {
        let header = Header {
            volume: VolumeId(1),
            generation: Generation(1),
            stable: self.stable,
        };
        let (mut effects, mut done) = (Vec::new(), Vec::new());
        self.store.submit(Tag(5), header, request, &mut effects);
        let mut reply = None;
        for _ in 0..1_000 {
            self.store.flush_batch(&mut effects);
            for effect in std::mem::take(&mut effects) {
                match effect {
                    Effect::Io { token, io } => {
                        // SAFETY: the store's memory and the request's live longer than this loop, which ends with the
                        // answer; a disk in memory is done within the call.
                        unsafe { self.disk.submit(&mut self.ring, token, io, &mut done) }.unwrap();
                    }
                    Effect::Reply { reply: got, .. } => reply = Some(got),
                    other => panic!("{other:?}"),
                }
            }
            for completion in std::mem::take(&mut done) {
                self.store.completed(completion, &mut effects);
            }
            if effects.is_empty() && reply.is_some() {
                break;
            }
        }
        reply.expect("every request is answered")
    }

    fn want(&mut self, want: &Want) -> Reply {
        let request = want.request(&mut self.memory);
        self.ask(request)
    }

    /// All it says of its chunk: sealing, records, content (what was read, and a checksum of the data).
    ///
    /// Without one thing: whether a block without data was zeroed or never written. A zeroing of an extent that is not there
    /// leaves nothing behind; of one that a later write has made it leaves a mark. Both read as zeros.
    fn says(&mut self) -> (Reply, Reply, Vec<(Reply, u32)>) {
        let mut digest = self.ask(Request::Digest {
            chunk: chunk(0, 1),
            region: 0,
            verify: true,
        });
        if let Reply::Digest { extents, .. } = &mut digest {
            for extent in extents.iter_mut() {
                extent.image.zero = 0;
            }
        }
        let reads = (0..EXTENTS)
            .map(|extent| {
                self.memory.bytes_mut(0, 16).fill(0);
                let reply = self.ask(Request::Read {
                    span: Span {
                        chunk: chunk(0, 1),
                        extent,
                        first: 0,
                        count: 16,
                    },
                    raw: false,
                    data: self.memory.payload(0),
                });
                (reply, crc32c(self.memory.bytes(0, 16)))
            })
            .collect();
        (self.ask(Request::Seal), digest, reads)
    }
}

#[derive(Clone, Debug)]
enum What {
    Write(u8),
    Zero,
    Install(u8),
    Remove,
    Flush,
    Settle,
    Seal,
    Create(u32, u32),
    Drop(u32, u32),
}

#[derive(Clone, Debug)]
struct Want {
    what: What,
    extent: u16,
    first: u8,
    count: u8,
    version: u64,
}

impl Want {
    fn request(&self, memory: &mut Arena) -> Request {
        let version = Version(self.version);
        let span = Span {
            chunk: chunk(0, 1),
            extent: self.extent,
            first: self.first,
            count: self.count,
        };
        let filled = |memory: &mut Arena, stamp: u8| {
            memory.bytes_mut(0, 16).fill(stamp);
            let mut crcs = Crcs::default();
            crcs[usize::from(span.first)..usize::from(span.first + span.count)].fill(crc32c(&[stamp; BLOCK]));
            crcs
        };
        match self.what {
            What::Write(stamp) => Request::Write {
                span,
                version,
                crcs: filled(memory, stamp),
                data: memory.payload(0),
            },
            What::Zero => Request::Zero { span, version },
            What::Install(stamp) => Request::Install {
                chunk: chunk(0, 1),
                extent: self.extent,
                image: ExtentImage {
                    version,
                    valid: span.mask(),
                    zero: !span.mask(),
                    lost: 0,
                    crcs: filled(memory, stamp),
                },
                write: span.mask(),
                data: memory.payload(0),
            },
            What::Remove => Request::Install {
                chunk: chunk(0, 1),
                extent: self.extent,
                image: ExtentImage::default(),
                write: 0,
                data: memory.payload(0),
            },
            What::Flush => Request::Flush,
            What::Seal => Request::Seal,
            What::Settle => Request::Settle {
                chunk: chunk(0, 1),
                region: 0,
            },
            What::Create(number, incarnation) => Request::CreateChunk(chunk(number, incarnation)),
            What::Drop(number, incarnation) => Request::DropChunk(chunk(number, incarnation)),
        }
    }

    /// An owner has both unanswered at a time only if this is not so.
    fn touches(&self, other: &Want) -> bool {
        let blocks = |want: &Want| match want.what {
            What::Write(_) | What::Zero => Some((want.extent, want.first, want.first + want.count)),
            What::Install(_) | What::Remove => Some((want.extent, 0, 16)),
            _ => None,
        };
        let chunks = |want: &Want| match want.what {
            What::Create(number, _) | What::Drop(number, _) => Some(number),
            _ => None,
        };
        let same_blocks = match (blocks(self), blocks(other)) {
            (Some((e, from, to)), Some((f, start, end))) => e == f && from < end && start < to,
            _ => false,
        };
        same_blocks || (chunks(self).is_some() && chunks(self) == chunks(other))
    }
}

fn want() -> impl Strategy<Value = Want> {
    let what = prop_oneof![
        6 => (1u8..).prop_map(What::Write),
        3 => Just(What::Zero),
        3 => (1u8..).prop_map(What::Install),
        1 => Just(What::Remove),
        1 => Just(What::Flush),
        1 => Just(What::Settle),
        1 => Just(What::Seal),
        1 => (1u32..3, 1u32..4).prop_map(|(n, i)| What::Create(n, i)),
        1 => (1u32..3, 1u32..4).prop_map(|(n, i)| What::Drop(n, i)),
    ];
    (what, 0..EXTENTS, 0u8..16, 1u8..=16).prop_map(|(what, extent, first, count)| Want {
        what,
        extent,
        first,
        count: count.min(16 - first),
        version: 0,
    })
}

proptest! {
    #[test]
    fn what_is_asked_again_changes_nothing(
        mut wants in prop::collection::vec(want(), 1..60), breaks in prop::collection::vec(1usize..12, 1..10), stable in any::<bool>(),
    ) {
        for (n, want) in wants.iter_mut().enumerate() {
            want.version = n as u64 + 1;
        }
        let (mut once, mut twice) = (Replica::new(), Replica::new());
        let mut breaks = breaks.iter().cycle();
        let mut from = 0;
        while from < wants.len() {
            // As many as can be unanswered together.
            let most = *breaks.next().unwrap();
            let mut to = from + 1;
            while to < wants.len() && to - from < most && wants[from..to].iter().all(|want| !want.touches(&wants[to])) {
                to += 1;
            }
            // What a sealing tells is the state of the moment, with what was done in between.
            let plain = |reply| if matches!(reply, Reply::Sealed(_)) { Reply::Done } else { reply };
            let first: Vec<Reply> = wants[from..to].iter().map(|want| plain(once.want(want))).collect();
            for want in &wants[from..to] {
                twice.want(want);
            }
            let second: Vec<Reply> = wants[from..to].iter().map(|want| plain(twice.want(want))).collect();
            prop_assert_eq!(first, second, "{:?}", &wants[from..to]);
            if stable {
                (once.stable, twice.stable) = (Version(to as u64), Version(to as u64));
            }
            from = to;
        }
        let (first, second) = (once.says(), twice.says());
        prop_assert!(first == second, "{first:?}\n{second:?}");
    }
}
