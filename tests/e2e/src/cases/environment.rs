//! What a process finds around itself is what runc gives it, but for the machine.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use spore_harness::containerd::Runtime;
use spore_harness::image::BUSYBOX;

use super::bad_config::run as configured;
use super::{Case, expect_contains, expect_equal};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("environment::as_runc", as_runc).spore_only().starts(2),
    Case::new("environment::limits_choose_the_machine", limits_choose_the_machine).spore_only(),
    Case::new("environment::sets_of_cpus", sets_of_cpus).spore_only().alone().starts(2),
    Case::new("environment::memory_limit_kills", memory_limit_kills),
    Case::new("environment::domain_name_and_personality", domain_name_and_personality).spore_only(),
];

/// Identity, capabilities, limits, environment, devices, mounts, masked and read-only paths.
/// Not compared: the boot id and the generation with its socket, which are the sandbox's own and therefore mounted; the link to `/proc/kcore`, which libcontainer calls kcore and runc core.
const ASK: &str = "id; pwd; umask; env | sort; ulimit -n; \
    grep -E '^(Cap|NoNewPrivs|Groups)' /proc/self/status; \
    ls /dev | grep -v -e core -e spore | sort; awk '$2 != \"/\" && $2 !~ /boot_id$|generation(\\.sock)?$/ { print $2, $3 }' /proc/mounts | sort; \
    for f in /proc/kcore /proc/keys; do wc -c < $f; done; \
    for f in /proc/sys/kernel/hostname /proc/sysrq-trigger; do ( echo x > $f ) 2>&1; done; \
    ls /proc/acpi /sys/firmware 2>/dev/null | wc -l";

fn as_runc(subject: &Subject) -> Result<()> {
    let ask = |runtime: Runtime| -> Result<Vec<String>> {
        let id = subject.id("ask");
        let args = ["run", "--rm", "--runtime", runtime.id(), BUSYBOX, &id, "sh", "-c", ASK];
        let output = subject.ctr(&args)?.run()?;
        ensure!(output.success(), "{}: {output}", runtime.name());
        Ok(output.text().lines().map(str::to_owned).collect())
    };
    expect_equal("lines", &ask(Runtime::Spore)?, &ask(Runtime::Runc)?)
}

/// CPU and memory limits of the specification choose a machine that holds them.
fn limits_choose_the_machine(subject: &Subject) -> Result<()> {
    let options = ["--cpus", "1.5", "--memory-limit", "536870912"];
    let script = "nproc; free -m | awk '/^Mem:/ { print $2 }'";
    let output = subject.run_with("limited", &options, BUSYBOX, &["sh", "-c", script])?.run()?;
    ensure!(output.success(), "{output}");
    let text = output.text();
    let [cpus, memory] = text.lines().collect::<Vec<_>>()[..] else {
        anyhow::bail!("two lines expected: {output}")
    };
    expect_equal("CPUs", &cpus, &"2")?;
    ensure!(memory.parse::<u32>()? > 512, "the machine has {memory} MiB");
    Ok(())
}

/// A machine has every CPU of a set, whatever else would have chosen fewer. The ground itself may have one only, so that
/// runc could not do the same there.
fn sets_of_cpus(subject: &Subject) -> Result<()> {
    let script = "cd /sys/fs/cgroup; cat cpuset.cpus cpuset.cpus.effective; \
                  sed -n 's/^Cpus_allowed_list:\\t//p' /proc/self/status";
    for (cpu, set) in
        [(json!({ "cpus": "1" }), "1"), (json!({ "cpus": "0-1", "quota": 50_000, "period": 100_000 }), "0-1")]
    {
        let output = configured(subject, |spec| {
            spec["process"]["args"] = json!(["/bin/sh", "-c", script]);
            spec["linux"]["resources"]["cpu"] = cpu.clone();
            own_cgroup(spec);
        })?;
        ensure!(output.success(), "{cpu}: {output}");
        expect_equal("the sets", &output.text().as_str(), &format!("{set}\n{set}\n{set}\n").as_str())
            .with_context(|| cpu.to_string())?;
    }
    Ok(())
}

/// Shows the container its own cgroup as the root of those below /sys/fs/cgroup.
fn own_cgroup(spec: &mut Value) {
    let mount =
        json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] });
    spec["mounts"].as_array_mut().into_iter().for_each(|mounts| mounts.push(mount.clone()));
    let own = json!({ "type": "cgroup" });
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    namespaces.into_iter().for_each(|namespaces| {
        namespaces.retain(|namespace| namespace["type"] != "cgroup");
        namespaces.push(own.clone());
    });
}

/// The exact limit is that of the container's cgroup: its process dies, the container goes on.
fn memory_limit_kills(subject: &Subject) -> Result<()> {
    let script = "dd if=/dev/zero of=/dev/shm/big bs=1M count=60; echo status $?";
    let options = ["--memory-limit", "33554432"];
    let output = subject.run_with("oom", &options, BUSYBOX, &["sh", "-c", script])?.run()?;
    ensure!(output.success(), "{output}");
    expect_contains("output", &output.text(), "status 137")
}

/// What runc does since 1.2 only, so that there is nothing to compare with in Debian's.
fn domain_name_and_personality(subject: &Subject) -> Result<()> {
    let output = configured(subject, |spec| {
        spec["process"]["args"] = json!(["/bin/sh", "-c", "cat /proc/sys/kernel/domainname; uname -m"]);
        spec["domainname"] = json!("example");
        spec["linux"]["personality"] = json!({ "domain": "LINUX32" });
    })?;
    ensure!(output.success(), "{output}");
    expect_equal("domain name and machine", &output.text().as_str(), &"example\ni686\n")
}
