//! Counting latencies and printing what was measured.

use std::time::Duration;

use serde_json::{Value, json};

/// Latencies in buckets of about 3 %: 32 steps for each power of two, in nanoseconds. Recording allocates nothing.
pub(crate) struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    sum: u128,
    min: u64,
    max: u64,
}

const STEPS: u32 = 5;

impl Histogram {
    pub(crate) fn new() -> Self {
        Histogram {
            buckets: vec![0; 64 << STEPS],
            count: 0,
            sum: 0,
            min: u64::MAX,
            max: 0,
        }
    }

    fn index(value: u64) -> usize {
        if value < 1 << STEPS {
            return value as usize;
        }
        let shift = 63 - value.leading_zeros() - STEPS;
        (((shift + 1) as usize) << STEPS) + ((value >> shift) as usize - (1 << STEPS))
    }

    /// The largest value that falls into a bucket.
    fn top(index: usize) -> u64 {
        if index < 1 << STEPS {
            return index as u64;
        }
        let shift = (index >> STEPS) as u32 - 1;
        let low = ((index & ((1 << STEPS) - 1)) as u64 + (1 << STEPS)) << shift;
        low + (1 << shift) - 1
    }

    #[inline]
    pub(crate) fn record(&mut self, nanoseconds: u64) {
        self.buckets[Self::index(nanoseconds)] += 1;
        self.count += 1;
        self.sum += u128::from(nanoseconds);
        self.min = self.min.min(nanoseconds);
        self.max = self.max.max(nanoseconds);
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    fn mean(&self) -> f64 {
        if self.count == 0 {
            0.0
        } else {
            self.sum as f64 / self.count as f64
        }
    }

    /// The latency that `percent` of all requests stay at or below.
    pub(crate) fn percentile(&self, percent: f64) -> u64 {
        let wanted = (self.count as f64 * percent / 100.0).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, &count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Self::top(index).min(self.max);
            }
        }
        0
    }
}

/// One direction of a run.
pub(crate) struct Side {
    pub(crate) bytes: u64,
    pub(crate) latency: Histogram,
}

impl Side {
    pub(crate) fn new() -> Self {
        Side {
            bytes: 0,
            latency: Histogram::new(),
        }
    }

    fn json(&self, seconds: f64) -> Value {
        let latency = &self.latency;
        let percentiles: serde_json::Map<String, Value> =
            [1.0, 5.0, 10.0, 50.0, 90.0, 95.0, 99.0, 99.9, 99.99]
                .iter()
                .map(|&percent| (format!("{percent:.6}"), json!(latency.percentile(percent))))
                .collect();
        json!({
            "io_bytes": self.bytes,
            "total_ios": latency.count(),
            "runtime": (seconds * 1000.0) as u64,
            "iops": latency.count() as f64 / seconds,
            "bw_bytes": (self.bytes as f64 / seconds) as u64,
            "bw": (self.bytes as f64 / seconds / 1024.0) as u64,
            "clat_ns": {
                "min": if latency.count() == 0 { 0 } else { latency.min },
                "max": latency.max,
                "mean": latency.mean(),
                "percentile": percentiles,
            },
        })
    }

    fn line(&self, name: &str, seconds: f64) -> Option<String> {
        let latency = &self.latency;
        if latency.count() == 0 {
            return None;
        }
        let us = |percent| latency.percentile(percent) as f64 / 1000.0;
        Some(format!(
            "{name:5} {:>10.0} IOPS  {:>8.1} MiB/s  latency us: p50 {:.1}  p99 {:.1}  p99.9 {:.1}  max {:.1}",
            latency.count() as f64 / seconds,
            self.bytes as f64 / seconds / 1048576.0,
            us(50.0),
            us(99.0),
            us(99.9),
            latency.max as f64 / 1000.0,
        ))
    }
}

/// What a server process used meanwhile.
#[derive(Clone, Copy, Default)]
pub(crate) struct Usage {
    pub(crate) user: f64,
    pub(crate) system: f64,
    pub(crate) switches: u64,
}

/// A whole run.
pub(crate) struct Report {
    pub(crate) elapsed: Duration,
    pub(crate) read: Side,
    pub(crate) write: Side,
    pub(crate) trim: Side,
    pub(crate) errors: u64,
    pub(crate) verified: u64,
    pub(crate) server: Option<Usage>,
    /// Looks for answers, and those that found none: hardly any of these and the generator is the bottleneck.
    pub(crate) polls: u64,
    pub(crate) polls_empty: u64,
}

impl Report {
    pub(crate) fn json(&self, name: &str) -> Value {
        let seconds = self.elapsed.as_secs_f64();
        let server = self.server.map(|usage| {
            json!({ "usr_s": usage.user, "sys_s": usage.system, "cpu": (usage.user + usage.system) / seconds * 100.0, "ctx": usage.switches })
        });
        json!({
            "unibody version": env!("CARGO_PKG_VERSION"),
            "jobs": [{
                "jobname": name,
                "error": i32::from(self.errors > 0),
                "total_err": self.errors,
                "verified_blocks": self.verified,
                "read": self.read.json(seconds),
                "write": self.write.json(seconds),
                "trim": self.trim.json(seconds),
                "server": server,
                "polls": { "total": self.polls, "empty": self.polls_empty },
            }],
        })
    }

    pub(crate) fn print(&self) {
        let seconds = self.elapsed.as_secs_f64();
        let sides = [("read", &self.read), ("write", &self.write), ("trim", &self.trim)];
        for line in sides
            .into_iter()
            .filter_map(|(name, side)| side.line(name, seconds))
        {
            println!("{line}");
        }
        if let Some(usage) = self.server {
            println!(
                "server {:.0} % of a core ({:.2} s user, {:.2} s system), {} context switches",
                (usage.user + usage.system) / seconds * 100.0,
                usage.user,
                usage.system,
                usage.switches
            );
        }
        if self.polls > 0 {
            println!(
                "{:.0} % of the generator's looks for answers found none",
                self.polls_empty as f64 / self.polls as f64 * 100.0
            );
        }
        if self.verified > 0 {
            println!("{} blocks verified", self.verified);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_cover_all_values_in_order() {
        let mut last = 0;
        for value in (0..20)
            .flat_map(|shift| (0..64).map(move |step| (64 + step) << shift))
            .chain(0..64)
        {
            let index = Histogram::index(value);
            assert!(Histogram::top(index) >= value, "{value} above its bucket");
            assert!(
                index == 0 || Histogram::top(index - 1) < value,
                "{value} below its bucket"
            );
            last = last.max(index);
        }
        assert!(Histogram::index(u64::MAX) < 64 << STEPS && last > 0);
    }

    #[test]
    fn percentiles_are_within_a_bucket() {
        let mut histogram = Histogram::new();
        (1..=1000).for_each(|n| histogram.record(n * 1000));
        for percent in [50.0, 90.0, 99.0] {
            let exact = percent * 10.0 * 1000.0;
            let got = histogram.percentile(percent) as f64;
            assert!(
                got >= exact && got <= exact * 1.04,
                "p{percent}: {got} instead of {exact}"
            );
        }
        assert_eq!(histogram.percentile(100.0), 1_000_000);
    }
}
