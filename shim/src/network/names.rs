//! Docker's name server of user-defined networks, 127.0.0.11: a socket of dockerd's in the sandbox's
//! network namespace, which the guest cannot reach by its interfaces. The agent passes on what the
//! containers ask (`agent/api/src/network.rs` says how); this asks in their place, from within the
//! namespace. A guest reaches that one address and port, and nothing else.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::sync::Arc;
use std::time::Duration;

use spore_agent_api::network::{DOMAIN, MOST_QUESTIONS, NAME_SERVER, OVER_TCP, OVER_UDP};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpStream, UdpSocket, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// Resolvers ask again after five seconds.
const ANSWER: Duration = Duration::from_secs(10);
const CONNECTION: Duration = Duration::from_secs(120);

/// Whether somebody has a socket at the name server's address; for a thread in the namespace. Its
/// port is any: dockerd's is found through a rule of the firewall.
pub(super) fn is_there() -> bool {
    let table = std::fs::read_to_string("/proc/thread-self/net/udp").unwrap_or_default();
    listens(&table)
}

fn listens(table: &str) -> bool {
    // "  12: 0B00007F:D431 00000000:0000 07 …": the address as the kernel has it in memory.
    let address = format!("{:08X}:", u32::from_ne_bytes(NAME_SERVER.octets()));
    table.lines().any(|line| line.split_whitespace().nth(1).is_some_and(|local| local.starts_with(&address)))
}

/// Answers a guest's questions; lives on the namespace's thread.
pub(super) struct Relay {
    turns: Arc<Semaphore>,
    deadline: Duration,
}

impl Default for Relay {
    fn default() -> Self {
        Self { turns: Arc::new(Semaphore::new(MOST_QUESTIONS)), deadline: ANSWER }
    }
}

impl Relay {
    #[cfg(test)]
    pub(super) fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// Takes a connection of the agent's; one too many is hung up.
    pub(super) fn serve(&self, stream: OwnedFd) {
        let Ok(turn) = Arc::clone(&self.turns).try_acquire_owned() else { return };
        let deadline = self.deadline;
        tokio::spawn(async move {
            let _turn = turn;
            // What fails is hung up: the guest's resolver asks again.
            let _ = relay(stream.into(), deadline).await;
        });
    }
}

async fn relay(stream: StdStream, deadline: Duration) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(stream)?;
    let server = SocketAddrV4::new(NAME_SERVER, DOMAIN);
    match timeout(deadline, stream.read_u8()).await?? {
        OVER_UDP => timeout(deadline, answer(&mut stream, server)).await?,
        OVER_TCP => {
            let mut connection = timeout(deadline, TcpStream::connect(server)).await??;
            timeout(CONNECTION, copy_bidirectional(&mut stream, &mut connection)).await?.map(drop)
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

async fn answer(stream: &mut UnixStream, server: SocketAddrV4) -> io::Result<()> {
    let mut question = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut question).await?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(server).await?;
    socket.send(&question).await?;
    // Room for the longest, but not before there is an answer.
    socket.readable().await?;
    let mut answer = vec![0; usize::from(u16::MAX)];
    let length = socket.recv(&mut answer).await?;
    stream.write_u16(u16::try_from(length).map_err(io::Error::other)?).await?;
    stream.write_all(&answer[..length]).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_at_the_address_is_found_whatever_its_port() {
        let heading = "   sl  local_address rem_address   st tx_queue rx_queue\n";
        let line = |local: &str| format!("{heading} 1021: {local} 00000000:0000 07 00000000:00000000\n");
        assert!(listens(&line("0B00007F:D431")) && listens(&line("0B00007F:0035")));
        for other in ["0100007F:0035", "00000000:0035", "0B00007", ""] {
            assert!(!listens(&line(other)), "{other}");
        }
        assert!(!listens(""));
    }
}
