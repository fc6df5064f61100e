//! From the OCI spec that the shim sends to the one that libcontainer runs in the guest.
//!
//! The guest is a machine of its own: what names things of the host (namespace paths, bind
//! sources other than the exports of its volumes, host hooks) is refused with a message, what merely describes the host's policy
//! (AppArmor, SELinux, Intel RDT) is dropped, because the guest has none of it: the shim has refused what would be missed.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Hooks, Linux, LinuxNamespaceType, Process, RootBuilder, Spec};
use spore_agent_api::{MAX_SPEC, MOUNT_TYPES};

use super::devices::{self, Rule};
use super::{block_io, volumes};
use crate::error::{AgentError, Result};
use crate::identity;
use crate::network::namespace;

/// A spec ready for libcontainer, and what the agent itself needs of it.
#[derive(Debug)]
pub struct Prepared {
    pub spec: Spec,
    /// Path of the container's cgroup below the hierarchy's root, beginning with `/`.
    pub cgroup: PathBuf,
    /// A pid namespace of its own: its init takes every process with it.
    pub own_pid_namespace: bool,
    /// A network namespace of its own, whose loopback has to be brought up: that of a container with
    /// a user namespace. Every other one is in [`namespace::PATH`].
    pub own_network_namespace: bool,
    pub terminal: bool,
    /// Rows and columns.
    pub console_size: Option<(u16, u16)>,
    /// Owner of the standard streams.
    pub uid: u32,
    pub cwd: PathBuf,
    pub devices: Vec<Rule>,
    /// Some of its mounts are the host's directories or files.
    pub has_volumes: bool,
}

fn invalid(message: impl Into<String>) -> AgentError {
    AgentError::InvalidArgument(message.into())
}

/// Parses, checks and rewrites `config.json` for the container `id` whose root file system
/// will be mounted at `rootfs`.
pub fn prepare(id: &str, json: &[u8], rootfs: &Path) -> Result<Prepared> {
    if json.len() > MAX_SPEC {
        let length = json.len();
        return Err(invalid(format!("config.json: {length} bytes, at most {MAX_SPEC} are allowed")));
    }
    let mut spec: Spec =
        serde_json::from_slice(json).map_err(|error| invalid(format!("config.json: malformed: {error}")))?;

    let process = spec.process_mut().as_mut().ok_or_else(|| invalid("config.json: has no process"))?;
    check_process(process).map_err(|what| invalid(format!("config.json: {what}")))?;
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    let terminal = process.terminal().unwrap_or(false);
    let uid = process.user().uid();
    let cwd = process.cwd().clone();
    let console_size = console_size(process);

    let readonly = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    let root = RootBuilder::default().path(rootfs).readonly(readonly).build();
    spec.set_root(Some(root.map_err(|error| AgentError::internal("config.json: root", error))?));
    let hooks = guest_hooks(spec.hooks().as_ref())?;
    spec.set_hooks(hooks);
    let has_volumes = check_mounts(&mut spec)?;
    show_identity(&mut spec)?;

    let linux = spec.linux_mut().as_mut().ok_or_else(|| invalid("config.json: has no linux section"))?;
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    own_propagation(linux);
    let cgroup = cgroup_path(id, linux.cgroups_path().as_deref())?;
    // Absolute, so that libcgroups never takes it for a systemd unit.
    linux.set_cgroups_path(Some(cgroup.clone()));
    if let Some(resources) = linux.resources_mut() {
        block_io::make_guests_own(resources).map_err(|what| invalid(format!("config.json: {what}")))?;
    }
    let rules =
        linux.resources().as_ref().and_then(|resources| resources.devices().clone()).unwrap_or_default();
    let devices = devices::rules(&rules).map_err(|error| invalid(format!("config.json: {error}")))?;
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for namespace in &namespaces {
        if let Some(path) = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty()) {
            return Err(invalid(format!(
                "config.json: {:?} namespace \"{}\" is one of the host's, which a guest cannot join; \
                 the path has to be removed",
                namespace.typ(),
                path.display()
            )));
        }
    }
    let has = |typ| namespaces.iter().any(|namespace| namespace.typ() == typ);
    if !has(LinuxNamespaceType::Mount) {
        return Err(invalid("config.json: a mount namespace is required in linux.namespaces"));
    }
    let own_pid_namespace = has(LinuxNamespaceType::Pid);
    let has_network = has(LinuxNamespaceType::Network);
    // Of a namespace that is not its user namespace's it could not mount a sysfs.
    let own_network_namespace = has_network && has(LinuxNamespaceType::User);
    if !own_network_namespace {
        for network in namespaces.iter_mut().filter(|one| one.typ() == LinuxNamespaceType::Network) {
            network.set_path(Some(namespace::PATH.into()));
        }
        linux.set_namespaces(Some(namespaces));
    }
    Ok(Prepared {
        spec,
        cgroup,
        own_pid_namespace,
        own_network_namespace,
        terminal,
        console_size,
        uid,
        cwd,
        devices,
        has_volumes,
    })
}

/// What every process must have, a container's init and an exec; says what is wrong.
pub fn check_process(process: &Process) -> std::result::Result<(), String> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err("process.args is empty, nothing could be run".into());
    }
    if !process.cwd().is_absolute() {
        return Err(format!("process.cwd \"{}\" must be absolute", process.cwd().display()));
    }
    Ok(())
}

/// Rows and columns that a process wants its terminal to have.
pub fn console_size(process: &Process) -> Option<(u16, u16)> {
    let size = process.console_size()?;
    Some((u16::try_from(size.height()).ok()?, u16::try_from(size.width()).ok()?))
}

/// Keeps the only kind of hook that runs wholly inside the container.
#[allow(deprecated)] // prestart is still what Docker's and nerdctl's network set-up uses.
fn guest_hooks(hooks: Option<&Hooks>) -> Result<Option<Hooks>> {
    let Some(hooks) = hooks else { return Ok(None) };
    let host_side = [
        ("prestart", hooks.prestart()),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ];
    for (name, hooks) in host_side {
        if hooks.as_ref().is_some_and(|hooks| !hooks.is_empty()) {
            return Err(invalid(format!(
                "config.json: hooks.{name} runs a program of the host, which a guest does not have; \
                 the shim has to run it and leave it out"
            )));
        }
    }
    let start = hooks.start_container().clone().filter(|hooks| !hooks.is_empty());
    Ok(start.map(|hooks| {
        let mut kept = Hooks::default();
        kept.set_start_container(Some(hooks));
        kept
    }))
}

/// Whether there is a volume among the mounts.
fn check_mounts(spec: &mut Spec) -> Result<bool> {
    let Some(mounts) = spec.mounts_mut() else { return Ok(false) };
    let mut has_volumes = false;
    for mount in mounts {
        let target = mount.destination().display().to_string();
        let options = mount.options().clone().unwrap_or_default();
        let kind = mount.typ().clone().unwrap_or_default();
        let bind = options.iter().any(|option| option == "bind" || option == "rbind");
        if bind || kind == "bind" || kind == "rbind" {
            let source = mount.source().as_deref().unwrap_or(Path::new(""));
            if volumes::is_volume(source) {
                has_volumes = true;
                continue;
            }
            return Err(invalid(format!(
                "config.json: mount of \"{}\" at \"{target}\": a guest has none of the host's paths; the shim \
                 has to export it",
                source.display()
            )));
        }
        if !MOUNT_TYPES.contains(&kind.as_str()) {
            return Err(invalid(format!(
                "config.json: mount at \"{target}\": unknown type \"{kind}\"; allowed are {}",
                MOUNT_TYPES.join(", ")
            )));
        }
        if mount.source().is_none() {
            mount.set_source(Some(kind.into()));
        }
    }
    Ok(has_volumes)
}

/// Where it can, the container sees what tells its guest from others, see [`identity`].
fn show_identity(spec: &mut Spec) -> Result<()> {
    let Some(mounts) = spec.mounts_mut() else { return Ok(()) };
    let shown = identity::shown(mounts)?;
    mounts.extend(shown);
    Ok(())
}

/// Makes `rootfsPropagation` one that libcontainer knows. Engines say `rslave` and the like; of one mount both mean the same, and
/// what is mounted below the root has its own.
fn own_propagation(linux: &mut Linux) {
    let Some(propagation) = linux.rootfs_propagation().as_deref() else { return };
    let known = match propagation.strip_prefix('r') {
        Some(plain @ ("shared" | "slave" | "private" | "unbindable")) => Some(plain.to_owned()),
        _ => Some(propagation.to_owned()).filter(|propagation| !propagation.is_empty()),
    };
    linux.set_rootfs_propagation(known);
}

/// The cgroup below the hierarchy's root: the spec's path as it stands (`slice:prefix:name`
/// becomes one directory of that name: there is no systemd here), or `/spore/ID`.
fn cgroup_path(id: &str, path: Option<&Path>) -> Result<PathBuf> {
    let mut cgroup = PathBuf::from("/");
    for component in path.unwrap_or(Path::new("")).components() {
        match component {
            Component::Normal(name) => cgroup.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                let path = path.unwrap_or(Path::new("")).display();
                return Err(invalid(format!(
                    "config.json: linux.cgroupsPath \"{path}\" must not contain \"..\""
                )));
            }
        }
    }
    if cgroup == Path::new("/") {
        cgroup = Path::new("/spore").join(id);
    }
    Ok(cgroup)
}

/// Adds HOME when the process has none, from the text of the container's own `/etc/passwd`.
///
/// Done before libcontainer would do it by the C library, which in a static binary loads name
/// service modules from the container's image.
pub fn add_home(process: &mut Process, passwd: impl FnOnce() -> String) {
    let mut environment = process.env().clone().unwrap_or_default();
    if environment.iter().all(|entry| !entry.starts_with("HOME=")) {
        let home = home_of(&passwd(), process.user().uid()).unwrap_or_else(|| "/".into());
        environment.push(format!("HOME={home}"));
        process.set_env(Some(environment));
    }
}

/// The home directory of a user in the text of a passwd file.
fn home_of(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let id = fields.nth(2)?.parse::<u32>().ok()?;
        let home = fields.nth(2)?;
        (id == uid && !home.is_empty()).then(|| home.to_owned())
    })
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
