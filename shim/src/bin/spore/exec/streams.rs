//! The command's standard streams: fifos, which containerd's API takes by name, in a directory
//! of their own that goes with the value.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::failure::Failure;

const BUFFER: usize = 64 * 1024;

pub(super) struct Streams {
    directory: PathBuf,
    stdin: bool,
    /// Of the output: what is read, and a writing end that keeps it from ending before the
    /// command's shim has opened it.
    outputs: Vec<(Target, File, Option<File>)>,
    copies: Vec<JoinHandle<()>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Stdout,
    Stderr,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

impl Streams {
    pub(super) fn make(id: &str, stdin: bool, tty: bool) -> Result<Self, Failure> {
        let directory = std::env::temp_dir().join(id);
        DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .map_err(Failure::host("make directory", &directory))?;
        let mut streams = Self { directory, stdin, outputs: Vec::new(), copies: Vec::new() };
        if stdin {
            streams.fifo("stdin")?;
        }
        // A terminal has one output.
        let targets = if tty { &[Target::Stdout][..] } else { &[Target::Stdout, Target::Stderr] };
        for target in targets {
            let path = streams.fifo(target.name())?;
            let failed = Failure::host("open", &path);
            let read =
                OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).map_err(&failed)?;
            let keep = OpenOptions::new().write(true).open(&path).map_err(&failed)?;
            // Only the opening was not to wait.
            fcntl(&read, FcntlArg::F_SETFL(OFlag::empty())).map_err(|error| failed(error.into()))?;
            streams.outputs.push((*target, read, Some(keep)));
        }
        Ok(streams)
    }

    fn fifo(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.directory.join(name);
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|error| Failure::host("make fifo", &path)(error.into()))?;
        Ok(path)
    }

    fn name(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    pub(super) fn stdin(&self) -> String {
        if self.stdin { self.name("stdin") } else { String::new() }
    }

    pub(super) fn stdout(&self) -> String {
        self.name("stdout")
    }

    pub(super) fn stderr(&self) -> String {
        let has_one = self.outputs.iter().any(|(target, ..)| *target == Target::Stderr);
        if has_one { self.name("stderr") } else { String::new() }
    }

    /// Copies output from now on.
    pub(super) fn follow_output(&mut self) {
        for (target, read, _) in &self.outputs {
            let Ok(mut read) = read.try_clone() else { continue };
            let target = *target;
            self.copies.push(tokio::task::spawn_blocking(move || {
                let _ = match target {
                    Target::Stdout => copy(&mut read, &mut io::stdout()),
                    Target::Stderr => copy(&mut read, &mut io::stderr()),
                };
            }));
        }
    }

    /// The shim has the other ends by now, or never will.
    pub(super) fn release_output(&mut self) {
        for (_, _, keep) in &mut self.outputs {
            *keep = None;
        }
    }

    /// Copies input from now on; tells when it has ended.
    pub(super) fn follow_input(&self) -> Option<oneshot::Receiver<()>> {
        if !self.stdin {
            return None;
        }
        let (tell, ended) = oneshot::channel();
        let path = self.directory.join("stdin");
        // Nothing waits for it: it may wait for a key for ever.
        std::thread::spawn(move || {
            let _ = feed(&path);
            let _ = tell.send(());
        });
        Some(ended)
    }

    /// Waits until all output has been copied.
    pub(super) async fn finish(&mut self, deadline: Duration) {
        let all = async {
            for copy in self.copies.drain(..) {
                let _ = copy.await;
            }
        };
        let _ = tokio::time::timeout(deadline, all).await;
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Everything as it comes.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                to.write_all(&buffer[..count])?;
                to.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn feed(path: &Path) -> io::Result<()> {
    let mut fifo = OpenOptions::new().write(true).open(path)?;
    copy(&mut io::stdin().lock(), &mut fifo)
}
