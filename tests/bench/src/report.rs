//! The one format of every suite's results, and its table.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::stats::Sample;

/// One figure.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// Where it was measured: `host`, `outer-kvm`, `outer-tcg`.
    pub(crate) ground: String,
    /// Measurements.
    pub(crate) n: usize,
    pub(crate) median: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) unit: &'static str,
    /// The median of what it is compared with, measured in the same run.
    pub(crate) reference: Option<f64>,
    /// `median / reference`.
    pub(crate) ratio: Option<f64>,
    /// What the median (or the ratio, where there is a reference) is to stay below.
    pub(crate) target: Option<f64>,
    pub(crate) met: Option<bool>,
    /// Smallest and largest, for the table.
    #[serde(skip)]
    pub(crate) spread: (f64, f64),
}

impl Row {
    pub(crate) fn new(name: &str, unit: &'static str, sample: &Sample) -> Self {
        Self {
            name: name.to_owned(),
            ground: std::env::var("SPORE_GROUND_NAME").unwrap_or_else(|_| "unknown".into()),
            n: sample.len(),
            median: rounded(sample.median()),
            p95: rounded(sample.p95()),
            p99: rounded(sample.p99()),
            unit,
            reference: None,
            ratio: None,
            target: None,
            met: None,
            spread: (sample.smallest(), sample.largest()),
        }
    }

    /// Compares with another sample's median; `target` bounds the ratio.
    pub(crate) fn against(mut self, reference: &Sample, target: Option<f64>) -> Self {
        let reference = reference.median();
        if reference > 0.0 {
            let ratio = rounded(self.median / reference);
            self.reference = Some(rounded(reference));
            self.ratio = Some(ratio);
            self.target = target;
            self.met = target.filter(|_| self.n > 0).map(|target| ratio <= target);
        }
        self
    }

    /// Bounds the median itself.
    pub(crate) fn at_most(mut self, target: f64) -> Self {
        self.target = Some(target);
        self.met = (self.n > 0).then_some(self.median <= target);
        self
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

/// Prints the table and writes `SUITE.json` into `results`.
pub(crate) fn publish(suite: &str, rows: &[Row], results: &Path) -> Result<()> {
    println!("\n{suite} on ground {}\n", rows.first().map_or("unknown", |row| row.ground.as_str()));
    println!("| figure | n | median | p95 | p99 | min .. max | unit | reference | ratio | target | met |");
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for row in rows {
        let optional =
            |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
        let met = row.met.map_or("-", |met| if met { "yes" } else { "NO" });
        println!(
            "| {} | {} | {:.1} | {:.1} | {:.1} | {:.1} .. {:.1} | {} | {} | {} | {} | {met} |",
            row.name,
            row.n,
            row.median,
            row.p95,
            row.p99,
            row.spread.0,
            row.spread.1,
            row.unit,
            optional(row.reference),
            optional(row.ratio),
            optional(row.target),
        );
    }
    let path = results.join(format!("{suite}.json"));
    fs::write(&path, serde_json::to_vec_pretty(rows)?).with_context(|| format!("writing {}", path.display()))
}
