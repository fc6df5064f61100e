//! Stdio with real pipes, socket pairs and terminals, from the hello to the end of file.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // A test, helpers included.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use spore_agent::stdio::listener::serve_one;
use spore_agent::stdio::make::{self, Wanted};
use spore_agent::stdio::streams::Streams;
use spore_agent_api::stream::{
    ATTACHED, Hello, Kind, REFUSED_ALREADY_ATTACHED, REFUSED_MALFORMED, REFUSED_NO_SUCH_PROCESS,
    REFUSED_NO_SUCH_STREAM,
};

const ALL: Wanted = Wanted { stdin: true, stdout: true, stderr: true };
const DEADLINE: Duration = Duration::from_secs(120);

/// A process "web" whose ends the test holds.
fn process(streams: &Streams, wanted: Wanted) -> [File; 3] {
    let (ours, theirs) = make::pipes(wanted, nix::unistd::getuid().as_raw()).unwrap();
    streams.insert("web", "", ours);
    let files: Vec<File> = theirs.into_iter().map(File::from).collect();
    files.try_into().unwrap()
}

fn hello(kind: Kind) -> Vec<u8> {
    Hello { kind, id: "web".into(), exec_id: String::new() }.encode().unwrap()
}

/// Connects as the shim does and returns the answer.
async fn connect(streams: &Arc<Streams>, hello: Vec<u8>) -> (UnixStream, u8) {
    let (shim, agent) = UnixStream::pair().unwrap();
    tokio::spawn(serve_one(OwnedFd::from(agent), Arc::clone(streams)));
    blocking(move || {
        let mut shim = shim;
        shim.write_all(&hello).unwrap();
        let mut answer = [0xff];
        shim.read_exact(&mut answer).unwrap();
        (shim, answer[0])
    })
    .await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::time::timeout(DEADLINE, tokio::task::spawn_blocking(work)).await.unwrap().unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0u32..).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).take(length).collect()
}

fn read_all(mut from: impl Read + Send + 'static) -> impl FnOnce() -> Vec<u8> + Send + 'static {
    move || {
        let mut bytes = Vec::new();
        from.read_to_end(&mut bytes).unwrap();
        bytes
    }
}

#[tokio::test]
async fn sixty_four_mebibytes_of_output_arrive_byte_for_byte() {
    let streams = Arc::new(Streams::default());
    let [stdin, mut stdout, stderr] = process(&streams, ALL);
    let sent = pattern(64 << 20);
    let written = sent.clone();
    // Begins before anybody reads: it fills the pipe and waits there.
    let writing = thread::spawn(move || stdout.write_all(&written).unwrap());
    let (shim, answer) = connect(&streams, hello(Kind::Stdout)).await;
    assert_eq!(answer, ATTACHED);
    let received = blocking(read_all(shim)).await;
    writing.join().unwrap();
    assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
    // Ended, not free for another reader.
    assert_eq!(connect(&streams, hello(Kind::Stdout)).await.1, REFUSED_NO_SUCH_STREAM);
    drop((stdin, stderr));
}

#[tokio::test]
async fn sixty_four_mebibytes_of_input_arrive_and_half_close_is_end_of_file() {
    let streams = Arc::new(Streams::default());
    let [stdin, ..] = process(&streams, ALL);
    let (mut shim, answer) = connect(&streams, hello(Kind::Stdin)).await;
    assert_eq!(answer, ATTACHED);
    let sent = pattern(64 << 20);
    let written = sent.clone();
    let writing = thread::spawn(move || {
        shim.write_all(&written).unwrap();
        shim.shutdown(std::net::Shutdown::Write).unwrap();
        shim
    });
    let received = blocking(read_all(stdin)).await;
    writing.join().unwrap();
    assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
}

#[tokio::test]
async fn a_process_that_reads_no_input_ends_the_shims_writing() {
    let streams = Arc::new(Streams::default());
    let [stdin, ..] = process(&streams, ALL);
    let (mut shim, _) = connect(&streams, hello(Kind::Stdin)).await;
    let writing = thread::spawn(move || {
        let block = [0; 65536];
        while shim.write_all(&block).is_ok() {}
    });
    // The process ends with most of it unread.
    drop(stdin);
    blocking(move || writing.join().unwrap()).await;

    // The same when the shim has sent nothing at all.
    let [stdin, ..] = process(&streams, ALL);
    let (shim, _) = connect(&streams, hello(Kind::Stdin)).await;
    drop(stdin);
    assert!(blocking(read_all(shim)).await.is_empty());
}

#[tokio::test]
async fn output_ends_only_when_every_writer_has_closed() {
    let streams = Arc::new(Streams::default());
    let [_stdin, mut stdout, _stderr] = process(&streams, ALL);
    let mut child_copy = stdout.try_clone().unwrap();
    let (shim, _) = connect(&streams, hello(Kind::Stdout)).await;
    let reading = tokio::spawn(blocking(read_all(shim)));
    stdout.write_all(b"parent ").unwrap();
    drop(stdout);
    // Deleting the container does not cut what is being delivered.
    streams.remove("web", "");
    child_copy.write_all(b"child").unwrap();
    assert!(!reading.is_finished());
    drop(child_copy);
    assert_eq!(tokio::time::timeout(DEADLINE, reading).await.unwrap().unwrap(), b"parent child");
}

#[tokio::test]
async fn a_broken_reader_can_be_replaced_without_losing_what_was_not_sent() {
    let streams = Arc::new(Streams::default());
    let [_stdin, mut stdout, _stderr] = process(&streams, ALL);
    let (shim, _) = connect(&streams, hello(Kind::Stdout)).await;
    drop(shim);
    // Shows the agent that the connection is gone; it keeps the bytes.
    stdout.write_all(b"kept ").unwrap();
    let again = async {
        loop {
            match connect(&streams, hello(Kind::Stdout)).await {
                (shim, ATTACHED) => break shim,
                (_, answer) => assert_eq!(answer, REFUSED_ALREADY_ATTACHED),
            }
        }
    };
    let shim = tokio::time::timeout(DEADLINE, again).await.unwrap();
    stdout.write_all(b"and more").unwrap();
    drop(stdout);
    assert_eq!(blocking(read_all(shim)).await, b"kept and more");
}

#[tokio::test]
async fn output_that_parts_from_its_connection_goes_on_with_the_next() {
    let streams = Arc::new(Streams::default());
    let [_stdin, mut stdout, _stderr] = process(&streams, ALL);
    let (mut shim, _) = connect(&streams, hello(Kind::Stdout)).await;
    let sent = pattern(8 << 20);
    let written = sent.clone();
    let writing = thread::spawn(move || stdout.write_all(&written).unwrap());
    // In the midst of it.
    let (shim, mut received) = blocking(move || {
        let mut some = vec![0; 1 << 20];
        shim.read_exact(&mut some).unwrap();
        (shim, some)
    })
    .await;
    let parted = streams.part("web").done();
    received.extend(blocking(read_all(shim)).await);
    assert!(received.len() < sent.len());
    tokio::time::timeout(DEADLINE, parted).await.unwrap();
    let (shim, answer) = connect(&streams, hello(Kind::Stdout)).await;
    assert_eq!(answer, ATTACHED);
    received.extend(blocking(read_all(shim)).await);
    writing.join().unwrap();
    assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
}

#[tokio::test]
async fn input_under_way_is_kept_for_the_process_when_its_connection_is_parted_from() {
    let streams = Arc::new(Streams::default());
    let [mut stdin, ..] = process(&streams, ALL);
    let (mut shim, _) = connect(&streams, hello(Kind::Stdin)).await;
    // More than the process's pipe holds.
    let sent = pattern(600 << 10);
    let written = sent.clone();
    let shim = blocking(move || {
        shim.set_nonblocking(true).unwrap();
        let (mut from, deadline) = (0, std::time::Instant::now() + DEADLINE);
        while from < written.len() && std::time::Instant::now() < deadline {
            match shim.write(&written[from..]) {
                Ok(count) => from += count,
                // Nobody reads the pipe: what fits is all that fits.
                Err(_) if from > 300 << 10 => break,
                Err(_) => thread::yield_now(),
            }
        }
        (shim, from)
    });
    let (shim, taken) = shim.await;
    let parting = streams.part("web");
    assert_eq!(connect(&streams, hello(Kind::Stdin)).await.1, REFUSED_ALREADY_ATTACHED);
    shim.shutdown(std::net::Shutdown::Write).unwrap();
    tokio::time::timeout(DEADLINE, parting.done()).await.unwrap();
    let (mut shim, answer) = connect(&streams, hello(Kind::Stdin)).await;
    assert_eq!(answer, ATTACHED);
    let rest = sent[taken..].to_vec();
    let writing = thread::spawn(move || shim.write_all(&rest).unwrap());
    let received = blocking(move || {
        let mut received = Vec::new();
        stdin.read_to_end(&mut received).unwrap();
        received
    })
    .await;
    writing.join().unwrap();
    assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
}

#[tokio::test]
async fn refusals_have_their_codes() {
    let streams = Arc::new(Streams::default());
    assert_eq!(connect(&streams, hello(Kind::Stdout)).await.1, REFUSED_NO_SUCH_PROCESS);
    let _process = process(&streams, Wanted { stdin: false, stdout: true, stderr: false });
    assert_eq!(connect(&streams, hello(Kind::Stderr)).await.1, REFUSED_NO_SUCH_STREAM);
    assert_eq!(connect(&streams, b"GET / HTTP".to_vec()).await.1, REFUSED_MALFORMED);
    let (_first, answer) = connect(&streams, hello(Kind::Stdout)).await;
    assert_eq!(answer, ATTACHED);
    assert_eq!(connect(&streams, hello(Kind::Stdout)).await.1, REFUSED_ALREADY_ATTACHED);
}

#[tokio::test]
async fn a_terminal_is_one_stream_both_ways() {
    let streams = Arc::new(Streams::default());
    let pty = nix::pty::openpty(None, None).unwrap();
    let uid = nix::unistd::getuid().as_raw();
    streams.insert("web", "", make::terminal(pty.master, uid, Some((40, 100))).unwrap());
    let mut process = File::from(pty.slave);
    let (mut shim, answer) = connect(&streams, hello(Kind::Stdin)).await;
    assert_eq!(answer, ATTACHED);
    let line = blocking(move || {
        shim.write_all(b"typed\n").unwrap();
        shim.shutdown(std::net::Shutdown::Write).unwrap();
        let mut line = [0; 6];
        process.read_exact(&mut line).unwrap();
        // The end of the input is not the end of the session.
        process.write_all(b"answer\n").unwrap();
        drop(process);
        (line, shim)
    })
    .await;
    assert_eq!(&line.0, b"typed\n");
    assert_eq!(blocking(read_all(line.1)).await, b"typed\r\nanswer\r\n");
}
