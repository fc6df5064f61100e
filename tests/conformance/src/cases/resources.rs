//! Limits of a container's cgroup, as a configuration of one's own asks for them.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use spore_harness::bed::Subject;

use super::config::{is_refused, own_cgroup, said};
use super::{Case, Difference, equal};

pub(crate) const CASES: &[Case] = &[
    Case::new("config: CPU weight and number of processes", weight_and_pids).starts(1),
    Case::new("config: a set of CPUs", set_of_cpus).starts(1),
    Case::new("config: CPUs that are not there are refused", bad_cpus).starts(1),
    Case::new("config: memory that is too little for a container is refused", little_memory).starts(1),
    Case::new("config: weight of input and output", io_weight).starts(1),
    Case::new("config: limits of a device's input and output", device_limits)
        .starts(1)
        .differs("they name disks of the host by number; a virtual machine has disks of its own"),
    Case::new("config: huge pages", huge_pages).starts(1),
];

fn weight_and_pids(subject: &Subject) -> Result<()> {
    let script = "cat /sys/fs/cgroup/cpu.weight /sys/fs/cgroup/pids.max";
    let said = said(subject, script, |spec| {
        spec["linux"]["resources"]["cpu"] = json!({ "shares": 512 });
        spec["linux"]["resources"]["pids"] = json!({ "limit": 77 });
        own_cgroup(spec);
    })?;
    // runc and youki convert shares by formulas of different years.
    let words: Vec<_> = said.split_whitespace().collect();
    let [weight, pids] = words.as_slice() else { anyhow::bail!("{said:?}") };
    ensure!((10..=60).contains(&weight.parse::<u32>()?) && *pids == "77", "{said:?}");
    Ok(())
}

/// With less time than one of them has. The ground has no second one: `environment::sets_of_cpus` of the e2e cases.
fn set_of_cpus(subject: &Subject) -> Result<()> {
    let said = said(subject, "cat /sys/fs/cgroup/cpuset.cpus /sys/fs/cgroup/cpu.max", |spec| {
        spec["linux"]["resources"]["cpu"] = json!({ "cpus": "0", "quota": 50_000, "period": 100_000 });
        own_cgroup(spec);
    })?;
    equal("the set, and the time", &said, "0\n50000 100000\n")
}

fn bad_cpus(subject: &Subject) -> Result<()> {
    is_refused(subject, &["cpu"], |spec| spec["linux"]["resources"]["cpu"] = json!({ "cpus": "900" }))
}

fn little_memory(subject: &Subject) -> Result<()> {
    let part = if subject.is_spore() { "at least 4194304 are needed" } else { "memory limit" };
    is_refused(subject, &[part], |spec| spec["linux"]["resources"]["memory"]["limit"] = json!(1 << 20))
}

fn io_weight(subject: &Subject) -> Result<()> {
    // The file is the scheduler's, io.bfq.weight, where that has weights, else the controller's.
    let said = said(
        subject,
        "cat /sys/fs/cgroup/io.bfq.weight 2>/dev/null || cat /sys/fs/cgroup/io.weight",
        |spec| {
            spec["linux"]["resources"]["blockIO"] = json!({ "weight": 500 });
            own_cgroup(spec);
        },
    )?;
    // In io.weight the 10 to 1000 of the specification become 1 to 10000.
    let weight = said.split_whitespace().last().unwrap_or("");
    ensure!(["500", "4950"].contains(&weight), "{said:?}");
    Ok(())
}

fn device_limits(subject: &Subject) -> Result<()> {
    let disk = fs::read_dir("/sys/block")?.flatten().find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        // Whole disks that have something behind them.
        (name.starts_with("vd") || name.starts_with("sd") || name.starts_with("nvme"))
            .then(|| fs::read_to_string(entry.path().join("dev")).ok())?
    });
    let disk = disk.context("the ground has no disk")?;
    let (major, minor) = disk.trim().split_once(':').context("its number")?;
    let (major, minor) = (major.parse::<u32>()?, minor.parse::<u32>()?);
    let limit = |spec: &mut Value| {
        spec["linux"]["resources"]["blockIO"] =
            json!({ "throttleReadBpsDevice": [{ "major": major, "minor": minor, "rate": 1_048_576 }] });
        own_cgroup(spec);
    };
    if subject.is_spore() {
        let device = format!("throttleReadBpsDevice: {major}:{minor} is a device of the host");
        is_refused(subject, &[&device], limit)?;
        return Err(Difference.into());
    }
    let said = said(subject, "cat /sys/fs/cgroup/io.max", limit)?;
    ensure!(said.starts_with(&format!("{major}:{minor} rbps=1048576 ")), "{said:?}");
    Ok(())
}

fn huge_pages(subject: &Subject) -> Result<()> {
    let said = said(subject, "cat /sys/fs/cgroup/hugetlb.2MB.max", |spec| {
        spec["linux"]["resources"]["hugepageLimits"] = json!([{ "pageSize": "2MB", "limit": 4_194_304 }]);
        own_cgroup(spec);
    })?;
    equal("the limit", &said, "4194304\n")
}
