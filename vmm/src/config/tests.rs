use std::os::unix::net::UnixStream;

use super::*;

fn config() -> VmConfig {
    VmConfig {
        protocol: PROTOCOL_VERSION,
        vcpus: 1,
        memory_mib: 128,
        huge_pages: false,
        kvm: FdIndex(0),
        kernel: FdIndex(1),
        initrd: None,
        cmdline: "console=ttyS0".into(),
        console: None,
        vsock: None,
        disk_slots: DiskSlots::default(),
        filesystem: None,
        network_slots: 1,
        disks: Vec::new(),
    }
}

fn file() -> OwnedFd {
    tempfile::tempfile().unwrap().into()
}

fn open(path: &str, write: bool) -> OwnedFd {
    File::options().read(!write).write(write).open(path).unwrap().into()
}

/// A character device stands in for /dev/kvm: that it is the real one is KVM's to say.
fn kvm() -> OwnedFd {
    File::options().read(true).write(true).open("/dev/null").unwrap().into()
}

fn check(config: VmConfig, more: Vec<OwnedFd>) -> Result<MachineConfig, ConfigError> {
    let mut fds = vec![kvm(), file()];
    fds.extend(more);
    MachineConfig::new(config, FdTable::new(fds))
}

fn refuse(change: impl FnOnce(&mut VmConfig), more: Vec<OwnedFd>) -> ConfigError {
    let mut config = config();
    change(&mut config);
    check(config, more).unwrap_err()
}

#[test]
fn a_good_configuration_passes() {
    let mut config = config();
    config.initrd = Some(FdIndex(2));
    config.console = Some(ConsoleConfig { output: FdIndex(3), input: Some(FdIndex(4)), cap_bytes: 9 });
    config.disks = vec![DiskConfig { file: FdIndex(5), read_only: true, below: Vec::new() }];
    config.vsock = Some(VsockConfig { guest_cid: 3, listener: FdIndex(6), host_ports: vec![1, 2] });
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
    let more = vec![file(), open("/dev/null", true), open("/dev/null", false), file(), listener.into()];
    let machine = check(config, more).unwrap();
    assert_eq!(machine.memory_bytes, 128 << 20);
    assert_eq!(machine.disks.len(), 1);
    assert_eq!(machine.console.unwrap().cap_bytes, 9);
    assert_eq!(machine.vsock.unwrap().host_ports, [1, 2]);
}

#[test]
fn numbers_out_of_range_are_refused() {
    assert!(matches!(refuse(|c| c.protocol = 2, vec![]), ConfigError::Protocol { found: 2 }));
    assert!(matches!(refuse(|c| c.vcpus = 0, vec![]), ConfigError::Range { what: "vcpus", .. }));
    assert!(matches!(refuse(|c| c.vcpus = 33, vec![]), ConfigError::Range { what: "vcpus", .. }));
    for memory in [0, MIN_MEMORY_MIB - 1, MAX_MEMORY_MIB + 1, u64::MAX] {
        let error = refuse(|c| c.memory_mib = memory, vec![]);
        assert!(matches!(error, ConfigError::Range { what: "memory_mib", .. }), "{error}");
    }
    let error = refuse(|c| c.cmdline = "x".repeat(2048), vec![]);
    assert!(matches!(error, ConfigError::Range { what: "cmdline length", .. }));
    assert!(check(VmConfig { cmdline: "x".repeat(2047), ..config() }, vec![]).is_ok());
    for text in ["a\0b", "a\nb", "ä"] {
        assert!(matches!(refuse(|c| c.cmdline = text.into(), vec![]), ConfigError::Byte { .. }));
    }
}

#[test]
fn descriptors_of_the_wrong_kind_or_mode_are_refused() {
    let (pipe, _writer) = nix::unistd::pipe().unwrap();
    let fds = FdTable::new(vec![kvm(), pipe]);
    assert!(matches!(MachineConfig::new(config(), fds), Err(ConfigError::Kind { .. })), "a piped kernel");
    let fds = FdTable::new(vec![file(), file()]);
    assert!(matches!(MachineConfig::new(config(), fds), Err(ConfigError::Kind { .. })), "a file as /dev/kvm");
    let disk = |read_only| {
        move |c: &mut VmConfig| c.disks = vec![DiskConfig { file: FdIndex(2), read_only, below: Vec::new() }]
    };
    let path = tempfile::NamedTempFile::new().unwrap();
    let read_only_file = || open(path.path().to_str().unwrap(), false);
    assert!(matches!(refuse(disk(false), vec![read_only_file()]), ConfigError::Mode { .. }));
    assert!(matches!(refuse(disk(true), vec![open("/", false)]), ConfigError::Kind { .. }));
    assert!(matches!(refuse(disk(true), vec![open("/dev/null", false)]), ConfigError::Kind { .. }));
    let console = ConsoleConfig { output: FdIndex(2), input: None, cap_bytes: 0 };
    let error = refuse(|c| c.console = Some(console), vec![open("/dev/null", false)]);
    assert!(matches!(error, ConfigError::Mode { needed: "writing", .. }), "{error}");
    let vsock = || VsockConfig { guest_cid: 3, listener: FdIndex(2), host_ports: vec![] };
    let (connected, _other) = UnixStream::pair().unwrap();
    assert!(matches!(refuse(|c| c.vsock = Some(vsock()), vec![connected.into()]), ConfigError::Kind { .. }));
    assert!(matches!(refuse(|c| c.vsock = Some(vsock()), vec![file()]), ConfigError::Kind { .. }));
}

#[test]
fn descriptors_are_named_exactly_once() {
    assert!(matches!(refuse(|c| c.kernel = FdIndex(0), vec![]), ConfigError::Fd(FdError::Twice { .. })));
    assert!(matches!(refuse(|c| c.kernel = FdIndex(2), vec![]), ConfigError::Fd(FdError::Missing { .. })));
    assert!(matches!(refuse(|_| {}, vec![file()]), ConfigError::Fd(FdError::Unused { count: 1, first: 2 })));
}

#[test]
fn vsock_ids_and_ports_are_checked() {
    let vsock = |guest_cid, host_ports: &[u32]| {
        let vsock = VsockConfig { guest_cid, listener: FdIndex(2), host_ports: host_ports.to_vec() };
        refuse(|c| c.vsock = Some(vsock), vec![file()])
    };
    for cid in [0, 1, 2, u32::MAX] {
        assert!(matches!(vsock(cid, &[]), ConfigError::Range { what: "vsock.guest_cid", .. }));
    }
    assert!(matches!(vsock(3, &[5, 6, 5]), ConfigError::HostPort { port: 5 }));
    assert!(matches!(vsock(3, &[0; 65]), ConfigError::Range { what: "vsock.host_ports count", .. }));
}

#[test]
fn more_disks_than_slots_are_refused() {
    let disks = vec![DiskConfig { file: FdIndex(2), read_only: true, below: Vec::new() }; 3];
    let few = |c: &mut VmConfig| (c.disks, c.disk_slots) = (disks, DiskSlots { read_only: 2, writable: 12 });
    assert!(matches!(refuse(few, vec![]), ConfigError::Disks { kind: "read-only", found: 3, max: 2 }));
}

#[test]
fn more_slots_than_the_machine_has_are_refused() {
    let many = |c: &mut VmConfig| c.disk_slots.writable = MAX_DISK_SLOTS + 1;
    assert!(matches!(refuse(many, vec![]), ConfigError::Range { what: "disk_slots.writable", max: 12, .. }));
    let many = |c: &mut VmConfig| c.network_slots = MAX_NETWORK_SLOTS + 1;
    assert!(matches!(refuse(many, vec![]), ConfigError::Range { what: "network_slots", max: 4, .. }));
}

#[test]
fn a_writable_disk_may_not_be_open_for_appending() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let open = || File::options().read(true).append(true).open(file.path()).unwrap().into();
    let with = |read_only| {
        move |config: &mut VmConfig| {
            config.disks = vec![DiskConfig { file: FdIndex(2), read_only, below: Vec::new() }];
        }
    };
    assert!(matches!(refuse(with(false), vec![open()]), ConfigError::Append { .. }));
    let mut config = config();
    with(true)(&mut config);
    check(config, vec![open()]).unwrap();
}

#[test]
fn a_tap_is_a_character_device_open_both_ways() {
    let config = NetworkConfig {
        slot: 0,
        tap: FdIndex(0),
        to_guest: RateLimit::default(),
        from_guest: RateLimit::default(),
    };
    let attach = |fds| attached_network(&config, FdTable::new(fds));
    assert!(matches!(attach(vec![file()]), Err(ConfigError::Kind { .. })));
    assert!(matches!(attach(vec![open("/dev/null", false)]), Err(ConfigError::Mode { .. })));
    assert!(matches!(attach(vec![kvm(), kvm()]), Err(ConfigError::Fd(FdError::Unused { .. }))));
    assert!(matches!(attach(vec![]), Err(ConfigError::Fd(FdError::Missing { .. }))));
    attach(vec![kvm()]).unwrap();
}

#[test]
fn a_configuration_from_before_networks_has_all_slots() {
    let text = r#"{"protocol":1,"vcpus":1,"memory_mib":64,"kvm":0,"kernel":1,"initrd":null,"cmdline":"",
        "console":null,"vsock":null}"#;
    let config: VmConfig = serde_json::from_str(text).unwrap();
    assert_eq!(config.network_slots, MAX_NETWORK_SLOTS);
}
