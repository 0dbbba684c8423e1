//! `unibody disk`: format and check disks offline; list, add, fail, return and replace disks of a running node.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use serde_json::{Value, json};
use unibody_control::admin::{Fault, Request, call};
use unibody_control::api::types::GivenUp;
use unibody_control::cluster::LocalRequest;
use unibody_dataplane::store::Verdict;

use crate::output::{self, Out, parse_size};
use crate::progress::Bar;
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
    },
    /// List the disks of a node.
    List {
        #[command(flatten)]
        node: NodeArgs,
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

pub(crate) fn run(command: DiskCommand, out: Out) -> Result<ExitCode> {
    match command {
        DiskCommand::Format {
            path,
            size,
            journal,
            force,
        } => {
            let uuid = unibody_control::node::format_disk(&path, size, journal, force)
                .with_context(|| format!("{} was not formatted", path.display()))?;
            out.done(
                &format!("{}: formatted, disk {uuid}", path.display()),
                &json!({ "path": path, "disk": uuid.to_string() }),
            )?;
        }
        DiskCommand::Check { path } => return check(&path, out),
        DiskCommand::List { node } => output::disks(&node, out)?,
        DiskCommand::Add { spec, on, node } => {
            let far = LocalRequest::DiskAdd {
                spec: crate::node::whole(&spec)?,
            };
            let added = either(&node, on, Request::DiskAdd { spec: spec.clone() }, far)?;
            out.done("", &told(added, &node, &spec)?)?;
        }
        DiskCommand::Fail { disk, on, node } => {
            let far = LocalRequest::DiskFail { disk: disk.clone() };
            either(&node, on, Request::DiskFail { disk: disk.clone() }, far)?;
            out.done("", &json!({ "disk": disk, "failed": true }))?;
        }
        DiskCommand::Return { disk, on, node } => {
            let far = LocalRequest::DiskReturn { disk: disk.clone() };
            either(&node, on, Request::DiskReturn { disk: disk.clone() }, far)?;
            out.done("", &json!({ "disk": disk, "returned": true }))?;
        }
        DiskCommand::Replace { disk, spec, node } => match node.target()? {
            Target::Alone(control) => {
                let with = spec.clone();
                call(
                    &control,
                    &Request::DiskReplace {
                        disk: disk.clone(),
                        spec,
                    },
                )?;
                out.done("", &json!({ "disk": disk, "replaced_by": with }))?;
            }
            Target::Cluster(_) => bail!("in a cluster: `disk add` another one, then `disk remove` this one"),
        },
        DiskCommand::Remove {
            disk,
            lost: false,
            node,
        } => {
            node.cluster()?.delete(&format!("/v1/disks/{}", segment(&disk)))?;
            out.done("", &json!({ "disk": disk, "leaving": true }))?;
        }
        DiskCommand::Remove {
            disk,
            lost: true,
            node,
        } => {
            let path = format!("/v1/disks/{}/give-up", segment(&disk));
            let given_up: GivenUp = node.cluster()?.post(&path, &())?;
            let line = |(volume, chunks): (&String, &u64)| {
                format!("volume {volume}: {chunks} chunks have no copy left that can be read now")
            };
            let lines: Vec<_> = given_up.unreadable.iter().map(line).collect();
            let told = json!({ "disk": disk, "leaving": true, "unreadable": given_up.unreadable });
            out.done(&lines.join("\n"), &told)?;
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
            let what = json!({ "disk": disk, "fault": fault });
            either(&node, on, Request::DiskFault { disk, fault }, far)?;
            out.done("", &what)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks a node by itself, or a certain one of a cluster.
fn either(node: &NodeArgs, on: Option<String>, alone: Request, far: LocalRequest) -> Result<Value> {
    match node.target()? {
        Target::Alone(_) if on.is_some() => bail!("--on names a node of a cluster: this is a node by itself"),
        Target::Alone(control) => Ok(call(&control, &alone)?),
        Target::Cluster(client) => client.command(on.as_deref(), &far),
    }
}

/// What a node says of a disk that it was given: a node by itself has to be asked.
fn told(added: Value, node: &NodeArgs, spec: &str) -> Result<Value> {
    match node.target()? {
        Target::Alone(control) => {
            let name = spec.split(',').next().unwrap_or(spec);
            // One in memory has a name that only its node knows: the last one is new.
            let mut disks = output::fetch(&control)?.disks.into_iter().rev();
            Ok(json!(disks.find(|disk| disk.name == name || name.contains(':'))))
        }
        Target::Cluster(_) => Ok(added),
    }
}

fn check(path: &std::path::Path, out: Out) -> Result<ExitCode> {
    let mut bar = Bar::new(&format!("checking {}", path.display()), out);
    let report = unibody_control::node::check_disk(path, &mut |done, total| bar.show(done, total));
    bar.end();
    let report = match report {
        Ok(report) => report,
        // As much of an answer as any other for a script that looks at disks.
        Err(error) if out.json => {
            let error = format!("{:#}", anyhow::Error::from(error));
            out.done("", &json!({ "verdict": "unusable", "error": error }))?;
            return Ok(ExitCode::from(2));
        }
        Err(error) => return Err(error.into()),
    };
    let (verdict, status) = match report.verdict {
        Verdict::Clean => ("clean", 0),
        Verdict::Damaged => ("damaged", 1),
        Verdict::Unusable => ("unusable", 2),
    };
    let mut lines: Vec<String> = report.findings.iter().map(ToString::to_string).collect();
    let value = json!({
        "disk": report.uuid.map(|uuid| uuid.to_string()),
        "verdict": verdict,
        "closed": report.closed,
        "findings": lines,
        "findings_total": report.findings_total,
        "journal_blocks": report.journal_blocks,
        "chunks": report.chunks,
        "extents": report.extents,
        "blocks": report.blocks,
        "blocks_in_doubt": report.in_doubt,
        "slots_quarantined": report.quarantined,
    });
    let unlisted = report.findings_total - report.findings.len() as u64;
    if unlisted > 0 {
        lines.push(format!("and {unlisted} more"));
    }
    lines.push(format!(
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
    ));
    out.done(&lines.join("\n"), &value)?;
    Ok(ExitCode::from(status))
}
