//! The reaper with real children. One test at a time: it reaps every child of the process.

#![allow(clippy::unwrap_used, clippy::zombie_processes)] // A test; the reaper does the waiting.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use spore_agent::reaper::{Child, Exit, Expectation, Reaper};
use tokio::sync::Mutex;

static ALONE: Mutex<()> = Mutex::const_new(());
const DEADLINE: Duration = Duration::from_secs(30);

fn spawn(expectation: &Expectation, script: &str) -> Child {
    // The reaper waits for it: std's handle is dropped without doing so.
    let child = Command::new("/bin/sh").args(["-c", script]).stdin(Stdio::null()).spawn().unwrap();
    expectation.claim(child.id().cast_signed())
}

async fn exit(child: &Child) -> Exit {
    tokio::time::timeout(DEADLINE, child.wait()).await.unwrap()
}

#[tokio::test]
async fn every_exit_status_reaches_its_waiters() {
    let _alone = ALONE.lock().await;
    let reaper = Reaper::new();
    let running = tokio::spawn(Arc::clone(&reaper).run());
    let expectation = reaper.expect();
    let children: Vec<_> =
        (0..=255).map(|status| (status, spawn(&expectation, &format!("exit {status}")))).collect();
    for (status, child) in &children {
        let (first, second) = tokio::join!(exit(child), exit(child));
        assert_eq!(first.status, *status);
        assert_eq!(first, second);
        assert!(first.at_ns > 1_000_000_000_000_000_000);
        assert_eq!(child.exited(), Some(first));
    }
    running.abort();
}

#[tokio::test]
async fn a_signal_counts_from_128_real_time_ones_too() {
    let _alone = ALONE.lock().await;
    let reaper = Reaper::new();
    let running = tokio::spawn(Arc::clone(&reaper).run());
    let expectation = reaper.expect();
    for signal in [9, 15, 34, 64] {
        let child = spawn(&expectation, "exec sleep 1000");
        reaper.signal(&child, signal).unwrap();
        assert_eq!(exit(&child).await.status, 128 + signal.unsigned_abs());
        assert_eq!(reaper.signal(&child, 9), Err(Errno::ESRCH));
    }
    running.abort();
}

#[tokio::test]
async fn a_child_that_ended_before_it_was_claimed_is_not_lost() {
    let _alone = ALONE.lock().await;
    let reaper = Reaper::new();
    let expectation = reaper.expect();
    let child = Command::new("/bin/sh").args(["-c", "exit 7"]).spawn().unwrap();
    let pid = child.id().cast_signed();
    // Waits without reaping, so that the reaper surely finds it before the claim.
    let id = nix::sys::wait::Id::Pid(nix::unistd::Pid::from_raw(pid));
    let flags = nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT;
    nix::sys::wait::waitid(id, flags).unwrap();
    reaper.reap();
    assert_eq!(exit(&expectation.claim(pid)).await.status, 7);
}

#[tokio::test]
async fn orphans_are_reaped_and_forgotten() {
    let _alone = ALONE.lock().await;
    nix::sys::prctl::set_child_subreaper(true).unwrap();
    let reaper = Reaper::new();
    let running = tokio::spawn(Arc::clone(&reaper).run());
    let expectation = reaper.expect();
    // The grandchild outlives its parent, becomes this process's and then ends.
    let marker = tempfile::tempdir().unwrap();
    let fifo = marker.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let child = spawn(&expectation, &format!("(exec sleep 0.05 > {}) & exit 3", fifo.display()));
    assert_eq!(exit(&child).await.status, 3);
    let gone = tokio::task::spawn_blocking(move || std::fs::read(fifo));
    assert!(tokio::time::timeout(DEADLINE, gone).await.unwrap().unwrap().unwrap().is_empty());
    let no_children = async {
        // The descriptor closes just before the process can be reaped.
        while nix::sys::wait::waitid(nix::sys::wait::Id::All, wait_flags()) != Err(Errno::ECHILD) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(DEADLINE, no_children).await.unwrap();
    running.abort();
}

fn wait_flags() -> nix::sys::wait::WaitPidFlag {
    use nix::sys::wait::WaitPidFlag;
    WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG
}
