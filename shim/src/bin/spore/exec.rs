//! `spore exec`: a further process in a container, by containerd's task API; its exit status is
//! the command's.
//!
//! As with Docker: 125 when Spore or containerd failed, 126 when the command cannot be executed,
//! 127 when it does not exist.

mod streams;
mod terminal;
mod user;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use containerd_client::services::v1::{
    DeleteProcessRequest, ExecProcessRequest, KillRequest, ResizePtyRequest, StartRequest, WaitRequest,
};
use containerd_client::tonic::Status;
use containerd_shim_spore::clean;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::Global;
use crate::containerd::{Containerd, Namespace};
use crate::failure::{Failure, of_containerd};
use streams::Streams;
use terminal::RawMode;

/// What containerd calls an OCI process object.
pub(crate) const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// Statuses of a command that never ran.
const FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
/// After the command's end, how long its output may take to arrive.
const LAST_OUTPUT: Duration = Duration::from_secs(10);
/// What is passed on to the command; without a terminal nobody else does it.
const SIGNALS: [SignalKind; 5] = [
    SignalKind::interrupt(),
    SignalKind::terminate(),
    SignalKind::hangup(),
    SignalKind::quit(),
    SignalKind::user_defined1(),
];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Pass standard input on
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// USER[:GROUP] of the command, by name or number [default: the container's]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Working directory of the command [default: the container's]
    #[arg(short, long, value_name = "DIRECTORY")]
    workdir: Option<String>,
    /// NAME=VALUE, or NAME to pass this environment's value on
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// The container's id
    pub(crate) container: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<OsString>,
}

/// One exec of a container, as containerd is told of it.
struct Exec<'a> {
    containerd: &'a Containerd,
    namespace: Namespace,
    container: String,
    id: String,
}

pub(crate) async fn run(global: &Global, args: Args) -> Result<u8, Failure> {
    execute(global, args).await.map_err(|failure| match failure {
        usage @ (Failure::Usage(_) | Failure::NotExecuted { .. }) => usage,
        other => Failure::NotExecuted { status: FAILED, message: other.to_string() },
    })
}

async fn execute(global: &Global, args: Args) -> Result<u8, Failure> {
    if args.tty && args.interactive && !std::io::stdin().is_terminal() {
        return Err(Failure::Usage("--tty: standard input is not a terminal".into()));
    }
    let containerd = Containerd::connect(global).await?;
    let namespace = Namespace::new(&global.namespace)?;
    let container = containerd.container(&namespace, &args.container).await?;
    let spec = container.spec.map(|spec| spec.value).unwrap_or_default();
    let process = process(global, &args, &spec).await?;
    let id = format!("spore-{}-{}", std::process::id(), unique());
    let exec = Exec { containerd: &containerd, namespace, container: args.container.clone(), id };

    let mut streams = Streams::make(&exec.id, args.interactive, args.tty)?;
    let request = ExecProcessRequest {
        container_id: exec.container.clone(),
        exec_id: exec.id.clone(),
        stdin: streams.stdin(),
        stdout: streams.stdout(),
        stderr: streams.stderr(),
        terminal: args.tty,
        spec: Some(prost_types::Any { type_url: PROCESS_TYPE.into(), value: process }),
    };
    let answer = containerd.client.tasks().exec(exec.namespace.call(request)).await;
    answer.map_err(exec.failed("exec"))?;
    let outcome = exec.follow(&args, &mut streams).await;
    let request = DeleteProcessRequest { container_id: exec.container.clone(), exec_id: exec.id.clone() };
    let deleted = containerd.client.tasks().delete_process(exec.namespace.call(request)).await;
    let status = outcome?;
    if let Err(error) = deleted {
        eprintln!("spore: warning: exec {}: not deleted: {}", exec.id, clean(error.message()));
    }
    Ok(u8::try_from(status).unwrap_or(u8::MAX))
}

impl Exec<'_> {
    fn failed(&self, operation: &str) -> impl FnOnce(Status) -> Failure + use<> {
        of_containerd(&self.containerd.address, &format!("{operation} in container \"{}\"", self.container))
    }

    /// Starts it and stays with it to its end.
    async fn follow(&self, args: &Args, streams: &mut Streams) -> Result<u32, Failure> {
        let (container_id, exec_id) = (self.container.clone(), self.id.clone());
        let mut tasks = self.containerd.client.tasks();
        let mut starting = tasks.clone();
        // Before anything can end.
        let mut signals = Vec::new();
        for kind in SIGNALS {
            signals.push((kind, signal(kind).map_err(Failure::Output)?));
        }
        let mut resized = signal(SignalKind::window_change()).map_err(Failure::Output)?;
        streams.follow_output();
        let request = StartRequest { container_id: container_id.clone(), exec_id: exec_id.clone() };
        let started = starting.start(self.namespace.call(request)).await;
        streams.release_output();
        started.map_err(|status| self.not_executed(&status))?;
        // From here on every way out gives the terminal back.
        let raw = if args.tty && args.interactive { Some(RawMode::enter()?) } else { None };
        if args.tty {
            self.resize().await;
        }
        let mut input_ended = streams.follow_input();
        let request = WaitRequest { container_id, exec_id };
        let waiting = tasks.wait(self.namespace.call(request));
        tokio::pin!(waiting);
        let status = loop {
            let caught = async {
                let kinds = signals.iter_mut().map(|(kind, stream)| {
                    Box::pin(async move {
                        stream.recv().await;
                        *kind
                    })
                });
                first(kinds.collect()).await
            };
            tokio::select! {
                answer = &mut waiting => {
                    break answer.map_err(self.failed("wait for exec"))?.into_inner().exit_status;
                }
                kind = caught => self.signal(kind.as_raw_value()).await,
                _ = resized.recv() => self.resize().await,
                true = ended(&mut input_ended) => self.close_input().await,
            }
        };
        streams.finish(LAST_OUTPUT).await;
        drop(raw);
        Ok(status)
    }

    /// A start that failed, with the status that a shell would give.
    fn not_executed(&self, status: &Status) -> Failure {
        let message = clean(status.message());
        let container = &self.container;
        Failure::NotExecuted {
            status: not_executed_status(&message),
            message: format!("container \"{container}\": {message}"),
        }
    }

    async fn signal(&self, signal: i32) {
        let request = KillRequest {
            container_id: self.container.clone(),
            exec_id: self.id.clone(),
            signal: signal.unsigned_abs(),
            all: false,
        };
        // It may have ended just now.
        let _ = self.containerd.client.tasks().kill(self.namespace.call(request)).await;
    }

    async fn resize(&self) {
        let Some((width, height)) = terminal::size() else { return };
        let (container_id, exec_id) = (self.container.clone(), self.id.clone());
        let request = ResizePtyRequest { container_id, exec_id, width, height };
        let _ = self.containerd.client.tasks().resize_pty(self.namespace.call(request)).await;
    }

    async fn close_input(&self) {
        let request = containerd_client::services::v1::CloseIoRequest {
            container_id: self.container.clone(),
            exec_id: self.id.clone(),
            stdin: true,
        };
        let _ = self.containerd.client.tasks().close_io(self.namespace.call(request)).await;
    }
}

/// The first of them that is done.
async fn first<T>(mut futures: Vec<std::pin::Pin<Box<impl Future<Output = T>>>>) -> T {
    std::future::poll_fn(|context| {
        for future in &mut futures {
            if let std::task::Poll::Ready(value) = future.as_mut().poll(context) {
                return std::task::Poll::Ready(value);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

/// Once: the input's end. Afterwards, and without input, never.
async fn ended(input: &mut Option<tokio::sync::oneshot::Receiver<()>>) -> bool {
    match input {
        Some(ending) => {
            let _ = ending.await;
            *input = None;
            true
        }
        None => std::future::pending().await,
    }
}

fn not_executed_status(message: &str) -> u8 {
    let says = |texts: &[&str]| texts.iter().any(|text| message.contains(text));
    if says(&["executable file not found", "no such file or directory"]) {
        NOT_FOUND
    } else if says(&["permission denied", "is a directory", "exec format error"]) {
        NOT_EXECUTABLE
    } else {
        FAILED
    }
}

/// Something that no other exec of this process id had.
fn unique() -> u128 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos()
}

/// The container's own process object, with what is asked for changed.
async fn process(global: &Global, args: &Args, spec: &[u8]) -> Result<Vec<u8>, Failure> {
    let broken = |detail: String| Failure::Container { id: args.container.clone(), detail };
    let mut spec: Value =
        serde_json::from_slice(spec).map_err(|error| broken(format!("its specification: {error}")))?;
    let mut process = spec["process"].take();
    if !process.is_object() {
        return Err(broken("its specification has no process".into()));
    }
    let mut words = Vec::new();
    for word in &args.command {
        let text = word.to_str().ok_or_else(|| {
            Failure::Usage(format!("\"{}\": a command must be UTF-8", crate::show::name(word.as_bytes())))
        })?;
        words.push(text);
    }
    process["args"] = json!(words);
    process["terminal"] = args.tty.into();
    if let Some(object) = process.as_object_mut() {
        object.remove("consoleSize");
        object.remove("commandLine");
    }
    if let Some(directory) = &args.workdir {
        process["cwd"] = directory.as_str().into();
    }
    process["env"] = environment(&process["env"], &args.env, args.tty);
    if let Some(user) = &args.user {
        process["user"] = user::find(global, &args.container, user, &process["user"]).await?;
        // HOME is that of the user who is asked for.
        if let Some(env) = process["env"].as_array_mut()
            && !args.env.iter().any(|entry| entry.starts_with("HOME"))
        {
            env.retain(|entry| !entry.as_str().is_some_and(|entry| entry.starts_with("HOME=")));
        }
    }
    Ok(process.to_string().into_bytes())
}

/// The container's environment with changes; a name without a value is this process's.
fn environment(base: &Value, changes: &[String], tty: bool) -> Value {
    let mut entries: Vec<String> =
        base.as_array().into_iter().flatten().filter_map(|entry| entry.as_str().map(str::to_owned)).collect();
    let mut set = |name: &str, value: &str| {
        entries.retain(|entry| entry.split('=').next() != Some(name));
        entries.push(format!("{name}={value}"));
    };
    if tty {
        set("TERM", "xterm");
    }
    for change in changes {
        match change.split_once('=') {
            Some((name, value)) => set(name, value),
            None => {
                if let Ok(value) = std::env::var(change) {
                    set(change, &value);
                }
            }
        }
    }
    json!(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_is_changed_by_name() {
        let base = json!(["PATH=/bin", "A=1", "AB=2"]);
        let changed =
            environment(&base, &["A=x=y".into(), "NEW=".into(), "SURELY_NOT_SET_HERE".into()], false);
        assert_eq!(changed, json!(["PATH=/bin", "AB=2", "A=x=y", "NEW="]));
        assert_eq!(environment(&Value::Null, &[], true), json!(["TERM=xterm"]));
    }

    #[test]
    fn what_could_not_be_executed_has_a_shells_status() {
        for (message, status) in [
            ("OCI runtime exec failed: exec: \"x\": executable file not found in $PATH", 127),
            ("exec: \"/x\": stat /x: no such file or directory", 127),
            ("exec: \"/etc/passwd\": permission denied", 126),
            ("exec: \"/\": is a directory", 126),
            ("cannot exec in a paused container", 125),
        ] {
            assert_eq!(not_executed_status(message), status, "{message}");
        }
    }
}
