//! What a sandbox has joined in its network namespace: for each interface a tap beside it, and a
//! redirect each way. Lives on the thread that is in the namespace.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use rtnetlink::LinkUnspec;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::LinkMessage;
use spore_agent_api::network::MAX_SLOTS;

use super::error::NetworkError;
use super::links::{self, Link, Use};
use super::mirror::{Counters, Mirror};
use super::names;
use super::netlink::{Netlink, Refusal};
use super::read::{self, Found, Refused};
use super::redirect::{self, Ingress, Kinds};
use super::routes;
use super::tap::{self, Tap};
use super::upstream::{self, Ports};

/// How often a configuration that changes under the reader is read again.
const READINGS: usize = 5;

#[derive(Debug)]
struct Joined {
    slot: u8,
    index: u32,
    name: String,
    tap: u32,
    mtu: u32,
    /// The name server's own questions are answered.
    answered: bool,
}

/// An interface that has just been joined.
#[derive(Debug)]
pub(crate) struct New {
    pub(crate) slot: u8,
    pub(crate) name: String,
    pub(crate) tap: OwnedFd,
}

/// What looking at the namespace has come to.
#[derive(Debug, Default)]
pub(crate) struct Looked {
    pub(crate) joined: Vec<New>,
    /// Slots whose interfaces have gone, and their taps with them.
    pub(crate) left: Vec<u8>,
    /// What the guest shall have; none when it could not be read, and then nothing new is joined.
    pub(crate) mirror: Option<Mirror>,
    /// What failed, or cannot be joined or mirrored. The rest is.
    pub(crate) refused: Vec<NetworkError>,
}

pub(super) struct Desk {
    pub(super) netlink: Netlink,
    joined: Vec<Joined>,
    /// The container has a user namespace, in which it sees no interface of the guest's.
    refuse_all: bool,
    kinds: Kinds,
    /// While there is a name server.
    ports: Option<Ports>,
}

fn refused(name: &str) -> impl FnOnce(redirect::Failure) -> NetworkError {
    let name = name.to_owned();
    move |failure| {
        let mend = redirect::mend(&failure);
        let (operation, refusal) = failure;
        NetworkError::Redirect { name, operation, refusal, mend }
    }
}

fn failed(operation: &'static str) -> impl FnOnce(Refusal) -> NetworkError {
    move |refusal| NetworkError::Netlink { operation, refusal }
}

impl Desk {
    pub(super) fn new(netlink: Netlink, refuse_all: bool) -> Self {
        Self { netlink, joined: Vec::new(), refuse_all, kinds: Kinds::default(), ports: None }
    }

    #[cfg(test)]
    pub(super) fn with_kinds(self, kinds: Kinds) -> Self {
        Self { kinds, ..self }
    }

    /// Joins what has come, leaves what has gone, and reads what the guest shall have.
    pub(super) async fn look(&mut self) -> Result<Looked, NetworkError> {
        let mut looked = Looked::default();
        let (links, addresses) = self.links(&mut looked.refused).await?;
        let addressed =
            |link: &Link| addresses.iter().any(|found| found.index == link.index && found.is_given());
        // One that is set down stays joined.
        let stays = |joined: &Joined| links.iter().any(|link| link.index == joined.index);
        let (kept, gone) = std::mem::take(&mut self.joined).into_iter().partition(stays);
        self.joined = kept;
        for joined in gone {
            looked.left.push(joined.slot);
            looked.refused.extend(self.take_apart(&joined).await.err());
        }
        for link in &links {
            if let Some(joined) = self.joined.iter_mut().find(|joined| joined.index == link.index) {
                joined.name.clone_from(&link.name);
                if joined.mtu != link.mtu {
                    joined.mtu = link.mtu;
                    let tap = LinkUnspec::new_with_index(joined.tap).mtu(link.mtu).build();
                    let set = set(&self.netlink, tap).await.map_err(failed("set the MTU of a tap"));
                    looked.refused.extend(set.err());
                }
                continue;
            }
            match link.use_of(addressed(link)) {
                Use::Ignore => {}
                Use::Refuse(kind) => {
                    looked.refused.push(NetworkError::Kind { name: link.name.clone(), kind });
                }
                Use::Join => match self.join(link, &links).await {
                    Ok(new) => looked.joined.push(new),
                    Err(error) => looked.refused.push(error),
                },
            }
        }
        let name_server = !self.joined.is_empty() && names::is_there();
        looked.refused.extend(self.answer(name_server).await);
        match self.mirror(&links, &addresses, &mut looked.refused).await {
            Ok(mirror) => looked.mirror = Some(Mirror { name_server, ..mirror }),
            Err(error) => {
                let new: Vec<_> = looked.joined.drain(..).map(|new| new.slot).collect();
                let left = self.leave(&new).await;
                looked.refused.extend([error].into_iter().chain(left.err()));
            }
        }
        Ok(looked)
    }

    /// Lets a name server in the namespace get answers from others, or stops that with it.
    async fn answer(&mut self, name_server: bool) -> Vec<NetworkError> {
        let mut problems = Vec::new();
        match (name_server, &self.ports) {
            (true, None) => match Ports::reserve() {
                Ok(ports) => self.ports = Some(ports),
                Err(source) => {
                    let operation = "reserve ports for its name server (net.ipv4.ip_local_port_range)";
                    problems.push(NetworkError::Namespace { operation, source });
                }
            },
            (false, Some(_)) => self.ports = None,
            _ => {}
        }
        for joined in self.joined.iter_mut().filter(|joined| joined.answered != name_server) {
            let (link, tap) = (joined.index, joined.tap);
            let done = match name_server {
                true => upstream::let_through(&self.netlink, link, tap).await.map_err(refused(&joined.name)),
                false => upstream::keep_back(&self.netlink, link)
                    .await
                    .map_err(failed("take the name server's filters away")),
            };
            match done {
                Ok(()) => joined.answered = name_server,
                Err(error) => problems.push(error),
            }
        }
        problems
    }

    /// Links and addresses that fit together.
    async fn links(&self, refused: &mut Refused) -> Result<(Vec<Link>, Vec<Found>), NetworkError> {
        for reading in 1.. {
            let links = links::list(&self.netlink).await.map_err(failed("list its interfaces"))?;
            let addresses = read::addresses(&self.netlink).await?;
            let unreadable = links::unreadable(&links);
            let strangers = addresses.iter().any(|found| links.iter().all(|link| link.index != found.index));
            if (unreadable.is_none() && !strangers) || reading == READINGS {
                refused.extend(unreadable);
                return Ok((links, addresses));
            }
        }
        Ok(Default::default())
    }

    async fn mirror(
        &self,
        links: &[Link],
        addresses: &[Found],
        refused: &mut Refused,
    ) -> Result<Mirror, NetworkError> {
        let slots: Vec<_> = self.joined.iter().map(|joined| (joined.index, joined.slot)).collect();
        if slots.is_empty() {
            return Ok(Mirror::default());
        }
        let links: Vec<_> = links.iter().collect();
        let mut interfaces = read::interfaces(&links, &slots, addresses, refused)?;
        interfaces.sort_by_key(|interface| interface.slot);
        read::neighbours(&self.netlink, &slots, &mut interfaces).await?;
        read::sysctls(&mut interfaces);
        let mut found = routes::routes(&self.netlink, &slots, refused).await?;
        read::imply_prefix_routes(&mut interfaces, &mut found);
        let rules = routes::rules(&self.netlink, refused).await?;
        Ok(Mirror { interfaces, routes: found, rules, name_server: false })
    }

    async fn join(&mut self, link: &Link, links: &[Link]) -> Result<New, NetworkError> {
        let name = link.name.clone();
        if self.refuse_all {
            return Err(NetworkError::UserNamespace { name });
        }
        if !link.is_nameable() {
            return Err(NetworkError::Name { name });
        }
        let free = |slot: &u8| self.joined.iter().all(|joined| joined.slot != *slot);
        let Some(slot) = (0..MAX_SLOTS).find(free) else {
            return Err(NetworkError::NoSlot { name, max: MAX_SLOTS.into() });
        };
        self.free_ingress(link, links).await?;
        let tap = tap::open().map_err(|(operation, source)| NetworkError::Tap {
            name: name.clone(),
            operation,
            mend: if source.raw_os_error() == Some(Errno::ENOENT as i32) { "; modprobe tun" } else { "" },
            source,
        })?;
        // From here on nothing is left of the tap when its descriptor is dropped.
        self.connect(link, &tap).await.map_err(refused(&name))?;
        self.joined.push(Joined {
            slot,
            index: link.index,
            name: name.clone(),
            tap: tap.index,
            mtu: link.mtu,
            answered: false,
        });
        Ok(New { slot, name, tap: tap.fd })
    }

    /// Sees to it that nobody has the link's ingress side; what a killed shim has left is removed.
    async fn free_ingress(&self, link: &Link, links: &[Link]) -> Result<(), NetworkError> {
        let name = link.name.clone();
        let ingress = redirect::examine(&self.netlink, link.index);
        match ingress.await.map_err(failed("look at its queueing disciplines"))? {
            Ingress::Free => Ok(()),
            Ingress::Redirects(targets) => {
                let present = |target: &&Link| targets.contains(&target.index);
                let present: Vec<_> = links.iter().filter(present).collect();
                if present.is_empty() {
                    let removed = redirect::remove(&self.netlink, link.index).await;
                    return removed
                        .map_err(failed("remove the redirect of a virtual machine that has ended"));
                }
                match present.iter().any(|target| target.is_tap_of_ours) {
                    true => Err(NetworkError::Taken { name }),
                    false => Err(NetworkError::Filtered { name }),
                }
            }
            Ingress::Others => Err(NetworkError::Filtered { name }),
        }
    }

    /// Sets the tap up beside the link, and redirects both ways. The link comes last, so that what
    /// it receives goes to the host or to the guest, but never astray.
    async fn connect(&self, link: &Link, tap: &Tap) -> Result<(), redirect::Failure> {
        keep_quiet(&tap.name);
        let shape = LinkUnspec::new_with_index(tap.index).mtu(link.mtu).up().build();
        set(&self.netlink, shape).await.map_err(|refusal| ("set up the tap with its MTU", refusal))?;
        redirect::make(&self.netlink, tap.index, link.index, self.kinds).await?;
        redirect::make(&self.netlink, link.index, tap.index, self.kinds).await
    }

    /// Gives interfaces back to the host's network stack.
    pub(super) async fn leave(&mut self, slots: &[u8]) -> Result<(), NetworkError> {
        let (gone, kept) =
            std::mem::take(&mut self.joined).into_iter().partition(|joined| slots.contains(&joined.slot));
        self.joined = kept;
        if self.joined.is_empty() {
            self.ports = None;
        }
        let mut outcome = Ok(());
        for joined in gone {
            let apart = self.take_apart(&joined).await;
            outcome = outcome.and(apart);
        }
        outcome
    }

    pub(super) async fn leave_all(&mut self) -> Result<(), NetworkError> {
        let slots: Vec<_> = self.joined.iter().map(|joined| joined.slot).collect();
        self.leave(&slots).await
    }

    /// The tap's interface goes now, whoever still has its descriptor.
    async fn take_apart(&self, joined: &Joined) -> Result<(), NetworkError> {
        let removed = redirect::remove(&self.netlink, joined.index).await;
        let mut tap = LinkMessage::default();
        tap.header.index = joined.tap;
        let deleted = match self.netlink.request(RouteNetlinkMessage::DelLink(tap), 0).await {
            Err(Refusal { errno: Errno::ENODEV, .. }) => Ok(()),
            other => other,
        };
        removed.map_err(failed("remove a redirect"))?;
        deleted.map_err(failed("remove a tap"))
    }

    /// Counters of the joined interfaces.
    pub(super) async fn counters(&self) -> Result<Vec<Counters>, NetworkError> {
        let links = links::list(&self.netlink).await.map_err(failed("list its interfaces"))?;
        let joined = |link: &Link| self.joined.iter().any(|joined| joined.index == link.index);
        Ok(links.into_iter().filter(joined).map(|link| link.counters).collect())
    }
}

async fn set(netlink: &Netlink, message: LinkMessage) -> Result<(), Refusal> {
    netlink.request(RouteNetlinkMessage::SetLink(message), 0).await
}

/// Lets the host's stack send nothing of its own into the guest: no router solicitation, no
/// multicast listener report. A kernel without IPv6 sends none.
fn keep_quiet(tap: &str) {
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{tap}/disable_ipv6"), "1");
}
