//! Into a container. A file is written under a name of its own and renamed when it is complete;
//! where that cannot be (a file that is mounted on its own, or reached by a link), in place.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use containerd_shim_spore::next_data;
use spore_agent_api::files::{MAX_CHUNK, MODE_BITS};
use spore_agent_api::v1::files::attributes::Kind;
use spore_agent_api::v1::files::write_request::Create;
use spore_agent_api::v1::files::{Mode, Owner, SetAttributesRequest, Size, Times, WriteRequest};
use ttrpc::Code;

use super::place::{There, target};
use super::{MAX_DEPTH, Options, draft_name, join, until_interrupted};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::remote::Remote;
use crate::show;

struct Push<'a> {
    remote: &'a Remote,
    options: Options,
    progress: &'a Progress,
    skipped: Vec<Vec<u8>>,
    /// In the container, while it has no name yet.
    draft: Option<Vec<u8>>,
}

/// A directory that is being copied.
struct Level {
    to: Vec<u8>,
    /// What the directory gets when all is in it; nothing for one that was there.
    dress: Option<Metadata>,
    /// What is still to be copied, the last first.
    entries: Vec<PathBuf>,
}

/// Copies `from` to `to`; gives what was left out because it cannot be copied.
pub(super) async fn run(
    remote: &Remote,
    from: &Path,
    to: &[u8],
    options: Options,
    progress: &Progress,
) -> Result<Vec<Vec<u8>>, Failure> {
    let found = if options.follow { std::fs::metadata(from) } else { std::fs::symlink_metadata(from) };
    let found = found.map_err(Failure::host("look at", from))?;
    let there = match remote.find(to, true).await? {
        Some(found) if found.is_directory() => There::Directory,
        Some(_) => There::Other,
        None => There::Nothing,
    };
    let refused = |why| Failure::Refused(format!("{}:{}: {why}", remote.id(), show::name(to)));
    let path = target(from.as_os_str().as_bytes(), found.is_dir(), to, there).map_err(refused)?;
    let mut push = Push { remote, options, progress, skipped: Vec::new(), draft: None };
    let copied = until_interrupted(push.copy(from, found, path)).await;
    if let Some(draft) = push.draft.take() {
        // It is the failure that counts.
        let _ = remote.remove(&draft, false).await;
    }
    copied.map(|()| push.skipped)
}

impl Push<'_> {
    async fn copy(&mut self, from: &Path, found: Metadata, to: Vec<u8>) -> Result<(), Failure> {
        let mut levels = Vec::new();
        self.one(from.to_owned(), found, to, &mut levels).await?;
        while let Some(current) = levels.last_mut() {
            let Some(from) = current.entries.pop() else {
                if let Some(Level { to, dress: Some(found), .. }) = levels.pop() {
                    self.dress(&to, &found, false).await?;
                }
                continue;
            };
            let found = match std::fs::symlink_metadata(&from) {
                Ok(found) => found,
                // Gone since.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(Failure::host("look at", &from)(error)),
            };
            let name = from.file_name().map(OsStrExt::as_bytes).unwrap_or_default();
            let to = join(&current.to, name);
            self.one(from, found, to, &mut levels).await?;
        }
        Ok(())
    }

    /// Copies what is not a directory; of a directory makes a level.
    async fn one(
        &mut self,
        from: PathBuf,
        found: Metadata,
        to: Vec<u8>,
        levels: &mut Vec<Level>,
    ) -> Result<(), Failure> {
        let kind = found.file_type();
        if kind.is_dir() {
            if levels.len() >= MAX_DEPTH {
                let why = format!("{}: deeper than {MAX_DEPTH} directories", from.display());
                return Err(Failure::Refused(why));
            }
            let made = self.directory(&to).await?;
            let entries = std::fs::read_dir(&from)
                .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect());
            let mut entries: Vec<PathBuf> = entries.map_err(Failure::host("list", &from))?;
            entries.sort_by(|a, b| b.cmp(a));
            levels.push(Level { to: to.clone(), dress: made.then_some(found), entries });
        } else if kind.is_symlink() {
            let target = std::fs::read_link(&from).map_err(Failure::host("read link", &from))?;
            self.make_way(&to).await?;
            self.remote.link(&to, target.as_os_str().as_bytes()).await?;
            self.dress(&to, &found, true).await?;
        } else if kind.is_file() {
            self.file(&from, &to).await?;
        } else {
            self.skipped.push(from.into_os_string().into_encoded_bytes());
            return Ok(());
        }
        self.progress.entry(&to);
        Ok(())
    }

    /// Says whether it was missing.
    async fn directory(&self, path: &[u8]) -> Result<bool, Failure> {
        match self.remote.find(path, true).await? {
            Some(found) if found.is_directory() => Ok(false),
            Some(_) => {
                let why = "is a file; a directory cannot be copied onto it";
                Err(Failure::Refused(format!("{}:{}: {why}", self.remote.id(), show::name(path))))
            }
            // Only its owner looks in before it is complete.
            None => self.remote.make_directory(path, 0o700, false).await,
        }
    }

    /// A link replaces everything but a directory.
    async fn make_way(&self, path: &[u8]) -> Result<(), Failure> {
        match self.remote.find(path, false).await? {
            None => Ok(()),
            Some(found) if found.is_directory() => {
                let why = "is a directory; a link cannot be copied onto it";
                Err(Failure::Refused(format!("{}:{}: {why}", self.remote.id(), show::name(path))))
            }
            Some(_) => self.remote.remove(path, false).await.map(drop),
        }
    }

    async fn file(&mut self, from: &Path, to: &[u8]) -> Result<(), Failure> {
        let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(from);
        let file = opened.map_err(Failure::host("open", from))?;
        let found = file.metadata().map_err(Failure::host("look at", from))?;
        let there = self.remote.find(to, false).await?;
        match there.map(|there| there.kind()) {
            Some(Kind::DIRECTORY) => {
                let why = "is a directory; a file cannot be copied onto it";
                return Err(Failure::Refused(format!("{}:{}: {why}", self.remote.id(), show::name(to))));
            }
            Some(Kind::SYMLINK) => return self.in_place(from, &file, &found, to).await,
            _ => {}
        }
        let draft = draft_of(to);
        self.draft = Some(draft.clone());
        self.content(from, &file, &found, &draft, Create::ALWAYS).await?;
        self.dress(&draft, &found, false).await?;
        match self.remote.rename(&draft, to, true).await {
            // Something is mounted on it.
            Err(failure) if failure.is(Code::FAILED_PRECONDITION) => {
                self.remote.remove(&draft, false).await?;
                self.draft = None;
                self.in_place(from, &file, &found, to).await
            }
            other => {
                other?;
                self.draft = None;
                Ok(())
            }
        }
    }

    async fn in_place(&self, from: &Path, file: &File, found: &Metadata, to: &[u8]) -> Result<(), Failure> {
        self.content(from, file, found, to, Create::NEVER).await?;
        let (times, mode) = (Some(times(found)), Some(mode(found)));
        let owner = self.options.archive.then(|| owner(found));
        let request = SetAttributesRequest {
            path: to.into(),
            follow: true,
            owner: owner.into(),
            mode: mode.into(),
            times: times.into(),
            ..Default::default()
        };
        self.remote.set_attributes(request).await
    }

    /// The file's data; what is a hole stays one.
    async fn content(
        &self,
        from: &Path,
        file: &File,
        found: &Metadata,
        to: &[u8],
        create: Create,
    ) -> Result<(), Failure> {
        let size = found.len();
        let failed = Failure::host("read", from);
        let first = WriteRequest {
            path: to.into(),
            create: create.into(),
            mode: 0o600,
            size: Some(Size::new()).into(),
            ..Default::default()
        };
        let mut next = next_data(file, 0, size).map_err(&failed)?;
        // Most files fit into one call.
        if next.as_ref().is_none_or(|data| *data == (0..size)) && size <= MAX_CHUNK as u64 {
            let data = read_range(file, next.unwrap_or(0..0)).map_err(&failed)?;
            self.progress.bytes(data.len());
            let request = WriteRequest { data, size: size_of(size).into(), ..first };
            return self.remote.write(request).await;
        }
        self.remote.write(first).await?;
        while let Some(data) = next {
            let mut at = data.start;
            while at < data.end {
                let end = data.end.min(at + MAX_CHUNK as u64);
                let piece = read_range(file, at..end).map_err(&failed)?;
                if piece.is_empty() {
                    break;
                }
                let (offset, length) = (at, piece.len());
                at += length as u64;
                let request = WriteRequest { path: to.into(), offset, data: piece, ..Default::default() };
                self.remote.write(request).await?;
                self.progress.bytes(length);
            }
            next = next_data(file, data.end, size).map_err(&failed)?;
        }
        self.remote
            .write(WriteRequest { path: to.into(), size: size_of(size).into(), ..Default::default() })
            .await
    }

    /// Gives what was copied the attributes of its source. A link has no mode.
    async fn dress(&self, path: &[u8], found: &Metadata, link: bool) -> Result<(), Failure> {
        let owner = self.options.archive.then(|| owner(found));
        let mode = (!link).then(|| mode(found));
        let request = SetAttributesRequest {
            path: path.into(),
            owner: owner.into(),
            mode: mode.into(),
            times: Some(times(found)).into(),
            ..Default::default()
        };
        self.remote.set_attributes(request).await
    }
}

/// A name beside the file's own.
fn draft_of(path: &[u8]) -> Vec<u8> {
    let directory = path.iter().rposition(|byte| *byte == b'/').map_or(0, |slash| slash + 1);
    [&path[..directory], draft_name().as_bytes()].concat()
}

fn size_of(bytes: u64) -> Option<Size> {
    Some(Size { bytes, ..Default::default() })
}

fn read_range(file: &File, range: Range<u64>) -> io::Result<Vec<u8>> {
    let wanted = usize::try_from(range.end - range.start).unwrap_or(MAX_CHUNK).min(MAX_CHUNK);
    let mut data = vec![0; wanted];
    let mut filled = 0;
    while filled < wanted {
        match file.read_at(&mut data[filled..], range.start + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    data.truncate(filled);
    Ok(data)
}

fn owner(found: &Metadata) -> Owner {
    Owner { uid: found.uid(), gid: found.gid(), ..Default::default() }
}

fn mode(found: &Metadata) -> Mode {
    Mode { bits: found.mode() & MODE_BITS, ..Default::default() }
}

fn times(found: &Metadata) -> Times {
    let ns =
        |seconds: i64, nanoseconds: i64| seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds);
    Times {
        accessed_ns: ns(found.atime(), found.atime_nsec()),
        modified_ns: ns(found.mtime(), found.mtime_nsec()),
        ..Default::default()
    }
}
