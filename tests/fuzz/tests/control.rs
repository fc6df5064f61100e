//! Control messages from a hostile peer: whatever bytes and descriptors arrive, the VMM's
//! decoder answers with a valid machine or a typed error, and every descriptor that came
//! with a refused packet is closed.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs::File;
use std::io::{PipeReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};
use spore_vmm::api::{
    Call, DiskConfig, Event, FailureCode, FdIndex, MAX_FDS, MAX_MESSAGE, MAX_VCPUS, Message, Request,
};
use spore_vmm::config::{MachineConfig, attached_disk};
use spore_vmm::control::socket::{Socket, send_with};
use spore_vmm::control::{Channel, FdTable, Incoming};

fn channel() -> (Channel, OwnedFd) {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    (Channel::new(Socket::new(ours).unwrap()), theirs)
}

/// Descriptors of one packet. The reader sees its end once all copies of the writers, which
/// every kind of descriptor is accompanied by, are closed.
struct Fds {
    fds: Vec<OwnedFd>,
    watch: PipeReader,
}

fn fds(kinds: &[u8]) -> Fds {
    let (watch, writer) = std::io::pipe().unwrap();
    let open = |path: &str| File::options().read(true).write(true).open(path).unwrap();
    let fds = kinds
        .iter()
        .map(|kind| match kind % 8 {
            0 => writer.try_clone().unwrap().into(),
            1 => tempfile::tempfile().unwrap().into(),
            2 => File::open("/").unwrap().into(),
            3 => open("/dev/null").into(),
            4 => {
                let folder = tempfile::tempdir().unwrap();
                UnixListener::bind(folder.path().join("s")).unwrap().into()
            }
            5 => std::os::unix::net::UnixDatagram::unbound().unwrap().into(),
            6 => std::io::pipe().unwrap().0.into(),
            _ => File::open("/dev/null").unwrap().into(),
        })
        .collect();
    Fds { fds, watch }
}

/// Whether all writers are closed: read sees the end instead of waiting.
fn all_closed(mut watch: PipeReader) -> bool {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(watch.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    matches!(watch.read(&mut [0]), Ok(0))
}

fn kinds() -> impl Strategy<Value = Vec<u8>> {
    proptest::collection::vec(any::<u8>(), 0..12)
}

/// A `VmConfig` that is right but for its descriptors.
fn config() -> Value {
    json!({
        "protocol": 1, "vcpus": 2, "memory_mib": 128, "kvm": 0, "kernel": 1, "initrd": 2,
        "cmdline": "console=ttyS0", "console": { "output": 3, "input": 4, "cap_bytes": 100 },
        "vsock": { "guest_cid": 3, "listener": 5, "host_ports": [1024] },
        "disks": [{ "file": 6, "read_only": true }, { "file": 7, "read_only": false }]
    })
}

/// Values that a decoder or a range check might stumble over.
fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u64..40).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,40}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
        Just(json!([{ "file": 0, "read_only": true }])),
        proptest::collection::vec(0u32..5, 0..80).prop_map(|ports| json!(ports)),
    ]
}

const PLACES: &[&str] = &[
    "/protocol",
    "/vcpus",
    "/memory_mib",
    "/kvm",
    "/kernel",
    "/initrd",
    "/cmdline",
    "/console",
    "/console/output",
    "/console/input",
    "/console/cap_bytes",
    "/vsock",
    "/vsock/guest_cid",
    "/vsock/listener",
    "/vsock/host_ports",
    "/disks",
    "/disks/0",
    "/disks/0/file",
    "/disks/1/read_only",
];

proptest! {
    #[test]
    fn arbitrary_bytes_with_arbitrary_descriptors(
        bytes in proptest::collection::vec(any::<u8>(), 1..2000), kinds in kinds(),
    ) {
        let (channel, peer) = channel();
        let Fds { fds, watch } = fds(&kinds);
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        prop_assert!(send_with(peer.as_fd(), &bytes, &borrowed).unwrap());
        drop(borrowed);
        drop(fds);
        match channel.receive().unwrap() {
            Incoming::Bad(error) => {
                prop_assert_eq!(error.failure().code, FailureCode::InvalidArgument);
                prop_assert!(!error.failure().message.is_empty());
            }
            Incoming::Request(..) => {}
            other => return Err(TestCaseError::fail(format!("{other:?}"))),
        }
        prop_assert!(all_closed(watch), "a descriptor stayed open");
    }

    #[test]
    fn lengths_and_counts_around_the_limits(over in 0usize..3, count in MAX_FDS - 1..MAX_FDS + 3) {
        let (channel, peer) = channel();
        let mut bytes = br#"{"id":5,"call":"state"}"#.to_vec();
        bytes.resize(MAX_MESSAGE - 1 + over, b' ');
        let Fds { fds, watch } = fds(&vec![0; count]);
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        prop_assert!(send_with(peer.as_fd(), &bytes, &borrowed).unwrap());
        drop(borrowed);
        drop(fds);
        let good = bytes.len() <= MAX_MESSAGE && count <= MAX_FDS;
        match channel.receive().unwrap() {
            Incoming::Request(request, table) => {
                prop_assert!(good);
                prop_assert_eq!(request, Request { id: 5, call: Call::State });
                prop_assert!(table.finish().is_err(), "surplus descriptors are named");
            }
            Incoming::Bad(_) => prop_assert!(!good),
            other => return Err(TestCaseError::fail(format!("{other:?}"))),
        }
        prop_assert!(all_closed(watch), "a descriptor stayed open");
        // The channel goes on.
        send_with(peer.as_fd(), br#"{"id":6,"call":"boot"}"#, &[]).unwrap();
        let next = channel.receive().unwrap();
        let expected = Request { id: 6, call: Call::Boot };
        prop_assert!(matches!(&next, Incoming::Request(request, _) if *request == expected), "{:?}", next);
    }

    #[test]
    fn a_damaged_configuration_gives_a_valid_machine_or_a_typed_error(
        edits in proptest::collection::vec((any::<Index>(), value()), 0..4), kinds in kinds(),
    ) {
        let mut config = config();
        for (place, value) in edits {
            if let Some(at) = config.pointer_mut(PLACES[place.index(PLACES.len())]) {
                *at = value;
            }
        }
        let request = json!({ "id": 9, "call": { "configure": config } });
        let Fds { fds, watch } = fds(&kinds);
        let Ok(request) = serde_json::from_value::<Request>(request) else { return Ok(()) };
        let Call::Configure(config) = request.call else { unreachable!() };
        match MachineConfig::new(config, FdTable::new(fds)) {
            Ok(machine) => {
                prop_assert!((1..=MAX_VCPUS).contains(&machine.vcpus));
                prop_assert!(machine.memory_bytes >= 64 << 20);
                prop_assert!(machine.cmdline.is_ascii() && machine.cmdline.len() <= 2047);
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
        prop_assert!(all_closed(watch), "a descriptor stayed open");
    }

    #[test]
    fn a_disk_of_any_kind_of_descriptor(kinds in kinds(), index in 0u32..14, read_only: bool) {
        let Fds { fds, watch } = fds(&kinds);
        let result = attached_disk(&DiskConfig { file: FdIndex(index), read_only, below: Vec::new() }, FdTable::new(fds));
        if result.is_ok() {
            prop_assert_eq!(kinds.len(), 1, "every descriptor is named");
            prop_assert_eq!(kinds[0] % 8, 1, "only the regular file is a disk");
        }
        drop(result);
        prop_assert!(all_closed(watch), "a descriptor stayed open");
    }

    /// Valid JSON cut, doubled or with bytes changed never passes for something else.
    #[test]
    fn damaged_json_is_refused_or_means_what_it_says(at: Index, byte: u8, cut: bool) {
        let mut bytes = json!({ "id": 9, "call": { "configure": config() } }).to_string().into_bytes();
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at.max(1)) } else { bytes[at] = byte }
        let (channel, peer) = channel();
        prop_assert!(send_with(peer.as_fd(), &bytes, &[]).unwrap());
        match channel.receive().unwrap() {
            Incoming::Request(request, _) => {
                prop_assert_eq!(&serde_json::from_slice::<Request>(&bytes).unwrap(), &request);
            }
            Incoming::Bad(error) => prop_assert!(error.id() == 9 || error.id() < 10 || cut || byte.is_ascii_digit()),
            other => return Err(TestCaseError::fail(format!("{other:?}"))),
        }
    }

    /// What one side writes the other reads, for every event and descriptor.
    #[test]
    fn events_arrive_with_their_descriptor(port: u32, attach: bool) {
        let (channel, peer) = channel();
        let fd = attach.then(|| OwnedFd::from(tempfile::tempfile().unwrap()));
        channel.event(Event::GuestConnection { port }, fd).unwrap();
        let peer = Channel::new(Socket::new(peer).unwrap());
        // A peer that is no VMM reads bytes; here the VMM's own reader shows that they are
        // one packet and no request.
        prop_assert!(matches!(peer.receive().unwrap(), Incoming::Bad(_)));
        prop_assert!(matches!(peer.receive().unwrap(), Incoming::Nothing));
        let event = Message::Event(Event::GuestConnection { port });
        let text = serde_json::to_string(&event).unwrap();
        prop_assert_eq!(serde_json::from_str::<Message>(&text).unwrap(), event);
    }
}
