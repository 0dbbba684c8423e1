//! What the program prints: sizes, tables, status screens; and the sizes it reads.

use anyhow::{Context, Result};
use unibody_control::admin::{DiskStatus, NodeStatus, Request, VolumeStatus, call};

use crate::NodeArgs;

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

/// The state of the node at the socket.
pub(crate) fn fetch(node: &NodeArgs) -> Result<NodeStatus> {
    let value = call(&node.control, &Request::Status)?;
    serde_json::from_value(value).context("the node's status is of another version than this program")
}

fn json<T: serde::Serialize>(value: &T) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// `unibody status`.
pub(crate) fn status(node: &NodeArgs, as_json: bool) -> Result<()> {
    let status = fetch(node)?;
    if as_json {
        return json(&status);
    }
    print_volumes(&status.volumes);
    println!();
    print_disks(&status.disks);
    Ok(())
}

/// `unibody volume list`.
pub(crate) fn volumes(node: &NodeArgs, as_json: bool) -> Result<()> {
    let status = fetch(node)?;
    if as_json {
        json(&status.volumes)
    } else {
        print_volumes(&status.volumes);
        Ok(())
    }
}

/// `unibody disk list`.
pub(crate) fn disks(node: &NodeArgs, as_json: bool) -> Result<()> {
    let status = fetch(node)?;
    if as_json {
        json(&status.disks)
    } else {
        print_disks(&status.disks);
        Ok(())
    }
}

fn print_volumes(volumes: &[VolumeStatus]) {
    let rows: Vec<_> = volumes
        .iter()
        .map(|v| {
            let healing = match (v.regions_to_heal, v.stale) {
                (0, 0) => "-".into(),
                (regions, 0) => format!("{} to go", size(regions << 20)),
                (regions, stale) => format!("{} to go, {stale} replicas wait", size(regions << 20)),
            };
            let socket = v.socket.as_ref().map_or("-".into(), |p| p.display().to_string());
            let layout = format!("{} x {}", v.stripe_width, size(v.stripe_unit));
            vec![
                v.name.clone(),
                size(v.size),
                v.mirror.to_string(),
                layout,
                v.state.clone(),
                format!("{}/{}", v.in_sync, v.replicas),
                healing,
                socket,
            ]
        })
        .collect();
    table(
        &[
            "VOLUME", "SIZE", "COPIES", "STRIPE", "STATE", "IN SYNC", "HEALING", "SOCKET",
        ],
        &rows,
    );
}

fn print_disks(disks: &[DiskStatus]) {
    let rows: Vec<_> = disks
        .iter()
        .map(|d| {
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
        })
        .collect();
    table(&["DISK", "DOMAIN", "KIND", "CAPACITY", "FREE", "STATE"], &rows);
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(4096), "4 KiB");
        assert_eq!(size(1 << 30), "1 GiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
    }
}
