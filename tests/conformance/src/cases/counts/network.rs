//! Containers with an interface, many and again.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use serde_json::{Value, json};
use spore_harness::bed::Subject;
use spore_harness::network::cni::Network;

use super::{at_rest, count, repeated, tell, timed};
use crate::cases::Case;
use crate::guest::Guest;
use crate::lan::{Lan, Place, in_lan};

pub(crate) const CASES: &[Case] = &[
    Case::new("counts: create and delete with an interface, again and again", cycles).alone().starts(8),
    Case::new("counts: containers with an interface at once", at_once).alone().starts(4),
];

const NUMBER: u8 = 40;
/// Clients at a time.
const CLIENTS: usize = 4;

/// A container that has reached the bridge, with its place and what CNI told.
fn connected(lan: &Lan, network: &Network) -> Result<(Arc<Place>, Value, Guest)> {
    let place = lan.place()?;
    let result = network.add(&lan.attachment(&place, "eth0", Value::Null))?;
    let guest = lan.guest_with(
        &place,
        &["--memory-limit", "67108864"],
        &["sh", "-c", &format!("ping -c 1 10.{NUMBER}.0.1 && {}", crate::lan::READY)],
    )?;
    Ok((place, result, guest))
}

/// The container ends, and its place is as before; then CNI takes the interface away.
fn disconnect(
    lan: &Lan,
    network: &Network,
    (place, result, guest): (Arc<Place>, Value, Guest),
) -> Result<()> {
    guest.end()?;
    lan.give_up(&place)?;
    network.del(&lan.attachment(&place, "eth0", Value::Null), &result)
}

/// A bridge whose plugins leave no more than the bridge.
fn network(lan: &Lan) -> Network {
    let mut network = lan.bridge(NUMBER);
    network.plugins.push(json!({ "type": "loopback" }));
    network
}

fn cycles(subject: &Subject) -> Result<()> {
    subject.warm_up()?;
    in_lan(subject, |lan| {
        let network = network(lan);
        let one = || disconnect(lan, &network, connected(lan, &network)?);
        // The first makes the bridge.
        one()?;
        let before = subject.inventory()?;
        let seconds = repeated(count(subject, 4, 200), 2, |_| timed(one))?;
        subject.nothing_beyond(&before)?;
        tell(subject, "containers with an interface created, used and deleted, two at a time", &seconds, "")
    })
}

fn at_once(subject: &Subject) -> Result<()> {
    subject.warm_up()?;
    in_lan(subject, |lan| {
        let network = network(lan);
        disconnect(lan, &network, connected(lan, &network)?)?;
        let before = subject.inventory()?;
        let alive = Mutex::new(Vec::new());
        let start = || {
            let one = connected(lan, &network)?;
            alive.lock().unwrap_or_else(PoisonError::into_inner).push(one);
            Ok(())
        };
        let seconds = repeated(count(subject, 4, 50), CLIENTS, |_| timed(start))?;
        let alive = alive.into_inner().unwrap_or_else(PoisonError::into_inner);
        for (_, _, guest) in &alive {
            // While all the others are there too.
            guest.shell(&format!("ping -c 1 10.{NUMBER}.0.1"))?;
        }
        let rest = at_rest(subject)?;
        alive.into_iter().try_for_each(|one| disconnect(lan, &network, one))?;
        subject.nothing_beyond(&before)?;
        tell(subject, "containers with an interface alive at once, four started at a time", &seconds, &rest)
    })
}
