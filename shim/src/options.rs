//! Runtime options that clients send with Create. Nothing in them changes what a virtual machine does yet.

use containerd_shim_protos::shim::oci;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use slog::{Logger, warn};

use crate::error::Error;

/// Decodes options of the types that clients send for any runtime (`ctr --runtime …`, CRI's and nerdctl's); others are
/// somebody else's, and ignored.
pub(crate) fn check(options: &Any, log: &Logger) -> Result<(), Error> {
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    let decoded = match name {
        "containerd.runc.v1.Options" => oci::Options::parse_from_bytes(&options.value).map(drop),
        // Which names a file of a configuration that Spore does not have.
        "runtimeoptions.v1.Options" => Empty::parse_from_bytes(&options.value).map(drop),
        "" => Ok(()),
        other => {
            warn!(log, "runtime options of an unknown type are ignored"; "type" => other);
            Ok(())
        }
    };
    decoded
        .map_err(|error| Error::Invalid(format!("create task: runtime options {name}: malformed: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_known_types_are_decoded_and_others_are_somebody_elses() {
        let log = Logger::root(slog::Discard, slog::o!());
        let checked = |name: &str, value: &[u8]| {
            check(&Any { type_url: name.into(), value: value.into(), ..Any::default() }, &log)
        };
        let runc = oci::Options { no_pivot_root: true, ..oci::Options::default() }.write_to_bytes().unwrap();
        checked("containerd.runc.v1.Options", &runc).unwrap();
        checked("types.containerd.io/runtimeoptions.v1.Options", b"\x12\x02/x").unwrap();
        checked("", b"").unwrap();
        checked("another.Options", b"\xff").unwrap();
        for name in ["containerd.runc.v1.Options", "runtimeoptions.v1.Options"] {
            let message = checked(name, b"\x12\x7f").unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("malformed"), "{message}");
        }
    }
}
