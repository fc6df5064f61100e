use std::io::{Seek as _, Write as _};
use std::process::{Command, Stdio};

use super::*;
use crate::elf::tests::static_agent;

/// A bzImage with one setup sector around `payload`.
pub(crate) fn bzimage(release: &str, payload: &[u8]) -> Vec<u8> {
    let mut data = vec![0_u8; 2 * SECTOR];
    data[SETUP_SECTS] = 1;
    data[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
    data[VERSION..VERSION + 2].copy_from_slice(&0x020f_u16.to_le_bytes());
    data[KERNEL_VERSION..KERNEL_VERSION + 2].copy_from_slice(&0x100_u16.to_le_bytes());
    let text = format!("{release} (builder) #1 SMP\0");
    data[0x300..0x300 + text.len()].copy_from_slice(text.as_bytes());
    data[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16_u32.to_le_bytes());
    data[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4]
        .copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    data.extend([0x90; 16]);
    data.extend(payload);
    data.extend([0xcc; 64]);
    data
}

/// `data` packed as the kernel's build does it; nothing when the tool is not installed.
fn packed(tool: &str, args: &[&str], data: &[u8]) -> Option<Vec<u8>> {
    let mut input = tempfile::tempfile().unwrap();
    input.write_all(data).unwrap();
    input.rewind().unwrap();
    let Ok(output) = Command::new(tool).args(args).stdin(input).stderr(Stdio::null()).output() else {
        eprintln!("skipped: no {tool} program on this machine");
        return None;
    };
    let mut packed = output.stdout;
    if tool != "gzip" {
        packed.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
    }
    Some(packed)
}

#[test]
fn every_compression_of_the_kernel_unpacks() {
    let kernel = static_agent();
    let lean = elf::lean_kernel(kernel.clone()).unwrap();
    let path = Path::new("bzImage");
    let ways: [(&str, &[&str]); 4] =
        [("gzip", &["-nc"]), ("xz", &["--check=crc32", "-c"]), ("zstd", &["-qc"]), ("lz4", &["-lqc"])];
    for (tool, args) in ways {
        let Some(payload) = packed(tool, args, &kernel) else { continue };
        let image = bzimage("6.12.1+deb13-cloud-amd64", &payload);
        let setup = parse(&image).unwrap();
        assert_eq!(setup.release, "6.12.1+deb13-cloud-amd64");
        assert_eq!(setup.unpack(path).unwrap(), lean, "{tool}");
    }
    let image = bzimage("6.12", &kernel);
    assert_eq!(parse(&image).unwrap().unpack(path).unwrap(), lean, "not compressed");
}

#[test]
fn a_hostile_setup_header_is_refused() {
    let good = bzimage("6.12", &static_agent());
    assert_eq!(parse(&good[..0x200]), Err(KernelError::Short { found: 0x200, min: MIN_HEADER }));
    assert_eq!(parse(&vec![0; 4096]), Err(KernelError::Magic { found: [0; 4] }));

    let mut old = good.clone();
    old[VERSION] = 7;
    old[VERSION + 1] = 2;
    assert_eq!(parse(&old), Err(KernelError::Protocol { found: 0x0207 }));

    for (offset, length) in
        [(u32::MAX, u32::MAX), (0, u32::MAX), (u32::MAX, 16), (1 << 20, 16), (0, 0), (0, 7)]
    {
        let mut image = good.clone();
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&offset.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        assert!(matches!(parse(&image), Err(KernelError::PayloadRange { .. })), "{offset} {length}");
    }
    let mut image = good.clone();
    image[SETUP_SECTS] = 255;
    assert!(matches!(parse(&image), Err(KernelError::PayloadRange { .. })));

    for version in [0xffff_u16, 0x3f0, 0] {
        let mut image = good.clone();
        image[KERNEL_VERSION..KERNEL_VERSION + 2].copy_from_slice(&version.to_le_bytes());
        assert!(matches!(parse(&image), Err(KernelError::Version { .. })), "{version:#x}");
    }
    for release in ["../../etc", "..", "a/b", "\u{1b}[2J"] {
        assert!(matches!(parse(&bzimage(release, &good)), Err(KernelError::Version { .. })), "{release:?}");
    }
}

#[test]
fn a_hostile_payload_is_refused() {
    let path = Path::new("bzImage");
    let unpack = |payload: &[u8]| parse(&bzimage("6.12", payload)).unwrap().unpack(path).unwrap_err();
    let kernel_error = |payload: &[u8]| match unpack(payload) {
        Error::Kernel { source, .. } => source,
        other => panic!("{other}"),
    };
    assert_eq!(kernel_error(b"BZh91AY&SY..."), KernelError::PayloadFormat { found: *b"BZh91A" });
    assert_eq!(
        kernel_error(b"\x1f\x8b\x08\x00\xff\xff\xff\xff"),
        KernelError::PayloadSize { found: 0xffff_ffff, max: MAX_UNPACKED }
    );
    assert!(matches!(kernel_error(b"\x7fELF....."), KernelError::PayloadElf(_)));
    assert!(matches!(unpack(b"\x1f\x8b\x08\x00garbage\x10\x00\x00\x00"), Error::ToolFailed { .. }));

    // A bomb: unpacks to far more than its trailer says.
    if let Some(mut bomb) = packed("gzip", &["-nc"], &vec![0; 8 << 20]) {
        let end = bomb.len();
        bomb[end - 4..].copy_from_slice(&64_u32.to_le_bytes());
        assert!(matches!(unpack(&bomb), Error::TooLarge { max: 64, .. }));
    }
    if let Some(mut short) = packed("xz", &["--check=crc32", "-c"], &static_agent()) {
        let end = short.len();
        short[end - 4..].copy_from_slice(&4096_u32.to_le_bytes());
        assert!(matches!(kernel_error(&short), KernelError::PayloadMismatch { expected: 4096, .. }));
    }
}
