#![allow(clippy::unwrap_used)]
use super::super::rng::Rng;
use super::super::testing::{DATA, Driver, RING_FEATURES, memory, writable};
use super::*;
use crate::bus::MmioDevice;
use crate::devices::virtio::Saved;
use crate::snapshot::contract::{PartState, RestoreError, SaveError};

#[test]
fn identifies_itself() {
    let mut driver = Driver::raw(Rng::new());
    assert_eq!(driver.read(0x00), u32::from_le_bytes(*b"virt"));
    assert_eq!(driver.read(0x04), 2);
    assert_eq!(driver.read(0x08), 4);
    assert_eq!(driver.offered() & F_VERSION_1, F_VERSION_1);
    driver.write(0x14, 2);
    assert_eq!(driver.read(0x10), 0, "no features beyond 64");
    for register in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(driver.read(register), u32::MAX, "no shared memory");
    }
    driver.write(0x30, 1);
    assert_eq!(driver.read(0x34), 0, "only one queue");
    let mut config = [7; 8];
    driver.transport.read(0x100, &mut config);
    assert_eq!(config, [0; 8], "beyond configuration space reads zero");
}

#[test]
fn refuses_accesses_of_other_widths() {
    let mut driver = Driver::raw(Rng::new());
    for (offset, len) in [(0, 1), (0, 2), (2, 4), (0, 8), (1, 4)] {
        let mut data = vec![9; len];
        driver.transport.read(offset, &mut data);
        assert_eq!(data, vec![0; len], "offset {offset}, {len} bytes");
    }
    driver.transport.write(0x70, &[1]);
    assert_eq!(driver.status(), 0);
}

#[test]
fn features_must_be_a_subset_with_version_1() {
    let cases = [(0, 0, false), (0, 1, true), (u32::MAX, 1, false), (0, 3, false)];
    for (low, high, good) in cases {
        let mut driver = Driver::raw(Rng::new());
        driver.add_status(status::ACKNOWLEDGE);
        driver.add_status(status::DRIVER);
        for (select, word) in [(0, low), (1, high), (2, 0)] {
            driver.write(0x24, select);
            driver.write(0x20, word);
        }
        driver.add_status(status::FEATURES_OK);
        assert_eq!(driver.status() & status::FEATURES_OK != 0, good, "{low:#x} {high:#x}");
        driver.add_status(status::DRIVER_OK);
        assert_eq!(driver.status() & status::DRIVER_OK != 0, good, "DRIVER_OK needs FEATURES_OK");
    }
}

#[test]
fn status_bits_are_cleared_only_by_reset() {
    let mut driver = Driver::new(Rng::new());
    let full = driver.status();
    driver.write(0x70, status::ACKNOWLEDGE);
    assert_eq!(driver.status(), full);
    driver.add_status(status::FAILED);
    assert_eq!(driver.status(), full | status::FAILED);
    driver.write(0x70, 0);
    assert_eq!(driver.status(), 0);
    driver.write(0x30, 0);
    assert_eq!(driver.read(0x44), 0, "queues are not ready after reset");
}

#[test]
fn driver_ok_without_queues_needs_reset() {
    let mut driver = Driver::raw(Rng::new());
    driver.negotiate(!0);
    driver.add_status(status::DRIVER_OK);
    assert!(driver.needs_reset());
    assert_eq!(driver.interrupt(), Some(2), "a configuration interrupt says so");
}

#[test]
fn queues_are_validated_when_made_ready() {
    // size, descriptor table, available ring, used ring
    let end = super::super::testing::MEMORY as u64;
    let good = (64, 0x1000, 0x2000, 0x3000);
    let cases = [
        (good, true),
        ((0, 0x1000, 0x2000, 0x3000), false),
        ((48, 0x1000, 0x2000, 0x3000), false),
        ((128, 0x1000, 0x2000, 0x3000), false),
        ((0x1_0040, 0x1000, 0x2000, 0x3000), false),
        ((64, 0x1008, 0x2000, 0x3000), false),
        ((64, 0x1000, 0x2001, 0x3000), false),
        ((64, 0x1000, 0x2000, 0x3002), false),
        ((64, end - 512, 0x2000, 0x3000), false),
        ((64, 0x1000, end - 16, 0x3000), false),
        ((64, 0x1000, 0x2000, end - 16), false),
        ((64, !0xf, 0x2000, 0x3000), false),
        ((64, 0, 0x2000, 0x3000), false),
    ];
    for ((size, table, available, used), ready) in cases {
        let mut driver = Driver::raw(Rng::new());
        driver.negotiate(!0);
        driver.write(0x38, size);
        for (register, address) in [(0x80, table), (0x90, available), (0xa0, used)] {
            driver.write(register, (address & 0xffff_ffff) as u32);
            driver.write(register + 4, (address >> 32) as u32);
        }
        driver.write(0x44, 1);
        assert_eq!(driver.read(0x44) == 1, ready, "{size} {table:#x} {available:#x} {used:#x}");
        assert_eq!(driver.needs_reset(), !ready);
        if ready {
            driver.write(0x38, 2);
            driver.write(0x80, 0x4000);
            driver.add_status(status::DRIVER_OK);
            assert!(!driver.needs_reset(), "changes after QueueReady are ignored");
        }
    }
}

#[test]
fn a_ring_may_not_straddle_a_hole() {
    let ram = crate::memory::GuestRam::from_ranges(&[
        (GuestAddress(0), 0x1_0000),
        (GuestAddress(0x1_0100), 0x1_0000),
    ])
    .unwrap();
    let mut queue = Queue::new(64).unwrap();
    queue.set_desc_table_address(Some(0xff00), None);
    queue.set_avail_ring_address(Some(0x2000), None);
    queue.set_used_ring_address(Some(0x3000), None);
    queue.set_ready(true);
    assert!(queue.is_valid(&ram), "virtio-queue looks at the ends only");
    assert!(queue::validate(&queue, &ram).is_err());
}

#[test]
fn interrupts_are_pending_until_acknowledged() {
    let mut driver = Driver::with_features(Rng::new(), !RING_FEATURES);
    assert_eq!(driver.interrupt(), None);
    driver.add(0, &[writable(DATA, 8)]);
    driver.kick(0);
    assert_eq!(driver.read(0x60), 1);
    driver.write(0x64, 2);
    assert_eq!(driver.read(0x60), 1, "another bit was acknowledged");
    assert_eq!(driver.interrupt(), Some(1));
    assert_eq!(driver.read(0x60), 0);
}

#[test]
fn an_interrupt_handler_does_not_wait_for_the_device() {
    use std::sync::Mutex;

    let mut driver = Driver::with_features(Rng::new(), !RING_FEATURES);
    driver.add(0, &[writable(DATA, 8)]);
    driver.kick(0);
    let mut bus = crate::bus::MmioBus::default();
    for (offset, register) in driver.transport.lock_free_registers() {
        bus.insert_register(0x1000 + offset, register);
    }
    let transport = Arc::new(Mutex::new(driver.transport));
    bus.insert(0x1000, 0x1000, "rng", transport.clone()).unwrap();
    let at_work = transport.lock().unwrap();
    let mut word = [0; 4];
    assert!(bus.read(0x1060, &mut word));
    assert_eq!(word, [1, 0, 0, 0]);
    assert!(bus.write(0x1064, &word));
    assert!(bus.read(0x1060, &mut word));
    assert_eq!(word, [0; 4]);
    drop(at_work);
    // The other way round they are no registers: the device ignores that.
    assert!(bus.read(0x1064, &mut word) && bus.write(0x1060, &[1, 0, 0, 0]));
    assert_eq!(word, [0; 4]);
}

#[test]
fn notifications_wanted_or_not_are_respected() {
    let mut driver = Driver::with_features(Rng::new(), !RING_FEATURES);
    // VRING_AVAIL_F_NO_INTERRUPT.
    driver.fill(0x1_4000, &1u16.to_le_bytes());
    driver.add(0, &[writable(DATA, 8)]);
    driver.kick(0);
    assert_eq!(driver.used(0).len(), 1);
    assert_eq!(driver.interrupt(), None);

    let mut driver = Driver::new(Rng::new());
    // used_event far ahead: no interrupt yet.
    driver.fill(0x1_4000 + 4 + 128, &100u16.to_le_bytes());
    driver.add(0, &[writable(DATA, 8)]);
    driver.kick(0);
    assert_eq!(driver.interrupt(), None);
}

#[test]
fn too_many_available_heads_need_reset_and_silence_the_queue() {
    let mut driver = Driver::new(Rng::new());
    driver.fill(0x1_4002, &1000u16.to_le_bytes());
    driver.kick(0);
    assert!(driver.needs_reset());
    assert_eq!(driver.interrupt(), Some(2));
    driver.fill(0x1_4002, &1u16.to_le_bytes());
    driver.kick(0);
    assert!(driver.used(0).is_empty());
}

#[test]
fn configuration_changes_wait_for_the_driver() {
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let irq = IrqLine::new(line.try_clone().unwrap());
    irq.config_changed();
    assert_eq!(irq.generation(), 1);
    assert!(line.read().is_err());
    irq.set_live(true);
    assert!(line.read().is_ok());
    assert_eq!(irq.status(), 2);
    irq.reset();
    irq.used();
    assert!(line.read().is_err(), "nothing after reset");
}

#[test]
fn a_queue_size_that_is_no_power_of_two_is_refused() {
    struct Odd;
    impl VirtioDevice for Odd {
        fn device_type(&self) -> u32 {
            4
        }
        fn name(&self) -> &str {
            "odd"
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> &[u16] {
            &[48]
        }
        fn read_config(&self, _: u64, _: &mut [u8]) {}
        fn activate(&mut self, _: ActiveContext, _: Vec<Queue>) -> Result<(), DeviceError> {
            Ok(())
        }
        fn reset(&mut self) {}
        fn save(&self) -> Result<Saved, SaveError> {
            Ok(Saved { positions: Vec::new(), own: PartState::none() })
        }
        fn restore(&mut self, _: &PartState) -> Result<(), RestoreError> {
            Ok(())
        }
        fn process_queue(&mut self, _: u16) -> Result<Pending, DeviceError> {
            Ok(Pending::NONE)
        }
    }
    let line = EventFd::new(EFD_NONBLOCK).unwrap();
    let error = MmioTransport::new(Box::new(Odd), memory(), line).unwrap_err();
    assert!(matches!(error, TransportError::QueueSize { index: 0, size: 48, .. }));
}

#[test]
fn the_event_loop_serves_doorbells_and_activation() {
    use event_manager::{EventManager, SubscriberOps};
    use std::sync::Mutex;

    let mut driver = Driver::raw(Rng::new());
    driver.negotiate(!0);
    driver.set_up_queues();
    // Made available before DRIVER_OK, so without a notification.
    driver.add(0, &[writable(DATA, 8)]);
    driver.add_status(status::DRIVER_OK);
    let spare =
        MmioTransport::new(Box::new(Rng::new()), memory(), EventFd::new(EFD_NONBLOCK).unwrap()).unwrap();
    let shared = Arc::new(Mutex::new(std::mem::replace(&mut driver.transport, spare)));
    let mut manager = EventManager::new().unwrap();
    manager.add_subscriber(super::super::subscriber::DeviceSubscriber::new(shared.clone()));
    manager.run_with_timeout(1000).unwrap();
    assert_eq!(driver.used(0).len(), 1);
    driver.add(0, &[writable(DATA, 8)]);
    shared.lock().unwrap().write(0x50, &0u32.to_le_bytes());
    manager.run_with_timeout(1000).unwrap();
    assert_eq!(driver.used(0).len(), 1);
}
