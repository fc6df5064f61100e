//! Bytes that both sides can compute: the test on the host and the guest (which includes
//! this very file).

/// Fills `bytes` with the pattern `seed` as it stands from `offset` on.
pub fn fill(seed: u64, offset: u64, bytes: &mut [u8]) {
    let mut word = offset / 8;
    let mut value = mix(seed, word).to_le_bytes();
    for (index, byte) in bytes.iter_mut().enumerate() {
        let at = offset + index as u64;
        if at / 8 != word {
            word = at / 8;
            value = mix(seed, word).to_le_bytes();
        }
        *byte = value[(at % 8) as usize];
    }
}

/// SplitMix64: neighbouring words share nothing.
fn mix(seed: u64, word: u64) -> u64 {
    let mut z = seed.wrapping_add(word.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
