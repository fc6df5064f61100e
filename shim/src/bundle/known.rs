//! Capabilities that no kernel has, or none that Spore knows. runc passes them over with a warning; so a client whose host has newer ones
//! than its containers' kernel gets what there is.

use oci_spec::runtime::Capability;
use serde_json::Value;

/// Takes them out of an OCI process object; their names.
pub(super) fn keep_known(process: &mut Value) -> Vec<String> {
    let sets = process.get_mut("capabilities").and_then(Value::as_object_mut);
    let mut unknown = Vec::new();
    for set in sets.into_iter().flat_map(|sets| sets.values_mut()).filter_map(Value::as_array_mut) {
        set.retain(|name| {
            let Some(text) = name.as_str() else { return true };
            let is_known = serde_json::from_value::<Capability>(name.clone()).is_ok();
            if !is_known && !unknown.iter().any(|known: &String| known == text) {
                unknown.push(text.to_owned());
            }
            is_known
        });
    }
    unknown
}

/// The same of a further process's JSON. What is malformed stays: the agent says what is wrong.
pub(crate) fn known_only(process: Vec<u8>) -> Vec<u8> {
    let Ok(mut value) = serde_json::from_slice::<Value>(&process) else { return process };
    if keep_known(&mut value).is_empty() { process } else { value.to_string().into_bytes() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_unknown_is_told_once_and_the_rest_stays() {
        let mut process = json!({ "args": ["sh"], "capabilities": {
            "bounding": ["CAP_KILL", "CAP_NOBODY_HAS"], "effective": ["CAP_NOBODY_HAS"], "ambient": []
        } });
        let bytes = process.to_string().into_bytes();
        assert_eq!(keep_known(&mut process), ["CAP_NOBODY_HAS"]);
        let kept = json!({ "bounding": ["CAP_KILL"], "effective": [], "ambient": [] });
        assert_eq!(process["capabilities"], kept);
        assert_eq!(serde_json::from_slice::<Value>(&known_only(bytes)).unwrap(), process);
    }

    #[test]
    fn what_is_something_else_is_left_alone() {
        for text in ["{", "{\"capabilities\":7}", "{ \"capabilities\": {\"bounding\":[1, \"CAP_KILL\"]}}"] {
            assert_eq!(known_only(text.into()), text.as_bytes());
        }
    }
}
