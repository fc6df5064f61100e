//! What every part of a VM that has state agrees to. At the bottom of the crate: it imports nothing
//! of it, and devices, transports and the VM import it.
//!
//! A part is saved at the quiescent point only (vCPUs parked, nothing in flight, no lock held), into memory.
//! It is restored into a machine that has not run: a part is made as for a boot, and takes its saved
//! state up before it is used. State is untrusted: whatever it says, the answer is a part that a
//! guest could have brought into this state, or a [`RestoreError`].
//!
//! Versions: a state has the version of its kind. A part reads every version up to its own, the older
//! ones by default values of the fields that they lack, and refuses newer ones.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A part's saved state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartState {
    pub version: u32,
    pub data: Value,
}

/// A part cannot be saved.
#[derive(Debug, thiserror::Error)]
#[error("save {part}: {detail}")]
pub struct SaveError {
    pub part: String,
    pub detail: String,
}

/// A saved state cannot be taken up.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(
        "restore {part}: its state has version {found}, and this VMM reads up to {max}; use the VMM that wrote the snapshot, or a newer one"
    )]
    Newer { part: String, found: u32, max: u32 },
    #[error("restore {part}: its state cannot be decoded: {source}")]
    Malformed { part: String, source: serde_json::Error },
    #[error("restore {part}: {detail}")]
    Invalid { part: String, detail: String },
    #[error("restore {part}: the snapshot has no state of it")]
    Missing { part: String },
    #[error("restore: the snapshot has state of {part}, which this machine does not have")]
    Surplus { part: String },
}

impl RestoreError {
    pub fn invalid(part: &str, detail: impl std::fmt::Display) -> Self {
        Self::Invalid { part: part.to_owned(), detail: detail.to_string() }
    }
}

impl PartState {
    /// The state of a part that has none between two calls.
    pub fn none() -> Self {
        Self { version: 1, data: Value::Null }
    }

    pub fn new<T: Serialize>(part: &str, version: u32, state: &T) -> Result<Self, SaveError> {
        let data = serde_json::to_value(state)
            .map_err(|error| SaveError { part: part.to_owned(), detail: error.to_string() })?;
        Ok(Self { version, data })
    }

    /// The state, if this build knows its version.
    pub fn read<T: DeserializeOwned>(&self, part: &str, newest: u32) -> Result<T, RestoreError> {
        self.check_version(part, newest)?;
        T::deserialize(&self.data).map_err(|source| RestoreError::Malformed { part: part.to_owned(), source })
    }

    /// For a part without state.
    pub fn check_version(&self, part: &str, newest: u32) -> Result<(), RestoreError> {
        if self.version > newest {
            return Err(RestoreError::Newer { part: part.to_owned(), found: self.version, max: newest });
        }
        Ok(())
    }
}

/// A part whose state is in a snapshot under its name.
pub trait Persist {
    fn save(&self) -> Result<PartState, SaveError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Sample {
        size: u32,
        #[serde(default)]
        later: bool,
    }

    #[test]
    fn an_older_state_gets_the_defaults_of_what_it_lacks() {
        let state = PartState { version: 1, data: serde_json::json!({ "size": 7 }) };
        assert_eq!(state.read::<Sample>("sample", 2).unwrap(), Sample { size: 7, later: false });
    }

    #[test]
    fn a_newer_state_is_refused_before_it_is_read() {
        let state = PartState { version: 3, data: Value::from("anything") };
        let error = state.read::<Sample>("sample", 2).unwrap_err();
        assert!(matches!(error, RestoreError::Newer { found: 3, max: 2, .. }), "{error}");
    }

    #[test]
    fn a_state_of_another_shape_is_an_error_that_names_the_part() {
        let state = PartState { version: 1, data: serde_json::json!({ "size": "large" }) };
        let error = state.read::<Sample>("sample", 1).unwrap_err().to_string();
        assert!(error.starts_with("restore sample: "), "{error}");
    }
}
