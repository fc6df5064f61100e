//! What Docker finds of a container's changes: diff, commit, cp.

use std::fs;

use anyhow::{Result, ensure};
use spore_harness::bed::Subject;

use super::{Container, equal};
use crate::cases::{Case, Difference};

pub(crate) const CASES: &[Case] = &[
    Case::new("docker: diff of a stopped container", diff).starts(1),
    Case::new("docker: diff of a running container", diff_running).starts(1).differs(
        "what a container writes reaches the engine when it is paused or ends; `docker commit` pauses",
    ),
    Case::new("docker: commit of a running container, and of the same stopped", commit).starts(3),
    Case::new("docker: cp from and to a stopped container, which starts with it", copy).starts(2),
];

/// Waits for its end.
fn ended(container: &Container) -> Result<()> {
    equal("its status", container.must("wait", &[])?.trim_end(), "0")
}

fn diff(subject: &Subject) -> Result<()> {
    let script = "mkdir /made; echo new > /made/file; echo more >> /etc/passwd; rm /etc/group; rm -r /var";
    let container = Container::start(subject, &[], &["sh", "-c", script])?;
    ended(&container)?;
    let text = container.must("diff", &[])?;
    for line in ["A /made", "A /made/file", "C /etc", "C /etc/passwd", "D /etc/group", "D /var"] {
        ensure!(text.lines().any(|found| found == line), "{line:?} is not in {text:?}");
    }
    Ok(())
}

fn diff_running(subject: &Subject) -> Result<()> {
    let container = Container::start(subject, &[], &["sh", "-c", "sleep 1000"])?;
    container.shell("mkdir /made")?;
    let text = container.must("diff", &[])?;
    if subject.is_spore() && text.trim().is_empty() {
        return Err(Difference.into());
    }
    ensure!(text.lines().any(|found| found == "A /made"), "{text:?}");
    Ok(())
}

/// Commits the container, runs a script on what has come of it, and removes that.
fn on_commit(subject: &Subject, container: &Container, script: &str) -> Result<String> {
    let image = subject.id("committed");
    subject.docker(|docker| docker.must(&["commit", &container.id, &image]))?;
    let mut args = vec!["run", "--rm", "--network", "none", "--runtime", subject.runtime.id()];
    args.extend([image.as_str(), "sh", "-c", script]);
    let output = subject.docker(|docker| docker.call(&args).run())?;
    subject.docker(|docker| docker.call(&["rmi", &image]).run())?;
    ensure!(output.success(), "{output}");
    Ok(output.text())
}

fn commit(subject: &Subject) -> Result<()> {
    let script = "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";
    let container = Container::start(subject, &[], &["sh", "-c", script])?;
    container.shell("mkdir -p /made; echo 1 > /made/file; rm /etc/group; chown 7:8 /made")?;
    let look = "cat /made/file; stat -c %u:%g /made; test -e /etc/group || echo gone";
    equal("of a running container", &on_commit(subject, &container, look)?, "1\n7:8\ngone\n")?;
    container.shell("echo 2 >> /made/file; echo x > /etc/group")?;
    container.must("stop", &[])?;
    let look = "cat /made/file /etc/group";
    equal("of the stopped container", &on_commit(subject, &container, look)?, "1\n2\nx\n")
}

fn copy(subject: &Subject) -> Result<()> {
    let script = "cat /given /made 2>/dev/null; echo guest > /made; echo line >> /lines; cat /lines";
    let container = Container::start(subject, &[], &["sh", "-c", script])?;
    ended(&container)?;
    let cp = |from: &str, to: &str| subject.docker(|docker| docker.must(&["cp", from, to]));
    let directory = subject.bed.rootfs().with_file_name(subject.id("docker-cp"));
    fs::create_dir(&directory)?;
    let on_host = |name: &str| directory.join(name).display().to_string();
    let inside = |name: &str| format!("{}:/{name}", container.id);
    cp(&inside("made"), &on_host("made"))?;
    equal("the copy", &fs::read_to_string(on_host("made"))?, "guest\n")?;
    for name in ["given", "made"] {
        fs::write(on_host(name), format!("host's {name}\n"))?;
        cp(&on_host(name), &inside(name))?;
    }
    fs::remove_dir_all(&directory)?;
    container.must("start", &[])?;
    ended(&container)?;
    equal("its logs", &container.must("logs", &[])?, "line\nhost's given\nhost's made\nline\nline\n")
}
