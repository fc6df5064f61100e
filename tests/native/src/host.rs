//! What the tests need of the host, and clear words where it is missing.

use std::fs::File;
use std::path::PathBuf;
use std::sync::OnceLock;

use kvm_ioctls::Kvm;

/// An open `/dev/kvm`.
///
/// # Panics
/// When the host cannot run a VM: a suite that passed then would have tested nothing.
#[must_use]
pub fn kvm() -> File {
    static CHECKED: OnceLock<Result<(), String>> = OnceLock::new();
    let checked = CHECKED.get_or_init(|| {
        let kvm = Kvm::new().map_err(|error| error.to_string())?;
        kvm.create_vm().map(drop).map_err(|error| format!("creating a VM: {error}"))
    });
    if let Err(cause) = checked {
        panic!(
            "this host's KVM is unusable: /dev/kvm: {cause}. The native suite needs it; \
             load kvm_intel, kvm_amd or kvm_pvm, or give this user read and write access to /dev/kvm"
        );
    }
    File::options().read(true).write(true).open("/dev/kvm").expect("/dev/kvm opened a moment ago")
}

/// The `spore-vmm` binary of the same build: beside a program, and one folder above a test, which is
/// `target/TRIPLE/release/deps/test`.
///
/// # Panics
/// When it has not been built.
#[must_use]
pub fn vmm_binary() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let folder = test.parent().expect("a program stands in a folder");
    let profile = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    let binary = profile.join("spore-vmm");
    assert!(
        binary.is_file(),
        "{} is missing; build it first: cargo build --release -p spore-vmm --bin spore-vmm",
        binary.display()
    );
    binary
}
