//! containerd killed by force and started again finds its tasks.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use spore_harness::api::{self, Streams};
use spore_harness::bed::Subject;
use spore_harness::containerd::Containerd;
use spore_harness::image::BUSYBOX;
use spore_harness::wait;

use super::{Case, equal};
use crate::fifo::Fifo;
use crate::guest::Guest;

pub(crate) const CASES: &[Case] = &[
    Case::new("restart: containerd killed finds its tasks again", finds_tasks).starts(1).alone(),
    Case::new("restart: output goes on while containerd is away and after", output_goes_on).starts(1).alone(),
    Case::new("restart: so do fifos, and those of an exec", fifos_go_on).starts(1).alone(),
    Case::new("restart: a task that ends while containerd is away", ends_meanwhile).starts(1).alone(),
];

const DEADLINE: Duration = Duration::from_secs(60);

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
    if subject.is_spore() { logged(subject, &guest.id) } else { Ok(()) }
}

/// What a shim logs after the restart is in containerd's log, with its task.
fn logged(subject: &Subject, id: &str) -> Result<()> {
    let log = subject.with(|containerd| Ok(containerd.log().to_owned()))?;
    let task = format!("\"{id}\"");
    wait::until("the task's exit is in containerd's log", DEADLINE, || {
        let log = fs::read(&log).ok()?;
        let log = String::from_utf8_lossy(&log);
        log.lines().any(|line| line.contains("\"task exit\"") && line.contains(&task)).then_some(())
    })
}

fn output_goes_on(subject: &Subject) -> Result<()> {
    let id = subject.id("ticking");
    let log = format!("/srv/bed/{id}.log");
    let uri = format!("file://{log}");
    let runtime = subject.runtime.id();
    let script = "n=0; while :; do n=$((n + 1)); echo $n; sleep 0.2; done";
    subject.must(&[
        "run",
        "--detach",
        "--runtime",
        runtime,
        "--log-uri",
        &uri,
        BUSYBOX,
        &id,
        "sh",
        "-c",
        script,
    ])?;
    let guest = Guest::adopt(subject, &id);
    let lines = || fs::read_to_string(&log).map(|text| text.lines().count()).unwrap_or(0);
    wait::until("the container writes", DEADLINE, || (lines() > 2).then_some(()))?;
    subject.with(Containerd::restart)?;
    let before = lines();
    wait::until("it still writes", DEADLINE, || (lines() > before + 5).then_some(()))?;
    guest.must("kill", &["--signal", "KILL"], &[])?;
    guest.until("STOPPED")?;
    let text = fs::read_to_string(&log)?;
    fs::remove_file(&log)?;
    for (number, line) in text.lines().enumerate() {
        equal("line", line, &(number + 1).to_string())?;
    }
    Ok(())
}

fn fifos_go_on(subject: &Subject) -> Result<()> {
    const TICKING: &str = "n=0; while :; do n=$((n + 1)); echo $n; sleep 0.2; done";
    // Echoes, to show that the input goes on too.
    const ECHOING: &str = "n=0; while read -r line; do n=$((n + 1)); echo $n; done";
    let id = subject.id("ticking");
    let runtime = subject.runtime.id();
    subject.must(&["containers", "create", "--runtime", runtime, BUSYBOX, &id, "sh", "-c", TICKING])?;
    let guest = Guest::adopt(subject, &id);
    let [of_task, of_exec, input, echoed] =
        [Fifo::new(subject)?, Fifo::new(subject)?, Fifo::new(subject)?, Fifo::new(subject)?];
    api::create(
        subject,
        &id,
        Streams { stdout: of_task.path(), stderr: of_task.path(), ..Default::default() },
    )?;
    api::start(subject, &id, "")??;
    for (exec, script, stdin, stdout) in
        [("ticks", TICKING, String::new(), of_exec.path()), ("echoes", ECHOING, input.path(), echoed.path())]
    {
        let process = json!({ "args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/usr/bin:/bin"],
                              "user": { "uid": 0, "gid": 0 } });
        api::exec(
            subject,
            &id,
            exec,
            &process,
            Streams { stdin, stderr: stdout.clone(), stdout, terminal: false },
        )??;
        api::start(subject, &id, exec)??;
    }
    let lines = |fifo: &Fifo| fifo.text().lines().count();
    let more =
        |fifo: &Fifo, than: usize| wait::until("lines come", DEADLINE, || (lines(fifo) > than).then_some(()));
    more(&of_task, 2)?;
    more(&of_exec, 2)?;
    input.feed("x\n")?;
    more(&echoed, 0)?;
    subject.with(Containerd::restart)?;
    more(&of_task, lines(&of_task) + 5)?;
    more(&of_exec, lines(&of_exec) + 5)?;
    input.feed("x\nx\n")?;
    more(&echoed, 2)?;
    guest.must("kill", &["--signal", "KILL"], &[])?;
    guest.until("STOPPED")?;
    for fifo in [of_task, of_exec, echoed] {
        for (number, line) in fifo.text().lines().enumerate() {
            equal("line", line, &(number + 1).to_string())?;
        }
    }
    Ok(())
}

/// Its status is not lost. With runc it is: a containerd that starts takes a shim whose container has no process for one
/// that was left behind, and removes the task. Spore's names the task's pid to the end.
fn ends_meanwhile(subject: &Subject) -> Result<()> {
    let directory = subject.bed.rootfs().with_file_name(subject.id("away"));
    fs::create_dir(&directory)?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", directory.display());
    let script = "until test -e /data/go; do sleep 0.1; done; echo >/data/ends; exit 7";
    let guest = Guest::start_with(subject, &["--mount", &mount], &["sh", "-c", script])?;
    subject.with(|containerd| {
        containerd.away(|| {
            fs::write(directory.join("go"), "")?;
            wait::until("the script ends", DEADLINE, || directory.join("ends").exists().then_some(()))
        })
    })?;
    let listed = wait::until("the task does not run", DEADLINE, || {
        let list = subject.must(&["tasks", "ls"]).ok()?;
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(guest.id.as_str()));
        let line = line.map(str::to_owned);
        line.as_ref().is_none_or(|line| line.contains("STOPPED")).then_some(line)
    })?;
    fs::remove_dir_all(&directory)?;
    if listed.is_none() && !subject.is_spore() {
        return Ok(());
    }
    guest.until("STOPPED")?;
    let deleted = guest.task("delete", &[], &[])?.run()?;
    ensure!(deleted.success() && deleted.errors().contains("code 7"), "{deleted}");
    Ok(())
}
