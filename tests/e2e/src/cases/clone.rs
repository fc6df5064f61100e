//! Running copies of a container: `spore clone`, and the annotation that it stands on. Each goes on where its source was,
//! and is somebody else.

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::net::TcpListener;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use spore_harness::bed::Subject;
use spore_harness::call::Output;
use spore_harness::docker::IMAGE;
use spore_harness::image::BUSYBOX;
use spore_harness::network::space::Space;

use super::checkpoint::{COUNTER, SHOWN, Scene, inventory_after_a_snapshot};
use super::{Case, expect_contains, expect_equal, soak};
use spore_harness::wait;

pub(crate) const CASES: &[Case] = &[
    Case::new("clone::of_a_running_container", of_a_running_container)
        .spore_only()
        .newest_unless_soak()
        .starts(1 + CLONES),
    Case::new("clone::all_or_nothing", all_or_nothing).spore_only().alone().starts(4),
    Case::new("clone::of_a_clone", of_a_clone).spore_only().starts(4),
    Case::new("clone::in_another_network", in_another_network).spore_only().starts(2),
    Case::new("clone::by_docker", by_docker).spore_only().newest_unless_soak().starts(2),
    Case::new("clone::of_what_cannot_be_is_refused", refusals).spore_only().starts(2),
    Case::new("clone::of_a_template", of_a_template).spore_only().starts(1 + CLONES),
];

const CLONES: usize = 4;
/// In `make soak`.
const MANY: usize = 32;

/// A counter on a machine that has an id.
fn machine() -> String {
    format!("echo 0123456789abcdef0123456789abcdef > /etc/machine-id; {COUNTER}")
}

/// All that tells one machine from another, one to a line.
const IDENTITY: &str = "[ -S /dev/spore/generation.sock ] && hostname; cat /etc/machine-id /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid \
    /dev/spore/generation; head -c 16 /dev/urandom | od -A n -t x1";
const PARTS: [&str; 6] = ["hostname", "machine id", "boot id", "UUID", "generation", "random numbers"];

/// `spore ARGS`, which must succeed.
fn must(subject: &Subject, args: &[&str]) -> Result<String> {
    let output = subject.spore(args)?.run()?;
    ensure!(output.success(), "spore {args:?}: {output}");
    Ok(output.text())
}

fn refused(subject: &Subject, args: &[&str], status: i32, part: &str) -> Result<()> {
    let output = subject.spore(args)?.run()?;
    expect_equal("status", &output.code(), &status)?;
    expect_contains("standard error", &output.errors(), "spore: error: ")?;
    expect_contains("standard error", &output.errors(), part)
}

fn snapshots(subject: &Subject) -> Result<Vec<Value>> {
    Ok(serde_json::from_str(&must(subject, &["snapshot", "ls", "--json"])?)?)
}

fn identity(scene: &Scene, id: &str) -> Result<Vec<String>> {
    let told = scene.says(id, IDENTITY)?;
    let lines: Vec<_> = told.lines().map(|line| line.trim().to_owned()).collect();
    ensure!(lines.len() == PARTS.len() && lines.iter().all(|line| !line.is_empty()), "{id}: {told:?}");
    Ok(lines)
}

/// Fails when two machines have one part of their identities in common.
fn all_differ(identities: &[Vec<String>]) -> Result<()> {
    for (at, part) in PARTS.iter().enumerate() {
        let different: HashSet<_> = identities.iter().map(|identity| &identity[at]).collect();
        ensure!(different.len() == identities.len(), "{part}: not all differ: {identities:?}");
    }
    Ok(())
}

/// Each goes on from one instant, memory and disk, and so does the source.
fn of_a_running_container(subject: &Subject) -> Result<()> {
    let count = if soak().is_some() { MANY } else { CLONES };
    let mut scene = Scene::new(subject);
    let source = scene.start("cloned", &machine())?;
    let before = scene.counted(&source)?;
    let first = identity(&scene, &source)?;
    let told = must(subject, &["clone", &source, "--count", &count.to_string(), "--json"])?;
    let told: Value = serde_json::from_str(&told).with_context(|| told.clone())?;
    let clones = told["clones"].as_array().context("no clones are told")?;
    let names: Vec<_> = clones.iter().filter_map(|clone| clone["id"].as_str().map(str::to_owned)).collect();
    for name in &names {
        scene.adopt(name);
    }
    let expected: Vec<_> = (1..=count).map(|number| format!("{source}-{number}")).collect();
    expect_equal("the clones' names", &names, &expected)?;
    for time in ["stood_ns", "zygote_ns", "wall_ns"] {
        ensure!(told[time].as_u64().is_some_and(|ns| ns > 0), "{time} in {told}");
    }
    ensure!(
        snapshots(subject)?.iter().all(|row| row["container"] != source.as_str()),
        "something was written"
    );
    let mut identities = vec![first];
    for (name, clone) in names.iter().zip(clones) {
        let (memory, disk) = scene.counted(name)?;
        expect_equal("the counters in memory and on disk", &memory, &disk)?;
        ensure!(memory > before.0, "{name} began anew: {before:?}, {memory}");
        identities.push(identity(&scene, name)?);
        expect_equal("its host name", &identities[identities.len() - 1][0], name)?;
        let tasks = subject.must(&["tasks", "ls"])?;
        let line = tasks.lines().find(|line| line.split_whitespace().next() == Some(name.as_str()));
        let line = line.with_context(|| tasks.clone())?;
        expect_contains("its task", line, "RUNNING")?;
        expect_contains("its task", line, &format!(" {} ", clone["pid"]))?;
        let record = subject.must(&["containers", "info", name])?;
        ensure!(!record.contains("clone-from"), "its next task would be a clone: {record}");
    }
    all_differ(&identities)?;
    let after = scene.counted(&source)?;
    ensure!(after.0 > before.0, "the source has not gone on: {before:?}, {after:?}");
    let again = identity(&scene, &source)?;
    // What is drawn anew each time is another.
    for at in [0, 1, 2, 4] {
        expect_equal(PARTS[at], &again[at], &identities[0][at])?;
    }
    Ok(())
}

/// The last one's rootfs snapshot is there already, so that it fails when others run.
fn all_or_nothing(subject: &Subject) -> Result<()> {
    let [one, two, taken] = ["one", "two", "taken"].map(|what| subject.id(what));
    let probe = subject.id("probe");
    subject.must(&["containers", "create", "--runtime", subject.runtime.id(), BUSYBOX, &probe])?;
    let info: Value = serde_json::from_str(&subject.must(&["snapshots", "info", &probe])?)?;
    subject.must(&["containers", "delete", &probe])?;
    let parent = info["Parent"].as_str().context("the rootfs snapshot has no parent")?;
    subject.must(&["snapshots", "prepare", &taken, parent])?;
    let before = inventory_after_a_snapshot(subject)?;

    let mut scene = Scene::new(subject);
    let source = scene.start("source", COUNTER)?;
    let counted = scene.counted(&source)?;
    let names = ["--name", &one, "--name", &two, "--name", &taken];
    let clone = [&["clone", source.as_str()], &names[..]].concat();
    refused(subject, &clone, 1, &format!("clone \"{taken}\": make its rootfs snapshot"))?;
    ensure!(scene.counted(&source)?.0 > counted.0, "the source has not gone on");
    // Refused before anything is made.
    refused(subject, &["clone", &source, "--name", &one, "--name", &one], 2, "cannot have one name")?;
    refused(subject, &["clone", &source, "--name", &source], 1, "there is one of that name already")?;
    drop(scene);
    subject.nothing_beyond(&before)?;
    subject.must(&["snapshots", "rm", &taken]).map(drop)
}

/// What is cloned twice is as good as what is cloned once; the next task of a clone is an ordinary one, with its disk.
fn of_a_clone(subject: &Subject) -> Result<()> {
    let mut scene = Scene::new(subject);
    let source = scene.start("source", &machine())?;
    let before = scene.counted(&source)?;
    let (clone, again) = (scene.name("clone"), scene.name("again"));
    expect_equal(
        "its name",
        &must(subject, &["clone", &source, "--name", &clone])?.trim_end(),
        &clone.as_str(),
    )?;
    let between = scene.counted(&clone)?;
    ensure!(between.0 > before.0, "{before:?}, {between:?}");
    must(subject, &["clone", &clone, "--name", &again])?;
    let after = scene.counted(&again)?;
    ensure!(after.0 > between.0, "{between:?}, {after:?}");
    expect_equal("the counters in memory and on disk", &after.0, &after.1)?;
    let identities = [&source, &clone, &again].map(|id| identity(&scene, id));
    all_differ(&identities.into_iter().collect::<Result<Vec<_>>>()?)?;

    scene.says(&clone, "echo kept > /kept; sync")?;
    start_again(subject, &clone)?;
    expect_equal("what it kept", &scene.says(&clone, "cat /kept")?.as_str(), &"kept\n")
}

/// Ends a container's task by force, and starts another.
fn start_again(subject: &Subject, id: &str) -> Result<()> {
    subject.must(&["tasks", "kill", "--signal", "KILL", id])?;
    wait::until("its task is gone", SHOWN, || {
        subject.ctr(&["tasks", "delete", id]).ok()?.run().ok().filter(Output::success)
    })?;
    subject.must(&["tasks", "start", "--detach", id]).map(drop)
}

/// A clone has its namespace's addresses. A connection of its source's, which is none of its own, has ended; the source's goes on.
fn in_another_network(subject: &Subject) -> Result<()> {
    let [lan, here, there] = ["lan", "here", "there"].map(|what| Space::new(&subject.id(what)));
    let (lan, here, there) = (lan?, here?, there?);
    here.wire(("eth0", "10.77.1.2/24"), &lan, ("here", "10.77.1.1/24"))?;
    there.wire(("eth0", "10.77.2.2/24"), &lan, ("there", "10.77.2.1/24"))?;
    here.ip("route add default via 10.77.1.1")?;
    there.ip("route add default via 10.77.2.1")?;
    let listener = lan.within(|| Ok(TcpListener::bind("10.77.1.1:7000")?))?;
    let mut scene = Scene::new(subject);
    let source = scene.name("connected");
    let namespace = format!("network:{}", here.path().display());
    // One that is always about to send, and one that waits.
    let script = "nc 10.77.1.1 7000 < /dev/zero > /dev/null & mkfifo /quiet; sleep 100000 > /quiet & \
        nc 10.77.1.1 7000 < /quiet; touch /ended; sleep 100000";
    let mut args = vec!["run", "--detach", "--runtime", subject.runtime.id(), "--with-ns", &namespace];
    args.extend([BUSYBOX, &source, "sh", "-c", script]);
    subject.must(&args)?;
    let (busy, _) = listener.accept()?;
    let (idle, _) = listener.accept()?;
    refused(subject, &["clone", &source], 1, "--network-namespace")?;
    let clone = scene.name("elsewhere");
    let path = there.path().display().to_string();
    must(subject, &["clone", &source, "--name", &clone, "--network-namespace", &path])?;
    let both = |script: &str| -> Result<[String; 2]> {
        Ok([scene.says(&source, script)?, scene.says(&clone, script)?])
    };
    let [mac, other] = both("cat /sys/class/net/eth0/address")?;
    ensure!(mac != other, "both have MAC {mac}");
    let [own, others] = both("ip -4 addr show eth0")?;
    expect_contains("the source's address", &own, "10.77.1.2/24")?;
    expect_contains("the clone's address", &others, "10.77.2.2/24")?;
    scene.says(&clone, "cat /ended")?;
    expect_equal("what has ended in the source", &scene.shell(&source, "cat /ended")?.code(), &1)?;
    let still = scene.says(&source, "netstat -tn | grep -c 'ESTABLISHED'")?;
    let mut gone = scene.says(&clone, "netstat -tn | grep -c 'ESTABLISHED' || true")?;
    gone.truncate(1);
    expect_equal(
        "connections of the source and of the clone",
        &(still.trim_end(), gone.as_str()),
        &("2", "0"),
    )?;
    for mut connection in [busy, idle] {
        connection.set_nonblocking(true)?;
        let mut buffer = vec![0; 1 << 20];
        // Whatever has come by now: it is no end and no reset.
        match connection.read(&mut buffer) {
            Ok(length) => ensure!(length > 0, "the source's connection has ended"),
            Err(error) => expect_equal("its state", &error.kind(), &std::io::ErrorKind::WouldBlock)?,
        }
    }
    Ok(())
}

/// Ordinary containers, made by another client than ours, which begin warmed up.
fn of_a_template(subject: &Subject) -> Result<()> {
    let mut scene = Scene::new(subject);
    let source = scene.start("warm", &machine())?;
    let before = scene.counted(&source)?;
    let name = subject.id("template");
    refused(subject, &["template", "create", "cafe", "--from", &source], 1, "a snapshot's id")?;
    let id = must(subject, &["template", "create", &name, "--from", &source])?;
    refused(subject, &["template", "create", &name, "--snapshot", id.trim_end()], 1, "has this name")?;
    let listed: Value = serde_json::from_str(&must(subject, &["template", "ls", "--json"])?)?;
    let row = listed.as_array().and_then(|rows| rows.iter().find(|row| row["name"] == name.as_str()));
    let row = row.with_context(|| listed.to_string())?;
    expect_equal(
        "its id and its container",
        &(&row["id"], &row["container"]),
        &(&id.trim_end().into(), &source.as_str().into()),
    )?;
    let others = snapshots(subject)?.into_iter().filter(|row| row["container"] == source.as_str()).count();
    expect_equal("snapshots of the container, the template among them", &others, &1)?;
    let mut identities = vec![identity(&scene, &source)?];
    let annotation = format!("io.spore.clone-from={name}");
    for what in ["first", "second", "third"] {
        let id = scene.name(what);
        let runtime = subject.runtime.id();
        let run = [
            "run",
            "--detach",
            "--runtime",
            runtime,
            "--annotation",
            &annotation,
            BUSYBOX,
            &id,
            "sleep",
            "100000",
        ];
        subject.must(&run)?;
        let (memory, disk) = scene.counted(&id)?;
        expect_equal("the counters in memory and on disk", &memory, &disk)?;
        ensure!(memory > before.0, "{what} began anew: {before:?}, {memory}");
        identities.push(identity(&scene, &id)?);
        expect_equal("its host name", &identities[identities.len() - 1][0], &id)?;
    }
    all_differ(&identities)?;
    must(subject, &["template", "rm", &name])?;
    refused(subject, &["template", "rm", &name], 1, "there is none")?;
    let gone = subject.run_with("late", &["--annotation", &annotation], BUSYBOX, &["true"])?.run()?;
    ensure!(!gone.success(), "{gone}");
    expect_contains("standard error", &gone.errors(), "there is none")?;
    // Those that began with it have what they need.
    let last = scene.last();
    let counted = scene.counted(&last)?;
    // Its next task is its own command, on the disk that the clone has left.
    start_again(subject, &last)?;
    let kept = scene.says(&last, "cat /n")?;
    ensure!(kept.trim().parse::<u64>()? >= counted.1, "{counted:?}, {kept}");
    expect_contains("its first process", &scene.says(&last, "cat /proc/1/cmdline")?, "sleep")
}

/// Docker's engine knows the containers that it makes itself, so it makes the clone.
fn by_docker(subject: &Subject) -> Result<()> {
    const NAMESPACE: &str = "docker";
    let docker = |args: &[&str]| subject.docker(|docker| docker.must(args));
    let run = |name: &str, options: &[&str], command: &[&str]| {
        let fixed =
            ["run", "--detach", "--network", "none", "--runtime", subject.runtime.id(), "--name", name];
        docker(&[&fixed[..], options, &[IMAGE], command].concat())
    };
    let [source, clone] = ["source", "clone"].map(|what| subject.id(what));
    let _removed = [&source, &clone].map(|name| Dockers { subject, name });
    let id = run(&source, &[], &["sh", "-c", &machine()])?;
    let shell = |name: &str, script: &str| docker(&["exec", name, "sh", "-c", script]);
    let counted = |name: &str| -> Result<u64> {
        let told = wait::until("it has told", SHOWN, || shell(name, "cat /n").ok()?.trim().parse().ok())?;
        Ok(told)
    };
    let before = counted(&source)?;
    let spore = |args: &[&str]| subject.with(|containerd| containerd.spore_in(NAMESPACE, args).run());
    let output = spore(&["snapshot", "create", id.trim_end()])?;
    ensure!(output.success(), "{output}");
    let snapshot = output.text();
    let annotation = format!("io.spore.clone-from={}", snapshot.trim_end());
    let made = run(&clone, &["--annotation", &annotation], &["sleep", "100000"]);
    must(subject, &["snapshot", "rm", snapshot.trim_end()])?;
    made?;
    let after = counted(&clone)?;
    ensure!(after > before, "it began anew: {before}, {after}");
    let told = "hostname; cat /etc/hostname /etc/machine-id /proc/sys/kernel/random/boot_id";
    let (one, other) = (shell(&source, told)?, shell(&clone, told)?);
    let same = one.lines().zip(other.lines()).filter(|(one, other)| one == other).count();
    expect_equal("what both are", &(one.lines().count(), same), &(4, 0))?;
    let lines: Vec<_> = other.lines().collect();
    expect_equal("its host name, by /etc/hostname", &lines[0], &lines[1])?;
    let refused = spore(&["clone", id.trim_end()])?;
    expect_contains("standard error", &refused.errors(), "Docker's engine runs it")?;
    // The next task is its own command on the clone's disk.
    docker(&["restart", "--time", "0", &clone])?;
    ensure!(counted(&clone)? >= after, "its disk went back");
    expect_contains("its first process", &shell(&clone, "cat /proc/1/cmdline")?, "sleep")
}

/// A container of Docker's, removed with the value.
struct Dockers<'a> {
    subject: &'a Subject,
    name: &'a str,
}

impl Drop for Dockers<'_> {
    fn drop(&mut self) {
        self.subject.docker(|docker| docker.call(&["rm", "--force", self.name]).run()).ok();
    }
}

fn refusals(subject: &Subject) -> Result<()> {
    let mut scene = Scene::new(subject);
    let host = subject.bed.rootfs().with_file_name(subject.id("cloned-volume"));
    fs::create_dir(&host)?;
    fs::write(host.join("file"), "the host's\n")?;
    let id = scene.name("writes");
    let [writable, fixed] = [("/data", "rw"), ("/fixed", "ro")]
        .map(|(at, how)| format!("type=bind,src={},dst={at},options=rbind:{how}", host.display()));
    let mut args = vec!["run", "--detach", "--runtime", subject.runtime.id(), "--mount", &writable];
    args.extend(["--mount", &fixed, BUSYBOX, &id, "sh", "-c", COUNTER]);
    subject.must(&args)?;
    refused(subject, &["clone", &id], 1, "writes to the host's files on /data, ")?;
    refused(
        subject,
        &["clone", &id, "--count", "2", "--network-namespace", "/x", "--share-volumes"],
        2,
        "serves one clone",
    )?;
    refused(subject, &["clone", "nobodys"], 1, "not found")?;
    refused(subject, &["clone", &id, "--share-volumes", "--snapshot", "ffffffffffff"], 1, "there is none")?;
    let shared = scene.name("shares");
    must(subject, &["clone", &id, "--share-volumes", "--name", &shared])?;
    scene.says(&shared, "echo of the clone > /data/file; grep host /fixed/file; true")?;
    let seen = scene.says(&id, "cat /fixed/file")?;
    fs::remove_dir_all(&host)?;
    expect_equal("what the source sees", &seen.as_str(), &"of the clone\n")?;

    let named = |name: &str| format!("io.spore.clone-from={name}");
    let run = |annotation: &str, part: &str| -> Result<()> {
        let output = subject.run_with("of", &["--annotation", annotation], BUSYBOX, &["true"])?.run()?;
        ensure!(!output.success(), "{output}");
        expect_contains("standard error", &output.errors(), part)
    };
    run(&named("no-such"), "annotation io.spore.clone-from: snapshot \"no-such\": there is none")?;
    let snapshot = must(subject, &["snapshot", "create", &id])?;
    let refusal = run(&named(snapshot.trim_end()), "bind mount on /data: the checkpoint was taken with one");
    must(subject, &["snapshot", "rm", snapshot.trim_end()])?;
    refusal
}
