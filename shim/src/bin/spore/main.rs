//! `spore`: what people and scripts ask of Spore beside containerd's own clients (DESIGN 8).
//!
//! A client of containerd over gRPC (`containerd`) and of the shims over ttrpc (`remote`). One
//! file for each verb; `show` is all output, `failure` all errors and exit statuses. What comes
//! from a guest is not believed: `remote` checks it, `show` escapes it.

mod bench;
mod clone;
mod containerd;
mod cp;
mod create;
mod doctor;
mod exec;
mod failure;
mod fs;
mod hibernate;
mod progress;
mod ps;
mod remote;
mod resume;
mod rollback;
mod show;
mod snapshot;
mod template;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::Failure;

/// Containers in microVMs: what containerd's own clients have no word for.
#[derive(Debug, Parser)]
#[command(name = "spore", version, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Global {
    /// containerd's socket
    #[arg(
        long,
        global = true,
        env = "CONTAINERD_ADDRESS",
        default_value = "/run/containerd/containerd.sock",
        value_name = "PATH"
    )]
    address: String,
    /// containerd's namespace
    #[arg(
        short,
        long,
        global = true,
        env = "CONTAINERD_NAMESPACE",
        default_value = "default",
        value_name = "NAME"
    )]
    namespace: String,
    /// Print JSON: one value, or for what goes on, one a line
    #[arg(long, global = true)]
    json: bool,
}

impl Global {
    /// The socket's path, with which the shims were started too.
    fn socket(&self) -> &str {
        self.address.strip_prefix("unix://").unwrap_or(&self.address)
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Look for what this host lacks to run containers in microVMs
    Doctor,
    /// List the containers that run with Spore
    Ps(ps::Args),
    /// Run a command in a container
    Exec(exec::Args),
    /// Copy files and trees between a container and the host
    Cp(cp::Args),
    /// Look at the files of a container, and change them
    #[command(subcommand)]
    Fs(fs::Verb),
    /// Have a container go back to one of its snapshots, in place
    Rollback(rollback::Args),
    /// Put a container's machine away, to disk: the container stays, and takes no memory
    Hibernate(hibernate::Args),
    /// Have a container that hibernates, or is paused, run again
    Resume(resume::Args),
    /// Take snapshots of containers, and look after those that there are
    #[command(subcommand)]
    Snapshot(snapshot::Verb),
    /// Keep containers that are warmed up under a name, for others to begin with
    #[command(subcommand)]
    Template(template::Verb),
    /// Make running copies of a container, each with an identity of its own
    Clone(clone::Args),
    /// Measure how long what containers are asked to do takes on this host
    Bench(bench::Args),
}

fn main() -> ExitCode {
    let Cli { global, verb } = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("spore: error: start the runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(async {
        match verb {
            Verb::Doctor => doctor::run(&global).await,
            Verb::Ps(args) => ps::run(&global, args).await,
            Verb::Exec(args) => exec::run(&global, args).await,
            Verb::Cp(args) => cp::run(&global, args).await,
            Verb::Fs(verb) => fs::run(&global, verb).await,
            Verb::Rollback(args) => rollback::run(&global, args).await.map(|()| 0),
            Verb::Hibernate(args) => hibernate::run(&global, args).await.map(|()| 0),
            Verb::Resume(args) => resume::run(&global, args).await.map(|()| 0),
            Verb::Snapshot(verb) => snapshot::run(&global, verb).await,
            Verb::Template(verb) => template::run(&global, verb).await,
            Verb::Clone(args) => clone::run(&global, args).await,
            Verb::Bench(args) => bench::run(&global, args).await,
        }
    });
    // A thread may still wait for input that nobody needs.
    runtime.shutdown_background();
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            if !matches!(failure, Failure::Output(ref error) if error.kind() == std::io::ErrorKind::BrokenPipe)
            {
                eprintln!("spore: error: {failure}");
            }
            ExitCode::from(failure.status())
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_a_command_is_given_after_its_name_is_its_own() {
        let cli = parse("spore -n k8s.io exec -it -u 1000:1000 -e A=b web ls -n --json -w").unwrap();
        assert_eq!(cli.global.namespace, "k8s.io");
        assert!(!cli.global.json);
        let Verb::Exec(args) = cli.verb else { panic!("{:?}", cli.verb) };
        assert_eq!((args.container.as_str(), args.interactive, args.tty), ("web", true, true));
        assert_eq!(args.command, ["ls", "-n", "--json", "-w"]);
        let cli = parse("spore fs ls web / --json --address unix:///x/y.sock").unwrap();
        assert!(cli.global.json);
        assert_eq!(cli.global.socket(), "/x/y.sock");
        // The number of runs is another letter than the namespace.
        let cli = parse("spore bench exec -n k8s.io -N 7 --image x -- sleep -n 9").unwrap();
        assert_eq!(cli.global.namespace, "k8s.io");
    }

    #[test]
    fn mistakes_on_the_command_line_are_status_2() {
        for line in [
            "spore",
            "spore exec web",
            "spore cp a",
            "spore fs ls",
            "spore frobnicate",
            "spore ps --bad",
            "spore snapshot create web --wait forever",
            "spore snapshot rm",
            "spore clone",
            "spore template create warm",
            "spore template create warm --from web --snapshot 0123",
            "spore template prune --older-than 3",
            "spore clone web --count 0",
            "spore rollback web",
            "spore hibernate",
            "spore resume",
            "spore bench",
            "spore bench frobnicate --image x",
            "spore bench exec --image x --count 0",
            "spore bench exec --image x -c 0",
            "spore bench exec --image x --plot x.png",
            "spore bench exec --image",
        ] {
            let error = parse(line).map(|_| ()).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
        assert_eq!(parse("spore --help").map(|_| ()).unwrap_err().exit_code(), 0);
    }
}
