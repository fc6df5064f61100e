//! Network namespaces with names (ip-netns(8)), and work inside of any.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns};

use crate::call::Call;

const NAMED: &str = "/run/netns";

/// A network namespace; ends with the value.
pub struct Space {
    name: String,
}

impl Space {
    /// Makes one. Nothing is in it but a loopback interface, which is down.
    pub fn new(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        Ok(Self { name: name.to_owned() })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> PathBuf {
        Path::new(NAMED).join(&self.name)
    }

    /// `ip LINE` in it; what it prints.
    pub fn ip(&self, line: &str) -> Result<String> {
        let words = ["-n", &self.name].into_iter().chain(line.split_whitespace());
        ip(&words.collect::<Vec<_>>())
    }

    /// Does something on a thread that is in it. Sockets that are opened there stay there.
    pub fn within<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        within(&self.path(), act)
    }

    /// A program that runs in it.
    pub fn command(&self, program: &str) -> Command {
        command(&self.path(), program)
    }

    /// A cable to another one: an interface at each end, up, with an address.
    pub fn wire(&self, (name, address): (&str, &str), other: &Self, far: (&str, &str)) -> Result<()> {
        self.ip(&format!("link add {name} type veth peer name {} netns {}", far.0, other.name))?;
        for (space, name, address) in [(self, name, address), (other, far.0, far.1)] {
            space.ip(&format!("addr add {address} dev {name}"))?;
            space.ip(&format!("link set {name} up"))?;
        }
        Ok(())
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        ip(&["netns", "delete", &self.name]).ok();
    }
}

fn ip(words: &[&str]) -> Result<String> {
    let mut command = Command::new("ip");
    command.args(words);
    let output = Call::new(command).run()?;
    ensure!(output.success(), "ip {}: {output}", words.join(" "));
    Ok(output.text())
}

/// Does something on a thread that is in the namespace at a path, such as `/proc/PID/ns/net`.
pub fn within<T: Send>(namespace: &Path, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = File::open(namespace).with_context(|| namespace.display().to_string())?;
    let inside = move || {
        setns(file, CloneFlags::CLONE_NEWNET)?;
        act()
    };
    thread::scope(|scope| scope.spawn(inside).join())
        .map_err(|_| anyhow!("what ran in {} panicked", namespace.display()))?
}

/// A program that runs in the namespace at a path.
pub fn command(namespace: &Path, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", namespace.display())).args(["--", program]);
    command
}
