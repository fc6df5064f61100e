//! Builds the bare-metal guest. It is not a package of its own: it shares neither target
//! nor flags with the workspace (no operating system, its own link script).

#![allow(clippy::expect_used)] // A build script reports by panicking.

use std::path::Path;
use std::process::Command;
use std::{env, fs};

fn main() {
    let guest = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("guest");
    let out = Path::new(&env::var("OUT_DIR").expect("cargo sets it")).join("guest.elf");
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=src/pattern.rs");
    println!("cargo::rerun-if-changed=build.rs");
    let status = Command::new(env::var("RUSTC").expect("cargo sets it"))
        .args(["--edition", "2024", "--crate-name", "spore_guest", "--crate-type", "bin"])
        .args(["--target", "x86_64-unknown-linux-gnu", "-C", "opt-level=2", "-C", "panic=abort"])
        .args(["-C", "relocation-model=static", "-C", "target-feature=+crt-static"])
        .args(["-C", "force-unwind-tables=no", "-C", "strip=debuginfo"])
        .args([
            "-C",
            "link-args=-nostdlib -nostartfiles -static -no-pie -Wl,--build-id=none -Wl,-z,noexecstack",
        ])
        .arg("-C")
        .arg(format!("link-arg=-Wl,-T,{}", guest.join("link.ld").display()))
        .arg("-o")
        .arg(&out)
        .arg(guest.join("main.rs"))
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTFLAGS")
        .status()
        .expect("rustc starts");
    assert!(status.success(), "the bare-metal guest does not compile (see above)");
    let length = fs::metadata(&out).expect("rustc wrote the guest").len();
    assert!(length < 4 << 20, "the guest grew to {length} bytes: something pulled in a library");
}
