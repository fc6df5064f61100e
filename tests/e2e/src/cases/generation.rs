//! A guest's kernel knows when it goes on from a snapshot, and draws its random numbers anew.

use std::time::Duration;

use anyhow::{Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::image::BUSYBOX;
use spore_harness::wait;

use super::Case;

pub(crate) const CASES: &[Case] =
    &[Case::new("generation::a_kernel_of_a_template_is_told", told).spore_only().since("2.").starts(2)];

/// A template is written by a child of the first guest's VMM: until it is there, guests boot.
const WRITTEN: Duration = Duration::from_secs(180);
/// Linux says so when its driver has found another generation id, a moment after the guest has begun to run.
const SCRIPT: &str =
    "for i in $(seq 50); do dmesg | grep 'virtual machine fork' && exit; usleep 100000; done";

fn told(subject: &Subject) -> Result<()> {
    let mut last = Ok(String::new());
    let mut number = 0;
    let said = wait::until("a guest has been restored from a template", WRITTEN, || {
        number += 1;
        last = run(subject, &format!("generation{number}"));
        match &last {
            Ok(line) if line.is_empty() => None,
            _ => Some(()),
        }
    });
    let line = last?;
    said?;
    ensure!(line.contains("crng reseeded"), "{line}");
    Ok(())
}

/// What a container finds among its kernel's messages, which it may read.
fn run(subject: &Subject, what: &str) -> Result<String> {
    let id = subject.id(what);
    let options = ["run", "--rm", "--runtime", subject.runtime.id(), "--privileged"];
    let output = subject.ctr(&[&options[..], &[BUSYBOX, &id, "sh", "-c", SCRIPT]].concat())?.run()?;
    ensure!(output.success(), "{output}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
