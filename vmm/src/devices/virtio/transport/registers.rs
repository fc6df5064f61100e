//! The register file (virtio 1.2, 4.2.2, table 4.1).

use super::{Ignored, MmioTransport, QueueSetup, status};
use crate::bus::MmioDevice;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "SPOR", little-endian.
const VENDOR: u32 = 0x524f_5053;

pub(super) mod offset {
    pub(crate) const MAGIC: u64 = 0x00;
    pub(crate) const VERSION: u64 = 0x04;
    pub(crate) const DEVICE_ID: u64 = 0x08;
    pub(crate) const VENDOR_ID: u64 = 0x0c;
    pub(crate) const DEVICE_FEATURES: u64 = 0x10;
    pub(crate) const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub(crate) const DRIVER_FEATURES: u64 = 0x20;
    pub(crate) const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub(crate) const QUEUE_SEL: u64 = 0x30;
    pub(crate) const QUEUE_NUM_MAX: u64 = 0x34;
    pub(crate) const QUEUE_NUM: u64 = 0x38;
    pub(crate) const QUEUE_READY: u64 = 0x44;
    pub(crate) const QUEUE_NOTIFY: u64 = 0x50;
    pub(crate) const INTERRUPT_STATUS: u64 = 0x60;
    pub(crate) const INTERRUPT_ACK: u64 = 0x64;
    pub(crate) const STATUS: u64 = 0x70;
    pub(crate) const QUEUE_DESC_LOW: u64 = 0x80;
    pub(crate) const QUEUE_DESC_HIGH: u64 = 0x84;
    pub(crate) const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub(crate) const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub(crate) const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub(crate) const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub(crate) const SHM_SEL: u64 = 0xac;
    pub(crate) const SHM_LEN_LOW: u64 = 0xb0;
    pub(crate) const SHM_BASE_HIGH: u64 = 0xbc;
    pub(crate) const CONFIG_GENERATION: u64 = 0xfc;
    pub(crate) const CONFIG: u64 = 0x100;
}

fn low(word: &mut u64, value: u32) {
    *word = (*word & !0xffff_ffff) | u64::from(value);
}

fn high(word: &mut u64, value: u32) {
    *word = (*word & 0xffff_ffff) | (u64::from(value) << 32);
}

/// Half `select` of a 64-bit set of features; nothing beyond.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => (features & 0xffff_ffff) as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

impl MmioTransport {
    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset {
            offset::MAGIC => MAGIC,
            offset::VERSION => VERSION,
            offset::DEVICE_ID => self.device.device_type(),
            offset::VENDOR_ID => VENDOR,
            offset::DEVICE_FEATURES => half(self.offered(), self.device_features_select),
            offset::QUEUE_NUM_MAX => {
                self.device.queue_sizes().get(self.queue_select as usize).copied().unwrap_or(0).into()
            }
            offset::QUEUE_READY => queue.is_some_and(|queue| queue.ready).into(),
            offset::INTERRUPT_STATUS => self.irq.status(),
            offset::STATUS => self.status,
            // No shared memory: length and base of every region are -1 (4.2.2).
            offset::SHM_LEN_LOW..=offset::SHM_BASE_HIGH => u32::MAX,
            offset::CONFIG_GENERATION => self.irq.generation(),
            _ => {
                self.ignore(
                    Ignored::Read,
                    format_args!("read of register {offset:#x}, which is not readable"),
                );
                0
            }
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            offset::DEVICE_FEATURES_SEL => self.device_features_select = value,
            offset::DRIVER_FEATURES_SEL => self.driver_features_select = value,
            offset::DRIVER_FEATURES => self.accept_features(value),
            offset::QUEUE_SEL => self.queue_select = value,
            offset::QUEUE_NUM => self.set_up_queue(|queue| queue.size = value),
            offset::QUEUE_READY => self.set_queue_ready(value & 1 != 0),
            offset::QUEUE_NOTIFY => self.ring(value as usize),
            offset::INTERRUPT_ACK => self.irq.acknowledge(value),
            offset::STATUS => self.set_status(value),
            offset::QUEUE_DESC_LOW => self.set_up_queue(|queue| low(&mut queue.descriptors, value)),
            offset::QUEUE_DESC_HIGH => self.set_up_queue(|queue| high(&mut queue.descriptors, value)),
            offset::QUEUE_DRIVER_LOW => self.set_up_queue(|queue| low(&mut queue.available, value)),
            offset::QUEUE_DRIVER_HIGH => self.set_up_queue(|queue| high(&mut queue.available, value)),
            offset::QUEUE_DEVICE_LOW => self.set_up_queue(|queue| low(&mut queue.used, value)),
            offset::QUEUE_DEVICE_HIGH => self.set_up_queue(|queue| high(&mut queue.used, value)),
            offset::SHM_SEL => {}
            _ => self.ignore(
                Ignored::Write,
                format_args!("write of {value:#x} to register {offset:#x}, which is not writable"),
            ),
        }
    }

    fn accept_features(&mut self, value: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return self.ignore(Ignored::Features, format_args!("DriverFeatures after FEATURES_OK"));
        }
        match self.driver_features_select {
            0 => low(&mut self.driver_features, value),
            1 => high(&mut self.driver_features, value),
            select if value != 0 => {
                self.ignore(Ignored::Features, format_args!("DriverFeatures of word {select}"))
            }
            _ => {}
        }
    }

    fn set_up_queue(&mut self, change: impl FnOnce(&mut QueueSetup)) {
        let index = self.queue_select;
        match self.queues.get_mut(index as usize) {
            Some(queue) if !queue.ready => change(queue),
            Some(_) => {
                self.ignore(Ignored::QueueSetup, format_args!("set-up of queue {index}, which is ready"))
            }
            None => self
                .ignore(Ignored::QueueSetup, format_args!("set-up of queue {index}, which does not exist")),
        }
    }
}

impl MmioDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(offset::CONFIG) {
            self.device.read_config(offset, data);
        } else if let (Ok(word), true) = (<&mut [u8; 4]>::try_from(&mut *data), offset.is_multiple_of(4)) {
            *word = self.read_register(offset).to_le_bytes();
        } else {
            // 4.2.2.2: only aligned 32-bit accesses.
            self.ignore(Ignored::Width, format_args!("read of {} bytes at register {offset:#x}", data.len()));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(offset::CONFIG) {
            self.device.write_config(offset, data);
        } else if let (Ok(word), true) = (<[u8; 4]>::try_from(data), offset.is_multiple_of(4)) {
            self.write_register(offset, u32::from_le_bytes(word));
        } else {
            self.ignore(
                Ignored::Width,
                format_args!("write of {} bytes at register {offset:#x}", data.len()),
            );
        }
    }
}
