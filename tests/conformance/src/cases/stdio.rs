//! Standard streams: terminals, detaching, logs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use spore_harness::api::{self, Streams};
use spore_harness::bed::Subject;
use spore_harness::image::BUSYBOX;
use spore_harness::wait;

use super::{Case, equal};
use crate::fifo::Fifo;
use crate::guest::{Guest, UNTIL_RESIZED};

pub(crate) const CASES: &[Case] = &[
    Case::new("stdio: a terminal of the container's own, and its size", terminal).starts(1),
    Case::new("stdio: none at all", null).starts(1),
    Case::new("stdio: a log file", log_file).starts(1),
    Case::new("stdio: a logging program", log_program).starts(1),
    Case::new("stdio: a slow reader gets every byte", slow_reader).starts(1),
    Case::new("stdio: a slow logging program gets every byte", slow_log_program).starts(1),
    Case::new("stdio: attach to a detached task", attach).starts(1),
    Case::new("stdio: fifos of a client's own, to the end of the input", fifos).starts(1),
    Case::new("stdio: a terminal's interrupt and its changes of size reach the process", signalled).starts(1),
    Case::new("stdio: a client that leaves a terminal does not hang it up", left_terminal).starts(1),
];

const DEADLINE: Duration = Duration::from_secs(60);

/// What `seq 1 LAST` says.
fn numbers(last: u32) -> String {
    (1..=last).map(|number| format!("{number}\n")).collect()
}

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
    let expected = numbers(20_000);
    let complete = |text: &String| text.len() == expected.len() + 4;
    let text = wait::until("everything is in the file", DEADLINE, || {
        fs::read_to_string(&file).ok().filter(complete)
    })?;
    fs::remove_file(file)?;
    ensure!(text.replace("err\n", "") == expected, "{} bytes", text.len());
    Ok(())
}

/// A directory with a logging program, whose script finds it in `$d`; removed with the value.
struct LogProgram {
    directory: PathBuf,
}

impl LogProgram {
    /// It is ready at once, and has arguments.
    fn new(subject: &Subject, script: &str) -> Result<Self> {
        let program = Self { directory: PathBuf::from("/tmp").join(subject.id("program")) };
        fs::create_dir(&program.directory)?;
        let file = program.directory.join("log");
        fs::write(&file, format!("#!/bin/sh\nexec 5>&-\nd=$(dirname $0)\n{script}"))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
        Ok(program)
    }

    fn uri(&self) -> String {
        format!("binary://{}?--to=here", self.directory.join("log").display())
    }

    fn read(&self, name: &str) -> std::io::Result<String> {
        fs::read_to_string(self.directory.join(name))
    }
}

impl Drop for LogProgram {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.directory).ok();
    }
}

fn log_program(subject: &Subject) -> Result<()> {
    // Each stream to a file of its own; who it is for, and its arguments.
    let script = "echo \"$CONTAINER_NAMESPACE $CONTAINER_ID $*\" >$d/called\n\
                  cat <&4 >$d/err &\ncat <&3 >$d/out\nwait\n";
    let program = LogProgram::new(subject, script)?;
    let guest = Guest::start_with(
        subject,
        &["--log-uri", &program.uri()],
        &["sh", "-c", "echo to out; echo to err >&2; seq 1 1000"],
    )?;
    guest.until("STOPPED")?;
    wait::until("the program has everything", DEADLINE, || {
        let all = program.read("out").ok()?.ends_with("\n1000\n") && program.read("err").ok()? == "to err\n";
        all.then_some(())
    })?;
    let called = program.read("called")?;
    ensure!(called.ends_with(&format!("{} --to here\n", guest.id)), "{called:?}");
    equal("what it has", &program.read("out")?, &format!("to out\n{}", numbers(1000)))
}

/// More than pipes and buffers on the way hold waits in the container. The sleeps here and below are what is tested.
fn slow_log_program(subject: &Subject) -> Result<()> {
    let program = LogProgram::new(subject, "sleep 3\ncat <&4 >$d/err &\ncat <&3 >$d/out\nwait\n")?;
    let guest = Guest::start_with(subject, &["--log-uri", &program.uri()], &["seq", "1", "100000"])?;
    guest.until("STOPPED")?;
    let expected = numbers(100_000);
    let text = wait::until("the program has everything", DEADLINE, || {
        program.read("out").ok().filter(|text| text.len() >= expected.len())
    })?;
    ensure!(text == expected, "{} bytes", text.len());
    Ok(())
}

fn slow_reader(subject: &Subject) -> Result<()> {
    let call = subject.run("slow", &["seq", "1", "300000"])?;
    let output = call.in_pipeline("", " | { sleep 3; cat; }").run()?;
    let expected = numbers(300_000);
    ensure!(output.text() == expected, "{} bytes of {}: {output}", output.stdout.len(), expected.len());
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

/// Creates and starts a container of a shell's script with these streams.
fn start(subject: &Subject, options: &[&str], script: &str, streams: Streams) -> Result<Guest> {
    let id = subject.id("streams");
    let mut args = vec!["containers", "create", "--runtime", subject.runtime.id()];
    args.extend(options);
    args.extend([BUSYBOX, &id, "sh", "-c", script]);
    subject.must(&args)?;
    let guest = Guest::adopt(subject, &id);
    api::create(subject, &id, streams)?;
    api::start(subject, &id, "")??;
    Ok(guest)
}

fn says(fifo: &Fifo, text: &str) -> Result<()> {
    wait::until(&format!("{text:?} comes out of the fifo"), DEADLINE, || {
        fifo.text().contains(text).then_some(())
    })
}

fn fifos(subject: &Subject) -> Result<()> {
    let (input, out, err) = (Fifo::new(subject)?, Fifo::new(subject)?, Fifo::new(subject)?);
    let streams = Streams { stdin: input.path(), stdout: out.path(), stderr: err.path(), terminal: false };
    let guest = start(subject, &[], "echo to err >&2; cat; echo the end", streams)?;
    input.feed("one\n")?;
    says(&out, "one\n")?;
    says(&err, "to err\n")?;
    input.feed("two\n")?;
    says(&out, "two\n")?;
    // The input ends when nobody has it open any more, the shim neither.
    drop(input);
    api::close_stdin(subject, &guest.id)?;
    guest.until("STOPPED")?;
    equal("output", &out.text(), "one\ntwo\nthe end\n")
}

fn signalled(subject: &Subject) -> Result<()> {
    let (input, out) = (Fifo::new(subject)?, Fifo::new(subject)?);
    let streams = Streams { stdin: input.path(), stdout: out.path(), stderr: String::new(), terminal: true };
    let script = "trap 'echo interrupted' INT; trap 'stty size' WINCH; echo ready; \
                  while :; do sleep 1000000 & wait $!; done";
    let guest = start(subject, &["--tty"], script, streams)?;
    says(&out, "ready")?;
    // What the key Ctrl-C sends.
    input.feed("\x03")?;
    says(&out, "interrupted")?;
    api::resize(subject, &guest.id)??;
    says(&out, "33 77")?;
    equal("state", &guest.status()?, "RUNNING")
}

fn left_terminal(subject: &Subject) -> Result<()> {
    let (input, out) = (Fifo::new(subject)?, Fifo::new(subject)?);
    let streams = Streams { stdin: input.path(), stdout: out.path(), stderr: String::new(), terminal: true };
    let script = "trap 'echo hung up >/hung-up' HUP; while read -r line; do echo \"got $line\"; done; \
                  echo ended >/ended; while :; do sleep 1000000 & wait $!; done";
    let guest = start(subject, &["--tty"], script, streams)?;
    input.feed("one\n")?;
    says(&out, "got one")?;
    drop((input, out));
    // A further process answers, so the loss of the client is long known.
    equal("left", &guest.shell("kill -0 1 && ls / | grep -c -e hung-up -e ended; true")?, "0\n")?;
    equal("state", &guest.status()?, "RUNNING")
}
