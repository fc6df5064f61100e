//! A report of before beside that of now. The file is whatever somebody names: nothing of it is believed.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use containerd_shim_spore::clean;
use serde::{Deserialize, Serialize};

use super::figures::Row;
use super::operation::Operation;
use super::report::{KIND, VERSION};

/// Bytes of a report; one of every operation with as many runs as there can be has fewer.
const MAX_FILE: u64 = 16 << 20;
const MAX_OPERATIONS: usize = 64;

#[derive(Debug, thiserror::Error)]
pub(super) enum BeforeError {
    #[error("cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error("is no regular file")]
    NoFile,
    #[error("more than {MAX_FILE} bytes, which no report of `spore bench` has")]
    TooLarge,
    #[error("malformed: {}", clean(.0))]
    Malformed(String),
    #[error("is no report of `spore bench --json`: \"kind\" is not \"{KIND}\"")]
    Foreign,
    #[error("is a report of version {found}, and this command knows version {VERSION}")]
    Version { found: u64 },
    #[error("tells of {found} operations, at most {MAX_OPERATIONS} are allowed")]
    TooMany { found: usize },
    #[error("tells of {0} twice")]
    Twice(Operation),
    #[error("{operation}: p50 of {p50} ns and p95 of {p95} ns, which no runs have")]
    Impossible { operation: Operation, p50: u64, p95: u64 },
}

/// Whose file it is, before anything else of it is looked at.
#[derive(Deserialize)]
struct Head {
    kind: Option<String>,
    version: Option<u64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Before {
    pub(super) date: String,
    pub(super) image: String,
    operations: Vec<Then>,
}

#[derive(Debug, Deserialize)]
struct Then {
    operation: Operation,
    concurrency: usize,
    p50_ns: Option<u64>,
    p95_ns: Option<u64>,
}

/// A figure of now and of before; the ratio is below 1 where now is faster.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Pair {
    pub(super) now_ns: u64,
    pub(super) before_ns: u64,
    pub(super) ratio: f64,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Compared {
    pub(super) operation: Operation,
    pub(super) concurrency: usize,
    pub(super) p50: Pair,
    pub(super) p95: Pair,
}

impl Pair {
    #[allow(clippy::cast_precision_loss, reason = "of nanoseconds nobody sees the last digits")]
    fn new(now_ns: u64, before_ns: u64) -> Self {
        Self { now_ns, before_ns, ratio: now_ns as f64 / before_ns as f64 }
    }
}

impl Before {
    pub(super) fn read(path: &Path) -> Result<Self, BeforeError> {
        // A fifo would wait for its writer.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        if !file.metadata()?.is_file() {
            return Err(BeforeError::NoFile);
        }
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(BeforeError::TooLarge);
        }
        Self::decode(&bytes)
    }

    fn decode(bytes: &[u8]) -> Result<Self, BeforeError> {
        let malformed = |error: serde_json::Error| BeforeError::Malformed(error.to_string());
        let head: Head = serde_json::from_slice(bytes).map_err(malformed)?;
        if head.kind.as_deref() != Some(KIND) {
            return Err(BeforeError::Foreign);
        }
        let found = head.version.unwrap_or_default();
        if found != u64::from(VERSION) {
            return Err(BeforeError::Version { found });
        }
        let before: Self = serde_json::from_slice(bytes).map_err(malformed)?;
        let found = before.operations.len();
        if found > MAX_OPERATIONS {
            return Err(BeforeError::TooMany { found });
        }
        for (at, then) in before.operations.iter().enumerate() {
            let operation = then.operation;
            if before.operations[..at].iter().any(|other| other.operation == operation) {
                return Err(BeforeError::Twice(operation));
            }
            // Whose ratio would be none.
            if let (Some(p50), Some(p95)) = (then.p50_ns, then.p95_ns)
                && (p50 == 0 || p95 < p50)
            {
                return Err(BeforeError::Impossible { operation, p50, p95 });
            }
        }
        Ok(before)
    }

    /// An operation of now beside that of before, or why that is not possible.
    pub(super) fn compare(&self, row: &Row) -> Result<Compared, String> {
        let Row { operation, concurrency, .. } = *row;
        let then = self.operations.iter().find(|then| then.operation == operation);
        let then = then.ok_or_else(|| format!("{operation} was not measured before"))?;
        if then.concurrency != concurrency {
            return Err(format!("{operation} was measured with --concurrency {} before", then.concurrency));
        }
        let (Some(p50), Some(p95)) = (then.p50_ns, then.p95_ns) else {
            return Err(format!("{operation} never succeeded before"));
        };
        let now = row.figures.ok_or_else(|| format!("{operation} never succeeded now"))?;
        let (p50, p95) = (Pair::new(now.p50_ns, p50), Pair::new(now.p95_ns, p95));
        Ok(Compared { operation, concurrency, p50, p95 })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::figures::Tally;
    use super::*;

    fn report(operations: &str) -> String {
        format!(
            r#"{{"kind":"{KIND}","version":{VERSION},"date":"d","image":"i","more":[1],"operations":[{operations}]}}"#
        )
    }

    fn refused(text: impl AsRef<[u8]>) -> BeforeError {
        Before::decode(text.as_ref()).unwrap_err()
    }

    const EXEC: &str =
        r#"{"operation":"exec","concurrency":2,"p50_ns":1000000,"p95_ns":4000000,"samples_ns":[1]}"#;

    #[test]
    fn now_and_before_stand_side_by_side() {
        let restore = r#"{"operation":"restore","concurrency":2}"#;
        let create = r#"{"operation":"create","concurrency":1,"p50_ns":1,"p95_ns":1}"#;
        let before = Before::decode(report(&[EXEC, restore, create].join(",")).as_bytes()).unwrap();
        let row = |operation| {
            let mut tally = Tally::new(operation, 2, 1);
            tally.succeeded(Duration::from_millis(2));
            tally.row()
        };
        let compared = before.compare(&row(Operation::Exec)).unwrap();
        assert!((compared.p50.ratio - 2.0).abs() < 1e-9 && (compared.p95.ratio - 0.5).abs() < 1e-9);
        assert_eq!((compared.p95.now_ns, compared.p95.before_ns), (2_000_000, 4_000_000));
        for (operation, part) in [
            (Operation::Restore, "never succeeded before"),
            (Operation::Create, "--concurrency 1 before"),
            (Operation::Clone, "was not measured before"),
        ] {
            let why = before.compare(&row(operation)).unwrap_err();
            assert!(why.contains(part), "{why}");
        }
        assert!(before.compare(&Tally::new(Operation::Exec, 2, 1).row()).unwrap_err().contains("now"));
    }

    #[test]
    fn what_is_no_report_is_refused_for_what_it_is() {
        for text in ["", "[]", "7", "{", "\x7fELF", &"[".repeat(100_000), "{\"kind\": 7}"] {
            assert!(matches!(refused(text), BeforeError::Malformed(_)), "{text:.20}");
        }
        assert!(matches!(refused(b"\xff\xfe"), BeforeError::Malformed(_)));
        assert!(matches!(refused("{}"), BeforeError::Foreign));
        assert!(matches!(refused(r#"{"kind":"other","version":1}"#), BeforeError::Foreign));
        let newer = format!(r#"{{"kind":"{KIND}","version":9}}"#);
        assert!(matches!(refused(newer), BeforeError::Version { found: 9 }));
        let missing = format!(r#"{{"kind":"{KIND}","version":{VERSION}}}"#);
        assert!(matches!(refused(missing), BeforeError::Malformed(_)));
    }

    #[test]
    fn figures_that_no_runs_have_are_refused() {
        for figure in ["NaN", "-1", "1.5", "1e400", "\"7\"", "18446744073709551616", "{}"] {
            let row = format!(r#"{{"operation":"exec","concurrency":1,"p50_ns":{figure},"p95_ns":1}}"#);
            assert!(matches!(refused(report(&row)), BeforeError::Malformed(_)), "{figure}");
        }
        for (p50, p95) in [(0, 1), (0, 0), (2, 1)] {
            let row = format!(r#"{{"operation":"exec","concurrency":1,"p50_ns":{p50},"p95_ns":{p95}}}"#);
            assert!(matches!(refused(report(&row)), BeforeError::Impossible { .. }), "{p50} {p95}");
        }
        let unknown = r#"{"operation":"\u001b[2J","concurrency":1}"#;
        let error = refused(report(unknown)).to_string();
        assert!(error.contains("unknown variant") && !error.contains('\x1b'), "{error}");
        assert!(matches!(refused(report(&[EXEC; 2].join(","))), BeforeError::Twice(Operation::Exec)));
        let many = [EXEC; MAX_OPERATIONS + 1].join(",");
        assert!(matches!(refused(report(&many)), BeforeError::TooMany { .. }));
    }

    #[test]
    fn a_file_is_read_within_bounds() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(Before::read(directory.path()).unwrap_err(), BeforeError::NoFile));
        assert!(matches!(Before::read(Path::new("/dev/zero")).unwrap_err(), BeforeError::NoFile));
        let path = directory.path().join("file");
        assert!(matches!(Before::read(&path).unwrap_err(), BeforeError::Read(_)));
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(matches!(Before::read(&path).unwrap_err(), BeforeError::NoFile));
        std::fs::remove_file(&path).unwrap();
        std::fs::File::create(&path).unwrap().set_len(MAX_FILE + 1).unwrap();
        assert!(matches!(Before::read(&path).unwrap_err(), BeforeError::TooLarge));
        std::fs::write(&path, report(EXEC)).unwrap();
        assert_eq!(Before::read(&path).unwrap().operations.len(), 1);
    }
}
