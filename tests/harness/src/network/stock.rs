//! What there is in a network namespace, a line each: interfaces with their kinds (a tap's is "tun"),
//! queueing disciplines, and filters of what comes in. Read by rtnetlink(7), for it is compared
//! before and after every container.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

use super::space::within;

// linux/rtnetlink.h and linux/netlink.h
const GET_LINK: u16 = 18;
const GET_DISCIPLINE: u16 = 38;
const GET_FILTER: u16 = 46;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST_DUMP: u16 = 0x301;
const HEADER: usize = 16;
/// struct ifinfomsg, struct tcmsg.
const LINK: usize = 16;
const TRAFFIC: usize = 20;
// linux/if_link.h
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const TCA_KIND: u16 = 1;
/// `ffff:fff2`: the ingress side of an ingress or clsact discipline (linux/pkt_sched.h).
const INGRESS: u32 = 0xffff_fff2;
/// Beyond what the kernel puts into one message of a dump.
const MESSAGE: usize = 64 * 1024;

/// What is in a namespace. Lines are sorted; what there is twice has two lines.
pub fn stock(namespace: &Path) -> Result<Vec<String>> {
    within(namespace, || {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)
            .context("socket")?;
        let (mut names, mut lines) = (BTreeMap::new(), Vec::new());
        for link in dump(&socket, GET_LINK, &[0; LINK])? {
            let name = attribute(&link[LINK..], IFLA_IFNAME).map(text).unwrap_or_default();
            let kind = attribute(&link[LINK..], IFLA_LINKINFO);
            let kind = kind.and_then(|info| attribute(info, IFLA_INFO_KIND)).map(text);
            lines.push(format!("interface {name} ({})", kind.unwrap_or_else(|| "no kind".into())));
            names.insert(index(&link), name);
        }
        let kind = |message: &[u8]| attribute(&message[TRAFFIC..], TCA_KIND).map(text).unwrap_or_default();
        let no_name = String::new();
        for discipline in dump(&socket, GET_DISCIPLINE, &[0; TRAFFIC])? {
            let name = names.get(&index(&discipline)).unwrap_or(&no_name);
            lines.push(format!("queueing discipline {} of {name}", kind(&discipline)));
        }
        for (index, name) in &names {
            let mut request = [0; TRAFFIC];
            request[4..8].copy_from_slice(&index.to_ne_bytes());
            request[12..16].copy_from_slice(&INGRESS.to_ne_bytes());
            for filter in dump(&socket, GET_FILTER, &request)? {
                lines.push(format!("filter {} of {name}", kind(&filter)));
            }
        }
        lines.sort();
        Ok(lines)
    })
}

/// All namespaces that a process is in, or that are mounted somewhere, by inode.
pub fn namespaces() -> Result<BTreeMap<u64, PathBuf>> {
    let mut found = BTreeMap::new();
    let processes = fs::read_dir("/proc")?.flatten().map(|entry| entry.path().join("ns/net"));
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mounted = mounts.lines().filter_map(|line| {
        // Fields: id, parent, device, root, mount point.
        let fields: Vec<_> = line.split(' ').collect();
        fields.get(3).filter(|root| root.starts_with("net:["))?;
        fields.get(4).map(PathBuf::from)
    });
    for path in processes.chain(mounted) {
        // Of a process that has just ended there is none.
        if let Ok(namespace) = fs::metadata(&path) {
            found.entry(namespace.ino()).or_insert(path);
        }
    }
    Ok(found)
}

/// What is in all of them, and that they are there.
pub fn everywhere() -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (inode, path) in namespaces()? {
        lines.push(format!("network namespace {inode}"));
        // One that has just ended has nothing.
        let found = stock(&path).unwrap_or_default();
        lines.extend(found.iter().map(|line| format!("{line} in network namespace {inode}")));
    }
    Ok(lines)
}

fn number(message: &[u8], at: usize) -> i32 {
    message.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, i32::from_ne_bytes)
}

/// Number of the link that a message is about.
fn index(message: &[u8]) -> i32 {
    number(message, 4)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

/// struct rtattr: length with these 4 bytes, type; the next begins at a multiple of 4.
fn attribute(mut rest: &[u8], wanted: u16) -> Option<&[u8]> {
    while let [a, b, c, d, ..] = *rest {
        let (length, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        let value = rest.get(4..length)?;
        // The highest bits are flags.
        if kind & 0x3fff == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

/// Asks for all of a kind; what follows each answer's header.
fn dump(socket: &OwnedFd, kind: u16, body: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut request = u32::try_from(HEADER + body.len())?.to_ne_bytes().to_vec();
    request.extend(kind.to_ne_bytes());
    request.extend(REQUEST_DUMP.to_ne_bytes());
    request.extend([0; 8]);
    request.extend(body);
    sendto(socket.as_raw_fd(), &request, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let (mut found, mut buffer) = (Vec::new(), vec![0; MESSAGE]);
    loop {
        let count = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..count];
        while let [a, b, c, d, e, f, ..] = *rest {
            let length = usize::try_from(u32::from_ne_bytes([a, b, c, d]))?;
            let message = rest.get(HEADER..length).context("a message of netlink's is cut")?;
            match u16::from_ne_bytes([e, f]) {
                DONE => return Ok(found),
                ERROR => match -number(message, 0) {
                    // The link has gone since, or its discipline takes no filters.
                    0 | libc::ENODEV | libc::EINVAL | libc::EOPNOTSUPP => return Ok(found),
                    error => bail!("netlink: {}", std::io::Error::from_raw_os_error(error)),
                },
                _ => found.push(message.to_vec()),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use super::{namespaces, stock};
    use crate::network::space::Space;

    #[test]
    fn interfaces_disciplines_and_filters_are_seen_where_they_are() {
        let space = Space::new("spore-stock-test").unwrap();
        assert!(stock(&space.path()).unwrap().contains(&"interface lo (no kind)".to_owned()));
        assert!(namespaces().unwrap().values().any(|path| *path == space.path()));
        space.ip("link add one type veth peer name two").unwrap();
        space.ip("tuntap add tap7 mode tap").unwrap();
        let tc = |line: &str| {
            let status = space.command("tc").args(line.split(' ')).status().unwrap();
            assert!(status.success(), "tc {line}");
        };
        tc("qdisc add dev one ingress");
        tc("filter add dev one ingress protocol all u32 match u32 0 0 action mirred egress redirect dev two");
        let found = stock(&space.path()).unwrap();
        for line in [
            "interface one (veth)",
            "interface tap7 (tun)",
            "interface two (veth)",
            "queueing discipline ingress of one",
            "filter u32 of one",
        ] {
            assert!(found.iter().any(|found| found == line), "{line:?} is not in {found:?}");
        }
        assert!(!found.iter().any(|line| line.contains("filter u32 of two")), "{found:?}");
        tc("qdisc del dev one ingress");
        let left = stock(&space.path()).unwrap();
        assert!(!left.iter().any(|line| line.contains("ingress") || line.contains("filter")), "{left:?}");
        assert!(stock(Path::new("/run/netns/no-such")).is_err());
    }
}
