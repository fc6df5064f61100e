//! The body of a vCPU thread: run, park, stop.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_ioctls::VcpuFd;

use super::exit::{Step, step};
use super::handle::{Control, KickTarget, Wanted};
use super::{ExitCounters, Shared};
use crate::{arch, clock, log};

static UNEXCUSED: log::Limited = log::Limited::new();

/// Runs until told to stop or until the VM ends. Returns on the vCPU's own thread.
pub(super) fn run(mut vcpu: VcpuFd, index: u8, shared: &Shared, control: &Control) {
    // Declared after `vcpu`, so gone before it: the signal handler never sees a stale pointer.
    let _target = KickTarget::register(&mut vcpu);
    loop {
        match control.park() {
            Wanted::Run => {}
            Wanted::Save => {
                control.saved(arch::save_vcpu(&vcpu, &shared.list));
                continue;
            }
            Wanted::Park | Wanted::Stop => return,
        }
        if index == 0 && shared.counters.entered_ns.load(Ordering::Relaxed) == 0 {
            shared.counters.entered_ns.store(clock::monotonic_ns(), Ordering::Relaxed);
        }
        excuse_absence(&vcpu);
        while control.wanted() == Wanted::Run && !shared.end.is_set() {
            match step(&mut vcpu, index, shared) {
                Step::Go => {}
                // Cleared before `wanted` is looked at again: a kick in between sets it anew.
                Step::Interrupted => vcpu.set_kvm_immediate_exit(0),
                Step::End(reason) => shared.end.set(reason),
            }
        }
        if shared.end.is_set() {
            // What the guest did last was to end; it shall do nothing more.
            return;
        }
        complete_access(&mut vcpu, index, shared);
    }
}

/// Tells a guest that it may have been stopped for a while, so that its watchdogs do not take the
/// pause for a lockup. A guest without kvmclock (EINVAL), as before its boot, cannot be told.
fn excuse_absence(vcpu: &VcpuFd) {
    if let Err(error) = vcpu.kvmclock_ctrl()
        && error.errno() != libc::EINVAL
    {
        UNEXCUSED.warn("vcpu", format_args!("KVM_KVMCLOCK_CTRL: {error}"));
    }
}

/// Lets KVM finish an access whose exit was served but not yet carried back into the guest's
/// registers: state read before that would be torn.
fn complete_access(vcpu: &mut VcpuFd, index: u8, shared: &Shared) {
    loop {
        vcpu.set_kvm_immediate_exit(1);
        let done = step(vcpu, index, shared);
        vcpu.set_kvm_immediate_exit(0);
        match done {
            // The access had a second half, such as an unaligned one over two pages.
            Step::Go => {}
            Step::Interrupted => return,
            Step::End(reason) => {
                shared.end.set(reason);
                return;
            }
        }
    }
}

/// As [`run`], turning a panic into the VM's end instead of a silent loss of a processor.
pub(super) fn run_guarded(vcpu: VcpuFd, index: u8, shared: &Shared, control: &Arc<Control>) {
    let body = std::panic::AssertUnwindSafe(|| run(vcpu, index, shared, control));
    if std::panic::catch_unwind(body).is_err() {
        let detail = "a vCPU thread of the VMM panicked; its message is in the VMM's log".to_owned();
        shared.end.set(crate::api::EndReason::InternalError { vcpu: Some(index), detail, registers: None });
        ExitCounters::count(&shared.counters.other);
    }
    control.finished();
}
