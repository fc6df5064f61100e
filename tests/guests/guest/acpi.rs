//! Reads the ACPI tables as an operating system would, without AML.

use crate::say;

/// A table: address and length from its header.
#[derive(Clone, Copy)]
pub struct Table {
    address: u64,
    length: u32,
}

pub struct Tables {
    fadt: Table,
    madt: Option<Table>,
    dsdt: Table,
}

fn read<T: Copy>(address: u64) -> T {
    // SAFETY: everything below 16 GiB is mapped; outside RAM the VMM answers.
    unsafe { (address as *const T).read_unaligned() }
}

fn sum(address: u64, length: u32) -> u8 {
    (0..u64::from(length)).fold(0u8, |sum, at| sum.wrapping_add(read::<u8>(address + at)))
}

impl Table {
    fn at(address: u64) -> Self {
        Self { address, length: read(address + 4) }
    }

    fn signature(self) -> [u8; 4] {
        read(self.address)
    }

    fn field<T: Copy>(self, offset: u64) -> Option<T> {
        (offset + size_of::<T>() as u64 <= u64::from(self.length)).then(|| read(self.address + offset))
    }

    fn bytes(self) -> &'static [u8] {
        // SAFETY: a table is memory that nobody writes after boot.
        unsafe { core::slice::from_raw_parts(self.address as *const u8, self.length as usize) }
    }

    fn say(self) {
        let name = self.signature();
        say!(
            "table {} revision={} length={} checksum={}",
            core::str::from_utf8(&name).unwrap_or("????"),
            read::<u8>(self.address + 8),
            self.length,
            if sum(self.address, self.length) == 0 { "ok" } else { "BAD" }
        );
    }
}

/// Port and width of a generic address structure in port space.
fn port(gas: u64) -> Option<u16> {
    (read::<u8>(gas) == 1).then(|| read::<u64>(gas + 4) as u16)
}

impl Tables {
    pub fn find(rsdp: u64) -> Result<Self, &'static str> {
        if rsdp == 0 {
            return Err("boot_params.acpi_rsdp_addr is zero");
        }
        if read::<[u8; 8]>(rsdp) != *b"RSD PTR " {
            return Err("no RSDP signature");
        }
        let xsdt = Table::at(read(rsdp + 24));
        if xsdt.signature() != *b"XSDT" {
            return Err("no XSDT");
        }
        let (mut fadt, mut madt) = (None, None);
        for index in 0..u64::from(xsdt.length - 36) / 8 {
            let table = Table::at(read(xsdt.address + 36 + 8 * index));
            match &table.signature() {
                b"FACP" => fadt = Some(table),
                b"APIC" => madt = Some(table),
                _ => {}
            }
        }
        let fadt = fadt.ok_or("no FADT")?;
        let dsdt = match fadt.field::<u64>(140) {
            Some(address) if address != 0 => Table::at(address),
            _ => return Err("no X_DSDT"),
        };
        Ok(Self { fadt, madt, dsdt })
    }

    pub fn sleep_control(&self) -> Option<u16> {
        (self.fadt.length >= 256).then(|| port(self.fadt.address + 244)).flatten()
    }

    pub fn reset(&self) -> Option<(u16, u8)> {
        let supported = self.fadt.field::<u32>(112)? & 1 << 10 != 0;
        supported
            .then(|| port(self.fadt.address + 116))
            .flatten()
            .map(|port| (port, read(self.fadt.address + 128)))
    }

    /// SLP_TYP of `Name (_S5, Package () { typ, … })`.
    pub fn s5_type(&self) -> Option<u8> {
        let aml = self.dsdt.bytes();
        let at = aml.windows(4).position(|name| name == b"_S5_")? + 4;
        // PackageOp, a package length of one to four bytes, the element count, a byte.
        if *aml.get(at)? != 0x12 {
            return None;
        }
        let element = at + 1 + usize::from(aml.get(at + 1)? >> 6) + 2;
        match *aml.get(element)? {
            0x0a => aml.get(element + 1).copied(),
            value @ 0..=1 => Some(value),
            _ => None,
        }
    }

    /// `Name (ADDR, Package () { low, high })` of the generation id.
    pub fn generation_id(&self) -> Option<u64> {
        let aml = self.dsdt.bytes();
        let at = aml.windows(8).position(|bytes| bytes == b"ADDR\x12\x08\x02\x0c")? + 8;
        Some(u32::from_le_bytes(aml.get(at..at + 4)?.try_into().ok()?).into())
    }

    /// Local APICs that may be started.
    pub fn cpus(&self) -> usize {
        let Some(madt) = self.madt else { return 0 };
        let bytes = madt.bytes();
        let (mut at, mut count) = (44, 0);
        while at + 2 <= bytes.len() {
            let (kind, length) = (bytes[at], usize::from(bytes[at + 1]));
            if length < 2 || at + length > bytes.len() {
                say!("MADT entry at {at} has length {length}");
                return 0;
            }
            match kind {
                0 if bytes[at + 4] & 1 != 0 => {
                    count += 1;
                    say!("lapic id={}", bytes[at + 3]);
                }
                9 if bytes[at + 8] & 1 != 0 => {
                    count += 1;
                    say!("x2apic id={}", bytes[at + 4]);
                }
                1 => say!("ioapic address={:#x}", read::<u32>(madt.address + at as u64 + 4)),
                _ => {}
            }
            at += length;
        }
        count
    }

    fn count(&self, what: &[u8]) -> usize {
        self.dsdt.bytes().windows(what.len()).filter(|bytes| bytes == &what).count()
    }

    pub fn walk(rsdp: u64) -> Result<(), &'static str> {
        let tables = Self::find(rsdp)?;
        say!(
            "rsdp revision={} checksum={} extended={}",
            read::<u8>(rsdp + 15),
            if sum(rsdp, 20) == 0 { "ok" } else { "BAD" },
            if sum(rsdp, 36) == 0 { "ok" } else { "BAD" }
        );
        Table::at(read(rsdp + 24)).say();
        tables.fadt.say();
        tables.dsdt.say();
        if let Some(madt) = tables.madt {
            madt.say();
        }
        say!("hardware-reduced={}", tables.fadt.field::<u32>(112).unwrap_or(0) >> 20 & 1);
        say!(
            "sleep-control={:?} s5={:?} reset={:?}",
            tables.sleep_control(),
            tables.s5_type(),
            tables.reset()
        );
        say!("cpus={}", tables.cpus());
        let uart = [0x0c, 0x41, 0xd0, 0x05, 0x01];
        let button = [0x0c, 0x41, 0xd0, 0x0c, 0x0c];
        say!(
            "devices virtio={} serial={} button={} ged={}",
            tables.count(b"LNRO0005"),
            tables.count(&uart),
            tables.count(&button),
            tables.count(b"ACPI0013")
        );
        Ok(())
    }
}
