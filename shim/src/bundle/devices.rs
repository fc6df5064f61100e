//! Device nodes that a spec names beside the standard ones. A number means a device of the kernel that resolves it, which is the
//! guest's: but for those that every guest has, what a client means is the host's, and cannot be had.
//!
//! Specification: OCI config-linux "Devices"; numbers from Documentation/admin-guide/devices.txt of Linux.

use std::ops::RangeInclusive;
use std::path::Path;

use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use serde_json::Value;

use super::BundleError;

/// Character devices of every guest: memory and its like, terminals, tun, fuse, pseudo-terminals.
const GUESTS: [(i64, RangeInclusive<i64>); 5] =
    [(1, 1..=11), (5, 0..=2), (10, 200..=200), (10, 229..=229), (136, 0..=255)];

fn is_guests(device: &LinuxDevice) -> bool {
    match device.typ() {
        // A fifo is no device.
        LinuxDeviceType::P => true,
        LinuxDeviceType::C | LinuxDeviceType::U => {
            let is = |(major, minors): &(i64, RangeInclusive<i64>)| {
                *major == device.major() && minors.contains(&device.minor())
            };
            GUESTS.iter().any(is)
        }
        LinuxDeviceType::B | LinuxDeviceType::A => false,
    }
}

/// All devices are allowed, as `--privileged` says: then clients name whatever the host has.
fn are_all_allowed(spec: &Spec) -> bool {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_ref());
    let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
    rules.into_iter().flatten().any(|rule: &LinuxDeviceCgroup| {
        rule.allow()
            && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
            && any(rule.major())
            && any(rule.minor())
    })
}

/// Refuses a device of the host, unless the container is privileged: such a one has all of the guest's.
pub(super) fn check(path: &Path, spec: &Spec) -> Result<(), BundleError> {
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    match devices.into_iter().flatten().find(|device| !is_guests(device)) {
        Some(device) if !are_all_allowed(spec) => Err(BundleError::Invalid {
            path: path.into(),
            what: format!(
                "the device {} ({} {}:{}) is the host's, and a virtual machine has devices of its own",
                device.path().display(),
                device.typ().as_str(),
                device.major(),
                device.minor()
            ),
            mend: "run the container without it; /dev/fuse and /dev/net/tun can be had".into(),
        }),
        _ => Ok(()),
    }
}

/// Takes the host's devices out of the `linux` section that the guest gets.
pub(super) fn keep_guests(linux: &mut Value) {
    let Some(devices) = linux.get_mut("devices").and_then(Value::as_array_mut) else { return };
    devices.retain(|device| serde_json::from_value(device.clone()).is_ok_and(|device| is_guests(&device)));
}
