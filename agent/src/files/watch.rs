//! Changes as they happen: inotify(7) on a file, a directory or every directory of a tree.
//!
//! inotify tells by directory, so the watcher keeps the path of each, follows renames inside of
//! the tree, and takes up directories that come later. What the kernel drops because nobody
//! read in time is told as OVERFLOW: nothing is queued here.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use nix::sys::stat::{Mode, fstat};
use spore_agent_api::files::is_name;
use spore_agent_api::v1::files::WatchEvent;
use spore_agent_api::v1::files::watch_event::Kind;
use tokio::io::unix::AsyncFd;

use super::root::{Root, because, reopened};
use crate::container::blocking;
use crate::container::life::Container;
use crate::error::{AgentError, Result};

/// Directories of one recursive watch.
const MAX_DIRECTORIES: usize = 8192;
/// Between two signs of life.
const ALIVE: Duration = Duration::from_secs(10);
const VERB: &str = "watch";
const DIRECTORY: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// What is asked of the kernel.
const EVENTS: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_MODIFY)
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_DELETE_SELF);

/// What is watched.
struct Watches {
    inotify: Inotify,
    root: Root,
    /// Paths of the watched, without a slash at the end.
    paths: HashMap<WatchDescriptor, Vec<u8>>,
    top: Option<WatchDescriptor>,
    recursive: bool,
    /// A directory that was moved from here; its next place, if it is watched, comes next.
    moving: Option<(u32, Vec<u8>)>,
}

/// Watches until the container ends, what is watched is gone or nobody listens.
/// `tell` says whether anybody listens.
pub async fn run<F: Future<Output = bool> + Send>(
    container: Arc<Container>,
    path: Vec<u8>,
    recursive: bool,
    tell: impl Fn(WatchEvent) -> F + Send + Sync,
) -> Result<()> {
    let init = Arc::clone(&container.init);
    let name = container.name_of("");
    let begun = blocking(move || {
        let root = Root::of(&container)?;
        Watches::begin(root, &path, recursive)
    });
    let (mut watches, top) = begun.await?;
    let failed = |error: std::io::Error| AgentError::internal(format!("{name}: {VERB}"), error);
    let readable = watches.inotify.as_fd().try_clone_to_owned().map_err(failed)?;
    let readable: AsyncFd<OwnedFd> = crate::sys::watch(readable).map_err(failed)?;
    if !tell(event(Kind::WATCHING, top.clone(), false)).await {
        return Ok(());
    }
    // It must let go of the container's file systems as soon as the container ends.
    let ended = init.wait();
    tokio::pin!(ended);
    loop {
        let ready = tokio::select! {
            biased;
            _ = &mut ended => break,
            ready = readable.readable() => Some(ready),
            () = tokio::time::sleep(ALIVE) => None,
        };
        let Some(ready) = ready else {
            if tell(event(Kind::ALIVE, Vec::new(), false)).await {
                continue;
            }
            return Ok(());
        };
        let mut ready = ready.map_err(failed)?;
        let told = match watches.inotify.read_events() {
            Ok(events) => {
                let digest = blocking(move || {
                    let told = watches.digest(events);
                    Ok((watches, told))
                });
                let digested = digest.await?;
                watches = digested.0;
                digested.1
            }
            Err(Errno::EAGAIN) => {
                ready.clear_ready();
                continue;
            }
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(because(&format!("{name}: {VERB}"), error)),
        };
        for event in told {
            if !tell(event).await {
                return Ok(());
            }
        }
        if watches.top.is_none() {
            break;
        }
    }
    drop(watches);
    tell(event(Kind::GONE, top, false)).await;
    Ok(())
}

fn event(kind: Kind, path: Vec<u8>, directory: bool) -> WatchEvent {
    WatchEvent { kind: kind.into(), path, directory, ..Default::default() }
}

/// The root's path is empty here, so that names can be put behind it.
fn shown(path: &[u8]) -> &[u8] {
    if path.is_empty() { b"/" } else { path }
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    [directory, b"/", name].concat()
}

impl Watches {
    /// Watches the path, and with `recursive` the directories below it; gives the path too.
    fn begin(root: Root, path: &[u8], recursive: bool) -> Result<(Self, Vec<u8>)> {
        let found = root.find(VERB, path, true)?;
        let failed = root.failed(VERB, path);
        let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
        let top_path = path[..end].to_vec();
        let is_directory = fstat(&found).map_err(&failed)?.st_mode & libc::S_IFMT == libc::S_IFDIR;
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(&failed)?;
        let mut watches = Self { inotify, root, paths: HashMap::new(), top: None, recursive, moving: None };
        watches.top = Some(watches.add(&found, top_path.clone()).map_err(&failed)?);
        if recursive && is_directory && !watches.add_tree(&top_path, true, &mut |_, _| {})? {
            let what = path.escape_ascii();
            return Err(AgentError::FailedPrecondition(format!(
                "{VERB} \"{what}\": more than {MAX_DIRECTORIES} directories; watch a part of it"
            )));
        }
        Ok((watches, shown(&top_path).to_vec()))
    }

    fn add(&mut self, found: &OwnedFd, path: Vec<u8>) -> nix::Result<WatchDescriptor> {
        let descriptor = self.inotify.add_watch(&reopened(found), EVENTS)?;
        self.paths.insert(descriptor, path);
        Ok(descriptor)
    }

    /// Watches the directory, unless that is so already, and every one below it; tells each entry
    /// found. False when there are too many.
    fn add_tree(
        &mut self,
        top: &[u8],
        mut watched: bool,
        tell: &mut dyn FnMut(Vec<u8>, bool),
    ) -> Result<bool> {
        let mut waiting = vec![top.to_vec()];
        while let Some(path) = waiting.pop() {
            let failed = self.root.failed(VERB, &path);
            // Not followed, but for what was asked for: a link may have come in its place.
            let found = match self.root.find(VERB, shown(&path), watched) {
                Err(AgentError::NotFound(_)) => continue,
                other => other?,
            };
            let mut dir = match Dir::openat(&found, ".", DIRECTORY, Mode::empty()) {
                Err(Errno::ENOENT | Errno::ENOTDIR) => continue,
                other => other.map_err(&failed)?,
            };
            if !std::mem::take(&mut watched) {
                self.add(&found, path.clone()).map_err(&failed)?;
            }
            for entry in dir.iter() {
                let entry = entry.map_err(&failed)?;
                let name = entry.file_name().to_bytes();
                if !is_name(name) {
                    continue;
                }
                let is_directory = entry.file_type() == Some(Type::Directory);
                tell(join(&path, name), is_directory);
                if !is_directory {
                    continue;
                }
                if self.paths.len() + waiting.len() >= MAX_DIRECTORIES {
                    return Ok(false);
                }
                waiting.push(join(&path, name));
            }
        }
        Ok(true)
    }

    /// What the kernel's events mean.
    fn digest(&mut self, events: Vec<InotifyEvent>) -> Vec<WatchEvent> {
        let mut told = Vec::new();
        for event in events {
            self.digest_one(&event, &mut told);
        }
        told
    }

    fn digest_one(&mut self, raw: &InotifyEvent, told: &mut Vec<WatchEvent>) {
        let is = |flag| raw.mask.contains(flag);
        let directory = is(AddWatchFlags::IN_ISDIR);
        if is(AddWatchFlags::IN_Q_OVERFLOW) {
            told.push(event(Kind::OVERFLOW, Vec::new(), false));
            return;
        }
        // The two events of one move follow each other.
        if let Some((cookie, from)) = self.moving.take() {
            let to = self.path_of(raw).filter(|_| is(AddWatchFlags::IN_MOVED_TO) && raw.cookie == cookie);
            match to {
                Some(to) => {
                    self.renamed(&from, &to);
                    told.push(WatchEvent { cookie, ..event(Kind::MOVED_TO, to, directory) });
                    return;
                }
                None => self.forget(&from),
            }
        }
        if is(AddWatchFlags::IN_IGNORED) {
            self.paths.remove(&raw.wd);
            if self.top == Some(raw.wd) {
                self.top = None;
            }
            return;
        }
        // Of a directory that is no longer watched.
        let Some(path) = self.path_of(raw) else { return };
        let kind = [
            (AddWatchFlags::IN_CREATE, Kind::CREATED),
            (AddWatchFlags::IN_MODIFY, Kind::MODIFIED),
            (AddWatchFlags::IN_CLOSE_WRITE, Kind::WRITTEN),
            (AddWatchFlags::IN_ATTRIB, Kind::ATTRIBUTES),
            (AddWatchFlags::IN_MOVED_FROM, Kind::MOVED_FROM),
            (AddWatchFlags::IN_MOVED_TO, Kind::MOVED_TO),
            (AddWatchFlags::IN_DELETE, Kind::REMOVED),
        ];
        let Some((_, kind)) = kind.into_iter().find(|(flag, _)| is(*flag)) else { return };
        // A directory below is told by the one that holds it.
        if raw.name.is_none() && self.top != Some(raw.wd) {
            return;
        }
        told.push(WatchEvent { cookie: raw.cookie, ..event(kind, shown(&path).to_vec(), directory) });
        if !(self.recursive && directory && raw.name.is_some()) {
            return;
        }
        match kind {
            Kind::CREATED | Kind::MOVED_TO => self.take_up(path, told),
            Kind::MOVED_FROM => self.moving = Some((raw.cookie, path)),
            _ => {}
        }
    }

    fn path_of(&self, raw: &InotifyEvent) -> Option<Vec<u8>> {
        let directory = self.paths.get(&raw.wd)?;
        Some(match &raw.name {
            Some(name) => join(directory, name.as_bytes()),
            None => directory.clone(),
        })
    }

    /// A directory that has just come: what came into it before it was watched is told now.
    fn take_up(&mut self, path: Vec<u8>, told: &mut Vec<WatchEvent>) {
        let mut tell = |path, directory| told.push(event(Kind::CREATED, path, directory));
        let taken = if self.paths.len() < MAX_DIRECTORIES {
            self.add_tree(&path, false, &mut tell)
        } else {
            Ok(false)
        };
        match taken {
            Ok(true) => {}
            Ok(false) | Err(_) => told.push(event(Kind::OVERFLOW, path, true)),
        }
    }

    fn renamed(&mut self, from: &[u8], to: &[u8]) {
        for path in self.paths.values_mut() {
            if let Some(rest) = below(path, from) {
                *path = [to, rest].concat();
            }
        }
    }

    /// It was moved out of what is watched.
    fn forget(&mut self, from: &[u8]) {
        let gone: Vec<_> =
            self.paths.iter().filter(|(_, path)| below(path, from).is_some()).map(|(wd, _)| *wd).collect();
        for descriptor in gone {
            self.paths.remove(&descriptor);
            // It may have ended by itself.
            let _ = self.inotify.rm_watch(descriptor);
        }
    }
}

/// What of `path` lies behind `directory`: nothing, or a slash and more.
fn below<'a>(path: &'a [u8], directory: &[u8]) -> Option<&'a [u8]> {
    path.strip_prefix(directory).filter(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

#[cfg(test)]
mod tests;
