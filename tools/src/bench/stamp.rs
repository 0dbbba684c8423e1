//! Blocks that tell what they are: each 4 KiB carries its address, a sequence number and a seed, and the rest follows from
//! these, so that any other content is noticed.

/// Unit of stamping, bytes.
pub(crate) const BLOCK: usize = 4096;

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Stamps one block.
pub(crate) fn fill(block: &mut [u8], address: u64, sequence: u64, seed: u64) {
    let mut word = mix(address ^ mix(sequence ^ mix(seed)));
    for (i, chunk) in block.chunks_exact_mut(8).enumerate() {
        let value = match i {
            0 => address,
            1 => sequence,
            2 => seed,
            _ => {
                word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
                mix(word)
            }
        };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
}

/// The sequence number of a block that is stamped for this address and seed; `None` if it is anything else.
pub(crate) fn check(block: &[u8], address: u64, seed: u64) -> Option<u64> {
    let sequence = u64::from_le_bytes(block.get(8..16)?.try_into().ok()?);
    let mut expected = [0u8; BLOCK];
    fill(&mut expected, address, sequence, seed);
    (block == expected).then_some(sequence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_block_is_taken() {
        let mut block = [0u8; BLOCK];
        fill(&mut block, 8192, 3, 9);
        assert_eq!(check(&block, 8192, 9), Some(3));
        assert_eq!(check(&block, 4096, 9), None, "another address");
        assert_eq!(check(&block, 8192, 8), None, "another seed");
        for at in (0..BLOCK).step_by(97) {
            block[at] ^= 1;
            assert_eq!(check(&block, 8192, 9), None, "byte {at}");
            block[at] ^= 1;
        }
    }
}
