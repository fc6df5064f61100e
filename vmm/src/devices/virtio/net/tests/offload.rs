//! Checksums and segmentation pass through unfinished, as far as both sides take them so.

use super::super::spec::{F_GUEST_CSUM, F_GUEST_TSO4};
use super::tap::{SOCKET_HEADER, is_sum_right, segment};
use super::*;

const PAYLOAD: usize = 40_000;

#[test]
fn a_large_segment_reaches_the_guest_in_one_piece() {
    let (mut guest, host) = Guest::new();
    guest.give(40, 1536);
    let (header, big) = segment(PAYLOAD, 1400);
    host.send_with(&header, &big).unwrap();
    guest.wait();
    let frames = guest.received();
    let [(got, bytes, buffers)] = &frames[..] else { panic!("{} frames", frames.len()) };
    assert!(*bytes == big, "as it was sent");
    assert_eq!(*buffers, (TAP_HEADER + big.len()).div_ceil(1536));
    assert_eq!((got[0] & 1, got[1], &got[4..10]), (1, 1, &header[4..10]));
}

#[test]
fn a_driver_without_segmentation_gets_whole_frames() {
    let (mut guest, host) = Guest::with_features(!F_GUEST_TSO4);
    guest.give(60, 1536);
    let (header, big) = segment(PAYLOAD, 1400);
    host.send_with(&header, &big).unwrap();
    guest.wait();
    let frames = guest.received();
    assert_eq!(frames.len(), PAYLOAD.div_ceil(1400));
    let data: Vec<u8> = frames.iter().flat_map(|(_, bytes, _)| bytes[54..].to_vec()).collect();
    assert!(data == big[54..]);
    assert!(frames.iter().all(|(header, ..)| header[1] == 0));
}

#[test]
fn a_driver_without_checksums_gets_them_done() {
    let (mut guest, host) = Guest::with_features(!F_GUEST_CSUM);
    guest.give(8, 1536);
    let (header, big) = segment(3000, 1400);
    host.send_with(&header, &big).unwrap();
    guest.wait();
    let frames = guest.received();
    assert_eq!(frames.len(), 3, "segmentation needs checksums left out");
    for (header, bytes, _) in frames {
        assert_eq!(header[0] & 1, 0);
        assert!(is_sum_right(&bytes));
    }
}

#[test]
fn a_tap_that_comes_later_is_told_too() {
    let mut guest = Guest::alone(!F_GUEST_TSO4);
    guest.give(60, 1536);
    let host = guest.attach("tap0");
    let (header, big) = segment(3000, 1400);
    host.send_with(&header, &big).unwrap();
    guest.wait();
    assert_eq!(guest.received().len(), 3);
}

#[test]
fn a_large_segment_leaves_the_guest_in_one_piece() {
    let (mut guest, host) = Guest::new();
    let (header, big) = segment(PAYLOAD, 1400);
    guest.offer(&[&header[..], &[0, 0]].concat(), &big);
    guest.driver.kick(TX);
    let (got, bytes) = host.receive(DEADLINE).unwrap();
    assert!(bytes == big, "as it was sent");
    assert_eq!((got[0] & 1, got[1], got.len()), (1, 1, SOCKET_HEADER));
    assert_eq!(got[4..10], header[4..10]);
    assert_eq!(guest.metrics().from_guest.frames, 1);
}

#[test]
fn a_large_mtu_needs_no_segmentation() {
    let (mut guest, host) = Guest::new();
    host.set_mtu(9000).unwrap();
    guest.give(16, 1536);
    host.send(&frame(1, 9014));
    guest.wait();
    assert!(guest.received_frames() == [frame(1, 9014)]);
    guest.send(&frame(2, 9014));
    assert!(host.receive(DEADLINE).unwrap().1 == frame(2, 9014));
}
