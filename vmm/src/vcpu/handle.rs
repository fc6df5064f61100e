#![allow(unsafe_code)] // the signal handler that makes KVM_RUN return
//! The outside of a vCPU thread: start, pause, resume, stop.
//!
//! A kick is a real-time signal. Its handler sets `immediate_exit` in the thread's own
//! `kvm_run`, so that a kick that arrives just before KVM_RUN makes it return too. The request
//! stands in [`Control`], which the thread looks at after every exit; whoever asked waits on
//! its condition variable.
//!
//! Owned by the event loop. No lock is held while a device is called.

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{Shared, run_loop};
use crate::arch::{SaveStateError, VcpuState};

/// The signal, relative to SIGRTMIN.
const KICK: i32 = 1;
/// Between repeated kicks of a thread that has not answered.
const KICK_AGAIN: Duration = Duration::from_millis(50);
/// Enough for the deepest path, a device's register write, many times over.
const STACK: usize = 256 * 1024;

/// Faults of vCPU threads.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    #[error("vCPU threads: installing the signal handler: {0}")]
    Signal(#[source] vmm_sys_util::errno::Error),
    #[error("vCPU {index}: starting its thread: {source}")]
    Spawn { index: u8, source: io::Error },
    #[error("vCPU {index}: {source}")]
    Save { index: u8, source: SaveStateError },
    #[error("vCPU {index} has ended, so it has no state; the guest's end follows")]
    Gone { index: u8 },
    #[error("vCPU {index} did not leave the guest within {waited:?}")]
    Stuck { index: u8, waited: Duration },
}

thread_local! {
    /// Where this thread's `immediate_exit` is, while it has a vCPU.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let target = IMMEDIATE_EXIT.get();
    if !target.is_null() {
        // SAFETY: KickTarget holds that a pointer that is not null points into a live kvm_run
        // of this very thread; a volatile byte store is async-signal-safe.
        unsafe { target.write_volatile(1) };
    }
}

/// Installs the handler, once per process, before the first vCPU.
pub fn install_kick() -> Result<(), VcpuError> {
    register_signal_handler(SIGRTMIN() + KICK, on_kick).map_err(VcpuError::Signal)
}

/// Tells the handler of this thread's vCPU for as long as it lives.
#[derive(Debug)]
pub(super) struct KickTarget(());

impl KickTarget {
    /// The caller drops the result before `vcpu`.
    pub(super) fn register(vcpu: &mut VcpuFd) -> Self {
        IMMEDIATE_EXIT.set(&raw mut vcpu.get_kvm_run().immediate_exit);
        Self(())
    }
}

impl Drop for KickTarget {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }
}

/// What a vCPU thread is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Wanted {
    Park,
    Run,
    Stop,
    /// Read the vCPU's state, and park again.
    Save,
}

/// What it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Parked,
    Running,
    Finished,
}

/// The request and the answer.
#[derive(Debug)]
pub(super) struct Control {
    wanted: AtomicU8,
    doing: Mutex<Doing>,
    changed: Condvar,
    /// What [`Wanted::Save`] gave.
    state: Mutex<Option<Result<VcpuState, SaveStateError>>>,
}

impl Control {
    fn new() -> Self {
        Self {
            wanted: AtomicU8::new(Wanted::Park as u8),
            doing: Mutex::new(Doing::Running),
            changed: Condvar::new(),
            state: Mutex::new(None),
        }
    }

    fn doing(&self) -> MutexGuard<'_, Doing> {
        self.doing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wanted(&self) -> Wanted {
        match self.wanted.load(Ordering::Acquire) {
            v if v == Wanted::Park as u8 => Wanted::Park,
            v if v == Wanted::Run as u8 => Wanted::Run,
            v if v == Wanted::Save as u8 => Wanted::Save,
            _ => Wanted::Stop,
        }
    }

    /// Changed under the lock, so that a thread about to wait does not miss it.
    fn want(&self, wanted: Wanted) {
        let _doing = self.doing();
        self.wanted.store(wanted as u8, Ordering::Release);
        self.changed.notify_all();
    }

    /// On the vCPU's thread: waits until something other than parking is wanted.
    pub(super) fn park(&self) -> Wanted {
        let mut doing = self.doing();
        loop {
            let wanted = self.wanted();
            if wanted != Wanted::Park {
                *doing = Doing::Running;
                return wanted;
            }
            *doing = Doing::Parked;
            self.changed.notify_all();
            doing = self.changed.wait(doing).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// On the vCPU's thread: hands over what was read, and goes on to park unless something else is wanted by now.
    pub(super) fn saved(&self, state: Result<VcpuState, SaveStateError>) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
        let _doing = self.doing();
        if self.wanted() == Wanted::Save {
            self.wanted.store(Wanted::Park as u8, Ordering::Release);
        }
    }

    /// On the vCPU's thread, last.
    pub(super) fn finished(&self) {
        *self.doing() = Doing::Finished;
        self.changed.notify_all();
    }
}

/// One vCPU and its thread.
#[derive(Debug)]
pub struct VcpuHandle {
    index: u8,
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuHandle {
    /// Starts the thread, parked.
    pub fn spawn(vcpu: VcpuFd, index: u8, shared: Shared) -> Result<Self, VcpuError> {
        let control = Arc::new(Control::new());
        let theirs = Arc::clone(&control);
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(STACK)
            .spawn(move || run_loop::run_guarded(vcpu, index, &shared, &theirs))
            .map_err(|source| VcpuError::Spawn { index, source })?;
        Ok(Self { index, control, thread: Some(thread) })
    }

    pub fn resume(&self) {
        self.control.want(Wanted::Run);
    }

    /// Asks for a pause; [`Self::wait`] waits for it.
    pub fn pause(&self) {
        self.control.want(Wanted::Park);
        self.kick();
    }

    /// Asks a parked vCPU for its state; [`Self::saved`] waits for it.
    pub fn save(&self) {
        self.control.want(Wanted::Save);
    }

    /// The state that [`Self::save`] asked for.
    pub fn saved(&self, deadline: Instant) -> Result<VcpuState, VcpuError> {
        self.wait(deadline)?;
        let state = self.control.state.lock().unwrap_or_else(PoisonError::into_inner).take();
        let state = state.ok_or(VcpuError::Gone { index: self.index })?;
        state.map_err(|source| VcpuError::Save { index: self.index, source })
    }

    /// Asks for the thread's end; [`Self::wait`] waits for it.
    pub fn stop(&self) {
        self.control.want(Wanted::Stop);
        self.kick();
    }

    /// Waits until the vCPU is out of the guest: parked, or finished.
    pub fn wait(&self, deadline: Instant) -> Result<(), VcpuError> {
        let start = Instant::now();
        let mut doing = self.control.doing();
        let busy = |doing| {
            let wanted = self.control.wanted();
            doing == Doing::Running || doing == Doing::Parked && matches!(wanted, Wanted::Stop | Wanted::Save)
        };
        while busy(*doing) {
            let now = Instant::now();
            if now >= deadline {
                return Err(VcpuError::Stuck { index: self.index, waited: now - start });
            }
            let (next, timeout) = self
                .control
                .changed
                .wait_timeout(doing, KICK_AGAIN.min(deadline - now))
                .unwrap_or_else(PoisonError::into_inner);
            doing = next;
            if timeout.timed_out() {
                self.kick();
            }
        }
        Ok(())
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // The thread is not joined, so its id is valid; one that has ended needs no kick.
            let _ = thread.kill(SIGRTMIN() + KICK);
        }
    }

    /// Joins a thread that has finished.
    fn join(&mut self) {
        if *self.control.doing() == Doing::Finished
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

/// Stops all vCPUs of a VM. The first that does not stop is the error; its thread is left.
pub(crate) fn stop_all(vcpus: &mut [VcpuHandle], patience: Duration) -> Result<(), VcpuError> {
    let deadline = Instant::now() + patience;
    vcpus.iter().for_each(VcpuHandle::stop);
    let outcome = vcpus.iter().try_for_each(|vcpu| vcpu.wait(deadline));
    vcpus.iter_mut().for_each(VcpuHandle::join);
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread that obeys `Control` as a vCPU's does, without KVM.
    fn obey(control: Arc<Control>) -> VcpuHandle {
        let theirs = Arc::clone(&control);
        let thread = std::thread::spawn(move || {
            while theirs.park() == Wanted::Run {
                while theirs.wanted() == Wanted::Run {
                    std::thread::yield_now();
                }
            }
            theirs.finished();
        });
        VcpuHandle { index: 0, control, thread: Some(thread) }
    }

    #[test]
    fn pauses_resumes_and_stops() {
        install_kick().unwrap();
        let mut vcpus = [obey(Arc::new(Control::new())), obey(Arc::new(Control::new()))];
        let deadline = || Instant::now() + Duration::from_secs(10);
        for vcpu in &vcpus {
            vcpu.wait(deadline()).unwrap();
            for _ in 0..50 {
                vcpu.resume();
                vcpu.pause();
                vcpu.wait(deadline()).unwrap();
                assert_eq!(*vcpu.control.doing(), Doing::Parked);
            }
            vcpu.resume();
        }
        stop_all(&mut vcpus, Duration::from_secs(10)).unwrap();
        assert!(vcpus.iter().all(|vcpu| vcpu.thread.is_none()));
    }

    #[test]
    fn a_thread_that_does_not_answer_is_reported() {
        install_kick().unwrap();
        let handle = VcpuHandle { index: 3, control: Arc::new(Control::new()), thread: None };
        let error = handle.wait(Instant::now()).unwrap_err();
        assert!(matches!(error, VcpuError::Stuck { index: 3, .. }));
    }
}
