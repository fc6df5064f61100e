//! An image as containerd has it: from its name by way of index, manifest and configuration to the rootfs snapshot that
//! containers of it stand on, and to what a process of it is given.
//!
//! Specification: OCI image-spec 1.1, image-index, manifest, config ("Layer ChainID").

use containerd_client::services::v1::snapshots::StatSnapshotRequest;
use containerd_client::services::v1::{GetImageRequest, ReadContentRequest};
use containerd_client::tonic::Code;
use containerd_shim_spore::clean;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use crate::containerd::{Containerd, Namespace};
use crate::failure::{Failure, of_containerd};
use crate::show;

/// Bytes of a manifest, an index or a configuration; containerd reads no longer ones.
const MAX_DOCUMENT: usize = 8 << 20;
const MAX_LAYERS: usize = 1024;
/// An index may name indices.
const MAX_DEPTH: usize = 4;
/// Of this host, in OCI's words.
const PLATFORM: (&str, &str) = ("linux", "amd64");
const ALGORITHM: &str = "sha256:";

#[derive(Debug, Deserialize)]
struct Descriptor {
    digest: String,
    platform: Option<Platform>,
}

#[derive(Debug, Deserialize)]
struct Platform {
    os: String,
    architecture: String,
}

/// An index has manifests, a manifest has a configuration.
#[derive(Debug, Deserialize)]
struct Document {
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Configuration {
    config: Option<Process>,
    rootfs: Rootfs,
}

#[derive(Debug, Deserialize)]
struct Rootfs {
    diff_ids: Vec<String>,
}

/// What the image says of its processes. Its command is not asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct Process {
    pub(super) env: Option<Vec<String>>,
    pub(super) user: Option<String>,
    pub(super) working_dir: Option<String>,
}

#[derive(Debug)]
pub(super) struct Image {
    pub(super) name: String,
    pub(super) snapshotter: String,
    /// The rootfs snapshot of its layers.
    pub(super) parent: String,
    pub(super) process: Process,
}

impl Image {
    pub(super) async fn find(
        containerd: &Containerd,
        (namespace, called): (&Namespace, &str),
        name: &str,
        snapshotter: &str,
    ) -> Result<Self, Failure> {
        let shown = show::name(name.as_bytes());
        let refused = |detail: String| Failure::Refused(format!("image \"{shown}\": {detail}"));
        let answer =
            containerd.client.images().get(namespace.call(GetImageRequest { name: name.into() })).await;
        let image = match answer {
            Ok(answer) => answer.into_inner().image.unwrap_or_default(),
            Err(status) if status.code() == Code::NotFound => {
                return Err(refused(format!(
                    "there is none of that name in namespace \"{called}\"; `ctr --namespace {called} images ls` lists those that there are (-n is the namespace, -N the number of runs)"
                )));
            }
            Err(status) => {
                return Err(of_containerd(&containerd.address, &format!("image \"{shown}\""))(status));
            }
        };
        let target = image.target.unwrap_or_default().digest;
        let mut digest = target.clone();
        let mut configuration = None;
        for _ in 0..MAX_DEPTH {
            let document: Document = read(containerd, namespace, &shown, &digest).await?;
            if let Some(config) = document.config {
                configuration = Some(config.digest);
                break;
            }
            digest = choose(document.manifests.unwrap_or_default()).map_err(refused)?;
        }
        let configuration = configuration
            .ok_or_else(|| refused(format!("no manifest within {MAX_DEPTH} indices of its index")))?;
        let configuration: Configuration = read(containerd, namespace, &shown, &configuration).await?;
        let parent = chain_id(&configuration.rootfs.diff_ids).map_err(refused)?;
        let request = StatSnapshotRequest { snapshotter: snapshotter.into(), key: parent.clone() };
        match containerd.client.snapshots().stat(namespace.call(request)).await {
            Ok(_) => {}
            Err(status) if status.code() == Code::NotFound => {
                let mend =
                    format!("ctr --namespace {called} snapshots --snapshotter {snapshotter} unpack {target}");
                return Err(refused(format!(
                    "it is not unpacked for snapshotter \"{snapshotter}\"; `{mend}` does it, or pull it again with that snapshotter"
                )));
            }
            Err(status) => {
                let what = format!("rootfs snapshot of image \"{shown}\" by snapshotter \"{snapshotter}\"");
                return Err(of_containerd(&containerd.address, &what)(status));
            }
        }
        let process = configuration.config.unwrap_or_default();
        Ok(Self { name: name.into(), snapshotter: snapshotter.into(), parent, process })
    }
}

/// A JSON document of the content store.
async fn read<T: DeserializeOwned>(
    containerd: &Containerd,
    namespace: &Namespace,
    shown: &str,
    digest: &str,
) -> Result<T, Failure> {
    let digest = show::name(digest.as_bytes());
    let what = format!("content {digest} of image \"{shown}\"");
    let request = ReadContentRequest { digest: digest.clone(), ..Default::default() };
    let answer = containerd.client.content().read(namespace.call(request)).await;
    let mut pieces = answer.map_err(of_containerd(&containerd.address, &what))?.into_inner();
    let mut bytes = Vec::new();
    while let Some(piece) = pieces.message().await.map_err(of_containerd(&containerd.address, &what))? {
        if bytes.len().saturating_add(piece.data.len()) > MAX_DOCUMENT {
            return Err(Failure::Refused(format!("{what}: at most {MAX_DOCUMENT} bytes are read")));
        }
        bytes.extend(piece.data);
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| Failure::Refused(format!("{what}: malformed: {}", clean(&error.to_string()))))
}

/// The manifest for this host; one that does not say for what it is will do.
fn choose(manifests: Vec<Descriptor>) -> Result<String, String> {
    let mut unknown = None;
    for manifest in manifests {
        match &manifest.platform {
            Some(platform) if (platform.os.as_str(), platform.architecture.as_str()) == PLATFORM => {
                return Ok(manifest.digest);
            }
            Some(_) => {}
            None => unknown = unknown.or(Some(manifest.digest)),
        }
    }
    unknown.ok_or_else(|| format!("it has nothing for {}/{}", PLATFORM.0, PLATFORM.1))
}

/// The name of the rootfs snapshot that unpacking the layers leaves.
fn chain_id(layers: &[String]) -> Result<String, String> {
    let is_digest = |layer: &&String| {
        layer.strip_prefix(ALGORITHM).is_some_and(|hex| {
            hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
        })
    };
    if layers.is_empty() || layers.len() > MAX_LAYERS {
        return Err(format!("it has {} layers, 1 to {MAX_LAYERS} are allowed", layers.len()));
    }
    if let Some(layer) = layers.iter().find(|layer| !is_digest(layer)) {
        let shown = show::name(layer.as_bytes().get(..80).unwrap_or(layer.as_bytes()));
        return Err(format!("its layer \"{shown}\" is not named by a SHA-256 digest"));
    }
    let mut layers = layers.iter();
    let first = layers.next().cloned().unwrap_or_default();
    Ok(layers.fold(first, |chain, layer| {
        let digest = Sha256::digest(format!("{chain} {layer}"));
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{ALGORITHM}{hex}")
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(digit: char) -> String {
        format!("{ALGORITHM}{}", digit.to_string().repeat(64))
    }

    #[test]
    fn the_chain_id_is_that_of_the_specification() {
        assert_eq!(chain_id(&[layer('1')]).unwrap(), layer('1'));
        // printf '%s %s' sha256:1… sha256:2… | sha256sum, and that again with sha256:3….
        let two = "sha256:9932074217c35353d2e03a3f5a86549f7c67bfeb0ba53e23d69f4d4c8f7958f5";
        let three = "sha256:50127c0d6b338be78246434b4bce23ecf75e505158ea0bbd15effeb162fbf3ec";
        assert_eq!(chain_id(&[layer('1'), layer('2')]).unwrap(), two);
        assert_eq!(chain_id(&[layer('1'), layer('2'), layer('3')]).unwrap(), three);
    }

    #[test]
    fn layers_that_are_none_are_refused() {
        for bad in ["", "sha256:", "sha256:12", "../../etc", &layer('G'), &layer('A'), &layer('1')[1..]] {
            let error = chain_id(&[layer('1'), bad.to_owned()]).unwrap_err();
            assert!(error.contains("SHA-256"), "{error}");
        }
        let long = chain_id(&["\x1b".repeat(1 << 20)]).unwrap_err();
        assert!(long.len() < 1000 && !long.contains('\x1b'), "{long}");
        assert!(chain_id(&[]).unwrap_err().contains("0 layers"));
        assert!(chain_id(&vec![layer('1'); MAX_LAYERS + 1]).is_err());
    }

    #[test]
    fn the_manifest_is_this_hosts() {
        let index = |text: &str| serde_json::from_str::<Document>(text).unwrap().manifests.unwrap();
        let several = r#"{"manifests":[
            {"digest":"a","platform":{"os":"unknown","architecture":"unknown"}},
            {"digest":"b"},
            {"digest":"c","platform":{"os":"linux","architecture":"arm64"}},
            {"digest":"d","platform":{"os":"linux","architecture":"amd64","variant":"v2"}}]}"#;
        assert_eq!(choose(index(several)).unwrap(), "d");
        assert_eq!(choose(index(r#"{"manifests":[{"digest":"b"},{"digest":"e"}]}"#)).unwrap(), "b");
        let foreign = r#"{"manifests":[{"digest":"c","platform":{"os":"linux","architecture":"arm64"}}]}"#;
        assert_eq!(choose(index(foreign)).unwrap_err(), "it has nothing for linux/amd64");
        assert!(choose(Vec::new()).is_err());
    }

    #[test]
    fn a_configuration_may_say_little() {
        let of = |text: &str| serde_json::from_str::<Configuration>(text);
        let least = of(r#"{"rootfs":{"diff_ids":["x"]}}"#).unwrap();
        assert!(least.config.is_none());
        let some = of(
            r#"{"config":{"Env":["A=1"],"User":"7","Cmd":null,"WorkingDir":null},"rootfs":{"diff_ids":[]}}"#,
        );
        let process = some.unwrap().config.unwrap();
        assert_eq!((process.env, process.user.as_deref()), (Some(vec!["A=1".into()]), Some("7")));
        assert!(of(r#"{"config":{}}"#).is_err());
    }
}
