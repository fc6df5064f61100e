//! Devices: what the guest sees. They know guest memory, an interrupt line and the latch that
//! ends the VM; never KVM, the buses or the control socket. `virtio` has its own rules.

pub mod power;
pub mod serial;
pub mod virtio;
pub mod vmgenid;
