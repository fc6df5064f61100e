//! Generates the ttrpc bindings of the shim's own service from `proto/`.

use std::path::PathBuf;

const PROTO: &str = "proto/spore/shim/v1/snapshots.proto";

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed={PROTO}");
    let out = PathBuf::from(std::env::var("OUT_DIR").map_err(std::io::Error::other)?);
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs([PROTO])
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize { async_all: true, gen_mod: true, ..Default::default() })
        .run()?;
    // `include!` refuses the inner attributes that the generator puts at the top of its mod.rs.
    let module = out.join("mod.rs");
    let text: String = std::fs::read_to_string(&module)?
        .lines()
        .filter(|line| !line.starts_with("#!["))
        .flat_map(|line| [line, "\n"])
        .collect();
    std::fs::write(&module, text)
}
