//! The commands of a script, one function each.

use crate::memory::{BootParams, CHECKSUM_SEED, checksum};
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::{self, Blk, MAX_REQUEST, Op, SECTOR, Status};
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::{self};
use crate::{acpi, cpu, memory, pattern, power, say, serial, services, smp};

/// Input line of the I/O APIC that the power button's event device uses.
const BUTTON_GSI: u32 = 5;
const BUTTON_LINE: u32 = 0;
/// Input line of the I/O APIC that the generation id's event uses.
const GENERATION_GSI: u32 = 3;
const GENERATION_LINE: u32 = 0;
const CONFIG_LINE: u32 = 1;

type Outcome = Result<(), &'static str>;

pub struct Machine {
    boot: BootParams,
    disks: [Option<Blk>; virtio::SLOTS as usize],
    balloon: Option<Balloon>,
    networks: [Option<Net>; 4],
}

/// The arguments of a command.
struct Arguments<'a>(core::str::Split<'a, char>);

impl<'a> Arguments<'a> {
    fn text(&mut self) -> Result<&'a str, &'static str> {
        self.0.next().ok_or("argument missing")
    }

    fn number(&mut self) -> Result<u64, &'static str> {
        self.text()?.parse().map_err(|_| "argument is no number")
    }
}

impl Machine {
    pub fn new(boot: BootParams) -> Self {
        Self { boot, disks: [const { None }; virtio::SLOTS as usize], balloon: None, networks: [const { None }; 4] }
    }

    /// Runs one command and prints its outcome.
    pub fn run(&mut self, command: &str) -> bool {
        let mut words = command.split(',');
        let name = words.next().unwrap_or("");
        match self.dispatch(name, Arguments(words)) {
            Ok(()) => say!("ok {name}"),
            Err(why) => {
                say!("failed {name}: {why}");
                return false;
            }
        }
        true
    }

    fn dispatch(&mut self, name: &str, mut arguments: Arguments<'_>) -> Outcome {
        match name {
            "hello" => Ok(()),
            "off" => power::off(),
            "reset" => power::reset(),
            "triple" => cpu::triple_fault(),
            "wild" => cpu::jump(0xd000_0000),
            "hang" => cpu::hang(),
            "spin" => loop {
                cpu::relax();
            },
            "button" => button(),
            "generation" => self.generation(),
            "cmdline" => {
                say!("cmdline={}", self.boot.cmdline());
                Ok(())
            }
            "initrd" => self.initrd(),
            "flood" => flood(arguments.number()?),
            "shell" => self.shell(),
            "map" => self.map(),
            "memory" => self.memory(),
            "cpuid" => cpuid(),
            "smp" => {
                smp::start(arguments.number()? as u32);
                Ok(())
            }
            "acpi" => acpi::Tables::walk(self.boot.rsdp()),
            "count" => count(),
            "vector" => cpu::keep_vectors(),
            "store" => store(arguments.number()?, arguments.number()?, arguments.number()?),
            "load" => load(arguments.number()?, arguments.number()?),
            "scatter" => scatter(arguments.number()?, arguments.number()?),
            "scattered" => scattered(arguments.number()?, arguments.number()?, arguments.number()?),
            "dirty" => dirty(arguments.number()?, arguments.number()?),
            "bus" => bus(),
            "rng" => rng(),
            "serve" => services::serve(arguments.0.filter_map(|port| port.parse().ok())),
            "inflate" | "deflate" | "report" => self.give(name, arguments.number()?),
            "zeroes" => zeroes(arguments.number()?),
            "net-link" | "net-receive" | "net-send" | "net-echo" => self.network(name, arguments),
            "disks" => self.list_disks(),
            "disk-wait" => {
                let (index, sectors) = (self.disk(arguments.text()?)?, arguments.number()?);
                self.opened(index)?.wait_capacity(sectors);
                Ok(())
            }
            "disk-irq" => {
                let index = self.disk(arguments.text()?)?;
                config_interrupt(self.opened(index)?)
            }
            "disk-fill" | "disk-check" | "disk-sum" | "disk-write" | "disk-discard" | "disk-zero"
            | "disk-flush" => self.disk_command(name, arguments),
            "disk-count" => {
                let (index, from, to) = (self.disk(arguments.text()?)?, arguments.number()?, arguments.number()?);
                count_twice(self.opened(index)?, from, to)
            }
            _ => Err("unknown command"),
        }
    }

    /// Commands from the serial line, one each line, until `exit`.
    fn shell(&mut self) -> Outcome {
        let mut line = [0u8; 256];
        loop {
            say!("ready");
            match serial::read_line(&mut line) {
                "exit" => return Ok(()),
                command => {
                    self.run(command);
                }
            }
        }
    }

    /// Says the generation id, and again when it has changed.
    fn generation(&self) -> Outcome {
        let address = acpi::Tables::find(self.boot.rsdp())?.generation_id().ok_or("no generation id")?;
        let id = || unsafe { (address as *const u128).read_volatile() }; // SAFETY: the tables say that it is there.
        cpu::route(GENERATION_GSI, GENERATION_LINE);
        say!("generation {:032x}", id());
        cpu::wait_interrupt(GENERATION_LINE);
        say!("generation {:032x}", id());
        Ok(())
    }

    fn initrd(&self) -> Outcome {
        let (address, size) = self.boot.ramdisk();
        // SAFETY: the protocol says that the initramfs is there.
        let bytes = unsafe { core::slice::from_raw_parts(address as *const u8, size as usize) };
        say!("initrd size={size} sum={:016x}", checksum(CHECKSUM_SEED, bytes));
        Ok(())
    }

    fn map(&self) -> Outcome {
        for range in self.boot.ranges() {
            say!("range start={:#x} size={:#x} kind={}", range.start, range.size, range.kind);
        }
        Ok(())
    }

    /// Writes and reads both ends of every usable range above the image.
    fn memory(&self) -> Outcome {
        for range in self.boot.ranges().filter(|range| range.kind == 1 && range.start + range.size > 1 << 24)
        {
            let first = (range.start.max(1 << 24) + 7) & !7;
            let last = (range.start + range.size - 8) & !7;
            for address in [first, first + (last - first) / 16 * 8, last] {
                let word = address as *mut u64;
                // SAFETY: usable memory above 16 MiB, where this guest keeps nothing; the
                // word is put back, so an initramfs at the top survives.
                let seen = unsafe {
                    let before = word.read_volatile();
                    word.write_volatile(!address);
                    let seen = word.read_volatile();
                    word.write_volatile(before);
                    seen
                };
                if seen != !address {
                    say!("memory at {address:#x} reads {seen:#x}");
                    return Err("memory does not hold what was written");
                }
                say!("memory {address:#x}");
            }
        }
        Ok(())
    }

    /// `inflate,0`: as much as the host wants; `deflate,MIB` and `report,MIB`: so much. All of it
    /// from 16 MiB on.
    fn give(&mut self, name: &str, mib: u64) -> Outcome {
        if self.balloon.is_none() {
            self.balloon = Some(Balloon::open()?);
        }
        let balloon = self.balloon.as_mut().ok_or("no balloon")?;
        match name {
            "report" => balloon.report(DIRTY, mib << 20),
            "deflate" => {
                balloon.holds(0);
                balloon.transfer(false, DIRTY, mib << 8)
            }
            _ => {
                let pages = balloon.wanted();
                balloon.transfer(true, DIRTY, pages)?;
                balloon.holds(pages);
                Ok(())
            }
        }
    }

    /// `net-link,NTH,1`: waits for the link; `net-receive,NTH,COUNT`, `net-echo,NTH,COUNT`,
    /// `net-send,NTH,COUNT,LENGTH`: so many frames.
    fn network(&mut self, name: &str, mut arguments: Arguments<'_>) -> Outcome {
        let (nth, number) = (arguments.number()? as usize, arguments.number()?);
        let place = self.networks.get_mut(nth).ok_or("no such network device")?;
        if place.is_none() {
            *place = Some(Net::open(nth)?);
        }
        let net = place.as_mut().ok_or("no such network device")?;
        match name {
            "net-link" => net.wait_link(number == 1),
            "net-echo" => net.echo(number)?,
            "net-send" => net.send(number, arguments.number()? as usize)?,
            _ => {
                let received = net.receive(number)?;
                say!("net frames={} bytes={} in-order={}", received.frames, received.bytes, received.in_order);
            }
        }
        Ok(())
    }

    /// The position of the disk whose serial is `serial`, opening disks as needed.
    fn disk(&mut self, serial: &str) -> Result<usize, &'static str> {
        for device in blk::devices() {
            let index = device.slot as usize;
            if self.disks[index].is_none() {
                self.disks[index] = Some(Blk::open(device)?);
            }
            if self.opened(index)?.serial() == serial {
                return Ok(index);
            }
        }
        Err("no disk with this serial")
    }

    fn opened(&mut self, index: usize) -> Result<&mut Blk, &'static str> {
        self.disks[index].as_mut().ok_or("disk not open")
    }

    fn list_disks(&mut self) -> Outcome {
        let _ = self.disk("");
        for disk in self.disks.iter().flatten() {
            say!(
                "disk {} slot={} sectors={} read-only={}",
                disk.serial(),
                disk.device.slot,
                blk::capacity(disk.device),
                disk.features & blk::READ_ONLY != 0
            );
        }
        Ok(())
    }

    /// `NAME,serial,sector,count[,seed]`
    fn disk_command(&mut self, name: &str, mut arguments: Arguments<'_>) -> Outcome {
        let index = self.disk(arguments.text()?)?;
        let disk = self.opened(index)?;
        if name == "disk-flush" {
            return outcome(disk.request(Op::Flush, 0, 0)?);
        }
        let (sector, count) = (arguments.number()?, arguments.number()?);
        if matches!(name, "disk-discard" | "disk-zero") {
            let op = if name == "disk-zero" { Op::WriteZeroes } else { Op::Discard };
            return outcome(disk.request(op, sector, count as usize * SECTOR)?);
        }
        let seed = if name == "disk-sum" { 0 } else { arguments.number()? };
        let (mut sum, end) = (CHECKSUM_SEED, (sector + count) * SECTOR as u64);
        let mut at = sector * SECTOR as u64;
        while at < end {
            let length = MAX_REQUEST.min((end - at) as usize);
            let position = at / SECTOR as u64;
            match name {
                "disk-fill" | "disk-write" => {
                    pattern::fill(seed, at, &mut disk.data[..length]);
                    outcome(disk.request(Op::Write, position, length)?)?;
                }
                _ => {
                    disk.data[..length].fill(0xaa);
                    outcome(disk.request(Op::Read, position, length)?)?;
                }
            }
            if name == "disk-check" {
                let expected = memory_for_check();
                pattern::fill(seed, at, &mut expected[..length]);
                if expected[..length] != disk.data[..length] {
                    return Err("data differ");
                }
            }
            sum = checksum(sum, &disk.data[..length]);
            at += length as u64;
        }
        say!("sum={sum:016x}");
        Ok(())
    }
}

/// Counts in memory and in the first two sectors of the disk by turns, which must agree before each step and at the
/// end. The disk has `from` when that is not 0. One sector would not do: a disk of another instant agrees again once
/// the step's write has hidden it, which is so wherever a copy begins between a step's read and its write.
fn count_twice(disk: &mut Blk, from: u64, to: u64) -> Outcome {
    let mut count = from;
    loop {
        outcome(disk.request(Op::Read, 0, 2 * SECTOR)?)?;
        let found = |sector: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&disk.data[sector * SECTOR..][..8]);
            u64::from_le_bytes(word)
        };
        let (last, before) = (found(count as usize % 2), found((count as usize + 1) % 2));
        if (last, before) != (count, count.saturating_sub(1)) {
            say!("memory={count} disk={last},{before}");
            return Err("memory and disk disagree");
        }
        if count == to {
            return Ok(());
        }
        count += 1;
        disk.data[..8].copy_from_slice(&count.to_le_bytes());
        outcome(disk.request(Op::Write, count % 2, SECTOR)?)?;
    }
}

/// A second buffer of the largest request, made once.
fn memory_for_check() -> &'static mut [u8] {
    use core::sync::atomic::{AtomicUsize, Ordering};
    static AT: AtomicUsize = AtomicUsize::new(0);
    if AT.load(Ordering::Relaxed) == 0 {
        AT.store(memory::allocate(MAX_REQUEST).as_ptr() as usize, Ordering::Relaxed);
    }
    // SAFETY: one CPU, and each borrow ends within one pass of the loop above.
    unsafe { core::slice::from_raw_parts_mut(AT.load(Ordering::Relaxed) as *mut u8, MAX_REQUEST) }
}

fn outcome(status: Status) -> Outcome {
    match status {
        Status::Ok => Ok(()),
        Status::IoError => Err("I/O error"),
        Status::Unsupported => Err("unsupported"),
        Status::Other(_) => Err("status byte not written"),
    }
}

/// Waits for the power button's interrupt and obeys it.
fn button() -> Outcome {
    cpu::route(BUTTON_GSI, BUTTON_LINE);
    say!("waiting");
    cpu::wait_interrupt(BUTTON_LINE);
    say!("button");
    Ok(())
}

/// Waits for a configuration interrupt of `disk` through the I/O APIC.
fn config_interrupt(disk: &Blk) -> Outcome {
    disk.device.take_interrupts();
    let before = disk.device.generation();
    cpu::route(disk.device.gsi(), CONFIG_LINE);
    say!("waiting");
    loop {
        cpu::wait_interrupt(CONFIG_LINE);
        if disk.device.take_interrupts() & 2 != 0 {
            break;
        }
    }
    say!("capacity={} generation-changed={}", blk::capacity(disk.device), disk.device.generation() != before);
    Ok(())
}

/// `bytes` of serial output in lines of 64.
fn flood(bytes: u64) -> Outcome {
    let line = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcde\n";
    for _ in 0..bytes / 64 {
        serial::write_string(line);
    }
    Ok(())
}

fn cpuid() -> Outcome {
    for (leaf, subleaves) in
        [(0, 1), (1, 1), (4, 5), (7, 1), (0xb, 3), (0x4000_0000, 1), (0x4000_0001, 1), (0x8000_0000, 1)]
    {
        for subleaf in 0..subleaves {
            let [a, b, c, d] = cpu::cpuid(leaf, subleaf);
            say!("cpuid {leaf:08x}.{subleaf} {a:08x} {b:08x} {c:08x} {d:08x}");
        }
    }
    say!("apic-base={:#x}", cpu::read_msr(0x1b));
    Ok(())
}

/// Where commands find memory that this guest keeps nothing in.
const DIRTY: u64 = 16 << 20;

/// Fails unless `mib` MiB above 16 MiB read as zero, a word of each page.
fn zeroes(mib: u64) -> Outcome {
    for page in (DIRTY..DIRTY + (mib << 20)).step_by(4096) {
        // SAFETY: the test gave the machine this much memory.
        if unsafe { (page as *const u64).read_volatile() } != 0 {
            say!("page {page:#x} is not zero");
            return Err("memory is not zero");
        }
    }
    Ok(())
}

/// Writes one word in each page of `mib` MiB above 16 MiB, `rounds` times, at CPL3.
fn dirty(mib: u64, rounds: u64) -> Outcome {
    let (start, end) = (DIRTY, DIRTY + (mib << 20));
    for round in 0..rounds {
        for page in (start..end).step_by(4096) {
            // SAFETY: the test gave the machine this much memory.
            unsafe { (page as *mut u64).write_volatile(page ^ round) };
        }
        let mut sum = 0u64;
        for page in (start..end).step_by(4096) {
            // SAFETY: as above.
            sum = sum.wrapping_mul(31).wrapping_add(unsafe { (page as *const u64).read_volatile() });
        }
        say!("dirty round={round} sum={sum:016x}");
    }
    Ok(())
}

/// Counts aloud for ever.
fn count() -> Outcome {
    let mut number = 0u64;
    loop {
        say!("count {number}");
        number += 1;
    }
}

/// `store,AT,MIB,SEED`: writes one word of each page of `mib` MiB from `at` MiB above 16 MiB on.
fn store(at: u64, mib: u64, seed: u64) -> Outcome {
    let start = DIRTY + (at << 20);
    for page in (start..start + (mib << 20)).step_by(4096) {
        // SAFETY: the test gave the machine this much memory.
        unsafe { (page as *mut u64).write_volatile(page ^ seed) };
    }
    Ok(())
}

/// `load,AT,MIB`: fails unless each of these pages holds what one and the same seed put there; prints the seed, which is
/// the page's own address where nothing was written.
fn load(at: u64, mib: u64) -> Outcome {
    let start = DIRTY + (at << 20);
    // SAFETY: the test gave the machine this much memory.
    let word = |page: u64| unsafe { (page as *const u64).read_volatile() };
    let seed = word(start) ^ start;
    for page in (start..start + (mib << 20)).step_by(4096) {
        let here = word(page) ^ page;
        if here != seed && !(word(page) == 0 && word(start) == 0) {
            say!("page {page:#x} has seed {here}, the first one {seed}");
            return Err("pages differ");
        }
    }
    say!("seed={}", if word(start) == 0 { 0 } else { seed });
    Ok(())
}

/// The seed of [`scatter`].
const SCATTERED: u64 = 999;

/// As `store`, every other page.
fn scatter(at: u64, mib: u64) -> Outcome {
    let start = DIRTY + (at << 20);
    for page in (start..start + (mib << 20)).step_by(8192) {
        // SAFETY: the test gave the machine this much memory.
        unsafe { (page as *mut u64).write_volatile(page ^ SCATTERED) };
    }
    Ok(())
}

/// `scattered,AT,MIB,SEED`: fails unless `scatter` has been there, and `seed` between.
fn scattered(at: u64, mib: u64, seed: u64) -> Outcome {
    let start = DIRTY + (at << 20);
    for page in (start..start + (mib << 20)).step_by(4096) {
        let expected = if page % 8192 == 0 { SCATTERED } else { seed };
        // SAFETY: as above.
        if unsafe { (page as *const u64).read_volatile() } != page ^ expected {
            say!("page {page:#x} does not have seed {expected}");
            return Err("pages differ");
        }
    }
    Ok(())
}

/// What each slot says it is.
fn bus() -> Outcome {
    for device in virtio::find(0) {
        say!(
            "slot {} kind={} version={} features={:#x}",
            device.slot,
            device.kind(),
            device.version(),
            device.features()
        );
    }
    Ok(())
}

fn rng() -> Outcome {
    let mut rng = Rng::open()?;
    let first = rng.read(64)?;
    let second = rng.read(4096)?;
    if first.is_empty() || second.is_empty() {
        return Err("no bytes");
    }
    if first.iter().all(|byte| *byte == 0) || second.starts_with(first) {
        return Err("bytes are not random");
    }
    say!("rng {} {}", first.len(), second.len());
    Ok(())
}
