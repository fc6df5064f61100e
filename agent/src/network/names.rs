//! The containers' name server at 127.0.0.11, where Docker's users expect it: each question goes to
//! the host's over a vsock connection of its own ([`spore_agent_api::network`]). It listens in the
//! containers' namespace, on a port to which [`super::steer`] leads.

use std::io;
use std::net::{TcpListener as StdListener, UdpSocket as StdSocket};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use spore_agent_api::NAMES_PORT;
use spore_agent_api::network::{MOST_QUESTIONS, NAME_SERVER, OVER_TCP, OVER_UDP};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::steer::{self, Steering};
use crate::say;
use crate::vsock::{self, VsockStream};

/// Resolvers ask again after five seconds.
const ANSWER: Duration = Duration::from_secs(10);
const CONNECTION: Duration = Duration::from_secs(120);
/// Before accept is tried again for want of resources.
const RETRY: Duration = Duration::from_millis(100);
/// Until a port is found that is free for both.
const ATTEMPTS: u32 = 16;

/// How the host is reached: a connected, non-blocking stream socket for each question.
pub type Dial = Arc<dyn Fn() -> BoxFuture<'static, io::Result<OwnedFd>> + Send + Sync>;

pub fn by_vsock() -> Dial {
    Arc::new(|| Box::pin(vsock::connect_to_host(NAMES_PORT)))
}

/// Sockets at the name server's address, with the same port.
#[derive(Debug)]
pub struct Doors {
    udp: StdSocket,
    tcp: StdListener,
}

impl Doors {
    /// Opens them in the network namespace of the calling thread, whose loopback interface is up.
    pub fn open() -> io::Result<Self> {
        let attempt = || -> io::Result<Self> {
            let tcp = StdListener::bind((NAME_SERVER, 0))?;
            let udp = StdSocket::bind((NAME_SERVER, tcp.local_addr()?.port()))?;
            tcp.set_nonblocking(true)?;
            udp.set_nonblocking(true)?;
            Ok(Self { udp, tcp })
        };
        for _ in 1..ATTEMPTS {
            match attempt() {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                other => return other,
            }
        }
        attempt()
    }
}

/// The name server, until it is dropped.
#[derive(Debug)]
pub struct Names {
    _serving: JoinSet<()>,
    _steering: Steering,
}

impl Names {
    /// Serves the sockets of `cgroup`, a directory.
    pub fn serve(doors: Doors, cgroup: &Path, dial: &Dial) -> io::Result<Self> {
        let steering = steer::to(doors.tcp.local_addr()?.port(), cgroup)?;
        let (udp, tcp) = (UdpSocket::from_std(doors.udp)?, TcpListener::from_std(doors.tcp)?);
        let turns = Arc::new(Semaphore::new(MOST_QUESTIONS));
        let mut serving = JoinSet::new();
        serving.spawn(serve_datagrams(Arc::new(udp), Arc::clone(dial), Arc::clone(&turns)));
        serving.spawn(serve_streams(tcp, Arc::clone(dial), turns));
        Ok(Self { _serving: serving, _steering: steering })
    }
}

async fn serve_datagrams(socket: Arc<UdpSocket>, dial: Dial, turns: Arc<Semaphore>) {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    let mut questions = JoinSet::new();
    loop {
        let (length, from) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => return say!("name server: receive: {error}"),
        };
        while questions.try_join_next().is_some() {}
        // One too many is asked again.
        let Ok(turn) = Arc::clone(&turns).try_acquire_owned() else { continue };
        let (socket, dial, question) = (Arc::clone(&socket), Arc::clone(&dial), buffer[..length].to_vec());
        questions.spawn(async move {
            let _turn = turn;
            if let Ok(Ok(answer)) = timeout(ANSWER, ask(&dial, &question)).await {
                let _ = socket.send_to(&answer, from).await;
            }
        });
    }
}

async fn ask(dial: &Dial, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = VsockStream::new(dial().await?)?;
    let length = u16::try_from(question.len()).map_err(io::Error::other)?;
    let message = [&[OVER_UDP][..], &length.to_be_bytes(), question].concat();
    stream.write_all(&message).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

async fn serve_streams(listener: TcpListener, dial: Dial, turns: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    loop {
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                say!("name server: accept: {error}; trying again");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        while connections.try_join_next().is_some() {}
        let Ok(turn) = Arc::clone(&turns).try_acquire_owned() else { continue };
        let dial = Arc::clone(&dial);
        connections.spawn(async move {
            let _turn = turn;
            let _ = timeout(CONNECTION, pass_on(connection, &dial)).await;
        });
    }
}

async fn pass_on(mut connection: TcpStream, dial: &Dial) -> io::Result<()> {
    let mut stream = VsockStream::new(dial().await?)?;
    stream.write_all(&[OVER_TCP]).await?;
    copy_bidirectional(&mut connection, &mut stream).await.map(drop)
}
