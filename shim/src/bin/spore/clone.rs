//! `spore clone`: a zygote of a container, or a snapshot, and ordinary containers of containerd's that are made of it. All of them, or
//! none: what was made is taken back when one fails.

pub(crate) mod origin;
mod plan;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::Global;
use crate::containerd::{Containerd, Namespace};
use crate::create::{Made, Maker};
use crate::failure::Failure;
use crate::progress::Work;
use crate::remote::check_id;
use crate::show::{self, nanoseconds};
use origin::Origin;
use plan::{Plan, Wishes};

/// Clones that are made at a time.
const AT_ONCE: usize = 4;
const MOST: u16 = 1024;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The container's id
    source: String,
    /// How many; they are called SOURCE-1, SOURCE-2 and so on, as far as these names are free [default: 1]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=i64::from(MOST)))]
    count: Option<u16>,
    /// The name of a clone; once for each, instead of --count
    #[arg(long = "name", value_name = "NAME")]
    names: Vec<String>,
    /// Begin with this snapshot or template of the container, instead of with what it is now
    #[arg(long, value_name = "ID")]
    snapshot: Option<String>,
    /// Let the clones write to the volumes that the container writes to
    #[arg(long)]
    share_volumes: bool,
    /// Where the clones' output goes: a file:// or binary:// URI [default: nowhere]
    #[arg(long, value_name = "URI")]
    log_uri: Option<String>,
    /// The network namespace of the clone, which somebody else has set up; for one clone
    #[arg(long, value_name = "PATH")]
    network_namespace: Option<String>,
}

pub(crate) async fn run(global: &Global, args: Args) -> Result<u8, Failure> {
    let begun = Instant::now();
    check_id(&args.source)?;
    let containerd = Containerd::connect(global).await?;
    let namespace = Namespace::new(&global.namespace)?;
    let record = containerd.container(&namespace, &args.source).await?;
    let names = names(&args, &containerd.ids(&namespace).await?)?;
    if names.len() > 1 && args.network_namespace.is_some() {
        return Err(Failure::Usage(
            "--network-namespace: it serves one clone; clone again for another".into(),
        ));
    }
    let wishes = Wishes {
        share_volumes: args.share_volumes,
        log_uri: args.log_uri.clone(),
        network_namespace: args.network_namespace.clone(),
    };
    let plan = Plan::new(&global.namespace, record, wishes)?;
    let plan = plan.with_root(&containerd, &namespace).await?;
    let origin = Origin::find(global, &args.source, args.snapshot.as_deref()).await?;
    let maker = Maker { containerd: &containerd, namespace: &namespace, kind: "clone" };
    let made = all(&maker, &plan, &origin.named(), &names).await;
    // They have what they need of it, and disks of their own.
    origin.end(global, &args.source).await;
    let made = made?;
    if let Origin::Zygote { stood, .. } = &origin {
        eprintln!("spore: {} stood still for {:.1} ms", args.source, stood.as_secs_f64() * 1e3);
    }
    match global.json {
        true => show::json(&as_json(&origin, &made, begun.elapsed())),
        false => made.iter().try_for_each(|made| show::line(&made.name)),
    }
    .map(|()| 0)
}

/// What they shall be called.
fn names(args: &Args, taken: &[String]) -> Result<Vec<String>, Failure> {
    if args.names.is_empty() {
        let free = (1u32..).map(|number| format!("{}-{number}", args.source));
        let free = free.filter(|name| !taken.contains(name));
        return Ok(free.take(args.count.unwrap_or(1).into()).collect());
    }
    if args.count.is_some_and(|count| usize::from(count) != args.names.len()) {
        let count = args.names.len();
        return Err(Failure::Usage(format!("--count: there are {count} names; leave it out, or name each")));
    }
    for (at, name) in args.names.iter().enumerate() {
        check_id(name)?;
        if args.names[..at].contains(name) {
            return Err(Failure::Usage(format!("--name {name:?}: two clones cannot have one name")));
        }
        if taken.contains(name) {
            let detail = "there is one of that name already; choose another, or delete it".into();
            return Err(Failure::Container { id: name.clone(), detail });
        }
    }
    Ok(args.names.clone())
}

/// Makes them, some at a time; after a failure, or when somebody interrupts, no more are begun and all go again.
async fn all(maker: &Maker<'_>, plan: &Plan, origin: &str, names: &[String]) -> Result<Vec<Made>, Failure> {
    let mut work = Work::begin()?;
    let jobs = names.iter().map(|name| maker.make(plan.recipe(name, origin)));
    let line = |done| format!("{done} of {} clones", names.len());
    let (done, interrupted) = work.several(AT_ONCE, jobs, |(_, outcome)| outcome.is_ok(), line).await;
    work.finish();
    let mut failed = interrupted.then_some(Failure::Interrupted);
    let mut made = Vec::new();
    for (one, outcome) in done {
        // The first is told: others likely failed for the same reason.
        failed = failed.or(outcome.err());
        made.push(one);
    }
    let Some(failure) = failed else {
        made.sort_by_key(|one| names.iter().position(|name| *name == one.name));
        return Ok(made);
    };
    for one in made {
        for error in maker.undo(&one).await {
            eprintln!("spore: warning: clone {} is not taken back: {error}", one.name);
        }
    }
    Err(failure)
}

fn as_json(origin: &Origin, made: &[Made], wall: Duration) -> Value {
    let clones = made.iter().map(|made| {
        let times = made.times.iter().map(|(step, time)| (format!("{step}_ns"), json!(nanoseconds(*time))));
        let mut clone: serde_json::Map<_, _> = times.collect();
        clone.insert("id".into(), json!(made.name));
        clone.insert("pid".into(), json!(made.pid));
        Value::Object(clone)
    });
    let clones = clones.collect::<Value>();
    let wall = nanoseconds(wall);
    match origin {
        Origin::Snapshot(id) => json!({ "snapshot": id, "clones": clones, "wall_ns": wall }),
        Origin::Zygote { stood, took, .. } => json!({
            "stood_ns": nanoseconds(*stood),
            "zygote_ns": nanoseconds(*took),
            "clones": clones,
            "wall_ns": wall,
        }),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn named(line: &str) -> Result<Vec<String>, Failure> {
        let args = Line::parse_from(["clone"].into_iter().chain(line.split_whitespace())).args;
        names(&args, &["web".into(), "web-2".into(), "db".into()])
    }

    #[test]
    fn names_are_given_or_the_next_that_are_free() {
        assert_eq!(named("web").unwrap(), ["web-1"]);
        assert_eq!(named("web --count 3").unwrap(), ["web-1", "web-3", "web-4"]);
        assert_eq!(named("web --name b --name a --count 2").unwrap(), ["b", "a"]);
    }

    #[test]
    fn names_that_cannot_be_are_refused_before_anything_is_made() {
        for (line, part) in [
            ("web --name a --name a", "cannot have one name"),
            ("web --name a --count 2", "there are 1 names"),
            ("web --name ../x", "is not the id"),
            ("web --name a --name db", "there is one of that name already"),
        ] {
            let error = named(line).unwrap_err().to_string();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
