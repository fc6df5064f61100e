//! Accepts stdio connections: reads the hello, answers one byte, runs the stream.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use spore_agent_api::stream::{ATTACHED, HEADER_LEN, Hello, MAX_ID, REFUSED_MALFORMED};

use super::pump::{self, Watched};
use super::streams::{self, Streams};
use crate::say;
use crate::vsock::VsockListener;

/// A peer that has connected says its hello within this time.
const HELLO_DEADLINE: Duration = Duration::from_secs(10);

/// Serves until the socket does not listen any more, which nothing short of a fault brings about.
pub async fn serve(listener: VsockListener, streams: Arc<Streams>) -> io::Error {
    loop {
        match listener.accept().await {
            Ok(fd) => {
                tokio::spawn(serve_one(fd, Arc::clone(&streams)));
            }
            Err(error) => return error,
        }
    }
}

/// Serves one connection to its end.
pub async fn serve_one(fd: OwnedFd, streams: Arc<Streams>) {
    let connection = match streams::connection(fd) {
        Ok(connection) => connection,
        Err(error) => return say!("stdio connection: {error}"),
    };
    let hello = match tokio::time::timeout(HELLO_DEADLINE, read_hello(&connection)).await {
        Ok(Ok(hello)) => hello,
        Ok(Err(error)) => {
            let _ = pump::write_some(&connection, &[REFUSED_MALFORMED]).await;
            return say!("{error}");
        }
        Err(_elapsed) => return say!("stdio connection: no hello within {HELLO_DEADLINE:?}"),
    };
    match streams.attach(&hello) {
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
