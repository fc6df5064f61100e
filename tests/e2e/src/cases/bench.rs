//! `spore bench`: it measures what it says, and what it makes for that is gone afterwards.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use spore_harness::bed::Subject;
use spore_harness::call::Output;
use spore_harness::image::BUSYBOX;
use spore_harness::wait;

use super::checkpoint::{SHOWN, inventory_after_a_snapshot};
use super::{Case, expect_contains, expect_equal};

pub(crate) const CASES: &[Case] = &[
    Case::new("bench::every_operation", every_operation).spore_only().alone().newest_unless_soak().starts(20),
    Case::new("bench::interrupted_it_leaves_nothing", interrupted).spore_only().alone().starts(3),
];

/// In the order in which they are asked for.
const OPERATIONS: [&str; 8] =
    ["create", "exec", "snapshot", "restore", "clone", "rollback", "hibernate", "resume"];
/// How long all of them may take on the slowest ground, two at a time, two of each.
const ALL: Duration = Duration::from_secs(900);

fn parsed(output: &Output) -> Result<Value> {
    serde_json::from_slice(&output.stdout).with_context(|| output.to_string())
}

fn refused(subject: &Subject, args: &[&str], status: i32, part: &str) -> Result<()> {
    let output = subject.spore(&[&["bench"], args].concat())?.run()?;
    expect_equal("status", &output.code(), &status)?;
    expect_contains("standard error", &output.errors(), part)
}

/// All of them succeed; a second report is compared with the first, and drawn.
fn every_operation(subject: &Subject) -> Result<()> {
    let before = inventory_after_a_snapshot(subject)?;
    refused(
        subject,
        &["create", "--image", "nobody/nothing:1"],
        1,
        "there is none of that name in namespace",
    )?;
    let other = ["create", "--image", BUSYBOX, "--snapshotter", "nobodys"];
    refused(subject, &other, 1, "by snapshotter \"nobodys\"")?;

    let options = ["--image", BUSYBOX, "-c", "2", "--count", "2", "--warm-up", "0", "--json"];
    let args = [&["bench"], &OPERATIONS[..], &options].concat();
    let output = subject.spore(&args)?.deadline(ALL).run()?;
    ensure!(output.success(), "{args:?}: {output}");
    let report = parsed(&output)?;
    expect_equal("kind", &report["kind"], &"spore-bench".into())?;
    expect_equal("image", &report["image"], &BUSYBOX.into())?;
    let rows = report["operations"].as_array().context("no operations are told")?;
    let named: Vec<_> = rows.iter().filter_map(|row| row["operation"].as_str()).collect();
    expect_equal("the operations", &named.as_slice(), &OPERATIONS.as_slice())?;
    for row in rows {
        expect_equal("success", &row["success_percent"], &100.0.into())?;
        expect_equal("runs", &(&row["count"], &row["ok"]), &(&2.into(), &2.into()))?;
        let of = |name: &str| row[name].as_u64().with_context(|| format!("{name} in {row}"));
        let (least, most) = (of("min_ns")?, of("max_ns")?);
        ensure!(least > 0 && least <= of("p50_ns")? && of("p95_ns")? <= most, "{row}");
        ensure!(most <= of("wall_ns")?, "a run took longer than all of them: {row}");
        expect_equal("amortised", &of("amortised_ns")?, &(of("wall_ns")? / 2))?;
    }
    subject.nothing_beyond(&before)?;

    let directory = tempfile::tempdir()?;
    let path = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    let (first, drawn) = (path("first.json"), path("drawn.svg"));
    fs::write(&first, &output.stdout)?;
    let args = ["bench", "exec", "--image", BUSYBOX, "-c", "2", "-N", "3", "--json"];
    let args = [&args[..], &["--compare", &first, "--plot", &drawn]].concat();
    let output = subject.spore(&args)?.run()?;
    ensure!(output.success(), "{args:?}: {output}");
    let again = parsed(&output)?;
    let (row, compared) = (&again["operations"][0], &again["compared"][0]);
    expect_equal("counted samples", &row["samples_ns"].as_array().map(Vec::len), &Some(3))?;
    expect_equal("compared", &compared["operation"], &"exec".into())?;
    let was = &rows[1]["p50_ns"];
    expect_equal(
        "p50 of now and before",
        &(&compared["p50"]["now_ns"], &compared["p50"]["before_ns"]),
        &(&row["p50_ns"], was),
    )?;
    let svg = fs::read_to_string(&drawn)?;
    ensure!(svg.starts_with("<svg") && svg.matches("<circle").count() == 3, "{svg}");
    let malformed = ["exec", "--image", BUSYBOX, "--compare", &drawn];
    refused(subject, &malformed, 1, "malformed")?;
    drop(directory);

    // What fails is counted and told, and is taken away like the rest.
    let output =
        subject.spore(&["bench", "exec", "--image", BUSYBOX, "-N", "1", "--exec", "false"])?.run()?;
    expect_equal("status", &output.code(), &1)?;
    expect_contains("standard error", &output.errors(), "1 of 1 failed; the first: ")?;
    expect_contains("standard error", &output.errors(), "\"false\" ends with status 1")?;
    expect_contains("the table", &output.text(), "SUCCESS %")?;
    subject.nothing_beyond(&before)
}

fn interrupted(subject: &Subject) -> Result<()> {
    subject.warm_up()?;
    let before = subject.inventory()?;
    let call = subject.spore(&["bench", "create", "--image", BUSYBOX, "-N", "1000", "--warm-up", "0"])?;
    let running = call.spawn()?;
    let name = format!("spore-bench-{}-1", running.pid());
    wait::until("its first container is there", SHOWN, || {
        let listed = subject.must(&["containers", "ls", "-q"]).ok()?;
        listed.lines().any(|line| line == name).then_some(())
    })?;
    kill(Pid::from_raw(i32::try_from(running.pid())?), Signal::SIGINT)?;
    let output = running.wait()?;
    expect_equal("status", &output.code(), &130)?;
    expect_contains("standard error", &output.errors(), "interrupted")?;
    expect_equal("standard output", &output.text().as_str(), &"")?;
    subject.nothing_beyond(&before)
}
