//! Commands that cannot be started fail with runc's wording and status, and leave nothing.

use anyhow::{Result, ensure};
use spore_harness::call::Output;
use spore_harness::image::{FOREIGN, FOREIGN_PROGRAM, NOT_EXECUTABLE};

use super::{Case, expect_contains, expect_equal};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("bad_command::not_found", not_found).smoke(),
    Case::new("bad_command::not_found_by_path", not_found_by_path),
    Case::new("bad_command::not_executable", not_executable),
    Case::new("bad_command::foreign_program", foreign_program),
    Case::new("bad_command::foreign_image", foreign_image),
];

fn not_found(subject: &Subject) -> Result<()> {
    refused(subject, "no-such-command", "exec: \"no-such-command\": executable file not found in $PATH")
}

fn not_found_by_path(subject: &Subject) -> Result<()> {
    let wording = "exec: \"/no/such/command\": stat /no/such/command: no such file or directory";
    refused(subject, "/no/such/command", wording)
}

fn not_executable(subject: &Subject) -> Result<()> {
    refused(subject, NOT_EXECUTABLE, &format!("exec: \"{NOT_EXECUTABLE}\": permission denied"))
}

fn refused(subject: &Subject, command: &str, wording: &str) -> Result<()> {
    let output = subject.run("refused", &[command])?.run()?;
    expect_equal("status of ctr", &output.code(), &1)?;
    expect_contains("standard error", &output.errors(), wording)?;
    one_error(subject, &output)
}

/// The kernel refuses it when the container has already been created.
fn foreign_program(subject: &Subject) -> Result<()> {
    let output = subject.run("foreign", &[FOREIGN_PROGRAM])?.run()?;
    ensure!(!output.success(), "{output}");
    expect_contains("standard error", &output.errors(), "exec format error")
}

/// Asked for by its platform, the image arrives; its programs do not run.
fn foreign_image(subject: &Subject) -> Result<()> {
    let archive = subject.bed.foreign_archive();
    subject.with(|containerd| containerd.import(&archive, "overlayfs", &["--all-platforms"]))?;
    let options = ["--platform", "linux/arm64"];
    let output = subject.run_with("foreign", &options, FOREIGN, &[FOREIGN_PROGRAM])?.run();
    subject.must(&["images", "delete", "--sync", FOREIGN])?;
    let output = output?;
    ensure!(!output.success(), "{output}");
    expect_contains("standard error", &output.errors(), "exec format error")
}

/// One error, and no output of the container's.
pub(crate) fn one_error(subject: &Subject, output: &Output) -> Result<()> {
    ensure!(output.stdout.is_empty(), "unexpected output: {output}");
    let errors = output.errors();
    let lines: Vec<_> = errors.lines().filter(|line| !line.trim().is_empty()).collect();
    ensure!(lines.first().is_some_and(|line| line.starts_with("ctr: ")), "no error of ctr's: {output}");
    // runc's are of several lines now and then.
    ensure!(lines.len() == 1 || !subject.is_spore(), "more than one line: {output}");
    Ok(())
}
