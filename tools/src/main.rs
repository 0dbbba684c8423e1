//! `unibody`: serve a node's data plane, and everything an operator does with it.

mod bench;
mod demo;
mod disk;
mod host;
mod node;
mod output;
mod serve;
mod target;
mod vm;
mod volume;

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
    /// Found or join a cluster, run a node of it, and list, drain and remove nodes.
    #[command(subcommand)]
    Node(node::NodeCommand),
    /// Show nodes, disks, volumes, VMs, redundancy, what is being healed and when it will be done.
    Status(StatusArgs),
    /// Format, check, list, add, fail, return and replace disks.
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Create, list, resize and delete volumes.
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Start, stop, watch and swap virtual machines.
    Vm(vm::VmArgs),
    /// Put load on volumes and measure, or write and verify their contents.
    Bench(bench::BenchArgs),
    /// Show all of it on this machine: disks, a volume, load, a failure, healing, verification.
    Demo(demo::DemoArgs),
}

#[derive(Args)]
struct StatusArgs {
    #[command(flatten)]
    node: target::NodeArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => serve::run(args).map(|()| ExitCode::SUCCESS),
        Command::Node(command) => node::run(command).map(|()| ExitCode::SUCCESS),
        Command::Status(args) => output::status(&args.node, args.json).map(|()| ExitCode::SUCCESS),
        Command::Disk(command) => disk::run(command),
        Command::Volume(command) => volume::run(command).map(|()| ExitCode::SUCCESS),
        Command::Vm(args) => vm::run(args).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(args).map(|()| ExitCode::SUCCESS),
        Command::Demo(args) => demo::run(args).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("unibody: {error:#}");
        ExitCode::from(2)
    })
}
