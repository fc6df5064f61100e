//! Traffic through a network: a server at each end, in this program, which copies itself into
//! containers and is started there as `traffic serve`. Each does what it is asked over TCP: takes, gives,
//! echoes, or turns to another server itself. So nothing but the network under test is between the two.
//!
//! A request is a line of words on a connection of its own; the answer is text up to the end, unless the job
//! says otherwise. An answer that begins with "error" is one.
//!
//! | job | at the server |
//! |---|---|
//! | `greet` | nothing |
//! | `sink`, `hold`, `source BYTES`, `echo SIZE`, `release` | see [`stream`] |
//! | `count`, `join GROUP PORT` | see [`datagram`] |
//! | `push`, `push-held`, `pull`, `trips`, `datagrams`, `whole`, `blast`, `flood`, `send` | it is the client of another server |

pub mod datagram;
pub mod stream;

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use super::space::within;

/// The first argument that makes a program this one.
pub const VERB: &str = "traffic";
/// Of a server, for TCP, and for UDP, where it echoes.
pub const PORT: u16 = 7007;
/// For whatever a socket waits for. Emulated machines are slow, and a flood is slower.
const DEADLINE: Duration = Duration::from_secs(180);
const CONNECT: Duration = Duration::from_secs(20);

/// `traffic serve`: serves until it is killed. `traffic give BYTES` and `traffic take`: the pattern of [`stream`] to standard output
/// and from standard input, which must be that; how many bytes came.
pub fn main(arguments: &[String]) -> Result<()> {
    match arguments {
        [word] if word == "serve" => {
            let server = Server::bind()?;
            println!("serving");
            server.wait()
        }
        [word, bytes] if word == "give" => stream::give(std::io::stdout().lock(), bytes.parse()?),
        [word] if word == "take" => {
            println!("{}", stream::take(std::io::stdin().lock())?);
            Ok(())
        }
        _ => bail!("usage: {VERB} serve | give BYTES | take"),
    }
}

/// Puts this program, alone, into a directory for containers to have as a volume.
pub fn install(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)?;
    let to = directory.join(VERB);
    fs::copy(std::env::current_exe()?, &to).with_context(|| to.display().to_string()).map(drop)
}

/// What connections to one server share: whether those that hold may read.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn release(&self) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.opened.notify_all();
    }

    fn wait(&self) -> Result<()> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.opened.wait_timeout_while(open, DEADLINE, |open| !*open);
        let (_open, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() { Err(anyhow!("nobody said release")) } else { Ok(()) }
    }
}

/// A server of this process. Ends with the value; connections that are open end by themselves.
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// Where it is, when it was started from elsewhere.
    namespace: Option<PathBuf>,
}

impl Server {
    /// Starts one in a namespace, whose loopback interface is up.
    pub fn start(namespace: &Path) -> Result<Self> {
        let mut server = within(namespace, Self::bind)?;
        server.namespace = Some(namespace.to_owned());
        Ok(server)
    }

    /// Starts one on every address of this thread's namespace.
    fn bind() -> Result<Self> {
        // Both families at once, where there is a second.
        let addresses = [
            SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT)),
            SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)),
        ];
        let listener = TcpListener::bind(&addresses[..]).context("binding for TCP")?;
        let socket = UdpSocket::bind(&addresses[..]).context("binding for UDP")?;
        let stop = Arc::new(AtomicBool::new(false));
        let (over, ended) = (Arc::clone(&stop), Arc::clone(&stop));
        let threads = vec![
            thread::spawn(move || accept(&listener, &over)),
            thread::spawn(move || datagram::echo(&socket, &ended)),
        ];
        Ok(Self { stop, threads, namespace: None })
    }

    fn wait(mut self) -> Result<()> {
        for thread in std::mem::take(&mut self.threads) {
            thread.join().map_err(|_| anyhow!("a thread of the server panicked"))?;
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let wake = || {
            let to = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
            TcpStream::connect_timeout(&to, CONNECT)?;
            UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.send_to(&[], to)?;
            Ok(())
        };
        if self.namespace.as_ref().is_some_and(|namespace| within(namespace, wake).is_ok()) {
            for thread in self.threads.drain(..) {
                thread.join().ok();
            }
        }
    }
}

fn accept(listener: &TcpListener, stop: &AtomicBool) {
    let gate = Arc::new(Gate::default());
    for stream in listener.incoming() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let gate = Arc::clone(&gate);
        let Ok(stream) = stream else { continue };
        thread::spawn(move || {
            if let Err(error) = serve(&stream, &gate) {
                writeln!(&stream, "error: {error:#}").ok();
            }
            stream.shutdown(Shutdown::Write).ok();
        });
    }
}

fn serve(stream: &TcpStream, gate: &Gate) -> Result<()> {
    prepare(stream)?;
    let mut words = String::new();
    // Byte by byte: what follows the line is the job's.
    while !words.ends_with('\n') {
        let mut byte = [0];
        (&mut &*stream).read_exact(&mut byte).context("reading the request")?;
        words.push(char::from(byte[0]));
    }
    let words: Vec<_> = words.split_whitespace().collect();
    let mut answer = String::new();
    match words[..] {
        ["greet"] => answer.push_str("here"),
        ["sink"] => stream::sink(stream)?,
        ["hold"] => stream::hold(stream, || gate.wait())?,
        ["release"] => gate.release(),
        ["source", bytes] => stream::source(stream, bytes.parse()?)?,
        ["echo", size] => stream::echo(stream, size.parse()?)?,
        ["count"] => datagram::count(stream)?,
        ["join", group, port] => datagram::join(stream, group.parse()?, port.parse()?)?,
        ["push", to, bytes] => told(&mut answer, &[stream::push(to.parse()?, bytes.parse()?)?])?,
        ["push-held", to, bytes] => stream::push_held(to.parse()?, bytes.parse()?)?,
        ["pull", from, bytes] => told(&mut answer, &[stream::pull(from.parse()?, bytes.parse()?)?])?,
        ["trips", to, size, count] => {
            told(&mut answer, &stream::trips(to.parse()?, size.parse()?, count.parse()?)?)?;
        }
        ["datagrams", to, sizes] => {
            let sizes = sizes.split(',').map(str::parse).collect::<Result<Vec<_>, _>>()?;
            datagram::there_and_back(to.parse()?, &sizes)?;
        }
        ["whole", to, size] => datagram::whole(to.parse()?, size.parse()?)?,
        ["blast", to, size, count] => {
            let blast = datagram::blast(to.parse()?, size.parse()?, count.parse()?)?;
            write!(answer, "{} {}", blast.received, blast.elapsed.as_nanos())?;
        }
        ["flood", to] => write!(answer, "{}", datagram::flood(stream, to.parse()?)?)?,
        ["send", group, port, text] => datagram::send(group.parse()?, port.parse()?, text)?,
        _ => bail!("no job {words:?}"),
    }
    (&mut &*stream).write_all(answer.as_bytes())?;
    Ok(())
}

/// Times as an answer.
fn told(answer: &mut String, times: &[Duration]) -> Result<()> {
    times.iter().try_for_each(|time| Ok(writeln!(answer, "{}", time.as_nanos())?))
}

fn prepare(stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    Ok(stream.set_nodelay(true)?)
}

/// Connects to a server and tells it what to do.
fn request(to: SocketAddr, job: &str) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, CONNECT).with_context(|| format!("connecting to {to}"))?;
    prepare(&stream)?;
    (&mut &stream).write_all(format!("{job}\n").as_bytes())?;
    Ok(stream)
}

/// The rest of what a server answers.
fn answer(mut from: impl Read) -> Result<String> {
    let mut text = String::new();
    from.read_to_string(&mut text).context("reading the answer")?;
    if let Some(error) = text.trim_end().strip_prefix("error: ") {
        bail!("the other end: {error}");
    }
    Ok(text)
}

/// A server elsewhere, as those in a namespace reach it.
#[derive(Debug, Clone)]
pub struct Peer {
    /// The namespace of those who ask.
    pub from: PathBuf,
    pub address: SocketAddr,
}

impl Peer {
    /// Has a job done; the answer.
    pub fn ask(&self, job: &str) -> Result<String> {
        self.begin(job)?.finish()
    }

    /// Has a job done whose answer is times in nanoseconds.
    pub fn times(&self, job: &str) -> Result<Vec<Duration>> {
        let text = self.ask(job)?;
        let number = |line: &str| Ok(Duration::from_nanos(line.parse().with_context(|| text.clone())?));
        text.lines().map(number).collect()
    }

    /// Has a job begun.
    pub fn begin(&self, job: &str) -> Result<Ongoing> {
        let stream = within(&self.from, || request(self.address, job)).with_context(|| job.to_owned())?;
        Ok(Ongoing { job: job.to_owned(), reader: BufReader::new(stream) })
    }
}

/// A job that is being done.
pub struct Ongoing {
    job: String,
    reader: BufReader<TcpStream>,
}

impl Ongoing {
    /// The next line of the answer.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line).with_context(|| self.job.clone())?;
        Ok(line.trim_end().to_owned())
    }

    /// Tells the server that nothing more comes; the rest of its answer.
    pub fn finish(self) -> Result<String> {
        self.reader.get_ref().shutdown(Shutdown::Write).ok();
        answer(self.reader).with_context(|| self.job)
    }
}

#[cfg(test)]
mod tests;
