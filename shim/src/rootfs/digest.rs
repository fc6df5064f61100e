//! Read-only image disks with their digests, which every checkpoint names and which take as long as reading all of the image.
//! That of an image in the cache is kept in a file beside it, `<image>.digest`; a checkpoint tells those of its own.
//!
//! Whatever is kept is believed only of the very file that was read: of this device, inode, birth, length and time
//! of the last change. A file that was replaced is another inode or was born later, one that was written to has another time; to be
//! sure of that, nothing is kept of a file that was changed a moment ago, when the clock of files may still stand.

use std::fs::{File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::writable::publish;

const VERSION: u32 = 1;
const SUFFIX: &str = ".digest";
/// More than any file system's clock stands still.
const SETTLED: Duration = Duration::from_secs(2);
const MAX_NOTE: u64 = 4096;

/// A read-only disk.
#[derive(Debug)]
pub(crate) struct Image {
    file: File,
    known: Known,
}

#[derive(Debug, Clone)]
enum Known {
    /// What is in this file.
    Kept(PathBuf),
    Told(Option<Note>),
    Nothing,
}

/// Which file, as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    device: u64,
    inode: u64,
    /// Where the file system knows it.
    born_ns: Option<u128>,
    length: u64,
    changed_s: i64,
    changed_ns: i64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    version: u32,
    of: Identity,
    /// As snapshots have it of a layer.
    sha256: String,
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        let born = metadata.created().ok().and_then(|born| born.duration_since(UNIX_EPOCH).ok());
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            born_ns: born.map(|born| born.as_nanos()),
            length: metadata.len(),
            changed_s: metadata.mtime(),
            changed_ns: metadata.mtime_nsec(),
        }
    }
}

impl Image {
    /// In the cache, at `path`.
    pub(super) fn cached(file: File, path: &Path) -> Self {
        let mut note = path.as_os_str().to_owned();
        note.push(SUFFIX);
        Self { file, known: Known::Kept(note.into()) }
    }

    pub(crate) fn other(file: File) -> Self {
        Self { file, known: Known::Nothing }
    }

    /// A snapshot's, as its manifest describes it.
    pub(crate) fn told(file: File, sha256: &str) -> Self {
        let of = file.metadata().ok().map(|metadata| Identity::of(&metadata));
        let note = of.map(|of| Note { version: VERSION, of, sha256: sha256.to_owned() });
        Self { file, known: Known::Told(note) }
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, known: self.known.clone() })
    }

    /// The digest, where it is known without reading the image.
    pub(crate) fn known(&self) -> Option<String> {
        let of = Identity::of(&self.file.metadata().ok()?);
        self.note().filter(|note| note.of == of).map(|note| note.sha256)
    }

    fn note(&self) -> Option<Note> {
        match &self.known {
            Known::Kept(path) => read(path),
            Known::Told(note) => note.clone(),
            Known::Nothing => None,
        }
    }

    /// The digest, which `compute` finds when it is not known yet.
    pub(crate) fn digest(&self, compute: impl FnOnce(&File) -> io::Result<String>) -> io::Result<String> {
        let before = self.file.metadata()?;
        let of = Identity::of(&before);
        let note = self.note();
        if let Some(note) = note.filter(|note| note.of == of) {
            return Ok(note.sha256);
        }
        let age = SystemTime::now().duration_since(before.modified()?).unwrap_or_default();
        let sha256 = compute(&self.file)?;
        if let Known::Kept(path) = &self.known
            && age >= SETTLED
            && Identity::of(&self.file.metadata()?) == of
        {
            // Where it cannot be kept, it is computed again.
            let _ = keep(path, &Note { version: VERSION, of, sha256: sha256.clone() });
        }
        Ok(sha256)
    }
}

/// What is not one of ours is as good as none.
fn read(path: &Path) -> Option<Note> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(MAX_NOTE).read_to_end(&mut text).ok()?;
    let note: Note = serde_json::from_slice(&text).ok()?;
    let is_digest = note.sha256.len() == 64 && note.sha256.bytes().all(|byte| byte.is_ascii_hexdigit());
    (note.version == VERSION && is_digest).then_some(note)
}

fn keep(path: &Path, note: &Note) -> io::Result<()> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let text = serde_json::to_vec(note)?;
    publish(dir, name, |mut file| file.write_all(&text))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const LONG_AGO: Duration = Duration::from_secs(1_000_000_000);

    struct Cache(tempfile::TempDir);

    impl Cache {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn path(&self) -> PathBuf {
            self.0.path().join("chain.erofs")
        }

        fn note(&self) -> PathBuf {
            self.0.path().join("chain.erofs.digest")
        }

        fn put(&self, content: &str, changed: Duration) {
            std::fs::write(self.path(), content).unwrap();
            File::options()
                .write(true)
                .open(self.path())
                .unwrap()
                .set_modified(UNIX_EPOCH + changed)
                .unwrap();
        }

        /// The digest, and whether it had to be computed.
        fn digest(&self) -> (String, bool) {
            asked(&Image::cached(File::open(self.path()).unwrap(), &self.path()))
        }
    }

    fn asked(image: &Image) -> (String, bool) {
        let computed = Cell::new(false);
        let digest = image.digest(|file| {
            computed.set(true);
            let mut text = String::new();
            io::Read::read_to_string(&mut &*file, &mut text)?;
            Ok(format!("{text:0>64}"))
        });
        (digest.unwrap(), computed.get())
    }

    fn is(digit: char, computed: bool) -> (String, bool) {
        (format!("{digit:0>64}"), computed)
    }

    #[test]
    fn a_digest_is_computed_once_and_not_believed_of_a_changed_or_replaced_file() {
        let cache = Cache::new();
        cache.put("1", LONG_AGO);
        assert_eq!([cache.digest(), cache.digest()], [is('1', true), is('1', false)]);
        // Its length stays.
        cache.put("2", LONG_AGO + Duration::from_nanos(1));
        assert_eq!([cache.digest(), cache.digest()], [is('2', true), is('2', false)]);
        let aside = cache.0.path().join("aside");
        std::fs::write(&aside, "3").unwrap();
        File::options()
            .write(true)
            .open(&aside)
            .unwrap()
            .set_modified(UNIX_EPOCH + LONG_AGO + Duration::from_nanos(1))
            .unwrap();
        std::fs::rename(aside, cache.path()).unwrap();
        assert_eq!(cache.digest(), is('3', true), "another file of the same length and time");
        // A further name changes nothing.
        std::fs::hard_link(cache.path(), cache.0.path().join("layer.disk")).unwrap();
        assert_eq!(cache.digest(), is('3', false));
    }

    #[test]
    fn nothing_is_kept_of_a_file_that_may_be_being_written() {
        let cache = Cache::new();
        let soon = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + Duration::from_secs(3600);
        cache.put("1", soon);
        assert_eq!([cache.digest(), cache.digest()], [is('1', true), is('1', true)]);
        assert!(!cache.note().exists());
    }

    #[test]
    fn a_note_that_is_none_is_written_anew() {
        let cache = Cache::new();
        cache.put("1", LONG_AGO);
        cache.digest();
        let good = std::fs::read_to_string(cache.note()).unwrap();
        for bad in ["", "{", &good.replace(":1,", ":2,"), &good.replace("0001", "../x"), &"x".repeat(100_000)]
        {
            assert_ne!(bad, good);
            std::fs::write(cache.note(), bad).unwrap();
            assert_eq!(cache.digest(), is('1', true), "{bad}");
        }
        assert_eq!(cache.digest(), is('1', false));
    }

    #[test]
    fn a_told_digest_is_that_of_the_file_as_it_was() {
        let cache = Cache::new();
        cache.put("1", LONG_AGO);
        let told = Image::told(File::open(cache.path()).unwrap(), &"f".repeat(64));
        assert_eq!(asked(&told), ("f".repeat(64), false));
        cache.put("2", LONG_AGO + LONG_AGO);
        assert_eq!(asked(&told.try_clone().unwrap()), is('2', true));
        assert!(asked(&Image::other(File::open(cache.path()).unwrap())).1);
        assert!(!cache.note().exists());
    }
}
