//! Taps that come and go.

use super::*;
use crate::backend::tap::TapError;
use crate::devices::virtio::transport::status;

#[test]
fn the_link_follows_the_tap() {
    let mut guest = Guest::alone(!0);
    guest.give(8, ROOM);
    assert_eq!(guest.driver.interrupt(), None);
    for round in 0..3 {
        let name = format!("tap{round}");
        let host = guest.attach(&name);
        assert_eq!(guest.driver.interrupt(), Some(2), "the configuration changed");
        assert!(guest.metrics().link_up);
        host.send(&frame(round, 100));
        guest.wait();
        assert_eq!(guest.received_frames(), [frame(round, 100)]);
        guest.send(&frame(round, 200));
        assert_eq!(host.receive(DEADLINE).unwrap().1, frame(round, 200));
        let _ = guest.driver.interrupt();
        guest.handle.detach().unwrap();
        assert_eq!(guest.driver.interrupt(), Some(2));
        assert_eq!(guest.driver.read(0x104) >> 16, 0);
        assert!(host.set_up(true).is_err(), "the interface went with its tap");
        guest.settle();
    }
    assert_eq!(guest.metrics().to_guest.frames, 3);
}

#[test]
fn a_slot_has_one_tap() {
    let (guest, _host) = Guest::new();
    let (other, interface) = tap_of("tap1");
    assert!(matches!(
        guest.handle.attach(other, NO_LIMIT, NO_LIMIT),
        Err(AttachError::Occupied { slot: SLOT })
    ));
    assert!(interface.set_up(true).is_err(), "the one refused is closed");
    guest.handle.detach().unwrap();
    assert!(matches!(guest.handle.detach(), Err(AttachError::Free { slot: SLOT })));
}

#[test]
fn a_tap_of_another_kind_is_refused() {
    let guest = Guest::alone(!0);
    let attach = |flags, header| {
        let tap = tap::open("tap9", flags, header).unwrap();
        match guest.handle.attach(tap, NO_LIMIT, NO_LIMIT) {
            Err(AttachError::Tap { source, .. }) => source,
            other => panic!("{flags:#x} {header}: {other:?}"),
        }
    };
    let (tap, tun, plain, header) = (libc::IFF_TAP, libc::IFF_TUN, libc::IFF_NO_PI, libc::IFF_VNET_HDR);
    assert!(matches!(attach(tun | plain | header, 12), TapError::Flags { missing: "IFF_TAP" }));
    assert!(matches!(attach(tap | plain, 12), TapError::Flags { missing: "IFF_VNET_HDR" }));
    assert!(matches!(attach(tap | plain | header, 10), TapError::Header { found: 10 }));
    assert!(!guest.metrics().link_up);
}

#[test]
fn what_is_sent_without_a_link_is_dropped() {
    let mut guest = Guest::alone(!0);
    let heads = [guest.send(&frame(1, 100)), guest.send(&frame(2, 100))];
    assert_eq!(guest.driver.used(TX.into()), heads.map(|head| (head, 0)));
    let counters = guest.metrics().from_guest;
    assert_eq!((counters.frames, counters.dropped), (0, 2));
}

#[test]
fn a_tap_may_come_before_the_driver() {
    enter_namespace();
    let device = Net::new(SLOT).unwrap();
    let handle = device.handle();
    let (tap, host) = pair("tap0");
    handle.attach(tap, NO_LIMIT, NO_LIMIT).unwrap();
    host.send(&frame(1, 100));
    let driver = Driver::raw(device);
    let mut guest = Guest { driver, handle, rooms: HashMap::new(), next_room: 0, next_frame: 0 };
    guest.settle();
    assert!(!poll_readable(guest.gate(), 0), "nobody is there to take the frame");
    guest.driver.negotiate(!0);
    guest.driver.set_up_queues();
    guest.driver.add_status(status::DRIVER_OK);
    guest.give(1, ROOM);
    assert_eq!(guest.received_frames(), [frame(1, 100)]);
}

#[test]
fn a_driver_may_come_again() {
    let (mut guest, host) = Guest::new();
    guest.give(4, ROOM);
    guest.driver.negotiate(!F_MRG_RXBUF);
    host.send(&frame(1, 100));
    guest.settle();
    guest.driver.set_up_queues();
    guest.driver.add_status(status::DRIVER_OK);
    guest.rooms.clear();
    guest.give(1, ROOM);
    assert_eq!(guest.received_frames(), [frame(1, 100)]);
    assert!(guest.metrics().link_up);
}

#[test]
fn a_tap_whose_interface_is_removed_costs_the_link() {
    for driver_waits in [true, false] {
        let (mut guest, host) = Guest::new();
        if driver_waits {
            guest.give(2, ROOM);
            host.remove().unwrap();
            guest.wait();
        } else {
            // Nothing is waited for then.
            host.remove().unwrap();
            guest.give(2, ROOM);
        }
        assert!(!guest.metrics().link_up);
        assert_eq!(guest.driver.read(0x104) >> 16, 0);
        assert!(!poll_readable(guest.gate(), 0), "the event loop comes to rest");
        guest.send(&frame(1, 100));
        assert_eq!(guest.metrics().from_guest.dropped, 1);
        let (other, _interface) = tap_of("tap1");
        assert!(matches!(guest.handle.attach(other, NO_LIMIT, NO_LIMIT), Err(AttachError::Occupied { .. })));
        guest.handle.detach().unwrap();
        guest.settle();
        let host = guest.attach("tap2");
        guest.give(1, ROOM);
        host.send(&frame(2, 100));
        guest.settle();
        assert_eq!(guest.received_frames(), [frame(2, 100)]);
    }
}

#[test]
fn a_tap_that_goes_while_the_guest_sends_costs_those_frames() {
    let (mut guest, host) = Guest::new();
    host.remove().unwrap();
    for number in 0..3 {
        guest.offer(&[0; TAP_HEADER], &frame(number, 100));
    }
    // The doorbell is served before the tap's failure is.
    guest.driver.kick(TX);
    assert_eq!(guest.driver.used(TX.into()).len(), 3);
    assert_eq!(guest.metrics().from_guest.dropped, 3);
    assert!(!guest.metrics().link_up);
    guest.settle();
}

#[test]
fn an_interface_that_is_down_takes_nothing_and_comes_back() {
    let (mut guest, host) = Guest::new();
    host.set_up(false).unwrap();
    guest.send(&frame(1, 100));
    assert_eq!(guest.metrics().from_guest.dropped, 1);
    assert!(guest.metrics().link_up, "it is the host's to bring it up again");
    host.set_up(true).unwrap();
    guest.send(&frame(2, 100));
    assert_eq!(host.receive(DEADLINE).unwrap().1, frame(2, 100));
}
