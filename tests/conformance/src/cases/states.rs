//! What is asked of a task, or of a process in it, in a state in which that cannot be, and what can. At the API: `ctr`
//! looks at the state itself, and then does not ask.

use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::json;
use spore_harness::api::{self, Answer, Streams};
use spore_harness::bed::Subject;
use spore_harness::wait;

use super::process::{said, shell};
use super::processes;
use super::{Case, equal};
use crate::guest::{Guest, shared};

pub(crate) const CASES: &[Case] = &[
    Case::new("states: what a process that has not run refuses", prepared),
    Case::new("states: what a created task refuses, and that it takes a process", created).starts(1),
    Case::new("states: what a running task and a paused one refuse", running_and_paused).starts(1),
    Case::new("states: what a stopped task refuses, and one that is gone", stopped).starts(1),
];

const DEADLINE: Duration = Duration::from_secs(60);

/// It is refused in words that contain `words`. The codes differ: runc's shim has one for everything that is of its own.
fn refused<T>(what: &str, answer: Answer<T>, words: &str) -> Result<()> {
    let Err(status) = answer else { bail!("{what}: it is done") };
    ensure!(status.message().contains(words), "{what}: {words:?} is not in {status}");
    Ok(())
}

fn not_found<T>(what: &str, answer: Answer<T>) -> Result<()> {
    let Err(status) = answer else { bail!("{what}: it is done") };
    ensure!(format!("{:?}", status.code()) == "NotFound", "{what}: {status}");
    Ok(())
}

fn prepared(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let (id, exec) = (guest.id.as_str(), subject.id("prepared"));
        let add = || api::exec(subject, id, &exec, &shell("exit 3"), Streams::default());
        add()??;
        equal("its state", &api::state(subject, id, &exec)??, "CREATED")?;
        refused("Kill", api::kill(subject, id, &exec)?, "process not created")?;
        refused("Exec of the same id", add()?, "already exists")?;
        ensure!(api::delete(subject, id, &exec)?? == 0, "the status of what has not run");
        not_found("State", api::state(subject, id, &exec)?)?;
        not_found("Kill", api::kill(subject, id, &exec)?)?;
        not_found("Delete", api::delete(subject, id, &exec)?)?;
        // The id is free again.
        add()??;
        api::start(subject, id, &exec)??;
        ensure!(api::reap(subject, id, &exec)? == 3, "its status");
        guest.shell("true").map(drop)
    })
}

fn created(subject: &Subject) -> Result<()> {
    let (out, guest) = processes::prepared(subject)?;
    let id = guest.id.as_str();
    refused("Pause", api::pause(subject, id)?, "pause")?;
    refused("Resume", api::resume(subject, id)?, "resume")?;
    equal("a further process", &said(subject, id, &shell("pwd; echo inside"))?, "/\ninside\n")?;
    equal("its state", &api::state(subject, id, "")??, "CREATED")?;
    equal("its output", &out.text(), "")?;
    api::start(subject, id, "")??;
    guest.until("STOPPED")?;
    wait::until("its output comes", DEADLINE, || (out.text() == "it ran\n").then_some(()))
}

fn running_and_paused(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &[])?;
    let id = guest.id.as_str();
    let state = |exec: &str| Ok::<_, anyhow::Error>(api::state(subject, id, exec)??);
    let add = |exec: &str| api::exec(subject, id, exec, &shell("exec sleep 1000000"), Streams::default());
    refused("Start", api::start(subject, id, "")?, "cannot start a running process")?;
    refused("Delete", api::delete(subject, id, "")?, "cannot delete a running process")?;
    add("runs")??;
    add("waits")??;
    api::start(subject, id, "runs")??;
    refused("Delete of the process", api::delete(subject, id, "runs")?, "cannot delete a running process")?;
    equal("the process", &state("runs")?, "RUNNING")?;

    api::pause(subject, id)??;
    equal("the paused task", &state("")?, "PAUSED")?;
    equal("the process in it", &state("runs")?, "PAUSED")?;
    refused("Start, paused", api::start(subject, id, "")?, "cannot start a paused process")?;
    refused("Delete, paused", api::delete(subject, id, "")?, "cannot delete a paused process")?;
    refused("Exec, paused", add("late")?, "cannot exec in a paused state")?;
    refused("Start of a process, paused", api::start(subject, id, "waits")?, "cannot exec in a paused")?;

    api::resume(subject, id)??;
    equal("the task after all that", &state("")?, "RUNNING")?;
    equal("the process after all that", &state("runs")?, "RUNNING")?;
    api::delete(subject, id, "waits")??;
    api::kill(subject, id, "runs")??;
    let status = api::reap(subject, id, "runs")?;
    ensure!(status == 137, "status {status} of the process");
    equal("the container", &guest.shell("echo alive")?, "alive\n")
}

fn stopped(subject: &Subject) -> Result<()> {
    let guest = Guest::start_with(subject, &[], &["sh", "-c", "exit 5"])?;
    let id = guest.id.as_str();
    let add = || api::exec(subject, id, "late", &shell("true"), Streams::default());
    let update = || api::update(subject, id, &json!({ "pids": { "limit": 77 } }));
    guest.until("STOPPED")?;
    refused("Start", api::start(subject, id, "")?, "cannot start a stopped process")?;
    refused("Pause", api::pause(subject, id)?, "cannot pause a stopped container")?;
    refused("Resume", api::resume(subject, id)?, "cannot resume a stopped container")?;
    refused("Update", update()?, "cannot update a stopped container")?;
    refused("Exec", add()?, "cannot exec in a stopped state")?;
    equal("its state", &api::state(subject, id, "")??, "STOPPED")?;
    ensure!(api::delete(subject, id, "")?? == 5, "its status");

    for (what, answer) in [
        ("Start", api::start(subject, id, "")?),
        ("Pause", api::pause(subject, id)?),
        ("Resume", api::resume(subject, id)?),
        ("Kill", api::kill(subject, id, "")?),
        ("Update", update()?),
        ("Exec", add()?),
    ] {
        not_found(what, answer)?;
    }
    not_found("State", api::state(subject, id, "")?)?;
    not_found("Delete", api::delete(subject, id, "")?)
}
