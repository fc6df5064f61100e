//! Bytes: credit both ways, half-close both ways, turns, large transfers.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::super::spec::{BUF_ALLOC, SHUTDOWN_RCV, SHUTDOWN_SEND, op};
use super::guest::{Conn, Guest, WINDOW, closed};

fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        })
        .collect()
}

/// Writes without blocking as much as the socket takes.
fn stuff(stream: &mut UnixStream, data: &[u8]) -> usize {
    stream.set_nonblocking(true).unwrap();
    let mut done = 0;
    while done < data.len() {
        match stream.write(&data[done..]) {
            Ok(count) => done += count,
            Err(_) => break,
        }
    }
    stream.set_nonblocking(false).unwrap();
    done
}

#[test]
fn the_guests_window_is_respected() {
    let mut guest = Guest::new();
    let (mut client, mut conn) = guest.connected(5000);
    let data = pattern(2 * WINDOW as usize, 1);
    assert_eq!(stuff(&mut client, &data), data.len());
    let mut received = Vec::new();
    while received.len() < WINDOW as usize {
        received.extend(guest.expect(op::RW).1);
    }
    assert_eq!(received.len(), WINDOW as usize, "not a byte beyond the window");
    guest.expect(op::CREDIT_REQUEST);
    guest.expect_silence();
    conn.fwd_cnt = 1;
    guest.send(conn, op::CREDIT_UPDATE, &[]);
    received.extend(guest.expect(op::RW).1);
    assert_eq!(received.len(), WINDOW as usize + 1);
    guest.expect(op::CREDIT_REQUEST);
    conn.fwd_cnt = WINDOW;
    guest.send(conn, op::CREDIT_UPDATE, &[]);
    while received.len() < data.len() {
        received.extend(guest.expect(op::RW).1);
    }
    assert_eq!(received, data);
}

#[test]
fn a_host_that_does_not_read_stops_the_guest_and_nobody_else() {
    let mut guest = Guest::new();
    let (mut slow, conn) = guest.connected(5000);
    let (mut quick, other) = guest.connected(5001);
    let data = pattern(1 << 20, 2);
    // As a well-behaved guest: only within the credit that packets brought.
    let (mut sent, mut forwarded) = (0u32, 0u32);
    loop {
        while let Some((header, _)) = guest.try_recv() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            forwarded = header.fwd_cnt;
        }
        let count = (BUF_ALLOC - (sent - forwarded)).min(10_000);
        if count == 0 {
            break;
        }
        guest.send(conn, op::RW, &data[sent as usize..(sent + count) as usize]);
        sent += count;
    }
    assert!(sent >= BUF_ALLOC && (sent as usize) < data.len());

    guest.send(other, op::RW, b"quick");
    let mut answer = [0; 5];
    quick.read_exact(&mut answer).unwrap();
    quick.write_all(b"back").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"back");

    // Reading opens the window again.
    let mut received: Vec<u8> = Vec::new();
    let mut chunk = vec![0; 100_000];
    while received.len() < data.len() {
        let count = slow.read(&mut chunk).unwrap();
        received.extend(&chunk[..count]);
        while guest.serve(0) {}
        while let Some((header, _)) = guest.try_recv() {
            forwarded = header.fwd_cnt;
        }
        let room = BUF_ALLOC - (sent - forwarded);
        let count = room.min(data.len() as u32 - sent).min(60_000);
        if count > 0 {
            guest.send(conn, op::RW, &data[sent as usize..(sent + count) as usize]);
            sent += count;
        }
    }
    assert_eq!(received, data);
}

#[test]
fn sending_without_credit_resets() {
    let mut guest = Guest::new();
    let (mut client, conn) = guest.connected(5000);
    let data = vec![1; 64 * 1024];
    // The socket takes some; then the buffer fills; then there is no credit.
    let mut packets = 0;
    loop {
        guest.send(conn, op::RW, &data);
        packets += 1;
        match guest.try_recv() {
            Some((header, _)) if header.op == op::RST => break,
            _ => assert!(packets < 64, "the buffer has no end"),
        }
    }
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
}

#[test]
fn credit_is_told_when_asked() {
    let mut guest = Guest::new();
    let (_client, conn) = guest.connected(5000);
    guest.send(conn, op::RW, b"12345");
    guest.send(conn, op::CREDIT_REQUEST, &[]);
    let (header, _) = guest.expect(op::CREDIT_UPDATE);
    assert_eq!((header.buf_alloc, header.fwd_cnt), (BUF_ALLOC, 5));
}

#[test]
fn the_host_may_close_its_half() {
    let mut guest = Guest::new();
    let (mut client, conn) = guest.connected(5000);
    client.write_all(b"last").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::RW).1, b"last");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, SHUTDOWN_SEND);
    guest.send(conn, op::RW, b"answer");
    guest.shutdown(conn, SHUTDOWN_RCV | SHUTDOWN_SEND);
    guest.expect(op::RST);
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"answer");
}

#[test]
fn the_guest_may_close_its_half() {
    let mut guest = Guest::new();
    let (mut client, conn) = guest.connected(5000);
    guest.send(conn, op::RW, b"last");
    guest.shutdown(conn, SHUTDOWN_SEND);
    let mut all = Vec::new();
    client.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
    client.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"answer");
    drop(client);
    let (header, _) = guest.expect(op::SHUTDOWN);
    assert_ne!(header.flags & SHUTDOWN_SEND, 0);
    guest.send(conn, op::RST, &[]);
    guest.send(conn, op::RW, b"x");
    guest.expect(op::RST);
}

#[test]
fn a_half_closed_connection_is_quiet() {
    let mut guest = Guest::new();
    let (client, conn) = guest.connected(5000);
    guest.shutdown(conn, SHUTDOWN_SEND);
    let mut turns = 0;
    while guest.serve(0) {
        turns += 1;
        assert!(turns < 100, "the device wakes itself");
    }
    client.shutdown(Shutdown::Write).unwrap();
    guest.expect(op::SHUTDOWN);
    while guest.serve(0) {
        turns += 1;
        assert!(turns < 100, "the device wakes itself");
    }
}

#[test]
fn the_guest_may_stop_receiving() {
    let mut guest = Guest::new();
    let (mut client, conn) = guest.connected(5000);
    guest.shutdown(conn, SHUTDOWN_RCV);
    let error = client.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    guest.send(conn, op::RW, b"still");
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
}

#[test]
fn a_host_that_closes_is_told_to_the_guest_after_its_bytes() {
    let mut guest = Guest::new();
    let (mut client, conn) = guest.connected(5000);
    let data = pattern(100_000, 3);
    assert_eq!(stuff(&mut client, &data), data.len());
    drop(client);
    let mut received = Vec::new();
    let mut flags = 0;
    let mut conn = conn;
    while flags != SHUTDOWN_SEND | SHUTDOWN_RCV {
        let (header, bytes) = guest.recv();
        match header.op {
            op::RW => {
                assert_eq!(flags & SHUTDOWN_SEND, 0, "bytes after the end");
                received.extend(bytes);
                conn.fwd_cnt = received.len() as u32;
                guest.send(conn, op::CREDIT_UPDATE, &[]);
            }
            op::SHUTDOWN => flags |= header.flags,
            op => assert_eq!(op, op::CREDIT_REQUEST),
        }
    }
    assert_eq!(received, data);
    // What the guest sends now vanishes, but counts as consumed.
    for _ in 0..8 {
        guest.send(conn, op::RW, &[0; 65536]);
    }
    while let Some((header, _)) = guest.try_recv() {
        assert_eq!(header.op, op::CREDIT_UPDATE);
    }
    guest.shutdown(conn, SHUTDOWN_SEND | SHUTDOWN_RCV);
    guest.expect(op::RST);
}

#[test]
fn the_guests_last_bytes_arrive_after_it_let_go() {
    for by_reset in [false, true] {
        let mut guest = Guest::new();
        let (mut stream, conn) = guest.dial_host(77, 1024);
        let data = pattern(400_000, 4);
        let mut sent = 0;
        let mut forwarded = 0;
        while sent < data.len() {
            let room = BUF_ALLOC as usize - (sent - forwarded);
            let count = room.min(50_000).min(data.len() - sent);
            assert!(count > 0);
            guest.send(conn, op::RW, &data[sent..sent + count]);
            sent += count;
            while let Some((header, _)) = guest.try_recv() {
                forwarded = header.fwd_cnt as usize;
            }
        }
        if by_reset {
            guest.send(conn, op::RST, &[]);
        } else {
            guest.shutdown(conn, SHUTDOWN_SEND | SHUTDOWN_RCV);
            guest.expect(op::RST);
        }
        // The guest may use the same ports again while the old bytes drain.
        let (_again, _) = guest.dial_host(77, 1024);
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).unwrap();
            all
        });
        guest.serve_until("drain", |_| reader.is_finished());
        assert_eq!(reader.join().unwrap(), data);
    }
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::with(8, |_| {});
    let (mut first, _) = guest.connected(1);
    let (mut second, _) = guest.connected(2);
    guest.refill = false;
    guest.window = 1 << 20;
    let mut conns = Vec::new();
    for client in [&mut first, &mut second] {
        stuff(client, &[1; 60_000]);
    }
    while guest.serve(50) {}
    while let Some((header, _)) = guest.try_recv() {
        assert_eq!(header.op, op::RW);
        conns.push(header.dst_port);
    }
    let ones = conns.iter().filter(|&&port| port == 1).count();
    assert!(conns.len() >= 6 && ones.abs_diff(conns.len() - ones) <= 1, "{conns:?}");
}

#[test]
fn nothing_is_lost_when_the_guest_has_no_buffers() {
    let mut guest = Guest::with(2, |_| {});
    let (mut client, _) = guest.connected(5000);
    guest.refill = false;
    let data = pattern(50_000, 5);
    stuff(&mut client, &data);
    let mut received = Vec::new();
    let mut spare = 2;
    while received.len() < data.len() {
        while guest.serve(0) {}
        match guest.try_recv() {
            Some((header, bytes)) => {
                spare += 1;
                if header.op == op::RW {
                    received.extend(bytes);
                }
            }
            None => {
                assert!(spare > 0);
                spare -= 1;
                guest.add_buffer();
                guest.driver.kick(0);
            }
        }
    }
    assert_eq!(received, data);
}

/// Both directions at once, several connections, threads on the host's side.
#[test]
fn large_transfers_are_exact() {
    const BYTES: usize = 3 << 20;
    const CONNECTIONS: u32 = 4;
    struct Side {
        conn: Conn,
        to_host: Vec<u8>,
        sent: u32,
        forwarded: u32,
        received: Vec<u8>,
        ended: bool,
        shut: bool,
    }
    let mut guest = Guest::new();
    let mut sides = Vec::new();
    let mut threads = Vec::new();
    let open: Vec<_> = (0..CONNECTIONS)
        .map(|number| if number % 2 == 0 { guest.connected(5000) } else { guest.dial_host(number, 1030) })
        .collect();
    for (number, (client, conn)) in (0..).zip(open) {
        let mut writer = client.try_clone().unwrap();
        let mut reader = client;
        threads.push((
            std::thread::spawn(move || {
                writer.write_all(&pattern(BYTES, 100 + number)).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            }),
            std::thread::spawn(move || {
                let mut all = Vec::new();
                reader.read_to_end(&mut all).unwrap();
                all
            }),
        ));
        let to_host = pattern(BYTES, 200 + number);
        sides.push(Side {
            conn,
            to_host,
            sent: 0,
            forwarded: 0,
            received: Vec::new(),
            ended: false,
            shut: false,
        });
    }
    guest.serve_until("transfer", |guest| {
        while let Some((header, data)) = guest.try_recv() {
            let key = (header.src_port, header.dst_port);
            let side =
                sides.iter_mut().find(|side| (side.conn.host_port, side.conn.guest_port) == key).unwrap();
            side.forwarded = header.fwd_cnt;
            match header.op {
                op::RW => {
                    side.received.extend(data);
                    let news = (side.received.len() as u32).wrapping_sub(side.conn.fwd_cnt);
                    if news >= WINDOW / 2 {
                        side.conn.fwd_cnt = side.received.len() as u32;
                        guest.send(side.conn, op::CREDIT_UPDATE, &[]);
                    }
                }
                op::SHUTDOWN => side.ended |= header.flags & SHUTDOWN_SEND != 0,
                op::CREDIT_REQUEST => {
                    side.conn.fwd_cnt = side.received.len() as u32;
                    guest.send(side.conn, op::CREDIT_UPDATE, &[]);
                }
                op::CREDIT_UPDATE => {}
                op => panic!("operation {op}"),
            }
        }
        for side in &mut sides {
            let room = BUF_ALLOC - side.sent.wrapping_sub(side.forwarded);
            let count = room.min(65_536).min(BYTES as u32 - side.sent);
            if count > 0 {
                let from = side.sent as usize;
                guest.send(side.conn, op::RW, &side.to_host[from..from + count as usize]);
                side.sent += count;
            } else if side.sent as usize == BYTES && !side.shut {
                side.shut = true;
                guest.shutdown(side.conn, SHUTDOWN_SEND);
            }
        }
        sides.iter().all(|side| side.ended && side.shut)
            && threads.iter().all(|(w, r)| w.is_finished() && r.is_finished())
    });
    for (number, (side, (writer, reader))) in (0..).zip(sides.into_iter().zip(threads)) {
        writer.join().unwrap();
        assert!(reader.join().unwrap() == side.to_host, "guest to host, connection {number}");
        assert!(side.received == pattern(BYTES, 100 + number), "host to guest, connection {number}");
    }
    let metrics = guest.handle.metrics();
    assert_eq!(metrics.rx_bytes, u64::from(CONNECTIONS) * BYTES as u64);
    assert_eq!(metrics.tx_bytes, u64::from(CONNECTIONS) * BYTES as u64);
}

#[test]
fn a_reset_of_the_guest_closes_the_host_end() {
    let mut guest = Guest::new();
    let (mut stream, conn) = guest.dial_host(77, 1024);
    guest.send(conn, op::RST, &[]);
    assert!(closed(&mut stream));
    assert_eq!(guest.handle.metrics().resets, 1);
}
