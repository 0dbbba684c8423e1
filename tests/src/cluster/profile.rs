//! What a seed draws: the cluster, the load and the faults of its run.

use crate::sim::profile::{Damage, Profile as Base};
use crate::sim::random::Random;

/// A run. Rates are "once in so many milliseconds" of the faulty phase; zero is never.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    /// Of the run.
    pub seed: u64,
    /// Load and disks, as on one node.
    pub base: Base,
    /// Nodes.
    pub nodes: usize,
    /// Disks of a node, at most; each draws its own number.
    pub disks: u64,
    /// Microseconds of a message between nodes: least and spread.
    pub message: (u64, u64),
    /// Microseconds of a message of the consensus: least and spread.
    pub consensus: (u64, u64),
    /// Microseconds that a node lags behind in applying, at most.
    pub lag: u64,
    /// The answer to a proposal is lost once in so many.
    pub lost_answer: u64,
    /// Requests that a node may have out at another.
    pub credits: usize,
    /// A node's process is killed.
    pub kill: u64,
    /// A node loses power.
    pub power: u64,
    /// All nodes are killed or lose power.
    pub blackout: u64,
    /// A node's process stands still for up to fifteen seconds.
    pub pause: u64,
    /// Nodes can not hear each other, in one or both directions.
    pub cut: u64,
    /// A node does not hear of the consensus, but of all else.
    pub isolate: u64,
    /// A connection breaks.
    pub snap: u64,
    /// Another leader.
    pub leader: u64,
    /// No quorum for up to twenty seconds.
    pub stall: u64,
    /// A disk is away for a while.
    pub disk_loss: u64,
    /// A disk is destroyed and an empty one put in.
    pub destroy: u64,
    /// A node is gone for good, at most one.
    pub gone: u64,
    /// The owner lets go.
    pub leave: u64,
    /// A disk is taken out that could go on: what is on it moves.
    pub retire: u64,
    /// The volume grows by a chunk for each of its width.
    pub resize: u64,
    /// A node gets another disk.
    pub expand: u64,
    /// Nothing new goes to a node for a while.
    pub drain: u64,
    /// The owner hears nobody for up to twenty seconds, and nobody hears it.
    pub zombie: u64,
}

/// Of so many seeds one is a run in which owners go on reading alone while others have taken their volume, in some I/O fails,
/// in some data rots, and in some an operator changes things.
const KINDS: u64 = 16;

impl Profile {
    /// The profile of a seed.
    pub fn draw(seed: u64) -> Self {
        let mut r = Random::new(seed ^ 0x636c_7573_7465_7221);
        let nodes = r.pick(&[3, 3, 3, 4, 5]);
        let mirror = r.pick(&[1, 2, 2, 2, 3]);
        let ops = r.range(60, 220);
        let depth = r.pick(&[1, 2, 4, 8]);
        let seconds = r.pick(&[4, 15, 30, 40]);
        let base = Base {
            disks: 1,
            disk_bytes: 16 << 20,
            mirror,
            unit: r.pick(&[64 << 10, 128 << 10, 1 << 20]),
            width: r.range(1, 3) as u32,
            volatile: r.below(4) != 0,
            latency: r.pick(&[(20, 60), (50, 500), (10, 3000), (1000, 60_000)]),
            ops,
            depth,
            think: seconds * 2_000_000 * u64::from(depth) / ops,
            pause: 0,
            hot: r.pick(&[1, 2, 8]),
            spread: r.pick(&[2, 8, 24]),
            mix: r.pick(&[(40, 5, 5), (60, 2, 5), (20, 2, 15), (30, 15, 5)]),
            slow: r.pick(&[0, 0, 200, 40]),
            scrub_ms: 0,
            io_timeout_ms: r.pick(&[0, 0, 10_000]),
            ..Base::calm(seed)
        };
        let mut rate = |common: u64, of: u64| if r.below(of) == 0 { common } else { 0 };
        let drawn = Profile {
            seed,
            base,
            nodes,
            kill: rate(5_000, 2),
            power: rate(8_000, 3),
            blackout: rate(15_000, 4),
            pause: rate(6_000, 2),
            cut: rate(4_000, 2),
            isolate: rate(5_000, 3),
            snap: rate(400, 3),
            leader: rate(4_000, 3),
            stall: rate(12_000, 5),
            disk_loss: rate(5_000, 3),
            destroy: if mirror > 1 { rate(8_000, 4) } else { 0 },
            gone: if nodes > mirror as usize && mirror > 1 {
                rate(10_000, 4)
            } else {
                0
            },
            leave: rate(8_000, 4),
            disks: r.pick(&[1, 1, 2, 3]),
            message: r.pick(&[(20, 50), (50, 500), (100, 5000), (1000, 50_000)]),
            consensus: r.pick(&[(100, 2000), (1000, 20_000), (1000, 1_000_000)]),
            lag: r.pick(&[100, 5_000, 500_000]),
            lost_answer: r.pick(&[0, 20, 4]),
            credits: r.pick(&[2, 8, 64]),
            retire: if r.below(3) == 0 { 6_000 } else { 0 },
            zombie: 0,
            resize: 0,
            expand: 0,
            drain: 0,
        };
        match seed % KINDS {
            7 => drawn.zombies(),
            1 | 3 | 5 => drawn.injured(),
            11 | 13 => drawn.changing().injured(),
            4 | 10 | 15 => drawn.changing(),
            2 | 12 | 14 => drawn.rotten(),
            _ => drawn,
        }
    }

    /// Beside all else an operator grows the volume, puts in disks and drains nodes.
    fn changing(self) -> Self {
        let mut r = Random::new(self.seed ^ 0x6368_616e_6769_6e67);
        Profile {
            resize: r.pick(&[0, 4_000, 10_000]),
            expand: r.pick(&[0, 6_000]),
            drain: r.pick(&[0, 5_000]),
            ..self
        }
    }

    /// Beside all else, I/O fails.
    fn injured(self) -> Self {
        let mut r = Random::new(self.seed ^ 0x696e_6a75_7265_6421);
        let base = Base {
            io_error: r.pick(&[0, 60, 300]),
            flush_error: r.pick(&[0, 20, 100]),
            device_full: r.pick(&[0, 0, 100]),
            stuck: r.pick(&[0, 0, 6_000]),
            ..self.base
        };
        Profile { base, ..self }
    }

    /// The data on one disk rots, and nothing takes other replicas away: each block keeps a good copy, every read succeeds.
    fn rotten(self) -> Self {
        let mut r = Random::new(self.seed ^ 0x726f_7474_656e_2121);
        let base = Base {
            mirror: r.pick(&[2, 2, 3]),
            damage: Damage::Within,
            rot: r.pick(&[100, 500]),
            scrub_ms: r.pick(&[3_000, 60_000]),
            latency: r.pick(&[(20, 60), (50, 500), (10, 3000)]),
            slow: 0,
            io_timeout_ms: 0,
            ..self.base
        };
        Profile {
            base,
            kill: self.kill,
            leader: self.leader,
            disk_loss: self.disk_loss,
            leave: self.leave,
            retire: self.retire,
            ..self.without_faults()
        }
    }

    /// Nearly only reads, of the same few blocks, on both sides of a partition that outlasts every lease: whoever reads there
    /// without one reads what is no longer true. Any write would hang, and soon nothing would be left that reads.
    fn zombies(self) -> Self {
        let (ops, depth) = (600, 8);
        let base = Base {
            mirror: 2,
            ops,
            depth,
            think: 1_500_000,
            hot: 1,
            spread: 2,
            mix: (93, 1, 1),
            slow: 0,
            latency: (20, 60),
            io_timeout_ms: 0,
            ..self.base
        };
        Profile {
            base,
            zombie: 10_000,
            retire: 0,
            ..self.without_faults()
        }
    }

    /// A run without any fault.
    pub fn calm(seed: u64) -> Self {
        Profile::draw(seed).without_faults()
    }

    fn without_faults(self) -> Self {
        let base = Base {
            stuck: 0,
            io_error: 0,
            flush_error: 0,
            device_full: 0,
            damage: Damage::None,
            rot: 0,
            ..self.base
        };
        Profile {
            base,
            kill: 0,
            power: 0,
            blackout: 0,
            pause: 0,
            cut: 0,
            isolate: 0,
            snap: 0,
            leader: 0,
            stall: 0,
            disk_loss: 0,
            destroy: 0,
            gone: 0,
            leave: 0,
            retire: 0,
            zombie: 0,
            resize: 0,
            expand: 0,
            drain: 0,
            ..self
        }
    }
}
