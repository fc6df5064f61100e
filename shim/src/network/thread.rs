//! The thread that is in the sandbox's network namespace. Nothing that happens there can hold the
//! shim up: a caller waits for an answer only so long, and a thread that has not given one is not
//! asked again but to leave, which it may have come to itself for.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use tokio::sync::{Notify, mpsc, oneshot};

use super::desk::{Desk, Looked};
use super::error::NetworkError;
use super::mirror::Counters;
use super::names::Relay;
use super::netlink::Netlink;
use super::watch::Watch;

/// The kernel answers within milliseconds, unless somebody holds its network lock. With dozens of sandboxes that come and go on
/// a slow host, many do, one after the other.
const DEADLINE: Duration = Duration::from_secs(30);
const STACK: usize = 256 * 1024;
/// The calling thread's own, whichever it is in.
const CURRENT: &str = "/proc/thread-self/ns/net";

/// Connections of the guest for the name server in the namespace ([`super::names`]).
pub(crate) type Questions = mpsc::Receiver<OwnedFd>;

enum Job {
    Look(oneshot::Sender<Result<Looked, NetworkError>>),
    Leave(Vec<u8>, oneshot::Sender<Result<(), NetworkError>>),
    Counters(oneshot::Sender<Result<Vec<Counters>, NetworkError>>),
    /// Leaves everything.
    Close(oneshot::Sender<Result<(), NetworkError>>),
    /// Holds the thread up until the other end is dropped.
    #[cfg(test)]
    Hang(std::sync::mpsc::Receiver<()>),
}

pub(crate) struct Thread {
    jobs: mpsc::UnboundedSender<Job>,
    changed: Arc<Notify>,
    stuck: AtomicBool,
    deadline: Duration,
}

impl Thread {
    /// Starts a thread in a namespace, which it keeps alive until it is closed. `questions` are the
    /// guest's connections for its name server.
    pub(crate) async fn start(
        namespace: File,
        refuse_all: bool,
        questions: Questions,
    ) -> Result<Self, NetworkError> {
        Self::with(namespace, DEADLINE, questions, move |netlink| Desk::new(netlink, refuse_all)).await
    }

    pub(super) async fn with(
        namespace: File,
        deadline: Duration,
        questions: Questions,
        desk: impl FnOnce(Netlink) -> Desk + Send + 'static,
    ) -> Result<Self, NetworkError> {
        const OPERATION: &str = "start a thread in it";
        let (jobs, queue) = mpsc::unbounded_channel();
        let changed = Arc::new(Notify::new());
        let thread = Self { jobs, changed: Arc::clone(&changed), stuck: false.into(), deadline };
        let (ready, started) = oneshot::channel();
        std::thread::Builder::new()
            .name("network".into())
            .stack_size(STACK)
            .spawn(move || run(&namespace, desk, ready, (queue, questions), &changed))
            .map_err(|source| NetworkError::Namespace { operation: OPERATION, source })?;
        thread.answer(OPERATION, started).await?;
        Ok(thread)
    }

    async fn answer<T>(
        &self,
        operation: &'static str,
        answer: oneshot::Receiver<Result<T, NetworkError>>,
    ) -> Result<T, NetworkError> {
        match tokio::time::timeout(self.deadline, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(NetworkError::Ended { operation }),
            Err(_) => {
                self.stuck.store(true, Ordering::Relaxed);
                Err(self.late(operation))
            }
        }
    }

    fn late(&self, operation: &'static str) -> NetworkError {
        NetworkError::Deadline { operation, seconds: self.deadline.as_secs() }
    }

    async fn call<T>(
        &self,
        operation: &'static str,
        job: impl FnOnce(oneshot::Sender<Result<T, NetworkError>>) -> Job,
    ) -> Result<T, NetworkError> {
        if self.stuck.load(Ordering::Relaxed) {
            return Err(self.late(operation));
        }
        self.ask(operation, job).await
    }

    async fn ask<T>(
        &self,
        operation: &'static str,
        job: impl FnOnce(oneshot::Sender<Result<T, NetworkError>>) -> Job,
    ) -> Result<T, NetworkError> {
        let (sender, answer) = oneshot::channel();
        self.jobs.send(job(sender)).map_err(|_| NetworkError::Ended { operation })?;
        self.answer(operation, answer).await
    }

    pub(crate) async fn look(&self) -> Result<Looked, NetworkError> {
        self.call("read it", Job::Look).await
    }

    pub(crate) async fn leave(&self, slots: Vec<u8>) -> Result<(), NetworkError> {
        self.call("leave an interface", |sender| Job::Leave(slots, sender)).await
    }

    pub(crate) async fn counters(&self) -> Result<Vec<Counters>, NetworkError> {
        self.call("read its counters", Job::Counters).await
    }

    /// Leaves every interface; when this is answered nothing of the thread is in the namespace. Also a thread that has been late
    /// is asked: nobody else does it once the shim has ended.
    pub(crate) async fn close(&self) -> Result<(), NetworkError> {
        self.ask("leave it", Job::Close).await
    }

    /// Returns when something may have changed since the last look.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// As if something had changed.
    pub(super) fn stir(&self) {
        self.changed.notify_one();
    }

    #[cfg(test)]
    pub(super) fn hang(&self, until: std::sync::mpsc::Receiver<()>) {
        let _ = self.jobs.send(Job::Hang(until));
    }
}

type Answer<T> = oneshot::Sender<Result<T, NetworkError>>;

fn run(
    namespace: &File,
    desk: impl FnOnce(Netlink) -> Desk,
    ready: Answer<()>,
    queues: (mpsc::UnboundedReceiver<Job>, Questions),
    changed: &Notify,
) {
    let failed = |operation| move |source| NetworkError::Namespace { operation, source };
    let enter = |namespace: &File| setns(namespace, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
    let prepared = || -> Result<_, NetworkError> {
        let home = File::open(CURRENT).map_err(failed("open the shim's own"))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(failed("start a runtime"))?;
        enter(namespace).map_err(failed("join it"))?;
        Ok((home, runtime))
    };
    let (home, runtime) = match prepared() {
        Ok(prepared) => prepared,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let last = runtime.block_on(async {
        let opened = Netlink::open().and_then(|netlink| Ok((netlink, Watch::open()?)));
        match opened.map_err(failed("open netlink sockets")) {
            Ok((netlink, watch)) => {
                let _ = ready.send(Ok(()));
                work(desk(netlink), watch, queues, changed).await
            }
            Err(error) => {
                let _ = ready.send(Err(error));
                None
            }
        }
    });
    // The namespace is let go before anybody is told: sockets first, then the thread itself.
    drop(runtime);
    let _ = enter(&home);
    if let Some((answer, outcome)) = last {
        let _ = answer.send(outcome);
    }
}

/// Does the jobs, to the last one, whose answer is given later.
async fn work(
    mut desk: Desk,
    watch: Watch,
    (mut queue, mut questions): (mpsc::UnboundedReceiver<Job>, Questions),
    changed: &Notify,
) -> Option<(Answer<()>, Result<(), NetworkError>)> {
    let mut watch = Some(watch);
    let relay = Relay::default();
    loop {
        let heard = async {
            match &mut watch {
                Some(watch) => watch.changed().await,
                None => std::future::pending().await,
            }
        };
        let job = tokio::select! {
            biased;
            job = queue.recv() => job,
            heard = heard => {
                if heard.is_err() {
                    // Deaf from here on; Start looks for itself.
                    watch = None;
                }
                changed.notify_one();
                continue;
            }
            // Without a guest there are none, and nothing to do either.
            Some(stream) = questions.recv() => {
                relay.serve(stream);
                continue;
            }
        };
        match job {
            Some(Job::Look(answer)) => {
                if answer.send(desk.look().await).is_err() {
                    // Nobody took the taps of what was joined.
                    let _ = desk.leave_all().await;
                }
            }
            Some(Job::Leave(slots, answer)) => drop(answer.send(desk.leave(&slots).await)),
            Some(Job::Counters(answer)) => drop(answer.send(desk.counters().await)),
            Some(Job::Close(answer)) => return Some((answer, desk.leave_all().await)),
            #[cfg(test)]
            Some(Job::Hang(until)) => drop(until.recv()),
            // The shim has lost interest.
            None => {
                let _ = desk.leave_all().await;
                return None;
            }
        }
    }
}
