//! The QEMU of the outer machine: a Debian package of a fixed suite with everything that it
//! needs, libc included, unpacked into the cache and run from there. The machine's own may be
//! too old (see tests/README.md), and is neither needed nor touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::cache;
use super::rootfs::run;

/// Changes when the recipe below changes in a way that its constants do not show.
const RECIPE: &str = "1";
/// QEMU 11 or newer: it changes a CPU's pending interrupts atomically.
const SUITE: &str = "sid";
const PACKAGE: &str = "qemu-system-x86";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// An unpacked QEMU.
#[derive(Debug, Clone)]
pub struct Qemu(PathBuf);

/// From the cache or fetched. `repository` is the checkout, for `packaging/fetch-deb`.
pub fn prepare(repository: &Path) -> Result<Qemu> {
    let key = cache::Key::default().with(RECIPE).with(SUITE).with(PACKAGE);
    let directory = cache::entry("qemu", key, |draft| {
        eprintln!("test bed: fetching QEMU of {SUITE}, once");
        let debs = draft.join("debs");
        let mut fetch = Command::new(repository.join("packaging/fetch-deb"));
        run(fetch.args(["--suite", SUITE, "--closure"]).arg(&debs).arg(PACKAGE))?;
        for deb in fs::read_dir(&debs)? {
            run(Command::new("dpkg-deb").arg("-x").arg(deb?.path()).arg(draft))?;
        }
        fs::remove_dir_all(&debs)?;
        Ok(())
    })?;
    let qemu = Qemu(directory);
    if !qemu.loader().exists() {
        bail!("{} is missing; remove {} and try again", qemu.loader().display(), qemu.0.display());
    }
    Ok(qemu)
}

impl Qemu {
    /// The dynamic loader of the same suite, which the program needs instead of the machine's.
    fn loader(&self) -> PathBuf {
        self.0.join(LIBRARIES).join("ld-linux-x86-64.so.2")
    }

    /// A QEMU that dies with the thread that starts it.
    pub fn command(&self) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(self.loader());
        command.arg("--library-path").arg(self.0.join(LIBRARIES));
        command.arg(self.0.join("usr/bin/qemu-system-x86_64"));
        for firmware in ["usr/share/qemu", "usr/share/seabios"] {
            command.arg("-L").arg(self.0.join(firmware));
        }
        command
    }
}
