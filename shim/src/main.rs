//! `containerd-shim-spore-v2`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    containerd_shim_spore::run()
}
