//! A network for containers: a namespace that plays the host, where CNI's plugins make bridges and their
//! like, and namespaces for containers, made before them as kubelet and podman do ("places"). Afterwards
//! each has to have what it had.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use spore_harness::bed::Subject;
use spore_harness::call::{Call, Output, Running};
use spore_harness::image::BUSYBOX;
use spore_harness::network::cni::{self, Attachment, Network};
use spore_harness::network::space::{self, Space};
use spore_harness::network::stock::{namespaces, stock};
use spore_harness::network::traffic::{self, Peer, Server};
use spore_harness::wait;

use crate::guest::{Cni, Guest};

/// For what takes seconds here, and a minute when the other case floods.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);
/// Where a container finds this program.
const PROGRAM: &str = "/program/traffic";
/// Says when it is there, and reacts to signals.
pub(crate) const READY: &str = "echo ready; trap 'exit 0' TERM; while :; do sleep 1000000 & wait $!; done";
/// What a web server in a container, or on the host, says.
pub(crate) const CONTENT: &str = "hello from the web\n";
/// A web server in a container, on ports 80 and 81.
pub(crate) const WEB: &str =
    "mkdir /www; echo hello from the web > /www/index.html; httpd -p 81 -h /www; exec httpd -f -p 80 -h /www";

/// See the module.
pub(crate) struct Lan {
    pub(crate) subject: Subject,
    pub(crate) host: Space,
    directory: PathBuf,
    places: Mutex<Vec<Arc<Place>>>,
    _server: Server,
}

/// A namespace for one container.
pub(crate) struct Place {
    pub(crate) space: Space,
    /// What was in it before the container.
    before: OnceLock<Vec<String>>,
}

/// Runs a case in a network of its own. When its containers are gone, nothing of theirs may be left in any
/// of the namespaces.
pub(crate) fn in_lan(subject: &Subject, act: impl FnOnce(&Lan) -> Result<()>) -> Result<()> {
    let lan = Lan::new(subject)?;
    act(&lan)?;
    lan.as_before()
}

impl Lan {
    pub(crate) fn new(subject: &Subject) -> Result<Self> {
        let host = Space::new(&subject.id("lan"))?;
        host.ip("link set lo up")?;
        // An address of a bridge can be used at once.
        host.within(|| Ok(fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0")?))?;
        let directory = subject.bed.rootfs().with_file_name(host.name());
        fs::create_dir_all(directory.join("web"))?;
        fs::write(directory.join("web/index.html"), CONTENT)?;
        fs::create_dir_all(cni::CONFIGURATIONS)?;
        let server = Server::start(&host.path())?;
        Ok(Self { subject: subject.clone(), host, directory, places: Mutex::default(), _server: server })
    }

    /// A path for a file of the case's own.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A bridge of its own, 10.NUMBER.0.1 and fd00:NUMBER::1 on the host.
    pub(crate) fn bridge(&self, number: u8) -> Network {
        let plugin = json!({
            "type": "bridge",
            "bridge": format!("bridge{number}"),
            "isGateway": true,
            "hairpinMode": true,
            "ipam": self.addresses(number, &["0.0.0.0/0", "::/0"]),
        });
        Network { name: format!("{}-{number}", self.host.name()), plugins: vec![plugin] }
    }

    /// Addresses for a plugin that makes interfaces.
    pub(crate) fn addresses(&self, number: u8, routes: &[&str]) -> Value {
        let routes: Vec<_> = routes.iter().map(|to| json!({ "dst": to })).collect();
        json!({
            "type": "host-local",
            "dataDir": self.file("addresses"),
            "ranges": [
                [{ "subnet": format!("10.{number}.0.0/24") }],
                [{ "subnet": format!("fd00:{number}::/64") }],
            ],
            "routes": routes,
        })
    }

    /// A namespace for a container.
    pub(crate) fn place(&self) -> Result<Arc<Place>> {
        let space = Space::new(&self.subject.id("place"))?;
        let place = Arc::new(Place { space, before: OnceLock::new() });
        self.places.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&place));
        Ok(place)
    }

    /// A place with one interface of a network, `eth0`, and its addresses.
    pub(crate) fn place_in(&self, network: &Network) -> Result<(Arc<Place>, Addresses)> {
        let place = self.place()?;
        let addresses = self.attach(network, &place, "eth0", Value::Null)?;
        Ok((place, addresses))
    }

    /// Gives a place an interface of a network.
    pub(crate) fn attach(
        &self,
        network: &Network,
        place: &Place,
        interface: &str,
        arguments: Value,
    ) -> Result<Addresses> {
        Addresses::of(&network.add(&self.attachment(place, interface, arguments))?)
    }

    pub(crate) fn attachment(&self, place: &Place, interface: &str, arguments: Value) -> Attachment {
        Attachment {
            host: self.host.path(),
            container: place.space.name().to_owned(),
            namespace: place.space.path(),
            interface: interface.to_owned(),
            arguments,
        }
    }

    /// A container in a place, which waits.
    pub(crate) fn guest(&self, place: &Place) -> Result<Guest> {
        self.guest_with(place, &[], &["sh", "-c", READY])
    }

    pub(crate) fn guest_with(&self, place: &Place, options: &[&str], command: &[&str]) -> Result<Guest> {
        let namespace = place.noted()?;
        let options = [&["--with-ns", &namespace], options].concat();
        Guest::start_with(&self.subject, &options, command)
    }

    /// `ctr run --rm` in a place, to its end.
    pub(crate) fn run(&self, place: &Place, command: &[&str]) -> Result<Output> {
        let namespace = place.noted()?;
        self.subject.run_with("run", &["--with-ns", &namespace], BUSYBOX, command)?.run()
    }

    /// A container in a place that serves traffic.
    pub(crate) fn serving(&self, place: &Place, addresses: &Addresses) -> Result<(Guest, Peer)> {
        let mount = format!("type=bind,src={},dst=/program,options=rbind:ro", program()?.display());
        let guest = self.guest_with(place, &["--mount", &mount], &[PROGRAM, traffic::VERB, "serve"])?;
        let peer = Peer { from: self.host.path(), address: (addresses.v4, traffic::PORT).into() };
        wait::until("the container serves", DEADLINE, || peer.ask("greet").ok())?;
        Ok((guest, peer))
    }

    /// This side's server, at its address in the network of that number.
    pub(crate) fn server(number: u8) -> SocketAddr {
        (Ipv4Addr::new(10, number, 0, 1), traffic::PORT).into()
    }

    /// `ctr run --rm --cni`, as a user of this host calls it, with one network.
    pub(crate) fn run_cni(&self, network: &Network, command: &[&str]) -> Result<Attached> {
        let configurations = self.file("net.d");
        fs::create_dir_all(&configurations)?;
        fs::write(configurations.join("10-test.conflist"), network.list().to_string())?;
        let id = self.subject.id("cni");
        let mut args = vec!["run", "--rm", "--cni", "--runtime", self.subject.runtime.id(), BUSYBOX, &id];
        args.extend(command);
        let cni = Cni { namespace: self.host.path(), configurations };
        let running = cni.call(self.subject.ctr(&args)?).spawn()?;
        Ok(Attached { running, guest: Guest::adopt_with(&self.subject, &id, Some(cni)) })
    }

    /// A web server at every address of the host's side.
    pub(crate) fn web(&self) -> Result<Running> {
        self.web_in(&self.host, 80)
    }

    /// A web server in any namespace.
    pub(crate) fn web_in(&self, space: &Space, port: u16) -> Result<Running> {
        let mut command = space.command("busybox");
        command.args(["httpd", "-f", "-p", &port.to_string(), "-h"]).arg(self.file("web"));
        Call::new(command).deadline(DEADLINE).spawn()
    }

    /// Nothing is in the places but what was there before their containers.
    fn as_before(&self) -> Result<()> {
        let places = std::mem::take(&mut *self.places.lock().unwrap_or_else(PoisonError::into_inner));
        places.iter().try_for_each(|place| place.as_before())
    }

    /// Looks at one place now, and forgets it, so that it ends with its last user.
    pub(crate) fn give_up(&self, place: &Arc<Place>) -> Result<()> {
        self.forget(place);
        place.as_before()
    }

    /// Does not look at a place any more, nor keep it.
    pub(crate) fn forget(&self, place: &Arc<Place>) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.retain(|other| !Arc::ptr_eq(other, place));
    }

    /// Waits until nothing on the host's side leads to a container any more.
    pub(crate) fn without_containers(&self) -> Result<()> {
        let leads = |line: &String| line.contains("(veth)");
        wait::until("the host's ends of interfaces go", DEADLINE, || {
            (!stock(&self.host.path()).ok()?.iter().any(leads)).then_some(())
        })
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.directory).ok();
    }
}

impl Place {
    /// For `--with-ns`. What is in the place from now on has to be there at the end.
    fn noted(&self) -> Result<String> {
        let path = self.space.path();
        if self.before.get().is_none() {
            let _ = self.before.set(stock(&path)?);
        }
        Ok(format!("network:{}", path.display()))
    }

    /// Waits until there is in it what was before its container.
    fn as_before(&self) -> Result<()> {
        let Some(before) = self.before.get() else { return Ok(()) };
        let mut now = Vec::new();
        let same = || {
            now = stock(&self.space.path()).ok()?;
            (now == *before).then_some(())
        };
        wait::until(&format!("{} is as it was before its container", self.space.name()), DEADLINE, same)
            .with_context(|| format!("before: {before:?}; now: {now:?}"))
    }
}

/// What CNI gave an interface.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addresses {
    pub(crate) v4: IpAddr,
    pub(crate) v6: IpAddr,
}

impl Addresses {
    fn of(result: &Value) -> Result<Self> {
        let found = || result["ips"].as_array().into_iter().flatten().filter_map(|ip| ip["address"].as_str());
        let address = |wanted: fn(&IpAddr) -> bool| {
            let parsed = found().filter_map(|text| text.split('/').next()?.parse().ok());
            let mut wanted = parsed.filter(wanted);
            wanted.next().with_context(|| format!("no address in {result}"))
        };
        Ok(Self { v4: address(IpAddr::is_ipv4)?, v6: address(IpAddr::is_ipv6)? })
    }

    /// Its server for traffic over IPv6.
    pub(crate) fn server_6(&self) -> SocketAddr {
        (self.v6, traffic::PORT).into()
    }
}

/// A container of `ctr run`, which waits for its end.
pub(crate) struct Attached {
    // In this order: who waits goes first when a case fails.
    pub(crate) running: Running,
    pub(crate) guest: Guest,
}

impl Attached {
    /// Ends the container; `ctr` then takes its network away, and its namespace goes.
    pub(crate) fn end(self) -> Result<()> {
        let namespace = fs::metadata(self.guest.network()?)?.ino();
        self.guest.must("kill", &["--signal", "KILL"], &[])?;
        let output = self.running.wait()?;
        ensure!(output.code() == 137, "{output}");
        wait::until("the container's network namespace goes", DEADLINE, || {
            (!namespaces().ok()?.contains_key(&namespace)).then_some(())
        })
    }
}

/// A directory that holds this program alone.
fn program() -> Result<&'static Path> {
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    let directory = Path::new("/srv/bed/program");
    let install = || traffic::install(directory).map_err(|error| format!("{error:#}"));
    let installed = INSTALLED.get_or_init(install).clone();
    installed.map(|()| directory).map_err(|error| anyhow!(error))
}

/// A program's output, run to a good end.
pub(crate) fn said(command: Command) -> Result<String> {
    let what = format!("{command:?}");
    let output = Call::new(command).run()?;
    ensure!(output.success(), "{what}: {output}");
    Ok(output.text())
}

/// What a web server says to somebody in a namespace, as soon as it is there.
pub(crate) fn fetched(namespace: &Path, url: &str) -> Result<String> {
    let mut last = String::new();
    let fetch = || {
        let output = fetch(namespace, url).ok()?;
        last = output.to_string();
        output.success().then(|| output.text())
    };
    wait::until(&format!("{url} is there"), DEADLINE, fetch).with_context(|| last.clone())
}

/// Asks once.
pub(crate) fn fetch(namespace: &Path, url: &str) -> Result<Output> {
    let mut command = space::command(namespace, "busybox");
    command.args(["wget", "-q", "-T", "3", "-O", "-", url]);
    Call::new(command).run()
}

/// What busybox says of an interface and of all routes, and what is the same in the container and in its
/// namespace on the host: not numbers, nor queueing disciplines.
fn script(interface: &str) -> String {
    format!(
        "set -e; busybox ip -o link show dev {interface} | \
           busybox sed 's/.* \\(mtu [0-9]*\\) .*\\(link.ether [0-9a-f:]*\\).*/\\1 \\2/'; \
         busybox ip -o addr show dev {interface} | busybox sed 's/^[0-9]*: //'; \
         busybox ip -4 route; busybox ip -6 route"
    )
}

fn lines(text: &str) -> Vec<String> {
    let mut lines: Vec<_> =
        text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    lines.sort();
    lines
}

/// Waits until the container sees an interface as the host does in its namespace; what it sees.
pub(crate) fn mirrored(guest: &Guest, namespace: &Path, interface: &str) -> Result<Vec<String>> {
    let script = script(interface);
    let mut last = String::new();
    let same = || {
        let mut command = space::command(namespace, "sh");
        command.args(["-c", &script]);
        let (outside, inside) = (said(command), guest.shell(&script));
        // Routes are told to the guest one by one, and addresses are not looked for again: the flags of that.
        let plain =
            |text: String| text.replace(" noprefixroute", "").replace(" flags 02", "").replace(" nodad", "");
        let [outside, inside] = [outside, inside].map(|text| text.map(|text| lines(&plain(text))));
        last = format!("in its namespace on the host {outside:#?}; in the container {inside:#?}");
        // A new address of IPv6 changes by itself when its check is over.
        (outside.ok()? == *inside.as_ref().ok()?).then_some(inside.ok()?)
    };
    wait::until(&format!("{interface} is the same on both sides"), DEADLINE, same)
        .with_context(|| last.clone())
}
