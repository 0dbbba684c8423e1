//! Replays the kept inputs of every fuzz target, and damaged variants of them, on the stable compiler.
//!
//! A target panics where it finds a bug, so to return is to pass. Deliberately absent: randomness. The variants are every cut at
//! a power of two and one flipped bit in each of at most 64 places, so that a failure repeats.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn fuzz_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

/// Names in a directory of `tests/fuzz`, without their extension.
fn names(dir: &str) -> BTreeSet<String> {
    let dir = fuzz_dir().join(dir);
    let entries = fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    entries
        .map(|entry| {
            let path = entry.expect("an entry of a directory").path();
            path.file_stem().expect("a name").to_string_lossy().into_owned()
        })
        .collect()
}

/// The input, its beginnings, and it with one bit flipped in several places.
fn variants(input: &[u8]) -> impl Iterator<Item = Vec<u8>> + '_ {
    let cuts = (0..usize::BITS)
        .map(|n| 1usize << n)
        .take_while(|&len| len < input.len());
    let places = (0..input.len()).step_by(input.len().div_ceil(64).max(1));
    let flips = places.map(|at| {
        let mut changed = input.to_vec();
        changed[at] ^= 1 << (at % 8);
        changed
    });
    std::iter::once(input.to_vec())
        .chain(cuts.map(|len| input[..len].to_vec()))
        .chain(flips)
}

#[test]
fn kept_inputs_do_no_harm() {
    for (name, _) in targets::TARGETS {
        let dir = fuzz_dir().join("corpus").join(name);
        let mut inputs = 0;
        for entry in fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
            let path = entry.expect("an entry of the corpus").path();
            let input = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            // What a panic's message is read for.
            println!("{}", path.display());
            variants(&input).for_each(|variant| targets::run(name, &variant));
            inputs += 1;
        }
        assert!(inputs > 0, "target {name} has no input in {}", dir.display());
        targets::run(name, &[]);
    }
}

#[test]
fn every_target_is_a_program_and_has_a_corpus() {
    let table: BTreeSet<String> = targets::TARGETS
        .iter()
        .map(|(name, _)| (*name).to_owned())
        .collect();
    assert_eq!(names("fuzz_targets"), table, "fuzz_targets/ and targets.rs");
    assert_eq!(names("corpus"), table, "corpus/ and targets.rs");
    let manifest = fs::read_to_string(fuzz_dir().join("Cargo.toml")).expect("the manifest");
    let manifest: toml::Table = manifest.parse().expect("a manifest is TOML");
    let programs = manifest["bin"].as_array().expect("[[bin]]").iter();
    let programs: BTreeSet<String> = programs
        .map(|bin| bin["name"].as_str().expect("a name").to_owned())
        .collect();
    assert_eq!(programs, table, "Cargo.toml and targets.rs");
    for name in &table {
        let program = fuzz_dir().join("fuzz_targets").join(format!("{name}.rs"));
        let text = fs::read_to_string(program).expect("the program");
        assert!(
            text.contains(&format!("run(\"{name}\", data)")),
            "{name}.rs runs another target"
        );
    }
}

#[test]
fn variants_are_many_and_bounded() {
    let input: Vec<u8> = (0..=255).collect();
    let all: BTreeSet<Vec<u8>> = variants(&input).collect();
    assert_eq!(all.len(), 1 + 8 + 64);
    assert!(all.iter().all(|variant| variant.len() <= input.len()));
    assert_eq!(variants(&[]).count(), 1);
}
