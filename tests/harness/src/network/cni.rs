//! The part of a container runtime's that runs CNI plugins (CNI specification 1.0.0, sections 2 and 4), in a
//! namespace that plays the host: as CRI does it, with what no option of `ctr` says.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::space;
use crate::call::Call;

/// Where clients look for plugins unless they are told otherwise.
pub const PLUGINS: &str = "/opt/cni/bin";
/// Where clients look for configurations.
pub const CONFIGURATIONS: &str = "/etc/cni/net.d";
const VERSION: &str = "1.0.0";

/// A list of plugins that make one network.
#[derive(Debug, Clone)]
pub struct Network {
    pub name: String,
    pub plugins: Vec<Value>,
}

/// One interface of one container.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// The namespace that plays the host.
    pub host: PathBuf,
    pub container: String,
    /// The container's namespace.
    pub namespace: PathBuf,
    pub interface: String,
    /// Capabilities' arguments, such as `portMappings`.
    pub arguments: Value,
}

/// How often a plugin is asked that the kernel has interrupted.
const ATTEMPTS: usize = 10;

/// A list of the kernel's that changes while a plugin reads it is an error to the plugin (EINTR), which gives up; whoever
/// runs CNI for many at once asks again.
fn uninterrupted<T>(act: impl Fn() -> Result<T>) -> Result<T> {
    let interrupted = |error: &anyhow::Error| format!("{error:#}").contains("interrupted system call");
    for _ in 1..ATTEMPTS {
        match act() {
            Err(error) if interrupted(&error) => {}
            other => return other,
        }
    }
    act()
}

impl Network {
    /// As a file of [`CONFIGURATIONS`].
    pub fn list(&self) -> Value {
        json!({ "cniVersion": VERSION, "name": self.name, "plugins": self.plugins })
    }

    /// Makes the interface; the last plugin's result.
    pub fn add(&self, to: &Attachment) -> Result<Value> {
        uninterrupted(|| self.try_add(to))
    }

    fn try_add(&self, to: &Attachment) -> Result<Value> {
        let mut result = Value::Null;
        for plugin in &self.plugins {
            let text = match self.call(plugin, "ADD", to, &result) {
                Ok(text) => text,
                Err(error) => {
                    // As the specification wants it.
                    self.del(to, &Value::Null).ok();
                    return Err(error);
                }
            };
            result = serde_json::from_str(&text).with_context(|| format!("a plugin's result: {text:?}"))?;
        }
        Ok(result)
    }

    /// Takes it away again. `result` is what [`Self::add`] gave.
    pub fn del(&self, from: &Attachment, result: &Value) -> Result<()> {
        for plugin in self.plugins.iter().rev() {
            uninterrupted(|| self.call(plugin, "DEL", from, result))?;
        }
        Ok(())
    }

    fn call(&self, plugin: &Value, command: &str, attachment: &Attachment, result: &Value) -> Result<String> {
        let mut input = plugin.clone();
        input["cniVersion"] = json!(VERSION);
        input["name"] = json!(self.name);
        if !result.is_null() {
            input["prevResult"] = result.clone();
        }
        let capabilities = plugin["capabilities"].as_object();
        for (name, _) in capabilities.into_iter().flatten() {
            if !attachment.arguments[name].is_null() {
                input["runtimeConfig"][name] = attachment.arguments[name].clone();
            }
        }
        let kind = plugin["type"].as_str().context("a plugin without a type")?;
        let program = Path::new(PLUGINS).join(kind);
        let mut call = space::command(&attachment.host, &program.display().to_string());
        call.env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &attachment.container)
            .env("CNI_NETNS", &attachment.namespace)
            .env("CNI_IFNAME", &attachment.interface)
            .env("CNI_PATH", PLUGINS);
        let output = Call::new(call).stdin(input.to_string()).run()?;
        if !output.success() {
            bail!("CNI plugin {kind}, {command} {}: {output}", attachment.interface);
        }
        Ok(output.text())
    }
}
