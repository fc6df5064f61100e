//! Limits of the Files service, which both sides keep: see `proto/spore/agent/v1/files.proto`.

/// Longest path, and target of a link, in bytes.
pub const MAX_PATH: usize = 4095;
/// Longest name of a directory's entry in bytes.
pub const MAX_NAME: usize = 255;
/// Most bytes of a file in one call. A frame of ttrpc holds 4 MiB.
pub const MAX_CHUNK: usize = 1024 * 1024;
/// Most entries of a directory in one answer.
pub const MAX_ENTRIES: usize = 2048;
/// Longest path of an event in bytes.
pub const MAX_EVENT_PATH: usize = 8192;
/// Permission bits with the set-id and sticky ones.
pub const MODE_BITS: u32 = 0o7777;

/// Whether a name can stand in a directory: what comes from the other side and cannot is never
/// put behind a path.
pub fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name != b"."
        && name != b".."
        && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_component_and_goes_nowhere() {
        for good in [&b"a"[..], b"...", b" ", b"-rf", b"\xff", b"a\nb", &[b'x'; MAX_NAME]] {
            assert!(is_name(good), "{}", good.escape_ascii());
        }
        for bad in [&b""[..], b".", b"..", b"../x", b"/etc", b"a/b", b"a/", b"a\0b", &[b'x'; MAX_NAME + 1]] {
            assert!(!is_name(bad), "{}", bad.escape_ascii());
        }
    }
}
