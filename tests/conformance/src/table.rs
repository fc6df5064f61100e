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
