//! The power goes at any step. Of what was written since the last sync of a file, each sector may
//! have reached the disk or not.

use super::*;
use crate::backend::disk::tape::Step;

/// What became of a file.
fn after_the_cut(
    steps: &[(usize, Step)],
    file: usize,
    length: usize,
    lost: &mut impl FnMut() -> bool,
) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let ours: Vec<&Step> = steps.iter().filter(|(of, _)| *of == file).map(|(_, step)| step).collect();
    let synced = ours.iter().rposition(|step| matches!(step, Step::Sync)).unwrap_or(0);
    for (at, step) in ours.iter().enumerate() {
        let (start, change) = match step {
            Step::Write { offset, bytes } => (*offset, bytes.clone()),
            Step::Zero { offset, len } => (*offset, vec![0; usize::try_from(*len).unwrap()]),
            Step::Sync => continue,
        };
        for (index, piece) in change.chunks(512).enumerate() {
            if at < synced || !lost() {
                let start = usize::try_from(start).unwrap() + index * 512;
                bytes[start..start + piece.len()].copy_from_slice(piece);
            }
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_loss_of_power_leaves_what_was_flushed(
        ops in proptest::collection::vec(op(), 1..30), cut: proptest::sample::Index, seed: u64,
    ) {
        let mut scene = Scene::new();
        // Sectors as they were flushed, and what else each may hold since.
        let mut history = vec![(0, vec![0u8; usize::try_from(SIZE / 512).unwrap()], Vec::new(), 1)];
        let mut now = history[0].1.clone();
        // Merging puts other files in the place of those on the tape.
        for op in ops.iter().filter(|op| !matches!(op, Op::Merge { .. })) {
            let (_, mut flushed, mut since, _) = history.last().unwrap().clone();
            if let Some((range, value)) = apply(&mut scene, op) {
                now[range.clone()].fill(value);
                since.push((range, value));
            }
            // While it is under way, what was written before it may be there as well as not.
            let begun = since.clone();
            if matches!(op, Op::Flush) {
                flushed.clone_from(&now);
                since.clear();
            }
            let layers = scene.paths.len();
            history.last_mut().unwrap().2 = begun;
            history.last_mut().unwrap().3 = layers;
            history.push((scene.tape.len(), flushed, since, layers));
        }
        let steps = scene.tape.steps();
        let cut = cut.index(steps.len() + 1);
        // The last operation that was complete; the next one may have been under way.
        let (_, flushed, since, layers) = history.iter().rev().find(|(done, ..)| *done <= cut).unwrap();
        let mut random = seed | 1;
        let mut lost = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random & 1 == 0
        };
        for at in 0..*layers {
            let length = std::fs::metadata(&scene.paths[at]).unwrap().len();
            let mut bytes = after_the_cut(&steps[..cut], at, usize::try_from(length).unwrap(), &mut lost);
            let synced =
                |layer| steps[..cut].iter().any(|(of, step)| *of == layer && matches!(step, Step::Sync));
            // It was written when the layer was staged, which is not on the tape, after those below were durable.
            let written = at == 1 || (at > 1 && synced(at - 1));
            if at > 0 && (synced(at) || (written && !lost())) {
                let mut header = vec![0; format::HEADER];
                File::open(&scene.paths[at]).unwrap().read_exact_at(&mut header, 0).unwrap();
                bytes[..format::HEADER].copy_from_slice(&header);
            }
            std::fs::write(&scene.paths[at], bytes).unwrap();
        }
        scene.paths.truncate(*layers);
        scene.reopen();
        for (at, &found) in sectors(&scene.all()).iter().enumerate() {
            let written = since.iter().any(|(range, value)| range.contains(&at) && *value == found);
            prop_assert!(found == flushed[at] || written, "sector {}: {}", at, found);
        }
    }
}
