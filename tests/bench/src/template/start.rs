//! Containers that begin with a container template, which is the application warmed up, beside runc that starts the same
//! application from nothing; and beside Spore that does so, from a boot template.
//!
//! The time is that of a client: from `ctr run --detach` until it has returned and, of a server, until it has answered a first
//! request. Nobody asks while `ctr` runs, and nothing is executed in the container: requests come over its network.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use spore_harness::containerd::Runtime;
use spore_harness::image::{APPLICATIONS, BUSYBOX, POSTGRES_DATA, POSTGRES_PROGRAMS, POSTGRES_USER};
use spore_harness::job;

use super::place::{Place, Question};
use crate::lab::Lab;
use crate::report::Row;
use crate::rounds::{Side, alternate};
use crate::stats::Sample;

/// A container of a template takes at most half of what runc takes.
const AIM: f64 = 0.5;

/// What is started.
struct Application {
    name: &'static str,
    image: &'static str,
    /// Of `ctr run`.
    options: Vec<String>,
    command: Vec<String>,
    /// Whom it answers, if anybody.
    question: Option<Question>,
}

fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(str::to_owned).collect()
}

fn sleep() -> Application {
    let command = words("sleep 100000");
    Application { name: "sleep", image: BUSYBOX, options: Vec::new(), command, question: None }
}

/// Of the image that is only on the ground when it was asked for.
fn servers() -> [Application; 2] {
    let http = Application {
        name: "Python's HTTP server",
        image: APPLICATIONS,
        options: Vec::new(),
        command: words("python3 -m http.server --directory /srv/www 8000"),
        question: Some(Question::Http),
    };
    let postgres = Application {
        name: "PostgreSQL",
        image: APPLICATIONS,
        options: words(&format!("--user {POSTGRES_USER}:{POSTGRES_USER}")),
        command: words(&format!("{POSTGRES_PROGRAMS}/postgres -D {POSTGRES_DATA}")),
        question: Some(Question::Postgres),
    };
    [http, postgres]
}

pub(super) fn run(lab: &Lab, rounds: usize) -> Result<Vec<Row>> {
    let mut rows = measure(lab, rounds, 0, &sleep())?;
    let archive: PathBuf = [job::PAYLOAD, job::APPLICATIONS].iter().collect();
    if archive.exists() {
        lab.import(&archive)?;
        for (application, number) in servers().iter().zip(1..) {
            rows.extend(measure(lab, rounds, number, application)?);
        }
    } else {
        let missing = archive.display();
        eprintln!(
            "template: servers are not measured: {missing} is missing (spore-testbed run --applications)"
        );
    }
    Ok(rows)
}

fn measure(lab: &Lab, rounds: usize, number: u8, application: &Application) -> Result<Vec<Row>> {
    let name = application.name;
    // Containers of one side run there one after the other.
    let place = |side: &str, at: u8| Place::new(&format!("{side}-{number}"), 10 * number + at);
    let [of_runc, of_spore, of_template] = [place("runc", 0)?, place("spore", 1)?, place("template", 2)?];
    let (template, source) = (format!("bench-{number}"), format!("source-{number}"));
    application.start(lab, Runtime::Spore, &source, &of_spore, &[])?;
    lab.spore(&["template", "create", &template, "--from", &source])?;
    lab.remove(&source)?;
    let annotation = format!("io.spore.clone-from={template}");
    let annotated = ["--annotation", annotation.as_str()];
    let once = |side: &str, runtime, place: &Place, options: &[&str], round: usize| -> Result<f64> {
        let id = format!("{side}-{number}-{round}");
        let ms = application.start(lab, runtime, &id, place, options)?;
        lab.remove(&id)?;
        Ok(ms)
    };
    let sides = [
        Side::new("runc", |round| once("runc", Runtime::Runc, &of_runc, &[], round)),
        Side::new("spore", |round| once("spore", Runtime::Spore, &of_spore, &[], round)),
        Side::new("template", |round| once("template", Runtime::Spore, &of_template, &annotated, round)),
    ];
    let times = alternate(&format!("container template of {name}"), rounds, sides)?;
    let [runc, spore, of_template] = times.map(Sample::new);
    lab.spore(&["template", "rm", &template])?;
    Ok(vec![
        Row::new(&format!("{name}, runc"), "ms", &runc),
        Row::new(&format!("{name}, spore from nothing"), "ms", &spore).against(&runc, None),
        Row::new(&format!("{name}, spore from a container template"), "ms", &of_template)
            .against(&runc, Some(AIM)),
    ])
}

impl Application {
    /// Starts it; after how many milliseconds it ran, and had answered.
    fn start(&self, lab: &Lab, runtime: Runtime, id: &str, place: &Place, options: &[&str]) -> Result<f64> {
        let namespace = place.namespace();
        let mut all: Vec<_> = self.options.iter().map(String::as_str).collect();
        all.extend(options);
        if self.question.is_some() {
            all.extend(["--with-ns", namespace.as_str()]);
        }
        let command: Vec<_> = self.command.iter().map(String::as_str).collect();
        let begun = Instant::now();
        lab.detach_image(runtime, self.image, id, &all, &command)?;
        let ms = || begun.elapsed().as_secs_f64() * 1000.0;
        let started = ms();
        let Some(question) = self.question else { return Ok(started) };
        place.ask(question)?;
        let answered = ms();
        eprintln!(
            "template: {id}: ctr returned after {started:.0} ms, the first answer came after {answered:.0} ms"
        );
        Ok(answered)
    }
}
