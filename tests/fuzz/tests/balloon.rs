//! The memory balloon against page numbers and reports of any kind. Asserted each time: no panic,
//! a bounded amount of work, every whole page of RAM that was named reads as zeroes, every other
//! page is as it was, and the device works after a reset.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod virtio;

use proptest::prelude::*;
use spore_vmm::devices::virtio::balloon::Balloon;
use virtio::{AVAILABLE, HIGH, HIGH_BASE, LOW, Machine, TABLE, USED};

const PAGE: u64 = 4096;
const INFLATE: usize = 0;
const REPORTING: usize = 2;
/// Where lists of page numbers are.
const LISTS: u64 = 0x8_0000;
/// From here on pages are named and watched; below lie rings and lists.
const WATCHED: u64 = 0x10_0000;
const FULL: u8 = 0xa5;

/// What the driver asks for.
#[derive(Debug, Clone)]
enum Ask {
    Inflate(Vec<u32>),
    /// Addresses and lengths.
    Report(Vec<(u64, u32)>),
}

/// Addresses that are watched, in the hole, around the ends of RAM, or nowhere.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => WATCHED..LOW as u64,
        2 => LOW as u64 - 4 * PAGE..HIGH_BASE + HIGH as u64 + 4 * PAGE,
        1 => (WATCHED >> 12)..u64::MAX >> 12,
    ]
}

fn ask() -> impl Strategy<Value = Ask> {
    let number = address().prop_map(|address| (address / PAGE) as u32);
    let number = number.prop_filter("below what is watched", |number| u64::from(*number) * PAGE >= WATCHED);
    let length = prop_oneof![
        4 => (1..64u32).prop_map(|pages| pages * PAGE as u32),
        2 => 1u32..1_048_576,
        1 => Just(1u32),
    ];
    // In RAM: what is not is a driver error and ends the case.
    let range = (address(), length, any::<bool>()).prop_filter_map("outside RAM", |(at, length, whole)| {
        let at = if whole { at / PAGE * PAGE } else { at };
        in_ram(at, length.into()).then_some((at, length))
    });
    prop_oneof![
        proptest::collection::vec(number, 0..300).prop_map(Ask::Inflate),
        proptest::collection::vec(range, 1..32).prop_map(Ask::Report),
    ]
}

fn in_ram(at: u64, length: u64) -> bool {
    at.checked_add(length)
        .is_some_and(|end| end <= LOW as u64 || at >= HIGH_BASE && end <= HIGH_BASE + HIGH as u64)
}

/// Writes the request into the rings and rings the bell.
fn offer(machine: &mut Machine, position: u16, ask: &Ask) {
    let (queue, parts): (usize, Vec<(u64, u32, u16)>) = match ask {
        Ask::Inflate(numbers) => {
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            machine.put(LISTS, &bytes);
            (INFLATE, vec![(LISTS, bytes.len() as u32, 0)])
        }
        Ask::Report(ranges) => (REPORTING, ranges.iter().map(|(at, length)| (*at, *length, 2)).collect()),
    };
    let base = Machine::ring(queue);
    for (number, (at, length, flags)) in (0u16..).zip(&parts) {
        let more = u16::from(usize::from(number) + 1 < parts.len());
        let mut raw = at.to_le_bytes().to_vec();
        raw.extend(length.to_le_bytes());
        raw.extend((flags | more).to_le_bytes());
        raw.extend((number + 1).to_le_bytes());
        machine.put(base + TABLE + 16 * u64::from(number), &raw);
    }
    let size = machine.sizes[queue];
    machine.put(base + AVAILABLE + 4 + 2 * u64::from(position % size), &0u16.to_le_bytes());
    machine.put(base + AVAILABLE + 2, &(position + 1).to_le_bytes());
    machine.write(0x50, queue as u32);
}

/// The pages that a request gives back.
fn named(ask: &Ask) -> Vec<u64> {
    let pages: Vec<u64> = match ask {
        Ask::Inflate(numbers) => numbers.iter().map(|number| u64::from(*number)).collect(),
        Ask::Report(ranges) => ranges
            .iter()
            .flat_map(|(at, length)| at.div_ceil(PAGE)..(at + u64::from(*length)) / PAGE)
            .collect(),
    };
    pages.into_iter().filter(|page| in_ram(page * PAGE, PAGE)).collect()
}

proptest! {
    #[test]
    fn only_what_is_named_goes(
        features in prop_oneof![Just(u64::MAX), any::<u64>().prop_map(|some| some | 1 << 5)],
        asks in proptest::collection::vec(ask(), 1..8),
    ) {
        let mut machine = Machine::new(Box::new(Balloon::new()));
        machine.start(features);
        for (start, end) in [(WATCHED, LOW as u64), (HIGH_BASE, HIGH_BASE + HIGH as u64)] {
            machine.put(start, &vec![FULL; (end - start) as usize]);
        }
        let mut gone = std::collections::BTreeSet::new();
        let mut positions = [0u16; 3];
        for ask in &asks {
            let queue = if matches!(ask, Ask::Inflate(_)) { INFLATE } else { REPORTING };
            offer(&mut machine, positions[queue], ask);
            positions[queue] += 1;
            prop_assert!(machine.settle(), "work without end");
            prop_assert!(!machine.needs_reset());
            prop_assert_eq!(machine.u16_at(Machine::ring(queue) + USED + 2), positions[queue]);
            gone.extend(named(ask));
        }
        let pages = (WATCHED / PAGE..LOW as u64 / PAGE)
            .chain(HIGH_BASE / PAGE..(HIGH_BASE + HIGH as u64) / PAGE);
        for page in pages {
            let expected = if gone.contains(&page) { 0 } else { FULL };
            let found = machine.get(page * PAGE, PAGE as usize);
            prop_assert!(found.iter().all(|byte| *byte == expected), "page {page:#x} is not all {expected:#x}");
        }
        machine.start(u64::MAX);
        offer(&mut machine, 0, &Ask::Inflate(vec![(WATCHED / PAGE) as u32]));
        prop_assert!(machine.settle());
        prop_assert_eq!(machine.used_index(INFLATE), 1);
    }

    /// Lists of any length from anywhere, also of the rings' own pages.
    #[test]
    fn any_list_in_any_queue(
        queue in 0usize..3,
        noise in proptest::collection::vec(prop_oneof![any::<u32>(), 0..0x600u32], 0..4096),
        at in prop_oneof![0u64..LOW as u64, any::<u64>()],
        length in prop_oneof![0u32..1 << 16, any::<u32>()],
        write in any::<bool>(),
    ) {
        let mut machine = Machine::new(Box::new(Balloon::new()));
        machine.start(u64::MAX);
        let bytes: Vec<u8> = noise.iter().flat_map(|number| number.to_le_bytes()).collect();
        machine.put(LISTS, &bytes);
        let mut raw = (if write || at > LOW as u64 { at } else { LISTS + at % 4096 }).to_le_bytes().to_vec();
        raw.extend(length.to_le_bytes());
        raw.extend((u16::from(write) * 2).to_le_bytes());
        raw.extend([0; 2]);
        let base = Machine::ring(queue);
        machine.put(base + TABLE, &raw);
        machine.put(base + AVAILABLE + 2, &1u16.to_le_bytes());
        machine.write(0x50, queue as u32);
        prop_assert!(machine.settle(), "work without end");
        machine.start(u64::MAX);
        prop_assert!(!machine.needs_reset());
    }
}
