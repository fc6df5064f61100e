//! The event loop: one thread that obeys the control socket and runs every device.
//!
//! Requests are served between rounds of the loop, never from within a device's turn, so when
//! a call runs no device is at work: a pause needs only the vCPUs to park. While the VM is
//! paused the loop listens to its own descriptors only: what rings or arrives for a device waits
//! in its descriptor until the VM goes on.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::timerfd::TimerFd;

use super::disk_work::DiskWork;
use super::socket::SocketError;
use super::{Channel, FdTable, Incoming, zygote};
use crate::api::{
    Call, EndReason, Event, Failure, FailureCode, MAX_SNAPSHOT_WRITERS, Reply, Request, RestoreConfig,
    SnapshotConfig, SnapshotMetrics, SnapshotTimes, VmConfig, VmState, ZygoteConfig,
};
use crate::arch::RestoreStateError;
use crate::config::{
    ConfigError, MachineConfig, NextFiles, RestoredMachine, attached_disk, attached_network, merged_file,
    server_sockets, snapshot_target, zygote_target,
};
use crate::end::EndLatch;
use crate::fork::{Children, Ended};
use crate::vm::builder::{BuildError, OnConnection, Subscriber};
use crate::vm::{self, Built, Inherited, RestoredVm, StateError, Taken, Vm};
use crate::{clock, log, vcpu};

/// How long the last message may wait for the peer to take it.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// How long host peers have, after the guest's end, to take what it had sent them.
const LAST_BYTES: Duration = Duration::from_secs(1);

/// How long, in a pause, the file server has to answer what it was asked.
const IN_FLIGHT: Duration = Duration::from_secs(10);

/// The VMM cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("event loop: {0}")]
    Loop(#[from] event_manager::Error),
    #[error("event loop: {what}: {source}")]
    Source { what: &'static str, source: std::io::Error },
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Vcpu(#[from] vcpu::VcpuError),
}

/// How a VMM's life ended when nothing failed.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Ended(EndReason),
    PeerHungUp,
}

/// What woke the loop, for after the round.
#[derive(Debug, Default)]
struct Woken {
    request: Cell<bool>,
    deadline: Cell<bool>,
    child: Cell<bool>,
    disks: Cell<bool>,
}

/// Notes which of the loop's own descriptors are ready.
#[derive(Clone)]
struct Wakeups {
    channel: RawFd,
    end: RawFd,
    deadline: RawFd,
    children: RawFd,
    disks: RawFd,
    woken: Rc<Woken>,
}

impl MutEventSubscriber for Wakeups {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for fd in [self.channel, self.end, self.deadline, self.children, self.disks] {
            if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                log::error("control", format_args!("watching descriptor {fd}: {error}"));
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        if events.fd() == self.channel {
            self.woken.request.set(true);
        } else if events.fd() == self.deadline {
            self.woken.deadline.set(true);
        } else if events.fd() == self.children {
            self.woken.child.set(true);
        } else if events.fd() == self.disks {
            self.woken.disks.set(true);
        }
    }
}

/// Serves `channel` until the guest has ended or the peer is gone. `process_start_ns` is
/// reported in the metrics; what was inherited is a `Restore`'s to take.
pub fn serve(
    channel: Channel,
    process_start_ns: u64,
    inherited: Option<Inherited>,
) -> Result<Outcome, ServeError> {
    vcpu::install_kick()?;
    Server { inherited, ..Server::new(channel, process_start_ns)? }.run()
}

struct Server {
    // First, so that devices and their descriptors outlive the loop's registrations no longer
    // than the VM: fields drop in order.
    manager: EventManager<Subscriber>,
    wakeups: SubscriberId,
    devices: Vec<SubscriberId>,
    /// The loop while the VM is paused: no devices.
    paused: EventManager<Wakeups>,
    paused_wakeups: SubscriberId,
    watching_writable: bool,
    woken: Rc<Woken>,
    channel: Channel,
    end: Arc<EndLatch>,
    disk_work: DiskWork,
    deadline: TimerFd,
    /// When the timer fires.
    deadline_at: Option<Instant>,
    vm: Option<Vm>,
    /// What this process was forked with.
    inherited: Option<Inherited>,
    /// Those that write snapshots, and zygotes. They outlive this process if they have to.
    children: Children,
    snapshots: SnapshotMetrics,
    process_start_ns: u64,
    configured_ns: u64,
}

impl Server {
    fn new(channel: Channel, process_start_ns: u64) -> Result<Self, ServeError> {
        let source = |what| move |source| ServeError::Source { what, source };
        let end = Arc::new(EndLatch::new().map_err(source("the end's descriptor"))?);
        let deadline =
            TimerFd::new().map_err(|error| source("the deadline's timer")(std::io::Error::from(error)))?;
        let children = Children::new().map_err(source("the children's descriptor"))?;
        let disk_work = DiskWork::new().map_err(source("the descriptor of work for disks"))?;
        let woken = Rc::new(Woken::default());
        let mut manager: EventManager<Subscriber> = EventManager::new()?;
        let own = Wakeups {
            channel: channel.as_raw_fd(),
            end: end.as_raw_fd(),
            deadline: deadline.as_raw_fd(),
            children: children.as_raw_fd(),
            disks: disk_work.as_raw_fd(),
            woken: Rc::clone(&woken),
        };
        let wakeups = manager.add_subscriber(Box::new(own.clone()));
        let mut paused = EventManager::new()?;
        let paused_wakeups = paused.add_subscriber(own);
        Ok(Self {
            manager,
            wakeups,
            devices: Vec::new(),
            paused,
            paused_wakeups,
            watching_writable: false,
            woken,
            channel,
            end,
            disk_work,
            deadline,
            deadline_at: None,
            vm: None,
            inherited: None,
            children,
            snapshots: SnapshotMetrics::default(),
            process_start_ns,
            configured_ns: 0,
        })
    }

    fn run(mut self) -> Result<Outcome, ServeError> {
        loop {
            if self.vm.as_ref().is_some_and(Vm::is_paused) {
                self.paused.run()?;
            } else {
                self.manager.run()?;
            }
            if self.woken.deadline.take() && self.deadline_passed() {
                self.force_end();
            }
            if self.woken.child.take() {
                self.reap();
            }
            if self.woken.disks.take() {
                self.tell_finished(Duration::ZERO)?;
            }
            if self.woken.request.take() && !self.serve_one()? {
                return Ok(self.peer_hung_up());
            }
            if let Some(reason) = self.end.reason() {
                return self.finish(reason);
            }
            self.channel.flush()?;
            self.watch_writable()?;
        }
    }

    /// Serves one packet; false when the peer has hung up.
    fn serve_one(&mut self) -> Result<bool, ServeError> {
        match self.channel.receive()? {
            Incoming::Request(Request { id, call }, fds) => {
                let result = self.serve(call, fds);
                if let Err(failure) = &result {
                    log::warn("control", format_args!("request {id}: {:?}: {failure}", failure.code));
                }
                self.channel.respond(id, result)?;
            }
            Incoming::Bad(error) => {
                log::warn("control", format_args!("{error}"));
                self.channel.respond(error.id(), Err(error.failure()))?;
            }
            Incoming::Nothing => {}
            Incoming::HungUp => return Ok(false),
        }
        Ok(true)
    }

    fn serve(&mut self, call: Call, fds: FdTable) -> Result<Reply, Failure> {
        match call {
            Call::Configure(config) => self.configure(config, fds),
            Call::AttachDisk(disk) => {
                let disk = attached_disk(&disk, fds)?;
                Ok(Reply::Attached(self.vm("attach")?.attach(disk)?))
            }
            Call::MergeDisk { serial, first, last, file } => {
                let file = merged_file(file, fds)?;
                self.merge_disk(serial, first, last, file)?;
                Ok(Reply::Done)
            }
            Call::AttachFilesystem { sockets } => {
                let sockets = server_sockets(&sockets, fds)?;
                self.vm("attach")?.attach_filesystem(sockets)?;
                Ok(Reply::Done)
            }
            Call::Restore(config) => self.restore(config, fds),
            Call::Snapshot(config) => self.snapshot(config, fds),
            Call::Zygote(config) => self.zygote(config, fds),
            Call::AttachNetwork(network) => {
                let network = attached_network(&network, fds)?;
                self.vm("attach")?.attach_network(network)?;
                Ok(Reply::Done)
            }
            other => {
                fds.finish().map_err(ConfigError::from)?;
                self.serve_plain(other)
            }
        }
    }

    /// Calls that carry no descriptors.
    fn serve_plain(&mut self, call: Call) -> Result<Reply, Failure> {
        match call {
            Call::Boot => self.vm("boot")?.boot()?,
            Call::Pause => self.pause()?,
            Call::Resume => {
                let shutting_down = self.deadline_at.is_some();
                self.vm("resume")?.resume(shutting_down)?;
            }
            Call::DetachNetwork { slot } => self.vm("detach")?.detach_network(slot)?,
            Call::SetBalloon { target_mib } => self.vm("balloon")?.set_balloon(target_mib)?,
            Call::Shutdown { deadline_ms } => self.shutdown(Duration::from_millis(deadline_ms))?,
            Call::State => {
                return Ok(Reply::State(self.vm.as_ref().map_or(VmState::Empty, Vm::state)));
            }
            Call::Metrics => {
                let mut metrics = self.vm("metrics")?.metrics();
                metrics.boot.process_start_ns = self.process_start_ns;
                metrics.boot.configured_ns = self.configured_ns;
                metrics.snapshots =
                    SnapshotMetrics { writing: self.children.len() as u64, ..self.snapshots.clone() };
                return Ok(Reply::Metrics(metrics));
            }
            Call::Fork(_) => {
                let message = "fork: this is no zygote; ask the VM for one".to_owned();
                return Err(Failure { code: FailureCode::WrongState, message });
            }
            // Served above.
            Call::Configure(_)
            | Call::Restore(_)
            | Call::Snapshot(_)
            | Call::Zygote(_)
            | Call::AttachDisk(_)
            | Call::MergeDisk { .. }
            | Call::AttachFilesystem { .. }
            | Call::AttachNetwork(_) => {}
        }
        Ok(Reply::Done)
    }

    /// Parks the vCPUs and lets the devices finish what a server outside has been asked.
    fn pause(&mut self) -> Result<(), Failure> {
        self.vm("pause")?.pause()?;
        let deadline = Instant::now() + IN_FLIGHT;
        loop {
            let requests = self.vm.as_ref().map_or(0, Vm::in_flight);
            let left = deadline.saturating_duration_since(Instant::now());
            if requests == 0 {
                return Ok(());
            }
            if left.is_zero() {
                let shutting_down = self.deadline_at.is_some();
                self.vm("pause")?.resume(shutting_down)?;
                return Err(StateError::InFlight { requests, seconds: IN_FLIGHT.as_secs() }.into());
            }
            let wait = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            self.manager.run_with_timeout(wait).map_err(|error| Failure {
                code: FailureCode::HostUnfit,
                message: format!("pause: event loop: {error}"),
            })?;
        }
    }

    fn merge_disk(&mut self, serial: String, first: u32, last: u32, file: File) -> Result<(), Failure> {
        let numbers = (first as usize)..=(last as usize);
        let merging = self.vm("merge layers")?.merge_disk(&serial, numbers, file)?;
        self.disk_work.merge(serial, merging)
    }

    /// Tells the peer what was done for disks; waits so long for it.
    fn tell_finished(&mut self, patience: Duration) -> Result<(), SocketError> {
        let events = self.disk_work.finished(patience);
        events.into_iter().try_for_each(|event| self.channel.event(event, None))
    }

    /// Waits for the snapshots whose disks are being settled: what is closed is settled, so it is not long.
    fn tell_settled(&mut self) -> Result<(), SocketError> {
        let deadline = Instant::now() + LAST_WORDS;
        while self.disk_work.is_settling() && Instant::now() < deadline {
            self.tell_finished(deadline.saturating_duration_since(Instant::now()))?;
        }
        Ok(())
    }

    fn vm(&mut self, call: &'static str) -> Result<&mut Vm, Failure> {
        self.vm.as_mut().ok_or_else(|| Failure {
            code: FailureCode::WrongState,
            message: format!("{call}: there is no VM yet; configure one first"),
        })
    }

    fn require_no_vm(&self, call: &str) -> Result<(), Failure> {
        let Some(vm) = &self.vm else { return Ok(()) };
        let message = format!("{call}: this process has a VM already ({:?}); start another", vm.state());
        Err(Failure { code: FailureCode::WrongState, message })
    }

    fn restore(&mut self, config: RestoreConfig, fds: FdTable) -> Result<Reply, Failure> {
        self.require_no_vm("restore")?;
        let machine = RestoredMachine::new(config, fds)?;
        let (inherited, end) = (self.inherited.take(), Arc::clone(&self.end));
        let RestoredVm { vm, shape, saved_at_ns, subscribers } =
            vm::restore(machine, inherited, end, self.on_connection())?;
        self.take_on(vm, subscribers);
        let (disk_slots, network_slots) = (shape.disk_slots, shape.network_slots);
        Ok(Reply::Restored { disk_slots, network_slots, saved_at_ns })
    }

    fn take_on(&mut self, vm: Vm, subscribers: Vec<Subscriber>) {
        for subscriber in subscribers {
            self.devices.push(self.manager.add_subscriber(subscriber));
        }
        self.vm = Some(vm);
        self.configured_ns = clock::monotonic_ns();
    }

    /// Saves the VM and lets a child write it.
    fn snapshot(&mut self, config: SnapshotConfig, fds: FdTable) -> Result<Reply, Failure> {
        let layer_id = config.layer_id.clone();
        let (target, disks) = snapshot_target(config, fds)?;
        self.take("snapshot", layer_id, disks, |vm| vm.snapshot(&target))
    }

    fn zygote(&mut self, config: ZygoteConfig, fds: FdTable) -> Result<Reply, Failure> {
        let layer_id = config.layer_id.clone();
        let (ends, patience, disks) = zygote_target(config, fds)?;
        self.take("zygote", layer_id, disks, |vm| zygote::start(vm, &ends, patience))
    }

    /// Has a copy of the VM forked; a running VM is paused for as long as that takes.
    fn take(
        &mut self,
        call: &'static str,
        layer_id: String,
        disks: NextFiles,
        fork: impl FnOnce(&mut Vm) -> Result<Taken, StateError>,
    ) -> Result<Reply, Failure> {
        if self.children.len() >= MAX_SNAPSHOT_WRITERS {
            let message = format!(
                "{call}: {MAX_SNAPSHOT_WRITERS} copies of the VM are there already, being written or zygotes; wait for a report, or end a zygote"
            );
            return Err(Failure { code: FailureCode::Exhausted, message });
        }
        let vm = self.vm(call)?;
        vm.stage_disks(disks)?;
        let was_paused = vm.is_paused();
        let begun = Instant::now();
        if !was_paused && let Err(failure) = self.pause() {
            self.vm(call)?.unstage_disks();
            return Err(failure);
        }
        let quiesce_ns = nanoseconds(begun);
        let vm = self.vm(call)?;
        let taken = fork(vm).inspect_err(|_| vm.unstage_disks());
        let shutting_down = self.deadline_at.is_some();
        let resumed = if was_paused { Ok(()) } else { self.vm(call)?.resume(shutting_down) };
        let pause_ns = nanoseconds(begun);
        let Taken { child, times, disks } = taken?;
        self.snapshots.taken += 1;
        self.snapshots.last = SnapshotTimes { pause_ns, quiesce_ns, ..times };
        if !disks.is_empty() {
            let layers = self.vm.as_ref().map(Vm::unsettled_disks).unwrap_or_default();
            self.disk_work.settle(layer_id, layers);
        }
        if let Err(error) = self.children.add(child) {
            log::warn(call, format_args!("watching the child: {error}"));
        }
        resumed?;
        Ok(Reply::Snapshotted { times: self.snapshots.last.clone(), disks })
    }

    /// Notes which children have ended. What became of their snapshots writers have reported, or not.
    fn reap(&mut self) {
        for (pid, ended) in self.children.reap() {
            if ended != Ended::Status(0) {
                self.snapshots.failed += 1;
                log::error(
                    "snapshot",
                    format_args!("the writer or zygote {pid} has failed ({ended:?}); the VM goes on"),
                );
            }
        }
    }

    fn configure(&mut self, config: VmConfig, fds: FdTable) -> Result<Reply, Failure> {
        self.require_no_vm("configure")?;
        let (disk_slots, network_slots) = (config.disk_slots, config.network_slots);
        let machine = MachineConfig::new(config, fds)?;
        let Built { vm, disks, subscribers } =
            vm::build(machine, Arc::clone(&self.end), self.on_connection())?;
        self.take_on(vm, subscribers);
        Ok(Reply::Configured { disk_slots, network_slots, disks })
    }

    /// Hands connections of the guest to the peer.
    fn on_connection(&self) -> OnConnection {
        let channel = self.channel.clone();
        Box::new(move |port, stream| {
            if let Err(error) = channel.event(Event::GuestConnection { port }, Some(stream.into())) {
                log::warn("control", format_args!("guest connection to port {port} is lost: {error}"));
            }
        })
    }

    fn shutdown(&mut self, deadline: Duration) -> Result<(), Failure> {
        let vm = self.vm("shutdown")?;
        if deadline.is_zero() {
            vm.force_end();
            return Ok(());
        }
        vm.press_power_button()?;
        // A later call may shorten the time that an earlier one gave, not lengthen it.
        let at = Instant::now() + deadline;
        if self.deadline_at.is_none_or(|earlier| at < earlier) {
            self.deadline.reset(deadline, None).map_err(|error| Failure {
                code: FailureCode::HostUnfit,
                message: format!("shutdown: setting the deadline: {error}"),
            })?;
            self.deadline_at = Some(at);
        }
        Ok(())
    }

    fn deadline_passed(&mut self) -> bool {
        // Reading makes the descriptor unready; whether it fired is what the clock says.
        let _ = self.deadline.wait();
        self.deadline_at.is_some_and(|at| Instant::now() >= at)
    }

    fn force_end(&self) {
        if let Some(vm) = &self.vm {
            log::warn("vm", format_args!("the guest did not shut down in time; it is ended by force"));
            vm.force_end();
        }
    }

    fn watch_writable(&mut self) -> Result<(), ServeError> {
        let wanted = self.channel.has_waiting();
        if wanted != self.watching_writable {
            let set = if wanted { EventSet::IN | EventSet::OUT } else { EventSet::IN };
            let events = Events::new_raw(self.channel.as_raw_fd(), set);
            self.manager.event_ops(self.wakeups)?.modify(events)?;
            self.paused.event_ops(self.paused_wakeups)?.modify(events)?;
            self.watching_writable = wanted;
        }
        Ok(())
    }

    fn peer_hung_up(&mut self) -> Outcome {
        log::info("control", format_args!("the peer hung up; the VM ends with it"));
        if let Some(mut vm) = self.vm.take() {
            // One that does not stop ends the process when it is dropped.
            if vm.stop().is_ok() {
                vm.close_disks();
            }
        }
        Outcome::PeerHungUp
    }

    /// Says why the guest ended, as the last message, and waits until the peer has it.
    fn finish(&mut self, reason: EndReason) -> Result<Outcome, ServeError> {
        log::info("vm", format_args!("the guest ended: {reason:?}"));
        self.wind_down()?;
        self.tell_settled()?;
        // What the peer asked meanwhile is answered first; unread, it would make the peer's next
        // read fail instead of giving it this message.
        while let Ok(Incoming::Request(Request { id, .. }, _)) = self.channel.receive() {
            let message = "the guest has ended; the reason follows".to_owned();
            self.channel.respond(id, Err(Failure { code: FailureCode::Ended, message }))?;
        }
        let sent = self.channel.event(Event::Ended(reason.clone()), None).and_then(|()| self.drain());
        match sent {
            Ok(()) => Ok(Outcome::Ended(reason)),
            Err(SocketError::Send(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                Ok(Outcome::PeerHungUp)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Stops the vCPUs, delivers what the guest had handed over, closes the devices.
    fn wind_down(&mut self) -> Result<(), ServeError> {
        let Some(mut vm) = self.vm.take() else { return Ok(()) };
        vm.stop()?;
        // A paused guest's last word was its pause: what it had handed over then belongs to
        // whoever saved it there.
        if !vm.is_paused() {
            self.deliver_rest(&vm)?;
        }
        vm.close_disks();
        for device in self.devices.drain(..) {
            self.manager.remove_subscriber(device)?;
        }
        Ok(())
    }

    /// Lets devices serve the doorbells that are rung, and host peers take what was sent to them.
    fn deliver_rest(&mut self, vm: &Vm) -> Result<(), ServeError> {
        // The end's descriptor stays ready; without it the loop comes to rest.
        self.manager.remove_subscriber(self.wakeups)?;
        let deadline = Instant::now() + LAST_BYTES;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let wait = if vm.unsent() > 0 { left } else { Duration::ZERO };
            let served =
                self.manager.run_with_timeout(i32::try_from(wait.as_millis()).unwrap_or(i32::MAX))?;
            if left.is_zero() || (served == 0 && vm.unsent() == 0) {
                break;
            }
        }
        match vm.unsent() {
            0 => {}
            unsent => log::warn(
                "vm",
                format_args!(
                    "{unsent} bytes of the guest are lost: host peers did not take them in {LAST_BYTES:?}"
                ),
            ),
        }
        Ok(())
    }

    fn drain(&self) -> Result<(), SocketError> {
        let deadline = Instant::now() + LAST_WORDS;
        while self.channel.has_waiting() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(SocketError::PeerStalled { waiting: self.channel.waiting_count() });
            }
            self.channel.wait_writable(left)?;
            self.channel.flush()?;
        }
        Ok(())
    }
}

impl Channel {
    fn wait_writable(&self, patience: Duration) -> Result<(), SocketError> {
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(SocketError::Send(error.into())),
        }
    }
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self { code: FailureCode::InvalidArgument, message: error.to_string() }
    }
}

impl From<StateError> for Failure {
    fn from(error: StateError) -> Self {
        let code = match &error {
            // The guest can end between two rounds of the loop; the peer hears why next.
            StateError::WrongState { state: VmState::Ended, .. } => FailureCode::Ended,
            StateError::WrongState { .. } | StateError::NotStaged { .. } => FailureCode::WrongState,
            StateError::Exhausted { .. } => FailureCode::Exhausted,
            StateError::Attach(_)
            | StateError::NoFilesystem
            | StateError::NoFileServer
            | StateError::NoDisk { .. }
            | StateError::NoNetworkSlot { .. }
            | StateError::Balloon { .. } => FailureCode::InvalidArgument,
            StateError::Button(_)
            | StateError::Vcpu(_)
            | StateError::Platform(_)
            | StateError::Part(_)
            | StateError::Fork(_)
            | StateError::InFlight { .. } => FailureCode::HostUnfit,
        };
        Self { code, message: error.to_string() }
    }
}

impl From<BuildError> for Failure {
    fn from(error: BuildError) -> Self {
        let message = error.to_string();
        match error {
            BuildError::Image(_) => Self { code: FailureCode::BadImage, message },
            BuildError::Disk(cause) => cause.into(),
            BuildError::RestoreState(
                RestoreStateError::Processor { .. }
                | RestoreStateError::Msr { .. }
                | RestoreStateError::Tsc { .. },
            ) => Self { code: FailureCode::HostUnfit, message },
            BuildError::StateFile(_) | BuildError::Restore(_) | BuildError::RestoreState(_) => {
                Self { code: FailureCode::BadSnapshot, message }
            }
            _ => Self { code: FailureCode::HostUnfit, message },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_to_a_guest_that_has_ended_is_told_apart_from_one_at_the_wrong_time() {
        let refused = |state| {
            let error = StateError::WrongState { call: "attach", state, mend: "" };
            Failure::from(error).code
        };
        assert_eq!(refused(VmState::Ended), FailureCode::Ended);
        assert_eq!(refused(VmState::Paused), FailureCode::WrongState);
    }
}
