//! The VMM's network data path at native speed: a bare-metal guest that polls its queues, a tap in a
//! namespace of its own, and a packet socket at the tap's other end. No containers, and no runc to compare
//! with; to be run where the VMM is developed, not on the ground.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use spore_native::tap::{Interface, enter_namespace, frame, pair, segment};
use spore_native::{DEADLINE, Setup, Vm};
use spore_vmm::api::{Call, Metrics, Reply};

use crate::report::Row;
use crate::stats::Sample;

/// Frames of one measurement.
const FRAMES: u32 = 200_000;
const SEGMENTS: u32 = 4000;
const TRIPS: u32 = 5000;
/// A million small frames a second.
const TARGET_NS: f64 = 1000.0;

struct Lab {
    vm: Vm,
    host: Interface,
    /// Open as long as the VMM's: closing it is none of what is measured.
    _tap: OwnedFd,
}

/// What one measurement came to, of each frame.
#[derive(Default)]
struct Costs {
    time_ns: Vec<f64>,
    /// Of the VMM's event loop.
    cpu_ns: Vec<f64>,
    exits: Vec<f64>,
    wakeups: Vec<f64>,
    interrupts: Vec<f64>,
}

pub(crate) fn run(rounds: usize) -> Result<Vec<Row>> {
    enter_namespace();
    let mut vm = Setup::new("shell").memory_mib(128).boot();
    let (tap, host) = pair("tap0");
    attached(vm.attach_network(0, &tap))?;
    host.set_queue(i32::try_from(FRAMES)?)?;
    let mut lab = Lab { vm, host, _tap: tap };
    lab.command("net-link,0,1")?;
    let mut rows = vec![lab.attach(rounds)?];
    for len in [64, 1514] {
        let costs = repeat(rounds, || lab.sent_by_guest(len))?;
        costs.rows(&format!("from the guest, {len} bytes"), (len == 64).then_some(TARGET_NS), &mut rows);
        let costs = repeat(rounds, || lab.received_by_guest(FRAMES, [0; 10], &frame(0, len)))?;
        costs.rows(&format!("to the guest, {len} bytes"), (len == 64).then_some(TARGET_NS), &mut rows);
    }
    let (header, big) = segment(60_000, 1400);
    let costs = repeat(rounds, || lab.received_by_guest(SEGMENTS, header, &big))?;
    costs.rows("to the guest, segments of 60000 bytes", None, &mut rows);
    let costs = repeat(rounds, || lab.round_trips())?;
    costs.rows("to the guest and back, 64 bytes, one at a time", None, &mut rows);
    rows.iter_mut().for_each(|row| "native".clone_into(&mut row.ground));
    Ok(rows)
}

fn attached(reply: Result<Reply, spore_vmm::api::Failure>) -> Result<()> {
    reply.map(drop).context("attach a tap")
}

/// The first round is not counted.
fn repeat(rounds: usize, mut measure: impl FnMut() -> Result<[f64; 5]>) -> Result<Costs> {
    let mut costs = Costs::default();
    for round in 0..=rounds {
        let [time, cpu, exits, wakeups, interrupts] = measure()?;
        if round > 0 {
            costs.time_ns.push(time);
            costs.cpu_ns.push(cpu);
            costs.exits.push(exits);
            costs.wakeups.push(wakeups);
            costs.interrupts.push(interrupts);
        }
    }
    Ok(costs)
}

impl Costs {
    fn rows(self, what: &str, target: Option<f64>, rows: &mut Vec<Row>) {
        let time = Row::new(&format!("{what}: time"), "ns", &Sample::new(self.time_ns));
        rows.push(match target {
            Some(target) => time.at_most(target),
            None => time,
        });
        for (name, unit, values) in [
            ("the VMM's CPU", "ns", self.cpu_ns),
            ("exits", "/1000", self.exits),
            ("wake-ups by the tap", "/1000", self.wakeups),
            ("interrupts", "/1000", self.interrupts),
        ] {
            rows.push(Row::new(&format!("{what}: {name}"), unit, &Sample::new(values)));
        }
    }
}

impl Lab {
    fn command(&mut self, command: &str) -> Result<()> {
        self.vm.begin(command);
        self.finish(command)
    }

    fn finish(&mut self, command: &str) -> Result<()> {
        let text = self.vm.finish();
        ensure!(text.contains("ok net"), "{command}: {text}");
        Ok(())
    }

    fn call(&mut self, call: Call) -> Result<()> {
        ensure!(self.vm.call(call)? == Reply::Done, "not done");
        Ok(())
    }

    /// Nanoseconds that the event loop's thread has run.
    fn cpu(&self) -> Result<u64> {
        let pid = self.vm.pid();
        let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/schedstat"))?;
        Ok(text.split_whitespace().next().context("schedstat is empty")?.parse()?)
    }

    /// From the call to its answer.
    fn attach(&mut self, rounds: usize) -> Result<Row> {
        let mut times = Vec::new();
        for round in 0..rounds {
            let (tap, _host) = pair(&format!("more{round}"));
            let start = Instant::now();
            attached(self.vm.attach_network(1, &tap))?;
            times.push(start.elapsed().as_secs_f64() * 1e6);
            self.call(Call::DetachNetwork { slot: 1 })?;
        }
        Ok(Row::new("attach a tap", "us", &Sample::new(times)).at_most(1000.0))
    }

    fn measure(&mut self, frames: u32, work: impl FnOnce(&mut Self) -> Result<Duration>) -> Result<[f64; 5]> {
        let (before, cpu) = (self.vm.metrics(), self.cpu()?);
        let time = work(self)?;
        let (after, cpu) = (self.vm.metrics(), self.cpu()? - cpu);
        let frames = f64::from(frames);
        #[allow(clippy::cast_precision_loss)] // counts far below 2^52
        let each = |count: u64| count as f64 / frames;
        let difference = |of: fn(&Metrics) -> u64| each(of(&after) - of(&before)) * 1000.0;
        Ok([
            time.as_secs_f64() * 1e9 / frames,
            each(cpu),
            difference(|metrics| metrics.networks[0].notifications),
            difference(|metrics| metrics.networks[0].wakeups),
            difference(|metrics| metrics.networks[0].interrupts),
        ])
    }

    fn sent_by_guest(&mut self, len: usize) -> Result<[f64; 5]> {
        // Received by nobody: what the host does with frames is not the VMM's.
        self.host.listen(false)?;
        let measured = self.measure(FRAMES, |lab| {
            let start = Instant::now();
            lab.command(&format!("net-send,0,{FRAMES},{len}"))?;
            Ok(start.elapsed())
        });
        self.host.listen(true)?;
        measured
    }

    /// All frames wait in the tap when the VM goes on, so that making them is not measured.
    fn received_by_guest(&mut self, frames: u32, header: [u8; 10], bytes: &[u8]) -> Result<[f64; 5]> {
        let command = format!("net-receive,0,{frames}");
        self.measure(frames, |lab| {
            lab.vm.begin(&command);
            lab.call(Call::Pause)?;
            for _ in 0..frames {
                lab.host.send_with(&header, bytes)?;
            }
            let start = Instant::now();
            lab.call(Call::Resume)?;
            lab.finish(&command)?;
            Ok(start.elapsed())
        })
    }

    fn round_trips(&mut self) -> Result<[f64; 5]> {
        self.measure(TRIPS, |lab| {
            let command = format!("net-echo,0,{TRIPS}");
            lab.vm.begin(&command);
            let bytes = frame(0, 64);
            let start = Instant::now();
            for _ in 0..TRIPS {
                lab.host.send(&bytes);
                lab.host.receive(DEADLINE).context("no answer")?;
            }
            let time = start.elapsed();
            lab.finish(&command)?;
            Ok(time)
        })
    }
}
