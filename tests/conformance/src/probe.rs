#![allow(unsafe_code)] // mmap(2), inotify(7), record locks: the calls themselves are what is asked.
//! What a program may ask of a file system, one question a function. Runs in the container: the
//! suite copies itself into the volume and starts itself there.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail, ensure};

/// The first argument that makes this program a probe, and its name in the volume.
pub(crate) const VERB: &str = "probe";
pub(crate) const PROGRAM: &str = "probe";

/// `probe NAME DIRECTORY [MORE]`.
pub(crate) fn main(arguments: &[String]) -> Result<()> {
    let [name, directory, more @ ..] = arguments else { bail!("usage: probe NAME DIRECTORY") };
    let directory = Path::new(directory);
    match name.as_str() {
        "mmap" => mmap(directory),
        "flock" => flock(directory),
        "locks" => locks(directory, more),
        "direct" => direct(directory),
        "append" => append(directory, more),
        "xattr" => xattr(directory),
        "rename" => rename(directory),
        "unlinked" => unlinked(directory),
        "sparse" => sparse(directory),
        "times" => times(directory),
        "directory" => many_entries(directory),
        "statfs" => statfs(directory),
        "inotify" => inotify(directory),
        other => bail!("no probe {other:?}"),
    }
}

fn checked(result: i32) -> Result<i32> {
    if result < 0 { Err(std::io::Error::last_os_error().into()) } else { Ok(result) }
}

fn path(path: &Path) -> Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

fn new(path: &Path) -> Result<File> {
    Ok(OpenOptions::new().read(true).write(true).create_new(true).open(path)?)
}

/// Another process of this program.
fn again(name: &str, directory: &Path, more: &str) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(VERB).arg(name).arg(directory).arg(more);
    Ok(command)
}

fn mmap(directory: &Path) -> Result<()> {
    const LENGTH: usize = 3 * 4096 + 100;
    let file = new(&directory.join("file"))?;
    file.set_len(LENGTH as u64)?;
    // SAFETY: a new shared mapping of a file of that length, unmapped below.
    let address = unsafe {
        let flags = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(std::ptr::null_mut(), LENGTH, flags, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    ensure!(address != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    // SAFETY: inside the mapping, which nothing else writes to.
    unsafe { address.cast::<u8>().add(LENGTH - 5).copy_from(b"mmap!".as_ptr(), 5) };
    let mut end = [0; 5];
    file.read_exact_at(&mut end, LENGTH as u64 - 5)?;
    ensure!(&end == b"mmap!", "read after a store gives {end:?}");
    file.write_all_at(b"write", 4096)?;
    // SAFETY: as above.
    let seen = unsafe { std::slice::from_raw_parts(address.cast::<u8>().add(4096), 5).to_vec() };
    ensure!(seen == b"write", "a load after a write gives {seen:?}");
    // SAFETY: the mapping made above.
    checked(unsafe { libc::msync(address, LENGTH, libc::MS_SYNC) })?;
    // SAFETY: the mapping made above, of which nothing is kept.
    checked(unsafe { libc::munmap(address, LENGTH) })?;
    ensure!(fs::read(directory.join("file"))?.ends_with(b"mmap!"), "after munmap");
    Ok(())
}

fn flock(directory: &Path) -> Result<()> {
    new(&directory.join("file"))?;
    let (one, other) = (File::open(directory.join("file"))?, File::open(directory.join("file"))?);
    one.lock()?;
    ensure!(other.try_lock().is_err(), "two exclusive locks");
    one.unlock()?;
    other.lock_shared()?;
    one.try_lock_shared()?;
    Ok(())
}

fn locks(directory: &Path, more: &[String]) -> Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(directory.join("file"))?;
    let lock = |start| {
        // SAFETY: all zeroes is a valid flock: SEEK_SET, no pid.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_start, lock.l_len) = (i16::try_from(libc::F_WRLCK)?, start, 10);
        // SAFETY: an open descriptor and a flock that lives over the call.
        checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLK, &raw const lock) })
    };
    if !more.is_empty() {
        lock(100).context("a range that nobody holds")?;
        ensure!(lock(5).is_err(), "a range that the other process holds");
        return Ok(());
    }
    lock(0)?;
    ensure!(again("locks", directory, "other")?.status()?.success(), "the other process");
    Ok(())
}

fn direct(directory: &Path) -> Result<()> {
    const BLOCK: usize = 4096;
    let file = directory.join("file");
    let mut options = OpenOptions::new();
    let direct = options.read(true).write(true).create_new(true).custom_flags(libc::O_DIRECT).open(&file)?;
    let mut memory = vec![7u8; 3 * BLOCK];
    let start = memory.as_ptr().align_offset(BLOCK);
    direct.write_all_at(&memory[start..start + BLOCK], BLOCK as u64)?;
    memory.fill(0);
    direct.read_exact_at(&mut memory[start..start + BLOCK], BLOCK as u64)?;
    ensure!(memory[start..start + BLOCK] == [7; BLOCK], "read back");
    ensure!(fs::read(&file)?[BLOCK..] == [7; BLOCK], "and through the cache");
    Ok(())
}

fn append(directory: &Path, more: &[String]) -> Result<()> {
    const LINES: usize = 200;
    let file = directory.join("file");
    if let Some(name) = more.first() {
        let mut file = OpenOptions::new().append(true).create(true).open(&file)?;
        for number in 0..LINES {
            file.write_all(format!("{name} {number:04}\n").as_bytes())?;
        }
        return Ok(());
    }
    let names = ["a", "b", "c"];
    let children =
        names.map(|name| again("append", directory, name).and_then(|mut child| Ok(child.spawn()?)));
    for child in children {
        ensure!(child?.wait()?.success(), "a writer");
    }
    let text = fs::read_to_string(file)?;
    let lines: BTreeSet<_> = text.lines().collect();
    ensure!(lines.len() == names.len() * LINES, "{} whole lines", lines.len());
    ensure!(lines.iter().all(|line| line.len() == 6), "a torn line");
    Ok(())
}

fn xattr(directory: &Path) -> Result<()> {
    let file = directory.join("file");
    new(&file)?;
    let (file, name) = (path(&file)?, c"user.colour");
    // SAFETY: strings with their NULs and buffers of the lengths that are said, over the calls.
    unsafe {
        checked(libc::setxattr(file.as_ptr(), name.as_ptr(), b"green".as_ptr().cast(), 5, 0))?;
        let mut value = [0u8; 16];
        let length = libc::getxattr(file.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len());
        ensure!(length == 5 && &value[..5] == b"green", "{length}: {value:?}");
        let mut names = [0u8; 256];
        let length = libc::listxattr(file.as_ptr(), names.as_mut_ptr().cast(), names.len());
        let listed = &names[..usize::try_from(length)?];
        ensure!(listed.windows(12).any(|part| part == b"user.colour\0"), "{listed:?}");
        checked(libc::removexattr(file.as_ptr(), name.as_ptr()))?;
        ensure!(libc::getxattr(file.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) < 0, "removed");
    }
    Ok(())
}

fn rename(directory: &Path) -> Result<()> {
    fs::write(directory.join("a"), "a")?;
    fs::write(directory.join("b"), "b")?;
    let (a, b) = (path(&directory.join("a"))?, path(&directory.join("b"))?);
    let rename = |flags| {
        // SAFETY: two strings with their NULs that live over the call.
        checked(unsafe { libc::renameat2(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), flags) })
    };
    ensure!(rename(libc::RENAME_NOREPLACE).is_err(), "replaced");
    rename(libc::RENAME_EXCHANGE)?;
    ensure!(fs::read_to_string(directory.join("a"))? == "b", "exchanged");
    fs::rename(directory.join("a"), directory.join("b"))?;
    ensure!(fs::read_to_string(directory.join("b"))? == "b" && !directory.join("a").exists(), "replaced");
    Ok(())
}

fn unlinked(directory: &Path) -> Result<()> {
    let name = directory.join("file");
    let mut file = new(&name)?;
    fs::remove_file(&name)?;
    file.write_all(b"still here")?;
    file.seek(SeekFrom::Start(0))?;
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    ensure!(text == "still here" && file.metadata()?.nlink() == 0, "{text:?}");
    fs::write(&name, "another")?;
    ensure!(fs::read_dir(directory)?.count() == 1, "nothing but the other");
    Ok(())
}

fn sparse(directory: &Path) -> Result<()> {
    let mut file = new(&directory.join("file"))?;
    file.set_len(8 << 20)?;
    file.write_all_at(b"data", 4 << 20)?;
    file.sync_all()?;
    ensure!(file.metadata()?.blocks() < 2048, "{} blocks", file.metadata()?.blocks());
    // SAFETY: an open descriptor and integers.
    let data = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_DATA) };
    ensure!(data > 0 && data <= 4 << 20, "SEEK_DATA gives {data}");
    // SAFETY: as above.
    checked(unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, 9 << 20) })?;
    ensure!(file.metadata()?.len() == 9 << 20, "{} bytes", file.metadata()?.len());
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: as above.
    checked(unsafe { libc::fallocate(file.as_raw_fd(), mode, 4 << 20, 4096) })?;
    let mut bytes = [1; 4];
    file.seek(SeekFrom::Start(4 << 20))?;
    file.read_exact(&mut bytes)?;
    ensure!(bytes == [0; 4], "a hole reads {bytes:?}");
    Ok(())
}

fn times(directory: &Path) -> Result<()> {
    let file = new(&directory.join("file"))?;
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    file.set_times(fs::FileTimes::new().set_modified(time).set_accessed(time))?;
    let found = fs::metadata(directory.join("file"))?;
    ensure!((found.mtime(), found.mtime_nsec()) == (1_000_000_000, 123_456_789), "{found:?}");
    file.write_all_at(b"x", 0)?;
    drop(file);
    ensure!(fs::metadata(directory.join("file"))?.mtime() > 1_600_000_000, "a write is told");
    Ok(())
}

fn many_entries(directory: &Path) -> Result<()> {
    for number in 0..500 {
        File::create(directory.join(format!("an entry with a name of some length {number}")))?;
    }
    let names: BTreeSet<_> =
        fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect::<Result<_>>()?;
    ensure!(names.len() == 500, "{} entries", names.len());
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        ensure!(entry.metadata()?.ino() == std::os::unix::fs::DirEntryExt::ino(&entry), "inode numbers");
        fs::remove_file(entry.path())?;
    }
    ensure!(fs::read_dir(directory)?.count() == 0, "all removed");
    Ok(())
}

fn statfs(directory: &Path) -> Result<()> {
    // SAFETY: all zeroes is a valid statvfs; the path is a string with its NUL.
    let status = unsafe {
        let mut status: libc::statvfs = std::mem::zeroed();
        checked(libc::statvfs(path(directory)?.as_ptr(), &raw mut status))?;
        status
    };
    ensure!(status.f_blocks > 0 && status.f_bavail <= status.f_blocks && status.f_namemax == 255, "sizes");
    Ok(())
}

fn inotify(directory: &Path) -> Result<()> {
    // SAFETY: integers; then a string with its NUL; then a buffer of the length that is said.
    let watch = checked(unsafe { libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK) })?;
    let watched = path(directory)?;
    let events = libc::IN_CREATE | libc::IN_DELETE;
    // SAFETY: a string with its NUL that lives over the call.
    checked(unsafe { libc::inotify_add_watch(watch, watched.as_ptr(), events) })?;
    new(&directory.join("seen"))?;
    fs::remove_file(directory.join("seen"))?;
    let mut events = [0u8; 1024];
    // SAFETY: a buffer of the length that is said.
    let length = unsafe { libc::read(watch, events.as_mut_ptr().cast(), events.len()) };
    let length = usize::try_from(length).map_err(|_| anyhow!("read: {}", std::io::Error::last_os_error()))?;
    let told = events[..length].windows(4).filter(|part| part == b"seen").count();
    ensure!(told == 2, "{told} events of two");
    Ok(())
}
