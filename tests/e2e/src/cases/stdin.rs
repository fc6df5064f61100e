//! What a container is given arrives byte for byte, and so does its end.

use anyhow::{Result, ensure};

use super::{Case, expect_equal};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("stdin::echo_hi", echo_hi).smoke().spore_only(),
    Case::new("stdin::a_dialogue", a_dialogue).smoke(),
    Case::new("stdin::eight_mebibytes", eight_mebibytes),
    Case::new("stdin::reader_stops_early", reader_stops_early),
];

/// With runc this hangs: `ctr` meets the end of its input before it knows the task, and then never
/// says CloseIO. What it has read it can write once the shim opens the fifo, which Spore's does in
/// Start; an input that is empty from the start hangs with every runtime.
fn echo_hi(subject: &Subject) -> Result<()> {
    let output = subject.run("hi", &["cat"])?.stdin("hi\n").run()?;
    ensure!(output.success(), "{output}");
    expect_equal("standard output", &output.text().as_str(), &"hi\n")
}

/// Line by line: nothing waits for the end of the input or of the output.
fn a_dialogue(subject: &Subject) -> Result<()> {
    let mut running =
        subject.run("dialogue", &["sh", "-c", "echo ready; exec cat"])?.spawn_with_open_stdin()?;
    running.says("ready\n")?;
    for line in ["one\n", "two\n"] {
        running.feed(line.as_bytes())?;
        running.says(line)?;
    }
    running.close_stdin();
    let output = running.wait()?;
    ensure!(output.success(), "{output}");
    expect_equal("standard output", &output.text().as_str(), &"ready\none\ntwo\n")
}

fn eight_mebibytes(subject: &Subject) -> Result<()> {
    // A linear congruential generator: no period that a buffer's size could hide.
    let mut state = 12_345_u32;
    let sent: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(8 << 20)
    .collect();
    let output = subject.run("large", &["cat"])?.stdin(sent.clone()).run()?;
    ensure!(output.success(), "{output}");
    expect_equal("length", &output.stdout.len(), &sent.len())?;
    let differs = output.stdout.iter().zip(&sent).position(|(found, sent)| found != sent);
    expect_equal("first byte that differs", &differs, &None)
}

/// The writer's broken pipe is no concern of the container's.
fn reader_stops_early(subject: &Subject) -> Result<()> {
    let output = subject.run("early", &["head", "-c", "3"])?.stdin(vec![b'x'; 4 << 20]).run()?;
    ensure!(output.success(), "{output}");
    expect_equal("standard output", &output.text().as_str(), &"xxx")
}
