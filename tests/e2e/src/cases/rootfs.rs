//! Every way by which a root file system reaches the runtime.

use std::fs;

use anyhow::{Result, ensure};
use spore_harness::image::{BUSYBOX, LAYERS, LAYERS_FILES};

use super::{Case, expect_equal};
use crate::host::Over;
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("rootfs::layers_overlayfs", |subject| layers(subject, "overlayfs")),
    Case::new("rootfs::layers_native", |subject| layers(subject, "native")).smoke(),
    Case::new("rootfs::layers_erofs", layers_erofs).since("2.1"),
    Case::new("rootfs::directory", directory),
    Case::new("rootfs::mounted_overlay", mounted_overlay),
    Case::new("rootfs::writable_and_ordinary", writable_and_ordinary),
];

/// Whiteouts, opaque directories and replaced files look as they should.
fn layers(subject: &Subject, snapshotter: &str) -> Result<()> {
    // Unpacks for this snapshotter what is already imported.
    subject
        .must(&["images", "mount", "--snapshotter", snapshotter, LAYERS, "/mnt"])
        .and_then(|_| subject.must(&["images", "unmount", "--snapshotter", snapshotter, "--rm", "/mnt"]))?;
    let paths: Vec<_> = LAYERS_FILES.iter().map(|(path, _)| *path).collect();
    let script =
        format!("for f in {}; do if [ -e $f ]; then cat $f; echo; else echo -; fi; done", paths.join(" "));
    let command = ["sh", "-c", &script];
    let output = subject.run_with("layers", &["--snapshotter", snapshotter], LAYERS, &command)?.run()?;
    ensure!(output.success(), "{output}");
    let found: Vec<_> = output.text().lines().map(str::to_owned).collect();
    let expected: Vec<_> =
        LAYERS_FILES.iter().map(|(_, content)| content.unwrap_or("-").to_owned()).collect();
    expect_equal("files of the image", &found, &expected)
}

fn layers_erofs(subject: &Subject) -> Result<()> {
    let plugins = subject.must(&["plugins", "ls"])?;
    let usable = plugins.lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields.first() == Some(&"io.containerd.snapshotter.v1")
            && fields.get(1) == Some(&"erofs")
            && fields.last() == Some(&"ok")
    });
    ensure!(usable, "containerd {} has no usable erofs snapshotter:\n{plugins}", subject.series);
    layers(subject, "erofs")
}

/// `--rootfs`: a directory that somebody else prepared.
fn directory(subject: &Subject) -> Result<()> {
    let id = subject.id("directory");
    let rootfs = subject.bed.rootfs();
    let rootfs = rootfs.to_string_lossy();
    let runtime = subject.runtime.id();
    // Without an image nothing sets a PATH.
    let command = ["/bin/sh", "-c", "cat /etc/passwd; echo x > /tmp/x"];
    let mut args = vec!["run", "--rm", "--runtime", runtime, "--rootfs", &rootfs, &id];
    args.extend(command);
    let output = subject.ctr(&args)?.run()?;
    ensure!(output.success(), "{output}");
    let expected = fs::read_to_string(subject.bed.rootfs().join("etc/passwd"))?;
    expect_equal("/etc/passwd", &output.text(), &expected)
}

/// `--rootfs` on a mounted overlay to which something was written: what Docker gives.
fn mounted_overlay(subject: &Subject) -> Result<()> {
    let home = tempfile::tempdir_in("/srv/bed")?;
    let [upper, work, root] = ["upper", "work", "root"].map(|name| home.path().join(name));
    for directory in [&upper, &work, &root] {
        fs::create_dir(directory)?;
    }
    let _mounted = Over::overlay(&subject.bed.rootfs(), &upper, &work, &root)?;
    fs::write(root.join("etc/written"), "on the host\n")?;
    fs::remove_file(root.join("etc/passwd"))?;
    let script = "cat /etc/written; [ -e /etc/passwd ] || echo gone; echo x > /etc/more";
    let (id, runtime, root) = (subject.id("overlay"), subject.runtime.id(), root.to_string_lossy());
    let args = ["run", "--rm", "--runtime", runtime, "--rootfs", &root, &id, "/bin/sh", "-c", script];
    let output = subject.ctr(&args)?.run()?;
    ensure!(output.success(), "{output}");
    expect_equal("output", &output.text().as_str(), &"on the host\ngone\n")
}

/// What a program finds of an ordinary OCI environment.
fn writable_and_ordinary(subject: &Subject) -> Result<()> {
    let script = "set -e; echo x > /new; rm /etc/group; mkdir /d; ln -s /new /d/l; cat /d/l; \
                  [ -c /dev/null ]; [ -d /proc/self ]; [ -w /dev/shm ]; [ -d /sys/fs/cgroup ]; \
                  [ $$ = 1 ]; id -u; pwd; chown 1000:1000 /new; stat -c %u /new; umask";
    let output = subject.run_with("ordinary", &[], BUSYBOX, &["sh", "-c", script])?.run()?;
    ensure!(output.success(), "{output}");
    expect_equal("output", &output.text().as_str(), &"x\n0\n/\n1000\n0022\n")
}
