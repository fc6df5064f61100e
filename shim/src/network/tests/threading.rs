//! The thread: what it hears, and what becomes of its callers when it hangs.

use std::time::Duration;

use super::space::Space;
use crate::network::desk::Desk;
use crate::network::error::NetworkError;
use crate::network::thread::Thread;
use crate::network::{Network, NetworkLimits, Questions};

const DEADLINE: Duration = Duration::from_secs(20);

/// Of a guest that asks for no name.
fn unasked() -> Questions {
    tokio::sync::mpsc::channel(1).1
}

async fn space() -> (Space, Space) {
    let (space, outside) = (Space::new(), Space::new());
    space.veth("eth0", &outside, "out0", 1500).await;
    (space, outside)
}

#[tokio::test]
async fn changes_are_heard_and_followed() {
    let (space, outside) = space().await;
    let thread = Thread::start(space.file.try_clone().unwrap(), false, unasked()).await.unwrap();
    let first = thread.look().await.unwrap();
    assert_eq!(first.joined.len(), 1);
    space.address("eth0", "10.1.1.2", 24).await;
    space.veth("eth1", &outside, "out1", 1500).await;
    // One message may come before what it announces is complete.
    let followed = async {
        let mut joined = Vec::new();
        loop {
            thread.changed().await;
            let looked = thread.look().await.unwrap();
            joined.extend(looked.joined);
            let interfaces = looked.mirror.unwrap().interfaces;
            let addressed = interfaces[0].addresses.iter().any(|one| one.address.to_string() == "10.1.1.2");
            if addressed && interfaces.len() == 2 {
                return joined;
            }
        }
    };
    let joined = tokio::time::timeout(DEADLINE, followed).await.unwrap();
    assert_eq!(joined[0].name, "eth1");
    thread.close().await.unwrap();
}

#[tokio::test]
async fn looking_is_not_a_change() {
    let (space, _outside) = space().await;
    let thread = Thread::start(space.file.try_clone().unwrap(), false, unasked()).await.unwrap();
    let mut looked = vec![thread.look().await.unwrap()];
    // Whatever joining has stirred up settles.
    let settled = async {
        while tokio::time::timeout(Duration::from_secs(2), thread.changed()).await.is_ok() {
            looked.push(thread.look().await.unwrap());
        }
    };
    tokio::time::timeout(DEADLINE, settled).await.expect("it comes to rest");
    thread.close().await.unwrap();
}

#[tokio::test]
async fn counters_are_the_interfaces() {
    let (space, outside) = space().await;
    space.address("eth0", "10.1.1.2", 24).await;
    outside.address("out0", "10.1.1.1", 24).await;
    let thread = Thread::start(space.file.try_clone().unwrap(), false, unasked()).await.unwrap();
    let _joined = thread.look().await.unwrap();
    let before = thread.counters().await.unwrap();
    outside.inside(|| {
        let socket = std::net::UdpSocket::bind("10.1.1.1:0").unwrap();
        socket.set_broadcast(true).unwrap();
        socket.send_to(&[0; 1000], "255.255.255.255:9").unwrap_or_default();
        socket.send_to(&[0; 1000], "10.1.1.255:9").unwrap_or_default();
        socket.send_to(&[0; 1000], "10.1.1.2:9").unwrap();
    });
    let after = thread.counters().await.unwrap();
    assert_eq!((after.len(), after[0].name.as_str()), (1, "eth0"));
    assert!(after[0].rx_packets > before[0].rx_packets, "{after:?}");
    thread.close().await.unwrap();
}

#[tokio::test]
async fn a_kernel_that_does_not_answer_holds_nobody_up_for_ever() {
    let (space, _outside) = space().await;
    let before = space.counts().await;
    let short = Duration::from_millis(300);
    let file = space.file.try_clone().unwrap();
    let desk = |netlink| Desk::new(netlink, false);
    let thread = Thread::with(file, short, unasked(), desk).await.unwrap();
    let _joined = thread.look().await.unwrap();
    let (release, until) = std::sync::mpsc::channel();
    thread.hang(until);
    let message = thread.look().await.unwrap_err().to_string();
    assert!(message.contains("read it: not done within"), "{message}");
    let begin = std::time::Instant::now();
    assert!(matches!(thread.counters().await, Err(NetworkError::Deadline { .. })));
    assert!(begin.elapsed() < short, "it is not asked again");
    assert!(matches!(thread.close().await, Err(NetworkError::Deadline { .. })));
    // When it comes to itself it gives everything back.
    drop(release);
    drop(thread);
    let gone = async {
        while space.counts().await != before {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, gone).await.unwrap();
}

#[tokio::test]
async fn a_thread_that_was_late_leaves_when_it_is_told_to() {
    let (space, _outside) = space().await;
    let before = space.counts().await;
    // Long enough for what it does once it is released.
    let (file, short) = (space.file.try_clone().unwrap(), Duration::from_secs(2));
    let desk = |netlink| Desk::new(netlink, false);
    let thread = Thread::with(file, short, unasked(), desk).await.unwrap();
    let _joined = thread.look().await.unwrap();
    assert_ne!(space.counts().await, before);
    let (release, until) = std::sync::mpsc::channel();
    thread.hang(until);
    assert!(matches!(thread.look().await, Err(NetworkError::Deadline { .. })));
    drop(release);
    thread.close().await.unwrap();
    assert_eq!(space.counts().await, before);
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_nothing_joined() {
    let (space, _outside) = space().await;
    let before = space.counts().await;
    let thread = Thread::start(space.file.try_clone().unwrap(), false, unasked()).await.unwrap();
    let (release, until) = std::sync::mpsc::channel();
    thread.hang(until);
    let looking = thread.look();
    assert!(tokio::time::timeout(Duration::from_millis(50), looking).await.is_err());
    drop(release);
    // Behind the look that nobody waits for.
    thread.counters().await.unwrap();
    assert_eq!(space.counts().await, before);
    thread.close().await.unwrap();
}

#[tokio::test]
async fn a_namespace_that_has_vanished_is_named() {
    let log = slog::Logger::root(slog::Discard, slog::o!());
    // No process has this number.
    let opened = Network::open(u32::MAX, false, NetworkLimits::default(), unasked(), &log).await;
    let message = opened.err().unwrap().to_string();
    assert!(
        message.contains("network namespace of the sandbox: open the holder's: No such file"),
        "{message}"
    );
    let file = std::fs::File::open("/dev/null").unwrap();
    let message = Thread::start(file, false, unasked()).await.err().unwrap().to_string();
    assert!(message.contains("join it: Invalid argument"), "{message}");
}
