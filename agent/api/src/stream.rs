//! The opening of a stdio stream.
//!
//! The shim connects to [`crate::STDIO_PORT`], sends one [`Hello`], and the agent answers
//! one byte: 0 (attached) or the refusal's code, after which it closes. From then on the
//! connection is the stream itself: for stdin shim → guest, for stdout and stderr
//! guest → shim, and both ways for a terminal's one stream (sent as `Stdin` kind). Closing a direction
//! (`shutdown(2)`, VIRTIO_VSOCK_SHUTDOWN) is end of file in that direction. The agent
//! closes an output stream when every writer in the guest has closed its end and every
//! byte has been delivered.
//!
//! [`Kind::Changes`] is of a container, not of a process: the archive of its changes
//! ([`crate::changes`]), which the guest ends; [`UNCHANGED`] answers when there are none.
//!
//! Wire form, little-endian: magic `SPIO` · version u8 (1) · kind u8 · id length u16 ·
//! exec id length u16 · id · exec id.

use std::io;

/// Container and exec ids are at most this long, in bytes.
pub const MAX_ID: usize = 128;
const MAGIC: [u8; 4] = *b"SPIO";
const VERSION: u8 = 1;
/// Bytes before the ids.
pub const HEADER_LEN: usize = 10;

/// The agent's one-byte answers.
pub const ATTACHED: u8 = 0;
pub const REFUSED_NO_SUCH_PROCESS: u8 = 1;
pub const REFUSED_NO_SUCH_STREAM: u8 = 2;
pub const REFUSED_ALREADY_ATTACHED: u8 = 3;
pub const REFUSED_MALFORMED: u8 = 4;
/// Not a refusal: nothing was written, and nothing follows.
pub const UNCHANGED: u8 = 5;

/// Which stream of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Stdin = 0,
    Stdout = 1,
    Stderr = 2,
    Changes = 3,
}

/// Names a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    pub kind: Kind,
    pub id: String,
    /// Empty for the container's init process.
    pub exec_id: String,
}

/// Why bytes are not a hello.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HelloError {
    #[error("stdio stream: bad magic {0:02x?}, expected \"SPIO\"")]
    Magic([u8; 4]),
    #[error("stdio stream: version {0} is not known, this build speaks version {VERSION}")]
    Version(u8),
    #[error("stdio stream: unknown kind {0}, expected 0 to 3")]
    Kind(u8),
    #[error("stdio stream: id of {0} bytes, at most {MAX_ID} are allowed")]
    IdTooLong(usize),
    #[error("stdio stream: id is not UTF-8")]
    NotUtf8,
    #[error("stdio stream: {got} bytes where {need} are needed")]
    Truncated { got: usize, need: usize },
}

impl From<HelloError> for io::Error {
    fn from(error: HelloError) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }
}

impl Hello {
    /// The wire form.
    pub fn encode(&self) -> Result<Vec<u8>, HelloError> {
        let mut out = Vec::with_capacity(HEADER_LEN + self.id.len() + self.exec_id.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, self.kind as u8]);
        for id in [&self.id, &self.exec_id] {
            let length = u16::try_from(id.len()).ok().filter(|_| id.len() <= MAX_ID);
            out.extend_from_slice(&length.ok_or(HelloError::IdTooLong(id.len()))?.to_le_bytes());
        }
        out.extend_from_slice(self.id.as_bytes());
        out.extend_from_slice(self.exec_id.as_bytes());
        Ok(out)
    }

    /// Checks a header of [`HEADER_LEN`] bytes and returns how many bytes of ids follow,
    /// at most 2 × [`MAX_ID`].
    pub fn body_len(header: &[u8; HEADER_LEN]) -> Result<usize, HelloError> {
        let magic = [header[0], header[1], header[2], header[3]];
        if magic != MAGIC {
            return Err(HelloError::Magic(magic));
        }
        if header[4] != VERSION {
            return Err(HelloError::Version(header[4]));
        }
        Kind::try_from(header[5])?;
        let mut total = 0;
        for at in [6, 8] {
            let length = usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
            if length > MAX_ID {
                return Err(HelloError::IdTooLong(length));
            }
            total += length;
        }
        Ok(total)
    }

    /// Decodes a header and the body whose length [`Hello::body_len`] gave.
    pub fn decode(header: &[u8; HEADER_LEN], body: &[u8]) -> Result<Self, HelloError> {
        let need = Self::body_len(header)?;
        if body.len() != need {
            return Err(HelloError::Truncated { got: body.len(), need });
        }
        let split = usize::from(u16::from_le_bytes([header[6], header[7]]));
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| HelloError::NotUtf8);
        Ok(Self {
            kind: Kind::try_from(header[5])?,
            id: text(&body[..split])?,
            exec_id: text(&body[split..])?,
        })
    }
}

impl TryFrom<u8> for Kind {
    type Error = HelloError;

    fn try_from(value: u8) -> Result<Self, HelloError> {
        match value {
            0 => Ok(Self::Stdin),
            1 => Ok(Self::Stdout),
            2 => Ok(Self::Stderr),
            3 => Ok(Self::Changes),
            other => Err(HelloError::Kind(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hello_survives_the_wire() {
        let hello = Hello { kind: Kind::Stderr, id: "web".into(), exec_id: "sh1".into() };
        let wire = hello.encode().unwrap();
        let header: &[u8; HEADER_LEN] = wire[..HEADER_LEN].try_into().unwrap();
        assert_eq!(Hello::body_len(header).unwrap(), 6);
        assert_eq!(Hello::decode(header, &wire[HEADER_LEN..]).unwrap(), hello);
    }

    #[test]
    fn an_id_beyond_the_cap_is_refused_before_it_is_read() {
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(b"SPIO");
        header[4] = 1;
        header[6..8].copy_from_slice(&129u16.to_le_bytes());
        assert_eq!(Hello::body_len(&header), Err(HelloError::IdTooLong(129)));
        let hello = Hello { kind: Kind::Stdin, id: "x".repeat(129), exec_id: String::new() };
        assert_eq!(hello.encode(), Err(HelloError::IdTooLong(129)));
    }
}
