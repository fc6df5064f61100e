//! The files of one container, through its shim. What the guest answers is checked here against
//! what was asked: names that are none, lists without end, pieces that were not asked for.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use containerd_shim_spore::{Config, running};
use spore_agent_api::files::{MAX_CHUNK, MAX_ENTRIES, MAX_EVENT_PATH, MAX_PATH, MODE_BITS, is_name};
use spore_agent_api::v1::files::attributes::Kind;
use spore_agent_api::v1::files::{
    Attributes, Entry, LinkRequest, ListRequest, ListResponse, MakeDirectoryRequest, ReadRequest,
    ReadResponse, RemoveRequest, RenameRequest, SetAttributesRequest, StatRequest, WatchEvent, WatchRequest,
    WriteRequest,
};
use spore_agent_api::v1::files_ttrpc::FilesClient;
use ttrpc::r#async::{Client, ClientStreamReceiver};
use ttrpc::context::{self, Context};

use crate::Global;
use crate::failure::Failure;

/// A call moves a MiB at most; a small guest under load is slow.
const CALL: Duration = Duration::from_secs(120);
/// Longest id of a container.
const MAX_ID: usize = spore_agent_api::stream::MAX_ID;

/// A connection to the shim of one container.
pub(crate) struct Remote {
    client: FilesClient,
    id: String,
}

/// What a path names.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) attributes: Attributes,
    /// Of a link that was not followed.
    pub(crate) target: Vec<u8>,
}

impl Found {
    pub(crate) fn kind(&self) -> Kind {
        self.attributes.kind.enum_value_or_default()
    }

    pub(crate) fn is_directory(&self) -> bool {
        self.kind() == Kind::DIRECTORY
    }
}

/// A piece of a file.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) offset: u64,
    pub(crate) data: Vec<u8>,
    pub(crate) end: bool,
    /// Device and inode.
    pub(crate) identity: (u64, u64),
}

/// Changes as the guest tells them.
pub(crate) struct Watching {
    events: ClientStreamReceiver<WatchEvent>,
    id: String,
}

fn context() -> Context {
    context::with_duration(CALL)
}

impl Remote {
    pub(crate) async fn connect(global: &Global, id: &str) -> Result<Self, Failure> {
        Ok(Self { client: FilesClient::new(shim_of(global, id).await?), id: id.into() })
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    fn failed(&self) -> impl Fn(ttrpc::Error) -> Failure + '_ {
        |error| Failure::of_shim(&self.id, error)
    }

    fn nonsense(&self, detail: impl Into<String>) -> Failure {
        Failure::Nonsense { id: self.id.clone(), detail: detail.into() }
    }

    pub(crate) async fn stat(&self, path: &[u8], follow: bool) -> Result<Found, Failure> {
        let request = StatRequest { id: self.id.clone(), path: path.into(), follow, ..Default::default() };
        let answer = self.client.stat(context(), &request).await.map_err(self.failed())?;
        let attributes = answer.attributes.into_option().filter(|found| found.mode & !MODE_BITS == 0);
        let attributes = attributes.ok_or_else(|| self.nonsense("attributes that no file has"))?;
        let is_link = attributes.kind.enum_value_or_default() == Kind::SYMLINK;
        let target = answer.target;
        if is_link == target.is_empty() || target.len() > MAX_PATH || target.contains(&0) {
            return Err(self.nonsense("a link without a target that can be one"));
        }
        Ok(Found { attributes, target })
    }

    /// The same, or nothing when nothing is there.
    pub(crate) async fn find(&self, path: &[u8], follow: bool) -> Result<Option<Found>, Failure> {
        match self.stat(path, follow).await {
            Ok(found) => Ok(Some(found)),
            Err(failure) if failure.is_not_found() => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Entries behind `after` in the order of their names, and whether more follow.
    pub(crate) async fn list(&self, path: &[u8], after: &[u8]) -> Result<(Vec<Entry>, bool), Failure> {
        let (path, after) = (path.to_vec(), after.to_vec());
        let request = ListRequest { id: self.id.clone(), path, after, ..Default::default() };
        let answer = self.client.list(context(), &request).await.map_err(self.failed())?;
        believed(&request.after, answer).map_err(|detail| self.nonsense(detail))
    }

    pub(crate) async fn read(
        &self,
        path: &[u8],
        offset: u64,
        length: usize,
        skip_hole: bool,
    ) -> Result<Piece, Failure> {
        let length = u32::try_from(length.clamp(1, MAX_CHUNK)).unwrap_or(u32::MAX);
        let path = path.to_vec();
        let request =
            ReadRequest { id: self.id.clone(), path, offset, length, skip_hole, ..Default::default() };
        let answer = self.client.read(context(), &request).await.map_err(self.failed())?;
        piece(&request, answer).map_err(|detail| self.nonsense(detail))
    }

    pub(crate) async fn write(&self, request: WriteRequest) -> Result<(), Failure> {
        let request = WriteRequest { id: self.id.clone(), ..request };
        self.client.write(context(), &request).await.map(drop).map_err(self.failed())
    }

    /// Removes, a tree in as many calls as it takes.
    pub(crate) async fn remove(&self, path: &[u8], recursive: bool) -> Result<u64, Failure> {
        let request =
            RemoveRequest { id: self.id.clone(), path: path.into(), recursive, ..Default::default() };
        let mut removed = 0u64;
        loop {
            let answer = self.client.remove(context(), &request).await.map_err(self.failed())?;
            removed = removed.saturating_add(answer.removed);
            if answer.done {
                return Ok(removed);
            }
        }
    }

    pub(crate) async fn rename(&self, from: &[u8], to: &[u8], replace: bool) -> Result<(), Failure> {
        let (id, from, to) = (self.id.clone(), from.into(), to.into());
        let request = RenameRequest { id, from, to, replace, ..Default::default() };
        self.client.rename(context(), &request).await.map(drop).map_err(self.failed())
    }

    /// Says whether it was missing.
    pub(crate) async fn make_directory(
        &self,
        path: &[u8],
        mode: u32,
        parents: bool,
    ) -> Result<bool, Failure> {
        let (id, path) = (self.id.clone(), path.into());
        let request = MakeDirectoryRequest { id, path, mode, parents, ..Default::default() };
        let answer = self.client.make_directory(context(), &request).await;
        answer.map(|answer| answer.made).map_err(self.failed())
    }

    pub(crate) async fn link(&self, path: &[u8], target: &[u8]) -> Result<(), Failure> {
        let (id, path, target) = (self.id.clone(), path.into(), target.into());
        let request = LinkRequest { id, path, target, ..Default::default() };
        self.client.link(context(), &request).await.map(drop).map_err(self.failed())
    }

    pub(crate) async fn set_attributes(&self, request: SetAttributesRequest) -> Result<(), Failure> {
        let request = SetAttributesRequest { id: self.id.clone(), ..request };
        self.client.set_attributes(context(), &request).await.map(drop).map_err(self.failed())
    }

    pub(crate) async fn watch(&self, path: &[u8], recursive: bool) -> Result<Watching, Failure> {
        let request =
            WatchRequest { id: self.id.clone(), path: path.into(), recursive, ..Default::default() };
        let events = self.client.watch(Context::default(), &request).await.map_err(self.failed())?;
        Ok(Watching { events, id: self.id.clone() })
    }
}

impl Watching {
    /// The next event, as soon as it is there; nothing behind the last.
    pub(crate) async fn next(&mut self) -> Result<Option<WatchEvent>, Failure> {
        let event = self.events.recv().await.map_err(|error| Failure::of_shim(&self.id, error))?;
        if event.as_ref().is_some_and(|event| event.path.len() > MAX_EVENT_PATH) {
            return Err(Failure::Nonsense { id: self.id.clone(), detail: "a path that is too long".into() });
        }
        Ok(event)
    }
}

/// A connection to the shim of a container.
pub(crate) async fn shim_of(global: &Global, id: &str) -> Result<Client, Failure> {
    check_id(id)?;
    let address = address_of(global, id)?;
    Client::connect(&address).await.map_err(|error| Failure::of_shim(id, error))
}

/// Whether there can be such a container.
pub(crate) fn check_id(id: &str) -> Result<(), Failure> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if id.is_empty() || id.len() > MAX_ID || !id.bytes().all(good) || id.starts_with('.') {
        return Err(Failure::Usage(format!("{id:?} is not the id of a container")));
    }
    Ok(())
}

/// The socket of the shim: where containerd's address, namespace and id put it, else where the
/// shim itself has noted it (a containerd that is known by several addresses).
fn address_of(global: &Global, id: &str) -> Result<String, Failure> {
    let computed = containerd_shim::socket_address(global.socket(), &global.namespace, id);
    let answers = |address: &str| {
        let path = address.strip_prefix("unix://").unwrap_or(address);
        UnixStream::connect(Path::new(path)).map(drop)
    };
    let error = match answers(&computed) {
        Ok(()) => return Ok(computed),
        Err(error) => error,
    };
    let run_dir = Config::load().unwrap_or_default().run_dir;
    let noted = running(&run_dir, &global.namespace, id).address.filter(|noted| answers(noted).is_ok());
    noted.ok_or_else(|| {
        let mend = match error.kind() {
            std::io::ErrorKind::PermissionDenied => "run spore as root",
            _ => "\"spore ps\" lists what runs; --namespace and --address say where to look",
        };
        let namespace = &global.namespace;
        Failure::Container {
            id: id.into(),
            detail: format!("no shim of it answers in namespace \"{namespace}\" ({error}); {mend}"),
        }
    })
}

/// Checks a page of a directory.
fn believed(after: &[u8], answer: ListResponse) -> Result<(Vec<Entry>, bool), String> {
    if answer.entries.len() > MAX_ENTRIES {
        return Err(format!(
            "{} entries of a directory, at most {MAX_ENTRIES} are allowed",
            answer.entries.len()
        ));
    }
    let mut last = after;
    for entry in &answer.entries {
        let shown = &entry.name[..entry.name.len().min(64)];
        if !is_name(&entry.name) {
            return Err(format!("an entry \"{}\", which is not a name", crate::show::name(shown)));
        }
        if entry.name.as_slice() <= last {
            return Err(format!("the entry \"{}\" out of order", crate::show::name(shown)));
        }
        if entry.attributes.is_none() || entry.attributes.mode & !MODE_BITS != 0 {
            return Err(format!("no attributes of \"{}\"", crate::show::name(shown)));
        }
        last = &entry.name;
    }
    if answer.more && answer.entries.is_empty() {
        return Err("an empty page of a directory that goes on".into());
    }
    Ok((answer.entries, answer.more))
}

/// Checks a piece of a file.
fn piece(request: &ReadRequest, answer: ReadResponse) -> Result<Piece, String> {
    let ReadResponse { offset, data, end, device, inode, .. } = answer;
    let wanted = usize::try_from(request.length).unwrap_or(usize::MAX);
    if data.len() > wanted {
        return Err(format!("{} bytes of a file where {wanted} were asked for", data.len()));
    }
    let moved = offset < request.offset || offset > request.offset && !request.skip_hole;
    if moved || offset.checked_add(data.len() as u64).is_none() {
        return Err(format!("bytes from {offset} where {} was asked for", request.offset));
    }
    if data.is_empty() && !end {
        return Err("nothing of a file that goes on".into());
    }
    Ok(Piece { offset, data, end, identity: (device, inode) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &[u8]) -> Entry {
        let attributes = Some(Attributes { mode: 0o644, ..Default::default() }).into();
        Entry { name: name.into(), attributes, ..Default::default() }
    }

    fn page(names: &[&[u8]], more: bool) -> ListResponse {
        let entries = names.iter().map(|name| entry(name)).collect();
        ListResponse { entries, more, ..Default::default() }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        assert!(believed(b"", page(&[b"a", b"b"], true)).is_ok());
        for hostile in [&b"../x"[..], b"..", b".", b"/etc/passwd", b"a/b", b"", b"a\0", &[b'x'; 256]] {
            let error = believed(b"", page(&[hostile], false)).unwrap_err();
            assert!(error.contains("not a name"), "{error}");
            assert!(error.len() < 400 && !error.contains('\0'));
        }
    }

    #[test]
    fn a_list_without_end_is_refused() {
        assert!(believed(b"m", page(&[b"a"], true)).unwrap_err().contains("out of order"));
        assert!(believed(b"", page(&[b"a", b"a"], true)).unwrap_err().contains("out of order"));
        assert!(believed(b"", page(&[], true)).unwrap_err().contains("empty page"));
        let many = ListResponse { entries: vec![entry(b"a"); MAX_ENTRIES + 1], ..Default::default() };
        assert!(believed(b"", many).unwrap_err().contains("at most"));
        let bare = ListResponse {
            entries: vec![Entry { name: b"a".into(), ..Default::default() }],
            ..Default::default()
        };
        assert!(believed(b"", bare).unwrap_err().contains("no attributes"));
    }

    #[test]
    fn pieces_are_what_was_asked_for() {
        let request = |skip_hole| ReadRequest { offset: 100, length: 10, skip_hole, ..Default::default() };
        let answer =
            |offset, length, end| ReadResponse { offset, data: vec![0; length], end, ..Default::default() };
        assert!(piece(&request(false), answer(100, 10, false)).is_ok());
        assert!(piece(&request(true), answer(1 << 40, 10, false)).is_ok());
        for (skip, bad) in [
            (false, answer(100, 11, false)),
            (false, answer(101, 1, false)),
            (true, answer(99, 1, false)),
            (true, answer(u64::MAX, 1, true)),
            (true, answer(100, 0, false)),
        ] {
            assert!(piece(&request(skip), bad).is_err());
        }
    }
}
