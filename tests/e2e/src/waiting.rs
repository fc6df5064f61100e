//! A container that waits while a case looks into it with the `spore` command.

use anyhow::{Result, ensure};
use spore_harness::bed::Subject;
use spore_harness::call::{Call, Output};
use spore_harness::image::BUSYBOX;

/// Ends with the value.
pub(crate) struct Waiting {
    subject: Subject,
    pub(crate) id: String,
}

impl Waiting {
    pub(crate) fn start(subject: &Subject, what: &str) -> Result<Self> {
        Self::start_with(subject, what, &[])
    }

    /// With further options of `ctr run`.
    pub(crate) fn start_with(subject: &Subject, what: &str, options: &[&str]) -> Result<Self> {
        let id = subject.id(what);
        let waiting = Self { subject: subject.clone(), id };
        let mut args = vec!["run", "--detach", "--runtime", subject.runtime.id()];
        args.extend(options);
        args.extend([BUSYBOX, &waiting.id, "sleep", "100000"]);
        subject.must(&args)?;
        Ok(waiting)
    }

    /// A path in it, as `spore cp` takes it.
    pub(crate) fn path(&self, path: &str) -> String {
        format!("{}:{path}", self.id)
    }

    /// `spore fs VERB [OPTIONS] ID [REST]`.
    pub(crate) fn fs(&self, verb: &str, options: &[&str], rest: &[&str]) -> Result<Call> {
        let mut args = vec!["fs", verb];
        args.extend(options);
        args.push(&self.id);
        args.extend(rest);
        self.subject.spore(&args)
    }

    /// The same, to its end, which must be a good one; its output.
    pub(crate) fn must(&self, verb: &str, options: &[&str], rest: &[&str]) -> Result<String> {
        let output = self.fs(verb, options, rest)?.run()?;
        ensure!(output.success(), "spore fs {verb} {options:?} {rest:?}: {output}");
        Ok(output.text())
    }

    /// `spore exec` of a command.
    pub(crate) fn exec_with(&self, options: &[&str], command: &[&str]) -> Result<Call> {
        let mut args = vec!["exec"];
        args.extend(options);
        args.push(&self.id);
        args.extend(command);
        self.subject.spore(&args)
    }

    pub(crate) fn exec(&self, command: &[&str]) -> Result<Output> {
        self.exec_with(&[], command)?.run()
    }

    /// A script's standard output; the script must succeed.
    pub(crate) fn shell(&self, script: &str) -> Result<String> {
        let output = self.exec(&["sh", "-c", script])?;
        ensure!(output.success(), "spore exec of {script:?}: {output}");
        Ok(output.text())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        for args in
            [["tasks", "delete", "--force", self.id.as_str()].as_slice(), &["containers", "delete", &self.id]]
        {
            if let Ok(call) = self.subject.ctr(args) {
                call.run().ok();
            }
        }
    }
}
