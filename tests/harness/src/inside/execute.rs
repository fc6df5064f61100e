//! Runs the job as a child of PID 1, reaps what it leaves, sends results and logs.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::job::{Job, PAYLOAD, RESULTS, Record, STATUS_DEADLINE};

/// Runs the job with `output` as its standard output and error; then writes the archive of
/// its results and the ground's logs to `files`, then the record of its end to `output`.
pub(super) fn run(job: &Job, mut output: &File, files: &File) -> Result<()> {
    fs::create_dir_all(Path::new(RESULTS).join("logs"))?;
    output.write_all(&started()?.to_line())?;
    let child = Command::new(path_of(&job.program))
        .args(&job.args)
        .envs(&job.env)
        .env("PATH", format!("{PAYLOAD}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"))
        .env("HOME", "/root")
        .env("SPORE_RESULTS", RESULTS)
        .env("SPORE_GROUND_NAME", &job.ground)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output.try_clone()?)
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {}", job.program))?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let (done, is_done) = channel::<()>();
    let deadline = Duration::from_secs(job.deadline_s);
    let watchdog = thread::spawn(move || {
        let late = matches!(is_done.recv_timeout(deadline), Err(RecvTimeoutError::Timeout));
        if late {
            record_processes();
            killpg(pid, Signal::SIGKILL).ok();
        }
        late
    });
    let mut status = reap_until(pid)?;
    drop(done);
    if watchdog.join().unwrap_or(false) {
        let message = format!(
            "\ntest bed: {} passed its deadline of {} s and was killed\n",
            job.program, job.deadline_s
        );
        output.write_all(message.as_bytes())?;
        status = STATUS_DEADLINE;
    }
    collect_logs();
    // What the job left running could still write to the archive's sources.
    kill(Pid::from_raw(-1), Signal::SIGKILL).ok();
    let sent = Command::new("tar")
        .args(["--sparse", "--ignore-failed-read", "-C", RESULTS, "-cf", "-", "."])
        .stdout(files.try_clone()?)
        .status()
        .context("starting tar")?;
    if !sent.success() {
        output.write_all(format!("test bed: results could not be sent whole: {sent}\n").as_bytes())?;
    }
    output.write_all(&Record::Ended { status }.to_line())?;
    Ok(())
}

fn started() -> Result<Record> {
    let uptime = fs::read_to_string("/proc/uptime")?;
    let uptime_s = uptime.split('.').next().and_then(|seconds| seconds.parse().ok()).unwrap_or(0);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned();
    Ok(Record::Started { uptime_s, kernel, kvm: Path::new("/dev/kvm").exists() })
}

fn path_of(program: &str) -> String {
    let packed = format!("{PAYLOAD}/bin/{program}");
    if !program.contains('/') && Path::new(&packed).exists() { packed } else { program.to_owned() }
}

/// Reaps everything that falls to PID 1 until `pid` ends; its status as a shell gives it.
fn reap_until(pid: Pid) -> Result<i32> {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(ended, status)) if ended == pid => return Ok(status),
            Ok(WaitStatus::Signaled(ended, signal, _)) if ended == pid => return Ok(128 + signal as i32),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("waiting for the job"),
        }
    }
}

/// Who was running when the deadline passed.
fn record_processes() {
    let Ok(log) = File::create(Path::new(RESULTS).join("logs/processes-at-deadline")) else { return };
    Command::new("ps").args(["-eo", "pid,ppid,stat,etime,args", "--forest"]).stdout(log).status().ok();
}

/// Gathers what explains a failure. Best effort: its own failures must not hide the job's.
fn collect_logs() {
    let logs = Path::new(RESULTS).join("logs");
    if let Ok(log) = File::create(logs.join("dmesg")) {
        Command::new("dmesg").stdout(log).status().ok();
    }
    // Sandboxes that still exist: their guests' consoles.
    for namespace in fs::read_dir("/run/spore").into_iter().flatten().flatten() {
        for sandbox in fs::read_dir(namespace.path()).into_iter().flatten().flatten() {
            let (namespace, id) = (namespace.file_name(), sandbox.file_name());
            let name = format!("console-{}-{}.log", namespace.to_string_lossy(), id.to_string_lossy());
            fs::copy(sandbox.path().join("console.log"), logs.join(name)).ok();
        }
    }
}
