//! The containers that are made: of the image, with the runtime specification's defaults, without a network and without volumes.

use std::collections::HashMap;
use std::path::PathBuf;

use containerd_client::services::v1::Container;
use containerd_client::services::v1::container::Runtime;
use containerd_shim_spore::{CLONE_FROM, RUNTIME};
use oci_spec::runtime::{Process, Spec};

use super::image::Image;
use crate::create::{Recipe, Root};
use crate::failure::Failure;

/// What containerd calls an OCI specification.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// Tells whose the containers are.
const LABEL: (&str, &str) = ("io.spore.bench", "");
const SHELLS_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug)]
pub(super) struct Recipes {
    image: Image,
    /// Of which one is a cgroup.
    namespace: String,
    process: Process,
}

impl Recipes {
    pub(super) fn new(image: Image, namespace: &str, command: Vec<String>) -> Self {
        let process = process(&image, command);
        Self { image, namespace: namespace.into(), process }
    }

    /// A container that begins with a snapshot or off a zygote, or as any other. What `passes` is not told to its next task, as `spore clone` does.
    pub(super) fn recipe(&self, name: &str, origin: Option<&str>, passes: bool) -> Result<Recipe, Failure> {
        Ok(Recipe {
            record: self.record(name, origin)?,
            afterwards: if passes { Some(self.record(name, None)?) } else { None },
            root: Root { parent: self.image.parent.clone(), view: false },
            ..Recipe::default()
        })
    }

    fn record(&self, name: &str, origin: Option<&str>) -> Result<Container, Failure> {
        let spec = encoded(&self.spec(name, origin))?;
        Ok(Container {
            id: name.into(),
            labels: [(LABEL.0.into(), LABEL.1.into())].into(),
            image: self.image.name.clone(),
            runtime: Some(Runtime { name: RUNTIME.into(), options: None }),
            spec: Some(prost_types::Any { type_url: SPEC_TYPE.into(), value: spec }),
            snapshotter: self.image.snapshotter.clone(),
            snapshot_key: name.into(),
            ..Container::default()
        })
    }

    fn spec(&self, name: &str, origin: Option<&str>) -> Spec {
        let mut spec = Spec::default();
        spec.set_process(Some(self.process.clone())).set_hostname(Some(name.into()));
        let annotation = origin.map(|origin| (CLONE_FROM.to_owned(), origin.to_owned()));
        spec.set_annotations(annotation.map(|annotation| HashMap::from([annotation])));
        if let Some(root) = spec.root_mut() {
            root.set_readonly(Some(false));
        }
        if let Some(linux) = spec.linux_mut() {
            linux.set_cgroups_path(Some(PathBuf::from(format!("/{}/{name}", self.namespace))));
        }
        spec
    }

    /// A further process in one of them.
    pub(super) fn exec(&self, program: &str) -> Result<Vec<u8>, Failure> {
        let mut process = self.process.clone();
        process.set_args(Some(vec![program.into()]));
        encoded(&process)
    }
}

fn encoded(value: &impl serde::Serialize) -> Result<Vec<u8>, Failure> {
    serde_json::to_vec(value).map_err(|error| Failure::Refused(format!("write a specification: {error}")))
}

/// What the image says of environment, directory and user. Who a user is by name stands in the image's files; what is measured does
/// not depend on it, so that one is root here.
fn process(image: &Image, command: Vec<String>) -> Process {
    let said = &image.process;
    let mut process = Process::default();
    let mut env = said.env.clone().unwrap_or_default();
    if !env.iter().any(|entry| entry.starts_with("PATH=")) {
        env.push(SHELLS_PATH.into());
    }
    process.set_args(Some(command)).set_env(Some(env));
    if let Some(directory) = said.working_dir.as_ref().filter(|path| path.starts_with('/')) {
        process.set_cwd(PathBuf::from(directory));
    }
    let user = said.user.as_deref().unwrap_or_default();
    let (uid, gid) = user.split_once(':').unwrap_or((user, "0"));
    if let (Ok(uid), Ok(gid)) = (uid.parse(), gid.parse()) {
        process.user_mut().set_uid(uid).set_gid(gid);
    }
    process
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::image;
    use super::*;

    fn recipes(process: image::Process) -> Recipes {
        let (name, snapshotter, parent) = ("busybox".into(), "native".into(), "sha256:0".into());
        let image = Image { name, snapshotter, parent, process };
        Recipes::new(image, "default", vec!["sleep".into(), "9".into()])
    }

    fn spec_of(record: &Container) -> Value {
        serde_json::from_slice(&record.spec.as_ref().unwrap().value).unwrap()
    }

    #[test]
    fn a_container_is_the_images_and_is_called_by_its_name() {
        let id = "0123456789abcdef0123456789abcdef";
        let recipe = recipes(image::Process::default()).recipe("b-1", Some(id), true).unwrap();
        let record = &recipe.record;
        assert_eq!((record.id.as_str(), record.snapshot_key.as_str()), ("b-1", "b-1"));
        assert_eq!((record.snapshotter.as_str(), recipe.root.parent.as_str()), ("native", "sha256:0"));
        assert_eq!(record.runtime.as_ref().unwrap().name, RUNTIME);
        let spec = spec_of(record);
        assert_eq!(
            (&spec["hostname"], &spec["linux"]["cgroupsPath"]),
            (&"b-1".into(), &"/default/b-1".into())
        );
        assert_eq!(spec["annotations"][CLONE_FROM], id);
        assert_eq!(spec["process"]["args"], serde_json::json!(["sleep", "9"]));
        assert_eq!(spec["root"]["readonly"], false);
        let networks = spec["linux"]["namespaces"].as_array().unwrap().iter();
        assert_eq!(networks.filter(|namespace| namespace["type"] == "network").count(), 1);
        assert!(spec_of(&recipe.afterwards.unwrap())["annotations"].is_null());
        assert!(recipes(image::Process::default()).recipe("b-2", None, false).unwrap().afterwards.is_none());
    }

    #[test]
    fn an_exec_is_the_containers_process_with_another_command() {
        let said = image::Process {
            env: Some(vec!["A=1".into()]),
            user: Some("7:8".into()),
            working_dir: Some("/srv".into()),
        };
        let process: Value = serde_json::from_slice(&recipes(said).exec("true").unwrap()).unwrap();
        assert_eq!(process["args"], serde_json::json!(["true"]));
        assert_eq!(process["env"], serde_json::json!(["A=1", SHELLS_PATH]));
        assert_eq!((&process["cwd"], &process["user"]["uid"]), (&"/srv".into(), &7.into()));
        assert_eq!(process["user"]["gid"], 8);
        for named in ["nobody", "nobody:8", "7:users", "-1", ""] {
            let said = image::Process { user: Some(named.into()), ..image::Process::default() };
            let process: Value = serde_json::from_slice(&recipes(said).exec("true").unwrap()).unwrap();
            assert_eq!(process["user"]["uid"], 0, "{named}");
        }
    }
}
