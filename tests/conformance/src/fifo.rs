//! A fifo of the suite's own, for a stream of a task, as clients of containerd's API give them.

use std::cell::RefCell;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::call::Call;

/// See the module. What nobody has asked for waits in it, and then with its writer.
pub(crate) struct Fifo {
    path: PathBuf,
    file: File,
    bytes: RefCell<Vec<u8>>,
}

impl Fifo {
    pub(crate) fn new(subject: &Subject) -> Result<Self> {
        let path = PathBuf::from(format!("/srv/bed/{}", subject.id("fifo")));
        let mut mkfifo = Command::new("mkfifo");
        mkfifo.arg(&path);
        let output = Call::new(mkfifo).run()?;
        ensure!(output.success(), "{output}");
        // Both ends, so that opening it waits for nobody, and it has no end while this is there.
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
        Ok(Self { path, file, bytes: RefCell::default() })
    }

    pub(crate) fn path(&self) -> String {
        self.path.display().to_string()
    }

    pub(crate) fn feed(&self, text: &str) -> Result<()> {
        Ok((&self.file).write_all(text.as_bytes())?)
    }

    /// All that has come out of it until now.
    pub(crate) fn text(&self) -> String {
        let mut bytes = self.bytes.borrow_mut();
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = (&self.file).read(&mut buffer) {
            bytes.extend_from_slice(&buffer[..count]);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        fs::remove_file(&self.path).ok();
    }
}
