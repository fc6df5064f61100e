//! rtnetlink's connection, with errors that carry the kernel's number and its words.

use std::fmt;
use std::io;

use futures::StreamExt;
use nix::errno::Errno;
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::AsyncSocket;

/// Of linux/netlink.h: the header that an error repeats, and what follows it.
const HEADER: usize = 16;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// What the kernel answers to what it does not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub errno: Errno,
    /// Its own words, if it has some.
    pub words: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.errno.desc())?;
        if self.words.is_empty() { Ok(()) } else { write!(f, " ({})", self.words) }
    }
}

impl Refusal {
    fn of(message: &ErrorMessage) -> Self {
        let code = message.code.map_or(0, |code| code.get().saturating_abs());
        Self { errno: Errno::from_raw(code), words: words(&message.header).unwrap_or_default() }
    }

    fn lost() -> Self {
        Self { errno: Errno::ECONNRESET, words: "the netlink socket has closed".into() }
    }
}

/// The text among the attributes behind the repeated header.
fn words(error: &[u8]) -> Option<String> {
    let mut rest = error.get(HEADER..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes([*rest.first()?, *rest.get(1)?]));
        let kind = u16::from_ne_bytes([*rest.get(2)?, *rest.get(3)?]);
        let value = rest.get(4..length)?;
        if kind == NLMSGERR_ATTR_MSG {
            let text = String::from_utf8_lossy(value);
            return Some(text.trim_end_matches(['\0', '.']).to_owned());
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

/// A netlink socket of the network namespace in which it was opened.
#[derive(Debug, Clone)]
pub struct Netlink(Handle);

impl Netlink {
    /// Opens a socket in the calling thread's network namespace, within an async runtime.
    pub fn open() -> io::Result<Self> {
        let (mut connection, handle, _) = rtnetlink::new_connection()?;
        let socket = connection.socket_mut().socket_mut();
        // Words are a courtesy of newer kernels.
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_cap_ack(true);
        // Without them an answer and a closed socket look the same.
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    /// Sends a request and waits for the kernel's verdict.
    pub async fn request(&self, message: RouteNetlinkMessage, flags: u16) -> Result<(), Refusal> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut answers = self.0.clone().request(message).map_err(|_| Refusal::lost())?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload {
                return match error.code {
                    None => Ok(()),
                    Some(_) => Err(Refusal::of(&error)),
                };
            }
        }
        Err(Refusal::lost())
    }

    /// Asks for all objects of a kind.
    pub async fn dump(&self, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Refusal> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut answers = self.0.clone().request(message).map_err(|_| Refusal::lost())?;
        let mut found = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(object) => found.push(object),
                NetlinkPayload::Error(error) => return Err(Refusal::of(&error)),
                NetlinkPayload::Done(done) if done.code == 0 => return Ok(found),
                NetlinkPayload::Done(done) => {
                    let errno = Errno::from_raw(done.code.saturating_abs());
                    return Err(Refusal { errno, words: String::new() });
                }
                _ => {}
            }
        }
        Err(Refusal::lost())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_found_and_nonsense_gives_none() {
        let mut error = vec![0; HEADER];
        error.extend([8, 0, 2, 0, 1, 2, 3, 4]);
        error.extend([11, 0, 1, 0]);
        error.extend(b"no way\0");
        assert_eq!(words(&error).unwrap(), "no way");
        for length in 0..error.len() - 1 {
            assert_eq!(words(&error[..length]), None, "{length}");
        }
        assert_eq!(words(&[0; 64]), None);
    }
}
