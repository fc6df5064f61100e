//! What an Update may not contain.

use spore_agent_api::network::{MAX_ADDRESSES, MAX_ROUTES};
use spore_agent_api::v1::network as pb;

use crate::error::AgentError;
use crate::network::decode;

fn interface() -> pb::Interface {
    pb::Interface { name: "eth0".into(), mac: vec![2, 0, 0, 0, 0, 1], mtu: 1500, ..Default::default() }
}

fn route() -> pb::Route {
    let hop = pb::NextHop { slot: Some(0), gateway: vec![10, 1, 1, 1], ..Default::default() };
    pb::Route {
        family: pb::Family::FAMILY_IPV4.into(),
        table: 254,
        type_: 1,
        next_hops: vec![hop],
        ..Default::default()
    }
}

fn update(interface: pb::Interface, routes: Vec<pb::Route>) -> Result<(), String> {
    let request = pb::NetworkRequest { interfaces: vec![interface], routes, ..Default::default() };
    match decode::config(request) {
        Ok(_) => Ok(()),
        Err(AgentError::InvalidArgument(message)) => Err(message),
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn a_plain_request_passes() {
    update(interface(), vec![route()]).unwrap();
}

#[test]
fn interfaces_that_cannot_be_are_named() {
    let refused = |change: &dyn Fn(&mut pb::Interface)| {
        let mut wanted = interface();
        change(&mut wanted);
        update(wanted, Vec::new()).unwrap_err()
    };
    let address = |bytes: Vec<u8>, prefix| pb::Address { address: bytes, prefix, ..Default::default() };
    for (message, needle) in [
        (refused(&|i| i.name = "../x".into()), "takes no such name"),
        (refused(&|i| i.name = "x".repeat(16)), "takes no such name"),
        (refused(&|i| i.slot = 4), "slot 4, allowed is 0 to 3"),
        (refused(&|i| i.mac = vec![1, 0, 0, 0, 0, 1]), "a group's"),
        (refused(&|i| i.mac.truncate(5)), "5 bytes, six are needed"),
        (refused(&|i| i.addresses = vec![address(vec![1; 5], 8)]), "5 bytes, 4 or 16"),
        (refused(&|i| i.addresses = vec![address(vec![1; 4], 33)]), "33 bits, at most 32"),
        (refused(&|i| i.addresses = vec![address(vec![1; 4], 8); MAX_ADDRESSES + 1]), "at most 256"),
        (refused(&|i| drop(i.sysctls.insert("ipv4/../x".into(), "1".into()))), "not allowed"),
        (refused(&|i| drop(i.sysctls.insert("ipv6/accept_ra".into(), "a\n".into()))), "not allowed"),
        (
            refused(&|i| i.neighbours = vec![pb::Neighbour { address: vec![1; 4], ..Default::default() }]),
            "proxy",
        ),
    ] {
        assert!(message.contains(needle), "{needle}: {message}");
    }
}

#[test]
fn routes_that_cannot_be_are_refused() {
    let refused = |change: &dyn Fn(&mut pb::Route)| {
        let mut wanted = route();
        change(&mut wanted);
        update(interface(), vec![wanted]).unwrap_err()
    };
    for (message, needle) in [
        (refused(&|r| r.next_hops[0].slot = Some(2)), "no interface in slot 2"),
        (refused(&|r| r.family = Default::default()), "no known family"),
        (refused(&|r| r.destination_prefix = 8), "do not fit"),
        (refused(&|r| (r.destination, r.destination_prefix) = (vec![0; 16], 8)), "do not fit"),
        (refused(&|r| r.type_ = 256), "type 256 is out of range"),
        (refused(&|r| r.preferred_source = vec![0; 16]), "another family"),
    ] {
        assert!(message.contains(needle), "{needle}: {message}");
    }
    assert!(update(interface(), vec![route(); MAX_ROUTES + 1]).unwrap_err().contains("at most 4096"));
}

#[test]
fn a_slot_or_name_is_there_once() {
    let twice = pb::NetworkRequest { interfaces: vec![interface(); 2], ..Default::default() };
    assert!(decode::config(twice).unwrap_err().to_string().contains("there twice"));
}
