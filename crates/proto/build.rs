//! Compiles every file under `proto/` without protoc: protox reads and checks them, tonic writes the Rust.

use std::{
    env,
    error::Error,
    fs, io,
    path::{Path, PathBuf},
};

use protox::prost::Message;

/// Tensors: shared with the buffer they came in rather than copied.
const SHARED_BYTES: [&str; 2] = [
    ".inference.ModelInferRequest.raw_input_contents",
    ".inference.ModelInferResponse.raw_output_contents",
];

/// What holds a secret is printed by hand, in `lib.rs`.
const SECRET: [&str; 2] = [".isobar.mesh.v1.Join", ".isobar.mesh.v1.JoinToken"];

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new("../../proto");
    println!("cargo::rerun-if-changed={}", root.display());
    let mut files = Vec::new();
    collect(root, &mut files)?;
    files.sort();

    let mut set = protox::compile(&files, [root])?;
    tonic_prost_build::configure()
        .build_transport(false)
        // A server implements what it offers; the rest answers UNIMPLEMENTED.
        .generate_default_stubs(true)
        .bytes(SHARED_BYTES[0])
        .bytes(SHARED_BYTES[1])
        .btree_map(".")
        .skip_debug(SECRET)
        .compile_fds(set.clone())?;

    // Reflection hands out declarations; comments would only make the binary larger.
    for file in &mut set.file {
        file.source_code_info = None;
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), set.encode_to_vec())?;
    Ok(())
}

/// Every `.proto` file below `dir`.
fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "proto") {
            files.push(path);
        }
    }
    Ok(())
}
