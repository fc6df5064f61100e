#![allow(unsafe_code)] // reads the parts of kvm_run that kvm-ioctls does not hand over
//! One entry into the guest, and what its exit asks for.

use kvm_bindings::{KVM_EXIT_IO, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{ExitCounters, Shared};
use crate::api::EndReason;
use crate::{arch, log};

/// What the run loop does next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Enter the guest again.
    Go,
    /// Something outside wants attention; any access that was under way is complete.
    Interrupted,
    End(EndReason),
}

static UNMAPPED_READ: log::Limited = log::Limited::new();
static UNMAPPED_WRITE: log::Limited = log::Limited::new();

/// Enters the guest until its next exit and serves that.
pub(super) fn step(vcpu: &mut VcpuFd, index: u8, shared: &Shared) -> Step {
    let counters = &shared.counters;
    match vcpu.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            ExitCounters::count(&counters.pio);
            let (data, length) = (data.as_mut_ptr(), data.len());
            let width = access_width(vcpu, length);
            // SAFETY: `data .. data + length` is the I/O area of the mapped kvm_run, as
            // kvm-ioctls returned it; nobody else touches it until KVM_RUN is called again.
            let data = unsafe { std::slice::from_raw_parts_mut(data, length) };
            for item in data.chunks_mut(width) {
                shared.pio.read(port, item);
            }
            Step::Go
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            ExitCounters::count(&counters.pio);
            let (data, length) = (data.as_ptr(), data.len());
            let width = access_width(vcpu, length);
            // SAFETY: as above.
            let data = unsafe { std::slice::from_raw_parts(data, length) };
            for item in data.chunks(width) {
                shared.pio.write(port, item);
            }
            Step::Go
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            ExitCounters::count(&counters.mmio);
            if !shared.mmio.read(address, data) {
                UNMAPPED_READ.warn("vcpu", format_args!("guest read of {address:#x}, where nothing is"));
            }
            Step::Go
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            ExitCounters::count(&counters.mmio);
            if !shared.mmio.write(address, data) {
                UNMAPPED_WRITE.warn("vcpu", format_args!("guest write of {address:#x}, where nothing is"));
            }
            Step::Go
        }
        Ok(VcpuExit::Hlt) => {
            ExitCounters::count(&counters.hlt);
            Step::Go
        }
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {
            ExitCounters::count(&counters.interrupted);
            Step::Interrupted
        }
        Ok(VcpuExit::Shutdown) => {
            ExitCounters::count(&counters.other);
            Step::End(EndReason::TripleFault { vcpu: index, registers: arch::describe_registers(vcpu) })
        }
        Ok(VcpuExit::SystemEvent(kind, _)) => {
            ExitCounters::count(&counters.other);
            match kind {
                KVM_SYSTEM_EVENT_SHUTDOWN => Step::End(EndReason::Shutdown),
                KVM_SYSTEM_EVENT_RESET => Step::End(EndReason::Reset),
                KVM_SYSTEM_EVENT_CRASH => failure(vcpu, index, "the guest reported a crash".into()),
                other => failure(vcpu, index, format!("unknown system event {other}")),
            }
        }
        Ok(VcpuExit::InternalError) => {
            ExitCounters::count(&counters.other);
            let detail = internal_error(vcpu);
            failure(vcpu, index, detail)
        }
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            ExitCounters::count(&counters.other);
            failure(
                vcpu,
                index,
                format!("KVM cannot enter the guest: hardware reason {reason:#x} on CPU {cpu}"),
            )
        }
        Ok(other) => {
            ExitCounters::count(&counters.other);
            let detail = format!("KVM exit that this VMM does not know: {other:?}");
            failure(vcpu, index, detail)
        }
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
            ExitCounters::count(&counters.interrupted);
            Step::Interrupted
        }
        Err(error) => {
            ExitCounters::count(&counters.other);
            failure(vcpu, index, format!("KVM_RUN: {error}"))
        }
    }
}

fn failure(vcpu: &VcpuFd, index: u8, detail: String) -> Step {
    let registers = Some(arch::describe_registers(vcpu));
    Step::End(EndReason::InternalError { vcpu: Some(index), detail, registers })
}

/// Bytes of one access of a port exit, which may stand for many by a string instruction.
fn access_width(vcpu: &mut VcpuFd, length: usize) -> usize {
    let run = vcpu.get_kvm_run();
    debug_assert_eq!(run.exit_reason, KVM_EXIT_IO);
    // SAFETY: the exit reason is KVM_EXIT_IO (that is when kvm-ioctls returns a port exit), so
    // `io` is the member that KVM filled in.
    let size = unsafe { run.__bindgen_anon_1.io.size };
    usize::from(size).clamp(1, length.max(1))
}

/// KVM's own account of an internal error.
fn internal_error(vcpu: &mut VcpuFd) -> String {
    let run = vcpu.get_kvm_run();
    // SAFETY: called for KVM_EXIT_INTERNAL_ERROR only, for which KVM fills in `internal`.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let kind = match internal.suberror {
        1 => "an instruction that KVM cannot emulate",
        2 => "an exception while an event was delivered",
        3 => "an error while an event was delivered",
        4 => "an exit that KVM did not expect",
        _ => "an error of a kind that this VMM does not know",
    };
    let count = usize::try_from(internal.ndata).unwrap_or_default();
    let data: Vec<String> = internal.data.iter().take(count).map(|word| format!("{word:#x}")).collect();
    format!("KVM met {kind} (suberror {}, data [{}])", internal.suberror, data.join(" "))
}
