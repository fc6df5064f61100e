//! Checkpoints as containerd's clients see them: a directory that Checkpoint fills and Create is given, with a snapshot
//! in it that has all that it needs. On this host the snapshot is in the store as well, where
//! Create finds it again without reading the directory's layers.
//!
//! A directory becomes a tar stream, and is removed, or stays. It stays if the client named it (`image_path` of [`CheckpointOptions`]);
//! containerd from 2.0 on passes that on as the request's path, whatever the runtime is, and packs nothing then. Any other path of a request is a temporary
//! directory of containerd's, which it packs: always for Docker and CRI, which name none, and before 2.0 also where a client
//! has named one. So who is not sure that it stays gets it packed.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::shim::oci::CheckpointOptions;
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use crate::clone::Identity;
use crate::config::Machine;
use crate::error::Error;
use crate::rootfs::Image;
use crate::rundir::{Running, running};
use crate::snapshot::manifest::{FILE, LayerKind, Purpose};
use crate::snapshot::{
    ImportError, Manifest, Opened, Placed, Policy, SnapshotId, Store, StoreError, export_directory,
    export_plain, import_directory,
};
use crate::volumes::SavedVolumes;
use crate::zygote;

/// The name of [`CheckpointOptions`], which clients send whatever the runtime is.
const OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";
/// Most files of a checkpoint: more than a VMM can be given at once.
const MOST_LAYERS: usize = 200;
/// The store's copy of a checkpoint serves to find it again quickly; the client has its own.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// What a container's snapshot says of it beside the VM's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remembered {
    /// The container's id in the guest.
    pub(crate) guest_id: String,
    pub(crate) terminal: bool,
    pub(crate) memory_mib: u64,
}

const GUEST_ID: &str = "guest-id";
const TERMINAL: &str = "terminal";
const MEMORY_MIB: &str = "memory-mib";

impl Remembered {
    pub(crate) fn labels(&self) -> BTreeMap<String, String> {
        let Self { guest_id, terminal, memory_mib } = self;
        [(GUEST_ID, guest_id.clone()), (TERMINAL, terminal.to_string()), (MEMORY_MIB, memory_mib.to_string())]
            .map(|(key, value)| (key.to_owned(), value))
            .into()
    }

    fn of(labels: &BTreeMap<String, String>) -> Option<Self> {
        Some(Self {
            guest_id: labels.get(GUEST_ID)?.clone(),
            terminal: labels.get(TERMINAL)?.parse().ok()?,
            memory_mib: labels.get(MEMORY_MIB)?.parse().ok()?,
        })
    }

    /// Of a machine with so many processors, if that can be one of Spore's.
    pub(crate) fn of_machine(labels: &BTreeMap<String, String>, vcpus: u8) -> Option<Self> {
        Self::of(labels)
            .filter(|found| crate::config::is_machine(vcpus, found.memory_mib) && !found.guest_id.is_empty())
    }
}

/// What a client wants beside the checkpoint itself.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Wishes {
    /// The task shall end with it.
    pub(crate) exit: bool,
    /// A directory for the checkpoint, which containerd itself names in the request, or names another.
    pub(crate) image_path: Option<PathBuf>,
}

impl Wishes {
    /// Options of other types are somebody else's, and none are ours.
    pub(crate) fn decode(options: Option<&Any>) -> Result<Self, Error> {
        let Some(options) = options.filter(|any| any.type_url.rsplit('/').next() == Some(OPTIONS)) else {
            return Ok(Self::default());
        };
        let decoded = CheckpointOptions::parse_from_bytes(&options.value)
            .map_err(|error| Error::Invalid(format!("checkpoint: options: {error}")))?;
        let image_path = (!decoded.image_path.is_empty()).then(|| PathBuf::from(decoded.image_path));
        Ok(Self { exit: decoded.exit, image_path })
    }
}

/// Runs work on the store elsewhere.
pub(crate) async fn blocking<T: Send + 'static, E: Send + 'static + Into<Error>>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Into::into),
        Err(error) => Err(Error::State(format!("snapshot: cut short in the shim: {error}"))),
    }
}

/// Whether there is room for a snapshot of this machine, at worst.
pub(crate) fn admit(store: &Store, machine: &Machine) -> Result<(), StoreError> {
    prune(store, None)?;
    store.admit(&Policy::ADMITTED, machine.memory_mib << 20)
}

/// Removes what the store has kept for long enough, or so many of it.
pub(crate) fn prune(store: &Store, most: Option<usize>) -> Result<(), StoreError> {
    let aged = Policy { max_age: Some(KEPT), only: Some(Purpose::Checkpoint), most, ..Policy::default() };
    store.prune(&aged, 0, SystemTime::now()).map(drop)
}

/// Removes what a task has hibernated in, but for one, and what any has whose shim is no more, after a power failure say: nothing can
/// wake there.
pub(crate) fn forget_hibernations(
    store: &Store,
    run_dir: &Path,
    own: (&str, &str),
    but: Option<SnapshotId>,
) -> Result<(), StoreError> {
    for Manifest { id, purpose, namespace, container, .. } in
        store.list()?.entries.into_iter().map(|entry| entry.manifest)
    {
        let of = (namespace.as_str(), container.as_str());
        if purpose == Purpose::Hibernation
            && Some(id) != but
            && (of == own || running(run_dir, of.0, of.1) == Running::default())
        {
            store.remove(id)?;
        }
    }
    Ok(())
}

/// Where a checkpoint shall go.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Becomes a tar stream, which has no holes and shares nothing.
    Packed(PathBuf),
    /// Stays, and is the client's.
    Plain(PathBuf),
}

impl Target {
    fn dir(&self) -> &Path {
        let (Self::Packed(dir) | Self::Plain(dir)) = self;
        dir
    }
}

/// The directories for a checkpoint, of which none has one yet.
pub(crate) fn targets(path: String, image_path: Option<PathBuf>) -> Result<Vec<Target>, Error> {
    if path.is_empty() {
        return Err(Error::Invalid("checkpoint: the request names no directory for it".into()));
    }
    let path = PathBuf::from(path);
    let packed = (image_path.as_ref() != Some(&path)).then_some(Target::Packed(path));
    let to: Vec<_> = packed.into_iter().chain(image_path.map(Target::Plain)).collect();
    match to.iter().map(Target::dir).find(|dir| dir.join(FILE).exists()) {
        Some(taken) => Err(Error::State(format!(
            "checkpoint: there is one in {} already; remove it or name another directory",
            taken.display()
        ))),
        None => Ok(to),
    }
}

/// Writes a snapshot of the store into directories of a client's.
pub(crate) fn export(store: &Store, id: SnapshotId, to: &[Target]) -> Result<Placed, StoreError> {
    let snapshot = store.open(id)?;
    let mut placed = Placed::default();
    for target in to {
        let dir = target.dir();
        std::fs::create_dir_all(dir).map_err(StoreError::own("make", dir))?;
        match target {
            Target::Packed(dir) => export_directory(&snapshot, dir)?,
            Target::Plain(dir) => placed = export_plain(&snapshot, dir)?,
        }
    }
    Ok(placed)
}

/// A checkpoint that a task is going to be.
pub(crate) struct Restored {
    pub(crate) remembered: Remembered,
    pub(crate) vcpus: u8,
    /// Nothing if its VMM is forked off a zygote.
    pub(crate) state: Option<File>,
    pub(crate) zygote: Option<zygote::Source>,
    /// Memory layers by id.
    pub(crate) memory: Vec<(String, File)>,
    /// Read-only disks by serial.
    pub(crate) lower: Vec<(String, Image)>,
    /// The writable one's serial and layers, from the bottom up.
    pub(crate) writable: (String, Vec<File>),
    pub(crate) volumes: Option<SavedVolumes>,
    /// What it gets of its own, if it is a clone.
    pub(crate) identity: Option<Identity>,
}

impl Restored {
    /// Takes the checkpoint in a directory into the store, if it is not there yet, and opens it.
    pub(crate) fn import(store: &Store, dir: &Path) -> Result<Self, ImportError> {
        prune(store, None)?;
        let id = import_directory(store, dir, &Policy::ADMITTED)?;
        let opened = store.open(id)?;
        Self::new(&opened)
    }

    /// A snapshot of the store's of this very container, by its namespace and id.
    pub(crate) fn own(
        store: &Store,
        id: SnapshotId,
        (namespace, container): (&str, &str),
        purposes: &[Purpose],
    ) -> Result<Self, Error> {
        let opened = store.open(id)?;
        let manifest = &opened.manifest;
        if (manifest.namespace.as_str(), manifest.container.as_str()) != (namespace, container) {
            return Err(Error::State(format!(
                "snapshot {id} is of container {} in namespace {}, not of container {container}",
                manifest.container, manifest.namespace
            )));
        }
        if !purposes.contains(&manifest.purpose) {
            return Err(Error::State(format!(
                "snapshot {id} is a {}, to which nothing goes back",
                manifest.purpose.name()
            )));
        }
        Ok(Self::new(&opened)?)
    }

    pub(crate) fn new(opened: &Opened) -> Result<Self, ImportError> {
        let Opened { manifest, state, volumes, .. } = opened;
        let unfit = |detail: &str| ImportError::Entry { name: FILE.into(), detail: detail.into() };
        let remembered = Remembered::of_machine(&manifest.labels, manifest.vcpus).ok_or_else(|| {
            unfit("it is no container's: labels are missing or malformed, or no machine of Spore's is like that")
        })?;
        if manifest.layers.len() > MOST_LAYERS {
            return Err(unfit("no machine of Spore's has so many layers"));
        }
        let copy = |file: &File| {
            file.try_clone().map_err(|error| ImportError::Store(StoreError::own("open", "a layer")(error)))
        };
        let files: Vec<_> = opened.layers().collect();
        let mut memory = Vec::new();
        for (layer, file) in files.iter().filter(|(layer, _)| layer.kind == LayerKind::Memory) {
            memory.push((layer.id.to_string(), copy(file)?));
        }
        let (mut lower, mut writable): (Vec<_>, _) = (Vec::new(), None);
        for disk in &manifest.disks {
            let (mut layers, mut digests) = (Vec::new(), Vec::new());
            for &at in &disk.layers {
                let file = usize::try_from(at).ok().and_then(|at| files.get(at));
                let (layer, file) = file.ok_or_else(|| unfit("a disk without its layer"))?;
                layers.push(copy(file)?);
                digests.push(&layer.file.sha256);
            }
            match (disk.serial.starts_with("rw"), &digests[..]) {
                (true, _) if writable.is_none() => writable = Some((disk.serial.clone(), layers)),
                (false, [digest]) => {
                    let images = layers.into_iter().map(|file| Image::told(file, digest));
                    lower.extend(images.map(|image| (disk.serial.clone(), image)));
                }
                _ => return Err(unfit("disks that no container of Spore's has")),
            }
        }
        let writable = writable.ok_or_else(|| unfit("there is no writable disk among its disks"))?;
        let state = memory_file(state).map_err(StoreError::own("copy", "state.bin"))?;
        let volumes = match (&manifest.volumes, volumes) {
            (Some(about), Some(tables)) => {
                let tables = memory_file(tables).map_err(StoreError::own("copy", "volumes.json"))?;
                Some(SavedVolumes { exports: about.exports.clone(), tables })
            }
            _ => None,
        };
        let (vcpus, state, zygote, identity) = (manifest.vcpus, Some(state), None, None);
        Ok(Self { remembered, vcpus, state, zygote, memory, lower, writable, volumes, identity })
    }
}

/// A file in memory: the VMM reads the bytes whose digest was checked.
pub(crate) fn memory_file(bytes: &[u8]) -> std::io::Result<File> {
    use std::io::{Seek, Write};
    let mut file: File = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC)?.into();
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_is_kept_for_a_day_and_snapshots_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        prune(&store, None).unwrap();
        let [old, older, asked, young] = [
            (Purpose::Checkpoint, 25),
            (Purpose::Checkpoint, 26),
            (Purpose::Snapshot, 1000),
            (Purpose::Checkpoint, 23),
        ]
        .map(|(purpose, hours)| {
            let mut draft = store.begin().unwrap();
            draft.state(b"x").unwrap();
            let id = draft.publish(Manifest::about(purpose, "default", "web")).unwrap().id;
            let arrived = SystemTime::now() - Duration::from_secs(hours * 3600);
            File::open(store.root().join(id.to_string())).unwrap().set_modified(arrived).unwrap();
            id
        });
        let there =
            || -> Vec<_> { store.list().unwrap().entries.iter().map(|entry| entry.manifest.id).collect() };
        prune(&store, Some(1)).unwrap();
        assert_eq!(there(), [asked, old, young], "{older} was the oldest of them");
        prune(&store, Some(1)).unwrap();
        assert_eq!(there(), [asked, young]);
        prune(&store, None).unwrap();
        assert_eq!(there(), [asked, young]);
    }

    #[test]
    fn what_a_snapshot_remembers_is_read_from_its_labels() {
        let remembered = Remembered { guest_id: "web".into(), terminal: true, memory_mib: 256 };
        let mut labels = remembered.labels();
        assert_eq!(Remembered::of(&labels), Some(remembered));
        labels.insert(MEMORY_MIB.into(), "much".into());
        assert_eq!(Remembered::of(&labels), None);
    }

    #[test]
    fn only_a_directory_that_the_client_named_stays() {
        let named = |path: &str| Some(PathBuf::from(path));
        let packed = |path: &str| Target::Packed(path.into());
        let plain = |path: &str| Target::Plain(path.into());
        assert_eq!(targets("/run/ctrd-checkpoint1".into(), None).unwrap(), [packed("/run/ctrd-checkpoint1")]);
        assert_eq!(targets("/mine".into(), named("/mine")).unwrap(), [plain("/mine")]);
        let both = [packed("/run/ctrd-checkpoint1"), plain("/mine")];
        assert_eq!(targets("/run/ctrd-checkpoint1".into(), named("/mine")).unwrap(), both);
        assert!(targets(String::new(), named("/mine")).is_err());
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "").unwrap();
        let path = dir.path().to_string_lossy().into_owned();
        assert!(targets(path.clone(), None).is_err());
        assert!(targets("/elsewhere".into(), named(&path)).is_err());
    }

    #[test]
    fn wishes_are_those_of_runcs_options() {
        assert_eq!(Wishes::decode(None).unwrap(), Wishes::default());
        let options =
            CheckpointOptions { exit: true, image_path: "/there".into(), ..CheckpointOptions::default() };
        let any = |name: &str, value| Any { type_url: name.into(), value, ..Any::default() };
        let bytes = options.write_to_bytes().unwrap();
        let wishes = Wishes::decode(Some(&any(OPTIONS, bytes.clone()))).unwrap();
        assert_eq!(wishes, Wishes { exit: true, image_path: Some("/there".into()) });
        assert_eq!(Wishes::decode(Some(&any("another.Options", bytes))).unwrap(), Wishes::default());
        assert!(Wishes::decode(Some(&any(OPTIONS, vec![0xff]))).is_err());
    }
}
