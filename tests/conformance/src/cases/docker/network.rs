//! Docker's networks: what it makes between Create and Start, and later.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::docker::Docker;
use spore_harness::network::stock::everywhere;
use spore_harness::processes::find;
use spore_harness::wait;

use super::{Container, equal, run_on};
use crate::cases::{Case, Difference, refused};
use crate::lan::{CONTENT, WEB, fetched};

pub(crate) const CASES: &[Case] = &[
    Case::new("docker: the default bridge, with a port that is published", published).starts(1),
    Case::new("docker: a published port leaves nothing behind", nothing_left).alone().starts(1),
    Case::new("docker: containers of a network reach each other by address", by_address).starts(2),
    Case::new("docker: containers of a network reach each other by name", by_name).starts(2),
    Case::new("docker: network connect and disconnect", connect).starts(1),
    Case::new("docker: run --network none", none).starts(1),
    Case::new("docker: run --network container:", joined)
        .starts(2)
        .differs("each virtual machine has a network stack of its own; what comes in can go to one only"),
    Case::new("docker: run --dns --dns-search --add-host --hostname --mac-address", options).starts(1),
    Case::new("docker: run --ip", fixed).starts(1),
    Case::new("docker: a network with IPv6", ipv6).starts(1),
    Case::new("docker: stats tells what its network moves", stats).starts(1),
];

const DEADLINE: Duration = Duration::from_secs(120);
/// The engine's own namespace, where its bridges are.
const HOST: &str = "/proc/self/ns/net";

/// A network of Docker's; removed with the value.
struct Network {
    subject: Subject,
    name: String,
}

impl Network {
    fn new(subject: &Subject, options: &[&str]) -> Result<Self> {
        let network = Self { subject: subject.clone(), name: subject.id("network") };
        let mut args = vec!["network", "create"];
        args.extend(options);
        args.push(&network.name);
        subject.docker(|docker| docker.must(&args))?;
        Ok(network)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.subject.docker(|docker: &Docker| docker.call(&["network", "rm", &self.name]).run()).ok();
    }
}

impl Container {
    /// Its address on the default bridge or in the only network that it has.
    fn address(&self) -> Result<String> {
        self.inspect("{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
    }

    fn gateway(&self) -> Result<String> {
        self.inspect("{{range .NetworkSettings.Networks}}{{.Gateway}}{{end}}")
    }
}

fn web(subject: &Subject, network: &str, options: &[&str]) -> Result<Container> {
    Container::start_on(subject, network, options, &["sh", "-c", WEB])
}

fn published(subject: &Subject) -> Result<()> {
    let container = web(subject, "bridge", &["-p", "80"])?;
    let told = subject.docker(|docker| docker.must(&["port", &container.id, "80"]))?;
    let port =
        told.lines().next().and_then(|line| line.rsplit(':').next()).context("no port is published")?;
    equal("from the host", &fetched(Path::new(HOST), &format!("http://127.0.0.1:{port}/"))?, CONTENT)?;
    let direct = format!("http://{}/", container.address()?);
    equal("at its address", &fetched(Path::new(HOST), &direct)?, CONTENT)?;
    let itself = format!("wget -q -T 20 -O - http://{}:{port}/", container.gateway()?);
    equal("from the container itself", &container.shell(&itself)?, CONTENT)
}

fn nothing_left(subject: &Subject) -> Result<()> {
    // The engine and its bridge are there to stay.
    subject.docker(|_| Ok(()))?;
    let before = everywhere()?;
    let output = run_on(subject, "bridge", &["-p", "80"], &["true"])?;
    ensure!(output.success(), "{output}");
    let mut now = Vec::new();
    let gone = || {
        now = everywhere().ok()?;
        (now == before && find(&["docker-proxy"]).is_none()).then_some(())
    };
    wait::until("everything is as before the container", DEADLINE, gone)
        .with_context(|| format!("before: {before:?}; now: {now:?}"))
}

fn by_address(subject: &Subject) -> Result<()> {
    let network = Network::new(subject, &[])?;
    let server = web(subject, &network.name, &[])?;
    let script = format!("wget -q -T 20 -O - http://{}/", server.address()?);
    let output = run_on(subject, &network.name, &[], &["sh", "-c", &script])?;
    equal("by address", &output.text(), CONTENT).with_context(|| output.to_string())
}

fn by_name(subject: &Subject) -> Result<()> {
    let network = Network::new(subject, &[])?;
    let server = web(subject, &network.name, &["--network-alias", "web"])?;
    for name in [server.id.as_str(), "web"] {
        let script = format!("grep nameserver /etc/resolv.conf; wget -q -T 20 -O - http://{name}/");
        let output = run_on(subject, &network.name, &[], &["sh", "-c", &script])?;
        equal(name, &output.text(), &format!("nameserver 127.0.0.11\n{CONTENT}"))?;
    }
    Ok(())
}

fn connect(subject: &Subject) -> Result<()> {
    let network = Network::new(subject, &["--subnet", "10.78.0.0/24"])?;
    let container = Container::start_on(subject, "bridge", &[], &["sleep", "100000"])?;
    let first = container.gateway()?;
    let until = |what: &str, script: &str| {
        wait::until(what, DEADLINE, || container.shell(script).is_ok().then_some(()))
    };
    container.shell(&format!("ping -c 1 {first}"))?;
    let change = |verb: &str| {
        subject.docker(|docker| docker.must(&["network", verb, &network.name, &container.id])).map(drop)
    };
    change("connect")?;
    until("the second network works", "ping -c 1 -W 2 10.78.0.1")?;
    container.shell(&format!("ping -c 1 {first}"))?;
    change("disconnect")?;
    until("the second network goes", "! ip addr | grep 10.78.0.")?;
    container.shell(&format!("ping -c 1 {first}")).map(drop)
}

fn none(subject: &Subject) -> Result<()> {
    let script = "ip -o addr | sed 's/ *inet.*//; s/.*: //' | sort -u; ping -c 1 127.0.0.1 >/dev/null && echo loopback";
    let output = run_on(subject, "none", &[], &["sh", "-c", script])?;
    equal("interfaces in use", &output.text(), "lo\nloopback\n").with_context(|| output.to_string())
}

fn joined(subject: &Subject) -> Result<()> {
    let first = web(subject, "bridge", &[])?;
    let url = format!("http://{}/", first.address()?);
    fetched(Path::new(HOST), &url)?;
    let network = format!("container:{}", first.id);
    let output = run_on(subject, &network, &[], &["wget", "-q", "-O", "-", "http://127.0.0.1/"])?;
    if subject.is_spore() {
        refused(
            &output,
            &["interface eth0", "another virtual machine is joined to it", "give each its own"],
        )?;
        equal("the first one, afterwards", &fetched(Path::new(HOST), &url)?, CONTENT)?;
        return Err(Difference.into());
    }
    equal("the other's web server", &output.text(), CONTENT)
}

fn options(subject: &Subject) -> Result<()> {
    let options = ["--dns", "10.9.9.9", "--dns-search", "some.test", "--add-host", "there:10.1.2.3"];
    let more = ["--hostname", "named", "--mac-address", "02:42:0a:4d:00:32"];
    let script = "grep -E '^(nameserver|search)' /etc/resolv.conf; grep -w there /etc/hosts | tr '\\t' ' '; hostname; \
                  cat /sys/class/net/eth0/address; ping -c 1 there >/dev/null 2>&1; ping -c 1 named | head -n 1 | cut -d ' ' -f 1-2";
    let output = run_on(subject, "bridge", &[&options[..], &more].concat(), &["sh", "-c", script])?;
    let expected =
        "nameserver 10.9.9.9\nsearch some.test\n10.1.2.3 there\nnamed\n02:42:0a:4d:00:32\nPING named\n";
    equal("its output", &output.text(), expected).with_context(|| output.to_string())
}

fn fixed(subject: &Subject) -> Result<()> {
    let network = Network::new(subject, &["--subnet", "10.77.0.0/24"])?;
    let script = "ip -o -4 addr show dev eth0 | sed 's/.* \\(inet [0-9./]*\\) .*/\\1/'; ping -c 1 10.77.0.1 >/dev/null && echo reached";
    let output = run_on(subject, &network.name, &["--ip", "10.77.0.50"], &["sh", "-c", script])?;
    equal("its address", &output.text(), "inet 10.77.0.50/24\nreached\n").with_context(|| output.to_string())
}

fn ipv6(subject: &Subject) -> Result<()> {
    let network = Network::new(subject, &["--ipv6", "--subnet", "fd00:d0c::/64"])?;
    // The bridge's own address is checked for duplicates first.
    let script = "ip -o -6 addr show dev eth0 scope global | sed 's/.* \\(inet6 [0-9a-f:/]*\\) .*/\\1/'; \
                  n=0; until ping6 -c 1 -W 2 fd00:d0c::1 >/dev/null 2>&1; do n=$((n + 1)); test $n -lt 20 || exit 1; sleep 0.5; done; echo reached";
    let output = run_on(subject, &network.name, &[], &["sh", "-c", script])?;
    equal("its address", &output.text(), "inet6 fd00:d0c::2/64\nreached\n")
        .with_context(|| output.to_string())
}

fn stats(subject: &Subject) -> Result<()> {
    let container = web(subject, "bridge", &[])?;
    container.shell("head -c 3000000 /dev/zero > /www/zeroes")?;
    let url = format!("http://{}/", container.address()?);
    fetched(Path::new(HOST), &url)?;
    fetched(Path::new(HOST), &format!("{url}zeroes"))?;
    // Received, then sent.
    let text = container.must("stats", &["--no-stream", "--format", "{{.NetIO}}"])?;
    let sent = text.rsplit('/').next().unwrap_or_default().trim();
    ensure!(sent.starts_with(['3', '4']) && sent.ends_with("MB"), "{text}");
    Ok(())
}
