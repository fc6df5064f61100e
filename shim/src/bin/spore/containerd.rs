//! containerd's own API, as far as the command needs it.

use containerd_client::Client;
use containerd_client::services::v1::{
    Container, GetContainerRequest, ListContainersRequest, ListNamespacesRequest,
};
use containerd_client::tonic::Request;
use containerd_client::tonic::metadata::{Ascii, MetadataValue};
use containerd_shim_spore::RUNTIME;

use crate::Global;
use crate::failure::{Failure, no_containerd, of_containerd};

/// containerd reads the namespace from this header.
const NAMESPACE: &str = "containerd-namespace";

pub(crate) struct Containerd {
    pub(crate) client: Client,
    pub(crate) address: String,
}

/// A namespace that can be a header.
pub(crate) struct Namespace(MetadataValue<Ascii>);

impl Namespace {
    pub(crate) fn new(name: &str) -> Result<Self, Failure> {
        let header = name
            .parse()
            .ok()
            .filter(|_| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic()));
        let header = header
            .ok_or_else(|| Failure::Usage(format!("namespace {name:?}: not a name that containerd knows")))?;
        Ok(Self(header))
    }

    /// A message as it goes to containerd.
    pub(crate) fn call<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(NAMESPACE, self.0.clone());
        request
    }
}

impl Containerd {
    pub(crate) async fn connect(global: &Global) -> Result<Self, Failure> {
        let address = global.socket().to_owned();
        let client = Client::from_path(&address).await.map_err(|error| no_containerd(&address, &error))?;
        Ok(Self { client, address })
    }

    pub(crate) async fn version(&self) -> Result<String, Failure> {
        let answer = self.client.version().version(()).await;
        Ok(answer.map_err(of_containerd(&self.address, "version"))?.into_inner().version)
    }

    pub(crate) async fn namespaces(&self) -> Result<Vec<String>, Failure> {
        let request = ListNamespacesRequest { filter: String::new() };
        let answer = self.client.namespaces().list(request).await;
        let answer = answer.map_err(of_containerd(&self.address, "list namespaces"))?;
        Ok(answer.into_inner().namespaces.into_iter().map(|namespace| namespace.name).collect())
    }

    /// The ids of all containers, whatever runs them.
    pub(crate) async fn ids(&self, namespace: &Namespace) -> Result<Vec<String>, Failure> {
        let request = ListContainersRequest { filters: Vec::new() };
        let answer = self.client.containers().list(namespace.call(request)).await;
        let containers =
            answer.map_err(of_containerd(&self.address, "list containers"))?.into_inner().containers;
        Ok(containers.into_iter().map(|container| container.id).collect())
    }

    /// Those that run with Spore.
    pub(crate) async fn containers(&self, namespace: &Namespace) -> Result<Vec<Container>, Failure> {
        let request = ListContainersRequest { filters: vec![format!("runtime.name=={RUNTIME}")] };
        let answer = self.client.containers().list(namespace.call(request)).await;
        Ok(answer.map_err(of_containerd(&self.address, "list containers"))?.into_inner().containers)
    }

    /// One of them.
    pub(crate) async fn container(&self, namespace: &Namespace, id: &str) -> Result<Container, Failure> {
        let request = GetContainerRequest { id: id.into() };
        let answer = self.client.containers().get(namespace.call(request)).await;
        let answer = answer.map_err(of_containerd(&self.address, &format!("container \"{id}\"")))?;
        let missing = |detail: String| Failure::Container { id: id.into(), detail };
        let container =
            answer.into_inner().container.ok_or_else(|| missing("containerd tells nothing of it".into()))?;
        let runtime = container.runtime.as_ref().map_or("", |runtime| runtime.name.as_str());
        if runtime != RUNTIME {
            return Err(missing(format!("runs with {runtime:?}, not with {RUNTIME}")));
        }
        Ok(container)
    }
}
