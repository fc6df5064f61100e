//! `spore-vmm`: a VMM for one VM. The shim starts it with `--control-fd`; `run` is for people.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use spore_vmm::control::{Channel, server};
use spore_vmm::{DEFAULT_CMDLINE, clock, log, run};

/// Runs one microVM.
#[derive(Parser)]
#[command(version, about, long_about = None, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Cli {
    /// Obey the control protocol on this inherited descriptor, a SOCK_SEQPACKET Unix socket
    #[arg(long, value_name = "N")]
    control_fd: Option<RawFd>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Boot a guest from files
    Run(Run),
}

/// Exit status: 0 the guest powered off (or you quit), 1 it could not start, 3 it reset or
/// panicked, 4 it faulted, 5 it ignored the power button, 128+n signal n.
#[derive(Args)]
struct Run {
    /// A bzImage (vmlinuz) or an ELF vmlinux
    #[arg(long, value_name = "PATH")]
    kernel: PathBuf,
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,
    /// A raw disk image or block device; repeat for more
    #[arg(long = "disk", value_name = "PATH[:ro]", value_parser = parse_disk)]
    disks: Vec<(PathBuf, bool)>,
    /// Connect the serial console to this terminal (Ctrl-A x quits, Ctrl-A p is the power button)
    #[arg(long)]
    console: bool,
    #[arg(long, value_name = "N", default_value_t = 1)]
    vcpus: u8,
    /// Guest memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    memory: u64,
    /// Listen here for host clients of the guest's vsock ports
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
    /// A host vsock port that the guest may connect to; repeat for more
    #[arg(long = "host-port", value_name = "PORT", requires = "vsock")]
    host_ports: Vec<u32>,
    /// Kernel command line, instead of the default one
    #[arg(long, value_name = "TEXT", default_value = DEFAULT_CMDLINE)]
    cmdline: String,
    /// Added to the kernel command line
    #[arg(long, value_name = "TEXT")]
    append: Option<String>,
}

fn parse_disk(text: &str) -> Result<(PathBuf, bool), String> {
    match text.strip_suffix(":ro").map_or((text, false), |path| (path, true)) {
        ("", _) => Err("a path is needed".to_owned()),
        (path, read_only) => Ok((PathBuf::from(path), read_only)),
    }
}

fn main() -> ExitCode {
    let start = clock::monotonic_ns();
    match Cli::parse() {
        Cli { control_fd: Some(fd), .. } => obey(fd, start),
        Cli { command: Some(Command::Run(options)), .. } => run_alone(options, start),
        Cli { .. } => run::failed(),
    }
}

fn obey(fd: RawFd, start: u64) -> ExitCode {
    let served = match Channel::inherit(fd) {
        Ok(channel) => server::serve(channel, start, None),
        Err(error) => Err(error.into()),
    };
    match served {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            log::error("main", format_args!("{error}"));
            ExitCode::FAILURE
        }
    }
}

fn run_alone(options: Run, start: u64) -> ExitCode {
    let Run { kernel, initrd, disks, console, vcpus, memory, vsock, host_ports, mut cmdline, append } =
        options;
    if let Some(more) = append {
        cmdline.push(' ');
        cmdline.push_str(&more);
    }
    let memory_mib = memory;
    let options =
        run::Options { kernel, initrd, disks, console, vcpus, memory_mib, vsock, host_ports, cmdline };
    match run::run(&options, start) {
        Ok(status) => status,
        Err(error) => {
            log::error("run", format_args!("{error}"));
            run::failed()
        }
    }
}
