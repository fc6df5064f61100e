//! `/proc/self/mountinfo` (proc(5)): what is mounted where.

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The mounted part of the file system, `/` for all of it.
    pub(crate) root: PathBuf,
    pub(crate) mount_point: PathBuf,
    pub(crate) fs_type: String,
    /// The file system's own options, still escaped.
    pub(crate) super_options: String,
}

/// Parses the whole file; lines that are not understood are skipped.
pub(crate) fn parse(text: &str) -> Vec<Entry> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Entry> {
    let (head, tail) = line.split_once(" - ")?;
    let mut head = head.split(' ');
    let root = head.nth(3)?;
    let mount_point = head.next()?;
    let mut tail = tail.split(' ');
    let fs_type = tail.next()?;
    let super_options = tail.nth(1).unwrap_or("");
    Some(Entry {
        root: PathBuf::from(unescape(root)),
        mount_point: PathBuf::from(unescape(mount_point)),
        fs_type: fs_type.into(),
        super_options: super_options.into(),
    })
}

/// The uppermost mount on exactly `path`.
pub(crate) fn find<'a>(entries: &'a [Entry], path: &Path) -> Option<&'a Entry> {
    entries.iter().rev().find(|entry| entry.mount_point == path)
}

/// Decodes the octal escapes (`\040`) that the kernel writes for blanks and backslashes.
pub(crate) fn unescape(text: &str) -> std::ffi::OsString {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|digits| bytes[at] == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        match octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    std::ffi::OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uppermost_mount_on_the_path_is_found() {
        let text = "\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 22 0:35 / /var/lib/docker/overlay2/ab\\040c/merged rw,relatime shared:1 master:2 - overlay overlay rw,lowerdir=/l/A:/l/B,upperdir=/d,workdir=/w
41 22 0:36 /sub /mnt rw - tmpfs none rw,size=1k
nonsense
42 22 0:37 / /mnt rw - overlay overlay rw,lowerdir=/x";
        let entries = parse(text);
        assert_eq!(entries.len(), 4);
        let docker = find(&entries, Path::new("/var/lib/docker/overlay2/ab c/merged")).unwrap();
        assert_eq!(docker.fs_type, "overlay");
        assert_eq!(docker.super_options, "rw,lowerdir=/l/A:/l/B,upperdir=/d,workdir=/w");
        assert_eq!(find(&entries, Path::new("/mnt")).unwrap().fs_type, "overlay");
        assert_eq!(entries[2].root, Path::new("/sub"));
        assert!(find(&entries, Path::new("/mnt/")).is_some(), "paths are compared by component");
        assert!(find(&entries, Path::new("/mn")).is_none());
    }

    #[test]
    fn escapes_are_decoded_and_stray_backslashes_kept() {
        assert_eq!(unescape("a\\040b\\134c\\"), "a b\\c\\");
        assert_eq!(unescape("\\04"), "\\04");
    }
}
