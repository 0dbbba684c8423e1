//! From a descriptor chain to a request: walking, checking, copying the header (virtio 1.2, 5.2.6).
//!
//! The framing is the driver's choice: readable bytes are a stream of 16 bytes of header and then data, writable bytes a
//! stream of data and then one status byte, cut into descriptors anyhow. Nothing is believed that was read before: what
//! does not have the plain shape is walked from its first descriptor on, as if nobody had looked.

use super::guest::MemoryTable;
use super::ring::{DESC_INDIRECT, DESC_NEXT, DESC_SIZE, DESC_WRITE, Desc, Ring, read16};
use super::slots::{SEGS_MAX, Slots};
use super::{Counters, RANGE_SECTORS_MAX, REQUEST_BYTES_MAX, SECTOR, SERIAL_BYTES, count};
use crate::memory::{Payload, Seg};

/// Most ranges of a discard or write-zeroes request.
pub const RANGES_MAX: usize = 32;
/// Most descriptors of a chain: those of the segments, header and status.
pub(crate) const DESCS_MAX: usize = SEGS_MAX + 2;
const HEADER: usize = 16;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read `len` bytes from `sector` into `data`.
    In,
    /// Write `len` bytes from `data` to `sector`.
    Out,
    /// Make all completed writes durable.
    Flush,
    /// The ranges' contents no longer matter.
    Discard,
    /// The ranges read as zeros afterwards.
    WriteZeroes,
}

/// A checked request. Its memory stays valid until [`super::Queue::complete`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Names it to [`super::Queue::complete`].
    pub head: u16,
    /// What to do.
    pub kind: Kind,
    /// First sector (`In`, `Out`); zero otherwise.
    pub sector: u64,
    /// Bytes of data (`In`, `Out`; a multiple of 512, not zero); number of ranges (`Discard`, `WriteZeroes`).
    pub len: u32,
    /// Guest memory of `In` and `Out`.
    pub data: Payload,
}

/// One range of a discard or write-zeroes request, inside the device.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub sector: u64,
    /// Sectors; may be zero.
    pub sectors: u32,
    /// Bit 0: the space may be given back.
    flags: u32,
}

impl Range {
    /// Whether a write of zeroes may give back the space.
    pub fn unmap(&self) -> bool {
        self.flags & 1 != 0
    }
}

/// What became of a chain.
pub(crate) enum Parsed {
    /// A request for the reactor.
    Request(Request),
    /// To be answered at once with this status byte, `written` bytes of data being there already.
    Answer { status: u8, written: u32 },
    /// No status byte to be found: the chain can not be answered.
    Broken,
}

pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;

/// What a chain is checked against.
pub(crate) struct Limits<'a> {
    pub(crate) ring: &'a Ring,
    pub(crate) memory: &'a MemoryTable,
    pub(crate) counters: &'a Counters,
    pub(crate) serial: &'a [u8],
    pub(crate) read_only: bool,
    pub(crate) capacity_bytes: u64,
}

/// Why a chain is wrong: who counts it.
#[derive(Clone, Copy)]
enum Flaw {
    Malformed,
    Unmapped,
    TooLong,
}

#[derive(Default)]
struct Walk {
    header: [u8; HEADER],
    header_have: usize,
    /// Data bytes collected as segments.
    data: u64,
    /// Bytes of writable descriptors.
    writable: u64,
    /// Last writable byte seen.
    last: Option<*mut u8>,
    flaw: Option<Flaw>,
    /// Segments are kept (a header of a kind with data on this side was read).
    keep_readable: bool,
    keep_writable: bool,
}

impl Walk {
    fn flaw(&mut self, flaw: Flaw) {
        self.flaw.get_or_insert(flaw);
    }

    /// The chain has no end: that counts, whatever else is wrong with it.
    fn endless(&mut self, flaw: Flaw) -> bool {
        self.flaw = Some(flaw);
        false
    }

    fn kind(&self) -> u32 {
        u32::from_le_bytes([self.header[0], self.header[1], self.header[2], self.header[3]])
    }

    fn header_complete(&mut self) {
        self.keep_writable = matches!(self.kind(), T_IN | T_GET_ID);
        self.keep_readable = !self.keep_writable;
    }

    /// Takes in the memory of one descriptor.
    #[inline]
    fn take(&mut self, limits: &Limits<'_>, hint: &mut usize, slots: &mut Slots, head: u16, desc: &Desc) {
        let (mut addr, mut left) = (desc.addr, u64::from(desc.len));
        let write = desc.flags & DESC_WRITE != 0;
        if !write && self.writable > 0 {
            return self.flaw(Flaw::Malformed);
        }
        if write {
            self.writable += left;
            // What could be the status byte of this chain must come from this descriptor or a later one.
            if left > 0 {
                self.last = None;
            }
        }
        while left > 0 {
            let Some((ptr, have)) = limits.memory.lookup(hint, addr) else {
                return self.flaw(Flaw::Unmapped);
            };
            let mut n = left.min(have);
            if !write && self.header_have < HEADER {
                n = n.min((HEADER - self.header_have) as u64);
                self.copy_header(ptr, n as usize);
            } else if write && self.keep_writable || !write && self.keep_readable {
                let seg = Seg { ptr, len: n as u32 };
                self.data += n;
                if !slots.push(head, seg) {
                    self.flaw(Flaw::TooLong);
                }
            } else if !write {
                // Data where none belongs.
                self.flaw(Flaw::Malformed);
            }
            if write && n == left {
                self.last = Some(ptr.wrapping_add(n as usize - 1));
            }
            left -= n;
            let Some(next) = addr.checked_add(n) else {
                if left > 0 {
                    self.flaw(Flaw::Unmapped);
                }
                return;
            };
            addr = next;
        }
    }

    #[inline]
    fn copy_header(&mut self, ptr: *const u8, n: usize) {
        if n == HEADER {
            // SAFETY: the lookup said that `n` bytes are mapped at `ptr`.
            let [a, b] = unsafe { read16(ptr) };
            self.header[..8].copy_from_slice(&a.to_ne_bytes());
            self.header[8..].copy_from_slice(&b.to_ne_bytes());
        } else {
            for i in 0..n {
                // SAFETY: as above.
                self.header[self.header_have + i] = unsafe { ptr.add(i).read_volatile() };
            }
        }
        self.header_have += n;
        if self.header_have == HEADER {
            self.header_complete();
        }
    }
}

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// A read or write of the shape that nearly all have: header, data and status in a descriptor each, none across a border
/// of regions. `None`: anything else, and whatever is wrong.
#[inline]
fn parse_plain(
    limits: &Limits<'_>,
    hint: &mut usize,
    slots: &mut Slots,
    head: u16,
    first: &Desc,
) -> Option<Request> {
    let size = limits.ring.size();
    let (header, data, status) = if first.flags == DESC_INDIRECT {
        if first.len as usize != 3 * DESC_SIZE {
            return None;
        }
        let table = limits.memory.contiguous(hint, first.addr, u64::from(first.len))?;
        // SAFETY: the whole table of three is mapped.
        let [header, data, status] =
            [0, 1, 2].map(|i| unsafe { Desc::read(table.wrapping_add(i * DESC_SIZE)) });
        if header.next != 1 || data.next != 2 {
            return None;
        }
        (header, data, status)
    } else {
        if first.flags != DESC_NEXT || first.next >= size {
            return None;
        }
        let data = limits.ring.desc(first.next);
        if data.flags & DESC_NEXT == 0 || data.next >= size {
            return None;
        }
        (*first, data, limits.ring.desc(data.next))
    };
    let plain = header.flags == DESC_NEXT
        && header.len as usize == HEADER
        && data.flags & !DESC_WRITE == DESC_NEXT
        && status.flags == DESC_WRITE
        && status.len == 1;
    if !plain {
        return None;
    }
    let status = limits.memory.contiguous(hint, status.addr, 1)?;
    let ptr = limits.memory.contiguous(hint, data.addr, u64::from(data.len))?;
    let header = limits.memory.contiguous(hint, header.addr, HEADER as u64)?;
    // SAFETY: the lookup said that the header's bytes are mapped.
    let [kind, sector] = unsafe { read16(header) }.map(u64::from_le);
    let (kind, written) = match (kind as u32, data.flags & DESC_WRITE != 0) {
        (T_IN, true) => (Kind::In, data.len.checked_add(1)?),
        (T_OUT, false) if !limits.read_only => (Kind::Out, 1),
        _ => return None,
    };
    if !in_range(limits, sector, u64::from(data.len)) {
        return None;
    }
    let slot = slots.get(head);
    (slot.status, slot.written, slot.count) = (status, written, 0);
    let stored = slots.push(head, Seg { ptr, len: data.len });
    debug_assert!(stored, "an empty list has room");
    Some(Request {
        head,
        kind,
        sector,
        len: data.len,
        data: Payload::new(slots.segs(head)),
    })
}

/// Walks the chain of `head`, whose first descriptor is `first`. Fills the slot; its state is the queue's business.
#[inline]
pub(crate) fn parse(
    limits: &Limits<'_>,
    hint: &mut usize,
    slots: &mut Slots,
    head: u16,
    first: Desc,
) -> Parsed {
    if let Some(request) = parse_plain(limits, hint, slots, head, &first) {
        return Parsed::Request(request);
    }
    slots.get(head).count = 0;
    let mut walk = Walk::default();
    let complete = walk_chain(limits, hint, slots, head, first, &mut walk);
    let Some(status) = walk.last.filter(|_| complete) else {
        count(flaw_counter(
            limits.counters,
            walk.flaw.unwrap_or(Flaw::Malformed),
        ));
        return Parsed::Broken;
    };
    let slot = slots.get(head);
    slot.status = status;
    slot.written = 1;
    if walk.header_have < HEADER {
        walk.flaw(Flaw::Malformed);
    }
    if let Some(flaw) = walk.flaw {
        count(flaw_counter(limits.counters, flaw));
        return Parsed::Answer {
            status: IOERR,
            written: 0,
        };
    }
    decide(limits, slots, head, &walk)
}

fn flaw_counter(counters: &Counters, flaw: Flaw) -> &std::sync::atomic::AtomicU64 {
    match flaw {
        Flaw::Malformed => &counters.chains_malformed,
        Flaw::Unmapped => &counters.chains_unmapped,
        Flaw::TooLong => &counters.chains_too_long,
    }
}

/// Visits all descriptors. False if the chain has no end, so that no byte of it can be trusted to be the status.
#[inline]
fn walk_chain(
    limits: &Limits<'_>,
    hint: &mut usize,
    slots: &mut Slots,
    head: u16,
    first: Desc,
    walk: &mut Walk,
) -> bool {
    let size = limits.ring.size();
    let mut desc = first;
    for _ in 0..usize::from(size).min(DESCS_MAX) {
        if desc.flags & DESC_INDIRECT != 0 {
            if desc.flags & DESC_NEXT != 0 {
                return walk.endless(Flaw::Malformed);
            }
            return walk_table(limits, hint, slots, head, &desc, walk);
        }
        walk.take(limits, hint, slots, head, &desc);
        if desc.flags & DESC_NEXT == 0 {
            return true;
        }
        if desc.next >= size {
            return walk.endless(Flaw::Malformed);
        }
        desc = limits.ring.desc(desc.next);
    }
    walk.endless(Flaw::TooLong)
}

/// The same in an indirect table.
#[inline]
fn walk_table(
    limits: &Limits<'_>,
    hint: &mut usize,
    slots: &mut Slots,
    head: u16,
    table: &Desc,
    walk: &mut Walk,
) -> bool {
    let entries = table.len as usize / DESC_SIZE;
    if entries == 0 || !(table.len as usize).is_multiple_of(DESC_SIZE) || entries > usize::from(u16::MAX) + 1
    {
        return walk.endless(Flaw::Malformed);
    }
    let Some(base) = limits.memory.contiguous(hint, table.addr, u64::from(table.len)) else {
        return walk.endless(Flaw::Unmapped);
    };
    let mut at = 0;
    for _ in 0..entries.min(DESCS_MAX) {
        // SAFETY: `at` is below `entries`, and the whole table is mapped.
        let desc = unsafe { Desc::read(base.wrapping_add(at * DESC_SIZE)) };
        if desc.flags & DESC_INDIRECT != 0 {
            return walk.endless(Flaw::Malformed);
        }
        walk.take(limits, hint, slots, head, &desc);
        if desc.flags & DESC_NEXT == 0 {
            return true;
        }
        at = usize::from(desc.next);
        if at >= entries {
            return walk.endless(Flaw::Malformed);
        }
    }
    walk.endless(Flaw::TooLong)
}

/// Checks what the header asks for.
#[inline]
fn decide(limits: &Limits<'_>, slots: &mut Slots, head: u16, walk: &Walk) -> Parsed {
    let sector = u64::from_le_bytes(std::array::from_fn(|i| walk.header[8 + i]));
    let refuse = |counter, status| {
        count(counter);
        Parsed::Answer { status, written: 0 }
    };
    let request = |kind, sector, len, data| {
        Parsed::Request(Request {
            head,
            kind,
            sector,
            len,
            data,
        })
    };
    let counters = limits.counters;
    let changes = matches!(walk.kind(), T_OUT | T_DISCARD | T_WRITE_ZEROES);
    if changes && limits.read_only {
        return refuse(&counters.requests_read_only, IOERR);
    }
    match walk.kind() {
        T_IN => {
            // The last writable byte is the status, all before it is data.
            slots.pop_byte(head);
            let len = walk.data - 1;
            if !in_range(limits, sector, len) {
                return refuse(&counters.requests_out_of_range, IOERR);
            }
            slots.get(head).written = len as u32 + 1;
            request(Kind::In, sector, len as u32, Payload::new(slots.segs(head)))
        }
        T_OUT => {
            if !in_range(limits, sector, walk.data) {
                return refuse(&counters.requests_out_of_range, IOERR);
            }
            request(
                Kind::Out,
                sector,
                walk.data as u32,
                Payload::new(slots.segs(head)),
            )
        }
        T_FLUSH => request(Kind::Flush, 0, 0, Payload::NONE),
        T_GET_ID => {
            slots.pop_byte(head);
            let written = write_id(limits.serial, slots.segs(head));
            Parsed::Answer { status: OK, written }
        }
        kind @ (T_DISCARD | T_WRITE_ZEROES) => match copy_ranges(limits, slots, head, walk.data, kind) {
            Ok(n) => {
                let kind = if kind == T_DISCARD {
                    Kind::Discard
                } else {
                    Kind::WriteZeroes
                };
                request(kind, 0, n, Payload::NONE)
            }
            Err(UNSUPP) => refuse(&counters.requests_unsupported, UNSUPP),
            Err(status) => refuse(&counters.requests_out_of_range, status),
        },
        _ => refuse(&counters.requests_unsupported, UNSUPP),
    }
}

#[inline]
fn in_range(limits: &Limits<'_>, sector: u64, len: u64) -> bool {
    let sectors = limits.capacity_bytes / SECTOR;
    len > 0
        && len.is_multiple_of(SECTOR)
        && len <= REQUEST_BYTES_MAX
        && sector <= sectors
        && len / SECTOR <= sectors - sector
}

fn write_id(serial: &[u8], segs: &[Seg]) -> u32 {
    let mut id = [0u8; SERIAL_BYTES];
    let n = serial.len().min(SERIAL_BYTES);
    id[..n].copy_from_slice(&serial[..n]);
    let mut at = 0;
    for seg in segs {
        for i in 0..seg.len as usize {
            let Some(&byte) = id.get(at) else { return at as u32 };
            // SAFETY: segments name mapped memory that the driver gave for writing.
            unsafe { seg.ptr.add(i).write_volatile(byte) };
            at += 1;
        }
    }
    at as u32
}

/// Copies and checks the ranges of a request and leaves them in the slot. Returns how many.
#[cold]
fn copy_ranges(limits: &Limits<'_>, slots: &mut Slots, head: u16, bytes: u64, kind: u32) -> Result<u32, u8> {
    const RANGE: usize = size_of::<Range>();
    let n = bytes as usize / RANGE;
    if bytes == 0 || !bytes.is_multiple_of(RANGE as u64) || n > RANGES_MAX {
        return Err(IOERR);
    }
    let mut raw = [0u8; RANGES_MAX * RANGE];
    let mut at = 0;
    for seg in slots.segs(head) {
        for i in 0..seg.len as usize {
            // SAFETY: segments name mapped memory; `at` stays below `bytes`, which is the sum of their lengths.
            raw[at] = unsafe { seg.ptr.add(i).read_volatile() };
            at += 1;
        }
    }
    let out = slots.scratch(head).cast::<Range>();
    let sectors = limits.capacity_bytes / SECTOR;
    for (i, raw) in raw[..at].chunks_exact(RANGE).enumerate() {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| raw[at + i]));
        let range = Range {
            sector: u64::from(word(0)) | u64::from(word(4)) << 32,
            sectors: word(8),
            flags: word(12),
        };
        if range.flags & !1 != 0 || kind == T_DISCARD && range.flags != 0 {
            return Err(UNSUPP);
        }
        let inside = range.sector <= sectors && u64::from(range.sectors) <= sectors - range.sector;
        if range.sectors > RANGE_SECTORS_MAX || !inside {
            return Err(IOERR);
        }
        // SAFETY: the list of a slot has room for SEGS_MAX entries of 16 bytes, which is more than RANGES_MAX ranges.
        unsafe { out.add(i).write(range) };
    }
    Ok(n as u32)
}
