//! Puts the initramfs together and writes the output files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::cpio::Archive;
use crate::elf;
use crate::error::{Error, IoContext, Result};
use crate::modules::{Chosen, Closure, Wanted};
use crate::sha256;
use crate::source::{Kernel, MAX_FILE, read};
use crate::tools::{self, Filter};

/// Where the agent reads the modules' paths, in load order; those of a group in a file with the
/// group's name behind a dot.
const MODULES_FILE: &str = "/etc/spore/modules";

/// An initramfs and what the manifest says of it.
#[derive(Debug)]
pub(crate) struct Initramfs {
    pub(crate) data: Vec<u8>,
    pub(crate) modules: Vec<Value>,
    pub(crate) closure: Closure,
    pub(crate) agent: Value,
}

/// Builds the initramfs of `kernel` with the static executable `agent` as `/init`.
pub(crate) fn build(
    kernel: &Kernel,
    wanted: &[Wanted],
    agent: &Path,
    keep_symbols: bool,
) -> Result<Initramfs> {
    let original = read(agent, "the agent")?;
    let needed =
        elf::check_agent(&original).map_err(|source| Error::Agent { path: agent.to_owned(), source })?;
    // Symbols would sit in every guest's memory.
    let init = if keep_symbols { original } else { elf::without_symbols(&original, needed) };
    let agent = json!({ "bytes": init.len(), "sha256": sha256(&init) });

    let mut archive = Archive::new();
    archive.file("/init", 0o755, init)?;
    for directory in ["/dev", "/proc", "/sys", "/run"] {
        archive.directory(directory, 0o755)?;
    }
    archive.directory("/tmp", 0o1777)?;
    // The kernel opens the console for PID 1 before devtmpfs can be mounted.
    archive.char_device("/dev/console", 0o600, 5, 1)?;
    archive.char_device("/dev/null", 0o666, 1, 3)?;

    let mut listings = BTreeMap::from([(MODULES_FILE.to_owned(), String::new())]);
    let mut described = Vec::new();
    let mut closure = Closure::default();
    if let Some(tree) = &kernel.modules {
        closure = tree.closure(wanted)?;
        for module in &closure.modules {
            let data = unpacked_module(&tree.dir().join(&module.path), module)?;
            let packed = module.path.rsplit_once(".ko").map_or(module.path.as_str(), |(stem, _)| stem);
            let path = format!("/lib/modules/{}/{packed}.ko", kernel.release);
            let list =
                module.group.iter().fold(MODULES_FILE.to_owned(), |list, group| format!("{list}.{group}"));
            let listing = listings.entry(list).or_default();
            listing.push_str(&path);
            listing.push('\n');
            described.push(json!({
                "name": module.name, "group": module.group, "path": path, "reason": module.reason,
                "bytes": data.len(), "sha256": sha256(&data),
            }));
            archive.file(&path, 0o644, data)?;
        }
    }
    for (list, listing) in listings {
        archive.file(&list, 0o644, listing.into_bytes())?;
    }
    Ok(Initramfs { data: archive.finish()?, modules: described, closure, agent })
}

fn unpacked_module(path: &Path, module: &Chosen) -> Result<Vec<u8>> {
    let data = read(path, "a module")?;
    let filter = match module.path.rsplit_once(".ko").map(|(_, end)| end) {
        Some("") => None,
        Some(".xz") => Some(Filter::Xz),
        Some(".zst") => Some(Filter::Zstd),
        Some(".gz") => Some(Filter::Gzip),
        _ => return Err(Error::ModuleFormat { path: path.to_owned() }),
    };
    let data = match filter {
        Some(filter) => tools::unpack(filter, &data, MAX_FILE, &module.path)?,
        None => data,
    };
    elf::check_module(&data).map_err(|source| Error::ModuleElf { path: path.to_owned(), source })?;
    Ok(data)
}

/// A finished output file.
#[derive(Debug)]
pub(crate) struct Output<'a> {
    pub(crate) name: &'static str,
    pub(crate) data: &'a [u8],
}

/// The manifest: nothing in it depends on time or place.
pub(crate) fn manifest(kernel: &Kernel, initramfs: &Initramfs, outputs: &[Output<'_>]) -> Vec<u8> {
    let files: serde_json::Map<String, Value> = outputs
        .iter()
        .map(|output| {
            (output.name.to_owned(), json!({ "bytes": output.data.len(), "sha256": sha256(output.data) }))
        })
        .collect();
    let manifest = json!({
        "format": 1,
        "kernel_release": kernel.release,
        "source": kernel.origin,
        "agent": initramfs.agent,
        "files": files,
        "modules": initramfs.modules,
        "built_in": initramfs.closure.built_in,
        "soft_dependencies_not_found": initramfs.closure.unresolved,
    });
    let mut text = format!("{manifest:#}").into_bytes();
    text.push(b'\n');
    text
}

/// Writes `data` to `dir/name` so that a reader sees the old file or the new one. An
/// unchanged file keeps its time stamp, for make. Says whether it changed.
pub(crate) fn write(dir: &Path, name: &str, data: &[u8]) -> Result<bool> {
    let path: PathBuf = dir.join(name);
    if std::fs::read(&path).is_ok_and(|old| old == data) {
        return Ok(false);
    }
    let mut file = tempfile::NamedTempFile::new_in(dir).context("make a temporary file in", dir)?;
    std::io::Write::write_all(&mut file, data).context("write", &path)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    file.as_file().set_permissions(mode).context("set the mode of", &path)?;
    file.persist(&path).map_err(|error| error.error).context("rename a temporary file to", &path)?;
    Ok(true)
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
