#![allow(clippy::cast_possible_truncation)]
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::spec::{IN_HEADER, MAX_MESSAGE, OUT_HEADER};
use super::*;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::testing::{DATA, Driver, Part, poll_readable, readable, writable};
use crate::snapshot::PartState;

const REQUESTS: usize = 1;
const REPLY: u64 = DATA + 0x20_0000;
const ROOM: usize = 4096;

/// A guest whose file server is the test.
struct Guest {
    driver: Driver,
    handle: FsHandle,
    servers: Vec<UnixStream>,
}

impl Guest {
    fn new(sockets: usize) -> Self {
        let device = Fs::new("volumes".into());
        let handle = device.handle();
        let (ours, servers): (Vec<_>, Vec<_>) = (0..sockets).map(|_| UnixStream::pair().unwrap()).unzip();
        if sockets > 0 {
            handle.attach(ours).unwrap();
        }
        for server in &servers {
            server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        }
        Self { driver: Driver::new(device), handle, servers }
    }

    /// Makes a request of `body` available, whose header claims a length of its own.
    fn ask(&mut self, unique: u64, body: &[u8], room: &[Part]) -> u16 {
        let at = DATA + unique * 0x1000;
        self.driver.fill(at, &request(unique, 77, body));
        let mut parts = vec![readable(at, IN_HEADER), readable(at + IN_HEADER as u64, body.len())];
        parts.extend(room);
        self.driver.add(REQUESTS, &parts)
    }

    /// Lets the device hear what its sockets have for it, until there is nothing.
    fn deliver(&mut self) {
        for _ in 0..1000 {
            let ready: Vec<_> = self
                .driver
                .transport
                .watches()
                .into_iter()
                .filter(|watch| watch.writable || poll_readable(watch.fd, 0))
                .collect();
            if ready.is_empty() {
                return;
            }
            for watch in ready {
                self.driver.transport.process_backend(watch.fd, true, watch.writable);
            }
            self.driver.settle();
        }
        panic!("the sockets never became quiet");
    }
}

fn request(unique: u64, claimed: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = claimed.to_le_bytes().to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend([0; IN_HEADER - 16]);
    bytes.extend(body);
    bytes
}

fn reply(unique: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = ((OUT_HEADER + body.len()) as u32).to_le_bytes().to_vec();
    bytes.extend(0i32.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(body);
    bytes
}

fn receive(server: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    server.read_exact(&mut bytes).unwrap();
    bytes
}

fn error_of(reply: &[u8]) -> i32 {
    i32::from_le_bytes(reply[4..8].try_into().unwrap())
}

#[test]
fn the_tag_and_one_queue_are_in_the_configuration() {
    let mut driver = Driver::raw(Fs::new("volumes".into()));
    let mut tag = Vec::new();
    for word in 0..10 {
        tag.extend(driver.read(0x100 + 4 * word).to_le_bytes());
    }
    assert_eq!(tag[..8], *b"volumes\0");
    assert_eq!(tag[36..], 1u32.to_le_bytes());
}

#[test]
fn a_request_goes_out_with_its_true_length_and_its_answer_comes_in() {
    let mut guest = Guest::new(1);
    let head = guest.ask(1, b"name\0", &[writable(REPLY, 20), writable(REPLY + 0x1000, ROOM)]);
    guest.driver.kick(REQUESTS as u16);
    let whole = IN_HEADER + 5;
    assert_eq!(receive(&mut guest.servers[0], whole), request(1, whole as u32, b"name\0"));
    assert!(guest.driver.used(REQUESTS).is_empty());
    assert_eq!(guest.handle.in_flight(), 1);
    let answer = reply(1, b"twenty bytes or more");
    // In two pieces, the first of which ends within the header.
    guest.servers[0].write_all(&answer[..7]).unwrap();
    guest.deliver();
    assert!(guest.driver.used(REQUESTS).is_empty());
    guest.servers[0].write_all(&answer[7..]).unwrap();
    guest.deliver();
    assert_eq!(guest.driver.used(REQUESTS), [(head, answer.len() as u32)]);
    assert_eq!(guest.driver.interrupt(), Some(1));
    assert_eq!(guest.driver.bytes(REPLY, 20), answer[..20]);
    assert_eq!(guest.driver.bytes(REPLY + 0x1000, answer.len() - 20), answer[20..]);
    assert_eq!((guest.handle.in_flight(), guest.handle.metrics().requests), (0, 1));
}

#[test]
fn as_many_requests_are_under_way_as_there_are_sockets() {
    let mut guest = Guest::new(2);
    let heads: Vec<_> = (1..=3).map(|n| guest.ask(n, b"x", &[writable(REPLY + n * 0x1000, ROOM)])).collect();
    guest.driver.kick(REQUESTS as u16);
    for server in &mut guest.servers {
        receive(server, IN_HEADER + 1);
    }
    // The second is answered first; its socket takes the third.
    guest.servers[1].write_all(&reply(2, b"")).unwrap();
    guest.deliver();
    assert_eq!(guest.driver.used(REQUESTS), [(heads[1], 16)]);
    assert_eq!(receive(&mut guest.servers[1], IN_HEADER + 1)[8], 3);
    guest.servers[0].write_all(&reply(1, b"")).unwrap();
    guest.servers[1].write_all(&reply(3, b"")).unwrap();
    guest.deliver();
    let mut done: Vec<_> = guest.driver.used(REQUESTS).into_iter().map(|(head, _)| head).collect();
    done.sort_unstable();
    assert_eq!(done, [heads[0], heads[2]]);
}

#[test]
fn a_request_that_leaves_no_room_is_finished_when_the_server_answers() {
    let mut guest = Guest::new(1);
    let head = guest.ask(1, b"forget", &[]);
    guest.driver.kick(REQUESTS as u16);
    receive(&mut guest.servers[0], IN_HEADER + 6);
    guest.servers[0].write_all(&reply(1, b"")).unwrap();
    guest.deliver();
    assert_eq!(guest.driver.used(REQUESTS), [(head, 0)]);
}

#[test]
fn large_messages_pass_a_full_socket() {
    let mut guest = Guest::new(1);
    let body: Vec<u8> = (0..900_000u32).map(|n| (n / 7) as u8).collect();
    let at = DATA + 0x1000;
    guest.driver.fill(at, &request(1, 0, &body));
    let whole = IN_HEADER + body.len();
    let head = guest.driver.add(REQUESTS, &[readable(at, whole), writable(REPLY, whole)]);
    guest.driver.kick(REQUESTS as u16);
    let mut server = guest.servers.remove(0);
    let echo = std::thread::spawn(move || {
        let got = receive(&mut server, whole);
        server.write_all(&reply(1, &got[IN_HEADER..])).unwrap();
        (got, server)
    });
    let mut used = Vec::new();
    while used.is_empty() {
        let watch = guest.driver.transport.watches()[0];
        assert!(watch.writable || poll_readable(watch.fd, 10_000), "the answer never came");
        guest.driver.transport.process_backend(watch.fd, true, watch.writable);
        used = guest.driver.used(REQUESTS);
    }
    let (got, _server) = echo.join().unwrap();
    assert_eq!(used, [(head, (OUT_HEADER + body.len()) as u32)]);
    assert!(got[IN_HEADER..] == body, "the request as the guest wrote it");
    assert!(guest.driver.bytes(REPLY + OUT_HEADER as u64, body.len()) == body, "and the answer");
}

#[test]
fn an_answer_for_which_the_guest_has_no_room_is_an_error_to_it_alone() {
    let mut guest = Guest::new(1);
    let head = guest.ask(1, b"read", &[writable(REPLY, 100)]);
    let next = guest.ask(2, b"read", &[writable(REPLY + 0x1000, ROOM)]);
    guest.driver.kick(REQUESTS as u16);
    receive(&mut guest.servers[0], IN_HEADER + 4);
    guest.servers[0].write_all(&reply(1, &[7; 50_000])).unwrap();
    guest.deliver();
    assert_eq!(guest.driver.used(REQUESTS), [(head, 16)]);
    assert_eq!(error_of(&guest.driver.bytes(REPLY, 16)), -libc::EIO);
    receive(&mut guest.servers[0], IN_HEADER + 4);
    guest.servers[0].write_all(&reply(2, b"ok")).unwrap();
    guest.deliver();
    assert_eq!(guest.driver.used(REQUESTS), [(next, 18)], "the socket is in step");
}

#[test]
fn without_a_server_requests_are_answered_at_once() {
    let mut guest = Guest::new(0);
    let head = guest.ask(1, b"x", &[writable(REPLY, ROOM)]);
    guest.driver.kick(REQUESTS as u16);
    assert_eq!(guest.driver.used(REQUESTS), [(head, 16)]);
    assert_eq!(error_of(&guest.driver.bytes(REPLY, 16)), -libc::ENOTCONN);
    assert_eq!(guest.handle.metrics().errors, 1);
}

#[test]
fn a_server_that_goes_away_fails_what_is_under_way_and_what_follows() {
    let mut guest = Guest::new(1);
    let head = guest.ask(1, b"x", &[writable(REPLY, ROOM)]);
    let waiting = guest.ask(2, b"x", &[writable(REPLY + 0x1000, ROOM)]);
    guest.driver.kick(REQUESTS as u16);
    guest.servers.clear();
    guest.deliver();
    assert_eq!(guest.driver.used(REQUESTS), [(head, 16), (waiting, 16)]);
    assert_eq!(error_of(&guest.driver.bytes(REPLY, 16)), -libc::EIO);
    assert_eq!(error_of(&guest.driver.bytes(REPLY + 0x1000, 16)), -libc::ENOTCONN);
    assert!(guest.driver.transport.watches().is_empty());
    assert!(matches!(guest.handle.attach(Vec::new()), Err(AttachError::Occupied)));
}

#[test]
fn a_server_that_breaks_the_protocol_is_left() {
    for answer in [&[1u8, 0, 0, 0][..], &u32::MAX.to_le_bytes()] {
        let mut guest = Guest::new(1);
        let head = guest.ask(1, b"x", &[writable(REPLY, ROOM)]);
        guest.driver.kick(REQUESTS as u16);
        receive(&mut guest.servers[0], IN_HEADER + 1);
        let mut bytes = answer.to_vec();
        bytes.resize(OUT_HEADER, 0);
        guest.servers[0].write_all(&bytes).unwrap();
        guest.deliver();
        assert_eq!(guest.driver.used(REQUESTS), [(head, 16)]);
        assert_eq!(error_of(&guest.driver.bytes(REPLY, 16)), -libc::EIO);
        assert!(guest.driver.transport.watches().is_empty());
    }
    let mut guest = Guest::new(1);
    guest.driver.kick(REQUESTS as u16);
    guest.servers[0].write_all(b"unasked").unwrap();
    guest.deliver();
    assert!(guest.driver.transport.watches().is_empty());
}

#[test]
fn broken_requests_are_the_drivers_error_or_refused() {
    let mut guest = Guest::new(1);
    guest.driver.add(REQUESTS, &[readable(DATA, IN_HEADER - 1), writable(REPLY, ROOM)]);
    guest.driver.kick(REQUESTS as u16);
    assert!(guest.driver.needs_reset());

    let mut guest = Guest::new(1);
    let half = MAX_MESSAGE / 2 + 1;
    let head =
        guest.driver.add(REQUESTS, &[readable(DATA, half), readable(DATA, half), writable(REPLY, ROOM)]);
    guest.driver.kick(REQUESTS as u16);
    assert_eq!(guest.driver.used(REQUESTS), [(head, 16)]);
    assert_eq!(error_of(&guest.driver.bytes(REPLY, 16)), -libc::EIO);
}

#[test]
fn a_reset_closes_the_socket_that_a_request_was_on() {
    let mut guest = Guest::new(2);
    guest.ask(1, b"x", &[writable(REPLY, ROOM)]);
    guest.driver.kick(REQUESTS as u16);
    receive(&mut guest.servers[0], IN_HEADER + 1);
    guest.driver.negotiate(!0);
    guest.driver.set_up_queues();
    guest.driver.add_status(super::super::transport::status::DRIVER_OK);
    assert_eq!(guest.driver.transport.watches().len(), 1);
    let head = guest.ask(2, b"x", &[writable(REPLY, ROOM)]);
    guest.driver.kick(REQUESTS as u16);
    assert_eq!(guest.servers[0].read(&mut [0]).unwrap(), 0, "closed");
    receive(&mut guest.servers[1], IN_HEADER + 1);
    guest.servers[1].write_all(&reply(2, b"")).unwrap();
    guest.deliver();
    assert_eq!(guest.driver.used(REQUESTS), [(head, 16)]);
}

#[test]
fn while_held_requests_wait_and_those_under_way_are_finished() {
    let mut guest = Guest::new(1);
    let first = guest.ask(1, b"x", &[writable(REPLY, ROOM)]);
    let second = guest.ask(2, b"x", &[writable(REPLY + 0x1000, ROOM)]);
    guest.driver.kick(REQUESTS as u16);
    receive(&mut guest.servers[0], IN_HEADER + 1);
    guest.handle.hold(true);
    guest.servers[0].write_all(&reply(1, b"")).unwrap();
    let watch = guest.driver.transport.watches()[0];
    guest.driver.transport.process_backend(watch.fd, true, false);
    assert_eq!(guest.driver.used(REQUESTS), [(first, 16)]);
    assert_eq!(guest.handle.in_flight(), 0);
    guest.handle.hold(false);
    guest.driver.settle();
    receive(&mut guest.servers[0], IN_HEADER + 1);
    guest.servers[0].write_all(&reply(2, b"")).unwrap();
    guest.deliver();
    assert_eq!(guest.driver.used(REQUESTS), [(second, 16)]);
}

#[test]
fn a_restored_device_serves_what_waited_from_another_server() {
    let mut guest = Guest::new(1);
    let first = guest.ask(1, b"x", &[writable(REPLY, ROOM)]);
    let second = guest.ask(2, b"x", &[writable(REPLY + 0x1000, ROOM)]);
    guest.driver.kick(REQUESTS as u16);
    receive(&mut guest.servers[0], IN_HEADER + 1);
    guest.handle.hold(true);
    let error = guest.driver.transport.save().unwrap_err();
    assert!(error.to_string().contains("with the file server"), "{error}");
    guest.servers[0].write_all(&reply(1, b"")).unwrap();
    let watch = guest.driver.transport.watches()[0];
    guest.driver.transport.process_backend(watch.fd, true, false);

    let device = Fs::new("volumes".into());
    let handle = device.handle();
    handle.hold(true);
    let mut driver = guest.driver.restored(device);
    assert!(handle.awaits_server());
    let (ours, mut server) = UnixStream::pair().unwrap();
    server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    handle.attach(vec![ours]).unwrap();
    assert!(!handle.awaits_server());
    handle.hold(false);
    driver.settle();
    assert_eq!(receive(&mut server, IN_HEADER + 1)[8], 2, "the first was answered by the one before");
    server.write_all(&reply(2, b"")).unwrap();
    assert!(poll_readable(driver.transport.watches()[0].fd, 0));
    let fd = driver.transport.watches()[0].fd;
    driver.transport.process_backend(fd, true, false);
    assert_eq!(driver.used(REQUESTS), [(first, 16), (second, 16)]);
}

#[test]
fn a_restored_device_awaits_a_server_if_it_had_one() {
    let restored = |guest: &Guest| {
        let device = Fs::new("volumes".into());
        let handle = device.handle();
        (guest.driver.restored(device), handle)
    };
    let (_driver, handle) = restored(&Guest::new(0));
    assert!(!handle.awaits_server());
    let (driver, handle) = restored(&Guest::new(1));
    assert!(handle.awaits_server());
    let device = Fs::new("volumes".into());
    let again = device.handle();
    let _driver = driver.restored(device);
    assert!(again.awaits_server(), "saved before it got one");

    let restore = |version, data| {
        let mut device = Fs::new("volumes".into());
        let handle = device.handle();
        device.restore(&PartState { version, data }).map(|()| handle.awaits_server())
    };
    assert_eq!(restore(1, serde_json::Value::Null).ok(), Some(false), "of an older build");
    assert!(restore(2, serde_json::Value::Null).is_err());
    assert!(restore(3, serde_json::Value::Null).is_err());
}
