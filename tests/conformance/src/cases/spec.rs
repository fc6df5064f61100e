//! The OCI runtime specification, as the options of `ctr run` reach it.

use std::fs;

use anyhow::{Context, Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::image::BUSYBOX;

use super::{Case, equal};
use crate::guest::shared;

pub(crate) const CASES: &[Case] = &[
    Case::new("spec: hostname", hostname).starts(1),
    Case::new("spec: environment, from options and a file", environment).starts(1),
    Case::new("spec: a working directory that the image lacks is made", directory).starts(1),
    Case::new("spec: user and group", user).starts(1),
    Case::new("spec: capabilities added and dropped", capabilities).starts(1),
    Case::new("spec: privileged", privileged).starts(1),
    Case::new("spec: a read-only root", read_only).starts(1),
    Case::new("spec: tmpfs with its options", tmpfs).starts(1),
    Case::new("spec: no new privileges", no_new_privileges),
    Case::new("spec: masked and read-only paths", masked),
    Case::new("spec: devices", devices),
    Case::new("spec: a seccomp profile of errno and arguments", seccomp).starts(1),
    Case::new("spec: the pid file", pid_file).starts(1),
];

/// What a script says in a container of its own.
fn said(subject: &Subject, options: &[&str], script: &str) -> Result<String> {
    let output = subject.run_with("spec", options, BUSYBOX, &["sh", "-c", script])?.run()?;
    ensure!(output.success(), "{script:?} with {options:?}: {output}");
    Ok(output.text())
}

fn hostname(subject: &Subject) -> Result<()> {
    equal(
        "hostname",
        &said(subject, &["--hostname", "web-1"], "hostname; cat /proc/sys/kernel/hostname")?,
        "web-1\nweb-1\n",
    )
}

fn environment(subject: &Subject) -> Result<()> {
    let file = format!("/tmp/{}", subject.id("env"));
    fs::write(&file, "FROM_FILE=a b=c\n")?;
    let options = ["--env", "ONE=1", "--env", "EMPTY=", "--env-file", &file];
    let text = said(subject, &options, "echo \"$ONE|$EMPTY|$FROM_FILE|$HOME\"; env | grep -c ^EMPTY=")?;
    fs::remove_file(file)?;
    equal("environment", &text, "1||a b=c|/root\n1\n")
}

fn directory(subject: &Subject) -> Result<()> {
    equal(
        "directory",
        &said(subject, &["--cwd", "/made/for/this"], "pwd; stat -c %a .")?,
        "/made/for/this\n755\n",
    )
}

fn user(subject: &Subject) -> Result<()> {
    equal(
        "ids",
        &said(subject, &["--user", "1000:1001"], "id -u; id -g; echo x >/dev/stdout")?,
        "1000\n1001\nx\n",
    )
}

fn capabilities(subject: &Subject) -> Result<()> {
    let options = ["--cap-add", "CAP_SYS_ADMIN", "--cap-drop", "CAP_CHOWN"];
    let text = said(subject, &options, "sed -n 's/^CapEff:\\t//p' /proc/self/status")?;
    let effective = u64::from_str_radix(text.trim(), 16)?;
    ensure!(effective & (1 << 21) != 0 && effective & 1 == 0, "CapEff is {text}");
    Ok(())
}

fn privileged(subject: &Subject) -> Result<()> {
    let script = "sed -n 's/^CapEff:\\t//p' /proc/self/status; mkdir /m && mount -t tmpfs none /m && echo mounted; \
                  test -w /proc/sys/kernel/hostname && echo writable";
    let text = said(subject, &["--privileged"], script)?;
    let mut lines = text.lines();
    let effective = u64::from_str_radix(lines.next().unwrap_or_default(), 16)?;
    ensure!(effective.count_ones() >= 40, "CapEff is {effective:x}");
    equal("rest", &lines.collect::<Vec<_>>().join(" "), "mounted writable")
}

fn read_only(subject: &Subject) -> Result<()> {
    let script = "touch /x 2>&1; echo $?; touch /dev/shm/x && echo shm";
    let text = said(subject, &["--read-only"], script)?;
    ensure!(text.contains("Read-only file system\n1\nshm\n"), "{text:?}");
    Ok(())
}

fn tmpfs(subject: &Subject) -> Result<()> {
    let options = ["--mount", "type=tmpfs,src=tmpfs,dst=/scratch,options=nosuid:noexec:size=1m:mode=711"];
    let script = "stat -c %a /scratch; df -k /scratch | tail -n 1 | awk '{ print $2 }'; \
                  grep ' /scratch ' /proc/mounts | grep -c 'nosuid.*noexec'; dd if=/dev/zero of=/scratch/x bs=1M count=2 2>&1 | grep -c 'No space'";
    equal("mode, size, flags, fullness", &said(subject, &options, script)?, "711\n1024\n1\n1\n")
}

fn no_new_privileges(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let of = |pid: &str| guest.shell(&format!("sed -n 's/^NoNewPrivs:\\t//p' /proc/{pid}/status"));
        equal("of init and exec", &format!("{}{}", of("1")?, of("self")?), "1\n1\n")
    })
}

fn masked(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let script =
            "head -c 1 /proc/kcore | wc -c; ls /proc/acpi | wc -l; echo 1 >/proc/sys/vm/drop_caches; echo $?";
        let output = guest.exec(&["sh", "-c", script])?;
        equal("kcore, acpi, sys", &output.text(), "0\n0\n1\n")
    })
}

fn devices(subject: &Subject) -> Result<()> {
    shared(subject, |guest| {
        let script = "for d in full null ptmx random tty urandom zero; do test -c /dev/$d || echo no $d; done; \
                      for l in fd stdin stdout stderr; do readlink /dev/$l; done; head -c 3 /dev/zero | wc -c";
        equal(
            "devices",
            &guest.shell(script)?,
            "/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\n3\n",
        )
    })
}

fn seccomp(subject: &Subject) -> Result<()> {
    // mkdir fails with ENOTTY, kill of signal 15 (its second argument) with EDOM.
    let profile = serde_json::json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [
            { "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 25 },
            { "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 33,
              "args": [{ "index": 1, "value": 15, "op": "SCMP_CMP_EQ" }] }
        ]
    });
    let file = format!("/tmp/{}", subject.id("seccomp"));
    fs::write(&file, profile.to_string())?;
    let script = "mkdir /tmp/x 2>&1; kill -15 $$ 2>&1; kill -0 $$ && echo alive";
    let text = said(subject, &["--seccomp", "--seccomp-profile", &file], script)?;
    fs::remove_file(file)?;
    for part in ["Inappropriate ioctl for device", "Numerical argument out of domain", "alive"] {
        ensure!(text.contains(part), "{part:?} is not in {text:?}");
    }
    Ok(())
}

fn pid_file(subject: &Subject) -> Result<()> {
    let file = format!("/tmp/{}", subject.id("pid"));
    let id = subject.id("with-pid");
    let args = [
        "run",
        "--detach",
        "--pid-file",
        &file,
        "--runtime",
        subject.runtime.id(),
        BUSYBOX,
        &id,
        "sleep",
        "1000",
    ];
    subject.must(&args)?;
    let list = subject.must(&["tasks", "ls"])?;
    let line = list.lines().find(|line| line.starts_with(&id)).context("in the list")?.to_owned();
    let pid = fs::read_to_string(&file)?;
    subject.must(&["tasks", "delete", "--force", &id])?;
    subject.must(&["containers", "delete", &id])?;
    fs::remove_file(file)?;
    equal("pid", pid.trim(), line.split_whitespace().nth(1).unwrap_or_default())
}
