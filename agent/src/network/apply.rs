//! Makes the network what a [`Config`] says. The order is the kernel's: rules and routes go before
//! what they rest on, interfaces have their addresses before they are up, routes to gateways come
//! after those that lead to the gateways.

use std::collections::HashMap;
use std::fs::File;

use rtnetlink::packet_route::AddressFamily;

use super::config::{Address, Config, Interface, Route};
use super::link::{self, Nic, Recognise};
use super::netlink::{Netlink, Refusal};
use super::{address, route, rule};

/// What the last update has made, as far as it got.
#[derive(Debug, Default)]
pub struct Applied {
    config: Config,
    /// Nothing was refused, so what is in `config` need not be looked at again.
    complete: bool,
}

/// Where an update works. The calling thread is in the containers' namespace.
pub struct Place {
    /// Sockets of the agent's own namespace, where spare NICs wait, and of the containers'.
    pub own: Netlink,
    pub inside: Netlink,
    pub own_namespace: File,
    pub inside_namespace: File,
    pub recognise: Recognise,
}

/// Changes what differs from the last update; returns what could not be done.
pub async fn update(place: &Place, applied: &mut Applied, wanted: Config) -> Vec<String> {
    // Until it is done, whatever becomes of it.
    let trusted = std::mem::take(&mut applied.complete);
    let mut update =
        Update { place, before: &applied.config, trusted, indices: HashMap::new(), problems: Vec::new() };
    update.remove_rules_and_routes(&wanted).await;
    let changed = update.interfaces(&wanted).await;
    update.add_routes_and_rules(&wanted, changed).await;
    let problems = update.problems;
    *applied = Applied { config: wanted, complete: problems.is_empty() };
    problems
}

struct Update<'a> {
    place: &'a Place,
    before: &'a Config,
    trusted: bool,
    /// Of the interfaces that are in place, by slot.
    indices: HashMap<u8, u32>,
    problems: Vec<String>,
}

impl Update<'_> {
    fn note(&mut self, what: impl std::fmt::Display, result: Result<(), Refusal>) {
        if let Err(refusal) = result {
            self.problems.push(format!("{what}: {refusal}"));
        }
    }

    async fn list(&mut self, netlink: &Netlink) -> Vec<Nic> {
        link::list(netlink, self.place.recognise).await.unwrap_or_else(|refusal| {
            self.problems.push(format!("network interfaces: list: {refusal}"));
            Vec::new()
        })
    }

    async fn remove_rules_and_routes(&mut self, wanted: &Config) {
        for unwanted in self.before.rules.iter().filter(|rule| !wanted.rules.contains(rule)) {
            let removed = rule::remove(&self.place.inside, unwanted).await;
            self.note(format_args!("policy rule {}: remove", unwanted.priority), removed);
        }
        let inside = self.list(&self.place.inside).await;
        let index = |slot: u8| inside.iter().find(|nic| nic.slot == slot).map(|nic| nic.index);
        let ordered = route::in_order(&self.before.routes);
        for unwanted in ordered.into_iter().rev().filter(|route| !wanted.routes.contains(route)) {
            let removed = route::remove(&self.place.inside, unwanted, &index).await;
            self.note(format_args!("route {unwanted}: remove"), removed);
        }
    }

    /// Whether something has changed on which routes rest.
    async fn interfaces(&mut self, wanted: &Config) -> bool {
        let mut inside = self.list(&self.place.inside).await;
        let mut changed = !self.trusted;
        let unwanted = |nic: &Nic| wanted.interfaces.iter().all(|interface| interface.slot != nic.slot);
        for nic in inside.extract_if(.., |nic| unwanted(nic)) {
            let name = link::spare_name(nic.slot);
            let moved = link::move_to(&self.place.inside, &nic, &self.place.own_namespace, &name).await;
            self.note(format_args!("interface {}: take away", nic.name), moved);
            changed = true;
        }
        for nic in &mut inside {
            let mut others = wanted.interfaces.iter().filter(|interface| interface.slot != nic.slot);
            if others.any(|interface| interface.name == nic.name) {
                let set_aside = link::set_aside(&self.place.inside, nic).await;
                self.note(format_args!("interface {}: set aside", nic.name), set_aside);
                nic.name = link::spare_name(nic.slot);
                changed = true;
            }
        }
        let spare = match wanted.interfaces.len() > inside.len() {
            true => self.list(&self.place.own).await,
            false => Vec::new(),
        };
        for interface in &wanted.interfaces {
            let there = inside.iter().find(|nic| nic.slot == interface.slot);
            let before = self.before.interfaces.iter().find(|before| before.slot == interface.slot);
            if let (Some(nic), true) = (there, self.trusted && before == Some(interface)) {
                self.indices.insert(interface.slot, nic.index);
                continue;
            }
            changed = true;
            let nic = match there {
                Some(nic) => Some(nic.clone()),
                None => self.bring_in(interface, &spare).await,
            };
            if let Some(nic) = nic {
                let before = there.and(before);
                self.configure(interface, before, &nic).await;
            }
        }
        changed
    }

    async fn bring_in(&mut self, interface: &Interface, spare: &[Nic]) -> Option<Nic> {
        let (name, slot) = (&interface.name, interface.slot);
        let Some(nic) = spare.iter().find(|nic| nic.slot == slot) else {
            self.problems.push(format!(
                "interface {name}: the machine shows no NIC for slot {slot}; is virtio_net in the guest image?"
            ));
            return None;
        };
        let spare_name = link::spare_name(slot);
        let moved = link::move_to(&self.place.own, nic, &self.place.inside_namespace, &spare_name).await;
        if let Err(refusal) = moved {
            self.problems.push(format!("interface {name}: move its NIC to the containers: {refusal}"));
            return None;
        }
        // It may have got another index there.
        let inside = self.list(&self.place.inside).await;
        let nic = inside.into_iter().find(|nic| nic.slot == slot);
        if nic.is_none() {
            self.problems.push(format!("interface {name}: its NIC has vanished"));
        }
        nic
    }

    async fn configure(&mut self, interface: &Interface, before: Option<&Interface>, nic: &Nic) {
        let (name, netlink) = (&interface.name, &self.place.inside);
        if let Err((operation, refusal)) = link::shape(netlink, nic, interface).await {
            self.problems.push(format!("interface {name}: {operation}: {refusal}"));
            return;
        }
        self.indices.insert(interface.slot, nic.index);
        self.problems.extend(link::write_sysctls(interface));
        let gone = before.iter().flat_map(|before| &before.addresses);
        for unwanted in gone.filter(|address| !interface.addresses.contains(address)) {
            let removed = address::remove(netlink, nic.index, unwanted).await;
            self.note(format_args!("interface {name}: address {unwanted}: remove"), removed);
        }
        let gone = before.iter().flat_map(|before| &before.neighbours);
        for unwanted in gone.filter(|neighbour| !interface.neighbours.contains(neighbour)) {
            let removed = address::remove_neighbour(netlink, nic.index, unwanted).await;
            self.note(format_args!("interface {name}: neighbour {}: remove", unwanted.address), removed);
        }
        for wanted in &interface.addresses {
            let added = address::add(netlink, nic.index, wanted).await;
            if added.is_ok() || (is_link_local(wanted) && !has_ipv6()) {
                continue;
            }
            self.note(
                format_args!("interface {name}: address {wanted}{}", lacking(wanted.address.is_ipv6())),
                added,
            );
        }
        if interface.up {
            let up = link::set_up(netlink, nic.index, true).await;
            self.note(format_args!("interface {name}: set up"), up);
        }
        for wanted in &interface.neighbours {
            let added = address::add_neighbour(netlink, nic.index, wanted).await;
            let lacking = lacking(wanted.address.is_ipv6());
            self.note(format_args!("interface {name}: neighbour {}{lacking}", wanted.address), added);
        }
    }

    async fn add_routes_and_rules(&mut self, wanted: &Config, changed: bool) {
        let indices = std::mem::take(&mut self.indices);
        let index = |slot: u8| indices.get(&slot).copied();
        let new = |route: &&Route| changed || !self.before.routes.contains(route);
        let routes: Vec<_> = route::in_order(&wanted.routes).into_iter().filter(new).collect();
        for route in routes {
            let added = route::add(&self.place.inside, route, &index).await;
            let lacking = lacking(route.family == AddressFamily::Inet6);
            self.note(format_args!("route {route}{lacking}"), added);
        }
        for rule in &wanted.rules {
            if !self.trusted || !self.before.rules.contains(rule) {
                let added = rule::add(&self.place.inside, rule).await;
                self.note(format_args!("policy rule {}", rule.priority), added);
            }
        }
    }
}

fn is_link_local(address: &Address) -> bool {
    matches!(address.address, std::net::IpAddr::V6(address) if address.is_unicast_link_local())
}

fn has_ipv6() -> bool {
    std::path::Path::new("/proc/sys/net/ipv6").exists()
}

/// The reason that the kernel does not name.
fn lacking(ipv6: bool) -> &'static str {
    if ipv6 && !has_ipv6() { ": the guest's kernel has no IPv6" } else { "" }
}
