//! OCI images made here, without a registry or a builder: an image layout in a tar archive
//! that `ctr image import` reads (OCI image specification 1.1, "image-layout.md").

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::archive::tar;

/// A shell and what belongs to it: busybox, one layer.
pub const BUSYBOX: &str = "spore.test/busybox:latest";
/// The same with a second layer that removes, hides and replaces.
pub const LAYERS: &str = "spore.test/layers:latest";
/// The same, said to be for another architecture.
pub const FOREIGN: &str = "spore.test/foreign:latest";

/// Python and PostgreSQL, made by [`crate::host::applications`].
pub const APPLICATIONS: &str = "spore.test/applications:latest";

/// In [`APPLICATIONS`]: PostgreSQL's programs, its database, and the number of its user, whose name is `postgres` to
/// the database too.
pub const POSTGRES_PROGRAMS: &str = "/usr/lib/postgresql/17/bin";
pub const POSTGRES_DATA: &str = "/var/lib/postgresql/data";
pub const POSTGRES_USER: u32 = 999;

/// In every image: a file that may not be executed.
pub const NOT_EXECUTABLE: &str = "/etc/not-executable";
/// In every image: an executable of another architecture.
pub const FOREIGN_PROGRAM: &str = "/bin/foreign-program";

/// What [`LAYERS`] looks like from inside: (path, content or absence).
pub const LAYERS_FILES: &[(&str, Option<&str>)] = &[
    ("/data/kept", Some("from the lower layer")),
    ("/data/replaced", Some("from the upper layer")),
    ("/data/removed", None),
    ("/data/opaque/old", None),
    ("/data/opaque/new", Some("from the upper layer")),
];

const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// Architecture of the machine, in OCI's words.
const ARCHITECTURE: &str = "amd64";

/// Writes [`BUSYBOX`] and [`LAYERS`] as one archive, from a static busybox.
pub fn write_images(busybox: &Path, archive: &Path) -> Result<()> {
    let base = base_layer(busybox)?;
    let [lower, upper] = whiteout_layers()?;
    let images = [
        Image { name: BUSYBOX, architecture: ARCHITECTURE, layers: vec![&base] },
        Image { name: LAYERS, architecture: ARCHITECTURE, layers: vec![&base, &lower, &upper] },
    ];
    write(&images, archive)
}

/// Writes [`FOREIGN`].
pub fn write_foreign(busybox: &Path, archive: &Path) -> Result<()> {
    let base = base_layer(busybox)?;
    write(&[Image { name: FOREIGN, architecture: "arm64", layers: vec![&base] }], archive)
}

/// Writes [`APPLICATIONS`], of one layer.
pub fn write_applications(layer: &Path, archive: &Path) -> Result<()> {
    let layer = fs::read(layer).with_context(|| format!("reading {}", layer.display()))?;
    write(&[Image { name: APPLICATIONS, architecture: ARCHITECTURE, layers: vec![&layer] }], archive)
}

/// The files of [`BUSYBOX`] as a directory, for `ctr run --rootfs`.
pub fn write_rootfs(busybox: &Path, directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)?;
    let mut tar = Command::new("tar")
        .arg("-xC")
        .arg(directory)
        .stdin(std::process::Stdio::piped())
        .spawn()
        .context("starting tar")?;
    if let Some(mut stdin) = tar.stdin.take() {
        stdin.write_all(&base_layer(busybox)?)?;
    }
    let status = tar.wait()?;
    if !status.success() {
        bail!("unpacking a root file system into {}: tar: {status}", directory.display());
    }
    Ok(())
}

struct Image<'a> {
    name: &'a str,
    architecture: &'a str,
    layers: Vec<&'a [u8]>,
}

fn write(images: &[Image<'_>], path: &Path) -> Result<()> {
    let mut blobs = Blobs::default();
    let mut manifests = Vec::new();
    for image in images {
        let layers: Vec<_> = image.layers.iter().map(|layer| blobs.add(LAYER_TYPE, layer.to_vec())).collect();
        let config = json!({
            "architecture": image.architecture,
            "os": "linux",
            "config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Cmd": ["/bin/sh"],
                "WorkingDir": "/",
            },
            // Layers are not compressed: their digests are the diff ids.
            "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| &layer["digest"]).collect::<Vec<_>>() },
        });
        let config = blobs.add("application/vnd.oci.image.config.v1+json", serde_json::to_vec(&config)?);
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest =
            json!({ "schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": layers });
        let mut descriptor = blobs.add(manifest_type, serde_json::to_vec(&manifest)?);
        descriptor["annotations"] = json!({ "io.containerd.image.name": image.name });
        descriptor["platform"] = json!({ "architecture": image.architecture, "os": "linux" });
        manifests.push(descriptor);
    }
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": manifests,
    });
    let file = fs::File::create(path).with_context(|| format!("creating {}", path.display()))?;
    let mut archive = tar::Writer::new(io::BufWriter::new(file));
    archive.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    archive.file("index.json", 0o644, &serde_json::to_vec(&index)?)?;
    archive.directory("blobs", 0o755)?;
    archive.directory("blobs/sha256", 0o755)?;
    for (digest, content) in &blobs.0 {
        archive.file(&format!("blobs/sha256/{digest}"), 0o644, content)?;
    }
    archive.finish()?.flush()?;
    Ok(())
}

/// Content by hexadecimal SHA-256.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    /// Returns the blob's descriptor.
    fn add(&mut self, media_type: &str, content: Vec<u8>) -> Value {
        let digest: String = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
        let descriptor =
            json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": content.len() });
        self.0.insert(digest, content);
        descriptor
    }
}

fn base_layer(busybox: &Path) -> Result<Vec<u8>> {
    let program = fs::read(busybox).with_context(|| format!("reading {}", busybox.display()))?;
    let applets = Command::new(busybox)
        .arg("--list")
        .output()
        .with_context(|| format!("starting {}", busybox.display()))?;
    let applets = String::from_utf8_lossy(&applets.stdout).into_owned();
    let mut layer = tar::Writer::new(Vec::new());
    for directory in ["bin", "dev", "etc", "proc", "sys", "usr", "var"] {
        layer.directory(directory, 0o755)?;
    }
    layer.directory("root", 0o700)?;
    layer.directory("tmp", 0o1777)?;
    layer.file("bin/busybox", 0o755, &program)?;
    for applet in applets.lines().filter(|applet| !applet.is_empty() && *applet != "busybox") {
        layer.symbolic_link(&format!("bin/{applet}"), "busybox")?;
    }
    layer.symbolic_link("sbin", "bin")?;
    layer.symbolic_link("usr/bin", "../bin")?;
    layer.symbolic_link("usr/sbin", "../bin")?;
    layer.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n",
    )?;
    layer.file("etc/group", 0o644, b"root:x:0:\nuser:x:1000:\n")?;
    layer.file(NOT_EXECUTABLE.trim_start_matches('/'), 0o644, b"#!/bin/sh\necho this must not run\n")?;
    layer.file(FOREIGN_PROGRAM.trim_start_matches('/'), 0o755, &aarch64_header())?;
    Ok(layer.finish()?)
}

/// The ELF header of an aarch64 executable: enough for a kernel to refuse it.
fn aarch64_header() -> Vec<u8> {
    let mut header = vec![0_u8; 120];
    // Magic, 64 bits, little endian, version 1.
    header[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    // ET_EXEC, EM_AARCH64, version 1.
    header[16..24].copy_from_slice(&[2, 0, 183, 0, 1, 0, 0, 0]);
    header
}

fn whiteout_layers() -> Result<[Vec<u8>; 2]> {
    let mut lower = tar::Writer::new(Vec::new());
    lower.directory("data", 0o755)?;
    lower.file("data/kept", 0o644, b"from the lower layer")?;
    lower.file("data/replaced", 0o644, b"from the lower layer")?;
    lower.file("data/removed", 0o644, b"from the lower layer")?;
    lower.directory("data/opaque", 0o755)?;
    lower.file("data/opaque/old", 0o644, b"from the lower layer")?;
    let mut upper = tar::Writer::new(Vec::new());
    upper.directory("data", 0o755)?;
    upper.file("data/.wh.removed", 0o644, b"")?;
    upper.file("data/replaced", 0o644, b"from the upper layer")?;
    upper.directory("data/opaque", 0o755)?;
    upper.file("data/opaque/.wh..wh..opq", 0o644, b"")?;
    upper.file("data/opaque/new", 0o644, b"from the upper layer")?;
    Ok([lower.finish()?, upper.finish()?])
}
