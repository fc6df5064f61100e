//! What can go wrong in the guest, in the terms of the agent API.
//!
//! One enum for all requests: its variants are the status codes that
//! `proto/spore/agent/v1/container.proto` promises, its texts name object, operation, cause
//! and mend. [`crate::service`] alone turns them into ttrpc statuses.

/// A refused or failed request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    AlreadyExists(String),
    #[error("{0}")]
    InvalidArgument(String),
    #[error("{0}")]
    FailedPrecondition(String),
    #[error("{0}")]
    Unimplemented(String),
    #[error("{0}")]
    Internal(String),
}

pub type Result<T> = std::result::Result<T, AgentError>;

impl AgentError {
    /// An operation of the guest's kernel or file system that should not fail.
    pub fn internal(operation: impl std::fmt::Display, cause: impl std::fmt::Display) -> Self {
        Self::Internal(format!("{operation}: {cause}"))
    }
}
