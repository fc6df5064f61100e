//! AppArmor profiles and SELinux labels. They confine processes of the host's kernel by its policy; a guest's kernel has neither, and
//! what the host has of a container is its virtual machine.
//!
//! Engines put their own defaults into every spec where the host has them, so these pass, and a warning says that they have no effect.
//! A profile that somebody asked for by name is refused: it would be a promise that nobody keeps.

use std::path::Path;

use oci_spec::runtime::Spec;
use serde::Deserialize;

use super::BundleError;

/// What says that there is none.
const NONE: [&str; 2] = ["", "unconfined"];
/// Of Docker, containerd's CRI plugin, nerdctl.
const DEFAULTS: [&str; 3] = ["docker-default", "cri-containerd.apparmor.d", "nerdctl-default"];
const MEND: &str = "run it without, or with apparmor=unconfined";

/// What of a process's JSON is looked at here.
#[derive(Deserialize)]
struct Confined {
    #[serde(default, rename = "apparmorProfile")]
    profile: Option<String>,
    #[serde(default, rename = "selinuxLabel")]
    label: Option<String>,
}

fn is_somebodys(profile: &str) -> bool {
    !NONE.contains(&profile) && !DEFAULTS.contains(&profile)
}

fn unknown(profile: &str) -> String {
    format!("the AppArmor profile \"{profile}\" is the host's, and the kernel of a virtual machine has none")
}

pub(super) fn check(path: &Path, spec: &Spec) -> Result<(), BundleError> {
    let profile = spec.process().as_ref().and_then(|process| process.apparmor_profile().as_deref());
    match profile.filter(|profile| is_somebodys(profile)) {
        Some(profile) => {
            Err(BundleError::Invalid { path: path.into(), what: unknown(profile), mend: MEND.into() })
        }
        None => Ok(()),
    }
}

/// The same of a further process's JSON; what else is wrong with that the agent tells. What of it has no effect, for the log.
pub(crate) fn check_exec(process: &[u8]) -> Result<Vec<String>, String> {
    let Ok(Confined { profile, label }) = serde_json::from_slice(process) else { return Ok(Vec::new()) };
    match profile.as_deref().filter(|profile| is_somebodys(profile)) {
        Some(profile) => Err(format!("exec: {}; {MEND}", unknown(profile))),
        None => Ok(set(of_process(profile.as_deref(), label.as_deref()))),
    }
}

/// What of a spec has no effect, for the log.
pub(super) fn unheeded(spec: &Spec) -> Vec<String> {
    let process = spec.process().as_ref();
    let of_process = of_process(
        process.and_then(|process| process.apparmor_profile().as_deref()),
        process.and_then(|process| process.selinux_label().as_deref()),
    );
    let label = spec.linux().as_ref().and_then(|linux| linux.mount_label().as_deref());
    set(of_process.into_iter().chain([("linux.mountLabel", label)]))
}

fn of_process<'a>(profile: Option<&'a str>, label: Option<&'a str>) -> [(&'static str, Option<&'a str>); 2] {
    let profile = profile.filter(|profile| !NONE.contains(profile));
    [("process.apparmorProfile", profile), ("process.selinuxLabel", label)]
}

/// Those fields that somebody has set.
fn set<'a>(fields: impl IntoIterator<Item = (&'static str, Option<&'a str>)>) -> Vec<String> {
    let set = fields.into_iter().filter_map(|(name, value)| Some((name, value?)));
    set.filter(|(_, value)| !value.is_empty()).map(|(name, value)| format!("{name} \"{value}\"")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(process: &Value, linux: &Value) -> Spec {
        let mut whole = json!({
            "ociVersion": "1.0.2",
            "root": { "path": "rootfs" },
            "process": { "args": ["sh"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
            "linux": linux
        });
        for (name, value) in process.as_object().unwrap() {
            whole["process"][name] = value.clone();
        }
        serde_json::from_value(whole).unwrap()
    }

    #[test]
    fn the_engines_own_profiles_pass_and_are_told_of() {
        for profile in DEFAULTS {
            let spec = spec(&json!({ "apparmorProfile": profile }), &json!({}));
            check(Path::new("/b"), &spec).unwrap();
            assert_eq!(unheeded(&spec), [format!("process.apparmorProfile \"{profile}\"")]);
            let exec = format!("{{\"apparmorProfile\":\"{profile}\"}}");
            assert_eq!(
                check_exec(exec.as_bytes()).unwrap(),
                [format!("process.apparmorProfile \"{profile}\"")]
            );
        }
        for profile in NONE {
            let spec = spec(&json!({ "apparmorProfile": profile }), &json!({}));
            check(Path::new("/b"), &spec).unwrap();
            assert!(unheeded(&spec).is_empty());
        }
        assert!(unheeded(&spec(&json!({}), &json!({}))).is_empty());
    }

    #[test]
    fn a_profile_that_somebody_named_is_refused() {
        let spec = spec(&json!({ "apparmorProfile": "acme" }), &json!({}));
        let refused = check(Path::new("/b/config.json"), &spec).unwrap_err().to_string();
        assert!(refused.contains("/b/config.json: the AppArmor profile \"acme\" is the host's"), "{refused}");
        assert!(refused.contains("apparmor=unconfined"), "{refused}");
        let refused = check_exec(b"{\"args\":[\"sh\"],\"apparmorProfile\":\"acme\"}").unwrap_err();
        assert!(refused.contains("\"acme\""), "{refused}");
        assert_eq!(check_exec(b"{}").unwrap(), [""; 0]);
        assert_eq!(check_exec(b"{").unwrap(), [""; 0]);
    }

    #[test]
    fn labels_of_selinux_pass_and_are_told_of() {
        let label = "system_u:system_r:container_t:s0:c1,c2";
        let spec = spec(&json!({ "selinuxLabel": label }), &json!({ "mountLabel": "x" }));
        check(Path::new("/b"), &spec).unwrap();
        assert_eq!(
            unheeded(&spec),
            [format!("process.selinuxLabel \"{label}\""), "linux.mountLabel \"x\"".to_owned()]
        );
        let exec = format!("{{\"selinuxLabel\":\"{label}\"}}");
        assert_eq!(check_exec(exec.as_bytes()).unwrap(), [format!("process.selinuxLabel \"{label}\"")]);
    }
}
