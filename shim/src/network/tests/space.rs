//! Network namespaces of a test and what it puts into them.

use std::fs::File;
use std::net::IpAddr;

use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteMessage, RouteProtocol, RouteScope};
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use rtnetlink::{LinkUnspec, LinkVeth, RouteMessageBuilder};

use crate::network::desk::{Desk, Looked};
use crate::network::links;
use crate::network::netlink::Netlink;

/// A namespace, which lives as long as this.
pub(super) struct Space {
    pub(super) file: File,
    pub(super) netlink: Netlink,
}

pub(super) fn current() -> File {
    File::open("/proc/thread-self/ns/net").unwrap()
}

fn enter(namespace: &File) {
    setns(namespace, CloneFlags::CLONE_NEWNET).expect("these tests need root");
}

impl Space {
    pub(super) fn new() -> Self {
        let home = current();
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        let space = Self { file: current(), netlink: Netlink::open().unwrap() };
        enter(&home);
        space
    }

    /// Puts the test's thread into the namespace: a desk belongs to a thread that is.
    pub(super) fn enter(&self) {
        enter(&self.file);
    }

    /// Runs something in the namespace.
    pub(super) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                enter(&self.file);
                work()
            });
            inside.join().unwrap()
        })
    }

    pub(super) async fn request(&self, message: RouteNetlinkMessage) {
        self.netlink.request(message, NLM_F_CREATE | NLM_F_EXCL).await.unwrap();
    }

    pub(super) async fn set(&self, message: LinkMessage) {
        self.netlink.request(RouteNetlinkMessage::SetLink(message), 0).await.unwrap();
    }

    /// A veth pair: `name` here, `peer` in the other namespace; both up, with this MTU.
    pub(super) async fn veth(&self, name: &str, other: &Self, peer: &str, mtu: u32) {
        self.request(RouteNetlinkMessage::NewLink(LinkVeth::new(name, "peer-on-its-way").build())).await;
        let fd = std::os::fd::AsRawFd::as_raw_fd(&other.file);
        let mut away = LinkUnspec::new_with_name("peer-on-its-way").build();
        away.attributes.retain(|attribute| !matches!(attribute, LinkAttribute::IfName(_)));
        away.header.index = self.index("peer-on-its-way").await;
        away.attributes.push(LinkAttribute::IfName(peer.into()));
        away.attributes.push(LinkAttribute::NetNsFd(fd));
        self.set(away).await;
        for (space, link) in [(self, name), (other, peer)] {
            space.set(LinkUnspec::new_with_name(link).mtu(mtu).up().build()).await;
        }
    }

    pub(super) async fn delete(&self, name: &str) {
        let mut message = LinkMessage::default();
        message.header.index = self.index(name).await;
        self.netlink.request(RouteNetlinkMessage::DelLink(message), 0).await.unwrap();
    }

    pub(super) async fn index(&self, name: &str) -> u32 {
        self.link(name).await.unwrap().index
    }

    pub(super) async fn link(&self, name: &str) -> Option<links::Link> {
        links::list(&self.netlink).await.unwrap().into_iter().find(|link| link.name == name)
    }

    pub(super) async fn mac(&self, name: &str) -> [u8; 6] {
        self.link(name).await.unwrap().mac.try_into().unwrap()
    }

    pub(super) async fn address(&self, name: &str, address: &str, prefix: u8) {
        self.change_address(name, address, prefix, 0, true).await;
    }

    pub(super) async fn change_address(&self, name: &str, address: &str, prefix: u8, flags: u32, add: bool) {
        let address: IpAddr = address.parse().unwrap();
        let mut message = AddressMessage::default();
        message.header.family = if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
        message.header.prefix_len = prefix;
        message.header.index = self.index(name).await;
        message.header.flags = AddressHeaderFlags::Nodad;
        let flags = AddressFlags::from_bits_retain(flags) | AddressFlags::Nodad;
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
            AddressAttribute::Flags(flags),
        ];
        let message = match add {
            true => RouteNetlinkMessage::NewAddress(message),
            false => RouteNetlinkMessage::DelAddress(message),
        };
        self.netlink.request(message, NLM_F_CREATE | NLM_F_REPLACE).await.unwrap();
    }

    pub(super) async fn route(&self, message: RouteMessage) {
        self.request(RouteNetlinkMessage::NewRoute(message)).await;
    }

    /// Lets a link send 1000 bytes a second, after the first 10 000, and keep what comes meanwhile.
    pub(super) async fn slow(&self, name: &str) {
        // linux/pkt_sched.h: struct tc_tbf_qopt of two struct tc_ratespec, of 12 bytes, whose second byte is
        // the kind of link and whose last four are the rate; limit in bytes, burst of 10 s in ticks of 64 ns, mtu.
        let mut parameters = vec![0, 1, 0, 0, 0, 0, 0, 0];
        parameters.extend(1000u32.to_ne_bytes());
        parameters.extend([0; 12]);
        for number in [1u32 << 30, 156_250_000, 0] {
            parameters.extend(number.to_ne_bytes());
        }
        const OPTIONS: u16 = 2;
        const PARAMETERS: u16 = 1;
        let length = u16::try_from(4 + parameters.len()).unwrap();
        let nested = [&length.to_ne_bytes()[..], &PARAMETERS.to_ne_bytes(), &parameters].concat();
        let mut message = self.discipline(name).await;
        message.attributes.push(TcAttribute::Kind("tbf".into()));
        message.attributes.push(TcAttribute::Other(DefaultNla::new(OPTIONS, nested)));
        self.request(RouteNetlinkMessage::NewQueueDiscipline(message)).await;
    }

    /// Lets what [`Self::slow`] has kept go.
    pub(super) async fn unslow(&self, name: &str) {
        let message = RouteNetlinkMessage::DelQueueDiscipline(self.discipline(name).await);
        self.netlink.request(message, 0).await.unwrap();
    }

    /// Of what a link sends.
    async fn discipline(&self, name: &str) -> TcMessage {
        let mut message = TcMessage::with_index(self.index(name).await.cast_signed());
        message.header.parent = TcHandle::ROOT;
        message
    }

    /// Links, queueing disciplines that somebody added, filters.
    pub(super) async fn counts(&self) -> (usize, usize, usize) {
        let links = links::list(&self.netlink).await.unwrap();
        let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        let ingress = |message: &RouteNetlinkMessage| match message {
            RouteNetlinkMessage::NewQueueDiscipline(found) => found.header.parent == TcHandle::INGRESS,
            _ => false,
        };
        let disciplines = self.netlink.dump(request).await.unwrap().iter().filter(|one| ingress(one)).count();
        let mut filters = 0;
        for link in &links {
            let mut request = TcMessage::with_index(link.index.cast_signed());
            request.header.parent = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };
            filters += self.netlink.dump(RouteNetlinkMessage::GetTrafficFilter(request)).await.unwrap().len();
        }
        (links.len(), disciplines, filters)
    }
}

/// An IPv4 route as CNI plugins make them.
pub(super) fn route(to: (&str, u8), gateway: Option<&str>, index: u32, scope: RouteScope) -> RouteMessage {
    let builder = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
        .destination_prefix(to.0.parse().unwrap(), to.1)
        .output_interface(index)
        .protocol(RouteProtocol::Boot)
        .scope(scope);
    match gateway {
        Some(gateway) => builder.gateway(gateway.parse().unwrap()).build(),
        None => builder.build(),
    }
}

/// A desk of the calling thread's namespace.
pub(super) fn desk() -> Desk {
    Desk::new(Netlink::open().unwrap(), false)
}

/// A look at which nothing was wrong.
pub(super) async fn look(desk: &mut Desk) -> Looked {
    let looked = desk.look().await.unwrap();
    let refused: Vec<_> = looked.refused.iter().map(ToString::to_string).collect();
    assert_eq!(refused, [""; 0]);
    looked
}

/// A look at which just this was wrong.
pub(super) async fn refusal(desk: &mut Desk) -> (String, Looked) {
    let looked = desk.look().await.unwrap();
    let [error] = &looked.refused[..] else { panic!("{:?}", looked.refused) };
    (error.to_string(), looked)
}
