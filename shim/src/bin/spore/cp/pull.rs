//! Out of a container. The guest decides what is listed and what is in it, so `remote` checks
//! names and pieces, `host` makes what they say, and a file is as long as it was said to be.

use std::collections::VecDeque;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use spore_agent_api::files::MAX_CHUNK;
use spore_agent_api::v1::files::attributes::Kind;
use spore_agent_api::v1::files::{Attributes, Entry};

use super::host::Directory;
use super::place::{There, target};
use super::{MAX_DEPTH, Options, join, until_interrupted};
use crate::failure::Failure;
use crate::progress::Progress;
use crate::remote::{Found, Remote};
use crate::show;

/// A directory that is being copied.
struct Level {
    to: Directory,
    from: Vec<u8>,
    /// What the directory gets when all is in it; nothing for one that was there.
    dress: Option<Attributes>,
    page: VecDeque<Entry>,
    after: Vec<u8>,
    more: bool,
}

struct Pull<'a> {
    remote: &'a Remote,
    options: Options,
    progress: &'a Progress,
    skipped: Vec<Vec<u8>>,
}

/// Copies `from` to `to`; gives what was left out because it cannot be copied.
pub(super) async fn run(
    remote: &Remote,
    from: &[u8],
    to: &Path,
    options: Options,
    progress: &Progress,
) -> Result<Vec<Vec<u8>>, Failure> {
    let found = remote.stat(from, options.follow).await?;
    let there = match std::fs::metadata(to) {
        Ok(metadata) if metadata.is_dir() => There::Directory,
        Ok(_) => There::Other,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => There::Nothing,
        Err(error) => return Err(Failure::host("look at", to)(error)),
    };
    let refused = |why| Failure::Refused(format!("{}: {why}", show::name(to.as_os_str().as_bytes())));
    let bytes = target(from, found.is_directory(), to.as_os_str().as_bytes(), there).map_err(refused)?;
    // A link that the caller named is what it points to.
    let path = PathBuf::from(std::ffi::OsStr::from_bytes(&bytes));
    let path = if path == to && there == There::Other {
        std::fs::canonicalize(&path).map_err(Failure::host("look at", to))?
    } else {
        path
    };
    let mut pull = Pull { remote, options, progress, skipped: Vec::new() };
    let named = there == There::Directory && path == to;
    until_interrupted(pull.copy(from.to_vec(), found, &path, named)).await?;
    Ok(pull.skipped)
}

impl Pull<'_> {
    /// `named`: the directory is there, and links to it are the caller's.
    async fn copy(&mut self, from: Vec<u8>, found: Found, to: &Path, named: bool) -> Result<(), Failure> {
        let Found { attributes, target: link } = found;
        let parent = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let name = to.file_name().map(OsStrExt::as_bytes);
        match (kind(&attributes), name) {
            (Kind::DIRECTORY, name) => {
                let (to, made) = match name.filter(|_| !named) {
                    Some(name) => Directory::open(parent)?.directory(name)?,
                    None => (Directory::open(to)?, false),
                };
                self.tree(from, attributes, to, made).await
            }
            (Kind::FILE, Some(name)) => self.file(&from, &attributes, &Directory::open(parent)?, name).await,
            (Kind::SYMLINK, Some(name)) => {
                Directory::open(parent)?.link(name, &link, &attributes, self.options)?;
                self.progress.entry(name);
                Ok(())
            }
            _ => {
                self.skipped.push(from);
                Ok(())
            }
        }
    }

    async fn tree(
        &mut self,
        from: Vec<u8>,
        attributes: Attributes,
        to: Directory,
        made: bool,
    ) -> Result<(), Failure> {
        let level = |to, from, attributes, made: bool| Level {
            to,
            from,
            dress: made.then_some(attributes),
            page: VecDeque::new(),
            after: Vec::new(),
            more: true,
        };
        let mut levels = vec![level(to, from, attributes, made)];
        while let Some(current) = levels.last_mut() {
            let Some(entry) = current.page.pop_front() else {
                if current.more {
                    let (page, more) = self.remote.list(&current.from, &current.after).await?;
                    if let Some(last) = page.last() {
                        current.after.clone_from(&last.name);
                    }
                    (current.page, current.more) = (page.into(), more);
                } else {
                    if let Some(dress) = &current.dress {
                        current.to.finish(dress, self.options)?;
                    }
                    levels.pop();
                }
                continue;
            };
            let attributes = entry.attributes.unwrap_or_default();
            let from = join(&current.from, &entry.name);
            match kind(&attributes) {
                Kind::DIRECTORY => {
                    let (to, made) = current.to.directory(&entry.name)?;
                    self.progress.entry(&from);
                    if levels.len() >= MAX_DEPTH {
                        let why = format!("{}: deeper than {MAX_DEPTH} directories", show::name(&from));
                        return Err(Failure::Refused(why));
                    }
                    levels.push(level(to, from, attributes, made));
                }
                Kind::FILE => self.file(&from, &attributes, &current.to, &entry.name).await?,
                Kind::SYMLINK => match self.remote.find(&from, false).await? {
                    Some(found) if found.kind() == Kind::SYMLINK => {
                        current.to.link(&entry.name, &found.target, &found.attributes, self.options)?;
                        self.progress.entry(&from);
                    }
                    // Gone, or something else by now.
                    _ => self.skipped.push(from),
                },
                _ => self.skipped.push(from),
            }
        }
        Ok(())
    }

    /// As many bytes as the file was said to have; holes stay holes.
    async fn file(
        &self,
        from: &[u8],
        attributes: &Attributes,
        to: &Directory,
        name: &[u8],
    ) -> Result<(), Failure> {
        let draft = to.draft()?;
        let mut at = 0;
        while at < attributes.size {
            let wanted = usize::try_from(attributes.size - at).unwrap_or(usize::MAX).min(MAX_CHUNK);
            let piece = self.remote.read(from, at, wanted, true).await?;
            if piece.identity != (attributes.device, attributes.inode) {
                let why = "another file has taken its name while it was copied; try again";
                return Err(Failure::Refused(format!("{}: {why}", show::name(from))));
            }
            at = piece.offset.min(attributes.size);
            let left = usize::try_from(attributes.size - at).unwrap_or(usize::MAX);
            let data = &piece.data[..piece.data.len().min(left)];
            draft.write(data, at)?;
            at += data.len() as u64;
            self.progress.bytes(data.len());
            if piece.end {
                break;
            }
        }
        draft.publish(name, at, attributes, self.options)?;
        self.progress.entry(from);
        Ok(())
    }
}

fn kind(attributes: &Attributes) -> Kind {
    attributes.kind.enum_value_or_default()
}
