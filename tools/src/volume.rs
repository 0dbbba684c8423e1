//! `unibody volume`: create, list, attach, resize and delete volumes of a node or a cluster.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde_json::json;
use unibody_control::admin::{Request, VolumeSpec, call};
use unibody_control::api::types::{Attached, NewVolume, OnNode, Resize};

use crate::output::{self, Out, parse_size};
use crate::target::{NodeArgs, Target, segment};

#[derive(Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume.
    Create(CreateArgs),
    /// List the volumes.
    List {
        #[command(flatten)]
        node: NodeArgs,
    },
    /// Attach a volume of a cluster to a node, or move it there, and print its socket.
    Attach {
        /// Its name.
        name: String,
        /// The node [default: where it is].
        #[arg(long, value_name = "NODE")]
        on: Option<String>,
        #[command(flatten)]
        node: NodeArgs,
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
    /// In a cluster: the node it will be used on.
    #[arg(long, value_name = "NODE")]
    near: Option<String>,
    #[command(flatten)]
    node: NodeArgs,
}

pub(crate) fn run(command: VolumeCommand, out: Out) -> Result<()> {
    match command {
        VolumeCommand::Create(args) => create(args, out)?,
        VolumeCommand::List { node } => output::volumes(&node, out)?,
        VolumeCommand::Attach { name, on, node } => {
            let path = format!("/v1/volumes/{}/attach", segment(&name));
            let attached: Attached = node.cluster()?.post(&path, &OnNode { node: on })?;
            out.done(&attached.socket.display().to_string(), &json!(attached))?;
        }
        VolumeCommand::Resize { name, size, node } => {
            match node.target()? {
                Target::Alone(control) => {
                    let name = name.clone();
                    call(&control, &Request::VolumeResize { name, size })?;
                }
                Target::Cluster(client) => {
                    let path = format!("/v1/volumes/{}/resize", segment(&name));
                    client.post::<()>(&path, &Resize { size })?;
                }
            }
            out.done("", &json!({ "volume": name, "size": size }))?;
        }
        VolumeCommand::Delete { name, node } => {
            match node.target()? {
                Target::Alone(control) => {
                    let name = name.clone();
                    call(&control, &Request::VolumeDelete { name })?;
                }
                Target::Cluster(client) => client.delete(&format!("/v1/volumes/{}", segment(&name)))?,
            }
            out.done("", &json!({ "volume": name, "deleted": true }))?;
        }
    }
    Ok(())
}

fn create(args: CreateArgs, out: Out) -> Result<()> {
    let made = json!({ "volume": args.name, "size": args.size, "mirror": args.mirror });
    match args.node.target()? {
        Target::Alone(control) => {
            if args.near.is_some() {
                bail!("--near names a node of a cluster: this is a node by itself");
            }
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
            call(&control, &Request::VolumeCreate(spec))?;
        }
        Target::Cluster(client) => {
            if args.socket.is_some() || args.queues.is_some() {
                bail!("a cluster chooses sockets and queues itself: leave out --socket and --queues");
            }
            let new = NewVolume {
                name: args.name,
                size: args.size,
                mirror: args.mirror,
                stripe_unit: args.stripe_unit,
                stripe_width: args.stripe_width,
                read_only: args.read_only,
                near: args.near,
            };
            client.post::<()>("/v1/volumes", &new)?;
        }
    }
    out.done("", &made)
}
