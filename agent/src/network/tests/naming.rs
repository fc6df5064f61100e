//! The name server, asked by a process of a cgroup, as a container's is. Needs root and cgroup v2.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use spore_agent_api::network::{MOST_QUESTIONS, OVER_TCP, OVER_UDP};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;

use super::support::Ground;
use crate::network::config::Config;
use crate::network::names::Dial;
use crate::network::namespace;

const SERVER: &str = "127.0.0.11:53";
const DEADLINE: Duration = Duration::from_secs(60);

/// A cgroup of the test's own.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Self {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let root = mounts.lines().find_map(|line| {
            let mut fields = line.split(' ');
            let mount_point = fields.nth(1)?;
            (fields.next() == Some("cgroup2")).then_some(mount_point)
        });
        let name = format!("spore-{name}-{}", std::process::id());
        let path = PathBuf::from(root.expect("cgroup v2 is mounted")).join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        std::fs::remove_dir(&self.0).unwrap();
    }
}

/// The shim's end: answers with the question reversed.
async fn answer(mut stream: UnixStream) -> io::Result<()> {
    let mut bytes = Vec::new();
    match stream.read_u8().await? {
        OVER_UDP => {
            bytes.resize(stream.read_u16().await?.into(), 0);
            stream.read_exact(&mut bytes).await?;
            stream.write_all(&u16::try_from(bytes.len()).unwrap().to_be_bytes()).await?;
        }
        OVER_TCP => drop(stream.read_to_end(&mut bytes).await?),
        other => panic!("{other}"),
    }
    bytes.reverse();
    stream.write_all(&bytes).await
}

fn connection() -> io::Result<(UnixStream, OwnedFd)> {
    let (shim, agent) = UnixStream::pair()?;
    Ok((shim, agent.into_std()?.into()))
}

fn host() -> Dial {
    Arc::new(|| {
        Box::pin(async {
            let (shim, agent) = connection()?;
            tokio::spawn(answer(shim));
            Ok(agent)
        })
    })
}

/// Runs [`process`] in the cgroup and the containers' namespace.
async fn run(what: &str, cgroup: &Cgroup, ground: &Ground) {
    let status = tokio::process::Command::new("/proc/self/exe")
        .args(["--ignored", "--exact", "network::tests::naming::process", "--nocapture"])
        .env("SPORE_WHAT", what)
        .env("SPORE_CGROUP", &cgroup.0)
        .env("SPORE_NAMESPACE", ground.path())
        .stdout(std::process::Stdio::null())
        .status();
    assert!(tokio::time::timeout(DEADLINE, status).await.unwrap().unwrap().success(), "{what}");
}

#[test]
#[ignore = "a process of the other tests"]
fn process() {
    let variable = |name| std::env::var(name).unwrap();
    std::fs::write(PathBuf::from(variable("SPORE_CGROUP")).join("cgroup.procs"), "0").unwrap();
    namespace::enter(&File::open(variable("SPORE_NAMESPACE")).unwrap()).unwrap();
    match variable("SPORE_WHAT").as_str() {
        "served" => {
            over_udp();
            over_tcp();
        }
        "serves" => serves_itself(),
        "flood" => {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            for _ in 0..2 * MOST_QUESTIONS {
                socket.send_to(b"who?", SERVER).unwrap();
            }
        }
        "refused" => {
            let refused = TcpStream::connect(SERVER).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        }
        other => panic!("{other}"),
    }
}

fn over_udp() {
    let mut buffer = [0; 100];
    // As musl asks, which looks at who answers.
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.send_to(b"question", SERVER).unwrap();
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from), (&b"noitseuq"[..], SERVER.parse().unwrap()));
    // As glibc asks.
    socket.connect(SERVER).unwrap();
    socket.send(b"another").unwrap();
    let length = socket.recv(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"rehtona");
}

fn over_tcp() {
    let mut stream = TcpStream::connect(SERVER).unwrap();
    stream.write_all(&[7; 100_000]).unwrap();
    stream.write_all(b"first").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!((answer.len(), &answer[..5]), (100_005, &b"tsrif"[..]));
}

/// A container with a name server of its own, on every address.
fn serves_itself() {
    let own = UdpSocket::bind("0.0.0.0:53").unwrap();
    TcpListener::bind("0.0.0.0:53").unwrap();
    own.set_read_timeout(Some(DEADLINE)).unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.send_to(b"to itself", "127.0.0.1:53").unwrap();
    let mut buffer = [0; 100];
    let (length, from) = own.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from), (&b"to itself"[..], socket.local_addr().unwrap()));
    over_udp();
}

fn wanted(name_server: bool) -> Config {
    Config { name_server, ..Config::default() }
}

#[tokio::test]
async fn questions_reach_the_host_as_long_as_there_is_a_name_server() {
    let cgroup = Cgroup::new("served");
    let ground = Ground::asking(0, &cgroup.0, host()).await;
    assert_eq!(ground.update(wanted(true)).await, [""; 0]);
    run("served", &cgroup, &ground).await;
    assert_eq!(ground.update(wanted(true)).await, [""; 0], "the same again is nothing new");
    run("served", &cgroup, &ground).await;
    assert_eq!(ground.update(wanted(false)).await, [""; 0]);
    run("refused", &cgroup, &ground).await;
}

#[tokio::test]
async fn the_port_is_free_for_a_name_server_of_the_containers_own() {
    let cgroup = Cgroup::new("serves");
    let ground = Ground::asking(0, &cgroup.0, host()).await;
    assert_eq!(ground.update(wanted(true)).await, [""; 0]);
    run("serves", &cgroup, &ground).await;
}

#[tokio::test]
async fn a_flood_of_questions_is_bounded_and_outlived() {
    let cgroup = Cgroup::new("flood");
    let (gate, asked) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let dial: Dial = {
        let (gate, asked) = (Arc::clone(&gate), Arc::clone(&asked));
        Arc::new(move || {
            let (gate, asked) = (Arc::clone(&gate), Arc::clone(&asked));
            Box::pin(async move {
                let now = asked.fetch_add(1, Ordering::Relaxed) + 1;
                assert!(now <= MOST_QUESTIONS, "{now} at a time");
                let _open = gate.acquire().await.unwrap();
                asked.fetch_sub(1, Ordering::Relaxed);
                let (shim, agent) = connection()?;
                tokio::spawn(answer(shim));
                Ok(agent)
            })
        })
    };
    let ground = Ground::asking(0, &cgroup.0, dial).await;
    assert_eq!(ground.update(wanted(true)).await, [""; 0]);
    run("flood", &cgroup, &ground).await;
    let full = async {
        while asked.load(Ordering::Relaxed) < MOST_QUESTIONS {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, full).await.unwrap();
    gate.add_permits(1);
    let empty = async {
        while asked.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, empty).await.unwrap();
    run("served", &cgroup, &ground).await;
}

#[tokio::test]
async fn what_cannot_be_steered_is_told() {
    let ground = Ground::asking(0, "/proc".as_ref(), host()).await;
    let problems = ground.update(wanted(true)).await;
    assert!(problems.len() == 1 && problems[0].contains("name server 127.0.0.11: "), "{problems:?}");
}
