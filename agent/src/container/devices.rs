//! The device rules of a container, as an eBPF program on its cgroup.
//!
//! cgroup v2 has no file for them. Without rules, a container that may mknod (Docker's and
//! containerd's default) could open the guest's disks, its neighbours' among them.
//!
//! Specification: OCI config-linux "Allowed Device list"; the program's context is
//! `struct bpf_cgroup_dev_ctx` of include/uapi/linux/bpf.h. Rules apply in order and the last
//! match decides, so the program tests them from the last to the first. Behind the spec's own
//! stand the devices that every container has, as with runc; what no rule names is denied.

use std::fs::File;
use std::io;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::bpf::{
    self, AND, EXIT, Hook, Instruction, JUMP_EQUAL, JUMP_UNEQUAL, JUMP_UNEQUAL_REGISTER, LOAD_WORD, MOVE,
    MOVE_REGISTER, SHIFT_RIGHT, instruction,
};

/// More rules than any spec has; the program stays far below the kernel's 4096 instructions.
pub const MAX_RULES: usize = 256;

const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;
const ALL: i32 = MKNOD | READ | WRITE;

/// One rule; `None` matches anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// Translates the spec's rules. The error names the rule.
pub fn rules(spec: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>, String> {
    if spec.len() > MAX_RULES {
        return Err(format!(
            "linux.resources.devices has {} rules, at most {MAX_RULES} are allowed",
            spec.len()
        ));
    }
    spec.iter()
        .map(|rule| parse(rule).map_err(|why| format!("linux.resources.devices: {rule:?}: {why}")))
        .collect()
}

fn parse(rule: &LinuxDeviceCgroup) -> Result<Rule, &'static str> {
    let number = |value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => {
            i32::try_from(value).ok().filter(|value| *value >= 0).map(Some).ok_or("bad device number")
        }
    };
    let kind = match rule.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
        Some(LinuxDeviceType::P) => return Err("a fifo is not a device"),
    };
    let mut access = 0;
    for letter in rule.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => return Err("access is made of r, w and m"),
        };
    }
    Ok(Rule { allow: rule.allow(), kind, major: number(rule.major())?, minor: number(rule.minor())?, access })
}

/// What every container may do: make any node, use the harmless devices and its terminals.
fn defaults() -> Vec<Rule> {
    let node = |kind| Rule { allow: true, kind: Some(kind), major: None, minor: None, access: MKNOD };
    let device =
        |major, minor| Rule { allow: true, kind: Some(CHARACTER), major: Some(major), minor, access: ALL };
    let mut rules = vec![node(CHARACTER), node(BLOCK)];
    // null, zero, full, random, urandom; tty, console, ptmx; pts.
    rules.extend([3, 5, 7, 8, 9].map(|minor| device(1, Some(minor))));
    rules.extend([0, 1, 2].map(|minor| device(5, Some(minor))));
    rules.push(device(136, None));
    rules
}

/// r2 type, r3 access, r4 major, r5 minor; r1 scratch.
fn program(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        instruction(LOAD_WORD, 2, 1, 0, 0),
        instruction(MOVE_REGISTER, 3, 2, 0, 0),
        instruction(AND, 2, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, 3, 0, 0, 16),
        instruction(LOAD_WORD, 4, 1, 4, 0),
        instruction(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        let mut tests = Vec::new();
        if let Some(kind) = rule.kind {
            tests.push(instruction(JUMP_UNEQUAL, 2, 0, 0, kind));
        }
        if rule.access != ALL {
            tests.push(instruction(MOVE_REGISTER, 1, 3, 0, 0));
            tests.push(instruction(AND, 1, 0, 0, rule.access));
            // Allowed is only what the rule covers whole; denied what it touches.
            tests.push(if rule.allow {
                instruction(JUMP_UNEQUAL_REGISTER, 1, 3, 0, 0)
            } else {
                instruction(JUMP_EQUAL, 1, 0, 0, 0)
            });
        }
        if let Some(major) = rule.major {
            tests.push(instruction(JUMP_UNEQUAL, 4, 0, 0, major));
        }
        if let Some(minor) = rule.minor {
            tests.push(instruction(JUMP_UNEQUAL, 5, 0, 0, minor));
        }
        // A failed test goes on behind this rule's verdict of two instructions.
        let mut to_verdict = i16::try_from(tests.len()).unwrap_or(0);
        for test in &mut tests {
            to_verdict -= 1;
            if matches!(test.code, JUMP_UNEQUAL | JUMP_UNEQUAL_REGISTER | JUMP_EQUAL) {
                test.offset = to_verdict + 2;
            }
        }
        let always = tests.is_empty();
        program.extend(tests);
        program.push(instruction(MOVE, 0, 0, 0, rule.allow.into()));
        program.push(instruction(EXIT, 0, 0, 0, 0));
        if always {
            // The kernel refuses a program with code that nothing reaches.
            return program;
        }
    }
    program.push(instruction(MOVE, 0, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    program
}

/// Puts the rules on a cgroup, by its directory.
pub fn apply(cgroup: &Path, spec: &[Rule]) -> io::Result<()> {
    let mut rules = spec.to_vec();
    rules.extend(defaults());
    let program = bpf::load(Hook::Device, &program(&rules))?;
    bpf::attach(Hook::Device, &program, &File::open(cgroup)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the program answers: an interpreter of the few instructions that it uses.
    fn allows(program: &[Instruction], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0i32; 11];
        let mut at = 0;
        loop {
            let Instruction { code, registers: pair, offset, immediate } = program[at];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            let jump = match code {
                LOAD_WORD => {
                    registers[to] = context[usize::try_from(offset).unwrap() / 4];
                    false
                }
                MOVE_REGISTER => {
                    registers[to] = registers[from];
                    false
                }
                MOVE => {
                    registers[to] = immediate;
                    false
                }
                AND => {
                    registers[to] &= immediate;
                    false
                }
                SHIFT_RIGHT => {
                    registers[to] >>= immediate;
                    false
                }
                JUMP_UNEQUAL => registers[to] != immediate,
                JUMP_UNEQUAL_REGISTER => registers[to] != registers[from],
                JUMP_EQUAL => registers[to] == immediate,
                EXIT => return registers[0] == 1,
                other => panic!("instruction {other:#x}"),
            };
            at += 1 + if jump { usize::try_from(offset).unwrap() } else { 0 };
        }
    }

    fn compile(json: serde_json::Value) -> Vec<Instruction> {
        let spec: Vec<LinuxDeviceCgroup> = serde_json::from_value(json).unwrap();
        let mut rules = rules(&spec).unwrap();
        rules.extend(defaults());
        program(&rules)
    }

    #[test]
    fn the_usual_spec_allows_the_usual_devices_only() {
        let program = compile(serde_json::json!([{ "allow": false, "access": "rwm" }]));
        assert!(allows(&program, CHARACTER, READ | WRITE, 1, 3));
        assert!(allows(&program, CHARACTER, READ, 136, 7));
        assert!(allows(&program, BLOCK, MKNOD, 254, 0));
        assert!(!allows(&program, BLOCK, READ, 254, 0));
        assert!(!allows(&program, CHARACTER, READ, 1, 1));
        assert!(!allows(&program, BLOCK, MKNOD | READ, 254, 0));
    }

    #[test]
    fn the_last_matching_rule_decides() {
        let program = compile(serde_json::json!([
            { "allow": true, "type": "a", "access": "rwm" },
            { "allow": false, "type": "b", "major": 254, "minor": -1, "access": "w" },
            { "allow": true, "type": "b", "major": 254, "minor": 3, "access": "rw" }
        ]));
        assert!(allows(&program, BLOCK, READ, 254, 0));
        assert!(!allows(&program, BLOCK, WRITE, 254, 0));
        assert!(!allows(&program, BLOCK, READ | WRITE, 254, 0));
        assert!(allows(&program, BLOCK, READ | WRITE, 254, 3));
        assert!(allows(&program, CHARACTER, READ | WRITE, 10, 200));
        // Nothing stands behind the rule that matches everything.
        assert_eq!(program.last().unwrap().code, EXIT);
    }

    #[test]
    fn bad_rules_are_named() {
        let spec: Vec<LinuxDeviceCgroup> =
            serde_json::from_value(serde_json::json!([{ "allow": true, "access": "rx" }])).unwrap();
        assert!(rules(&spec).unwrap_err().contains("access is made of r, w and m"));
        let one = spec[0].clone();
        assert!(rules(&vec![one; MAX_RULES + 1]).unwrap_err().contains("at most 256"));
    }
}
