//! The outer machine: QEMU with a CPU that virtualises, over a copy-on-write view of the
//! cached root file system.
//!
//! Nothing of a run survives it but the results: the overlay is an unlinked file, the machine
//! has no network, and QEMU dies with this process (PR_SET_PDEATHSIG, by setpriv(1)).

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::qemu::Qemu;
use super::relay::{OVERHEAD, Outcome, Relay};
use super::rootfs::Root;
use super::{initramfs, run::Finished};
use crate::ground::Accelerator;
use crate::job::{Job, Record};
use crate::wait;

/// Memory of the machine in MiB. Guests of 6 GiB run in it; they touch little of theirs.
const MEMORY_MIB: u32 = 8192;
/// With more, QEMU 7.2 and 10.0 let guests die now and then: tests/README.md has the figures.
const CPUS_EMULATED: u32 = 1;
const CPUS: u32 = 2;
/// Features are off that QEMU's emulation lacks and would warn about. QEMU 7.2 also got two
/// wrong, which kernels do without: cmpxchg16b left garbage in RFLAGS when an interrupt
/// followed, and XSETBV was not intercepted, so that KVM reset a guest's XCR0 at every entry.
const EMULATED_CPU: &str = concat!(
    "EPYC,svm=on,npt=on,cx16=off,rdseed=off,sha-ni=off,fxsr-opt=off,misalignsse=off,",
    "3dnowprefetch=off,osvw=off,topoext=off,nrip-save=off,xsavec=off,xsave=off",
);
/// Names of the virtio ports, as the machine's init finds them.
pub const PORT_OUTPUT: &str = "spore.output";
pub const PORT_FILES: &str = "spore.files";
/// What is a variable's assignment here becomes the environment of PID 1.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 loglevel=4 mitigations=off random.trust_cpu=on PATH=/usr/sbin:/usr/bin:/sbin:/bin";
const LINES_OF_CONSOLE: usize = 30;

/// Everything that a machine is made of.
pub struct Machine<'a> {
    pub accelerator: Accelerator,
    pub qemu: Qemu,
    pub root: &'a Root,
    pub payload: &'a Path,
    pub init: &'a Path,
    /// Directory of this run: console, results.
    pub run_directory: &'a Path,
}

impl Machine<'_> {
    /// Boots, runs the job, waits for the machine to be off.
    pub fn run(&self, job: &Job) -> Result<Finished> {
        let initrd = self.run_directory.join("initramfs");
        fs::write(&initrd, initramfs::outer(self.init, &self.root.modules(), job)?)?;
        let console = self.run_directory.join("outer-console.log");
        let files = self.run_directory.join("files.tar");
        let begin = Instant::now();
        let mut qemu = self
            .command(&initrd, &console, &files)
            .spawn()
            .context("starting QEMU through setpriv (make installs what is missing)")?;
        let Some(output) = qemu.stdout.take() else { bail!("QEMU has no standard output") };
        let end = begin + Duration::from_secs(job.deadline_s) + OVERHEAD;
        let outcome = Relay::start(output).wait(end, |record| {
            if let Record::Started { uptime_s, kernel, kvm } = record {
                eprintln!(
                    "test bed: outer machine up after {} s (its clock: {uptime_s} s), kernel {kernel}, /dev/kvm {}",
                    begin.elapsed().as_secs(),
                    if *kvm { "there" } else { "missing" },
                );
            }
        })?;
        let Some(outcome) = outcome else {
            qemu.kill()?;
            qemu.wait()?;
            bail!(
                "the outer machine did not end within {} s and was killed\n{}",
                job.deadline_s,
                tail(&console)
            );
        };
        let status = wait::child("QEMU ends", &mut qemu, Duration::from_secs(30))?;
        match outcome {
            Outcome::Ended(status) => Ok(Finished { status, files: Some(files) }),
            Outcome::Failed(reason) => {
                bail!("the outer machine could not run the job: {reason}\n{}", tail(&console))
            }
            Outcome::Silent => {
                let how =
                    status.signal().map_or_else(|| status.to_string(), |signal| format!("signal {signal}"));
                bail!("the outer machine ended ({how}) before its job did\n{}", tail(&console))
            }
        }
    }

    fn command(&self, initrd: &Path, console: &Path, files: &Path) -> Command {
        let mut qemu = self.qemu.command();
        qemu.args(["-nodefaults", "-no-user-config", "-M", "q35"]);
        let cpus = match self.accelerator {
            Accelerator::Tcg => {
                qemu.args(["-accel", "tcg,tb-size=2048", "-cpu", EMULATED_CPU]);
                CPUS_EMULATED
            }
            Accelerator::Kvm => {
                qemu.args(["-accel", "kvm", "-cpu", "host"]);
                CPUS
            }
        };
        qemu.args(["-smp", &cpus.to_string(), "-m", &MEMORY_MIB.to_string()])
            .args(["-display", "none", "-no-reboot", "-nic", "none"])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .arg("-kernel")
            .arg(self.root.kernel())
            .arg("-initrd")
            .arg(initrd)
            .args(["-append", COMMAND_LINE]);
        let root = drive("root", &self.root.disk(), "snapshot=on,cache=unsafe,discard=unmap");
        let payload = drive("payload", self.payload, "readonly=on");
        qemu.args(root).args(payload);
        // Not "-chardev stdio": at the end of its input it takes the port for disconnected, and
        // the guest's writes block.
        qemu.args([
            "-device",
            "virtio-serial-pci",
            "-chardev",
            "file,id=output,path=/proc/self/fd/1",
            "-chardev",
        ])
        .arg(format!("file,id=files,path={}", files.display()));
        for (chardev, name) in [("output", PORT_OUTPUT), ("files", PORT_FILES)] {
            qemu.args(["-device", &format!("virtserialport,chardev={chardev},name={name}")]);
        }
        qemu.stdin(Stdio::null()).stdout(Stdio::piped());
        qemu
    }
}

fn drive(id: &str, image: &Path, options: &str) -> [String; 4] {
    [
        "-drive".into(),
        format!("if=none,id={id},format=raw,{options},file={}", image.display()),
        "-device".into(),
        format!("virtio-blk-pci,drive={id},serial={id}"),
    ]
}

/// The last lines of the machine's console, for an error.
fn tail(console: &Path) -> String {
    let text = fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    let from = lines.len().saturating_sub(LINES_OF_CONSOLE);
    let shown: String = lines[from..].iter().map(|line| format!("    {line}\n")).collect();
    format!("its console ({}) ends with:\n{shown}", PathBuf::from(console).display())
}
