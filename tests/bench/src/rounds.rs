//! What is compared is measured in turn, round by round, so that what slows the machine slows all of it. The first
//! round warms up and is not counted.

use anyhow::{Context, Result};

/// One of those that are compared: its name, and what measures it once, in milliseconds, given the round.
pub(crate) struct Side<'a> {
    name: String,
    once: Box<dyn FnMut(usize) -> Result<f64> + 'a>,
}

impl<'a> Side<'a> {
    pub(crate) fn new(name: &str, once: impl FnMut(usize) -> Result<f64> + 'a) -> Self {
        Self { name: name.to_owned(), once: Box::new(once) }
    }
}

/// What each side came to in the counted rounds, in their order. Rounds count from 1; 0 is the one that warms up.
pub(crate) fn alternate<const N: usize>(
    what: &str,
    rounds: usize,
    mut sides: [Side<'_>; N],
) -> Result<[Vec<f64>; N]> {
    let mut times = [const { Vec::new() }; N];
    for round in 0..=rounds {
        let mut told = Vec::new();
        for (side, times) in sides.iter_mut().zip(&mut times) {
            let ms = (side.once)(round).with_context(|| format!("{what}: {}, round {round}", side.name))?;
            told.push(format!("{} {ms:.0} ms", side.name));
            if round > 0 {
                times.push(ms);
            }
        }
        let counts = if round == 0 { " (warm-up, not counted)" } else { "" };
        eprintln!("{what}: round {round} of {rounds}: {}{counts}", told.join(", "));
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn sides_take_turns_and_the_first_round_does_not_count() {
        let order = RefCell::new(Vec::new());
        let side = |name: &'static str, by: f64| {
            let order = &order;
            Side::new(name, move |round| {
                order.borrow_mut().push((name, round));
                Ok(f64::from(u32::try_from(round)?) * by)
            })
        };
        let times = alternate("test", 2, [side("a", 1.0), side("b", 10.0)]).unwrap();
        assert_eq!(times, [[1.0, 2.0], [10.0, 20.0]]);
        assert_eq!(*order.borrow(), [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]);
        let failing = Side::new("c", |round| {
            anyhow::ensure!(round < 1, "no more");
            Ok(0.0)
        });
        let error = alternate("test", 1, [failing]).unwrap_err();
        assert_eq!(format!("{error:#}"), "test: c, round 1: no more");
    }
}
