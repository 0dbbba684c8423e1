//! Checksums of blocks (CRC-32C, iSCSI polynomial) and the copies that are made together with them.
//!
//! A block is copied by our own plain vector loop and its checksum taken over the private copy right after, while it is
//! in the first-level cache: one pass over memory. `memcpy` of the C library is avoided on purpose: it falls to a
//! twentieth of its speed when source and target differ by a few bytes modulo 4096.
//!
//! Guest memory changes under us. It is therefore only ever a source or a target of [`copy`], whose accesses the
//! compiler can not see, never a Rust reference, and a checksum is never taken over guest memory itself but over the
//! private bytes copied from it or to it: what was summed is what was stored.

use crate::ids::BLOCK;
use crate::memory::Payload;

/// The checksum of private bytes.
#[inline]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// Private memory for one block.
#[repr(C, align(4096))]
struct BlockBuffer([u8; BLOCK]);

/// Copies `len` bytes. The two may differ in alignment; other threads and devices may be changing either of them, then
/// which bytes are copied is unknown, but nothing worse.
///
/// # Safety
/// `from` is mapped readable and `to` mapped writable for `len` bytes, they do not overlap, and no Rust reference to any
/// of these bytes is alive except one that gave `from` or `to`.
#[inline]
pub unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        let vectors = len & !127;
        if vectors > 0 {
            if std::arch::is_x86_feature_detected!("avx") {
                // SAFETY: the caller vouches for the ranges, AVX is there, `vectors` is a positive multiple of 128.
                unsafe { copy_avx(from, to, vectors) };
            } else {
                // SAFETY: likewise; SSE2 is part of the architecture.
                unsafe { copy_sse2(from, to, vectors) };
            }
        }
        if len > vectors {
            // SAFETY: the rest of the same ranges.
            unsafe { copy_bytes(from.add(vectors), to.add(vectors), len - vectors) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    // SAFETY: the caller's obligations. Volatile accesses are made once each and as they stand here.
    unsafe {
        let mut at = 0;
        if (from as usize | to as usize) % 8 == 0 {
            while at + 8 <= len {
                to.add(at)
                    .cast::<u64>()
                    .write_volatile(from.add(at).cast::<u64>().read_volatile());
                at += 8;
            }
        }
        while at < len {
            to.add(at).write_volatile(from.add(at).read_volatile());
            at += 1;
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_avx(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: reads and writes exactly `len` bytes (a positive multiple of 128) of ranges the caller vouches for; the
    // registers it changes are declared.
    unsafe {
        std::arch::asm!(
            "2:",
            "vmovdqu ymm0, [{from} + {at}]",
            "vmovdqu ymm1, [{from} + {at} + 32]",
            "vmovdqu ymm2, [{from} + {at} + 64]",
            "vmovdqu ymm3, [{from} + {at} + 96]",
            "vmovdqu [{to} + {at}], ymm0",
            "vmovdqu [{to} + {at} + 32], ymm1",
            "vmovdqu [{to} + {at} + 64], ymm2",
            "vmovdqu [{to} + {at} + 96], ymm3",
            "add {at}, 128",
            "jnz 2b",
            "vzeroupper",
            from = in(reg) from.wrapping_add(len),
            to = in(reg) to.wrapping_add(len),
            at = inout(reg) (len as isize).wrapping_neg() => _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
            out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
            out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(nostack),
        );
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn stream_avx(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: as in `copy_avx`; `to` is a multiple of 32 (the caller looked).
    unsafe {
        std::arch::asm!(
            "2:",
            "vmovdqu ymm0, [{from} + {at}]",
            "vmovdqu ymm1, [{from} + {at} + 32]",
            "vmovdqu ymm2, [{from} + {at} + 64]",
            "vmovdqu ymm3, [{from} + {at} + 96]",
            "vmovntdq [{to} + {at}], ymm0",
            "vmovntdq [{to} + {at} + 32], ymm1",
            "vmovntdq [{to} + {at} + 64], ymm2",
            "vmovntdq [{to} + {at} + 96], ymm3",
            "add {at}, 128",
            "jnz 2b",
            "vzeroupper",
            from = in(reg) from.wrapping_add(len),
            to = in(reg) to.wrapping_add(len),
            at = inout(reg) (len as isize).wrapping_neg() => _,
            out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
            out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
            out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
            out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
            options(nostack),
        );
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_sse2(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: as in `copy_avx`.
    unsafe {
        std::arch::asm!(
            "2:",
            "movdqu xmm0, [{from} + {at}]",
            "movdqu xmm1, [{from} + {at} + 16]",
            "movdqu xmm2, [{from} + {at} + 32]",
            "movdqu xmm3, [{from} + {at} + 48]",
            "movdqu [{to} + {at}], xmm0",
            "movdqu [{to} + {at} + 16], xmm1",
            "movdqu [{to} + {at} + 32], xmm2",
            "movdqu [{to} + {at} + 48], xmm3",
            "add {at}, 64",
            "jnz 2b",
            from = in(reg) from.wrapping_add(len),
            to = in(reg) to.wrapping_add(len),
            at = inout(reg) (len as isize).wrapping_neg() => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            options(nostack),
        );
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_bytes(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: reads and writes exactly `len` bytes of ranges the caller vouches for; the direction flag is clear by the
    // calling convention.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// Copies one block into private memory and returns the checksum of the copy. For writes: `from` may be guest memory.
///
/// # Safety
/// As [`copy`] for 4096 bytes; nobody else changes `to`.
#[inline]
pub unsafe fn copy_block_in(from: *const u8, to: *mut u8) -> u32 {
    // SAFETY: the caller's obligations; after the copy `to` is initialised, private and unchanging.
    unsafe {
        copy(from, to, BLOCK);
        crc32c(std::slice::from_raw_parts(to, BLOCK))
    }
}

/// Copies one block out of private memory and returns its checksum. For reads: `to` may be guest memory.
///
/// # Safety
/// As [`copy`] for 4096 bytes; nobody changes `from`.
#[inline]
pub unsafe fn copy_block_out(from: *const u8, to: *mut u8) -> u32 {
    // SAFETY: the caller's obligations; `from` is private and unchanging.
    unsafe {
        copy(from, to, BLOCK);
        crc32c(std::slice::from_raw_parts(from, BLOCK))
    }
}

/// Copies the first `len` bytes of a payload to private memory.
///
/// # Safety
/// As [`copy`] for every piece; the payload is alive and at least `len` bytes long.
#[inline]
pub unsafe fn gather(from: Payload, len: usize, to: *mut u8) {
    let mut at = 0;
    // SAFETY: the caller keeps the payload; the pieces add up to at most `len`.
    let missing = unsafe {
        from.pieces(len, |piece, n| {
            copy(piece, to.wrapping_add(at), n);
            at += n;
        })
    };
    assert_eq!(missing, 0, "payload shorter than its request");
}

/// As [`gather`], but past the caches: for a target so large that it will not be read again soon. A plain store fetches
/// each line of the target from memory only to overwrite it; this one does not. This thread sees what it wrote at once,
/// any other only after [`stream_fence`].
///
/// # Safety
/// As [`gather`].
#[inline]
pub unsafe fn gather_streaming(from: Payload, len: usize, to: *mut u8) {
    let mut at = 0;
    // SAFETY: the caller keeps the payload; the pieces add up to at most `len`.
    let missing = unsafe {
        from.pieces(len, |piece, n| {
            stream(piece, to.wrapping_add(at), n);
            at += n;
        })
    };
    assert_eq!(missing, 0, "payload shorter than its request");
}

/// Copies past the caches where that can be done.
///
/// # Safety
/// As [`copy`].
#[inline]
unsafe fn stream(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if len > 0
        && len.is_multiple_of(128)
        && to.addr().is_multiple_of(32)
        && std::arch::is_x86_feature_detected!("avx")
    {
        // SAFETY: the caller vouches for the ranges; length, alignment and AVX were just looked at.
        return unsafe { stream_avx(from, to, len) };
    }
    // SAFETY: the caller's obligations.
    unsafe { copy(from, to, len) }
}

/// What this thread wrote by [`gather_streaming`] comes before whatever it writes from now on, for all threads.
#[inline]
pub fn stream_fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a fence touches no memory, and every processor of this architecture has it.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Copies `len` private bytes to the beginning of a payload.
///
/// # Safety
/// As [`gather`].
#[inline]
pub unsafe fn scatter(from: *const u8, to: Payload, len: usize) {
    let mut at = 0;
    // SAFETY: as in `gather`.
    let missing = unsafe {
        to.pieces(len, |piece, n| {
            copy(from.wrapping_add(at), piece, n);
            at += n;
        })
    };
    assert_eq!(missing, 0, "payload shorter than its request");
}

/// Copies `crcs.len()` blocks of a payload to private memory, with the checksum of each copy.
///
/// # Safety
/// As [`gather`]; nobody else changes `to`.
#[inline]
pub unsafe fn copy_in(from: Payload, to: *mut u8, crcs: &mut [u32]) {
    for (i, crc) in crcs.iter_mut().enumerate() {
        let (source, target) = (from.advance(i * BLOCK), to.wrapping_add(i * BLOCK));
        // SAFETY: the caller's obligations, block by block.
        unsafe {
            match source.contiguous(BLOCK) {
                Some(piece) => copy(piece.as_ptr(), target, BLOCK),
                None => gather(source, BLOCK, target),
            }
            *crc = crc32c(std::slice::from_raw_parts(target, BLOCK));
        }
    }
}

/// Copies `crcs.len()` private blocks to a payload, with the checksum of each.
///
/// # Safety
/// As [`scatter`]; nobody changes `from`.
#[inline]
pub unsafe fn copy_out(from: *const u8, to: Payload, crcs: &mut [u32]) {
    for (i, crc) in crcs.iter_mut().enumerate() {
        let (source, target) = (from.wrapping_add(i * BLOCK), to.advance(i * BLOCK));
        // SAFETY: the caller's obligations, block by block.
        unsafe {
            match target.contiguous(BLOCK) {
                Some(piece) => copy(source, piece.as_ptr(), BLOCK),
                None => scatter(source, target, BLOCK),
            }
            *crc = crc32c(std::slice::from_raw_parts(source, BLOCK));
        }
    }
}

/// The checksums of `crcs.len()` blocks of a payload that may be guest memory: each is copied aside first.
///
/// # Safety
/// As [`gather`].
pub unsafe fn sums(of: Payload, crcs: &mut [u32]) {
    let mut aside = std::mem::MaybeUninit::<BlockBuffer>::uninit();
    // SAFETY: the caller's obligations for the payload; the buffer is private and as large as one block.
    unsafe {
        for (i, crc) in crcs.iter_mut().enumerate() {
            copy_in(
                of.advance(i * BLOCK),
                aside.as_mut_ptr().cast(),
                std::slice::from_mut(crc),
            );
        }
    }
}

#[cfg(test)]
#[path = "checksum_tests.rs"]
mod tests;
