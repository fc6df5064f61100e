//! The initramfs of the outer machine and of the probe guest: our own static binary as
//! `/init`, and what it needs before it has a disk.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::archive::cpio::Writer;
use crate::job::Job;

/// The job's description in the outer machine's initramfs.
pub const JOB: &str = "/job.json";
/// Folder of kernel modules to load, in the order of their names. They may be compressed: the
/// outer kernel unpacks them itself.
pub const MODULES: &str = "/modules";

/// For the outer machine.
pub fn outer(init: &Path, modules: &[std::path::PathBuf], job: &Job) -> Result<Vec<u8>> {
    let mut archive = base(init)?;
    archive.directory(MODULES)?;
    for (index, module) in modules.iter().enumerate() {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        archive.file(&format!("{MODULES}/{index}-{name}"), 0o644, &read(module)?)?;
    }
    archive.file(JOB, 0o644, &serde_json::to_vec(job)?)?;
    Ok(archive.finish()?)
}

/// For the probe guest: no job, so `/init` greets and powers off.
pub fn probe(init: &Path) -> Result<Vec<u8>> {
    Ok(base(init)?.finish()?)
}

fn base(init: &Path) -> Result<Writer<Vec<u8>>> {
    let mut archive = Writer::new(Vec::new());
    for directory in ["/dev", "/proc", "/sys", "/root"] {
        archive.directory(directory)?;
    }
    // The kernel opens it for PID 1 before anything is mounted.
    archive.character_device("/dev/console", 0o600, 5, 1)?;
    archive.file("/init", 0o755, &read(init)?)?;
    Ok(archive)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}
