//! A guest that breaks the rules.

use std::io::Read;

use virtio_queue::Queue;

use super::super::Vsock;
use super::super::spec::{EVENT, HEADER, Header, RX, TX, op};
use super::guest::{CID, Conn, Guest, closed};
use crate::devices::virtio::testing::{DATA, memory, readable, writable};
use crate::devices::virtio::{ActiveContext, Interrupt, VirtioDevice};

const NOBODY: Conn = Conn { guest_port: 9, host_port: 1024, fwd_cnt: 0 };

#[test]
fn headers_are_encoded_as_the_specification_and_the_crate_say() {
    let header = Header {
        src_cid: 0x0102_0304_0506_0708,
        dst_cid: 0x1112_1314_1516_1718,
        src_port: 0x2122_2324,
        dst_port: 0x3132_3334,
        len: 0x4142_4344,
        kind: 0x5152,
        op: 0x6162,
        flags: 0x7172_7374,
        buf_alloc: 0x8182_8384,
        fwd_cnt: 0x9192_9394,
    };
    assert_eq!(Header::decode(&header.encode()), header);
    let mut raw = [0; HEADER];
    let memory = vm_memory::VolatileSlice::from(&mut raw[..]);
    memory.copy_from(&header.encode());
    // `virtio-vsock`'s accessors on the same bytes.
    use virtio_vsock::packet::{PKT_HEADER_SIZE, PacketHeader};
    assert_eq!(PKT_HEADER_SIZE, HEADER);
    let theirs = vm_memory::Bytes::read_obj::<PacketHeader>(&memory, 0).unwrap();
    let text = format!("{theirs:?}");
    for value in [u64::from(header.src_port), header.dst_cid, u64::from(header.op), u64::from(header.fwd_cnt)]
    {
        assert!(text.contains(&value.to_string()), "{value} in {text}");
    }
}

#[test]
fn packets_for_nobody_are_reset_once() {
    let mut guest = Guest::new();
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 8, u16::MAX] {
        guest.send(NOBODY, op, &[]);
        let (reset, _) = guest.expect(op::RST);
        assert_eq!((reset.src_port, reset.dst_port), (1024, 9), "operation {op}");
    }
    guest.send(NOBODY, op::RST, &[]);
    guest.expect_silence();
}

#[test]
fn packets_of_wrong_type_or_addressee() {
    let mut guest = Guest::new();
    let good = guest.header(NOBODY, op::REQUEST);
    for kind in [0, 2, u16::MAX] {
        guest.send_raw(&Header { kind, ..good }, &[]);
        assert_eq!(guest.expect(op::RST).0.src_port, 1024);
    }
    guest.send_raw(&Header { kind: 2, op: op::RST, ..good }, &[]);
    guest.send_raw(&Header { src_cid: u64::from(CID) + 1, ..good }, &[]);
    guest.send_raw(&Header { src_cid: u64::from(CID) | 1 << 32, ..good }, &[]);
    guest.send_raw(&Header { dst_cid: 3, op: op::RST, ..good }, &[]);
    guest.expect_silence();
    assert!(guest.incoming.try_recv().is_err());
}

#[test]
fn operations_that_do_not_fit_end_the_connection() {
    for op in [0, op::RESPONSE, 8, u16::MAX] {
        let mut guest = Guest::new();
        let (mut client, conn) = guest.connected(5000);
        guest.send(conn, op, &[]);
        guest.expect(op::RST);
        assert!(closed(&mut client), "operation {op}");
    }
    for op in [op::RW, op::SHUTDOWN, op::REQUEST, op::CREDIT_REQUEST] {
        let mut guest = Guest::new();
        let mut client = guest.dial(5000);
        let (request, _) = guest.expect(op::REQUEST);
        guest.send(Conn { guest_port: 5000, host_port: request.src_port, fwd_cnt: 0 }, op, &[]);
        guest.expect(op::RST);
        assert!(closed(&mut client), "operation {op} before RESPONSE");
    }
}

#[test]
fn a_second_request_for_the_same_ports_ends_the_first() {
    let mut guest = Guest::new();
    let (mut stream, conn) = guest.dial_host(77, 1024);
    guest.send(conn, op::REQUEST, &[]);
    guest.expect(op::RST);
    assert!(closed(&mut stream));
}

#[test]
fn lengths_that_lie() {
    let mut guest = Guest::new();
    let (mut client, conn) = guest.connected(5000);
    // Longer buffers than the length: the rest is not data.
    let header = Header { len: 2, ..guest.header(conn, op::RW) };
    guest.send_raw(&header, b"abcd");
    let mut answer = [0; 2];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ab");
    // A longer length than the buffers.
    let header = Header { len: 5, ..guest.header(conn, op::RW) };
    guest.send_raw(&header, b"abcd");
    guest.expect(op::RST);
    assert!(closed(&mut client));
}

#[test]
fn credit_that_lies_only_hurts_the_guest() {
    let mut guest = Guest::new();
    let (client, mut conn) = guest.connected(5000);
    std::io::Write::write_all(&mut &client, b"x").unwrap();
    guest.expect(op::RW);
    // More consumed than was ever sent.
    conn.fwd_cnt = 1000;
    guest.send(conn, op::CREDIT_UPDATE, &[]);
    std::io::Write::write_all(&mut &client, b"y").unwrap();
    guest.expect(op::CREDIT_REQUEST);
    guest.expect_silence();
    conn.fwd_cnt = 1;
    guest.window = u32::MAX;
    guest.send(conn, op::CREDIT_UPDATE, &[]);
    assert_eq!(guest.expect(op::RW).1, b"y");
}

#[test]
fn malformed_chains_need_a_reset() {
    let header = |guest: &mut Guest| {
        let raw = guest.header(NOBODY, op::REQUEST).encode();
        guest.driver.fill(DATA + 0x30_0000, &raw);
        DATA + 0x30_0000
    };
    type Parts = Vec<crate::devices::virtio::testing::Part>;
    type Make = fn(u64) -> Parts;
    let cases: [(u16, Make); 4] = [
        (TX, |at| vec![readable(at, 43)]),
        (TX, |at| vec![readable(at, 44), writable(at + 0x1000, 1)]),
        (TX, |_| vec![readable(1 << 40, 44)]),
        (TX, |at| vec![writable(at, 44)]),
    ];
    for (queue, parts) in cases {
        let mut guest = Guest::new();
        let (mut client, _) = guest.connected(5000);
        let at = header(&mut guest);
        guest.driver.add(queue.into(), &parts(at));
        guest.driver.kick(queue);
        assert!(guest.driver.needs_reset());
        assert!(closed(&mut client), "the host learns of it");
        assert!(guest.incoming.try_recv().is_err());
    }
    for parts in
        [vec![writable(DATA, 44)], vec![readable(DATA, 100)], vec![readable(DATA, 4), writable(DATA, 100)]]
    {
        let mut guest = Guest::with(0, |_| {});
        guest.driver.add(RX.into(), &parts);
        guest.driver.kick(RX);
        guest.send(NOBODY, op::RW, &[]);
        assert!(guest.driver.needs_reset(), "{parts:?}");
    }
}

#[test]
fn a_guest_that_takes_no_answers_is_held_up_but_not_lost() {
    let mut guest = Guest::with(0, |_| {});
    let header = guest.header(NOBODY, op::RW).encode();
    guest.driver.fill(DATA + 0x30_0000, &header);
    let mut completed = 0;
    for _ in 0..400 {
        guest.driver.add(TX.into(), &[readable(DATA + 0x30_0000, HEADER)]);
        guest.driver.kick(TX);
        completed += guest.driver.used(TX.into()).len();
    }
    assert_eq!(completed, 256, "the answers that wait are bounded");
    let mut answers = 0;
    for _ in 0..400 {
        guest.add_buffer();
        guest.driver.kick(RX);
        guest.refill = false;
        while let Some((header, _)) = guest.try_recv() {
            assert_eq!(header.op, op::RST);
            answers += 1;
        }
    }
    assert_eq!(answers, 400);
}

#[test]
fn a_transport_reset_reaches_the_event_queue() {
    struct Silent;
    impl Interrupt for Silent {
        fn used(&self) {}
        fn config_changed(&self) {}
    }
    let directory = tempfile::tempdir().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(directory.path().join("s")).unwrap();
    let mut device = Vsock::new(CID, listener, vec![], Box::new(|_, _| {})).unwrap();
    let memory = memory();
    let queues = (0..3u64)
        .map(|index| {
            use virtio_queue::QueueT;
            let mut queue = Queue::new(16).unwrap();
            let base = 0x1_0000 * (index as u32 + 1);
            queue.set_desc_table_address(Some(base), None);
            queue.set_avail_ring_address(Some(base + 0x4000), None);
            queue.set_used_ring_address(Some(base + 0x8000), None);
            queue.set_ready(true);
            queue
        })
        .collect();
    let context =
        ActiveContext { memory: memory.clone(), interrupt: std::sync::Arc::new(Silent), features: 0 };
    device.activate(context, queues).unwrap();
    device.transport_reset().unwrap();
    // The event waits for a buffer.
    use vm_memory::{Bytes, GuestAddress};
    let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
    put(DATA, &[0xff; 8]);
    put(0x3_0000, &DATA.to_le_bytes());
    put(0x3_0008, &[8, 0, 0, 0, 2, 0, 0, 0]);
    put(0x3_4002, &[1, 0]);
    let _ = device.process_queue(EVENT).unwrap();
    let used: u16 = memory.read_obj(GuestAddress(0x3_8002)).unwrap();
    let event: u64 = memory.read_obj(GuestAddress(DATA)).unwrap();
    assert_eq!((used, event), (1, 0xffff_ffff_0000_0000));
}
