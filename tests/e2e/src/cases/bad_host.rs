//! A host that lacks something, or has it broken: one clear error, and nothing left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use super::bad_command::one_error;
use super::{Case, expect_contains};
use crate::host::{Config, Over};
use spore_harness::bed::Subject;

pub(crate) const CASES: &[Case] = &[
    case("bad_host::kernel_missing", kernel_missing),
    case("bad_host::kernel_corrupt", kernel_corrupt),
    case("bad_host::initramfs_missing", initramfs_missing),
    case("bad_host::initramfs_corrupt", initramfs_corrupt),
    case("bad_host::cached_image_corrupt", cached_image_corrupt),
    case("bad_host::cached_image_is_made_again", cached_image_is_made_again),
    case("bad_host::memory_too_small", memory_too_small),
    case("bad_host::memory_too_small_for_the_kernel", memory_too_small_for_the_kernel),
    case("bad_host::kvm_missing", kvm_missing),
    case("bad_host::kvm_unusable", kvm_unusable),
    case("bad_host::disk_full", disk_full),
    case("bad_host::guest_panics", guest_panics),
    case("bad_host::guest_faults", guest_faults),
    case("bad_host::guest_hangs", guest_hangs),
    case("bad_host::mended", mended),
];

/// They change the ground, so they run alone; they do not depend on containerd's series.
const fn case(name: &'static str, run: fn(&Subject) -> Result<()>) -> Case {
    Case::new(name, run).spore_only().alone().since("2.")
}

const FILES: &str = "/srv/bed/bad";
/// What an error shows of a guest that did not come up.
const CONSOLE: &str = "last lines of the guest console";
const PANIC: &str = "Kernel panic - not syncing";

/// Runs a container that must be refused: ctr's one error with every one of `words`, nothing
/// left once the breakage itself is undone.
fn refused(
    subject: &Subject,
    words: &[&str],
    breakage: impl FnOnce() -> Result<Vec<Box<dyn Send>>>,
) -> Result<()> {
    subject.warm_up()?;
    let before = subject.inventory()?;
    let broken = breakage()?;
    let output = subject.run("broken", &["true"])?.run()?;
    drop(broken);
    ensure!(output.code() == 1, "status of ctr: {output}");
    one_error(subject, &output)?;
    let errors = output.errors();
    words.iter().try_for_each(|word| expect_contains("standard error", &errors, word))?;
    subject.nothing_beyond(&before)
}

/// After all of that, the next container runs as if nothing had been.
fn mended(subject: &Subject) -> Result<()> {
    let output = subject.run("mended", &["echo", "mended"])?.run()?;
    ensure!(output.success() && output.text() == "mended\n", "{output}");
    Ok(())
}

/// Runs a container under a changed configuration that must be refused.
fn refused_with(subject: &Subject, config: &str, words: &[&str]) -> Result<()> {
    refused(subject, words, || Ok(vec![Box::new(Config::with(config)?)]))
}

fn file(name: &str, content: &[u8]) -> Result<PathBuf> {
    fs::create_dir_all(FILES)?;
    let path = Path::new(FILES).join(name);
    fs::write(&path, content)?;
    Ok(path)
}

fn kernel_missing(subject: &Subject) -> Result<()> {
    refused_with(subject, "kernel = \"/srv/no-such-kernel\"", &["kernel", "/srv/no-such-kernel"])
}

fn kernel_corrupt(subject: &Subject) -> Result<()> {
    let path = file("kernel", &[0x5a; 100_000])?;
    refused_with(subject, &format!("kernel = \"{}\"", path.display()), &["neither a bzImage nor an ELF file"])
}

fn initramfs_missing(subject: &Subject) -> Result<()> {
    refused_with(subject, "initramfs = \"/srv/no-such-initramfs\"", &["initramfs", "/srv/no-such-initramfs"])
}

/// The guest's kernel finds no init in it: the end of its console tells.
fn initramfs_corrupt(subject: &Subject) -> Result<()> {
    let path = file("initramfs", &[0x5a; 100_000])?;
    refused_with(subject, &format!("initramfs = \"{}\"", path.display()), &[CONSOLE, PANIC])
}

/// A damaged image that cannot be replaced, for something is mounted on it.
fn cached_image_corrupt(subject: &Subject) -> Result<()> {
    refused(subject, &["root file system image /var/lib/spore/images/", "it is made again"], || {
        let mut undo: Vec<Box<dyn Send>> = Vec::new();
        for image in cached_images()? {
            let torn = file("image", &torn(&image)?)?;
            undo.push(Box::new(Over::bind(&torn, &image)?));
        }
        Ok(undo)
    })
}

fn cached_image_is_made_again(subject: &Subject) -> Result<()> {
    subject.warm_up()?;
    for image in cached_images()? {
        fs::write(&image, torn(&image)?)?;
    }
    let output = subject.run("healed", &["echo", "healed"])?.run()?;
    ensure!(output.success() && output.text() == "healed\n", "{output}");
    Ok(())
}

fn cached_images() -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir("/var/lib/spore/images")?.flatten().map(|entry| entry.path());
    let images: Vec<_> = entries.filter(|path| path.extension().is_some_and(|end| end == "erofs")).collect();
    ensure!(!images.is_empty(), "no cached image in /var/lib/spore/images");
    Ok(images)
}

/// What a torn write leaves: the right length, the wrong bytes.
fn torn(image: &Path) -> Result<Vec<u8>> {
    Ok(vec![0; usize::try_from(fs::metadata(image)?.len())?])
}

fn memory_too_small(subject: &Subject) -> Result<()> {
    refused_with(subject, "memory_mib = 16", &["memory", "16"])
}

/// A size that the configuration allows and Debian's kernel does not fit into.
fn memory_too_small_for_the_kernel(subject: &Subject) -> Result<()> {
    refused_with(subject, "memory_mib = 64", &["the guest", "64 MiB", "raise memory_mib"])
}

fn kvm_missing(subject: &Subject) -> Result<()> {
    refused(subject, &["/dev/kvm"], || {
        fs::rename("/dev/kvm", "/dev/kvm.away")?;
        Ok(vec![Box::new(Back)])
    })
}

/// Puts the device back.
struct Back;

impl Drop for Back {
    fn drop(&mut self) {
        fs::rename("/dev/kvm.away", "/dev/kvm").ok();
    }
}

fn kvm_unusable(subject: &Subject) -> Result<()> {
    refused(subject, &["/dev/kvm"], || {
        Ok(vec![Box::new(Over::bind(Path::new("/dev/null"), Path::new("/dev/kvm"))?)])
    })
}

fn disk_full(subject: &Subject) -> Result<()> {
    let state = Path::new("/var/lib/spore");
    refused(subject, &["the disk that holds /var/lib/spore", "free space there"], || {
        Ok(vec![Box::new(Full(Over::small(64 << 10, state)?))])
    })?;
    let left = fs::read_to_string(LEFT_ON_FULL)?;
    ensure!(left.is_empty(), "left on the full disk:\n{left}");
    Ok(())
}

/// What still lay on the full disk when it went.
const LEFT_ON_FULL: &str = "/srv/bed/bad/left-on-full-disk";

/// A full disk; tells in [`LEFT_ON_FULL`] which half-made files it held at its end.
struct Full(#[expect(dead_code, reason = "unmounted when it goes")] Over);

impl Drop for Full {
    fn drop(&mut self) {
        let find = Command::new("find").args(["/var/lib/spore", "-type", "f", "-size", "+0"]).output();
        let told = find.map_or_else(|error| error.to_string().into_bytes(), |find| find.stdout);
        fs::create_dir_all(FILES).and_then(|()| fs::write(LEFT_ON_FULL, told)).ok();
    }
}

fn guest_panics(subject: &Subject) -> Result<()> {
    refused_with(subject, "kernel_args = \"rdinit=/no-such-init\"", &[CONSOLE, PANIC])
}

fn guest_faults(subject: &Subject) -> Result<()> {
    // ud2 without an interrupt table: a triple fault.
    let path = file("bare", &bare_kernel(&[0x0f, 0x0b]))?;
    refused_with(subject, &format!("kernel = \"{}\"", path.display()), &["triple fault"])
}

fn guest_hangs(subject: &Subject) -> Result<()> {
    // Writes a line to the serial port, mov dx,0x3f8; then mov al,BYTE; out dx,al for each.
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    code.extend(b"waiting for godot\n".iter().flat_map(|byte| [0xb0, *byte, 0xee]));
    // cli; hlt, for ever.
    code.extend([0xfa, 0xf4, 0xeb, 0xfd]);
    let path = file("hanging", &bare_kernel(&code))?;
    let config = format!("kernel = \"{}\"\nboot_deadline_s = 5", path.display());
    refused_with(subject, &config, &["within 5 s", CONSOLE, "waiting for godot"])
}

/// An ELF executable for x86_64 that consists of `code` at 16 MiB.
fn bare_kernel(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 16 << 20;
    const HEADERS: u64 = 64 + 56;
    let size = code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // ET_EXEC, EM_X86_64, version; entry, program headers, no sections.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    elf.extend([BASE + HEADERS, 64, 0].iter().flat_map(|word| word.to_le_bytes()));
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // PT_LOAD, readable and executable; offset, virtual and physical address, sizes, alignment.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    let segment = [0, BASE, BASE, HEADERS + size, HEADERS + size, 4096];
    elf.extend(segment.iter().flat_map(|word| word.to_le_bytes()));
    elf.extend(code);
    elf
}
