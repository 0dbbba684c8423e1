//! `unibody volume`: create, list, resize and delete volumes of a running node.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};
use unibody_control::admin::{Request, VolumeSpec, call};

use crate::NodeArgs;
use crate::output::{self, parse_size};

#[derive(Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume.
    Create(CreateArgs),
    /// List the volumes.
    List {
        #[command(flatten)]
        node: NodeArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Grow a volume; a guest that uses it is told.
    Resize {
        /// Its name.
        name: String,
        /// New size, for example 20G.
        #[arg(long, value_parser = parse_size)]
        size: u64,
        #[command(flatten)]
        node: NodeArgs,
    },
    /// Delete a volume and everything in it.
    Delete {
        /// Its name.
        name: String,
        #[command(flatten)]
        node: NodeArgs,
    },
}

#[derive(Args)]
pub(crate) struct CreateArgs {
    /// Its name.
    name: String,
    /// Size, for example 10G.
    #[arg(long, value_parser = parse_size)]
    size: u64,
    /// Copies of everything, 1 to 3.
    #[arg(long, default_value_t = 2)]
    mirror: u32,
    /// Chunks a row of stripe units is spread over [default: as many as there are disks, at most 16].
    #[arg(long)]
    stripe_width: Option<u32>,
    /// Stripe unit.
    #[arg(long, value_parser = parse_size, default_value = "256K")]
    stripe_unit: u64,
    /// Serve it on this vhost-user socket.
    #[arg(long)]
    socket: Option<PathBuf>,
    /// Request queues offered to the guest.
    #[arg(long)]
    queues: Option<u16>,
    /// Refuse writes.
    #[arg(long)]
    read_only: bool,
    #[command(flatten)]
    node: NodeArgs,
}

pub(crate) fn run(command: VolumeCommand) -> Result<()> {
    match command {
        VolumeCommand::Create(args) => {
            let spec = VolumeSpec {
                name: args.name,
                size: Some(args.size),
                mirror: Some(args.mirror),
                stripe_width: args.stripe_width,
                stripe_unit: Some(args.stripe_unit),
                socket: args.socket,
                queues: args.queues,
                read_only: args.read_only,
            };
            call(&args.node.control, &Request::VolumeCreate(spec))?;
        }
        VolumeCommand::List { node, json } => output::volumes(&node, json)?,
        VolumeCommand::Resize { name, size, node } => {
            call(&node.control, &Request::VolumeResize { name, size })?;
        }
        VolumeCommand::Delete { name, node } => {
            call(&node.control, &Request::VolumeDelete { name })?;
        }
    }
    Ok(())
}
