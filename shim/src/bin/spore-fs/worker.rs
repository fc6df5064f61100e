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

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use proptest::prelude::*;

    use super::*;

    /// Opcodes of FUSE that there are, and some that there are not.
    const OPCODES: std::ops::Range<u32> = 0..60;

    fn service(export: &std::path::Path) -> Service {
        let tree = Tree::new("/proc/self/fd");
        tree.export(0, OwnedFd::from(File::open(export).unwrap())).unwrap();
        Service::new(Arc::new(tree), File::options().write(true).open("/dev/null").unwrap())
    }

    fn message(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(IN_HEADER + body.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(opcode.to_ne_bytes());
        bytes.extend(unique.to_ne_bytes());
        bytes.extend(node.to_ne_bytes());
        bytes.resize(IN_HEADER, 0);
        bytes.extend(body);
        bytes
    }

    fn body() -> impl Strategy<Value = Vec<u8>> {
        let name = prop_oneof![
            Just(b"file\0".to_vec()),
            Just(b"0\0".to_vec()),
            Just(b"../outside\0".to_vec()),
            Just(b"/etc/passwd\0".to_vec()),
            Just(b"..\0".to_vec()),
            Just(Vec::new()),
        ];
        let numbers =
            proptest::collection::vec(prop_oneof![Just(0u64), 0..5u64, Just(1 << 32), any::<u64>()], 0..12);
        (numbers, name.clone(), name).prop_map(|(numbers, one, other)| {
            let numbers = numbers.into_iter().flat_map(u64::to_ne_bytes);
            numbers.chain(one).chain(other).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        #[test]
        fn whatever_a_guest_asks_gets_one_answer_and_nothing_outside_is_touched(
            asked in proptest::collection::vec((OPCODES, prop_oneof![0..4u64, Just((1 << 32) + 1)], body()), 1..40)
        ) {
            let dir = tempfile::tempdir().unwrap();
            let export = dir.path().join("export");
            std::fs::create_dir(&export).unwrap();
            std::fs::write(export.join("file"), b"content").unwrap();
            std::fs::write(dir.path().join("outside"), b"secret").unwrap();
            let service = service(&export);
            let mut reply = vec![0; MAX_MESSAGE];
            for (unique, (opcode, node, body)) in (1u64..).zip(asked) {
                let mut request = message(opcode, unique, node, &body);
                let length = service.answer(&mut request, &mut reply);
                prop_assert!(length >= OUT_HEADER, "opcode {opcode}: {length} bytes");
                let said = u32::from_ne_bytes(reply[..4].try_into().unwrap()) as usize;
                prop_assert_eq!(said, length, "opcode {}", opcode);
                prop_assert_eq!(&reply[8..16], &unique.to_ne_bytes()[..], "opcode {}", opcode);
                let shown = reply[..length].windows(6).any(|part| part == b"secret");
                prop_assert!(!shown, "opcode {opcode}: what is outside");
            }
            prop_assert_eq!(std::fs::read(dir.path().join("outside")).unwrap(), b"secret");
            prop_assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
        }
    }
}
