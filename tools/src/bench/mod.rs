//! `unibody bench`: a polled vhost-user-blk load generator.

pub(crate) mod client;
mod report;
pub(crate) mod stamp;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::output::{Out, parse_size};
use crate::progress::Bar;
use client::Client;
use report::{Report, Side, Usage};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Pattern {
    /// Random reads.
    Randread,
    /// Random writes.
    Randwrite,
    /// Random reads and writes, see --rwmix.
    Randrw,
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random discards.
    Trim,
}

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// The volumes' sockets; all are driven by one polling thread.
    #[arg(required = true)]
    sockets: Vec<PathBuf>,
    /// What to do.
    #[arg(long, value_enum, default_value = "randread")]
    rw: Pattern,
    /// Of a mixed load, reads in percent.
    #[arg(long, default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    rwmix: u8,
    /// Bytes of a request.
    #[arg(long, value_parser = parse_size, default_value = "4K")]
    bs: u64,
    /// Requests in flight for each queue.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=128))]
    iodepth: u16,
    /// Queues for each socket, all of one connection and of one polling thread. The server has to offer as many (`queues=`).
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    queues: u16,
    /// At most so many requests a second in all.
    #[arg(long)]
    rate: Option<u64>,
    /// Seconds to measure; ignored when a whole range is written or verified.
    #[arg(long, default_value_t = 5.0)]
    runtime: f64,
    /// Seconds to run before measuring.
    #[arg(long, default_value_t = 0.5)]
    ramp: f64,
    /// Use this part of the volume: first byte.
    #[arg(long, value_parser = |text: &str| if text == "0" { Ok(0) } else { parse_size(text) }, default_value = "0")]
    offset: u64,
    /// Use this part of the volume: bytes [default: all].
    #[arg(long, value_parser = parse_size)]
    size: Option<u64>,
    /// Write the whole range once with stamped blocks, then stop (to prepare a volume, or for --verify-only).
    #[arg(long)]
    fill: bool,
    /// Stamp what is written and check what is read: blocks that were not written before are errors.
    #[arg(long)]
    verify: bool,
    /// Read the whole range once and check that every block is stamped.
    #[arg(long)]
    verify_only: bool,
    /// Draws the addresses and marks the blocks.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Stay on this core.
    #[arg(long)]
    core: Option<usize>,
    /// The server's process, for its CPU time [default: who listens on the first socket].
    #[arg(long)]
    server_pid: Option<u32>,
}

/// Rounds without an answer between two looks at the clock.
const ROUNDS_BLIND: u32 = 16;

/// The next address and direction.
struct Addresses {
    state: u64,
    next: u64,
    /// The queues of a volume share its range: each takes every `step`th slot in order.
    step: u64,
    slots: u64,
}

impl Addresses {
    fn random(&mut self) -> u64 {
        // xorshift64*: fast, and good enough to spread addresses.
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn at(&mut self, sequential: bool) -> u64 {
        if sequential {
            let slot = self.next % self.slots;
            self.next += self.step;
            slot
        } else {
            ((u128::from(self.random()) * u128::from(self.slots)) >> 64) as u64
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
    Trim,
}

struct Flight {
    at: u64,
    direction: Direction,
    began: Instant,
}

struct Job<'a> {
    args: &'a BenchArgs,
    client: Client,
    flights: Vec<Flight>,
    idle: Vec<usize>,
    addresses: Addresses,
    offset: u64,
    sequence: u64,
}

/// JSON is in the shape of fio's.
pub(crate) fn run(args: BenchArgs, out: Out) -> Result<()> {
    if let Some(core) = args.core {
        unibody_dataplane::reactor::pin::pin_current(core)
            .with_context(|| format!("core {core} can not be used"))?;
    }
    let report = measure(&args, Bar::new("bench", out))?;
    if out.json {
        println!("{}", serde_json::to_string_pretty(&report.json("bench"))?);
    } else {
        report.print();
    }
    if report.errors > 0 {
        bail!("{} requests failed", report.errors);
    }
    Ok(())
}

fn jobs(args: &BenchArgs) -> Result<Vec<Job<'_>>> {
    if !args.bs.is_multiple_of(512)
        || (args.verify || args.fill || args.verify_only) && !args.bs.is_multiple_of(4096)
    {
        bail!("--bs must be a multiple of 512, and of 4096 where blocks are stamped");
    }
    let mut jobs = Vec::new();
    let depth = usize::from(args.iodepth);
    let mut clients = Vec::new();
    for socket in &args.sockets {
        let queues = Client::connect_queues(socket, args.queues, depth, depth * args.bs as usize)?;
        clients.extend(queues.into_iter().enumerate());
    }
    for (number, (queue, client)) in clients.into_iter().enumerate() {
        let size = args.size.unwrap_or(client.capacity().saturating_sub(args.offset));
        let slots = size / args.bs;
        if slots == 0 || args.offset + size > client.capacity() {
            bail!(
                "{} has {} bytes: the range asked for does not fit",
                client.path().display(),
                client.capacity()
            );
        }
        let seed = args
            .seed
            .wrapping_add(number as u64)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            | 1;
        jobs.push(Job {
            args,
            client,
            flights: (0..depth)
                .map(|_| Flight {
                    at: 0,
                    direction: Direction::Read,
                    began: Instant::now(),
                })
                .collect(),
            idle: (0..depth).rev().collect(),
            addresses: Addresses {
                state: seed,
                next: queue as u64,
                step: u64::from(args.queues),
                slots,
            },
            offset: args.offset,
            sequence: 0,
        });
    }
    for job in &mut jobs {
        let len = job.args.bs as usize;
        for tag in 0..job.flights.len() {
            // Real memory, different in each place: no deduplicated zero pages in the measurement.
            job.client
                .memory(tag * len, len)
                .iter_mut()
                .enumerate()
                .for_each(|(i, byte)| *byte = (i * 31 + tag) as u8);
        }
    }
    Ok(jobs)
}

impl Job<'_> {
    fn whole_range(&self) -> bool {
        self.args.fill || self.args.verify_only
    }

    fn direction(&mut self) -> Direction {
        if self.args.fill {
            return Direction::Write;
        }
        if self.args.verify_only {
            return Direction::Read;
        }
        match self.args.rw {
            Pattern::Randread | Pattern::Read => Direction::Read,
            Pattern::Randwrite | Pattern::Write => Direction::Write,
            Pattern::Trim => Direction::Trim,
            Pattern::Randrw if self.addresses.random() % 100 < u64::from(self.args.rwmix) => Direction::Read,
            Pattern::Randrw => Direction::Write,
        }
    }

    /// Queues one request if there is anything left to ask for.
    fn start(&mut self, now: Instant) -> bool {
        if self.whole_range() && self.addresses.next >= self.addresses.slots {
            return false;
        }
        let Some(tag) = self.idle.pop() else { return false };
        let len = self.args.bs as usize;
        let direction = self.direction();
        let sequential = self.whole_range() || matches!(self.args.rw, Pattern::Read | Pattern::Write);
        let at = self.offset + self.addresses.at(sequential) * self.args.bs;
        match direction {
            Direction::Read => self.client.read(at, tag * len, len, tag),
            Direction::Write => {
                if self.args.verify || self.args.fill {
                    self.sequence += 1;
                    let (seed, sequence) = (self.args.seed, self.sequence);
                    for (i, block) in self
                        .client
                        .memory(tag * len, len)
                        .chunks_exact_mut(stamp::BLOCK)
                        .enumerate()
                    {
                        stamp::fill(block, at + (i * stamp::BLOCK) as u64, sequence, seed);
                    }
                }
                self.client.write(at, tag * len, len, tag);
            }
            Direction::Trim => self.client.discard(at, len as u64, tag),
        }
        self.flights[tag] = Flight {
            at,
            direction,
            began: now,
        };
        true
    }

    /// Checks what a read returned; the address of the first wrong block.
    fn wrong_block(&mut self, tag: usize) -> Option<u64> {
        let (len, at, seed) = (self.args.bs as usize, self.flights[tag].at, self.args.seed);
        let memory = self.client.memory(tag * len, len);
        memory
            .chunks_exact(stamp::BLOCK)
            .enumerate()
            .map(|(i, block)| (at + (i * stamp::BLOCK) as u64, block))
            .find(|(address, block)| stamp::check(block, *address, seed).is_none())
            .map(|(address, _)| address)
    }
}

/// Runs the load of `args` and reports.
fn measure(args: &BenchArgs, mut bar: Bar) -> Result<Report> {
    let mut jobs = jobs(args)?;
    let pid = args.server_pid.or_else(|| peer_pid(&args.sockets[0]).ok());
    let whole = args.fill || args.verify_only;
    let ramp = if whole {
        Duration::ZERO
    } else {
        Duration::from_secs_f64(args.ramp)
    };
    let mut report = Report {
        elapsed: Duration::ZERO,
        read: Side::new(),
        write: Side::new(),
        trim: Side::new(),
        errors: 0,
        verified: 0,
        server: None,
        polls: 0,
        polls_empty: 0,
    };
    let start = Instant::now();
    let end = start + ramp + Duration::from_secs_f64(args.runtime);
    let mut measuring = (ramp == Duration::ZERO).then(|| (start, pid.and_then(usage)));
    let mut done = Vec::with_capacity(client::TAKE);
    let mut issued = 0u64;
    let mut last_answer = start;
    let mut now = start;
    let mut rounds_without = 0u32;
    loop {
        if measuring.is_none() && now >= start + ramp {
            measuring = Some((now, pid.and_then(usage)));
        }
        let over = !whole && now >= end;
        let due = args.rate.map_or(u64::MAX, |rate| {
            ((now - start).as_secs_f64() * rate as f64) as u64
        });
        let (mut active, mut answered) = (false, false);
        for job in &mut jobs {
            while !over && issued < due && job.start(now) {
                issued += 1;
            }
            if job.idle.len() == job.flights.len() {
                continue;
            }
            active = true;
            done.clear();
            job.client.poll(|tag, result| done.push((tag, result)))?;
            let measured = measuring.is_some() && !over;
            if measured {
                report.polls += 1;
                report.polls_empty += u64::from(done.is_empty());
            }
            if done.is_empty() {
                continue;
            }
            // One look at the clock for all that came together: it is when they were seen.
            now = Instant::now();
            (answered, last_answer) = (true, now);
            for &(tag, result) in &done {
                if result < 0 {
                    report.errors += 1;
                } else if job.flights[tag].direction == Direction::Read && (args.verify || args.verify_only) {
                    if let Some(address) = job.wrong_block(tag) {
                        bail!("wrong data at byte {address} of {}", job.client.path().display());
                    }
                    report.verified += args.bs / stamp::BLOCK as u64;
                }
                if result >= 0 && measured {
                    let flight = &job.flights[tag];
                    let side = match flight.direction {
                        Direction::Read => &mut report.read,
                        Direction::Write => &mut report.write,
                        Direction::Trim => &mut report.trim,
                    };
                    side.bytes += args.bs;
                    side.latency.record((now - flight.began).as_nanos() as u64);
                }
                job.idle.push(tag);
            }
        }
        if !answered {
            // Looking at the clock costs more than looking for answers.
            rounds_without += 1;
            if args.rate.is_some() || rounds_without.is_multiple_of(ROUNDS_BLIND) {
                now = Instant::now();
            }
        }
        if bar.due(now) {
            match whole {
                true => bar.show(
                    jobs.iter().map(|job| job.addresses.next).sum(),
                    jobs.iter().map(|job| job.addresses.slots).sum(),
                ),
                false => bar.show((now - start).as_millis() as u64, (end - start).as_millis() as u64),
            }
        }
        if active && now.duration_since(last_answer) > client::PATIENCE {
            bail!(
                "nothing was answered for {} s: is the server still there?",
                client::PATIENCE.as_secs()
            );
        }
        if !active && (over || whole && jobs.iter().all(|job| job.addresses.next >= job.addresses.slots)) {
            break;
        }
    }
    bar.end();
    if args.fill {
        for job in &mut jobs {
            job.client.flush(0);
            job.client.finish(1)?;
        }
    }
    let (began, before) = measuring.unwrap_or((start, None));
    report.elapsed = if whole {
        began.elapsed()
    } else {
        end.saturating_duration_since(began)
    };
    report.server = before.zip(pid.and_then(usage)).map(|(before, after)| Usage {
        user: after.user - before.user,
        system: after.system - before.system,
        switches: after.switches.saturating_sub(before.switches),
    });
    Ok(report)
}

/// The process that listens on a socket.
fn peer_pid(socket: &Path) -> Result<u32> {
    let stream = std::os::unix::net::UnixStream::connect(socket)?;
    let credentials = rustix::net::sockopt::socket_peercred(&stream)?;
    Ok(credentials.pid.as_raw_nonzero().get() as u32)
}

/// CPU time and context switches of a process and all its threads.
fn usage(pid: u32) -> Option<Usage> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    // USER_HZ is 100 on every Linux that there is.
    let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok().map(|t| t / 100.0);
    let mut switches = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        switches += status
            .lines()
            .filter(|line| line.contains("ctxt_switches"))
            .filter_map(|line| line.split_whitespace().last()?.parse::<u64>().ok())
            .sum::<u64>();
    }
    Some(Usage {
        user: ticks(11)?,
        system: ticks(12)?,
        switches,
    })
}
