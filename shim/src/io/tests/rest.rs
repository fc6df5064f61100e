//! Streams whose machine is put away.

use super::*;

async fn in_time<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, what).await.unwrap()
}

/// A machine sends this, and is put away.
async fn put_away(streams: &Streams, mut machine: UnixStream, last: Vec<u8>) {
    streams.rest();
    let writer = tokio::spawn(async move {
        machine.write_all(&last).await.unwrap();
        machine.shutdown().await.unwrap();
        machine
    });
    in_time(streams.at_rest()).await;
    drop(writer.await.unwrap());
}

#[tokio::test]
async fn what_a_machine_has_sent_is_kept_until_the_client_takes_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "stdout");
    let (streams, first) = output_to(&path).await;
    // More than the fifo and the socket hold.
    let data = pattern(1 << 20);
    let expected = [&data[..], b"and more"].concat();
    put_away(&streams, first, data).await;
    let reader = tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        File::open(path).unwrap().read_to_end(&mut all).map(|_| all)
    });
    let (ends, _input, mut second) = another();
    streams.go_on_with(ends);
    second.write_all(b"and more").await.unwrap();
    drop(second);
    assert!(streams.settle(DEADLINE, DEADLINE).await);
    assert!(reader.await.unwrap().unwrap() == expected);
}

#[tokio::test]
async fn a_client_takes_what_was_sent_while_there_is_no_machine() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "stdout");
    let (streams, first) = output_to(&path).await;
    let data = pattern(1 << 20);
    put_away(&streams, first, data.clone()).await;
    let reader = tokio::task::spawn_blocking(move || {
        let mut all = vec![0; 1 << 20];
        File::open(path).unwrap().read_exact(&mut all).map(|()| all)
    });
    assert!(in_time(reader).await.unwrap().unwrap() == data);
    streams.give_up();
    assert!(streams.settle(DEADLINE, DEADLINE).await);
}

#[tokio::test]
async fn what_was_sent_is_the_end_when_no_machine_follows() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "stdout");
    let (streams, first) = output_to(&path).await;
    put_away(&streams, first, b"the last words".to_vec()).await;
    let reader = tokio::task::spawn_blocking(move || std::fs::read(path));
    assert!(!streams.settle(Duration::from_millis(200), DEADLINE).await, "a machine may follow");
    streams.give_up();
    assert!(streams.settle(DEADLINE, DEADLINE).await);
    assert_eq!(reader.await.unwrap().unwrap(), b"the last words");
}

#[tokio::test]
async fn input_is_one_machines_or_the_next_ones() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(&dir, "stdin");
    let (streams, mut first) = input_from(&path).await;
    let data = pattern(4 << 20);
    let sent = data.clone();
    let client = tokio::task::spawn_blocking(move || {
        File::options().write(true).open(path).unwrap().write_all(&sent).unwrap();
    });
    // In the midst of it.
    let mut taken = vec![0; 1 << 20];
    first.read_exact(&mut taken).await.unwrap();
    streams.rest();
    in_time(streams.end_input()).await;
    first.read_to_end(&mut taken).await.unwrap();
    assert!(taken.len() < data.len(), "the machine that rests is sent no more");
    let (ends, mut second, _output) = another();
    streams.go_on_with(ends);
    streams.close_stdin();
    in_time(second.read_to_end(&mut taken)).await.unwrap();
    client.await.unwrap();
    assert!(taken == data, "{} of {} bytes", taken.len(), data.len());
}
