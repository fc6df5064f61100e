//! COM1: a 16550 (`vm-superio`) whose output goes to a descriptor, up to a cap, and whose
//! input, if there is any, comes from one.
//!
//! The guest's writes arrive on vCPU threads under the device's lock and go out at once; an
//! output that takes nothing (a full pipe, a stopped terminal) may hold a vCPU up for
//! [`PATIENCE`] once, and from then on loses bytes until it takes some again. Input is read on
//! the event loop, as much as the 16550's queue has room for; when the guest has emptied the
//! queue, `room` wakes the loop. The input's end is the end of input, not of the VM.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::PioDevice;
use crate::log;
use crate::snapshot::contract::{PartState, RestoreError, SaveError};

/// How long an output may hold a vCPU up.
const PATIENCE: Duration = Duration::from_millis(100);
const INPUT_CHUNK: usize = 64;

/// Counters, shared with the metrics.
#[derive(Debug, Default)]
pub struct ConsoleCounters {
    pub bytes: AtomicU64,
    pub dropped: AtomicU64,
}

/// The serial port's interrupt line.
#[derive(Debug)]
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Says when the guest has taken all input.
#[derive(Debug)]
struct Room(Option<EventFd>);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if let Some(event) = &self.0 {
            // Fails only when the counter is full, and then the loop is awake already.
            let _ = event.write(1);
        }
    }
}

/// Where output goes, and how much of it.
#[derive(Debug)]
pub struct CappedOutput {
    file: Option<File>,
    cap: u64,
    counters: Arc<ConsoleCounters>,
    capped: bool,
    stalled: bool,
}

impl CappedOutput {
    /// `cap` 0 is no cap; without `file` all output is dropped and not counted.
    pub fn new(file: Option<File>, cap: u64, counters: Arc<ConsoleCounters>) -> Self {
        Self { file, cap, counters, capped: false, stalled: false }
    }

    fn put(&mut self, data: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            return Ok(());
        }
        let count = data.len() as u64;
        let written = self.counters.bytes.load(Ordering::Relaxed);
        if self.cap > 0 && written.saturating_add(count) > self.cap {
            self.counters.dropped.fetch_add(count, Ordering::Relaxed);
            return self.say_capped();
        }
        let counter = if self.offer(data)? { &self.counters.bytes } else { &self.counters.dropped };
        counter.fetch_add(count, Ordering::Relaxed);
        Ok(())
    }

    /// Says once that output stops; later, if the output takes nothing now.
    fn say_capped(&mut self) -> io::Result<()> {
        if !self.capped {
            let cap = self.cap;
            let notice = format!("\n[spore-vmm: console output stops here, at its cap of {cap} bytes]\n");
            self.capped = self.offer(notice.as_bytes())?;
        }
        Ok(())
    }

    /// Writes `data` unless the output takes nothing for too long; false then.
    fn offer(&mut self, data: &[u8]) -> io::Result<bool> {
        let Some(file) = &mut self.file else { return Ok(false) };
        let patience = if self.stalled { Duration::ZERO } else { PATIENCE };
        self.stalled = !writable(file, patience)?;
        if self.stalled {
            return Ok(false);
        }
        match file.write_all(data) {
            // It is writable, but not for this much.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            other => other.map(|()| true),
        }
    }
}

/// Whether `file` takes bytes, or does so before `patience` is over.
fn writable(file: &File, patience: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut fds, timeout) {
            Ok(0) => return Ok(false),
            // An error state counts as writable: the write then says what it is.
            Ok(_) => return Ok(true),
            // A kick of the vCPU, for one.
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

impl Write for CappedOutput {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.put(data) {
            log::warn(
                "serial",
                format_args!("writing console output: {error}; all further output is dropped"),
            );
            self.file = None;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Newest version of the saved state.
const VERSION: u32 = 1;
const PART: &str = "serial";

/// The 16550's registers, and what the guest has not read of its input.
#[derive(Debug, Serialize, Deserialize)]
struct SerialStateV1 {
    divisor_low: u8,
    divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

/// The device on the bus.
#[derive(Debug)]
pub struct SerialPort(Serial<Line, Room, CappedOutput>);

static REGISTER_FAILED: log::Limited = log::Limited::new();
static INPUT_FAILED: log::Limited = log::Limited::new();

impl SerialPort {
    /// A port without input.
    pub fn new(line: EventFd, output: CappedOutput) -> Self {
        Self(Serial::with_events(Line(line), Room(None), output))
    }

    /// A port with input: `room` is signalled when the guest has taken all of it.
    pub fn with_input(line: EventFd, output: CappedOutput, room: EventFd) -> Self {
        Self(Serial::with_events(Line(line), Room(Some(room)), output))
    }

    /// A saved port, with `room` if it has input. An interrupt that was pending is raised, so the interrupt controllers have their
    /// state. Of its output nothing is saved: it went out at once.
    pub fn restore(
        state: &PartState,
        line: EventFd,
        output: CappedOutput,
        room: Option<EventFd>,
    ) -> Result<Self, RestoreError> {
        let state: SerialStateV1 = state.read(PART, VERSION)?;
        let state = SerialState {
            baud_divisor_low: state.divisor_low,
            baud_divisor_high: state.divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input,
        };
        let port = Serial::from_state(&state, Line(line), Room(room), output);
        port.map(Self).map_err(|error| RestoreError::invalid(PART, format_args!("{error:?}")))
    }

    pub fn save(&self) -> Result<PartState, SaveError> {
        let state = self.0.state();
        let state = SerialStateV1 {
            divisor_low: state.baud_divisor_low,
            divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            input: state.in_buffer,
        };
        PartState::new(PART, VERSION, &state)
    }
}

impl PioDevice for SerialPort {
    fn read(&mut self, offset: u16) -> u8 {
        u8::try_from(offset).map_or(0xff, |offset| self.0.read(offset))
    }

    fn write(&mut self, offset: u16, value: u8) {
        let Ok(offset) = u8::try_from(offset) else { return };
        if let Err(error) = self.0.write(offset, value) {
            REGISTER_FAILED.warn("serial", format_args!("register {offset}: {error:?}"));
        }
    }
}

/// Feeds the port from a descriptor. Runs on the event loop; takes the port's lock.
pub struct SerialInput {
    port: Arc<Mutex<SerialPort>>,
    input: File,
    room: EventFd,
    watching: bool,
}

impl SerialInput {
    pub fn new(port: Arc<Mutex<SerialPort>>, input: File, room: EventFd) -> Self {
        Self { port, input, room, watching: false }
    }

    fn watch(&mut self, on: bool, ops: &mut EventOps<'_>) {
        if on == self.watching {
            return;
        }
        let events = Events::new(&self.input, EventSet::IN);
        let done = if on { ops.add(events) } else { ops.remove(events) };
        match done {
            Ok(()) => self.watching = on,
            // A regular file cannot be watched.
            Err(error) => log::warn("serial", format_args!("watching console input: {error}")),
        }
    }

    /// Moves what fits; false when there is no more to come.
    fn pump(&mut self, ops: &mut EventOps<'_>) -> bool {
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        let mut data = [0; INPUT_CHUNK];
        let room = port.0.fifo_capacity().min(data.len());
        if room == 0 {
            drop(port);
            self.watch(false, ops);
            return true;
        }
        let more = match self.input.read(&mut data[..room]) {
            Ok(0) => false,
            Ok(count) => {
                if let Err(error) = port.0.enqueue_raw_bytes(&data[..count]) {
                    INPUT_FAILED.warn("serial", format_args!("input: {error:?}"));
                }
                true
            }
            Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        };
        drop(port);
        more
    }
}

impl MutEventSubscriber for SerialInput {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.room, EventSet::IN)) {
            log::warn("serial", format_args!("watching the port's queue: {error}"));
        }
        self.watch(true, ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.room.as_raw_fd() {
            let _ = self.room.read();
            self.watch(true, ops);
        } else if !self.pump(ops) {
            self.watch(false, ops);
            let _ = ops.remove(Events::new(&self.room, EventSet::IN));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    use super::*;

    const DATA: u16 = 0;
    const LINE_STATUS: u16 = 5;

    fn read_back(mut file: File) -> String {
        file.rewind().unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        text
    }

    fn port(file: Option<File>, cap: u64) -> (SerialPort, Arc<ConsoleCounters>) {
        let counters = Arc::new(ConsoleCounters::default());
        let output = CappedOutput::new(file, cap, Arc::clone(&counters));
        (SerialPort::new(EventFd::new(0).unwrap(), output), counters)
    }

    fn send(port: &mut SerialPort, text: &str) {
        for byte in text.bytes() {
            port.write(DATA, byte);
        }
    }

    #[test]
    fn output_reaches_the_file() {
        let file = tempfile::tempfile().unwrap();
        let (mut port, counters) = port(Some(file.try_clone().unwrap()), 0);
        send(&mut port, "hello\n");
        assert_eq!(read_back(file), "hello\n");
        assert_eq!(counters.bytes.load(Ordering::Relaxed), 6);
        assert_ne!(port.read(LINE_STATUS) & 0x20, 0, "ready for more");
    }

    #[test]
    fn output_stops_at_the_cap_and_says_so_once() {
        let file = tempfile::tempfile().unwrap();
        let (mut port, counters) = port(Some(file.try_clone().unwrap()), 4);
        send(&mut port, "0123456789");
        let text = read_back(file);
        assert!(text.starts_with("0123\n[spore-vmm: "), "{text}");
        assert_eq!(text.matches("cap of 4 bytes").count(), 1);
        assert_eq!(counters.bytes.load(Ordering::Relaxed), 4);
        assert_eq!(counters.dropped.load(Ordering::Relaxed), 6);
    }

    #[test]
    fn a_failing_output_is_given_up() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        drop(reader);
        let (mut port, counters) = port(Some(File::from(writer)), 0);
        send(&mut port, "lost");
        assert_eq!(counters.bytes.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_full_pipe_loses_bytes_instead_of_blocking() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let (mut port, counters) = port(Some(File::from(writer)), 0);
        let sent = 80_000;
        for _ in 0..sent {
            port.write(DATA, b'x');
        }
        let (bytes, dropped) = (&counters.bytes, &counters.dropped);
        assert!(dropped.load(Ordering::Relaxed) > 0);
        assert_eq!(bytes.load(Ordering::Relaxed) + dropped.load(Ordering::Relaxed), sent);
        drop(reader);
    }

    #[test]
    fn the_notice_of_the_cap_waits_for_a_full_pipe() {
        for nonblocking in [false, true] {
            let (mut reader, mut writer) = io::pipe().unwrap();
            let fill = fcntl(&writer, FcntlArg::F_GETPIPE_SZ).unwrap();
            writer.write_all(&vec![b'.'; usize::try_from(fill).unwrap()]).unwrap();
            if nonblocking {
                fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
            }
            let (mut port, counters) = port(Some(File::from(std::os::fd::OwnedFd::from(writer))), 1);
            // The pipe stays full: neither the byte nor the notice may block.
            send(&mut port, "ab");
            assert_eq!(counters.dropped.load(Ordering::Relaxed), 2);
            reader.read_exact(&mut vec![0; usize::try_from(fill).unwrap()]).unwrap();
            send(&mut port, "cde");
            drop(port);
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            assert_eq!((text.matches("cap of 1 bytes").count(), &text[..2]), (1, "c\n"), "{text}");
            assert_eq!(counters.dropped.load(Ordering::Relaxed), 4);
        }
    }

    #[test]
    fn input_waits_for_room() {
        let (reader, mut writer) = io::pipe().unwrap();
        let (line, room) = (EventFd::new(0).unwrap(), EventFd::new(0).unwrap());
        let output = CappedOutput::new(None, 0, Arc::default());
        let port = SerialPort::with_input(line, output, room.try_clone().unwrap());
        let port = Arc::new(Mutex::new(port));
        let input = File::from(std::os::fd::OwnedFd::from(reader));
        let mut manager = event_manager::EventManager::<SerialInput>::new().unwrap();
        use event_manager::SubscriberOps;
        manager.add_subscriber(SerialInput::new(Arc::clone(&port), input, room));
        let sent: Vec<u8> = (0..200).collect();
        writer.write_all(&sent).unwrap();
        drop(writer);
        let mut seen = Vec::new();
        while seen.len() < sent.len() {
            manager.run_with_timeout(1000).unwrap();
            let mut port = port.lock().unwrap();
            while port.read(LINE_STATUS) & 1 != 0 {
                seen.push(port.read(DATA));
            }
        }
        assert_eq!(seen, sent);
    }
}
