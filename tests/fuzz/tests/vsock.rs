//! The socket device against arbitrary packets and host peers, and its one promise under
//! arbitrary scheduling: every byte arrives, once and in order.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod virtio;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, channel};

use proptest::prelude::*;
use spore_vmm::devices::virtio::vsock::Vsock;
use virtio::{AVAILABLE, Machine, USED};

const CID: u64 = 3;
const PORT: u32 = 1024;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x20_0000;
const RX_SIZE: u64 = 4096;
const HEADER: usize = 44;
const RW: u16 = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packet {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Packet {
    fn raw(&self) -> Vec<u8> {
        let mut raw = Vec::with_capacity(HEADER);
        raw.extend(self.src_cid.to_le_bytes());
        raw.extend(self.dst_cid.to_le_bytes());
        for word in [self.src_port, self.dst_port, self.len] {
            raw.extend(word.to_le_bytes());
        }
        raw.extend(self.kind.to_le_bytes());
        raw.extend(self.op.to_le_bytes());
        for word in [self.flags, self.buf_alloc, self.fwd_cnt] {
            raw.extend(word.to_le_bytes());
        }
        raw
    }

    fn parse(raw: &[u8]) -> Self {
        let u32_at = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_le_bytes(raw[at..at + 8].try_into().unwrap());
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u32_at(28) as u16,
            op: (u32_at(28) >> 16) as u16,
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }
}

struct Guest {
    machine: Machine,
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
    incoming: Receiver<(u32, UnixStream)>,
    available: [u16; 3],
    seen: u16,
}

impl Guest {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (sender, incoming) = channel();
        let on_connection = Box::new(move |port, stream| sender.send((port, stream)).unwrap());
        let device = Vsock::new(CID as u32, listener, vec![PORT], on_connection).unwrap();
        let mut machine = Machine::new(Box::new(device));
        machine.start(u64::MAX);
        Self { machine, path, _directory: directory, incoming, available: [0; 3], seen: 0 }
    }

    fn offer(&mut self, queue: usize, address: u64, len: usize, flags: u16) {
        let size = self.machine.sizes[queue];
        let slot = self.available[queue] % size;
        let base = Machine::ring(queue);
        let mut raw = address.to_le_bytes().to_vec();
        raw.extend((len as u32).to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend([0; 2]);
        self.machine.put(base + 16 * u64::from(slot), &raw);
        self.machine.put(base + AVAILABLE + 4 + 2 * u64::from(slot), &slot.to_le_bytes());
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.machine.put(base + AVAILABLE + 2, &self.available[queue].to_le_bytes());
    }

    fn give_buffer(&mut self) {
        if self.available[0].wrapping_sub(self.seen) < self.machine.sizes[0] {
            let slot = u64::from(self.available[0] % self.machine.sizes[0]);
            self.offer(0, RX_BUFFERS + slot * RX_SIZE, RX_SIZE as usize, 2);
            self.machine.write(0x50, 0);
        }
    }

    /// Sends a packet if the transmit queue has room.
    fn send(&mut self, packet: &Packet, data: &[u8]) -> bool {
        if self.available[1].wrapping_sub(self.machine.used_index(1)) >= 16 {
            return false;
        }
        let at = TX_BUFFERS + u64::from(self.available[1] % 16) * 0x1_1000;
        self.machine.put(at, &packet.raw());
        self.machine.put(at + HEADER as u64, data);
        self.offer(1, at, HEADER + data.len(), 0);
        self.machine.write(0x50, 1);
        true
    }

    /// Packets from the device, each checked for form.
    fn receive(&mut self) -> Vec<(Packet, Vec<u8>)> {
        let mut packets = Vec::new();
        while self.seen != self.machine.used_index(0) {
            let at = Machine::ring(0) + USED + 4 + 8 * u64::from(self.seen % self.machine.sizes[0]);
            let slot = self.machine.u16_at(at);
            let len = usize::from(self.machine.u16_at(at + 4));
            assert!((HEADER..=RX_SIZE as usize).contains(&len));
            let raw = self.machine.get(RX_BUFFERS + u64::from(slot) * RX_SIZE, len);
            let packet = Packet::parse(&raw);
            assert_eq!(packet.len as usize, len - HEADER);
            assert_eq!((packet.dst_cid, packet.kind), (CID, 1));
            assert!((1..=7).contains(&packet.op));
            packets.push((packet, raw[HEADER..].to_vec()));
            self.seen = self.seen.wrapping_add(1);
        }
        packets
    }
}

#[derive(Debug, Clone)]
enum Step {
    Send(Packet, Vec<u8>),
    /// A packet for the n-th connection that the device asked for.
    SendTo(usize, u16, u32, u32, Vec<u8>),
    Buffer,
    Dial(Vec<u8>),
    HostWrite(usize, Vec<u8>),
    HostRead(usize),
    HostClose(usize),
    HostShutdown(usize, bool),
    Settle,
}

fn packet() -> impl Strategy<Value = Packet> {
    (
        (prop_oneof![9 => Just(CID), 1 => any::<u64>()], prop_oneof![9 => Just(2u64), 1 => any::<u64>()]),
        (prop_oneof![5 => 0u32..4, 1 => any::<u32>()], prop_oneof![6 => Just(PORT), 1 => any::<u32>()]),
        (prop_oneof![6 => 0u32..200, 1 => any::<u32>()], prop_oneof![9 => Just(1u16), 1 => any::<u16>()]),
        prop_oneof![4 => Just(1u16), 4 => Just(RW), 6 => 0u16..9, 1 => any::<u16>()],
        (prop_oneof![0u32..4, any::<u32>()], any::<u32>(), prop_oneof![Just(0), any::<u32>()]),
    )
        .prop_map(
            |((src_cid, dst_cid), (src_port, dst_port), (len, kind), op, (flags, buf_alloc, fwd_cnt))| {
                Packet { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt }
            },
        )
}

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        6 => proptest::collection::vec(any::<u8>(), 0..200),
        1 => (0usize..0x1_0000).prop_map(|len| vec![7; len]),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let greeting = prop_oneof![
        4 => Just(b"CONNECT 5000\n".to_vec()),
        1 => proptest::collection::vec(any::<u8>(), 0..40),
        1 => Just(b"CONNECT 50".to_vec()),
    ];
    prop_oneof![
        6 => (packet(), bytes()).prop_map(|(packet, data)| Step::Send(packet, data)),
        6 => (any::<usize>(), prop_oneof![3 => Just(2u16), 3 => Just(RW), 2 => 0u16..9], 0u32..4, any::<u32>(), bytes())
            .prop_map(|(which, op, flags, credit, data)| Step::SendTo(which, op, flags, credit, data)),
        4 => Just(Step::Buffer),
        2 => greeting.prop_map(Step::Dial),
        2 => (any::<usize>(), bytes()).prop_map(|(which, data)| Step::HostWrite(which, data)),
        2 => any::<usize>().prop_map(Step::HostRead),
        1 => any::<usize>().prop_map(Step::HostClose),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(which, read)| Step::HostShutdown(which, read)),
        4 => Just(Step::Settle),
    ]
}

fn pick<T>(list: &mut [T], which: usize) -> Option<&mut T> {
    let count = list.len();
    list.get_mut(which.checked_rem(count)?)
}

proptest! {
    #[test]
    fn arbitrary_packets_and_peers(steps in proptest::collection::vec(step(), 1..120)) {
        let mut guest = Guest::new();
        let mut hosts: Vec<UnixStream> = Vec::new();
        let mut dialled = Vec::new();
        for step in steps {
            match step {
                Step::Send(packet, data) => {
                    guest.send(&packet, &data);
                }
                Step::SendTo(which, op, flags, credit, data) => {
                    if let Some(&mut (host_port, guest_port)) = pick(&mut dialled, which) {
                        let packet = Packet {
                            src_cid: CID, dst_cid: 2, src_port: guest_port, dst_port: host_port,
                            len: data.len() as u32, kind: 1, op, flags, buf_alloc: credit, fwd_cnt: 0,
                        };
                        guest.send(&packet, &data);
                    }
                }
                Step::Buffer => guest.give_buffer(),
                Step::Dial(greeting) => {
                    let mut client = UnixStream::connect(&guest.path).unwrap();
                    client.write_all(&greeting).unwrap();
                    client.set_nonblocking(true).unwrap();
                    hosts.push(client);
                }
                Step::HostWrite(which, data) => {
                    if let Some(mut host) = pick(&mut hosts, which).map(|host| &*host) {
                        let _ = host.write(&data);
                    }
                }
                Step::HostRead(which) => {
                    if let Some(mut host) = pick(&mut hosts, which).map(|host| &*host) {
                        let _ = host.read(&mut [0; 4096]);
                    }
                }
                Step::HostClose(which) => {
                    if !hosts.is_empty() {
                        let count = hosts.len();
                        hosts.swap_remove(which % count);
                    }
                }
                Step::HostShutdown(which, read) => {
                    if let Some(host) = pick(&mut hosts, which) {
                        let _ = host.shutdown(if read { Shutdown::Read } else { Shutdown::Write });
                    }
                }
                Step::Settle => prop_assert!(guest.machine.settle(), "work without end"),
            }
            for (packet, _) in guest.receive() {
                if packet.op == 1 {
                    dialled.push((packet.src_port, packet.dst_port));
                }
            }
            while let Ok((port, stream)) = guest.incoming.try_recv() {
                prop_assert_eq!(port, PORT);
                stream.set_nonblocking(true).unwrap();
                hosts.push(stream);
            }
        }
        prop_assert!(guest.machine.settle(), "work without end");
        // Every packet was a well-formed chain, so only its content can have been wrong.
        prop_assert!(!guest.machine.needs_reset());
    }

    /// A well-behaved guest and peer, scheduled at will.
    #[test]
    fn every_byte_arrives_in_order(
        window in prop_oneof![1u32..64, 64u32..20_000, Just(1 << 20)],
        to_guest in 0usize..300_000,
        to_host in 0usize..600_000,
        schedule in proptest::collection::vec((0u8..6, 1usize..70_000), 20..60),
    ) {
        // A narrow window makes as many packets as bytes.
        let to_guest = to_guest.min(window as usize * 2000);
        let pattern = |len: usize, factor: usize| (0..len).map(|at| ((at * factor) >> 3) as u8).collect::<Vec<_>>();
        let (down, up) = (pattern(to_guest, 31), pattern(to_host, 17));
        let mut guest = Guest::new();
        let base = Packet {
            src_cid: CID, dst_cid: 2, src_port: 77, dst_port: PORT, len: 0,
            kind: 1, op: 1, flags: 0, buf_alloc: window, fwd_cnt: 0,
        };
        guest.send(&base, &[]);
        prop_assert!(guest.machine.settle());
        let (_, mut host) = guest.incoming.try_recv().unwrap();
        host.set_nonblocking(true).unwrap();

        let (mut down_sent, mut up_sent) = (0, 0);
        let (mut down_got, mut up_got): (Vec<u8>, Vec<u8>) = (Vec::new(), Vec::new());
        let (mut credit, mut forwarded, mut told) = (0u32, 0u32, 0u32);
        let (mut host_shut, mut ended, mut guest_shut, mut host_end) = (false, false, false, false);
        let mut turns = schedule.iter().cycle();
        let mut idle = 0;
        while !(ended && host_end) {
            idle += 1;
            prop_assert!(idle < 5000, "stuck: {} of {} down, {} of {} up, {host_shut} {ended} {guest_shut} {host_end}",
                down_got.len(), down.len(), up_got.len(), up.len());
            let &(what, amount) = turns.next().unwrap();
            match what {
                0 if host_shut => {}
                0 => {
                    let end = down.len().min(down_sent + amount);
                    match host.write(&down[down_sent..end]) {
                        Ok(count) => down_sent += count,
                        Err(error) => prop_assert_eq!(error.kind(), ErrorKind::WouldBlock),
                    }
                }
                1 => {
                    let mut chunk = vec![0; amount];
                    match host.read(&mut chunk) {
                        Ok(0) => host_end = true,
                        Ok(count) => { up_got.extend(&chunk[..count]); idle = 0; }
                        Err(error) => prop_assert_eq!(error.kind(), ErrorKind::WouldBlock),
                    }
                }
                2 => {
                    let room = (credit as usize).saturating_sub(up_sent - forwarded as usize);
                    let count = amount.min(room).min(65_536).min(up.len() - up_sent);
                    if count > 0 {
                        told = down_got.len() as u32;
                        let packet = Packet { op: RW, len: count as u32, fwd_cnt: told, ..base };
                        if guest.send(&packet, &up[up_sent..up_sent + count]) {
                            up_sent += count;
                        }
                    } else if up_sent == up.len() && !guest_shut && credit > 0 {
                        guest_shut = guest.send(&Packet { op: 4, flags: 2, fwd_cnt: told, ..base }, &[]);
                    }
                }
                3 => (0..1 + amount / 1024).for_each(|_| guest.give_buffer()),
                4 => prop_assert!(guest.machine.settle()),
                _ => {
                    if told != down_got.len() as u32 {
                        told = down_got.len() as u32;
                        guest.send(&Packet { op: 6, fwd_cnt: told, ..base }, &[]);
                    }
                }
            }
            if down_sent == down.len() && !host_shut {
                host.shutdown(Shutdown::Write).unwrap();
                host_shut = true;
            }
            // Nobody is idle for ever: a schedule without some turn still gets it.
            if idle % 50 == 49 {
                turns = FAIR.iter().cycle();
            }
            for (packet, data) in guest.receive() {
                prop_assert_ne!(packet.op, 3, "reset");
                credit = packet.buf_alloc;
                forwarded = packet.fwd_cnt;
                if packet.op == RW {
                    prop_assert!(!ended, "bytes after the end");
                    down_got.extend(data);
                    prop_assert!(down_got.len() as u32 - told <= window, "beyond the window");
                    idle = 0;
                }
                ended |= packet.op == 4 && packet.flags & 2 != 0;
            }
        }
        prop_assert!(down_got == down, "host to guest");
        prop_assert!(up_got == up, "guest to host");
    }
}

const FAIR: [(u8, usize); 6] = [(0, 60_000), (3, 60_000), (4, 1), (5, 1), (2, 65_536), (1, 60_000)];
