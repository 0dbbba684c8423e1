//! Tells the tests where the build's results are.

fn main() {
    // OUT_DIR is <target>/<profile>/build/<crate>/out.
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let target = out.ancestors().nth(4).expect("it lies four folders deep");
    println!("cargo::rustc-env=CARGO_TARGET_TMPDIR_PARENT={}", target.display());
    println!("cargo::rerun-if-changed=build.rs");
}
