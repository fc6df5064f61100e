//! Filters of system calls, as a configuration of one's own asks for them.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use spore_harness::bed::Subject;

use super::config::{is_refused, said};
use super::{Case, Difference, equal};
use crate::bundle::Bundle;

pub(crate) const CASES: &[Case] = &[
    Case::new("config: seccomp kills", kills).starts(1),
    Case::new("config: a seccomp profile with an action that is none is refused", bad_action).starts(1),
    Case::new("seccomp: what is to be logged is in the kernel's log", logs)
        .starts(1)
        .differs("guests boot faster without audit: the call is let through, and nothing is written"),
    Case::new("seccomp: names of system calls that are none are passed over", unknown_call).starts(1),
    Case::new("seccomp: a profile that does not compile is refused", does_not_compile).starts(1),
];

fn profile(spec: &mut Value, syscalls: Value) {
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": syscalls,
    });
}

fn kills(subject: &Subject) -> Result<()> {
    let bundle = Bundle::new(subject)?;
    let call = bundle.call(subject, "echo before; mkdir /made; echo after; exit 3", |spec| {
        profile(spec, json!([{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_PROCESS" }]));
    })?;
    let output = call.run()?;
    // The shell goes on: it is mkdir's process that is killed, by SIGSYS.
    ensure!(output.text().starts_with("before\n") && output.text().contains("after"), "{output}");
    ensure!(output.code() == 3, "{output}");
    ensure!(!bundle.path("rootfs/made").exists(), "the directory was made");
    Ok(())
}

fn bad_action(subject: &Subject) -> Result<()> {
    is_refused(subject, &["SCMP_ACT_PERHAPS"], |spec| {
        profile(spec, json!([{ "names": ["mkdir"], "action": "SCMP_ACT_PERHAPS" }]));
    })
}

fn logs(subject: &Subject) -> Result<()> {
    // 0x7ffc0000 is SECCOMP_RET_LOG. With runc the log is the machine's, which others have written to.
    let script = "count() { dmesg | grep -c 'type=1326.*comm=\"chmod\".*code=0x7ffc0000'; }; before=$(count); \
                  touch /file && chmod 600 /file && stat -c %a /file";
    let waits = "until test $(count) -gt $before; do sleep 0.1; done; echo logged";
    let edit = |spec: &mut Value| {
        let calls = ["chmod", "fchmod", "fchmodat", "fchmodat2"];
        profile(spec, json!([{ "names": calls, "action": "SCMP_ACT_LOG" }]));
        for kind in ["bounding", "permitted", "effective"] {
            let set = spec["process"]["capabilities"][kind].as_array_mut();
            set.into_iter().for_each(|set| set.push(json!("CAP_SYSLOG")));
        }
    };
    if subject.is_spore() {
        let said = said(subject, &format!("{script}; echo $(count)"), edit)?;
        equal("done, and not logged", &said, "600\n0\n")?;
        return Err(Difference.into());
    }
    let said = said(subject, &format!("{script}; {waits}"), edit)?;
    equal("done, and logged", &said, "600\nlogged\n")
}

fn unknown_call(subject: &Subject) -> Result<()> {
    let said = said(subject, "mkdir /made 2>&1; echo $?", |spec| {
        let names = ["no_such_call", "mkdir", "mkdirat", "nor_this_one"];
        profile(spec, json!([{ "names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": 25 }]));
    })?;
    ensure!(said.ends_with("Inappropriate ioctl for device\n1\n"), "{said:?}");
    Ok(())
}

fn does_not_compile(subject: &Subject) -> Result<()> {
    let argument = |index: u32, op: &str| {
        let args = [json!({ "index": index, "value": 1, "op": op })];
        json!([{ "names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": args }])
    };
    is_refused(subject, &["SCMP_CMP_PERHAPS"], |spec| profile(spec, argument(1, "SCMP_CMP_PERHAPS")))?;
    // A system call has six arguments.
    is_refused(subject, &["seccomp"], |spec| profile(spec, argument(9, "SCMP_CMP_EQ")))?;
    is_refused(subject, &["SCMP_ARCH_ABACUS"], |spec| {
        profile(spec, json!([]));
        spec["linux"]["seccomp"]["architectures"] = json!(["SCMP_ARCH_ABACUS"]);
    })
}
