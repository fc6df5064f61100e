//! `spore doctor`: what this host lacks to run containers in microVMs, each with its mend. Exit
//! status 1 when something is bad. Nothing is changed.

mod containerd;
mod host;
mod kvm;

use serde_json::json;

use containerd_shim_spore::{Config, probe};

use crate::Global;
use crate::failure::Failure;
use crate::show;

/// What was looked at.
#[derive(Debug)]
struct Check {
    what: &'static str,
    found: Result<String, Bad>,
}

/// What is wrong, and what helps.
#[derive(Debug)]
struct Bad {
    found: String,
    mend: String,
}

impl Check {
    fn new(what: &'static str, found: Result<String, Bad>) -> Self {
        Self { what, found }
    }
}

fn bad<T>(found: impl Into<String>, mend: impl Into<String>) -> Result<T, Bad> {
    Err(Bad { found: found.into(), mend: mend.into() })
}

const INSTALL: &str = "install Spore: packaging/install";

pub(crate) async fn run(global: &Global) -> Result<u8, Failure> {
    let mut checks = vec![
        Check::new("processor", host::processor()),
        Check::new("/dev/kvm", kvm::usable()),
        Check::new("kernel", host::kernel()),
        Check::new("overlayfs", host::overlayfs()),
        Check::new("cgroup v2", host::cgroups()),
        Check::new("/dev/net/tun", host::network(probe::taps())),
        Check::new("tc", host::network(probe::redirects())),
    ];
    let config = match Config::load() {
        Ok(config) => {
            checks.push(Check::new("configuration", Ok("can be read".into())));
            config
        }
        Err(error) => {
            let mend = "correct it; packaging/config.toml documents every key".to_owned();
            checks.push(Check::new("configuration", bad(error.to_string(), mend)));
            Config::default()
        }
    };
    checks.extend([
        Check::new("guest kernel", host::file(&config.kernel)),
        Check::new("guest initramfs", host::file(&config.initramfs)),
        Check::new("spore-vmm", host::program(&config.vmm)),
        Check::new("spore-fs", host::program(&config.file_server)),
        Check::new("state directory", host::space(&config.state_dir)),
    ]);
    let (socket, path) = containerd::reached(global).await;
    checks.push(Check::new("containerd", socket));
    checks.push(Check::new("shim", containerd::shim(&path)));
    checks.push(Check::new("mkfs.erofs", host::erofs(&path)));
    checks.push(Check::new("mkfs.ext4", host::ext4(&path)));
    tell(global, &checks)
}

fn tell(global: &Global, checks: &[Check]) -> Result<u8, Failure> {
    let bad = checks.iter().filter(|check| check.found.is_err()).count();
    if global.json {
        let told = checks.iter().map(|Check { what, found }| match found {
            Ok(found) => json!({ "check": what, "ok": true, "found": found }),
            Err(Bad { found, mend }) => json!({ "check": what, "ok": false, "found": found, "mend": mend }),
        });
        show::json(&json!(told.collect::<Vec<_>>()))?;
    } else {
        let mut rows = Vec::new();
        for Check { what, found } in checks {
            let (verdict, found, mend) = match found {
                Ok(found) => ("ok", found, None),
                Err(Bad { found, mend }) => ("bad", found, Some(mend)),
            };
            rows.push(vec![verdict.to_owned(), (*what).to_owned(), found.clone()]);
            if let Some(mend) = mend {
                rows.push(vec![String::new(), String::new(), format!("→ {mend}")]);
            }
        }
        show::table(&rows)?;
        match bad {
            0 => show::line("\nThis host can run containers in microVMs.")?,
            count => show::line(&format!("\n{count} of {} checks are bad.", checks.len()))?,
        }
    }
    Ok(u8::from(bad > 0))
}
