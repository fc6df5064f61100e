//! Docker's checkpoints, of containers that have what Docker mounts into every one.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::wait;

use super::{Container, equal};
use crate::cases::{Case, Difference};

pub(crate) const CASES: &[Case] =
    &[Case::new("docker: checkpoint create, and start --checkpoint", checkpoint).starts(3).differs(
        "runc needs CRIU for it, which is not here; Spore saves the machine, and puts the disk back with it",
    )];

const SHOWN: Duration = Duration::from_secs(60);

/// Counts in memory and, by the same step, on its disk; tells both when it is asked.
const COUNTER: &str = "n=0; while :; do n=$((n+1)); echo $n > /next; mv /next /n; \
    if [ -e /data/ask ]; then rm /data/ask; echo $n $(cat /n) > /data/next; mv /data/next /data/told; fi; \
    usleep 1000; done";

fn checkpoint(subject: &Subject) -> Result<()> {
    let directory = subject.bed.rootfs().with_file_name(subject.id("docker-checkpoint"));
    fs::create_dir(&directory)?;
    let volume = format!("{}:/data", directory.display());
    let container = Container::start(subject, &["-v", &volume], &["sh", "-c", COUNTER])?;
    let counted = || -> Result<u64> {
        fs::write(directory.join("ask"), "")?;
        let text =
            wait::until("the container has told", SHOWN, || fs::read_to_string(directory.join("told")).ok())?;
        fs::remove_file(directory.join("told"))?;
        let (memory, disk) = text.trim_end().split_once(' ').with_context(|| text.clone())?;
        equal("the counter on disk", disk, memory)?;
        Ok(memory.parse()?)
    };
    let create = |options: &[&str], name: &str| {
        let args = [&["checkpoint", "create"], options, &[container.id.as_str(), name]].concat();
        subject.docker(|docker| docker.call(&args).run())
    };
    counted()?;
    let output = create(&["--leave-running"], "first")?;
    if !subject.is_spore() {
        ensure!(!output.success(), "{output}");
        fs::remove_dir_all(&directory)?;
        return Ok(());
    }
    ensure!(output.success(), "{output}");
    equal("after it", &container.inspect("{{.State.Status}}")?, "running")?;
    container.shell("echo later > /later")?;
    let before = counted()?;
    let output = create(&[], "second")?;
    ensure!(output.success(), "{output}");
    container.must("wait", &[])?;
    equal("after the second", &container.inspect("{{.State.Status}}")?, "exited")?;
    let list = subject.docker(|docker| docker.must(&["checkpoint", "ls", &container.id]))?;
    ensure!(list.contains("first") && list.contains("second"), "{list}");

    container.must("start", &["--checkpoint", "second"])?;
    let after = counted()?;
    ensure!(after >= before, "it began anew: {before}, {after}");
    let look = "cat /later; grep -c localhost /etc/hosts; cat /etc/hostname";
    let name = container.inspect("{{.Config.Hostname}}")?;
    let text = container.shell(look)?;
    ensure!(text.starts_with("later\n") && text.ends_with(&format!("\n{name}\n")), "{text}");
    container.must("kill", &[])?;

    // The disk is that of the memory's instant again.
    container.must("start", &["--checkpoint", "first"])?;
    counted()?;
    equal("later, before it was", &container.shell("ls /later 2>&1 | grep -c 'No such'")?, "1\n")?;
    container.must("kill", &[])?;
    fs::remove_dir_all(&directory)?;
    Err(Difference.into())
}
