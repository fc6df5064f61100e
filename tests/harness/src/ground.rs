//! Which ground to stand on, and why.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::host::initramfs;
use crate::wait;

/// Line that the probe guest prints when it is up.
pub const PROBE_GREETING: &str = "spore-testbed: probe guest is up";
/// A kernel that boots at all prints the greeting well within this.
const PROBE_DEADLINE: Duration = Duration::from_secs(60);

/// Where programs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ground {
    /// On the host's kernel and KVM, in namespaces of their own.
    Direct,
    /// In the outer QEMU machine.
    Outer(Accelerator),
}

/// What runs the outer machine's CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU emulates a CPU with SVM.
    Tcg,
    /// The host's KVM, with nested virtualisation.
    Kvm,
}

impl fmt::Display for Ground {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "host",
            Self::Outer(Accelerator::Tcg) => "outer-tcg",
            Self::Outer(Accelerator::Kvm) => "outer-kvm",
        })
    }
}

/// A ground and the reason for it, in words for the user.
#[derive(Debug, Clone)]
pub struct Decision {
    pub ground: Ground,
    pub reason: String,
}

impl Decision {
    /// One or two lines for the screen.
    pub fn announce(&self) -> String {
        let what = match self.ground {
            Ground::Direct => "the host's own kernel and KVM, in private namespaces",
            Ground::Outer(Accelerator::Tcg) => {
                "an outer QEMU machine whose CPU (with SVM) is emulated: slow but real"
            }
            Ground::Outer(Accelerator::Kvm) => {
                "an outer QEMU machine on the host's KVM with nested virtualisation"
            }
        };
        format!("ground: {what}\n        because {}", self.reason)
    }
}

/// What a probe needs.
pub struct ProbeKit<'a> {
    pub vmm: PathBuf,
    pub kernel: PathBuf,
    /// The static binary that serves as the probe guest's `/init`.
    pub init: &'a Path,
}

/// Decides. `SPORE_GROUND=host|outer-tcg|outer-kvm` overrules.
pub fn decide(kit: &ProbeKit<'_>) -> Result<Decision> {
    if let Some(wish) = std::env::var_os("SPORE_GROUND") {
        let ground = match wish.to_str() {
            Some("host") => Ground::Direct,
            Some("outer-tcg") => Ground::Outer(Accelerator::Tcg),
            Some("outer-kvm") => Ground::Outer(Accelerator::Kvm),
            _ => bail!("SPORE_GROUND is {wish:?}; it may be host, outer-tcg or outer-kvm"),
        };
        return Ok(Decision { ground, reason: "SPORE_GROUND asks for it".into() });
    }
    let outer = |accelerator, reason: String| Ok(Decision { ground: Ground::Outer(accelerator), reason });
    let cpu = fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
    let has = |flag| {
        cpu.lines().any(|line| line.starts_with("flags") && line.split_whitespace().any(|f| f == flag))
    };
    if !has("vmx") && !has("svm") {
        return outer(
            Accelerator::Tcg,
            "the CPU shows neither vmx nor svm: no KVM here can boot a stock kernel".into(),
        );
    }
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return outer(Accelerator::Tcg, format!("/dev/kvm cannot be opened: {error}"));
    }
    if !nix::unistd::geteuid().is_root() {
        return outer(accelerator_of_host(), "running directly needs root, for mounts and namespaces".into());
    }
    match probe(kit) {
        // The outer machine keeps the tests from the host's devices and cgroups.
        Ok(()) if accelerator_of_host() == Accelerator::Kvm => {
            outer(Accelerator::Kvm, "a probe guest booted on /dev/kvm, and KVM here nests".into())
        }
        Ok(()) => Ok(Decision {
            ground: Ground::Direct,
            reason: "a probe guest booted on /dev/kvm, and KVM here does not nest".into(),
        }),
        Err(error) => outer(
            accelerator_of_host(),
            format!("a probe guest did not boot on this host's /dev/kvm: {error:#}"),
        ),
    }
}

/// KVM when it nests, else emulation.
fn accelerator_of_host() -> Accelerator {
    let nested = ["kvm_intel", "kvm_amd"].iter().any(|module| {
        fs::read_to_string(format!("/sys/module/{module}/parameters/nested"))
            .is_ok_and(|value| matches!(value.trim(), "1" | "Y"))
    });
    if nested { Accelerator::Kvm } else { Accelerator::Tcg }
}

/// Boots the guest kernel with an init that says one line and powers off.
fn probe(kit: &ProbeKit<'_>) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let initrd = directory.path().join("probe.cpio");
    fs::write(&initrd, initramfs::probe(kit.init)?)?;
    let output = fs::File::create(directory.path().join("console"))?;
    let mut vmm = Command::new(&kit.vmm)
        .args(["run", "--console", "--kernel"])
        .arg(&kit.kernel)
        .arg("--initrd")
        .arg(&initrd)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .spawn()
        .with_context(|| format!("starting {}", kit.vmm.display()))?;
    let ended = wait::child("the probe guest powers off", &mut vmm, PROBE_DEADLINE);
    let console = String::from_utf8_lossy(&fs::read(directory.path().join("console"))?).into_owned();
    if console.contains(PROBE_GREETING) {
        return Ok(());
    }
    let last = console.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("(nothing)").to_owned();
    let ended = ended.map_or_else(|error| error.to_string(), |status| status.to_string());
    bail!("{ended}; its last line was: {last}")
}
