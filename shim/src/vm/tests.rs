use spore_vmm::api::EndReason;

use super::end::{TAIL_LINES, Told, describe};
use spore_vmm::api::MAX_NETWORK_SLOTS;

use super::*;

#[test]
fn the_end_is_told_in_words() {
    let ended = |reason| Told { reason: Some(reason), broken: None };
    assert!(describe(&ended(EndReason::Reset), None).contains("reset"));
    let fault = EndReason::TripleFault { vcpu: 1, registers: "rip=0".into() };
    assert_eq!(describe(&ended(fault), None), "vCPU 1: triple fault; rip=0");
    assert!(describe(&Told::default(), None).contains("without a reason"));
    let broken = Told { reason: None, broken: Some(io::Error::other("noise")) };
    assert!(describe(&broken, None).contains("cannot be understood: noise"));
}

/// Neither crate knows the other.
#[test]
fn the_guest_knows_a_network_slot_by_the_address_that_the_vmm_gives_it() {
    assert_eq!(MAX_NETWORK_SLOTS, spore_agent_api::network::MAX_SLOTS);
    for slot in 0..MAX_NETWORK_SLOTS {
        let address = spore_vmm::api::network_mac(slot);
        assert_eq!(address, spore_agent_api::network::permanent_mac(slot));
        assert_eq!(spore_agent_api::network::slot_of(&address), Some(slot));
    }
}

#[test]
fn the_oom_score_is_the_specs_or_zero() {
    assert_eq!(wanted_oom_score_adj(br#"{"process":{"oomScoreAdj":-500,"args":["a"]}}"#), -500);
    assert_eq!(wanted_oom_score_adj(br#"{"process":{"args":["a"]},"root":{}}"#), 0);
    assert_eq!(wanted_oom_score_adj(b"{}"), 0);
}

#[test]
fn a_tail_has_the_last_lines_without_control_characters() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.log");
    let mut text: String = (0..1000).map(|n| format!("line {n}\r\n")).collect();
    text.push_str("\x1b[31mnot well\x1b[0m\n\n");
    std::fs::write(&path, text).unwrap();
    let tail = tail(&path).unwrap();
    assert!(tail.ends_with("line 999 | [31mnot well[0m"), "{tail}");
    assert_eq!(tail.split(" | ").count(), TAIL_LINES);
}

#[test]
fn the_tail_of_a_panic_is_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.log");
    let trace: String = (0..40).map(|n| format!("frame {n}\n")).collect();
    std::fs::write(&path, format!("before\nKernel panic - not syncing: no init\n{trace}")).unwrap();
    let tail = tail(&path).unwrap();
    assert!(tail.starts_with("Kernel panic - not syncing: no init | frame 0 | "), "{tail}");
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
