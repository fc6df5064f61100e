//! The table of what runc and Spore do.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use spore_harness::containerd::Runtime;

/// How a case ended with one runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Same,
    /// Known, with its reason.
    Differs(&'static str),
    Failed,
}

type Row = BTreeMap<(String, &'static str), Verdict>;

#[derive(Default)]
pub(crate) struct Table {
    rows: Mutex<BTreeMap<&'static str, Row>>,
}

impl Table {
    pub(crate) fn note(&self, case: &'static str, series: &str, runtime: Runtime, verdict: Verdict) {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        rows.entry(case).or_default().insert((series.to_owned(), runtime.name()), verdict);
    }

    /// Prints it, and keeps it among the results.
    pub(crate) fn write(&self) -> Result<()> {
        let text = self.text();
        println!("{text}");
        let Some(results) = std::env::var_os("SPORE_RESULTS") else { return Ok(()) };
        let path = PathBuf::from(results).join("conformance.md");
        fs::write(&path, text).with_context(|| path.display().to_string())
    }

    fn text(&self) -> String {
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let mut columns: Vec<_> = rows.values().flat_map(|row| row.keys().cloned()).collect();
        columns.sort();
        columns.dedup();
        let mut text = String::from("| behaviour |");
        for (series, runtime) in &columns {
            let _ = write!(text, " {runtime}, {series} |");
        }
        text.push_str("\n|---|");
        text.push_str(&"---|".repeat(columns.len()));
        for (case, row) in rows.iter() {
            let _ = write!(text, "\n| {case} |");
            for column in &columns {
                let _ = match row.get(column) {
                    None => write!(text, " - |"),
                    Some(Verdict::Same) => write!(text, " yes |"),
                    Some(Verdict::Differs(reason)) => write!(text, " differs: {reason} |"),
                    Some(Verdict::Failed) => write!(text, " NO |"),
                };
            }
        }
        text.push('\n');
        text
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use crate::cases::{self, docker};

    /// What stands between back quotes and looks like the name of a case.
    fn named(text: &str) -> impl Iterator<Item = &str> {
        text.split('`').skip(1).step_by(2).filter(|word| word.contains(": "))
    }

    #[test]
    fn the_list_of_the_runtime_tools_checks_names_cases_that_there_are() {
        let names: BTreeSet<_> = cases::all(docker::SERIES).into_iter().map(|case| case.name).collect();
        let list = include_str!("../runtime-tools.md");
        let rows: Vec<_> = list.lines().filter(|line| line.starts_with("| ")).skip(1).collect();
        assert_eq!(rows.len(), 58);
        for row in rows {
            let says = ["covered by `", "not applicable: ", "differs: ", "| as linux_cgroups_"];
            assert!(says.iter().any(|word| row.contains(word)), "{row}");
            for name in named(row) {
                assert!(names.contains(name), "no case {name:?}: {row}");
            }
        }
    }

    #[test]
    fn the_table_of_results_names_cases_that_there_are() {
        let names: BTreeSet<_> = cases::all(docker::SERIES).into_iter().map(|case| case.name).collect();
        let table = include_str!("../README.md").lines().filter(|line| line.starts_with("| "));
        for name in table.filter_map(|row| row.split(" | ").next()?.strip_prefix("| ")).skip(1) {
            assert!(names.contains(name), "no case {name:?}");
        }
    }
}
