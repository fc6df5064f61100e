use super::*;

#[test]
fn the_end_is_told_in_words() {
    assert!(describe(Some(&EndReason::Reset), None).contains("reset"));
    let fault = EndReason::TripleFault { vcpu: 1, registers: "rip=0".into() };
    assert_eq!(describe(Some(&fault), None), "vCPU 1: triple fault; rip=0");
    assert!(describe(None, None).contains("without a reason"));
}

#[test]
fn a_tail_has_the_last_lines_without_control_characters() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.log");
    let mut text: String = (0..1000).map(|n| format!("line {n}\r\n")).collect();
    text.push_str("\x1b[31mKernel panic\x1b[0m - not syncing\n\n");
    std::fs::write(&path, text).unwrap();
    let tail = tail(&path).unwrap();
    assert!(tail.ends_with("line 999 | [31mKernel panic[0m - not syncing"), "{tail}");
    assert_eq!(tail.split(" | ").count(), TAIL_LINES);
}

#[test]
fn missing_host_files_are_named_with_the_mend() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("vmlinuz");
    let config = Config { kernel: kernel.clone(), ..Config::default() };
    let message = |config: &Config| HostFiles::open(config).err().unwrap().to_string();
    if Path::new("/dev/kvm").exists() {
        assert!(message(&config).contains("guest kernel") && message(&config).contains("vmlinuz"));
        assert!(message(&config).contains("set \"kernel\" in /etc/spore/config.toml"));
        std::fs::write(&kernel, b"").unwrap();
        assert!(message(&config).contains("empty"));
        std::fs::write(&kernel, b"x").unwrap();
        let config = Config { initramfs: dir.path().into(), ..config };
        assert!(message(&config).contains("not a regular file"));
    } else {
        assert!(message(&config).contains("/dev/kvm"));
    }
}
