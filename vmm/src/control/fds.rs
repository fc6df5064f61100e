//! The descriptors of one packet. Each is taken by the index that the message gives, at most
//! once; what is left is closed with the table.

use std::os::fd::OwnedFd;

use crate::api::FdIndex;

/// A message and its descriptors do not match.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FdError {
    #[error("{what}: descriptor {index} is named, but only {attached} are attached")]
    Missing { what: String, index: u32, attached: usize },
    #[error("{what}: descriptor {index} is named twice")]
    Twice { what: String, index: u32 },
    #[error("{count} attached descriptors are not named in the message (the first is {first})")]
    Unused { count: usize, first: usize },
}

/// Owns the descriptors until they are taken.
#[derive(Debug, Default)]
pub struct FdTable {
    slots: Vec<Option<OwnedFd>>,
}

impl FdTable {
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self { slots: fds.into_iter().map(Some).collect() }
    }

    /// Takes the descriptor for `what`.
    pub fn take(&mut self, index: FdIndex, what: &str) -> Result<OwnedFd, FdError> {
        let attached = self.slots.len();
        let slot = usize::try_from(index.0).ok().and_then(|at| self.slots.get_mut(at));
        let slot =
            slot.ok_or_else(|| FdError::Missing { what: what.to_owned(), index: index.0, attached })?;
        slot.take().ok_or_else(|| FdError::Twice { what: what.to_owned(), index: index.0 })
    }

    /// Checks that every descriptor was taken.
    pub fn finish(self) -> Result<(), FdError> {
        let count = self.slots.iter().flatten().count();
        match self.slots.iter().position(Option::is_some) {
            Some(first) => Err(FdError::Unused { count, first }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::*;

    fn table(count: usize) -> FdTable {
        FdTable::new((0..count).map(|_| tempfile::tempfile().unwrap().into()).collect())
    }

    #[test]
    fn each_descriptor_is_taken_once() {
        let mut fds = table(2);
        fds.take(FdIndex(1), "kernel").unwrap();
        assert!(matches!(fds.take(FdIndex(1), "initrd"), Err(FdError::Twice { index: 1, .. })));
        assert!(matches!(fds.take(FdIndex(2), "disk"), Err(FdError::Missing { attached: 2, .. })));
        assert!(matches!(fds.take(FdIndex(u32::MAX), "disk"), Err(FdError::Missing { .. })));
        assert_eq!(fds.finish(), Err(FdError::Unused { count: 1, first: 0 }));
    }

    #[test]
    fn what_is_not_taken_is_closed() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let raw = writer.as_raw_fd();
        let error = FdTable::new(vec![writer]).finish().unwrap_err();
        assert_eq!(error, FdError::Unused { count: 1, first: 0 });
        let mut byte = [0];
        assert_eq!(nix::unistd::read(&reader, &mut byte).unwrap(), 0, "descriptor {raw} is closed");
    }
}
