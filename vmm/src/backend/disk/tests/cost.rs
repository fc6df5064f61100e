//! What layers cost: `cargo test --release -p spore-vmm disk::tests::cost -- --ignored --nocapture`.

use std::time::Instant;

use super::*;

const DISK: u64 = 1 << 30;
const COUNT: u64 = 20_000;

/// Nanoseconds of one call, of the best of some rounds.
fn each(mut call: impl FnMut(u64)) -> f64 {
    let round = |call: &mut dyn FnMut(u64)| {
        let start = Instant::now();
        (0..COUNT).for_each(call);
        start.elapsed().as_secs_f64() * 1e9
    };
    #[allow(clippy::cast_precision_loss)]
    let best = (0..5).map(|_| round(&mut call)).fold(f64::MAX, f64::min) / COUNT as f64;
    best
}

/// Blocks in an order that no read-ahead guesses.
fn block(at: u64) -> u64 {
    at.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (DISK / 4096) * 4096
}

#[test]
#[ignore = "measures"]
fn one_raw_file_costs_its_system_calls_and_layers_a_look_into_the_map() {
    let mut page = vec![1u8; 4096];
    let mut scene = Scene::of_size(DISK);
    scene.disk().layers.iter_mut().for_each(|layer| Arc::get_mut(layer).unwrap().file_mut().tape = None);
    let bare = File::options().read(true).write(true).open(&scene.paths[0]).unwrap();
    let run = |what: &str, call: &mut dyn FnMut(u64)| println!("{what}: {:.0} ns", each(call));
    for at in 0..COUNT {
        bare.write_all_at(&page, block(at)).unwrap();
    }
    run("pwrite of 4 KiB", &mut |at| bare.write_all_at(&page, block(at)).unwrap());
    let mut other = vec![0u8; 4096];
    run("pread of 4 KiB", &mut |at| bare.read_exact_at(&mut other, block(at)).unwrap());
    let mut fresh: Vec<_> = (0..200)
        .map(|at| {
            bare.write_all_at(&page, DISK - 4096 * (at + 1)).unwrap();
            let start = Instant::now();
            bare.sync_data().unwrap();
            start.elapsed()
        })
        .collect();
    fresh.sort();
    println!("fdatasync of a raw file after a write of new blocks: median {:?}", fresh[100]);
    for layers in [1, 2, 8, 32] {
        while scene.disk().depth() < layers {
            let file = scene.new_file();
            scene.disk().stage(file).unwrap();
            scene.disk().switch().unwrap();
            // Every layer has some of them.
            let part = layers as u64;
            let slice = [VolatileSlice::from(&mut page[..])];
            (0..COUNT).filter(|at| at % part == part - 1).for_each(|at| {
                scene.disk().write(block(at), &slice).map(drop).unwrap();
            });
        }
        let slice = VolatileSlice::from(&mut page[..]);
        run(&format!("{layers} layers, read of 4 KiB"), &mut |at| {
            scene.disk.as_mut().unwrap().read(block(at), std::slice::from_ref(&slice)).map(drop).unwrap();
        });
        run(&format!("{layers} layers, write of 4 KiB"), &mut |at| {
            scene.disk.as_mut().unwrap().write(block(at), std::slice::from_ref(&slice)).map(drop).unwrap();
        });
    }
    let slice = VolatileSlice::from(&mut page[..]);
    let disk = scene.disk.as_mut().unwrap();
    disk.flush().unwrap();
    for (what, fresh) in [("blocks that the top has", false), ("new blocks", true)] {
        let mut times: Vec<_> = (0..200)
            .map(|at| {
                let place = if fresh { DISK - 4096 * (at + 1) } else { block(at) };
                disk.write(place, std::slice::from_ref(&slice)).unwrap();
                let start = Instant::now();
                disk.flush().unwrap();
                start.elapsed()
            })
            .collect();
        times.sort();
        println!("flush after a write of {what}: median {:?}", times[100]);
    }
    let file = scene.new_file();
    let start = Instant::now();
    scene.disk().stage(file).unwrap();
    let staged = start.elapsed();
    let start = Instant::now();
    scene.disk().switch().unwrap();
    println!("stage: {staged:?}, switch: {:?}", start.elapsed());
    let start = Instant::now();
    scene.disk().close().unwrap();
    println!("settle: {:?}", start.elapsed());
    let start = Instant::now();
    let disk = scene.try_open().unwrap();
    println!("open {} layers: {:?}", disk.depth(), start.elapsed());
}
