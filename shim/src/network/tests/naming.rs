//! A name server in the namespace, as Docker has it: asked by the guest, and asking others itself.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::Duration;

use spore_agent_api::network::{DOMAIN, MOST_QUESTIONS, NAME_SERVER, OVER_TCP, OVER_UDP};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket, UnixStream};
use tokio::time::timeout;

use super::packet::{DEADLINE, Nic};
use super::space::{Space, desk, look};
use crate::network::loopback_up;
use crate::network::names::Relay;
use crate::network::thread::Thread;

const SERVER: (std::net::Ipv4Addr, u16) = (NAME_SERVER, DOMAIN);
const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";

/// A namespace with loopback up.
fn looped() -> Space {
    let space = Space::new();
    space.inside(loopback_up).unwrap();
    space
}

fn bind_udp(space: &Space, address: impl Into<SocketAddr>) -> UdpSocket {
    let address = address.into();
    let socket = space.inside(|| std::net::UdpSocket::bind(address).unwrap());
    socket.set_nonblocking(true).unwrap();
    UdpSocket::from_std(socket).unwrap()
}

/// The guest's end of a connection, and the shim's.
fn connection() -> (UnixStream, OwnedFd) {
    let (guest, shim) = UnixStream::pair().unwrap();
    (guest, shim.into_std().unwrap().into())
}

async fn ask(guest: &mut UnixStream, question: &[u8]) {
    let length = u16::try_from(question.len()).unwrap().to_be_bytes();
    guest.write_all(&[&[OVER_UDP][..], &length, question].concat()).await.unwrap();
}

async fn answered(guest: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    timeout(DEADLINE, guest.read_to_end(&mut bytes)).await.unwrap().unwrap();
    bytes
}

/// Answers one question by reversing it.
async fn answer(server: &UdpSocket) {
    let mut question = vec![0; 70_000];
    let (length, from) = timeout(DEADLINE, server.recv_from(&mut question)).await.unwrap().unwrap();
    question[..length].reverse();
    server.send_to(&question[..length], from).await.unwrap();
}

#[tokio::test]
async fn questions_over_udp_are_asked_in_the_namespace() {
    let space = looped();
    let server = bind_udp(&space, SERVER);
    space.enter();
    for question in [&b"question"[..], &[], &[7; 20_000]] {
        let (mut guest, shim) = connection();
        Relay::default().serve(shim);
        ask(&mut guest, question).await;
        answer(&server).await;
        let mut wanted = u16::try_from(question.len()).unwrap().to_be_bytes().to_vec();
        wanted.extend(question.iter().rev());
        assert_eq!(answered(&mut guest).await, wanted);
    }
}

#[tokio::test]
async fn a_stream_over_tcp_is_passed_on() {
    let space = looped();
    let server = space.inside(|| std::net::TcpListener::bind(SERVER).unwrap());
    server.set_nonblocking(true).unwrap();
    let server = TcpListener::from_std(server).unwrap();
    space.enter();
    let (mut guest, shim) = connection();
    Relay::default().serve(shim);
    guest.write_all(&[OVER_TCP]).await.unwrap();
    guest.write_all(b"question").await.unwrap();
    let (mut connection, _) = timeout(DEADLINE, server.accept()).await.unwrap().unwrap();
    let mut question = [0; 8];
    connection.read_exact(&mut question).await.unwrap();
    connection.write_all(&[&question[..], b" answered"].concat()).await.unwrap();
    drop(connection);
    guest.shutdown().await.unwrap();
    assert_eq!(answered(&mut guest).await, b"question answered");
}

#[tokio::test]
async fn what_makes_no_sense_or_finds_nobody_is_hung_up() {
    let space = looped();
    space.enter();
    let relay = Relay::default();
    for bytes in [&[9][..], &[OVER_TCP], &[OVER_UDP, 0, 1, b'?']] {
        let (mut guest, shim) = connection();
        relay.serve(shim);
        guest.write_all(bytes).await.unwrap();
        assert_eq!(answered(&mut guest).await, b"", "{bytes:?}");
    }
}

#[tokio::test]
async fn a_guest_that_says_nothing_is_hung_up() {
    let relay = Relay::default().with_deadline(Duration::from_millis(20));
    for bytes in [&[][..], &[OVER_UDP], &[OVER_UDP, 0, 9, b'?']] {
        let (mut guest, shim) = connection();
        relay.serve(shim);
        guest.write_all(bytes).await.unwrap();
        assert_eq!(answered(&mut guest).await, b"", "{bytes:?}");
    }
}

#[tokio::test]
async fn only_so_many_questions_are_asked_at_a_time() {
    let space = looped();
    let server = bind_udp(&space, SERVER);
    space.enter();
    let relay = Relay::default();
    let mut open: Vec<_> = (0..MOST_QUESTIONS)
        .map(|_| {
            let (guest, shim) = connection();
            relay.serve(shim);
            guest
        })
        .collect();
    let (mut guest, shim) = connection();
    relay.serve(shim);
    assert_eq!(answered(&mut guest).await, b"", "one too many");
    open[0].write_all(&[9]).await.unwrap();
    assert_eq!(answered(&mut open[0]).await, b"");
    let (mut guest, shim) = connection();
    relay.serve(shim);
    ask(&mut guest, b"room").await;
    answer(&server).await;
    assert_eq!(answered(&mut guest).await, b"\0\x04moor");
}

#[tokio::test]
async fn the_namespaces_thread_serves_the_guest() {
    let space = looped();
    let server = bind_udp(&space, SERVER);
    let (asks, questions) = tokio::sync::mpsc::channel(1);
    let thread = Thread::start(space.file.try_clone().unwrap(), false, questions).await.unwrap();
    let (mut guest, shim) = connection();
    asks.send(shim).await.unwrap();
    ask(&mut guest, b"question").await;
    answer(&server).await;
    assert_eq!(answered(&mut guest).await, b"\0\x08noitseuq");
    let (mut unanswered, shim) = connection();
    asks.send(shim).await.unwrap();
    thread.close().await.unwrap();
    assert_eq!(answered(&mut unanswered).await, b"", "it ends with the sandbox");
}

#[tokio::test]
async fn a_name_server_is_told_to_the_guest_and_gets_answers_from_others() {
    let (space, outside) = (looped(), Space::new());
    space.veth("eth0", &outside, "out0", 1500).await;
    space.address("eth0", "10.1.1.2", 24).await;
    outside.address("out0", "10.1.1.1", 24).await;
    space.enter();
    let before = space.counts().await;
    let range = std::fs::read_to_string(RANGE).unwrap();
    let mut desk = desk();
    let looked = look(&mut desk).await;
    assert!(!looked.mirror.unwrap().name_server);
    let joined = space.counts().await;
    let mut guest = Nic::new(looked.joined.into_iter().next().unwrap().tap);

    let name_server = bind_udp(&space, (NAME_SERVER, 0));
    for _ in 0..2 {
        let looked = look(&mut desk).await;
        assert!(looked.mirror.unwrap().name_server && looked.joined.is_empty());
    }
    let upstream = bind_udp(&outside, ([10, 1, 1, 1], DOMAIN));
    let asking = bind_udp(&space, ([0, 0, 0, 0], 0));
    asking.send_to(b"question", "10.1.1.1:53").await.unwrap();
    answer(&upstream).await;
    let mut answer = [0; 100];
    let (length, from) = timeout(DEADLINE, asking.recv_from(&mut answer)).await.unwrap().unwrap();
    assert_eq!((&answer[..length], from.to_string()), (&b"noitseuq"[..], "10.1.1.1:53".into()));
    // The answers to the guest's own questions are the guest's.
    upstream.send_to(b"for the guest", "10.1.1.2:40000").await.unwrap();
    guest.receive(|found| found.ends_with(b"for the guest"));

    drop(name_server);
    assert!(!look(&mut desk).await.mirror.unwrap().name_server);
    assert_eq!(space.counts().await, joined);
    assert_eq!(std::fs::read_to_string(RANGE).unwrap(), range);
    let _name_server = bind_udp(&space, (NAME_SERVER, 0));
    look(&mut desk).await;
    desk.leave_all().await.unwrap();
    assert_eq!(space.counts().await, before);
    assert_eq!(std::fs::read_to_string(RANGE).unwrap(), range);
}

#[tokio::test]
async fn filters_for_a_name_server_are_known_as_our_own() {
    let (space, outside) = (looped(), Space::new());
    space.veth("eth0", &outside, "out0", 1500).await;
    space.enter();
    let before = space.counts().await;
    let _name_server = bind_udp(&space, (NAME_SERVER, 0));
    // A shim that is killed leaves them.
    drop(look(&mut desk()).await);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&space.file));
    crate::network::reclaim(path.as_ref()).unwrap();
    assert_eq!(space.counts().await, before);
}
