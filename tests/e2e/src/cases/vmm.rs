//! The VMM without a shim, as people who work on it use it.

use std::process::Command;

use anyhow::{Result, ensure};
use spore_harness::call::Call;

use super::{Case, expect_contains};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[Case::new("vmm::by_hand", by_hand).spore_only().since("2.")];

/// Ctrl-A p.
const POWER_BUTTON: &[u8] = b"\x01p";

/// `spore-vmm run` boots the guest at a terminal; its power button shuts the guest down in order.
fn by_hand(_: &Subject) -> Result<()> {
    let disk = tempfile::NamedTempFile::new()?;
    disk.as_file().set_len(1 << 20)?;
    let disk = &disk.path().display().to_string();
    let lib = "/usr/local/lib/spore";
    let mut command = Command::new("/usr/local/libexec/spore/spore-vmm");
    command.args(["run", "--console", "--disk", disk, "--append", "loglevel=6"]);
    command.args(["--kernel", &format!("{lib}/vmlinux"), "--initrd", &format!("{lib}/initramfs")]);
    let mut running = Call::new(command).spawn_with_open_stdin()?;
    running.says("Linux version ")?;
    // There is no shim: the agent says so and goes on.
    running.says("ready, but the host does not listen")?;
    running.feed(POWER_BUTTON)?;
    let output = running.wait()?;
    ensure!(output.success(), "{output}");
    expect_contains("the console", &output.text(), "[vda] 2048 512-byte logical blocks")?;
    expect_contains("the console", &output.text(), "Power down")
}
