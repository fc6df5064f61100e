//! The archive of a container's changes: what the guest's overlay has in its upper directory, as the
//! agent sends it on a stream of [`crate::stream::Kind::Changes`] and the shim's helper applies it.
//!
//! A tar archive of pairs: a PAX header (`x`) whose records say everything that a name or an
//! attribute can be, then the entry itself. Of the entry's own header only type, mode, owner and
//! size count. What the tar format leaves open:
//!
//! * Paths are relative; the first is `.`, the upper directory itself. Each is greater than the one
//!   before, compared component by component: parents come before what is in them, nothing comes twice.
//! * A whiteout is a character device 0:0, an opaque directory has `trusted.overlay.opaque` = `y`.
//! * A file with holes is sent without them: [`SPARSE_SIZE`] is its length and [`SPARSE_MAP`] the
//!   offsets and lengths of its data, in order (GNU tar's PAX format 0.1).
//! * The archive ends with a global header (`g`): [`END`], or [`FAILED`] with the reason. One
//!   that just stops is incomplete. [`SKIPPED`] counts what could not be sent.

/// A path, and the target of a link.
pub const PATH: &str = "path";
pub const LINK: &str = "linkpath";
/// Seconds since the epoch, which may be negative, a point, and nanoseconds to add, nine digits.
pub const MTIME: &str = "mtime";
/// Followed by the attribute's name.
pub const XATTR: &str = "SCHILY.xattr.";
pub const SPARSE_SIZE: &str = "GNU.sparse.size";
pub const SPARSE_MAP: &str = "GNU.sparse.map";
pub const END: &str = "SPORE.end";
pub const FAILED: &str = "SPORE.failed";
pub const SKIPPED: &str = "SPORE.skipped";

/// An opaque directory's attribute.
pub const OPAQUE: &str = "trusted.overlay.opaque";
/// Most bytes of one entry's records: all attributes that a file can have.
pub const MAX_RECORDS: usize = 1 << 20;
/// Most pieces of data of one file; smaller holes are sent as zeroes beyond that.
pub const MAX_PIECES: usize = 4096;
/// Most bytes of a path, and of one name in it.
pub const MAX_PATH: usize = 4095;
pub const MAX_NAME: usize = 255;
pub const BLOCK: usize = 512;

/// Whether the attribute is one that is exported.
pub fn is_exported(name: &[u8]) -> bool {
    name.starts_with(b"user.") || name == b"security.capability" || name == OPAQUE.as_bytes()
}

/// Adds a record: its own length in decimal, a space, `key=value` and a line feed.
pub fn push_record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// The next record and what follows it; `None` for bytes that are none.
pub fn next_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(8).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    let record = bytes.get(space + 1..length)?;
    let (end, record) = record.split_last()?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    (*end == b'\n').then(|| (&record[..equals], &record[equals + 1..], &bytes[length..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_any_bytes_and_length_are_read_back() {
        for length in [0, 1, 83, 84, 85, 86, 90, 980, 990, 1000, 70_000] {
            let value: Vec<u8> = (0..=u8::MAX).cycle().take(length).collect();
            let mut records = Vec::new();
            push_record(&mut records, b"key", &value);
            push_record(&mut records, b"other", b"\n=1");
            let (key, found, rest) = next_record(&records).unwrap();
            assert_eq!((key, found), (b"key".as_slice(), value.as_slice()));
            assert_eq!(next_record(rest).unwrap(), (b"other".as_slice(), b"\n=1".as_slice(), [].as_slice()));
        }
    }

    #[test]
    fn what_is_no_record_is_none() {
        for bytes in
            ["", "5", "5 a=", "9 a=b\n", "6 a=b.", "0 a=b\n", "2 a=b\n", "5 abc\n", "99999999999 a=b\n"]
        {
            assert_eq!(next_record(bytes.as_bytes()), None, "{bytes}");
        }
    }
}
