//! One request socket: a request, its answer, and again. The length in a message's own header
//! is all the framing (the VMM sees to it that it is the true one), and every request gets
//! exactly one answer, so that both sides stay in step.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader};

use crate::tree::Tree;

/// Lengths of `struct fuse_in_header` and `struct fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Longest message either way: 1 MiB of data and its headers.
const MAX_MESSAGE: usize = (1 << 20) + 4096;

/// What every worker serves with.
pub(crate) struct Service {
    server: Server<Arc<Tree>>,
    /// The library's writer insists on a descriptor; answers are taken from its buffer.
    null: File,
}

impl Service {
    /// `null` is a descriptor that takes and forgets everything.
    pub(crate) fn new(tree: Arc<Tree>, null: File) -> Self {
        Self { server: Server::new(tree), null }
    }

    /// Serves until the VMM closes the socket.
    pub(crate) fn run(&self, mut socket: UnixStream) -> io::Result<()> {
        let mut request = vec![0; MAX_MESSAGE];
        let mut reply = vec![0; MAX_MESSAGE];
        while let Some(length) = receive(&mut socket, &mut request)? {
            let length = self.answer(&mut request[..length], &mut reply);
            socket.write_all(&reply[..length])?;
        }
        Ok(())
    }

    /// Answers a request in `reply`; the answer's length.
    fn answer(&self, request: &mut [u8], reply: &mut [u8]) -> usize {
        let mut unique = [0; 8];
        unique.copy_from_slice(&request[8..16]);
        match self.serve(request, reply) {
            Ok(length) if length >= OUT_HEADER => length.min(reply.len()),
            // FORGET and the like, which have no answer but here.
            Ok(_) => bare(reply, unique, 0),
            // What the library cannot decode; the guest alone suffers.
            Err(_) => bare(reply, unique, libc::EIO),
        }
    }

    fn serve(&self, request: &mut [u8], reply: &mut [u8]) -> Result<usize, fuse_backend_rs::Error> {
        let failed = |_| fuse_backend_rs::Error::InvalidHeaderLength;
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(request)).map_err(failed)?;
        let mut writer = FuseDevWriter::<()>::new(self.null.as_raw_fd(), reply).map_err(failed)?;
        // What was split off writes into its buffer only.
        let buffered = writer.split_at(0).map_err(failed)?;
        self.server.handle_message(reader, buffered.into(), None, None)
    }
}

/// The length of the next request; `None` at the end of the stream.
fn receive(socket: &mut UnixStream, request: &mut [u8]) -> io::Result<Option<usize>> {
    let mut filled = 0;
    loop {
        if let Some(prefix) = request[..filled].first_chunk() {
            let length = u32::from_ne_bytes(*prefix) as usize;
            if !(IN_HEADER..=MAX_MESSAGE).contains(&length) || filled > length {
                let detail = format!("a request of {length} bytes, {filled} were sent");
                return Err(io::Error::new(io::ErrorKind::InvalidData, detail));
            }
            if filled == length {
                return Ok(Some(length));
            }
        }
        match socket.read(&mut request[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// An answer that is a header only.
fn bare(reply: &mut [u8], unique: [u8; 8], errno: i32) -> usize {
    reply[..4].copy_from_slice(&16u32.to_ne_bytes());
    reply[4..8].copy_from_slice(&(-errno).to_ne_bytes());
    reply[8..16].copy_from_slice(&unique);
    OUT_HEADER
}
