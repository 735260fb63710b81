//! FNV-1a with 64 bits: a hash that is the same in every process, on every machine and in every language. It guards against
//! nobody who looks for collisions.

/// The hash of nothing.
pub(crate) const START: u64 = 0xcbf2_9ce4_8422_2325;

/// The hash of what `hash` is of, with these bytes after it.
pub(crate) fn add(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
