//! Builds the tiny guest of `guest/` into the crate, see `src/guest.rs`.
//!
//! It is 32-bit code in a 64-bit ELF file, because that is what the VMMs load. The compiler's 32-bit assembler text is put
//! through the 64-bit assembler, so that no 32-bit libraries and no conversion of relocations are needed. Without gcc and ld
//! for x86-64 the crate has no guest, and says so where one is asked for.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=guest");
    println!("cargo::rerun-if-changed=build.rs");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    if let Err(why) = build(&out) {
        println!("cargo::warning=the tiny guest is left out: {why}");
        std::fs::write(out.join("guest"), []).expect("cargo's directory can be written");
    }
}

fn build(out: &Path) -> Result<(), String> {
    let at = |name: &str| out.join(name);
    let compile = "-m32 -march=i686 -O2 -Wall -Wextra -Werror -ffreestanding -fno-pic -fno-pie -fno-stack-protector \
                   -fno-asynchronous-unwind-tables -fno-tree-loop-distribute-patterns -fcf-protection=none -S -o";
    run(Command::new("gcc")
        .args(compile.split(' ').filter(|word| !word.is_empty()))
        .args([at("guest.32.s"), "guest/pvh.c".into()]))?;
    let text = std::fs::read_to_string(at("guest.32.s")).map_err(|error| error.to_string())?;
    std::fs::write(at("guest.s"), format!(".code32\n{text}")).map_err(|error| error.to_string())?;
    for (object, source) in [
        ("main.o", at("guest.s")),
        ("entry.o", PathBuf::from("guest/pvh.S")),
    ] {
        run(Command::new("gcc")
            .args(["-m64", "-c", "-o"])
            .args([at(object), source]))?;
    }
    run(Command::new("ld")
        .args(["-m", "elf_x86_64", "--no-warn-rwx-segments", "--build-id=none"])
        .args(["-T", "guest/pvh.ld"])
        .args([at("entry.o"), at("main.o")])
        .arg("-o")
        .arg(at("guest")))
}

fn run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|error| format!("{program} can not be run: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr).replace('\n', " ");
    Err(format!("{program}: {text}"))
}
