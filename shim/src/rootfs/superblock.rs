//! The superblock of an EROFS image (the kernel's `erofs_fs.h`), as far as it tells whether a
//! file is what it was when it was made.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const AT: u64 = 1024;
const LENGTH: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
const CHECKSUM_AT: usize = 4;
const COMPATIBLE_FEATURES_AT: usize = 8;
const BLOCK_BITS_AT: usize = 12;
const BLOCKS_AT: usize = 36;
const FEATURE_CHECKSUM: u32 = 1;
/// CRC-32C, reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Whether the file claims to be an EROFS image.
pub(super) fn has_magic(path: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(path).and_then(|file| file.read_exact_at(&mut magic, AT)).is_ok()
        && u32::from_le_bytes(magic) == MAGIC
}

/// Opens an image whose superblock is sound and whose length it states truly. A longer file
/// is sound: the erofs snapshotter appends the layer's data.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let bad = |detail: String| io::Error::new(io::ErrorKind::InvalidData, detail);
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut superblock = [0; LENGTH];
    match file.read_exact_at(&mut superblock, AT) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(bad(format!("not an EROFS file system: {length} bytes")));
        }
        other => other?,
    }
    if word(&superblock, 0) != MAGIC {
        return Err(bad("not an EROFS file system".into()));
    }
    let (bits, blocks) = (superblock[BLOCK_BITS_AT], word(&superblock, BLOCKS_AT));
    if !(9..=16).contains(&bits) || blocks == 0 {
        return Err(bad(format!("damaged: {blocks} blocks of 2^{bits} bytes")));
    }
    let stated = u64::from(blocks) << bits;
    if stated > length {
        return Err(bad(format!("truncated: {length} bytes, the superblock states {stated}")));
    }
    if word(&superblock, COMPATIBLE_FEATURES_AT) & FEATURE_CHECKSUM != 0 {
        let (found, computed) = (word(&superblock, CHECKSUM_AT), checksum(&file, 1 << bits)?);
        if found != computed {
            return Err(bad(format!(
                "damaged: the superblock's checksum is {found:08x}, of its content {computed:08x}"
            )));
        }
    }
    Ok(file)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Of the rest of the superblock's block, with the checksum's own field zero; without the
/// customary final inversion, as `erofs_superblock_csum_verify` has it.
fn checksum(file: &File, block: usize) -> io::Result<u32> {
    let start = usize::try_from(AT).unwrap_or(0);
    let mut bytes = vec![0; if block > start { block - start } else { block }];
    file.read_exact_at(&mut bytes, AT)?;
    bytes[CHECKSUM_AT..CHECKSUM_AT + 4].fill(0);
    Ok(crc32c(u32::MAX, &bytes))
}

/// Bit by bit: a few KiB of one block, once for each image that is opened.
fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two blocks of 4 KiB with a true checksum.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 8192];
        let start = 1024;
        let mut put = |at: usize, value: u32| {
            image[start + at..start + at + 4].copy_from_slice(&value.to_le_bytes());
        };
        put(0, MAGIC);
        put(COMPATIBLE_FEATURES_AT, FEATURE_CHECKSUM);
        put(BLOCK_BITS_AT, 12);
        put(BLOCKS_AT, 2);
        let sum = crc32c(u32::MAX, &image[start..4096]);
        image[start + CHECKSUM_AT..start + CHECKSUM_AT + 4].copy_from_slice(&sum.to_le_bytes());
        image
    }

    fn refusal(image: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), image).unwrap();
        open(file.path()).unwrap_err().to_string()
    }

    #[test]
    fn the_checksum_is_crc32c() {
        // The check value of the catalogue of CRCs, which has the final inversion.
        assert_eq!(!crc32c(u32::MAX, b"123456789"), 0xe306_9283);
    }

    #[test]
    fn what_mkfs_erofs_makes_is_sound_and_any_flipped_bit_of_its_first_block_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, path) = (dir.path().join("tree"), dir.path().join("x.erofs"));
        std::fs::create_dir(&tree).unwrap();
        std::fs::write(tree.join("file"), vec![7; 10_000]).unwrap();
        let output =
            std::process::Command::new("/usr/bin/mkfs.erofs").arg(&path).arg(&tree).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        open(&path).unwrap();
        assert!(has_magic(&path));
        let sound = std::fs::read(&path).unwrap();
        for at in [1028, 1040, 1100, 1300, 4095] {
            let mut image = sound.clone();
            image[at] ^= 4;
            assert!(refusal(&image).contains("damaged"), "byte {at}");
        }
        let message = refusal(&sound[..sound.len() - 1]);
        assert!(message.contains("truncated"), "{message}");
    }

    #[test]
    fn truncated_and_foreign_files_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), image()).unwrap();
        open(file.path()).unwrap();
        assert!(refusal(&image()[..4096]).contains("truncated: 4096 bytes, the superblock states 8192"));
        assert!(refusal(&[0; 8192]).contains("not an EROFS"));
        assert!(refusal(b"torn").contains("not an EROFS file system: 4 bytes"));
        let mut blockless = image();
        blockless[1024 + BLOCKS_AT] = 0;
        assert!(refusal(&blockless).contains("damaged: 0 blocks"));
        let mut unsigned = image();
        unsigned[1024 + COMPATIBLE_FEATURES_AT] = 0;
        unsigned[1500] = 1;
        std::fs::write(file.path(), unsigned).unwrap();
        open(file.path()).unwrap();
    }
}
