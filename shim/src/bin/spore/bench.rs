//! `spore bench`: how long what containers are asked to do takes on this host, through the interfaces that every client uses.

mod compare;
mod figures;
mod image;
mod operation;
mod plot;
mod recipe;
mod report;
mod stage;

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::Global;
use crate::containerd::{Containerd, Namespace};
use crate::create::Maker;
use crate::failure::Failure;
use crate::progress::Work;
use crate::{show, snapshot};
use clap::ValueEnum;
use compare::Before;
use figures::Row;
use image::Image;
use operation::Operation;
use plot::Plot;
use recipe::Recipes;
use report::{KIND, Report, VERSION};
use stage::{Names, Rounds, Stage};

const MOST_AT_ONCE: u16 = 256;
const MOST_RUNS: u16 = 10_000;
const MOST_WARM_UP: u16 = 1000;
/// What the containers do, for longer than anybody measures; every sleep(1) knows it.
const IDLE: [&str; 2] = ["sleep", "1000000"];

const HELP: &str = "\
Runs are made in rounds of --concurrency at once. What a round has made is taken away before the next, and nothing of that is
measured; neither is the making of the containers and snapshots that an operation needs, of which each run of a round has its own
(all restores begin with one snapshot). All are called spore-bench-PID-NUMBER, and none is left, after Ctrl-C neither.

WALL is the time in which runs were under way, AMORTISED is that for each run that succeeded; percentiles are by nearest rank.
The status is 1 when a run has failed. The number of runs is -N, because -n is containerd's namespace with every verb.";

#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub(crate) struct Args {
    /// What to measure [default: all of it]
    #[arg(value_enum, value_name = "OPERATION")]
    operations: Vec<Operation>,
    /// An image that containerd has, unpacked, by the name that `ctr images ls` gives it
    #[arg(long, value_name = "IMAGE")]
    image: String,
    /// The snapshotter that it is unpacked for
    #[arg(long, value_name = "NAME", default_value = "overlayfs")]
    snapshotter: String,
    /// Runs at once
    #[arg(short, long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MOST_AT_ONCE)))]
    concurrency: u16,
    /// Runs of each operation that are counted
    #[arg(short = 'N', long, value_name = "NUMBER", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=i64::from(MOST_RUNS)))]
    count: u16,
    /// Rounds before these that are not
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u16).range(0..=i64::from(MOST_WARM_UP)))]
    warm_up: u16,
    /// The program that exec runs, without arguments; its status has to be 0
    #[arg(long = "exec", value_name = "PROGRAM", default_value = "true")]
    program: String,
    /// Draw every run: a file that ends with .svg or .html, which is written anew
    #[arg(long, value_name = "FILE")]
    plot: Option<Plot>,
    /// Compare with what --json has printed before
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// What the containers run; it has to run for as long as it is let [default: sleep 1000000]
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

pub(crate) async fn run(global: &Global, args: Args) -> Result<u8, Failure> {
    let operations = operations(&args.operations);
    if let Some(plot) = &args.plot {
        plot.check()?;
    }
    let before = args.compare.as_ref().map(|path| {
        let shown = show::name(path.as_os_str().as_encoded_bytes());
        Before::read(path).map_err(|error| Failure::Refused(format!("--compare {shown}: {error}")))
    });
    let before = before.transpose()?;
    let containerd = Containerd::connect(global).await?;
    let namespace = Namespace::new(&global.namespace)?;
    let store = snapshot::store()?;
    let called = (&namespace, global.namespace.as_str());
    let image = Image::find(&containerd, called, &args.image, &args.snapshotter).await?;
    let version = containerd.version().await?;
    let command = match args.command.is_empty() {
        true => IDLE.map(str::to_owned).to_vec(),
        false => args.command.clone(),
    };
    let stage = Stage {
        global,
        maker: Maker { containerd: &containerd, namespace: &namespace, kind: "container" },
        store: &store,
        recipes: Recipes::new(image, &global.namespace, command),
        program: &args.program,
        names: Names::beside(containerd.ids(&namespace).await?),
    };
    let rounds = Rounds {
        concurrency: args.concurrency.into(),
        count: args.count.into(),
        warm_up: args.warm_up.into(),
    };

    let begun = now();
    let mut work = Work::begin()?;
    let measured = all(&stage, &mut work, &operations, rounds).await;
    work.finish();
    let operations = measured?;

    let mut report = Report {
        kind: KIND,
        version: VERSION,
        date: begun,
        spore: env!("CARGO_PKG_VERSION"),
        containerd: version,
        kernel: report::kernel(),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        image: args.image,
        snapshotter: args.snapshotter,
        operations,
        compared: None,
    };
    for row in &report.operations {
        if let Some(why) = &row.first_failure {
            let failed = row.count - row.ok;
            eprintln!(
                "spore: warning: {}: {failed} of {} failed; the first: {why}",
                row.operation, row.count
            );
        }
    }
    if let Some(before) = &before {
        compare(&mut report, before);
    }
    // First, for whoever reads the tables may stop reading.
    if let Some(plot) = &args.plot {
        plot.write(&report)?;
    }
    report.show(global.json)?;
    Ok(u8::from(report.operations.iter().any(|row| row.ok < row.count)))
}

async fn all(
    stage: &Stage<'_>,
    work: &mut Work,
    operations: &[Operation],
    rounds: Rounds,
) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    for operation in operations {
        rows.push(stage.measure(work, *operation, rounds).await?);
    }
    Ok(rows)
}

/// Those that are asked for, each once.
fn operations(named: &[Operation]) -> Vec<Operation> {
    if named.is_empty() {
        return Operation::value_variants().to_vec();
    }
    let mut once = Vec::new();
    for operation in named {
        if !once.contains(operation) {
            once.push(*operation);
        }
    }
    once
}

/// Puts beside the report what was before; what cannot be compared is told.
fn compare(report: &mut Report, before: &Before) {
    if before.image != report.image {
        let (image, date) = (show::name(before.image.as_bytes()), show::name(before.date.as_bytes()));
        eprintln!("spore: warning: --compare: what was measured on {date} was image \"{image}\"");
    }
    let mut compared = Vec::new();
    for row in &report.operations {
        match before.compare(row) {
            Ok(one) => compared.push(one),
            Err(why) => eprintln!("spore: warning: --compare: {why}"),
        }
    }
    report.compared = Some(compared);
}

fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    show::time(i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
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

    fn parse(line: &str) -> Args {
        Line::parse_from(["bench"].into_iter().chain(line.split_whitespace())).args
    }

    #[test]
    fn everything_is_measured_unless_some_are_named() {
        let named = |line: &str| operations(&parse(line).operations);
        assert_eq!(named("--image x"), Operation::value_variants());
        assert_eq!(named("exec create --image x exec"), [Operation::Exec, Operation::Create]);
    }

    #[test]
    fn what_follows_two_dashes_is_the_command() {
        let args = parse("exec --image x -c 4 -N 20 --plot a.svg -- sh -c -n");
        assert_eq!((args.concurrency, args.count, args.warm_up), (4, 20, 1));
        assert_eq!((args.operations.as_slice(), args.program.as_str()), (&[Operation::Exec][..], "true"));
        assert_eq!(args.command, ["sh", "-c", "-n"]);
        assert!(parse("--image x").command.is_empty());
    }
}
