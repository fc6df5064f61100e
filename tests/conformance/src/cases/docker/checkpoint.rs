//! Docker's checkpoints, of containers that have what Docker mounts into every one.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::wait;

use super::{Container, equal};
use crate::cases::{Case, Difference, refused};

pub(crate) const CASES: &[Case] =
    // Alone, as all of the machine is packed, by a guest's own CPU where that is emulated.
    &[Case::new(
        "docker: checkpoint create, and start --checkpoint",
        checkpoint,
    )
    .alone()
    .starts(2)
    .differs(
        "runc needs CRIU for it, which is not here; Spore saves the machine, and puts the disk back with it",
    )];

const SHOWN: Duration = Duration::from_secs(60);
/// The image's disk is packed with the rest.
const PACKED: Duration = Duration::from_secs(900);

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
    let before = counted()?;
    let args = ["checkpoint", "create", "--leave-running", container.id.as_str(), "warm"];
    let output = subject.docker(|docker| docker.call(&args).deadline(PACKED).run())?;
    if !subject.is_spore() {
        fs::remove_dir_all(&directory)?;
        return refused(&output, &["criu"]);
    }
    ensure!(output.success(), "{output}");
    equal("after it", &container.inspect("{{.State.Status}}")?, "running")?;
    let list = subject.docker(|docker| docker.must(&["checkpoint", "ls", &container.id]))?;
    ensure!(list.contains("warm"), "{list}");
    container.shell("echo later > /later")?;
    container.must("kill", &[])?;
    container.must("wait", &[])?;

    container.must("start", &["--checkpoint", "warm"])?;
    let after = counted()?;
    ensure!(after >= before, "it began anew: {before}, {after}");
    // The disk is that of the memory's instant again.
    let look = "test -e /later || echo not yet; grep -c localhost /etc/hosts; cat /etc/hostname";
    let text = container.shell(look)?;
    let name = container.inspect("{{.Config.Hostname}}")?;
    ensure!(text.starts_with("not yet\n") && text.ends_with(&format!("\n{name}\n")), "{text}");
    container.must("kill", &[])?;
    fs::remove_dir_all(&directory)?;
    Err(Difference.into())
}
