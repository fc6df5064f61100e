use proptest::prelude::*;

use super::*;

#[allow(clippy::single_range_in_vec_init)] // a list of runs, of which there is one
const RAM: [Range<u64>; 1] = [0..64 * PAGE];
const WIDE: Limits = Limits { extents: 1000, layers: 15 };

fn pages(start: u64, end: u64) -> Range<u64> {
    start * PAGE..end * PAGE
}

fn extent(start: u64, end: u64, layer: u32, offset: u64) -> Extent {
    Extent { start: start * PAGE, bytes: (end - start) * PAGE, layer, offset: offset * PAGE }
}

fn layer(id: &str, pages: u64) -> Layer {
    Layer { id: id.into(), bytes: pages * PAGE, crc32: 0 }
}

fn map(extents: Vec<Extent>) -> MemoryMap {
    MemoryMap { layers: vec![layer("a", 8), layer("b", 8)], extents }
}

#[test]
fn a_full_snapshot_writes_what_is_written() {
    let plan = plan(&RAM, &[], &[], &[pages(4, 6), pages(9, 10)], WIDE);
    assert_eq!(plan, Plan { kept: vec![], fresh: vec![pages(4, 6), pages(9, 10)] });
    let map = table(&plan, &[], layer("new", 3));
    assert_eq!(map.extents, [extent(4, 6, 0, 0), extent(9, 10, 0, 2)]);
    map.check(&RAM).unwrap();
}

#[test]
fn a_delta_refers_to_the_parts_that_are_as_they_were() {
    let base = [extent(0, 8, 0, 0), extent(10, 12, 1, 4)];
    let plan = plan(&RAM, &base, &[pages(6, 7)], &[pages(2, 3), pages(11, 14)], WIDE);
    assert_eq!(plan.kept, [extent(0, 2, 0, 0), extent(3, 6, 0, 3), extent(7, 8, 0, 7), extent(10, 11, 1, 4)]);
    let map = table(&plan, &[layer("a", 8), layer("b", 8)], layer("c", 4));
    assert_eq!(map.layers.iter().map(|layer| &*layer.id).collect::<Vec<_>>(), ["a", "b", "c"]);
    map.check(&RAM).unwrap();
}

#[test]
fn a_layer_that_nothing_refers_to_any_more_is_left_out() {
    let base = [extent(0, 1, 0, 0), extent(2, 3, 1, 0)];
    let plan = plan(&RAM, &base, &[], &[pages(0, 1)], WIDE);
    let map = table(&plan, &[layer("a", 8), layer("b", 8)], layer("c", 1));
    assert_eq!(map.layers.iter().map(|layer| &*layer.id).collect::<Vec<_>>(), ["b", "c"]);
    assert_eq!(map.extents, [extent(0, 1, 1, 0), extent(2, 3, 0, 0)]);
}

#[test]
fn the_smallest_gaps_are_closed_first() {
    let written = [pages(0, 1), pages(2, 3), pages(10, 11), pages(12, 13)];
    let plan = plan(&RAM, &[], &[], &written, Limits { extents: 2, layers: 15 });
    assert_eq!(plan.fresh, [pages(0, 3), pages(10, 13)]);
}

#[test]
fn no_gap_is_closed_over_the_hole_between_two_runs() {
    let runs = [pages(0, 8), pages(16, 24)];
    let plan =
        plan(&runs, &[], &[], &[pages(0, 1), pages(3, 4), pages(20, 21)], Limits { extents: 1, layers: 1 });
    assert_eq!(plan.fresh, [pages(0, 4), pages(20, 21)]);
}

#[test]
fn the_layer_of_which_least_is_used_is_written_anew() {
    let base = [extent(0, 4, 0, 0), extent(5, 6, 1, 0), extent(8, 11, 2, 0)];
    let plan = plan(&RAM, &base, &[], &[pages(20, 21)], Limits { extents: 100, layers: 2 });
    assert_eq!(plan.fresh, [pages(5, 6), pages(20, 21)]);
    assert_eq!(plan.kept, [extent(0, 4, 0, 0), extent(8, 11, 2, 0)]);
}

#[test]
fn tables_that_cannot_be_are_refused() {
    let refused = |extents| map(extents).check(&RAM).unwrap_err();
    assert!(matches!(refused(vec![extent(0, 9, 0, 0)]), TableError::BeyondLayer { end: 0x9000, .. }));
    assert!(matches!(
        refused(vec![Extent { offset: u64::MAX - 4095, ..extent(0, 1, 0, 0) }]),
        TableError::BeyondLayer { .. }
    ));
    assert!(matches!(refused(vec![extent(0, 2, 0, 0), extent(1, 3, 0, 0)]), TableError::Overlap { .. }));
    assert!(matches!(refused(vec![extent(3, 4, 0, 0), extent(0, 1, 0, 0)]), TableError::Overlap { .. }));
    assert!(matches!(refused(vec![extent(63, 65, 0, 0)]), TableError::NotRam { .. }));
    assert!(matches!(
        refused(vec![Extent { start: u64::MAX - 4095, ..extent(0, 1, 0, 0) }]),
        TableError::NotRam { .. }
    ));
    assert!(matches!(refused(vec![extent(0, 1, 2, 0)]), TableError::NoLayer { layers: 2, .. }));
    assert!(matches!(refused(vec![Extent { bytes: 7, ..extent(0, 1, 0, 0) }]), TableError::Unaligned { .. }));
    assert!(matches!(refused(vec![Extent { bytes: 0, ..extent(0, 1, 0, 0) }]), TableError::Unaligned { .. }));
    assert!(matches!(
        refused(vec![extent(0, 1, 0, 0); MAX_EXTENTS + 1]),
        TableError::TooMany { what: "extents", .. }
    ));
    let odd = MemoryMap { layers: vec![layer("../a", 1)], extents: vec![] };
    assert_eq!(odd.check(&RAM), Err(TableError::LayerId { index: 0 }));
    let twice = MemoryMap { layers: vec![layer("a", 1), layer("a", 1)], extents: vec![] };
    assert!(matches!(twice.check(&RAM), Err(TableError::LayerTwice { .. })));
}

/// What each page reads as: the layer and page in it, or zero.
fn content(extents: &[Extent]) -> Vec<Option<(u32, u64)>> {
    let mut pages = vec![None; 64];
    for extent in extents {
        for page in 0..extent.bytes / PAGE {
            let at = usize::try_from(extent.start / PAGE + page).unwrap();
            assert_eq!(pages[at], None, "overlap at page {at}");
            pages[at] = Some((extent.layer, extent.offset / PAGE + page));
        }
    }
    pages
}

fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
    proptest::collection::vec(any::<bool>(), 64).prop_map(|pages| {
        let on = (0u64..).zip(pages).filter(|(_, on)| *on);
        join(on.map(|(page, _)| page * PAGE..(page + 1) * PAGE).collect())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever was written, zeroed and merged: each page reads as it should, and the bounds hold.
    #[test]
    fn a_plan_keeps_every_page(
        first in ranges(), second in ranges(), zero in ranges(), written in ranges(), max in 1usize..40,
    ) {
        // Two layers, of which the second holds every other written range.
        let all = join(first.into_iter().chain(second).collect());
        let base: Vec<Extent> = all.iter().enumerate().map(|(n, range)| Extent {
            start: range.start,
            bytes: range.end - range.start,
            layer: u32::try_from(n % 2).unwrap(),
            offset: range.start,
        }).collect();
        let before = content(&base);
        let plan = plan(&RAM, &base, &zero, &written, Limits { extents: max, layers: 1 });
        prop_assert!(plan.kept.len() + plan.fresh.len() <= max.max(1));
        let kept = content(&plan.kept);
        let holds = |ranges: &[Range<u64>], page: u64| ranges.iter().any(|r| r.contains(&(page * PAGE)));
        for page in 0..64 {
            let at = usize::try_from(page).unwrap();
            if holds(&plan.fresh, page) {
                prop_assert_eq!(kept[at], None);
            } else {
                prop_assert!(!holds(&written, page));
                let expected = if holds(&zero, page) { None } else { before[at] };
                prop_assert_eq!(kept[at], expected, "page {}", page);
            }
        }
    }
}
