//! Puts kernel, initramfs and command line into guest memory and describes them to the kernel,
//! by the zero page of the Linux boot protocol or the start info of PVH.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Address, ByteValued, Bytes, GuestMemory, GuestMemoryRegion};

use super::image::{ImageError, LoadedKernel, load_kernel};
use super::{Entry, acpi, layout};
use crate::devices::power;
use crate::memory::{Gpa, GuestRam};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const E820_ACPI: u32 = 3;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_UNDEFINED: u8 = 0xff;
const PVH_MAGIC: u32 = 0x336e_c578;
/// What kernels that do not say otherwise can address an initramfs at.
const INITRD_MAX: u64 = 0x7fff_ffff;
const PAGE: u64 = 4096;
/// A kernel that knows no better way to reboot jumps to the reset vector (Linux does when
/// hardware-reduced ACPI makes it hope for EFI). There it finds, in place of a BIOS:
/// `mov dx, reset; mov al, value; out dx, al; hlt; jmp back`.
const RESET_CODE: [u8; 9] = {
    let [low, high] = (layout::POWER_PORT + power::RESET).to_le_bytes();
    [0xba, low, high, 0xb0, power::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

/// Where a file was put.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Placed {
    start: u64,
    size: u64,
}

/// Loads everything; returns how the boot processor starts.
pub fn load_image(
    ram: &GuestRam,
    kernel: &mut File,
    initrd: Option<&mut File>,
    cmdline: &str,
) -> Result<Entry, ImageError> {
    let low_end = ram.iter().next().map_or(0, |region| region.len());
    let kernel = load_kernel(ram, kernel, low_end)?;
    let initrd = initrd.map(|file| load_initrd(ram, file, &kernel, low_end)).transpose()?.unwrap_or_default();
    write_cmdline(ram, cmdline, kernel.header.as_ref())?;
    let memory = |source| ImageError::Memory { what: "the reset vector", source };
    ram.write_slice(&RESET_CODE, Gpa::new(layout::RESET_VECTOR)).map_err(memory)?;
    match kernel.entry {
        Entry::Linux64 { .. } => write_zero_page(ram, &kernel, initrd, cmdline.len())?,
        Entry::Pvh { .. } => write_start_info(ram, initrd)?,
    }
    Ok(kernel.entry)
}

/// As high as the kernel can address, so that it is out of the way of what the kernel unpacks.
fn load_initrd(
    ram: &GuestRam,
    file: &mut File,
    kernel: &LoadedKernel,
    low_end: u64,
) -> Result<Placed, ImageError> {
    let size = file.seek(SeekFrom::End(0)).map_err(ImageError::Initrd)?;
    if size == 0 {
        return Err(ImageError::InitrdEmpty);
    }
    file.rewind().map_err(ImageError::Initrd)?;
    let highest = kernel.header.as_ref().map_or(INITRD_MAX, |header| u64::from(header.initrd_addr_max));
    let start = low_end.min(highest.saturating_add(1)).checked_sub(size).map(|start| start & !(PAGE - 1));
    let Some(start) = start.filter(|start| *start >= kernel.end) else {
        let needed_mib = kernel.end.saturating_add(size).saturating_add(PAGE).div_ceil(layout::MIB);
        return Err(ImageError::InitrdTooLarge { size, needed_mib, have_mib: low_end / layout::MIB });
    };
    // Both fit usize: the range lies in mapped memory.
    let length = usize::try_from(size).map_err(|_| ImageError::InitrdShort)?;
    ram.read_exact_volatile_from(Gpa::new(start), file, length).map_err(|source| match source {
        vm_memory::GuestMemoryError::IOError(error) if error.kind() != std::io::ErrorKind::UnexpectedEof => {
            ImageError::Initrd(error)
        }
        _ => ImageError::InitrdShort,
    })?;
    Ok(Placed { start, size })
}

fn write_cmdline(ram: &GuestRam, cmdline: &str, header: Option<&setup_header>) -> Result<(), ImageError> {
    let length = u32::try_from(cmdline.len()).unwrap_or(u32::MAX);
    if let Some(max) = header.map(|header| header.cmdline_size).filter(|max| length > *max) {
        return Err(ImageError::Cmdline { length, max });
    }
    let bytes = [cmdline.as_bytes(), &[0]].concat();
    let memory = |source| ImageError::Memory { what: "the command line", source };
    ram.write_slice(&bytes, Gpa::new(layout::CMDLINE)).map_err(memory)
}

/// What the firmware of a PC would report: RAM, and what is in its way.
fn memory_map(ram: &GuestRam) -> Vec<(u64, u64, u32)> {
    let acpi = layout::ACPI_TABLES;
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (layout::LOW_RAM_END, 0xa_0000 - layout::LOW_RAM_END, E820_RESERVED),
        (acpi.start, acpi.end - acpi.start, E820_ACPI),
        (acpi.end, layout::HIGH_RAM - acpi.end, E820_RESERVED),
    ];
    for region in ram.iter() {
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        let start = start.max(layout::HIGH_RAM);
        if end > start {
            map.push((start, end - start, E820_RAM));
        }
    }
    map
}

/// Low and high half of an address or a size in the zero page.
fn halves(value: u64) -> (u32, u32) {
    #[allow(clippy::cast_possible_truncation)] // the split is the point
    let low = value as u32;
    (low, u32::try_from(value >> 32).unwrap_or(u32::MAX))
}

fn write_zero_page(
    ram: &GuestRam,
    kernel: &LoadedKernel,
    initrd: Placed,
    cmdline: usize,
) -> Result<(), ImageError> {
    let mut params = boot_params { hdr: kernel.header.unwrap_or_default(), ..Default::default() };
    let header = &mut params.hdr;
    header.boot_flag = BOOT_FLAG;
    header.header = HEADER_MAGIC;
    header.type_of_loader = LOADER_UNDEFINED;
    (header.cmd_line_ptr, params.ext_cmd_line_ptr) = halves(layout::CMDLINE);
    header.cmdline_size = u32::try_from(cmdline).unwrap_or(u32::MAX);
    (header.ramdisk_image, params.ext_ramdisk_image) = halves(initrd.start);
    (header.ramdisk_size, params.ext_ramdisk_size) = halves(initrd.size);
    params.acpi_rsdp_addr = acpi::RSDP;
    let map = memory_map(ram);
    params.e820_entries = u8::try_from(map.len()).unwrap_or(u8::MAX);
    let mut table = params.e820_table;
    for (slot, (addr, size, type_)) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr, size, type_ };
    }
    params.e820_table = table;
    let memory = |source| ImageError::Memory { what: "the zero page", source };
    ram.write_obj(params, Gpa::new(layout::ZERO_PAGE)).map_err(memory)
}

fn write_start_info(ram: &GuestRam, initrd: Placed) -> Result<(), ImageError> {
    fn put<T: ByteValued>(ram: &GuestRam, value: T, address: u64) -> Result<(), ImageError> {
        let memory = |source| ImageError::Memory { what: "the PVH start info", source };
        ram.write_obj(value, Gpa::new(address)).map_err(memory)
    }
    let map = memory_map(ram);
    let mut info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: acpi::RSDP,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or_default(),
        ..Default::default()
    };
    if initrd.size > 0 {
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
        let module = hvm_modlist_entry { paddr: initrd.start, size: initrd.size, ..Default::default() };
        put(ram, module, layout::PVH_MODULES)?;
    }
    let mut address = layout::PVH_MEMORY_MAP;
    for (addr, size, type_) in map {
        put(ram, hvm_memmap_table_entry { addr, size, type_, reserved: 0 }, address)?;
        address += size_of::<hvm_memmap_table_entry>() as u64;
    }
    put(ram, info, layout::PVH_START_INFO)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::elf;
    use super::*;
    use crate::memory::{RamLayout, map};

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn kernel() -> File {
        file(&elf::tests::image(0x20_0000, 0x20_0000, &[0xf4; 16], 0x1000))
    }

    fn ram(mib: u64) -> GuestRam {
        map(&RamLayout::around(mib << 20, layout::HOLE)).unwrap()
    }

    #[test]
    fn zero_page_describes_what_was_loaded() {
        let ram = ram(64);
        let initrd = vec![0x5a; 10_000];
        let entry = load_image(&ram, &mut kernel(), Some(&mut file(&initrd)), "console=ttyS0").unwrap();
        assert_eq!(entry, Entry::Linux64 { rip: 0x20_0000 });
        let params: boot_params = ram.read_obj(Gpa::new(layout::ZERO_PAGE)).unwrap();
        let header = params.hdr;
        let start = u64::from(header.ramdisk_image);
        assert_eq!((start % PAGE, header.ramdisk_size), (0, 10_000));
        let mut back = vec![0; initrd.len()];
        ram.read_slice(&mut back, Gpa::new(start)).unwrap();
        assert_eq!(back, initrd);
        let mut text = [0; 14];
        ram.read_slice(&mut text, Gpa::new(header.cmd_line_ptr.into())).unwrap();
        assert_eq!(&text, b"console=ttyS0\0");
        assert_eq!({ params.acpi_rsdp_addr }, acpi::RSDP);
        assert_eq!(params.e820_entries, 5);
    }

    #[test]
    fn memory_map_spans_the_hole() {
        let total = |map: &[(u64, u64, u32)]| -> u64 {
            map.iter()
                .filter(|(start, _, kind)| *kind == E820_RAM && *start > 0)
                .map(|(_, size, _)| size)
                .sum()
        };
        let map = memory_map(&ram(6 * 1024));
        assert_eq!(total(&map), (6 << 30) - layout::HIGH_RAM);
        assert_eq!(map.last(), Some(&(0x1_0000_0000, 3 << 30, E820_RAM)));
        for pair in map.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0);
        }
    }

    #[test]
    fn an_initramfs_that_does_not_fit_says_what_would() {
        let mut large = tempfile::tempfile().unwrap();
        large.set_len(63 << 20).unwrap();
        let error = load_image(&ram(64), &mut kernel(), Some(&mut large), "").unwrap_err();
        assert!(matches!(error, ImageError::InitrdTooLarge { needed_mib: 66, have_mib: 64, .. }), "{error}");
        let error = load_image(&ram(64), &mut kernel(), Some(&mut file(b"")), "").unwrap_err();
        assert!(matches!(error, ImageError::InitrdEmpty));
        large.rewind().unwrap();
        large.write_all(b"x").unwrap();
        load_image(&ram(128), &mut kernel(), Some(&mut large), "").unwrap();
    }

    #[test]
    fn start_info_lists_the_initramfs_as_module() {
        let ram = ram(64);
        write_start_info(&ram, Placed { start: 0x100_0000, size: 5 }).unwrap();
        let info: hvm_start_info = ram.read_obj(Gpa::new(layout::PVH_START_INFO)).unwrap();
        assert_eq!((info.magic, info.nr_modules, info.memmap_entries), (PVH_MAGIC, 1, 5));
        let module: hvm_modlist_entry = ram.read_obj(Gpa::new(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size), (0x100_0000, 5));
    }
}
