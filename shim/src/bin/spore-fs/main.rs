//! `spore-fs`: serves directories and files of the host to one sandbox's guest, as a FUSE file
//! system over sockets that the VMM relays (DESIGN 5). Started by the shim, which gives it every
//! file it may touch as an open mount of its own (`protocol`).
//!
//! Boundary: everything that arrives on a request socket is the guest's and hostile. It is
//! decoded by `fuse-backend-rs`; names and numbers are checked in `tree`. The process has left
//! its user's file system behind (`confine`): all that it can reach is what it was given.

mod confine;
mod serve;
mod sys;
mod tree;
mod worker;

use std::fs::File;
use std::os::fd::AsFd;
use std::process::ExitCode;

use clap::Parser;

/// Serves host directories to a Spore guest. Started by containerd-shim-spore-v2; standard input
/// is its control socket.
#[derive(Debug, Parser)]
#[command(name = "spore-fs", version)]
struct Arguments {}

fn main() -> ExitCode {
    let Arguments {} = Arguments::parse();
    let run = || -> Result<(), Box<dyn std::error::Error>> {
        let control = std::io::stdin().as_fd().try_clone_to_owned()?;
        let null = File::options().write(true).open("/dev/null")?;
        confine::raise_open_files();
        confine::enter()?;
        serve::run(&control, tree::Tree::new(confine::DESCRIPTORS), null)?;
        Ok(())
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("spore-fs: error: {error}");
            ExitCode::FAILURE
        }
    }
}
