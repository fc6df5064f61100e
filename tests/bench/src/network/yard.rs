//! One bridge, in a namespace that plays the host, and the containers at it.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::unistd::Pid;
use spore_harness::containerd::Runtime;
use spore_harness::image::BUSYBOX;
use spore_harness::network::space::Space;
use spore_harness::network::traffic::{self, PORT, Peer, Server};
use spore_harness::processes::child_and_parent;
use spore_harness::wait;

use crate::lab::Lab;

const DEADLINE: Duration = Duration::from_secs(120);
const PROGRAM: &str = "/srv/bench/program";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 30, 0, 1);

pub(super) struct Yard {
    pub(super) host: Space,
    /// Of the last address that was given away.
    last: AtomicU8,
    _server: Server,
}

impl Yard {
    pub(super) fn new() -> Result<Self> {
        traffic::install(Path::new(PROGRAM))?;
        let host = Space::new("bench-host")?;
        // Nothing but what is measured: no router solicitations, no checks for duplicates.
        host.within(|| Ok(fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")?))?;
        host.ip("link set lo up")?;
        host.ip("link add bridge0 type bridge")?;
        host.ip(&format!("addr add {HOST}/24 dev bridge0"))?;
        host.ip("link set bridge0 up")?;
        let server = Server::start(&host.path())?;
        Ok(Self { host, last: AtomicU8::new(1), _server: server })
    }

    /// The host's own server.
    pub(super) fn address(&self) -> SocketAddr {
        (HOST, PORT).into()
    }
}

/// One container, or the place for it.
pub(super) struct Member {
    pub(super) id: String,
    pub(super) space: Space,
    pub(super) peer: Peer,
    pub(super) vmm: Option<Pid>,
}

impl Member {
    /// A namespace with an interface at the bridge.
    pub(super) fn place(yard: &Yard, id: &str) -> Result<Self> {
        let number = yard.last.fetch_add(1, Ordering::Relaxed) + 1;
        let space = Space::new(&format!("bench-{id}"))?;
        let port = format!("port{number}");
        yard.host.ip(&format!("link add {port} type veth peer name eth0 netns {}", space.name()))?;
        yard.host.ip(&format!("link set {port} master bridge0 up"))?;
        let address = Ipv4Addr::new(10, 30, 0, number);
        space.within(|| Ok(fs::write("/proc/sys/net/ipv6/conf/eth0/disable_ipv6", "1")?))?;
        space.ip(&format!("addr add {address}/24 dev eth0"))?;
        space.ip("link set eth0 up")?;
        space.ip("link set lo up")?;
        let peer = Peer { from: yard.host.path(), address: (address, PORT).into() };
        Ok(Self { id: id.to_owned(), space, peer, vmm: None })
    }

    fn namespace(&self) -> String {
        format!("network:{}", self.space.path().display())
    }

    /// `ctr run --rm` there, until it has had an answer from the host.
    pub(super) fn run_once(&self, lab: &Lab, yard: &Yard, runtime: Runtime) -> Result<()> {
        let (namespace, to) = (self.namespace(), yard.address().ip().to_string());
        let mut args = vec!["run", "--rm", "--runtime", runtime.id(), "--with-ns", &namespace];
        args.extend([BUSYBOX, &self.id, "ping", "-c", "1", &to]);
        let output = lab.ctr(&args).run()?;
        ensure!(output.success(), "{}: {output}", self.id);
        Ok(())
    }
}

/// Two containers of one runtime, which serve.
pub(super) struct Side {
    pub(super) members: [Member; 2],
}

impl Side {
    /// `side`: the number of the side, for runc may be compared with itself.
    pub(super) fn start(lab: &Lab, yard: &Yard, runtime: Runtime, side: usize) -> Result<Self> {
        let mount = format!("type=bind,src={PROGRAM},dst=/program,options=rbind:ro");
        let program = format!("/program/{}", traffic::VERB);
        let start = |number| -> Result<_> {
            let mut member = Member::place(yard, &format!("{}{side}-{number}", runtime.name()))?;
            let options = ["--with-ns", &member.namespace(), "--mount", &mount];
            lab.detach_with(runtime, &member.id, &options, &[&program, traffic::VERB, "serve"])?;
            wait::until("the container serves", DEADLINE, || member.peer.ask("greet").ok())?;
            if runtime == Runtime::Spore {
                member.vmm =
                    Some(child_and_parent("spore-vmm", &["containerd-shim-spore-v2", &member.id])?.0);
            }
            Ok(member)
        };
        Ok(Self { members: [start(1)?, start(2)?] })
    }

    pub(super) fn end(self, lab: &Lab) -> Result<()> {
        self.members.iter().try_for_each(|member| lab.remove(&member.id))
    }
}
