//! Further processes in a container: prepared by Exec, run by Start.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use oci_spec::runtime::Process as Spec;
use spore_agent_api::MAX_SPEC;

use super::life::Container;
use super::process::Process;
use crate::error::{AgentError, Result};
use crate::reaper::Reaper;
use crate::runtime::{client, protocol};
use crate::stdio::make::{self, Wanted};
use crate::stdio::streams::{ProcessStreams, Streams};

/// See the module.
#[derive(Debug)]
pub struct Exec {
    pub process: Arc<Process>,
    waiting: tokio::sync::Mutex<Option<Waiting>>,
}

/// What Start needs.
#[derive(Debug)]
struct Waiting {
    spec: Spec,
    /// The process's ends of its streams; none with a terminal.
    streams: client::Streams,
}

fn invalid(message: impl Into<String>) -> AgentError {
    AgentError::InvalidArgument(message.into())
}

/// Parses and checks an OCI process object.
fn parse(json: &[u8], terminal: bool) -> Result<Spec> {
    if json.len() > MAX_SPEC {
        let length = json.len();
        return Err(invalid(format!("process: {length} bytes, at most {MAX_SPEC} are allowed")));
    }
    let spec: Spec =
        serde_json::from_slice(json).map_err(|error| invalid(format!("process: malformed: {error}")))?;
    super::spec::check_process(&spec).map_err(invalid)?;
    if spec.terminal().unwrap_or(false) != terminal {
        let said = spec.terminal().unwrap_or(false);
        return Err(invalid(format!("process.terminal is {said}, but the request says {terminal}")));
    }
    for (name, set) in [
        ("scheduler", spec.scheduler().is_some()),
        ("ioPriority", spec.io_priority().is_some()),
        ("execCPUAffinity", spec.exec_cpu_affinity().is_some()),
    ] {
        if set {
            let message = format!("process.{name} is not supported for exec; leave it out");
            return Err(AgentError::Unimplemented(message));
        }
    }
    Ok(spec)
}

impl Exec {
    /// Prepares a process and the agent's ends of its streams.
    pub fn prepare(json: &[u8], wanted: Wanted, terminal: bool) -> Result<(Self, ProcessStreams)> {
        let spec = parse(json, terminal)?;
        let (ours, streams) = if terminal {
            // They come to be with the terminal, at Start.
            (ProcessStreams::default(), Vec::new())
        } else {
            make::pipes(wanted, spec.user().uid())
                .map_err(|error| AgentError::internal("standard streams", error))?
        };
        let waiting = tokio::sync::Mutex::new(Some(Waiting { spec, streams }));
        Ok((Self { process: Arc::new(Process::prepared()), waiting }, ours))
    }

    /// Runs it; answers when its executable has taken over, or why it could not.
    pub(super) async fn start(
        &self,
        container: &Container,
        exec_id: &str,
        reaper: &Arc<Reaper>,
        streams: &Streams,
    ) -> Result<()> {
        let Some(Waiting { spec, streams: theirs }) = self.waiting.lock().await.take() else {
            let name = container.name_of(exec_id);
            return Err(AgentError::FailedPrecondition(format!("{name}: was started already")));
        };
        let uid = spec.user().uid();
        let size = super::spec::console_size(&spec);
        let request = protocol::Exec {
            init: container.init.pid().cast_signed(),
            cgroup: container.cgroup.path().to_owned(),
            config: container.bundle.join("config.json"),
            terminal: spec.terminal().unwrap_or(false),
        };
        let json = serde_json::to_vec(&spec).map_err(|error| AgentError::internal("process", error))?;
        let created = client::exec(reaper, request, &json, theirs).await?;
        let wired = |master: OwnedFd| {
            let size_of = master.try_clone()?;
            streams.insert(&container.id, exec_id, make::terminal(master, uid, size)?);
            Ok::<_, std::io::Error>(size_of)
        };
        let master = match created.terminal.map(wired).transpose() {
            Ok(master) => master,
            Err(error) => {
                // Nobody could follow it.
                let _ = reaper.signal(&created.init, libc::SIGKILL);
                return Err(AgentError::internal(format!("{}: terminal", container.name_of(exec_id)), error));
            }
        };
        self.process.set_started();
        self.process.born(created.init, master);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(process: &serde_json::Value) -> AgentError {
        parse(&serde_json::to_vec(process).unwrap(), false).unwrap_err()
    }

    #[test]
    fn a_process_is_checked_before_anything_is_made() {
        let good = serde_json::json!({ "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 } });
        parse(&serde_json::to_vec(&good).unwrap(), false).unwrap();
        let with = |name: &str, value: serde_json::Value| {
            let mut process = good.clone();
            process[name] = value;
            refusal(&process).to_string()
        };
        assert!(with("args", serde_json::json!([])).contains("process.args is empty"));
        assert!(with("cwd", "tmp".into()).contains("must be absolute"));
        assert!(with("terminal", true.into()).contains("the request says false"));
        assert!(with("user", "root".into()).contains("malformed"));
        let scheduled = with("scheduler", serde_json::json!({ "policy": "SCHED_FIFO" }));
        assert!(scheduled.contains("process.scheduler is not supported"), "{scheduled}");
    }
}
