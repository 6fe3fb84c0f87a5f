//! With the `cuda` feature: compiles every kernel of `cuda/` by nvcc, to a cubin for sm_90a and, but for files
//! `*_hopper.cu`, which are for that alone, to PTX for compute_80, and writes a table of them, and of their sources, that
//! `src/cuda/images.rs` includes. With the `fibres` feature: compiles all of them by a C++ compiler to the library that
//! `src/cuda/fibres.rs` loads. With both: compiles a CUDA driver and a cuBLASLt that run on the host, for processes that
//! tests start.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const NVCC_RELEASE_MIN: u32 = 13;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CARGO_FEATURE_CUDA");
    println!("cargo::rerun-if-env-changed=CARGO_FEATURE_FIBRES");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
        compile_kernels();
    }
    if std::env::var_os("CARGO_FEATURE_FIBRES").is_some() {
        compile_for_the_host();
        if std::env::var_os("CARGO_FEATURE_CUDA").is_some() {
            compile_host_driver();
        }
    }
}

/// About 10 seconds, whenever a kernel changes.
fn compile_for_the_host() {
    println!("cargo::rerun-if-env-changed=CXX");
    println!("cargo::rerun-if-changed=cuda");
    let library = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join("libfibres.so");
    link_library(&library, &["cuda/host/device.cpp".into()], &[]);
    println!("cargo::rustc-env=TANDEM_FIBRES_LIBRARY={}", library.display());
}

/// About 30 seconds more. The libraries have the names that a program asks the system for.
fn compile_host_driver() {
    let folder = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join("host-driver");
    std::fs::create_dir_all(&folder).expect("the output folder is writable");
    let is_library = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "cpp");
    let sources = std::fs::read_dir("cuda/host/driver").expect("the driver is beside the kernels");
    let sources = sources.map(|entry| entry.expect("a readable folder").path()).filter(is_library);
    let sources = sources.filter(|path| !path.ends_with("compiled.cpp"));
    let (blas, mut driver): (Vec<PathBuf>, Vec<PathBuf>) = sources.partition(|path| path.ends_with("blas.cpp"));
    // NVIDIA's own header: the compiler checks every function against it.
    let include = format!("-I{}", cuda_home().join("include").display());
    driver.push(compile_compiled_kernels(&include));
    // Names of its own: what runs as fibres may be in the same process twice.
    for (name, sources) in [("libcuda.so.1", driver), ("libcublasLt.so.13", blas)] {
        let soname = format!("-Wl,-soname,{name}");
        link_library(&folder.join(name), &sources, &["-fvisibility=hidden", "-fno-gnu-unique", &include, &soname]);
    }
    println!("cargo::rustc-env=TANDEM_HOST_DRIVER_FOLDER={}", folder.display());
}

/// What nvcc has made of the kernels for sm_90a, as C++ and that as an object file: of instructions, whose registers are
/// bits. With less optimisation it is compiled several times as fast.
fn compile_compiled_kernels(include_cuda: &str) -> PathBuf {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let mut includes = String::new();
    for source in kernel_files() {
        let name = source.file_stem().and_then(|stem| stem.to_str()).expect("kernel files have plain names");
        let output =
            Command::new("python3").arg("cuda/host/ptx.py").arg(out.join(format!("{name}.sm_90a.ptx"))).output();
        let output = output.unwrap_or_else(|error| {
            panic!("tests of compiled kernels need Python, and python3 cannot be run ({error}): install it")
        });
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let header = out.join(format!("{name}.ptx.h"));
        std::fs::write(&header, output.stdout).expect("the output folder is writable");
        includes += &format!("#include {header:?}\n");
    }
    std::fs::write(out.join("compiled_kernels.h"), includes).expect("the output folder is writable");
    let object = out.join("compiled_kernels.o");
    let include = format!("-I{}", out.display());
    let includes = [include_cuda, &include, "-Icuda/host"];
    let options = [&["-c", "-O1", "-fno-strict-aliasing", "-fvisibility=hidden", "-fno-gnu-unique"], &includes[..]];
    compile_cpp(&object, &["cuda/host/driver/compiled.cpp".into()], &options.concat());
    object
}

fn link_library(library: &Path, sources: &[PathBuf], options: &[&str]) {
    compile_cpp(library, sources, &[&["-O2", "-shared"], options].concat());
}

fn compile_cpp(to: &Path, sources: &[PathBuf], options: &[&str]) {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let output = Command::new(&compiler)
        // Where distributions fortify by default, longjmp to another stack ends the program.
        .args(["-U_FORTIFY_SOURCE", "-std=c++17", "-fPIC", "-ffp-contract=off", "-w"])
        .args(options)
        .arg("-o")
        .arg(to)
        .args(sources)
        .output();
    match output {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            panic!("{} does not compile {sources:?}:\n{}", compiler.display(), String::from_utf8_lossy(&output.stderr))
        }
        Err(error) => panic!(
            "tests of the CUDA engine without a GPU need a C++ compiler, and {} cannot be run ({error}): install g++, \
             or name one in CXX",
            compiler.display()
        ),
    }
}

/// The folder of a toolkit: `CUDA_HOME`, or that of the `nvcc` that the system finds.
fn cuda_home() -> PathBuf {
    if let Some(home) = std::env::var_os("CUDA_HOME") {
        return home.into();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let nvcc = std::env::split_paths(&path).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.exists());
    let nvcc = nvcc.and_then(|nvcc| nvcc.canonicalize().ok());
    nvcc.and_then(|nvcc| Some(nvcc.parent()?.parent()?.to_path_buf())).unwrap_or_default()
}

fn compile_kernels() {
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    println!("cargo::rerun-if-changed=cuda");
    let home = cuda_home();
    let nvcc = if home.as_os_str().is_empty() { PathBuf::from("nvcc") } else { home.join("bin/nvcc") };
    check_release(&nvcc);
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let mut table =
        String::from("/// Every kernel file, in alphabetical order.\npub static EMBEDDED: &[Embedded] = &[\n");
    for source in &kernel_files() {
        let name = source.file_stem().and_then(|stem| stem.to_str()).expect("kernel files have plain names");
        let [cubin, exact, ptx] = ["cubin", "sm_90a.ptx", "ptx"].map(|suffix| out.join(format!("{name}.{suffix}")));
        run_nvcc(&nvcc, &["--ptx", "-arch=compute_90a"], source, &exact);
        run_nvcc(&nvcc, &["--cubin", "-arch=sm_90a"], &exact, &cubin);
        let is_hopper = name.ends_with("_hopper");
        if !is_hopper {
            run_nvcc(&nvcc, &["--ptx", "-arch=compute_80"], source, &ptx);
        }
        // What is for sm_90a alone is not embedded as text.
        let embedded_ptx = if is_hopper { "None".to_string() } else { format!("Some(include_str!({ptx:?}))") };
        let flat = out.join(format!("{name}.flat.cu"));
        let whole = with_headers(source, &mut Vec::new());
        std::fs::write(&flat, whole).expect("the output folder is writable");
        let text = std::fs::read_to_string(&exact).expect("nvcc wrote it");
        let entries = entries(&text);
        table += &format!(
            "    Embedded {{ name: {name:?}, entries: &{entries:?}, cubin: include_bytes!({cubin:?}), ptx: {embedded_ptx}, source: include_str!({flat:?}) }},\n"
        );
    }
    table += "];\n";
    std::fs::write(out.join("cuda_kernels.rs"), table).expect("the output folder is writable");
}

/// In alphabetical order.
fn kernel_files() -> Vec<PathBuf> {
    let entries = std::fs::read_dir("cuda").expect("the kernels are beside this file");
    let paths = entries.map(|entry| entry.expect("a readable folder").path());
    let mut files: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "cu")).collect();
    files.sort();
    files
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
    let output = nvcc_output(
        Command::new(nvcc).args(["-O3", "-std=c++17", "-fmad=false"]).args(options).arg(source).arg("-o").arg(to),
    );
    assert!(
        output.status.success(),
        "nvcc does not compile {}:\n{}",
        source.display(),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Earlier releases lack instructions and headers that are used here, and say so in ways that do not help.
fn check_release(nvcc: &Path) {
    let output = nvcc_output(Command::new(nvcc).arg("--version"));
    let text = String::from_utf8_lossy(&output.stdout);
    let major = text.split("release ").nth(1).and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
    let nvcc = nvcc.display();
    let Some(major) = major else {
        panic!("{nvcc} --version does not tell its release: {text}{}", String::from_utf8_lossy(&output.stderr))
    };
    assert!(
        major >= NVCC_RELEASE_MIN,
        "{nvcc} is of CUDA {major}, and the kernels need nvcc of CUDA {NVCC_RELEASE_MIN} or later: name such a toolkit in \
         CUDA_HOME, for example the folder that kernels/cuda/install-nvcc installs and prints"
    );
}

fn nvcc_output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| {
        panic!(
            "the `cuda` feature needs nvcc, and {} cannot be run ({error}): set CUDA_HOME to a CUDA 13 toolkit, \
             for example to the folder that kernels/cuda/install-nvcc installs and prints",
            command.get_program().display()
        )
    })
}

/// Names of the kernels in a PTX text: `.visible .entry name(`.
fn entries(ptx: &str) -> Vec<&str> {
    let names = ptx.split(".visible .entry ").skip(1);
    names.map(|rest| rest.split('(').next().expect("split gives at least one part").trim()).collect()
}
