//! The cases, one module per behaviour.

mod bad_command;
mod bad_config;
mod bad_host;
mod bench;
mod checkpoint;
mod clone;
mod command;
mod copy;
mod environment;
mod events;
mod files;
mod generation;
mod guest_spec;
mod killed;
mod leftovers;
mod matrix;
mod memory;
mod output;
mod rootfs;
mod signals;
mod status;
mod stdin;
mod tasks;
mod vmm;

use anyhow::Result;

use spore_harness::bed::Subject;

/// One behaviour to prove.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Subject) -> Result<()>,
    /// No other case may run meanwhile.
    pub(crate) alone: bool,
    /// Runs with old series of containerd too.
    pub(crate) smoke: bool,
    /// What it proves exists only in Spore.
    pub(crate) spore_only: bool,
    /// Belongs to `make soak`, which runs it on each series.
    pub(crate) long: bool,
    /// Too long for every series in `make test`: only the newest.
    pub(crate) newest_unless_soak: bool,
    /// Series of containerd from which on it applies.
    pub(crate) since: &'static str,
    /// How many it starts: what it costs.
    pub(crate) containers: usize,
}

impl Case {
    pub(crate) const fn new(name: &'static str, run: fn(&Subject) -> Result<()>) -> Self {
        Self {
            name,
            run,
            alone: false,
            smoke: false,
            spore_only: false,
            long: false,
            newest_unless_soak: false,
            since: "",
            containers: 1,
        }
    }

    pub(crate) const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    pub(crate) const fn smoke(mut self) -> Self {
        self.smoke = true;
        self
    }

    pub(crate) const fn spore_only(mut self) -> Self {
        self.spore_only = true;
        self
    }

    pub(crate) const fn starts(mut self, containers: usize) -> Self {
        self.containers = containers;
        self
    }

    pub(crate) const fn since(mut self, series: &'static str) -> Self {
        self.since = series;
        self
    }

    pub(crate) const fn newest_unless_soak(mut self) -> Self {
        self.newest_unless_soak = true;
        self.long()
    }

    pub(crate) const fn long(mut self) -> Self {
        self.long = true;
        self
    }

    pub(crate) fn applies(&self, subject: &Subject) -> bool {
        let since = if self.newest_unless_soak && soak().is_none() { "2." } else { self.since };
        (subject.is_spore() || !self.spore_only) && subject.series.as_str() >= since
    }
}

/// The runs that `make soak` asks for.
pub(crate) fn soak() -> Option<usize> {
    std::env::var("SPORE_E2E_SOAK").ok()?.parse().ok()
}

/// Every case, the quick and telling ones first.
pub(crate) fn all() -> Vec<Case> {
    [
        output::CASES,
        stdin::CASES,
        status::CASES,
        signals::CASES,
        tasks::CASES,
        checkpoint::CASES,
        clone::CASES,
        bench::CASES,
        vmm::CASES,
        rootfs::CASES,
        environment::CASES,
        events::CASES,
        command::CASES,
        files::CASES,
        generation::CASES,
        guest_spec::CASES,
        copy::CASES,
        bad_command::CASES,
        bad_config::CASES,
        leftovers::CASES,
        matrix::CASES,
        memory::CASES,
        killed::CASES,
        bad_host::CASES,
    ]
    .concat()
}

/// Fails with what was found and what was expected.
pub(crate) fn expect_equal<T: PartialEq + std::fmt::Debug>(
    what: &str,
    found: &T,
    expected: &T,
) -> Result<()> {
    anyhow::ensure!(found == expected, "{what}: found {found:?}, expected {expected:?}");
    Ok(())
}

/// Fails when `text` lacks `part`.
pub(crate) fn expect_contains(what: &str, text: &str, part: &str) -> Result<()> {
    anyhow::ensure!(text.contains(part), "{what}: {part:?} is not in {text:?}");
    Ok(())
}
