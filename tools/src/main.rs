//! `unibody`: serve a node's data plane, and everything an operator does with it.

mod bench;
mod demo;
mod disk;
mod output;
mod serve;
mod vm;
mod volume;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// Hyperconverged storage and VM hosting for a handful of commodity servers.
#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run this node's data plane in the foreground.
    Serve(serve::ServeArgs),
    /// Show the node: disks, volumes, redundancy, what is being healed.
    Status(StatusArgs),
    /// Format, check, list, add, fail, return and replace disks.
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Create, list, resize and delete volumes.
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Start, stop, watch and swap virtual machines.
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Put load on volumes and measure, or write and verify their contents.
    Bench(bench::BenchArgs),
    /// Show all of it on this machine: disks, a volume, load, a failure, healing, verification.
    Demo(demo::DemoArgs),
}

#[derive(Args)]
struct StatusArgs {
    #[command(flatten)]
    node: NodeArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Which node to talk to.
#[derive(Args, Clone)]
pub(crate) struct NodeArgs {
    /// The node's control socket.
    #[arg(
        long,
        value_name = "SOCKET",
        env = "UNIBODY_CONTROL",
        default_value = "./state/control.sock"
    )]
    control: PathBuf,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => serve::run(args).map(|()| ExitCode::SUCCESS),
        Command::Status(args) => output::status(&args.node, args.json).map(|()| ExitCode::SUCCESS),
        Command::Disk(command) => disk::run(command),
        Command::Volume(command) => volume::run(command).map(|()| ExitCode::SUCCESS),
        Command::Vm(command) => vm::run(command).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(args).map(|()| ExitCode::SUCCESS),
        Command::Demo(args) => demo::run(args).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("unibody: {error:#}");
        ExitCode::from(2)
    })
}
