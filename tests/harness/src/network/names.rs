//! A name server (RFC 1035) that knows one name.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

use super::space::within;

const PORT: u16 = 53;
/// Of the header; the question follows.
const HEADER: usize = 12;
/// Response, recursion desired and available; and the code for a name that does not exist.
const FOUND: [u8; 2] = [0x81, 0x80];
const UNKNOWN: [u8; 2] = [0x81, 0x83];
const TYPE_A: [u8; 2] = [0, 1];

/// See the module. Ends with the value.
pub struct NameServer {
    stop: Arc<AtomicBool>,
    waker: UdpSocket,
    thread: Option<JoinHandle<()>>,
}

impl NameServer {
    /// Serves at an address of a namespace: `name` is at that address too.
    pub fn start(namespace: &Path, address: Ipv4Addr, name: &str) -> Result<Self> {
        let (socket, waker) = within(namespace, || {
            let socket =
                UdpSocket::bind((address, PORT)).with_context(|| format!("binding {address}:{PORT}"))?;
            let waker = UdpSocket::bind((address, 0))?;
            waker.connect(socket.local_addr()?)?;
            Ok((socket, waker))
        })?;
        let stop = Arc::new(AtomicBool::new(false));
        let (over, name) = (Arc::clone(&stop), encoded(name));
        let thread = Some(thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                if let Some(answer) = answer(&buffer[..length], &name, address) {
                    socket.send_to(&answer, from).ok();
                }
            }
        }));
        Ok(Self { stop, waker, thread })
    }

    /// What a resolv.conf says of one at an address.
    pub fn resolv_conf(address: IpAddr) -> String {
        format!("nameserver {address}\n")
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let (Ok(_), Some(thread)) = (self.waker.send(&[0]), self.thread.take()) {
            thread.join().ok();
        }
    }
}

/// Labels with their lengths.
fn encoded(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
        bytes.extend(label.to_ascii_lowercase().as_bytes());
    }
    bytes.push(0);
    bytes
}

fn answer(query: &[u8], known: &[u8], address: Ipv4Addr) -> Option<Vec<u8>> {
    let end = HEADER + query.get(HEADER..)?.iter().position(|byte| *byte == 0)? + 1;
    let (name, question) = (query.get(HEADER..end)?, query.get(HEADER..end + 4)?);
    let is_known = name.eq_ignore_ascii_case(known);
    // An address of another family is not there, but the name is.
    let has_answer = is_known && question.get(end - HEADER..end - HEADER + 2)? == TYPE_A;
    let mut answer = query.get(..2)?.to_vec();
    answer.extend(if is_known { FOUND } else { UNKNOWN });
    answer.extend([0, 1, 0, u8::from(has_answer), 0, 0, 0, 0]);
    answer.extend(question);
    if has_answer {
        // The name as in the question, class IN, for a second, four bytes.
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}

#[cfg(test)]
mod tests {
    use super::{answer, encoded};

    #[test]
    fn one_name_is_known() {
        let query = |name: &str, kind: u8| {
            let mut query = vec![7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
            query.extend(encoded(name));
            query.extend([0, kind, 0, 1]);
            query
        };
        let known = encoded("web.test");
        let ask = |name, kind| answer(&query(name, kind), &known, [10, 0, 0, 1].into()).unwrap_or_default();
        assert!(ask("Web.TEST", 1).ends_with(&[10, 0, 0, 1]));
        assert_eq!(ask("web.test", 28).get(6..8), Some(&[0, 0][..]));
        assert_eq!(ask("other.test", 1).get(3), Some(&0x83));
        assert_eq!(answer(&[0; 12], &known, [10, 0, 0, 1].into()), None);
    }
}
