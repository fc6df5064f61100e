//! Network namespaces as CNI would make them, and what it puts into them.

use std::fs::File;
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use futures::TryStreamExt;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::tc::TcHandle;
use rtnetlink::{Handle, LinkUnspec, LinkVeth};

/// A namespace, which lives as long as this or somebody in it.
pub(crate) struct Space {
    file: File,
    handle: Handle,
}

impl Space {
    pub(crate) fn new() -> Self {
        Self::entered_by(|| unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root"))
    }

    /// One that is there.
    pub(crate) fn at(path: &Path) -> Self {
        let namespace = File::open(path).unwrap();
        Self::entered_by(move || setns(namespace, CloneFlags::CLONE_NEWNET).unwrap())
    }

    fn entered_by(enter: impl FnOnce() + Send + 'static) -> Self {
        let runtime = tokio::runtime::Handle::current();
        let make = move || {
            enter();
            let _runtime = runtime.enter();
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            runtime.spawn(connection);
            Self { file: File::open("/proc/thread-self/ns/net").unwrap(), handle }
        };
        std::thread::spawn(make).join().unwrap()
    }

    /// As long as the test runs.
    pub(crate) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }

    async fn index(&self, name: &str) -> Option<u32> {
        let mut links = self.handle.link().get().match_name(name.to_owned()).execute();
        links.try_next().await.ok().flatten().map(|link| link.header.index)
    }

    /// An interface that is up and has an address; its other end, of the same name, is `outside`.
    pub(crate) async fn interface(&self, outside: &Self, name: &str, address: &str) {
        outside.handle.link().add(LinkVeth::new(name, "moving").build()).execute().await.unwrap();
        let moving = outside.index("moving").await.unwrap();
        let mut away = LinkUnspec::new_with_index(moving).build();
        away.attributes.push(LinkAttribute::IfName(name.into()));
        away.attributes.push(LinkAttribute::NetNsFd(self.file.as_raw_fd()));
        outside.handle.link().set(away).execute().await.unwrap();
        let index = self.index(name).await.unwrap();
        let address: IpAddr = address.parse().unwrap();
        self.handle.address().add(index, address, 24).execute().await.unwrap();
        for space in [self, outside] {
            space.handle.link().set(LinkUnspec::new_with_name(name).up().build()).execute().await.unwrap();
        }
    }

    /// Brings loopback up, and answers one question for a name there, with its reverse.
    pub(crate) async fn name_server(&self) {
        self.handle.link().set(LinkUnspec::new_with_name("lo").up().build()).execute().await.unwrap();
        let namespace = self.file.try_clone().unwrap();
        let (bound, is_bound) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            let socket = UdpSocket::bind("127.0.0.11:53").unwrap();
            bound.send(()).unwrap();
            let mut question = [0; 100];
            let (length, from) = socket.recv_from(&mut question).unwrap();
            question[..length].reverse();
            socket.send_to(&question[..length], from).unwrap();
        });
        is_bound.recv().unwrap();
    }

    pub(crate) async fn delete(&self, name: &str) {
        let index = self.index(name).await.unwrap();
        self.handle.link().del(index).execute().await.unwrap();
    }

    /// Links, and ingress queueing disciplines.
    pub(crate) async fn counts(&self) -> (usize, usize) {
        let links: Vec<_> = self.handle.link().get().execute().try_collect().await.unwrap();
        let disciplines: Vec<_> = self.handle.qdisc().get().execute().try_collect().await.unwrap();
        let ingress = disciplines.iter().filter(|one| one.header.parent == TcHandle::INGRESS).count();
        (links.len(), ingress)
    }
}
