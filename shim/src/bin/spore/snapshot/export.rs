//! `spore snapshot export`.

use std::fs::File;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_spore::chain;
use containerd_shim_spore::snapshot::manifest::Purpose;
use containerd_shim_spore::snapshot::{Opened, SnapshotId, StoreError, export_tar};
use serde_json::json;

use super::transfer::{self, Meter, Metered, STANDARD};
use crate::Global;
use crate::failure::Failure;
use crate::show;

/// Bytes that are written at once.
const BUFFER: usize = 1 << 20;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The snapshot's id, or enough of its beginning
    id: String,
    /// Where to; - is standard output
    file: PathBuf,
}

pub(super) async fn run(global: &Global, args: Args) -> Result<(), Failure> {
    let Args { id, file } = args;
    let store = super::store()?;
    let id = store.find(&id)?;
    let snapshot = store.open(id)?;
    if snapshot.manifest.purpose == Purpose::Template {
        return Err(Failure::Usage(format!(
            "snapshot {id} is a template, which no host takes from elsewhere; export a snapshot, and make a template of it there"
        )));
    }
    let standard = file.as_os_str() == STANDARD;
    if standard && io::stdout().is_terminal() {
        return Err(Failure::Usage("an archive is nothing for a terminal; name a file, or redirect".into()));
    }
    eprintln!(
        "spore: warning: snapshot {id}: the guest's memory travels in the archive, keys and passwords with it"
    );
    let (name, from) = (format!("snapshot {id}"), file.clone());
    transfer::run(&name, move |meter| {
        if standard { to_output(&snapshot, meter) } else { to_file(&snapshot, &file, meter) }
    })
    .await?;
    if global.json && !standard {
        show::json(&json!({ "id": id, "file": show::json_name(from.as_os_str().as_encoded_bytes()) }))?;
    }
    Ok(())
}

fn to_output(snapshot: &Opened, meter: &Arc<Meter>) -> Result<(), Failure> {
    // Past the buffer of standard output, which looks for lines.
    let out = io::stdout().as_fd().try_clone_to_owned().map_err(Failure::Output)?;
    let mut out = BufWriter::with_capacity(BUFFER, Metered::new(File::from(out), meter));
    export_tar(snapshot, &mut out).map_err(|error| match error {
        StoreError::Host { source, .. } if source.kind() == io::ErrorKind::BrokenPipe => {
            Failure::Output(source)
        }
        error => error.into(),
    })
}

/// A file is there whole or not at all, and nobody but its owner reads it.
fn to_file(snapshot: &Opened, path: &Path, meter: &Arc<Meter>) -> Result<(), Failure> {
    let shown = show::name(path.as_os_str().as_encoded_bytes());
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => {
            return Err(Failure::Refused(format!("{shown}: it is no file; redirect standard output there")));
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(Failure::host("look at", path)(error));
        }
        _ => {}
    }
    let draft = Draft(beside(path, snapshot.manifest.id));
    let made = File::options().write(true).create_new(true).mode(0o600).open(&draft.0);
    let mut file = made.map_err(Failure::host("make", &draft.0))?;
    let mut out = BufWriter::with_capacity(BUFFER, Metered::new(&mut file, meter));
    export_tar(snapshot, &mut out)
        .map_err(|error| Failure::Refused(format!("{shown}: {}", chain(&error))))?;
    out.flush().map_err(Failure::host("write", path))?;
    drop(out);
    file.sync_all().map_err(Failure::host("write back", path))?;
    std::fs::rename(&draft.0, path).map_err(Failure::host("write", path))
}

/// A file that is not complete. What is renamed has this name no more.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn beside(path: &Path, id: SnapshotId) -> PathBuf {
    path.with_file_name(format!(".spore-export-{}-{id}", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_complete_lies_beside_the_file() {
        let id = "0123456789abcdef0123456789abcdef".parse().unwrap();
        let name = format!(".spore-export-{}-{id}", std::process::id());
        assert_eq!(beside(Path::new("/a/b.tar"), id), Path::new("/a").join(&name));
        assert_eq!(beside(Path::new("b.tar"), id), Path::new(&name));
    }
}
