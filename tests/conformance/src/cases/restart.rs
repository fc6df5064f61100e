//! containerd killed by force and started again finds its tasks.

use anyhow::{Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::containerd::Containerd;

use super::{Case, equal};
use crate::guest::Guest;

pub(crate) const CASES: &[Case] =
    &[Case::new("restart: containerd killed finds its tasks again", finds_tasks).starts(1).alone()];

fn finds_tasks(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &[])?;
    let before = guest.shell("cat /proc/sys/kernel/random/boot_id; readlink /proc/1/ns/pid")?;
    subject.with(Containerd::restart)?;
    equal("state", &guest.status()?, "RUNNING")?;
    equal(
        "what runs",
        &guest.shell("cat /proc/sys/kernel/random/boot_id; readlink /proc/1/ns/pid")?,
        &before,
    )?;
    guest.must("kill", &["--signal", "KILL"], &[])?;
    guest.until("STOPPED")?;
    let deleted = guest.task("delete", &[], &[])?.run()?;
    ensure!(deleted.success() && deleted.errors().contains("137"), "{deleted}");
    Ok(())
}
