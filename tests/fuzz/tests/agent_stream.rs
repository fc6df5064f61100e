//! Hostile openings of a stdio stream: whatever bytes arrive, the parser answers with a
//! hello or a typed error, and never asks for more than two ids' worth of bytes.

use proptest::prelude::*;
use spore_agent_api::stream::{HEADER_LEN, Hello, Kind, MAX_ID};

/// Headers that are often nearly right, so that the checks behind the magic are reached.
fn header() -> impl Strategy<Value = [u8; HEADER_LEN]> {
    let magic = prop_oneof![4 => Just(*b"SPIO"), 1 => any::<[u8; 4]>()];
    let version = prop_oneof![4 => Just(1u8), 1 => any::<u8>()];
    let length = prop_oneof![4 => 0u16..=160, 1 => any::<u16>()];
    (magic, version, 0u8..5, length.clone(), length).prop_map(|(magic, version, kind, id, exec)| {
        let mut out = [0; HEADER_LEN];
        out[..4].copy_from_slice(&magic);
        out[4] = version;
        out[5] = kind;
        out[6..8].copy_from_slice(&id.to_le_bytes());
        out[8..].copy_from_slice(&exec.to_le_bytes());
        out
    })
}

proptest! {
    #[test]
    fn a_header_never_asks_for_more_than_two_ids(header in header()) {
        if let Ok(length) = Hello::body_len(&header) {
            prop_assert!(length <= 2 * MAX_ID);
        }
    }

    #[test]
    fn arbitrary_bytes_decode_or_fail_typed(header in header(), body in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(hello) = Hello::decode(&header, &body) {
            let mut wire = header.to_vec();
            wire.extend_from_slice(&body);
            prop_assert_eq!(hello.encode().unwrap(), wire, "what decodes is exactly what encodes");
        }
    }

    #[test]
    fn every_valid_hello_round_trips(id in "[ -~]{0,128}", exec in "[ -~]{0,128}", kind in 0u8..3) {
        let hello = Hello { kind: Kind::try_from(kind).unwrap(), id, exec_id: exec };
        let wire = hello.encode().unwrap();
        let header = wire[..HEADER_LEN].try_into().unwrap();
        prop_assert_eq!(Hello::decode(header, &wire[HEADER_LEN..]).unwrap(), hello);
    }
}
