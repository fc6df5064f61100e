//! Several tasks of one container, one after the other.

use anyhow::{Result, ensure};
use spore_harness::image;

use super::{Case, expect_equal};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] =
    &[Case::new("tasks::second_sees_the_writes_of_the_first", second_sees_first)];

/// Writes belong to the container's rootfs snapshot: they outlive the task, not the container.
fn second_sees_first(subject: &Subject) -> Result<()> {
    let id = subject.id("twice");
    let script =
        "cat /written 2>/dev/null; echo by a task >> /written; rm -f /etc/group; ls /etc/group 2>/dev/null";
    for generation in ["first container", "same name again"] {
        subject.must(&[
            "containers",
            "create",
            "--runtime",
            subject.runtime.id(),
            image::BUSYBOX,
            &id,
            "sh",
            "-c",
            script,
        ])?;
        for expected in ["", "by a task\n"] {
            let output = subject.ctr(&["tasks", "start", &id])?.run()?;
            ensure!(output.errors().is_empty(), "{generation}: {output}");
            expect_equal(generation, &output.text().as_str(), &expected)?;
            subject.ctr(&["tasks", "delete", &id])?.run()?;
        }
        subject.must(&["containers", "delete", &id])?;
    }
    Ok(())
}
