//! Docker's engine and command over the same containerd. What is not about networks is done without one.

pub(crate) mod changes;
pub(crate) mod checkpoint;
pub(crate) mod network;

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::call::Output;
use spore_harness::docker::{Docker, IMAGE};
use spore_harness::wait;

use super::{Case, Difference, equal, refused};
use crate::guest::shared_by;

/// The series of containerd that Docker is tested over.
pub(crate) const SERIES: &str = "1.7";

pub(crate) const CASES: &[Case] = &[
    Case::new("docker: run, its output and status", run).starts(1),
    Case::new("docker: run -e -u -w -h --read-only --tmpfs --init", options).starts(1),
    Case::new("docker: run -m --cpus --pids-limit", limits).starts(1),
    Case::new("docker: run -v, and what Docker puts into /etc", volumes).starts(1),
    Case::new("docker: run -it", terminal).starts(1),
    Case::new("docker: run of a command that is not there", not_found).starts(1),
    Case::new("docker: exec, its options and status", exec),
    Case::new("docker: exec -it", exec_terminal),
    Case::new("docker: top", top)
        .differs("the engine asks the host's `ps`, which shows the process that stands for the task; use `docker exec` with ps"),
    Case::new("docker: stats", stats),
    Case::new("docker: pause and unpause", pause),
    Case::new("docker: update", update),
    Case::new("docker: logs -f", logs).starts(1),
    Case::new("docker: kill, wait, inspect, start again with what was written", life).starts(3),
    Case::new("docker: cp", copy).differs(
        "the engine copies through its own mount of the root; use `docker exec` with tar, or a volume",
    ),
];

/// A container of Docker's; removed with the value.
struct Container {
    subject: Subject,
    id: String,
}

impl Container {
    fn start(subject: &Subject, options: &[&str], command: &[&str]) -> Result<Self> {
        Self::start_on(subject, "none", options, command)
    }

    fn start_on(subject: &Subject, network: &str, options: &[&str], command: &[&str]) -> Result<Self> {
        let container = Self { subject: subject.clone(), id: subject.id("docker") };
        let mut args = vec!["run", "-d", "--network", network, "--runtime", subject.runtime.id()];
        args.extend(["--name", container.id.as_str()]);
        args.extend(options);
        args.push(IMAGE);
        args.extend(command);
        subject.docker(|docker| docker.must(&args))?;
        Ok(container)
    }

    fn exec(&self, options: &[&str], command: &[&str]) -> Result<Output> {
        let mut args = vec!["exec"];
        args.extend(options);
        args.push(&self.id);
        args.extend(command);
        self.subject.docker(|docker| docker.call(&args).run())
    }

    fn shell(&self, script: &str) -> Result<String> {
        let output = self.exec(&[], &["sh", "-c", script])?;
        ensure!(output.success(), "docker exec of {script:?}: {output}");
        Ok(output.text())
    }

    fn must(&self, verb: &str, options: &[&str]) -> Result<String> {
        let mut args = vec![verb];
        args.extend(options);
        args.push(&self.id);
        self.subject.docker(|docker| docker.must(&args))
    }

    fn inspect(&self, format: &str) -> Result<String> {
        Ok(self.must("inspect", &["--format", format])?.trim_end().to_owned())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.subject.docker(|docker: &Docker| docker.call(&["rm", "-f", &self.id]).run()).ok();
    }
}

/// `docker run --rm` to its end.
fn run_with(subject: &Subject, options: &[&str], command: &[&str]) -> Result<Output> {
    run_on(subject, "none", options, command)
}

fn run_on(subject: &Subject, network: &str, options: &[&str], command: &[&str]) -> Result<Output> {
    let mut args = vec!["run", "--rm", "--network", network, "--runtime", subject.runtime.id()];
    args.extend(options);
    args.push(IMAGE);
    args.extend(command);
    subject.docker(|docker| docker.call(&args).run())
}

/// Does something with the container that cases share.
fn with<T>(subject: &Subject, act: impl FnOnce(&Container) -> Result<T>) -> Result<T> {
    let start = |subject: &Subject| Container::start(subject, &["--pids-limit", "100"], &["sleep", "100000"]);
    shared_by(subject, "docker", start, act)
}

fn run(subject: &Subject) -> Result<()> {
    let output = run_with(subject, &[], &["sh", "-c", "echo out; echo err >&2; exit 42"])?;
    ensure!(output.code() == 42 && output.text() == "out\n" && output.errors() == "err\n", "{output}");
    Ok(())
}

fn options(subject: &Subject) -> Result<()> {
    let options =
        ["-e", "COLOUR=green", "-u", "1000:1000", "-w", "/scratch", "-h", "somewhere", "--read-only"];
    let options =
        [&options[..], &["--tmpfs", "/scratch:mode=1777", "--init", "--ulimit", "nofile=123:456"]].concat();
    let script = "echo $COLOUR; id -u; id -g; pwd; hostname; touch x && echo scratch; touch /x 2>/dev/null || echo read-only; \
                  ps -o pid,comm | grep -c init; ulimit -Sn; ulimit -Hn";
    let output = run_with(subject, &options, &["sh", "-c", script])?;
    equal(
        "its output",
        &output.text(),
        "green\n1000\n1000\n/scratch\nsomewhere\nscratch\nread-only\n1\n123\n456\n",
    )
    .with_context(|| output.to_string())
}

fn limits(subject: &Subject) -> Result<()> {
    let options = ["-m", "64m", "--cpus", "0.5", "--pids-limit", "50"];
    let script = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max";
    let output = run_with(subject, &options, &["sh", "-c", script])?;
    equal("its cgroup", &output.text(), "67108864\n50000 100000\n50\n").with_context(|| output.to_string())
}

fn volumes(subject: &Subject) -> Result<()> {
    let directory = subject.bed.rootfs().with_file_name(subject.id("docker-volume"));
    fs::create_dir(&directory)?;
    fs::write(directory.join("file"), "host\n")?;
    let (data, read_only) =
        (format!("{}:/data", directory.display()), format!("{}:/ro:ro", directory.display()));
    let options = ["-h", "named", "-v", &data, "-v", &read_only, "-v", "named-volume:/kept"];
    let script = "cat /data/file; echo container >> /data/file; echo x >> /ro/file; echo kept > /kept/file; \
                  cat /etc/hostname; grep -c localhost /etc/hosts; test -e /etc/resolv.conf && df /dev/shm | tail -n 1 | cut -c1-3";
    let output = run_with(subject, &options, &["sh", "-c", script])?;
    let file = fs::read_to_string(directory.join("file"))?;
    fs::remove_dir_all(&directory)?;
    ensure!(output.errors().contains("Read-only file system"), "{output}");
    ensure!(output.text().starts_with("host\nnamed\n"), "{output}");
    ensure!(output.text().ends_with("shm\n"), "{output}");
    equal("the host's file", &file, "host\ncontainer\n")?;
    let output = run_with(subject, &["-v", "named-volume:/kept"], &["cat", "/kept/file"])?;
    equal("the named volume, in the next container", &output.text(), "kept\n")
}

fn terminal(subject: &Subject) -> Result<()> {
    let args = ["run", "--rm", "-it", "--network", "none", "--runtime", subject.runtime.id(), IMAGE];
    let command =
        ["sh", "-c", "test -t 0 && test -t 1 && echo a terminal; read line; echo got $line; exit 7"];
    let args = [&args[..], &command].concat();
    let mut running =
        subject.docker(|docker| docker.call(&args).in_terminal(33, 77).spawn_with_open_stdin())?;
    running.says("a terminal")?;
    running.feed(b"a line\n")?;
    running.says("got a line")?;
    let output = running.wait()?;
    ensure!(output.code() == 7, "{output}");
    Ok(())
}

fn not_found(subject: &Subject) -> Result<()> {
    let output = run_with(subject, &[], &["no-such-program"])?;
    ensure!(output.code() == 127, "{output}");
    refused(&output, &["executable file not found in $PATH"])
}

fn exec(subject: &Subject) -> Result<()> {
    with(subject, |container| {
        let script = "id -u; pwd; echo $COLOUR; cat; exit 3";
        let options = ["-u", "7", "-w", "/tmp", "-e", "COLOUR=red"];
        let output = container.exec(&options, &["sh", "-c", script])?;
        ensure!(output.code() == 3 && output.text() == "7\n/tmp\nred\n", "{output}");
        let mut args = vec!["exec", "-i", container.id.as_str()];
        args.push("cat");
        let output = subject.docker(|docker| docker.call(&args).stdin("fed\n").run())?;
        ensure!(output.success() && output.text() == "fed\n", "{output}");
        let output = container.exec(&[], &["no-such-program"])?;
        ensure!(matches!(output.code(), 126 | 127), "{output}");
        Ok(())
    })
}

fn exec_terminal(subject: &Subject) -> Result<()> {
    with(subject, |container| {
        let args = ["exec", "-it", container.id.as_str(), "sh", "-c", crate::guest::UNTIL_RESIZED];
        let output = subject.docker(|docker| docker.call(&args).in_terminal(33, 77).run())?;
        ensure!(output.success() && output.text().contains("33 77"), "{output}");
        Ok(())
    })
}

fn top(subject: &Subject) -> Result<()> {
    with(subject, |container| {
        let output = subject.docker(|docker| docker.call(&["top", &container.id]).run())?;
        if subject.is_spore() {
            // The engine asks the host's ps about the pids that the runtime names: the holder's.
            ensure!(output.success() && output.text().contains("holder"), "{output}");
            return Err(Difference.into());
        }
        ensure!(output.text().contains("sleep 100000"), "{output}");
        Ok(())
    })
}

fn stats(subject: &Subject) -> Result<()> {
    with(subject, |container| {
        let format = "{{.MemUsage}} {{.PIDs}} {{.CPUPerc}}";
        let text = container.must("stats", &["--no-stream", "--format", format])?;
        let mut words = text.split_whitespace();
        let memory = words.next().unwrap_or_default();
        ensure!(
            memory.starts_with(|first: char| first.is_ascii_digit()) && !memory.starts_with("0B"),
            "{text}"
        );
        // Threads count, and those of runc's init may be there still.
        let pids = words.nth(2).and_then(|count| count.parse::<u32>().ok());
        ensure!(pids.is_some_and(|count| count >= 1) && text.trim_end().ends_with('%'), "{text}");
        Ok(())
    })
}

fn pause(subject: &Subject) -> Result<()> {
    with(subject, |container| {
        container.must("pause", &[])?;
        equal("paused", &container.inspect("{{.State.Status}}")?, "paused")?;
        refused(&container.exec(&[], &["true"])?, &["is paused"])?;
        container.must("unpause", &[])?;
        equal("running again", &container.shell("echo yes")?, "yes\n")
    })
}

fn update(subject: &Subject) -> Result<()> {
    with(subject, |container| {
        container.must("update", &["--pids-limit", "77"])?;
        equal("pids.max", &container.shell("cat /sys/fs/cgroup/pids.max")?, "77\n")
    })
}

fn logs(subject: &Subject) -> Result<()> {
    let script = "echo first; while test ! -e /go; do sleep 0.1; done; echo last; echo error >&2";
    let container = Container::start(subject, &[], &["sh", "-c", script])?;
    let args = ["logs", "-f", container.id.as_str()];
    let mut following = subject.docker(|docker| docker.call(&args).spawn())?;
    following.says("first")?;
    container.shell("touch /go")?;
    let output = following.wait()?;
    ensure!(output.text() == "first\nlast\n" && output.errors() == "error\n", "{output}");
    Ok(())
}

fn life(subject: &Subject) -> Result<()> {
    let script = "trap 'exit 9' TERM; cat /count 2>/dev/null; echo x >> /count; while :; do sleep 1000 & wait $!; done";
    let container = Container::start(subject, &[], &["sh", "-c", script])?;
    let written = |lines: usize| {
        let text = "x\n".repeat(lines);
        wait::until("the container's script has written", Duration::from_secs(60), || {
            container.shell("cat /count").is_ok_and(|found| found == text).then_some(())
        })
    };
    written(1)?;
    container.must("stop", &[])?;
    equal("after stop", &container.inspect("{{.State.Status}} {{.State.ExitCode}}")?, "exited 9")?;
    container.must("start", &[])?;
    written(2)?;
    container.must("restart", &[])?;
    written(3)?;
    let mut waiting = subject.docker(|docker| docker.call(&["wait", &container.id]).spawn())?;
    ensure!(!waiting.ended()?, "docker wait answers a running container");
    container.must("kill", &["--signal", "KILL"])?;
    equal("docker wait", &waiting.wait()?.text(), "137\n")?;
    equal(
        "after kill",
        &container.inspect("{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}")?,
        "exited 137 false",
    )?;
    equal("logs of all its lives", &container.must("logs", &[])?, "x\nx\nx\n")
}

fn copy(subject: &Subject) -> Result<()> {
    with(subject, |container| {
        container.shell("echo inside > /made-inside")?;
        let source = format!("{}:/made-inside", container.id);
        let output = subject.docker(|docker| docker.call(&["cp", &source, "-"]).run())?;
        if subject.is_spore() {
            ensure!(!output.text().contains("inside\n"), "{output}");
            return Err(Difference.into());
        }
        ensure!(output.success() && output.text().contains("inside\n"), "{output}");
        Ok(())
    })
}
