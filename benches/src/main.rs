//! Side-by-side measurements: Unibody and a peer in turns, one server at a time on core 0, the load on core 1.
//!
//! Every run starts a fresh server, fills the range, measures and stops it; contenders alternate, so that a drift of the
//! machine meets both. `benches/README.md` says what each figure means.

mod devices;
mod servers;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::{Value, json};

use servers::{Contender, Place};

/// Side-by-side measurements of Unibody and its peers.
#[derive(Parser)]
pub(crate) struct Args {
    /// One short run of each: to see that it works, not to quote.
    #[arg(long)]
    quick: bool,
    /// Only rows whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Runs of each contender; odd.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Seconds of each run.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// The program to measure.
    #[arg(long, default_value = "target/release/unibody")]
    unibody: PathBuf,
    /// Directory for disk files on a real disk.
    #[arg(long, default_value = "target/bench")]
    dir: PathBuf,
    /// Also write the results there, as DATE.md and DATE.json.
    #[arg(long)]
    out: Option<PathBuf>,
}

/// What is measured of a run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measure {
    /// Requests a second.
    Iops,
    /// MiB a second.
    Bandwidth,
    /// Median latency, microseconds; less is better.
    Latency,
}

/// One line of the table.
struct Row {
    name: &'static str,
    rw: &'static str,
    bs: &'static str,
    depth: &'static str,
    measure: Measure,
    ours: Contender,
    peer: Contender,
    /// Ratio ours / peer that is to be reached (for latency: not to be exceeded).
    target: f64,
}

const fn row(
    name: &'static str,
    load: (&'static str, &'static str, &'static str),
    measure: Measure,
    contenders: (Contender, Contender),
    target: f64,
) -> Row {
    Row {
        name,
        rw: load.0,
        bs: load.1,
        depth: load.2,
        measure,
        ours: contenders.0,
        peer: contenders.1,
        target,
    }
}

use Contender::{Fio, Qsd, QsdNull, Unibody, UnibodyFile};
use Measure::{Bandwidth, Iops, Latency};

const NULL: (Contender, Contender) = (Unibody(&["null:1G"]), QsdNull);
const MEM: (Contender, Contender) = (Unibody(&["mem:2G"]), Qsd);
const MIRROR: (Contender, Contender) = (Unibody(&["mem:2G,domain=a", "mem:2G,domain=b"]), Qsd);
const TMPFS: (Contender, Contender) = (UnibodyFile(Place::Tmpfs), Fio(Place::Tmpfs));
const DISK: (Contender, Contender) = (UnibodyFile(Place::Disk), Fio(Place::Disk));

const ROWS: &[Row] = &[
    row(
        "null, random read, depth 32",
        ("randread", "4K", "32"),
        Iops,
        NULL,
        2.0,
    ),
    row(
        "null, random write, depth 32",
        ("randwrite", "4K", "32"),
        Iops,
        NULL,
        2.0,
    ),
    row(
        "null, random read, depth 128",
        ("randread", "4K", "128"),
        Iops,
        NULL,
        2.0,
    ),
    row(
        "null, random write, depth 128",
        ("randwrite", "4K", "128"),
        Iops,
        NULL,
        2.0,
    ),
    row(
        "mem, random read, depth 32",
        ("randread", "4K", "32"),
        Iops,
        MEM,
        5.0,
    ),
    row(
        "mem x 2 copies, random write, depth 32",
        ("randwrite", "4K", "32"),
        Iops,
        MIRROR,
        3.0,
    ),
    row(
        "mem, sequential read 128 KiB, depth 32",
        ("read", "128K", "32"),
        Bandwidth,
        MEM,
        2.0,
    ),
    row(
        "mem, sequential write 128 KiB, depth 32",
        ("write", "128K", "32"),
        Bandwidth,
        MEM,
        2.0,
    ),
    row(
        "mem, random read, depth 1",
        ("randread", "4K", "1"),
        Latency,
        MEM,
        0.2,
    ),
    row(
        "mem, random write, depth 1",
        ("randwrite", "4K", "1"),
        Latency,
        MEM,
        0.2,
    ),
    row(
        "tmpfs file, random read, depth 32",
        ("randread", "4K", "32"),
        Iops,
        TMPFS,
        0.85,
    ),
    row(
        "tmpfs file, random write, depth 32",
        ("randwrite", "4K", "32"),
        Iops,
        TMPFS,
        0.85,
    ),
    row(
        "O_DIRECT file, random read, depth 32",
        ("randread", "4K", "32"),
        Iops,
        DISK,
        0.95,
    ),
    row(
        "O_DIRECT file, random write, depth 32",
        ("randwrite", "4K", "32"),
        Iops,
        DISK,
        0.95,
    ),
];

impl Measure {
    fn unit(self) -> &'static str {
        match self {
            Iops => "IOPS",
            Bandwidth => "MiB/s",
            Latency => "us (p50)",
        }
    }

    /// The figure in a report in the shape of fio's.
    pub(crate) fn of(self, report: &Value, rw: &str) -> Result<f64> {
        let side = &report["jobs"][0][if rw.ends_with("read") { "read" } else { "write" }];
        let (value, scale) = match self {
            Iops => (&side["iops"], 1.0),
            Bandwidth => (&side["bw_bytes"], 1.0 / 1048576.0),
            Latency => (&side["clat_ns"]["percentile"]["50.000000"], 1e-3),
        };
        Ok(value
            .as_f64()
            .with_context(|| format!("no {} in the report", self.unit()))?
            * scale)
    }

    fn passed(self, ratio: f64, target: f64) -> bool {
        if self == Latency {
            ratio <= target
        } else {
            ratio >= target
        }
    }
}

/// Runs the load generator on core 1.
pub(crate) fn load(args: &Args, sockets: &[PathBuf], more: &[&str]) -> Result<Value> {
    generate(Command::new(&args.unibody), sockets, more)
}

/// The same, stepping back for whatever else has work on that core. A file system ends a direct write in a kernel worker
/// on the core that took the device's interrupt, and behind a generator that never pauses the worker waits for milliseconds.
fn load_politely(args: &Args, sockets: &[PathBuf], more: &[&str]) -> Result<Value> {
    let mut command = Command::new("nice");
    command.args(["-n", "19"]).arg(&args.unibody);
    generate(command, sockets, more)
}

fn generate(mut command: Command, sockets: &[PathBuf], more: &[&str]) -> Result<Value> {
    command
        .arg("bench")
        .args(sockets)
        .args(["--json", "--core", "1"])
        .args(more);
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context("the load generator can not be started")?;
    if !output.status.success() {
        bail!("the load generator failed: {more:?}");
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// One run of one contender.
fn once(args: &Args, row: &Row, contender: &Contender) -> Result<f64> {
    let seconds = args.seconds.to_string();
    if let Fio(place) = contender {
        let report = servers::fio(args, *place, row.rw, row.bs, row.depth, &seconds)?;
        return row.measure.of(&report, row.rw);
    }
    let server = servers::start(args, contender)?;
    let sockets = [server.socket().to_path_buf()];
    load(args, &sockets, &["--fill", "--bs", "128K", "--size", "512M"])?;
    let flags = [
        "--rw",
        row.rw,
        "--bs",
        row.bs,
        "--iodepth",
        row.depth,
        "--size",
        "512M",
        "--runtime",
        &seconds,
    ];
    let report = match contender {
        UnibodyFile(Place::Disk) => load_politely(args, &sockets, &flags)?,
        _ => load(args, &sockets, &flags)?,
    };
    row.measure.of(&report, row.rw)
}

/// Median and "median [min - max]".
pub(crate) fn spread(values: &mut [f64]) -> (f64, String) {
    values.sort_by(f64::total_cmp);
    let (median, digits) = (values[values.len() / 2], usize::from(values[0] < 100.0));
    let text = format!(
        "{median:.digits$} [{:.digits$} - {:.digits$}]",
        values[0],
        values[values.len() - 1]
    );
    (median, text)
}

/// What the figures were taken on.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("?", |m| m.1);
    let cores = cpu.lines().filter(|line| line.starts_with("processor")).count();
    let memory: u64 = read("/proc/meminfo")
        .split_whitespace()
        .nth(1)
        .and_then(|kb| kb.parse().ok())
        .unwrap_or(0);
    let kernel = read("/proc/sys/kernel/osrelease");
    format!(
        "{model}, {cores} cores, {} GiB, Linux {}",
        memory >> 20,
        kernel.trim()
    )
}

fn main() -> Result<()> {
    let mut args = Args::parse();
    if args.quick {
        (args.runs, args.seconds) = (1, 1.0);
    }
    std::fs::create_dir_all(&args.dir)?;
    let wanted = |name: &str| args.only.as_ref().is_none_or(|only| name.contains(only.as_str()));
    let mut table = String::from(
        "| work | unit | Unibody | peer | ratio | target | |\n| --- | --- | --- | --- | --- | --- | --- |\n",
    );
    let mut results = Vec::new();
    print!("{}\n\n{table}", machine());
    for row in ROWS.iter().filter(|row| wanted(row.name)) {
        let (mut ours, mut peer) = (Vec::new(), Vec::new());
        for _ in 0..args.runs.max(1) {
            ours.push(once(&args, row, &row.ours).with_context(|| format!("{}: ours", row.name))?);
            peer.push(
                once(&args, row, &row.peer).with_context(|| format!("{}: {}", row.name, row.peer.name()))?,
            );
        }
        let ((our, our_text), (other, peer_text)) = (spread(&mut ours), spread(&mut peer));
        let ratio = our / other;
        let passed = row.measure.passed(ratio, row.target);
        let mut line = String::new();
        writeln!(
            line,
            "| {} | {} | {our_text} | {peer_text} ({}) | {ratio:.2} | {} | {} |",
            row.name,
            row.measure.unit(),
            row.peer.name(),
            row.target,
            if passed { "reached" } else { "missed" }
        )?;
        print!("{line}");
        table.push_str(&line);
        results.push(json!({ "row": row.name, "unit": row.measure.unit(), "ours": ours, "peer": peer, "ratio": ratio, "target": row.target, "reached": passed }));
    }
    if wanted("1,000 devices") {
        for line in devices::measure(&args)? {
            print!("{line}");
            table.push_str(&line);
            results.push(json!({ "row": line.trim() }));
        }
    }
    if let Some(out) = &args.out {
        write_results(out, &args, &table, &results)?;
    }
    Ok(())
}

fn write_results(out: &Path, args: &Args, table: &str, results: &[Value]) -> Result<()> {
    std::fs::create_dir_all(out)?;
    let date = Command::new("date").arg("+%Y-%m-%d").output()?;
    let date = String::from_utf8(date.stdout)?.trim().to_owned();
    let head = format!(
        "{date}; {}; {} runs of {} s, median [min - max]",
        machine(),
        args.runs,
        args.seconds
    );
    std::fs::write(out.join(format!("{date}.md")), format!("{head}\n\n{table}"))?;
    let whole = json!({ "date": date, "machine": machine(), "runs": args.runs, "seconds": args.seconds, "rows": results });
    std::fs::write(
        out.join(format!("{date}.json")),
        serde_json::to_string_pretty(&whole)?,
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_and_shows_its_spread() {
        let (median, text) = spread(&mut [300.0, 100.0, 200.0]);
        assert_eq!((median, text.as_str()), (200.0, "200 [100 - 300]"));
    }

    #[test]
    fn latency_passes_below_its_target_and_the_rest_above() {
        assert!(Latency.passed(0.1, 0.2) && !Latency.passed(0.3, 0.2));
        assert!(Iops.passed(2.1, 2.0) && !Iops.passed(1.9, 2.0));
    }
}
