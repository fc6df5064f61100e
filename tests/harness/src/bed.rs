//! What every case of `tests/e2e` and `tests/conformance` stands on: containerd instances started when first
//! asked for, images, names that nobody else uses.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use crate::call::{Call, Output};
use crate::containerd::{Containerd, Runtime};
use crate::docker::Docker;
use crate::image;
use crate::job::{APPLICATIONS, NOT_INSTALLED, PAYLOAD};
use crate::leftovers::{self, Inventory};
use anyhow::{Context, Result, anyhow, ensure};

const BUSYBOX_PROGRAM: &str = "/bin/busybox";
/// Below it lie roots and states of the instances; on the ground's disk, as overlayfs needs.
const HOME: &str = "/srv/bed";
/// Where a user's containerd would look for the shim.
const SHIM: &str = "/usr/local/bin/containerd-shim-spore-v2";

type Instance = Arc<OnceLock<Result<Containerd, String>>>;

/// Shared by all cases.
pub struct Bed {
    directory: PathBuf,
    logs: PathBuf,
    instances: Mutex<BTreeMap<String, Instance>>,
    /// Over the instance of the series that first asked for it.
    docker: Mutex<Option<Arc<Result<Docker, String>>>>,
    /// Cases that count everything on the ground, or change its configuration, write; others read.
    quiet: RwLock<()>,
    next: AtomicUsize,
}

impl Bed {
    /// Makes the images; starts nothing yet.
    pub fn prepare() -> Result<Self> {
        let directory = PathBuf::from(HOME);
        fs::create_dir_all(&directory).with_context(|| format!("making {HOME} (is this the ground?)"))?;
        let results = std::env::var_os("SPORE_RESULTS").map_or_else(|| directory.clone(), PathBuf::from);
        let bed = Self {
            logs: results.join("logs"),
            directory,
            instances: Mutex::default(),
            docker: Mutex::default(),
            quiet: RwLock::new(()),
            next: AtomicUsize::new(1),
        };
        let busybox = Path::new(BUSYBOX_PROGRAM);
        image::write_images(busybox, &bed.archive())?;
        image::write_foreign(busybox, &bed.foreign_archive())?;
        image::write_rootfs(busybox, &bed.rootfs())?;
        Ok(bed)
    }

    fn archive(&self) -> PathBuf {
        self.directory.join("images.tar")
    }

    pub fn foreign_archive(&self) -> PathBuf {
        self.directory.join("foreign.tar")
    }

    /// An unpacked image, for `--rootfs`.
    pub fn rootfs(&self) -> PathBuf {
        self.directory.join("rootfs")
    }

    /// Stops every instance.
    pub fn close(&self) {
        drop(self.docker.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.instances.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn instance(&self, series: &str) -> Instance {
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        let instance = Arc::clone(instances.entry(series.to_owned()).or_default());
        drop(instances);
        instance.get_or_init(|| self.start(series).map_err(|error| format!("{error:#}")));
        instance
    }

    fn start(&self, series: &str) -> Result<Containerd> {
        let log = self.logs.join(format!("containerd-{series}.log"));
        let containerd = Containerd::start(series, &self.directory.join(series), &log)?;
        containerd.import(&self.archive(), "overlayfs", &[])?;
        Ok(containerd)
    }
}

/// What a case is about: one runtime under one containerd.
#[derive(Clone)]
pub struct Subject {
    pub bed: Arc<Bed>,
    pub series: String,
    pub runtime: Runtime,
    warm: Arc<OnceLock<Result<(), String>>>,
    applications: Arc<OnceLock<Result<(), String>>>,
}

impl Subject {
    pub fn new(bed: Arc<Bed>, series: &str, runtime: Runtime) -> Self {
        Self { bed, series: series.to_owned(), runtime, warm: Arc::default(), applications: Arc::default() }
    }

    /// Runs a case, alone if it asks for that.
    pub fn perform(&self, alone: bool, run: fn(&Self) -> Result<()>) -> Result<()> {
        if self.runtime == Runtime::Spore && !Path::new(SHIM).exists() {
            let why = fs::read_to_string(NOT_INSTALLED).unwrap_or_default();
            return Err(anyhow!("{SHIM} is not on the ground: {}", why.trim_end()));
        }
        if alone {
            let _all = self.bed.quiet.write().unwrap_or_else(PoisonError::into_inner);
            run(self)
        } else {
            let _one = self.bed.quiet.read().unwrap_or_else(PoisonError::into_inner);
            run(self)
        }
    }

    pub fn is_spore(&self) -> bool {
        self.runtime == Runtime::Spore
    }

    /// A name for a container, unique on this ground.
    pub fn id(&self, what: &str) -> String {
        format!("{what}-{}", self.bed.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Does something with the containerd, which is started when needed.
    pub fn with<T>(&self, act: impl FnOnce(&Containerd) -> Result<T>) -> Result<T> {
        let instance = self.bed.instance(&self.series);
        match instance.get() {
            Some(Ok(containerd)) => act(containerd),
            Some(Err(error)) => Err(anyhow!("containerd {}: {error}", self.series)),
            None => Err(anyhow!("containerd {} was not started", self.series)),
        }
    }

    /// Does something with Docker's engine, which is started when needed, over this containerd.
    pub fn docker<T>(&self, act: impl FnOnce(&Docker) -> Result<T>) -> Result<T> {
        let docker = {
            let mut slot = self.bed.docker.lock().unwrap_or_else(PoisonError::into_inner);
            let started = slot.get_or_insert_with(|| {
                let (directory, log) = (self.bed.directory.join("docker"), self.bed.logs.join("dockerd.log"));
                let start =
                    |containerd: &Containerd| Docker::start(containerd, &directory, &self.bed.rootfs(), &log);
                Arc::new(self.with(start).map_err(|error| format!("{error:#}")))
            });
            Arc::clone(started)
        };
        match docker.as_ref() {
            Ok(docker) => act(docker),
            Err(error) => Err(anyhow!("Docker: {error}")),
        }
    }

    /// `ctr ARGS`.
    pub fn ctr<S: AsRef<str>>(&self, args: &[S]) -> Result<Call> {
        self.with(|containerd| Ok(containerd.ctr(args)))
    }

    /// `ctr ARGS`, which must succeed.
    pub fn must<S: AsRef<str>>(&self, args: &[S]) -> Result<String> {
        self.with(|containerd| containerd.must(args))
    }

    /// `spore ARGS`.
    pub fn spore<S: AsRef<str>>(&self, args: &[S]) -> Result<Call> {
        self.with(|containerd| Ok(containerd.spore(args)))
    }

    /// `ctr run --rm` of the busybox image.
    pub fn run(&self, what: &str, command: &[&str]) -> Result<Call> {
        self.run_with(what, &[], image::BUSYBOX, command)
    }

    /// `ctr run --rm` with options, an image and a command.
    pub fn run_with(&self, what: &str, options: &[&str], image: &str, command: &[&str]) -> Result<Call> {
        let id = self.id(what);
        let mut args = vec!["run", "--rm", "--runtime", self.runtime.id()];
        args.extend(options);
        args.extend([image, id.as_str()]);
        args.extend(command);
        self.ctr(&args)
    }

    /// The same, run to its end in a shell of the image.
    pub fn shell(&self, what: &str, script: &str) -> Result<Output> {
        self.run(what, &["sh", "-c", script])?.run()
    }

    /// Runs one container, once, so that what is made once and kept (caches) exists.
    pub fn warm_up(&self) -> Result<()> {
        let warm = self.warm.get_or_init(|| {
            let output =
                self.run("warm", &["true"]).and_then(Call::run).map_err(|error| format!("{error:#}"))?;
            if output.success() { Ok(()) } else { Err(output.to_string()) }
        });
        warm.clone().map_err(|error| anyhow!("the first container: {error}"))
    }

    /// Gives the containerd, of 1.7 or newer, the image [`image::APPLICATIONS`], once.
    pub fn import_applications(&self) -> Result<()> {
        let import = || -> Result<()> {
            let archive = Path::new(PAYLOAD).join(APPLICATIONS);
            ensure!(
                archive.exists(),
                "{} is not on the ground: spore-testbed run --applications",
                archive.display()
            );
            // 209 MB through the transfer service, in small messages, take an emulated machine two minutes.
            self.with(|containerd| containerd.import(&archive, "overlayfs", &["--local"]))
        };
        let imported = self.applications.get_or_init(|| import().map_err(|error| format!("{error:#}")));
        imported.clone().map_err(|error| anyhow!("the image of applications: {error}"))
    }

    /// Directories of this containerd whose files are counted.
    fn counted(&self) -> Result<Vec<PathBuf>> {
        self.with(|containerd| Ok(vec![containerd.state(), containerd.snapshots()]))
    }

    /// Has containerd remove the files of what was deleted, which it does by itself when it finds the time: the longer that
    /// takes, the less often.
    fn collect_garbage(&self) -> Result<()> {
        let lease = self.id("garbage");
        self.must(&["leases", "create", "--id", &lease])?;
        self.must(&["leases", "delete", "--sync", &lease]).map(drop)
    }

    /// What exists now, with the lists that containerd itself keeps.
    pub fn inventory(&self) -> Result<(Inventory, Vec<String>)> {
        self.collect_garbage()?;
        Ok((Inventory::take(&self.counted()?)?, self.listed()?))
    }

    /// Fails when anything exists that was not there before.
    pub fn nothing_beyond(&self, before: &(Inventory, Vec<String>)) -> Result<()> {
        self.collect_garbage()?;
        leftovers::none_since(&before.0, &self.counted()?)?;
        let now = self.listed()?;
        if now != before.1 {
            return Err(anyhow!("containerd's own lists differ: before {:?}, now {now:?}", before.1));
        }
        Ok(())
    }

    fn listed(&self) -> Result<Vec<String>> {
        let mut lists = vec![self.must(&["containers", "ls", "-q"])?, self.must(&["tasks", "ls", "-q"])?];
        for snapshotter in ["overlayfs", "native"] {
            lists.push(self.must(&["snapshots", "--snapshotter", snapshotter, "ls"])?);
        }
        // containerd lists tasks in no order.
        Ok(lists
            .into_iter()
            .map(|list| {
                let mut lines: Vec<_> = list.lines().collect();
                lines.sort_unstable();
                lines.join("\n")
            })
            .collect())
    }
}
