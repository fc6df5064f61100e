//! What the guest sees of a network device (virtio 1.2, 5.1.2 - 5.1.6).

use crate::api::network_mac;
use crate::backend::tap::Offloads;
use crate::devices::virtio::transport::{F_EVENT_IDX, F_INDIRECT_DESC};

pub(super) const DEVICE_TYPE: u32 = 1;

/// To the guest.
pub(super) const RX: u16 = 0;
/// From the guest.
pub(super) const TX: u16 = 1;
pub(super) const QUEUE_SIZES: [u16; 2] = [256; 2];

const F_CSUM: u64 = 1;
pub(super) const F_GUEST_CSUM: u64 = 1 << 1;
const F_MAC: u64 = 1 << 5;
pub(super) const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
pub(super) const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;

/// UDP segmentation is left out: whether a tap has it depends on the host's kernel (6.2), and what is
/// offered is fixed before there is a tap. The MTU is the agent's to set.
pub(super) const FEATURES: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_MAC
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_ECN
    | F_MRG_RXBUF
    | F_STATUS
    | F_INDIRECT_DESC
    | F_EVENT_IDX;

/// What a driver that accepted `features` takes unfinished.
pub(super) fn offloads(features: u64) -> Offloads {
    Offloads {
        checksum: features & F_GUEST_CSUM != 0,
        tso4: features & F_GUEST_TSO4 != 0,
        tso6: features & F_GUEST_TSO6 != 0,
        ecn: features & F_GUEST_ECN != 0,
    }
}

/// Bytes of the header before each frame. Of these the host fills in `num_buffers` alone.
pub(super) const HEADER: usize = crate::backend::tap::HEADER;
/// Where in it is the number of chains that a received frame fills.
pub(super) const NUM_BUFFERS: usize = 10;
/// Largest frame with its header (5.1.6.3.1), which is what segmentation offload makes of it.
pub(super) const MAX_FRAME: usize = HEADER + 65_550;

const LINK_UP: u16 = 1;
const CONFIG_SIZE: usize = 8;

/// The configuration space without the fields of features that are not offered: address, status.
pub(super) fn config(slot: u8, up: bool) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    config[..6].copy_from_slice(&network_mac(slot));
    let status = if up { LINK_UP } else { 0 };
    config[6..].copy_from_slice(&status.to_le_bytes());
    config
}
