//! Generates the ttrpc bindings from `proto/`.

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let protos =
        ["sandbox", "container", "files", "network"].map(|name| format!("proto/spore/agent/v1/{name}.proto"));
    let protos = protos.iter();
    for proto in protos.clone() {
        println!("cargo:rerun-if-changed={proto}");
    }
    let out = PathBuf::from(std::env::var("OUT_DIR").map_err(std::io::Error::other)?);
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(protos)
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
