//! Frames and descriptors that are wrong: they cost the guest a frame, or a reset, and nothing else.

use super::super::spec::MAX_FRAME;
use super::*;
use crate::devices::virtio::testing::MEMORY;
use crate::devices::virtio::transport::status;

/// The device still works.
fn is_well(guest: &mut Guest, host: &Interface) {
    assert!(!guest.driver.needs_reset());
    guest.give(1, ROOM);
    let _ = guest.received();
    host.send(&frame(77, 100));
    guest.settle();
    assert_eq!(guest.received_frames(), [frame(77, 100)]);
    guest.send(&frame(78, 100));
    assert_eq!(host.receive(DEADLINE).unwrap().1, frame(78, 100));
    assert!(host.receive(MOMENT).is_none(), "and nothing else was sent");
}

#[test]
fn a_malformed_frame_costs_the_guest_that_frame() {
    let big = MAX_FRAME / 2 + 1;
    let lying = |field: usize| {
        let (mut header, bytes) = tap::segment(1000, 500);
        header[field] = 0xff;
        header[field + 1] = 0xff;
        (header, bytes)
    };
    let (mut guest, host) = Guest::new();
    let mut heads = vec![
        guest.driver.add(TX.into(), &[readable(DATA, TAP_HEADER - 1)]),
        guest.driver.add(TX.into(), &[readable(DATA, 0)]),
        // Less than an Ethernet header.
        guest.driver.add(TX.into(), &[readable(DATA, TAP_HEADER + 13)]),
        guest.driver.add(TX.into(), &[readable(DATA, big), readable(DATA, big)]),
        guest.driver.add(TX.into(), &[readable(DATA, TAP_HEADER), readable(DATA, 100), writable(DATA, 100)]),
        guest.driver.add(TX.into(), &[writable(DATA, 200)]),
    ];
    // The header's length, and where the checksum is, beyond the frame.
    for field in [2, 6] {
        let (header, bytes) = lying(field);
        heads.push(guest.offer(&[&header[..], &[0, 0]].concat(), &bytes));
    }
    guest.driver.kick(TX);
    let used: Vec<_> = guest.driver.used(TX.into());
    assert_eq!(used, heads.iter().map(|head| (*head, 0)).collect::<Vec<_>>());
    assert_eq!(guest.metrics().from_guest.malformed, heads.len() as u64);
    is_well(&mut guest, &host);
}

#[test]
fn a_receive_buffer_of_no_use_is_returned_empty() {
    let (mut guest, host) = Guest::new();
    let heads = [
        guest.driver.add(RX.into(), &[readable(DATA, ROOM)]),
        guest.driver.add(RX.into(), &[readable(DATA, 12), writable(DATA, ROOM)]),
        guest.driver.add(RX.into(), &[writable(DATA, TAP_HEADER - 1)]),
        guest.driver.add(RX.into(), &[writable(DATA, 0)]),
    ];
    guest.driver.kick(RX);
    // They are looked at when there is a frame.
    host.send(&frame(1, 100));
    guest.settle();
    assert_eq!(guest.driver.used(RX.into()), heads.map(|head| (head, 0)));
    assert_eq!(guest.metrics().to_guest.malformed, 4);
    guest.give(1, ROOM);
    assert_eq!(guest.received_frames(), [frame(1, 100)]);
    is_well(&mut guest, &host);
}

/// More useless buffers than a call's budget, while a frame waits for useful ones.
#[test]
fn a_flood_of_useless_buffers_ends() {
    let (mut guest, host) = Guest::new();
    guest.give(1, 100);
    host.send(&frame(1, 200));
    guest.settle();
    let mut count = 0;
    for _ in 0..5 {
        for _ in 0..255 {
            guest.driver.add(RX.into(), &[writable(DATA, 3)]);
        }
        guest.driver.kick(RX);
        guest.settle();
        count += guest.driver.used(RX.into()).len();
    }
    assert_eq!(count, 5 * 255);
    guest.give(1, ROOM);
    assert_eq!(guest.received_frames(), [frame(1, 200)]);
}

#[test]
fn a_broken_chain_costs_the_device_a_reset() {
    let outside = MEMORY as u64;
    for queue in [RX, TX] {
        for (addr, len, flags, next) in [
            (DATA, 100, 1, 0),
            (DATA, 100, 1, 999),
            (outside - 4, 8, 0, 0),
            (u64::MAX - 4, 8, 0, 0),
            (DATA, 0, 4, 0),
            (DATA, 17, 4, 0),
        ] {
            let (mut guest, host) = Guest::new();
            let write = if queue == RX && flags & 4 == 0 { 2 } else { 0 };
            guest.driver.descriptor(queue.into(), 0, addr, len, flags | write, next);
            guest.driver.offer(queue.into(), 0);
            guest.driver.kick(queue);
            guest.settle();
            if queue == RX {
                host.send(&frame(1, 100));
                guest.settle();
            }
            assert!(guest.driver.needs_reset(), "queue {queue}: {addr:#x} {len} {flags} {next}");
            guest.settle();
            assert!(!poll_readable(guest.gate(), 0), "it rests until then");
            guest.driver.negotiate(!0);
            guest.driver.set_up_queues();
            guest.driver.add_status(status::DRIVER_OK);
            if queue == RX {
                guest.give(1, ROOM);
                assert_eq!(guest.received_frames(), [frame(1, 100)], "it waited in the tap");
            }
            is_well(&mut guest, &host);
        }
    }
}

#[test]
fn more_buffers_than_a_call_takes_are_no_harm() {
    let (mut guest, host) = Guest::new();
    let parts: Vec<Part> = (0..32).map(|_| guest.place(12)).collect();
    for _ in 0..8 {
        guest.driver.add(RX.into(), &parts);
    }
    guest.driver.kick(RX);
    for number in 0..4 {
        host.send(&frame(number, 600));
    }
    guest.settle();
    let used = guest.driver.used(RX.into());
    assert_eq!(used.iter().map(|(_, len)| *len).sum::<u32>(), 4 * 612);
    assert_eq!(guest.metrics().to_guest.frames, 4);
}
