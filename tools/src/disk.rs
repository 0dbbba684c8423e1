//! `unibody disk`: format and check disks offline; list, add, fail, return and replace disks of a running node.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use unibody_control::admin::{Fault, Request, call};
use unibody_control::api::types::GivenUp;
use unibody_control::cluster::LocalRequest;
use unibody_dataplane::store::Verdict;

use crate::output::{self, parse_size};
use crate::target::{NodeArgs, Target, segment};

#[derive(Subcommand)]
pub(crate) enum DiskCommand {
    /// Prepare a file or block device for Unibody. Everything on it is lost.
    Format {
        /// The file or block device.
        path: PathBuf,
        /// Create a file of this size, or grow an existing one to it.
        #[arg(long, value_parser = parse_size)]
        size: Option<u64>,
        /// Size of the journal [default: a 64th of the disk, 1 MiB to 64 MiB].
        #[arg(long, value_parser = parse_size)]
        journal: Option<u64>,
        /// Format even though something is on it.
        #[arg(long)]
        force: bool,
    },
    /// Verify a whole disk offline. Exit status: 0 clean, 1 damaged, 2 unusable.
    Check {
        /// The file or block device; no node may be using it.
        path: PathBuf,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// List the disks of a node.
    List {
        #[command(flatten)]
        node: NodeArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Give a node another disk.
    Add {
        /// A formatted file or block device (`./d2.img`, `/dev/sdb,domain=b`) or `mem:2G`.
        spec: String,
        /// In a cluster: its node [default: the one that is asked].
        #[arg(long, value_name = "NODE")]
        on: Option<String>,
        #[command(flatten)]
        node: NodeArgs,
    },
    /// Take a disk out of service, as if it had died.
    Fail {
        /// Its name in `disk list`.
        disk: String,
        /// In a cluster: its node [default: the one that is asked].
        #[arg(long, value_name = "NODE")]
        on: Option<String>,
        #[command(flatten)]
        node: NodeArgs,
    },
    /// Put a failed disk back into service; it gets exactly what it missed.
    Return {
        /// Its name in `disk list`.
        disk: String,
        /// In a cluster: its node [default: the one that is asked].
        #[arg(long, value_name = "NODE")]
        on: Option<String>,
        #[command(flatten)]
        node: NodeArgs,
    },
    /// Give a failed disk's place to another disk, which gets everything.
    Replace {
        /// The failed disk's name in `disk list`.
        disk: String,
        /// The new disk, as for `add`.
        spec: String,
        #[command(flatten)]
        node: NodeArgs,
    },
    /// Take a disk out of a cluster for good: what is on it moves to others, each copy as soon as its new one is complete, then
    /// the disk is forgotten. Refused where the only copies that can be read would be given up.
    Remove {
        /// Its identity in `disk list`.
        disk: String,
        /// The disk can not be read and never will be: give up what is on it. What has no other copy can not be read again.
        #[arg(long)]
        lost: bool,
        #[command(flatten)]
        node: NodeArgs,
    },
    /// Make a disk misbehave, for drills: none, read-errors, write-errors, flush-errors, rot, stuck or delay=MS.
    Fault {
        /// Its name in `disk list`.
        disk: String,
        /// The fault.
        #[arg(value_parser = parse_fault)]
        fault: Fault,
        /// In a cluster: its node [default: the one that is asked].
        #[arg(long, value_name = "NODE")]
        on: Option<String>,
        #[command(flatten)]
        node: NodeArgs,
    },
}

fn parse_fault(text: &str) -> Result<Fault, String> {
    Ok(match text {
        "none" => Fault::None,
        "read-errors" => Fault::ReadErrors,
        "write-errors" => Fault::WriteErrors,
        "flush-errors" => Fault::FlushErrors,
        "rot" => Fault::Rot,
        "stuck" => Fault::Stuck,
        _ => match text.strip_prefix("delay=").map(str::parse) {
            Some(Ok(ms)) => Fault::Delay(ms),
            _ => {
                return Err(
                    "use none, read-errors, write-errors, flush-errors, rot, stuck or delay=MILLISECONDS"
                        .into(),
                );
            }
        },
    })
}

pub(crate) fn run(command: DiskCommand) -> Result<ExitCode> {
    match command {
        DiskCommand::Format {
            path,
            size,
            journal,
            force,
        } => {
            let uuid = unibody_control::node::format_disk(&path, size, journal, force)
                .with_context(|| format!("{} was not formatted", path.display()))?;
            println!("{}: formatted, disk {uuid}", path.display());
        }
        DiskCommand::Check { path, json } => return check(&path, json),
        DiskCommand::List { node, json } => output::disks(&node, json)?,
        DiskCommand::Add { spec, on, node } => {
            let far = LocalRequest::DiskAdd {
                spec: crate::node::whole(&spec)?,
            };
            either(&node, on, Request::DiskAdd { spec }, far)?;
        }
        DiskCommand::Fail { disk, on, node } => {
            let far = LocalRequest::DiskFail { disk: disk.clone() };
            either(&node, on, Request::DiskFail { disk }, far)?;
        }
        DiskCommand::Return { disk, on, node } => {
            let far = LocalRequest::DiskReturn { disk: disk.clone() };
            either(&node, on, Request::DiskReturn { disk }, far)?;
        }
        DiskCommand::Replace { disk, spec, node } => match node.target()? {
            Target::Alone(control) => drop(call(&control, &Request::DiskReplace { disk, spec })?),
            Target::Cluster(_) => bail!("in a cluster: `disk add` another one, then `disk remove` this one"),
        },
        DiskCommand::Remove {
            disk,
            lost: false,
            node,
        } => {
            node.cluster()?.delete(&format!("/v1/disks/{}", segment(&disk)))?;
        }
        DiskCommand::Remove {
            disk,
            lost: true,
            node,
        } => {
            let path = format!("/v1/disks/{}/give-up", segment(&disk));
            let given_up: GivenUp = node.cluster()?.post(&path, &())?;
            for (volume, chunks) in given_up.unreadable {
                println!("volume {volume}: {chunks} chunks have no copy left that can be read now");
            }
        }
        DiskCommand::Fault {
            disk,
            fault,
            on,
            node,
        } => {
            let far = LocalRequest::DiskFault {
                disk: disk.clone(),
                fault: fault.clone(),
            };
            either(&node, on, Request::DiskFault { disk, fault }, far)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks a node by itself, or a certain one of a cluster.
fn either(node: &NodeArgs, on: Option<String>, alone: Request, far: LocalRequest) -> Result<()> {
    match node.target()? {
        Target::Alone(_) if on.is_some() => bail!("--on names a node of a cluster: this is a node by itself"),
        Target::Alone(control) => drop(call(&control, &alone)?),
        Target::Cluster(client) => drop(client.command(on.as_deref(), &far)?),
    }
    Ok(())
}

fn check(path: &std::path::Path, json: bool) -> Result<ExitCode> {
    let show = std::io::stderr().is_terminal() && !json;
    let mut shown = u64::MAX;
    let mut progress = |done: u64, total: u64| {
        let percent = done.saturating_mul(100) / total.max(1);
        if show && percent != shown {
            shown = percent;
            eprint!("\rchecking {}: {percent} %", path.display());
        }
    };
    let report = unibody_control::node::check_disk(path, &mut progress);
    if show {
        eprintln!();
    }
    let report = report?;
    let (verdict, status) = match report.verdict {
        Verdict::Clean => ("clean", 0),
        Verdict::Damaged => ("damaged", 1),
        Verdict::Unusable => ("unusable", 2),
    };
    if json {
        let findings: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
        let value = serde_json::json!({
            "disk": report.uuid.map(|uuid| uuid.to_string()),
            "verdict": verdict,
            "closed": report.closed,
            "findings": findings,
            "findings_total": report.findings_total,
            "journal_blocks": report.journal_blocks,
            "chunks": report.chunks,
            "extents": report.extents,
            "blocks": report.blocks,
            "blocks_in_doubt": report.in_doubt,
            "slots_quarantined": report.quarantined,
        });
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(ExitCode::from(status));
    }
    for finding in &report.findings {
        println!("{finding}");
    }
    let unlisted = report.findings_total - report.findings.len() as u64;
    if unlisted > 0 {
        println!("and {unlisted} more");
    }
    println!(
        "{}: {verdict}; {} chunks, {} extents, {} blocks checked{}",
        path.display(),
        report.chunks,
        report.extents,
        report.blocks,
        if report.closed {
            ""
        } else {
            "; it was not closed: opening it will recover it"
        },
    );
    Ok(ExitCode::from(status))
}
