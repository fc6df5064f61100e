//! What the times of an operation's runs come to.

use std::time::Duration;

use serde::Serialize;

use super::operation::Operation;
use crate::show::nanoseconds;

/// Of the times of the runs that succeeded, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Figures {
    pub(super) avg_ns: u64,
    pub(super) min_ns: u64,
    pub(super) p50_ns: u64,
    pub(super) p95_ns: u64,
    pub(super) p99_ns: u64,
    pub(super) max_ns: u64,
}

impl Figures {
    /// There are none of nothing.
    fn of(times: &[u64]) -> Option<Self> {
        let mut sorted = times.to_vec();
        sorted.sort_unstable();
        let sum: u128 = sorted.iter().map(|time| u128::from(*time)).sum();
        Some(Self {
            avg_ns: u64::try_from(sum.checked_div(sorted.len() as u128)?).unwrap_or(u64::MAX),
            min_ns: *sorted.first()?,
            p50_ns: nearest_rank(&sorted, 50)?,
            p95_ns: nearest_rank(&sorted, 95)?,
            p99_ns: nearest_rank(&sorted, 99)?,
            max_ns: *sorted.last()?,
        })
    }
}

/// The smallest time that so many per cent of all are not above: always one that was measured.
fn nearest_rank(sorted: &[u64], percent: usize) -> Option<u64> {
    let rank = sorted.len().saturating_mul(percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied()
}

/// What is told of an operation.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    pub(super) operation: Operation,
    pub(super) concurrency: usize,
    pub(super) count: usize,
    pub(super) ok: usize,
    pub(super) success_percent: f64,
    /// Left out when no run has succeeded.
    #[serde(flatten)]
    pub(super) figures: Option<Figures>,
    /// For how long runs were under way.
    pub(super) wall_ns: u64,
    /// Of the wall time, for each that succeeded.
    pub(super) amortised_ns: Option<u64>,
    pub(super) per_second: Option<f64>,
    /// Of those that succeeded, in the order of their ends.
    pub(super) samples_ns: Vec<u64>,
    pub(super) first_failure: Option<String>,
}

/// A row as it grows.
#[derive(Debug)]
pub(super) struct Tally {
    operation: Operation,
    concurrency: usize,
    count: usize,
    times: Vec<u64>,
    wall: Duration,
    failure: Option<String>,
}

impl Tally {
    pub(super) fn new(operation: Operation, concurrency: usize, count: usize) -> Self {
        Self { operation, concurrency, count, times: Vec::new(), wall: Duration::ZERO, failure: None }
    }

    pub(super) fn succeeded(&mut self, time: Duration) {
        self.times.push(nanoseconds(time));
    }

    /// The first is told.
    pub(super) fn failed(&mut self, why: impl ToString) {
        self.failure.get_or_insert_with(|| why.to_string());
    }

    /// Runs were under way for so long.
    pub(super) fn took(&mut self, wall: Duration) {
        self.wall = self.wall.saturating_add(wall);
    }

    #[allow(clippy::cast_precision_loss, reason = "counts of runs are small")]
    pub(super) fn row(self) -> Row {
        let (ok, wall) = (self.times.len(), self.wall.as_secs_f64());
        let divisor = u128::try_from(ok).unwrap_or(u128::MAX);
        let amortised = self.wall.as_nanos().checked_div(divisor);
        Row {
            operation: self.operation,
            concurrency: self.concurrency,
            count: self.count,
            ok,
            success_percent: if self.count == 0 { 0.0 } else { 100.0 * ok as f64 / self.count as f64 },
            figures: Figures::of(&self.times),
            wall_ns: nanoseconds(self.wall),
            amortised_ns: amortised.map(|time| u64::try_from(time).unwrap_or(u64::MAX)),
            per_second: (ok > 0 && wall > 0.0).then(|| ok as f64 / wall),
            samples_ns: self.times,
            first_failure: self.failure,
        }
    }
}

/// As people read it.
#[allow(clippy::cast_precision_loss, reason = "of nanoseconds nobody sees the last digits")]
pub(super) fn milliseconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let hundred: Vec<u64> = (1..=100).collect();
        let ranks = |sorted: &[u64]| [50, 95, 99, 100].map(|percent| nearest_rank(sorted, percent));
        assert_eq!(ranks(&hundred), [Some(50), Some(95), Some(99), Some(100)]);
        assert_eq!(ranks(&[15, 20, 35, 40, 50]), [Some(35), Some(50), Some(50), Some(50)]);
        assert_eq!(ranks(&[7, 9]), [Some(7), Some(9), Some(9), Some(9)]);
        assert_eq!(ranks(&[7]), [Some(7); 4]);
        assert_eq!(ranks(&[]), [None; 4]);
        assert_eq!(nearest_rank(&[7], 0), Some(7));
    }

    #[test]
    fn figures_do_not_depend_on_the_order_and_do_not_overflow() {
        let figures = Figures::of(&[30, 10, 20]).unwrap();
        let Figures { avg_ns, min_ns, p50_ns, p95_ns, p99_ns, max_ns } = figures;
        assert_eq!([avg_ns, min_ns, p50_ns, p95_ns, p99_ns, max_ns], [20, 10, 20, 30, 30, 30]);
        assert_eq!(Figures::of(&[u64::MAX; 3]).unwrap().avg_ns, u64::MAX);
        assert_eq!(Figures::of(&[]), None);
    }

    #[test]
    fn a_row_tells_runs_that_failed_and_the_first_reason() {
        let mut tally = Tally::new(Operation::Exec, 2, 4);
        tally.took(Duration::from_millis(300));
        for time in [100, 200, 150] {
            tally.succeeded(Duration::from_millis(time));
        }
        tally.failed("the first");
        tally.failed("another");
        tally.took(Duration::from_millis(300));
        let row = tally.row();
        assert_eq!((row.count, row.ok, row.first_failure.as_deref()), (4, 3, Some("the first")));
        assert_eq!((row.wall_ns, row.amortised_ns), (600_000_000, Some(200_000_000)));
        assert!((row.success_percent - 75.0).abs() < 1e-9 && (row.per_second.unwrap() - 5.0).abs() < 1e-9);
        assert_eq!(row.samples_ns, [100_000_000, 200_000_000, 150_000_000]);
    }

    #[test]
    fn of_runs_that_all_failed_there_are_no_figures() {
        let mut tally = Tally::new(Operation::Create, 1, 2);
        tally.failed("no");
        let row = serde_json::to_value(tally.row()).unwrap();
        assert_eq!((&row["ok"], &row["success_percent"]), (&0.into(), &0.0.into()));
        assert!(row.get("p50_ns").is_none() && row["per_second"].is_null() && row["amortised_ns"].is_null());
    }
}
