//! The `spore` command beside its files: doctor, ps, exec.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use spore_harness::image::BUSYBOX;

use super::{Case, expect_contains, expect_equal};
use crate::waiting::Waiting;
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("command::doctor", doctor).spore_only(),
    Case::new("command::ps", ps).spore_only(),
    Case::new("command::exec_is_the_command", exec_is_the_command).spore_only(),
    Case::new("command::exec_has_a_terminal", exec_has_a_terminal).spore_only(),
];

/// A ground that runs containers has nothing to mend; one without containerd has.
fn doctor(subject: &Subject) -> Result<()> {
    let output = subject.spore(&["doctor"])?.run()?;
    ensure!(output.success(), "{output}");
    for good in ["/dev/kvm", "containerd-shim-spore-v2", "mkfs.erofs", "This host can run containers"] {
        expect_contains("the doctor's output", &output.text(), good)?;
    }
    ensure!(!output.text().contains("bad"), "{output}");
    let output = subject.spore(&["doctor", "--json", "--address", "/nowhere.sock"])?.run()?;
    expect_equal("status without containerd", &output.code(), &1)?;
    let checks: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let bad: Vec<_> = checks.iter().filter(|check| check["ok"] == false).collect();
    let told = bad.iter().find(|check| check["check"] == "containerd").context("no word of containerd")?;
    ensure!(told["mend"].as_str().is_some_and(|mend| mend.contains("--address")), "{told}");
    ensure!(checks.iter().any(|check| check["check"] == "/dev/kvm" && check["ok"] == true), "{checks:?}");
    Ok(())
}

fn ps(subject: &Subject) -> Result<()> {
    let waiting = Waiting::start(subject, "listed")?;
    let output = subject.spore(&["ps"])?.run()?;
    ensure!(output.success(), "{output}");
    let line = output.text().lines().find(|line| line.contains(&waiting.id)).map(str::to_owned);
    let line = line.with_context(|| format!("{} is not in {output}", waiting.id))?;
    for part in [BUSYBOX, "running", "256 MiB"] {
        expect_contains("its line", &line, part)?;
    }
    let output = subject.spore(&["ps", "--all-namespaces", "--json"])?.run()?;
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout).with_context(|| output.to_string())?;
    let row = rows.iter().find(|row| row["id"] == waiting.id.as_str()).context("not in the JSON")?;
    expect_equal("vCPUs", &row["vcpus"], &1.into())?;
    ensure!(row["pid"].as_u64().is_some_and(|pid| pid > 1), "{row}");
    let elsewhere = subject.spore(&["ps", "--namespace", "nobodys"])?.run()?;
    ensure!(elsewhere.success() && !elsewhere.text().contains(&waiting.id), "{elsewhere}");
    Ok(())
}

fn exec_is_the_command(subject: &Subject) -> Result<()> {
    let waiting = Waiting::start(subject, "executed")?;
    let output = waiting.exec(&["sh", "-c", "echo out; echo err >&2; exit 42"])?;
    expect_equal("status", &output.code(), &42)?;
    expect_equal("standard output", &output.text().as_str(), &"out\n")?;
    expect_equal("standard error", &output.errors().as_str(), &"err\n")?;

    let output = waiting.exec_with(&["-i"], &["wc", "-c"])?.stdin(vec![b'x'; 300_000]).run()?;
    ensure!(output.success(), "{output}");
    expect_equal("bytes that arrived", &output.text().trim(), &"300000")?;

    let options = ["-u", "user", "-w", "/tmp", "-e", "SPORE_TEST=a b"];
    let output = waiting.exec_with(&options, &["sh", "-c", "id -u; pwd; echo $SPORE_TEST"])?.run()?;
    expect_equal("user, directory and environment", &output.text().as_str(), &"1000\n/tmp\na b\n")?;

    for (command, status) in [("no-such-command", 127), ("/etc/not-executable", 126)] {
        let output = waiting.exec(&[command])?;
        expect_equal(command, &output.code(), &status)?;
        expect_contains("the message", &output.errors(), "spore: error: ")?;
    }
    expect_equal("status after SIGKILL", &waiting.exec(&["sh", "-c", "kill -9 $$"])?.code(), &137)?;
    let missing = subject.spore(&["exec", "no-such-container", "true"])?.run()?;
    expect_equal("status without a container", &missing.code(), &125)
}

/// Its size is the caller's, what is typed arrives, and the status is the command's.
fn exec_has_a_terminal(subject: &Subject) -> Result<()> {
    let waiting = Waiting::start(subject, "terminal")?;
    let script = "until [ \"$(stty size)\" = \"33 77\" ]; do sleep 0.1; done; tty; read line; echo \"<$line>\"; exit 3";
    let call = waiting.exec_with(&["-it"], &["sh", "-c", script])?.in_terminal(33, 77);
    let mut running = call.spawn_with_open_stdin()?;
    running.says("/dev/pts/")?;
    running.feed(b"typed\r")?;
    running.says("<typed>")?;
    let output = running.wait()?;
    expect_equal("status", &output.code(), &3)
}
