//! Kernels and initramfs images: what boots, and what is refused with which words.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use spore_guests::{ELF, bzimage, checksum, pattern_bytes, pvh, with_segment};
use spore_native::{Setup, Vm};
use spore_vmm::api::{EndReason, Failure, FailureCode, VmState};

#[test]
fn an_elf_kernel_boots() {
    let mut vm = Setup::new("hello").kernel(ELF.to_vec()).boot();
    assert_eq!(vm.ended(), EndReason::Shutdown);
    assert_eq!(vm.line("ok "), "ok hello");
}

#[test]
fn a_bzimage_boots() {
    let mut vm = Setup::new("hello;map").kernel(bzimage()).boot();
    assert_eq!(vm.ended(), EndReason::Shutdown);
    assert_eq!(vm.line("ok "), "ok hello");
}

/// A kernel that has a PVH entry alone is entered by it, with the same information.
#[test]
fn a_pvh_kernel_boots() {
    let content = pattern_bytes(1, 0, 100_001);
    let expected = format!("initrd size=100001 sum={:016x}", checksum(&content));
    let mut vm = Setup::new("initrd;memory;acpi").kernel(pvh()).initrd(content).memory_mib(3200).boot();
    assert_eq!(vm.ended(), EndReason::Shutdown);
    let text = vm.console_text();
    assert!(text.contains(&expected), "{text}");
    assert!(text.contains("ok memory") && text.contains("memory 0x100000000"), "{text}");
    assert!(text.contains("ok acpi") && !text.contains("BAD"), "{text}");
}

#[test]
fn the_command_line_arrives_whole() {
    let padding = "x".repeat(1900);
    let mut vm = Setup::new(&format!("cmdline {padding}")).boot();
    assert_eq!(vm.line("cmdline="), format!("cmdline=console=ttyS0 guest=cmdline {padding}"));
    assert_eq!(vm.ended(), EndReason::Shutdown);
}

#[test]
fn an_initramfs_arrives_byte_for_byte() {
    for kernel in [ELF.to_vec(), bzimage()] {
        let content = pattern_bytes(1, 0, 5_000_001);
        let expected = format!("initrd size=5000001 sum={:016x}", checksum(&content));
        let mut vm = Setup::new("initrd").kernel(kernel).initrd(content).boot();
        assert_eq!(vm.line("initrd "), expected);
        assert_eq!(vm.ended(), EndReason::Shutdown);
    }
}

fn refused(vm: &mut Vm, setup: Setup) -> Failure {
    let failure = vm.configure(setup).unwrap_err();
    assert_eq!(failure.code, FailureCode::BadImage, "{failure}");
    assert_eq!(vm.state(), VmState::Empty);
    failure
}

/// Every refusal names the kernel and the cause; the same VMM then boots a good one.
#[test]
fn a_kernel_that_is_none_is_refused() {
    let mut vm = Vm::spawn();
    let mut other_machine = ELF.to_vec();
    other_machine[18] = 183;
    let mut no_entry_64 = bzimage();
    no_entry_64[0x236] = 0;
    let mut old_protocol = bzimage();
    old_protocol[0x206..0x208].copy_from_slice(&0x200_u16.to_le_bytes());
    for (image, word) in [
        (vec![], "empty"),
        (b"#!/bin/sh\n".to_vec(), "bzImage"),
        (vec![0; 4 << 20], "bzImage"),
        (ELF[..32].to_vec(), "damaged"),
        (ELF[..ELF.len() / 2].to_vec(), "damaged"),
        (bzimage()[..4096].to_vec(), "damaged"),
        (other_machine, "183"),
        (no_entry_64, "64-bit"),
        (old_protocol, "0x200"),
        (with_segment(Some(0x1000), None), "0x1000"),
        (with_segment(Some(0xd000_0000), None), "0xd0000000"),
        (with_segment(Some(u64::MAX - 0xfff), None), ""),
        (with_segment(None, Some(u64::MAX)), ""),
    ] {
        let failure = refused(&mut vm, Setup::new("hello").kernel(image));
        assert!(failure.message.contains("kernel"), "{failure}");
        assert!(failure.message.contains(word), "{failure} does not say {word:?}");
    }
    vm.configure(Setup::new("hello")).unwrap();
    vm.boot();
    assert_eq!(vm.ended(), EndReason::Shutdown);
}

#[test]
fn too_little_memory_says_how_much_is_needed() {
    let mut vm = Vm::spawn();
    let kernel = with_segment(None, Some(100 << 20));
    let failure = refused(&mut vm, Setup::new("hello").kernel(kernel.clone()));
    for word in ["101 MiB", "64 MiB", "memory_mib"] {
        assert!(failure.message.contains(word), "{failure} does not say {word:?}");
    }
    let failure = refused(&mut vm, Setup::new("hello").initrd(vec![1; 80 << 20]));
    for word in ["initramfs", "64 MiB", "memory_mib"] {
        assert!(failure.message.contains(word), "{failure} does not say {word:?}");
    }
    let failure = refused(&mut vm, Setup::new("hello").initrd(vec![]));
    assert!(failure.message.contains("initramfs"), "{failure}");
    vm.configure(Setup::new("hello").kernel(kernel).memory_mib(128)).unwrap();
    vm.boot();
    assert_eq!(vm.ended(), EndReason::Shutdown);
}
