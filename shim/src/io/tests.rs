use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use slog::o;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

use super::*;

mod rest;

const DEADLINE: Duration = Duration::from_secs(60);

fn fifo(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    let path = dir.path().join(name);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    path
}

fn log() -> Log {
    Log::root(slog::Discard, o!())
}

fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[0]
        })
        .collect()
}

fn guest_end(name: &'static str, (from, keep): (OwnedReadHalf, OwnedWriteHalf)) -> GuestOutput {
    GuestOutput { name, from, _keep: Some(keep) }
}

fn waiting(path: Option<PathBuf>, guest: OwnedWriteHalf) -> Mutex<Input> {
    Mutex::new(Input::Waiting { path: path.unwrap(), guest, closed: false })
}

/// Another machine's end of the same streams, and its guest's: input and standard output.
fn another() -> (GuestEnds, UnixStream, UnixStream) {
    let ((shim_in, guest_in), (shim_out, guest_out)) =
        (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let outputs = vec![guest_end("stdout", shim_out.into_split())];
    (GuestEnds { stdin: Some(shim_in.into_split().1), outputs }, guest_in, guest_out)
}

/// Streams that carry a guest's standard output to a fifo, and the guest's end of it.
async fn output_to(path: &Path) -> (Streams, UnixStream) {
    let stdio = Stdio { stdout: path.display().to_string(), ..Stdio::default() };
    let ends = Ends::open(&stdio, "default", "c").await.unwrap();
    let (shim, guest) = UnixStream::pair().unwrap();
    let (from_guest, to_guest) = shim.into_split();
    let streams = Streams::new(&log());
    streams.start_output(ends.stdout, guest_end("stdout", (from_guest, to_guest)));
    (streams, guest)
}

/// Streams that carry a fifo to a guest's standard input, and the guest's end of it.
async fn input_from(path: &Path) -> (Streams, UnixStream) {
    let stdio = Stdio { stdin: path.display().to_string(), ..Stdio::default() };
    let ends = Ends::open(&stdio, "default", "c").await.unwrap();
    let (shim, guest) = UnixStream::pair().unwrap();
    let mut streams = Streams::new(&log());
    streams.input = waiting(ends.stdin, shim.into_split().1);
    streams.start_input().unwrap();
    (streams, guest)
}

#[tokio::test]
async fn sixty_four_mebibytes_reach_a_slow_reader_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "stdout");
    let stdio = Stdio { stdout: path.display().to_string(), ..Stdio::default() };
    let ends = Ends::open(&stdio, "default", "c").await.unwrap();
    let (shim, mut guest) = UnixStream::pair().unwrap();
    let data = pattern(64 << 20);
    let expected = data.clone();
    let reader = std::thread::spawn(move || {
        let mut file = File::open(path).unwrap();
        let (mut all, mut chunk, mut size) = (Vec::new(), vec![0; 200_000], 1);
        loop {
            // Odd and changing sizes; now and then a pause for the writer to fill the pipe.
            let length = file.read(&mut chunk[..size]).unwrap();
            if length == 0 {
                return all;
            }
            all.extend_from_slice(&chunk[..length]);
            size = (size * 7 + 13) % 199_999 + 1;
            std::thread::yield_now();
        }
    });
    let (from_guest, to_guest) = shim.into_split();
    let streams = Streams::new(&log());
    streams.start_output(ends.stdout, guest_end("stdout", (from_guest, to_guest)));
    // The process writes all and exits at once.
    let writer = tokio::spawn(async move {
        guest.write_all(&data).await.unwrap();
        drop(guest);
    });
    assert!(streams.drain(DEADLINE).await);
    writer.await.unwrap();
    let all = tokio::task::spawn_blocking(move || reader.join().unwrap()).await.unwrap();
    assert_eq!(all.len(), expected.len());
    assert!(all == expected);
}

#[tokio::test]
async fn a_client_may_detach_and_another_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "stdout");
    let (streams, mut guest) = output_to(&path).await;
    let read = |path: PathBuf, length: usize| async move {
        tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; length];
            File::open(path).unwrap().read_exact(&mut bytes).unwrap();
            bytes
        })
        .await
        .unwrap()
    };
    guest.write_all(b"first").await.unwrap();
    assert_eq!(read(path.clone(), 5).await, b"first");
    guest.write_all(b"second").await.unwrap();
    assert_eq!(read(path, 6).await, b"second");
    drop(guest);
    assert!(streams.drain(DEADLINE).await);
}

#[tokio::test]
async fn a_client_that_never_reads_delays_delete_only_until_its_deadline() {
    let dir = tempfile::tempdir().unwrap();
    let (streams, mut guest) = output_to(&fifo(&dir, "stdout")).await;
    let writer = tokio::spawn(async move {
        let _ = guest.write_all(&vec![0; 4 << 20]).await;
    });
    assert!(!streams.settle(Duration::from_millis(200), DEADLINE).await, "no progress");
    assert!(!streams.drain(Duration::from_millis(200)).await);
    writer.await.unwrap();
}

#[tokio::test]
async fn a_guest_that_writes_for_ever_delays_the_exit_only_until_the_cap() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "stdout");
    let (streams, mut guest) = output_to(&path).await;
    let reader =
        std::thread::spawn(move || std::io::copy(&mut File::open(path).unwrap(), &mut std::io::sink()));
    let writer = tokio::spawn(async move { while guest.write_all(&[0; 4096]).await.is_ok() {} });
    assert!(!streams.settle(DEADLINE, Duration::from_millis(200)).await, "there is no end");
    assert!(streams.progress.load(Ordering::Relaxed) > 0, "it was read all the time");
    drop(streams);
    writer.await.unwrap();
    tokio::task::spawn_blocking(move || reader.join().unwrap()).await.unwrap().unwrap();
}

#[tokio::test]
async fn output_is_settled_when_the_client_has_read_it_or_there_is_none() {
    for attached in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(&dir, "stdout");
        let stdio = Stdio { stdout: path.display().to_string(), ..Stdio::default() };
        let ends = Ends::open(&stdio, "default", "c").await.unwrap();
        let client =
            attached.then(|| File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap());
        let (shim, mut guest) = UnixStream::pair().unwrap();
        let (from_guest, to_guest) = shim.into_split();
        let streams = Streams::new(&log());
        streams.start_output(ends.stdout, guest_end("stdout", (from_guest, to_guest)));
        guest.write_all(b"the last words").await.unwrap();
        drop(guest);
        if let Some(mut client) = client {
            assert!(!streams.settle(Duration::from_millis(200), DEADLINE).await, "unread");
            let mut bytes = [0; 100];
            assert_eq!(client.read(&mut bytes).unwrap(), 14);
        }
        assert!(streams.settle(DEADLINE, DEADLINE).await);
    }
}

#[tokio::test]
async fn input_ends_when_close_io_came_and_the_clients_have_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "stdin");
    let stdio = Stdio { stdin: path.display().to_string(), ..Stdio::default() };
    let ends = Ends::open(&stdio, "default", "c").await.unwrap();
    let (shim, mut guest) = UnixStream::pair().unwrap();
    let (_from_guest, to_guest) = shim.into_split();
    let mut streams = Streams::new(&log());
    streams.input = waiting(ends.stdin, to_guest);
    streams.start_input().unwrap();
    let write = |path: PathBuf, text: &'static [u8]| async move {
        tokio::task::spawn_blocking(move || {
            File::options().write(true).open(path).unwrap().write_all(text).unwrap()
        })
        .await
        .unwrap();
    };
    let mut bytes = [0; 6];
    write(path.clone(), b"hello ").await;
    guest.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"hello ");
    // The first client is gone, which is no end of file yet.
    write(path, b"again!").await;
    guest.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"again!");
    streams.close_stdin();
    let end = tokio::time::timeout(DEADLINE, guest.read(&mut bytes)).await.unwrap().unwrap();
    assert_eq!(end, 0);
}

#[tokio::test]
async fn close_io_before_start_loses_no_input() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "stdin");
    let stdio = Stdio { stdin: path.display().to_string(), ..Stdio::default() };
    let ends = Ends::open(&stdio, "default", "c").await.unwrap();
    let (shim, mut guest) = UnixStream::pair().unwrap();
    let (_from_guest, to_guest) = shim.into_split();
    let mut streams = Streams::new(&log());
    streams.input = waiting(ends.stdin, to_guest);
    let opening = std::sync::Arc::new(std::sync::Barrier::new(2));
    let opened = std::sync::Arc::clone(&opening);
    let client = std::thread::spawn(move || {
        opened.wait();
        File::options().write(true).open(path).unwrap().write_all(b"early").unwrap();
    });
    opening.wait();
    // The client is blocked in open(2) as soon as the kernel counts it as a sleeper there.
    let asleep = || {
        std::fs::read_dir("/proc/self/task").unwrap().flatten().any(|task| {
            std::fs::read_to_string(task.path().join("wchan"))
                .unwrap_or_default()
                .contains("wait_for_partner")
        })
    };
    let until = std::time::Instant::now() + Duration::from_secs(5);
    while !asleep() && std::time::Instant::now() < until {
        std::thread::yield_now();
    }
    streams.close_stdin();
    streams.start_input().unwrap();
    let mut text = Vec::new();
    tokio::time::timeout(DEADLINE, guest.read_to_end(&mut text)).await.unwrap().unwrap();
    client.join().unwrap();
    assert_eq!(text, b"early");
}

#[tokio::test]
async fn another_machines_output_follows_all_of_the_first_ones() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "stdout");
    let (streams, mut first) = output_to(&path).await;
    // More than the fifo holds: it is on its way when the other machine comes.
    let data = pattern(300_000);
    let expected = [&data[..], b"second third"].concat();
    let writer = tokio::spawn(async move {
        first.write_all(&data).await.unwrap();
        drop(first);
    });
    let (ends, _input, mut second) = another();
    streams.go_on_with(ends);
    second.write_all(b"second ").await.unwrap();
    let (ends, _input, mut third) = another();
    streams.go_on_with(ends);
    drop(second);
    third.write_all(b"third").await.unwrap();
    let reader = tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        File::open(path).unwrap().read_to_end(&mut all).map(|_| all)
    });
    writer.await.unwrap();
    assert!(!streams.settle(Duration::from_millis(200), DEADLINE).await, "the third goes on");
    drop(third);
    assert!(streams.settle(DEADLINE, DEADLINE).await);
    assert!(reader.await.unwrap().unwrap() == expected);
    // The client has seen the end: what comes now is thrown away, and blocks nobody.
    let (ends, _input, mut late) = another();
    streams.go_on_with(ends);
    late.write_all(&pattern(1 << 20)).await.unwrap();
    drop(late);
    assert!(streams.drain(DEADLINE).await);
}

#[tokio::test]
async fn input_goes_to_the_machine_that_there_is_and_its_end_to_every_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "stdin");
    let (streams, mut first) = input_from(&path).await;
    let write = |text: &'static [u8]| {
        let path = path.clone();
        tokio::task::spawn_blocking(move || {
            File::options().write(true).open(path).unwrap().write_all(text).unwrap();
        })
    };
    let mut bytes = [0; 5];
    write(b"first").await.unwrap();
    first.read_exact(&mut bytes).await.unwrap();
    let (ends, mut second, _output) = another();
    streams.go_on_with(ends);
    drop(first);
    write(b"other").await.unwrap();
    second.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"other");
    streams.close_stdin();
    let mut rest = Vec::new();
    tokio::time::timeout(DEADLINE, second.read_to_end(&mut rest)).await.unwrap().unwrap();
    let (ends, mut third, _output) = another();
    streams.go_on_with(ends);
    tokio::time::timeout(DEADLINE, third.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, b"");
}

#[test]
fn schemes_that_are_not_served_are_refused_and_empty_means_none() {
    let stdout = |uri: &str| Stdio { stdout: uri.into(), ..Stdio::default() }.check();
    let message = stdout("http://logs").unwrap_err().to_string();
    assert!(message.contains("\"http\"") && message.contains("stdout"), "{message}");
    for served in ["fifo:///tmp/x", "/tmp/x", "file:///tmp/x", "binary:///usr/bin/logger?id=1", ""] {
        stdout(served).unwrap();
    }
    assert!(Stdio { stdin: "file:///tmp/x".into(), ..Stdio::default() }.check().is_err());
    assert_eq!(Stdio::default().wanted(), GuestStdio::default());
    let terminal = Stdio { stdin: "/i".into(), stdout: "/o".into(), stderr: "/e".into(), terminal: true };
    assert_eq!(terminal.wanted(), GuestStdio { stdin: true, stdout: true, stderr: false, terminal: true });
}
