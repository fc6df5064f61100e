//! The host's side of vsock connections: Unix sockets and the `CONNECT` line.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::DEADLINE;

/// Asks for guest port `port`. An error of kind `ConnectionReset` when the guest refuses.
pub fn connect(path: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    // Byte by byte: what follows the line belongs to the stream.
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        if stream.read(&mut byte)? == 0 {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        line.push(byte[0]);
    }
    let text = String::from_utf8_lossy(&line);
    let number = text.trim_end().strip_prefix("OK ").and_then(|number| number.parse::<u32>().ok());
    number.map(|_| stream).ok_or_else(|| io::Error::other(format!("answer to CONNECT: {text:?}")))
}

/// Sends `data`, then its end, while it reads what comes back to the end.
pub fn exchange(stream: &UnixStream, data: &[u8]) -> io::Result<Vec<u8>> {
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut half: &UnixStream = stream;
            half.write_all(data)?;
            half.shutdown(std::net::Shutdown::Write)
        });
        let mut back = Vec::new();
        let mut half: &UnixStream = stream;
        let read = half.read_to_end(&mut back);
        writer.join().expect("the writer does not panic")?;
        read.map(|_| back)
    })
}

/// Reads one line.
pub fn read_line(stream: &UnixStream) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line)
}
