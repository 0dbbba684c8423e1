//! Exhaustive mode: a short script is played once to count what it makes the devices do, then again for each of those
//! I/Os with the process killed, and with the power lost, at the very moment at which that I/O is done.
//!
//! Up to the crash every playing of a script is the same, event for event. What else was under way at the crash is done or
//! not by the draw of the run's seed. After it the script goes on where it was; at its end everything heals and the oracle
//! of the random runs judges. Reads, and the I/Os of an opening, are not crash points: the store has its own test of those.

use unibody_dataplane::mirror::OpKind;

use super::profile::{Damage, Profile};
use super::world::{Checked, Event, Stats, World};
use super::{Run, guarded};

/// Virtual time within which a step must be over.
const STEP_MS: u64 = 60_000;

/// What a script's guest, or its fate, does next.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// An operation on sectors `from..to` begins; it runs beside those before it.
    Do(OpKind, u64, u64),
    /// All operations end.
    Join,
    /// A disk dies, with its power or not, and comes back within four seconds.
    Lose {
        /// Which.
        disk: usize,
        /// It forgets what it did not flush.
        power: bool,
    },
    /// A disk is taken away for good and an empty one put in.
    Replace {
        /// Which.
        disk: usize,
    },
    /// Every replica is in sync.
    Whole,
    /// Time passes: milliseconds.
    Pause(u64),
}

/// When a run is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crash {
    /// At the end of that I/O of all that change or flush a disk, from one on.
    pub at: u64,
    /// The power goes, not only the process.
    pub power: bool,
}

fn profile(seed: u64) -> Profile {
    let of = |choices: &[(u64, u64)], draw: u64| choices[draw as usize % choices.len()];
    Profile {
        disks: 2,
        disk_bytes: 8 << 20,
        mirror: 2,
        unit: 64 << 10,
        width: 1,
        journal_bytes: 64 << 10,
        cache_bytes: 32 << 10,
        volatile: seed % 4 != 3,
        latency: of(&[(50, 500), (10, 3_000), (20, 60)], seed),
        message: of(&[(5, 100), (1, 2_000)], seed),
        ops: 0,
        depth: 8,
        think: 1,
        pause: 0,
        spread: 4,
        damage: Damage::None,
        scrub_ms: 0,
        io_timeout_ms: 0,
        ..Profile::calm(seed)
    }
}

/// Plays a script. Also tells how many crash points it has.
pub fn play(script: &[Step], seed: u64, crash: Option<Crash>, trace: bool) -> (Run, u64) {
    let mut points = 0;
    let run = guarded(std::panic::AssertUnwindSafe(|| {
        let mut world = World::new(profile(seed), trace);
        world.crash = crash;
        let verdict = world.run_script(script);
        points = world.points;
        Run {
            verdict,
            stats: world.stats.clone(),
            trace: world.hash(),
        }
    }));
    (run, points)
}

/// What an exhaustive playing did.
#[derive(Clone, Debug, Default)]
pub struct Exhausted {
    /// Runs.
    pub runs: u64,
    /// The first violation, with what replays it.
    pub failed: Option<(Crash, String)>,
    /// Events of all runs.
    pub events: u64,
}

/// Plays a script with a crash at each of its points, until something is violated.
pub fn exhaust(script: &[Step], seed: u64) -> Exhausted {
    let (whole, points) = play(script, seed, None, false);
    let mut all = Exhausted {
        runs: 1,
        ..Exhausted::default()
    };
    let mut judge = |crash: Crash, run: Run| {
        let Stats { events, .. } = run.stats;
        all.events += events;
        all.failed = run.verdict.err().map(|error| (crash, error));
        all.failed.is_some()
    };
    if judge(Crash { at: 0, power: false }, whole) {
        return all;
    }
    for at in 1..=points {
        for power in [false, true] {
            let crash = Crash { at, power };
            let (run, _) = play(script, seed, Some(crash), false);
            if judge(crash, run) {
                all.runs += 2 * at;
                return all;
            }
        }
    }
    all.runs += 2 * points;
    all
}

impl World {
    /// Plays the script, heals, judges.
    fn run_script(&mut self, script: &[Step]) -> Checked {
        self.after(0, Event::Start { owner: 0 });
        self.after(1_000, Event::Tick);
        for step in script {
            match *step {
                Step::Do(kind, first, end) => {
                    self.until(step, |world| world.guest.ops.len() < world.profile.depth as usize)?;
                    let slot = (0..).find(|slot| !self.guest.ops.contains_key(slot));
                    self.begin(slot.expect("there is always another number"), kind, first, end)?;
                }
                Step::Join => self.until(step, |world| world.guest.ops.is_empty())?,
                Step::Lose { disk, power } => self.lose_disk(disk, power)?,
                Step::Replace { disk } => self.replace(disk)?,
                Step::Whole => self.until(step, World::healed)?,
                Step::Pause(ms) => {
                    let end = self.now + ms * 1000;
                    self.until(step, |world| world.now >= end)?;
                }
            }
        }
        self.until(&Step::Join, |world| world.guest.ops.is_empty())?;
        self.crash = None;
        self.heal_and_judge()
    }

    fn until(&mut self, step: &Step, over: impl Fn(&World) -> bool) -> Checked {
        let limit = self.now + STEP_MS * 1000;
        while !over(self) {
            if self.now > limit {
                return Err(format!("{step:?} does not end: {}", self.ailing()));
            }
            self.step()?;
        }
        Ok(())
    }
}

const fn write(first: u64, end: u64) -> Step {
    Step::Do(OpKind::Write, first, end)
}

const fn zero(first: u64, end: u64) -> Step {
    Step::Do(OpKind::Zero { unmap: false }, first, end)
}

const fn trim(first: u64, end: u64) -> Step {
    Step::Do(OpKind::Zero { unmap: true }, first, end)
}

const FLUSH: Step = Step::Do(OpKind::Flush, 0, 0);

/// The scripts, by name.
pub const SCRIPTS: &[(&str, &[Step])] = &[
    (
        "writes that overlap, aligned and not, between flushes",
        &[
            write(0, 8),
            write(8, 24),
            write(120, 152),
            Step::Join,
            FLUSH,
            write(3, 9),
            write(5, 12),
            write(126, 131),
            Step::Join,
            FLUSH,
            Step::Join,
            write(4, 6),
            write(0, 16),
            write(127, 140),
            FLUSH,
            write(9, 10),
            Step::Join,
            Step::Do(OpKind::Read, 0, 32),
            Step::Join,
        ],
    ),
    (
        "zeroes and trims of what was written and flushed",
        &[
            write(0, 256),
            Step::Join,
            FLUSH,
            Step::Join,
            trim(0, 128),
            zero(64, 160),
            write(16, 21),
            Step::Join,
            FLUSH,
            Step::Join,
            Step::Pause(1_500),
            write(0, 8),
            trim(128, 256),
            Step::Join,
            FLUSH,
            Step::Pause(1_500),
            write(130, 133),
            Step::Join,
        ],
    ),
    (
        "a disk killed, and back",
        &[
            write(0, 64),
            write(128, 131),
            Step::Join,
            FLUSH,
            Step::Join,
            write(8, 24),
            Step::Lose {
                disk: 1,
                power: false,
            },
            write(0, 8),
            write(20, 30),
            Step::Join,
            trim(128, 256),
            Step::Join,
            Step::Whole,
            write(4, 12),
            FLUSH,
            Step::Join,
        ],
    ),
    (
        "a disk without power, and back, then the other",
        &[
            write(0, 32),
            Step::Join,
            FLUSH,
            Step::Join,
            write(8, 24),
            Step::Lose { disk: 0, power: true },
            write(0, 4),
            Step::Join,
            Step::Whole,
            write(2, 17),
            Step::Join,
            Step::Lose { disk: 1, power: true },
            write(30, 40),
            Step::Join,
            Step::Whole,
        ],
    ),
    (
        "a disk replaced, then the one it was copied from",
        &[
            write(0, 64),
            write(128, 160),
            Step::Join,
            FLUSH,
            Step::Join,
            Step::Replace { disk: 1 },
            write(8, 24),
            Step::Join,
            Step::Whole,
            Step::Replace { disk: 0 },
            Step::Pause(30),
        ],
    ),
    (
        "as many records as make a checkpoint",
        &[
            write(0, 8),
            Step::Join,
            write(8, 16),
            Step::Join,
            write(128, 136),
            Step::Join,
            write(256, 264),
            Step::Join,
            FLUSH,
            write(3, 5),
            Step::Join,
            write(384, 392),
            Step::Join,
            write(130, 140),
            Step::Join,
            write(0, 8),
            Step::Join,
            write(256, 258),
            Step::Join,
            FLUSH,
            Step::Join,
            write(386, 400),
            Step::Join,
            write(5, 30),
            Step::Join,
            write(140, 142),
            Step::Join,
            FLUSH,
            Step::Join,
            write(0, 3),
            Step::Join,
            write(260, 270),
            Step::Join,
            write(128, 129),
            Step::Join,
        ],
    ),
];
