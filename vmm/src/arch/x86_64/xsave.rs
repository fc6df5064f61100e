#![allow(unsafe_code)] // KVM writes and reads an area whose size it names elsewhere
//! The XSAVE area of a vCPU, as 32-bit words.

use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::VcpuFd;

/// Words of the area that every KVM has.
const FIXED: usize = size_of::<kvm_xsave>() / 4;

/// Words of this host's area, whose bytes KVM_CAP_XSAVE2 tells; 0 where it does not know that.
pub(super) fn words(bytes: usize) -> usize {
    FIXED.max(bytes.div_ceil(4))
}

fn area(words: usize) -> Result<Xsave, kvm_ioctls::Error> {
    Xsave::new(words - FIXED).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

/// Reads the area, which has `words` words on this host.
pub(super) fn get(vcpu: &VcpuFd, words: usize) -> Result<Vec<u32>, kvm_ioctls::Error> {
    if words <= FIXED {
        return Ok(vcpu.get_xsave()?.region.to_vec());
    }
    let mut xsave = area(words)?;
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 told for this VM, which is all that
    // KVM_GET_XSAVE2 writes: this process asks for no dynamically enabled state.
    unsafe { vcpu.get_xsave2(&mut xsave) }?;
    Ok([&xsave.as_fam_struct_ref().xsave.region[..], xsave.as_slice()].concat())
}

/// Sets the area from `saved`; what it lacks is zero, what is beyond the host's is left out.
pub(super) fn set(vcpu: &VcpuFd, words: usize, saved: &[u32]) -> Result<(), kvm_ioctls::Error> {
    let mut xsave = area(words)?;
    let (fixed, extra) = saved.split_at(saved.len().min(FIXED));
    // SAFETY: `region` is no part of what the wrapper keeps its length in.
    unsafe { xsave.as_mut_fam_struct() }.xsave.region[..fixed.len()].copy_from_slice(fixed);
    let room = extra.len().min(words - FIXED);
    xsave.as_mut_slice()[..room].copy_from_slice(&extra[..room]);
    // SAFETY: the area has this host's whole size, which is all that KVM_SET_XSAVE reads; KVM checks what is in it.
    unsafe { vcpu.set_xsave2(&xsave) }
}
