//! Differential tests of the checksum and of every copy against the obvious way to do it.

use super::*;
use crate::memory::Seg;
use proptest::prelude::*;

/// CRC-32C by its definition, a bit at a time.
fn bitwise(bytes: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
        }
    }
    !crc
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

/// Cuts `bytes` where `cuts` says (modulo its length) and names the pieces.
fn cut(bytes: &mut [u8], cuts: &[usize]) -> Vec<Seg> {
    let len = bytes.len();
    let mut at: Vec<usize> = cuts.iter().map(|cut| cut % (len + 1)).chain([0, len]).collect();
    at.sort_unstable();
    at.windows(2)
        .map(|w| Seg {
            ptr: bytes.as_mut_ptr().wrapping_add(w[0]),
            len: (w[1] - w[0]) as u32,
        })
        .collect()
}

#[test]
fn known_vectors() {
    // From RFC 3720, B.4.
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
    assert_eq!(bitwise(b"123456789"), 0xe306_9283);
}

proptest! {
    #[test]
    fn checksum_is_the_definition(seed: u64, skew in 0usize..64, len in 0usize..5000) {
        let bytes = noise(seed, skew + len);
        prop_assert_eq!(crc32c(&bytes[skew..]), bitwise(&bytes[skew..]));
    }

    #[test]
    fn copy_copies_exactly_its_range(seed: u64, from in 0usize..200, to in 0usize..200, len in 0usize..9000) {
        let source = noise(seed, from + len);
        let mut target = vec![0xa5; to + len + 200];
        // SAFETY: both vectors are long enough and nobody else uses them.
        unsafe { copy(source.as_ptr().add(from), target.as_mut_ptr().add(to), len) };
        prop_assert_eq!(&target[to..to + len], &source[from..]);
        prop_assert!(target[..to].iter().chain(&target[to + len..]).all(|&byte| byte == 0xa5));
    }

    #[test]
    fn the_fallback_copies_the_same(seed: u64, from in 0usize..70, to in 0usize..70, vectors in 1usize..60) {
        let len = vectors * 128;
        let source = noise(seed, from + len);
        let mut target = vec![0xa5; to + len + 70];
        #[cfg(target_arch = "x86_64")]
        // SAFETY: both vectors are long enough and nobody else uses them; the length is a multiple of 128.
        unsafe { copy_sse2(source.as_ptr().add(from), target.as_mut_ptr().add(to), len) };
        #[cfg(not(target_arch = "x86_64"))]
        // SAFETY: as above.
        unsafe { copy(source.as_ptr().add(from), target.as_mut_ptr().add(to), len) };
        prop_assert_eq!(&target[to..to + len], &source[from..]);
        prop_assert!(target[..to].iter().chain(&target[to + len..]).all(|&byte| byte == 0xa5));
    }

    #[test]
    fn scattered_blocks_come_and_go_whole(
        seed: u64,
        blocks in 1usize..5,
        skip in 0usize..600,
        cuts in prop::collection::vec(0usize..30_000, 0..12),
    ) {
        let len = blocks * BLOCK;
        let mut guest = noise(seed, skip + len);
        let expected = guest[skip..].to_vec();
        let sums_expected: Vec<u32> = expected.chunks(BLOCK).map(bitwise).collect();
        let segs = cut(&mut guest, &cuts);
        let payload = Payload::new(&segs).advance(skip);

        let mut private = vec![0u8; len];
        let mut crcs = vec![0; blocks];
        // SAFETY: `segs` and both vectors outlive the calls, are large enough and used by nobody else.
        unsafe { copy_in(payload, private.as_mut_ptr(), &mut crcs) };
        prop_assert_eq!(&private, &expected);
        prop_assert_eq!(&crcs, &sums_expected);

        crcs.fill(0);
        // SAFETY: as above.
        unsafe { sums(payload, &mut crcs) };
        prop_assert_eq!(&crcs, &sums_expected);

        private.fill(0);
        // SAFETY: as above; whatever the target's alignment.
        unsafe { gather_streaming(payload, len, private.as_mut_ptr()) };
        stream_fence();
        prop_assert_eq!(&private, &expected);
        let mut aligned = Box::new(BlockBuffer([0; BLOCK]));
        // SAFETY: as above; one block.
        unsafe { gather_streaming(payload, BLOCK, aligned.0.as_mut_ptr()) };
        prop_assert_eq!(&aligned.0[..], &expected[..BLOCK]);

        let other = noise(!seed, len);
        // SAFETY: as above.
        unsafe { copy_out(other.as_ptr(), payload, &mut crcs) };
        prop_assert_eq!(&guest[skip..], &other[..]);
        prop_assert_eq!(crcs, other.chunks(BLOCK).map(bitwise).collect::<Vec<_>>());
    }
}
