//! The image of applications, for `spore-bench template` and the integrity cases of `tests/e2e`: Python with its HTTP server
//! and SQLite, and PostgreSQL, of Debian packages that are unpacked and not installed. Made once, only when it is asked for.
//!
//! It has what spares the applications work at every start, as images that people use have: a database that is initialised,
//! modules that are compiled.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cache;
use super::rootfs::run;
use crate::image::{self, POSTGRES_DATA, POSTGRES_PROGRAMS, POSTGRES_USER};

/// Changes when the recipe below changes in a way that its constants do not show.
const RECIPE: &str = "2";
const SUITE: &str = "trixie";
const PACKAGES: &[&str] = &["busybox-static", "postgresql-17", "python3"];
/// Beginnings of the names of packages that these depend on and that nobody here uses: what packages are installed
/// with, other languages, PostgreSQL's compiler of queries.
const LEFT_OUT: &[&str] = &[
    "adduser_",
    "debconf_",
    "dpkg_",
    "libc-l10n_",
    "libllvm",
    "libperl",
    "libz3-",
    "locales_",
    "openssl_",
    "passwd_",
    "perl",
    "postgresql-common",
    "procps_",
    "tar_",
];
/// Directories that lie in /usr.
const MERGED: &[&str] = &["bin", "lib", "lib64", "sbin"];
/// Directories that nobody here reads: documentation, code for a compiler of queries that is left out, tests, encodings. Each
/// file costs time where an emulated machine imports the image.
const UNREAD: &[&str] = &[
    "usr/lib/postgresql/17/lib/bitcode",
    "usr/lib/python3.13/idlelib",
    "usr/lib/python3.13/test",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/share/doc",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/postgresql/17/man",
];

/// The archive of the image, from the cache or made (half a minute). `repository` is the checkout, for `packaging/fetch-deb`.
pub fn prepare(repository: &Path) -> Result<PathBuf> {
    let key = cache::Key::default()
        .with(RECIPE)
        .with(SUITE)
        .with(PACKAGES.join(","))
        .with(LEFT_OUT.join(","))
        .with(UNREAD.join(","));
    let directory = cache::entry("applications", key, |draft| make(repository, draft))?;
    Ok(directory.join("image.tar"))
}

fn make(repository: &Path, draft: &Path) -> Result<()> {
    eprintln!("test bed: making the image of Python and PostgreSQL, once");
    let (root, debs, layer) = (draft.join("root"), draft.join("debs"), draft.join("layer.tar"));
    for directory in MERGED {
        fs::create_dir_all(root.join("usr").join(directory))?;
        symlink(Path::new("usr").join(directory), root.join(directory))?;
    }
    let mut fetch = Command::new(repository.join("packaging/fetch-deb"));
    run(fetch.args(["--suite", SUITE, "--closure"]).arg(&debs).args(PACKAGES))?;
    for entry in fs::read_dir(&debs)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !LEFT_OUT.iter().any(|beginning| name.starts_with(beginning)) {
            run(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(&root))
                .with_context(|| format!("unpacking {name}"))?;
        }
    }
    for directory in UNREAD {
        let directory = root.join(directory);
        if directory.exists() {
            fs::remove_dir_all(&directory).with_context(|| directory.display().to_string())?;
        }
    }
    furnish(&root)?;
    run(Command::new("tar")
        .args(["--sort=name", "--mtime=@0", "--numeric-owner", "-cf"])
        .arg(&layer)
        .arg("-C")
        .arg(&root)
        .arg("."))?;
    image::write_applications(&layer, &draft.join("image.tar"))?;
    for directory in [&root, &debs] {
        fs::remove_dir_all(directory)?;
    }
    Ok(fs::remove_file(&layer)?)
}

/// What the packages' own scripts would do, as far as it is needed, and the database.
fn furnish(root: &Path) -> Result<()> {
    for directory in ["dev/shm", "etc", "proc", "sys", "srv/www", "tmp", "var/lib/postgresql"] {
        fs::create_dir_all(root.join(directory))?;
    }
    for directory in ["dev/shm", "tmp"] {
        fs::set_permissions(root.join(directory), fs::Permissions::from_mode(0o1777))?;
    }
    symlink("busybox", root.join("usr/bin/sh"))?;
    fs::write(root.join("srv/www/index.html"), "<p>It runs.</p>\n")?;
    let (user, id) = ("postgres", POSTGRES_USER);
    fs::write(
        root.join("etc/passwd"),
        format!("root:x:0:0:root:/root:/bin/sh\n{user}:x:{id}:{id}:{user}:/tmp:/bin/sh\n"),
    )?;
    fs::write(root.join("etc/group"), format!("root:x:0:\n{user}:x:{id}:\n"))?;
    // Python looks its own address up: nobody is to be asked for it.
    fs::write(root.join("etc/nsswitch.conf"), "hosts: files\n")?;
    fs::write(root.join("etc/hosts"), "127.0.0.1 localhost\n")?;
    chown(root.join("var/lib/postgresql"), Some(id), Some(id))?;

    // initdb starts shells that turn to it.
    let null = root.join("dev/null");
    run(Command::new("mknod").args(["-m", "666"]).arg(&null).args(["c", "1", "3"]))?;
    chroot(root, 0, &["/usr/bin/python3", "-m", "compileall", "-q", "/usr/lib/python3", &python(root)?])?;
    let (initdb, username) = (format!("{POSTGRES_PROGRAMS}/initdb"), format!("--username={user}"));
    chroot(root, id, &[&initdb, "--auth=trust", "--encoding=UTF8", "--no-locale", &username, POSTGRES_DATA])?;
    fs::remove_file(&null)?;
    let data = root.join(&POSTGRES_DATA[1..]);
    append(
        &data.join("postgresql.conf"),
        "listen_addresses = '*'\nunix_socket_directories = '/tmp'\njit = off\n",
    )?;
    append(&data.join("pg_hba.conf"), "host all all all trust\n")
}

/// The directory of Python's modules, as the image has it.
fn python(root: &Path) -> Result<String> {
    for entry in fs::read_dir(root.join("usr/lib"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("python3.") {
            return Ok(format!("/usr/lib/{name}"));
        }
    }
    bail!("no /usr/lib/python3.* in the packages of Python")
}

fn chroot(root: &Path, user: u32, command: &[&str]) -> Result<()> {
    run(Command::new("chroot")
        .arg(format!("--userspec={user}:{user}"))
        .arg(root)
        .args(command)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"))
    .with_context(|| format!("in {}", root.display()))
}

fn append(path: &Path, text: &str) -> Result<()> {
    let with = fs::read_to_string(path).with_context(|| path.display().to_string())? + text;
    fs::write(path, with).with_context(|| path.display().to_string())
}
