//! What the guest finds: memory, CPUs, firmware tables, devices.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::collections::BTreeSet;

use spore_native::Setup;
use spore_vmm::api::EndReason;

/// Runs a script to its end and returns the console.
fn run(setup: Setup) -> String {
    let mut vm = setup.boot();
    assert_eq!(vm.ended(), EndReason::Shutdown);
    vm.console_text()
}

/// The value of `name=` in a line.
fn value<'a>(line: &'a str, name: &str) -> &'a str {
    let found = line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    found.unwrap_or_else(|| panic!("no {name}= in {line:?}"))
}

fn number(text: &str) -> u64 {
    text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16)).unwrap()
}

#[test]
fn memory_is_all_there_from_the_smallest_to_6_gib() {
    for mib in [64, 65, 128, 3071, 3072, 3073, 6144] {
        let text = run(Setup::new("map;memory").memory_mib(mib));
        assert!(text.contains("ok memory"), "{mib} MiB: {text}");
        let ranges: Vec<(u64, u64)> = text
            .lines()
            .filter(|line| line.starts_with("range ") && value(line, "kind") == "1")
            .map(|line| (number(value(line, "start")), number(value(line, "size"))))
            .collect();
        let total: u64 = ranges.iter().map(|(_, size)| size).sum();
        // Usable is all but the little below 1 MiB that firmware keeps.
        assert!(total <= mib << 20 && total > (mib << 20) - (1 << 20), "{mib} MiB: {total:#x} usable");
        for (start, size) in &ranges {
            let end = start + size;
            assert!(end <= 0xc000_0000 || *start >= 0x1_0000_0000, "{start:#x}..{end:#x} is in the hole");
        }
        let last = ranges.iter().map(|(start, size)| start + size).max().unwrap();
        let expected = if mib <= 3072 { mib << 20 } else { (mib << 20) + (1 << 30) };
        assert_eq!(last, expected, "{mib} MiB");
    }
}

#[test]
fn every_vcpu_starts_and_knows_who_it_is() {
    for vcpus in [1_u8, 2, 4, 32] {
        let text = run(Setup::new(&format!("smp,{vcpus};cpuid")).vcpus(vcpus));
        let cpus: Vec<&str> = text.lines().filter(|line| line.starts_with("cpu ")).collect();
        assert_eq!(cpus.len(), usize::from(vcpus), "{text}");
        assert!(text.contains(&format!("online={vcpus}\n")), "{text}");
        let ids: BTreeSet<u64> = cpus.iter().map(|line| number(value(line, "apic"))).collect();
        assert_eq!(ids, (0..u64::from(vcpus)).collect());
        for line in cpus {
            assert_eq!(value(line, "apic"), value(line, "x2apic"), "leaf 1 and leaf 0xb agree: {line}");
            assert_eq!(number(value(line, "cores")), u64::from(vcpus), "{line}");
            // Of a single CPU the bit may say either.
            assert!(vcpus == 1 || value(line, "htt") == "1", "{line}");
        }
        // Leaf 1 EBX 23:16: addressable ids, a power of two that holds all vCPUs.
        let leaf1 = text.lines().find_map(|line| line.strip_prefix("cpuid 00000001.0 ")).unwrap();
        let ebx = u64::from_str_radix(leaf1.split(' ').nth(1).unwrap(), 16).unwrap();
        assert!((ebx >> 16 & 0xff) >= u64::from(vcpus), "{leaf1}");
        let ecx = u64::from_str_radix(leaf1.split(' ').nth(2).unwrap(), 16).unwrap();
        assert_eq!(ecx >> 31, 1, "the hypervisor bit");
        assert_eq!(ecx >> 5 & 1, 0, "no VMX in the guest");
    }
}

#[test]
fn kvm_announces_itself() {
    let text = run(Setup::new("cpuid"));
    let leaf = text.lines().find(|line| line.starts_with("cpuid 40000000.0 ")).unwrap();
    assert!(leaf.contains("4b4d564b 564b4d56 0000004d"), "{leaf}");
}

#[test]
fn acpi_tables_are_sound_and_complete() {
    for vcpus in [1, 3] {
        let text = run(Setup::new("acpi").vcpus(vcpus).vsock(&[]));
        assert!(text.contains("ok acpi"), "{text}");
        assert!(!text.contains("BAD"), "{text}");
        for table in ["XSDT", "FACP", "DSDT", "APIC"] {
            assert!(text.contains(&format!("table {table} ")), "no {table}: {text}");
        }
        assert!(text.contains("hardware-reduced=1"), "{text}");
        assert!(text.contains(&format!("cpus={vcpus}\n")), "{text}");
        assert!(text.contains("ioapic address=0xfec00000"), "{text}");
        assert!(text.contains("devices virtio=31 serial=1 button=1 ged=1"), "{text}");
    }
}

#[test]
fn every_slot_holds_its_device() {
    let text = run(Setup::new("bus").vsock(&[]));
    let slots: Vec<&str> = text.lines().filter(|line| line.starts_with("slot ")).collect();
    assert_eq!(slots.len(), 31, "{text}");
    for line in slots {
        let index = number(line.split(' ').nth(1).unwrap());
        let kind = match index {
            0 => "4",
            1 => "19",
            27 => "5",
            28.. => "1",
            _ => "2",
        };
        assert_eq!((value(line, "kind"), value(line, "version")), (kind, "2"), "{line}");
        let features = number(value(line, "features"));
        assert_eq!(features >> 32 & 1, 1, "VIRTIO_F_VERSION_1: {line}");
        if kind == "2" {
            assert_eq!(features >> 5 & 1 == 1, index < 14, "VIRTIO_BLK_F_RO: {line}");
        }
    }
}

#[test]
fn random_numbers_arrive() {
    let text = run(Setup::new("rng"));
    assert!(text.contains("ok rng"), "{text}");
}

#[test]
fn a_guest_dirties_memory_with_the_expected_result() {
    let text = run(Setup::new("dirty,64,2").memory_mib(128));
    let expected = |round: u64| {
        (16_u64 << 20..80 << 20)
            .step_by(4096)
            .fold(0_u64, |sum, page| sum.wrapping_mul(31).wrapping_add(page ^ round))
    };
    for round in 0..2 {
        assert!(text.contains(&format!("dirty round={round} sum={:016x}", expected(round))), "{text}");
    }
}
