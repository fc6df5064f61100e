//! Guests of every size and kernel image boot and have what was asked for.

use anyhow::{Context, Result, ensure};
use spore_harness::image::BUSYBOX;

use super::{Case, expect_equal};
use crate::host;
use spore_harness::bed::Subject;

/// One boot does not depend on containerd's series: only the newest runs them.
pub(crate) const CASES: &[Case] = &[
    Case::new("matrix::vmlinux_1_cpu_128_mib", |subject| boots(subject, 1, 128)).spore_only().since("2."),
    Case::new("matrix::vmlinux_2_cpus_1_gib", |subject| boots(subject, 2, 1024)).spore_only().since("2."),
    Case::new("matrix::vmlinux_4_cpus_6_gib", |subject| boots(subject, 4, 6144)).spore_only().since("2."),
    Case::new("matrix::bzimage_1_cpu_128_mib", |subject| bzimage(subject, 1, 128))
        .spore_only()
        .alone()
        .since("2."),
    Case::new("matrix::bzimage_2_cpus_512_mib", |subject| bzimage(subject, 2, 512))
        .spore_only()
        .alone()
        .since("2."),
    Case::new("matrix::bzimage_4_cpus_6_gib", |subject| bzimage(subject, 4, 6144))
        .spore_only()
        .alone()
        .since("2."),
];

/// The ELF file beside it is the default.
fn bzimage(subject: &Subject, vcpus: u32, memory_mib: u64) -> Result<()> {
    let _config = host::Config::with("kernel = \"/usr/local/lib/spore/vmlinuz\"")?;
    boots(subject, vcpus, memory_mib)
}

fn boots(subject: &Subject, vcpus: u32, memory_mib: u64) -> Result<()> {
    let (vcpus_of, memory_of) =
        (format!("io.spore.vcpus={vcpus}"), format!("io.spore.memory_mib={memory_mib}"));
    let options = ["--annotation", &vcpus_of, "--annotation", &memory_of];
    let script = "nproc; sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
    let output = subject.run_with("matrix", &options, BUSYBOX, &["sh", "-c", script])?.run()?;
    ensure!(output.success(), "{output}");
    let text = output.text();
    let mut lines = text.lines();
    expect_equal("CPUs in the guest", &lines.next().unwrap_or_default(), &vcpus.to_string().as_str())?;
    let kib: u64 =
        lines.next().unwrap_or_default().parse().with_context(|| format!("MemTotal in {text:?}"))?;
    // The kernel keeps a part for itself, more of a small machine's.
    let (most, least) = (memory_mib * 1024, memory_mib * 1024 * 6 / 10);
    ensure!((least..=most).contains(&kib), "{kib} KiB of memory in a guest of {memory_mib} MiB");
    Ok(())
}
