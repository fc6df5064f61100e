//! What the suites stand on: a containerd, an image, runs, and the shim's timelines of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};
use spore_harness::call::{Call, Output, Piped};
use spore_harness::containerd::{Containerd, Runtime, preferred_series};
use spore_harness::image::{self, BUSYBOX};

const HOME: &str = "/srv/bench";
const CONFIG: &str = "/etc/spore/config.toml";
const TIMELINE: &str = "/srv/bench/timeline.jsonl";

/// A line of Spore's configuration: every guest boots.
pub(crate) const COLD: &str = "boot_templates = false";

/// The shim's account of one sandbox: marks in nanoseconds of the ground's CLOCK_MONOTONIC.
pub(crate) type Timeline = Map<String, Value>;

pub(crate) struct Lab {
    containerd: Containerd,
    /// The ground's configuration of Spore.
    config: String,
}

impl Lab {
    /// Starts containerd and imports the image.
    pub(crate) fn start(results: &Path) -> Result<Self> {
        let directory = PathBuf::from(HOME);
        fs::create_dir_all(&directory).with_context(|| format!("making {HOME} (is this the ground?)"))?;
        let chosen = preferred_series()?;
        eprintln!("starting containerd {chosen}");
        let log = results.join("logs/containerd.log");
        let containerd = Containerd::start(&chosen, &directory.join("containerd"), &log)?;
        let archive = directory.join("image.tar");
        image::write_images(Path::new("/bin/busybox"), &archive)?;
        containerd.import(&archive, "overlayfs", &[])?;
        let config = fs::read_to_string(CONFIG).with_context(|| format!("reading {CONFIG}"))?;
        let lab = Self { containerd, config };
        lab.configure("")?;
        Ok(lab)
    }

    /// Sets Spore's configuration to the ground's, with `lines` before it.
    pub(crate) fn configure(&self, lines: &str) -> Result<()> {
        fs::write(CONFIG, format!("timeline = \"{TIMELINE}\"\n{lines}\n{}", self.config))
            .with_context(|| format!("writing {CONFIG}"))
    }

    /// `ctr run --rm`, which must succeed and print no error.
    pub(crate) fn run(&self, runtime: Runtime, id: &str, command: &[&str]) -> Result<Output> {
        let mut args = vec!["run", "--rm", "--runtime", runtime.id(), BUSYBOX, id];
        args.extend(command);
        let output = self.containerd.ctr(&args).run()?;
        ensure!(output.success() && output.stderr.is_empty(), "{id}: {output}");
        Ok(output)
    }

    /// Milliseconds of the whole of a `ctr run --rm IMAGE ID true`.
    pub(crate) fn whole_run(&self, runtime: Runtime, id: &str) -> Result<f64> {
        Ok(self.run(runtime, id, &["true"])?.ms())
    }

    /// Starts a container that waits.
    pub(crate) fn detach(&self, runtime: Runtime, id: &str, options: &[&str]) -> Result<()> {
        self.detach_with(runtime, id, options, &["sleep", "100000"])
    }

    /// Starts a container and leaves it alone.
    pub(crate) fn detach_with(
        &self,
        runtime: Runtime,
        id: &str,
        options: &[&str],
        command: &[&str],
    ) -> Result<()> {
        self.detach_image(runtime, BUSYBOX, id, options, command)
    }

    /// The same of another image.
    pub(crate) fn detach_image(
        &self,
        runtime: Runtime,
        image: &str,
        id: &str,
        options: &[&str],
        command: &[&str],
    ) -> Result<()> {
        let mut args = vec!["run", "--detach", "--runtime", runtime.id()];
        args.extend(options);
        args.extend([image, id]);
        args.extend(command);
        self.containerd.must(&args).map(drop)
    }

    /// Imports an archive of images.
    pub(crate) fn import(&self, archive: &Path) -> Result<()> {
        self.containerd.import(archive, "overlayfs", &[])
    }

    /// `spore ARGS`, which must succeed.
    pub(crate) fn spore(&self, args: &[&str]) -> Result<Output> {
        let output = self.containerd.spore(args).run()?;
        ensure!(output.success(), "spore {}: {output}", args.join(" "));
        Ok(output)
    }

    /// `spore ARGS --json`: what it tells, and the milliseconds of the whole command.
    pub(crate) fn spore_json(&self, args: &[&str]) -> Result<(Value, f64)> {
        let output = self.spore(&[args, &["--json"]].concat())?;
        let told = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("spore {}: {output}", args.join(" ")))?;
        Ok((told, output.ms()))
    }

    /// A call of `ctr`.
    pub(crate) fn ctr(&self, args: &[&str]) -> Call {
        self.containerd.ctr(args)
    }

    /// `ctr tasks exec` in it.
    pub(crate) fn exec(&self, id: &str, exec_id: &str, command: &[&str]) -> Result<Output> {
        let mut args = vec!["tasks", "exec", "--exec-id", exec_id, id];
        args.extend(command);
        self.containerd.ctr(&args).run()
    }

    /// The same, started, with pipes for the caller.
    pub(crate) fn exec_piped(&self, id: &str, exec_id: &str, command: &[&str]) -> Result<Piped> {
        let mut args = vec!["tasks", "exec", "--exec-id", exec_id, id];
        args.extend(command);
        self.containerd.ctr(&args).piped()
    }

    /// Ends and removes it.
    pub(crate) fn remove(&self, id: &str) -> Result<()> {
        self.containerd.must(&["tasks", "delete", "--force", id])?;
        self.containerd.must(&["containers", "delete", id]).map(drop)
    }

    /// Ends containerd; gives the timelines by container, and keeps a copy in `results`.
    pub(crate) fn timelines(self, results: &Path) -> Result<BTreeMap<String, Timeline>> {
        drop(self.containerd);
        fs::write(CONFIG, &self.config)?;
        let Ok(text) = fs::read_to_string(TIMELINE) else { return Ok(BTreeMap::new()) };
        fs::write(results.join("timeline.jsonl"), &text)?;
        fs::remove_file(TIMELINE)?;
        text.lines()
            .map(|line| {
                let line: Timeline =
                    serde_json::from_str(line).with_context(|| format!("reading a timeline: {line}"))?;
                let id = line.get("id").and_then(Value::as_str).unwrap_or_default().to_owned();
                Ok((id, line))
            })
            .collect()
    }
}

/// Milliseconds of a time in nanoseconds that a command told.
pub(crate) fn told_ms(told: &Value, name: &str) -> Result<f64> {
    let ns = told[name].as_f64().with_context(|| format!("no {name} in {told}"))?;
    Ok(ns / 1e6)
}

/// Milliseconds between two marks of a timeline.
pub(crate) fn span(line: &Timeline, from: &str, to: &str) -> Option<f64> {
    Some((line.get(to)?.as_f64()? - line.get(from)?.as_f64()?) / 1e6)
}

/// From the kernel's first instruction to the agent's, in milliseconds: what is not Spore's to
/// shorten.
pub(crate) fn kernel_boot(line: &Timeline) -> Option<f64> {
    Some(span(line, "kernel_entry_ns", "guest_ready_ns")? - line.get("agent_boot_ns")?.as_f64()? / 1e6)
}
