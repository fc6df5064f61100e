//! `spore-vmm run`: one VM for a person at a terminal. It opens what the arguments name and
//! then speaks the control protocol, over a socket pair, to a VMM on a second thread; so it
//! exercises what the shim uses and nothing else.
//!
//! Console keys: Ctrl-A x quits, Ctrl-A p presses the power button, Ctrl-A Ctrl-A is a Ctrl-A.

mod feed;
mod keys;
mod terminal;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use self::feed::Feed;
use self::keys::{Keys, Typed};
use self::terminal::RawTerminal;
use crate::api::{
    Call, ConsoleConfig, DiskConfig, DiskSlots, EndReason, Event, Failure, FdIndex, PROTOCOL_VERSION, Reply,
    VmConfig, VsockConfig,
};
use crate::control::client::{Client, ClientError};
use crate::control::socket::{Socket, SocketError};
use crate::control::{Channel, server};

/// How long building a VM may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// What Ctrl-A p gives the guest.
const POWER_OFF: Duration = Duration::from_secs(30);
const GUEST_CID: u32 = 3;

/// Exit statuses besides 0, the guest powered itself off.
const FAILED: u8 = 1;
const RESET: u8 = 3;
const ENDED_BY_FAULT: u8 = 4;
const FORCED: u8 = 5;

/// What to run.
#[derive(Debug)]
pub struct Options {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// Path, read-only.
    pub disks: Vec<(PathBuf, bool)>,
    pub console: bool,
    pub vcpus: u8,
    pub memory_mib: u64,
    pub vsock: Option<PathBuf>,
    pub host_ports: Vec<u32>,
    pub cmdline: String,
}

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("{what} {path}: {source}", path = path.display())]
    Open { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{what}: {source}")]
    System { what: &'static str, source: io::Error },
    #[error(transparent)]
    Refused(#[from] Failure),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Socket(#[from] SocketError),
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |source| RunError::System { what, source }
}

/// Boots the VM and stays with it until it has ended or the user quits.
pub fn run(options: &Options, process_start_ns: u64) -> Result<ExitCode, RunError> {
    // Blocked before the VMM's threads exist, so that only the descriptor sees them.
    let signals = watch_signals()?;
    let mut parcel = Parcel::default();
    let mut console_input = Feed::closed();
    let config = describe(options, &mut parcel, &mut console_input)?;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|error| system("making the control socket")(error.into()))?;
    let channel = Channel::new(Socket::new(theirs)?);
    let vmm = std::thread::Builder::new()
        .name("vmm".into())
        .spawn(move || server::serve(channel, process_start_ns, None))
        .map_err(system("starting the VMM's thread"))?;
    let outcome = drive(Client::new(Socket::new(ours)?), config, parcel, console_input, &signals, options);
    // The client is gone, so the VMM is on its way out; a fault of its own is worth a line.
    if let Ok(Err(error)) = vmm.join() {
        crate::log::error("vmm", format_args!("{error}"));
    }
    if let Some(path) = &options.vsock {
        let _ = std::fs::remove_file(path);
    }
    outcome
}

fn watch_signals() -> Result<SignalFd, RunError> {
    let set: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    set.thread_block().map_err(|error| system("blocking signals")(error.into()))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(|error| system("watching signals")(error.into()))
}

/// Descriptors on their way into a message.
#[derive(Debug, Default)]
struct Parcel(Vec<OwnedFd>);

impl Parcel {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> FdIndex {
        self.0.push(fd.into());
        FdIndex(u32::try_from(self.0.len() - 1).unwrap_or(u32::MAX))
    }

    fn open(&mut self, what: &'static str, path: &Path, write: bool) -> Result<FdIndex, RunError> {
        let file = File::options().read(true).write(write).open(path);
        let file = file.map_err(|source| RunError::Open { what, path: path.to_owned(), source })?;
        Ok(self.add(file))
    }
}

fn describe(options: &Options, parcel: &mut Parcel, console_input: &mut Feed) -> Result<VmConfig, RunError> {
    let kvm = parcel.open("KVM device", Path::new("/dev/kvm"), true)?;
    let kernel = parcel.open("kernel", &options.kernel, false)?;
    let initrd = options.initrd.as_deref().map(|path| parcel.open("initramfs", path, false)).transpose()?;
    let mut disks = Vec::new();
    for (path, read_only) in &options.disks {
        disks.push(DiskConfig {
            file: parcel.open("disk", path, !read_only)?,
            read_only: *read_only,
            below: Vec::new(),
        });
    }
    let console = if options.console {
        let output = io::stdout().as_fd().try_clone_to_owned().map_err(system("the terminal"))?;
        let (reader, writer) = io::pipe().map_err(system("a pipe"))?;
        *console_input = Feed::new(writer).map_err(system("a pipe"))?;
        Some(ConsoleConfig { output: parcel.add(output), input: Some(parcel.add(reader)), cap_bytes: 0 })
    } else {
        None
    };
    let vsock = options.vsock.as_deref().map(|path| listen(path, options, parcel)).transpose()?;
    Ok(VmConfig {
        protocol: PROTOCOL_VERSION,
        vcpus: options.vcpus,
        memory_mib: options.memory_mib,
        huge_pages: false,
        kvm,
        kernel,
        initrd,
        cmdline: options.cmdline.clone(),
        console,
        vsock,
        disk_slots: slots_for(&disks),
        filesystem: None,
        network_slots: 0,
        disks,
    })
}

/// As many slots as there are disks: nobody attaches more.
fn slots_for(disks: &[DiskConfig]) -> DiskSlots {
    let count = |read_only| {
        let count = disks.iter().filter(|disk| disk.read_only == read_only).count();
        u8::try_from(count).unwrap_or(u8::MAX)
    };
    DiskSlots { read_only: count(true), writable: count(false) }
}

fn listen(path: &Path, options: &Options, parcel: &mut Parcel) -> Result<VsockConfig, RunError> {
    // A socket that an earlier run left would be in the way; anything else is not ours.
    if path.symlink_metadata().is_ok_and(|status| status.file_type().is_socket()) {
        let _ = std::fs::remove_file(path);
    }
    let listener = UnixListener::bind(path).map_err(|source| RunError::Open {
        what: "vsock listener",
        path: path.to_owned(),
        source,
    })?;
    Ok(VsockConfig {
        guest_cid: GUEST_CID,
        listener: parcel.add(listener),
        host_ports: options.host_ports.clone(),
    })
}

/// Configures, boots, and relays until the end. Dropping the client ends the VMM.
fn drive(
    mut client: Client,
    config: VmConfig,
    parcel: Parcel,
    mut console_input: Feed,
    signals: &SignalFd,
    options: &Options,
) -> Result<ExitCode, RunError> {
    let fds: Vec<BorrowedFd<'_>> = parcel.0.iter().map(AsFd::as_fd).collect();
    let configured = client.call(Call::Configure(config), &fds, PATIENCE)??;
    if let Reply::Configured { disks, .. } = configured {
        for (disk, (path, _)) in disks.iter().zip(&options.disks) {
            crate::log::info("run", format_args!("{} is disk {}", path.display(), disk.serial));
        }
    }
    drop(parcel);
    let terminal = if options.console { RawTerminal::new().map_err(system("the terminal"))? } else { None };
    client.call(Call::Boot, &[], PATIENCE)??;
    let outcome = relay(&mut client, &mut console_input, signals, options.console);
    drop(terminal);
    outcome
}

fn relay(
    client: &mut Client,
    console_input: &mut Feed,
    signals: &SignalFd,
    console: bool,
) -> Result<ExitCode, RunError> {
    let mut keys = Keys::default();
    let mut stdin = io::stdin();
    let mut reading = console;
    loop {
        while let Some((event, _fd)) = client.try_event()? {
            match event {
                Event::GuestConnection { port } => {
                    crate::log::info("run", format_args!("the guest connected to port {port}; closed"));
                }
                // Nobody asks for it here.
                Event::DisksSettled { .. } | Event::DiskMerged { .. } => {}
                Event::Ended(reason) => return Ok(report(&reason)),
            }
        }
        let (signalled, typed) = wait(client, signals, reading.then(|| stdin.as_fd()), console_input)?;
        console_input.flush();
        if signalled && let Ok(Some(signal)) = signals.read_signal() {
            crate::log::info("run", format_args!("signal {}; the VM ends", signal.ssi_signo));
            return Ok(ExitCode::from(128u8.wrapping_add(u8::try_from(signal.ssi_signo).unwrap_or(0))));
        }
        if typed {
            let mut data = [0; 256];
            let count = stdin.read(&mut data).map_err(system("reading the terminal"))?;
            if count == 0 {
                reading = false;
                console_input.close();
            }
            for typed in keys.feed(&data[..count]) {
                match typed {
                    Typed::Bytes(bytes) => console_input.push(&bytes),
                    Typed::PowerButton => press(client)?,
                    Typed::Quit => return Ok(ExitCode::SUCCESS),
                }
            }
        }
    }
}

/// Waits for the VMM, a signal, the terminal, or room for what was typed; says whether a signal
/// and whether the terminal is there.
fn wait(
    client: &Client,
    signals: &SignalFd,
    stdin: Option<BorrowedFd<'_>>,
    input: &Feed,
) -> Result<(bool, bool), RunError> {
    let mut fds =
        vec![PollFd::new(client.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    let at = stdin.map(|stdin| {
        fds.push(PollFd::new(stdin, PollFlags::POLLIN));
        fds.len() - 1
    });
    fds.extend(input.waits().map(|pipe| PollFd::new(pipe, PollFlags::POLLOUT)));
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) | Err(nix::Error::EINTR) => {}
        Err(error) => return Err(system("waiting")(error.into())),
    }
    let ready = |at: usize| fds.get(at).and_then(PollFd::any).unwrap_or(false);
    Ok((ready(1), at.is_some_and(ready)))
}

fn press(client: &mut Client) -> Result<(), RunError> {
    let deadline_ms = u64::try_from(POWER_OFF.as_millis()).unwrap_or(u64::MAX);
    if let Err(failure) = client.call(Call::Shutdown { deadline_ms }, &[], PATIENCE)? {
        crate::log::warn("run", format_args!("{failure}"));
    }
    Ok(())
}

fn report(reason: &EndReason) -> ExitCode {
    match reason {
        EndReason::Shutdown => ExitCode::SUCCESS,
        EndReason::Reset => ExitCode::from(RESET),
        EndReason::Forced => ExitCode::from(FORCED),
        EndReason::TripleFault { .. } | EndReason::InternalError { .. } => ExitCode::from(ENDED_BY_FAULT),
    }
}

/// The status for a run that could not begin.
pub fn failed() -> ExitCode {
    ExitCode::from(FAILED)
}
