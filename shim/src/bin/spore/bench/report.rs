//! What was measured and where: as tables, and as JSON, whose shape `shim/README.md` tells.

use serde::Serialize;

use super::compare::{Compared, Pair};
use super::figures::{Row, milliseconds};
use crate::failure::Failure;
use crate::show;

/// Tells these files from others.
pub(super) const KIND: &str = "spore-bench";
/// Of the shape: another one when something that is here means something else, or is gone.
pub(super) const VERSION: u32 = 1;

#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) kind: &'static str,
    pub(super) version: u32,
    pub(super) date: String,
    pub(super) spore: &'static str,
    pub(super) containerd: String,
    pub(super) kernel: String,
    pub(super) cpus: usize,
    pub(super) image: String,
    pub(super) snapshotter: String,
    pub(super) operations: Vec<Row>,
    /// With what was before, if that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) compared: Option<Vec<Compared>>,
}

/// This host's.
pub(super) fn kernel() -> String {
    nix::sys::utsname::uname()
        .map_or_else(|_| "unknown".into(), |uname| uname.release().to_string_lossy().into_owned())
}

impl Report {
    /// Of what and where, in a line.
    pub(super) fn place(&self) -> String {
        let text = format!(
            "spore {}, containerd {}, Linux {}, {} CPUs, snapshotter {}",
            self.spore, self.containerd, self.kernel, self.cpus, self.snapshotter
        );
        show::name(text.as_bytes())
    }

    pub(super) fn title(&self) -> String {
        format!("{}, {}", show::name(self.image.as_bytes()), self.date)
    }

    pub(super) fn show(&self, json: bool) -> Result<(), Failure> {
        if json {
            let value = serde_json::to_value(self);
            return show::json(
                &value.map_err(|error| Failure::Refused(format!("write the report: {error}")))?,
            );
        }
        show::line(&self.title())?;
        show::line(&self.place())?;
        show::table(&rows(&self.operations))?;
        match &self.compared {
            Some(compared) if !compared.is_empty() => {
                show::line("")?;
                show::table(&comparison(compared))
            }
            _ => Ok(()),
        }
    }
}

fn cells<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

fn ms(nanoseconds: u64) -> String {
    format!("{:.2}", milliseconds(nanoseconds))
}

fn rows(rows: &[Row]) -> Vec<Vec<String>> {
    let heading = [
        "OPERATION",
        "AT ONCE",
        "RUNS",
        "OK",
        "AVG ms",
        "MIN ms",
        "P50 ms",
        "P95 ms",
        "P99 ms",
        "MAX ms",
        "WALL s",
        "AMORTISED ms",
        "PER SECOND",
        "SUCCESS %",
    ];
    let mut table = vec![cells(heading)];
    for row in rows {
        let mut line = vec![row.operation.to_string()];
        line.extend([row.concurrency, row.count, row.ok].map(|number| number.to_string()));
        line.extend(match row.figures {
            Some(of) => [of.avg_ns, of.min_ns, of.p50_ns, of.p95_ns, of.p99_ns, of.max_ns].map(ms),
            None => [(); 6].map(|()| "-".into()),
        });
        line.push(format!("{:.2}", milliseconds(row.wall_ns) / 1e3));
        line.push(row.amortised_ns.map_or_else(|| "-".into(), ms));
        line.push(row.per_second.map_or_else(|| "-".into(), |rate| format!("{rate:.2}")));
        line.push(format!("{:.1}", row.success_percent));
        table.push(line);
    }
    table
}

fn comparison(compared: &[Compared]) -> Vec<Vec<String>> {
    let heading = ["OPERATION", "AT ONCE", "P50 ms", "BEFORE", "RATIO", "P95 ms", "BEFORE", "RATIO"];
    let mut table = vec![cells(heading)];
    let pair = |pair: Pair| [ms(pair.now_ns), ms(pair.before_ns), format!("{:.2}", pair.ratio)];
    for row in compared {
        let mut line = vec![row.operation.to_string(), row.concurrency.to_string()];
        line.extend(pair(row.p50));
        line.extend(pair(row.p95));
        table.push(line);
    }
    table
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::super::figures::Tally;
    use super::super::operation::Operation;
    use super::*;

    /// One that two operations make.
    pub(in super::super) fn report(image: &str) -> Report {
        let mut exec = Tally::new(Operation::Exec, 2, 3);
        for time in [20, 10, 30] {
            exec.succeeded(Duration::from_millis(time));
        }
        exec.took(Duration::from_millis(60));
        let mut create = Tally::new(Operation::Create, 2, 1);
        create.failed("it cannot be");
        Report {
            kind: KIND,
            version: VERSION,
            date: "2026-11-23T00:00:00Z".into(),
            spore: "0.1.0",
            containerd: "1.7".into(),
            kernel: "6.12".into(),
            cpus: 2,
            image: image.into(),
            snapshotter: "native".into(),
            operations: vec![exec.row(), create.row()],
            compared: None,
        }
    }

    #[test]
    fn the_shape_is_the_documented_one() {
        let value = serde_json::to_value(report("busybox")).unwrap();
        let expected = json!({
            "kind": "spore-bench", "version": 1, "date": "2026-11-23T00:00:00Z", "spore": "0.1.0",
            "containerd": "1.7", "kernel": "6.12", "cpus": 2, "image": "busybox", "snapshotter": "native",
            "operations": [
                {
                    "operation": "exec", "concurrency": 2, "count": 3, "ok": 3, "success_percent": 100.0,
                    "avg_ns": 20_000_000, "min_ns": 10_000_000, "p50_ns": 20_000_000,
                    "p95_ns": 30_000_000, "p99_ns": 30_000_000, "max_ns": 30_000_000,
                    "wall_ns": 60_000_000, "amortised_ns": 20_000_000, "per_second": 50.0,
                    "samples_ns": [20_000_000, 10_000_000, 30_000_000], "first_failure": null
                },
                {
                    "operation": "create", "concurrency": 2, "count": 1, "ok": 0, "success_percent": 0.0,
                    "wall_ns": 0, "amortised_ns": null, "per_second": null, "samples_ns": [],
                    "first_failure": "it cannot be"
                }
            ]
        });
        assert_eq!(value, expected);
    }

    #[test]
    fn rows_have_a_cell_for_each_heading() {
        let report = report("busy\u{202e}box");
        let table = rows(&report.operations);
        assert!(table.iter().all(|row| row.len() == table[0].len()));
        let (exec, create) = (table[1].join(" "), table[2].join(" "));
        assert_eq!(exec, "exec 2 3 3 20.00 10.00 20.00 30.00 30.00 30.00 0.06 20.00 50.00 100.0");
        assert_eq!(create, "create 2 1 0 - - - - - - 0.00 - - 0.0");
        assert!(report.title().starts_with("busy\\u{202e}box, 2026"));
    }

    #[test]
    fn a_report_can_be_compared_with_itself() {
        let directory = tempfile::tempdir().unwrap();
        let (path, report) = (directory.path().join("before.json"), report("busybox"));
        std::fs::write(&path, serde_json::to_vec(&report).unwrap()).unwrap();
        let before = super::super::compare::Before::read(&path).unwrap();
        let compared = before.compare(&report.operations[0]).unwrap();
        assert_eq!(comparison(&[compared])[1].join(" "), "exec 2 20.00 20.00 1.00 30.00 30.00 1.00");
        assert!(before.compare(&report.operations[1]).is_err());
    }
}
