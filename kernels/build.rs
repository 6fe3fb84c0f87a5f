//! With the `cuda` feature: compiles every kernel of `cuda/` by nvcc, to a cubin for sm_90a and, but for files
//! `*_hopper.cu`, which are for that alone, to PTX for compute_80, and writes a table of them, and of their sources, that
//! `src/cuda/images.rs` includes. With the `fibres` feature: compiles all of them by a C++ compiler to the library that
//! `src/cuda/fibres.rs` loads.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CARGO_FEATURE_CUDA");
    println!("cargo::rerun-if-env-changed=CARGO_FEATURE_FIBRES");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernels();
    }
    if std::env::var_os("CARGO_FEATURE_FIBRES").is_some() {
        compile_for_the_host();
    }
}

/// About 10 seconds, whenever a kernel changes.
fn compile_for_the_host() {
    println!("cargo::rerun-if-env-changed=CXX");
    println!("cargo::rerun-if-changed=cuda");
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let library = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join("libfibres.so");
    let output = Command::new(&compiler)
        // Where distributions fortify by default, longjmp to another stack ends the program.
        .args(["-U_FORTIFY_SOURCE", "-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-w", "-o"])
        .arg(&library)
        .arg("cuda/host/device.cpp")
        .output();
    match output {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!(
            "{} does not compile cuda/host/device.cpp:\n{}",
            compiler.display(),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => panic!(
            "tests of the CUDA engine without a GPU need a C++ compiler, and {} cannot be run ({error}): install g++, \
             or name one in CXX",
            compiler.display()
        ),
    }
    println!("cargo::rustc-env=TANDEM_FIBRES_LIBRARY={}", library.display());
}

fn compile_kernels() {
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    println!("cargo::rerun-if-changed=cuda");
    let nvcc = match std::env::var_os("CUDA_HOME") {
        Some(home) => Path::new(&home).join("bin/nvcc"),
        None => PathBuf::from("nvcc"),
    };
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let mut sources: Vec<PathBuf> = std::fs::read_dir("cuda")
        .expect("the kernels are beside this file")
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    let mut table =
        String::from("/// Every kernel file, in alphabetical order.\npub static EMBEDDED: &[Embedded] = &[\n");
    for source in &sources {
        let name = source.file_stem().and_then(|stem| stem.to_str()).expect("kernel files have plain names");
        let (cubin, ptx) = (out.join(format!("{name}.cubin")), out.join(format!("{name}.ptx")));
        run_nvcc(&nvcc, &["--cubin", "-gencode=arch=compute_90a,code=sm_90a"], source, &cubin);
        let is_hopper = name.ends_with("_hopper");
        // What is for sm_90a alone is not embedded as text, which says only which kernels there are.
        run_nvcc(&nvcc, &["--ptx", if is_hopper { "-arch=compute_90a" } else { "-arch=compute_80" }], source, &ptx);
        let embedded_ptx = if is_hopper { "None".to_string() } else { format!("Some(include_str!({ptx:?}))") };
        let flat = out.join(format!("{name}.flat.cu"));
        let whole = with_headers(source, &mut Vec::new());
        std::fs::write(&flat, whole).expect("the output folder is writable");
        let text = std::fs::read_to_string(&ptx).expect("nvcc wrote it");
        let entries = entries(&text);
        table += &format!(
            "    Embedded {{ name: {name:?}, entries: &{entries:?}, cubin: include_bytes!({cubin:?}), ptx: {embedded_ptx}, source: include_str!({flat:?}) }},\n"
        );
    }
    table += "];\n";
    std::fs::write(out.join("cuda_kernels.rs"), table).expect("the output folder is writable");
}

/// A source with the headers of this folder in their place, each once: a compiler without files takes it.
fn with_headers(path: &Path, seen: &mut Vec<PathBuf>) -> String {
    let text = std::fs::read_to_string(path).expect("sources and their headers are readable");
    let mut whole = String::new();
    for line in text.lines() {
        // Behind what only the host's compiler sees, `host/` is not to be found, and is not looked for.
        match line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"')) {
            Some(header) if !header.starts_with("host/") => {
                let header = path.with_file_name(header);
                if !seen.contains(&header) {
                    seen.push(header.clone());
                    whole += &with_headers(&header, seen);
                }
            }
            _ if line == "#pragma once" => {}
            _ => whole += &format!("{line}\n"),
        }
    }
    whole
}

fn run_nvcc(nvcc: &Path, options: &[&str], source: &Path, to: &Path) {
    let output = Command::new(nvcc)
        .args(["-O3", "-std=c++17", "-fmad=false"])
        .args(options)
        .arg(source)
        .arg("-o")
        .arg(to)
        .output();
    match output {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            panic!("nvcc does not compile {}:\n{}", source.display(), String::from_utf8_lossy(&output.stderr))
        }
        Err(error) => panic!(
            "the `cuda` feature needs nvcc, and {} cannot be run ({error}): set CUDA_HOME to a CUDA 13 toolkit, \
             for example to the folder that kernels/cuda/install-nvcc installs and prints",
            nvcc.display()
        ),
    }
}

/// Names of the kernels in a PTX text: `.visible .entry name(`.
fn entries(ptx: &str) -> Vec<&str> {
    let names = ptx.split(".visible .entry ").skip(1);
    names.map(|rest| rest.split('(').next().expect("split gives at least one part").trim()).collect()
}
