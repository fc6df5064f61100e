//! Kernel images: recognising, checking and loading a bzImage or an ELF vmlinux.
//! (Linux `Documentation/arch/x86/boot.rst` and `pvh` in Xen's documentation.)

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, bootparam::setup_header};

use super::{Entry, elf, layout};
use crate::memory::GuestRam;

const BZIMAGE_MAGIC: [u8; 4] = *b"HdrS";
const BZIMAGE_MAGIC_OFFSET: usize = 0x202;
/// Version 2.12 brought `xloadflags`, which tell whether there is a 64-bit entry point.
const MIN_BOOT_PROTOCOL: u16 = 0x20c;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry point's distance from the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

/// The kernel or the initramfs cannot be booted. Messages say what to do.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("kernel: {0}")]
    Kernel(#[source] Box<ImageError>),
    #[error("it is empty")]
    Empty,
    #[error(
        "it is neither a bzImage nor an ELF file (it begins with {begin:02x?}); give a vmlinuz or vmlinux for x86_64"
    )]
    Unknown { begin: Vec<u8> },
    #[error("it ends in the middle of {what}; the file is incomplete or damaged")]
    Truncated { what: &'static str },
    #[error("reading {what}: {source}")]
    Read { what: &'static str, source: io::Error },
    #[error(
        "it is an ELF file of class {class}, data encoding {data}; needed are class 2 (64-bit), encoding 1 (little-endian)"
    )]
    ElfKind { class: u8, data: u8 },
    #[error("it is made for ELF machine {found}, not {wanted} (x86_64)")]
    Machine { found: u16, wanted: u16 },
    #[error(
        "its ELF header announces {count} program headers of {size} bytes; allowed are 1 to {max} of 56 bytes"
    )]
    ProgramHeaders { size: u16, count: u16, max: u16 },
    #[error("its segment {index} wants {size:#x} bytes at {start:#x}; allowed is {min:#x} to {max:#x}")]
    Segment { index: u16, start: u64, size: u64, min: u64, max: u64 },
    #[error("it has nothing to load")]
    NothingToLoad,
    #[error("it has no entry point: neither 64-bit nor PVH")]
    NoEntry,
    #[error("it speaks boot protocol {found:#x}; {MIN_BOOT_PROTOCOL:#x} or later is needed")]
    Protocol { found: u16 },
    #[error("it has no 64-bit entry point (XLF_KERNEL_64 is not set)")]
    No64BitEntry,
    #[error("loading it into guest memory: {0}")]
    Load(#[source] linux_loader::loader::Error),
    #[error(
        "the guest has too little memory: the kernel alone needs {needed_mib} MiB to start, the guest has {have_mib} MiB; raise memory_mib"
    )]
    TooLittleMemory { needed_mib: u64, have_mib: u64 },
    #[error(
        "initramfs: its {size} bytes do not fit: the guest would need {needed_mib} MiB of memory beside the kernel, and has {have_mib} MiB; raise memory_mib"
    )]
    InitrdTooLarge { size: u64, needed_mib: u64, have_mib: u64 },
    #[error("initramfs: {0}")]
    Initrd(#[source] io::Error),
    #[error("initramfs: it is empty; leave it out or give one")]
    InitrdEmpty,
    #[error("initramfs: it shrank while it was read")]
    InitrdShort,
    #[error("kernel command line: {length} bytes; this kernel takes at most {max}")]
    Cmdline { length: u32, max: u32 },
    #[error("guest memory: writing {what}: {source}")]
    Memory { what: &'static str, source: vm_memory::GuestMemoryError },
}

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct LoadedKernel {
    pub(super) entry: Entry,
    /// First address that the kernel leaves alone until it knows of the initramfs.
    pub(super) end: u64,
    /// Of a bzImage.
    pub(super) header: Option<setup_header>,
}

/// Loads a kernel below `low_end`, the end of RAM under the hole.
pub(super) fn load_kernel(ram: &GuestRam, file: &mut File, low_end: u64) -> Result<LoadedKernel, ImageError> {
    load(ram, file, low_end).map_err(|error| match error {
        // These say "kernel" or speak of the guest themselves.
        ImageError::TooLittleMemory { .. } => error,
        other => ImageError::Kernel(Box::new(other)),
    })
}

fn load(ram: &GuestRam, file: &mut File, low_end: u64) -> Result<LoadedKernel, ImageError> {
    let read = |source| ImageError::Read { what: "the file", source };
    let size = file.seek(SeekFrom::End(0)).map_err(read)?;
    if size == 0 {
        return Err(ImageError::Empty);
    }
    file.rewind().map_err(read)?;
    let mut begin = Vec::new();
    file.take(BZIMAGE_MAGIC_OFFSET as u64 + 4).read_to_end(&mut begin).map_err(read)?;
    if begin.get(BZIMAGE_MAGIC_OFFSET..) == Some(&BZIMAGE_MAGIC) {
        load_bzimage(ram, file, size, low_end)
    } else if begin.starts_with(&elf::MAGIC) {
        load_elf(ram, file, size, low_end)
    } else {
        begin.truncate(8);
        Err(ImageError::Unknown { begin })
    }
}

fn load_elf(ram: &GuestRam, file: &mut File, size: u64, low_end: u64) -> Result<LoadedKernel, ImageError> {
    let facts = elf::inspect(file, size)?;
    check_fits(facts.end, low_end)?;
    let loaded = Elf::load(ram, None, file, None).map_err(ImageError::Load)?;
    let entry = match loaded.pvh_boot_cap {
        _ if facts.entry_is_loaded => Entry::Linux64 { rip: facts.entry },
        PvhBootCapability::PvhEntryPresent(address) => Entry::Pvh { rip: address.0 },
        _ => return Err(ImageError::NoEntry),
    };
    Ok(LoadedKernel { entry, end: facts.end, header: None })
}

fn load_bzimage(
    ram: &GuestRam,
    file: &mut File,
    size: u64,
    low_end: u64,
) -> Result<LoadedKernel, ImageError> {
    // The loader reads the header again; it must be there in full, and describe the file.
    let header_end = 0x1f1 + size_of::<setup_header>() as u64;
    if size < header_end {
        return Err(ImageError::Truncated { what: "the boot header" });
    }
    let load_error = |error| match error {
        linux_loader::loader::Error::Bzimage(linux_loader::loader::bzimage::Error::Underflow) => {
            ImageError::Truncated { what: "the real-mode code" }
        }
        other => ImageError::Load(other),
    };
    check_fits(layout::HIGH_RAM + size, low_end)?;
    let start = vm_memory::GuestAddress(layout::HIGH_RAM);
    let loaded = BzImage::load(ram, Some(start), file, None).map_err(load_error)?;
    let header = loaded.setup_header.ok_or(ImageError::NoEntry)?;
    if header.version < MIN_BOOT_PROTOCOL {
        return Err(ImageError::Protocol { found: header.version });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(ImageError::No64BitEntry);
    }
    // `syssize` counts 16-byte paragraphs of the protected-mode part.
    let setup = (u64::from(header.setup_sects.max(if header.setup_sects == 0 { 4 } else { 0 })) + 1) * SECTOR;
    let (offset, length) = (u64::from(header.payload_offset), u64::from(header.payload_length));
    if setup + u64::from(header.syssize) * 16 > size || setup + offset + length > size {
        return Err(ImageError::Truncated { what: "the compressed kernel" });
    }
    // The kernel unpacks itself at its preferred address, into `init_size` bytes.
    let end = header.pref_address.max(layout::HIGH_RAM).checked_add(header.init_size.into());
    let end = end.ok_or(ImageError::Truncated { what: "the boot header" })?.max(loaded.kernel_end);
    check_fits(end, low_end)?;
    let entry = Entry::Linux64 { rip: layout::HIGH_RAM + ENTRY_64 };
    Ok(LoadedKernel { entry, end, header: Some(header) })
}

fn check_fits(end: u64, low_end: u64) -> Result<(), ImageError> {
    if end > low_end {
        let (needed_mib, have_mib) = (end.div_ceil(layout::MIB), low_end / layout::MIB);
        return Err(ImageError::TooLittleMemory { needed_mib, have_mib });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::Address;

    use super::*;
    use crate::memory::Gpa;

    fn ram(mib: usize) -> GuestRam {
        GuestRam::from_ranges(&[(Gpa::new(0), mib << 20)]).unwrap()
    }

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    fn try_load(content: &[u8], mib: usize) -> Result<LoadedKernel, ImageError> {
        load_kernel(&ram(mib), &mut file(content), (mib as u64) << 20)
    }

    fn cause(content: &[u8], mib: usize) -> ImageError {
        match try_load(content, mib).unwrap_err() {
            ImageError::Kernel(inner) => *inner,
            other => other,
        }
    }

    /// A bzImage of one setup sector and `payload` bytes of kernel.
    fn bzimage(payload: u32) -> Vec<u8> {
        let mut image = vec![0; 1024 + payload as usize];
        image[0x1f1] = 1;
        image[0x1f4..0x1f8].copy_from_slice(&(payload / 16).to_le_bytes());
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[BZIMAGE_MAGIC_OFFSET..][..4].copy_from_slice(&BZIMAGE_MAGIC);
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x211] = 1; // LOADED_HIGH
        image[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image[0x236] = 1; // XLF_KERNEL_64
        image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x200_0000u32.to_le_bytes());
        image
    }

    #[test]
    fn loads_a_bzimage() {
        let kernel = try_load(&bzimage(4096), 64).unwrap();
        assert_eq!(kernel.entry, Entry::Linux64 { rip: 0x10_0200 });
        assert_eq!(kernel.end, 0x300_0000, "preferred address and init_size");
        assert!(kernel.header.is_some());
    }

    #[test]
    fn loads_an_elf_file() {
        let content = elf::tests::image(0x20_0000, 0x20_0000, &[0xf4; 16], 0x1000);
        let kernel = try_load(&content, 64).unwrap();
        assert_eq!(kernel.entry, Entry::Linux64 { rip: 0x20_0000 });
        assert_eq!(kernel.end, 0x20_1000);
    }

    #[test]
    fn refuses_what_is_no_kernel() {
        assert!(matches!(cause(b"", 64), ImageError::Empty));
        assert!(matches!(cause(b"#!/bin/sh\n", 64), ImageError::Unknown { .. }));
        let outside = elf::tests::image(0, 0x20_0000, &[0; 16], 16);
        assert!(matches!(cause(&outside, 64), ImageError::NoEntry));
    }

    #[test]
    fn refuses_a_damaged_bzimage() {
        let with = |at: usize, value: u8| {
            let mut image = bzimage(4096);
            image[at] = value;
            cause(&image, 64)
        };
        assert!(matches!(with(0x206, 0x0b), ImageError::Protocol { found: 0x20b }));
        assert!(matches!(with(0x236, 0), ImageError::No64BitEntry));
        assert!(matches!(with(0x1f1, 200), ImageError::Truncated { .. }));
        assert!(matches!(with(0x1f6, 1), ImageError::Truncated { .. }));
        assert!(matches!(with(0x211, 0), ImageError::Load(_)), "a zImage");
        let image = bzimage(4096);
        assert!(matches!(cause(&image[..0x210], 64), ImageError::Truncated { .. }));
        assert!(matches!(cause(&image[..4096], 64), ImageError::Truncated { .. }));
    }

    #[test]
    fn says_how_much_memory_a_kernel_needs() {
        let error = try_load(&bzimage(4096), 32).unwrap_err();
        assert!(matches!(error, ImageError::TooLittleMemory { needed_mib: 48, have_mib: 32 }));
        assert!(error.to_string().contains("needs 48 MiB"), "{error}");
    }
}
