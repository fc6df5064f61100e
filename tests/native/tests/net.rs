//! Networks: taps in namespaces of the tests' own, and a guest that answers.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::time::Duration;

use spore_native::tap::{Interface, enter_namespace, frame, open, pair};
use spore_native::{DEADLINE, Setup, Vm};
use spore_vmm::api::{Call, FailureCode, FdIndex, NetMetrics, NetworkConfig, RateLimit, Reply, VmState};

/// For what shall not come.
const MOMENT: Duration = Duration::from_millis(50);

/// A guest that obeys commands, with a tap in slot 0.
fn networked() -> (Vm, Interface) {
    let mut vm = Setup::new("shell").boot();
    let host = attach(&mut vm, 0, "tap0");
    (vm, host)
}

fn attach(vm: &mut Vm, slot: u8, name: &str) -> Interface {
    enter_namespace();
    let (tap, host) = pair(name);
    assert_eq!(vm.attach_network(slot, &tap), Ok(Reply::Done));
    host
}

fn done(vm: &mut Vm, command: &str) -> String {
    let text = vm.run(command);
    let name = command.split(',').next().unwrap();
    assert!(text.contains(&format!("ok {name}")), "{command}: {text}");
    text
}

fn network(vm: &mut Vm, slot: usize) -> NetMetrics {
    vm.metrics().networks[slot].clone()
}

#[test]
fn frames_go_to_the_guest_and_back() {
    let (mut vm, host) = networked();
    done(&mut vm, "net-link,0,1");
    vm.begin("net-echo,0,100");
    for number in 0..100 {
        let len = 60 + 14 * number as usize;
        host.send(&frame(number, len));
        assert!(host.receive(DEADLINE).unwrap().1 == frame(number, len), "{number}");
    }
    vm.finish();
    let metrics = network(&mut vm, 0);
    assert_eq!((metrics.to_guest.frames, metrics.from_guest.frames), (100, 100));
    assert_eq!(metrics.to_guest.bytes, metrics.from_guest.bytes);
}

#[test]
fn a_flood_each_way_arrives_whole_and_in_order() {
    let (mut vm, host) = networked();
    host.set_queue(20_000).unwrap();
    vm.begin("net-receive,0,20000");
    for number in 0..20_000 {
        host.send(&frame(number, 200));
    }
    let text = vm.finish();
    assert!(text.contains("net frames=20000 bytes=4000000 in-order=true"), "{text}");
    vm.begin("net-send,0,20000,200");
    for number in 0..20_000u32 {
        let (_, got) = host.receive(DEADLINE).expect("as many as were sent");
        assert_eq!(got[14..18], number.to_be_bytes());
    }
    vm.finish();
}

#[test]
fn a_tap_may_be_attached_before_boot_and_exchanged_while_the_guest_runs() {
    let mut vm = Setup::new("shell").configure();
    let mut host = attach(&mut vm, 0, "tap0");
    vm.boot();
    for round in 0..3 {
        done(&mut vm, "net-link,0,1");
        vm.begin("net-echo,0,1");
        host.send(&frame(round, 100));
        assert_eq!(host.receive(DEADLINE).unwrap().1, frame(round, 100));
        vm.finish();
        assert_eq!(vm.call(Call::DetachNetwork { slot: 0 }), Ok(Reply::Done));
        assert!(host.set_up(true).is_err(), "the interface goes with the answer");
        done(&mut vm, "net-link,0,0");
        let (tap, next) = pair(&format!("next{round}"));
        vm.attach_network(0, &tap).unwrap();
        host = next;
    }
    assert!(network(&mut vm, 0).link_up);
}

#[test]
fn every_slot_is_a_network_of_its_own() {
    let mut vm = Setup::new("shell").boot();
    enter_namespace();
    let hosts: Vec<(u8, Interface)> = (0..4)
        .map(|slot| {
            let (tap, host) = pair(&format!("tap{slot}"));
            vm.attach_network(slot, &tap).unwrap();
            (slot, host)
        })
        .collect();
    for (slot, host) in hosts.iter().rev() {
        vm.begin(&format!("net-echo,{slot},1"));
        let own = frame((*slot).into(), 100);
        host.send(&own);
        assert_eq!(host.receive(DEADLINE).unwrap().1, own);
        vm.finish();
    }
    assert!(vm.metrics().networks.iter().all(|network| network.to_guest.frames == 1));
}

#[test]
fn while_paused_no_frame_moves_and_none_is_lost() {
    let (mut vm, host) = networked();
    vm.begin("net-echo,0,300");
    host.send(&frame(0, 100));
    assert_eq!(host.receive(DEADLINE).unwrap().1, frame(0, 100));
    assert_eq!(vm.call(Call::Pause), Ok(Reply::Done));
    let before = network(&mut vm, 0);
    for number in 1..300 {
        host.send(&frame(number, 100));
    }
    assert!(host.receive(MOMENT).is_none());
    assert_eq!(network(&mut vm, 0), before);
    assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
    for number in 1..300 {
        assert_eq!(host.receive(DEADLINE).unwrap().1, frame(number, 100));
    }
    vm.finish();
}

#[test]
fn a_paused_vm_takes_and_gives_taps() {
    let (mut vm, host) = networked();
    done(&mut vm, "net-link,0,1");
    assert_eq!(vm.call(Call::Pause), Ok(Reply::Done));
    assert_eq!(vm.call(Call::DetachNetwork { slot: 0 }), Ok(Reply::Done));
    assert!(host.set_up(true).is_err(), "closed at once");
    let (tap, host) = pair("tap1");
    vm.attach_network(0, &tap).unwrap();
    drop(tap);
    host.send(&frame(1, 100));
    assert_eq!(vm.call(Call::Resume), Ok(Reply::Done));
    vm.begin("net-echo,0,1");
    assert_eq!(host.receive(DEADLINE).unwrap().1, frame(1, 100));
    vm.finish();
}

#[test]
fn what_cannot_be_attached_is_refused_and_nothing_changes() {
    let mut vm = Vm::spawn();
    enter_namespace();
    let (tap, host) = pair("tap0");
    assert_eq!(vm.attach_network(0, &tap).unwrap_err().code, FailureCode::WrongState);
    vm.configure(Setup::new("shell")).unwrap();
    let refused = |vm: &mut Vm, slot, tap| {
        let failure = vm.attach_network(slot, tap).unwrap_err();
        assert_eq!(failure.code, FailureCode::InvalidArgument, "{failure}");
        failure.message
    };
    let message = refused(&mut vm, 4, &tap);
    assert!(message.contains("slot 4") && message.contains("4 slots"), "{message}");
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").unwrap().into();
    let message = refused(&mut vm, 0, &null);
    assert!(message.contains("TUNGETIFF"), "{message}");
    let tun = open("tun0", libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR, 12).unwrap();
    let message = refused(&mut vm, 0, &tun);
    assert!(message.contains("IFF_TAP"), "{message}");
    let file = tempfile::tempfile().unwrap().into();
    let message = refused(&mut vm, 0, &file);
    assert!(message.contains("a regular file"), "{message}");
    vm.attach_network(0, &tap).unwrap();
    let message = refused(&mut vm, 0, &tap);
    assert!(message.contains("slot 0") && message.contains("detach it first"), "{message}");
    for slot in [1, 4] {
        let failure = vm.call(Call::DetachNetwork { slot }).unwrap_err();
        assert_eq!(failure.code, FailureCode::InvalidArgument, "{failure}");
    }
    assert_eq!(vm.state(), VmState::Configured);
    vm.boot();
    vm.begin("net-echo,0,1");
    host.send(&frame(1, 100));
    assert_eq!(host.receive(DEADLINE).unwrap().1, frame(1, 100));
    vm.finish();
}

#[test]
fn a_limit_holds_what_is_sent_and_received() {
    let mut vm = Setup::new("shell").boot();
    enter_namespace();
    let (tap, host) = pair("tap0");
    let limit = RateLimit { bytes_per_s: 0, packets_per_s: 1000 };
    let config = NetworkConfig { slot: 0, tap: FdIndex(0), to_guest: limit, from_guest: limit };
    vm.call_with(Call::AttachNetwork(config), &[std::os::fd::AsFd::as_fd(&tap)]).unwrap();
    vm.begin("net-echo,0,300");
    let start = std::time::Instant::now();
    for number in 0..300 {
        host.send(&frame(number, 100));
    }
    for number in 0..300 {
        assert_eq!(host.receive(DEADLINE).unwrap().1, frame(number, 100));
    }
    vm.finish();
    // A burst of 100, the others 1 ms apart.
    assert!(start.elapsed() >= Duration::from_millis(195), "{:?}", start.elapsed());
    assert!(network(&mut vm, 0).to_guest.throttled > 0);
}

/// A guest that never takes its frames costs the others nothing.
#[test]
fn a_network_that_nobody_serves_starves_no_other() {
    let mut vm = Setup::new("shell").boot();
    enter_namespace();
    let (tap, deaf) = pair("tap0");
    vm.attach_network(0, &tap).unwrap();
    let (tap, host) = pair("tap1");
    vm.attach_network(1, &tap).unwrap();
    // Opened, its queue is filled, and then left alone.
    done(&mut vm, "net-link,0,1");
    for number in 0..900 {
        deaf.send(&frame(number, 100));
    }
    vm.begin("net-echo,1,200");
    for number in 0..200 {
        host.send(&frame(number, 100));
        assert_eq!(host.receive(DEADLINE).unwrap().1, frame(number, 100));
    }
    vm.finish();
    let metrics = network(&mut vm, 0);
    assert_eq!((metrics.to_guest.frames, metrics.to_guest.stalled), (256, 1));
    let text = done(&mut vm, "net-receive,0,900");
    assert!(text.contains("net frames=900 bytes=90000 in-order=true"), "{text}");
}
