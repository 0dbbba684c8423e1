//! What a seed draws: the configuration, the load and the faults of its run.

use unibody_dataplane::disk::{Io, IoError};

use super::disk::Mishap;
use super::random::Random;

/// Which integrity faults (rot, latent errors, lost and misdirected writes) a run has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// None.
    None,
    /// On one disk only, and nothing else takes replicas away: each block keeps a good copy, every read must succeed.
    Within,
    /// In the data of any disk, without crashes (after one, rot in a block that was being written can not be told from a
    /// torn write): reads may fail, but never return wrong bytes.
    Beyond,
}

/// A run. Rates are "once in so many milliseconds" of the faulty phase; zero is never.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    /// Of the run.
    pub seed: u64,
    /// Disks of the node.
    pub disks: u64,
    /// Bytes of each.
    pub disk_bytes: u64,
    /// Copies.
    pub mirror: u32,
    /// Stripe unit, bytes.
    pub unit: u64,
    /// Stripe width, chunks.
    pub width: u32,
    /// Journal of each disk, bytes.
    pub journal_bytes: u64,
    /// Record cache of each disk, bytes.
    pub cache_bytes: usize,
    /// Disks lose what they did not flush when power goes.
    pub volatile: bool,
    /// Microseconds of an I/O: least and spread.
    pub latency: (u64, u64),
    /// Microseconds of a message: least and spread.
    pub message: (u64, u64),
    /// Microseconds that a decision of the control state takes longer than its messages, at most.
    pub decision: u64,
    /// Once in so many promotions the disk that was copied from is destroyed at once, and power lost soon after.
    pub betrayal: u64,
    /// A disk is away for seconds when the data plane starts, once in so many.
    pub absent: u64,
    /// Operations of the faulty phase.
    pub ops: u64,
    /// Guest operations at a time.
    pub depth: u32,
    /// Microseconds between operations of a slot, at most.
    pub think: u64,
    /// A pause of six seconds once in so many operations, in which chunks become clean.
    pub pause: u64,
    /// Blocks that the load meets on.
    pub hot: u64,
    /// Extents that the load spreads over.
    pub spread: u64,
    /// Of a hundred operations: reads, flushes, zeros; the rest writes.
    pub mix: (u64, u64, u64),
    /// Data plane killed.
    pub kill: u64,
    /// Power of the node lost.
    pub power: u64,
    /// Clean restart.
    pub restart: u64,
    /// A disk dies and returns.
    pub disk_loss: u64,
    /// A disk is cut off and comes back in the same boot.
    pub disconnect: u64,
    /// A disk is replaced by an empty one.
    pub replace: u64,
    /// A disk leaves I/O unanswered.
    pub stuck: u64,
    /// An I/O fails, once in so many I/Os.
    pub io_error: u64,
    /// A flush fails, once in so many flushes.
    pub flush_error: u64,
    /// A write finds no room on the device, once in so many.
    pub device_full: u64,
    /// An I/O takes a hundred times as long, once in so many.
    pub slow: u64,
    /// A crash inside an opening, once in so many openings.
    pub open_crash: u64,
    /// Integrity faults.
    pub damage: Damage,
    /// Rot, latent errors: once in so many milliseconds.
    pub rot: u64,
    /// Blocks of data on the damaged disk that rot again after each write, for ever.
    pub weak: u64,
    /// Lost and misdirected writes: once in so many writes.
    pub stray: u64,
    /// Everything is verified in the background every so many milliseconds.
    pub scrub_ms: u64,
    /// An operation without progress fails after so long; zero: never.
    pub io_timeout_ms: u64,
}

impl Profile {
    /// The profile of a seed: mostly anything, for every fourth one of the storms.
    pub fn draw(seed: u64) -> Self {
        let profile = Profile::draw_any(seed);
        if seed.is_multiple_of(4) {
            profile.storm()
        } else {
            profile
        }
    }

    /// Two copies and a few faults that follow each other closely: what seldom meets by chance.
    fn storm(self) -> Self {
        let mut r = Random::new(self.seed ^ 0x7374_6f72_6d21_2121);
        let base = Profile {
            disks: 2,
            disk_bytes: 16 << 20,
            mirror: 2,
            width: 1,
            volatile: true,
            latency: r.pick(&[(20, 60), (50, 500), (10, 3000)]),
            ops: r.range(100, 300),
            depth: r.pick(&[4, 8, 16]),
            think: r.pick(&[1000, 20_000]),
            pause: 0,
            hot: r.pick(&[2, 8]),
            spread: r.pick(&[4, 24]),
            scrub_ms: 0,
            ..Profile::calm(self.seed)
        };
        match self.seed / 4 % 4 {
            // Power lost right after flushes.
            0 => Profile {
                mix: (20, 20, 5),
                power: 150,
                ..base
            },
            // A control state that decides slowly while replicas come and go.
            1 => Profile {
                disks: r.range(2, 3),
                mix: (40, 5, 5),
                decision: r.pick(&[100_000, 3_000_000]),
                depth: 8,
                think: 200_000,
                disconnect: 250,
                disk_loss: 400,
                kill: 800,
                absent: 3,
                ..base
            },
            // Long spells with one copy, and power lost in them.
            2 => Profile {
                mix: (30, 1, 5),
                disk_loss: 300,
                power: 400,
                ..base
            },
            // The copy that was copied from goes as soon as it may.
            _ => Profile {
                disks: 3,
                mix: (20, 2, 5),
                replace: 1_500,
                disk_loss: 2_000,
                betrayal: 2,
                ..base
            },
        }
    }

    fn draw_any(seed: u64) -> Self {
        let mut r = Random::new(seed ^ 0x7072_6f66_696c_6521);
        let disks = r.range(1, 5);
        let mirror = r.range(1, disks.min(3)) as u32;
        let damage = match r.below(4) {
            0 if mirror > 1 => Damage::Within,
            1 => Damage::Beyond,
            _ => Damage::None,
        };
        let calm = damage != Damage::None;
        let mut rate = |common: u64, of: u64| if r.below(of) == 0 { common } else { 0 };
        let (kill, power, restart) = (rate(800, 2), rate(1500, 3), rate(2500, 4));
        let (disk_loss, disconnect, replace) = (rate(1500, 3), rate(1500, 4), rate(3000, 4));
        let (stuck, io_error, flush_error) = (rate(4000, 6), rate(2000, 4), rate(100, 6));
        let (device_full, slow, open_crash) = (rate(1500, 8), rate(200, 3), rate(3, 3));
        let full = !calm && r.one_in(8);
        Profile {
            seed,
            disks,
            disk_bytes: if full {
                5 << 20
            } else {
                r.pick(&[16, 24, 32]) << 20
            },
            mirror,
            unit: r.pick(&[64 << 10, 128 << 10, 1 << 20]),
            width: r.range(1, 3) as u32,
            journal_bytes: r.pick(&[64 << 10, 96 << 10, 128 << 10, 256 << 10, 1 << 20]),
            cache_bytes: r.pick(&[32 << 10, 48 << 10, 64 << 10, 256 << 10]),
            volatile: r.below(4) != 0,
            latency: r.pick(&[(20, 60), (50, 500), (10, 3000), (500, 5000)]),
            message: r.pick(&[(1, 5), (5, 100), (1, 2000)]),
            decision: 0,
            betrayal: 0,
            absent: 0,
            ops: r.range(100, 500),
            depth: r.pick(&[1, 4, 8, 16]),
            think: r.pick(&[10, 1000, 20_000]),
            pause: r.pick(&[0, 0, 60, 150]),
            hot: r.pick(&[2, 8, 24, 64]),
            spread: if full { 160 } else { r.pick(&[4, 24, 80]) },
            mix: r.pick(&[(40, 5, 5), (20, 2, 20), (10, 15, 5), (50, 1, 10)]),
            kill: if damage == Damage::Beyond { 0 } else { kill },
            power: if calm { 0 } else { power },
            restart,
            disk_loss: if calm { 0 } else { disk_loss },
            disconnect: if calm { 0 } else { disconnect },
            replace: if calm { 0 } else { replace },
            stuck: if calm { 0 } else { stuck },
            io_error: if calm { 0 } else { io_error },
            flush_error: if calm { 0 } else { flush_error },
            device_full: if calm { 0 } else { device_full },
            slow,
            open_crash: if calm { 0 } else { open_crash },
            damage,
            rot: if damage == Damage::None {
                0
            } else {
                r.pick(&[100, 500, 2000])
            },
            weak: 0,
            stray: if damage == Damage::Within {
                r.pick(&[0, 100, 400])
            } else {
                0
            },
            scrub_ms: r.pick(&[0, 0, 3000]),
            io_timeout_ms: r.pick(&[0, 10_000]),
        }
    }

    /// What goes wrong with an I/O, and its name. `strays`: writes of this disk may get lost or land elsewhere.
    pub(crate) fn mishap(
        &self,
        io: &Io,
        strays: bool,
        random: &mut Random,
    ) -> Option<(&'static str, Mishap)> {
        if *io == Io::Flush {
            let fails = random.one_in(self.flush_error);
            return fails.then_some(("flush error", Mishap::Fails(IoError::Media)));
        }
        if random.one_in(self.io_error) {
            return Some(("I/O error", Mishap::Fails(IoError::Media)));
        }
        if !matches!(io, Io::Write { .. }) {
            return None;
        }
        if random.one_in(self.device_full) {
            return Some(("device full", Mishap::Fails(IoError::NoSpace)));
        }
        if strays && random.one_in(self.stray) {
            return Some(match random.one_in(2) {
                true => ("lost write", Mishap::Lost),
                false => ("misdirected write", Mishap::Misdirected(random.range(1, 40))),
            });
        }
        None
    }

    /// Operations may fail since I/O does.
    pub(crate) fn injured(&self) -> bool {
        self.io_error != 0 || self.device_full != 0 || self.flush_error != 0
    }

    /// A run without any fault.
    pub fn calm(seed: u64) -> Self {
        Profile {
            kill: 0,
            power: 0,
            restart: 0,
            disk_loss: 0,
            disconnect: 0,
            replace: 0,
            stuck: 0,
            io_error: 0,
            flush_error: 0,
            device_full: 0,
            slow: 0,
            open_crash: 0,
            damage: Damage::None,
            rot: 0,
            weak: 0,
            stray: 0,
            ..Profile::draw_any(seed)
        }
    }

    /// A disk with blocks that do not keep what is written to them, beside sound disks, one of them to spare.
    pub fn weak(seed: u64) -> Self {
        let base = Profile::calm(seed);
        let mirror = 2 + (seed % 2) as u32;
        Profile {
            disks: u64::from(mirror) + 1,
            disk_bytes: 24 << 20,
            mirror,
            spread: base.spread.min(24),
            damage: Damage::Within,
            rot: 300,
            weak: 1 + seed % 4,
            scrub_ms: if seed.is_multiple_of(3) { 3_000 } else { 0 },
            io_timeout_ms: 3_000,
            ..base
        }
    }
}
