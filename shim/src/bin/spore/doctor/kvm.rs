#![allow(unsafe_code)] // Two ioctls of KVM that take and give numbers.
//! Whether virtual machines can be made here.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::{Bad, bad};

const DEVICE: &str = "/dev/kvm";
/// The only version that there has been since 2007.
const API_VERSION: i32 = 12;

// Linux Documentation/virt/kvm/api.rst, sections 4.1 and 4.2.
nix::ioctl_none!(get_api_version, 0xAE, 0x00);
nix::ioctl_write_int_bad!(create_vm, nix::request_code_none!(0xAE, 0x01));

pub(super) fn usable() -> Result<String, Bad> {
    let kvm = match File::options().read(true).write(true).open(DEVICE) {
        Ok(kvm) => kvm,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return bad(
                "there is none",
                "modprobe kvm_intel or kvm_amd; in a virtual machine, let its host nest",
            );
        }
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            return bad("permission denied", "run spore as root; containerd does");
        }
        Err(error) => return bad(format!("cannot be opened: {error}"), "modprobe kvm_intel or kvm_amd"),
    };
    // SAFETY: KVM_GET_API_VERSION takes no argument; the descriptor is open.
    let version = unsafe { get_api_version(kvm.as_raw_fd()) };
    match version {
        Ok(API_VERSION) => {}
        Ok(other) => return bad(format!("speaks version {other} of KVM's API"), "a kernel with version 12"),
        Err(error) => return bad(format!("is not KVM: {}", error.desc()), "modprobe kvm_intel or kvm_amd"),
    }
    // SAFETY: KVM_CREATE_VM takes a number, 0 for the default kind of machine.
    match unsafe { create_vm(kvm.as_raw_fd(), 0) } {
        Ok(vm) => {
            // SAFETY: the kernel just gave us this descriptor, which nobody else has.
            drop(unsafe { OwnedFd::from_raw_fd(vm) });
            Ok("a virtual machine can be made".into())
        }
        Err(error) => {
            let mend = "enable virtualisation in the firmware, or nesting on the host; end other hypervisors";
            bad(format!("no virtual machine can be made: {}", error.desc()), mend)
        }
    }
}
