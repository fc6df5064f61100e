//! Runs of an operation: in rounds of so many at once. What runs work on is made before, and what a round leaves is taken away
//! before the next begins, outside of what is measured.

use std::cell::Cell;
use std::time::{Duration, Instant};

use containerd_client::services::v1::{DeleteProcessRequest, ExecProcessRequest, StartRequest, WaitRequest};
use containerd_client::tonic::Code;
use containerd_shim_spore::snapshot::{SnapshotId, Store};

use super::figures::{Row, Tally};
use super::operation::Operation;
use super::recipe::Recipes;
use crate::Global;
use crate::clone::origin;
use crate::create::{Made, Maker};
use crate::exec::PROCESS_TYPE;
use crate::failure::{Failure, of_containerd};
use crate::progress::Work;
use crate::snapshot::create::Wait;
use crate::snapshot::{create, discard};
use crate::{hibernate, resume, rollback, show};

/// How many runs, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rounds {
    /// Runs at once.
    pub(super) concurrency: usize,
    /// Runs that are counted.
    pub(super) count: usize,
    /// Rounds before them that are not.
    pub(super) warm_up: usize,
}

impl Rounds {
    /// How many runs each has, and whether they count.
    fn each(self) -> impl Iterator<Item = (usize, bool)> {
        let warm = std::iter::repeat_n((self.concurrency, false), self.warm_up);
        let counted = (0..self.count).step_by(self.concurrency.max(1));
        warm.chain(counted.map(move |begun| (self.concurrency.min(self.count - begun), true)))
    }
}

/// What there is of a run, or for some: what has to go again.
#[derive(Default)]
struct Things {
    made: Option<Made>,
    snapshot: Option<SnapshotId>,
    /// Of a container.
    zygote: Option<(String, String)>,
    exec: Option<(String, String)>,
}

/// A run that has ended.
struct Ran {
    time: Duration,
    outcome: Result<(), Failure>,
    things: Things,
}

pub(super) struct Stage<'a> {
    pub(super) global: &'a Global,
    pub(super) maker: Maker<'a>,
    pub(super) store: &'a Store,
    pub(super) recipes: Recipes,
    /// What an exec runs.
    pub(super) program: &'a str,
    pub(super) names: Names,
}

/// Names that nobody has.
pub(super) struct Names {
    taken: Vec<String>,
    next: Cell<u64>,
}

impl Names {
    pub(super) fn beside(taken: Vec<String>) -> Self {
        Self { taken, next: Cell::new(1) }
    }

    fn next(&self) -> String {
        loop {
            let number = self.next.replace(self.next.get() + 1);
            let name = format!("spore-bench-{}-{number}", std::process::id());
            if !self.taken.contains(&name) {
                return name;
            }
        }
    }
}

impl Stage<'_> {
    /// All runs of an operation. Whatever comes of them, what was made for it and by it is gone afterwards; fails only when
    /// somebody interrupts.
    pub(super) async fn measure(
        &self,
        work: &mut Work,
        operation: Operation,
        rounds: Rounds,
    ) -> Result<Row, Failure> {
        let mut tally = Tally::new(operation, rounds.concurrency, rounds.count);
        let count = operation.sources(rounds.concurrency);
        let jobs = (0..count).map(|_| self.source(operation.needs_snapshot()));
        let line = |done| format!("{operation}: {done} of {count} containers that it needs");
        let (begun, mut interrupted) =
            work.several(rounds.concurrency, jobs, |(_, outcome)| outcome.is_ok(), line).await;
        let mut sources = Vec::new();
        let mut ready = true;
        for (things, outcome) in begun {
            sources.push(things);
            if let Err(failure) = outcome {
                tally.failed(format!("what it needs cannot be made: {failure}"));
                ready = false;
            }
        }
        if ready && !interrupted {
            interrupted = self.rounds(work, operation, rounds, &sources, &mut tally).await;
        }
        interrupted |= self.clear(work, sources).await;
        if interrupted { Err(Failure::Interrupted) } else { Ok(tally.row()) }
    }

    /// Says whether somebody has interrupted them.
    async fn rounds(
        &self,
        work: &mut Work,
        operation: Operation,
        rounds: Rounds,
        sources: &[Things],
        tally: &mut Tally,
    ) -> bool {
        let mut done = 0;
        for (size, counts) in rounds.each() {
            let jobs = (0..size).map(|slot| self.run(operation, sources.get(slot % sources.len().max(1))));
            let line = |ended| match counts {
                true => format!("{operation}: {} of {}", done + ended, rounds.count),
                false => format!("{operation}: warming up"),
            };
            let begun = Instant::now();
            let (ran, mut interrupted) = work.several(size, jobs, |_| true, line).await;
            let wall = begun.elapsed();
            let mut left = Vec::new();
            for Ran { time, outcome, things } in ran {
                left.push(things);
                match outcome {
                    Ok(()) if counts => tally.succeeded(time),
                    Err(failure) if counts => tally.failed(failure),
                    _ => {}
                }
            }
            if counts {
                done += size;
                tally.took(wall);
            }
            interrupted |= self.clear(work, left).await;
            if interrupted {
                return true;
            }
        }
        false
    }

    /// A container that runs, with a snapshot of it if one is needed.
    async fn source(&self, snapshot: bool) -> (Things, Result<(), Failure>) {
        let mut things = Things::default();
        let outcome = async {
            let name = self.make(None, false, &mut things).await?;
            if snapshot {
                self.snapshot(&name, &mut things).await?;
            }
            Ok(())
        };
        let outcome = outcome.await;
        (things, outcome)
    }

    async fn run(&self, operation: Operation, source: Option<&Things>) -> Ran {
        let mut things = Things::default();
        let container = source.and_then(|source| source.made.as_ref());
        // What is not measured of it.
        if let (Operation::Resume, Some(made)) = (operation, container)
            && let Err(failure) = hibernate::ask(self.global, &made.name).await
        {
            return Ran { time: Duration::ZERO, outcome: Err(failure), things };
        }
        let begun = Instant::now();
        let mut outcome = self.once(operation, source, &mut things).await;
        let time = begun.elapsed();
        if let (Operation::Hibernate, Some(made), true) = (operation, container, outcome.is_ok()) {
            outcome = resume::ask(self.global, &made.name).await.map(drop);
        }
        Ran { time, outcome, things }
    }

    async fn once(
        &self,
        operation: Operation,
        source: Option<&Things>,
        things: &mut Things,
    ) -> Result<(), Failure> {
        let container = source.and_then(|source| Some(source.made.as_ref()?.name.as_str()));
        let snapshot = source.and_then(|source| source.snapshot);
        match (operation, container, snapshot) {
            (Operation::Create, ..) => self.make(None, false, things).await.map(drop),
            (Operation::Exec, Some(container), _) => self.exec(container, things).await,
            (Operation::Snapshot, Some(container), _) => self.snapshot(container, things).await.map(drop),
            (Operation::Restore, _, Some(from)) => {
                self.make(Some(from.to_string()), false, things).await.map(drop)
            }
            (Operation::Clone, Some(container), _) => {
                let zygote = origin::ask(self.global, container).await?.zygote;
                things.zygote = Some((container.to_owned(), zygote.clone()));
                self.make(Some(zygote), true, things).await.map(drop)
            }
            (Operation::Hibernate, Some(container), _) => {
                hibernate::ask(self.global, container).await.map(drop)
            }
            (Operation::Resume, Some(container), _) => resume::ask(self.global, container).await.map(drop),
            (Operation::Rollback, Some(container), Some(to)) => {
                rollback::ask(self.global, container, to).await.map(drop)
            }
            _ => Err(Failure::Refused(format!("{operation}: there is nothing that it could be run on"))),
        }
    }

    /// Gives its name.
    async fn make(&self, from: Option<String>, passes: bool, things: &mut Things) -> Result<String, Failure> {
        let name = self.names.next();
        let recipe = self.recipes.recipe(&name, from.as_deref(), passes)?;
        let (made, outcome) = self.maker.make(recipe).await;
        things.made = Some(made);
        outcome.map(|()| name)
    }

    async fn snapshot(&self, container: &str, things: &mut Things) -> Result<SnapshotId, Failure> {
        // A passing one goes by itself, should nobody be left to remove it.
        let answer = create::ask(self.global, container, Wait::Durable, true).await?;
        let id = answer.snapshot.parse().map_err(|_| Failure::Container {
            id: container.into(),
            detail: "its shim names a snapshot that has no id".into(),
        })?;
        things.snapshot = Some(id);
        Ok(id)
    }

    async fn exec(&self, container: &str, things: &mut Things) -> Result<(), Failure> {
        let Maker { containerd, namespace, .. } = self.maker;
        let (container_id, exec_id) = (container.to_owned(), self.names.next());
        let failed =
            |what| of_containerd(&containerd.address, &format!("{what} in container \"{container}\""));
        let mut tasks = containerd.client.tasks();
        let value = self.recipes.exec(self.program)?;
        things.exec = Some((container_id.clone(), exec_id.clone()));
        let request = ExecProcessRequest {
            container_id: container_id.clone(),
            exec_id: exec_id.clone(),
            spec: Some(prost_types::Any { type_url: PROCESS_TYPE.into(), value }),
            ..Default::default()
        };
        tasks.exec(namespace.call(request)).await.map_err(failed("exec"))?;
        let request = StartRequest { container_id: container_id.clone(), exec_id: exec_id.clone() };
        tasks.start(namespace.call(request)).await.map_err(failed("start exec"))?;
        let request = WaitRequest { container_id, exec_id };
        let ended = tasks.wait(namespace.call(request)).await.map_err(failed("wait for exec"))?;
        match ended.into_inner().exit_status {
            0 => Ok(()),
            status => Err(Failure::Container {
                id: container.into(),
                detail: format!("\"{}\" ends with status {status}", show::name(self.program.as_bytes())),
            }),
        }
    }

    /// Takes things away, all at once; what stays is told. Says whether somebody has interrupted, which ends nothing here.
    async fn clear(&self, work: &mut Work, things: Vec<Things>) -> bool {
        let count = things.len();
        let jobs = things.into_iter().map(|things| self.away(things));
        let line = |done| format!("taking away: {done} of {count}");
        let (stays, interrupted) = work.several(usize::MAX, jobs, |_| true, line).await;
        for failure in stays.into_iter().flatten() {
            eprintln!("spore: warning: {failure}");
        }
        interrupted
    }

    async fn away(&self, things: Things) -> Vec<Failure> {
        let Maker { containerd, namespace, .. } = self.maker;
        let mut failures = Vec::new();
        if let Some((container_id, exec_id)) = things.exec {
            let what = format!("delete exec in container \"{container_id}\"");
            let request = DeleteProcessRequest { container_id, exec_id };
            match containerd.client.tasks().delete_process(namespace.call(request)).await {
                Err(status) if status.code() != Code::NotFound => {
                    failures.push(of_containerd(&containerd.address, &what)(status));
                }
                _ => {}
            }
        }
        if let Some(made) = things.made {
            failures.extend(self.maker.undo(&made).await);
        }
        if let Some((container, zygote)) = things.zygote {
            failures.extend(origin::end(self.global, &container, &zygote).await.err());
        }
        if let Some(id) = things.snapshot {
            let store = self.store.clone();
            // It may be large, and others are not to wait for its end.
            let _ = tokio::task::spawn_blocking(move || discard(&store, id)).await;
        }
        failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_have_all_runs_and_no_more() {
        let each =
            |concurrency, count, warm_up| Rounds { concurrency, count, warm_up }.each().collect::<Vec<_>>();
        assert_eq!(each(1, 2, 1), [(1, false), (1, true), (1, true)]);
        assert_eq!(each(4, 10, 0), [(4, true), (4, true), (2, true)]);
        assert_eq!(each(4, 2, 2), [(4, false), (4, false), (2, true)]);
    }

    #[test]
    fn names_are_new_ones() {
        let pid = std::process::id();
        let names = Names::beside(vec![format!("spore-bench-{pid}-2"), "web".into()]);
        let drawn = [names.next(), names.next(), names.next()];
        assert_eq!(drawn, [1, 3, 4].map(|number| format!("spore-bench-{pid}-{number}")));
    }
}
