//! The tree is what STYLE.md and the READMEs say: who may import whom, and that every path
//! that a README names exists.

#![allow(clippy::unwrap_used)] // A tree that cannot be read fails the test.

use std::fs;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Every file below `directory` with one of the extensions, without what builds make.
fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if name.starts_with('.') || name == "target" {
            continue;
        }
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Lines of code (no comments) below `directory` that name `what`, except in files for which
/// `allowed` says yes to the path below `directory`.
fn users(directory: &str, what: &str, allowed: impl Fn(&str) -> bool) -> Vec<String> {
    let root = repository().join(directory);
    let mut found = Vec::new();
    for file in files(&root, "rs") {
        let below = file.strip_prefix(&root).unwrap().to_string_lossy().into_owned();
        // Tests may reach across.
        if allowed(&below) || below.ends_with("tests.rs") || below.contains("tests/") {
            continue;
        }
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (index, line) in code.lines().enumerate() {
            if !line.trim_start().starts_with("//") && line.contains(what) {
                found.push(format!("{directory}/{below}:{}: {}", index + 1, line.trim()));
            }
        }
    }
    found
}

/// Dependencies of ours that a manifest names outside its dev-dependencies.
fn dependencies(manifest: &str) -> Vec<String> {
    let text = fs::read_to_string(repository().join(manifest)).unwrap();
    let mut section = String::new();
    let mut found = Vec::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']').to_owned();
        } else if section == "dependencies" && line.starts_with("spore-") {
            found.push(line.split(['.', ' ', '=']).next().unwrap_or_default().to_owned());
        }
    }
    found
}

fn none(found: &[String], rule: &str) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

#[test]
fn crates_depend_only_on_those_that_they_may() {
    assert_eq!(dependencies("vmm/Cargo.toml"), [""; 0], "vmm depends on no crate of ours");
    assert_eq!(dependencies("agent/api/Cargo.toml"), [""; 0], "agent/api depends on no crate of ours");
    assert_eq!(dependencies("agent/Cargo.toml"), ["spore-agent-api"], "agent depends on agent/api alone");
    for name in dependencies("shim/Cargo.toml") {
        assert!(["spore-vmm", "spore-agent-api"].contains(&name.as_str()), "shim depends on {name}");
    }
    assert_eq!(
        dependencies("packaging/guest-image/Cargo.toml"),
        [""; 0],
        "packaging depends on no crate of ours"
    );
}

#[test]
fn the_shim_meets_the_vmm_only_in_its_vm_module_and_only_its_api() {
    // The configuration is checked against the API's own limits.
    let found = users("shim/src", "spore_vmm", |path| path.starts_with("vm") || path == "config.rs");
    none(&found, "shim: only vm/ uses spore_vmm");
    let beyond: Vec<_> = users("shim/src", "spore_vmm::", |_| false)
        .into_iter()
        .filter(|line| !line.contains("spore_vmm::api") && !line.contains("spore_vmm::DEFAULT_CMDLINE"))
        .collect();
    none(&beyond, "shim: of spore_vmm only api is for it");
}

#[test]
fn the_shim_calls_the_agent_only_in_its_guest_module() {
    // The file service is relayed: the shim serves what the agent does, and the command asks it.
    let relayed = |path: &str| path.ends_with("files.rs") || path.starts_with("bin/spore/");
    let found = users("shim/src", "spore_agent_api::v1", |path| path.starts_with("guest") || relayed(path));
    none(&found, "shim: only guest is a client of the agent");
}

#[test]
fn inside_the_vmm_layers_keep_to_themselves() {
    none(&users("vmm/src/vcpu", "crate::devices", |_| false), "vCPUs see the bus, never devices");
    for kvm in ["kvm_ioctls", "kvm_bindings"] {
        none(&users("vmm/src/devices", kvm, |_| false), "devices see an interrupt trait, never KVM");
    }
    for queue in ["virtio_queue", "devices::virtio::queue"] {
        none(&users("vmm/src/backend", queue, |_| false), "backends never see virtqueues");
    }
    for device in ["balloon", "blk", "fs", "net", "rng", "vsock"] {
        let named = format!("devices::virtio::{device}::");
        let found = users("vmm/src", &named, |path| path.starts_with("vm/") || path.starts_with("devices/"));
        none(&found, "only the builder names concrete devices");
    }
}

#[test]
fn unsafe_code_is_opted_into_on_the_first_line_with_a_reason() {
    for folder in ["vmm/src", "shim/src", "agent/src", "tests"] {
        for file in files(&repository().join(folder), "rs") {
            let text = fs::read_to_string(&file).unwrap();
            let opted = text.lines().position(|line| line.starts_with("#![allow(unsafe_code)]"));
            assert!(matches!(opted, None | Some(0)), "{}: the opt-in is not on line 1", file.display());
            if opted.is_some() {
                let line = text.lines().next().unwrap();
                assert!(line.contains("//"), "{}: no reason beside the opt-in", file.display());
            }
        }
    }
}

#[test]
fn every_path_that_a_readme_names_exists() {
    let repository = repository();
    let mut missing = Vec::new();
    for readme in files(&repository, "md") {
        if readme.file_name().is_none_or(|name| name != "README.md") {
            continue;
        }
        let text = fs::read_to_string(&readme).unwrap();
        let here = readme.parent().unwrap();
        for named in text.split('`').skip(1).step_by(2).filter(|named| looks_like_a_path(named)) {
            let first = named.split('/').next().unwrap();
            // A name that begins nowhere in the tree is another system's path or no path.
            let from = [here, repository.as_path()].into_iter().find(|base| base.join(first).exists());
            if first != "target"
                && from.is_some()
                && ![here, repository.as_path()].iter().any(|base| base.join(named).exists())
            {
                missing.push(format!("{}: {named}", readme.strip_prefix(&repository).unwrap().display()));
            }
        }
    }
    none(&missing, "READMEs name paths that do not exist");
}

fn looks_like_a_path(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
    text.contains('/') && !text.starts_with('/') && text.bytes().all(plain)
}
