//! The generation, as a file and as a socket: who is connected to that is sent a line with the UUID at once, and another with
//! every change, for programs that wait for events rather than watch files.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};

use crate::say;

/// Mounted at `SHOWN` in every container whose `/dev` is a file system of its own.
pub(crate) const FILE: &str = "/run/spore/generation";
/// The same for the socket.
pub(crate) const SOCKET: &str = "/run/spore/generation.sock";
/// Most connections of all containers together; further ones are closed.
const MOST: usize = 256;
/// Before a failed accept is repeated.
const AGAIN: Duration = Duration::from_secs(1);

/// What there is of it. The line is empty until the first Setup.
#[derive(Debug, Default)]
pub struct Generation(watch::Sender<String>);

impl Generation {
    /// Another one, for the file and whoever is connected.
    pub(crate) fn renew(&self) -> io::Result<()> {
        self.0.send_replace(super::renew(Path::new(FILE))?);
        Ok(())
    }

    /// Serves the socket while the guest runs. Without it there is still the file.
    pub async fn serve(self: Arc<Self>) {
        let error = match bind(Path::new(SOCKET)) {
            Ok(listener) => return accept(listener, &self.0, MOST).await,
            Err(error) => error,
        };
        say!("{SOCKET}: {error}");
    }
}

fn bind(at: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = at.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let listener = UnixListener::bind(at)?;
    // Nobody can learn or do anything by it that the file would not tell.
    std::fs::set_permissions(at, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

async fn accept(listener: UnixListener, current: &watch::Sender<String>, most: usize) {
    let places = Arc::new(Semaphore::new(most));
    loop {
        match listener.accept().await {
            Ok((connection, _)) => {
                let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
                let current = current.subscribe();
                tokio::spawn(async move {
                    // Whichever way it ends: the peer has gone.
                    let _ = attend(connection, current).await;
                    drop(place);
                });
            }
            // Short of descriptors, for now.
            Err(error) => {
                say!("{SOCKET}: accept: {error}");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// Until the peer closes. One that does not read waits for itself only.
async fn attend(mut connection: UnixStream, mut current: watch::Receiver<String>) -> io::Result<()> {
    let (mut from, mut to) = connection.split();
    loop {
        let line = current.borrow_and_update().clone();
        to.write_all(line.as_bytes()).await?;
        let mut ignored = [0; 64];
        loop {
            tokio::select! {
                changed = current.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return Ok(()),
                },
                read = from.read(&mut ignored) => if read? == 0 { return Ok(()) },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(60);

    async fn line(from: &mut UnixStream) -> String {
        let mut line = [0; 2];
        tokio::time::timeout(DEADLINE, from.read_exact(&mut line)).await.unwrap().unwrap();
        String::from_utf8(line.into()).unwrap()
    }

    #[tokio::test]
    async fn who_is_connected_is_told_what_there_is_and_what_comes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/generation.sock");
        let current = watch::Sender::new("a\n".to_owned());
        let listener = bind(&path).unwrap();
        let serving = current.clone();
        tokio::spawn(async move { accept(listener, &serving, 2).await });
        let mut first = UnixStream::connect(&path).await.unwrap();
        assert_eq!(line(&mut first).await, "a\n");
        current.send_replace("b\n".into());
        assert_eq!(line(&mut first).await, "b\n");
        // What a peer sends is nobody's business.
        first.write_all(&[b'x'; 1000]).await.unwrap();
        let mut second = UnixStream::connect(&path).await.unwrap();
        assert_eq!(line(&mut second).await, "b\n");
        current.send_replace("c\n".into());
        assert_eq!((line(&mut first).await, line(&mut second).await), ("c\n".into(), "c\n".into()));
        // There is no place for a third, until one goes.
        let mut third = UnixStream::connect(&path).await.unwrap();
        assert_eq!(tokio::time::timeout(DEADLINE, third.read(&mut [0])).await.unwrap().unwrap(), 0);
        drop(second);
        let served = async {
            loop {
                let mut next = UnixStream::connect(&path).await.unwrap();
                if next.read(&mut [0; 2]).await.unwrap_or(0) > 0 {
                    return;
                }
            }
        };
        tokio::time::timeout(DEADLINE, served).await.unwrap();
    }
}
