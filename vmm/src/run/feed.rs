//! What was typed, on its way to the guest's console.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, PipeWriter, Write};
use std::os::fd::{AsFd, BorrowedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// Most bytes that wait for a guest that does not read; more are dropped.
const MAX_WAITING: usize = 64 * 1024;

/// The writing end of the console's pipe. It never blocks: a guest that does not read must not
/// take the escape key from its user.
#[derive(Debug)]
pub(super) struct Feed {
    pipe: Option<PipeWriter>,
    waiting: VecDeque<u8>,
    /// No more is to come; the pipe closes when all is through.
    closing: bool,
}

impl Feed {
    pub(super) fn new(pipe: PipeWriter) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&pipe, FcntlArg::F_GETFL)?);
        fcntl(&pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { pipe: Some(pipe), waiting: VecDeque::new(), closing: false })
    }

    /// No console.
    pub(super) fn closed() -> Self {
        Self { pipe: None, waiting: VecDeque::new(), closing: true }
    }

    /// Passes bytes to the guest, as far as there is room for them.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        let room = MAX_WAITING - self.waiting.len();
        self.waiting.extend(bytes.iter().take(room));
        self.flush();
    }

    /// Writes what the pipe takes now.
    pub(super) fn flush(&mut self) {
        while let Some(pipe) = &mut self.pipe {
            let (front, _) = self.waiting.as_slices();
            if front.is_empty() {
                if self.closing {
                    self.pipe = None;
                }
                return;
            }
            match pipe.write(front) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                // Nobody reads it any more.
                Err(_) => self.pipe = None,
            }
        }
        self.waiting.clear();
    }

    /// What was typed has ended; the guest sees that after the last byte.
    pub(super) fn close(&mut self) {
        self.closing = true;
        self.flush();
    }

    /// The pipe, while something waits for room in it.
    pub(super) fn waits(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().filter(|_| !self.waiting.is_empty()).map(AsFd::as_fd)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_guest_that_does_not_read_blocks_nobody_and_gets_the_rest_later() {
        let (mut reader, writer) = io::pipe().unwrap();
        let pipe = usize::try_from(fcntl(&writer, FcntlArg::F_GETPIPE_SZ).unwrap()).unwrap();
        let mut feed = Feed::new(writer).unwrap();
        let typed: Vec<u8> = (0..=250).cycle().take(pipe + MAX_WAITING + 1000).collect();
        for piece in typed.chunks(1000) {
            feed.push(piece);
        }
        assert!(feed.waits().is_some());
        feed.close();
        let (mut seen, mut chunk) = (Vec::<u8>::new(), [0; 4096]);
        // While something waits the pipe is full, so this never waits itself.
        loop {
            match reader.read(&mut chunk).unwrap() {
                0 => break,
                count => seen.extend(&chunk[..count]),
            }
            feed.flush();
        }
        assert!(feed.waits().is_none());
        assert!((MAX_WAITING..typed.len()).contains(&seen.len()), "{} bytes", seen.len());
        assert!(seen == typed[..seen.len()]);
    }

    #[test]
    fn a_reader_that_is_gone_ends_it() {
        let (reader, writer) = io::pipe().unwrap();
        let mut feed = Feed::new(writer).unwrap();
        drop(reader);
        feed.push(b"lost");
        assert!(feed.waits().is_none() && feed.pipe.is_none());
        feed.push(b"lost as well");
        assert!(feed.waiting.is_empty());
    }
}
