//! Over TCP: bytes of a pattern that the receiver compares one by one, and messages that come back.
//!
//! * `sink`: takes all, then answers how many came. `hold`: the same, but takes the first after `release`.
//! * `source BYTES`: gives so many. `echo SIZE`: sends each message back.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::{DEADLINE, answer, request};

/// A prime: no piece of a stream that is lost, repeated or exchanged leaves the pattern as it was.
const PERIOD: usize = 1_000_003;
const PIECE: usize = 64 * 1024;
/// A sender that cannot write for so long is taken to be blocked.
const BLOCKED: Duration = Duration::from_secs(2);

/// Bytes without order, repeated for ever.
struct Pattern {
    bytes: &'static [u8],
    at: usize,
}

impl Pattern {
    fn new() -> Self {
        static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
        let make = || {
            // Marsaglia's xorshift64.
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            let mut next = || {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()[3]
            };
            (0..PERIOD).map(|_| next()).collect()
        };
        Self { bytes: BYTES.get_or_init(make), at: 0 }
    }

    /// What comes next, at most so much.
    fn next(&self, most: u64) -> &'static [u8] {
        let most = usize::try_from(most).unwrap_or(PIECE).min(PIECE);
        &self.bytes[self.at..(self.at + most).min(PERIOD)]
    }

    fn advance(&mut self, count: usize) {
        self.at = (self.at + count) % PERIOD;
    }

    fn is_followed_by(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            let count = bytes.len().min(PERIOD - self.at);
            let (now, rest) = bytes.split_at(count);
            if *now != self.bytes[self.at..self.at + count] {
                return false;
            }
            self.advance(count);
            bytes = rest;
        }
        true
    }
}

/// Takes bytes until their end; how many.
pub(super) fn take(mut from: impl Read) -> Result<u64> {
    let (mut pattern, mut buffer, mut count) = (Pattern::new(), vec![0; PIECE], 0u64);
    loop {
        let length = from.read(&mut buffer).with_context(|| format!("after {count} bytes"))?;
        if length == 0 {
            return Ok(count);
        }
        ensure!(pattern.is_followed_by(&buffer[..length]), "bytes {count} and on are others");
        count += length as u64;
    }
}

pub(super) fn give(mut to: impl Write, bytes: u64) -> Result<()> {
    let (mut pattern, mut left) = (Pattern::new(), bytes);
    while left > 0 {
        let piece = pattern.next(left);
        to.write_all(piece).with_context(|| format!("with {left} of {bytes} bytes left"))?;
        pattern.advance(piece.len());
        left -= piece.len() as u64;
    }
    Ok(())
}

pub(super) fn sink(stream: &TcpStream) -> Result<()> {
    let count = take(stream)?;
    Ok(write!(&mut &*stream, "{count}")?)
}

pub(super) fn hold(stream: &TcpStream, wait: impl FnOnce() -> Result<()>) -> Result<()> {
    wait()?;
    sink(stream)
}

pub(super) fn source(stream: &TcpStream, bytes: u64) -> Result<()> {
    give(stream, bytes)
}

pub(super) fn echo(mut stream: &TcpStream, size: usize) -> Result<()> {
    let mut message = vec![0; size];
    loop {
        match stream.read_exact(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other?,
        }
        stream.write_all(&message)?;
    }
}

/// The server has taken all, and what it took was right.
fn taken(stream: &TcpStream, bytes: u64) -> Result<()> {
    stream.shutdown(Shutdown::Write)?;
    let count = answer(stream)?;
    ensure!(count == bytes.to_string(), "{count} of {bytes} bytes came");
    Ok(())
}

/// Sends so many bytes to the server at `to`; the time until it had all.
pub fn push(to: SocketAddr, bytes: u64) -> Result<Duration> {
    let stream = request(to, "sink")?;
    let begin = Instant::now();
    give(&stream, bytes)?;
    taken(&stream, bytes)?;
    Ok(begin.elapsed())
}

/// Sends to a server that takes nothing, until no more can be sent; then has it take all.
pub fn push_held(to: SocketAddr, bytes: u64) -> Result<()> {
    let mut stream = request(to, "hold")?;
    stream.set_write_timeout(Some(BLOCKED))?;
    let (mut pattern, mut left, mut is_released) = (Pattern::new(), bytes, false);
    while left > 0 {
        match stream.write(pattern.next(left)) {
            Ok(count) => {
                pattern.advance(count);
                left -= count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !is_released => {
                answer(request(to, "release")?)?;
                stream.set_write_timeout(Some(DEADLINE))?;
                is_released = true;
            }
            Err(error) => return Err(error).with_context(|| format!("with {left} of {bytes} bytes left")),
        }
    }
    if !is_released {
        bail!("{bytes} bytes went out before anybody took one: too few to fill what is between");
    }
    taken(&stream, bytes)
}

/// Takes so many bytes from the server at `from`; the time until all were there.
pub fn pull(from: SocketAddr, bytes: u64) -> Result<Duration> {
    let begin = Instant::now();
    let stream = request(from, &format!("source {bytes}"))?;
    let count = take(stream)?;
    ensure!(count == bytes, "{count} of {bytes} bytes came");
    Ok(begin.elapsed())
}

/// Sends messages to the server at `to`, each when the one before has come back; the time of each.
pub fn trips(to: SocketAddr, size: usize, count: usize) -> Result<Vec<Duration>> {
    let mut stream = request(to, &format!("echo {size}"))?;
    let (message, mut back) = (Pattern::new().next(size as u64), vec![0; size]);
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = Instant::now();
        stream.write_all(message)?;
        stream.read_exact(&mut back)?;
        times.push(begin.elapsed());
        ensure!(back == message, "another message came back");
    }
    Ok(times)
}
