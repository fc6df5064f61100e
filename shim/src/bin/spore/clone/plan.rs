//! What a clone is made of: its source's record in containerd, with what is the source's alone exchanged.

use std::collections::HashMap;

use containerd_client::services::v1::Container;
use containerd_client::services::v1::snapshots::{Kind, StatSnapshotRequest};
use containerd_shim_spore::{CLONE_FROM, is_writable_bind};
use serde_json::{Value, json};

use crate::containerd::{Containerd, Namespace};
use crate::create::{Recipe, Root};
use crate::failure::{Failure, of_containerd};

/// Set by Docker's engine on its containers.
const DOCKERS: &str = "com.docker/engine.bundle.path";
/// Set by containerd's CRI on a pod's containers.
const PODS: &str = "io.cri-containerd.kind";
/// Tells of a clone whose it is.
const CLONE_OF: &str = "io.spore.clone-of";
/// Longest host name (hostname(7)).
const MAX_HOSTNAME: usize = 64;

/// What the user wants of the clones.
#[derive(Debug, Default)]
pub(super) struct Wishes {
    pub(super) share_volumes: bool,
    pub(super) log_uri: Option<String>,
    pub(super) network_namespace: Option<String>,
}

#[derive(Debug)]
pub(super) struct Plan {
    source: Container,
    /// What their rootfs snapshots stand on: what the source's does.
    root: Root,
    terminal: bool,
    log_uri: String,
    namespace: String,
    network_namespace: Option<String>,
    spec: Value,
}

impl Plan {
    /// Refuses what cannot be cloned, before anything is made.
    pub(super) fn new(namespace: &str, source: Container, wishes: Wishes) -> Result<Self, Failure> {
        let refused = |detail: String| Failure::Container { id: source.id.clone(), detail };
        let by_annotation = format!(
            "create one with that client and the annotation {CLONE_FROM}=ID, of `spore snapshot create`"
        );
        if source.labels.contains_key(DOCKERS) {
            return Err(refused(format!(
                "Docker's engine runs it, which knows no container that it has not created; {by_annotation}"
            )));
        }
        if !source.sandbox.is_empty() || source.labels.contains_key(PODS) {
            return Err(refused("it is part of a pod, of which Kubernetes knows each container".into()));
        }
        if source.snapshotter.is_empty() || source.snapshot_key.is_empty() {
            return Err(refused(
                "it has no rootfs snapshot (ctr run --rootfs), so there can be no other like it; run it from an image"
                    .into(),
            ));
        }
        let bytes = source.spec.as_ref().map(|spec| spec.value.as_slice()).unwrap_or_default();
        let spec: Value = serde_json::from_slice(bytes)
            .map_err(|error| refused(format!("its specification is malformed: {error}")))?;
        if !spec.is_object() {
            return Err(refused("its specification is malformed: it is no object".into()));
        }
        if let Some(hook) = host_hook(&spec) {
            return Err(refused(format!(
                "its client has given it hooks of its own ({hook}), which mean this one container; {by_annotation}"
            )));
        }
        let writable = writable_volumes(&spec);
        if !wishes.share_volumes && !writable.is_empty() {
            return Err(refused(format!(
                "it writes to the host's files on {}, and a clone would write to the same; --share-volumes allows it",
                writable.join(", ")
            )));
        }
        if wishes.network_namespace.is_none()
            && let Some(path) = network(&spec).and_then(|network| network.get("path")?.as_str())
            && !path.is_empty()
        {
            return Err(refused(format!(
                "its network namespace {path:?} is one that somebody has set up for it; set one up for the clone and name it with --network-namespace"
            )));
        }
        let terminal = spec.pointer("/process/terminal").and_then(Value::as_bool).unwrap_or(false);
        let Wishes { log_uri, network_namespace, .. } = wishes;
        let (log_uri, root) = (log_uri.unwrap_or_default(), Root::default());
        Ok(Self { source, root, terminal, log_uri, namespace: namespace.into(), network_namespace, spec })
    }

    /// Asks containerd what the source's rootfs snapshot stands on.
    pub(super) async fn with_root(
        mut self,
        containerd: &Containerd,
        namespace: &Namespace,
    ) -> Result<Self, Failure> {
        let (snapshotter, key) = (self.source.snapshotter.clone(), self.source.snapshot_key.clone());
        let what = format!("rootfs snapshot \"{key}\"");
        let request = StatSnapshotRequest { snapshotter, key };
        let answer = containerd.client.snapshots().stat(namespace.call(request)).await;
        let info = answer.map_err(of_containerd(&containerd.address, &what))?.into_inner().info;
        let info = info.unwrap_or_default();
        self.root = Root { view: info.kind == i32::from(Kind::View), parent: info.parent };
        Ok(self)
    }

    /// One of them, by its name, and what it begins as.
    pub(super) fn recipe(&self, name: &str, origin: &str) -> Recipe {
        Recipe {
            record: self.record(name, Some(origin)),
            // The next task of this container is not a clone but begins with what this one leaves on its disk.
            afterwards: Some(self.record(name, None)),
            root: self.root.clone(),
            terminal: self.terminal,
            log_uri: self.log_uri.clone(),
        }
    }

    /// The container's record. With an origin it begins as that, without one as any other container.
    fn record(&self, name: &str, origin: Option<&str>) -> Container {
        let spec = self.source.spec.as_ref().map(|spec| prost_types::Any {
            type_url: spec.type_url.clone(),
            value: self.spec(name, origin).to_string().into_bytes(),
        });
        let mut labels: HashMap<_, _> = self.source.labels.clone();
        labels.insert(CLONE_OF.into(), self.source.id.clone());
        Container {
            id: name.into(),
            labels,
            spec,
            snapshot_key: name.into(),
            created_at: None,
            updated_at: None,
            ..self.source.clone()
        }
    }

    fn spec(&self, name: &str, origin: Option<&str>) -> Value {
        let mut spec = self.spec.clone();
        let Some(object) = spec.as_object_mut() else { return spec };
        // Whatever the source is called: two machines of one name are what a clone is not.
        object.insert("hostname".into(), json!(name[..name.floor_char_boundary(MAX_HOSTNAME)]));
        let annotations = object.entry("annotations").or_insert_with(|| json!({}));
        if let Some(annotations) = annotations.as_object_mut() {
            annotations.remove(CLONE_FROM);
            if let Some(origin) = origin {
                annotations.insert(CLONE_FROM.into(), json!(origin));
            }
        }
        let linux = object.get_mut("linux").and_then(Value::as_object_mut);
        if let Some(cgroup) = linux.and_then(|linux| linux.get_mut("cgroupsPath")) {
            *cgroup = json!(format!("/{}/{name}", self.namespace));
        }
        if let (Some(path), Some(network)) = (&self.network_namespace, network_mut(&mut spec)) {
            network["path"] = json!(path);
        }
        spec
    }
}

fn networks(namespace: &Value) -> bool {
    namespace.get("type").and_then(Value::as_str) == Some("network")
}

fn network(spec: &Value) -> Option<&Value> {
    spec.pointer("/linux/namespaces")?.as_array()?.iter().find(|namespace| networks(namespace))
}

fn network_mut(spec: &mut Value) -> Option<&mut Value> {
    let namespaces = spec.pointer_mut("/linux/namespaces")?.as_array_mut()?;
    namespaces.iter_mut().find(|namespace| networks(namespace))
}

/// Of those that run on the host, the first.
fn host_hook(spec: &Value) -> Option<&str> {
    let hooks = spec.get("hooks")?.as_object()?;
    let some = |list: &Value| list.as_array().is_some_and(|list| !list.is_empty());
    hooks.iter().find(|(name, list)| *name != "startContainer" && some(list)).map(|(name, _)| name.as_str())
}

/// Where they are mounted.
fn writable_volumes(spec: &Value) -> Vec<String> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or_default().to_owned();
    let mounts = spec.get("mounts").and_then(Value::as_array).into_iter().flatten();
    let writable = mounts.filter(|mount| {
        let options = mount.get("options").and_then(Value::as_array).into_iter().flatten();
        let options: Vec<_> = options.map(|option| text(Some(option))).collect();
        is_writable_bind(&text(mount.get("type")), &options)
    });
    writable.map(|mount| text(mount.get("destination"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Value {
        json!({
            "process": { "args": ["sh"], "terminal": true },
            "hostname": "source",
            "annotations": { "io.spore.vcpus": "2", CLONE_FROM: "older" },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/etc/hosts", "type": "bind", "source": "/h", "options": ["rbind", "ro"] }
            ],
            "linux": {
                "cgroupsPath": "/default/web",
                "namespaces": [{ "type": "pid" }, { "type": "network" }]
            }
        })
    }

    fn container(spec: &Value) -> Container {
        Container {
            id: "web".into(),
            image: "busybox".into(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            snapshotter: "overlayfs".into(),
            snapshot_key: "web".into(),
            spec: Some(prost_types::Any { type_url: "spec".into(), value: spec.to_string().into_bytes() }),
            ..Default::default()
        }
    }

    fn plan(spec: &Value, wishes: Wishes) -> Result<Plan, Failure> {
        Plan::new("default", container(spec), wishes)
    }

    #[test]
    fn a_clone_has_its_sources_record_but_for_what_means_the_source() {
        let plan = plan(&spec(), Wishes::default()).unwrap();
        assert!(plan.terminal);
        let made = plan.record("web-1", Some("0123"));
        assert_eq!(
            (made.id.as_str(), made.snapshot_key.as_str(), made.image.as_str()),
            ("web-1", "web-1", "busybox")
        );
        assert_eq!((&made.labels["a"], &made.labels[CLONE_OF]), (&"b".to_owned(), &"web".to_owned()));
        let mut expected = spec();
        expected["hostname"] = json!("web-1");
        expected["annotations"][CLONE_FROM] = json!("0123");
        expected["linux"]["cgroupsPath"] = json!("/default/web-1");
        let spec_of = |made: Container| serde_json::from_slice::<Value>(&made.spec.unwrap().value).unwrap();
        assert_eq!(spec_of(made), expected);
        expected["annotations"] = json!({ "io.spore.vcpus": "2" });
        assert_eq!(spec_of(plan.record("web-1", None)), expected);
    }

    #[test]
    fn what_is_the_sources_alone_is_refused_unless_it_is_given() {
        let refused = |change: &dyn Fn(&mut Value), part: &str| {
            let mut spec = spec();
            change(&mut spec);
            let error = plan(&spec, Wishes::default()).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("container \"web\": "), "{error}");
            spec
        };
        let shared = refused(&|spec| spec["mounts"][1]["options"] = json!(["rbind"]), "on /etc/hosts");
        plan(&shared, Wishes { share_volumes: true, ..Wishes::default() }).unwrap();
        let joined = refused(
            &|spec| spec["linux"]["namespaces"][1]["path"] = json!("/run/netns/web"),
            "--network-namespace",
        );
        let other = Wishes { network_namespace: Some("/run/netns/b".into()), ..Wishes::default() };
        let made = plan(&joined, other).unwrap().spec("b", None);
        assert_eq!(made["linux"]["namespaces"][1]["path"], "/run/netns/b");
        refused(&|spec| spec["hooks"] = json!({ "createRuntime": [{ "path": "/x" }] }), "(createRuntime)");
        refused(&|spec| *spec = json!(7), "it is no object");
        let unrooted = Container { snapshot_key: String::new(), ..container(&spec()) };
        assert!(Plan::new("default", unrooted, Wishes::default()).is_err());
        let labels = [(DOCKERS.to_owned(), "/b".to_owned())].into();
        let dockers = Container { labels, ..container(&spec()) };
        let docker = Plan::new("moby", dockers, Wishes::default()).unwrap_err().to_string();
        assert!(docker.contains("Docker") && docker.contains(CLONE_FROM), "{docker}");
    }
}
