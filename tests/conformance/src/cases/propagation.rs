//! Which mounts of one side appear on the other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use spore_harness::bed::Subject;
use spore_harness::call::Call;
use spore_harness::wait;

use super::config::{is_refused, said};
use super::volumes::Directory;
use super::{Case, Difference, equal};
use crate::guest::Guest;

pub(crate) const CASES: &[Case] = &[
    Case::new("propagation: of the root, by its names with and without r", of_the_root).starts(3),
    Case::new("propagation: of the root, an unknown one is refused", unknown).starts(1),
    Case::new("propagation: a volume that is rslave has what the host mounts later", slave)
        .starts(1)
        .differs("the host's mounts are another kernel's; the volume is what was mounted when the container was created"),
    Case::new("propagation: a volume that is rprivate has not", private).starts(1),
];

fn of_the_root(subject: &Subject) -> Result<()> {
    // Debian's runc takes "shared" and leaves the root private.
    for (propagation, may_be_shared) in [("rshared", true), ("rslave", false), ("private", false)] {
        let script = "grep -E '^[0-9]+ [0-9]+ [0-9:]+ [^ ]+ / ' /proc/self/mountinfo | tail -n 1";
        let said = said(subject, script, |spec| spec["linux"]["rootfsPropagation"] = json!(propagation))?;
        ensure!(said.contains(" / "), "{propagation}: {said:?}");
        ensure!(may_be_shared || !said.contains("shared:"), "{propagation}: {said:?}");
        ensure!(!subject.is_spore() || said.contains("shared:") == may_be_shared, "{propagation}: {said:?}");
    }
    Ok(())
}

fn unknown(subject: &Subject) -> Result<()> {
    is_refused(subject, &["ropagation"], |spec| spec["linux"]["rootfsPropagation"] = json!("perhaps"))
}

/// A mount that goes with the value.
struct Mounted(PathBuf);

impl Mounted {
    fn new(arguments: &[&str], at: &Path) -> Result<Self> {
        let mut mount = Command::new("mount");
        mount.args(arguments).arg(at);
        let output = Call::new(mount).run()?;
        ensure!(output.success(), "{output}");
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let mut umount = Command::new("umount");
        umount.arg("--lazy").arg(&self.0);
        Call::new(umount).run().ok();
    }
}

/// Mounts something below a volume's source once the container runs; whether the container has it.
fn has_later_mount(subject: &Subject, options: &str) -> Result<bool> {
    let directory = Directory::new(subject)?;
    let path = directory.path();
    let _own = Mounted::new(&["--bind", &path.display().to_string()], path)?;
    let mut share = Command::new("mount");
    share.arg("--make-shared").arg(path);
    let shared = Call::new(share).run()?;
    ensure!(shared.success(), "{shared}");
    let below = path.join("below");
    fs::create_dir(&below)?;
    let guest = Guest::start(subject, &["--mount", &directory.mount(options)])?;
    let _later = Mounted::new(&["-t", "tmpfs", "none"], &below)?;
    fs::write(below.join("later"), "mounted later\n")?;
    fs::write(path.join("plain"), "there\n")?;
    // What the host writes is there; so whatever else could be is as well.
    wait::until("a file of the host", Duration::from_secs(60), || {
        guest.shell("cat /data/plain").is_ok_and(|text| text == "there\n").then_some(())
    })?;
    let found = guest.shell("cat /data/below/later 2>/dev/null || echo nothing")?;
    if found != "nothing\n" {
        equal("the file", &found, "mounted later\n")?;
    }
    Ok(found != "nothing\n")
}

fn slave(subject: &Subject) -> Result<()> {
    let has = has_later_mount(subject, "rbind:rw:rslave")?;
    if subject.is_spore() && !has {
        return Err(Difference.into());
    }
    ensure!(has, "the later mount is not there");
    Ok(())
}

fn private(subject: &Subject) -> Result<()> {
    ensure!(!has_later_mount(subject, "rbind:rw:rprivate")?, "the later mount is there");
    Ok(())
}
