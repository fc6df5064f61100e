#![allow(clippy::cast_possible_truncation)]
//! The device with a real tap: each test's thread has a network namespace of its own.

mod back_pressure;
mod hostile;
mod link;
mod offload;
mod rate;
#[path = "../../../../../tests/native/src/tap.rs"]
#[allow(unreachable_pub, dead_code)] // of a library's interface, which this is elsewhere
mod tap;
mod throughput;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use self::tap::{Interface, TAP_HEADER, enter_namespace, frame, pair};
use super::spec::{F_MRG_RXBUF, RX, TX};
use super::*;
use crate::api::{NetMetrics, RateLimit};
use crate::devices::virtio::testing::{DATA, Driver, Part, poll_readable, readable, writable};

const DEADLINE: Duration = Duration::from_secs(30);
/// For what shall not come.
const MOMENT: Duration = Duration::from_millis(20);
const NO_LIMIT: RateLimit = RateLimit { bytes_per_s: 0, packets_per_s: 0 };
/// A receive buffer for any frame of an ordinary MTU.
const ROOM: usize = 1600;

const SLOT: u8 = 1;

/// A guest whose network is the test.
struct Guest {
    driver: Driver,
    handle: NetHandle,
    /// Where receive buffers are, by their head.
    rooms: HashMap<u16, Part>,
    next_room: u64,
    next_frame: u64,
}

impl Guest {
    /// A guest with a tap and the interface at the tap's other end.
    fn new() -> (Self, Interface) {
        Self::with_features(!0)
    }

    fn with_features(mask: u64) -> (Self, Interface) {
        let mut guest = Self::alone(mask);
        let host = guest.attach("tap0");
        (guest, host)
    }

    /// One without a tap, in a namespace of its own.
    fn alone(mask: u64) -> Self {
        enter_namespace();
        let device = Net::new(SLOT).unwrap();
        let handle = device.handle();
        let driver = Driver::with_features(device, mask);
        Self { driver, handle, rooms: HashMap::new(), next_room: 0, next_frame: 0 }
    }

    fn attach(&mut self, name: &str) -> Interface {
        let (tap, host) = pair(name);
        self.handle.attach(tap, NO_LIMIT, NO_LIMIT).unwrap();
        self.settle();
        host
    }

    fn gate(&self) -> i32 {
        self.driver.transport.watches()[0].fd
    }

    /// Does what the event loop would until there is nothing to do.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            self.driver.settle();
            if !poll_readable(self.gate(), 0) {
                return;
            }
            let fd = self.gate();
            self.driver.transport.process_backend(fd, true, false);
        }
        panic!("the device never became quiet");
    }

    /// Waits until the device is woken, and lets it work.
    fn wait(&mut self) {
        assert!(poll_readable(self.gate(), DEADLINE.as_millis() as i32), "nothing woke the device");
        self.settle();
    }

    fn place(&mut self, len: usize) -> Part {
        let at = DATA + 0x8_0000 + self.next_room;
        self.next_room = (self.next_room + len as u64).next_multiple_of(64) % 0x60_0000;
        writable(at, len)
    }

    /// Gives `count` receive buffers of `len` bytes.
    fn give(&mut self, count: usize, len: usize) {
        for _ in 0..count {
            let part = self.place(len);
            let head = self.driver.add(RX.into(), &[part]);
            self.rooms.insert(head, part);
        }
        self.driver.kick(RX);
        self.settle();
    }

    /// What came: header, frame, and how many buffers it took.
    fn received(&mut self) -> Vec<([u8; TAP_HEADER], Vec<u8>, usize)> {
        let mut used = self.driver.used(RX.into()).into_iter();
        let mut frames = Vec::new();
        while let Some((head, written)) = used.next() {
            let first = self.rooms.remove(&head).unwrap();
            let mut bytes = self.driver.bytes(first.addr, written as usize);
            let buffers = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
            for _ in 1..buffers {
                let (head, written) = used.next().expect("all of a frame's buffers come at once");
                bytes.extend(self.driver.bytes(self.rooms.remove(&head).unwrap().addr, written as usize));
            }
            let frame = bytes.split_off(TAP_HEADER);
            frames.push((bytes.try_into().unwrap(), frame, buffers));
        }
        frames
    }

    fn received_frames(&mut self) -> Vec<Vec<u8>> {
        self.received().into_iter().map(|(_, frame, _)| frame).collect()
    }

    /// Makes a frame available to the device; its head.
    fn offer(&mut self, header: &[u8], frame: &[u8]) -> u16 {
        let at = DATA + 0x70_0000 + self.next_frame;
        let len = (header.len() + frame.len()) as u64;
        self.next_frame = (self.next_frame + len).next_multiple_of(64) % 0x60_0000;
        self.driver.fill(at, header);
        self.driver.fill(at + header.len() as u64, frame);
        self.driver.add(TX.into(), &[readable(at, header.len() + frame.len())])
    }

    fn send(&mut self, frame: &[u8]) -> u16 {
        let head = self.offer(&[0; TAP_HEADER], frame);
        self.driver.kick(TX);
        self.settle();
        head
    }

    fn metrics(&self) -> NetMetrics {
        self.handle.metrics()
    }
}

fn tap_of(name: &str) -> (OwnedFd, Interface) {
    pair(name)
}

#[test]
fn frames_go_both_ways() {
    let (mut guest, host) = Guest::new();
    guest.give(4, ROOM);
    host.send(&frame(1, 60));
    host.send(&frame(2, 1514));
    guest.wait();
    assert_eq!(guest.driver.interrupt(), Some(1 | 2), "one for both, beside the link's");
    assert_eq!(
        guest.received(),
        [
            ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], frame(1, 60), 1),
            ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], frame(2, 1514), 1)
        ]
    );
    let heads = [guest.send(&frame(3, 18)), guest.send(&frame(4, 1514))];
    assert_eq!(guest.driver.used(TX.into()), heads.map(|head| (head, 0)));
    assert_eq!(guest.driver.interrupt(), Some(1));
    for (number, len) in [(3, 18), (4, 1514)] {
        assert_eq!(host.receive(DEADLINE).unwrap().1, frame(number, len));
    }
    let metrics = guest.metrics();
    assert_eq!((metrics.to_guest.frames, metrics.to_guest.bytes), (2, 60 + 1514));
    assert_eq!((metrics.from_guest.frames, metrics.from_guest.bytes), (2, 18 + 1514));
    assert_eq!((metrics.slot, metrics.link_up, metrics.interrupts), (SLOT, true, 2));
}

#[test]
fn a_frame_may_be_in_pieces_anywhere() {
    let (mut guest, host) = Guest::new();
    let bytes = [vec![0; TAP_HEADER], frame(9, 700)].concat();
    let pieces = [0..5, 5..11, 11..13, 13..300, 300..712];
    let parts: Vec<Part> = pieces
        .into_iter()
        .zip(0u64..)
        .map(|(range, n)| {
            let at = DATA + n * 0x1003;
            guest.driver.fill(at, &bytes[range.clone()]);
            readable(at, range.len())
        })
        .collect();
    guest.driver.add(TX.into(), &parts);
    guest.driver.kick(TX);
    assert_eq!(host.receive(DEADLINE).unwrap().1, frame(9, 700));

    let parts: Vec<Part> = [5, 6, 2, 400, 400].map(|len| guest.place(len)).into();
    let head = guest.driver.add(RX.into(), &parts);
    guest.driver.kick(RX);
    host.send(&frame(8, 500));
    guest.wait();
    assert_eq!(guest.driver.used(RX.into()), [(head, 512)]);
    let mut bytes = Vec::new();
    for (part, len) in parts.iter().zip([5, 6, 2, 400, 99]) {
        bytes.extend(guest.driver.bytes(part.addr, len));
    }
    assert_eq!(bytes[10..12], [1, 0], "across two of the pieces");
    assert_eq!(bytes[12..], frame(8, 500));
}

#[test]
fn a_frame_fills_as_many_buffers_as_it_needs() {
    let (mut guest, host) = Guest::new();
    guest.give(64, 300);
    for (number, len, buffers) in [(1, 1400, 5), (2, 288, 1), (3, 289, 2), (4, 1488, 5)] {
        host.send(&frame(number, len));
        guest.wait();
        let [(_, got, count)] = &guest.received()[..] else { panic!("one frame") };
        assert!(*got == frame(number, len) && *count == buffers, "{len}: {count} buffers");
    }
    assert_eq!(guest.metrics().to_guest.frames, 4);
}

#[test]
fn without_mergeable_buffers_a_frame_has_to_fit_one_chain() {
    let (mut guest, host) = Guest::with_features(!F_MRG_RXBUF);
    guest.give(2, 300);
    guest.give(1, ROOM);
    host.send(&frame(1, 1000));
    host.send(&frame(2, 200));
    host.send(&frame(3, 288));
    host.send(&frame(4, 1000));
    guest.wait();
    let frames = guest.received();
    assert_eq!(frames.iter().map(|(header, ..)| header[10..].to_vec()).collect::<Vec<_>>(), [[1, 0]; 3]);
    assert!(frames.into_iter().map(|(_, got, _)| got).eq([frame(2, 200), frame(3, 288), frame(4, 1000)]));
    assert_eq!(guest.metrics().to_guest.dropped, 1);
}

#[test]
fn a_driver_may_take_no_feature() {
    let (mut guest, host) = Guest::with_features(0);
    guest.give(3, ROOM);
    for number in 0..3 {
        host.send(&frame(number, 100));
    }
    guest.wait();
    assert_eq!(guest.received_frames(), [frame(0, 100), frame(1, 100), frame(2, 100)]);
    guest.send(&frame(7, 100));
    assert_eq!(host.receive(DEADLINE).unwrap().1, frame(7, 100));
}

#[test]
fn the_configuration_has_address_and_link() {
    let mut guest = Guest::alone(!0);
    let config = |guest: &mut Guest| [guest.driver.read(0x100), guest.driver.read(0x104)];
    let mac = crate::api::network_mac(SLOT);
    assert_eq!(mac, [0x02, 0x73, 0x70, 0x6f, 0x72, SLOT]);
    let words =
        |status: u8| [u32::from_le_bytes([2, 0x73, 0x70, 0x6f]), u32::from_le_bytes([0x72, SLOT, status, 0])];
    assert_eq!(config(&mut guest), words(0));
    let _host = guest.attach("tap0");
    assert_eq!(config(&mut guest), words(1));
    assert_eq!(guest.driver.read(0x108), 0, "and nothing more");
}
