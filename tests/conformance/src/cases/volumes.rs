//! Host directories and files in a container. What files do there is asked of a program that runs
//! in the container, from the volume itself: this one (`probe`).

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::call::Output;
use spore_harness::image::BUSYBOX;
use spore_harness::wait;

use super::{Case, Difference, equal, refused};
use crate::guest::{Guest, shared_by};
use crate::probe;

pub(crate) const CASES: &[Case] = &[
    Case::new("volumes: a directory, written on both sides", both_sides),
    Case::new("volumes: files belong to the container's users", owners),
    Case::new("volumes: what the host changes is seen within two seconds", host_changes),
    Case::new("volumes: links and .. stay in the container's root", links),
    Case::new("volumes: make, rename, link, remove", names),
    Case::new("volumes: 32 MiB through a file, both ways", large_file),
    Case::new("volumes: mmap, shared between processes and written back", |s| probed(s, "mmap")),
    Case::new("volumes: flock", |s| probed(s, "flock")),
    Case::new("volumes: POSIX record locks", |s| probed(s, "locks")),
    Case::new("volumes: O_DIRECT", |s| probed(s, "direct")),
    Case::new("volumes: O_APPEND of several processes", |s| probed(s, "append")),
    Case::new("volumes: extended attributes", |s| probed(s, "xattr")),
    Case::new("volumes: rename with NOREPLACE and EXCHANGE", |s| probed(s, "rename")),
    Case::new("volumes: a file that is unlinked but open", |s| probed(s, "unlinked")),
    Case::new("volumes: holes, fallocate, SEEK_DATA", |s| probed(s, "sparse")),
    Case::new("volumes: times in nanoseconds", |s| probed(s, "times")),
    Case::new("volumes: a directory of 500 entries", |s| probed(s, "directory")),
    Case::new("volumes: statfs", |s| probed(s, "statfs")),
    Case::new("volumes: inotify tells of what the container does", |s| probed(s, "inotify")),
    Case::new("volumes: read-only, a file alone, nested", kinds).starts(1),
    Case::new("volumes: a source that does not exist", missing).starts(1),
    Case::new("volumes: a socket of the host", socket)
        .starts(1)
        .differs("a socket's other end is a process of the host's kernel, which a guest cannot talk to"),
];

/// A directory of the host, empty, that goes with the value.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new(subject: &Subject) -> Result<Self> {
        let path = subject.bed.rootfs().with_file_name(subject.id("volume"));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// As `ctr run --mount` has it, at `/data`.
    pub(crate) fn mount(&self, options: &str) -> String {
        mount(&self.0, "/data", options)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn mount(source: &Path, destination: &str, options: &str) -> String {
    format!("type=bind,src={},dst={destination},options={options}", source.display())
}

/// Does something with the container that cases share, and with the directory that is its /data.
fn with<T>(subject: &Subject, act: impl FnOnce(&Guest, &Path) -> Result<T>) -> Result<T> {
    let start = |subject: &Subject| {
        let directory = Directory::new(subject)?;
        let program = directory.0.join(probe::PROGRAM);
        fs::copy(std::env::current_exe()?, &program)?;
        fs::set_permissions(&directory.0, fs::Permissions::from_mode(0o777))?;
        let guest = Guest::start(subject, &["--mount", &directory.mount("rbind:rw")])?;
        Ok((guest, directory))
    };
    shared_by(subject, "volume", start, |(guest, directory)| act(guest, &directory.0))
}

/// Runs a probe in a directory of its own.
fn probed(subject: &Subject, name: &str) -> Result<()> {
    with(subject, |guest, _| {
        guest.shell(&format!(
            "mkdir /data/{name} && /data/{} {} {name} /data/{name}",
            probe::PROGRAM,
            probe::VERB
        ))?;
        Ok(())
    })
}

fn both_sides(subject: &Subject) -> Result<()> {
    with(subject, |guest, data| {
        fs::write(data.join("from-the-host"), "hello\n")?;
        equal("the host's file", &guest.shell("cat /data/from-the-host")?, "hello\n")?;
        guest.shell("echo changed >> /data/from-the-host; mkdir -p /data/a/b; echo made > /data/a/b/c")?;
        equal("in the host", &fs::read_to_string(data.join("from-the-host"))?, "hello\nchanged\n")?;
        equal("in the host", &fs::read_to_string(data.join("a/b/c"))?, "made\n")
    })
}

fn owners(subject: &Subject) -> Result<()> {
    with(subject, |guest, data| {
        let script =
            "umask 027; mkdir /data/theirs && echo x > /data/theirs/file && ln -s file /data/theirs/link";
        let output = guest.exec_with(&["--user", "1234:2345"], &["sh", "-c", script])?.run()?;
        ensure!(output.success(), "{output}");
        for (path, mode) in [("theirs", 0o750), ("theirs/file", 0o640), ("theirs/link", 0o777)] {
            let found = fs::symlink_metadata(data.join(path))?;
            ensure!(
                (found.uid(), found.gid()) == (1234, 2345),
                "{path} is {}:{}'s",
                found.uid(),
                found.gid()
            );
            ensure!(found.mode() & 0o7777 == mode, "{path} has mode {:o}", found.mode());
        }
        let output = guest.exec_with(&["--user", "1:1"], &["cat", "/data/theirs/file"])?.run()?;
        refused(&output, &["Permission denied"])?;
        guest.shell("chown 7:8 /data/theirs/file && chmod 4711 /data/theirs/file")?;
        let found = fs::metadata(data.join("theirs/file"))?;
        ensure!((found.uid(), found.gid(), found.mode() & 0o7777) == (7, 8, 0o4711), "{found:?}");
        equal("as the container sees it", &guest.shell("stat -c '%u %g %a' /data/theirs/file")?, "7 8 4711\n")
    })
}

fn host_changes(subject: &Subject) -> Result<()> {
    with(subject, |guest, data| {
        let file = data.join("changing");
        fs::write(&file, "one")?;
        equal("at first", &guest.shell("cat /data/changing")?, "one")?;
        fs::write(&file, "another")?;
        fs::write(data.join("new"), "new")?;
        let seen = || guest.shell("cat /data/changing /data/new").is_ok_and(|text| text == "anothernew");
        wait::until("the host's changes in the container", Duration::from_secs(60), || seen().then_some(()))?;
        fs::remove_file(data.join("new"))?;
        let gone = || guest.shell("test -e /data/new || echo gone").is_ok_and(|text| text == "gone\n");
        wait::until("the removal in the container", Duration::from_secs(60), || gone().then_some(()))
    })
}

fn links(subject: &Subject) -> Result<()> {
    with(subject, |guest, data| {
        fs::create_dir(data.join("links"))?;
        let secret = data.with_extension("secret");
        fs::write(&secret, "the host's")?;
        let name = secret.file_name().and_then(|name| name.to_str()).context("a name")?;
        symlink(&secret, data.join("links/absolute"))?;
        symlink(format!("../../{name}"), data.join("links/relative"))?;
        symlink("/bin/busybox", data.join("links/inside"))?;
        let output =
            guest.exec(&["sh", "-c", "cat /data/links/absolute; cat /data/links/relative; ls /data/.."]);
        fs::remove_file(&secret)?;
        let output: Output = output?;
        ensure!(!output.text().contains("the host's"), "{output}");
        ensure!(output.text().contains("bin") && !output.text().contains(name), "{output}");
        guest.shell("test -x /data/links/inside && cmp /data/links/inside /bin/busybox")?;
        Ok(())
    })
}

fn names(subject: &Subject) -> Result<()> {
    let script =
        "cd /data && mkdir names && cd names && echo 1 > a && ln a b && mv a c && mkdir d && mv c d/e \
                  && test \"$(stat -c %h b)\" = 2 && mkfifo f && ln -s d g && test \"$(readlink g)\" = d \
                  && cat g/e && rm b d/e f g && rmdir d && ls && touch 'a name
with a line' && rm a* && rmdir ../names && test ! -e ../names && ! rmdir nothing 2>/dev/null \
                  && mkdir ../full && echo x > ../full/x && ! rmdir ../full 2>/dev/null";
    with(subject, |guest, _| equal("its output", &guest.shell(script)?, "1\n"))
}

fn large_file(subject: &Subject) -> Result<()> {
    with(subject, |guest, data| {
        let bytes: Vec<u8> =
            (0..32u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        fs::write(data.join("large"), &bytes)?;
        guest.shell("cp /data/large /data/copy && cmp /data/large /data/copy && sync")?;
        ensure!(fs::read(data.join("copy"))? == bytes, "the copy differs");
        Ok(())
    })
}

fn kinds(subject: &Subject) -> Result<()> {
    let outer = Directory::new(subject)?;
    let inner = Directory::new(subject)?;
    fs::create_dir(outer.0.join("inner"))?;
    fs::write(outer.0.join("file"), "outer\n")?;
    fs::write(inner.0.join("file"), "inner\n")?;
    fs::write(outer.0.join("hosts"), "10.0.0.1 somebody\n")?;
    let mounts = [
        outer.mount("rbind:ro"),
        mount(&inner.0, "/data/inner", "rbind:rw"),
        mount(&outer.0.join("hosts"), "/etc/hosts", "bind:rw"),
    ];
    let options: Vec<_> = mounts.iter().flat_map(|mount| ["--mount", mount.as_str()]).collect();
    let guest = Guest::start(subject, &options)?;
    equal(
        "all three",
        &guest.shell("cat /data/file /data/inner/file /etc/hosts")?,
        "outer\ninner\n10.0.0.1 somebody\n",
    )?;
    for script in
        ["echo x > /data/file", "touch /data/new", "rm /data/file", "chmod 0 /data/file", "mkdir /data/d"]
    {
        refused(&guest.exec(&["sh", "-c", script])?, &["Read-only file system"]).context(script)?;
    }
    guest.shell("echo more >> /data/inner/file; echo 10.0.0.2 another >> /etc/hosts")?;
    equal("the nested one", &fs::read_to_string(inner.0.join("file"))?, "inner\nmore\n")?;
    let hosts = "10.0.0.1 somebody\n10.0.0.2 another\n";
    equal("the single file", &fs::read_to_string(outer.0.join("hosts"))?, hosts)?;
    equal("the read-only one", &fs::read_to_string(outer.0.join("file"))?, "outer\n")
}

fn missing(subject: &Subject) -> Result<()> {
    let mount = mount(Path::new("/no/such/directory"), "/data", "rbind:rw");
    let output = subject.run_with("missing", &["--mount", &mount], BUSYBOX, &["true"])?.run()?;
    refused(
        &output,
        &["error mounting \"/no/such/directory\" to rootfs at \"/data\"", "no such file or directory"],
    )
}

fn socket(subject: &Subject) -> Result<()> {
    let directory = Directory::new(subject)?;
    let path = directory.0.join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&path)?;
    let mount = mount(&path, "/run/socket", "bind:rw");
    let output =
        subject.run_with("socket", &["--mount", &mount], BUSYBOX, &["test", "-S", "/run/socket"])?.run()?;
    if subject.is_spore() {
        refused(&output, &["a socket of the host cannot be used in a virtual machine", "mount a directory"])?;
        return Err(Difference.into());
    }
    ensure!(output.success(), "{output}");
    Ok(())
}
