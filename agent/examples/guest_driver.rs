//! Drives a real agent from inside its guest: the shim's part, over vsock loopback (CID 1).
//!
//! For guests that boot without a vsock device (plain QEMU). Put it into an initramfs beside
//! the agent, with a script as `/init` that starts it in the background and execs the
//! agent; give the kernel `spore.allow_loopback=1`, the modules `vsock_loopback`, a
//! busybox EROFS disk with serial `ro0` and fresh ext4 disks `rw0` and `rw1`. It prints one
//! line per case, `DRIVER: PASS` or `DRIVER: FAIL` at the end, and powers the guest off.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // A test program.

use std::error::Error;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, VsockAddr, connect, shutdown, socket};
use serde_json::{Value, json};
use spore_agent_api::stream::{ATTACHED, Hello, Kind};
use spore_agent_api::v1::container::{
    CreateRequest, DeleteRequest, PidsRequest, Rootfs, SignalRequest, StartRequest, StateRequest, Status,
    Stdio, WaitRequest,
};
use spore_agent_api::v1::container_ttrpc::ContainerClient;
use spore_agent_api::v1::sandbox::{InfoRequest, SetupRequest, ShutdownRequest};
use spore_agent_api::v1::sandbox_ttrpc::SandboxClient;
use spore_agent_api::{RPC_PORT, STDIO_PORT};
use ttrpc::context::{self, Context};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const LOCAL: u32 = 1;
const BOOT_DEADLINE: Duration = Duration::from_secs(120);

struct Driver {
    containers: ContainerClient,
    sandbox: SandboxClient,
}

fn deadline() -> Context {
    context::with_duration(Duration::from_secs(120))
}

/// A config.json as `ctr` writes it.
fn config(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": { "uid": 0, "gid": 0, "additionalGids": [0, 10] }, "args": args, "cwd": "/",
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "capabilities": {
                "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_RAW"],
                "effective": ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_RAW"],
                "permitted": ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_RAW"]
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true, "apparmorProfile": "cri-containerd.apparmor.d"
        },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
            { "destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }
        ],
        "hostname": "guest-container",
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                           { "type": "network" }, { "type": "cgroup" }],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// One stdio stream, blocking.
fn attach(id: &str, kind: Kind) -> Outcome<std::fs::File> {
    let fd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(fd.as_raw_fd(), &VsockAddr::new(LOCAL, STDIO_PORT))?;
    let mut stream = std::fs::File::from(fd);
    stream.write_all(&Hello { kind, id: id.into(), exec_id: String::new() }.encode()?)?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    if answer[0] != ATTACHED {
        return Err(format!("attach {kind:?}: refused with {}", answer[0]).into());
    }
    Ok(stream)
}

fn reader(mut stream: std::fs::File) -> tokio::task::JoinHandle<std::io::Result<Vec<u8>>> {
    tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).map(|_| bytes)
    })
}

fn writer(mut stream: std::fs::File, bytes: Vec<u8>) -> tokio::task::JoinHandle<()> {
    tokio::task::spawn_blocking(move || {
        let _ = stream.write_all(&bytes);
        let _ = shutdown(stream.as_raw_fd(), Shutdown::Write);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    })
}

#[derive(Debug)]
struct Ran {
    status: u32,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Ran {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

fn ensure(holds: bool, what: impl std::fmt::Debug) -> Outcome {
    if holds { Ok(()) } else { Err(format!("{what:?}").into()) }
}

impl Driver {
    async fn create(&self, id: &str, writable: &str, config: &Value, stdio: Stdio) -> Outcome<u32> {
        let request = CreateRequest {
            id: id.into(),
            spec: serde_json::to_vec(config)?,
            rootfs: Some(Rootfs {
                lower: vec!["ro0".into()],
                writable: writable.into(),
                ..Default::default()
            })
            .into(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        Ok(self.containers.create(deadline(), &request).await?.pid)
    }

    async fn start(&self, id: &str) -> Outcome {
        self.containers.start(deadline(), &StartRequest { id: id.into(), ..Default::default() }).await?;
        Ok(())
    }

    async fn wait(&self, id: &str) -> Outcome<u32> {
        let answer =
            self.containers.wait(deadline(), &WaitRequest { id: id.into(), ..Default::default() }).await?;
        ensure(answer.exited_at_ns > 0, "exited_at")?;
        Ok(answer.exit_status)
    }

    async fn delete(&self, id: &str) -> Outcome<u32> {
        let request = DeleteRequest { id: id.into(), ..Default::default() };
        Ok(self.containers.delete(deadline(), &request).await?.exit_status)
    }

    async fn signal(&self, id: &str, signal: u32, all: bool) -> Outcome {
        let request = SignalRequest { id: id.into(), signal, all, ..Default::default() };
        self.containers.signal(deadline(), &request).await?;
        Ok(())
    }

    /// Runs a container to its end with all three streams.
    async fn run(&self, id: &str, writable: &str, config: &Value, input: &[u8]) -> Outcome<Ran> {
        let stdio = Stdio { stdin: true, stdout: true, stderr: true, ..Default::default() };
        self.create(id, writable, config, stdio).await?;
        let stdin = writer(attach(id, Kind::Stdin)?, input.to_vec());
        let (stdout, stderr) = (reader(attach(id, Kind::Stdout)?), reader(attach(id, Kind::Stderr)?));
        self.start(id).await?;
        let status = self.wait(id).await?;
        let ran = Ran { status, stdout: stdout.await??, stderr: stderr.await?? };
        stdin.await?;
        ensure(self.delete(id).await? == status, "delete answers the same status")?;
        Ok(ran)
    }

    async fn sh(&self, script: &str) -> Outcome<Ran> {
        self.run("sh", "rw0", &config(&["sh", "-c", script]), b"").await
    }

    async fn info(&self) -> Outcome {
        let info = self.sandbox.info(deadline(), &InfoRequest::default()).await?;
        println!(
            "  kernel {} agent {} started {} us ready {} us memory {} of {} KiB available",
            info.kernel_release,
            info.agent_version,
            info.started_ns / 1000,
            info.ready_ns / 1000,
            info.memory_available / 1024,
            info.memory_total / 1024
        );
        ensure(info.ready_ns > info.started_ns, "clock")
    }

    async fn setup(&self) -> Outcome {
        let request = SetupRequest {
            hostname: "sandbox".into(),
            wall_clock_ns: 1_800_000_000_000_000_000,
            entropy: vec![7; 64],
            ..Default::default()
        };
        self.sandbox.setup(deadline(), &request).await?;
        let ran = self.sh("date +%s; hostname").await?;
        ensure(ran.text().starts_with("18000000") && ran.text().ends_with("\nguest-container\n"), &ran)
    }

    async fn prints(&self) -> Outcome {
        let ran = self.run("hello", "rw0", &config(&["echo", "hello", "guest"]), b"").await?;
        ensure(ran.status == 0 && ran.stdout == b"hello guest\n" && ran.stderr.is_empty(), &ran)
    }

    async fn pipes_stdin(&self) -> Outcome {
        let ran = self.run("cat", "rw0", &config(&["cat"]), b"hi\n").await?;
        ensure(ran.status == 0 && ran.stdout == b"hi\n", &ran)?;
        let noise: Vec<u8> = (0u32..2_000_000).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let ran = self.run("cat", "rw0", &config(&["cat"]), &noise).await?;
        ensure(ran.stdout == noise, ran.stdout.len())
    }

    async fn ignores_unread_stdin(&self) -> Outcome {
        let ran = self.run("true", "rw0", &config(&["true"]), &vec![1; 4 << 20]).await?;
        ensure(ran.status == 0, &ran)
    }

    async fn exit_statuses(&self) -> Outcome {
        for status in [0, 1, 2, 3, 125, 126, 127, 128, 130, 137, 143, 200, 255] {
            let ran = self.sh(&format!("exit {status}")).await?;
            ensure(ran.status == status, (status, &ran))?;
        }
        Ok(())
    }

    async fn signals(&self) -> Outcome {
        for (signal, all) in [(15, false), (9, false), (9, true), (2, false), (34, false), (15, true)] {
            let stdio = Stdio::default();
            // A pid namespace's init ignores what it does not handle, so the shell traps.
            let trap = if signal == 9 { "" } else { &format!("trap 'exit {}' {signal}; ", 128 + signal) };
            self.create(
                "sig",
                "rw0",
                &config(&["sh", "-c", &format!("{trap}while :; do sleep 0.05; done")]),
                stdio,
            )
            .await?;
            self.start("sig").await?;
            // The trap is set once the shell has got to its sleep.
            let begun = Instant::now();
            loop {
                let request = PidsRequest { id: "sig".into(), ..Default::default() };
                if self.containers.pids(deadline(), &request).await?.pids.len() > 1 {
                    break;
                }
                ensure(begun.elapsed() < BOOT_DEADLINE, "the shell never slept")?;
            }
            self.signal("sig", signal, all).await?;
            let status = self.wait("sig").await?;
            ensure(status == 128 + signal, (signal, all, status))?;
            ensure(self.signal("sig", 15, false).await.is_err(), "signal after the end")?;
            self.delete("sig").await?;
        }
        Ok(())
    }

    async fn states(&self) -> Outcome {
        let state = || async {
            let request = StateRequest { id: "st".into(), ..Default::default() };
            self.containers
                .state(deadline(), &request)
                .await
                .map(|state| state.status.enum_value_or_default())
        };
        let forever = config(&["sleep", "1000"]);
        ensure(state().await.is_err(), "absent")?;
        self.create("st", "rw0", &forever, Stdio::default()).await?;
        ensure(state().await? == Status::CREATED, "created")?;
        ensure(self.create("st", "rw1", &forever, Stdio::default()).await.is_err(), "same id")?;
        ensure(self.create("st2", "rw0", &forever, Stdio::default()).await.is_err(), "same disk")?;
        self.start("st").await?;
        ensure(state().await? == Status::RUNNING, "running")?;
        ensure(self.start("st").await.is_err(), "start twice")?;
        ensure(self.delete("st").await.is_err(), "delete while running")?;
        // A second container beside it, on the same image.
        let ran = self.run("other", "rw1", &config(&["echo", "beside"]), b"").await?;
        ensure(ran.stdout == b"beside\n", &ran)?;
        self.signal("st", 9, true).await?;
        ensure(self.wait("st").await? == 137, "killed")?;
        ensure(state().await? == Status::STOPPED, "stopped")?;
        ensure(self.delete("st").await? == 137 && self.delete("st").await? == 137, "delete twice")?;
        // Deleting what was created and never started.
        self.create("st", "rw0", &forever, Stdio::default()).await?;
        ensure(self.delete("st").await? == 137, "delete created")?;
        ensure(self.delete("never").await.is_err(), "delete unknown")
    }

    async fn refusals(&self) -> Outcome {
        let cases: Vec<(Value, &str)> = vec![
            (config(&["nosuch"]), "exec: \"nosuch\": executable file not found in $PATH"),
            (config(&["/no/such"]), "exec: \"/no/such\": stat /no/such: no such file or directory"),
            (config(&["/noexec"]), "exec: \"/noexec\": permission denied"),
            (config(&["/etc"]), "exec: \"/etc\": is a directory"),
            (json!({ "ociVersion": "1.0.2" }), "config.json: has no process"),
        ];
        for (config, wanted) in cases {
            let error = self.create("bad", "rw0", &config, Stdio::default()).await.unwrap_err().to_string();
            println!("  {error}");
            ensure(error.contains(&wanted.replace('"', "\\\"")) || error.contains(wanted), (wanted, error))?;
        }
        let mut bad = config(&["true"]);
        bad["mounts"][0] =
            json!({ "destination": "/x", "type": "bind", "source": "/etc", "options": ["rbind"] });
        ensure(self.create("bad", "rw0", &bad, Stdio::default()).await.is_err(), "bind")?;
        let mut bad = config(&["true"]);
        bad["mounts"][0] =
            json!({ "destination": "/proc", "type": "tmpfs", "source": "x", "options": ["size=banana"] });
        let error = self.create("bad", "rw0", &bad, Stdio::default()).await.unwrap_err().to_string();
        println!("  {error}");
        let error =
            self.create("bad", "rw7", &config(&["true"]), Stdio::default()).await.unwrap_err().to_string();
        println!("  {error}");
        // Another architecture: found, executable, and only execve can tell.
        let ran = self.run("arch", "rw0", &config(&["/wrongarch"]), b"").await?;
        ensure(ran.status == 255 && ran.stderr == b"exec /wrongarch: exec format error\n", &ran)
    }

    async fn environment(&self) -> Outcome {
        let script = "id -u; id -G; env | sort; cat /proc/self/cgroup; ip addr show lo | head -1; ls /dev | tr '\\n' ' '; \
                      echo; cat /proc/1/oom_score_adj; ps | wc -l; grep -E 'Sig(Ign|Blk)|Cap(Eff|Bnd)|Seccomp:' /proc/self/status; \
                      ulimit -n; cat /proc/mounts | cut -d' ' -f2,3 | tr '\\n' ';'; echo; ls -l /proc/self/fd | wc -l; \
                      echo x > /proc/sys/kernel/hostname || echo ro";
        let ran = self.sh(script).await?;
        for line in ran.text().lines() {
            println!("  | {line}");
        }
        ensure(ran.text().contains("HOME=/root") && ran.text().contains("LOOPBACK,UP"), &ran)?;
        ensure(ran.text().contains("SigIgn:\t0000000000000000"), "no signal is ignored")?;
        let mut user = config(&["sh", "-c", "id -u; pwd; echo via > /dev/stderr; echo $HOME"]);
        user["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
        user["process"]["cwd"] = json!("/made/for/me");
        let ran = self.run("user", "rw0", &user, b"").await?;
        ensure(ran.stdout == b"1000\n/made/for/me\n/\n" && ran.stderr == b"via\n", &ran)
    }

    async fn writes_survive(&self) -> Outcome {
        let ran = self.sh("test -e /kept && echo early; echo one > /kept; rm /etc/motd; sync").await?;
        ensure(ran.status == 0 && ran.stdout.is_empty(), &ran)?;
        let ran = self.sh("cat /kept; ls /etc/motd").await?;
        ensure(ran.stdout == b"one\n" && ran.status == 1, &ran)
    }

    async fn waits_for_a_reader(&self) -> Outcome {
        let stdio = Stdio { stdout: true, ..Default::default() };
        self.create("late", "rw0", &config(&["sh", "-c", "echo early; exit 3"]), stdio).await?;
        self.start("late").await?;
        ensure(self.wait("late").await? == 3, "status")?;
        let output = reader(attach("late", Kind::Stdout)?).await??;
        ensure(output == b"early\n", &output)?;
        ensure(attach("late", Kind::Stderr).is_err(), "stderr was not asked for")?;
        self.delete("late").await?;
        ensure(attach("late", Kind::Stdout).is_err(), "gone")
    }

    async fn terminal(&self) -> Outcome {
        let mut shell = config(&["sh"]);
        shell["process"]["terminal"] = json!(true);
        shell["process"]["consoleSize"] = json!({ "height": 40, "width": 100 });
        let stdio = Stdio { stdin: true, stdout: true, terminal: true, ..Default::default() };
        self.create("tty", "rw0", &shell, stdio).await?;
        let mut stream = attach("tty", Kind::Stdin)?;
        self.start("tty").await?;
        stream.write_all(b"tty; stty size; exit 5\n")?;
        let output = reader(stream).await??;
        let output = String::from_utf8_lossy(&output).into_owned();
        println!("  {output:?}");
        ensure(output.contains("/dev/pts/0") || output.contains("/dev/console"), &output)?;
        ensure(output.contains("40 100"), &output)?;
        ensure(self.wait("tty").await? == 5, "status")?;
        self.delete("tty").await?;
        Ok(())
    }

    async fn memory_limit(&self) -> Outcome {
        let mut hog =
            config(&["sh", "-c", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max; tail /dev/zero"]);
        hog["linux"]["resources"] = json!({ "memory": { "limit": 16_777_216 }, "pids": { "limit": 50 },
            "cpu": { "shares": 512, "quota": 50000, "period": 100_000 } });
        hog["linux"]["cgroupsPath"] = json!("system.slice:docker:abc");
        let ran = self.run("hog", "rw0", &hog, b"").await?;
        ensure(ran.text() == "16777216\n50\n" && ran.status == 137, &ran)
    }

    async fn devices(&self) -> Outcome {
        let script = "mknod /x b 254 0 && head -c 1 /x; mknod /n c 1 3 && echo > /n && echo null; head -c 1 /dev/urandom | wc -c";
        let mut maker = config(&["sh", "-c", script]);
        for set in ["bounding", "effective", "permitted"] {
            maker["process"]["capabilities"][set] = json!(["CAP_MKNOD"]);
        }
        let ran = self.run("mknod", "rw0", &maker, b"").await?;
        ensure(ran.text() == "null\n1\n" && ran.stderr.ends_with(b"Operation not permitted\n"), &ran)
    }

    async fn memory_of_the_agent(&self) -> Outcome {
        for line in std::fs::read_to_string("/proc/1/status")?.lines() {
            if line.starts_with("VmRSS") || line.starts_with("Rss") || line.starts_with("Threads") {
                println!("  {line}");
            }
        }
        Ok(())
    }

    /// Not one of the cases: leaves a container running, for somebody to press the power button.
    async fn linger(&self) -> Outcome {
        let script = "trap 'echo bye > /bye; exit 0' TERM; while :; do sleep 0.1; done";
        self.create("linger", "rw0", &config(&["sh", "-c", script]), Stdio::default()).await?;
        self.start("linger").await?;
        println!("DRIVER: LINGERS");
        println!("  ended with {}", self.wait("linger").await?);
        std::future::pending().await
    }

    async fn throughput(&self) -> Outcome {
        let begun = Instant::now();
        let ran = self.run("big", "rw0", &config(&["dd", "if=/dev/zero", "bs=1M", "count=64"]), b"").await?;
        println!("  64 MiB out in {:?}", begun.elapsed());
        ensure(ran.stdout.len() == 64 << 20 && ran.stdout.iter().all(|byte| *byte == 0), ran.stdout.len())?;
        let begun = Instant::now();
        let ran = self.run("big", "rw0", &config(&["wc", "-c"]), &vec![0; 64 << 20]).await?;
        println!("  64 MiB in in {:?}", begun.elapsed());
        ensure(ran.text().trim() == "67108864", &ran)
    }

    async fn leaves_nothing(&self) -> Outcome {
        let before = resources()?;
        let begun = Instant::now();
        for _ in 0..20 {
            let ran = self.sh("sleep 1000 & echo x").await?;
            ensure(ran.status == 0 && ran.stdout == b"x\n", &ran)?;
        }
        println!("  20 containers in {:?}", begun.elapsed());
        let after = resources()?;
        println!("  {before:?}");
        ensure(before == after, (before, after))
    }
}

/// Mounts, cgroups, descriptors of PID 1, processes.
fn resources() -> Outcome<(usize, usize, usize, Vec<String>)> {
    let mounts = std::fs::read_to_string("/proc/1/mounts")?.lines().count();
    let descriptors = std::fs::read_dir("/proc/1/fd")?.count();
    let mut processes = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let numeric = entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit());
        // Kernel threads come and go; they have no executable.
        if numeric && std::fs::read_link(entry.path().join("exe")).is_ok() {
            processes.push(std::fs::read_to_string(entry.path().join("comm"))?.trim().to_owned());
        }
    }
    processes.sort();
    Ok((mounts, count_cgroups(std::path::Path::new("/sys/fs/cgroup")), descriptors, processes))
}

fn count_cgroups(directory: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    1 + entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| count_cgroups(&entry.path()))
        .sum::<usize>()
}

async fn agent() -> Outcome<Driver> {
    let begun = Instant::now();
    loop {
        match ttrpc::r#async::Client::connect(&format!("vsock://{LOCAL}:{RPC_PORT}")).await {
            Ok(client) => {
                let containers = ContainerClient::new(client.clone());
                return Ok(Driver { containers, sandbox: SandboxClient::new(client) });
            }
            Err(error) if begun.elapsed() > BOOT_DEADLINE => return Err(error.into()),
            Err(_not_yet) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

macro_rules! run_cases {
    ($driver:expr, $only:expr, $($case:ident),+ $(,)?) => {{
        let mut failed = 0;
        $(
            if $only.is_empty() || $only.iter().any(|only| only == stringify!($case)) {
                let begun = Instant::now();
                match $driver.$case().await {
                    Ok(()) => println!("ok   {} ({:?})", stringify!($case), begun.elapsed()),
                    Err(error) => {
                        failed += 1;
                        println!("FAIL {}: {error}", stringify!($case));
                    }
                }
            }
        )+
        failed
    }};
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome {
    let driver = agent().await?;
    // The agent has moved a new root over the one that this process began in.
    nix::unistd::chroot("/..")?;
    std::env::set_current_dir("/")?;
    let only: Vec<String> = std::env::args().skip(1).collect();
    if only == ["linger"] {
        return driver.linger().await;
    }
    let failed = run_cases!(
        driver,
        only,
        info,
        prints,
        pipes_stdin,
        setup,
        ignores_unread_stdin,
        exit_statuses,
        signals,
        states,
        refusals,
        environment,
        writes_survive,
        waits_for_a_reader,
        terminal,
        memory_limit,
        devices,
        throughput,
        leaves_nothing,
        memory_of_the_agent,
        info
    );
    println!("DRIVER: {}", if failed == 0 { "PASS" } else { "FAIL" });
    driver.sandbox.shutdown(deadline(), &ShutdownRequest { grace_ms: 500, ..Default::default() }).await?;
    println!("shutdown answered");
    Ok(())
}
