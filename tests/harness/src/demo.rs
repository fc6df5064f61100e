//! `make demo`: what a visitor sees first. Containers in microVMs, made to be read.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::utsname::uname;

use crate::call::{Call, Output};
use crate::containerd::{Containerd, Runtime, preferred_series};
use crate::host::run::Request;
use crate::image::{self, BUSYBOX};

const DEADLINE: Duration = Duration::from_secs(400);
const HOME: &str = "/srv/demo";

/// The request to run [`tour`] on the ground.
pub fn request(runtime: String) -> Result<Request> {
    let of_host = uname_a()?;
    Ok(Request {
        program: "spore-testbed".into(),
        args: vec!["tour".into(), "--runtime".into(), runtime, "--host".into(), of_host],
        env: BTreeMap::new(),
        deadline: DEADLINE,
        machines: 1,
        applications: false,
    })
}

/// What `uname -a` says here.
fn uname_a() -> Result<String> {
    let name = uname()?;
    let fields = [name.sysname(), name.nodename(), name.release(), name.version(), name.machine()];
    let fields: Vec<_> = fields.iter().map(|field| field.to_string_lossy()).collect();
    Ok(format!("{} GNU/Linux", fields.join(" ")))
}

/// Shows everything, on the ground. `host` is what the developer's machine says of itself.
pub fn tour(runtime: &str, host: &str) -> Result<()> {
    let runtime: Runtime = runtime.parse()?;
    let directory = PathBuf::from(HOME);
    std::fs::create_dir_all(&directory)?;
    let chosen = preferred_series()?;

    let mut clock = Clock::start();
    let logs = Path::new(crate::job::RESULTS).join("logs/containerd.log");
    let containerd = Containerd::start(&chosen, &directory.join("containerd"), &logs)?;
    clock.lap(&format!("a private containerd {chosen} started"));
    let archive = directory.join("image.tar");
    image::write_images(Path::new("/bin/busybox"), &archive)?;
    containerd.import(&archive, "overlayfs", &[])?;
    clock.lap(&format!("{BUSYBOX} made of busybox and imported"));

    let mut show = Show { containerd: &containerd, runtime, next: 1 };

    title("Whose kernel is it?");
    let around = std::fs::read_to_string("/proc/uptime")?;
    println!("  this machine        {host}");
    println!("  around containerd   {}, up {} s", uname_a()?, around.split('.').next().unwrap_or_default());
    let inside = show.quietly(&["sh", "-c", "echo $(uname -a), up $(cut -d. -f1 /proc/uptime) s"], None)?;
    ensure!(inside.success(), "{inside}");
    println!("  in the container    {}", inside.text().trim());
    clock.lap("the first container (its root file system was converted)");

    title("An ordinary container");
    let output = show.run("head -n 1 /etc/passwd; ps; nproc; free -m | head -n 2", None)?;
    ensure!(output.success(), "{output}");
    clock.lap("");

    title("Exit statuses are real");
    let output = show.run("exit 42", None)?;
    ensure!(output.code() == 42, "exit 42 gave {output}");
    clock.lap("");

    title("A pipeline, fed on standard input");
    let output = show.run("tr a-z A-Z | sort", Some("to be\nor not\nthat is\n"))?;
    ensure!(output.text() == "OR NOT\nTHAT IS\nTO BE\n", "{output}");
    clock.lap("");

    title("Several at once");
    let calls: Vec<_> = (1..=3)
        .map(|index| {
            show.call(&["sh", "-c", &format!("echo guest {index} has pid $$ and its own kernel")], None)
                .spawn()
        })
        .collect::<Result<_>>()?;
    for call in calls {
        let output = call.wait()?;
        ensure!(output.success(), "{output}");
        print!("    {}", output.text());
    }
    clock.lap("three containers side by side");

    title("Nothing is left");
    let (containers, tasks) = (show.list("containers")?, show.list("tasks")?);
    println!("  containers: {containers:?}, tasks: {tasks:?}");
    ensure!(containers.is_empty() && tasks.is_empty(), "something is left");
    drop(containerd);
    println!("\nAll of it took {:.1} s on this ground.", clock.total());
    Ok(())
}

fn title(text: &str) {
    println!("\n\u{2500}\u{2500} {text}");
}

/// Runs containers with numbered names.
struct Show<'a> {
    containerd: &'a Containerd,
    runtime: Runtime,
    next: u32,
}

impl Show<'_> {
    fn call(&mut self, command: &[&str], stdin: Option<&str>) -> Call {
        let id = format!("demo-{}", self.next);
        self.next += 1;
        let mut args = vec!["run", "--rm", "--runtime", self.runtime.id(), BUSYBOX, &id];
        args.extend(command);
        let call = self.containerd.ctr(&args);
        match stdin {
            Some(text) => call.stdin(text),
            None => call,
        }
    }

    fn quietly(&mut self, command: &[&str], stdin: Option<&str>) -> Result<Output> {
        self.call(command, stdin).run()
    }

    /// Prints the command as a person would type it, its output and its status.
    fn run(&mut self, script: &str, stdin: Option<&str>) -> Result<Output> {
        let feed = stdin.map(|text| format!("printf {text:?} | ")).unwrap_or_default();
        println!(
            "  $ {feed}ctr run --rm --runtime {} {BUSYBOX} demo-{} sh -c '{script}'",
            self.runtime.id(),
            self.next
        );
        let output = self.quietly(&["sh", "-c", script], stdin)?;
        for line in output.text().lines() {
            println!("    {line}");
        }
        for line in output.errors().lines() {
            println!("    (standard error) {line}");
        }
        println!("    exit status {}", output.code());
        Ok(output)
    }

    fn list(&self, what: &str) -> Result<Vec<String>> {
        Ok(self.containerd.must(&[what, "ls", "-q"])?.lines().map(str::to_owned).collect())
    }
}

/// Tells how long each step took.
struct Clock {
    begin: Instant,
    lap: Instant,
}

impl Clock {
    fn start() -> Self {
        let now = Instant::now();
        Self { begin: now, lap: now }
    }

    fn lap(&mut self, what: &str) {
        let what = if what.is_empty() { "took".to_owned() } else { format!("{what}:") };
        println!("    \u{2192} {what} {:.1} s", self.lap.elapsed().as_secs_f64());
        self.lap = Instant::now();
    }

    fn total(&self) -> f64 {
        self.begin.elapsed().as_secs_f64()
    }
}
