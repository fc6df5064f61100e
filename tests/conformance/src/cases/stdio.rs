//! Standard streams: terminals, detaching, logs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::image::BUSYBOX;
use spore_harness::wait;

use super::{Case, equal};
use crate::guest::{Guest, UNTIL_RESIZED};

pub(crate) const CASES: &[Case] = &[
    Case::new("stdio: a terminal of the container's own, and its size", terminal).starts(1),
    Case::new("stdio: none at all", null).starts(1),
    Case::new("stdio: a log file", log_file).starts(1),
    Case::new("stdio: a logging program", log_program).starts(1),
    Case::new("stdio: attach to a detached task", attach).starts(1),
];

const DEADLINE: Duration = Duration::from_secs(60);

fn terminal(subject: &Subject) -> Result<()> {
    let script = format!(
        "tty; test -t 0 && test -t 1 && test -t 2 && echo all; ls -l /dev/console | cut -c1; {UNTIL_RESIZED}; exit 7"
    );
    let output = subject
        .run_with("terminal", &["--tty"], BUSYBOX, &["sh", "-c", &script])?
        .in_terminal(33, 77)
        .run()?;
    ensure!(output.code() == 7, "{output}");
    let text = output.text().replace('\r', "");
    ensure!(text.contains("/dev/") && text.contains("\nall\nc\n33 77\n"), "{text:?}");
    Ok(())
}

fn null(subject: &Subject) -> Result<()> {
    let script = "echo out; echo err >&2; cat; exit 3";
    let output = subject.run_with("null", &["--null-io"], BUSYBOX, &["sh", "-c", script])?.run()?;
    ensure!(output.code() == 3 && output.stdout.is_empty() && output.stderr.is_empty(), "{output}");
    Ok(())
}

fn log_file(subject: &Subject) -> Result<()> {
    let file = format!("/tmp/{}.log", subject.id("file"));
    let uri = format!("file://{file}");
    let guest = Guest::start_with(subject, &["--log-uri", &uri], &["sh", "-c", "seq 1 20000; echo err >&2"])?;
    guest.until("STOPPED")?;
    let expected = (1..=20_000).map(|number| format!("{number}\n")).collect::<String>();
    let complete = |text: &String| text.len() == expected.len() + 4;
    let text = wait::until("everything is in the file", DEADLINE, || {
        fs::read_to_string(&file).ok().filter(complete)
    })?;
    fs::remove_file(file)?;
    ensure!(text.replace("err\n", "") == expected, "{} bytes", text.len());
    Ok(())
}

fn log_program(subject: &Subject) -> Result<()> {
    let directory = format!("/tmp/{}", subject.id("program"));
    fs::create_dir(&directory)?;
    let program = format!("{directory}/log");
    // Ready at once; each stream to a file of its own; who it is for, and its arguments.
    let script = "#!/bin/sh\nexec 5>&-\nd=$(dirname $0)\necho \"$CONTAINER_NAMESPACE $CONTAINER_ID $*\" >$d/called\n\
                  cat <&4 >$d/err &\ncat <&3 >$d/out\nwait\n";
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let uri = format!("binary://{program}?--to=here");
    let guest = Guest::start_with(
        subject,
        &["--log-uri", &uri],
        &["sh", "-c", "echo to out; echo to err >&2; seq 1 1000"],
    )?;
    guest.until("STOPPED")?;
    let read = |name: &str| fs::read_to_string(format!("{directory}/{name}"));
    wait::until("the program has everything", DEADLINE, || {
        let all = read("out").ok()?.ends_with("\n1000\n") && read("err").ok()? == "to err\n";
        all.then_some(())
    })?;
    ensure!(read("called")?.ends_with(&format!("{} --to here\n", guest.id)), "{:?}", read("called")?);
    ensure!(read("out")?.starts_with("to out\n1\n2\n"), "{:?}", read("out")?);
    fs::remove_dir_all(directory)?;
    Ok(())
}

fn attach(subject: &Subject) -> Result<()> {
    let script = "while read line; do echo \"got $line\"; test \"$line\" = end && exit 5; done";
    let guest = Guest::start_with(subject, &[], &["sh", "-c", script])?;
    // A first client comes, hears and goes; a second takes over.
    let mut first = guest.task("attach", &[], &[])?.spawn_with_open_stdin()?;
    first.feed(b"one\n")?;
    first.says("got one\n")?;
    first.kill()?;
    let mut second = guest.task("attach", &[], &[])?.spawn_with_open_stdin()?;
    second.feed(b"two\nend\n")?;
    let output = second.wait()?;
    equal("the second's output", &output.text(), "got two\ngot end\n")?;
    ensure!(output.code() == 5, "{output}");
    Ok(())
}
