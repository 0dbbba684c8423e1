//! The same rings through the virtio-queue crate and a plain reading of the specification.

use proptest::prelude::*;
use virtio_queue::{Queue as Reference, QueueOwnedT, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::frontend::fuzz::MEMORY;

const SIZE: u16 = 16;

#[derive(Clone, Debug)]
struct RawDesc {
    place: u8,
    len: u32,
    flags: u16,
    next: u16,
}

fn raw_desc() -> impl Strategy<Value = RawDesc> {
    let flags = prop_oneof![6 => Just(NEXT), 4 => Just(NEXT | WRITE), 3 => Just(WRITE), 1 => Just(0), 1 => Just(INDIRECT)];
    let len = prop_oneof![
        Just(0u32),
        Just(1),
        Just(8),
        Just(16),
        Just(17),
        Just(512),
        Just(1024),
        Just(0x8000)
    ];
    (any::<u8>(), len, flags, 0u16..18).prop_map(|(place, len, flags, next)| RawDesc {
        place,
        len,
        flags,
        next,
    })
}

/// Addresses worth trying: buffers, headers, the table itself, the edges of memory.
fn address(place: u8) -> u64 {
    match place % 8 {
        0..=3 => GUEST + HEADER_AT + u64::from(place / 8) * 16,
        4 | 5 => GUEST + BUFFER_AT + u64::from(place / 8) * 64,
        6 => GUEST + MEMORY - u64::from(place / 8) * 64,
        _ => [0, GUEST - 8, u64::MAX - 15, GUEST + MEMORY][usize::from(place / 8) % 4],
    }
}

/// What a chain of (address, length, writable) means, byte by byte.
#[derive(Debug, PartialEq, Eq)]
enum Meaning {
    Broken,
    /// Answered with an error or by the queue itself.
    Answered,
    Request {
        kind: u32,
        sector: u64,
        bytes: Vec<u64>,
    },
}

fn meaning(mem: &GuestMemoryMmap, chain: &[(u64, u32, bool)], ended: bool) -> Meaning {
    let inside = |addr: u64| (GUEST..GUEST + MEMORY).contains(&addr);
    let bytes = |write: bool| -> Vec<u64> {
        let chosen = chain.iter().filter(|d| d.2 == write);
        chosen
            .flat_map(|&(addr, len, _)| (0..u64::from(len)).map(move |i| addr.wrapping_add(i)))
            .collect()
    };
    let (readable, writable) = (bytes(false), bytes(true));
    let Some(&status) = writable.last().filter(|_| ended) else {
        return Meaning::Broken;
    };
    if !inside(status)
        || writable.len() > 1 && {
            // The status byte is reached only if its own descriptor is mapped as a whole.
            let last = chain.iter().rfind(|d| d.2 && d.1 > 0).unwrap();
            (0..u64::from(last.1)).any(|i| !inside(last.0.wrapping_add(i)))
        }
    {
        return Meaning::Broken;
    }
    let first_write = chain.iter().position(|d| d.2 && d.1 > 0).unwrap_or(chain.len());
    let ordered = chain[first_write..].iter().all(|d| d.2);
    if !ordered || readable.len() < 16 || readable.iter().chain(&writable).any(|&a| !inside(a)) {
        return Meaning::Answered;
    }
    let header: Vec<u8> = readable[..16]
        .iter()
        .map(|&a| mem.read_obj(GuestAddress(a)).unwrap())
        .collect();
    let kind = u32::from_le_bytes(header[..4].try_into().unwrap());
    let sector = u64::from_le_bytes(header[8..].try_into().unwrap());
    let data: Vec<u64> = match kind {
        0 if readable.len() == 16 => writable[..writable.len() - 1].to_vec(),
        1 => readable[16..].to_vec(),
        4 => {
            return Meaning::Request {
                kind,
                sector: 0,
                bytes: Vec::new(),
            };
        }
        _ => return Meaning::Answered,
    };
    let end = sector.checked_add(data.len() as u64 / 512);
    if data.is_empty() || !data.len().is_multiple_of(512) || end.is_none_or(|end| end > (1 << 20) / 512) {
        return Meaning::Answered;
    }
    Meaning::Request {
        kind,
        sector,
        bytes: data,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn agrees_with_virtio_queue(
        ring in proptest::collection::vec(raw_desc(), SIZE as usize),
        table in proptest::collection::vec(raw_desc(), 8),
        kinds in proptest::collection::vec(prop_oneof![Just(0u32), Just(1), Just(4), Just(77)], 32),
        straight in any::<bool>(),
        head in 0..SIZE,
    ) {
        let guest = Guest::new(SIZE, false).unwrap();
        for (i, &kind) in kinds.iter().enumerate() {
            header(&guest, HEADER_AT + i as u64 * 16, kind, u64::from(kind) * 3);
        }
        // Half of the time descriptors follow each other, so that chains come to an end.
        let next = |i: usize, d: &RawDesc| if straight { i as u16 + 1 } else { d.next };
        for (i, d) in ring.iter().enumerate() {
            let (addr, len) = if d.flags & INDIRECT != 0 {
                (GUEST + BUFFER_AT + 0x4000, 8 * 16)
            } else {
                (address(d.place), d.len)
            };
            let first = straight && i == usize::from(head) && d.flags & INDIRECT == 0;
            let (addr, len, flags) = if first { (GUEST + HEADER_AT, 16, NEXT) } else { (addr, len, d.flags) };
            guest.desc(0, i as u16, addr, len, flags, next(i, d));
        }
        for (i, d) in table.iter().enumerate() {
            guest.desc(BUFFER_AT + 0x4000, i as u16, address(d.place), d.len, d.flags, next(i, d));
        }
        guest.offer(0, head);
        guest.set_avail_idx(1);

        let file = FileOffset::new(guest.file.try_clone().unwrap(), 0);
        let mem = GuestMemoryMmap::<()>::from_ranges_with_files([(GuestAddress(GUEST), MEMORY as usize, Some(file))]).unwrap();
        let mut reference = Reference::new(SIZE).unwrap();
        let [desc, avail, used] = Guest::addresses();
        reference.set_desc_table_address(Some(desc as u32), Some((desc >> 32) as u32));
        reference.set_avail_ring_address(Some(avail as u32), Some((avail >> 32) as u32));
        reference.set_used_ring_address(Some(used as u32), Some((used >> 32) as u32));
        reference.set_ready(true);
        let chain: Vec<_> = reference.iter(&mem).unwrap().next().unwrap().collect();
        let ended = chain.last().is_some_and(|d| !d.has_next());
        let plain: Vec<_> = chain.iter().map(|d| (d.addr().0, d.len(), d.is_write_only())).collect();
        let expected = meaning(&mem, &plain, ended);

        let mut queue = guest.queue(0, false, None);
        let requests = poll(&mut queue);
        queue.publish();
        let base = guest.table.contiguous(&mut 0, GUEST, 1).unwrap() as u64;
        let got = match (requests.first(), queue.broken()) {
            (None, true) => Meaning::Broken,
            (None, false) => Meaning::Answered,
            (Some(request), _) => {
                let kind = match request.kind { Kind::In => 0, Kind::Out => 1, _ => 4 };
                let segs = if kind == 4 { &[][..] } else { queue.segs(request) };
                let bytes = segs.iter().flat_map(|s| (0..u64::from(s.len)).map(move |i| s.ptr as u64 - base + GUEST + i));
                Meaning::Request { kind, sector: request.sector, bytes: bytes.collect() }
            }
        };
        prop_assert_eq!(got, expected, "chain {:?}", plain);
    }
}
