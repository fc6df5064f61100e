//! Runs a further process in a container that there is. Helper's side; one thread.
//!
//! The helper joins the container's namespaces, forks the process into its cgroup as a child of
//! PID 1 (a pid namespace is entered by children only), and waits until the process has been
//! replaced by its executable, or says why not. What the process gets is what runc's exec
//! gives: identity, capabilities, limits and terminal of its own, the container's seccomp
//! filter and personality.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use libcontainer::syscall::Syscall;
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::{capabilities, seccomp};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sched::{CloneFlags, setns};
use nix::sys::{personality, prctl, stat};
use nix::unistd::{Gid, Uid};
use oci_spec::runtime::{LinuxCapabilities, LinuxPersonalityDomain, LinuxSeccomp, Process, Spec};

use super::protocol::Exec;
use super::trace::Trace;
use super::{chain, executor, lookup};
use crate::container::spec::add_home;
use crate::sys;

/// Longest message of the child.
const MAX_MESSAGE: u64 = 4096;
const MAX_PASSWD: u64 = 1024 * 1024;
/// Marks a message about the executable.
const EXECUTABLE: char = '\u{1}';

const PTMX: libc::dev_t = libc::makedev(5, 2);
/// From the fork to execve. Less than the server waits for the helper.
const VERDICT: Duration = Duration::from_secs(30);

const NAMESPACES: [(&str, CloneFlags); 8] = [
    ("user", CloneFlags::CLONE_NEWUSER),
    ("mnt", CloneFlags::CLONE_NEWNS),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("net", CloneFlags::CLONE_NEWNET),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ("time", CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)),
];

/// What the child needs, gathered while the guest's own files are in sight.
struct Plan {
    process: Process,
    seccomp: Option<LinuxSeccomp>,
    persona: Option<LinuxPersonalityDomain>,
    joins_user: bool,
    /// Whose cgroup namespace is to be joined. The child does that itself: from inside of that
    /// namespace it could not be born in the container's cgroup.
    cgroup_of: Option<OwnedFd>,
    /// The three streams, or one terminal.
    streams: Vec<OwnedFd>,
    terminal: bool,
}

fn because(what: impl std::fmt::Display) -> impl FnOnce(Errno) -> String {
    move |error| format!("{what}: {}", error.desc())
}

fn io_because(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> String {
    move |error| format!("{what}: {error}")
}

/// Runs the process; gives its pid and, if it has one, its terminal's master.
pub fn run(request: &Exec, mut fds: Vec<OwnedFd>, trace: Trace) -> Result<(i32, Option<OwnedFd>), String> {
    if fds.is_empty() {
        return Err("no process came with the request".into());
    }
    let process = File::from(fds.remove(0));
    let process: Process = serde_json::from_reader(process).map_err(|error| format!("process: {error}"))?;
    let spec = fs::read(&request.config).map_err(io_because(request.config.display()))?;
    let spec: Spec =
        serde_json::from_slice(&spec).map_err(|error| format!("{}: {error}", request.config.display()))?;
    let linux = spec.linux().as_ref();
    if let Some(score) = process.oom_score_adj().or_else(|| spec.process().as_ref()?.oom_score_adj()) {
        fs::write("/proc/self/oom_score_adj", score.to_string()).map_err(io_because("oomScoreAdj"))?;
    }
    let process = with_defaults(process, &spec);
    let cgroup = cgroup_of(request)?;
    let (joined, init) = join(request.init)?;

    let (master, streams) = if request.terminal {
        let (master, slave) = open_terminal()?;
        (Some(master), vec![slave])
    } else {
        (None, fds)
    };
    let plan = Plan {
        process,
        seccomp: linux.and_then(|linux| linux.seccomp().clone()),
        persona: linux.and_then(|linux| linux.personality().as_ref().map(|persona| persona.domain())),
        joins_user: joined.contains(CloneFlags::CLONE_NEWUSER),
        cgroup_of: joined.contains(CloneFlags::CLONE_NEWCGROUP).then_some(init),
        streams,
        terminal: request.terminal,
    };
    let (verdict, tell) = pipe()?;
    let pid = match sys::fork_sibling_into(cgroup.as_fd()).map_err(because("fork"))? {
        0 => {
            // Nothing that is about to run may find the guest's own files behind a descriptor.
            drop(cgroup);
            become_process(plan, tell)
        }
        pid => pid,
    };
    drop(tell);
    drop(plan);
    if !readable_within(&verdict, VERDICT)? {
        let _ = sys::kill(pid, libc::SIGKILL);
        return Err(format!("it has not been executed within {VERDICT:?}; killed"));
    }
    let mut message = String::new();
    verdict.take(MAX_MESSAGE).read_to_string(&mut message).map_err(io_because("verdict"))?;
    match message.strip_prefix(EXECUTABLE) {
        Some(message) => {
            trace.executable(message);
            Err(message.into())
        }
        None if message.is_empty() => Ok((pid, master)),
        None => Err(message),
    }
}

/// What the process does not say about itself is as the container's init has it, as with runc.
fn with_defaults(mut process: Process, spec: &Spec) -> Process {
    let Some(init) = spec.process() else { return process };
    if process.capabilities().is_none() {
        process.set_capabilities(init.capabilities().clone());
    }
    if process.rlimits().is_none() {
        process.set_rlimits(init.rlimits().clone());
    }
    process
}

fn readable_within(file: &File, deadline: Duration) -> Result<bool, String> {
    let mut poll = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(deadline).unwrap_or(PollTimeout::MAX);
    nix::poll::poll(&mut poll, timeout).map(|ready| ready > 0).map_err(because("verdict"))
}

fn pipe() -> Result<(File, File), String> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(because("pipe"))?;
    Ok((read.into(), write.into()))
}

/// Where the process is born. A container that has cgroups of its own (systemd does) may hold
/// no process in the topmost; its init's own is the next best place, as with runc.
fn cgroup_of(request: &Exec) -> Result<File, String> {
    let nested = fs::read_dir(&request.cgroup)
        .map_err(io_because(request.cgroup.display()))?
        .flatten()
        .any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let mut directory = request.cgroup.clone();
    if nested {
        let own = format!("/proc/{}/cgroup", request.init);
        let text = fs::read_to_string(&own).map_err(io_because(&own))?;
        if let Some(path) = text.lines().find_map(|line| line.strip_prefix("0::/")) {
            directory = PathBuf::from("/sys/fs/cgroup").join(path);
        }
    }
    File::open(&directory).map_err(io_because(directory.display()))
}

/// Finds the namespaces in which the container's init is and this process is not, and joins them,
/// but for the cgroup's; gives them and the init.
fn join(init: i32) -> Result<(CloneFlags, OwnedFd), String> {
    let id = |whose: &str, name: &str| {
        let path = format!("/proc/{whose}/ns/{name}");
        fs::metadata(&path).map(|metadata| metadata.ino()).map_err(io_because(path))
    };
    let mut flags = CloneFlags::empty();
    for (name, flag) in NAMESPACES {
        // Absent from kernels that lack the kind.
        let Ok(ours) = id("self", name) else { continue };
        if ours != id(&init.to_string(), name)? {
            flags |= flag;
        }
    }
    // What is in the container must not look into this process.
    prctl::set_dumpable(false).map_err(because("set_dumpable"))?;
    let init = sys::pidfd_open(init).map_err(because("open the container's init"))?;
    let now = flags - CloneFlags::CLONE_NEWCGROUP;
    if !now.is_empty() {
        setns(&init, now).map_err(because("join the container's namespaces"))?;
    }
    Ok((flags, init))
}

/// A new terminal of the container's own devpts, master and slave.
fn open_terminal() -> Result<(OwnedFd, OwnedFd), String> {
    let flags = libc::O_NOCTTY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let master: OwnedFd = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open("/dev/ptmx")
        .map_err(io_because("/dev/ptmx"))?
        .into();
    // Whatever stands there is the container's: only the kernel's own multiplexer makes terminals.
    let found = stat::fstat(&master).map_err(because("/dev/ptmx"))?;
    if found.st_mode & libc::S_IFMT != libc::S_IFCHR || found.st_rdev != PTMX {
        return Err("/dev/ptmx is not the terminal multiplexer (character device 5:2)".into());
    }
    sys::unlock_terminal(master.as_fd()).map_err(because("/dev/ptmx"))?;
    let slave = sys::terminal_peer(master.as_fd()).map_err(io_because("/dev/ptmx"))?;
    Ok((master, slave))
}

/// In the child: becomes the process, or says why not.
fn become_process(mut plan: Plan, mut tell: File) -> ! {
    let init = plan.cgroup_of.take();
    let message = match prepare(&plan, init) {
        Ok(process) => {
            let name = process.args().iter().flatten().next().cloned().unwrap_or_default();
            match lookup::executable(&name, executor::path(&process)) {
                Ok(file) => match filter(&plan, true) {
                    Ok(()) => format!("{EXECUTABLE}{}", executor::execute(&process, &file)),
                    Err(message) => message,
                },
                Err(message) => format!("{EXECUTABLE}{message}"),
            }
        }
        Err(message) => message,
    };
    let _ = tell.write_all(message.as_bytes());
    sys::exit_now(255)
}

/// Everything between fork and execve; gives the process with its environment complete.
fn prepare(plan: &Plan, init: Option<OwnedFd>) -> Result<Process, String> {
    sys::close_rest_on_exec();
    if let Some(init) = init {
        setns(init, CloneFlags::CLONE_NEWCGROUP).map_err(because("join the container's cgroup namespace"))?;
    }
    let process = &plan.process;
    let syscall = create_syscall();
    nix::unistd::setsid().map_err(because("setsid"))?;
    wire(plan)?;
    if plan.joins_user {
        become_user(0, 0).map_err(because("user namespace"))?;
    }
    for rlimit in process.rlimits().iter().flatten() {
        syscall.set_rlimit(rlimit).map_err(|error| format!("rlimits: {}", chain(&error)))?;
    }
    if let Some(domain) = plan.persona {
        let persona = match domain {
            LinuxPersonalityDomain::PerLinux => personality::Persona::empty(),
            // PER_LINUX32, which nix does not name.
            LinuxPersonalityDomain::PerLinux32 => personality::Persona::from_bits_retain(8),
        };
        personality::set(persona).map_err(because("personality"))?;
    }
    let user = process.user();
    stat::umask(stat::Mode::from_bits_truncate(user.umask().unwrap_or(0o022)));
    // With this process's privileges first, with the user's own where those do not reach.
    let cwd = process.cwd();
    let entered = nix::unistd::chdir(cwd);
    let groups: Vec<_> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    nix::unistd::setgroups(&groups).map_err(because("additionalGids"))?;
    if process.no_new_privileges().unwrap_or(false) {
        prctl::set_no_new_privs().map_err(because("noNewPrivileges"))?;
    }
    filter(plan, false)?;
    drop_privileges(process, syscall.as_ref())?;
    if entered.is_err() {
        let failed = |error: Errno| {
            format!(
                "chdir to cwd (\"{}\") set in config.json failed: {}",
                cwd.display(),
                lookup::go_wording(error)
            )
        };
        nix::unistd::chdir(cwd).map_err(failed)?;
    }
    if nix::unistd::getcwd().is_err() {
        return Err("current working directory is outside of container mount namespace root".into());
    }
    let mut process = process.clone();
    add_home(&mut process, passwd);
    Ok(process)
}

/// The seccomp filter goes on last, with `no_new_privs`; without, while there is the privilege
/// to do it.
fn filter(plan: &Plan, last: bool) -> Result<(), String> {
    match &plan.seccomp {
        Some(filter) if plan.process.no_new_privileges().unwrap_or(false) == last => {
            let listener =
                seccomp::initialize_seccomp(filter).map_err(|error| format!("seccomp: {}", chain(&error)))?;
            match listener {
                None => Ok(()),
                Some(_) => {
                    Err("seccomp: SCMP_ACT_NOTIFY needs a listener on the host, which a guest has not".into())
                }
            }
        }
        _ => Ok(()),
    }
}

/// Makes the streams the standard ones.
fn wire(plan: &Plan) -> Result<(), String> {
    let failed = || because("standard streams");
    match (plan.terminal, plan.streams.as_slice()) {
        (true, [slave]) => {
            sys::take_terminal(slave.as_fd()).map_err(because("terminal"))?;
            nix::unistd::dup2_stdin(slave).map_err(failed())?;
            nix::unistd::dup2_stdout(slave).map_err(failed())?;
            nix::unistd::dup2_stderr(slave).map_err(failed())
        }
        (false, [stdin, stdout, stderr]) => {
            nix::unistd::dup2_stdin(stdin).map_err(failed())?;
            nix::unistd::dup2_stdout(stdout).map_err(failed())?;
            nix::unistd::dup2_stderr(stderr).map_err(failed())
        }
        _ => Err("three streams must be attached".into()),
    }
}

/// Becomes the user, with the capabilities that the process is given; none means none.
fn drop_privileges(process: &Process, syscall: &dyn Syscall) -> Result<(), String> {
    let user = process.user();
    let mut none = LinuxCapabilities::default();
    none.set_bounding(Some(Default::default()))
        .set_effective(Some(Default::default()))
        .set_permitted(Some(Default::default()))
        .set_inheritable(Some(Default::default()))
        .set_ambient(Some(Default::default()));
    let caps = process.capabilities().as_ref().unwrap_or(&none);
    let failed = |what: &'static str| {
        move |error: libcontainer::syscall::SyscallError| format!("{what}: {}", chain(&error))
    };
    become_user(user.uid(), user.gid()).map_err(because("user"))?;
    capabilities::reset_effective(syscall).map_err(failed("capabilities"))?;
    capabilities::drop_privileges(caps, syscall).map_err(failed("capabilities"))
}

/// Changes all ids; what capabilities there are stay permitted.
fn become_user(uid: u32, gid: u32) -> Result<(), Errno> {
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    prctl::set_keepcaps(true)?;
    nix::unistd::setresgid(gid, gid, gid)?;
    nix::unistd::setresuid(uid, uid, uid)?;
    prctl::set_keepcaps(false)
}

/// The container's passwd file, whatever it is; at most 1 MiB is read.
fn passwd() -> String {
    let mut bytes = Vec::new();
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(Path::new("/etc/passwd"));
    let _ = opened.and_then(|file| file.take(MAX_PASSWD).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}
