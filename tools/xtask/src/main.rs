//! Project automation. `cargo xtask test` is everything CI runs, and installs what it needs for that.
//!
//! `--quick` leaves out what is slow (guests, most seeds), `--soak` runs many more seeds.

use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// Debian packages the tests use, and the program or file that shows that they are there.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "/usr/bin/gcc"),
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("fio", "/usr/bin/fio"),
    ("busybox-static", "/bin/busybox"),
    ("iproute2", "/usr/sbin/ip"),
    ("nftables", "/usr/sbin/nft"),
    ("cpio", "/usr/bin/cpio"),
    ("e2fsprogs", "/sbin/mkfs.ext4"),
    ("strace", "/usr/bin/strace"),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Amount {
    Quick,
    Normal,
    Soak,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let amount = match arguments[..] {
        ["test"] => Amount::Normal,
        ["test", "--quick"] => Amount::Quick,
        ["test", "--soak"] => Amount::Soak,
        _ => {
            eprintln!("use: cargo xtask test [--quick | --soak]");
            return ExitCode::from(2);
        }
    };
    match test(amount) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn test(amount: Amount) -> Result<()> {
    step("packages", install_packages)?;
    step("format", || cargo(&["fmt", "--all", "--check"]))?;
    step("lints", || {
        cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--all-features",
            "--quiet",
            "--",
            "--deny",
            "warnings",
        ])
    })?;
    step("licences and sources", dependencies)?;
    step("documentation", || {
        run(Command::new("cargo")
            .args(["doc", "--workspace", "--no-deps", "--quiet"])
            .env("RUSTDOCFLAGS", "--deny warnings"))
    })?;
    step("program", || {
        cargo(&["build", "--release", "--quiet", "--package", "unibody-tools"])
    })?;
    step("tests", || tests(amount))
}

/// Runs one step and says how long it took.
fn step(name: &str, body: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("==> {name}");
    let start = Instant::now();
    body().with_context(|| format!("step `{name}` failed"))?;
    println!("==> {name}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("{command:?} can not be started"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

fn cargo(arguments: &[&str]) -> Result<()> {
    run(Command::new("cargo").args(arguments))
}

fn works(program: &str, argument: &str) -> bool {
    Command::new(program)
        .arg(argument)
        .output()
        .is_ok_and(|output| output.status.success())
}

fn install_packages() -> Result<()> {
    let missing: Vec<&str> = PACKAGES
        .iter()
        .filter(|(_, file)| !std::path::Path::new(file).exists())
        .map(|&(name, _)| name)
        .collect();
    // The guests' kernel is fetched, not installed, so its package must be known.
    let lists = Command::new("apt-cache")
        .args(["show", "linux-image-cloud-amd64"])
        .output();
    if missing.is_empty() && lists.is_ok_and(|output| output.status.success()) {
        return Ok(());
    }
    if !works("apt-get", "--version") || !rustix::process::geteuid().is_root() {
        bail!(
            "these Debian packages are needed: {}; install them, or run this as root",
            missing.join(" ")
        );
    }
    run(Command::new("apt-get").args(["update", "-qq"]))?;
    if missing.is_empty() {
        return Ok(());
    }
    run(Command::new("apt-get")
        .args(["install", "-y", "-qq", "--no-install-recommends"])
        .args(missing)
        .env("DEBIAN_FRONTEND", "noninteractive"))
}

/// Advisories need a database that can not be had everywhere; the rest is checked.
fn dependencies() -> Result<()> {
    if !works("cargo-deny", "--version") {
        cargo(&["install", "--locked", "--quiet", "cargo-deny"])?;
    }
    cargo(&[
        "deny",
        "--log-level",
        "error",
        "check",
        "bans",
        "licenses",
        "sources",
    ])
}

fn tests(amount: Amount) -> Result<()> {
    if !works("cargo-nextest", "--version") {
        cargo(&["install", "--locked", "--quiet", "cargo-nextest"])?;
    }
    let mut command = Command::new("cargo");
    command.args([
        "nextest",
        "run",
        "--workspace",
        "--all-features",
        "--no-fail-fast",
    ]);
    match amount {
        Amount::Quick => {
            command
                .env("UNIBODY_SEEDS", "100")
                .args(["-E", "not (binary(/^guest/) | test(/planted/))"]);
        }
        Amount::Normal => {}
        Amount::Soak => {
            command.env("UNIBODY_SEEDS", "50000");
        }
    }
    run(&mut command)
}
