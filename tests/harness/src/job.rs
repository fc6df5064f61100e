//! What the host asks the ground to do, and how the ground answers.
//!
//! The request is one JSON file ([`Job`]). The answer is the program's output, byte for byte,
//! with records of [`Record`] between: each an ASCII record separator, JSON and a newline;
//! no program of ours prints that separator.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// First byte of a record; it ends with a newline.
pub const RECORD_SEPARATOR: u8 = 0x1e;
/// The status that a job has when the ground ended it at its deadline, as of timeout(1).
pub const STATUS_DEADLINE: i32 = 124;
/// Where a job puts the files that the host shall have.
pub const RESULTS: &str = "/results";
/// Where the payload disk is mounted.
pub const PAYLOAD: &str = "/opt/payload";
/// Why Spore could not be installed on the ground.
pub const NOT_INSTALLED: &str = "/run/spore-not-installed";
/// Directory on it that looks like a checkout in which everything is built.
pub const CHECKOUT: &str = "spore";

/// Archive on it of the image of applications, when they were asked for.
pub const APPLICATIONS: &str = "images/applications.tar";

/// A program to run on the ground.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// Absolute path inside the ground, or a name found in the payload's `bin`.
    pub program: String,
    pub args: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// Seconds that the program may take.
    pub deadline_s: u64,
    /// Name of the ground, for the program to report.
    pub ground: String,
}

/// What the ground says about the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// The ground stands; the program starts. Seconds since its kernel started.
    Started { uptime_s: u64, kernel: String, kvm: bool },
    /// The program ended. Nothing follows but the files.
    Ended { status: i32 },
    /// The ground could not run the program.
    Failed { reason: String },
}

impl Record {
    /// The record as one line.
    pub fn to_line(&self) -> Vec<u8> {
        let mut line = vec![RECORD_SEPARATOR];
        // A record of strings and numbers always has a JSON form.
        line.extend(serde_json::to_vec(self).unwrap_or_default());
        line.push(b'\n');
        line
    }
}

/// Separates a stream of output into the program's bytes and the records.
#[derive(Debug, Default)]
pub struct Demux {
    /// A record's line so far.
    record: Option<Vec<u8>>,
}

impl Demux {
    /// Takes the next bytes; returns those of the program and the complete records.
    pub fn feed(&mut self, bytes: &[u8]) -> (Vec<u8>, Vec<Record>) {
        let mut plain = Vec::with_capacity(bytes.len());
        let mut records = Vec::new();
        for &byte in bytes {
            match (&mut self.record, byte) {
                (Some(line), b'\n') => {
                    records.extend(serde_json::from_slice::<Record>(line).ok());
                    self.record = None;
                }
                (Some(line), byte) => line.push(byte),
                (None, RECORD_SEPARATOR) => self.record = Some(Vec::new()),
                (None, byte) => plain.push(byte),
            }
        }
        (plain, records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_taken_out_of_the_stream_wherever_it_is_cut() {
        let mut stream = b"one\n".to_vec();
        stream.extend(Record::Ended { status: 7 }.to_line());
        stream.extend(b"two");
        for cut in 0..stream.len() {
            let mut demux = Demux::default();
            let (mut plain, mut records) = demux.feed(&stream[..cut]);
            let (rest, more) = demux.feed(&stream[cut..]);
            plain.extend(rest);
            records.extend(more);
            assert_eq!(plain, b"one\ntwo");
            assert_eq!(records, [Record::Ended { status: 7 }]);
        }
    }
}
