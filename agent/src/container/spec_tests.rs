use serde_json::{Value, json};

use super::*;

fn config() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": { "terminal": false, "user": { "uid": 5, "gid": 6 }, "args": ["sh"], "cwd": "/",
                     "env": ["PATH=/bin"], "apparmorProfile": "docker-default" },
        "root": { "path": "rootfs", "readonly": true },
        "mounts": [ { "destination": "/proc", "type": "proc", "source": "proc" },
                    { "destination": "/run", "type": "tmpfs", "options": ["nosuid"] } ],
        "linux": { "namespaces": [ { "type": "pid" }, { "type": "mount" }, { "type": "network" } ],
                   "cgroupsPath": "system.slice:docker:abc" }
    })
}

fn run(config: &Value) -> Result<Prepared> {
    prepare("abc", &serde_json::to_vec(config).unwrap(), Path::new("/run/spore/bundles/abc/rootfs"))
}

fn refusal(config: &Value) -> String {
    match run(config).unwrap_err() {
        AgentError::InvalidArgument(message) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_spec_is_made_the_guests() {
    let prepared = run(&config()).unwrap();
    let root = prepared.spec.root().as_ref().unwrap();
    assert_eq!(root.path(), Path::new("/run/spore/bundles/abc/rootfs"));
    assert_eq!(root.readonly(), Some(true));
    let process = prepared.spec.process().as_ref().unwrap();
    assert_eq!(process.apparmor_profile(), &None);
    assert_eq!(process.env().as_ref().unwrap(), &["PATH=/bin"]);
    assert_eq!(prepared.cgroup, Path::new("/system.slice:docker:abc"));
    assert_eq!(prepared.spec.linux().as_ref().unwrap().cgroups_path().as_ref(), Some(&prepared.cgroup));
    assert!(prepared.own_pid_namespace && !prepared.terminal);
    assert_eq!(prepared.uid, 5);
    // libcontainer insists on a source.
    let mounts = prepared.spec.mounts().as_ref().unwrap();
    assert_eq!(mounts[1].source().as_deref(), Some(Path::new("tmpfs")));
}

#[test]
fn a_container_joins_the_network_that_the_others_are_in() {
    let network = |prepared: &Prepared| {
        let linux = prepared.spec.linux().as_ref().unwrap();
        let namespaces = linux.namespaces().as_ref().unwrap();
        let found = namespaces.iter().find(|one| one.typ() == LinuxNamespaceType::Network).unwrap();
        found.path().clone()
    };
    let mut config = config();
    config["linux"]["sysctl"] = json!({ "net.ipv4.ping_group_range": "0 5" });
    let prepared = run(&config).unwrap();
    assert_eq!(network(&prepared).as_deref(), Some(Path::new("/run/spore/netns")));
    assert!(!prepared.own_network_namespace);
    assert!(prepared.spec.linux().as_ref().unwrap().sysctl().is_some());
    // In a user namespace it has to have its own.
    config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    let prepared = run(&config).unwrap();
    assert!(prepared.own_network_namespace && network(&prepared).is_none());
}

#[test]
fn a_missing_cgroup_path_becomes_one_per_container() {
    let mut config = config();
    config["linux"].as_object_mut().unwrap().remove("cgroupsPath");
    assert_eq!(run(&config).unwrap().cgroup, Path::new("/spore/abc"));
    config["linux"]["cgroupsPath"] = json!("/default/abc");
    assert_eq!(run(&config).unwrap().cgroup, Path::new("/default/abc"));
    config["linux"]["cgroupsPath"] = json!("/../../x");
    assert!(refusal(&config).contains("must not contain \"..\""));
}

#[test]
fn volumes_are_let_in_and_other_bind_mounts_and_unknown_types_refused_by_name() {
    let mut config = config();
    assert!(!run(&config).unwrap().has_volumes);
    config["mounts"][1] = json!({ "destination": "/data", "type": "bind", "source": "/run/spore/volumes/3",
                                  "options": ["rbind", "ro"] });
    assert!(run(&config).unwrap().has_volumes);
    config["mounts"][1] =
        json!({ "destination": "/data", "type": "bind", "source": "/srv", "options": ["rbind"] });
    let message = refusal(&config);
    assert!(message.contains("\"/srv\" at \"/data\": a guest has none"), "{message}");
    config["mounts"][1] = json!({ "destination": "/data", "type": "zfs", "source": "tank" });
    let message = refusal(&config);
    assert!(message.contains("mount at \"/data\": unknown type \"zfs\"; allowed are proc"), "{message}");
}

#[test]
fn every_type_of_the_common_list_is_accepted() {
    let mut config = config();
    let mounts = MOUNT_TYPES.map(|kind| json!({ "destination": format!("/m/{kind}"), "type": kind }));
    config["mounts"] = json!(mounts);
    assert_eq!(run(&config).unwrap().spec.mounts().as_ref().unwrap().len(), MOUNT_TYPES.len());
    config["mounts"][0]["type"] = json!("devtmpfs");
    assert!(refusal(&config).contains("unknown type \"devtmpfs\""));
}

#[test]
fn paths_and_hooks_of_the_host_are_refused() {
    let mut bad = config();
    bad["linux"]["namespaces"][2]["path"] = json!("/var/run/netns/cni");
    assert!(refusal(&bad).contains("/var/run/netns/cni"));
    let mut bad = config();
    bad["hooks"] = json!({ "prestart": [ { "path": "/usr/bin/nerdctl" } ] });
    assert!(refusal(&bad).contains("hooks.prestart"));
    let mut good = config();
    good["hooks"] = json!({ "prestart": [], "startContainer": [ { "path": "/bin/hook" } ] });
    assert!(run(&good).unwrap().spec.hooks().is_some());
    good["hooks"] = json!({});
    assert!(run(&good).unwrap().spec.hooks().is_none());
}

#[test]
fn incomplete_specs_say_what_is_missing() {
    assert!(prepare("x", b"{", Path::new("/r")).unwrap_err().to_string().contains("malformed"));
    let mut bad = config();
    bad.as_object_mut().unwrap().remove("process");
    assert_eq!(refusal(&bad), "config.json: has no process");
    let mut bad = config();
    bad["process"]["args"] = json!([]);
    assert!(refusal(&bad).contains("process.args is empty"));
    let mut bad = config();
    bad["linux"]["namespaces"] = json!([{ "type": "pid" }]);
    assert!(refusal(&bad).contains("mount namespace is required"));
    let huge = vec![b' '; MAX_SPEC + 1];
    assert!(prepare("x", &huge, Path::new("/r")).unwrap_err().to_string().contains("at most"));
}

#[test]
fn home_comes_from_the_containers_passwd() {
    let passwd = "root:x:0:0:root:/root:/bin/sh\nbad\nweb:x:5:6:www:/var/www:/bin/false\n";
    let mut prepared = run(&config()).unwrap();
    let process = prepared.spec.process_mut().as_mut().unwrap();
    add_home(process, || passwd.into());
    add_home(process, String::new);
    assert_eq!(process.env().as_ref().unwrap(), &["PATH=/bin", "HOME=/var/www"]);
    assert_eq!(home_of(passwd, 77), None);
}

#[test]
fn the_boot_id_is_the_sandboxs_wherever_there_is_a_proc() {
    let of = |config: &Value| {
        let prepared = run(config).unwrap();
        prepared
            .spec
            .mounts()
            .clone()
            .unwrap()
            .into_iter()
            .find(|mount| mount.destination().ends_with("boot_id"))
    };
    let mount = of(&config()).unwrap();
    assert_eq!(mount.source().as_deref(), Some(Path::new("/run/spore/boot-id")));
    assert!(mount.options().as_ref().unwrap().contains(&"ro".to_owned()));
    let mut without = config();
    without["mounts"] = json!([]);
    assert!(of(&without).is_none());
}

#[test]
fn the_roots_propagation_is_said_as_libcontainer_knows_it() {
    let of = |propagation: &str| {
        let mut config = config();
        config["linux"]["rootfsPropagation"] = json!(propagation);
        let prepared = run(&config).unwrap();
        prepared.spec.linux().as_ref().unwrap().rootfs_propagation().clone()
    };
    for (said, known) in [("rslave", "slave"), ("rshared", "shared"), ("private", "private"), ("odd", "odd")]
    {
        assert_eq!(of(said).as_deref(), Some(known));
    }
    assert_eq!(of(""), None);
}
