#![allow(clippy::cast_possible_truncation)]
use super::spec::{DEFLATE, F_REPORTING, INFLATE, MAX_PFNS, MAX_REPORT, PAGE, REPORTING};
use super::*;
use crate::api::BalloonMetrics;
use crate::devices::virtio::testing::{DATA, Driver, MEMORY, Part, RING_FEATURES, readable, writable};
use crate::devices::virtio::transport::status;

/// Where the tests' pages are: behind rings and request buffers.
const PAGES: u64 = 0x40_0000;
const FULL: u8 = 0xee;

struct Guest {
    driver: Driver,
    handle: BalloonHandle,
}

impl Guest {
    fn new() -> Self {
        Self::with_features(!0)
    }

    fn with_features(mask: u64) -> Self {
        let device = Balloon::new();
        let handle = device.handle();
        let driver = Driver::with_features(device, mask);
        driver.fill(PAGES, &vec![FULL; MEMORY - PAGES as usize]);
        Self { driver, handle }
    }

    /// Sends page numbers and waits for the answer.
    fn send(&mut self, queue: u16, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.driver.fill(DATA, &bytes);
        self.request(queue, &[readable(DATA, bytes.len())]);
    }

    fn request(&mut self, queue: u16, parts: &[Part]) {
        let head = self.driver.add(queue.into(), parts);
        self.driver.kick(queue);
        assert!(!self.driver.needs_reset());
        assert_eq!(self.driver.used(queue.into()), [(head, 0)]);
        assert_eq!(self.driver.interrupt(), Some(1));
    }

    /// The byte of which the `n`th page consists.
    fn page(&self, n: u64) -> u8 {
        let bytes = self.driver.bytes(PAGES + n * PAGE, PAGE as usize);
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {n} is torn");
        bytes[0]
    }

    /// Of the first ten pages, those that were given back.
    fn gone(&self) -> Vec<u64> {
        (0..10).filter(|&n| self.page(n) == 0).collect()
    }
}

/// The number of the `n`th page.
fn number(n: u64) -> u32 {
    ((PAGES + n * PAGE) / PAGE) as u32
}

#[test]
fn inflated_pages_go_and_can_be_used_after_deflation() {
    let mut guest = Guest::new();
    guest.send(INFLATE, &[number(7), number(2), number(1), number(2)]);
    assert_eq!(guest.gone(), [1, 2, 7]);
    assert_eq!(guest.handle.metrics().inflated_bytes, 3 * PAGE, "each page once");
    guest.send(DEFLATE, &[number(2)]);
    guest.driver.fill(PAGES + 2 * PAGE, &[1; PAGE as usize]);
    assert_eq!(guest.page(2), 1);
    assert_eq!(guest.handle.metrics().inflated_bytes, 3 * PAGE);
}

#[test]
fn a_list_may_be_in_pieces_anywhere() {
    let mut guest = Guest::new();
    let bytes: Vec<u8> = [number(3), number(4)].iter().flat_map(|number| number.to_le_bytes()).collect();
    guest.driver.fill(DATA, &bytes[..3]);
    guest.driver.fill(DATA + 77, &bytes[3..]);
    guest.request(INFLATE, &[readable(DATA, 3), readable(DATA + 77, 5)]);
    assert_eq!(guest.gone(), [3, 4]);
}

#[test]
fn reported_pages_go() {
    let mut guest = Guest::new();
    let at = |n: u64| PAGES + n * PAGE;
    guest.request(REPORTING, &[writable(at(8), PAGE as usize), writable(at(1), 3 * PAGE as usize)]);
    assert_eq!(guest.gone(), [1, 2, 3, 8]);
    let BalloonMetrics { reported_bytes, inflated_bytes, .. } = guest.handle.metrics();
    assert_eq!((reported_bytes, inflated_bytes), (4 * PAGE, 0));
}

#[test]
fn of_a_ragged_report_only_the_whole_pages_go() {
    let mut guest = Guest::new();
    guest.request(REPORTING, &[writable(PAGES + PAGE - 1, 2 * PAGE as usize + 2), writable(PAGES + 5, 9)]);
    assert_eq!(guest.gone(), [1, 2]);
    assert_eq!(guest.handle.metrics().reported_bytes, 2 * PAGE);
}

#[test]
fn page_numbers_that_are_not_ram_are_ignored() {
    let mut guest = Guest::new();
    let end = (MEMORY as u64 / PAGE) as u32;
    guest.send(INFLATE, &[u32::MAX, end, end - 1, number(1), 0xd_0000, u32::MAX - 1, end + 7]);
    assert_eq!(guest.gone(), [1]);
    assert_eq!(guest.driver.bytes(MEMORY as u64 - PAGE, 1), [0], "the last page of RAM");
    assert_eq!(guest.handle.metrics().inflated_bytes, 2 * PAGE);
}

#[test]
fn what_is_too_much_or_no_whole_number_is_left_out() {
    let mut guest = Guest::new();
    let mut numbers = vec![number(0); MAX_PFNS];
    numbers.push(number(1));
    guest.send(INFLATE, &numbers);
    assert_eq!(guest.gone(), [0]);
    guest.driver.fill(DATA, &number(2).to_le_bytes());
    guest.driver.fill(DATA + 4, &number(3).to_le_bytes());
    guest.request(INFLATE, &[readable(DATA, 7)]);
    assert_eq!(guest.gone(), [0, 2]);
    guest.request(INFLATE, &[readable(DATA, 3)]);
    assert_eq!(guest.gone(), [0, 2]);
}

/// The same memory again and again, and more than there is: each chain costs its cap at most.
#[test]
fn reports_are_capped() {
    let mut guest = Guest::new();
    let whole = writable(PAGES, MEMORY - PAGES as usize);
    let parts = [whole; 32];
    assert!(whole.len as usize * parts.len() > MAX_REPORT as usize);
    guest.request(REPORTING, &parts);
    assert_eq!(guest.handle.metrics().reported_bytes, MAX_REPORT);
    assert_eq!(guest.gone(), (0..10).collect::<Vec<_>>());
}

/// More than one call's budget is offered at once; all of it is served all the same.
#[test]
fn a_flood_of_reports_is_served_in_turns() {
    let mut guest = Guest::new();
    let part = writable(PAGES, MEMORY - PAGES as usize);
    let heads: Vec<u16> = (0..20).map(|_| guest.driver.add(REPORTING.into(), &[part])).collect();
    guest.driver.write(0x50, REPORTING.into());
    guest.driver.transport.process_queue(REPORTING);
    let first = guest.driver.used(REPORTING.into()).len();
    assert!((1..20).contains(&first), "{first} in one call");
    guest.driver.settle();
    assert_eq!(first + guest.driver.used(REPORTING.into()).len(), heads.len());
}

#[test]
fn buffers_of_the_wrong_direction_or_outside_memory_are_driver_errors() {
    for (queue, part) in [
        (INFLATE, writable(DATA, 8)),
        (DEFLATE, writable(DATA, 8)),
        (REPORTING, readable(PAGES, PAGE as usize)),
        (INFLATE, readable(MEMORY as u64 - 4, 8)),
        (REPORTING, writable(MEMORY as u64, PAGE as usize)),
        (REPORTING, writable(u64::MAX - PAGE, PAGE as usize)),
        (REPORTING, writable(PAGES, u32::MAX as usize)),
    ] {
        let mut guest = Guest::new();
        guest.driver.add(queue.into(), &[part]);
        guest.driver.kick(queue);
        assert!(guest.driver.needs_reset(), "{queue}: {part:x?}");
        assert!(guest.driver.used(queue.into()).is_empty());
        assert!(guest.gone().is_empty());
    }
}

#[test]
fn the_target_is_told_and_the_driver_tells_what_it_holds() {
    let mut guest = Guest::new();
    let _ = guest.driver.interrupt();
    guest.handle.set_target(3);
    assert_eq!(guest.driver.interrupt(), Some(2), "a configuration change");
    assert_eq!((guest.driver.read(0x100), guest.driver.read(0x104)), (768, 0));
    guest.driver.write(0x104, 700);
    guest.driver.write(0x100, 5);
    assert_eq!((guest.driver.read(0x100), guest.driver.read(0x104)), (768, 700));
    let metrics = guest.handle.metrics();
    assert_eq!((metrics.target_bytes, metrics.actual_bytes), (3 << 20, 700 * PAGE));
    guest.driver.write(0x104, u32::MAX);
    assert_eq!(guest.handle.metrics().actual_bytes, u64::from(u32::MAX) * PAGE);
    guest.driver.negotiate(!0);
    let metrics = guest.handle.metrics();
    assert_eq!((metrics.target_bytes, metrics.actual_bytes), (3 << 20, 0), "a reset empties it");
}

#[test]
fn a_target_may_come_before_the_driver() {
    let device = Balloon::new();
    let handle = device.handle();
    handle.set_target(1);
    let mut driver = Driver::new(device);
    assert_eq!(driver.read(0x100), 256);
}

/// A driver that poisons free pages accepts no reporting, and then has no queue for it.
#[test]
fn a_driver_without_reporting_has_two_queues() {
    let device = Balloon::new();
    let handle = device.handle();
    let mut guest = Guest { driver: Driver::raw(device), handle };
    guest.driver.negotiate(!F_REPORTING);
    guest.driver.set_up_queues();
    guest.driver.write(0x30, REPORTING.into());
    // Not ready: it was never set up.
    guest.driver.write(0x44, 0);
    guest.driver.add_status(status::DRIVER_OK);
    assert!(!guest.driver.needs_reset());
    guest.driver.fill(PAGES, &vec![FULL; 10 * PAGE as usize]);
    guest.send(INFLATE, &[number(5)]);
    assert_eq!(guest.gone(), [5]);
    guest.driver.kick(REPORTING);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn without_ring_features_too() {
    let mut guest = Guest::with_features(!RING_FEATURES);
    guest.send(INFLATE, &[number(1)]);
    guest.request(REPORTING, &[writable(PAGES + 4 * PAGE, PAGE as usize)]);
    assert_eq!(guest.gone(), [1, 4]);
}
