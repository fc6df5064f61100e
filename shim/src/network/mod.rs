//! The sandbox's network: whatever CNI, Docker or a user puts into its network namespace is joined to
//! NICs of the virtual machine, and mirrored in the guest.
//!
//! Each interface gets a tap beside it; what either receives the other sends ([`redirect`]). The
//! interface keeps its addresses, where Docker and CNI look for them, but the host's stack in the
//! namespace gets nothing any more. The tap's descriptor goes to the VMM, the configuration to the agent.
//!
//! * [`thread`]: all work in the namespace, one thread for each sandbox. [`desk`]: what it has joined.
//! * [`links`], [`read`], [`routes`]: what there is, as [`mirror`] for the guest.
//! * [`tap`], [`redirect`]: the joint. [`watch`]: that something has changed.
//! * [`names`], [`upstream`]: a name server in the namespace, for the guest, and what that asks itself.
//! * [`reclaim`]: after a killed shim. [`probe`]: for `spore doctor`.
//!
//! Looked at when the container is created, again before it is started, and from then on whenever
//! the kernel says that something has changed.

mod desk;
mod error;
mod links;
pub(crate) mod mirror;
mod names;
mod netlink;
pub mod probe;
mod read;
mod reclaim;
mod redirect;
mod routes;
mod tap;
mod thread;
mod upstream;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::LinkUnspec;
use rtnetlink::packet_route::RouteNetlinkMessage;
use slog::{Logger, info, warn};
use tokio::task::JoinHandle;

pub(crate) use self::error::NetworkError;
use self::mirror::{Counters, Mirror};
use self::netlink::Netlink;
pub(crate) use self::reclaim::{inode, kept, reclaim};
pub(crate) use self::thread::Questions;
use self::thread::Thread;
use crate::config::NetworkLimits;
use crate::container::with_vm;
use crate::error::Error;
use crate::guest::Guest;
use crate::vm::Vm;

/// What is in place.
#[derive(Default)]
struct State {
    /// What the guest was last told, if it did all of it.
    told: Option<Mirror>,
    /// The taps by slot. With the descriptor kept here a tap outlives the VMM that has it: a rollback gives it to another.
    taps: BTreeMap<u8, OwnedFd>,
    /// Slots of the VMM that have their tap.
    attached: BTreeSet<u8>,
    /// Whose tap came or went since another machine was lent them.
    changed: BTreeSet<u8>,
    /// Attached, but to a tap that has gone since.
    stale: BTreeSet<u8>,
    closed: bool,
}

/// Where the time of a [`Network::sync`] went; the rest of it is the guest's.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Spent {
    /// Reading the namespace and joining what is new.
    pub(crate) namespace: Duration,
    /// The VMM's, from calls to their answers.
    pub(crate) vmm: Duration,
}

/// The network of one sandbox.
pub(crate) struct Network {
    thread: Thread,
    limits: NetworkLimits,
    state: Arc<tokio::sync::Mutex<State>>,
    following: Mutex<Option<JoinHandle<()>>>,
    log: Logger,
}

impl Network {
    /// Enters the network namespace of a process, the sandbox's holder. `user_namespace`: the
    /// container has one of its own, so it cannot have any interface. `questions`: the guest's for a
    /// name server there.
    pub(crate) async fn open(
        holder: u32,
        user_namespace: bool,
        limits: NetworkLimits,
        questions: Questions,
        log: &Logger,
    ) -> Result<Arc<Self>, NetworkError> {
        let namespace = File::open(format!("/proc/{holder}/ns/net"))
            .map_err(|source| NetworkError::Namespace { operation: "open the holder's", source })?;
        let thread = Thread::start(namespace, user_namespace, questions).await?;
        let state = State { told: Some(Mirror::default()), ..State::default() };
        let state = Arc::new(tokio::sync::Mutex::new(state));
        Ok(Arc::new(Self { thread, limits, state, following: Mutex::default(), log: log.clone() }))
    }

    /// Makes VMM and guest have what the namespace has. What can be done is done also when
    /// something fails; the first failure is told.
    pub(crate) async fn sync(&self, vm: &Vm, guest: &Guest) -> Result<Spent, Error> {
        match self.sync_with(&mut *self.state.lock().await, vm, guest).await? {
            (_, Some(refused)) => Err(refused.into()),
            (spent, None) => Ok(spent),
        }
    }

    /// Also tells what of the namespace no guest can have.
    async fn sync_with(
        &self,
        state: &mut State,
        vm: &Vm,
        guest: &Guest,
    ) -> Result<(Spent, Option<NetworkError>), Error> {
        let mut spent = Spent::default();
        if state.closed {
            return Ok((spent, None));
        }
        let begin = Instant::now();
        let looked = self.thread.look().await?;
        spent.namespace = begin.elapsed();
        let mut refused = looked.refused.into_iter();
        let mut failure = None;
        for slot in std::mem::take(&mut state.stale) {
            if state.attached.remove(&slot)
                && let Err(error) = vm.detach_network(slot).await
            {
                failure.get_or_insert(error);
            }
        }
        for slot in looked.left {
            info!(self.log, "a network interface has gone"; "slot" => slot);
            state.taps.remove(&slot);
            state.changed.insert(slot);
        }
        let mut new = BTreeSet::new();
        for joined in looked.joined {
            info!(self.log, "network interface joined"; "interface" => &joined.name, "slot" => joined.slot);
            // A slot whose interface has just gone may be its own.
            if state.attached.remove(&joined.slot)
                && let Err(error) = vm.detach_network(joined.slot).await
            {
                failure.get_or_insert(error);
            }
            state.taps.insert(joined.slot, joined.tap);
            state.changed.insert(joined.slot);
            new.insert(joined.slot);
        }
        let gone: Vec<_> =
            state.attached.iter().filter(|slot| !state.taps.contains_key(slot)).copied().collect();
        for slot in gone {
            state.attached.remove(&slot);
            if let Err(error) = vm.detach_network(slot).await {
                failure.get_or_insert(error);
            }
        }
        let mut mirror = looked.mirror;
        let mut refused_taps = Vec::new();
        let State { taps, attached, .. } = &mut *state;
        for (&slot, tap) in taps.iter() {
            if attached.contains(&slot) {
                continue;
            }
            match vm.attach_network(slot, tap, self.limits).await {
                Ok(()) => drop(attached.insert(slot)),
                Err(error) => {
                    refused_taps.push(slot);
                    failure.get_or_insert(error);
                }
            }
        }
        for slot in refused_taps {
            if new.contains(&slot) {
                state.taps.remove(&slot);
                self.thread.leave(vec![slot]).await?;
            }
            if let Some(mirror) = &mut mirror {
                mirror.forget(slot);
            }
        }
        spent.vmm = begin.elapsed() - spent.namespace;
        if let Some(mirror) = mirror
            && state.told.as_ref() != Some(&mirror)
        {
            // Until it has answered nobody knows.
            state.told = None;
            let problems =
                with_vm(vm, "setting the guest's network up", guest.update_network(&mirror)).await?;
            if !problems.is_empty() {
                return Err(NetworkError::Guest(problems.join("; ")).into());
            }
            state.told = Some(mirror);
        }
        match failure {
            Some(error) => Err(error.into()),
            None => Ok((spent, refused.next())),
        }
    }

    /// Keeps the network as it is until this is dropped.
    pub(crate) async fn hold(self: &Arc<Self>) -> Held {
        let state = Arc::clone(&self.state).lock_owned().await;
        Held { network: Arc::clone(self), state, before: None }
    }

    /// Follows what happens in the namespace until it is closed. What cannot be mirrored then is
    /// logged, and tried again with the next change.
    pub(crate) fn follow(self: &Arc<Self>, vm: Arc<Vm>, guest: Arc<Guest>) {
        let this = Arc::clone(self);
        let following = tokio::spawn(async move {
            let mut last = String::new();
            while !vm.has_ended() {
                this.thread.changed().await;
                // Once for each problem, however often something else changes.
                let error = this.sync(&vm, &guest).await.err().map(|error| crate::error::chain(&error));
                let error = error.unwrap_or_default();
                if !error.is_empty() && error != last {
                    warn!(this.log, "a change of the network does not reach the guest"; "error" => &error);
                }
                last = error;
            }
        });
        let before = self.following.lock().unwrap_or_else(PoisonError::into_inner).replace(following);
        if let Some(before) = before {
            before.abort();
        }
    }

    /// Counters of the interfaces.
    pub(crate) async fn counters(&self) -> Result<Vec<Counters>, NetworkError> {
        self.thread.counters().await
    }

    /// Until another guest is to follow.
    pub(crate) async fn unfollow(&self) {
        let following = self.following.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(following) = following {
            // It may be waiting for a guest that does not answer.
            following.abort();
            let _ = following.await;
        }
    }

    /// Gives everything in the namespace back, and leaves it.
    pub(crate) async fn close(&self) {
        self.unfollow().await;
        let mut state = self.state.lock().await;
        state.taps.clear();
        if !std::mem::replace(&mut state.closed, true)
            && let Err(error) = self.thread.close().await
        {
            warn!(self.log, "the network namespace is not as it was"; "error" => %error);
        }
    }
}

/// A network that does not change. See [`Network::hold`].
pub(crate) struct Held {
    network: Arc<Network>,
    state: tokio::sync::OwnedMutexGuard<State>,
    /// What the machine has that stands still while another has the taps too.
    before: Option<BTreeSet<u8>>,
}

impl Held {
    /// Gives another machine, which was restored and has no tap yet, what the one has that stands still, and reads nothing from its taps
    /// meanwhile. Unless [`Self::keep`] follows, that is the one to go on.
    pub(crate) async fn lend(&mut self, vm: &Vm, guest: &Guest) -> Result<(), Error> {
        self.before = Some(std::mem::take(&mut self.state.attached));
        self.state.told = None;
        self.state.changed.clear();
        let (_, refused) = self.network.sync_with(&mut self.state, vm, guest).await?;
        if let Some(refused) = refused {
            // The machine that stands still has it no more than this one.
            warn!(self.network.log, "an interface does not reach the guest"; "error" => %refused);
        }
        Ok(())
    }

    /// The other machine is the one to go on.
    pub(crate) fn keep(mut self) {
        self.before = None;
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(before) = self.before.take() {
            // Where another tap, or none, is by now, the machine still has the one that was there.
            self.state.stale = before.intersection(&self.state.changed).copied().collect();
            self.state.attached = before;
            // What has come or gone meanwhile the machine has still to be told.
            self.state.told = None;
        }
        // Who follows the namespace may have been about to look when this began.
        self.network.thread.stir();
    }
}

/// Brings loopback up in the calling thread's network namespace.
pub(crate) fn loopback_up() -> Result<(), NetworkError> {
    /// As in every namespace.
    const LOOPBACK: u32 = 1;
    let failed = |source| NetworkError::Namespace { operation: "bring loopback up", source };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        let netlink = Netlink::open().map_err(failed)?;
        let up = RouteNetlinkMessage::SetLink(LinkUnspec::new_with_index(LOOPBACK).up().build());
        let done = netlink.request(up, 0).await;
        done.map_err(|refusal| NetworkError::Netlink { operation: "bring loopback up", refusal })
    })
}

/// Runs something in a namespace, or in a new one, on a thread of its own that nobody waits for
/// longer than `deadline`.
fn within<T: Send + 'static, F: Future<Output = Result<T, NetworkError>>>(
    namespace: Option<File>,
    operation: &'static str,
    deadline: Duration,
    work: impl FnOnce() -> F + Send + 'static,
) -> Result<T, NetworkError> {
    let failed = move |source| NetworkError::Namespace { operation, source };
    let (sender, answer) = std::sync::mpsc::channel();
    let run = move || -> Result<T, NetworkError> {
        match namespace {
            Some(namespace) => setns(namespace, CloneFlags::CLONE_NEWNET),
            None => unshare(CloneFlags::CLONE_NEWNET),
        }
        .map_err(|error| failed(error.into()))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        runtime.block_on(work())
    };
    std::thread::Builder::new().spawn(move || drop(sender.send(run()))).map_err(failed)?;
    answer.recv_timeout(deadline).map_err(|error| match error {
        std::sync::mpsc::RecvTimeoutError::Timeout => {
            NetworkError::Deadline { operation, seconds: deadline.as_secs() }
        }
        std::sync::mpsc::RecvTimeoutError::Disconnected => NetworkError::Ended { operation },
    })?
}

#[cfg(test)]
mod tests;
