//! Further processes in a container.

use anyhow::{Result, ensure};
use spore_harness::bed::Subject;

use super::{Case, equal, refused};
use crate::guest::{Guest, UNTIL_RESIZED, shared};

pub(crate) const CASES: &[Case] = &[
    Case::new("exec: output, error output and status", streams_and_status),
    Case::new("exec: standard input to its end", standard_input),
    Case::new("exec: a mebibyte of output, byte for byte", mebibyte),
    Case::new("exec: a signal counts from 128", killed_by_signal),
    Case::new("exec: a command that does not exist", no_such_command),
    Case::new("exec: a file that cannot be executed", not_executable),
    Case::new("exec: a directory that does not exist", no_such_directory),
    Case::new("exec: user and group", user),
    Case::new("exec: working directory and environment", directory),
    Case::new("exec: the container's capabilities and no more", capabilities),
    Case::new("exec: namespaces are the container's", namespaces),
    Case::new("exec: the cgroup is the container's", cgroup),
    Case::new("exec: in a cgroup namespace of the container's own", cgroup_namespace).starts(1),
    Case::new("exec: a terminal, and its size", terminal),
    Case::new("exec: what a terminal's owner leaves behind is hung up", hang_up),
    Case::new("exec: an id in use is refused", same_id),
    Case::new("exec: kill by exec id leaves the container", kill).starts(1),
    Case::new("exec: in a stopped container is refused", stopped).starts(1),
    Case::new("exec: ends with its container", ends_with_container).starts(1),
    Case::new("exec: the container's seccomp filter holds", seccomp).starts(1),
];

fn streams_and_status(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let output = guest.exec(&["sh", "-c", "echo out; echo err >&2; exit 42"])?;
        equal("standard output", &output.text(), "out\n")?;
        ensure!(output.errors().contains("err\n"), "standard error: {output}");
        ensure!(output.code() == 42, "{output}");
        ensure!(guest.exec(&["true"])?.code() == 0, "status of true");
        Ok(())
    })
}

fn standard_input(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let mut running =
            guest.exec_with(&[], &["sh", "-c", "echo ready; wc -c"])?.spawn_with_open_stdin()?;
        running.says("ready\n")?;
        running.feed(&[b'x'; 100_000])?;
        running.close_stdin();
        let output = running.wait()?;
        equal("bytes that arrived", output.text().trim_start_matches("ready\n").trim(), "100000")
    })
}

fn mebibyte(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let output = guest.exec(&["sh", "-c", "seq 1 150000"])?;
        let expected: String = (1..=150_000).map(|number| format!("{number}\n")).collect();
        ensure!(output.success() && output.text() == expected, "{} bytes arrived", output.stdout.len());
        Ok(())
    })
}

fn killed_by_signal(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let output = guest.exec(&["sh", "-c", "kill -KILL $$"])?;
        ensure!(output.code() == 137, "{output}");
        Ok(())
    })
}

fn no_such_command(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let output = guest.exec(&["no-such-command"])?;
        refused(
            &output,
            &[
                "OCI runtime exec failed: exec failed:",
                "exec: \"no-such-command\": executable file not found in $PATH",
            ],
        )
    })
}

fn not_executable(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        refused(&guest.exec(&["/etc/passwd"])?, &["exec: \"/etc/passwd\": permission denied"])
    })
}

fn no_such_directory(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let output = guest.exec_with(&["--cwd", "/no/such/directory"], &["true"])?.run()?;
        refused(&output, &["OCI runtime exec failed", "/no/such/directory", "no such file or directory"])
    })
}

fn user(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let output = guest.exec_with(&["--user", "1000:1001"], &["sh", "-c", "id -u; id -g"])?.run()?;
        equal("ids", &output.text(), "1000\n1001\n")
    })
}

fn directory(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let output =
            guest.exec_with(&["--cwd", "/tmp"], &["sh", "-c", "pwd; echo $PATH; echo $HOME"])?.run()?;
        let init = guest.shell("tr '\\0' '\\n' </proc/1/environ | sed -n 's/^PATH=//p'")?;
        equal("directory, PATH, HOME", &output.text(), &format!("/tmp\n{init}/root\n"))
    })
}

fn capabilities(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let of = |pid: &str| guest.shell(&format!("sed -n '/^Cap/p' /proc/{pid}/status"));
        equal("capabilities", &of("self")?, &of("1")?)?;
        let other =
            guest.exec_with(&["--user", "1000"], &["sed", "-n", "/^CapEff/p", "/proc/self/status"])?.run()?;
        equal("of another user", &other.text(), "CapEff:\t0000000000000000\n")
    })
}

fn namespaces(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let of = |pid: &str| {
            guest.shell(&format!("for n in cgroup ipc mnt net pid uts; do readlink /proc/{pid}/ns/$n; done"))
        };
        equal("namespaces", &of("self")?, &of("1")?)
    })
}

fn cgroup(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        equal("cgroup", &guest.shell("cat /proc/self/cgroup")?, &guest.shell("cat /proc/1/cgroup")?)
    })
}

fn cgroup_namespace(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &["--with-ns", "cgroup:"])?;
    let links = "readlink /proc/1/ns/cgroup; readlink /proc/self/ns/cgroup";
    let text = guest.shell(links)?;
    let (init, own) = text.trim().split_once('\n').unwrap_or_default();
    equal("namespace", own, init)
}

fn terminal(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let script = format!("tty; test -t 0 && test -t 2 && echo yes; {UNTIL_RESIZED}");
        // ctr wants a terminal itself, and passes its size on.
        let call = guest.exec_with(&["--tty"], &["sh", "-c", &script])?.in_terminal(33, 77);
        let output = call.run()?;
        let text = output.text();
        ensure!(text.contains("/dev/pts/") && text.contains("yes") && text.contains("33 77"), "{output}");
        Ok(())
    })
}

fn hang_up(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let script = "(trap 'echo hung up > /hung-up; exit' HUP; echo > /armed; while :; do sleep 1; done) &
            until test -e /armed; do sleep 0.1; done";
        let output = guest.exec_with(&["--tty"], &["sh", "-c", script])?.in_terminal(24, 80).run()?;
        ensure!(output.success(), "{output}");
        equal("left", &guest.shell("until test -s /hung-up; do sleep 0.1; done; cat /hung-up")?, "hung up\n")
    })
}

fn same_id(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let mut first = guest
            .task("exec", &["--exec-id", "twice"], &["sh", "-c", "echo ready; cat"])?
            .spawn_with_open_stdin()?;
        first.says("ready")?;
        let second = guest.task("exec", &["--exec-id", "twice"], &["true"])?.run()?;
        refused(&second, &["already exists"])?;
        first.close_stdin();
        ensure!(first.wait()?.success(), "the first");
        Ok(())
    })
}

fn kill(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &[])?;
    let mut running =
        guest.task("exec", &["--exec-id", "victim"], &["sh", "-c", "echo ready; sleep 1000"])?.spawn()?;
    running.says("ready")?;
    guest.must("kill", &["--exec-id", "victim", "--signal", "KILL"], &[])?;
    ensure!(running.wait()?.code() == 137, "status of the exec");
    equal("the container", &guest.status()?, "RUNNING")
}

fn stopped(subject: &Subject) -> Result<()> {
    let guest = Guest::start_with(subject, &[], &["true"])?;
    guest.until("STOPPED")?;
    refused(&guest.exec(&["true"])?, &["cannot exec in a stopped"])
}

fn ends_with_container(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &[])?;
    let mut running = guest.exec_with(&[], &["sh", "-c", "echo ready; sleep 1000"])?.spawn()?;
    running.says("ready")?;
    guest.must("kill", &["--signal", "KILL"], &[])?;
    ensure!(running.wait()?.code() == 137, "status of the exec");
    guest.until("STOPPED")
}

fn seccomp(subject: &Subject) -> Result<()> {
    let guest = Guest::start(subject, &["--seccomp"])?;
    equal("mode of the filter", &guest.shell("sed -n 's/^Seccomp:[^0-9]*//p' /proc/self/status")?, "2\n")
}
