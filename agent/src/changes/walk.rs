//! One directory tree as an archive of changes. Nothing changes the tree meanwhile: the container
//! is frozen or has ended.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use spore_agent_api::changes::{
    BLOCK, END, FAILED, LINK, MAX_PATH, MAX_PIECES, MAX_RECORDS, MTIME, PATH, SKIPPED, SPARSE_MAP,
    SPARSE_SIZE, XATTR, is_exported, push_record,
};
use tar::{EntryType, Header};

/// Bytes of an attribute's value, or of all names, that the kernel gives at most.
const MAX_XATTR: usize = 64 * 1024;

/// Why an archive ends before its time.
#[derive(Debug, thiserror::Error)]
enum WalkError {
    /// Said in the archive.
    #[error("{path}: {source}")]
    Read { path: String, source: io::Error },
    /// Nothing more can be said.
    #[error(transparent)]
    Broken(#[from] io::Error),
}

/// A piece of data: its offset and its length.
type Piece = (u64, u64);

struct Walk<'a, W> {
    upper: &'a Path,
    out: W,
    /// Where a file with several names was first.
    links: HashMap<(u64, u64), PathBuf>,
    skipped: u64,
}

/// Writes `upper` to `out`. Fails when `out` does; what cannot be read is told in the archive.
pub(super) fn archive(upper: &Path, out: impl Write) -> io::Result<()> {
    let mut walk = Walk { upper, out, links: HashMap::new(), skipped: 0 };
    let mut records = Vec::new();
    match walk.tree() {
        Ok(()) => push_record(&mut records, END.as_bytes(), b""),
        Err(WalkError::Broken(error)) => return Err(error),
        Err(error @ WalkError::Read { .. }) => {
            push_record(&mut records, FAILED.as_bytes(), error.to_string().as_bytes());
        }
    }
    push_record(&mut records, SKIPPED.as_bytes(), walk.skipped.to_string().as_bytes());
    walk.records(EntryType::XGlobalHeader, &records)
}

impl<W: Write> Walk<'_, W> {
    fn tree(&mut self) -> Result<(), WalkError> {
        let root = fs::symlink_metadata(self.upper).map_err(read(Path::new(".")))?;
        self.directory(Path::new("."), &root)?;
        // Of each directory on the way down what is still to come, last first.
        let mut open = vec![(PathBuf::new(), self.names(Path::new(""))?)];
        while let Some((directory, names)) = open.last_mut() {
            let Some(name) = names.pop() else {
                open.pop();
                continue;
            };
            let path = directory.join(name);
            if path.as_os_str().len() > MAX_PATH {
                return Err(read(&path)(Errno::NAMETOOLONG.into()));
            }
            let metadata = fs::symlink_metadata(self.upper.join(&path)).map_err(read(&path))?;
            if metadata.is_dir() {
                self.directory(&path, &metadata)?;
                let names = self.names(&path)?;
                open.push((path, names));
            } else {
                self.other(&path, &metadata)?;
            }
        }
        Ok(())
    }

    /// In falling order, for they are taken from the end.
    fn names(&self, path: &Path) -> Result<Vec<OsString>, WalkError> {
        let list = || -> io::Result<Vec<_>> {
            fs::read_dir(self.upper.join(path))?.map(|entry| Ok(entry?.file_name())).collect()
        };
        let mut names = list().map_err(read(path))?;
        names.sort_unstable_by(|a, b| b.as_bytes().cmp(a.as_bytes()));
        Ok(names)
    }

    fn directory(&mut self, path: &Path, metadata: &Metadata) -> Result<(), WalkError> {
        let mut records = about(path, metadata);
        self.attributes(path, &mut records)?;
        self.entry(path, EntryType::Directory, metadata, 0, &records)
    }

    fn other(&mut self, path: &Path, metadata: &Metadata) -> Result<(), WalkError> {
        let kind = metadata.file_type();
        let mut records = about(path, metadata);
        if kind.is_file() {
            if metadata.nlink() > 1 {
                let first = self.links.entry((metadata.dev(), metadata.ino())).or_insert_with(|| path.into());
                if first != path {
                    push_record(&mut records, LINK.as_bytes(), first.as_os_str().as_bytes());
                    return self.entry(path, EntryType::Link, metadata, 0, &records);
                }
            }
            return self.file(path, metadata, records);
        }
        if kind.is_symlink() {
            let target = fs::read_link(self.upper.join(path)).map_err(read(path))?;
            push_record(&mut records, LINK.as_bytes(), target.as_os_str().as_bytes());
            return self.entry(path, EntryType::Symlink, metadata, 0, &records);
        }
        if kind.is_char_device() && metadata.rdev() == 0 {
            return self.entry(path, EntryType::Char, metadata, 0, &records);
        }
        if kind.is_fifo() {
            return self.entry(path, EntryType::Fifo, metadata, 0, &records);
        }
        // Device nodes would be the host's, and sockets are nothing without their process.
        self.skipped += 1;
        Ok(())
    }

    fn file(&mut self, path: &Path, metadata: &Metadata, mut records: Vec<u8>) -> Result<(), WalkError> {
        self.attributes(path, &mut records)?;
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let opened = fs::OpenOptions::new().read(true).custom_flags(flags).open(self.upper.join(path));
        let mut file = opened.map_err(read(path))?;
        let length = metadata.len();
        let pieces = merged(pieces(&file, length).map_err(read(path))?, MAX_PIECES);
        let size = pieces.iter().map(|(_, length)| length).sum();
        if size != length {
            let map: Vec<_> = pieces.iter().map(|(offset, length)| format!("{offset},{length}")).collect();
            push_record(&mut records, SPARSE_SIZE.as_bytes(), length.to_string().as_bytes());
            push_record(&mut records, SPARSE_MAP.as_bytes(), map.join(",").as_bytes());
        }
        self.entry(path, EntryType::Regular, metadata, size, &records)?;
        // From here on the archive cannot say what goes wrong: data is due.
        for (offset, length) in pieces {
            file.seek(SeekFrom::Start(offset))?;
            if io::copy(&mut (&file).take(length), &mut self.out)? != length {
                return Err(WalkError::Broken(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        self.pad(size)
    }

    fn attributes(&self, path: &Path, records: &mut Vec<u8>) -> Result<(), WalkError> {
        let full = self.upper.join(path);
        let failed = |error: Errno| read(path)(error.into());
        let mut names = vec![0; MAX_XATTR];
        let length = match rustix::fs::llistxattr(&full, &mut names[..]) {
            Err(Errno::NOTSUP) => return Ok(()),
            listed => listed.map_err(failed)?,
        };
        let mut value = vec![0; MAX_XATTR];
        for name in names[..length].split(|byte| *byte == 0).filter(|name| is_exported(name)) {
            let length = match rustix::fs::lgetxattr(&full, name, &mut value[..]) {
                Err(Errno::NODATA) => continue,
                found => found.map_err(failed)?,
            };
            push_record(records, &[XATTR.as_bytes(), name].concat(), &value[..length]);
        }
        Ok(())
    }

    fn entry(
        &mut self,
        path: &Path,
        kind: EntryType,
        metadata: &Metadata,
        size: u64,
        records: &[u8],
    ) -> Result<(), WalkError> {
        if records.len() > MAX_RECORDS {
            return Err(read(path)(io::Error::other("its name and attributes are too long")));
        }
        self.records(EntryType::XHeader, records)?;
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(metadata.mode() & 0o7777);
        header.set_uid(metadata.uid().into());
        header.set_gid(metadata.gid().into());
        header.set_size(size);
        header.set_cksum();
        Ok(self.out.write_all(header.as_bytes())?)
    }

    fn records(&mut self, kind: EntryType, records: &[u8]) -> io::Result<()> {
        let mut header = Header::new_ustar();
        header.set_entry_type(kind);
        header.set_size(records.len() as u64);
        header.set_cksum();
        self.out.write_all(header.as_bytes())?;
        self.out.write_all(records)?;
        self.pad(records.len() as u64).map_err(io::Error::other)
    }

    fn pad(&mut self, length: u64) -> Result<(), WalkError> {
        let over = usize::try_from(length % BLOCK as u64).unwrap_or(0);
        let padding = [0; BLOCK];
        Ok(self.out.write_all(if over == 0 { &[] } else { &padding[over..] })?)
    }
}

fn about(path: &Path, metadata: &Metadata) -> Vec<u8> {
    let mut records = Vec::new();
    push_record(&mut records, PATH.as_bytes(), path.as_os_str().as_bytes());
    let time = format!("{}.{:09}", metadata.mtime(), metadata.mtime_nsec());
    push_record(&mut records, MTIME.as_bytes(), time.as_bytes());
    records
}

fn read(path: &Path) -> impl FnOnce(io::Error) -> WalkError {
    let path = path.display().to_string();
    move |source| WalkError::Read { path, source }
}

/// Where a file has data; the rest are holes.
fn pieces(file: &File, length: u64) -> io::Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut end = 0;
    while end < length {
        let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(end)) {
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL) => return Ok(vec![(0, length)]),
            start => start?.min(length),
        };
        end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start))?.min(length);
        if end <= start {
            break;
        }
        pieces.push((start, end - start));
    }
    Ok(pieces)
}

/// At most `most` pieces: the smallest holes become data.
fn merged(mut pieces: Vec<Piece>, most: usize) -> Vec<Piece> {
    let mut hole = 4096;
    while pieces.len() > most {
        pieces.dedup_by(|next, kept| {
            let is_close = next.0 - (kept.0 + kept.1) <= hole;
            if is_close {
                kept.1 = next.0 + next.1 - kept.0;
            }
            is_close
        });
        hole *= 2;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use spore_agent_api::changes::next_record;

    use super::*;

    /// An entry's kind, its records and its data.
    type Parsed = (EntryType, Vec<(String, String)>, Vec<u8>);

    /// The entries of an archive.
    fn parsed(archive: &[u8]) -> Vec<Parsed> {
        let mut entries = Vec::new();
        let mut records = Vec::new();
        let mut rest = archive;
        while !rest.is_empty() {
            let header = Header::from_byte_slice(&rest[..BLOCK]);
            let (kind, size) = (header.entry_type(), usize::try_from(header.entry_size().unwrap()).unwrap());
            let data = &rest[BLOCK..BLOCK + size];
            rest = &rest[BLOCK + size.next_multiple_of(BLOCK)..];
            if kind == EntryType::XHeader || kind == EntryType::XGlobalHeader {
                let mut more = data;
                while let Some((key, value, next)) = next_record(more) {
                    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                    records.push((text(key), text(value)));
                    more = next;
                }
            }
            if kind != EntryType::XHeader {
                entries.push((kind, std::mem::take(&mut records), data.to_vec()));
            }
        }
        entries
    }

    #[test]
    fn a_tree_is_sent_in_order_with_links_and_holes_and_an_end() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("b/c")).unwrap();
        fs::write(at("b/c/file"), b"data").unwrap();
        fs::hard_link(at("b/c/file"), at("z")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", at("b.link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let sparse = File::create(at("sparse")).unwrap();
        sparse.set_len(10 << 30).unwrap();
        sparse.write_all_at(b"end", (10 << 30) - 3).unwrap();
        let mut out = Vec::new();
        archive(dir.path(), &mut out).unwrap();
        assert!(out.len() < 64 << 10, "{} bytes", out.len());
        let entries = parsed(&out);
        let value = |index: usize, key: &str| {
            let (_, records, _) = &entries[index];
            records.iter().find(|(found, _)| found == key).map(|(_, value)| value.clone()).unwrap_or_default()
        };
        let paths: Vec<_> = (0..entries.len()).map(|index| value(index, PATH)).collect();
        assert_eq!(paths, [".", "b", "b/c", "b/c/file", "b.link", "sparse", "z", ""]);
        assert_eq!(entries[3].2, b"data");
        assert_eq!((entries[4].0, value(4, LINK).as_str()), (EntryType::Symlink, "/etc/passwd"));
        assert_eq!(value(5, SPARSE_SIZE), (10u64 << 30).to_string());
        assert_eq!((entries[6].0, value(6, LINK).as_str()), (EntryType::Link, "b/c/file"));
        assert_eq!(entries[7].1, [(END.to_owned(), String::new()), (SKIPPED.to_owned(), "1".to_owned())]);
    }

    #[test]
    fn what_cannot_be_read_is_said_at_the_end() {
        let mut out = Vec::new();
        archive(Path::new("/no/such/directory"), &mut out).unwrap();
        let entries = parsed(&out);
        let (key, reason) = &entries.last().unwrap().1[0];
        assert!(key == FAILED && reason.contains("No such file"), "{reason}");
    }

    #[test]
    fn many_pieces_become_fewer_and_cover_the_same() {
        let pieces: Vec<_> = (0..1000).map(|number| (number * 8192, 4096)).collect();
        assert_eq!(merged(pieces.clone(), 1000), pieces);
        assert_eq!(merged(pieces, 999), [(0, 999 * 8192 + 4096)]);
        assert_eq!(merged(vec![(0, 1), (1 << 20, 1), (5 << 20, 1)], 2), [(0, (1 << 20) + 1), (5 << 20, 1)]);
    }
}
