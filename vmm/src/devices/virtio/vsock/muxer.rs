//! All connections of a socket device: who they are, who has something for the guest, which
//! handshakes are late. Knows packets, not virtqueues.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::connection::{Connection, Key, Phase};
use super::metrics::Counters;
use super::spec::{HOST_CID, Header, TYPE_STREAM, op};
use super::table::{Table, Token};
use crate::backend::poller::{Poller, Ready};
use crate::backend::unix_socket::{Listener, Stream};
use crate::devices::virtio::queue::Buffers;
use crate::log::Limited;

/// Most connections at a time.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// Most of them that the guest may open.
pub(super) const MAX_FROM_GUEST: usize = 128;
/// Most host clients whose handshake is not finished; more wait in the listener's backlog.
pub(super) const MAX_PENDING: usize = 64;
/// Most answers that wait for the guest's receive buffers before its packets wait too.
const MAX_REPLIES: usize = 256;
/// How long a host client may take to say where to.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the guest may take to answer. Its kernel needs CPU time of its own for that, which a
/// busy or emulated host may not give it for long.
const CONNECTING_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest `CONNECT <port>\n`.
const MAX_GREETING: usize = 32;
/// Host ports of connections that host clients open.
const FIRST_HOST_PORT: u32 = 1 << 30;
const LAST_HOST_PORT: u32 = (1 << 31) - 1;

const LISTENER: Token = Token::MAX;
const TIMER: Token = Token::MAX - 1;

const NAME: &str = "vsock";

/// Called with the port and the host's end of a connection that the guest opened.
pub(super) type OnConnection = Box<dyn FnMut(u32, UnixStream) + Send>;

/// Handshakes of one phase, in the order of their deadlines.
struct Deadlines {
    patience: Duration,
    waiting: VecDeque<(Instant, Token)>,
}

impl Deadlines {
    fn new(patience: Duration) -> Self {
        Self { patience, waiting: VecDeque::new() }
    }

    fn next(&self) -> Option<Instant> {
        self.waiting.front().map(|&(deadline, _)| deadline)
    }

    /// Gives every handshake its whole time from `since` on.
    fn restart(&mut self, since: Instant) {
        let earliest = since + self.patience;
        for (deadline, _) in &mut self.waiting {
            *deadline = earliest.max(*deadline);
        }
    }
}

/// One limiter for each kind of warning, so that a flood of one does not hide the others.
#[derive(Default)]
struct Warnings {
    foreign_source: Limited,
    foreign_packet: Limited,
    guest_refused: Limited,
    guest_unserved: Limited,
    short_packet: Limited,
    overrun: Limited,
    misfit: Limited,
    accept: Limited,
    too_many: Limited,
    watch: Limited,
    no_greeting: Limited,
    greeting: Limited,
    refused_by_guest: Limited,
    silent_client: Limited,
    silent_guest: Limited,
    timer: Limited,
}

pub(super) struct Muxer {
    guest_cid: u64,
    host_ports: HashSet<u32>,
    on_connection: OnConnection,
    listener: Listener,
    poller: Poller,
    timer: TimerFd,
    table: Table,
    from_guest: usize,
    /// Connections in phase Greeting or Connecting.
    pending: usize,
    /// The listener may have clients that were not accepted for want of room.
    backlog: bool,
    greetings: Deadlines,
    requests: Deadlines,
    /// The timer has fired since [`Self::expire`] was called last.
    timer_fired: bool,
    /// Connections that have something for the guest, each once, in turn.
    ready: VecDeque<Token>,
    /// Answers that belong to no connection.
    replies: VecDeque<Header>,
    next_host_port: u32,
    active: bool,
    counters: Arc<Counters>,
    warnings: Warnings,
}

impl Muxer {
    pub(super) fn new(
        guest_cid: u32,
        listener: UnixListener,
        host_ports: Vec<u32>,
        on_connection: OnConnection,
        counters: Arc<Counters>,
    ) -> io::Result<Self> {
        let listener = Listener::new(listener)?;
        let poller = Poller::new()?;
        let timer = TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        poller.add(&listener, LISTENER)?;
        poller.add(&timer, TIMER)?;
        Ok(Self {
            guest_cid: guest_cid.into(),
            host_ports: host_ports.into_iter().collect(),
            on_connection,
            listener,
            poller,
            timer,
            table: Table::default(),
            from_guest: 0,
            pending: 0,
            backlog: false,
            greetings: Deadlines::new(GREETING_TIMEOUT),
            requests: Deadlines::new(CONNECTING_TIMEOUT),
            timer_fired: false,
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            active: false,
            counters,
            warnings: Warnings::default(),
        })
    }

    /// Readable when [`Self::poll`] has something to do.
    pub(super) fn fd(&self) -> RawFd {
        self.poller.as_raw_fd()
    }

    pub(super) fn connections(&self) -> usize {
        self.table.len()
    }

    /// Whether a guest is there. Ends every connection either way.
    pub(super) fn set_active(&mut self, active: bool) {
        self.active = active;
        for token in self.table.tokens() {
            self.remove(token);
        }
        self.ready.clear();
        self.replies.clear();
        self.greetings.waiting.clear();
        self.requests.waiting.clear();
    }

    /// How long a host client may take to say where to, and the guest to answer.
    pub(super) fn set_patience(&mut self, greeting: Duration, connecting: Duration) {
        self.greetings.patience = greeting;
        self.requests.patience = connecting;
    }

    // ---- connections -------------------------------------------------------------------

    fn insert(&mut self, connection: Connection) -> io::Result<Token> {
        let from_guest = connection.from_guest;
        let token = self.table.insert(connection);
        let watched = match self.table.get(token) {
            Some(connection) => self.poller.add_stream(&connection.stream, token),
            None => Ok(()),
        };
        if let Err(error) = watched {
            self.table.remove(token);
            return Err(error);
        }
        if from_guest {
            self.from_guest += 1;
        } else {
            self.pending += 1;
        }
        Ok(token)
    }

    fn remove(&mut self, token: Token) {
        let Some(connection) = self.table.remove(token) else { return };
        self.poller.remove(&connection.stream);
        if connection.from_guest {
            self.from_guest -= 1;
        }
        if matches!(connection.phase, Phase::Greeting | Phase::Connecting) {
            self.pending -= 1;
        }
    }

    /// Ends a connection that the guest knows, at once.
    fn abort(&mut self, token: Token) {
        let Some(connection) = self.table.get(token) else { return };
        let key = connection.key;
        let known = matches!(connection.phase, Phase::Connecting | Phase::Open);
        self.remove(token);
        if known {
            self.reset(key);
        }
    }

    fn reset(&mut self, key: Key) {
        self.reply(Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: key.host_port,
            dst_port: key.guest_port,
            kind: TYPE_STREAM,
            op: op::RST,
            ..Header::default()
        });
    }

    fn reply(&mut self, header: Header) {
        self.counters.reset();
        self.replies.push_back(header);
    }

    /// Puts a connection in line if it has something for the guest.
    fn enqueue(&mut self, token: Token) {
        if let Some(connection) = self.table.get(token)
            && !connection.queued
            && connection.wants_guest()
        {
            connection.queued = true;
            self.ready.push_back(token);
        }
    }

    /// The guest has let go of a connection; what it sent still reaches the host peer.
    fn release(&mut self, token: Token) {
        let Some(connection) = self.table.get(token) else { return };
        let key = connection.key;
        connection.flush(false);
        if connection.phase != Phase::Open || connection.drained() {
            self.remove(token);
        } else {
            connection.phase = Phase::Draining;
            self.table.unname(token, key);
        }
    }

    // ---- from the guest ----------------------------------------------------------------

    /// So many answers wait that the guest's next packets should wait too.
    pub(super) fn congested(&self) -> bool {
        self.replies.len() >= MAX_REPLIES
    }

    /// A packet of the guest with the payload that its descriptors hold.
    pub(super) fn receive(&mut self, header: &Header, data: &Buffers<'_>) {
        if header.src_cid != self.guest_cid {
            let (cid, own) = (header.src_cid, self.guest_cid);
            return self
                .warnings
                .foreign_source
                .warn(NAME, format_args!("packet from cid {cid} dropped: the guest's is {own}"));
        }
        if header.kind != TYPE_STREAM || header.dst_cid != HOST_CID {
            let (kind, cid) = (header.kind, header.dst_cid);
            self.warnings
                .foreign_packet
                .warn(NAME, format_args!("packet of type {kind} to cid {cid} refused: only type 1 to cid 2"));
            if header.op != op::RST {
                self.reply(header.reset_reply());
            }
            return;
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        match (self.table.find(key), header.op) {
            (None, op::REQUEST) => self.request(key, header),
            (None, op::RST) => self.counters.reset(),
            (None, _) => self.reply(header.reset_reply()),
            (Some(token), op) => self.deliver(token, op, header, data),
        }
        self.accept();
    }

    /// The guest asks for a connection.
    fn request(&mut self, key: Key, header: &Header) {
        let refuse = if !self.host_ports.contains(&key.host_port) {
            Some("the port is not open to the guest")
        } else if self.from_guest >= MAX_FROM_GUEST || self.table.len() >= MAX_CONNECTIONS {
            Some("there are too many connections")
        } else {
            None
        };
        if let Some(why) = refuse {
            self.warnings.guest_refused.warn(
                NAME,
                format_args!("connection of the guest to host port {} refused: {why}", key.host_port),
            );
            return self.reply(header.reset_reply());
        }
        let opened = Stream::pair().and_then(|(ours, theirs)| {
            let token = self.insert(Connection::accepted(ours, key, header, Arc::clone(&self.counters)))?;
            Ok((token, theirs))
        });
        match opened {
            Ok((token, theirs)) => {
                self.table.name(token, key);
                self.counters.connection();
                (self.on_connection)(key.host_port, theirs);
                self.enqueue(token);
            }
            Err(error) => {
                self.warnings.guest_unserved.warn(
                    NAME,
                    format_args!("connection of the guest to host port {}: {error}", key.host_port),
                );
                self.reply(header.reset_reply());
            }
        }
    }

    /// A packet for a connection that exists.
    fn deliver(&mut self, token: Token, op: u16, header: &Header, data: &Buffers<'_>) {
        let Some(connection) = self.table.get(token) else { return };
        connection.update_credit(header);
        match (connection.phase, op) {
            (phase, op::RST) => {
                if phase == Phase::Connecting {
                    let port = connection.key.guest_port;
                    self.warnings.refused_by_guest.warn(
                        NAME,
                        format_args!(
                            "the guest refused a connection to its port {port}: nothing listens there, \
                             or its backlog is full"
                        ),
                    );
                }
                self.counters.reset();
                self.release(token);
            }
            (Phase::Connecting, op::RESPONSE) => {
                let told = connection.established();
                self.pending -= 1;
                if told {
                    self.counters.connection();
                } else {
                    self.abort(token);
                }
            }
            (Phase::Connecting | Phase::Open, op::CREDIT_UPDATE) => {}
            (Phase::Open, op::CREDIT_REQUEST) => connection.owe_credit(),
            (Phase::Open, op::RW) => {
                let len = header.len as usize;
                if len > data.len() {
                    let there = data.len();
                    self.warnings.short_packet.warn(
                        NAME,
                        format_args!("packet of {len} bytes has only {there}; its connection is reset"),
                    );
                    self.abort(token);
                } else if connection.consume(&data.range(0, len)).is_err() {
                    self.warnings.overrun.warn(
                        NAME,
                        format_args!(
                            "the guest sent without credit or after its end; the connection is reset"
                        ),
                    );
                    self.abort(token);
                } else {
                    self.counters.sent_by_guest(len);
                }
            }
            (Phase::Open, op::SHUTDOWN) => {
                let key = connection.key;
                if connection.guest_shutdown(header.flags) {
                    self.release(token);
                    self.reset(key);
                }
            }
            (phase, op) => {
                self.warnings.misfit.warn(
                    NAME,
                    format_args!("operation {op} does not fit a connection in phase {phase:?}; it is reset"),
                );
                self.abort(token);
            }
        }
        self.enqueue(token);
    }

    // ---- to the guest ------------------------------------------------------------------

    /// Whether [`Self::produce`] may have a packet.
    pub(super) fn has_output(&self) -> bool {
        !self.replies.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, its payload already in `room` (at least one byte).
    pub(super) fn produce(&mut self, room: &Buffers<'_>) -> Option<Header> {
        if let Some(header) = self.replies.pop_front() {
            return Some(header);
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(connection) = self.table.get(token) else { continue };
            connection.queued = false;
            let packet = connection.produce(self.guest_cid, room);
            self.enqueue(token);
            if let Some(header) = packet {
                self.counters.sent_to_guest(header.len as usize);
                return Some(header);
            }
        }
        None
    }

    // ---- from the host -----------------------------------------------------------------

    /// Takes up what happened to sockets and deadlines, a bounded number of them.
    pub(super) fn poll(&mut self) -> io::Result<()> {
        let events: Vec<Ready> = self.poller.poll()?.collect();
        for event in events {
            match event.token {
                LISTENER => self.backlog = true,
                TIMER => self.timer_fired = true,
                _ => self.socket_event(event),
            }
        }
        self.accept();
        Ok(())
    }

    fn socket_event(&mut self, event: Ready) {
        let Some(connection) = self.table.get(event.token) else { return };
        connection.note(event.readable, event.writable);
        match connection.phase {
            Phase::Greeting => self.greet(event.token),
            // The client gave up.
            Phase::Connecting if event.closed => self.abort(event.token),
            Phase::Connecting => {}
            Phase::Open => connection.flush(event.closed),
            Phase::Draining => {
                connection.flush(event.closed);
                if connection.drained() {
                    self.remove(event.token);
                }
            }
        }
        self.enqueue(event.token);
    }

    /// Accepts host clients as far as there is room.
    fn accept(&mut self) {
        while self.backlog && self.pending < MAX_PENDING {
            let stream = match self.listener.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => {
                    self.backlog = false;
                    return;
                }
                Err(error) => {
                    // For want of descriptors, mostly; the next event tries again.
                    self.warnings
                        .accept
                        .warn(NAME, format_args!("accept a host client: {error} (raise RLIMIT_NOFILE?)"));
                    return;
                }
            };
            if self.table.len() >= MAX_CONNECTIONS {
                self.warnings
                    .too_many
                    .warn(NAME, format_args!("host client refused: {MAX_CONNECTIONS} connections are open"));
                continue;
            }
            match self.insert(Connection::greeting(stream, Arc::clone(&self.counters))) {
                Ok(token) => self.set_deadline(token, Phase::Greeting),
                Err(error) => self.warnings.watch.warn(NAME, format_args!("watch a host client: {error}")),
            }
        }
    }

    /// Reads `CONNECT <port>\n` and nothing beyond it.
    fn greet(&mut self, token: Token) {
        let Some(connection) = self.table.get(token) else { return };
        let mut line = [0; MAX_GREETING];
        let seen = match connection.stream.peek(&mut line) {
            Ok(seen) => seen,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(_) => 0,
        };
        let Some(end) = line[..seen].iter().position(|&byte| byte == b'\n') else {
            if seen == 0 || seen == MAX_GREETING {
                self.warnings
                    .no_greeting
                    .warn(NAME, format_args!("host client dropped: it did not say CONNECT <port>"));
                self.remove(token);
            }
            return;
        };
        let taken = connection.stream.take(&mut line[..=end]);
        let port = parse_greeting(&line[..end]);
        let (Some(guest_port), Ok(_), true) = (port, taken, self.active) else {
            let line = String::from_utf8_lossy(&line[..end]).escape_default().to_string();
            let why = if port.is_none() { "not CONNECT <port>" } else { "the guest's driver is not ready" };
            self.warnings.greeting.warn(NAME, format_args!("host client dropped: {line:?}: {why}"));
            return self.remove(token);
        };
        let Some(key) = self.free_key(guest_port) else { return self.remove(token) };
        if let Some(connection) = self.table.get(token) {
            connection.connect(key);
            self.table.name(token, key);
            self.set_deadline(token, Phase::Connecting);
        }
    }

    fn free_key(&mut self, guest_port: u32) -> Option<Key> {
        // More ports are tried than connections exist, so one is free.
        for _ in 0..=MAX_CONNECTIONS {
            let host_port = self.next_host_port;
            self.next_host_port = if host_port == LAST_HOST_PORT { FIRST_HOST_PORT } else { host_port + 1 };
            let key = Key { host_port, guest_port };
            if self.table.find(key).is_none() {
                return Some(key);
            }
        }
        None
    }

    // ---- deadlines ---------------------------------------------------------------------

    fn set_deadline(&mut self, token: Token, phase: Phase) {
        let list = if phase == Phase::Greeting { &mut self.greetings } else { &mut self.requests };
        list.waiting.push_back((Instant::now() + list.patience, token));
        if list.waiting.len() == 1 {
            self.arm();
        }
    }

    fn arm(&mut self) {
        let Some(deadline) = self.greetings.next().into_iter().chain(self.requests.next()).min() else {
            return;
        };
        // Zero would disarm it. The timer is never read: setting it forgets its expiry.
        let wait = deadline.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
        if let Err(error) = self.timer.reset(wait, None) {
            self.warnings.timer.warn(NAME, format_args!("set the handshake timer: {error}"));
        }
    }

    /// The timer has fired: [`Self::expire`] is due, once all that the guest sent was taken up.
    pub(super) fn timer_fired(&self) -> bool {
        self.timer_fired
    }

    /// Ends the handshakes that are late.
    pub(super) fn expire(&mut self, now: Instant) {
        self.timer_fired = false;
        if let Some(resumed) = self.counters.resumed() {
            // Neither the guest nor this device did anything while the VM was paused.
            self.greetings.restart(resumed);
            self.requests.restart(resumed);
        }
        while let Some(token) = self.late(Phase::Greeting, now) {
            self.warnings
                .silent_client
                .warn(NAME, format_args!("host client dropped: it did not say CONNECT <port> in time"));
            self.abort(token);
        }
        while let Some(token) = self.late(Phase::Connecting, now) {
            let port = self.table.get(token).map_or(0, |connection| connection.key.guest_port);
            self.warnings.silent_guest.warn(
                NAME,
                format_args!(
                    "the guest did not answer a connection to its port {port} in time; it is closed"
                ),
            );
            self.abort(token);
        }
        self.arm();
    }

    /// The next connection that is still in `phase` although its deadline has passed.
    fn late(&mut self, phase: Phase, now: Instant) -> Option<Token> {
        let list = if phase == Phase::Greeting { &mut self.greetings } else { &mut self.requests };
        while let Some(&(deadline, token)) = list.waiting.front() {
            let waits = self.table.get(token).is_some_and(|connection| connection.phase == phase);
            if waits && deadline > now {
                return None;
            }
            list.waiting.pop_front();
            if waits {
                return Some(token);
            }
        }
        None
    }
}

/// The port of `CONNECT <port>`.
fn parse_greeting(line: &[u8]) -> Option<u32> {
    let port = std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?;
    if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // u32::MAX is VMADDR_PORT_ANY.
    port.parse().ok().filter(|&port| port != u32::MAX)
}
