//! What the device itself costs, without a guest: only its own calls are timed.
//! `cargo test --release -p spore-vmm --lib -- --ignored --nocapture throughput`

use std::time::Instant;

use super::*;

const BATCH: u32 = 200;
const ROUNDS: u32 = 2000;

fn report(what: &str, frames: u32, len: usize, spent: Duration) {
    let each = spent.as_secs_f64() / f64::from(frames);
    println!("{what}, {len} bytes: {:.0} frames/s, {:.0} ns each", 1.0 / each, each * 1e9);
}

#[test]
#[ignore = "measures"]
fn to_the_guest() {
    for (room, len) in [(1536, 64), (4096, 64), (1536, 1514)] {
        let (mut guest, host) = Guest::new();
        host.listen(false).unwrap();
        let bytes = frame(1, len);
        let parts = [guest.place(room)];
        let mut spent = Duration::ZERO;
        for _ in 0..256 {
            guest.driver.add(RX.into(), &parts);
        }
        guest.driver.kick(RX);
        for round in 0..ROUNDS {
            for _ in 0..BATCH {
                host.send(&bytes);
            }
            let fd = guest.gate();
            let start = Instant::now();
            guest.driver.transport.process_backend(fd, true, false);
            if round >= 10 {
                spent += start.elapsed();
            }
            let used = guest.driver.used(RX.into()).len();
            assert_eq!(used, BATCH as usize);
            for _ in 0..used {
                guest.driver.add(RX.into(), &parts);
            }
            let _ = guest.driver.interrupt();
        }
        report(&format!("to the guest, buffers of {room}"), (ROUNDS - 10) * BATCH, len, spent);
    }
}

#[test]
#[ignore = "measures"]
fn from_the_guest() {
    for len in [64, 1514] {
        let (mut guest, host) = Guest::new();
        host.listen(false).unwrap();
        let bytes = [vec![0; TAP_HEADER], frame(1, len)].concat();
        guest.driver.fill(DATA, &bytes);
        let mut spent = Duration::ZERO;
        for round in 0..ROUNDS {
            for _ in 0..BATCH {
                guest.driver.add(TX.into(), &[readable(DATA, bytes.len())]);
            }
            guest.driver.write(0x50, TX.into());
            let start = Instant::now();
            guest.driver.transport.process_queue(TX);
            if round >= 10 {
                spent += start.elapsed();
            }
            assert_eq!(guest.driver.used(TX.into()).len(), BATCH as usize);
        }
        report("from the guest", (ROUNDS - 10) * BATCH, len, spent);
    }
}
