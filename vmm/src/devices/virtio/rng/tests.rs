#![allow(clippy::cast_possible_truncation)]
use super::*;
use crate::devices::virtio::testing::{DATA, Driver, readable, writable};

#[test]
fn fills_scattered_buffers_up_to_the_cap() {
    let mut driver = Driver::new(Rng::new());
    let small = driver.add(0, &[writable(DATA, 33), writable(DATA + 100, 31)]);
    let large = driver.add(0, &[writable(DATA + 0x1000, 100_000)]);
    driver.kick(0);
    assert_eq!(driver.used(0), [(small, 64), (large, MAX_REQUEST as u32)]);
    assert_eq!(driver.interrupt(), Some(1));
    assert_ne!(driver.bytes(DATA, 33), [0; 33]);
    assert_ne!(driver.bytes(DATA + 100, 31), [0; 31]);
    assert_eq!(driver.bytes(DATA + 33, 67), [0; 67], "nothing between the buffers");
    let beyond = DATA + 0x1000 + MAX_REQUEST as u64;
    assert_eq!(driver.bytes(beyond, 64), [0; 64], "nothing beyond the cap");
}

#[test]
fn a_readable_buffer_is_a_driver_error_until_reset() {
    let mut driver = Driver::new(Rng::new());
    driver.add(0, &[readable(DATA, 64)]);
    driver.kick(0);
    assert!(driver.needs_reset());
    assert!(driver.used(0).is_empty());
    driver.negotiate(!0);
    driver.set_up_queues();
    driver.add_status(super::super::transport::status::DRIVER_OK);
    driver.add(0, &[writable(DATA, 8)]);
    driver.kick(0);
    assert_eq!(driver.used(0).len(), 1);
}

#[test]
fn broken_chains_are_driver_errors() {
    for case in ["loop", "beyond the table", "outside memory", "nested indirect"] {
        let mut driver = Driver::new(Rng::new());
        match case {
            "loop" => driver.descriptor(0, 0, DATA, 8, 3, 0),
            "beyond the table" => driver.descriptor(0, 0, DATA, 8, 3, 5000),
            "outside memory" => driver.descriptor(0, 0, u64::MAX - 4, 8, 2, 0),
            _ => {
                driver.descriptor(0, 0, DATA, 16, 4, 0);
                let mut raw = (DATA + 64).to_le_bytes().to_vec();
                raw.extend([16, 0, 0, 0, 4, 0, 0, 0]);
                driver.fill(DATA, &raw);
            }
        }
        driver.offer(0, 0);
        driver.kick(0);
        assert!(driver.needs_reset(), "{case}");
        assert!(driver.used(0).is_empty(), "{case}");
    }
}
