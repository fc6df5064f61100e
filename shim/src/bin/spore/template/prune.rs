//! `spore template prune`.

use std::time::{Duration, SystemTime};

use containerd_shim_spore::snapshot::Policy;
use containerd_shim_spore::snapshot::manifest::Purpose;
use serde_json::json;

use crate::Global;
use crate::failure::Failure;
use crate::show;
use crate::snapshot::store;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// A number of days, hours, minutes or seconds since they were made: 30d, 12h, 5m, 90s
    #[arg(long, value_name = "AGE", default_value = "30d", value_parser = age)]
    older_than: Duration,
}

fn age(text: &str) -> Result<Duration, String> {
    let unit = match text.chars().last() {
        Some('d') => 24 * 3600,
        Some('h') => 3600,
        Some('m') => 60,
        Some('s') => 1,
        _ => return Err("a number with d, h, m or s behind it is needed, such as 30d".into()),
    };
    let number: u64 = text[..text.len() - 1].parse().map_err(|error| format!("{error}"))?;
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(|| "it is too long".into())
}

pub(super) fn run(global: &Global, args: &Args) -> Result<(), Failure> {
    let store = store()?;
    let templates = store.templates()?;
    let aged = Policy { max_age: Some(args.older_than), only: Some(Purpose::Template), ..Policy::default() };
    let pruned = store.prune(&aged, 0, SystemTime::now())?;
    if global.json {
        return show::json(&json!({ "removed": pruned.removed, "freed_bytes": pruned.freed }));
    }
    let gone = templates.iter().filter(|entry| pruned.removed.contains(&entry.manifest.id));
    let mut names = gone.filter_map(|entry| entry.manifest.name.as_deref());
    names.try_for_each(|name| show::line(&show::name(name.as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_is_a_number_and_a_unit() {
        let seconds = |text| age(text).map(|age| age.as_secs());
        assert_eq!(seconds("30d"), Ok(30 * 24 * 3600));
        assert_eq!((seconds("12h"), seconds("5m"), seconds("0s")), (Ok(43_200), Ok(300), Ok(0)));
        for bad in ["", "d", "3", "-1d", "1.5h", "3 d", "9999999999999999999d", "999999999999999999d", "3é"]
        {
            assert!(age(bad).is_err(), "{bad}");
        }
    }
}
