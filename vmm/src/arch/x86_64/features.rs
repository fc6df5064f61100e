//! Whether a host's processor can do what a saved guest was told that it can.
//!
//! Compared are the bits that say "there is", leaf by leaf; each that the guest has seen must be there. Identity (family, model,
//! brand, cache sizes) may differ: the guest goes on with the leaves that it had.

use std::fmt;

use kvm_bindings::kvm_cpuid_entry2;

/// A register of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// Leaf, subleaf, register, and which of its bits are features.
type Word = (u32, u32, Register, u32);

/// Left out of leaf 1: OSXSAVE, which mirrors CR4, and of leaf 7 OSPKE, likewise.
const WORDS: [Word; 18] = [
    (0x1, 0, Ecx, !(1 << 27)),
    (0x1, 0, Edx, u32::MAX),
    (0x7, 0, Ebx, u32::MAX),
    (0x7, 0, Ecx, !(1 << 4)),
    (0x7, 0, Edx, u32::MAX),
    (0x7, 1, Eax, u32::MAX),
    (0x7, 1, Edx, u32::MAX),
    (0x7, 2, Edx, u32::MAX),
    (0xd, 0, Eax, u32::MAX),
    (0xd, 0, Edx, u32::MAX),
    (0xd, 1, Eax, u32::MAX),
    (0xd, 1, Ecx, u32::MAX),
    (0x4000_0001, 0, Eax, u32::MAX),
    (0x8000_0001, 0, Ecx, u32::MAX),
    (0x8000_0001, 0, Edx, u32::MAX),
    (0x8000_0007, 0, Edx, u32::MAX),
    (0x8000_0008, 0, Ebx, u32::MAX),
    (0x8000_0021, 0, Eax, u32::MAX),
];

/// Names of what programs most often miss (Intel SDM vol. 2, CPUID).
const NAMES: [(u32, u32, Register, u32, &str); 40] = [
    (0x1, 0, Ecx, 0, "SSE3"),
    (0x1, 0, Ecx, 1, "PCLMULQDQ"),
    (0x1, 0, Ecx, 9, "SSSE3"),
    (0x1, 0, Ecx, 12, "FMA"),
    (0x1, 0, Ecx, 13, "CMPXCHG16B"),
    (0x1, 0, Ecx, 17, "PCID"),
    (0x1, 0, Ecx, 19, "SSE4.1"),
    (0x1, 0, Ecx, 20, "SSE4.2"),
    (0x1, 0, Ecx, 21, "x2APIC"),
    (0x1, 0, Ecx, 22, "MOVBE"),
    (0x1, 0, Ecx, 23, "POPCNT"),
    (0x1, 0, Ecx, 24, "the TSC deadline timer"),
    (0x1, 0, Ecx, 25, "AES"),
    (0x1, 0, Ecx, 26, "XSAVE"),
    (0x1, 0, Ecx, 28, "AVX"),
    (0x1, 0, Ecx, 29, "F16C"),
    (0x1, 0, Ecx, 30, "RDRAND"),
    (0x7, 0, Ebx, 0, "FSGSBASE"),
    (0x7, 0, Ebx, 3, "BMI1"),
    (0x7, 0, Ebx, 5, "AVX2"),
    (0x7, 0, Ebx, 7, "SMEP"),
    (0x7, 0, Ebx, 8, "BMI2"),
    (0x7, 0, Ebx, 9, "ERMS"),
    (0x7, 0, Ebx, 10, "INVPCID"),
    (0x7, 0, Ebx, 16, "AVX512F"),
    (0x7, 0, Ebx, 18, "RDSEED"),
    (0x7, 0, Ebx, 20, "SMAP"),
    (0x7, 0, Ebx, 29, "SHA"),
    (0x7, 0, Ebx, 30, "AVX512BW"),
    (0x7, 0, Ebx, 31, "AVX512VL"),
    (0x7, 0, Ecx, 2, "UMIP"),
    (0x7, 0, Ecx, 3, "PKU"),
    (0x7, 0, Ecx, 9, "VAES"),
    (0x7, 0, Ecx, 16, "five-level paging"),
    (0xd, 1, Eax, 3, "XSAVES"),
    (0x4000_0001, 0, Eax, 3, "kvmclock"),
    (0x8000_0001, 0, Edx, 20, "no-execute pages"),
    (0x8000_0001, 0, Edx, 26, "pages of 1 GiB"),
    (0x8000_0001, 0, Edx, 27, "RDTSCP"),
    (0x8000_0007, 0, Edx, 8, "an invariant TSC"),
];

/// What a host lacks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mismatch {
    Vendor { saved: String, host: String },
    Feature { leaf: u32, subleaf: u32, register: &'static str, bit: u32, name: Option<&'static str> },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor { saved, host } => write!(f, "a processor of {saved:?} (it is of {host:?})"),
            Self::Feature { leaf, subleaf, register, bit, name } => {
                if let Some(name) = name {
                    write!(f, "{name}, ")?;
                }
                write!(f, "CPUID {leaf:#x}.{subleaf} {register} bit {bit}")
            }
        }
    }
}

fn leaf(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    leaves.iter().find(|leaf| leaf.function == function && leaf.index == index)
}

fn word(leaves: &[kvm_cpuid_entry2], (function, index, register, _): Word) -> u32 {
    let Some(leaf) = leaf(leaves, function, index) else { return 0 };
    match register {
        Eax => leaf.eax,
        Ebx => leaf.ebx,
        Ecx => leaf.ecx,
        Edx => leaf.edx,
    }
}

fn vendor(leaves: &[kvm_cpuid_entry2]) -> String {
    let name = leaf(leaves, 0, 0).map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes));
    name.map_or_else(String::new, |name| String::from_utf8_lossy(name.as_flattened()).into_owned())
}

/// Checks that `host` has every feature of `saved`.
pub(super) fn compare(saved: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Result<(), Mismatch> {
    let (from, here) = (vendor(saved), vendor(host));
    if from != here {
        return Err(Mismatch::Vendor { saved: from, host: here });
    }
    for place in WORDS {
        let missing = word(saved, place) & !word(host, place) & place.3;
        if missing != 0 {
            return Err(feature(place, missing.trailing_zeros()));
        }
    }
    Ok(())
}

fn feature((leaf, subleaf, register, _): Word, bit: u32) -> Mismatch {
    let known = NAMES.iter().find(|(l, s, r, b, _)| (*l, *s, *r, *b) == (leaf, subleaf, register, bit));
    let name = known.map(|(.., name)| *name);
    let register = match register {
        Eax => "EAX",
        Ebx => "EBX",
        Ecx => "ECX",
        Edx => "EDX",
    };
    Mismatch::Feature { leaf, subleaf, register, bit, name }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(avx2: bool) -> Vec<kvm_cpuid_entry2> {
        let vendor = |text: &[u8; 4]| u32::from_le_bytes(*text);
        vec![
            kvm_cpuid_entry2 {
                ebx: vendor(b"Genu"),
                edx: vendor(b"ineI"),
                ecx: vendor(b"ntel"),
                ..Default::default()
            },
            kvm_cpuid_entry2 { function: 1, ecx: 1 << 28, ..Default::default() },
            kvm_cpuid_entry2 { function: 7, ebx: u32::from(avx2) << 5, ..Default::default() },
        ]
    }

    #[test]
    fn a_host_with_more_will_do() {
        compare(&host(false), &host(true)).unwrap();
        compare(&host(true), &host(true)).unwrap();
    }

    #[test]
    fn a_missing_feature_is_named() {
        let mismatch = compare(&host(true), &host(false)).unwrap_err();
        assert_eq!(mismatch.to_string(), "AVX2, CPUID 0x7.0 EBX bit 5");
    }

    #[test]
    fn another_maker_s_processor_is_refused() {
        let mut other = host(true);
        other[0].ecx = 0;
        assert!(matches!(compare(&host(true), &other), Err(Mismatch::Vendor { .. })));
    }

    #[test]
    fn what_only_mirrors_a_control_register_is_not_compared() {
        let mut saved = host(true);
        saved[1].ecx |= 1 << 27;
        compare(&saved, &host(true)).unwrap();
    }
}
