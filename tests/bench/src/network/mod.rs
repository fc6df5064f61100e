//! The network: throughput, latency, datagrams and what they cost, beside runc in alternation over one bridge,
//! in namespaces of the suite's own. The traffic is the harness's own program at both ends (`network::traffic`), which
//! tells its own times; starting it is not among them.

mod cost;
mod yard;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use spore_harness::containerd::Runtime;
use spore_harness::network::traffic::datagram::{self, Blast};
use spore_harness::network::traffic::stream;

use self::cost::{Cost, costing};
use self::yard::{Member, Side, Yard};
use crate::lab::{Lab, Timeline, span};
use crate::report::Row;
use crate::stats::Sample;

const MIB: f64 = 32.0;
const BYTES: u64 = 32 << 20;
const GB: f64 = 1e9;
/// What a request and its answer carry.
const SIZE: usize = 64;
const TRIPS: usize = 200;
const DATAGRAMS: u64 = 5000;
/// Sandboxes that are started at once, and how often that is done.
const AT_ONCE: usize = 16;
const TIMES: usize = 2;
/// Throughput: no more than twice runc's time.
const AIM: f64 = 2.0;

/// From whom to whom. The last goes by no device: what it costs the container's kernel to send and to receive is the
/// least that the others can cost.
const WAYS: [&str; 4] =
    ["host to container", "container to host", "container to container", "container to itself"];
/// Those by a device.
const OUTWARD: usize = 3;

/// What one side came to.
#[derive(Default)]
struct Samples {
    /// Of each way: milliseconds for a MiB, and seconds of the machine's CPU for a GB.
    transfer: [Vec<f64>; WAYS.len()],
    cpu: [Vec<f64>; WAYS.len()],
    /// Microseconds, from the host and from another container.
    trips: [Vec<f64>; 2],
    /// To the container and from it: datagrams a second that arrived, and per cent of those sent.
    rate: [Vec<f64>; 2],
    arrived: [Vec<f64>; 2],
    /// Of a request and its answer, of a MiB each way, and of a datagram each way.
    costs: [Vec<Cost>; 5],
}

pub(crate) fn run(runtime: Runtime, rounds: usize, results: &Path) -> Result<Vec<Row>> {
    let lab = Lab::start(results)?;
    let yard = Yard::new()?;
    let sides = [Side::start(&lab, &yard, Runtime::Runc, 0)?, Side::start(&lab, &yard, runtime, 1)?];
    let mut samples: [Samples; 2] = Default::default();
    for round in 0..=rounds {
        for (side, samples) in sides.iter().zip(&mut samples) {
            let mut once = Samples::default();
            measure(&yard, side, &mut once)?;
            if round > 0 {
                samples.add(once);
            }
        }
        eprintln!("network: round {round} of {rounds}{}", if round == 0 { " (not counted)" } else { "" });
    }
    for side in sides {
        side.end(&lab)?;
    }
    let [reference, measured] = samples;
    let mut rows = reference.rows(&measured, runtime);
    let (starts, measured_ids) = starts(&lab, &yard, runtime)?;
    rows.extend(starts);
    drop(yard);
    let lines = lab.timelines(results)?;
    for (what, ids) in measured_ids {
        let lines: Vec<_> = ids.iter().filter_map(|id| lines.get(id)).collect();
        if !lines.is_empty() {
            let joined = Sample::new(lines.iter().filter_map(|line| joined_ms(line)).collect());
            rows.push(Row::new(&format!("{what}: shim, VMM and guest join the interface"), "ms", &joined));
            for (who, key) in [("the shim", "network_namespace_ns"), ("the VMM", "network_vmm_ns")] {
                let part = lines.iter().filter_map(|line| Some(line.get(key)?.as_f64()? / 1e6));
                rows.push(Row::new(&format!("{what}: of that {who}"), "ms", &Sample::new(part.collect())));
            }
        }
    }
    Ok(rows)
}

/// From the moment when guest and disks are ready until the network is.
fn joined_ms(line: &Timeline) -> Option<f64> {
    let ready = |from: &str| span(line, from, "network_ready_ns");
    Some(ready("agent_ready_ns")?.min(ready("rootfs_ready_ns")?))
}

fn measure(yard: &Yard, side: &Side, samples: &mut Samples) -> Result<()> {
    let [one, other] = &side.members;
    let here = |act: &(dyn Fn() -> Result<Duration> + Sync)| yard.host.within(act);
    let ways: [&dyn Fn() -> Result<Duration>; WAYS.len()] = [
        &|| here(&|| stream::push(one.address(), BYTES)),
        &|| here(&|| stream::pull(one.address(), BYTES)),
        &|| first(one.peer.times(&format!("push {} {BYTES}", other.address()))?),
        &|| first(one.peer.times(&format!("push {} {BYTES}", one.own_address()))?),
    ];
    for (way, act) in ways.iter().enumerate() {
        let (time, cost) = costing(one, act)?;
        samples.transfer[way].push(time.as_secs_f64() * 1000.0 / MIB);
        #[allow(clippy::cast_precision_loss)] // a round number
        samples.cpu[way].push(cost.cpu_s * GB / BYTES as f64);
        if let Some(costs) = samples.costs[1..].get_mut(way).filter(|_| way < 2) {
            costs.push(cost);
        }
    }
    let (times, cost) = costing(one, || yard.host.within(|| stream::trips(one.address(), SIZE, TRIPS)))?;
    samples.trips[0].extend(microseconds(&times));
    samples.costs[0].push(cost);
    samples.trips[1]
        .extend(microseconds(&one.peer.times(&format!("trips {} {SIZE} {TRIPS}", other.address()))?));
    let (blast, cost) =
        costing(one, || yard.host.within(|| datagram::blast(one.address(), SIZE, DATAGRAMS)))?;
    samples.blast(0, blast, cost);
    let job = format!("blast {} {SIZE} {DATAGRAMS}", yard.address());
    let (blast, cost) = costing(one, || one.peer.ask(&job)?.parse())?;
    samples.blast(1, blast, cost);
    Ok(())
}

fn first(times: Vec<Duration>) -> Result<Duration> {
    times.into_iter().next().ok_or_else(|| anyhow!("no time in the answer"))
}

fn microseconds(times: &[Duration]) -> impl Iterator<Item = f64> {
    times.iter().map(|time| time.as_secs_f64() * 1e6)
}

impl Samples {
    #[allow(clippy::cast_precision_loss)] // counts of thousands
    fn blast(&mut self, way: usize, blast: Blast, cost: Cost) {
        let seconds = blast.elapsed.as_secs_f64();
        if seconds > 0.0 {
            self.rate[way].push(blast.received as f64 / seconds);
        }
        self.arrived[way].push(blast.received as f64 * 100.0 / DATAGRAMS as f64);
        self.costs[3 + way].push(cost);
    }

    fn add(&mut self, once: Self) {
        fn extend<T, const N: usize>(to: &mut [Vec<T>; N], from: [Vec<T>; N]) {
            to.iter_mut().zip(from).for_each(|(to, from)| to.extend(from));
        }
        extend(&mut self.transfer, once.transfer);
        extend(&mut self.cpu, once.cpu);
        extend(&mut self.trips, once.trips);
        extend(&mut self.rate, once.rate);
        extend(&mut self.arrived, once.arrived);
        extend(&mut self.costs, once.costs);
    }

    /// Its rows, each followed by those of what is compared with it.
    fn rows(self, measured: &Self, runtime: Runtime) -> Vec<Row> {
        let mut rows = Vec::new();
        let mut pair = |what: &str, unit, reference: &[f64], measured: &[f64], aim: Option<f64>| {
            let [reference, measured] = [reference, measured].map(|values| Sample::new(values.to_vec()));
            rows.push(Row::new(&format!("{what}, runc"), unit, &reference));
            let row = Row::new(&format!("{what}, {}", runtime.name()), unit, &measured);
            rows.push(row.against(&reference, aim));
        };
        for (way, name) in WAYS.iter().enumerate() {
            let what = format!("TCP, {name}");
            let aim = (way < OUTWARD).then_some(AIM);
            pair(&what, "ms/MiB", &self.transfer[way], &measured.transfer[way], aim);
            pair(&format!("{what}: the machine's CPU"), "s/GB", &self.cpu[way], &measured.cpu[way], None);
        }
        for (at, name) in ["host and container", "container and container"].into_iter().enumerate() {
            pair(
                &format!("64 bytes there and back, {name}"),
                "us",
                &self.trips[at],
                &measured.trips[at],
                None,
            );
        }
        for (at, name) in WAYS[..2].iter().enumerate() {
            let what = format!("UDP of 64 bytes, {name}");
            pair(&format!("{what}: arrive"), "/s", &self.rate[at], &measured.rate[at], None);
            pair(
                &format!("{what}: arrive of those sent"),
                "%",
                &self.arrived[at],
                &measured.arrived[at],
                None,
            );
        }
        let works = [
            "64 bytes there and back",
            "TCP, host to container",
            "TCP, container to host",
            "UDP of 64 bytes, host to container",
            "UDP of 64 bytes, container to host",
        ];
        for (work, costs) in works.iter().zip(&measured.costs) {
            for (name, of) in [
                ("exits of the guest for a frame", (|cost| cost.exits) as fn(&Cost) -> Option<f64>),
                ("interrupts injected for a frame", |cost| cost.interrupts),
                ("wake-ups of the VMM's event loop for a frame", |cost| cost.wakeups),
            ] {
                let sample = Sample::new(costs.iter().filter_map(of).collect());
                if sample.len() > 0 {
                    rows.push(Row::new(&format!("{work}: {name}"), "", &sample));
                }
            }
        }
        rows
    }
}

/// Names of measurements, and the containers that they were made of.
type Measured = Vec<(String, Vec<String>)>;

/// Containers with an interface, alone and many at once: the time for each.
fn starts(lab: &Lab, yard: &Yard, runtime: Runtime) -> Result<(Vec<Row>, Measured)> {
    let (mut rows, mut measured) = (Vec::new(), Vec::new());
    for (what, at_once) in [("one started alone", 1), ("each of 16 started at once", AT_ONCE)] {
        let mut samples = [Vec::new(), Vec::new()];
        let mut ids = Vec::new();
        for time in 0..TIMES {
            for (side, runtime) in [Runtime::Runc, runtime].into_iter().enumerate() {
                let name = |number| format!("{}{side}-{at_once}-{time}-{number}", runtime.name());
                let members = (0..at_once).map(|number| Member::place(yard, &name(number)));
                let members = members.collect::<Result<Vec<_>>>()?;
                let begin = Instant::now();
                thread::scope(|scope| {
                    let run = |member| scope.spawn(move || Member::run_once(member, lab, yard, runtime));
                    let runs: Vec<_> = members.iter().map(run).collect();
                    runs.into_iter().try_for_each(|run| run.join().map_err(|_| anyhow!("a run panicked"))?)
                })?;
                #[allow(clippy::cast_precision_loss)] // at most 16
                samples[side].push(begin.elapsed().as_secs_f64() * 1000.0 / at_once as f64);
                if side == 1 {
                    ids.extend(members.into_iter().map(|member| member.id));
                }
            }
            eprintln!("network: {what}, {} of {TIMES}", time + 1);
        }
        let [reference, ours] = samples.map(Sample::new);
        rows.push(Row::new(&format!("ctr run --rm with an interface, {what}, runc"), "ms", &reference));
        let row =
            Row::new(&format!("ctr run --rm with an interface, {what}, {}", runtime.name()), "ms", &ours);
        rows.push(row.against(&reference, None));
        measured.push((what.to_owned(), ids));
    }
    Ok((rows, measured))
}

impl Member {
    fn address(&self) -> SocketAddr {
        self.peer.address
    }

    /// Where only itself reaches it.
    fn own_address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.peer.address.port()).into()
    }
}
