//! What a container changed of its root file system, as containerd's clients find it in its rootfs
//! snapshot.

use std::process::Command;

use anyhow::{Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::call::Call;

use super::{Case, Difference, equal};
use crate::guest::Guest;

pub(crate) const CASES: &[Case] = &[
    Case::new("changes: snapshots diff of a stopped container", stopped).starts(1),
    Case::new("changes: snapshots diff of a paused container, which then goes on", paused).starts(1),
    Case::new("changes: a second task has what the first wrote", second_task).starts(2),
    Case::new("changes: without the export, by annotation", unexported)
        .starts(2)
        .differs("io.spore.export_changes=false asks for it"),
];

/// Adds, changes, deletes and replaces; its last line says that it is done.
const SCRIPT: &str = "mkdir /made /made/below; echo new > /made/below/file; ln /made/below/file /made/hard; \
     ln -s below/file /made/symbolic; echo more >> /etc/passwd; rm /etc/group; rm -r /var; mkdir /var; echo x > /var/x; \
     chown 7:8 /made/below; chmod 4751 /made/below/file; dd if=/dev/zero of=/made/sparse bs=1 count=1 seek=8388607 2>/dev/null; \
     echo done";

/// The lines of `tar` for what [`SCRIPT`] did, however the rest of the snapshot looks.
fn listed(archive: &[u8]) -> Result<String> {
    let mut tar = Command::new("tar");
    tar.args(["--gzip", "--list", "--verbose", "--numeric-owner", "--full-time"]);
    let output = Call::new(tar).stdin(archive).run()?;
    ensure!(output.success(), "tar: {output}");
    let mut lines = Vec::new();
    for line in output.text().lines() {
        // Without the times, which are of the day, and the sizes of links, which tars differ in.
        let words: Vec<_> = line.split_whitespace().collect();
        let [mode, owner, _size, _date, _time, name @ ..] = words.as_slice() else { continue };
        let name = name.join(" ");
        if ["made", "etc", "var"].iter().any(|top| name.trim_start_matches("./").starts_with(top)) {
            lines.push(format!("{mode} {owner} {name}"));
        }
    }
    lines.sort_unstable();
    Ok(lines.join("\n"))
}

pub(super) fn content(archive: &[u8], name: &str) -> Result<String> {
    let mut tar = Command::new("tar");
    tar.args(["--gzip", "--extract", "--to-stdout", name]);
    let output = Call::new(tar).stdin(archive).run()?;
    ensure!(output.success(), "tar of {name}: {output}");
    Ok(output.text())
}

pub(super) fn diff(subject: &Subject, guest: &Guest) -> Result<Vec<u8>> {
    let output = subject.ctr(&["snapshots", "diff", &guest.id])?.run()?;
    ensure!(output.success(), "ctr snapshots diff: {output}");
    Ok(output.stdout)
}

/// The change that [`SCRIPT`] makes is in the archive, and all of it.
fn check(archive: &[u8]) -> Result<()> {
    let lines = listed(archive)?;
    for part in [
        "etc/.wh.group",
        "0/0 etc/passwd",
        "drwxr-xr-x 0/0 made/",
        "drwxr-xr-x 7/8 made/below/",
        "-rwsr-x--x 0/0 made/below/file",
        "made/hard",
        "made/symbolic -> below/file",
        "made/sparse",
        "var/x",
    ] {
        ensure!(lines.contains(part), "{part:?} is not in {lines}");
    }
    equal("the new file", &content(archive, "made/below/file")?, "new\n")?;
    ensure!(content(archive, "etc/passwd")?.ends_with("\nmore\n"), "the changed file");
    Ok(())
}

fn stopped(subject: &Subject) -> Result<()> {
    let guest = Guest::start_with(subject, &[], &["sh", "-c", SCRIPT])?;
    // Its task is not deleted: `nerdctl commit` and others do not wait for that.
    guest.until("STOPPED")?;
    check(&diff(subject, &guest)?)?;
    let usage = subject.must(&["snapshots", "usage", &guest.id])?;
    ensure!(!usage.contains(" 0.0 B") && usage.contains(&guest.id), "{usage}");
    Ok(())
}

fn paused(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &[])?;
    guest.shell(SCRIPT)?;
    guest.must("pause", &[], &[])?;
    let archive = diff(subject, &guest)?;
    guest.must("resume", &[], &[])?;
    check(&archive)?;
    equal("what the container sees", &guest.shell("cat /made/below/file; ls /var")?, "new\nx\n")?;
    guest.shell("rm /made/below/file /made/hard; echo later > /later")?;
    guest.must("pause", &[], &[])?;
    let archive = diff(subject, &guest)?;
    guest.must("resume", &[], &[])?;
    let lines = listed(&archive)?;
    ensure!(lines.contains("made/symbolic") && !lines.contains("made/below/file\n"), "{lines}");
    equal("what was written since", &content(&archive, "later")?, "later\n")
}

fn second_task(subject: &Subject) -> Result<()> {
    let guest = Guest::start_with(subject, &[], &["sh", "-c", "echo line >> /lines; rm -f /etc/group"])?;
    for count in 1..=2 {
        guest.until("STOPPED")?;
        guest.must("delete", &[], &[])?;
        let archive = diff(subject, &guest)?;
        equal("the file", &content(&archive, "lines")?, &"line\n".repeat(count))?;
        ensure!(listed(&archive)?.contains("etc/.wh.group"), "the deletion");
        if count == 1 {
            guest.must("start", &["--detach"], &[])?;
        }
    }
    Ok(())
}

fn unexported(subject: &Subject) -> Result<()> {
    let options = ["--annotation", "io.spore.export_changes=false"];
    let script = "test ! -e /lines || exit 7; echo line > /lines";
    let guest = Guest::start_with(subject, &options, &["sh", "-c", script])?;
    guest.until("STOPPED")?;
    guest.must("delete", &[], &[])?;
    let mut tar = Command::new("tar");
    tar.args(["--gzip", "--list"]);
    let names = Call::new(tar).stdin(diff(subject, &guest)?).run()?;
    ensure!(names.success() && names.text().contains("lines") != subject.is_spore(), "{names}");
    // The file is there all the same.
    let second = guest.task("start", &[], &[])?.run()?;
    ensure!(second.code() == 7, "{second}");
    if subject.is_spore() { Err(Difference.into()) } else { Ok(()) }
}
