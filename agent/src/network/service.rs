//! The request: one update at a time, each on a thread of its own, which joins the containers'
//! namespace and ends with the update.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once};
use std::time::Duration;

use async_trait::async_trait;
use spore_agent_api::network::NAME_SERVER;
use spore_agent_api::v1::network as pb;
use spore_agent_api::v1::network_ttrpc;
use tokio::sync::{Mutex, oneshot};
use ttrpc::r#async::TtrpcContext;

use super::apply::{self, Applied, Place};
use super::config::Config;
use super::decode;
use super::link::{self, Recognise};
use super::names::{self, Dial, Doors, Names};
use super::namespace;
use super::netlink::Netlink;
use crate::boot::modules;
use crate::container::cgroup;
use crate::error::{AgentError, Result};
use crate::service::{detached, status};

/// The kernel answers at once, if it does.
const DEADLINE: Duration = Duration::from_secs(20);
const STACK: usize = 256 * 1024;

/// The containers' network and what was made of it.
#[derive(Clone)]
pub struct Network {
    namespace: PathBuf,
    recognise: Recognise,
    applied: Arc<Mutex<Applied>>,
    driver: Arc<Once>,
    names: Arc<Mutex<Option<Names>>>,
    /// Whose sockets find the name server, and how the host is asked.
    cgroup: PathBuf,
    dial: Dial,
}

impl Default for Network {
    fn default() -> Self {
        let (path, cgroup) = (Path::new(namespace::PATH), Path::new(cgroup::ROOT));
        Self::new(path, link::by_permanent_address, cgroup, names::by_vsock())
    }
}

impl Network {
    /// Of the namespace kept at a path, with NICs that `recognise` knows, for the sockets of a cgroup,
    /// whose questions for names go where `dial` leads.
    pub fn new(namespace: &Path, recognise: Recognise, cgroup: &Path, dial: Dial) -> Self {
        Self {
            namespace: namespace.into(),
            recognise,
            applied: Arc::default(),
            driver: Arc::new(Once::new()),
            names: Arc::default(),
            cgroup: cgroup.into(),
            dial,
        }
    }

    /// Makes the network what `config` says; returns what could not be done.
    pub async fn update(&self, config: Config) -> Result<Vec<String>> {
        let mut names = self.names.lock().await;
        let mut applied = Arc::clone(&self.applied).lock_owned().await;
        let (namespace, recognise) = (self.namespace.clone(), self.recognise);
        let driver = Arc::clone(&self.driver);
        let name_server = config.name_server;
        let unserved = name_server && names.is_none();
        let (sender, answer) = oneshot::channel();
        let work = move || {
            if !config.interfaces.is_empty() {
                driver.call_once(|| modules::load_listed(modules::NETWORK));
            }
            let done = in_namespace(&namespace, recognise, &mut applied, config);
            // The thread has stayed in the containers' namespace.
            let done = done.map(|problems| (problems, unserved.then(Doors::open)));
            let _ = sender.send(done);
        };
        let failed = |error| AgentError::internal("network: update", error);
        std::thread::Builder::new().name("network".into()).stack_size(STACK).spawn(work).map_err(failed)?;
        let (mut problems, doors) = match answer.await {
            Ok(done) => done.map_err(failed)?,
            Err(_) => return Err(AgentError::Internal("network: update: its thread has failed".into())),
        };
        if let Some(doors) = doors {
            match doors.and_then(|doors| Names::serve(doors, &self.cgroup, &self.dial)) {
                Ok(serving) => *names = Some(serving),
                Err(error) => problems.push(format!("name server {NAME_SERVER}: {error}")),
            }
        }
        if !name_server {
            *names = None;
        }
        Ok(problems)
    }
}

fn in_namespace(
    path: &Path,
    recognise: Recognise,
    applied: &mut Applied,
    config: Config,
) -> io::Result<Vec<String>> {
    let own_namespace = File::open(namespace::CURRENT)?;
    let inside_namespace = File::open(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        // A socket belongs to the namespace that it was opened in.
        let own = Netlink::open()?;
        namespace::enter(&inside_namespace)?;
        let place = Place { own, inside: Netlink::open()?, own_namespace, inside_namespace, recognise };
        let update = apply::update(&place, applied, config);
        Ok(tokio::time::timeout(DEADLINE, update).await.unwrap_or_else(|_| {
            vec![format!("network: the guest's kernel has not answered within {DEADLINE:?}")]
        }))
    })
}

#[async_trait]
impl network_ttrpc::Network for Network {
    async fn update(
        &self,
        _: &TtrpcContext,
        request: pb::NetworkRequest,
    ) -> ttrpc::Result<pb::NetworkResponse> {
        let config = decode::config(request).map_err(status)?;
        let network = self.clone();
        let problems = detached(async move { Network::update(&network, config).await }).await?;
        let problem = |message| pb::Problem { message, ..Default::default() };
        let problems = problems.into_iter().map(problem).collect();
        Ok(pb::NetworkResponse { problems, ..Default::default() })
    }
}
