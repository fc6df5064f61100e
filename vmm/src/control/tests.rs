use std::os::fd::AsFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::*;
use crate::api::{Call, EndReason, MAX_FDS, MAX_MESSAGE};

fn pair_of(kind: SockType) -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

fn pair() -> (Channel, OwnedFd) {
    let (ours, theirs) = pair_of(SockType::SeqPacket);
    (Channel::new(Socket::new(ours).unwrap()), theirs)
}

fn send(peer: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    assert!(socket::send_with(peer.as_fd(), bytes, fds).unwrap());
}

use std::os::fd::BorrowedFd;

/// True once every writer of `reader`'s pipe is closed.
fn all_closed(reader: &OwnedFd) -> bool {
    nix::fcntl::fcntl(reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK)).unwrap();
    nix::unistd::read(reader, &mut [0]) == Ok(0)
}

#[test]
fn a_request_arrives_with_its_descriptors() {
    let (channel, peer) = pair();
    let request = Request { id: 7, call: Call::Shutdown { deadline_ms: 5 } };
    let file = tempfile::tempfile().unwrap();
    send(&peer, &serde_json::to_vec(&request).unwrap(), &[file.as_fd(), file.as_fd()]);
    let Incoming::Request(got, fds) = channel.receive().unwrap() else { panic!("no request") };
    assert_eq!(got, request);
    assert_eq!(fds.finish(), Err(FdError::Unused { count: 2, first: 0 }));
    assert!(matches!(channel.receive().unwrap(), Incoming::Nothing));
    drop(peer);
    assert!(matches!(channel.receive().unwrap(), Incoming::HungUp));
}

#[test]
fn bad_packets_are_answered_by_id_and_close_their_descriptors() {
    let cases: [(&[u8], u64); 5] = [
        (b"not json", 0),
        (b"{\"id\":9,\"call\":\"explode\"}", 9),
        (b"{\"id\":3,\"call\":\"boot\",\"more\":1}", 3),
        (b"{\"id\":-1,\"call\":\"boot\"}", 0),
        (b"\xff\xfe", 0),
    ];
    for (bytes, id) in cases {
        let (channel, peer) = pair();
        let (reader, writer) = nix::unistd::pipe().unwrap();
        send(&peer, bytes, &[writer.as_fd()]);
        drop(writer);
        let Incoming::Bad(error) = channel.receive().unwrap() else { panic!("accepted {bytes:?}") };
        assert_eq!(error.id(), id, "{error}");
        assert_eq!(error.failure().code, FailureCode::InvalidArgument);
        assert!(all_closed(&reader), "the descriptor of {bytes:?} leaked");
    }
}

#[test]
fn caps_hold_and_close_descriptors() {
    let (channel, peer) = pair();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    send(&peer, &vec![b' '; MAX_MESSAGE + 1], &[writer.as_fd()]);
    assert!(matches!(channel.receive().unwrap(), Incoming::Bad(RequestError::TooLong { .. })));
    send(&peer, b"{}", &vec![writer.as_fd(); MAX_FDS + 1]);
    assert!(matches!(channel.receive().unwrap(), Incoming::Bad(RequestError::TooManyFds { .. })));
    let request = serde_json::to_vec(&Request { id: 1, call: Call::State }).unwrap();
    send(&peer, &request, &vec![writer.as_fd(); MAX_FDS]);
    assert!(matches!(channel.receive().unwrap(), Incoming::Request(..)), "the cap itself is allowed");
    drop(writer);
    assert!(all_closed(&reader));
}

#[test]
fn messages_wait_for_a_slow_peer_in_order() {
    let (channel, peer) = pair();
    let count = 600;
    for id in 0..count {
        channel.respond(id, Ok(Reply::Done)).unwrap();
    }
    assert!(channel.has_waiting(), "the socket's own queue is shorter than that");
    let client = Socket::new(peer).unwrap();
    let mut next = 0;
    while next < count {
        match client.receive().unwrap() {
            Packet::Data { bytes, .. } => {
                let message: Message = serde_json::from_slice(&bytes).unwrap();
                assert_eq!(message, Message::Response { id: next, result: Ok(Reply::Done) });
                next += 1;
            }
            Packet::Nothing => channel.flush().unwrap(),
            other => panic!("{other:?}"),
        }
    }
    assert!(!channel.has_waiting());
}

#[test]
fn a_peer_that_never_reads_is_given_up() {
    let (channel, _peer) = pair();
    let mut sent = 0;
    let error = loop {
        match channel.event(Event::Ended(EndReason::Reset), None) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, SocketError::PeerStalled { .. }), "{error}");
    assert!(sent >= MAX_WAITING);
}

#[test]
fn only_seqpacket_sockets_will_do() {
    let (stream, _other) = pair_of(SockType::Stream);
    assert!(matches!(Socket::new(stream), Err(SocketError::WrongType { .. })));
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    assert!(matches!(Socket::new(file), Err(SocketError::NotASocket { .. })));
    assert!(matches!(Socket::inherit(12_345), Err(SocketError::NotOpen { .. })));
    assert!(matches!(Socket::inherit(-1), Err(SocketError::NotOpen { .. })));
    assert!(matches!(Socket::inherit(0), Err(SocketError::StandardStream { fd: 0 })));
}
