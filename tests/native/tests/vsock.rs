//! Connections between host and guest.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use spore_guests::{SOURCE_BYTES, SOURCE_SEED, checksum, pattern_bytes, port};
use spore_native::vsock::{connect, exchange, read_line};
use spore_native::{DEADLINE, Setup, Vm};
use spore_vmm::api::{Call, EndReason, Event, Reply};

/// A guest that serves; it has memory for the window of every connection.
fn serving() -> Vm {
    let vm = Setup::new("serve").memory_mib(128).vsock(&[]).boot();
    assert_eq!(vm.line("vsock "), "vsock cid=3");
    vm.line("serving");
    vm
}

#[test]
fn an_echo_of_1_mib_is_byte_exact() {
    let mut vm = serving();
    let data = pattern_bytes(1, 0, 1 << 20);
    let stream = connect(&vm.vsock_path(), port::ECHO).unwrap();
    assert!(exchange(&stream, &data).unwrap() == data, "1 MiB came back different");
    let metrics = vm.metrics().vsock;
    assert_eq!((metrics.connections, metrics.rx_bytes, metrics.tx_bytes), (1, 1 << 20, 1 << 20));
}

#[test]
fn small_messages_pass_as_they_are_sent() {
    let vm = serving();
    let mut stream = connect(&vm.vsock_path(), port::ECHO).unwrap();
    for length in [1, 2, 43, 44, 45, 4095, 4096, 4097, 1, 65536] {
        let data = pattern_bytes(length, 0, usize::try_from(length).unwrap());
        stream.write_all(&data).unwrap();
        let mut back = vec![0; data.len()];
        stream.read_exact(&mut back).unwrap();
        assert!(back == data, "{length} bytes came back different");
    }
}

#[test]
fn the_guest_reads_to_the_end_and_then_answers() {
    let vm = serving();
    let data = pattern_bytes(2, 0, 3_000_001);
    let mut stream = connect(&vm.vsock_path(), port::SINK).unwrap();
    stream.write_all(&data).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    // Our half is closed; the guest's still speaks.
    assert_eq!(read_line(&stream).unwrap(), format!("3000001 {:016x}\n", checksum(&data)));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_stream_from_the_guest_arrives_whole_with_its_end() {
    let vm = serving();
    let mut stream = connect(&vm.vsock_path(), port::SOURCE).unwrap();
    let mut data = Vec::new();
    stream.read_to_end(&mut data).unwrap();
    assert!(data == pattern_bytes(SOURCE_SEED, 0, SOURCE_BYTES), "{} bytes, or different", data.len());
}

#[test]
fn a_reader_that_waits_loses_nothing() {
    let vm = serving();
    let mut slow = connect(&vm.vsock_path(), port::SOURCE).unwrap();
    // Others pass while the first is not read at all.
    for seed in 0..5 {
        let stream = connect(&vm.vsock_path(), port::ECHO).unwrap();
        let data = pattern_bytes(seed, 0, 100_000);
        assert!(exchange(&stream, &data).unwrap() == data);
    }
    let mut data = Vec::new();
    slow.read_to_end(&mut data).unwrap();
    assert!(data == pattern_bytes(SOURCE_SEED, 0, SOURCE_BYTES));
}

/// The guest accepts and never reads: its window bounds what the VMM takes from the host,
/// and others are not held up.
#[test]
fn a_guest_that_does_not_read_holds_up_only_its_own_stream() {
    let mut vm = serving();
    let stalled = connect(&vm.vsock_path(), port::STALL).unwrap();
    stalled.set_nonblocking(true).unwrap();
    let (mut taken, chunk) = (0_usize, vec![7; 64 << 10]);
    let end = std::time::Instant::now() + DEADLINE;
    let before = spore_native::process::resident_beyond_guest(vm.pid(), 128).unwrap();
    // Full when the socket stays full across many turns of the VMM's loop.
    let mut full = 0;
    while full < 100 {
        assert!(taken < 16 << 20, "the VMM took {taken} bytes that nobody reads");
        assert!(std::time::Instant::now() < end);
        match (&stalled).write(&chunk) {
            Ok(length) => {
                taken += length;
                full = 0;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                full += 1;
                vm.state();
            }
            Err(error) => panic!("{error}"),
        }
    }
    let stream = connect(&vm.vsock_path(), port::ECHO).unwrap();
    let data = pattern_bytes(3, 0, 300_000);
    assert!(exchange(&stream, &data).unwrap() == data);
    let after = spore_native::process::resident_beyond_guest(vm.pid(), 128).unwrap();
    println!("a stalled stream holds {taken} bytes; the VMM went from {before} to {after} KiB");
}

#[test]
fn many_connections_at_once_do_not_mix() {
    let mut vm = serving();
    let path = vm.vsock_path();
    let streams: Vec<UnixStream> = (0..200).map(|_| connect(&path, port::ECHO).unwrap()).collect();
    std::thread::scope(|scope| {
        for (index, stream) in streams.iter().enumerate() {
            scope.spawn(move || {
                let data = pattern_bytes(index as u64, 0, 20_000 + index);
                assert!(exchange(stream, &data).unwrap() == data, "stream {index}");
            });
        }
    });
    assert_eq!(vm.metrics().vsock.connections, 200);
}

#[test]
fn connections_one_after_another_leave_nothing_behind() {
    let mut vm = serving();
    let path = vm.vsock_path();
    let once = |seed: u64| {
        let stream = connect(&path, port::ECHO).unwrap();
        let data = pattern_bytes(seed, 0, 1000);
        assert!(exchange(&stream, &data).unwrap() == data);
    };
    once(0);
    let before = settled(&mut vm, usize::MAX);
    // More than the guest has room for at once.
    for seed in 0..600 {
        once(seed);
    }
    settled(&mut vm, before);
}

/// Descriptors of the VMM once they are at most `wanted`: closing follows the events.
fn settled(vm: &mut Vm, wanted: usize) -> usize {
    let end = std::time::Instant::now() + DEADLINE;
    loop {
        vm.state();
        let open = spore_native::process::descriptors(vm.pid()).unwrap();
        if open.len() <= wanted {
            return open.len();
        }
        assert!(std::time::Instant::now() < end, "more than {wanted} descriptors: {open:?}");
    }
}

#[test]
fn a_port_where_nobody_listens_is_refused() {
    let mut vm = serving();
    for _ in 0..3 {
        let error = connect(&vm.vsock_path(), port::CLOSED).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
    }
    // A guest that accepts and resets at once.
    let mut stream = connect(&vm.vsock_path(), port::RESET).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
    assert_eq!(vm.state(), spore_vmm::api::VmState::Running);
}

/// Before the guest's driver is up there is nobody to ask: the connection waits or is
/// refused, but the VMM stays well.
#[test]
fn a_connection_before_the_driver_does_no_harm() {
    let mut vm = Setup::new("serve").memory_mib(128).vsock(&[]).configure();
    let early = UnixStream::connect(vm.vsock_path()).unwrap();
    (&early).write_all(format!("CONNECT {}\n", port::ECHO).as_bytes()).unwrap();
    vm.boot();
    vm.line("serving");
    let stream = connect(&vm.vsock_path(), port::ECHO).unwrap();
    assert_eq!(exchange(&stream, b"after").unwrap(), b"after");
    drop(early);
}

#[test]
fn lines_that_are_no_connect_are_closed() {
    let vm = serving();
    let long = vec![b'x'; 10_000];
    for line in [
        &b"GET / HTTP/1.1\n"[..],
        b"CONNECT\n",
        b"CONNECT 7 8\n",
        b"CONNECT -1\n",
        b"CONNECT 99999999999\n",
        &long,
    ] {
        let stream = UnixStream::connect(vm.vsock_path()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        // The VMM may close before all is written.
        let _ = (&stream).write_all(line);
        let mut answer = Vec::new();
        let _ = (&stream).read_to_end(&mut answer);
        assert_eq!(answer, b"", "{:?}", String::from_utf8_lossy(&line[..line.len().min(30)]));
    }
    // One who connects and says nothing, and one who leaves in the middle of the line.
    let silent = UnixStream::connect(vm.vsock_path()).unwrap();
    let rude = UnixStream::connect(vm.vsock_path()).unwrap();
    (&rude).write_all(b"CONN").unwrap();
    drop(rude);
    let stream = connect(&vm.vsock_path(), port::ECHO).unwrap();
    assert_eq!(exchange(&stream, b"still here").unwrap(), b"still here");
    drop(silent);
}

/// What is written right behind the CONNECT line, in the same write, is the stream's.
#[test]
fn data_behind_the_connect_line_is_not_lost() {
    let vm = serving();
    let mut stream = UnixStream::connect(vm.vsock_path()).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(format!("CONNECT {}\nhello", port::ECHO).as_bytes()).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (line, rest) = answer.split_once('\n').unwrap();
    assert!(line.starts_with("OK "), "{line}");
    assert_eq!(rest, "hello");
}

#[test]
fn the_guest_connects_to_a_host_port_and_the_peer_gets_the_socket() {
    let mut vm = Setup::new("serve,1024,1025,1024").memory_mib(128).vsock(&[1024]).boot();
    let mut streams = Vec::new();
    for _ in 0..2 {
        match vm.event() {
            (Event::GuestConnection { port: 1024 }, mut fds) => {
                assert_eq!(fds.len(), 1, "one descriptor comes with the event");
                streams.push(UnixStream::from(fds.remove(0)));
            }
            other => panic!("{other:?}"),
        }
    }
    // Port 1025 is not among the host ports.
    vm.line("refused port=1025");
    vm.nth_line("connected port=1024", 1);
    for (seed, stream) in streams.iter().enumerate() {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let data = pattern_bytes(seed as u64, 0, 500_000);
        assert!(exchange(stream, &data).unwrap() == data, "stream {seed}");
    }
}

/// A host client that goes away in the middle of a stream.
#[test]
fn a_host_that_hangs_up_frees_the_connection() {
    let mut vm = serving();
    let before = settled(&mut vm, usize::MAX);
    for service in [port::ECHO, port::SOURCE, port::STALL, port::SINK] {
        let mut stream = connect(&vm.vsock_path(), service).unwrap();
        stream.write_all(&[1; 30_000]).unwrap();
        drop(stream);
    }
    settled(&mut vm, before);
    let stream = connect(&vm.vsock_path(), port::ECHO).unwrap();
    assert_eq!(exchange(&stream, b"still here").unwrap(), b"still here");
}

#[test]
fn connections_survive_a_pause() {
    let mut vm = serving();
    let mut stream = connect(&vm.vsock_path(), port::ECHO).unwrap();
    stream.write_all(b"before").unwrap();
    let mut back = [0; 6];
    stream.read_exact(&mut back).unwrap();
    vm.call(Call::Pause).unwrap();
    stream.write_all(b"during").unwrap();
    assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
    stream.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"during");
}

#[test]
fn streams_end_with_the_guest() {
    let mut vm = serving();
    let mut stream = connect(&vm.vsock_path(), port::ECHO).unwrap();
    let _ = connect(&vm.vsock_path(), port::POWER_OFF);
    assert_eq!(vm.ended(), EndReason::Shutdown);
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
}
