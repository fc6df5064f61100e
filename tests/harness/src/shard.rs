//! Work that several machines share: each runs the same program, which takes its part.

use anyhow::{Context, Result};

/// Variable that tells a program its part of the work: `1/2` is the first of two.
pub const SHARD: &str = "SPORE_SHARD";

/// Which part is ours, `number` of `of` counted from 1; `None` for all of it.
pub fn ours() -> Result<Option<(usize, usize)>> {
    let Ok(value) = std::env::var(SHARD) else { return Ok(None) };
    let parts = value.split_once('/').and_then(|(number, of)| Some((number.parse().ok()?, of.parse().ok()?)));
    let parts: Option<(usize, usize)> = parts.filter(|(number, of)| (1..=*of).contains(number));
    parts.map(Some).with_context(|| format!("{SHARD}={value}: a part looks like 1/2"))
}

/// The part of hand `number` of work with its sizes: the largest are dealt first, each to the
/// hand that has least.
pub fn dealt<T>(all: Vec<(usize, T)>, number: usize, of: usize) -> Vec<(usize, T)> {
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by_key(|&index| std::cmp::Reverse(all[index].0));
    let mut hands = vec![0; of];
    let mut owner = vec![0; all.len()];
    for index in order {
        let least = (0..of).min_by_key(|&hand| hands[hand]).unwrap_or(0);
        hands[least] += all[index].0;
        owner[index] = least + 1;
    }
    all.into_iter().zip(owner).filter(|(_, owner)| *owner == number).map(|(one, _)| one).collect()
}

#[cfg(test)]
mod tests {
    use super::dealt;

    #[test]
    fn every_case_is_dealt_once_and_evenly() {
        let all = || vec![(1, "a"), (21, "b"), (2, "c"), (21, "d"), (9, "e"), (9, "f"), (1, "g")];
        let (one, two) = (dealt(all(), 1, 2), dealt(all(), 2, 2));
        let weight = |hand: &[(usize, &str)]| hand.iter().map(|(containers, _)| containers).sum::<usize>();
        assert_eq!((weight(&one), weight(&two)), (32, 32));
        let mut names: Vec<_> = one.iter().chain(&two).map(|(_, name)| *name).collect();
        names.sort_unstable();
        assert_eq!(names, ["a", "b", "c", "d", "e", "f", "g"]);
        assert_eq!(dealt(all(), 1, 1), all());
    }
}
