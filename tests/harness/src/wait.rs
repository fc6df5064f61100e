//! Deadlines: wait for an event, never for a time.

use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at that nothing announces.
const POLL: Duration = Duration::from_millis(20);

/// Waits until `condition` gives a value, at most `deadline`. `what` says in the error what did
/// not come about.
pub fn until<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if Instant::now() >= end {
            bail!("deadline of {} s passed, and not yet: {what}", deadline.as_secs());
        }
        std::thread::sleep(POLL);
    }
}

/// Waits for a child of ours to end; kills it at the deadline.
pub fn child(what: &str, child: &mut Child, deadline: Duration) -> Result<ExitStatus> {
    let ended = until(what, deadline, || child.try_wait().transpose());
    match ended {
        Ok(status) => Ok(status?),
        Err(error) => {
            child.kill()?;
            child.wait()?;
            Err(error)
        }
    }
}
