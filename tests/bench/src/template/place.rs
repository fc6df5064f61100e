//! Where servers run: a network namespace with a cable to one that plays the client, who asks over TCP until there is an
//! answer.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use spore_harness::network::space::Space;
use spore_harness::wait;

/// For the first answer, on the slowest ground.
const ANSWERED: Duration = Duration::from_secs(120);
/// A connection that is not there by then is tried again.
const CONNECTED: Duration = Duration::from_millis(100);
/// One that is there waits for its answer for so long.
const READ: Duration = Duration::from_secs(30);

/// What asks for whether a server serves.
#[derive(Clone, Copy)]
pub(super) enum Question {
    /// `GET /`.
    Http,
    /// PostgreSQL's protocol, version 3: a session of its user `postgres`, and `select 1`.
    Postgres,
}

impl Question {
    fn port(self) -> u16 {
        match self {
            Self::Http => 8000,
            Self::Postgres => 5432,
        }
    }

    /// All that the client says.
    fn request(self) -> Vec<u8> {
        match self {
            Self::Http => b"GET / HTTP/1.0\r\n\r\n".to_vec(),
            Self::Postgres => {
                // Lengths count themselves: 4 + 4 + 33, 4 + 9, 4.
                let mut request = vec![0, 0, 0, 41, 0, 3, 0, 0];
                request.extend(b"user\0postgres\0database\0postgres\0\0");
                request.extend(b"Q\0\0\0\x0dselect 1\0");
                request.extend(b"X\0\0\0\x04");
                request
            }
        }
    }

    fn answered(self, answer: &[u8]) -> bool {
        match self {
            Self::Http => answer.starts_with(b"HTTP/1.0 200 "),
            Self::Postgres => messages(answer).any(|(kind, _)| kind == b'D'),
        }
    }
}

/// The server's messages: a letter, and what follows its length.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let (kind, rest) = bytes.split_first()?;
        let (length, _) = rest.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        let body = rest.get(4..length)?;
        bytes = &rest[length..];
        Some((*kind, body))
    })
}

/// A namespace for one container at a time.
pub(super) struct Place {
    space: Space,
    client: Space,
    address: Ipv4Addr,
}

impl Place {
    pub(super) fn new(name: &str, number: u8) -> Result<Self> {
        let (space, client) =
            (Space::new(&format!("{name}-server"))?, Space::new(&format!("{name}-client"))?);
        let address = |last| Ipv4Addr::new(10, 40, number, last);
        let near = format!("{}/24", address(2));
        let far = format!("{}/24", address(1));
        space.wire(("eth0", &near), &client, ("client", &far))?;
        Ok(Self { space, client, address: address(2) })
    }

    /// `--with-ns` of it.
    pub(super) fn namespace(&self) -> String {
        format!("network:{}", self.space.path().display())
    }

    /// Asks until there is an answer.
    pub(super) fn ask(&self, question: Question) -> Result<()> {
        let server = SocketAddr::from((self.address, question.port()));
        let mut last = None;
        let waited = self.client.within(|| {
            wait::until(&format!("{server} answers"), ANSWERED, || match once(server, question) {
                Ok(()) => Some(()),
                Err(error) => {
                    last = Some(error);
                    None
                }
            })
        });
        match (waited, last) {
            (Err(error), Some(last)) => Err(error.context(format!("the last try: {last:#}"))),
            (waited, _) => waited,
        }
    }
}

fn once(server: SocketAddr, question: Question) -> Result<()> {
    let mut connection = TcpStream::connect_timeout(&server, CONNECTED).context("connecting")?;
    connection.set_read_timeout(Some(READ))?;
    connection.write_all(&question.request())?;
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer).context("reading the answer")?;
    ensure!(question.answered(&answer), "it answered {:?}", String::from_utf8_lossy(&answer));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_the_request_are_those_of_its_messages() {
        let request = Question::Postgres.request();
        let (start, rest) = request.split_at(41);
        assert_eq!((start[3], start.ends_with(b"\0\0")), (41, true));
        let told: Vec<_> = messages(rest).collect();
        assert_eq!(told, [(b'Q', b"select 1\0".as_slice()), (b'X', b"".as_slice())]);
    }

    #[test]
    fn only_an_answer_of_the_application_counts() {
        assert!(Question::Http.answered(b"HTTP/1.0 200 OK\r\n\r\nhello"));
        assert!(!Question::Http.answered(b"HTTP/1.0 404 Not Found\r\n"));
        let row = b"R\0\0\0\x08\0\0\0\0D\0\0\0\x0b\0\x01\0\0\0\x011Z\0\0\0\x05I";
        assert!(Question::Postgres.answered(row));
        assert!(!Question::Postgres.answered(b"E\0\0\0\x0fstarting up"));
        assert!(!Question::Postgres.answered(b"D\0\0\0"));
        assert!(!Question::Postgres.answered(b""));
    }
}
