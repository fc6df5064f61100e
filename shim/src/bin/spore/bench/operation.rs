//! What can be measured.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Operation {
    /// A container with its rootfs snapshot and its task, until Start has answered
    Create,
    /// A command in a container that runs, from Exec to its exit status
    Exec,
    /// A snapshot of a container that runs, until it is on disk
    Snapshot,
    /// A container that begins with a snapshot taken before, until Start has answered
    Restore,
    /// What `spore clone` does: a zygote of a container that runs, and a container that is forked off it
    Clone,
    /// A container that runs goes back to a snapshot taken before, until it runs again
    Rollback,
    /// A container that runs is put away, until its machine is on disk and gone
    Hibernate,
    /// A container that hibernates comes back, until it runs again
    Resume,
}

impl Operation {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Exec => "exec",
            Self::Snapshot => "snapshot",
            Self::Restore => "restore",
            Self::Clone => "clone",
            Self::Rollback => "rollback",
            Self::Hibernate => "hibernate",
            Self::Resume => "resume",
        }
    }

    /// How many containers that run it needs, for so many runs at once.
    pub(super) fn sources(self, concurrency: usize) -> usize {
        match self {
            Self::Create => 0,
            // All begin with one snapshot.
            Self::Restore => 1,
            Self::Exec | Self::Snapshot | Self::Clone | Self::Rollback | Self::Hibernate | Self::Resume => {
                concurrency
            }
        }
    }

    /// Whether it needs a snapshot of each of them.
    pub(super) fn needs_snapshot(self) -> bool {
        matches!(self, Self::Restore | Self::Rollback)
    }
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_has_one_name_everywhere() {
        for operation in Operation::value_variants() {
            let name = operation.name();
            assert_eq!(operation.to_possible_value().unwrap().get_name(), name);
            assert_eq!(serde_json::to_value(operation).unwrap(), name);
        }
    }
}
