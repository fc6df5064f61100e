//! The guest's image in other wrappings.

/// Where the guest is linked: the address to which every loader puts a bzImage's
/// protected-mode part.
const LINK_ADDRESS: u64 = 0x10_0000;
const SECTOR: usize = 512;
const PROGRAM_HEADER: usize = 56;

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// What an address or size comes to in a vector, on a 64-bit machine.
fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Program headers of the guest: offset in the file.
fn program_headers(elf: &[u8]) -> impl Iterator<Item = usize> {
    let (table, count) = (index(u64_at(elf, 32)), usize::from(u16_at(elf, 56)));
    (0..count).map(move |number| table + number * PROGRAM_HEADER)
}

/// The loaded segments as one flat image from [`LINK_ADDRESS`] on, and its size in memory.
fn flatten(elf: &[u8]) -> (Vec<u8>, u64) {
    let (mut flat, mut end) = (Vec::new(), 0);
    for at in program_headers(elf).filter(|at| elf[*at..*at + 4] == 1u32.to_le_bytes()) {
        let (offset, address) = (index(u64_at(elf, at + 8)), u64_at(elf, at + 24));
        let (in_file, in_memory) = (index(u64_at(elf, at + 32)), u64_at(elf, at + 40));
        let start = index(address - LINK_ADDRESS);
        flat.resize(flat.len().max(start + in_file), 0);
        flat[start..start + in_file].copy_from_slice(&elf[offset..offset + in_file]);
        end = end.max(address + in_memory);
    }
    (flat, end - LINK_ADDRESS)
}

/// The guest as a minimal bzImage (Linux `Documentation/arch/x86/boot.rst`): one boot
/// sector, one setup sector, and a "compressed" kernel that is the flat image itself,
/// whose 64-bit entry is 512 bytes in.
#[must_use]
pub fn bzimage() -> Vec<u8> {
    let (mut kernel, in_memory) = flatten(super::ELF);
    kernel.resize(kernel.len().next_multiple_of(16), 0);
    let mut image = vec![0; 2 * SECTOR];
    let size = u32::try_from(kernel.len()).unwrap_or(u32::MAX);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &(size / 16).to_le_bytes()); // syssize
    put(0x1fe, &[0x55, 0xaa]);
    put(0x200, &[0xeb, 0x6a]); // a jump over the header, which also gives its length
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes()); // protocol 2.15
    put(0x211, &[1]); // LOADED_HIGH
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x1000_u32.to_le_bytes()); // kernel_alignment
    put(0x236, &[1]); // XLF_KERNEL_64
    put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x24c, &size.to_le_bytes()); // payload_length
    put(0x258, &LINK_ADDRESS.to_le_bytes()); // pref_address
    put(0x260, &u32::try_from(in_memory).unwrap_or(u32::MAX).to_le_bytes()); // init_size
    image.extend_from_slice(&kernel);
    image
}

/// The ELF guest with a PVH entry alone: the 64-bit entry leads nowhere, and a note names the
/// 32-bit one (Xen `docs/misc/pvh.pandoc`).
#[must_use]
pub fn pvh() -> Vec<u8> {
    const NOTE: u32 = 4;
    const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
    let mut elf = super::ELF.to_vec();
    let entry = u32::try_from(LINK_ADDRESS + 0x100).unwrap_or(0);
    let note = [4, 4, XEN_ELFNOTE_PHYS32_ENTRY, u32::from_le_bytes(*b"Xen\0"), entry];
    // The linker puts the first segment at a page's start: behind the one program header
    // there is room for a second, and for its note.
    let header = index(u64_at(&elf, 32)) + PROGRAM_HEADER;
    let content = header + PROGRAM_HEADER;
    let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
    put(24, &0_u64.to_le_bytes());
    put(56, &2_u16.to_le_bytes());
    put(header, &NOTE.to_le_bytes());
    for (field, value) in [(8, content as u64), (24, 0), (32, 20), (40, 20), (48, 4)] {
        put(header + field, &value.to_le_bytes());
    }
    for (position, word) in note.iter().enumerate() {
        put(content + 4 * position, &word.to_le_bytes());
    }
    elf
}

/// The ELF guest with its segment's address and size in memory replaced: kernels that
/// cannot be placed.
#[must_use]
pub fn with_segment(address: Option<u64>, size: Option<u64>) -> Vec<u8> {
    let mut elf = super::ELF.to_vec();
    if let Some(at) = program_headers(super::ELF).next() {
        if let Some(address) = address {
            elf[at + 24..at + 32].copy_from_slice(&address.to_le_bytes());
        }
        if let Some(size) = size {
            elf[at + 40..at + 48].copy_from_slice(&size.to_le_bytes());
        }
    }
    elf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_is_linked_where_a_bzimage_goes() {
        let (flat, in_memory) = flatten(crate::ELF);
        assert_eq!(u64_at(crate::ELF, 24), LINK_ADDRESS + 0x200, "the 64-bit entry");
        assert!(flat.len() > 0x200 && flat.len() as u64 <= in_memory);
        assert_eq!((flat[0x100], flat[0x200]), (0xfa, 0xfa), "both entries begin with cli");
        let segment = program_headers(crate::ELF).next().map(|at| u64_at(crate::ELF, at + 8));
        assert_eq!(segment, Some(4096), "room for the note of `pvh`");
    }

    #[test]
    fn bzimage_has_its_magic() {
        let image = bzimage();
        assert_eq!(image[0x202..0x206], *b"HdrS");
        assert_eq!(image[2 * SECTOR + 0x200], 0xfa, "the entry, after two sectors");
    }

    #[test]
    fn pattern_does_not_depend_on_where_it_is_cut() {
        let whole = crate::pattern_bytes(7, 0, 100);
        assert_eq!(crate::pattern_bytes(7, 13, 50), whole[13..63]);
    }
}
