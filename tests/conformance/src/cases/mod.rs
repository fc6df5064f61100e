//! The cases, one module per part of the interface.

mod changes;
mod config;
mod counts;
pub(crate) mod docker;
mod exec;
mod hooks;
mod limits;
pub(crate) mod namespaces;
pub(crate) mod network;
mod pause;
mod process;
mod processes;
mod propagation;
mod resources;
mod restart;
mod seccomp;
mod spec;
mod states;
mod stdio;
mod volumes;

use anyhow::{Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::call::Output;

/// One behaviour.
#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&Subject) -> Result<()>,
    /// No other case may run meanwhile.
    pub(crate) alone: bool,
    /// Why Spore does not do as runc does, where it cannot or should not.
    pub(crate) differs: Option<&'static str>,
    /// Containers that it starts: what it costs.
    pub(crate) weight: usize,
    /// There is only one series of containerd that it runs under.
    pub(crate) one_series: bool,
}

impl Case {
    /// One that looks into the shared container.
    pub(crate) const fn new(name: &'static str, run: fn(&Subject) -> Result<()>) -> Self {
        Self { name, run, alone: false, differs: None, weight: 1, one_series: false }
    }

    pub(crate) const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }

    /// Spore does not as runc does, and why.
    pub(crate) const fn differs(mut self, reason: &'static str) -> Self {
        self.differs = Some(reason);
        self
    }

    /// It starts so many containers of its own.
    pub(crate) const fn starts(mut self, containers: usize) -> Self {
        self.weight = 10 * containers;
        self
    }
}

/// The cases for one series of containerd.
pub(crate) fn all(series: &str) -> Vec<Case> {
    let of_docker =
        [docker::CASES, docker::changes::CASES, docker::checkpoint::CASES, docker::network::CASES].concat();
    let docker = of_docker.into_iter().filter(|_| series == docker::SERIES);
    let mut cases = [
        exec::CASES,
        process::CASES,
        processes::CASES,
        states::CASES,
        spec::CASES,
        config::CASES,
        resources::CASES,
        namespaces::CASES,
        propagation::CASES,
        seccomp::CASES,
        stdio::CASES,
        hooks::CASES,
        pause::CASES,
        limits::CASES,
        restart::CASES,
        volumes::CASES,
        changes::CASES,
        network::addresses::CASES,
        network::traffic::CASES,
        network::policy::CASES,
        network::moments::CASES,
        network::refused::CASES,
        network::trouble::CASES,
        counts::CASES,
        counts::network::CASES,
    ]
    .concat();
    cases.extend(docker.map(|case| Case { one_series: true, ..case }));
    cases
}

/// Spore does what it should where it does not do as runc does: the error that a case with such a
/// difference ends with.
#[derive(Debug)]
pub(crate) struct Difference;

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("as documented, other than with runc")
    }
}

impl std::error::Error for Difference {}

/// Fails with what was found and what was expected.
pub(crate) fn equal(what: &str, found: &str, expected: &str) -> Result<()> {
    ensure!(found == expected, "{what}: found {found:?}, expected {expected:?}");
    Ok(())
}

/// A call that failed, in words that contain all of `parts`.
pub(crate) fn refused(output: &Output, parts: &[&str]) -> Result<()> {
    ensure!(!output.success(), "it succeeded: {output}");
    let errors = output.errors();
    for part in parts {
        ensure!(errors.contains(part), "{part:?} is not in {errors:?}");
    }
    Ok(())
}
