//! What libcontainer calls in the container's init process: once before it waits for Start,
//! to see that there is something to execute, and once to execute it.

use std::collections::HashMap;
use std::ffi::CString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;
use oci_spec::runtime::{Process, Spec};

use super::lookup;
use super::trace::Trace;
use crate::sys;

/// Runs the spec's process.
#[derive(Clone)]
pub struct Execute {
    pub trace: Trace,
}

impl Executor for Execute {
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let (process, name) = command(spec)
            .ok_or_else(|| ExecutorValidationError::ArgValidationError("process.args is empty".into()))?;
        lookup::executable(name, path(process)).map(drop).map_err(|message| {
            self.trace.executable(&message);
            ExecutorValidationError::ArgValidationError(message)
        })
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let (process, name) = command(spec).ok_or(ExecutorError::InvalidArg)?;
        let failed = |message: String| {
            // Nobody waits for an answer any more, so the process's own stderr gets it, as
            // with runc; libcontainer then exits with 255.
            let _ = writeln!(std::io::stderr(), "{message}");
            ExecutorError::Other(message)
        };
        let file = lookup::executable(name, path(process)).map_err(failed)?;
        Err(failed(execute(process, &file)))
    }

    fn setup_envs(
        &self,
        _: HashMap<String, String>,
    ) -> Result<(), libcontainer::workload::ExecutorSetEnvsError> {
        // The environment goes to execve directly, in the spec's order.
        Ok(())
    }
}

/// Replaces this process by `file` with the arguments and environment of `process`; gives runc's
/// message if that fails.
pub fn execute(process: &Process, file: &Path) -> String {
    let c_strings = |texts: Vec<String>| {
        texts.into_iter().map(|text| CString::new(text.into_bytes())).collect::<Result<Vec<_>, _>>()
    };
    let arguments = c_strings(process.args().clone().unwrap_or_default());
    let (Ok(arguments), Ok(environment), Ok(path)) =
        (arguments, c_strings(environment(process)), CString::new(file.as_os_str().as_bytes()))
    else {
        return "process.args and process.env must not contain NUL bytes".into();
    };
    sys::default_signals();
    let error = match nix::unistd::execve(&path, &arguments, &environment) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    format!("exec {}: {}", file.display(), exec_wording(error))
}

fn exec_wording(error: Errno) -> String {
    lookup::go_wording(error)
}

fn command(spec: &Spec) -> Option<(&Process, &str)> {
    let process = spec.process().as_ref()?;
    Some((process, process.args().as_ref()?.first()?.as_str()))
}

/// The spec's environment, each name once: the last counts.
fn environment(process: &Process) -> Vec<String> {
    let name = |entry: &str| entry.split('=').next().unwrap_or_default().to_owned();
    let mut entries: Vec<String> = Vec::new();
    for entry in process.env().iter().flatten() {
        match entries.iter_mut().find(|known| name(known) == name(entry)) {
            Some(known) => known.clone_from(entry),
            None => entries.push(entry.clone()),
        }
    }
    entries
}

/// The value of PATH that the process gets.
pub fn path(process: &Process) -> &str {
    let entries = process.env().iter().flatten();
    entries.filter_map(|entry| entry.strip_prefix("PATH=")).next_back().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_keeps_its_order_and_the_last_value() {
        let process: Process = serde_json::from_value(serde_json::json!({
            "user": { "uid": 0, "gid": 0 }, "cwd": "/",
            "env": ["B=1", "PATH=/bin", "A=2", "B=3", "odd"]
        }))
        .unwrap();
        assert_eq!(environment(&process), ["B=3", "PATH=/bin", "A=2", "odd"]);
        assert_eq!(path(&process), "/bin");
    }

    #[test]
    fn failures_of_execve_read_as_with_runc() {
        assert_eq!(exec_wording(Errno::ENOEXEC), "exec format error");
        assert_eq!(exec_wording(Errno::ENOENT), "no such file or directory");
    }
}
