//! Container templates: snapshots with a name, which containers of every namespace may begin with. (Boot templates, guests
//! without a container, are others: `crate::template`.)

use std::fs::File;

use super::Store;
use super::error::{StoreError, host};
use super::manifest::{Manifest, Purpose, SnapshotId};
use super::store::Entry;

const MAX_NAME: usize = 64;

/// A name is no id nor the beginning of one, so that both can stand for a snapshot in one place.
fn check(name: &str) -> Result<(), StoreError> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    let detail = if !first || name.len() > MAX_NAME || !name.bytes().all(good) {
        "1 to 64 characters of A-Z a-z 0-9 . _ - are allowed, the first a letter or a digit"
    } else if name.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
        "it reads as the beginning of a snapshot's id; use a letter behind f, or one of . _ -"
    } else {
        return Ok(());
    };
    Err(StoreError::BadName { name: name.chars().take(MAX_NAME).collect(), detail })
}

impl Store {
    /// Whether a template can be called so now.
    pub fn check_name(&self, name: &str) -> Result<(), StoreError> {
        check(name)?;
        let named = |entry: &Entry| entry.manifest.name.as_deref() == Some(name);
        match self.list()?.entries.into_iter().find(named) {
            Some(other) => Err(StoreError::NameTaken { name: name.to_owned(), id: other.manifest.id }),
            None => Ok(()),
        }
    }

    /// Makes a template of a snapshot, which stays: they share their files.
    pub fn name_template(&self, from: SnapshotId, name: &str) -> Result<Manifest, StoreError> {
        let opened = self.open(from)?;
        self.make_root()?;
        // Two who want one name: the second finds the first's.
        let root = File::open(self.root()).map_err(host("open", self.root()))?;
        root.lock().map_err(host("lock", self.root()))?;
        self.check_name(name)?;
        let mut draft = self.begin()?;
        draft.state(&opened.state)?;
        let mut about = opened.manifest.clone();
        if let (Some(volumes), Some(tables)) = (&mut about.volumes, &opened.volumes) {
            volumes.tables = draft.tables(tables)?;
        }
        // In their order, by which everything else in the manifest names them.
        for at in 0..opened.manifest.layers.len() {
            draft.share_layer(&opened, u32::try_from(at).unwrap_or(u32::MAX))?;
        }
        (about.purpose, about.name) = (Purpose::Template, Some(name.to_owned()));
        draft.publish(about)
    }

    /// All of them.
    pub fn templates(&self) -> Result<Vec<Entry>, StoreError> {
        let entries = self.list()?.entries.into_iter();
        Ok(entries.filter(|entry| entry.manifest.purpose == Purpose::Template).collect())
    }

    /// The one that a name or an id means.
    pub fn find_template(&self, wanted: &str) -> Result<SnapshotId, StoreError> {
        let id = self.find(wanted)?;
        if self.entry(id)?.manifest.purpose == Purpose::Template {
            return Ok(id);
        }
        Err(StoreError::NoTemplate { wanted: wanted.to_owned() })
    }
}
