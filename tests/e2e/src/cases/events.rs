//! containerd's clients learn what happens to a task, in order.

use std::time::Duration;

use anyhow::{Result, ensure};
use spore_harness::image::BUSYBOX;
use spore_harness::wait;

use super::{Case, expect_equal};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[Case::new("events::in_order", in_order)];

const DEADLINE: Duration = Duration::from_secs(60);

fn in_order(subject: &Subject) -> Result<()> {
    let listener = subject.ctr(&["events"])?.deadline(2 * DEADLINE).spawn()?;
    let mut probes = 0;
    // A subscription announces itself by nothing but events: make some until one arrives.
    wait::until("ctr events is listening", DEADLINE, || {
        probes += 1;
        subject.must(&["images", "label", BUSYBOX, &format!("probe={probes}")]).ok()?;
        listener.stdout().contains("/images/update").then_some(())
    })?;
    let id = subject.id("events");
    let runtime = subject.runtime.id();
    let output =
        subject.ctr(&["run", "--rm", "--runtime", runtime, BUSYBOX, &id, "sh", "-c", "exit 3"])?.run()?;
    expect_equal("status", &output.code(), &3)?;
    let listed = wait::until("the task's deletion is announced", DEADLINE, || {
        let topics = topics(&listener.stdout(), &id);
        topics.iter().any(|(topic, _)| topic == "/tasks/delete").then_some(topics)
    });
    let events = listener.kill()?;
    let listed = listed.map_err(|error| error.context(format!("events: {}", events.text())))?;
    let names: Vec<_> = listed.iter().map(|(topic, _)| topic.as_str()).collect();
    expect_equal("events", &names, &vec!["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"])?;
    for (topic, body) in &listed[2..] {
        ensure!(body.contains("\"exit_status\":3"), "{topic} does not tell the exit status 3: {body}");
    }
    Ok(())
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
