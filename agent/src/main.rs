//! `spore-agent`: `/init` of the guest, or (as a child of itself) the OCI runtime helper.

use std::process::ExitCode;

use spore_agent::{pid1, runtime};

fn main() -> ExitCode {
    // The kernel hands words of its command line that it does not know to PID 1 as
    // arguments, so PID 1 looks at none.
    if std::process::id() == 1 {
        return pid1::run();
    }
    if std::env::args().nth(1).as_deref() == Some(runtime::HELPER_COMMAND) {
        return runtime::helper::main();
    }
    eprintln!(
        "spore-agent {}: PID 1 of a Spore guest. It is started by the guest's kernel as /init, \
         never by hand.",
        env!("CARGO_PKG_VERSION")
    );
    ExitCode::from(2)
}
