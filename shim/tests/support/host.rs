//! One bundle with its own directories, the shim started on it, and a containerd that only
//! listens to events.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, DeleteResponse, Empty, ForwardRequest, KillRequest, StartRequest,
    StateRequest, WaitRequest,
};
use containerd_shim_protos::shim_async::{Events, TaskClient, create_events};
use nix::sys::signal::Signal;
use protobuf::Message;
use serde_json::json;
use tokio::sync::mpsc;
use ttrpc::Code;
use ttrpc::r#async::{Client, Server, TtrpcContext};
use ttrpc::context::Context;

pub(crate) const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-spore-v2");
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) struct Containerd(mpsc::UnboundedSender<(String, Vec<u8>)>);

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap();
        assert_eq!(envelope.namespace, "test");
        let _ = self.0.send((envelope.topic, envelope.event.unwrap().value));
        Ok(Empty::new())
    }
}

/// One bundle with its own directories and a containerd that only listens.
pub(crate) struct Host {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) id: String,
    pub(crate) events: mpsc::UnboundedReceiver<(String, Vec<u8>)>,
    _server: Server,
}

impl Host {
    pub(crate) async fn new(id: &str) -> Self {
        Self::with_config(id, "").await
    }

    pub(crate) async fn with_config(id: &str, config: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["bundle", "root/etc"] {
            std::fs::create_dir_all(at(name)).unwrap();
        }
        std::fs::write(at("root/etc/motd"), b"hello").unwrap();
        for name in ["kernel", "initramfs"] {
            std::fs::write(at(name), b"not empty").unwrap();
        }
        let script = format!(
            "#!/bin/bash\nexport TMPDIR={}\neval \"exec 0<&$2 $2<&-\"\nexec {} --ignored --exact fake_vmm --nocapture >/dev/null\n",
            dir.path().display(),
            std::env::current_exe().unwrap().display()
        );
        std::fs::write(at("vmm"), script).unwrap();
        std::fs::set_permissions(at("vmm"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let text = format!(
            "kernel = {:?}\ninitramfs = {:?}\nvmm = {:?}\nstate_dir = {:?}\nrun_dir = {:?}\nwritable_size_mib = 64\nboot_templates = false\ntimeline = {:?}\n{config}\n",
            at("kernel"),
            at("initramfs"),
            at("vmm"),
            at("state"),
            at("run"),
            at("timeline"),
        );
        std::fs::write(at("config.toml"), text).unwrap();
        nix::unistd::mkfifo(&at("bundle/log"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (sender, events) = mpsc::unbounded_channel();
        let mut server = Server::new()
            .bind(&format!("unix://{}", at("ttrpc").display()))
            .unwrap()
            .register_service(create_events(Arc::new(Containerd(sender))));
        server.start().await.unwrap();
        let host = Self { dir, id: id.into(), events, _server: server };
        host.write_spec(&["/bin/true"]);
        host
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write_spec(&self, args: &[&str]) {
        self.write_spec_in(args, None);
    }

    /// With the path of a network namespace.
    pub(crate) fn write_spec_in(&self, args: &[&str], network: Option<&Path>) {
        let network = match network {
            Some(path) => json!({ "type": "network", "path": path }),
            None => json!({ "type": "network" }),
        };
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": { "args": args, "cwd": "/", "user": { "uid": 0, "gid": 0 }, "oomScoreAdj": 321 },
            "root": { "path": self.path("root") },
            "linux": { "namespaces": [network, { "type": "pid" }] },
        });
        std::fs::write(self.path("bundle/config.json"), spec.to_string()).unwrap();
    }

    pub(crate) fn command(&self, action: &str) -> Output {
        Command::new(SHIM)
            .args(["-namespace", "test", "-id", &self.id, "-address"])
            .arg(self.path("containerd.sock"))
            .arg(action)
            .current_dir(self.path("bundle"))
            .env("SPORE_CONFIG", self.path("config.toml"))
            .env("TTRPC_ADDRESS", self.path("ttrpc"))
            .env("MAX_SHIM_VERSION", "2")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// `start`, then a connection to the address that it answers.
    pub(crate) async fn start(&self) -> TaskClient {
        let output = self.command("start");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stderr, b"", "containerd would take it for a part of the answer");
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((answer["version"].as_u64(), answer["protocol"].as_str()), (Some(2), Some("ttrpc")));
        let address = answer["address"].as_str().unwrap();
        assert_eq!(std::fs::read_to_string(self.path("bundle/address")).unwrap(), address);
        TaskClient::new(Client::connect(address).await.unwrap())
    }

    pub(crate) fn request(&self) -> CreateTaskRequest {
        CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.path("bundle").display().to_string(),
            ..Default::default()
        }
    }

    pub(crate) fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.display().to_string()
    }

    pub(crate) async fn topics(&mut self, count: usize) -> Vec<String> {
        let mut topics = Vec::new();
        while topics.len() < count {
            topics.push(tokio::time::timeout(DEADLINE, self.events.recv()).await.unwrap().unwrap().0);
        }
        topics
    }

    /// What the shim has recorded of a process: `shim`, `vmm` or `holder`.
    pub(crate) fn recorded_pid(&self, name: &str) -> u32 {
        let path = self.path("run/test").join(&self.id).join("processes.json");
        let record: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        u32::try_from(record[name]["pid"].as_u64().unwrap()).unwrap()
    }

    pub(crate) fn delete(&self) -> DeleteResponse {
        let output = self.command("delete");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
    }

    /// Nothing of the sandbox is left but what belongs to the root directory.
    pub(crate) fn assert_clean(&self, address: &str) {
        assert!(!self.path("run/test").exists(), "run-time directory");
        assert!(!Path::new(address.trim_start_matches("unix://")).exists(), "socket");
        let ours = self.dir.path().display().to_string();
        let until = Instant::now() + DEADLINE;
        loop {
            let left = processes_with(&ours);
            if left.is_empty() {
                break;
            }
            assert!(Instant::now() < until, "processes left: {left:?}");
            std::thread::yield_now();
        }
        let temporary = |dir: &str| {
            let entries = std::fs::read_dir(self.path(dir)).into_iter().flatten().flatten();
            entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b".tmp")).count()
        };
        assert_eq!((temporary("state/golden"), temporary("state/images")), (0, 0));
    }

    pub(crate) fn address(&self) -> String {
        std::fs::read_to_string(self.path("bundle/address")).unwrap()
    }
}

impl Drop for Host {
    /// A failed test leaves no shim behind.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let output = self.command("delete");
            eprintln!("delete: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
}

/// Processes whose command line or environment names `text`, ourselves left out.
pub(crate) fn processes_with(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        let all = [String::from_utf8_lossy(&command), String::from_utf8_lossy(&environment)].join(" ");
        if pid != std::process::id() && all.contains(text) {
            found.push(format!("{pid}: {}", String::from_utf8_lossy(&command).replace('\0', " ")));
        }
    }
    found
}

pub(crate) fn start_request(host: &Host) -> StartRequest {
    StartRequest { id: host.id.clone(), ..Default::default() }
}

pub(crate) fn delete_request(host: &Host) -> DeleteRequest {
    DeleteRequest { id: host.id.clone(), ..Default::default() }
}

pub(crate) fn ctx() -> Context {
    ttrpc::context::with_duration(DEADLINE)
}

pub(crate) fn kill_request(host: &Host, signal: u32) -> KillRequest {
    KillRequest { id: host.id.clone(), signal, ..Default::default() }
}

pub(crate) fn wait_request(host: &Host) -> WaitRequest {
    WaitRequest { id: host.id.clone(), ..Default::default() }
}

pub(crate) fn state_request(host: &Host) -> StateRequest {
    StateRequest { id: host.id.clone(), ..Default::default() }
}

pub(crate) fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_string()),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn is_zombie(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

pub(crate) fn send_signal(pid: u32, signal: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
}

pub(crate) fn oom_score_adj(pid: u32) -> i32 {
    std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().parse().unwrap()
}
