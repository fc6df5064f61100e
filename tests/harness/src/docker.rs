//! A private Docker engine on the ground, over one of the containerd instances, and `docker` with
//! deadlines. Its networks are those of a fresh installation.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::call::{Call, Output};
use crate::containerd::Containerd;
use crate::wait;

const START: Duration = Duration::from_secs(180);
const STOP: Duration = Duration::from_secs(60);
/// What Docker calls the bed's root file system.
pub const IMAGE: &str = "busybox";

/// A running engine. Ends with the value.
pub struct Docker {
    directory: PathBuf,
    process: Child,
}

impl Docker {
    /// Starts an engine over `containerd`, and gives it [`IMAGE`], made from the tree `rootfs`.
    pub fn start(containerd: &Containerd, directory: &Path, rootfs: &Path, log: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        // Not the ground's own. Checkpoints are experimental to Docker.
        fs::write(directory.join("daemon.json"), r#"{"experimental": true}"#)?;
        let log_file = File::create(log).with_context(|| log.display().to_string())?;
        let path = |name: &str| directory.join(name).display().to_string();
        let process = Command::new("dockerd")
            .args(["--containerd", &containerd.socket().display().to_string()])
            .args(["--containerd-namespace", "docker", "--containerd-plugins-namespace", "docker-plugins"])
            .args(["--host", &format!("unix://{}", path("docker.sock")), "--pidfile", &path("docker.pid")])
            .args([
                "--data-root",
                &path("root"),
                "--exec-root",
                &path("exec"),
                "--config-file",
                &path("daemon.json"),
            ])
            .args(["--storage-driver", "overlay2"])
            .env("PATH", containerd.path())
            .stdin(Stdio::null())
            .stdout(log_file.try_clone()?)
            .stderr(log_file)
            .spawn()
            .context("starting dockerd")?;
        let mut started = Self { directory: directory.to_owned(), process };
        let what = format!("dockerd answers (log: {})", log.display());
        let ended = wait::until(&what, START, || match started.process.try_wait() {
            Ok(None) => started.call(&["version"]).run().ok().filter(Output::success).map(|_| None),
            Ok(Some(status)) => Some(Some(status)),
            Err(_) => None,
        })?;
        if let Some(status) = ended {
            bail!("dockerd ended at once: {status} (log: {})", log.display());
        }
        let archive = directory.join("rootfs.tar");
        let packed = Command::new("tar").arg("-C").arg(rootfs).arg("-cf").arg(&archive).arg(".").status()?;
        ensure!(packed.success(), "tar of {}: {packed}", rootfs.display());
        started.must(&["import", "--change", "ENV PATH=/bin", &archive.display().to_string(), IMAGE])?;
        Ok(started)
    }

    /// A `docker` call.
    pub fn call<S: AsRef<str>>(&self, args: &[S]) -> Call {
        let mut command = Command::new("docker");
        command.arg("--host").arg(format!("unix://{}", self.directory.join("docker.sock").display()));
        command.args(args.iter().map(AsRef::as_ref)).env("HOME", &self.directory);
        Call::new(command)
    }

    /// `docker` that must succeed; its standard output.
    pub fn must<S: AsRef<str>>(&self, args: &[S]) -> Result<String> {
        let output = self.call(args).run()?;
        if !output.success() {
            let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
            bail!("docker {}: {output}", args.join(" "));
        }
        Ok(output.text())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap_or(i32::MAX));
        if kill(pid, Signal::SIGTERM).is_ok() {
            wait::child("dockerd stops", &mut self.process, STOP).ok();
        }
    }
}
