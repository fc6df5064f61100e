use std::io::Write as _;
use std::process::{Command, Stdio};

use super::*;

fn sample(order: &[usize]) -> Vec<u8> {
    let mut archive = Archive::new();
    for step in order {
        match step {
            0 => archive.file("/init", 0o755, b"#!agent".to_vec()).unwrap(),
            1 => archive.directory("/dev", 0o755).unwrap(),
            2 => archive.char_device("/dev/console", 0o600, 5, 1).unwrap(),
            3 => archive.file("/etc/spore/modules", 0o644, b"/lib/a.ko\n".to_vec()).unwrap(),
            4 => archive.directory("/tmp", 0o1777).unwrap(),
            _ => archive.file("/empty", 0o644, Vec::new()).unwrap(),
        }
    }
    archive.finish().unwrap()
}

#[test]
fn order_of_calls_does_not_change_a_byte() {
    let first = sample(&[0, 1, 2, 3, 4, 5]);
    assert_eq!(first, sample(&[5, 4, 3, 2, 1, 0]));
    assert_eq!(first, sample(&[3, 0, 5, 2, 4, 1]));
    assert_eq!(first.len() % BLOCK, 0);
}

#[test]
fn header_fields_are_fixed() {
    let mut archive = Archive::new();
    archive.file("a", 0o644, b"xyz".to_vec()).unwrap();
    let bytes = archive.finish().unwrap();
    let expected = concat!(
        "070701", "00000001", "000081a4", "00000000", "00000000", "00000001", "00000000", "00000003",
        "00000000", "00000000", "00000000", "00000000", "00000002", "00000000"
    );
    assert_eq!(&bytes[..110], expected.as_bytes());
    assert_eq!(&bytes[110..116], b"a\0xyz\0");
    assert_eq!(&bytes[116..122], b"070701");
}

#[test]
fn a_path_that_would_not_unpack_is_refused() {
    let mut archive = Archive::new();
    for path in ["", "/", "a//b", "../a", "/a/../b", "a/.", "TRAILER!!!", "a\0b"] {
        assert!(archive.file(path, 0o644, Vec::new()).is_err(), "{path:?} was accepted");
    }
    archive.file("/a", 0o644, Vec::new()).unwrap();
    assert!(archive.file("/a", 0o644, Vec::new()).is_err(), "a duplicate was accepted");
    assert!(archive.file("/a/b", 0o644, Vec::new()).is_err(), "a file was accepted as a directory");
}

#[test]
fn cpio_lists_and_unpacks_it() {
    let bytes = sample(&[0, 1, 2, 3, 4, 5]);
    let Ok(mut child) = Command::new("cpio")
        .args(["-itv", "--quiet", "--numeric-uid-gid"])
        .env("TZ", "UTC")
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
    else {
        eprintln!("skipped: no cpio program on this machine");
        return;
    };
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let listing = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Vec<&str>> = listing.lines().map(|line| line.split_whitespace().collect()).collect();
    let names: Vec<&str> = lines.iter().map(|fields| *fields.last().unwrap()).collect();
    assert_eq!(
        names,
        ["dev", "dev/console", "empty", "etc", "etc/spore", "etc/spore/modules", "init", "tmp"]
    );
    let modes: Vec<&str> = lines.iter().map(|fields| fields[0]).collect();
    assert_eq!(
        modes,
        [
            "drwxr-xr-x",
            "crw-------",
            "-rw-r--r--",
            "drwxr-xr-x",
            "drwxr-xr-x",
            "-rw-r--r--",
            "-rwxr-xr-x",
            "drwxrwxrwt"
        ]
    );
    assert!(lines.iter().all(|fields| fields[2] == "0" && fields[3] == "0"), "{listing}");
    assert!(listing.contains("5,   1"), "{listing}");

    let scratch = tempfile::tempdir().unwrap();
    let mut child = Command::new("cpio")
        .args(["-i", "--quiet", "etc/spore/modules", "etc/spore", "etc", "init"])
        .current_dir(scratch.path())
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(std::fs::read(scratch.path().join("init")).unwrap(), b"#!agent");
    assert_eq!(std::fs::read(scratch.path().join("etc/spore/modules")).unwrap(), b"/lib/a.ko\n");
}
