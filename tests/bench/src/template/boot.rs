//! `ctr run --rm IMAGE true`: with runc, with Spore from a boot template, and with Spore that boots.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use spore_harness::containerd::Runtime;
use spore_harness::wait;

use crate::lab::{COLD, Lab};
use crate::report::Row;
use crate::rounds::{Side, alternate};
use crate::stats::Sample;

/// A container from a boot template: no slower than runc's, and a quarter of one that boots.
const OF_RUNC: f64 = 1.0;
const OF_COLD: f64 = 0.25;
/// Of boot templates, `shim/README.md`.
const TEMPLATES: &str = "/var/lib/spore/templates";
/// Writing one may take so long on the slowest ground.
const WRITTEN: Duration = Duration::from_secs(180);

pub(super) fn run(lab: &Lab, rounds: usize) -> Result<Vec<Row>> {
    plant(lab)?;
    let sides = [
        Side::new("runc", |round| lab.whole_run(Runtime::Runc, &format!("boot-runc-{round}"))),
        Side::new("template", |round| lab.whole_run(Runtime::Spore, &format!("boot-template-{round}"))),
        Side::new("cold", |round| {
            lab.configure(COLD)?;
            let ms = lab.whole_run(Runtime::Spore, &format!("boot-cold-{round}"))?;
            lab.configure("")?;
            Ok(ms)
        }),
    ];
    let [runc, template, cold] = alternate("boot template", rounds, sides)?.map(Sample::new);
    let name = "ctr run --rm";
    Ok(vec![
        Row::new(&format!("{name}, runc"), "ms", &runc),
        Row::new(&format!("{name}, spore cold"), "ms", &cold).against(&runc, None),
        Row::new(&format!("{name}, spore from a boot template, of runc"), "ms", &template)
            .against(&runc, Some(OF_RUNC)),
        Row::new(&format!("{name}, spore from a boot template, of cold"), "ms", &template)
            .against(&cold, Some(OF_COLD)),
    ])
}

/// Has the template made, by a container that lives until it is there.
fn plant(lab: &Lab) -> Result<()> {
    lab.detach(Runtime::Spore, "seed", &[])?;
    wait::until(&format!("a boot template is in {TEMPLATES}"), WRITTEN, || {
        // One that is being made has a dot before its name.
        let mut entries = fs::read_dir(TEMPLATES).ok()?.flatten();
        entries.any(|entry| !entry.file_name().as_encoded_bytes().starts_with(b".")).then_some(())
    })?;
    lab.remove("seed")
}
