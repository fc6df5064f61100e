//! The OCI runtime specification, as a configuration of one's own asks for it: what no option of
//! `ctr run` reaches.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use spore_harness::bed::Subject;

use super::{Case, Difference, equal, refused};
use crate::bundle::Bundle;

pub(crate) const CASES: &[Case] = &[
    Case::new("config: sysctls", sysctls).starts(1),
    Case::new("config: resource limits", rlimits).starts(1),
    Case::new("config: additional groups and umask", groups).starts(1),
    Case::new("config: ambient capabilities of another user", ambient).starts(1),
    Case::new("config: oom_score_adj", oom_score).starts(1),
    Case::new("config: proc, sysfs, mqueue, devpts, shm and cgroup are mounted as asked", mounts).starts(1),
    Case::new("config: propagation of a mount", propagation).starts(1).differs(
        "the guest's libcontainer mounts it private; nothing outside the machine could propagate into it anyway",
    ),
    Case::new("config: a rootfs that is read-only", read_only).starts(1),
    Case::new("config: a program that is not there is refused", no_program).starts(1),
    Case::new("config: a bind mount of nothing is refused", no_source).starts(1),
    Case::new("config: a further node for a device that every machine has", further_node).starts(1),
    Case::new("config: a device of the host", hosts_device)
        .starts(1)
        .differs("a virtual machine has devices of its own"),
    Case::new("config: a device that no rule allows cannot be opened", device_rules).starts(1),
    Case::new("config: an AppArmor profile that no kernel has is refused", unknown_profile).starts(1),
    Case::new("config: masked and read-only paths of one's own", masked).starts(1),
    Case::new("config: annotations and unknown properties are let pass", unknown_properties).starts(1),
    Case::new("config: a capability that is none is passed over", unknown_capability).starts(1),
    Case::new("config: a resource limit that is none is refused", unknown_rlimit).starts(1),
];

/// What a script says under a configuration.
pub(crate) fn said(subject: &Subject, script: &str, edit: impl FnOnce(&mut Value)) -> Result<String> {
    let output = Bundle::new(subject)?.call(subject, script, edit)?.run()?;
    ensure!(output.success(), "{script:?}: {output}");
    Ok(output.text())
}

/// The configuration is refused in these words, and leaves no task.
pub(crate) fn is_refused(subject: &Subject, parts: &[&str], edit: impl FnOnce(&mut Value)) -> Result<()> {
    let bundle = Bundle::new(subject)?;
    let output = bundle.call(subject, "true", edit)?.run()?;
    refused(&output, parts)?;
    let tasks = subject.must(&["tasks", "ls"])?;
    ensure!(!tasks.contains(&bundle.id), "{tasks}");
    Ok(())
}

fn sysctls(subject: &Subject) -> Result<()> {
    let script = "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start";
    let said = said(subject, script, |spec| {
        spec["linux"]["sysctl"] =
            json!({ "kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "77" });
    })?;
    equal("sysctls", &said, "1\n77\n")
}

fn rlimits(subject: &Subject) -> Result<()> {
    let said = said(subject, "ulimit -Sn; ulimit -Hn; ulimit -Sc", |spec| {
        spec["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 123, "hard": 456 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
        ]);
    })?;
    equal("limits", &said, "123\n456\n0\n")
}

fn groups(subject: &Subject) -> Result<()> {
    let script = "id -u; id -g; grep ^Groups: /proc/self/status; umask";
    let said = said(subject, script, |spec| {
        spec["process"]["user"] =
            json!({ "uid": 1000, "gid": 1001, "additionalGids": [10, 20], "umask": 0o27 });
    })?;
    let words: Vec<_> = said.split_whitespace().collect();
    equal("user", &words.join(" "), "1000 1001 Groups: 10 20 0027")
}

fn ambient(subject: &Subject) -> Result<()> {
    let said = said(subject, "grep -E '^Cap(Eff|Amb):' /proc/self/status", |spec| {
        let set = json!(["CAP_NET_BIND_SERVICE", "CAP_KILL"]);
        spec["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
        for kind in ["bounding", "permitted", "effective", "inheritable", "ambient"] {
            spec["process"]["capabilities"][kind] = set.clone();
        }
    })?;
    equal("capabilities", &said, "CapEff:\t0000000000000420\nCapAmb:\t0000000000000420\n")
}

fn node(spec: &mut Value, kind: &str, major: u32, minor: u32) {
    let node = json!({ "path": "/dev/further", "type": kind, "major": major, "minor": minor, "fileMode": 0o644, "uid": 0, "gid": 0 });
    spec["linux"]["devices"] = json!([node]);
}

fn further_node(subject: &Subject) -> Result<()> {
    let script = "stat -c '%F %t:%T %a' /dev/further; echo x > /dev/further; echo $?";
    let said = said(subject, script, |spec| node(spec, "c", 1, 7))?;
    // /dev/full.
    equal("the node", &said, "character special file 1:7 644\n1\n")
}

fn hosts_device(subject: &Subject) -> Result<()> {
    if subject.is_spore() {
        is_refused(subject, &["/dev/further (b 8:0) is the host's"], |spec| node(spec, "b", 8, 0))?;
        return Err(Difference.into());
    }
    said(subject, "test -b /dev/further", |spec| node(spec, "b", 8, 0)).map(drop)
}

fn device_rules(subject: &Subject) -> Result<()> {
    // autofs, which nobody has: the kernel looks for it only if the rules let it.
    let script = "mknod /tmp/node c 10 235 && cat /tmp/node 2>&1 | sed 's/.*: //'";
    let denied = said(subject, script, |_| {})?;
    equal("without a rule", &denied, "Operation not permitted\n")?;
    let allowed = said(subject, script, |spec| {
        let rule = json!({ "allow": true, "type": "c", "major": 10, "minor": 235, "access": "rwm" });
        spec["linux"]["resources"]["devices"]
            .as_array_mut()
            .into_iter()
            .for_each(|rules| rules.push(rule.clone()));
    })?;
    ensure!(!allowed.contains("not permitted"), "with a rule: {allowed:?}");
    Ok(())
}

fn unknown_profile(subject: &Subject) -> Result<()> {
    let part = if subject.is_spore() { "the AppArmor profile \"acme\" is the host's" } else { "apparmor" };
    is_refused(subject, &[part], |spec| spec["process"]["apparmorProfile"] = json!("acme"))
}

fn masked(subject: &Subject) -> Result<()> {
    let script = "mkdir -p /tmp/x; cat /etc/passwd | wc -c; ls /usr | wc -l; echo x >>/etc/group; echo $?; \
                  touch /root/x; echo $?; ls /etc | grep -c passwd; test -e /no/such || echo none";
    let said = said(subject, script, |spec| {
        spec["linux"]["maskedPaths"] = json!(["/etc/passwd", "/usr", "/no/such"]);
        spec["linux"]["readonlyPaths"] = json!(["/etc/group", "/root", "/no/such"]);
    })?;
    equal("what is there", &said, "0\n0\n1\n1\n1\nnone\n")
}

fn unknown_properties(subject: &Subject) -> Result<()> {
    let said = said(subject, "echo it runs", |spec| {
        spec["annotations"] = json!({ "org.example.some": "", "org.example.other": "value" });
        spec["org.example.unknown"] = json!({ "kept": true });
        spec["linux"]["unknownToo"] = json!(["x"]);
    })?;
    equal("it", &said, "it runs\n")
}

fn unknown_capability(subject: &Subject) -> Result<()> {
    let said = said(subject, "sed -n 's/^CapEff:\\t//p' /proc/self/status", |spec| {
        for kind in ["bounding", "permitted", "effective"] {
            spec["process"]["capabilities"][kind] = json!(["CAP_KILL", "CAP_NOBODY_HAS"]);
        }
    })?;
    equal("the others", &said, "0000000000000020\n")
}

fn unknown_rlimit(subject: &Subject) -> Result<()> {
    is_refused(subject, &["RLIMIT_PERHAPS"], |spec| {
        spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_PERHAPS", "soft": 1, "hard": 1 }]);
    })
}

fn oom_score(subject: &Subject) -> Result<()> {
    let said = said(subject, "cat /proc/self/oom_score_adj", |spec| {
        spec["process"]["oomScoreAdj"] = json!(321);
    })?;
    equal("oom_score_adj", &said, "321\n")
}

fn mounts(subject: &Subject) -> Result<()> {
    let script = "while read -r _ at kind options _; do case $at in \
        /proc|/sys|/dev|/dev/pts|/dev/shm|/dev/mqueue|/sys/fs/cgroup) echo \"$at $kind $options\";; esac; \
        done </proc/mounts | sort";
    let said = said(subject, script, own_cgroup)?;
    for (at, kind, options) in [
        ("/proc", "proc", &["rw", "nosuid", "nodev", "noexec"][..]),
        ("/sys", "sysfs", &["ro", "nosuid", "nodev", "noexec"]),
        ("/dev", "tmpfs", &["rw", "nosuid", "mode=755"]),
        ("/dev/pts", "devpts", &["rw", "nosuid", "noexec", "gid=5", "mode=620", "ptmxmode=666"]),
        ("/dev/shm", "tmpfs", &["rw", "nosuid", "nodev", "noexec"]),
        ("/dev/mqueue", "mqueue", &["rw", "nosuid", "nodev", "noexec"]),
        ("/sys/fs/cgroup", "cgroup2", &["ro", "nosuid", "nodev", "noexec"]),
    ] {
        let line = said.lines().find(|line| line.starts_with(&format!("{at} {kind} ")));
        let found: Vec<_> = line.and_then(|line| line.split(' ').nth(2)).unwrap_or("").split(',').collect();
        for option in options {
            ensure!(found.contains(option), "{at}: {option} is not in {said}");
        }
    }
    Ok(())
}

fn propagation(subject: &Subject) -> Result<()> {
    let script = "grep -o ' /shared .* - \\| /private .* - ' /proc/self/mountinfo";
    let said = said(subject, script, |spec| {
        let mounts = spec["mounts"].as_array_mut();
        let tmpfs = |at: &str, kind: &str| json!({ "destination": at, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", kind] });
        mounts.into_iter().for_each(|mounts| {
            mounts.extend([tmpfs("/shared", "shared"), tmpfs("/private", "private")]);
        });
    })?;
    let line = |at: &str| said.lines().find(|line| line.contains(at)).unwrap_or("").to_owned();
    ensure!(!line("/private").is_empty() && !line("/private").contains("shared:"), "{said}");
    ensure!(!line("/shared").is_empty(), "{said}");
    if subject.is_spore() && !line("/shared").contains("shared:") {
        return Err(Difference.into());
    }
    ensure!(line("/shared").contains("shared:"), "{said}");
    Ok(())
}

fn read_only(subject: &Subject) -> Result<()> {
    let said =
        said(subject, "touch /x 2>/dev/null || echo refused; touch /dev/shm/x && echo taken", |spec| {
            spec["root"]["readonly"] = json!(true);
        })?;
    equal("writes", &said, "refused\ntaken\n")
}

/// Shows the container its own cgroup as the root of those below /sys/fs/cgroup.
pub(super) fn own_cgroup(spec: &mut Value) {
    let cgroup = json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "nodev", "noexec"] });
    spec["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(cgroup.clone()));
    let own = json!({ "type": "cgroup" });
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    namespaces.into_iter().for_each(|namespaces| {
        namespaces.retain(|namespace| namespace["type"] != "cgroup");
        namespaces.push(own.clone());
    });
}

fn no_program(subject: &Subject) -> Result<()> {
    is_refused(subject, &["/no/such", "no such file or directory"], |spec| {
        spec["process"]["args"] = json!(["/no/such/program"]);
    })
}

fn no_source(subject: &Subject) -> Result<()> {
    is_refused(subject, &["/no/such/source"], |spec| {
        let mount = json!({ "destination": "/mnt", "type": "bind", "source": "/no/such/source", "options": ["rbind"] });
        spec["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(mount.clone()));
    })
}
