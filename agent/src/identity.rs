//! What tells this boot from every other. A guest that is restored from a template shares its
//! kernel's boot id with all others of that template, so containers see another file in its place.

use std::io;
use std::path::Path;

/// Mounted over [`KERNELS`] in every container that has a `/proc`.
pub(crate) const BOOT_ID: &str = "/run/spore/boot-id";
/// random(4).
pub(crate) const KERNELS: &str = "/proc/sys/kernel/random/boot_id";

/// Makes a new boot id from the kernel's random numbers: called when these have been reseeded.
/// The file stays the same one, so that it changes in containers that run.
pub(crate) fn renew(at: &Path) -> io::Result<()> {
    let mut random = [0; 16];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut random)?;
    if let Some(dir) = at.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(at, uuid(random) + "\n")
}

/// RFC 9562, section 5.4: a version 4 UUID.
fn uuid(mut bytes: [u8; 16]) -> String {
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_id_is_a_random_uuid_with_a_newline_as_the_kernels() {
        assert_eq!(uuid([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/boot-id");
        renew(&path).unwrap();
        let first = std::fs::read_to_string(&path).unwrap();
        renew(&path).unwrap();
        let second = std::fs::read_to_string(&path).unwrap();
        assert_eq!((first.len(), first.ends_with('\n')), (37, true));
        assert_ne!(first, second);
    }
}
