mod cost;
mod power;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use proptest::prelude::*;

use super::format::Geometry;
use super::tape::Tape;
use super::*;

/// Not a whole number of blocks: the last one is short.
const SIZE: u64 = 40 * 4096 + 3 * 512;

/// The files of one disk, and the disk once it is open.
struct Scene {
    dir: tempfile::TempDir,
    size: u64,
    /// From the bottom up.
    paths: Vec<PathBuf>,
    merges: u32,
    tape: Tape,
    disk: Option<Disk>,
}

impl Scene {
    fn of_size(size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let paths = vec![dir.path().join("0.raw")];
        File::create_new(&paths[0]).unwrap().set_len(size).unwrap();
        let mut scene = Self { dir, size, paths, merges: 0, tape: Tape::default(), disk: None };
        scene.reopen();
        scene
    }

    fn new() -> Self {
        Self::of_size(SIZE)
    }

    fn open_file(&self, at: usize) -> File {
        let top = at + 1 == self.paths.len();
        File::options().read(true).write(top).open(&self.paths[at]).unwrap()
    }

    fn try_open(&self) -> Result<Disk, DiskError> {
        let top = self.paths.len() - 1;
        Disk::open(self.open_file(top), (0..top).map(|at| self.open_file(at)).collect(), true)
    }

    /// As after `kill -9`: what the process knew is gone, what it gave to the kernel is not.
    fn reopen(&mut self) {
        self.disk = None;
        let mut disk = self.try_open().unwrap();
        for (at, layer) in disk.layers.iter_mut().enumerate() {
            Arc::get_mut(layer).unwrap().file_mut().tape = Some(self.tape.of(at));
        }
        self.disk = Some(disk);
    }

    fn disk(&mut self) -> &mut Disk {
        self.disk.as_mut().unwrap()
    }

    fn new_file(&mut self) -> File {
        let path = self.dir.path().join(format!("{}-{}.delta", self.merges, self.paths.len()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        self.paths.push(path);
        file
    }

    fn stage(&mut self) {
        let number = self.paths.len();
        let file = self.new_file();
        let tape = self.tape.of(number);
        let disk = self.disk();
        disk.stage(file).unwrap();
        disk.staged.as_mut().unwrap().layer.file_mut().tape = Some(tape);
    }

    fn capture(&mut self) {
        self.stage();
        self.disk().switch().unwrap();
    }

    /// Where there are so many layers below the top.
    fn merge(&mut self, first: usize, count: usize) {
        let last = first + count - 1;
        if last + 1 >= self.disk().depth() {
            return;
        }
        let path = self.dir.path().join(format!("merged-{}-{}", self.merges, self.paths.len()));
        self.merges += 1;
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        let merged = self.disk().merge(first..=last, file).unwrap().run().unwrap();
        self.disk().replace(merged).unwrap();
        self.paths.splice(first..=last, [path]);
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut bytes = bytes.to_vec();
        // In pieces of odd sizes, as a guest may give them.
        let cut = bytes.len() / 3;
        let (first, second) = bytes.split_at_mut(cut);
        let slices = [VolatileSlice::from(first), VolatileSlice::from(second)];
        let count = self.disk().write(offset, &slices).unwrap();
        assert_eq!(count, bytes.len());
    }

    fn read(&mut self, offset: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0xaa; count];
        let (first, second) = bytes.split_at_mut(count / 2);
        let slices = [VolatileSlice::from(first), VolatileSlice::from(second)];
        assert_eq!(self.disk().read(offset, &slices).unwrap(), count);
        bytes
    }

    fn all(&mut self) -> Vec<u8> {
        let size = self.size;
        self.read(0, usize::try_from(size).unwrap())
    }
}

#[derive(Debug, Clone)]
enum Op {
    Write { sector: u64, count: u64, value: u8 },
    Discard { sector: u64, count: u64 },
    Zero { sector: u64, count: u64, unmap: bool },
    Flush,
    Capture,
    Settle,
    Merge { first: usize, count: usize },
}

/// First sector and number of sectors of a range on the disk; small ones, mostly.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let sectors = SIZE / 512;
    let count = prop_oneof![3 => 1..20u64, 1 => 1..sectors];
    (0..sectors, count).prop_map(move |(sector, count)| (sector, count.min(sectors - sector)))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (range(), 1u8..).prop_map(|((sector, count), value)| Op::Write { sector, count, value }),
        1 => range().prop_map(|(sector, count)| Op::Discard { sector, count }),
        1 => (range(), any::<bool>()).prop_map(|((sector, count), unmap)| Op::Zero { sector, count, unmap }),
        2 => Just(Op::Flush),
        2 => Just(Op::Capture),
        1 => Just(Op::Settle),
        1 => (1usize..6, 2usize..5).prop_map(|(first, count)| Op::Merge { first, count }),
    ]
}

/// Does it to the disk; the range of sectors that it changes, and to what.
fn apply(scene: &mut Scene, op: &Op) -> Option<(std::ops::Range<usize>, u8)> {
    let (sector, count, value) = match *op {
        Op::Write { sector, count, value } => {
            scene.write(sector * 512, &vec![value; usize::try_from(count * 512).unwrap()]);
            (sector, count, value)
        }
        Op::Discard { sector, count } => {
            scene.disk().discard(sector * 512, count * 512).unwrap();
            (sector, count, 0)
        }
        Op::Zero { sector, count, unmap } => {
            scene.disk().write_zeroes(sector * 512, count * 512, unmap).unwrap();
            (sector, count, 0)
        }
        Op::Flush => {
            scene.disk().flush().unwrap();
            return None;
        }
        Op::Capture => {
            scene.capture();
            return None;
        }
        Op::Merge { first, count } => {
            scene.merge(first, count);
            return None;
        }
        Op::Settle => {
            scene.disk().unsettled().iter().for_each(|frozen| frozen.settle().unwrap());
            return None;
        }
    };
    let start = usize::try_from(sector).unwrap();
    Some((start..start + usize::try_from(count).unwrap(), value))
}

/// One value a sector, which has to be the same throughout it.
fn sectors(bytes: &[u8]) -> Vec<u8> {
    bytes
        .chunks(512)
        .map(|sector| {
            assert!(sector.iter().all(|&byte| byte == sector[0]), "a sector is in pieces");
            sector[0]
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_stack_reads_as_what_was_written(ops in proptest::collection::vec(op(), 1..40)) {
        let mut scene = Scene::new();
        let mut model = vec![0u8; usize::try_from(SIZE / 512).unwrap()];
        for op in &ops {
            if let Some((range, value)) = apply(&mut scene, op) {
                model[range].fill(value);
            }
        }
        prop_assert_eq!(&sectors(&scene.all()), &model);
        scene.disk().close().unwrap();
        scene.reopen();
        prop_assert_eq!(&sectors(&scene.all()), &model, "after it was closed");
    }

    /// After every few steps the process is killed. What was flushed is there, or what was written since.
    #[test]
    fn a_kill_loses_nothing_that_was_flushed(
        rounds in proptest::collection::vec(proptest::collection::vec(op(), 1..12), 1..5),
    ) {
        let mut scene = Scene::new();
        let mut flushed = vec![0u8; usize::try_from(SIZE / 512).unwrap()];
        for ops in &rounds {
            let (mut now, mut since) = (flushed.clone(), Vec::new());
            for op in ops {
                if let Some((range, value)) = apply(&mut scene, op) {
                    now[range.clone()].fill(value);
                    since.push((range, value));
                }
                if matches!(op, Op::Flush) {
                    flushed.clone_from(&now);
                    since.clear();
                }
            }
            scene.reopen();
            let found = sectors(&scene.all());
            for (at, &found) in found.iter().enumerate() {
                let written = since.iter().any(|(range, value)| range.contains(&at) && *value == found);
                prop_assert!(found == flushed[at] || written, "sector {}: {}", at, found);
            }
            // The guest that comes next goes by what it finds.
            flushed = found;
            scene.disk().flush().unwrap();
        }
    }
}

#[test]
fn a_part_of_a_block_keeps_the_rest_from_below() {
    let mut scene = Scene::new();
    scene.write(0, &[1; 8192]);
    scene.capture();
    scene.write(512, &[2; 512]);
    scene.write(4096 + 3584, &[3; 512]);
    let mut expected = vec![1; 8192];
    expected[512..1024].fill(2);
    expected[4096 + 3584..].fill(3);
    assert_eq!(scene.read(0, 8192), expected);
}

#[test]
fn a_frozen_layer_keeps_what_it_held_whatever_is_written_later() {
    let mut scene = Scene::new();
    scene.write(0, &[1; 16384]);
    scene.capture();
    scene.write(4096, &[2; 4096]);
    scene.capture();
    scene.disk().flush().unwrap();
    let frozen: Vec<_> = scene.paths[..2].iter().map(|path| std::fs::read(path).unwrap()).collect();
    scene.write(0, &[3; 16384]);
    scene.disk().discard(0, SIZE).unwrap();
    scene.disk().flush().unwrap();
    for (path, frozen) in scene.paths.iter().zip(&frozen) {
        assert!(std::fs::read(path).unwrap() == *frozen, "{path:?} has changed");
    }
    // What each capture holds is the stack up to it.
    for (layers, value) in [(1, 1), (2, 2), (3, 0)] {
        scene.paths.truncate(3);
        let kept = scene.paths.split_off(layers);
        let mut disk = scene.try_open().unwrap();
        scene.paths.extend(kept);
        std::mem::swap(scene.disk(), &mut disk);
        assert_eq!(scene.read(4096, 4096), [value; 4096], "{layers} layers");
        std::mem::swap(scene.disk(), &mut disk);
    }
}

#[test]
fn capturing_makes_no_system_call_and_settling_makes_it_complete() {
    let mut scene = Scene::new();
    scene.capture();
    scene.write(0, &[1; 4096]);
    scene.stage();
    let before = scene.tape.len();
    scene.disk().switch().unwrap();
    assert_eq!(scene.tape.len(), before, "reads are not told, but there is nothing to read either");
    let unsettled = scene.disk().unsettled();
    assert_eq!(unsettled.len(), 2);
    std::thread::scope(|scope| {
        // Any number may ask, one does it.
        for _ in 0..3 {
            scope.spawn(|| unsettled.iter().for_each(|frozen| frozen.settle().unwrap()));
        }
    });
    assert!(scene.disk().unsettled().is_empty());
    scene.paths.truncate(2);
    scene.reopen();
    assert_eq!(scene.read(0, 4096), [1; 4096]);
}

#[test]
fn without_a_staged_file_nothing_is_captured() {
    let mut scene = Scene::new();
    assert_eq!(scene.disk().switch(), None);
    scene.stage();
    scene.disk().unstage();
    assert_eq!(scene.disk().switch(), None);
    assert_eq!(scene.disk().depth(), 1);
}

#[test]
fn a_flush_that_failed_fails_until_the_disk_is_opened_again() {
    let mut scene = Scene::new();
    scene.write(0, &[1; 4096]);
    scene.capture();
    scene.disk().flush().unwrap();
    scene.write(0, &[2; 4096]);
    scene.stage();
    scene.tape.break_sync(true);
    scene.disk().flush().unwrap_err();
    scene.tape.break_sync(false);
    let error = scene.disk().flush().unwrap_err().to_string();
    assert!(error.contains("an earlier flush failed"), "{error}");
    // Nor is the layer that it becomes any good, nor what stands on it.
    scene.disk().switch().unwrap();
    scene.disk().unsettled()[0].settle().unwrap_err();
    scene.disk().flush().unwrap_err();
    scene.paths.truncate(2);
    scene.reopen();
    assert_eq!(scene.read(0, 4096), [1; 4096], "what was flushed");
}

#[test]
fn a_disk_whose_flush_failed_is_not_captured() {
    let mut scene = Scene::new();
    scene.capture();
    scene.tape.break_sync(true);
    scene.disk().flush().unwrap_err();
    scene.tape.break_sync(false);
    let error = scene.disk().stage(tempfile::tempfile().unwrap()).unwrap_err();
    assert!(matches!(error, DiskError::Create { .. }) && !scene.disk().is_staged(), "{error}");
}

#[test]
fn merged_layers_are_one_and_those_above_and_below_fit() {
    let mut scene = Scene::new();
    for layer in 1..=6u8 {
        scene.capture();
        scene.write(u64::from(layer) * 4096, &[layer; 8192]);
    }
    scene.disk().discard(3 * 4096, 4096).unwrap();
    let before = scene.all();
    let kept: Vec<_> = scene.paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let paths = scene.paths.clone();
    scene.merge(2, 3);
    assert_eq!((scene.disk().depth(), scene.paths.len()), (5, 5));
    assert!(scene.all() == before);
    scene.write(0, &[9; 512]);
    scene.capture();
    scene.merge(1, 4);
    scene.disk().close().unwrap();
    scene.reopen();
    assert_eq!(scene.disk().depth(), 3);
    let mut expected = before;
    expected[..512].fill(9);
    assert!(scene.all() == expected);
    // The uppermost was written since.
    for (path, kept) in paths.iter().zip(&kept).take(6).skip(1) {
        let now = std::fs::read(path).unwrap();
        assert!(now[format::HEADER + 4096..] == kept[format::HEADER + 4096..], "{path:?} has changed");
    }
}

#[test]
fn only_layers_between_the_lowest_and_the_top_are_merged_and_once() {
    let mut scene = Scene::new();
    (0..3).for_each(|_| scene.capture());
    #[allow(clippy::reversed_empty_ranges)] // what a peer may say
    for numbers in [0..=1, 1..=1, 2..=1, 1..=3, 2..=3, 1..=99] {
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(scene.disk().merge(numbers, file), Err(MergeError::Range { .. })));
    }
    let [first, second] = [(); 2].map(|()| {
        let file = tempfile::tempfile().unwrap();
        scene.disk().merge(1..=2, file).unwrap()
    });
    let (first, second) = (first.run().unwrap(), second.run().unwrap());
    scene.disk().replace(first).unwrap();
    assert!(matches!(scene.disk().replace(second), Err(MergeError::Changed)));
}

#[test]
fn a_disk_has_a_largest_number_of_layers() {
    let mut scene = Scene::new();
    for layer in 1..MAX_LAYERS {
        scene.capture();
        scene.write(layer as u64 % 40 * 4096, &[u8::try_from(layer).unwrap(); 512]);
    }
    let file = tempfile::tempfile().unwrap();
    let error = scene.disk().stage(file).unwrap_err();
    assert!(matches!(error, DiskError::TooMany { found: 61, max: 60 }), "{error}");
    let before = scene.all();
    scene.disk().close().unwrap();
    scene.reopen();
    assert!(scene.all() == before);
}

#[test]
fn a_large_disk_is_made_at_once_and_takes_what_is_written() {
    let mut scene = Scene::of_size(1 << 40);
    scene.capture();
    scene.write((1 << 40) - 4096, &[7; 4096]);
    scene.disk().discard(0, 1 << 39).unwrap();
    scene.disk().close().unwrap();
    let used = std::fs::metadata(&scene.paths[1]).unwrap().blocks() * 512;
    // Half of a bitmap of 32 MiB, for what was discarded.
    assert!(used < 17 << 20, "{used} bytes");
    scene.reopen();
    assert_eq!(scene.read((1 << 40) - 4096, 4096), [7; 4096]);
    assert_eq!(scene.read(1 << 30, 512), [0; 512]);
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let mut scene = Scene::new();
    scene.capture();
    scene.capture();
    scene.disk = None;
    let text = |scene: &Scene| scene.try_open().unwrap_err().to_string();
    let whole = scene.paths.clone();
    scene.paths = vec![whole[0].clone(), whole[2].clone()];
    assert!(text(&scene).contains("made above layer"), "{}", text(&scene));
    scene.paths = vec![whole[0].clone(), whole[1].clone(), whole[1].clone()];
    assert!(text(&scene).contains("layer 2 of 3") && text(&scene).contains("same file"), "{}", text(&scene));
    scene.paths = vec![whole[0].clone(), whole[0].clone()];
    assert!(text(&scene).contains("same file"), "{}", text(&scene));
    scene.paths = vec![scene.dir.path().join("small"), whole[1].clone()];
    std::fs::write(&scene.paths[0], [0; 512]).unwrap();
    assert!(text(&scene).contains("of a disk of"), "{}", text(&scene));
    scene.paths = vec![whole[0].clone(), scene.dir.path().join("small")];
    assert!(text(&scene).contains("has 512 bytes"), "{}", text(&scene));
    File::options().write(true).open(&whole[1]).unwrap().set_len(200_000).unwrap();
    scene.paths = whole[..2].to_vec();
    assert!(text(&scene).contains("has 200000 bytes"), "{}", text(&scene));
}

#[test]
fn a_damaged_header_or_bitmap_is_refused_by_name() {
    let mut scene = Scene::new();
    scene.capture();
    scene.disk = None;
    let file = File::options().read(true).write(true).open(&scene.paths[1]).unwrap();
    let mut header = [0; format::HEADER];
    file.read_exact_at(&mut header, 0).unwrap();
    for (at, expected) in [
        (0, "not a delta"),
        (8, "of version"),
        (30, "damaged header"),
        (511, "damaged header"),
        (4095, "a reserved byte"),
    ] {
        let mut bad = header;
        bad[at] ^= 0x40;
        file.write_all_at(&bad, 0).unwrap();
        let error = scene.try_open().unwrap_err().to_string();
        assert!(error.contains(expected), "byte {at}: {error}");
    }
    file.write_all_at(&header, 0).unwrap();
    // Block 41 of 41, counted from 0.
    file.write_all_at(&[1 << 1], 4096 + 5).unwrap();
    let error = scene.try_open().unwrap_err().to_string();
    assert!(error.contains("behind the disk's last, 40"), "{error}");
}

#[test]
fn a_raw_image_that_looks_like_a_delta_is_a_raw_image() {
    let mut scene = Scene::new();
    scene.capture();
    let header = std::fs::read(&scene.paths[1]).unwrap()[..4096].to_vec();
    let mut scene = Scene::new();
    scene.write(0, &header);
    scene.reopen();
    assert!(scene.read(0, 4096) == header);
}

#[test]
fn only_a_new_and_empty_file_becomes_a_layer() {
    let mut scene = Scene::new();
    let file = tempfile::tempfile().unwrap();
    file.set_len(1).unwrap();
    let error = scene.disk().stage(file).unwrap_err().to_string();
    assert!(error.contains("1 bytes long"), "{error}");
    let file = File::open(&scene.paths[0]).unwrap();
    let error = scene.disk().stage(file).unwrap_err().to_string();
    assert!(error.contains("opened for reading"), "{error}");
}

/// What is left of a file whose header was not durable when the power went, or whose maker was killed.
fn void(path: &std::path::Path, length: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(0).unwrap();
    file.set_len(length).unwrap();
}

#[test]
fn files_that_never_became_layers_have_nothing_wherever_they_stand() {
    let length = Geometry::of(SIZE).unwrap().length;
    for (lower, upper) in [(0, 0), (length, 0), (0, length), (length, length)] {
        let mut scene = Scene::new();
        scene.write(0, &[1; 8192]);
        scene.capture();
        scene.capture();
        scene.disk = None;
        void(&scene.paths[1], lower);
        void(&scene.paths[2], upper);
        // What a block's place holds while its bit is not set means nothing.
        if upper > 0 {
            let file = File::options().write(true).open(&scene.paths[2]).unwrap();
            file.write_all_at(&[9; 4096], Geometry::of(SIZE).unwrap().data).unwrap();
        }
        scene.reopen();
        assert_eq!((scene.disk().depth(), scene.read(0, 8192)), (3, vec![1; 8192]));
        scene.write(512, &[2; 512]);
        scene.capture();
        scene.write(4096, &[3; 512]);
        assert!(matches!(
            scene.disk().merge(1..=2, tempfile::tempfile().unwrap()).map(Merge::run),
            Ok(Ok(Merged { .. }))
        ));
        scene.disk().close().unwrap();
        scene.reopen();
        assert_eq!((scene.read(0, 512), scene.read(512, 512)), (vec![1; 512], vec![2; 512]));
        assert_eq!(scene.read(4096, 512), [3; 512]);
    }
}

#[test]
fn what_stands_above_a_layer_that_was_lost_is_refused() {
    let mut scene = Scene::new();
    scene.capture();
    scene.capture();
    scene.write(0, &[1; 4096]);
    scene.disk().close().unwrap();
    scene.disk = None;
    void(&scene.paths[1], Geometry::of(SIZE).unwrap().length);
    let error = scene.try_open().unwrap_err().to_string();
    assert!(error.contains("made above layer"), "{error}");
}
