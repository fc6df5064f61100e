//! Tells when the kernel has killed processes of a container for lack of memory.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::life::Container;
use crate::error::{AgentError, Result};

/// Waits until more than `seen` were killed; gives their number. Ends with the container.
pub async fn wait(container: &Container, seen: u64) -> Result<u64> {
    let events = container.cgroup.path().join("memory.events");
    let failed = |error: io::Error| AgentError::internal(events.display(), error);
    // The kernel modifies the file at each event; watched before it is read, none is missed.
    let watch = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
        .map_err(|error| failed(error.into()))?;
    watch.add_watch(&events, AddWatchFlags::IN_MODIFY).map_err(|error| failed(error.into()))?;
    let changes = watch.as_fd().try_clone_to_owned().and_then(crate::sys::watch).map_err(failed)?;
    let init = std::sync::Arc::clone(&container.init);
    let ended = init.wait();
    tokio::pin!(ended);
    loop {
        let kills = kills(&events).map_err(failed)?;
        if kills > seen {
            return Ok(kills);
        }
        tokio::select! {
            // What is killed is counted before it dies.
            _ = &mut ended => {
                return match self::kills(&events) {
                    Ok(kills) if kills > seen => Ok(kills),
                    _ => Err(AgentError::NotFound(format!("{}: has ended", container.name_of("")))),
                };
            }
            ready = changes.readable() => {
                let mut ready = ready.map_err(failed)?;
                // Which events they are does not matter.
                while watch.read_events().is_ok_and(|events| !events.is_empty()) {}
                ready.clear_ready();
            }
        }
    }
}

fn kills(events: &Path) -> io::Result<u64> {
    Ok(count(&fs::read_to_string(events)?))
}

fn count(text: &str) -> u64 {
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_are_told_from_ooms() {
        assert_eq!(count("low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 9\n"), 2);
        assert_eq!(count(""), 0);
    }
}
