//! Limits in real time. How exact they are is the limiter's own tests' matter.

use std::time::Instant;

use super::*;

fn limited(to_guest: RateLimit, from_guest: RateLimit) -> (Guest, Interface) {
    let mut guest = Guest::alone(!0);
    let (tap, host) = pair("tap0");
    guest.handle.attach(tap, to_guest, from_guest).unwrap();
    guest.settle();
    (guest, host)
}

#[test]
fn frames_to_the_guest_wait_for_the_rate() {
    let limit = RateLimit { bytes_per_s: 0, packets_per_s: 500 };
    let (mut guest, host) = limited(limit, NO_LIMIT);
    let start = Instant::now();
    guest.give(200, 200);
    for number in 0..150 {
        host.send(&frame(number, 100));
    }
    let mut next = 0;
    while next < 150 {
        guest.wait();
        for got in guest.received_frames() {
            assert_eq!(got, frame(next, 100));
            next += 1;
        }
    }
    // A burst of 50 at once, the others 2 ms apart.
    assert!(start.elapsed() >= Duration::from_millis(195), "{:?}", start.elapsed());
    let metrics = guest.metrics();
    assert!(metrics.to_guest.throttled > 0 && metrics.to_guest.dropped == 0);
}

#[test]
fn frames_from_the_guest_wait_for_the_rate() {
    let limit = RateLimit { bytes_per_s: 50_000, packets_per_s: 0 };
    let (mut guest, host) = limited(NO_LIMIT, limit);
    let start = Instant::now();
    for number in 0..150 {
        guest.offer(&[0; TAP_HEADER], &frame(number, 100));
    }
    guest.driver.kick(TX);
    let first = guest.driver.used(TX.into()).len();
    assert!((50..150).contains(&first), "{first} at once");
    guest.driver.kick(TX);
    let mut returned = first;
    while returned < 150 {
        guest.wait();
        returned += guest.driver.used(TX.into()).len();
    }
    assert!(start.elapsed() >= Duration::from_millis(195), "{:?}", start.elapsed());
    for number in 0..150 {
        assert_eq!(host.receive(DEADLINE).unwrap().1, frame(number, 100));
    }
    assert!(guest.metrics().from_guest.throttled > 0);
}

#[test]
fn one_direction_does_not_wait_for_the_other() {
    let slow = RateLimit { bytes_per_s: 0, packets_per_s: 1 };
    let (mut guest, host) = limited(slow, NO_LIMIT);
    guest.give(20, 200);
    for number in 0..10 {
        host.send(&frame(number, 100));
    }
    guest.settle();
    assert_eq!(guest.received().len(), 1);
    for number in 0..100 {
        guest.send(&frame(number, 100));
        assert_eq!(host.receive(DEADLINE).unwrap().1, frame(number, 100));
    }
    assert!(host.receive(MOMENT).is_none());
}

#[test]
fn a_limit_ends_with_its_tap() {
    let slow = RateLimit { bytes_per_s: 1, packets_per_s: 1 };
    let (mut guest, host) = limited(slow, slow);
    guest.give(20, 200);
    for number in 0..3 {
        host.send(&frame(number, 100));
        guest.offer(&[0; TAP_HEADER], &frame(number, 100));
    }
    guest.driver.kick(TX);
    guest.settle();
    assert_eq!((guest.received().len(), guest.driver.used(TX.into()).len()), (1, 1));
    guest.handle.detach().unwrap();
    guest.wait();
    assert_eq!(guest.driver.used(TX.into()).len(), 2, "dropped with the link");
    let host = guest.attach("tap1");
    for number in 0..10 {
        host.send(&frame(number, 100));
    }
    guest.wait();
    assert_eq!(guest.received().len(), 10);
}
