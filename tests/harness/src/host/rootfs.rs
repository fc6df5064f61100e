//! The root file system of the ground: a small Debian with containerd of three series, made
//! without touching the host's own and kept in the cache.
//!
//! The mirror is the one that the machine's own apt uses.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cache;

/// Changes when the recipe below changes in a way that its constants do not show.
const RECIPE: &str = "6";
/// Suite of the base: its containerd (1.7), runc and kernel.
const SUITE: &str = "trixie";
const PACKAGES: &[&str] = &[
    "busybox-static",
    "containerd",
    "containernetworking-plugins",
    "docker-cli",
    "docker.io",
    "e2fsprogs",
    "erofs-utils",
    "iproute2",
    "iptables",
    "kmod",
    "linux-image-cloud-amd64",
    "nftables",
    "procps",
    "runc",
    "tcpdump",
    "tini",
    "util-linux",
];
/// Suites whose containerd is unpacked beside.
const OTHER_CONTAINERDS: &[&str] = &["bookworm", "sid"];
/// Room on the disk; sparse, so it costs only what is used.
const DISK_SIZE: u64 = 8 << 30;

/// A prepared root file system.
#[derive(Debug, Clone)]
pub struct Root {
    directory: PathBuf,
}

impl Root {
    /// ext4 image of the whole root.
    pub fn disk(&self) -> PathBuf {
        self.directory.join("disk.img")
    }

    /// The outer machine's kernel.
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// Modules that the kernel needs to find its disk.
    pub fn modules(&self) -> Vec<PathBuf> {
        vec![self.directory.join("virtio_blk.ko.xz")]
    }
}

/// The root file system, from the cache or made (a minute or two). `repository` is the
/// checkout, for `packaging/fetch-deb`.
pub fn prepare(repository: &Path) -> Result<Root> {
    let key = cache::Key::default()
        .with(RECIPE)
        .with(SUITE)
        .with(PACKAGES.join(","))
        .with(OTHER_CONTAINERDS.join(","))
        .with(DISK_SIZE.to_le_bytes());
    let directory = cache::entry("ground", key, |draft| make(repository, draft))?;
    Ok(Root { directory })
}

fn make(repository: &Path, draft: &Path) -> Result<()> {
    eprintln!("test bed: making the ground's root file system, once ({SUITE}; about 1-2 minutes)");
    let root = draft.join("root");
    let mirror = mirror()?;
    eprintln!("test bed: 1/4 {} packages of {SUITE} from {mirror}", PACKAGES.len());
    run(Command::new("mmdebstrap")
        .args(["--quiet", "--variant=minbase", "--mode=root", "--dpkgopt=force-confold"])
        .args(["doc", "man", "locale"].map(|what| format!("--dpkgopt=path-exclude=/usr/share/{what}/*")))
        // The outer machine has an initramfs of our own; making Debian's takes half a minute.
        .arg(concat!(
            "--essential-hook=mkdir -p \"$1/etc/initramfs-tools\"; ",
            "echo update_initramfs=no > \"$1/etc/initramfs-tools/update-initramfs.conf\"",
        ))
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg(SUITE)
        .arg(&root)
        .arg(&mirror))?;

    eprintln!("test bed: 2/4 containerd of {}", OTHER_CONTAINERDS.join(" and "));
    arrange_containerds(repository, draft, &root)?;

    eprintln!("test bed: 3/4 kernel");
    let release = only_entry(&root.join("lib/modules"))?;
    fs::copy(root.join("boot").join(format!("vmlinuz-{release}")), draft.join("vmlinuz"))?;
    let virtio_blk = root.join("lib/modules").join(&release).join("kernel/drivers/block/virtio_blk.ko.xz");
    fs::copy(virtio_blk, draft.join("virtio_blk.ko.xz"))?;
    for entry in fs::read_dir(root.join("boot"))? {
        fs::remove_file(entry?.path())?;
    }

    eprintln!("test bed: 4/4 disk image");
    for directory in ["opt/payload", "opt/cni", "etc/cni/net.d", "results"] {
        fs::create_dir_all(root.join(directory))?;
    }
    // Debian's plugins, where clients look for them.
    symlink("/usr/lib/cni", root.join("opt/cni/bin"))?;
    fs::write(root.join("etc/hostname"), "ground\n")?;
    fs::write(root.join("etc/hosts"), "127.0.0.1 localhost ground\n")?;
    make_disk(&root, &draft.join("disk.img"), DISK_SIZE)?;
    fs::remove_dir_all(&root)?;
    Ok(())
}

/// Puts each series at `/opt/containerd-SERIES/bin`, the base's own included.
fn arrange_containerds(repository: &Path, draft: &Path, root: &Path) -> Result<()> {
    for suite in OTHER_CONTAINERDS {
        let debs = draft.join("debs");
        let mut fetch = Command::new(repository.join("packaging/fetch-deb"));
        run(fetch.args(["--suite", suite]).arg(&debs).arg("containerd"))?;
        let deb = debs.join(only_entry(&debs)?);
        let unpacked = draft.join("unpacked");
        run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&unpacked))?;
        let version = output(Command::new("dpkg-deb").arg("-f").arg(&deb).arg("Version"))?;
        install_series(root, &unpacked.join("usr/bin"), series(&version)?)?;
        fs::remove_dir_all(&unpacked)?;
        fs::remove_dir_all(&debs)?;
    }
    let version = output(Command::new("dpkg-query").args([
        &format!("--admindir={}", root.join("var/lib/dpkg").display()),
        "-W",
        "-f${Version}",
        "containerd",
    ]))?;
    install_series(root, &root.join("usr/bin"), series(&version)?)
}

fn install_series(root: &Path, from: &Path, series: &str) -> Result<()> {
    let to = root.join(format!("opt/containerd-{series}/bin"));
    fs::create_dir_all(&to)?;
    for binary in ["containerd", "ctr", "containerd-shim-runc-v2"] {
        fs::copy(from.join(binary), to.join(binary))
            .with_context(|| format!("containerd {series}: installing {}", from.join(binary).display()))?;
        // The base's own would only double the image.
        if from.starts_with(root) {
            fs::remove_file(from.join(binary))?;
        }
    }
    Ok(())
}

/// `1.7` of `1.7.24~ds1-6`.
fn series(version: &str) -> Result<&str> {
    let mut dots = version.match_indices('.');
    match (dots.next(), dots.next()) {
        (Some(_), Some((end, _))) => Ok(&version[..end]),
        _ => bail!("\"{version}\" is not a version of containerd like 1.7.24"),
    }
}

/// An ext4 image holding `tree`, without a journal: a ground that loses power is thrown away.
pub fn make_disk(tree: &Path, image: &Path, size: u64) -> Result<()> {
    fs::File::create(image)?.set_len(size)?;
    run(Command::new("mkfs.ext4")
        .args(["-q", "-F", "-O", "^has_journal", "-m", "0", "-d"])
        .arg(tree)
        .arg(image))
}

/// The Debian mirror of the machine's own apt.
fn mirror() -> Result<String> {
    let format = "$(LABEL)|$(COMPONENT)|$(REPO_URI)";
    let targets =
        output(Command::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]))?;
    let found = targets.lines().find_map(|line| {
        let mut fields = line.split('|');
        let label = fields.next()?;
        let component = fields.next()?;
        let uri = fields.next()?;
        // Before the first "apt-get update" apt knows no label.
        let debian =
            label == "Debian" || (label.starts_with('$') && uri.trim_end_matches('/').ends_with("/debian"));
        (debian && component == "main").then(|| uri.to_owned())
    });
    found.context(
        "this machine's apt knows no Debian main archive to take the mirror from (apt-get indextargets)",
    )
}

fn only_entry(directory: &Path) -> Result<String> {
    let names: Vec<_> = fs::read_dir(directory)
        .with_context(|| format!("reading {}", directory.display()))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    match names.as_slice() {
        [name] => Ok(name.clone()),
        _ => bail!("{} holds {names:?} where one entry was expected", directory.display()),
    }
}

/// Runs a tool to its end; what it says is told only when it fails.
pub(super) fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    // What the tools print is progress: our standard output belongs to the job.
    let output = command
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .output()
        .with_context(|| format!("starting {program} (make installs what is missing)"))?;
    if !output.status.success() {
        bail!("{program}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("starting {program}"))?;
    if !output.status.success() {
        bail!("{program}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::series;

    #[test]
    fn a_series_is_the_first_two_numbers() {
        assert_eq!(series("1.7.24~ds1-6+deb13u1").ok(), Some("1.7"));
        assert_eq!(series("2.1.9-1").ok(), Some("2.1"));
        assert!(series("unknown").is_err());
    }
}
