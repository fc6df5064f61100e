//! What a case may change about the ground, undone when the value goes: Spore's
//! configuration, mounts. What others would see is for cases that run alone.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const CONFIG: &str = "/etc/spore/config.toml";

/// A changed configuration.
pub(crate) struct Config {
    before: String,
}

impl Config {
    /// Adds lines to the ground's configuration; a key that is there already is replaced.
    pub(crate) fn with(lines: &str) -> Result<Self> {
        let before = fs::read_to_string(CONFIG).with_context(|| format!("reading {CONFIG}"))?;
        let key_of = |line: &str| line.split_once('=').map(|(key, _)| key.trim().to_owned());
        let new: Vec<_> = lines.lines().filter_map(key_of).collect();
        let kept = before.lines().filter(|line| key_of(line).is_none_or(|key| !new.contains(&key)));
        let text = kept.chain(lines.lines()).collect::<Vec<_>>().join("\n") + "\n";
        fs::write(CONFIG, text)?;
        Ok(Self { before })
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        fs::write(CONFIG, &self.before).ok();
    }
}

/// A mount over a path.
pub(crate) struct Over {
    at: PathBuf,
}

impl Over {
    /// Shows `source` at `at`.
    pub(crate) fn bind(source: &Path, at: &Path) -> Result<Self> {
        mount(Some(source), at, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("mounting {} over {}", source.display(), at.display()))?;
        Ok(Self { at: at.to_owned() })
    }

    /// Shows an overlay of `lower` and `upper` at `at`.
    pub(crate) fn overlay(lower: &Path, upper: &Path, work: &Path, at: &Path) -> Result<Self> {
        let options =
            format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        mount(Some("overlay"), at, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .with_context(|| format!("mounting an overlay at {}", at.display()))?;
        Ok(Self { at: at.to_owned() })
    }

    /// Shows an empty file system of `size` bytes at `at`.
    pub(crate) fn small(size: u64, at: &Path) -> Result<Self> {
        let options = CString::new(format!("size={size},mode=700"))?;
        fs::create_dir_all(at)?;
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options.as_c_str()))
            .with_context(|| format!("mounting a small tmpfs over {}", at.display()))?;
        Ok(Self { at: at.to_owned() })
    }
}

impl Drop for Over {
    fn drop(&mut self) {
        umount2(&self.at, MntFlags::MNT_DETACH).ok();
    }
}
