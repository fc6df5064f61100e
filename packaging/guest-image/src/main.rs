//! Makes what a Spore guest boots: the kernel as packaged by Debian (or the user's own)
//! and an initramfs that holds the agent and the modules it needs, nothing else.
//!
//! The same input gives the same bytes: nothing depends on time, place, user or the order
//! of directories. `packaging/guest-image/build` is the command for people; it fetches the
//! package and builds the agent first.

mod cpio;
mod elf;
mod error;
mod image;
mod modules;
mod payload;
mod source;
mod tools;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, IoContext, Result};
use crate::image::Output;

/// Makes the guest's kernel and initramfs.
#[derive(Debug, Parser)]
#[command(name = "spore-guest-image")]
struct Options {
    /// Debian kernel package (linux-image-*_amd64.deb).
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "modules"], required_unless_present = "kernel")]
    deb: Option<PathBuf>,
    /// Keep the unpacked package here, under its digest, for the next time.
    #[arg(long, value_name = "DIR", requires = "deb")]
    cache: Option<PathBuf>,
    /// bzImage of your own.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Its modules (lib/modules or lib/modules/RELEASE, after depmod); without this
    /// everything counts as built in.
    #[arg(long, value_name = "DIR", requires = "kernel")]
    modules: Option<PathBuf>,
    /// The list of modules to take.
    #[arg(long, value_name = "FILE")]
    list: PathBuf,
    /// The guest agent: a static executable.
    #[arg(long, value_name = "FILE")]
    agent: PathBuf,
    /// Directory for vmlinuz, initramfs, vmlinux and manifest.json.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Keep the agent's symbols (for backtraces with names; costs guest memory).
    #[arg(long)]
    keep_symbols: bool,
    /// Do not unpack vmlinux (only tests and debuggers want it).
    #[arg(long)]
    no_vmlinux: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(report) => {
            print!("{report}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let mut text = format!("spore-guest-image: error: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(inner) = cause {
                let _ = write!(text, ": {inner}");
                cause = inner.source();
            }
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<String> {
    let list = std::fs::read_to_string(&options.list).context("read", &options.list)?;
    let wanted = modules::parse_list(&list, &options.list)?;
    let kernel = match (&options.deb, &options.kernel) {
        (Some(deb), _) => source::from_package(deb, options.cache.as_deref())?,
        (None, Some(kernel)) => source::from_files(kernel, options.modules.as_deref())?,
        // clap requires one of the two.
        (None, None) => return Ok(String::new()),
    };
    let initramfs = image::build(&kernel, &wanted, &options.agent, options.keep_symbols)?;
    let vmlinux = if options.no_vmlinux {
        None
    } else {
        let setup = payload::parse(&kernel.image)
            .map_err(|source| Error::Kernel { path: kernel.path.clone(), source })?;
        Some(setup.unpack(&kernel.path)?)
    };

    let mut outputs = vec![
        Output { name: "vmlinuz", data: &kernel.image },
        Output { name: "initramfs", data: &initramfs.data },
    ];
    if let Some(vmlinux) = &vmlinux {
        outputs.push(Output { name: "vmlinux", data: vmlinux });
    }
    let manifest = image::manifest(&kernel, &initramfs, &outputs);
    // Last, so that a manifest describes complete files.
    outputs.push(Output { name: "manifest.json", data: &manifest });

    std::fs::create_dir_all(&options.out).context("make the directory", &options.out)?;
    let mut report =
        format!("guest image of Linux {}, {} modules:\n", kernel.release, initramfs.modules.len());
    for output in &outputs {
        let changed = image::write(&options.out, output.name, output.data)?;
        let _ = writeln!(
            report,
            "  {:>9} KiB  {}{}",
            output.data.len().div_ceil(1024),
            shown(&options.out, output.name),
            if changed { "" } else { " (unchanged)" }
        );
    }
    Ok(report)
}

fn shown(dir: &Path, name: &str) -> String {
    dir.join(name).display().to_string()
}

/// SHA-256 in hexadecimal.
fn sha256(data: &[u8]) -> String {
    Sha256::digest(data).iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
