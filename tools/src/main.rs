//! `unibody`: serve a node's data plane, and everything an operator does with it.

mod bench;
mod demo;
mod disk;
mod drain;
mod host;
mod node;
mod output;
mod progress;
mod serve;
mod target;
mod vm;
mod volume;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use output::Out;

/// Hyperconverged storage and VM hosting for a handful of commodity servers.
#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
struct Cli {
    /// Print JSON, errors too.
    #[arg(long, global = true)]
    json: bool,
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
}

/// Says how the program is used: because that was asked for, or because it was called wrongly, to scripts in their form.
fn usage(error: &clap::Error) -> ExitCode {
    let mut words = std::env::args_os().take_while(|word| word != "--");
    if error.use_stderr() && words.any(|word| word == "--json") {
        let text = error.to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
        println!("{}", serde_json::json!({ "error": text }));
    }
    // A terminal that has gone does not want to know.
    error.print().ok();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

fn main() -> ExitCode {
    let Cli { json, command } = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let out = Out { json };
    let result = match command {
        Command::Serve(args) => serve::run(args, out).map(|()| ExitCode::SUCCESS),
        Command::Node(command) => node::run(command, out).map(|()| ExitCode::SUCCESS),
        Command::Status(args) => output::status(&args.node, out).map(|()| ExitCode::SUCCESS),
        Command::Disk(command) => disk::run(command, out),
        Command::Volume(command) => volume::run(command, out).map(|()| ExitCode::SUCCESS),
        Command::Vm(args) => vm::run(args, out).map(|()| ExitCode::SUCCESS),
        Command::Bench(args) => bench::run(args, out).map(|()| ExitCode::SUCCESS),
        Command::Demo(_) if json => Err(anyhow::anyhow!("the demo is for people: it has no JSON")),
        Command::Demo(args) => demo::run(args).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        if json {
            println!("{}", serde_json::json!({ "error": format!("{error:#}") }));
        }
        eprintln!("unibody: {error:#}");
        ExitCode::from(2)
    })
}
