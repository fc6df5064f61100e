//! The README's rules about who may import what, and its map, held against the tree.

#![allow(clippy::unwrap_used)] // helpers of tests: what fails here fails the test

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn sources(under: &str) -> Vec<(PathBuf, String)> {
    fn walk(path: &Path, found: &mut Vec<(PathBuf, String)>) {
        if path.is_dir() {
            for entry in fs::read_dir(path).unwrap() {
                walk(&entry.unwrap().path(), found);
            }
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push((path.to_owned(), fs::read_to_string(path).unwrap()));
        }
    }
    let mut found = Vec::new();
    walk(&root().join("src").join(under), &mut found);
    assert!(!found.is_empty(), "nothing under src/{under}");
    found
}

/// No line of code under `under` (comments aside, tests aside) contains any of `words`.
fn forbid(under: &str, words: &[&str], except: &[&str]) {
    for (path, text) in sources(under) {
        let name = path.to_string_lossy();
        if name.ends_with("tests.rs") || except.iter().any(|part| name.contains(part)) {
            continue;
        }
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        for (number, line) in code.lines().enumerate() {
            let line = line.split("//").next().unwrap_or_default();
            for word in words {
                assert!(!line.contains(word), "{name}:{}: {word} does not belong there: {line}", number + 1);
            }
        }
    }
}

#[test]
fn the_api_stands_alone() {
    forbid("api.rs", &["crate::", "super::"], &[]);
}

#[test]
fn the_contract_of_saved_state_is_at_the_bottom() {
    forbid("snapshot/contract.rs", &["crate::", "super::"], &[]);
}

#[test]
fn vcpus_know_no_device() {
    forbid("vcpu", &["devices::", "backend::", "control::"], &[]);
}

#[test]
fn devices_know_neither_kvm_nor_control() {
    let foreign = ["kvm_ioctls", "kvm_bindings", "control::", "vcpu::", "vm::", "MmioBus", "PioBus"];
    forbid("devices", &foreign, &[]);
}

#[test]
fn backends_know_no_virtqueue() {
    forbid("backend", &["virtio_queue", "devices::", "kvm_"], &[]);
}

#[test]
fn only_the_builder_names_devices() {
    forbid("vm", &["devices::"], &["vm/builder"]);
    forbid("snapshot", &["devices::", "backend::", "control::", "vm::"], &[]);
    forbid("fork.rs", &["devices::", "backend::", "control::", "snapshot::"], &[]);
    forbid("control", &["devices::", "backend::"], &[]);
    forbid("config.rs", &["devices::"], &[]);
}

#[test]
fn only_arch_knows_the_processor() {
    let words = ["cpuid", "CpuId", "Msrs", "msr_", "acpi_tables", "linux_loader", "boot_params", "kvm_sregs"];
    for part in [
        "api.rs",
        "backend",
        "bus",
        "config.rs",
        "control",
        "devices",
        "fork.rs",
        "memory",
        "run",
        "snapshot",
        "vcpu",
        "vm",
    ] {
        forbid(part, &words, &[]);
    }
}

#[test]
fn the_map_names_modules_that_exist() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let map = readme.split("## Map").nth(1).unwrap().split("###").next().unwrap();
    for row in map.lines().filter(|line| line.starts_with("| `")) {
        let mut cells = row.split('|').skip(1);
        let modules: Vec<_> = cells.next().unwrap().split('`').skip(1).step_by(2).collect();
        for module in &modules {
            let path = root().join("src").join(module);
            assert!(path.is_dir() || path.with_extension("rs").is_file(), "{module} of {row}");
        }
    }
    let libraries = fs::read_to_string(root().join("src/lib.rs")).unwrap();
    for line in libraries.lines().filter_map(|line| line.strip_prefix("pub mod ")) {
        let module = line.trim_end_matches(';');
        assert!(map.contains(&format!("`{module}`")), "{module} is missing in the README's map");
    }
}
