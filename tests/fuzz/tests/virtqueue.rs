//! Every virtio device against arbitrary virtqueues and registers: descriptor tables,
//! indirect tables, available rings, headers. Asserted each time: no panic, a bounded amount of work,
//! not a byte of guest memory changed that no device-writable descriptor and no used ring
//! covers, and a device that works after a reset.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod virtio;

use std::os::unix::net::UnixListener;

use proptest::prelude::*;
use spore_native::tap;
use spore_vmm::api::RateLimit;
use spore_vmm::bus::MmioDevice;
use spore_vmm::devices::virtio::VirtioDevice;
use spore_vmm::devices::virtio::balloon::Balloon;
use spore_vmm::devices::virtio::blk::Blk;
use spore_vmm::devices::virtio::net::Net;
use spore_vmm::devices::virtio::rng::Rng;
use spore_vmm::devices::virtio::vsock::Vsock;
use virtio::{AVAILABLE, HIGH, HIGH_BASE, LOW, Machine, TABLE, USED};

/// Where only device-writable descriptors point.
const WRITABLE: u64 = 0x10_0000;
/// Where readable ones point: headers and data.
const READABLE: u64 = 0x20_0000;
const INDIRECT: u64 = 0x30_0000;
const AREA: u64 = 0x1_0000;
const CANARY: u8 = 0xa5;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TABLE_FOLLOWS: u16 = 4;

#[derive(Debug, Clone, Copy)]
enum Kind {
    Rng,
    BlkReadOnly,
    BlkWritable,
    BlkEmpty,
    Vsock,
    Balloon,
    NetDown,
    NetUp,
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        Just(Kind::Rng),
        Just(Kind::BlkReadOnly),
        Just(Kind::BlkWritable),
        Just(Kind::BlkEmpty),
        Just(Kind::Vsock),
        Just(Kind::Balloon),
        Just(Kind::NetDown),
        Just(Kind::NetUp)
    ]
}

fn blk(read_only: bool, attach: bool) -> Box<dyn VirtioDevice> {
    let device = Blk::new("rw0".into(), read_only);
    if attach {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * 512).unwrap();
        // What is written goes through layers: an empty one over the file.
        let (top, below) =
            if read_only { (file, Vec::new()) } else { (tempfile::tempfile().unwrap(), vec![file]) };
        device.handle().attach(top, below).unwrap();
    }
    Box::new(device)
}

/// With a tap in a namespace of the thread's own, in which frames of all sizes wait.
fn net(attach: bool) -> Box<dyn VirtioDevice> {
    let device = Net::new(0).unwrap();
    if attach {
        thread_local!(static ENTERED: () = tap::enter_namespace());
        ENTERED.with(|()| {});
        let (fd, host) = tap::pair("tap0");
        let limit = RateLimit::default();
        device.handle().attach(fd, limit, limit).unwrap();
        for (number, len) in (0..).zip([60, 1514, 18, 700, 60, 60, 1514, 300]) {
            host.send(&tap::frame(number, len));
        }
        let (header, big) = tap::segment(9000, 1000);
        host.send_with(&header, &big).unwrap();
    }
    Box::new(device)
}

fn device(kind: Kind) -> Box<dyn VirtioDevice> {
    match kind {
        Kind::Rng => Box::new(Rng::new()),
        Kind::Balloon => Box::new(Balloon::new()),
        Kind::NetDown => net(false),
        Kind::NetUp => net(true),
        Kind::BlkReadOnly => blk(true, true),
        Kind::BlkWritable => blk(false, true),
        Kind::BlkEmpty => blk(false, false),
        Kind::Vsock => {
            let directory = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(directory.path().join("s")).unwrap();
            Box::new(Vsock::new(3, listener, vec![1024], Box::new(|_, _| {})).unwrap())
        }
    }
}

/// One descriptor: its range never lets the device write outside [`WRITABLE`], the ends of
/// memory, and what is not memory.
#[derive(Debug, Clone)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn raw(&self) -> Vec<u8> {
        let mut raw = self.address.to_le_bytes().to_vec();
        raw.extend(self.len.to_le_bytes());
        raw.extend(self.flags.to_le_bytes());
        raw.extend(self.next.to_le_bytes());
        raw
    }
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let len = prop_oneof![
        4 => 0u32..80,
        3 => Just(512u32),
        2 => Just(16u32),
        1 => 0u32..AREA as u32,
        1 => any::<u32>(),
    ];
    let next = prop_oneof![6 => 0u16..24, 1 => any::<u16>()];
    let other = prop_oneof![12 => Just(0u16), 1 => any::<u16>().prop_map(|flags| flags & !7)];
    let place = prop_oneof![
        8 => (0u64..AREA).prop_map(Some),
        1 => Just(None),
    ];
    let wild = prop_oneof![
        any::<u64>(),
        Just(LOW as u64),
        Just(HIGH_BASE + HIGH as u64),
        Just(u64::MAX),
        (0u64..64).prop_map(|back| u64::MAX - back),
    ];
    let role = prop_oneof![5 => Just(0u16), 6 => Just(WRITE), 2 => Just(TABLE_FOLLOWS), 1 => Just(WRITE | TABLE_FOLLOWS)];
    (place, len, next, other, role, any::<bool>(), wild).prop_map(
        |(place, len, next, other, role, more, wild)| {
            let base = match role {
                0 => READABLE,
                WRITE => WRITABLE,
                _ => INDIRECT,
            };
            let (address, len) = match place {
                // Within the area, so that what a device may write is known.
                Some(offset) if role == WRITE => (base + offset, len.min((AREA - offset) as u32)),
                Some(offset) if role == 0 => (base + offset % 256, len),
                Some(offset) => {
                    (base + offset % 8 * 16, if len % 3 == 0 { len } else { len / 16 * 16 % 512 })
                }
                // Nothing that is memory may be written through it.
                None => (if wild < HIGH_BASE + HIGH as u64 { u64::MAX - wild } else { wild }, len),
            };
            Descriptor { address, len, flags: role | if more { NEXT } else { 0 } | other, next }
        },
    )
}

/// Bytes that look like requests more often than noise does.
fn header() -> impl Strategy<Value = Vec<u8>> {
    let blk = (prop_oneof![0u32..16, any::<u32>()], prop_oneof![0u64..70, any::<u64>()]).prop_map(
        |(kind, sector)| {
            let mut raw = kind.to_le_bytes().to_vec();
            raw.extend([0; 4]);
            raw.extend(sector.to_le_bytes());
            raw
        },
    );
    let ranges = (0u64..70, 0u32..70, 0u32..3).prop_map(|(sector, count, flags)| {
        let mut raw = sector.to_le_bytes().to_vec();
        raw.extend(count.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw
    });
    prop_oneof![blk, ranges, proptest::collection::vec(any::<u8>(), 0..64)]
}

#[derive(Debug, Clone)]
struct Queue {
    table: Vec<Descriptor>,
    heads: Vec<u16>,
    index: u16,
}

fn queue() -> impl Strategy<Value = Queue> {
    let head = prop_oneof![9 => 0u16..24, 1 => any::<u16>()];
    let table = proptest::collection::vec(descriptor(), 24);
    (
        table,
        proptest::collection::vec(head, 0..12),
        prop_oneof![8 => Just(None), 1 => any::<u16>().prop_map(Some)],
    )
        .prop_map(|(table, heads, index)| {
            let index = index.unwrap_or(heads.len() as u16);
            Queue { table, heads, index }
        })
}

fn covered(queues: usize) -> Vec<(u64, u64)> {
    let used = (0..queues).map(|queue| (Machine::ring(queue) + USED, 0x4000));
    used.chain([(WRITABLE, AREA)]).collect()
}

/// Guest memory outside what devices may write.
fn protected(machine: &Machine) -> Vec<u8> {
    let mut all = machine.get(0, LOW);
    for (start, len) in covered(machine.sizes.len()) {
        all[start as usize..(start + len) as usize].fill(0);
    }
    all.extend(machine.get(HIGH_BASE, HIGH));
    all
}

proptest! {
    #[test]
    fn arbitrary_queues(
        kind in kind(),
        features in prop_oneof![Just(u64::MAX), Just(0), any::<u64>()],
        queues in proptest::collection::vec(queue(), 3),
        indirect in proptest::collection::vec(descriptor(), 32),
        headers in proptest::collection::vec(header(), 1..8),
        again in any::<bool>(),
    ) {
        let mut machine = Machine::new(device(kind));
        machine.start(features);
        machine.put(0x8_0000, &vec![CANARY; LOW - 0x8_0000]);
        machine.put(HIGH_BASE, &[CANARY; HIGH]);
        machine.put(READABLE, &headers.concat());
        for (number, descriptor) in indirect.iter().enumerate() {
            machine.put(INDIRECT + 16 * number as u64, &descriptor.raw());
        }
        for (queue, content) in queues.iter().take(machine.sizes.len()).enumerate() {
            let base = Machine::ring(queue);
            for (number, descriptor) in content.table.iter().enumerate() {
                machine.put(base + TABLE + 16 * number as u64, &descriptor.raw());
            }
            for (number, head) in content.heads.iter().enumerate() {
                machine.put(base + AVAILABLE + 4 + 2 * number as u64, &head.to_le_bytes());
            }
            machine.put(base + AVAILABLE + 2, &content.index.to_le_bytes());
        }
        let before = protected(&machine);
        for queue in 0..machine.sizes.len() as u32 {
            machine.write(0x50, queue);
        }
        prop_assert!(machine.settle(), "work without end");
        if again {
            // Everything once more, by an index that jumps.
            let count = machine.sizes.len();
            for (queue, content) in queues.iter().enumerate().take(count) {
                let index = content.index.wrapping_add(content.heads.len() as u16);
                machine.put(Machine::ring(queue) + AVAILABLE + 2, &index.to_le_bytes());
                machine.write(0x50, queue as u32);
            }
            prop_assert!(machine.settle(), "work without end");
            for (queue, content) in queues.iter().enumerate().take(count) {
                machine.put(Machine::ring(queue) + AVAILABLE + 2, &content.index.to_le_bytes());
            }
        }
        // A balloon takes any page that the driver names, of its rings too: see balloon.rs.
        if matches!(kind, Kind::Balloon) {
            return Ok(());
        }
        prop_assert!(before == protected(&machine), "wrote where it must not");
        for (queue, &size) in machine.sizes.clone().iter().enumerate() {
            let offered = if again { 2 * u32::from(size) } else { u32::from(size) };
            prop_assert!(u32::from(machine.used_index(queue)) <= offered);
        }

        machine.start(0);
        prop_assert!(!machine.needs_reset());
        if matches!(kind, Kind::Rng) {
            machine.put(Machine::ring(0), &Descriptor { address: WRITABLE, len: 32, flags: WRITE, next: 0 }.raw());
            machine.put(Machine::ring(0) + AVAILABLE + 2, &1u16.to_le_bytes());
            machine.write(0x50, 0);
            prop_assert!(machine.settle());
            prop_assert_eq!(machine.used_index(0), 1);
        }
    }

    /// Reads and writes of any register, in any order and width.
    #[test]
    fn arbitrary_registers(
        kind in kind(),
        started in any::<bool>(),
        steps in proptest::collection::vec(
            (
                prop_oneof![4 => (0u64..0x48).prop_map(|word| word * 4), 1 => 0u64..0x1000, 1 => any::<u64>()],
                prop_oneof![Just(4usize), 0usize..9],
                prop_oneof![3 => 0u32..0x80, 1 => (0u32..0x40).prop_map(|page| page * 0x1_0000), 1 => any::<u32>()],
                any::<bool>(),
            ),
            0..120,
        ),
    ) {
        let mut machine = Machine::new(device(kind));
        if started {
            machine.start(u64::MAX);
        }
        for (offset, len, value, write) in steps {
            let mut data = [0u8; 8];
            data[..4].copy_from_slice(&value.to_le_bytes());
            if write {
                machine.transport.write(offset, &data[..len]);
            } else {
                machine.transport.read(offset, &mut data[..len]);
            }
        }
        prop_assert!(machine.settle(), "work without end");
        machine.start(u64::MAX);
    }
}
