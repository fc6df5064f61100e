//! Snapshot files from anybody: whatever a state file says, restoring it gives a VM or an error. Never a panic,
//! and never half a VM.
//!
//! The files are made of a real one: single values replaced, structure and checksums right, so that decoding gets past the
//! container and down to each part; and raw damage, which the container finds. `FUZZ_CASES` sets how many.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail as tests do.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use proptest::prelude::*;
use serde_json::{Value, json};
use spore_native::{Setup, host};
use spore_vmm::api::{FdIndex, LayerConfig, PROTOCOL_VERSION, RestoreConfig};
use spore_vmm::config::RestoredMachine;
use spore_vmm::control::FdTable;
use spore_vmm::end::EndLatch;
use spore_vmm::snapshot::MachineState;
use spore_vmm::{vcpu, vm};

/// A real snapshot: the document, and its layer.
struct Sample {
    document: Value,
    bytes: Vec<u8>,
    layer: File,
    /// Pointers to every value that is not deep inside an array of bytes.
    places: Vec<String>,
}

fn cases() -> u32 {
    std::env::var("FUZZ_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(96)
}

fn places(value: &Value, at: &str, found: &mut Vec<String>) {
    found.push(at.to_owned());
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                places(value, &format!("{at}/{key}"), found);
            }
        }
        Value::Array(items) => {
            // The first bytes of a structure of KVM's stand for the others.
            for (index, item) in items.iter().enumerate().take(24) {
                places(item, &format!("{at}/{index}"), found);
            }
        }
        _ => {}
    }
}

fn sample() -> &'static Sample {
    static SAMPLE: OnceLock<Sample> = OnceLock::new();
    SAMPLE.get_or_init(|| {
        let mut vm = Setup::new("shell").filesystem("volumes").boot();
        assert!(vm.run("disks").contains("ok disks"));
        let saved = vm.snapshot("a", &[]);
        let mut bytes = vec![0; usize::try_from(saved.state.metadata().unwrap().len()).unwrap()];
        saved.state.read_exact_at(&mut bytes, 0).unwrap();
        let document: Value = serde_json::from_slice(&bytes[32..]).unwrap();
        let mut found = Vec::new();
        places(&document, "", &mut found);
        let layer = saved.layers.into_iter().next().unwrap().1;
        Sample { document, bytes, layer, places: found }
    })
}

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// A state file with right sums.
fn state_file(document: &Value) -> File {
    file(&spore_vmm::snapshot::format::encode(document).unwrap())
}

/// Restores in this process; true when there was a VM.
fn restore(state: &File) -> bool {
    let fds = [host::kvm().as_fd(), state.as_fd(), sample().layer.as_fd()]
        .map(|fd| fd.try_clone_to_owned().unwrap());
    let config = RestoreConfig {
        protocol: PROTOCOL_VERSION,
        huge_pages: false,
        kvm: FdIndex(0),
        state: Some(FdIndex(1)),
        layers: vec![LayerConfig { id: "a".into(), file: FdIndex(2) }],
        console: None,
        vsock: None,
        disks: Vec::new(),
    };
    let machine = RestoredMachine::new(config, FdTable::new(fds.into())).unwrap();
    // As the VMM does before its first vCPU.
    static KICK: OnceLock<()> = OnceLock::new();
    KICK.get_or_init(|| vcpu::install_kick().unwrap());
    let end = Arc::new(EndLatch::new().unwrap());
    match vm::restore(machine, None, end, Box::new(|_, _| {})) {
        Ok(restored) => {
            drop(restored);
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

fn value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u64..300).prop_map(Value::from),
        (0u64..64).prop_map(|bit| Value::from(1u64 << bit)),
        ".{0,40}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
        proptest::collection::vec(any::<u8>(), 0..200).prop_map(|bytes| json!(bytes)),
        (0usize..100_000).prop_map(|length| json!(vec![1u64; length])),
    ]
}

#[test]
fn the_sample_itself_is_restored() {
    assert!(restore(&state_file(&sample().document)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 50, ..ProptestConfig::default() })]

    #[test]
    fn replaced_values_give_a_vm_or_an_error(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), value()), 1..3)
    ) {
        let mut document = sample().document.clone();
        for (place, value) in changes {
            if let Some(target) = document.pointer_mut(place.get::<String>(&sample().places[..])) {
                *target = value;
            }
        }
        restore(&state_file(&document));
    }

    #[test]
    fn damaged_files_are_refused(
        flips in proptest::collection::vec((any::<proptest::sample::Index>(), 0u32..8), 1..4),
        cut in proptest::option::of(any::<proptest::sample::Index>()),
    ) {
        let mut bytes = sample().bytes.clone();
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        prop_assume!(bytes != sample().bytes);
        prop_assert!(MachineState::read(&file(&bytes)).is_err());
    }
}
