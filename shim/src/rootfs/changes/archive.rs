//! The archive of a guest's changes, read as what it is: anything that a hostile guest may send.
//! Every length passes a cap before it is believed; nothing here touches a file.

use std::io::{self, Read};

use spore_agent_api::changes::{
    BLOCK, END, FAILED, LINK, MAX_NAME, MAX_PATH, MAX_PIECES, MAX_RECORDS, MTIME, OPAQUE, PATH, SKIPPED,
    SPARSE_MAP, SPARSE_SIZE, XATTR, is_exported, next_record,
};
use tar::{EntryType, Header};

/// A file may be mostly hole, but no longer than ext4 lets it be.
const MAX_LENGTH: u64 = 16 << 40;
/// Most bytes of the guest's own words.
const MAX_TEXT: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub(super) enum ArchiveError {
    #[error("the guest cannot read them: {0}")]
    Guest(String),
    #[error("the archive of them ended early")]
    Unfinished,
    #[error("the guest stalled while it sent them")]
    Stalled,
    #[error("read the archive of them: {0}")]
    Read(io::Error),
    #[error("the guest's archive is malformed: {0}")]
    Malformed(&'static str),
    #[error("the guest's archive is malformed: {path:?}: {detail}")]
    Entry { path: String, detail: &'static str },
    #[error("the guest's archive has more than {max} {what}, which its disk cannot hold")]
    TooMuch { what: &'static str, max: u64 },
}

/// A relative path by its names; the directory itself has none.
pub(super) type Names = Vec<Vec<u8>>;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory {
        opaque: bool,
    },
    /// Its length, and the offsets and lengths of its data, which follows.
    File {
        length: u64,
        pieces: Vec<(u64, u64)>,
    },
    Symlink(Vec<u8>),
    /// A further name of a file.
    Link(Names),
    Whiteout,
    Fifo,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) names: Names,
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds.
    pub(super) mtime: (i64, i64),
    pub(super) attributes: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Entry {
    pub(super) fn path(&self) -> String {
        shown(&self.names)
    }
}

/// A path for errors and logs.
pub(super) fn shown(names: &[Vec<u8>]) -> String {
    let mut text = String::from_utf8_lossy(&names.join(&b'/')).into_owned();
    text.truncate(text.floor_char_boundary(MAX_TEXT));
    text
}

/// What an archive may hold at most: what the guest's disk can.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) entries: u64,
    pub(super) bytes: u64,
}

/// Reads entries one after the other.
pub(super) struct Archive<R> {
    input: R,
    limits: Limits,
    entries: u64,
    bytes: u64,
    last: Option<Names>,
    /// What the guest could not send, once the archive has ended.
    pub(super) skipped: u64,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(input: R, limits: Limits) -> Self {
        Self { input, limits, entries: 0, bytes: 0, last: None, skipped: 0 }
    }

    /// The next entry, whose data has to be read with [`Archive::data`]; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let header = self.header()?;
        let records = self.records(&header)?;
        match header.entry_type() {
            EntryType::XGlobalHeader => self.end(&records).map(|()| None),
            EntryType::XHeader => {
                let header = self.header()?;
                let entry = self.entry(&header, &records)?;
                self.admit(&entry)?;
                self.last = Some(entry.names.clone());
                Ok(Some(entry))
            }
            _ => Err(ArchiveError::Malformed("an entry without records")),
        }
    }

    /// Fills `buffer` with data of the entry.
    pub(super) fn data(&mut self, buffer: &mut [u8]) -> Result<(), ArchiveError> {
        self.input.read_exact(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => ArchiveError::Unfinished,
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ArchiveError::Stalled,
            _ => ArchiveError::Read(error),
        })
    }

    /// Skips what fills the last block of `size` bytes.
    pub(super) fn pad(&mut self, size: u64) -> Result<(), ArchiveError> {
        let over = usize::try_from(size % BLOCK as u64).unwrap_or(0);
        let mut padding = [0; BLOCK];
        if over == 0 { Ok(()) } else { self.data(&mut padding[over..]) }
    }

    fn header(&mut self) -> Result<Header, ArchiveError> {
        let mut header = Header::new_ustar();
        self.data(header.as_mut_bytes())?;
        let mut wanted = header.clone();
        wanted.set_cksum();
        let sums = (header.cksum().ok(), wanted.cksum().ok());
        if sums.0.is_none() || sums.0 != sums.1 {
            return Err(ArchiveError::Malformed("a header's checksum is wrong"));
        }
        Ok(header)
    }

    fn records(&mut self, header: &Header) -> Result<Vec<u8>, ArchiveError> {
        let size = header.entry_size().unwrap_or(u64::MAX);
        let length = usize::try_from(size).ok().filter(|length| *length <= MAX_RECORDS);
        let length = length.ok_or(ArchiveError::Malformed("an entry's records are too long"))?;
        let mut records = vec![0; length];
        self.data(&mut records)?;
        self.pad(size)?;
        Ok(records)
    }

    fn end(&mut self, records: &[u8]) -> Result<(), ArchiveError> {
        let mut ended = false;
        let mut rest = records;
        while let Some((key, value, more)) = next_record(rest) {
            if key == FAILED.as_bytes() {
                let text = shown(&[value.to_vec()]);
                return Err(ArchiveError::Guest(text.chars().filter(|c| !c.is_control()).collect()));
            }
            ended |= key == END.as_bytes();
            if key == SKIPPED.as_bytes() {
                self.skipped = number(value).unwrap_or(0);
            }
            rest = more;
        }
        if ended { Ok(()) } else { Err(ArchiveError::Malformed("it has a global header that is no end")) }
    }

    fn entry(&self, header: &Header, records: &[u8]) -> Result<Entry, ArchiveError> {
        let mut names = None;
        let (mut link, mut mtime, mut opaque) = (None, (0, 0), false);
        let (mut length, mut map, mut attributes) = (None, None, Vec::new());
        let mut rest = records;
        while !rest.is_empty() {
            let malformed = ArchiveError::Malformed("records that are none");
            let (key, value, more) = next_record(rest).ok_or(malformed)?;
            rest = more;
            let attribute = key.strip_prefix(XATTR.as_bytes());
            if key == PATH.as_bytes() {
                names = Some(parse_path(value)?);
            } else if key == LINK.as_bytes() {
                link = Some(value);
            } else if key == MTIME.as_bytes() {
                mtime = time(value).ok_or(ArchiveError::Malformed("a time that is none"))?;
            } else if key == SPARSE_SIZE.as_bytes() {
                length = Some(number(value).ok_or(ArchiveError::Malformed("a length that is none"))?);
            } else if key == SPARSE_MAP.as_bytes() {
                map = Some(value);
            } else if attribute == Some(OPAQUE.as_bytes()) {
                opaque = value == b"y";
            } else if let Some(name) = attribute {
                if !is_exported(name) || name.len() > MAX_NAME {
                    return Err(ArchiveError::Malformed("an attribute that is not exported"));
                }
                attributes.push((name.to_vec(), value.to_vec()));
            }
        }
        let names = names.ok_or(ArchiveError::Malformed("an entry without a path"))?;
        let refused = |detail| ArchiveError::Entry { path: shown(&names), detail };
        let size = header.entry_size().map_err(|_| refused("its size is none"))?;
        let short = |id: io::Result<u64>| id.ok().and_then(|id| u32::try_from(id).ok());
        let device = (header.device_major().ok().flatten(), header.device_minor().ok().flatten());
        let kind = match header.entry_type() {
            EntryType::Directory => Kind::Directory { opaque },
            EntryType::Regular => {
                let pieces = match (length, map) {
                    (Some(length), Some(map)) => {
                        parse_map(map, length, size).ok_or_else(|| refused("its holes do not fit"))?
                    }
                    (None, None) if size > 0 => vec![(0, size)],
                    (None, None) => Vec::new(),
                    _ => return Err(refused("half of the records of a file with holes")),
                };
                Kind::File { length: length.unwrap_or(size), pieces }
            }
            EntryType::Symlink => {
                let target = link
                    .filter(|target| !target.is_empty() && target.len() <= MAX_PATH && !target.contains(&0));
                Kind::Symlink(target.ok_or_else(|| refused("a link without a target"))?.to_vec())
            }
            EntryType::Link => {
                let target = parse_path(link.ok_or_else(|| refused("a link without a target"))?)?;
                if target >= names {
                    return Err(refused("a link to what does not come before it"));
                }
                Kind::Link(target)
            }
            // An empty field is a zero.
            EntryType::Char if matches!(device, (None | Some(0), None | Some(0))) => Kind::Whiteout,
            EntryType::Char | EntryType::Block => return Err(refused("a device node")),
            EntryType::Fifo => Kind::Fifo,
            _ => return Err(refused("a kind of entry that no change has")),
        };
        if size != 0 && !matches!(kind, Kind::File { .. }) {
            return Err(refused("data of what is not a file"));
        }
        if matches!(&kind, Kind::File { length, .. } if *length > MAX_LENGTH) {
            return Err(refused("its length is beyond any file system's"));
        }
        if names.is_empty() && !matches!(kind, Kind::Directory { .. }) {
            return Err(refused("the upper directory as something else"));
        }
        Ok(Entry {
            mode: header.mode().map_err(|_| refused("its mode is none"))? & 0o7777,
            uid: short(header.uid())
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| refused("its owner is none"))?,
            gid: short(header.gid())
                .filter(|id| *id != u32::MAX)
                .ok_or_else(|| refused("its group is none"))?,
            names,
            kind,
            mtime,
            attributes,
        })
    }

    fn admit(&mut self, entry: &Entry) -> Result<(), ArchiveError> {
        // So that nothing comes twice, and nothing of a directory before it.
        if self.last.as_ref().is_some_and(|last| *last >= entry.names) {
            return Err(ArchiveError::Entry { path: entry.path(), detail: "it is out of order" });
        }
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(ArchiveError::TooMuch { what: "entries", max: self.limits.entries });
        }
        let content = match &entry.kind {
            Kind::File { pieces, .. } => pieces.iter().map(|(_, length)| *length).collect(),
            Kind::Symlink(target) => vec![target.len() as u64],
            _ => Vec::new(),
        };
        let attributes = entry.attributes.iter().map(|(_, value)| value.len() as u64);
        self.bytes = content.into_iter().chain(attributes).fold(self.bytes, u64::saturating_add);
        if self.bytes > self.limits.bytes {
            return Err(ArchiveError::TooMuch { what: "bytes", max: self.limits.bytes });
        }
        Ok(())
    }
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn time(text: &[u8]) -> Option<(i64, i64)> {
    let (seconds, nanoseconds) = std::str::from_utf8(text).ok()?.split_once('.')?;
    let nanoseconds: i64 = nanoseconds.parse().ok()?;
    (0..1_000_000_000).contains(&nanoseconds).then_some((seconds.parse().ok()?, nanoseconds))
}

/// A relative path without `.` and `..`, by its names; `.` alone has none.
fn parse_path(path: &[u8]) -> Result<Names, ArchiveError> {
    if path == b"." {
        return Ok(Vec::new());
    }
    let refused = |detail| ArchiveError::Entry { path: shown(&[path.to_vec()]), detail };
    if path.len() > MAX_PATH || path.contains(&0) {
        return Err(refused("a path that is too long or has a zero byte"));
    }
    let names: Names = path.split(|byte| *byte == b'/').map(<[u8]>::to_vec).collect();
    let is_name = |name: &Vec<u8>| !matches!(name.as_slice(), b"" | b"." | b"..") && name.len() <= MAX_NAME;
    if !names.iter().all(is_name) {
        return Err(refused("a path that leaves its directory, or has a name that no file can have"));
    }
    Ok(names)
}

fn parse_map(map: &[u8], length: u64, size: u64) -> Option<Vec<(u64, u64)>> {
    let mut pieces = Vec::new();
    let mut numbers = map.split(|byte| *byte == b',').filter(|text| !text.is_empty());
    let (mut end, mut sum) = (0_u64, 0_u64);
    while let Some(offset) = numbers.next() {
        let (offset, piece) = (number(offset)?, number(numbers.next()?)?);
        if offset < end || pieces.len() == MAX_PIECES {
            return None;
        }
        end = offset.checked_add(piece)?;
        sum = sum.checked_add(piece)?;
        pieces.push((offset, piece));
    }
    (end <= length && sum == size).then_some(pieces)
}
