//! What the program prints: sizes, tables, status screens; and the sizes it reads.

use std::path::Path;

use anyhow::{Context, Result};
use unibody_control::admin::{DiskStatus, NodeStatus, Request, VolumeStatus, call};
use unibody_control::api::types::{Balance, ClusterStatus, NodeSummary, VmSummary};

use crate::target::{Client, NodeArgs, Target};

/// Bytes as people write them: `4096`, `64K`, `10G`.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    unibody_dataplane::disk::spec::parse_size(text).map_err(|error| error.to_string())
}

/// Bytes as people read them.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value.fract() < 0.05 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Prints rows under headings, columns aligned.
fn table(headings: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .chain([headings[column].len()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let text: Vec<String> = cells
            .zip(&widths)
            .map(|(cell, &width)| format!("{cell:width$}"))
            .collect();
        println!("{}", text.join("  ").trim_end());
    };
    line(&mut headings.iter().copied());
    for row in rows {
        line(&mut row.iter().map(String::as_str));
    }
}

/// What a node by itself says.
pub(crate) fn fetch(control: &Path) -> Result<NodeStatus> {
    let value = call(control, &Request::Status)?;
    serde_json::from_value(value).context("the node's status is of another version than this program")
}

/// How a command says what it has to say.
#[derive(Clone, Copy)]
pub(crate) struct Out {
    /// As JSON, for scripts.
    pub(crate) json: bool,
}

impl Out {
    /// Says what was done: a text for people, if there is anything to say to them, or a value for scripts.
    pub(crate) fn done(self, text: &str, value: &serde_json::Value) -> Result<()> {
        match self.json {
            true => json(value)?,
            false if text.is_empty() => {}
            false => println!("{text}"),
        }
        Ok(())
    }
}

fn json<T: serde::Serialize>(value: &T) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// `unibody status`.
pub(crate) fn status(node: &NodeArgs, out: Out) -> Result<()> {
    match node.target()? {
        Target::Alone(control) => {
            let status = fetch(&control)?;
            if out.json {
                return json(&status);
            }
            print_volumes(&status.volumes);
            println!();
            print_disks(&status.disks);
            if let Some(line) = healing(&status.volumes.iter().collect::<Vec<_>>()) {
                println!("\n{line}");
            }
        }
        Target::Cluster(client) => {
            let status = client.status()?;
            if out.json {
                return json(&status);
            }
            print_cluster(&status);
        }
    }
    Ok(())
}

fn print_cluster(status: &ClusterStatus) {
    if !status.confirmed {
        println!(
            "No majority of the nodes answers: this is what {} knew last.\n",
            status.node
        );
    }
    print_nodes(&status.nodes);
    println!();
    print_disks_of(status);
    println!();
    print_volumes_of(status);
    if !status.vms.is_empty() {
        println!();
        print_vms(&status.vms);
    }
    let volumes: Vec<_> = status.volumes.iter().map(|volume| &volume.volume).collect();
    if let Some(line) = healing(&volumes) {
        println!("\n{line}");
    }
    let Balance { moving, left } = status.balance;
    if moving + left > 0 {
        println!("\nBalancing disks: {moving} chunks move, about {left} more are to.");
    }
}

/// What is being healed, and when the last of it will be done.
fn healing(volumes: &[&VolumeStatus]) -> Option<String> {
    let of: Vec<_> = volumes
        .iter()
        .filter(|volume| volume.regions_to_heal > 0)
        .collect();
    let left: u64 = of.iter().map(|volume| volume.regions_to_heal).sum();
    let known: Option<Vec<u64>> = of.iter().map(|volume| volume.heal_seconds).collect();
    let end = known.map_or("no end in sight yet".to_owned(), |seconds| {
        format!(
            "done in about {} s",
            seconds.into_iter().max().unwrap_or(0).max(1)
        )
    });
    (left > 0).then(|| format!("healing: {} to go, {end}", size(left << 20)))
}

/// `unibody volume list`.
pub(crate) fn volumes(node: &NodeArgs, out: Out) -> Result<()> {
    match node.target()? {
        Target::Alone(control) => {
            let status = fetch(&control)?;
            match out.json {
                true => json(&status.volumes)?,
                false => print_volumes(&status.volumes),
            }
        }
        Target::Cluster(client) => {
            let status = client.status()?;
            match out.json {
                true => json(&status.volumes)?,
                false => print_volumes_of(&status),
            }
        }
    }
    Ok(())
}

/// `unibody disk list`.
pub(crate) fn disks(node: &NodeArgs, out: Out) -> Result<()> {
    match node.target()? {
        Target::Alone(control) => {
            let status = fetch(&control)?;
            match out.json {
                true => json(&status.disks)?,
                false => print_disks(&status.disks),
            }
        }
        Target::Cluster(client) => {
            let status = client.status()?;
            match out.json {
                true => json(&status.disks)?,
                false => print_disks_of(&status),
            }
        }
    }
    Ok(())
}

/// `unibody node list`.
pub(crate) fn nodes(node: &NodeArgs, out: Out) -> Result<()> {
    let status = node.cluster()?.status()?;
    match out.json {
        true => json(&status.nodes)?,
        false => print_nodes(&status.nodes),
    }
    Ok(())
}

/// `unibody vm list` of a cluster.
pub(crate) fn vms(client: &Client, out: Out) -> Result<()> {
    let status = client.status()?;
    match out.json {
        true => json(&status.vms)?,
        false => print_vms(&status.vms),
    }
    Ok(())
}

fn print_nodes(nodes: &[NodeSummary]) {
    let row = |node: &NodeSummary| {
        let state = match (node.alive, node.draining) {
            (false, _) => "silent",
            (true, true) => "draining",
            (true, false) => "alive",
        };
        vec![
            node.name.clone(),
            node.addresses.join(" "),
            node.domain.clone(),
            node.role.clone(),
            format!("{} of {}", size(node.memory_free), size(node.memory)),
            state.into(),
        ]
    };
    let rows: Vec<_> = nodes.iter().map(row).collect();
    table(
        &["NODE", "ADDRESS", "DOMAIN", "ROLE", "MEMORY FREE", "STATE"],
        &rows,
    );
}

fn print_vms(vms: &[VmSummary]) {
    let row = |vm: &VmSummary| {
        vec![
            vm.name.clone(),
            vm.node.clone().unwrap_or_else(|| "-".into()),
            size(vm.memory),
            vm.volumes.join(" "),
            vm.state.clone(),
        ]
    };
    let rows: Vec<_> = vms.iter().map(row).collect();
    table(&["VM", "NODE", "MEMORY", "VOLUMES", "STATE"], &rows);
}

fn print_volumes_of(status: &ClusterStatus) {
    let row = |volume: &unibody_control::api::types::VolumeSummary| {
        let mut row = volume_row(&volume.volume);
        row.insert(1, volume.owner.clone().unwrap_or_else(|| "-".into()));
        row
    };
    let rows: Vec<_> = status.volumes.iter().map(row).collect();
    let mut headings = VOLUME_HEADINGS.to_vec();
    headings.insert(1, "NODE");
    table(&headings, &rows);
}

fn print_disks_of(status: &ClusterStatus) {
    let row = |disk: &unibody_control::api::types::DiskSummary| {
        let mut row = disk_row(&disk.disk);
        if disk.stuck {
            row[5] = format!(
                "{}, leaving: {} replicas stay, they need a disk in another failure domain",
                row[5], disk.replicas
            );
        } else if disk.leaving {
            row[5] = format!("{}, leaving: {} replicas to move", row[5], disk.replicas);
        }
        if let Some(warning) = &disk.warning {
            row[5] = format!("{}, {warning}", row[5]);
        }
        row.insert(0, disk.node.clone());
        row.push(disk.disk.uuid.clone());
        row
    };
    let rows: Vec<_> = status.disks.iter().map(row).collect();
    let mut headings = DISK_HEADINGS.to_vec();
    headings.insert(0, "NODE");
    headings.push("IDENTITY");
    table(&headings, &rows);
}

const VOLUME_HEADINGS: [&str; 8] = [
    "VOLUME", "SIZE", "COPIES", "STRIPE", "STATE", "IN SYNC", "HEALING", "SOCKET",
];

fn volume_row(v: &VolumeStatus) -> Vec<String> {
    let mut healing = match (v.regions_to_heal, v.heal_seconds) {
        (0, _) if v.stale == 0 => "-".into(),
        (regions, None) => format!("{} to go", size(regions << 20)),
        (regions, Some(seconds)) => format!("{} to go, about {} s", size(regions << 20), seconds.max(1)),
    };
    if v.stale > 0 {
        healing += &format!(", {} replicas wait", v.stale);
    }
    let socket = v.socket.as_ref().map_or("-".into(), |p| p.display().to_string());
    vec![
        v.name.clone(),
        size(v.size),
        v.mirror.to_string(),
        format!("{} x {}", v.stripe_width, size(v.stripe_unit)),
        v.state.clone(),
        format!("{}/{}", v.in_sync, v.replicas),
        healing,
        socket,
    ]
}

fn print_volumes(volumes: &[VolumeStatus]) {
    let rows: Vec<_> = volumes.iter().map(volume_row).collect();
    table(&VOLUME_HEADINGS, &rows);
}

const DISK_HEADINGS: [&str; 6] = ["DISK", "DOMAIN", "KIND", "CAPACITY", "FREE", "STATE"];

fn disk_row(d: &DiskStatus) -> Vec<String> {
    let state = match &d.reason {
        Some(reason) => format!("{} ({reason})", d.state),
        None if d.suspect => format!("{} (suspect)", d.state),
        None => d.state.clone(),
    };
    vec![
        d.name.clone(),
        d.domain.clone(),
        d.kind.clone(),
        size(d.capacity),
        size(d.free),
        state,
    ]
}

fn print_disks(disks: &[DiskStatus]) {
    let rows: Vec<_> = disks.iter().map(disk_row).collect();
    table(&DISK_HEADINGS, &rows);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_healing_is_that_of_the_last_volume() {
        let volume = |regions_to_heal, heal_seconds| VolumeStatus {
            regions_to_heal,
            heal_seconds,
            ..VolumeStatus::default()
        };
        let (whole, soon, late, unknown) = (
            volume(0, None),
            volume(1024, Some(3)),
            volume(1024, Some(9)),
            volume(1, None),
        );
        assert_eq!(healing(&[&whole]), None);
        let line = healing(&[&whole, &soon, &late]).unwrap();
        assert_eq!(line, "healing: 2 GiB to go, done in about 9 s");
        assert!(healing(&[&soon, &unknown]).unwrap().contains("no end in sight"));
        assert!(volume_row(&late)[6].contains("about 9 s"));
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(4096), "4 KiB");
        assert_eq!(size(1 << 30), "1 GiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
    }
}
