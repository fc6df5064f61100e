//! `spore fs`: the files of a container one at a time, and changes as they happen.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Case, expect_contains, expect_equal};
use crate::waiting::Waiting;
use spore_harness::bed::Subject;
use spore_harness::wait;

pub(crate) const CASES: &[Case] = &[
    Case::new("files::one_at_a_time", one_at_a_time).spore_only(),
    Case::new("files::seen_as_the_container_sees_them", as_the_container).spore_only(),
    Case::new("files::changes_are_told_at_once", changes).spore_only(),
];

const STOPPED: Duration = Duration::from_secs(60);

fn one_at_a_time(subject: &Subject) -> Result<()> {
    let waiting = Waiting::start(subject, "files")?;
    waiting.must("mkdir", &["-p", "-m", "0750"], &["/a/b"])?;
    // More than one piece.
    let sent: Vec<u8> = (0..3_000_000_u32).map(|index| (index / 7).to_le_bytes()[0]).collect();
    let put = waiting.fs("put", &["-m", "0640"], &["/a/b/f"])?.stdin(sent.clone()).run()?;
    ensure!(put.success(), "{put}");
    let got = waiting.fs("cat", &[], &["/a/b/f"])?.run()?;
    ensure!(got.success() && got.stdout == sent, "{got}");
    let sum = waiting.shell("stat -c '%a %u %s' /a/b/f; stat -c %a /a/b")?;
    expect_equal("mode, user and size inside", &sum.as_str(), &"640 0 3000000\n750\n")?;

    waiting.fs("put", &["--offset", "5"], &["/a/b/f"])?.stdin("HERE").run()?;
    let part = waiting.must("cat", &["--offset", "4", "--length", "6"], &["/a/b/f"])?;
    ensure!(part.as_bytes()[1..5] == *b"HERE", "{part:?}");

    waiting.shell("ln -s f /a/b/link; mkdir /a/b/dir; touch -d @86400 /a/b/dir")?;
    let list = waiting.must("ls", &["--json"], &["/a/b"])?;
    let list: Vec<Value> = serde_json::from_str(&list).with_context(|| list.clone())?;
    let names: Vec<_> = list.iter().map(|entry| (&entry["name"], &entry["kind"])).collect();
    let expected = [("dir", "directory"), ("f", "file"), ("link", "symlink")];
    expect_equal("the list", &names.len(), &expected.len())?;
    for ((name, kind), (expected_name, expected_kind)) in names.iter().zip(expected) {
        ensure!(*name == expected_name && *kind == expected_kind, "{name} is {kind}");
    }
    let stat = waiting.must("stat", &[], &["/a/b/dir"])?;
    expect_contains("stat", &stat, "1970-01-02T00:00:00Z")?;
    let target: Value = serde_json::from_str(&waiting.must("stat", &["--json"], &["/a/b/link"])?)?;
    expect_equal("the link's target", &target["target"], &"f".into())?;

    waiting.must("mv", &[], &["/a/b/f", "/a/b/dir"])?;
    waiting.shell("[ -f /a/b/dir/f ] && [ ! -e /a/b/f ]")?;
    let refused = waiting.fs("rm", &[], &["/a"])?.run()?;
    expect_equal("status of rm without -r", &refused.code(), &1)?;
    expect_contains("its message", &refused.errors(), "remove \"/a\": Directory not empty")?;
    waiting.must("rm", &["-r"], &["/a"])?;
    waiting.shell("[ ! -e /a ]")?;
    let missing = waiting.fs("cat", &[], &["/a"])?.run()?;
    expect_equal("status of cat without a file", &missing.code(), &1)?;
    expect_contains("its message", &missing.errors(), "No such file or directory")?;
    ensure!(waiting.fs("rm", &["-f"], &["/a"])?.run()?.success(), "rm -f of nothing");
    Ok(())
}

/// Mounts are seen, links stay inside, a paused container can be looked into and a stopped one not.
fn as_the_container(subject: &Subject) -> Result<()> {
    let volume = tempfile::tempdir_in("/srv/bed")?;
    std::fs::write(volume.path().join("f"), "of the host\n")?;
    let mount = format!("type=bind,src={},dst=/volume,options=rbind:rw", volume.path().display());
    let waiting = Waiting::start_with(subject, "seen", &["--mount", &mount])?;
    expect_equal("a volume", &waiting.must("cat", &[], &["/volume/f"])?.as_str(), &"of the host\n")?;
    let put = waiting.fs("put", &[], &["/volume/g"])?.stdin("of the container\n").run()?;
    ensure!(put.success(), "{put}");
    let written = std::fs::read_to_string(volume.path().join("g"))?;
    expect_equal("what was put into the volume", &written.as_str(), &"of the container\n")?;
    waiting.shell(
        "echo in shared memory > /dev/shm/f; ln -s /etc /escape; printf x > \"$(printf '/odd\\033[2J')\"",
    )?;
    expect_equal("a tmpfs", &waiting.must("cat", &[], &["/dev/shm/f"])?.as_str(), &"in shared memory\n")?;
    let passwd = waiting.must("cat", &[], &["/escape/../../../../etc/passwd"])?;
    expect_contains("the container's passwd", &passwd, "user:x:1000")?;
    expect_equal("its init", &waiting.must("cat", &[], &["/proc/1/comm"])?.as_str(), &"sleep\n")?;
    // The kernel's own links would lead out of any root.
    let refused = waiting.fs("cat", &[], &["/proc/1/root/etc/passwd"])?.run()?;
    expect_equal("status of a way through /proc", &refused.code(), &1)?;
    let list = waiting.must("ls", &[], &["/"])?;
    expect_contains("the list", &list, "/odd\\u{1b}[2J".trim_start_matches('/'))?;
    ensure!(!list.contains('\x1b'), "{list:?}");

    subject.must(&["tasks", "pause", &waiting.id])?;
    let put = waiting.fs("put", &[], &["/while-paused"])?.stdin("x").run()?;
    ensure!(put.success(), "{put}");
    subject.must(&["tasks", "resume", &waiting.id])?;
    waiting.shell("[ -f /while-paused ]")?;

    subject.must(&["tasks", "kill", "--signal", "KILL", &waiting.id])?;
    let stopped = waiting.fs("ls", &[], &["/"])?;
    let output = stopped.run()?;
    expect_equal("status of a stopped one", &output.code(), &1)?;
    expect_contains("its message", &output.errors(), &waiting.id)
}

/// The watch says that it stands before anything happens, and each change while it goes on.
fn changes(subject: &Subject) -> Result<()> {
    let waiting = Waiting::start(subject, "watched")?;
    waiting.shell("mkdir -p /w/deep")?;
    let mut watch = waiting.fs("watch", &["-r"], &["/w"])?.spawn()?;
    watch.says("watching   /w\n")?;
    expect_equal("what is told before anything happens", &watch.stdout().as_str(), &"watching   /w\n")?;
    waiting.shell("echo x > /w/first")?;
    watch.says("created    /w/first\n")?;
    watch.says("written    /w/first\n")?;
    ensure!(!watch.ended()?, "the watch ended: {}", watch.stdout());
    waiting.shell("mkdir /w/new && sleep 0.1 && echo x > /w/new/f && mv /w/new /w/deep/moved")?;
    watch.says("created    /w/new/\n")?;
    watch.says("created    /w/new/f\n")?;
    watch.says("moved-to   /w/deep/moved/\n")?;
    waiting.shell("rm /w/first")?;
    watch.says("removed    /w/first\n")?;
    ensure!(!watch.ended()?, "the watch ended: {}", watch.stdout());

    let mut second = waiting.fs("watch", &["--json"], &["/w/deep"])?.spawn()?;
    second.says("\"watching\"")?;
    // Both end with the container, and Delete does not wait for them.
    subject.must(&["tasks", "kill", "--signal", "KILL", &waiting.id])?;
    for (what, watch) in [("first", watch), ("second", second)] {
        let output = watch.wait()?;
        ensure!(output.text().contains("gone"), "the {what} watch: {output}");
    }
    // The end of a process is not yet the task's: what it wrote is exported in between.
    wait::until("the task has stopped", STOPPED, || {
        let list = subject.must(&["tasks", "ls"]).ok()?;
        list.lines().any(|line| line.starts_with(&waiting.id) && line.contains("STOPPED")).then_some(())
    })?;
    subject.must(&["tasks", "delete", &waiting.id])?;
    Ok(())
}
