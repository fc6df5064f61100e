//! Nothing is lost in the device for want of room, on either side.

use std::os::unix::net::UnixDatagram;

use nix::sys::socket::{setsockopt, sockopt};

use super::super::turn::BUDGET_FRAMES;
use super::*;
use crate::backend::tap::Tap;

#[test]
fn frames_wait_in_the_tap_until_the_guest_has_room() {
    let (mut guest, host) = Guest::new();
    let count = 300;
    for number in 0..count {
        host.send(&frame(number, 100));
    }
    guest.settle();
    assert!(!poll_readable(guest.gate(), 0), "what nobody can take wakes nobody");
    assert_eq!(guest.received().len(), 0);
    let mut next = 0;
    while next < count {
        guest.give(7, ROOM);
        for got in guest.received_frames() {
            assert_eq!(got, frame(next, 100));
            next += 1;
        }
    }
    assert!(guest.metrics().to_guest.stalled > 40);
    assert_eq!(guest.metrics().to_guest.dropped, 0);
}

#[test]
fn a_frame_larger_than_the_room_there_is_waits_for_more() {
    let (mut guest, host) = Guest::new();
    guest.give(2, 300);
    host.send(&frame(1, 1400));
    host.send(&frame(2, 100));
    guest.wait();
    assert!(guest.driver.used(RX.into()).is_empty(), "a driver must not see a part of a frame");
    guest.give(1, 300);
    guest.give(1, 11);
    assert_eq!(guest.driver.used(RX.into()).len(), 1, "a buffer of no use is returned");
    guest.give(1, 300);
    assert_eq!(guest.received().len(), 0, "1200 bytes are still too few");
    guest.give(2, 300);
    let frames = guest.received();
    let [(_, first, 5), (_, second, 1)] = &frames[..] else { panic!("{}", frames.len()) };
    assert!(*first == frame(1, 1400) && *second == frame(2, 100));
    assert_eq!(guest.metrics().to_guest.malformed, 1, "the buffer of 11 bytes");
}

#[test]
fn a_frame_that_the_whole_queue_cannot_hold_is_dropped() {
    let (mut guest, host) = Guest::new();
    guest.give(256, 40);
    let big = tap::segment(40_000, 1000);
    host.send_with(&big.0, &big.1).unwrap();
    host.send(&frame(2, 60));
    guest.wait();
    assert_eq!(guest.received_frames(), [frame(2, 60)]);
    assert_eq!(guest.metrics().to_guest.dropped, 1);
    assert!(guest.metrics().link_up);
}

/// A socket that takes a few frames, for a tap whose owner limited what may be under way in the
/// host's kernel (TUNSETSNDBUF), which a test cannot fill.
fn narrow_pair() -> (UnixDatagram, UnixDatagram) {
    let (ours, host) = UnixDatagram::pair().unwrap();
    setsockopt(&ours, sockopt::SndBuf, &20_000).unwrap();
    (ours, host)
}

#[test]
fn what_the_tap_does_not_take_waits_with_the_guest() {
    let mut guest = Guest::alone(!0);
    let (ours, host) = narrow_pair();
    guest.handle.attach_unchecked(Tap::of_socket(ours)).unwrap();
    guest.settle();
    host.set_nonblocking(true).unwrap();
    let count = 200u32;
    for number in 0..count {
        guest.offer(&[0; TAP_HEADER], &frame(number, 100));
    }
    guest.driver.kick(TX);
    guest.settle();
    let mut returned = guest.driver.used(TX.into()).len();
    assert!((1..count as usize).contains(&returned), "{returned} fit the socket");
    assert_eq!(guest.metrics().from_guest.stalled, 1);
    guest.driver.kick(TX);
    assert_eq!(guest.driver.used(TX.into()).len(), 0);
    assert_eq!(guest.metrics().from_guest.stalled, 1, "a doorbell does not try in vain");
    let mut bytes = [0; 200];
    for number in 0..count {
        while host.recv(&mut bytes).is_err() {
            guest.wait();
        }
        assert_eq!(bytes[TAP_HEADER..TAP_HEADER + 100], frame(number, 100));
        returned += guest.driver.used(TX.into()).len();
    }
    assert_eq!(returned, count as usize);
}

#[test]
fn what_waits_for_a_tap_is_dropped_when_it_leaves() {
    let mut guest = Guest::alone(!0);
    let (ours, _host) = narrow_pair();
    guest.handle.attach_unchecked(Tap::of_socket(ours)).unwrap();
    for number in 0..200 {
        guest.offer(&[0; TAP_HEADER], &frame(number, 100));
    }
    guest.driver.kick(TX);
    guest.handle.detach().unwrap();
    guest.wait();
    assert_eq!(guest.driver.used(TX.into()).len(), 200);
    let counters = guest.metrics().from_guest;
    assert_eq!(counters.frames + counters.dropped, 200);
    let host = guest.attach("tap0");
    guest.send(&frame(1, 100));
    assert_eq!(host.receive(DEADLINE).unwrap().1, frame(1, 100));
}

#[test]
fn a_flood_to_the_guest_leaves_others_their_turn() {
    let (mut guest, host) = Guest::new();
    guest.give(250, 200);
    for number in 0..600 {
        host.send(&frame(number, 100));
    }
    let fd = guest.gate();
    guest.driver.transport.process_backend(fd, true, false);
    let mut next = guest.received().len();
    assert!((1..=BUDGET_FRAMES).contains(&next), "{next} in one call");
    while next < 600 {
        guest.give(100, 200);
        for got in guest.received_frames() {
            assert_eq!(got, frame(next as u32, 100));
            next += 1;
        }
    }
}

#[test]
fn a_flood_from_the_guest_leaves_others_their_turn() {
    let (mut guest, host) = Guest::new();
    let big = tap::segment(60_000, 1400);
    let header = [&big.0[..], &[0, 0]].concat();
    for _ in 0..40 {
        guest.offer(&header, &big.1);
    }
    guest.driver.write(0x50, TX.into());
    guest.driver.transport.process_queue(TX);
    let first = guest.driver.used(TX.into()).len();
    assert!((1..40).contains(&first), "{first} in one call");
    guest.settle();
    assert_eq!(first + guest.driver.used(TX.into()).len(), 40);
    assert_eq!(guest.metrics().notifications, 1, "the device's own are none of the guest's");
    assert_eq!(host.receive(DEADLINE).unwrap().1.len(), big.1.len());
}
