//! containerd's clients learn what happens to a task, in order.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use spore_harness::call::Running;
use spore_harness::image::BUSYBOX;
use spore_harness::wait;

use super::{Case, expect_equal};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] =
    &[Case::new("events::in_order", in_order), Case::new("events::of_a_whole_life", whole_life)];

const DEADLINE: Duration = Duration::from_secs(60);

/// `ctr events`, which hears whatever happens from here on.
fn listener(subject: &Subject) -> Result<Running> {
    let listener = subject.ctr(&["events"])?.deadline(2 * DEADLINE).spawn()?;
    let mut probes = 0;
    // A subscription announces itself by nothing but events: make some until one arrives.
    wait::until("ctr events is listening", DEADLINE, || {
        probes += 1;
        subject.must(&["images", "label", BUSYBOX, &format!("probe={probes}")]).ok()?;
        listener.stdout().contains("/images/update").then_some(())
    })?;
    Ok(listener)
}

/// What it has heard of the task `id` when it has heard `topic`.
fn heard(listener: &Running, id: &str, topic: &str) -> Result<Vec<(String, String)>> {
    let heard = wait::until(&format!("{topic} of {id} is announced"), DEADLINE, || {
        let topics = topics(&listener.stdout(), id);
        topics.iter().any(|(found, _)| found == topic).then_some(topics)
    });
    heard.with_context(|| format!("events: {}", listener.stdout()))
}

fn names(events: &[(String, String)]) -> Vec<&str> {
    events.iter().map(|(topic, _)| topic.as_str()).collect()
}

fn in_order(subject: &Subject) -> Result<()> {
    let listener = listener(subject)?;
    let id = subject.id("events");
    let runtime = subject.runtime.id();
    let output =
        subject.ctr(&["run", "--rm", "--runtime", runtime, BUSYBOX, &id, "sh", "-c", "exit 3"])?.run()?;
    expect_equal("status", &output.code(), &3)?;
    let events = heard(&listener, &id, "/tasks/delete")?;
    let expected = vec!["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
    expect_equal("events", &names(&events), &expected)?;
    for (topic, body) in &events[2..] {
        ensure!(body.contains("\"exit_status\":3"), "{topic} does not tell the exit status 3: {body}");
    }
    listener.kill().map(drop)
}

/// With a process that ends with its container, and is told before it.
fn whole_life(subject: &Subject) -> Result<()> {
    let listener = listener(subject)?;
    let id = subject.id("life");
    let waits = "while :; do sleep 1000000; done";
    subject.must(&["run", "--detach", "--runtime", subject.runtime.id(), BUSYBOX, &id, "sh", "-c", waits])?;
    let (exec, script) = (subject.id("exec"), format!("echo ready; {waits}"));
    let args = ["tasks", "exec", "--exec-id", &exec, &id, "sh", "-c", &script];
    let mut running = subject.ctr(&args)?.spawn()?;
    running.says("ready")?;
    heard(&listener, &id, "/tasks/exec-started")?;
    for (verb, topic) in [("pause", "/tasks/paused"), ("resume", "/tasks/resumed")] {
        subject.must(&["tasks", verb, &id])?;
        heard(&listener, &id, topic)?;
    }
    subject.must(&["tasks", "kill", "--signal", "KILL", &id])?;
    expect_equal("status of the process", &running.wait()?.code(), &137)?;
    wait::until("the task has stopped", DEADLINE, || {
        let tasks = subject.must(&["tasks", "ls"]).ok()?;
        tasks.lines().any(|line| line.contains(&id) && line.contains("STOPPED")).then_some(())
    })?;
    subject.must(&["tasks", "delete", &id])?;
    let events = heard(&listener, &id, "/tasks/delete")?;
    subject.must(&["containers", "delete", &id])?;
    let expected = vec![
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/exit",
        "/tasks/delete",
    ];
    expect_equal("events", &names(&events), &expected)?;
    for (event, of) in [(2, "exec_id"), (3, "exec_id"), (6, "id")] {
        let named = format!("\"{of}\":\"{exec}\"");
        ensure!(events[event].1.contains(&named), "{named} is not in {:?}", events[event]);
    }
    for (topic, body) in &events[6..] {
        ensure!(body.contains("\"exit_status\":137"), "{topic} does not tell the exit status 137: {body}");
    }
    ensure!(
        events[7].1.contains(&format!("\"id\":\"{id}\"")),
        "the task's exit is the last: {:?}",
        events[7]
    );
    listener.kill().map(drop)
}

/// Topic and body of the events about the task `id`, as `ctr events` prints them: date, time
/// and zone, namespace, topic, JSON.
fn topics(text: &str, id: &str) -> Vec<(String, String)> {
    let named = format!("\"container_id\":\"{id}\"");
    text.lines()
        .filter(|line| line.contains(&named))
        .filter_map(|line| {
            let topic = line.split_whitespace().find(|word| word.starts_with("/tasks/"))?;
            Some((topic.to_owned(), line.to_owned()))
        })
        .collect()
}
