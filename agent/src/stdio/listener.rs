//! Accepts stdio connections: reads the hello, answers one byte, runs the stream.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use spore_agent_api::stream::{ATTACHED, HEADER_LEN, Hello, Kind, MAX_ID, REFUSED_MALFORMED};

use super::pump::{self, Watched};
use super::streams::{self, Streams};
use crate::changes;
use crate::container::registry::Registry;
use crate::say;
use crate::vsock::VsockListener;

/// A peer that has connected says its hello within this time.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// Serves until the socket does not listen any more, which nothing short of a fault brings about.
pub async fn serve(listener: VsockListener, registry: Arc<Registry>) -> io::Error {
    loop {
        match listener.accept().await {
            Ok(fd) => {
                tokio::spawn(serve_any(fd, Arc::clone(&registry)));
            }
            Err(error) => return error,
        }
    }
}

async fn serve_any(fd: OwnedFd, registry: Arc<Registry>) {
    let Some((connection, hello)) = greet(fd).await else { return };
    match hello.kind {
        Kind::Changes => changes::serve(connection, &hello.id, &registry).await,
        _ => run(connection, &hello, &registry.streams).await,
    }
}

/// Serves one connection of a process's stream to its end.
pub async fn serve_one(fd: OwnedFd, streams: Arc<Streams>) {
    if let Some((connection, hello)) = greet(fd).await {
        run(connection, &hello, &streams).await;
    }
}

async fn greet(fd: OwnedFd) -> Option<(Watched, Hello)> {
    let connection = match streams::connection(fd) {
        Ok(connection) => connection,
        Err(error) => {
            say!("stdio connection: {error}");
            return None;
        }
    };
    match tokio::time::timeout(HELLO_DEADLINE, read_hello(&connection)).await {
        Ok(Ok(hello)) => return Some((connection, hello)),
        Ok(Err(error)) => {
            let _ = pump::write_some(&connection, &[REFUSED_MALFORMED]).await;
            say!("{error}");
        }
        Err(_elapsed) => say!("stdio connection: no hello within {HELLO_DEADLINE:?}"),
    }
    None
}

async fn run(connection: Watched, hello: &Hello, streams: &Streams) {
    match streams.attach(hello) {
        Ok(attachment) => {
            // A peer that is gone already shows in the first copy.
            let _ = pump::write_some(&connection, &[ATTACHED]).await;
            attachment.run(connection).await;
        }
        Err(refusal) => {
            let _ = pump::write_some(&connection, &[refusal]).await;
        }
    }
}

async fn read_hello(connection: &Watched) -> io::Result<Hello> {
    let mut header = [0; HEADER_LEN];
    read_exact(connection, &mut header).await?;
    let mut body = [0; 2 * MAX_ID];
    let body = &mut body[..Hello::body_len(&header)?];
    read_exact(connection, body).await?;
    Ok(Hello::decode(&header, body)?)
}

async fn read_exact(connection: &Watched, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        match pump::read_some(connection, buffer).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => buffer = &mut buffer[count..],
        }
    }
    Ok(())
}
