//! The CPUID that a vCPU shows its guest: what KVM supports, less what this VMM does not
//! provide, with a topology that says "one package, one thread per core, `vcpus` cores".
//!
//! Sources: Intel SDM vol. 2 (CPUID), AMD APM vol. 3 appendix E, Linux
//! `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaves left out: each reads as zero, which is how a CPU says that it lacks the feature.
/// MONITOR (5), performance counters (0xa, 0x23, 0x80000022), resource control (0xf, 0x10),
/// SGX (0x12), processor trace (0x14), hybrid (0x1a), LBR (0x1c), AMX (0x1d, 0x1e), SVM (0x8000000a),
/// IBS (0x8000001b), memory encryption (0x8000001f), bandwidth enforcement (0x80000020), and the
/// topology leaves that are written anew below or, 0x80000026, have older equivalents.
const DROPPED: [u32; 18] = [
    0x5,
    0xa,
    0xb,
    0xf,
    0x10,
    0x12,
    0x14,
    0x1a,
    0x1c,
    0x1d,
    0x1e,
    0x1f,
    0x23,
    0x8000_000a,
    0x8000_001b,
    0x8000_001f,
    0x8000_0020,
    0x8000_0022,
];
const EXTENDED_TOPOLOGY_AMD: u32 = 0x8000_0026;

/// Leaf 1 ECX: DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, SDBG, PDCM. Nested virtualisation
/// and platform control are not for containers.
const LEAF1_ECX_OFF: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 11 | 1 << 15;
const LEAF1_ECX_X2APIC: u32 = 1 << 21;
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
/// The processor sets it as CR4.OSXSAVE is set; KVM keeps it right from there.
const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: DS, ACPI (thermal), TM, PBE.
const LEAF1_EDX_OFF: u32 = 1 << 21 | 1 << 22 | 1 << 29 | 1 << 31;
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// Leaf 7 (subleaf 0): SGX in EBX, its launch control in ECX; AMX in EDX (BF16, TILE, INT8), whose
/// state KVM gives only to a process that asked the kernel for it.
const LEAF7_EBX_SGX: u32 = 1 << 2;
const LEAF7_ECX_SGX_LC: u32 = 1 << 30;
const LEAF7_EDX_AMX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// Leaf 6 EAX: the APIC timer runs in every power state, the one bit that is about timers.
const LEAF6_EAX_ARAT: u32 = 1 << 2;
/// Leaf 0x80000001 ECX: CmpLegacy; SVM, IBS, SKINIT, WDT, LWP, performance counter extensions.
const EXT1_ECX_CMP_LEGACY: u32 = 1 << 1;
const EXT1_ECX_OFF: u32 =
    1 << 2 | 1 << 10 | 1 << 12 | 1 << 13 | 1 << 15 | 1 << 23 | 1 << 24 | 1 << 26 | 1 << 27 | 1 << 28;
/// KVM's features: asynchronous page faults (ASYNC_PF, _VMEXIT, _INT). A fault in flight would
/// be lost or doubled by a snapshot, and the guest would wait for it for ever.
const KVM_FEATURES_OFF: u32 = 1 << 4 | 1 << 10 | 1 << 14;
const KVM_FEATURES_LEAF: u32 = 0x4000_0001;

const LEVEL_SMT: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// Which processor maker's leaves the host has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Intel,
    Amd,
}

/// The leaves for vCPU `index` of `vcpus`.
pub(super) fn for_vcpu(
    supported: &[kvm_cpuid_entry2],
    vcpus: u8,
    index: u8,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    let highest = supported.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    let vendor = vendor(supported);
    let mut leaves: Vec<_> = supported
        .iter()
        .copied()
        .filter(|e| !DROPPED.contains(&e.function) && e.function != EXTENDED_TOPOLOGY_AMD)
        .collect();
    for leaf in &mut leaves {
        adjust(leaf, vendor, vcpus, index, tsc_deadline);
    }
    for function in [0xb, 0x1f] {
        if highest >= function {
            leaves.extend(topology(function, vcpus, index));
        }
    }
    leaves
}

fn vendor(leaves: &[kvm_cpuid_entry2]) -> Vendor {
    let name = leaves.iter().find(|e| e.function == 0).map(|e| [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes));
    match name.as_ref().map(|n| n.as_flattened()) {
        // Hygon is AMD's design and has AMD's leaves.
        Some(b"AuthenticAMD" | b"HygonGenuine") => Vendor::Amd,
        _ => Vendor::Intel,
    }
}

/// Bits of an APIC id that tell cores apart.
fn core_bits(vcpus: u8) -> u32 {
    u32::from(vcpus).next_power_of_two().trailing_zeros()
}

fn adjust(leaf: &mut kvm_cpuid_entry2, vendor: Vendor, vcpus: u8, index: u8, tsc_deadline: bool) {
    let (id, count) = (u32::from(index), u32::from(vcpus));
    match leaf.function {
        0x1 => {
            leaf.ebx = leaf.ebx & 0xff00_ffff | count << 16;
            leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24;
            leaf.ecx = leaf.ecx & !(LEAF1_ECX_OFF | LEAF1_ECX_OSXSAVE | LEAF1_ECX_TSC_DEADLINE)
                | LEAF1_ECX_X2APIC
                | LEAF1_ECX_HYPERVISOR;
            if tsc_deadline {
                leaf.ecx |= LEAF1_ECX_TSC_DEADLINE;
            }
            leaf.edx &= !(LEAF1_EDX_OFF | LEAF1_EDX_HTT);
            if vcpus > 1 {
                leaf.edx |= LEAF1_EDX_HTT;
            }
        }
        // Intel's cache levels: EAX 4:0 type (0 ends the list), 7:5 level, 25:14 ids that share
        // the cache less one, 31:26 ids of cores in the package less one.
        0x4 if vendor == Vendor::Intel && leaf.eax & 0x1f != 0 => {
            let ids = (1u32 << core_bits(vcpus)) - 1;
            let sharing = if leaf.eax >> 5 & 7 >= 3 { ids } else { 0 };
            leaf.eax = leaf.eax & 0x3fff | sharing << 14 | ids.min(0x3f) << 26;
        }
        0x6 => {
            leaf.eax &= LEAF6_EAX_ARAT;
            (leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0);
        }
        0x7 if leaf.index == 0 => {
            leaf.ebx &= !LEAF7_EBX_SGX;
            leaf.ecx &= !LEAF7_ECX_SGX_LC;
            leaf.edx &= !LEAF7_EDX_AMX;
        }
        KVM_FEATURES_LEAF => leaf.eax &= !KVM_FEATURES_OFF,
        0x8000_0001 => {
            leaf.ecx &= !(EXT1_ECX_OFF | EXT1_ECX_CMP_LEGACY);
            if vendor == Vendor::Amd && vcpus > 1 {
                leaf.ecx |= EXT1_ECX_CMP_LEGACY;
            }
        }
        // ECX 7:0 threads in the package less one, 15:12 bits of the APIC id; Intel: zero.
        0x8000_0008 => {
            leaf.ecx &= !0xf0ff;
            if vendor == Vendor::Amd {
                leaf.ecx |= (count - 1) | core_bits(vcpus) << 12;
            }
        }
        // AMD's cache levels: as leaf 4, without the count of cores.
        0x8000_001d if leaf.eax & 0x1f != 0 => {
            let sharing = if leaf.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
            leaf.eax = leaf.eax & 0x3fff | sharing << 14;
        }
        // EAX the APIC id; EBX 7:0 the core's id, 15:8 threads per core less one; ECX the node.
        0x8000_001e => {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (id, id, 0, 0);
        }
        _ => {}
    }
}

/// Extended topology: a thread level of one, a core level of all, the end of the list.
fn topology(function: u32, vcpus: u8, index: u8) -> impl Iterator<Item = kvm_cpuid_entry2> {
    let level = move |index_of_level: u32, kind: u32, bits: u32, count: u32| kvm_cpuid_entry2 {
        function,
        index: index_of_level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: bits,
        ebx: count,
        ecx: kind << 8 | index_of_level,
        edx: index.into(),
        ..Default::default()
    };
    [level(0, LEVEL_SMT, 0, 1), level(1, LEVEL_CORE, core_bits(vcpus), vcpus.into()), level(2, 0, 0, 0)]
        .into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    const KVM_SIGNATURE_LEAF: u32 = 0x4000_0000;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn word(text: &[u8; 4]) -> u32 {
        u32::from_le_bytes(*text)
    }

    fn intel() -> Vec<kvm_cpuid_entry2> {
        vec![
            leaf(0, 0, [0x1f, word(b"Genu"), word(b"ntel"), word(b"ineI")]),
            leaf(1, 0, [0, 0x0010_0800, u32::MAX, u32::MAX]),
            leaf(4, 0, [0x1c00_4121, 0, 0, 0]),
            leaf(4, 3, [0x1c03_c163, 0, 0, 0]),
            leaf(4, 4, [0, 0, 0, 0]),
            leaf(5, 0, [64, 64, 3, 0]),
            leaf(6, 0, [0x77, 2, 9, 0]),
            leaf(7, 0, [2, u32::MAX, u32::MAX, u32::MAX]),
            leaf(7, 1, [u32::MAX; 4]),
            leaf(0x1d, 0, [1, 0, 0, 0]),
            leaf(0xa, 0, [0x0830_0802, 0, 0, 0x603]),
            leaf(0xb, 0, [1, 2, 0x100, 77]),
            leaf(KVM_SIGNATURE_LEAF, 0, [KVM_FEATURES_LEAF, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")]),
            leaf(KVM_FEATURES_LEAF, 0, [0x0100_7efb, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, u32::MAX, 0]),
            leaf(0x8000_0008, 0, [0x3027, 0, 0xffff, 0]),
        ]
    }

    fn amd() -> Vec<kvm_cpuid_entry2> {
        vec![
            leaf(0, 0, [0xd, word(b"Auth"), word(b"cAMD"), word(b"enti")]),
            leaf(1, 0, [0, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, u32::MAX, 0]),
            leaf(0x8000_0008, 0, [0x3030, 0, 0xffff, 0]),
            leaf(0x8000_000a, 0, [1, 16, 0, 0]),
            leaf(0x8000_001d, 0, [0x4121, 0, 0, 0]),
            leaf(0x8000_001d, 3, [0x3c163, 0, 0, 0]),
            leaf(0x8000_001e, 0, [9, 9, 9, 9]),
        ]
    }

    fn get(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    fn has(leaves: &[kvm_cpuid_entry2], function: u32) -> bool {
        leaves.iter().any(|e| e.function == function)
    }

    #[test]
    fn leaf_1_names_the_vcpu_and_hides_nested_virtualisation() {
        let leaves = for_vcpu(&intel(), 4, 3, true);
        let one = get(&leaves, 1, 0);
        assert_eq!(one.ebx, 0x0304_0800, "APIC id 3, 4 ids, CLFLUSH size kept");
        assert_eq!(one.ecx & LEAF1_ECX_OFF, 0);
        assert_ne!(one.ecx & LEAF1_ECX_HYPERVISOR, 0);
        assert_ne!(one.ecx & LEAF1_ECX_X2APIC, 0);
        assert_ne!(one.ecx & LEAF1_ECX_TSC_DEADLINE, 0);
        assert_eq!(one.ecx & LEAF1_ECX_OSXSAVE, 0);
        assert_ne!(one.edx & LEAF1_EDX_HTT, 0);
        assert_eq!(get(&leaves, 0x8000_0001, 0).ecx & EXT1_ECX_OFF, 0);
    }

    #[test]
    fn a_single_vcpu_is_not_multithreaded() {
        let leaves = for_vcpu(&intel(), 1, 0, false);
        let one = get(&leaves, 1, 0);
        assert_eq!(one.edx & LEAF1_EDX_HTT, 0);
        assert_eq!(one.ecx & LEAF1_ECX_TSC_DEADLINE, 0, "KVM has no such timer here");
        assert_eq!(get(&leaves, 0xb, 1).eax, 0);
        assert_eq!(get(&leaves, 0xb, 1).ebx, 1);
    }

    #[test]
    fn topology_levels_cover_all_cores() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (32, 5)] {
            for index in 0..vcpus {
                let leaves = for_vcpu(&intel(), vcpus, index, true);
                for function in [0xb, 0x1f] {
                    let (smt, core) = (get(&leaves, function, 0), get(&leaves, function, 1));
                    assert_eq!((smt.eax, smt.ebx, smt.ecx), (0, 1, 0x100));
                    assert_eq!((core.eax, core.ebx, core.ecx), (bits, vcpus.into(), 0x201));
                    assert_eq!(get(&leaves, function, 2).ecx, 2);
                    assert_eq!((smt.edx, core.edx), (index.into(), index.into()));
                    assert_eq!(smt.flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
                }
                assert_eq!(leaves.iter().filter(|e| e.function == 0xb).count(), 3, "the host's are gone");
            }
        }
    }

    #[test]
    fn caches_are_private_up_to_level_2_and_shared_at_level_3() {
        let leaves = for_vcpu(&intel(), 4, 0, true);
        let fields = |index| {
            let eax = get(&leaves, 4, index).eax;
            (eax & 0x1f, eax >> 5 & 7, eax >> 14 & 0xfff, eax >> 26)
        };
        assert_eq!(fields(0), (1, 1, 0, 3));
        assert_eq!(fields(3), (3, 3, 3, 3));
        assert_eq!(get(&leaves, 4, 4).eax, 0, "the end of the list stays the end");
        let leaves = for_vcpu(&amd(), 4, 0, true);
        assert_eq!(get(&leaves, 0x8000_001d, 0).eax >> 14 & 0xfff, 0);
        assert_eq!(get(&leaves, 0x8000_001d, 3).eax >> 14 & 0xfff, 3);
    }

    #[test]
    fn amd_leaves_carry_the_amd_topology() {
        let leaves = for_vcpu(&amd(), 4, 2, true);
        assert_eq!(get(&leaves, 0x8000_0008, 0).ecx, 0x2f03);
        let node = get(&leaves, 0x8000_001e, 0);
        assert_eq!((node.eax, node.ebx, node.ecx, node.edx), (2, 2, 0, 0));
        assert_ne!(get(&leaves, 0x8000_0001, 0).ecx & EXT1_ECX_CMP_LEGACY, 0);
        assert!(!has(&leaves, 0x8000_000a));
        assert!(has(&leaves, 0xb), "AMD has it too");
        assert!(!has(&leaves, 0x1f), "beyond the highest leaf");
    }

    #[test]
    fn features_that_are_not_provided_are_gone() {
        let leaves = for_vcpu(&intel(), 2, 0, true);
        assert!(!has(&leaves, 5) && !has(&leaves, 0xa) && !has(&leaves, 0x1d));
        let seven = get(&leaves, 7, 0);
        assert_eq!((seven.eax, seven.ebx, seven.ecx, seven.edx), (2, !(1 << 2), !(1 << 30), !0x0340_0000));
        assert_eq!(get(&leaves, 7, 1).edx, u32::MAX, "another subleaf, other bits");
        let six = get(&leaves, 6, 0);
        assert_eq!((six.eax, six.ebx, six.ecx, six.edx), (LEAF6_EAX_ARAT, 0, 0, 0));
        assert_eq!(get(&leaves, KVM_FEATURES_LEAF, 0).eax & KVM_FEATURES_OFF, 0);
        assert_eq!(get(&leaves, KVM_FEATURES_LEAF, 0).eax & 0x9, 0x9, "kvmclock stays");
        assert!(has(&leaves, KVM_SIGNATURE_LEAF));
        assert_eq!(get(&leaves, 0x8000_0008, 0).ecx & 0xf0ff, 0, "reserved on Intel");
    }
}
