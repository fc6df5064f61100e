//! A running container's host name.

use std::fs::File;
use std::io;
use std::thread;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::unistd::sethostname;

use crate::error::{AgentError, Result};

/// The kernel's (__NEW_UTS_LEN).
const MAX: usize = 64;

pub(super) fn check(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > MAX || name.contains('\0') {
        return Err(AgentError::InvalidArgument(format!(
            "host name \"{}\": 1 to {MAX} bytes are allowed",
            name[..name.floor_char_boundary(2 * MAX)].escape_default()
        )));
    }
    Ok(())
}

/// Of the UTS namespace that a process is in, from a thread of its own: the caller stays where it is.
pub(super) fn set(pid: u32, name: &str) -> io::Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/uts"))?;
    let named = |name: &str| -> std::result::Result<(), Errno> {
        setns(namespace, CloneFlags::CLONE_NEWUTS)?;
        sethostname(name)
    };
    let set = thread::scope(|scope| scope.spawn(|| named(name)).join());
    set.map_err(|_| io::Error::other("its thread has failed"))?.map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_would_not_take_are_refused() {
        check(&"x".repeat(MAX)).unwrap();
        for bad in [String::new(), "x".repeat(MAX + 1), "é".repeat(4000), "a\0b".into()] {
            assert!(check(&bad).unwrap_err().to_string().contains("1 to 64 bytes"));
        }
    }

    #[test]
    fn the_name_is_that_of_the_process_and_not_the_callers() {
        use std::io::{BufRead, BufReader, Write};
        use std::process::{Command, Stdio};
        let before = nix::unistd::gethostname().unwrap();
        let mut child = Command::new("unshare")
            .args(["--uts", "sh", "-c", "echo; read line; hostname; read line"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        lines.next().unwrap().unwrap();
        set(child.id(), "clone-1").unwrap();
        child.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), "clone-1");
        assert_eq!(nix::unistd::gethostname().unwrap(), before);
        drop(child.stdin.take());
        child.wait().unwrap();
    }
}
