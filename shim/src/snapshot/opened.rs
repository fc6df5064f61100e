//! A snapshot that is read.

use std::fs::File;
use std::io::{self, Read};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use super::error::{FileError, StoreError};
use super::manifest::{self, Layer, Manifest, STATE, VOLUMES, hex};
use super::sparse;
use super::store::file_in;

/// See the module above. Holds every file open, for reading.
#[derive(Debug)]
pub struct Opened {
    pub manifest: Manifest,
    /// Content of `state.bin`, its digest checked.
    pub state: Vec<u8>,
    /// Of `volumes.json`, if there is one; likewise.
    pub volumes: Option<Vec<u8>>,
    /// As in the manifest.
    layers: Vec<File>,
}

impl Opened {
    pub(super) fn new(manifest: Manifest, dir: &File) -> Result<Self, StoreError> {
        let id = manifest.id;
        let bad = |file: &str| {
            let file = file.to_owned();
            move |source| StoreError::File { id, file, source }
        };
        let state = content(dir, STATE, &manifest.state).map_err(bad(STATE))?;
        let volumes = manifest.volumes.as_ref().map(|volumes| content(dir, VOLUMES, &volumes.tables));
        let volumes = volumes.transpose().map_err(bad(VOLUMES))?;
        let mut layers = Vec::with_capacity(manifest.layers.len());
        for layer in &manifest.layers {
            let name = layer.file_name();
            let file = file_in(dir, &name).map_err(bad(&name))?;
            length(&file, layer.file.length).map_err(bad(&name))?;
            layers.push(file);
        }
        Ok(Self { manifest, state, volumes, layers })
    }

    /// The layers and their open files.
    pub fn layers(&self) -> impl Iterator<Item = (&Layer, &File)> {
        self.manifest.layers.iter().zip(&self.layers)
    }

    /// Reads all layers and compares them with what the manifest says of them.
    pub fn verify(&self) -> Result<(), StoreError> {
        self.verify_those(|_| Ok(true))
    }

    /// The same for the layers that were written to at this time or later.
    pub(super) fn verify_written_since(&self, time: SystemTime) -> Result<(), StoreError> {
        self.verify_those(|file| Ok(file.metadata()?.modified()? >= time))
    }

    fn verify_those(&self, which: impl Fn(&File) -> io::Result<bool>) -> Result<(), StoreError> {
        for (layer, file) in self.layers() {
            let checked = match which(file) {
                Ok(false) => continue,
                Ok(true) => sparse::digest(file).map_err(FileError::Read),
                Err(error) => Err(FileError::Read(error)),
            };
            checked.and_then(|found| same(found, &layer.file.sha256)).map_err(|source| StoreError::File {
                id: self.manifest.id,
                file: layer.file_name(),
                source,
            })?;
        }
        Ok(())
    }
}

/// A file whose length is below a cap, by the manifest's check; its digest is checked.
fn content(dir: &File, name: &str, expected: &manifest::File) -> Result<Vec<u8>, FileError> {
    let file = file_in(dir, name)?;
    length(&file, expected.length)?;
    let mut bytes = Vec::new();
    file.take(expected.length).read_to_end(&mut bytes)?;
    same(hex(&Sha256::digest(&bytes)), &expected.sha256)?;
    Ok(bytes)
}

pub(super) fn length(file: &File, expected: u64) -> Result<(), FileError> {
    let found = file.metadata()?.len();
    if found == expected { Ok(()) } else { Err(FileError::Length { found, expected }) }
}

pub(super) fn same(found: String, expected: &str) -> Result<(), FileError> {
    if found.eq_ignore_ascii_case(expected) {
        return Ok(());
    }
    Err(FileError::Digest { found, expected: expected.to_owned() })
}
