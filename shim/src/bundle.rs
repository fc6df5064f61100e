//! The OCI bundle: reads and checks `config.json`, takes from it what the host side
//! needs, and makes the copy that the guest gets (without host paths and host hooks).

pub(crate) mod confinement;
mod devices;
pub(crate) mod known;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::Value;
use spore_agent_api::MOUNT_TYPES;

use crate::config::{LEAST_MEMORY, Limits, cpuset_last};
use crate::hooks::{Hooks, Told};
use crate::volumes::{self, Volume};

#[derive(Debug, thiserror::Error)]
pub(crate) enum BundleError {
    #[error("OCI spec {path}: cannot be read: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("OCI spec {path}: {size} bytes, at most {max} are allowed")]
    TooLarge { path: PathBuf, size: usize, max: usize },
    #[error("OCI spec {path}: malformed: {detail}")]
    Malformed { path: PathBuf, detail: String },
    #[error("OCI spec {path}: {what}; {mend}")]
    Invalid { path: PathBuf, what: String, mend: Cow<'static, str> },
    #[error("OCI spec {path}: {what} is not supported by this version of Spore; {mend}")]
    Unsupported { path: PathBuf, what: String, mend: &'static str },
}

/// Where the task's holder process lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NetworkNamespace {
    New,
    Path(PathBuf),
}

impl NetworkNamespace {
    /// Where one is that was there before.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Self::New => None,
            Self::Path(path) => Some(path),
        }
    }
}

/// A checked bundle.
#[derive(Debug)]
pub(crate) struct Bundle {
    pub(crate) path: PathBuf,
    /// What the guest gets.
    pub(crate) guest_spec: Vec<u8>,
    pub(crate) annotations: HashMap<String, String>,
    pub(crate) limits: Limits,
    pub(crate) network: NetworkNamespace,
    /// The container has a user namespace of its own.
    pub(crate) user_namespace: bool,
    /// `root.path`, made absolute.
    pub(crate) root: PathBuf,
    pub(crate) hostname: String,
    /// Of the host's side.
    pub(crate) hooks: Hooks,
    /// Host directories and files; the guest's spec names them by their place here.
    pub(crate) volumes: Vec<Volume>,
    pub(crate) oci_version: String,
    /// Fields that have no effect in a virtual machine, for the log.
    pub(crate) unheeded: Vec<String>,
}

impl Bundle {
    pub(crate) fn load(path: &Path) -> Result<Self, BundleError> {
        let file = path.join("config.json");
        let bytes =
            std::fs::read(&file).map_err(|source| BundleError::Read { path: file.clone(), source })?;
        Self::parse(path, &bytes)
    }

    /// What the hooks of container `id` are told.
    pub(crate) fn told(&self, id: &str, pid: u32) -> Told {
        Told {
            oci_version: self.oci_version.clone(),
            id: id.into(),
            pid,
            bundle: self.path.clone(),
            annotations: self.annotations.clone(),
        }
    }

    fn parse(bundle: &Path, bytes: &[u8]) -> Result<Self, BundleError> {
        let path = bundle.join("config.json");
        let max = spore_agent_api::MAX_SPEC;
        if bytes.len() > max {
            return Err(BundleError::TooLarge { path, size: bytes.len(), max });
        }
        let malformed = |error: serde_json::Error| BundleError::Malformed {
            path: path.clone(),
            detail: error.to_string(),
        };
        let mut value: Value = serde_json::from_slice(bytes).map_err(malformed)?;
        let unknown = value.get_mut("process").map(known::keep_known).unwrap_or_default();
        // From the text where that is possible: only then an error says at which line.
        let spec = if unknown.is_empty() {
            serde_json::from_slice::<Spec>(bytes)
        } else {
            serde_json::from_value(value.clone())
        };
        let spec = spec.map_err(malformed)?;
        check_process(&path, &spec)?;
        // Before the mounts: `ctr --net-host` adds some that are refused as well.
        let network = network(&path, &spec)?;
        let volumes = volumes_among(&path, bundle, &spec)?;
        let hooks = host_hooks(&path, &spec)?;
        let limits = limits(&spec);
        check_memory(&path, &limits)?;
        devices::check(&path, &spec)?;
        confinement::check(&path, &spec)?;
        let root =
            spec.root().as_ref().map_or_else(|| bundle.join("rootfs"), |root| bundle.join(root.path()));
        make_guests_own(&mut value);
        let mut unheeded = confinement::unheeded(&spec);
        unheeded.extend(unknown.into_iter().map(|name| format!("process.capabilities \"{name}\"")));
        Ok(Self {
            path: bundle.into(),
            guest_spec: serde_json::to_vec(&value).map_err(malformed)?,
            annotations: spec.annotations().clone().unwrap_or_default(),
            limits,
            network,
            user_namespace: has_namespace(&spec, LinuxNamespaceType::User),
            root,
            hostname: spec.hostname().clone().unwrap_or_default(),
            hooks,
            volumes,
            oci_version: spec.version().clone(),
            unheeded,
        })
    }
}

fn check_process(path: &Path, spec: &Spec) -> Result<(), BundleError> {
    let invalid = |what: &str, mend: &'static str| BundleError::Invalid {
        path: path.into(),
        what: what.to_string(),
        mend: mend.into(),
    };
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| invalid("there is no \"process\"", "name the command to run in process.args"))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(invalid("process.args is empty", "name the command to run"));
    }
    if !process.cwd().is_absolute() {
        return Err(invalid("process.cwd is not an absolute path", "use \"/\" or another absolute path"));
    }
    Ok(())
}

/// The host's directories and files among the mounts; the others' types are checked.
fn volumes_among(path: &Path, bundle: &Path, spec: &Spec) -> Result<Vec<Volume>, BundleError> {
    let mut volumes = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        let destination = mount.destination().display();
        let kind = mount.typ().as_deref().unwrap_or("");
        let options = mount.options().as_deref().unwrap_or_default();
        if volumes::is_bind(kind, options) {
            let source = mount.source().as_deref().ok_or_else(|| BundleError::Invalid {
                path: path.into(),
                what: format!("the bind mount on {destination} has no source"),
                mend: "name a directory or file of the host".into(),
            })?;
            volumes.push(Volume::new(bundle.join(source), mount.destination(), options));
        } else if !MOUNT_TYPES.contains(&kind) {
            return Err(BundleError::Invalid {
                path: path.into(),
                what: format!("mount on {destination}: unknown type {kind:?}"),
                mend: format!("allowed are bind, {}", MOUNT_TYPES.join(", ")).into(),
            });
        }
    }
    Ok(volumes)
}

/// What runs on the host is the shim's to run. `startContainer` is none of it: it runs inside the
/// container, so the agent sees to it. `createContainer` names a program of the host that has to
/// run in the container's namespaces, which are another machine's.
fn host_hooks(path: &Path, spec: &Spec) -> Result<Hooks, BundleError> {
    let Some(hooks) = spec.hooks() else { return Ok(Hooks::default()) };
    if hooks.create_container().as_ref().is_some_and(|list| !list.is_empty()) {
        return Err(BundleError::Unsupported {
            path: path.into(),
            what: "the hook createContainer".into(),
            mend: "use createRuntime, or startContainer with a program of the image",
        });
    }
    Ok(Hooks::of(hooks))
}

fn network(path: &Path, spec: &Spec) -> Result<NetworkNamespace, BundleError> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().clone()).unwrap_or_default();
    for namespace in &namespaces {
        if namespace.typ() != LinuxNamespaceType::Network && namespace.path().is_some() {
            return Err(BundleError::Unsupported {
                path: path.into(),
                what: format!("joining the {} namespace of another container", namespace.typ()),
                mend: "give the container its own",
            });
        }
    }
    match namespaces.iter().find(|namespace| namespace.typ() == LinuxNamespaceType::Network) {
        Some(namespace) => Ok(namespace.path().clone().map_or(NetworkNamespace::New, NetworkNamespace::Path)),
        None => Err(BundleError::Invalid {
            path: path.into(),
            what: "there is no network namespace (host networking), and a virtual machine cannot share the host's"
                .into(),
            mend: "run the container without --net-host / --network=host".into(),
        }),
    }
}

fn has_namespace(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| namespace.typ() == kind)
}

fn limits(spec: &Spec) -> Limits {
    let Some(resources) = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()) else {
        return Limits::default();
    };
    let positive =
        |value: Option<i64>| value.and_then(|value| u64::try_from(value).ok()).filter(|value| *value > 0);
    let cpu = resources.cpu().as_ref();
    Limits {
        quota: cpu
            .and_then(|cpu| positive(cpu.quota()).map(|quota| (quota, cpu.period().unwrap_or(100_000)))),
        last_cpu: cpu.and_then(|cpu| cpu.cpus().as_deref().and_then(cpuset_last)),
        memory: resources.memory().as_ref().and_then(|memory| positive(memory.limit())),
    }
}

fn check_memory(path: &Path, limits: &Limits) -> Result<(), BundleError> {
    match limits.memory {
        Some(limit) if limit < LEAST_MEMORY => Err(BundleError::Invalid {
            path: path.into(),
            what: format!("linux.resources.memory.limit is {limit} bytes"),
            mend: format!("at least {LEAST_MEMORY} are needed").into(),
        }),
        _ => Ok(()),
    }
}

/// Takes out what means something on the host only: the path of the network namespace
/// (the holder has joined it), the root's path (the disks replace it), the host's devices and the sources of bind
/// mounts (the guest knows them by number).
fn make_guests_own(spec: &mut Value) {
    let Some(object) = spec.as_object_mut() else { return };
    if let Some(hooks) = object.get_mut("hooks").and_then(Value::as_object_mut) {
        hooks.retain(|name, _| name == "startContainer");
    }
    if let Some(root) = object.get_mut("root").and_then(Value::as_object_mut) {
        root.insert("path".into(), "rootfs".into());
    }
    let mounts = object.get_mut("mounts").and_then(Value::as_array_mut);
    let binds = mounts.into_iter().flatten().filter_map(Value::as_object_mut).filter(|mount| {
        let kind = mount.get("type").and_then(Value::as_str).unwrap_or("");
        let options = mount.get("options").and_then(Value::as_array).into_iter().flatten();
        let options: Vec<_> = options.filter_map(Value::as_str).collect();
        volumes::is_bind(kind, &options)
    });
    for (number, mount) in binds.enumerate() {
        mount.insert("type".into(), "bind".into());
        mount.insert("source".into(), volumes::guest_path(number).into());
    }
    let Some(linux) = object.get_mut("linux") else { return };
    devices::keep_guests(linux);
    let namespaces = linux.get_mut("namespaces");
    for namespace in namespaces.and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(namespace) = namespace.as_object_mut() {
            namespace.remove("path");
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "hostname": "web",
            "process": { "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "root": { "path": "/some/rootfs" },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
            "annotations": { "io.spore.vcpus": "2" },
            "unknownToUs": { "kept": true },
            "linux": {
                "resources": { "cpu": { "quota": 50000, "period": 100000, "cpus": "0-1" }, "memory": { "limit": 8388608 } },
                "namespaces": [{ "type": "pid" }, { "type": "network", "path": "/var/run/netns/x" }]
            }
        })
    }

    fn parse(spec: &Value) -> Result<Bundle, BundleError> {
        Bundle::parse(Path::new("/b"), &serde_json::to_vec(spec).unwrap())
    }

    #[test]
    fn the_host_side_takes_what_it_needs_and_the_guest_gets_no_host_paths() {
        let bundle = parse(&spec()).unwrap();
        assert_eq!(bundle.network, NetworkNamespace::Path("/var/run/netns/x".into()));
        assert_eq!(bundle.root, Path::new("/some/rootfs"));
        assert_eq!(bundle.limits.quota, Some((50_000, 100_000)));
        assert_eq!((bundle.limits.last_cpu, bundle.limits.memory), (Some(1), Some(8_388_608)));
        assert_eq!(bundle.annotations["io.spore.vcpus"], "2");
        let guest: Value = serde_json::from_slice(&bundle.guest_spec).unwrap();
        assert_eq!(guest["linux"]["namespaces"][1], json!({ "type": "network" }));
        assert_eq!(guest["unknownToUs"]["kept"], true);
        assert_eq!(guest["root"]["path"], "rootfs");
    }

    #[test]
    fn what_the_agent_accepts_the_shim_lets_pass() {
        let mut spec = spec();
        let mounts = MOUNT_TYPES.map(|kind| json!({ "destination": format!("/m/{kind}"), "type": kind }));
        spec["mounts"] = json!(mounts);
        let hook = json!([{ "path": "/bin/in-the-image" }]);
        spec["hooks"] = json!({ "startContainer": hook, "prestart": [] });
        let guest: Value = serde_json::from_slice(&parse(&spec).unwrap().guest_spec).unwrap();
        assert_eq!(guest["mounts"], spec["mounts"]);
        assert_eq!(guest["hooks"], json!({ "startContainer": hook }));
    }

    #[test]
    fn bind_mounts_are_volumes_which_the_guest_knows_by_number() {
        let mut spec = spec();
        spec["mounts"] = json!([
            { "destination": "/a", "type": "bind", "source": "/host/a", "options": ["rbind", "ro"] },
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/b", "type": "none", "source": "data", "options": ["bind", "ro", "rw"] }
        ]);
        let bundle = parse(&spec).unwrap();
        let [first, second] = &bundle.volumes[..] else { panic!("{:?}", bundle.volumes) };
        assert_eq!(
            (first.source.as_path(), first.read_only, first.recursive),
            (Path::new("/host/a"), true, true)
        );
        assert_eq!((second.source.as_path(), second.read_only), (Path::new("/b/data"), false));
        assert!(!second.recursive);
        let guest: Value = serde_json::from_slice(&bundle.guest_spec).unwrap();
        assert_eq!(guest["mounts"][0]["source"], "/run/spore/volumes/0");
        assert_eq!(guest["mounts"][0]["options"], json!(["rbind", "ro"]));
        assert_eq!(guest["mounts"][1], spec["mounts"][1]);
        assert_eq!(
            (&guest["mounts"][2]["type"], &guest["mounts"][2]["source"]),
            (&json!("bind"), &json!("/run/spore/volumes/1"))
        );
    }

    #[test]
    fn a_device_of_the_host_is_refused_and_a_privileged_container_has_the_guests() {
        let device = |path: &str, kind: &str, major: u32, minor: u32| json!({ "path": path, "type": kind, "major": major, "minor": minor });
        let fuse = device("/dev/fuse", "c", 10, 229);
        let mut spec = spec();
        spec["linux"]["devices"] = json!([fuse, device("/dev/sda", "b", 8, 0)]);
        let refused = parse(&spec).unwrap_err().to_string();
        assert!(refused.contains("/dev/sda (b 8:0) is the host's"), "{refused}");
        spec["linux"]["resources"]["devices"] =
            json!([{ "allow": false, "access": "rwm" }, { "allow": true, "access": "rwm" }]);
        let guest: Value = serde_json::from_slice(&parse(&spec).unwrap().guest_spec).unwrap();
        assert_eq!(guest["linux"]["devices"], json!([fuse]));
        // A disk is allowed by its number only: the client means the host's.
        spec["linux"]["resources"]["devices"] =
            json!([{ "allow": true, "type": "b", "major": 8, "minor": 0, "access": "rwm" }]);
        parse(&spec).unwrap_err();
        for (kind, major, minor) in [("c", 10, 57), ("c", 226, 0), ("b", 254, 0)] {
            spec["linux"]["devices"] = json!([device("/dev/x", kind, major, minor)]);
            parse(&spec).unwrap_err();
        }
        for (kind, major, minor) in [("c", 1, 3), ("u", 5, 2), ("p", 0, 0), ("c", 10, 200)] {
            spec["linux"]["devices"] = json!([device("/dev/x", kind, major, minor)]);
            parse(&spec).unwrap();
        }
    }

    #[test]
    fn a_capability_that_nobody_knows_is_passed_over() {
        let mut spec = spec();
        spec["process"]["capabilities"] = json!({ "bounding": ["CAP_KILL", "CAP_NOBODY_HAS"] });
        let bundle = parse(&spec).unwrap();
        let guest: Value = serde_json::from_slice(&bundle.guest_spec).unwrap();
        assert_eq!(guest["process"]["capabilities"]["bounding"], json!(["CAP_KILL"]));
        assert_eq!(bundle.unheeded, ["process.capabilities \"CAP_NOBODY_HAS\""]);
    }

    #[test]
    fn a_relative_root_is_the_bundles() {
        let mut spec = spec();
        spec["root"]["path"] = "rootfs".into();
        assert_eq!(parse(&spec).unwrap().root, Path::new("/b/rootfs"));
    }

    #[test]
    fn bad_specs_are_refused_with_the_reason() {
        let edit = |edit: &dyn Fn(&mut Value)| {
            let mut spec = spec();
            edit(&mut spec);
            parse(&spec).unwrap_err().to_string()
        };
        for (message, needle) in [
            (edit(&|s| drop(s.as_object_mut().unwrap().remove("process"))), "there is no \"process\""),
            (edit(&|s| s["process"]["args"] = json!([])), "process.args is empty"),
            (edit(&|s| s["process"]["args"] = json!("sh")), "malformed"),
            (edit(&|s| s["mounts"][0]["type"] = "9p".into()), "unknown type \"9p\""),
            (edit(&|s| s["mounts"][0]["type"] = "devtmpfs".into()), "allowed are bind, proc, sysfs"),
            (edit(&|s| s["mounts"][0] = json!({ "destination": "/x", "type": "bind" })), "has no source"),
            (
                edit(&|s| s["linux"]["resources"]["memory"]["limit"] = json!(4_194_303)),
                "at least 4194304 are needed",
            ),
            (edit(&|s| s["linux"]["namespaces"] = json!([{ "type": "pid" }])), "host networking"),
            (edit(&|s| s["linux"]["namespaces"][0]["path"] = "/proc/1/ns/pid".into()), "pid namespace"),
            (
                edit(&|s| s["hooks"] = json!({ "createContainer": [{ "path": "/x" }] })),
                "hook createContainer",
            ),
        ] {
            assert!(message.contains(needle) && message.contains("/b/config.json"), "{needle}: {message}");
        }
        let message = Bundle::parse(Path::new("/b"), b"{").unwrap_err().to_string();
        assert!(message.contains("malformed") && message.contains("line 1"), "{message}");
    }
}
