//! Opening connections from both sides, and not opening them.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use super::super::muxer::{MAX_CONNECTIONS, MAX_FROM_GUEST, MAX_PENDING};
use super::super::spec::op;
use super::super::{Vsock, VsockError};
use super::guest::{Conn, Guest, closed};

#[test]
fn a_host_client_reaches_a_guest_port() {
    let mut guest = Guest::new();
    let (mut client, conn) = guest.connected(5000);
    client.write_all(b"hello").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"hello");
    guest.send(conn, op::RW, b"world");
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"world");
    let metrics = guest.handle.metrics();
    assert_eq!((metrics.connections, metrics.rx_bytes, metrics.tx_bytes), (1, 5, 5));
}

#[test]
fn bytes_sent_before_ok_are_kept() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONN").unwrap();
    guest.serve(1000);
    client.write_all(b"ECT 5000\nearly").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let (request, _) = guest.expect(op::REQUEST);
    guest.expect_silence();
    let conn = Conn { guest_port: 5000, host_port: request.src_port, fwd_cnt: 0 };
    guest.send(conn, op::RESPONSE, &[]);
    assert_eq!(guest.expect(op::RW).1, b"early");
    assert_eq!(guest.expect(op::SHUTDOWN).0.flags, 2);
}

#[test]
fn a_refusal_closes_the_client() {
    let mut guest = Guest::new();
    let mut client = guest.dial(5000);
    let (request, _) = guest.expect(op::REQUEST);
    guest.send(Conn { guest_port: 5000, host_port: request.src_port, fwd_cnt: 0 }, op::RST, &[]);
    assert!(closed(&mut client));
    guest.expect_silence();
}

#[test]
fn a_client_that_gives_up_resets_the_guest() {
    let mut guest = Guest::new();
    let client = guest.dial(5000);
    guest.expect(op::REQUEST);
    drop(client);
    guest.expect(op::RST);
}

#[test]
fn bad_greetings_close_the_client() {
    let mut guest = Guest::new();
    let long = "CONNECT 000000000000000000000000000000000000001\n";
    for greeting in [
        "\n",
        "CONNECT\n",
        "CONNECT \n",
        "CONNECT x\n",
        "CONNECT -1\n",
        "CONNECT +1\n",
        "connect 1\n",
        "CONNECT 4294967295\n",
        "CONNECT 4294967296\n",
        "CONNECT 1 \n",
        "CONNECT 1\r\n",
        long,
    ] {
        let mut client = guest.client();
        client.write_all(greeting.as_bytes()).unwrap();
        guest.serve(1000);
        while guest.serve(0) {}
        assert!(closed(&mut client), "{greeting:?}");
    }
    let client = guest.client();
    drop(client);
    guest.serve(1000);
    guest.expect_silence();
}

/// Handshakes of both kinds have so many milliseconds.
fn impatient(milliseconds: u64) -> Guest {
    let patience = Duration::from_millis(milliseconds);
    Guest::with(64, |device| device.set_handshake_timeouts(patience, patience))
}

#[test]
fn a_guest_has_longer_than_a_client() {
    let (short, long) = (Duration::from_millis(30), Duration::from_secs(3600));
    let mut guest = Guest::with(64, |device| device.set_handshake_timeouts(short, long));
    let mut silent = guest.client();
    let mut client = guest.dial(5000);
    let (request, _) = guest.expect(op::REQUEST);
    guest.serve_until("the silent client's end", |_| {
        silent.set_nonblocking(true).unwrap();
        matches!(silent.read(&mut [0]), Ok(0))
    });
    let conn = Conn { guest_port: 5000, host_port: request.src_port, fwd_cnt: 0 };
    guest.send(conn, op::RESPONSE, &[]);
    let mut line = [0; 3];
    client.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK ");
}

#[test]
fn an_answer_that_is_there_before_the_deadline_counts() {
    let mut guest = impatient(30);
    let mut client = guest.dial(5000);
    let (request, _) = guest.expect(op::REQUEST);
    let conn = Conn { guest_port: 5000, host_port: request.src_port, fwd_cnt: 0 };
    // The guest has answered; this process sees its timer first.
    guest.enqueue(&guest.header(conn, op::RESPONSE), &[]);
    assert!(guest.serve(10_000), "the timer fires");
    let mut line = [0; 3];
    client.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK ");
    guest.expect_silence();
}

#[test]
fn handshakes_start_anew_after_a_pause() {
    let mut guest = impatient(500);
    let mut client = guest.dial(5000);
    guest.expect(op::REQUEST);
    // The pause: nothing is served, until long after the deadline for all that is known.
    assert!(guest.ready(10_000), "the timer fires");
    guest.handle.resumed();
    guest.serve(0);
    assert!(guest.try_recv().is_none(), "ended at once");
    guest.expect(op::RST);
    assert!(closed(&mut client));
}

#[test]
fn late_handshakes_are_ended() {
    let mut guest = impatient(30);
    let mut silent = guest.client();
    let mut unanswered = guest.dial(5000);
    guest.expect(op::REQUEST);
    guest.expect(op::RST);
    assert!(closed(&mut unanswered));
    // The other one is gone as well, or about to be.
    while guest.serve(100) {}
    assert!(closed(&mut silent));
    // An established one stays.
    let (mut client, _) = guest.connected(5000);
    while guest.serve(100) {}
    client.write_all(b"x").unwrap();
    guest.expect(op::RW);
}

#[test]
fn clients_beyond_the_limit_wait_their_turn() {
    let mut guest = Guest::new();
    let mut clients: Vec<_> = (0..MAX_PENDING + 10).map(|_| guest.client()).collect();
    while guest.serve(50) {}
    let mut last = clients.pop().unwrap();
    last.write_all(b"CONNECT 9\n").unwrap();
    while guest.serve(50) {}
    guest.expect_silence();
    clients.clear();
    assert_eq!(guest.expect(op::REQUEST).0.dst_port, 9);
}

#[test]
fn the_guest_reaches_open_host_ports_only() {
    let mut guest = Guest::new();
    let (mut stream, conn) = guest.dial_host(77, 1024);
    stream.write_all(b"hi").unwrap();
    assert_eq!(guest.expect(op::RW).1, b"hi");
    guest.send(conn, op::RW, b"ho");
    let mut answer = [0; 2];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ho");

    guest.send(Conn { guest_port: 77, host_port: 1025, fwd_cnt: 0 }, op::REQUEST, &[]);
    let (reset, _) = guest.expect(op::RST);
    assert_eq!((reset.src_port, reset.dst_port), (1025, 77));
    assert!(guest.incoming.try_recv().is_err());
}

#[test]
fn the_guest_may_open_only_so_many() {
    let mut guest = Guest::new();
    let mut open = Vec::new();
    for port in 0..MAX_FROM_GUEST as u32 {
        open.push(guest.dial_host(port, 1024));
    }
    guest.send(Conn { guest_port: 5000, host_port: 1024, fwd_cnt: 0 }, op::REQUEST, &[]);
    guest.expect(op::RST);
    guest.send(open.pop().unwrap().1, op::RST, &[]);
    let _another = guest.dial_host(5000, 1024);
    // The host is not limited by that.
    guest.connected(1);
}

#[test]
fn hundreds_of_connections_keep_apart() {
    let mut guest = Guest::new();
    let mut open: Vec<_> = (0..300).map(|_| guest.connected(5000)).collect();
    for (number, (client, _)) in open.iter_mut().enumerate() {
        client.write_all(&(number as u32).to_le_bytes()).unwrap();
    }
    let mut seen = vec![false; open.len()];
    for _ in 0..open.len() {
        let (header, data) = guest.expect(op::RW);
        let number = u32::from_le_bytes(data.try_into().unwrap()) as usize;
        assert_eq!(header.src_port, open[number].1.host_port);
        assert!(!std::mem::replace(&mut seen[number], true));
    }
    for (client, conn) in &mut open {
        let text = conn.host_port.to_string();
        guest.send(*conn, op::RW, text.as_bytes());
        let mut answer = vec![0; text.len()];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(answer, text.as_bytes());
    }
    const { assert!(MAX_CONNECTIONS > 300) };
}

#[test]
fn without_a_driver_clients_are_turned_away() {
    let mut guest = Guest::new();
    let (mut old, _) = guest.connected(5000);
    guest.driver.write(0x70, 0);
    assert!(closed(&mut old), "a reset ends connections");
    let mut client = guest.dial(5000);
    guest.serve(1000);
    while guest.serve(0) {}
    assert!(closed(&mut client));
}

#[test]
fn reserved_context_ids_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    for cid in [0, 1, 2, u32::MAX] {
        let listener = UnixListener::bind(directory.path().join(cid.to_string())).unwrap();
        let result = Vsock::new(cid, listener, Vec::new(), Box::new(|_, _| {}));
        assert!(matches!(result, Err(VsockError::Cid { .. })), "{cid}");
    }
}
