//! Lets sockets of containers that turn to the name server's address and port reach the port on which
//! the agent listens, as dockerd does with rules of the firewall on the host: port 53 stays free for
//! a name server of the container's own, on whatever address.
//!
//! By programs on the root of the cgroups, which change a port before a socket connects or sends, and
//! change it back in the source of what is received (`struct bpf_sock_addr` of include/uapi/linux/bpf.h).

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use spore_agent_api::network::{DOMAIN, NAME_SERVER};

use crate::bpf::{self, EXIT, Hook, Instruction, JUMP_UNEQUAL, LOAD_WORD, MOVE, STORE_WORD, instruction};

/// Programs in their places, until it is dropped.
#[derive(Debug)]
pub struct Steering {
    _links: Vec<OwnedFd>,
}

/// Steers the sockets of `cgroup`, a directory, to `port`.
pub fn to(port: u16, cgroup: &Path) -> io::Result<Steering> {
    let directory = File::open(cgroup)?;
    let (there, back) = (program(DOMAIN, port), program(port, DOMAIN));
    let hooks = [(Hook::Connect4, &there), (Hook::SendTo4, &there), (Hook::Received4, &back)];
    let link =
        |(hook, program): (Hook, &Vec<Instruction>)| bpf::link(hook, &bpf::load(hook, program)?, &directory);
    Ok(Steering { _links: hooks.into_iter().map(link).collect::<io::Result<_>>()? })
}

/// Puts `to` in the place of port `from` of the name server's address.
fn program(from: u16, to: u16) -> Vec<Instruction> {
    const ADDRESS: i16 = 4;
    const PORT: i16 = 24;
    // Both as the kernel has them, in network order.
    let address = i32::from_ne_bytes(NAME_SERVER.octets());
    let port = |port: u16| i32::from(port.to_be());
    vec![
        instruction(LOAD_WORD, 2, 1, ADDRESS, 0),
        instruction(JUMP_UNEQUAL, 2, 0, 4, address),
        instruction(LOAD_WORD, 2, 1, PORT, 0),
        instruction(JUMP_UNEQUAL, 2, 0, 2, port(from)),
        instruction(MOVE, 2, 0, 0, port(to)),
        instruction(STORE_WORD, 1, 2, PORT, 0),
        // Everything is allowed.
        instruction(MOVE, 0, 0, 0, 1),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}
