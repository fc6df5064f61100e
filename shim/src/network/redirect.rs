//! tc: all that one link receives is sent by another. An ingress queueing discipline with one
//! filter, u32 without keys, which matches every frame, whose action is mirred's redirect
//! (tc-u32(8), tc-mirred(8)). What is redirected never reaches the host's own network stack, so that
//! does not answer in the guest's place; packet sockets (tcpdump) see it before.

use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Selector, TcU32SelectorFlags,
};

use super::netlink::{Netlink, Refusal};
use super::upstream;

/// `ffff:`, the ingress discipline.
pub(super) const INGRESS_DISCIPLINE: TcHandle = TcHandle { major: 0xffff, minor: 0 };
/// Of filters: the ingress side, of an ingress or a clsact discipline.
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };
const KIND: &str = "ingress";
/// Behind exceptions ([`super::upstream`]).
pub(super) const PRIORITY: u16 = 10;

const ADD_DISCIPLINE: &str = "add an ingress queueing discipline";

/// An operation that failed, and why.
pub(super) type Failure = (&'static str, Refusal);

/// What the host's kernel may lack. Never other than [`Kinds::default`] outside of tests.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kinds {
    pub(super) discipline: &'static str,
    pub(super) filter: &'static str,
    pub(super) action: &'static str,
}

impl Default for Kinds {
    fn default() -> Self {
        Self { discipline: KIND, filter: TcFilterU32::KIND, action: TcActionMirror::KIND }
    }
}

pub(super) fn message(link: u32) -> TcMessage {
    TcMessage::with_index(link.cast_signed())
}

fn discipline(link: u32) -> TcMessage {
    let mut message = message(link);
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = INGRESS_DISCIPLINE;
    message
}

/// Lets link `to` send what link `from` receives. Nothing is left when it fails.
pub(super) async fn make(netlink: &Netlink, from: u32, to: u32, kinds: Kinds) -> Result<(), Failure> {
    let mut wanted = discipline(from);
    wanted.attributes.push(TcAttribute::Kind(kinds.discipline.into()));
    let request = RouteNetlinkMessage::NewQueueDiscipline(wanted);
    let made = netlink.request(request, NLM_F_CREATE | NLM_F_EXCL).await;
    made.map_err(|refusal| (ADD_DISCIPLINE, refusal))?;
    let request = RouteNetlinkMessage::NewTrafficFilter(filter(from, to, kinds));
    let made = netlink.request(request, NLM_F_CREATE | NLM_F_EXCL).await;
    if let Err(refusal) = made {
        let _ = remove(netlink, from).await;
        return Err(("add a redirecting filter", refusal));
    }
    Ok(())
}

fn filter(from: u32, to: u32, kinds: Kinds) -> TcMessage {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    let redirect = mirred_by(kinds.action, to, TcMirrorActionType::EgressRedir);
    let every_protocol = u16::try_from(libc::ETH_P_ALL).unwrap_or_default();
    let options = vec![TcFilterU32Option::Selector(selector), redirect];
    filter_by(kinds.filter, from, PRIORITY, every_protocol, options)
}

/// A u32 filter at the ingress of a link.
pub(super) fn u32_filter(
    link: u32,
    priority: u16,
    ethertype: u16,
    options: Vec<TcFilterU32Option>,
) -> TcMessage {
    filter_by(TcFilterU32::KIND, link, priority, ethertype, options)
}

fn filter_by(
    kind: &str,
    link: u32,
    priority: u16,
    ethertype: u16,
    options: Vec<TcFilterU32Option>,
) -> TcMessage {
    let mut message = message(link);
    message.header.parent = INGRESS_DISCIPLINE;
    message.header.info = TcHandle { major: priority, minor: ethertype.to_be() }.into();
    message.attributes.push(TcAttribute::Kind(kind.into()));
    message.attributes.push(TcAttribute::Options(options.into_iter().map(TcOption::U32).collect()));
    message
}

/// mirred's action: what is redirected is another link's alone, what is mirrored goes on here too.
pub(super) fn mirred(to: u32, what: TcMirrorActionType) -> TcFilterU32Option {
    mirred_by(TcActionMirror::KIND, to, what)
}

fn mirred_by(kind: &str, to: u32, what: TcMirrorActionType) -> TcFilterU32Option {
    let mut generic = TcActionGeneric::default();
    generic.action = match what {
        TcMirrorActionType::EgressRedir => TcActionType::Stolen,
        _ => TcActionType::Ok,
    };
    let mut parameters = TcMirror::default();
    parameters.generic = generic;
    parameters.eaction = what;
    parameters.ifindex = to;
    let mut action = TcAction::default();
    let options = vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(parameters))];
    action.attributes = vec![TcActionAttribute::Kind(kind.into()), TcActionAttribute::Options(options)];
    TcFilterU32Option::Action(vec![action])
}

/// Takes a link's redirect away; a link or redirect that is not there is none the less gone.
pub(super) async fn remove(netlink: &Netlink, from: u32) -> Result<(), Refusal> {
    gone(netlink.request(RouteNetlinkMessage::DelQueueDiscipline(discipline(from)), 0).await)
}

/// What is not there is removed.
pub(super) fn gone(removed: Result<(), Refusal>) -> Result<(), Refusal> {
    match removed {
        Err(Refusal { errno: Errno::ENODEV | Errno::ENOENT | Errno::EINVAL, .. }) => Ok(()),
        other => other,
    }
}

/// Who has a link's ingress side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ingress {
    Free,
    /// Redirects, and nothing but redirects, to these links; 0 where the link has vanished.
    Redirects(Vec<u32>),
    Others,
}

/// Looks at a link's ingress side.
pub(super) async fn examine(netlink: &Netlink, link: u32) -> Result<Ingress, Refusal> {
    let ours = |message: &TcMessage| message.header.index == link.cast_signed();
    let disciplines = netlink.dump(RouteNetlinkMessage::GetQueueDiscipline(message(link))).await?;
    let there = disciplines.iter().any(|found| match found {
        RouteNetlinkMessage::NewQueueDiscipline(found) => {
            ours(found) && found.header.parent == TcHandle::INGRESS
        }
        _ => false,
    });
    if !there {
        return Ok(Ingress::Free);
    }
    let mut request = message(link);
    request.header.parent = INGRESS;
    let mut targets = Vec::new();
    for found in netlink.dump(RouteNetlinkMessage::GetTrafficFilter(request)).await? {
        let RouteNetlinkMessage::NewTrafficFilter(found) = found else { continue };
        if !ours(&found) {
            continue;
        }
        match target(&found) {
            Some(Target::Link(target)) => targets.push(target),
            Some(Target::None) => {}
            None => return Ok(Ingress::Others),
        }
    }
    // A discipline without filters may be somebody's who is about to add some.
    if targets.is_empty() { Ok(Ingress::Others) } else { Ok(Ingress::Redirects(targets)) }
}

enum Target {
    Link(u32),
    /// The head of a u32 classifier, which does nothing itself, or an exception of ours.
    None,
}

fn target(filter: &TcMessage) -> Option<Target> {
    let kind = filter.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    });
    if kind != Some(TcFilterU32::KIND) {
        return None;
    }
    let options = filter.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options.as_slice()),
        _ => None,
    });
    let options = options.unwrap_or_default();
    if options.iter().any(|option| matches!(option, TcOption::U32(option) if upstream::is_mark(option))) {
        return Some(Target::None);
    }
    let mut acts = false;
    for option in options {
        match option {
            TcOption::U32(TcFilterU32Option::Action(actions)) => {
                acts = true;
                let redirect = actions.iter().flat_map(|action| &action.attributes).find_map(redirected);
                if let (1, Some(to)) = (actions.len(), redirect) {
                    return Some(Target::Link(to));
                }
            }
            TcOption::U32(TcFilterU32Option::Selector(_)) => acts = true,
            _ => {}
        }
    }
    (!acts).then_some(Target::None)
}

fn redirected(attribute: &TcActionAttribute) -> Option<u32> {
    let TcActionAttribute::Options(options) = attribute else { return None };
    options.iter().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(found))
            if found.eaction == TcMirrorActionType::EgressRedir =>
        {
            Some(found.ifindex)
        }
        _ => None,
    })
}

/// The part of tc that a refused operation says the kernel lacks.
pub(super) fn lacking((operation, refusal): &Failure) -> Option<&'static str> {
    if !matches!(refusal.errno, Errno::ENOENT | Errno::EOPNOTSUPP) {
        return None;
    }
    // Newer kernels say which; before 4.16 it may be either.
    Some(match *operation {
        ADD_DISCIPLINE => "sch_ingress",
        _ if refusal.words.contains("classifier") => "cls_u32",
        _ if refusal.words.contains("action") => "act_mirred",
        _ => "cls_u32 act_mirred",
    })
}

/// What helps against a refusal.
pub(super) fn mend(failure: &Failure) -> String {
    match (lacking(failure), failure.1.errno) {
        (Some(modules), _) => format!("; the host's kernel lacks it: modprobe {modules}"),
        (None, Errno::EPERM | Errno::EACCES) => {
            "; the shim needs CAP_NET_ADMIN there, run containerd as root".into()
        }
        _ => String::new(),
    }
}
