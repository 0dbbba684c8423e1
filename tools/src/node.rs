//! `unibody node`: found a cluster, join one, run a node of it, and list, drain and remove nodes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde_json::json;
use unibody_control::api;
use unibody_control::api::types::Drain;
use unibody_control::cluster::{Agent, JoinToken, NodeConfig, NodeSetup};
use unibody_control::raft::Start;
use unibody_dataplane::disk::spec::{Backend, DiskSpec};
use unibody_vmm_adapter::RuntimeRoot;

use crate::drain::wait_empty;
use crate::host::Host;
use crate::output::{self, Out, parse_size};
use crate::target::{NODE_DIR, NodeArgs, runtime, segment};

#[derive(Subcommand)]
pub(crate) enum NodeCommand {
    /// Found a cluster with this machine as its first node, and run it in the foreground.
    Init(SetupArgs),
    /// Join a cluster by the token that `node init` and `node token` print, and run the node in the foreground.
    Join {
        /// The token.
        token: JoinToken,
        #[command(flatten)]
        setup: SetupArgs,
    },
    /// Run the node of this machine in the foreground, as after a restart.
    Run {
        /// Its directory.
        #[arg(long, default_value = NODE_DIR)]
        dir: PathBuf,
    },
    /// Print the token by which nodes join; whoever has it has the cluster.
    Token {
        /// Print the token for users of the API instead.
        #[arg(long)]
        api: bool,
        /// The node's directory.
        #[arg(long, default_value = NODE_DIR)]
        dir: PathBuf,
    },
    /// List the nodes.
    List {
        #[command(flatten)]
        node: NodeArgs,
    },
    /// Have data and VMs leave a node; `status` shows when it is empty.
    Drain {
        /// Its name.
        name: String,
        /// Use it again.
        #[arg(long, conflicts_with = "wait")]
        off: bool,
        /// Wait until nothing is left on it; an error says what can not leave it.
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        node: NodeArgs,
    },
    /// Remove a node that is empty. It can come back only as a new one.
    Remove {
        /// Its name.
        name: String,
        #[command(flatten)]
        node: NodeArgs,
    },
}

/// What a new node is to be.
#[derive(Args)]
pub(crate) struct SetupArgs {
    /// Where the node keeps what it must remember.
    #[arg(long, default_value = NODE_DIR)]
    dir: PathBuf,
    /// Its name [default: this machine's].
    #[arg(long)]
    name: Option<String>,
    /// Where it listens, for nodes and for users.
    #[arg(long, default_value = "127.0.0.1:7400")]
    listen: String,
    /// Where others reach it [default: where it listens].
    #[arg(long)]
    address: Option<String>,
    /// Its failure domain: no two copies of anything are in the same [default: its own].
    #[arg(long)]
    domain: Option<String>,
    /// Memory for VMs.
    #[arg(long, value_parser = parse_size, default_value = "4G")]
    memory: u64,
    /// One polled reactor on each of these cores.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    cores: Vec<usize>,
    /// A disk: a formatted file or block device, or `mem:2G`; `,domain=a` names its failure domain.
    #[arg(long = "disk", value_name = "SPEC")]
    disks: Vec<String>,
    /// Memory for extent records, for each disk: 4 KiB cover 2 MiB of data.
    #[arg(long, value_parser = parse_size, default_value = "64M")]
    cache: u64,
    /// Put a fault injector in front of every disk, for drills. It costs a little.
    #[arg(long)]
    faults: bool,
    /// Seconds after which the disks of a node that is gone are given up and their data is placed elsewhere.
    #[arg(long, value_name = "SECONDS", default_value_t = 1800)]
    out_after: u64,
}

/// The same disk, wherever the node is started.
pub(crate) fn whole(text: &str) -> Result<String> {
    let mut spec: DiskSpec = text.parse().with_context(|| format!("--disk {text}"))?;
    if let Backend::Path(path) = &mut spec.backend {
        *path = std::path::absolute(&path)?;
    }
    Ok(spec.to_string())
}

impl SetupArgs {
    fn make(self, token: Option<&JoinToken>) -> Result<PathBuf> {
        let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let disks = self.disks.iter().map(|text| whole(text));
        let setup = NodeSetup {
            name: self.name.unwrap_or_else(|| host().trim().to_owned()),
            address: self.address.unwrap_or_else(|| self.listen.clone()),
            listen: self.listen,
            domain: self.domain,
            memory: self.memory,
            cores: self.cores,
            cache_bytes: self.cache as usize,
            disks: disks.collect::<Result<_>>()?,
            faults: self.faults,
            out_after: Duration::from_secs(self.out_after),
        };
        NodeConfig::make(&self.dir, setup, token)?;
        Ok(self.dir)
    }
}

pub(crate) fn run(command: NodeCommand, out: Out) -> Result<()> {
    match command {
        NodeCommand::Init(setup) => {
            let dir = setup.make(None)?;
            let token = join_token(&dir)?;
            if !out.json {
                println!("others join with: unibody node join {token}");
            }
            run_node(&dir, &Start::Init, out)
        }
        NodeCommand::Join { token, setup } => {
            let dir = setup.make(Some(&token))?;
            run_node(&dir, &Start::Join(token.seeds), out)
        }
        NodeCommand::Run { dir } => {
            let config = NodeConfig::load(&dir)?;
            run_node(&dir, &Start::Resume(config.seeds), out)
        }
        NodeCommand::Token { api, dir } => {
            let token = match api {
                true => NodeConfig::load(&dir)?.api_token(),
                false => join_token(&dir)?.to_string(),
            };
            out.done(&token, &json!({ "token": token }))
        }
        NodeCommand::List { node } => output::nodes(&node, out),
        NodeCommand::Drain {
            name,
            off,
            wait,
            node,
        } => {
            let path = format!("/v1/nodes/{}/drain", segment(&name));
            let client = node.cluster()?;
            client.post::<()>(&path, &Drain { on: !off })?;
            if wait {
                wait_empty(&client, &name, out)?;
            }
            out.done("", &json!({ "node": name, "draining": !off, "empty": wait }))
        }
        NodeCommand::Remove { name, node } => {
            node.cluster()?.delete(&format!("/v1/nodes/{}", segment(&name)))?;
            out.done("", &json!({ "node": name, "removed": true }))
        }
    }
}

/// A token that leads to the node in this directory.
pub(crate) fn join_token(dir: &Path) -> Result<JoinToken> {
    let config = NodeConfig::load(dir)?;
    Ok(config.join_token(vec![config.address.clone()]))
}

fn run_node(dir: &Path, start: &Start, out: Out) -> Result<()> {
    let config = NodeConfig::load(dir)?;
    let dir = std::path::absolute(dir)?;
    let stop = unibody_control::node::stop_on_signals().context("signals can not be caught")?;
    crate::serve::raise_file_limit();
    let host = Arc::new(Host(RuntimeRoot::new(runtime(&dir))));
    let mut agent = Agent::start(&dir, config, start, host.clone())?;
    api::serve(&mut agent, host);
    eprintln!(
        "unibody: node {} listens at {}",
        agent.config().name,
        agent.address()
    );
    let handle = agent.handle();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            // The sender lives as long as the process.
            if stop.recv().is_ok() {
                handle.stop();
            }
        })?;
    match out.json {
        // One line, as the other is: what follows is for whoever waits for it.
        true => println!(
            "{}",
            json!({
                "ready": true,
                "node": agent.config().name,
                "address": agent.address().to_string(),
                "join": join_token(&dir)?.to_string(),
            })
        ),
        false => println!("ready"),
    }
    agent.run()?;
    Ok(())
}
