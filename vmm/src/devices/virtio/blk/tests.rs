#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use super::spec::{self, kind};
use super::*;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::testing::{DATA, Driver, RING_FEATURES, readable, writable};
use crate::devices::virtio::transport::status;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const STATUS: u64 = DATA - 1;
const HEADER: u64 = DATA - 64;

fn disk(sectors: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(sectors * 512).unwrap();
    file
}

fn attached(file: File, read_only: bool) -> (Driver, BlkHandle) {
    let device = Blk::new("rw0".into(), read_only);
    let handle = device.handle();
    handle.attach(file, Vec::new()).unwrap();
    (Driver::new(device), handle)
}

fn header(driver: &Driver, kind: u32, sector: u64) {
    let mut raw = kind.to_le_bytes().to_vec();
    raw.extend([0; 4]);
    raw.extend(sector.to_le_bytes());
    driver.fill(HEADER, &raw);
    driver.fill(STATUS, &[0xee]);
}

/// One request with a data buffer at DATA; its status and written length.
fn request(driver: &mut Driver, kind: u32, sector: u64, len: usize) -> (u8, u32) {
    header(driver, kind, sector);
    let data =
        if matches!(kind, kind::IN | kind::GET_ID) { writable(DATA, len) } else { readable(DATA, len) };
    let mut parts = vec![readable(HEADER, 16)];
    if len > 0 {
        parts.push(data);
    }
    parts.push(writable(STATUS, 1));
    let head = driver.add(0, &parts);
    driver.kick(0);
    let used = driver.used(0);
    assert_eq!(used.len(), 1);
    assert_eq!(used[0].0, head);
    assert!(driver.interrupt().is_some());
    (driver.bytes(STATUS, 1)[0], used[0].1)
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut raw = sector.to_le_bytes().to_vec();
    raw.extend(sectors.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    raw
}

fn capacity(driver: &mut Driver) -> u64 {
    u64::from(driver.read(0x100)) | u64::from(driver.read(0x104)) << 32
}

#[test]
fn reads_and_writes_whole_sectors() {
    let file = disk(100);
    file.write_all_at(&[7; 1024], 512 * 3).unwrap();
    let (mut driver, handle) = attached(file.try_clone().unwrap(), false);
    assert_eq!(capacity(&mut driver), 100);
    assert_eq!(request(&mut driver, kind::IN, 3, 1024), (OK, 1025));
    assert_eq!(driver.bytes(DATA, 1024), [7; 1024]);
    driver.fill(DATA, &[9; 512]);
    assert_eq!(request(&mut driver, kind::OUT, 99, 512), (OK, 1));
    let mut back = [0; 512];
    file.read_exact_at(&mut back, 512 * 99).unwrap();
    assert_eq!(back, [9; 512]);
    let metrics = handle.metrics();
    assert_eq!((metrics.reads, metrics.read_bytes, metrics.writes, metrics.written_bytes), (1, 1024, 1, 512));
    assert_eq!(metrics.serial, "rw0");
}

#[test]
fn any_framing_is_accepted() {
    let file = disk(8);
    file.write_all_at(&(0..1024u32).map(|i| i as u8).collect::<Vec<_>>(), 0).unwrap();
    let (mut driver, _) = attached(file, false);
    header(&driver, kind::IN, 0);
    // Header in three parts; data and status share descriptors.
    let parts = [
        readable(HEADER, 1),
        readable(HEADER + 1, 10),
        readable(HEADER + 11, 5),
        writable(DATA, 100),
        writable(DATA + 0x1000, 0),
        writable(DATA + 0x2000, 413),
    ];
    driver.add(0, &parts);
    driver.kick(0);
    assert_eq!(driver.used(0)[0].1, 513);
    assert_eq!(driver.bytes(DATA, 100), (0..100).collect::<Vec<u8>>());
    let rest = driver.bytes(DATA + 0x2000, 413);
    assert_eq!(rest[..412], (100..512u32).map(|i| i as u8).collect::<Vec<_>>());
    assert_eq!(rest[412], OK);
}

#[test]
fn indirect_chains_work() {
    let (mut driver, _) = attached(disk(8), false);
    header(&driver, kind::IN, 0);
    driver.fill(DATA, &[1; 512]);
    let mut table = Vec::new();
    for (addr, len, flags, next) in [(HEADER, 16u32, 1u16, 1u16), (DATA, 512, 3, 2), (STATUS, 1, 2, 0)] {
        table.extend(addr.to_le_bytes());
        table.extend(len.to_le_bytes());
        table.extend(flags.to_le_bytes());
        table.extend(next.to_le_bytes());
    }
    driver.fill(DATA + 0x1000, &table);
    driver.descriptor(0, 5, DATA + 0x1000, 48, 4, 0);
    driver.offer(0, 5);
    driver.kick(0);
    assert_eq!(driver.used(0), [(5, 513)]);
    assert_eq!(driver.bytes(DATA, 512), [0; 512]);
    assert_eq!(driver.bytes(STATUS, 1), [OK]);
}

#[test]
fn ranges_beyond_the_disk_and_odd_lengths_are_io_errors() {
    let (mut driver, handle) = attached(disk(8), false);
    for (sector, len) in [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511), (0, 1)] {
        // The status counts as written only where nothing unwritten is before it.
        for (kind, written) in [(kind::IN, 0), (kind::OUT, 1)] {
            assert_eq!(request(&mut driver, kind, sector, len), (IOERR, written), "{kind} {sector} {len}");
        }
    }
    assert_eq!(handle.metrics().errors, 12);
    assert_eq!(request(&mut driver, kind::IN, 8, 0).0, OK, "nothing at the end is something allowed");
}

#[test]
fn a_request_has_a_largest_size() {
    let (mut driver, _) = attached(disk(1 << 20), false);
    let piece = 1 << 20;
    for (kind, pieces, expected) in
        [(kind::IN, 31, OK), (kind::IN, 32, IOERR), (kind::OUT, 31, OK), (kind::OUT, 32, IOERR)]
    {
        header(&driver, kind, 0);
        let data = if kind == kind::IN { writable(DATA, piece) } else { readable(DATA, piece) };
        let mut parts = vec![readable(HEADER, 16)];
        parts.extend(vec![data; pieces]);
        parts.push(writable(STATUS, 1));
        driver.add(0, &parts);
        driver.kick(0);
        assert_eq!(driver.used(0).len(), 1);
        assert_eq!(driver.bytes(STATUS, 1), [expected], "type {kind}, {pieces} MiB");
    }
    let largest = driver.read(0x108) as usize * driver.read(0x10c) as usize;
    assert_eq!(largest, spec::MAX_REQUEST, "size_max times seg_max, as the driver reads them");
}

#[test]
fn an_identifier_with_a_gap_before_its_status_counts_alone() {
    let (mut driver, _) = attached(disk(8), false);
    assert_eq!(request(&mut driver, kind::GET_ID, 0, 20), (OK, 21));
    assert_eq!(request(&mut driver, kind::GET_ID, 0, 30), (OK, 20));
}

#[test]
fn unknown_types_are_unsupported() {
    let (mut driver, _) = attached(disk(8), false);
    for kind in [2, 3, 14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(request(&mut driver, kind, 0, 512), (UNSUPP, 1));
    }
}

#[test]
fn a_read_only_disk_refuses_changes() {
    let file = disk(8);
    let (mut driver, _) = attached(file.try_clone().unwrap(), true);
    let offered = driver.offered();
    assert_ne!(offered & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    assert_eq!(offered & (spec::F_FLUSH | spec::F_DISCARD | spec::F_WRITE_ZEROES), 0);
    driver.fill(DATA, &[9; 512]);
    assert_eq!(request(&mut driver, kind::OUT, 0, 512), (IOERR, 1));
    driver.fill(DATA, &range(0, 1, 0));
    assert_eq!(request(&mut driver, kind::DISCARD, 0, 16), (IOERR, 1));
    assert_eq!(request(&mut driver, kind::WRITE_ZEROES, 0, 16), (IOERR, 1));
    assert_eq!(request(&mut driver, kind::FLUSH, 0, 0), (OK, 1));
    let mut first = [1; 512];
    file.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [0; 512]);
}

#[test]
fn discard_and_write_zeroes_clear_ranges() {
    for (kind, flags) in [(kind::DISCARD, 0), (kind::WRITE_ZEROES, 0), (kind::WRITE_ZEROES, 1)] {
        let file = disk(64);
        file.write_all_at(&[5; 64 * 512], 0).unwrap();
        let (mut driver, handle) = attached(file.try_clone().unwrap(), false);
        let ranges = [range(8, 8, flags), range(32, 16, flags)];
        // Write-zeroes takes one at a time, so that its total is bounded.
        if kind == kind::DISCARD {
            driver.fill(DATA, &ranges.concat());
            assert_eq!(request(&mut driver, kind, 0, 32), (OK, 1));
        } else {
            for range in &ranges {
                driver.fill(DATA, range);
                assert_eq!(request(&mut driver, kind, 0, 16), (OK, 1));
            }
        }
        let mut all = vec![0; 64 * 512];
        file.read_exact_at(&mut all, 0).unwrap();
        for (sector, bytes) in all.chunks(512).enumerate() {
            let cleared = (8..16).contains(&sector) || (32..48).contains(&sector);
            assert_eq!(bytes, vec![if cleared { 0 } else { 5 }; 512], "sector {sector}");
        }
        assert_eq!(file.metadata().unwrap().len(), 64 * 512);
        assert_eq!(handle.metrics().discards, if kind == kind::DISCARD { 1 } else { 2 });
    }
}

#[test]
fn bad_ranges_change_nothing() {
    let file = disk(64);
    file.write_all_at(&[5; 64 * 512], 0).unwrap();
    let (mut driver, _) = attached(file.try_clone().unwrap(), false);
    let good = range(0, 8, 0);
    for (bad, expected) in [
        (range(60, 5, 0), IOERR),
        (range(u64::MAX, 1, 0), IOERR),
        (range(0, u32::MAX, 0), IOERR),
        (range(0, 1, 2), UNSUPP),
    ] {
        driver.fill(DATA, &[good.clone(), bad.clone()].concat());
        assert_eq!(request(&mut driver, kind::DISCARD, 0, 32).0, expected);
        driver.fill(DATA, &bad);
        assert_eq!(request(&mut driver, kind::WRITE_ZEROES, 0, 16).0, expected);
    }
    driver.fill(DATA, &good.repeat(2));
    assert_eq!(request(&mut driver, kind::WRITE_ZEROES, 0, 32).0, IOERR, "one range at a time");
    driver.fill(DATA, &range(0, 1, 1));
    assert_eq!(request(&mut driver, kind::DISCARD, 0, 16).0, UNSUPP, "unmap means nothing in a discard");
    for len in [0, 15, 17, 16 * 17] {
        assert_eq!(request(&mut driver, kind::DISCARD, 0, len).0, IOERR, "{len} bytes of ranges");
    }
    let mut all = vec![0; 64 * 512];
    file.read_exact_at(&mut all, 0).unwrap();
    assert!(all.iter().all(|&byte| byte == 5));
}

#[test]
fn discard_needs_its_feature() {
    let device = Blk::new("rw0".into(), false);
    device.handle().attach(disk(8), Vec::new()).unwrap();
    let mut driver = Driver::with_features(device, !(spec::F_DISCARD | RING_FEATURES));
    driver.fill(DATA, &range(0, 1, 0));
    assert_eq!(request(&mut driver, kind::DISCARD, 0, 16).0, UNSUPP);
}

#[test]
fn the_serial_is_padded_and_cut() {
    for (serial, expected) in [("ro11", "ro11"), ("a-serial-of-more-than-20-bytes", "a-serial-of-more-tha")] {
        let mut driver = Driver::new(Blk::new(serial.into(), true));
        driver.fill(DATA, &[0xff; 32]);
        assert_eq!(request(&mut driver, kind::GET_ID, 0, 20), (OK, 21));
        let mut id = expected.as_bytes().to_vec();
        id.resize(20, 0);
        assert_eq!(driver.bytes(DATA, 20), id);
        assert_eq!(driver.bytes(DATA + 20, 12), [0xff; 12]);
    }
}

#[test]
fn an_empty_slot_answers_and_takes_a_disk_while_running() {
    let device = Blk::new("rw3".into(), false);
    let handle = device.handle();
    let mut driver = Driver::new(device);
    assert_eq!(capacity(&mut driver), 0);
    assert!(handle.is_free());
    for kind in [kind::IN, kind::OUT, kind::FLUSH, kind::DISCARD] {
        assert_eq!(request(&mut driver, kind, 0, 512).0, IOERR);
    }
    assert_eq!(request(&mut driver, kind::GET_ID, 0, 20).0, OK);
    let generation = driver.read(0xfc);
    handle.attach(disk(10), Vec::new()).unwrap();
    assert_eq!(driver.interrupt(), Some(2));
    assert_ne!(driver.read(0xfc), generation);
    assert_eq!(capacity(&mut driver), 10);
    assert_eq!(request(&mut driver, kind::IN, 0, 512).0, OK);
    assert!(matches!(handle.attach(disk(10), Vec::new()), Err(AttachError::Occupied { .. })));
}

#[test]
fn a_disk_attached_between_probe_and_driver_ok_is_announced() {
    let device = Blk::new("rw3".into(), false);
    let handle = device.handle();
    let mut driver = Driver::raw(device);
    driver.negotiate(!0);
    driver.set_up_queues();
    assert_eq!(capacity(&mut driver), 0);
    handle.attach(disk(10), Vec::new()).unwrap();
    assert_eq!(driver.interrupt(), None);
    driver.add_status(status::DRIVER_OK);
    assert_eq!(driver.interrupt(), Some(2));
}

#[test]
fn unfit_files_are_refused_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::write(&path, [0; 1024]).unwrap();
    let attach = |read_only, file: File| {
        Blk::new("x".into(), read_only).handle().attach(file, Vec::new()).map_err(|e| e.to_string())
    };
    let open = |read, write| OpenOptions::new().read(read).write(write).open(&path).unwrap();
    assert!(attach(true, open(true, false)).is_ok());
    assert!(attach(true, open(true, true)).is_ok());
    assert!(attach(false, open(true, true)).is_ok());
    assert!(attach(false, open(true, false)).unwrap_err().contains("opened for reading"));
    assert!(attach(true, open(false, true)).unwrap_err().contains("opened for writing"));
    assert!(attach(true, File::open(directory.path()).unwrap()).unwrap_err().contains("directory"));
    assert!(attach(true, File::open("/dev/null").unwrap()).unwrap_err().contains("character device"));
    for size in [0, 511, 513] {
        open(true, true).set_len(size).unwrap();
        assert!(attach(true, open(true, true)).unwrap_err().contains("multiple of 512"), "{size}");
    }
}

#[test]
fn host_errors_reach_the_guest() {
    // A file that shrank under us: the read ends early.
    let file = disk(64);
    let (mut driver, handle) = attached(file.try_clone().unwrap(), false);
    file.set_len(512).unwrap();
    assert_eq!(request(&mut driver, kind::IN, 0, 512).0, OK);
    assert_eq!(request(&mut driver, kind::IN, 1, 512).0, IOERR);
    assert_eq!(handle.metrics().errors, 1);

    // A file sealed against writing, as a full file system would fail it: each write errs.
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let memfd = File::from(memfd_create(c"disk", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    memfd.set_len(4096).unwrap();
    let (mut driver, _) = attached(memfd.try_clone().unwrap(), false);
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    assert_eq!(request(&mut driver, kind::OUT, 0, 512), (IOERR, 1));
    driver.fill(DATA, &range(0, 1, 0));
    assert_eq!(request(&mut driver, kind::DISCARD, 0, 16).0, IOERR);
    assert_eq!(request(&mut driver, kind::IN, 0, 512).0, OK, "the device goes on");
}

#[test]
fn zeroes_are_written_where_the_file_cannot_make_them() {
    // memfd (tmpfs) can punch holes but, on older kernels, not zero a range.
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let mut memfd = File::from(memfd_create(c"disk", MFdFlags::empty()).unwrap());
    memfd.write_all(&[5; 1 << 20]).unwrap();
    let (mut driver, _) = attached(memfd.try_clone().unwrap(), false);
    driver.fill(DATA, &range(1, 2046, 0));
    assert_eq!(request(&mut driver, kind::WRITE_ZEROES, 0, 16).0, OK);
    let mut all = Vec::new();
    memfd.seek(SeekFrom::Start(0)).unwrap();
    memfd.read_to_end(&mut all).unwrap();
    assert!(all[..512].iter().chain(&all[(1 << 20) - 512..]).all(|&byte| byte == 5));
    assert!(all[512..(1 << 20) - 512].iter().all(|&byte| byte == 0));
}

#[test]
fn malformed_requests() {
    // A short header has a status; it gets an error there.
    let (mut driver, _) = attached(disk(8), false);
    header(&driver, kind::IN, 0);
    driver.add(0, &[readable(HEADER, 15), writable(DATA, 512), writable(STATUS, 1)]);
    driver.kick(0);
    assert_eq!(driver.used(0)[0].1, 0);
    assert_eq!(driver.bytes(STATUS, 1), [IOERR]);
    assert!(!driver.needs_reset());

    // No room for a status, in different ways: the device waits for a reset.
    let cases = [
        vec![readable(HEADER, 16)],
        vec![readable(HEADER, 16), writable(STATUS, 0)],
        vec![writable(STATUS, 1), readable(HEADER, 16)],
        vec![readable(HEADER, 16), writable(u64::MAX - 600, 512), writable(STATUS, 1)],
        vec![readable(HEADER, 16), writable(DATA, u32::MAX as usize), writable(STATUS, 1)],
    ];
    for parts in cases {
        let (mut driver, _) = attached(disk(8), false);
        header(&driver, kind::IN, 0);
        driver.add(0, &parts);
        driver.kick(0);
        assert!(driver.needs_reset(), "{parts:?}");
        assert!(driver.used(0).is_empty());
        assert_eq!(driver.bytes(STATUS, 1), [0xee]);
    }
}

#[test]
fn a_large_batch_is_served_in_turns() {
    let (mut driver, handle) = attached(disk(1 << 14), false);
    for _ in 0..4 {
        for _ in 0..40 {
            driver.add(0, &[readable(HEADER, 16), writable(DATA, 1 << 20), writable(STATUS, 1)]);
        }
        header(&driver, kind::IN, 0);
        driver.kick(0);
        let used = driver.used(0);
        assert_eq!(used.len(), 40);
        assert!(used.iter().all(|&(_, len)| len == (1 << 20) + 1));
    }
    assert_eq!(handle.metrics().reads, 160);
}

#[test]
fn configuration_space_ends() {
    let device = Blk::new("rw0".into(), false);
    for (offset, len) in [(0u64, 8), (56, 8), (60, 4), (1 << 40, 4), (u64::MAX, 8)] {
        let mut data = vec![0; len];
        device.read_config(offset, &mut data);
    }
}
