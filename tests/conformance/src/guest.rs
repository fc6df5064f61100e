//! A container that waits, for cases that look into it: made once for each subject, shared by
//! those that only read, or owned by one that changes it.

use std::any::Any;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use spore_harness::bed::Subject;
use spore_harness::call::{Call, Output};
use spore_harness::image::BUSYBOX;
use spore_harness::network::cni::CONFIGURATIONS;
use spore_harness::wait;

const STATUS: Duration = Duration::from_secs(120);
/// A shell that reacts to signals at once and can be told to end.
const WAITING: &str = "trap 'exit 0' TERM; while :; do sleep 1000000 & wait $!; done";

/// Waits, in a container, until the terminal has a size that only a client can have given it.
pub(crate) const UNTIL_RESIZED: &str =
    "until [ \"$(stty size)\" = \"33 77\" ]; do sleep 0.1; done; stty size";

/// See the module.
pub(crate) struct Guest {
    subject: Subject,
    pub(crate) id: String,
    /// Where `ctr` finds what it has made of the network, which it takes away with the task.
    cni: Option<Cni>,
}

/// The network namespace of a caller of `ctr`, and its configurations of networks.
#[derive(Debug, Clone)]
pub(crate) struct Cni {
    pub(crate) namespace: PathBuf,
    pub(crate) configurations: PathBuf,
}

impl Cni {
    /// A call of somebody there.
    pub(crate) fn call(&self, call: Call) -> Call {
        call.in_namespace(&self.namespace, &self.configurations, Path::new(CONFIGURATIONS))
    }
}

/// What cases share: a container, and what it needs of the host.
type Shared = Arc<OnceLock<Result<Box<dyn Any + Send + Sync>, String>>>;

/// By kind, series and runtime.
static SHARED: Mutex<BTreeMap<(&'static str, String, &'static str), Shared>> = Mutex::new(BTreeMap::new());

/// Ends the shared containers.
pub(crate) fn end_all() {
    SHARED.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// Does something with the container that cases share.
pub(crate) fn shared<T>(subject: &Subject, act: impl FnOnce(&Guest) -> Result<T>) -> Result<T> {
    shared_by(subject, "plain", |subject| Guest::start(subject, &[]), act)
}

/// Does something with what cases of a kind share, which is made by the first of them.
pub(crate) fn shared_by<S: Any + Send + Sync, T>(
    subject: &Subject,
    kind: &'static str,
    start: impl FnOnce(&Subject) -> Result<S>,
    act: impl FnOnce(&S) -> Result<T>,
) -> Result<T> {
    let key = (kind, subject.series.clone(), subject.runtime.name());
    let shared = Arc::clone(SHARED.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default());
    let started = shared.get_or_init(|| match start(subject) {
        Ok(made) => Ok(Box::new(made)),
        Err(error) => Err(format!("{error:#}")),
    });
    match started {
        Ok(made) => act(made.downcast_ref().context("what cases of a kind share has one type")?),
        Err(error) => Err(anyhow!("the container that cases share: {error}")),
    }
}

impl Guest {
    /// Starts a container with further options of `ctr run`.
    pub(crate) fn start(subject: &Subject, options: &[&str]) -> Result<Self> {
        Self::start_with(subject, options, &["sh", "-c", WAITING])
    }

    pub(crate) fn start_with(subject: &Subject, options: &[&str], command: &[&str]) -> Result<Self> {
        let id = subject.id("guest");
        let mut args = vec!["run", "--detach", "--runtime", subject.runtime.id()];
        args.extend(options);
        args.extend([BUSYBOX, &id]);
        args.extend(command);
        // From here on dropping it removes what there is.
        let guest = Self::adopt(subject, &id);
        subject.must(&args)?;
        Ok(guest)
    }

    /// Takes over a container that a case has started itself.
    pub(crate) fn adopt(subject: &Subject, id: &str) -> Self {
        Self::adopt_with(subject, id, None)
    }

    /// The same of one with a network of `ctr`'s.
    pub(crate) fn adopt_with(subject: &Subject, id: &str, cni: Option<Cni>) -> Self {
        Self { subject: subject.clone(), id: id.to_owned(), cni }
    }

    fn ctr(&self, args: &[&str]) -> Result<Call> {
        let call = self.subject.ctr(args)?;
        Ok(match &self.cni {
            Some(cni) => cni.call(call),
            None => call,
        })
    }

    /// `ctr tasks VERB [OPTIONS] ID [REST]`.
    pub(crate) fn task(&self, verb: &str, options: &[&str], rest: &[&str]) -> Result<Call> {
        let mut args = vec!["tasks", verb];
        args.extend(options);
        args.push(&self.id);
        args.extend(rest);
        self.ctr(&args)
    }

    /// The same, to its end, which must be a good one; its output.
    pub(crate) fn must(&self, verb: &str, options: &[&str], rest: &[&str]) -> Result<String> {
        let output = self.task(verb, options, rest)?.run()?;
        ensure!(output.success(), "ctr tasks {verb}: {output}");
        Ok(output.text())
    }

    /// `ctr tasks exec` of a command.
    pub(crate) fn exec_with(&self, options: &[&str], command: &[&str]) -> Result<Call> {
        let exec_id = self.subject.id("exec");
        let mut all = vec!["--exec-id", exec_id.as_str()];
        all.extend(options);
        self.task("exec", &all, command)
    }

    pub(crate) fn exec(&self, command: &[&str]) -> Result<Output> {
        self.exec_with(&[], command)?.run()
    }

    /// A script's standard output; the script must succeed.
    pub(crate) fn shell(&self, script: &str) -> Result<String> {
        let output = self.exec(&["sh", "-c", script])?;
        ensure!(output.success(), "exec of {script:?}: {output}");
        Ok(output.text())
    }

    /// The state in `ctr tasks ls`, such as "RUNNING".
    pub(crate) fn status(&self) -> Result<String> {
        self.listed(2)
    }

    /// The pid that `ctr tasks ls` tells.
    pub(crate) fn pid(&self) -> Result<String> {
        self.listed(1)
    }

    /// Its network namespace, by that pid.
    pub(crate) fn network(&self) -> Result<PathBuf> {
        Ok(format!("/proc/{}/ns/net", self.pid()?).into())
    }

    /// A column of its line in `ctr tasks ls`.
    fn listed(&self, column: usize) -> Result<String> {
        let list = self.subject.must(&["tasks", "ls"])?;
        let line = list.lines().find(|line| line.split_whitespace().next() == Some(self.id.as_str()));
        let value = line.and_then(|line| line.split_whitespace().nth(column));
        value.map(str::to_owned).ok_or_else(|| anyhow!("{} is not in {list:?}", self.id))
    }

    /// Waits for a state.
    pub(crate) fn until(&self, status: &str) -> Result<()> {
        wait::until(&format!("{} is {status}", self.id), STATUS, || {
            self.status().is_ok_and(|now| now == status).then_some(())
        })
    }
}

impl Guest {
    /// Takes it away, as the end of its value does, and tells what goes wrong.
    pub(crate) fn end(self) -> Result<()> {
        self.must("delete", &["--force"], &[])?;
        let deleted = self.ctr(&["containers", "delete", self.id.as_str()])?.run()?;
        ensure!(deleted.success(), "ctr containers delete: {deleted}");
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // What a case has deleted already is not there.
        for args in [
            ["tasks", "delete", "--force", self.id.as_str()].as_slice(),
            ["containers", "delete", self.id.as_str()].as_slice(),
        ] {
            if let Ok(call) = self.ctr(args) {
                call.run().ok();
            }
        }
    }
}
