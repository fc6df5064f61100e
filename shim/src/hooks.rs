//! Hooks of the OCI runtime specification (config.md, "POSIX-platform Hooks") that run on the host:
//! prestart and createRuntime before Create answers, poststart after Start, poststop after
//! Delete. Each gets the state of the container as JSON on its standard input; the pid in it is
//! the holder's, in whose network namespace CNI's and nerdctl's hooks do their work.

use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use oci_spec::runtime::Hook;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

/// For a hook that names no timeout of its own: it must not hold up a client for ever.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Of what a hook says, as much as an error shows.
const MOST_SAID: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub(crate) enum HookError {
    #[error("OCI runtime create failed: error running {kind} hook #{index}: {path}: {source}")]
    Start { kind: &'static str, index: usize, path: PathBuf, source: std::io::Error },
    #[error(
        "OCI runtime create failed: error running {kind} hook #{index}: {path}: {status}, stderr: {said}"
    )]
    Failed { kind: &'static str, index: usize, path: PathBuf, status: ExitStatus, said: String },
    #[error(
        "OCI runtime create failed: error running {kind} hook #{index}: {path}: has not ended after {timeout:?}"
    )]
    Timeout { kind: &'static str, index: usize, path: PathBuf, timeout: Duration },
}

/// When a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Point {
    Prestart,
    CreateRuntime,
    Poststart,
    Poststop,
}

impl Point {
    fn kind(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    /// The container's status at that moment (runtime.md, "State").
    fn status(self) -> &'static str {
        match self {
            Self::Prestart | Self::CreateRuntime => "creating",
            Self::Poststart => "running",
            Self::Poststop => "stopped",
        }
    }
}

/// A container's hooks on the host.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hooks {
    prestart: Vec<Hook>,
    create_runtime: Vec<Hook>,
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
}

/// What hooks are told.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    pub(crate) oci_version: String,
    pub(crate) id: String,
    pub(crate) pid: u32,
    pub(crate) bundle: PathBuf,
    pub(crate) annotations: std::collections::HashMap<String, String>,
}

impl Told {
    fn state(&self, point: Point) -> Vec<u8> {
        let mut state = json!({
            "ociVersion": self.oci_version,
            "id": self.id,
            "status": point.status(),
            "bundle": self.bundle,
            "annotations": self.annotations,
        });
        if point != Point::Poststop {
            state["pid"] = self.pid.into();
        }
        state.to_string().into_bytes()
    }
}

impl Hooks {
    pub(crate) fn of(hooks: &oci_spec::runtime::Hooks) -> Self {
        #[allow(deprecated)] // `prestart` is deprecated in the specification, not gone.
        let prestart = hooks.prestart();
        let all = |list: &Option<Vec<Hook>>| list.clone().unwrap_or_default();
        Self {
            prestart: all(prestart),
            create_runtime: all(hooks.create_runtime()),
            poststart: all(hooks.poststart()),
            poststop: all(hooks.poststop()),
        }
    }

    /// Runs the hooks of one point in order: to the first that fails, or all of them where a failure changes nothing any more.
    pub(crate) async fn run(&self, point: Point, told: &Told) -> Result<(), HookError> {
        let list = match point {
            Point::Prestart => &self.prestart,
            Point::CreateRuntime => &self.create_runtime,
            Point::Poststart => &self.poststart,
            Point::Poststop => &self.poststop,
        };
        let mut outcome = Ok(());
        for (index, hook) in list.iter().enumerate() {
            let ran = run(hook, point, index, &told.state(point)).await;
            match point {
                Point::Prestart | Point::CreateRuntime => ran?,
                // The first failure is the one that is told.
                Point::Poststart | Point::Poststop => outcome = outcome.and(ran),
            }
        }
        outcome
    }
}

async fn run(hook: &Hook, point: Point, index: usize, state: &[u8]) -> Result<(), HookError> {
    let (kind, path) = (point.kind(), hook.path().clone());
    let start = |source| HookError::Start { kind, index, path: path.clone(), source };
    let mut command = Command::new(&path);
    let args = hook.args().clone().unwrap_or_default();
    if let Some(name) = args.first() {
        command.arg0(name);
    }
    command.args(args.iter().skip(1)).env_clear().current_dir("/");
    for (name, value) in hook.env().iter().flatten().filter_map(|entry| entry.split_once('=')) {
        command.env(name, value);
    }
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(start)?;
    let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let work = async {
        let feed = async {
            if let Some(mut stdin) = stdin {
                // A hook need not read it.
                let _ = stdin.write_all(state).await;
            }
        };
        let mut said = Vec::new();
        let listen = async {
            if let Some(mut stderr) = stderr {
                let _ = (&mut stderr).take(MOST_SAID).read_to_end(&mut said).await;
                // A closed pipe would kill a hook that says more.
                let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
            }
        };
        let (status, (), ()) = tokio::join!(child.wait(), feed, listen);
        (status, said)
    };
    let seconds =
        hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    let timeout = seconds.map_or(TIMEOUT, Duration::from_secs);
    // Dropping the work kills the hook.
    let Ok((status, said)) = tokio::time::timeout(timeout, work).await else {
        return Err(HookError::Timeout { kind, index, path, timeout });
    };
    let status = status.map_err(start)?;
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    Err(HookError::Failed { kind, index, path, status, said })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(list: serde_json::Value) -> Hooks {
        Hooks::of(&serde_json::from_value(json!({ "createRuntime": list })).unwrap())
    }

    fn told() -> Told {
        Told {
            oci_version: "1.1.0".into(),
            id: "c1".into(),
            pid: 42,
            bundle: "/b".into(),
            annotations: [("a".into(), "1".into())].into(),
        }
    }

    #[tokio::test]
    async fn after_the_start_a_failure_keeps_no_other_hook_from_running() {
        let directory = tempfile::tempdir().unwrap();
        let noted = directory.path().join("noted");
        let list = json!([
            { "path": "/bin/sh", "args": ["sh", "-c", "echo first >&2; exit 4"] },
            { "path": "/bin/sh", "args": ["sh", "-c", "echo second >&2; exit 5"] },
            { "path": "/bin/sh", "args": ["sh", "-c", format!("echo ran >{}", noted.display())] }
        ]);
        let hooks = serde_json::from_value(json!({ "poststop": list, "createRuntime": list })).unwrap();
        let hooks = Hooks::of(&hooks);
        let failed = hooks.run(Point::CreateRuntime, &told()).await.unwrap_err().to_string();
        assert!(failed.contains("first") && !noted.exists(), "{failed}");
        let failed = hooks.run(Point::Poststop, &told()).await.unwrap_err().to_string();
        assert!(failed.contains("first") && noted.exists(), "{failed}");
    }

    #[tokio::test]
    async fn a_hook_gets_the_state_its_arguments_and_its_environment() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let script = format!("{{ echo $0 $1 $X; cat; }} >{}", file.path().display());
        let list =
            json!([{ "path": "/bin/sh", "args": ["sh", "-c", script, "zero", "one"], "env": ["X=y"] }]);
        hooks(list).run(Point::CreateRuntime, &told()).await.unwrap();
        let text = std::fs::read_to_string(file.path()).unwrap();
        let (first, state) = text.split_once('\n').unwrap();
        assert_eq!(first, "zero one y");
        let state: serde_json::Value = serde_json::from_str(state).unwrap();
        assert_eq!(state["pid"], 42);
        assert_eq!(
            (&state["id"], &state["status"], &state["bundle"]),
            (&json!("c1"), &json!("creating"), &json!("/b"))
        );
        assert_eq!(state["annotations"]["a"], "1");
    }

    #[tokio::test]
    async fn the_first_that_fails_ends_it_with_its_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let touch = format!("echo ran >{}", file.path().display());
        let list = json!([
            { "path": "/bin/true" },
            { "path": "/bin/sh", "args": ["sh", "-c", "echo no network >&2; exit 3"] },
            { "path": "/bin/sh", "args": ["sh", "-c", touch] },
        ]);
        let error = hooks(list).run(Point::CreateRuntime, &told()).await.unwrap_err().to_string();
        assert!(
            error.contains("createRuntime hook #1: /bin/sh: exit status: 3, stderr: no network"),
            "{error}"
        );
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "");
        let missing = hooks(json!([{ "path": "/no/such" }])).run(Point::CreateRuntime, &told()).await;
        assert!(missing.unwrap_err().to_string().contains("/no/such: No such file"));
    }

    #[tokio::test]
    async fn one_that_hangs_is_killed() {
        let list = json!([{ "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1 }]);
        let error = hooks(list).run(Point::CreateRuntime, &told()).await.unwrap_err();
        assert!(matches!(error, HookError::Timeout { .. }), "{error}");
    }
}
