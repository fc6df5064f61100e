//! Whether this host can join interfaces, tried in a network namespace of its own: for
//! `spore doctor`.

use std::io;
use std::time::Duration;

use rtnetlink::LinkUnspec;
use rtnetlink::packet_route::RouteNetlinkMessage;

use super::error::NetworkError;
use super::netlink::Netlink;
use super::redirect::{self, Kinds};
use super::{tap, within};

const DEADLINE: Duration = Duration::from_secs(5);
const AS_ROOT: &str = "run spore as root; containerd does";

/// What does not work, and what helps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lack {
    pub found: String,
    pub mend: String,
}

/// Makes a tap.
pub fn taps() -> Result<String, Lack> {
    let made = within(None, "try it", DEADLINE, || async { Ok(tap::open().map(drop)) });
    match made.map_err(unfit)? {
        Ok(()) => Ok(format!("{}: a tap can be made", tap::DEVICE)),
        Err((operation, error)) => Err(Lack {
            found: format!("{}: {operation}: {error}", tap::DEVICE),
            mend: match error.kind() {
                io::ErrorKind::NotFound => "modprobe tun",
                io::ErrorKind::PermissionDenied => AS_ROOT,
                _ => "a kernel with CONFIG_TUN",
            }
            .into(),
        }),
    }
}

/// Redirects between two taps.
pub fn redirects() -> Result<String, Lack> {
    redirects_by(Kinds::default())
}

pub(super) fn redirects_by(kinds: Kinds) -> Result<String, Lack> {
    let made = within(None, "try it", DEADLINE, move || async move {
        let netlink = Netlink::open()
            .map_err(|source| NetworkError::Namespace { operation: "open netlink sockets", source })?;
        let (Ok(one), Ok(other)) = (tap::open(), tap::open()) else { return Ok(None) };
        for tap in [&one, &other] {
            let up = LinkUnspec::new_with_index(tap.index).up().build();
            let _ = netlink.request(RouteNetlinkMessage::SetLink(up), 0).await;
        }
        Ok(Some(redirect::make(&netlink, one.index, other.index, kinds).await))
    });
    match made.map_err(unfit)? {
        Some(Ok(())) => Ok("tc redirects: ingress, u32, mirred".into()),
        Some(Err(failure)) => {
            let mend = match redirect::lacking(&failure) {
                Some(modules) => format!("modprobe {modules}"),
                None => AS_ROOT.into(),
            };
            Err(Lack { found: format!("{}: {}", failure.0, failure.1), mend })
        }
        None => Err(Lack { found: "cannot be tried without taps".into(), mend: "modprobe tun".into() }),
    }
}

fn unfit(error: NetworkError) -> Lack {
    Lack { found: error.to_string(), mend: AS_ROOT.into() }
}
