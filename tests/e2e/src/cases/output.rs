//! What a container writes arrives byte for byte.

use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};

use super::{Case, expect_equal};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    Case::new("output::both_streams", both_streams).smoke(),
    Case::new("output::every_byte_value", every_byte_value),
    Case::new("output::one_mebibyte", one_mebibyte),
    Case::new("output::sixty_four_mebibytes", sixty_four_mebibytes),
];

const MEBIBYTE: usize = 1 << 20;

fn both_streams(subject: &Subject) -> Result<()> {
    let output = subject.shell("streams", "echo to stdout; echo to stderr >&2")?;
    ensure!(output.success(), "{output}");
    expect_equal("standard output", &output.text().as_str(), &"to stdout\n")?;
    expect_equal("standard error", &output.errors().as_str(), &"to stderr\n")
}

fn every_byte_value(subject: &Subject) -> Result<()> {
    let all: String = (0..=255).map(|byte| format!("\\{byte:03o}")).collect();
    let output = subject.shell("bytes", &format!("printf '{all}'"))?;
    ensure!(output.success(), "{output}");
    expect_equal("standard output", &output.stdout, &(0..=255).collect::<Vec<u8>>())
}

fn one_mebibyte(subject: &Subject) -> Result<()> {
    blocks(subject, 1)
}

fn sixty_four_mebibytes(subject: &Subject) -> Result<()> {
    blocks(subject, 64)
}

/// The guest makes a random block of a MiB, tells its digest on standard error and writes it
/// `count` times, numbered: a lost, repeated, swapped or changed piece shows.
fn blocks(subject: &Subject, count: usize) -> Result<()> {
    let script = format!(
        "set -e; head -c {MEBIBYTE} /dev/urandom > /tmp/block; sha256sum < /tmp/block >&2; \
         for i in $(seq 1 {count}); do printf %08d $i; cat /tmp/block; done"
    );
    let output = subject.shell("blocks", &script)?;
    ensure!(output.success(), "{output}");
    expect_equal("length", &output.stdout.len(), &(count * (8 + MEBIBYTE)))?;
    let errors = output.errors();
    let digest = errors.split_whitespace().next().unwrap_or_default();
    for (index, piece) in output.stdout.chunks(8 + MEBIBYTE).enumerate() {
        let (number, block) = piece.split_at(8);
        expect_equal("block number", &number, &format!("{:08}", index + 1).as_bytes())?;
        // Hashing is slow on an emulated CPU: the first block by digest, others by comparison.
        if index == 0 {
            let found: String = Sha256::digest(block).iter().map(|byte| format!("{byte:02x}")).collect();
            expect_equal("digest of the block", &found.as_str(), &digest)?;
        } else {
            ensure!(block == &output.stdout[8..8 + MEBIBYTE], "block {} differs from the first", index + 1);
        }
    }
    Ok(())
}
