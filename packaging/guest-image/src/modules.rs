//! Which modules the guest gets and in which order they load: the list file of this
//! package, closed over modules.dep (hard dependencies) and modules.softdep.
//!
//! Formats: modules.dep(5), modules.softdep as written by depmod(8), softdep in
//! modprobe.d(5). The order depends only on the list and on those files' content.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext, Result};

/// A line of the list file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) name: String,
    /// Loaded when this is needed; as the guest boots if there is none.
    pub(crate) group: Option<String>,
    pub(crate) reason: String,
}

/// A module of the image.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) name: String,
    /// Relative to the modules directory, as packaged: `kernel/fs/erofs/erofs.ko.xz`.
    pub(crate) path: String,
    pub(crate) group: Option<String>,
    pub(crate) reason: String,
}

/// The answer of [`Tree::closure`].
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Closure {
    /// In load order.
    pub(crate) modules: Vec<Chosen>,
    /// Listed modules that the kernel has built in.
    pub(crate) built_in: Vec<String>,
    /// Soft dependencies that no module offers; harmless by definition, but reported.
    pub(crate) unresolved: Vec<String>,
}

#[derive(Debug, Default)]
struct Soft {
    pre: Vec<String>,
    post: Vec<String>,
}

#[derive(Debug)]
struct Module {
    path: String,
    /// All that it needs, direct or not, as modules.dep lists them.
    needs: Vec<String>,
}

/// What depmod knows of one kernel's modules.
#[derive(Debug)]
pub(crate) struct Tree {
    release: String,
    dir: PathBuf,
    modules: BTreeMap<String, Module>,
    built_in: BTreeSet<String>,
    soft: BTreeMap<String, Soft>,
    /// Exact aliases (no wildcard) of modules, and those that built-in code answers.
    aliases: BTreeMap<String, BTreeSet<String>>,
    built_in_aliases: BTreeSet<String>,
}

const SYNTAX: &str = "NAME [@GROUP] # REASON";

/// A module's name from its path or spelling: `virtio-rng.ko.xz` is `virtio_rng`.
fn normalised(name: &str) -> String {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// Parses the list file: a module's name, perhaps `@` and a group, then `#` and the reason; other
/// lines that begin with `#` are comments.
pub(crate) fn parse_list(text: &str, path: &Path) -> Result<Vec<Wanted>> {
    let mut wanted: Vec<Wanted> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let syntax = |expected| {
            Err(Error::Syntax { path: path.to_owned(), line: index + 1, found: line.to_owned(), expected })
        };
        let Some((name, reason)) = line.split_once('#') else {
            return syntax(SYNTAX);
        };
        let (name, group) = match name.split_once('@') {
            Some((name, group)) => (name.trim(), Some(group.trim())),
            None => (name.trim(), None),
        };
        let reason = reason.trim();
        let bad_group =
            |group: &str| group.is_empty() || !group.bytes().all(|byte| byte.is_ascii_lowercase());
        if name.is_empty()
            || reason.is_empty()
            || name.contains(|c: char| c.is_whitespace() || c == '/')
            || group.is_some_and(bad_group)
        {
            return syntax(SYNTAX);
        }
        let name = normalised(name);
        if wanted.iter().any(|other| other.name == name) {
            return syntax("each module once");
        }
        wanted.push(Wanted { name, group: group.map(str::to_owned), reason: reason.to_owned() });
    }
    Ok(wanted)
}

impl Tree {
    /// Reads what depmod wrote into `dir`, the directory of modules of kernel `release`.
    pub(crate) fn load(dir: &Path, release: &str) -> Result<Self> {
        let dep_path = dir.join("modules.dep");
        if !dep_path.exists() {
            return Err(Error::NoModulesDep { path: dep_path, release: release.to_owned() });
        }
        let optional = |name: &str| -> Result<String> {
            let path = dir.join(name);
            if !path.exists() {
                return Ok(String::new());
            }
            let bytes = std::fs::read(&path).context("read", &path)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let dep = std::fs::read_to_string(&dep_path).context("read", &dep_path)?;
        let mut tree =
            Self::parse(&dep, &optional("modules.builtin")?, &optional("modules.softdep")?, &dep_path)?;
        tree.parse_aliases(&optional("modules.alias")?, &optional("modules.builtin.modinfo")?);
        tree.release = release.to_owned();
        tree.dir = dir.to_owned();
        Ok(tree)
    }

    fn parse(dep: &str, built_in: &str, softdep: &str, dep_path: &Path) -> Result<Self> {
        let mut modules = BTreeMap::new();
        for (index, line) in dep.lines().enumerate() {
            let syntax = || Error::Syntax {
                path: dep_path.to_owned(),
                line: index + 1,
                found: line.to_owned(),
                expected: "relative MODULE: DEPENDENCY...",
            };
            let (path, needs) = line.split_once(':').ok_or_else(syntax)?;
            let mut paths = std::iter::once(path).chain(needs.split_whitespace());
            // The paths are joined to a directory and become names in the archive.
            if paths
                .any(|path| path.is_empty() || path.starts_with('/') || path.split('/').any(|p| p == ".."))
            {
                return Err(syntax());
            }
            let needs = needs.split_whitespace().map(normalised).collect();
            modules.insert(normalised(path), Module { path: path.to_owned(), needs });
        }
        Ok(Self {
            release: String::new(),
            dir: PathBuf::new(),
            modules,
            built_in: built_in.lines().map(|line| normalised(line.trim())).collect(),
            soft: parse_softdep(softdep),
            aliases: BTreeMap::new(),
            built_in_aliases: BTreeSet::new(),
        })
    }

    fn parse_aliases(&mut self, alias: &str, built_in_modinfo: &str) {
        for line in alias.lines() {
            let mut words = line.split_whitespace();
            if let (Some("alias"), Some(alias), Some(module)) = (words.next(), words.next(), words.next())
                && !alias.contains(['*', '?', '['])
            {
                self.aliases.entry(alias.replace('-', "_")).or_default().insert(normalised(module));
            }
        }
        for entry in built_in_modinfo.split('\0') {
            if let Some((key, value)) = entry.split_once('=')
                && key.ends_with(".alias")
            {
                self.built_in_aliases.insert(value.replace('-', "_"));
            }
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// `wanted` and everything that they need, each after what it needs.
    pub(crate) fn closure(&self, wanted: &[Wanted]) -> Result<Closure> {
        let mut visit = Visit {
            tree: self,
            done: BTreeSet::new(),
            stack: Vec::new(),
            group: None,
            closure: Closure::default(),
        };
        // What boots first: a group finds loaded what both need.
        let (boot, later): (Vec<_>, Vec<_>) = wanted.iter().partition(|want| want.group.is_none());
        for want in boot.into_iter().chain(later) {
            visit.group.clone_from(&want.group);
            if self.modules.contains_key(&want.name) {
                visit.module(&want.name, &want.reason)?;
            } else if self.built_in.contains(&want.name) {
                visit.closure.built_in.push(want.name.clone());
            } else {
                return Err(self.missing(&want.name, &want.reason));
            }
        }
        Ok(visit.closure)
    }

    fn missing(&self, name: &str, why: &str) -> Error {
        Error::ModuleMissing { name: name.to_owned(), why: why.to_owned(), release: self.release.clone() }
    }
}

fn parse_softdep(text: &str) -> BTreeMap<String, Soft> {
    let mut all: BTreeMap<String, Soft> = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("softdep") {
            continue;
        }
        let Some(name) = words.next() else { continue };
        let soft = all.entry(normalised(name)).or_default();
        // As in modprobe, words before "pre:" or "post:" mean nothing.
        let mut list = None;
        for word in words {
            match word {
                "pre:" => list = Some(&mut soft.pre),
                "post:" => list = Some(&mut soft.post),
                other => {
                    if let Some(list) = list.as_mut() {
                        list.push(other.replace('-', "_"));
                    }
                }
            }
        }
    }
    all
}

/// Depth-first walk that emits a module after what it needs.
struct Visit<'a> {
    tree: &'a Tree,
    done: BTreeSet<String>,
    stack: Vec<String>,
    group: Option<String>,
    closure: Closure,
}

impl Visit<'_> {
    fn module(&mut self, name: &str, reason: &str) -> Result<()> {
        if self.done.contains(name) {
            return Ok(());
        }
        if self.stack.iter().any(|other| other == name) {
            return Err(Error::ModuleCycle { name: name.to_owned() });
        }
        let Some(module) = self.tree.modules.get(name) else {
            return Err(self.tree.missing(name, reason));
        };
        self.stack.push(name.to_owned());
        let soft = self.tree.soft.get(name);
        for other in soft.iter().flat_map(|soft| &soft.pre) {
            self.soft(name, other, true)?;
        }
        // modules.dep names the deepest dependency last.
        for other in module.needs.iter().rev() {
            self.module(other, &format!("needed by {name}"))?;
        }
        self.stack.pop();
        self.done.insert(name.to_owned());
        self.closure.modules.push(Chosen {
            name: name.to_owned(),
            path: module.path.clone(),
            group: self.group.clone(),
            reason: reason.to_owned(),
        });
        for other in soft.iter().flat_map(|soft| &soft.post) {
            self.soft(name, other, false)?;
        }
        Ok(())
    }

    /// A soft dependency may be a module, an alias, built in, or not there at all.
    fn soft(&mut self, of: &str, wanted: &str, before: bool) -> Result<()> {
        let tree = self.tree;
        let found: Vec<&str> = if let Some((name, _)) = tree.modules.get_key_value(wanted) {
            vec![name]
        } else if tree.built_in.contains(wanted) || tree.built_in_aliases.contains(wanted) {
            Vec::new()
        } else if let Some(modules) = tree.aliases.get(wanted) {
            modules.iter().map(String::as_str).collect()
        } else {
            self.closure.unresolved.push(format!("{wanted} (of {of})"));
            Vec::new()
        };
        for name in found {
            // "Before" is a wish: a module that itself needs one being loaded cannot come first.
            let blocked = before
                && (self.stack.iter().any(|other| other == name)
                    || tree
                        .modules
                        .get(name)
                        .is_some_and(|m| m.needs.iter().any(|need| self.stack.contains(need))));
            if !blocked {
                self.module(name, &format!("soft dependency of {of}"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "modules_tests.rs"]
mod tests;
