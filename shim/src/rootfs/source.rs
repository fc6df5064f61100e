//! Where a root file system comes from: containerd's mounts, or a root path that somebody
//! has mounted already (Docker), or a plain directory (`--rootfs`).

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::Mount;

use super::{RootfsError, mountinfo};

/// A root file system, as found on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// Layers joined by overlayfs; `lowers` uppermost first.
    Overlay { lowers: Vec<PathBuf>, upper: Option<Upper> },
    /// EROFS images that exist already, uppermost first (the erofs snapshotter).
    Images { images: Vec<PathBuf>, upper: Option<Upper> },
    /// A directory of which the guest gets a copy.
    Directory { path: PathBuf, frozen: bool },
}

/// The writable part of an overlay on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Upper {
    pub(crate) upper: PathBuf,
    pub(crate) work: PathBuf,
}

impl Source {
    /// From the mounts of a CreateTaskRequest, or from the root path when there are none.
    pub(crate) fn find(mounts: &[Mount], root: &Path) -> Result<Self, RootfsError> {
        match mounts {
            [] => {
                let text = std::fs::read_to_string("/proc/self/mountinfo").map_err(|source| {
                    RootfsError::Host { operation: "read", path: "/proc/self/mountinfo".into(), source }
                })?;
                Self::from_path(root, &mountinfo::parse(&text))
            }
            [mount] => Self::from_mount(mount),
            [first, ..] => Err(RootfsError::Unsupported {
                what: format!("{} mounts, the first of type {:?}", mounts.len(), first.type_),
                allowed: "one mount of type overlay, bind or erofs",
            }),
        }
    }

    fn from_mount(mount: &Mount) -> Result<Self, RootfsError> {
        let path = PathBuf::from(&mount.source);
        match mount.type_.as_str() {
            "overlay" => {
                let options: Vec<&str> = mount.options.iter().map(String::as_str).collect();
                Self::from_overlay(&options, Path::new("/"))
            }
            "bind" | "none" => Ok(Self::Directory { path, frozen: true }),
            "" if mount.options.iter().any(|option| option == "bind" || option == "rbind") => {
                Ok(Self::Directory { path, frozen: true })
            }
            "erofs" => Ok(Self::Images { images: vec![path], upper: None }),
            other => Err(RootfsError::Unsupported {
                what: format!("mount of type {other:?}"),
                allowed: "the snapshotters overlayfs, native and erofs",
            }),
        }
    }

    fn from_path(root: &Path, mounts: &[mountinfo::Entry]) -> Result<Self, RootfsError> {
        let root = std::fs::canonicalize(root).map_err(|source| RootfsError::Host {
            operation: "find the root directory",
            path: root.into(),
            source,
        })?;
        match mountinfo::find(mounts, &root) {
            Some(entry) if entry.fs_type == "overlay" && entry.root == Path::new("/") => {
                let text = mountinfo::unescape(&entry.super_options);
                let text = text.to_string_lossy();
                let options = split(&text, ',');
                let options: Vec<&str> = options.iter().map(String::as_str).collect();
                // Docker mounts with paths relative to overlay2/, two levels above merged/.
                let base = root.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
                Self::from_overlay(&options, base)
            }
            _ => Ok(Self::Directory { path: root, frozen: false }),
        }
    }

    fn from_overlay(options: &[&str], base: &Path) -> Result<Self, RootfsError> {
        let (mut lowers, mut upper, mut work) = (Vec::new(), None, None);
        let path = |text: &str| base.join(unquote(text));
        for option in options {
            match option.split_once('=') {
                Some(("lowerdir", list)) => lowers.extend(split(list, ':').iter().map(|text| path(text))),
                Some(("lowerdir+", one)) => lowers.push(path(one)),
                Some(("upperdir", dir)) => upper = Some(path(dir)),
                Some(("workdir", dir)) => work = Some(path(dir)),
                Some(("datadir+", _)) => {
                    return Err(RootfsError::Unsupported {
                        what: "an overlay with data-only layers".into(),
                        allowed: "overlays of ordinary layers",
                    });
                }
                _ => {}
            }
        }
        if lowers.is_empty() {
            return Err(RootfsError::Unsupported {
                what: "an overlay mount without lowerdir".into(),
                allowed: "lowerdir=…, with upperdir=… and workdir=… when writable",
            });
        }
        let upper = match (upper, work) {
            (Some(upper), Some(work)) => Some(Upper { upper, work }),
            (None, _) => None,
            (Some(upper), None) => {
                return Err(RootfsError::Unsupported {
                    what: format!("an overlay mount with upperdir {} and no workdir", upper.display()),
                    allowed: "both or neither",
                });
            }
        };
        // The erofs snapshotter mounts each layer.erofs on the fs/ beside it.
        let images: Vec<PathBuf> = lowers.iter().map(|lower| lower.with_file_name("layer.erofs")).collect();
        // A damaged one is its image nevertheless, and refused as such when it is opened.
        if images.iter().all(|image| super::superblock::has_magic(image)) {
            return Ok(Self::Images { images, upper });
        }
        Ok(Self::Overlay { lowers, upper })
    }
}

/// Splits where overlayfs does: a backslash keeps the next character.
fn split(text: &str, at: char) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut escaped = false;
    for c in text.chars() {
        if c == at && !escaped {
            parts.push(String::new());
        } else if let Some(last) = parts.last_mut() {
            last.push(c);
        }
        escaped = c == '\\' && !escaped;
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn unquote(text: &str) -> OsString {
    let bytes = Path::new(text).as_os_str().as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut escaped = false;
    for &byte in bytes {
        if byte == b'\\' && !escaped {
            escaped = true;
        } else {
            escaped = false;
            out.push(byte);
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            source: source.into(),
            options: options.iter().map(|option| (*option).to_string()).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn the_snapshotters_mounts_are_understood() {
        let overlay = mount(
            "overlay",
            "overlay",
            &["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"],
        );
        assert_eq!(
            Source::find(&[overlay], Path::new("/b/rootfs")).unwrap(),
            Source::Overlay {
                lowers: vec!["/s/2/fs".into(), "/s/1/fs".into()],
                upper: Some(Upper { upper: "/s/3/fs".into(), work: "/s/3/work".into() }),
            }
        );
        let view = mount("overlay", "overlay", &["lowerdir=/s/2/fs:/s/1/fs"]);
        assert!(matches!(
            Source::find(&[view], Path::new("/")).unwrap(),
            Source::Overlay { upper: None, .. }
        ));
        let native = mount("bind", "/n/7", &["rbind", "rw"]);
        assert_eq!(
            Source::find(&[native], Path::new("/")).unwrap(),
            Source::Directory { path: "/n/7".into(), frozen: true }
        );
        let erofs = mount("erofs", "/e/1/layer.erofs", &["ro", "loop"]);
        assert_eq!(
            Source::find(&[erofs], Path::new("/")).unwrap(),
            Source::Images { images: vec!["/e/1/layer.erofs".into()], upper: None }
        );
    }

    #[test]
    fn colons_and_commas_in_names_survive() {
        let odd = mount("overlay", "overlay", &["lowerdir=/a\\:b:/c\\\\d"]);
        let Source::Overlay { lowers, .. } = Source::find(&[odd], Path::new("/")).unwrap() else { panic!() };
        assert_eq!(lowers, [PathBuf::from("/a:b"), PathBuf::from("/c\\d")]);
    }

    #[test]
    fn dockers_relative_lowers_are_resolved() {
        let dir = tempfile::tempdir().unwrap();
        let merged = dir.path().join("overlay2/ab/merged");
        std::fs::create_dir_all(&merged).unwrap();
        let merged = std::fs::canonicalize(merged).unwrap();
        let entry = mountinfo::Entry {
            root: "/".into(),
            mount_point: merged.clone(),
            fs_type: "overlay".into(),
            super_options: "rw,lowerdir=l/X:l/Y,upperdir=ab/diff,workdir=ab/work,nouserxattr".into(),
        };
        let base = merged.parent().unwrap().parent().unwrap();
        let Source::Overlay { lowers, upper } = Source::from_path(&merged, &[entry]).unwrap() else {
            panic!()
        };
        assert_eq!(lowers, [base.join("l/X"), base.join("l/Y")]);
        assert_eq!(upper, Some(Upper { upper: base.join("ab/diff"), work: base.join("ab/work") }));
        let plain = Source::from_path(&merged, &[]).unwrap();
        assert_eq!(plain, Source::Directory { path: merged, frozen: false });
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for mounts in [
            vec![mount("ext4", "/dev/sda", &[])],
            vec![mount("overlay", "overlay", &["upperdir=/u", "workdir=/w"])],
            vec![mount("overlay", "overlay", &["upperdir=/u", "lowerdir=/l"])],
            vec![mount("bind", "/a", &[]), mount("bind", "/b", &[])],
        ] {
            let error = Source::find(&mounts, Path::new("/")).unwrap_err();
            assert!(matches!(error, RootfsError::Unsupported { .. }), "{error}");
        }
        let missing = Source::find(&[], Path::new("/no/such/root")).unwrap_err().to_string();
        assert!(missing.contains("/no/such/root"), "{missing}");
    }
}
