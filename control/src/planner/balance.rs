//! Which replicas move so that disks are equally full: a pure function of the state.
//!
//! A disk's use is its replicas relative to its size, as for placement: that is what the state knows, and it changes with
//! placements only, so that nothing goes to and fro with what guests write. Beside it nodes report how full disks really
//! are ([`Fills`]): nothing goes to one that is nearly full, and what is on one that is all but full goes elsewhere.
//!
//! * A move goes to a disk that is not the fuller one afterwards: each makes the cluster more even, so there is an end of it.
//! * It goes between disks whose use differs by more than a twentieth of the average, so about as much moves as is
//!   missing on a new disk.
//! * The replicas of a chunk stay in distinct failure domains.
//! * Of the chunks that could move, one that does not take the near replica from its volume's owner, then one that does not
//!   put two of a stripe on one disk, then one whose other replicas share few chunks with the new disk.

use std::collections::BTreeSet;

use super::Board;
use crate::state::{Disk, Replica, ReplicaState, State, Volume};

/// By what part of the average use two disks may differ.
const SLACK: u128 = 20;

/// How full disks really are, as their nodes say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fills {
    /// Nothing new goes to these.
    pub full: BTreeSet<Disk>,
    /// What is on these goes elsewhere.
    pub crowded: BTreeSet<Disk>,
}

/// Percent of a disk at which it counts as full, and at which it does not any more.
pub const FULL: (u64, u64) = (85, 82);
/// Percent of a disk at which it counts as crowded, and at which it does not any more.
pub const CROWDED: (u64, u64) = (95, 90);

impl Fills {
    /// Takes in what is said of a disk. Between its two limits it stays what it was.
    pub fn say(&mut self, disk: Disk, capacity: u64, free: u64) {
        let used = u128::from(capacity.saturating_sub(free)) * 100;
        let above = |percent: u64| used > u128::from(capacity) * u128::from(percent);
        for (marked, (on, off)) in [(&mut self.full, FULL), (&mut self.crowded, CROWDED)] {
            if above(on) {
                marked.insert(disk);
            } else if !above(off) {
                marked.remove(&disk);
            }
        }
    }
}

/// A replica that is to move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shift {
    /// The volume.
    pub volume: String,
    /// The chunk.
    pub chunk: u32,
    /// Where it is.
    pub from: Disk,
    /// Where it is to be.
    pub to: Disk,
}

/// Whether a chunk moves between disks that stay.
fn moves(state: &State, volume: &Volume, slots: &[Replica]) -> bool {
    let leaves = |slot: &Replica| state.leaves(slot.disk) && state.is_spare(volume, slots, slot.disk);
    volume.has_spare(slots) && !slots.iter().any(leaves)
}

/// How many chunks move between disks that stay.
pub fn moving(state: &State) -> usize {
    let volumes = state.volumes.values();
    let counted = volumes.map(|volume| {
        let chunks = volume.chunks.iter();
        chunks.filter(|slots| moves(state, volume, slots)).count()
    });
    counted.sum()
}

impl Board<'_> {
    fn find(&self, disk: Disk) -> Option<usize> {
        // They are in the order of the state's map.
        self.disks.binary_search_by_key(&disk.0, |disk| disk.uuid).ok()
    }

    /// Which replica of a chunk that moves gives its place away: one that is not in sync, or of those that were there before
    /// the newest the one on the fullest disk. The newest only if it can be no other.
    fn predecessor(&self, state: &State, volume: &Volume, slots: &[Replica], fills: &Fills) -> Option<Disk> {
        if !moves(state, volume, slots) {
            return None;
        }
        let mut spare = slots
            .iter()
            .filter(|slot| state.is_spare(volume, slots, slot.disk));
        let newest = slots.last()?.disk;
        let use_of = |slot: &Replica| {
            let disk = self.find(slot.disk).map(|disk| &self.disks[disk]);
            // A fraction of so many parts is fine enough to choose by.
            let used = disk.map(|disk| u128::from(disk.chunks) * (1 << 60) / u128::from(disk.bytes));
            let stale = slot.state != ReplicaState::InSync;
            (stale, fills.crowded.contains(&slot.disk), used)
        };
        let older = spare.clone().filter(|slot| slot.disk != newest);
        let found = older.max_by_key(|slot| use_of(slot)).or_else(|| spare.next());
        found.map(|slot| slot.disk)
    }

    /// As it will be when what moves has moved.
    fn settle(&mut self, state: &State, fills: &Fills) {
        for volume in state.volumes.values() {
            for slots in volume.chunks.iter().filter(|slots| volume.has_spare(slots)) {
                self.end_move(state, volume, slots, fills);
            }
        }
    }

    /// Takes the replica of a chunk away that gives its place to a successor, and says which.
    fn end_move(&mut self, state: &State, volume: &Volume, slots: &[Replica], fills: &Fills) -> Option<Disk> {
        let disk = self.predecessor(state, volume, slots, fills)?;
        let others = slots.iter().filter(|slot| slot.disk != disk);
        let others: Vec<usize> = others.filter_map(|slot| self.find(slot.disk)).collect();
        if let Some(disk) = self.find(disk) {
            self.displace(&others, disk);
        }
        Some(disk)
    }

    fn displace(&mut self, others: &[usize], gone: usize) {
        let n = self.disks.len();
        self.disks[gone].chunks -= 1;
        for &other in others {
            self.pairs[gone * n + other] -= 1;
            self.pairs[other * n + gone] -= 1;
        }
    }

    fn weight(&self, disk: usize) -> u128 {
        u128::from((self.disks[disk].bytes >> 20).max(1))
    }

    fn chunks(&self, disk: usize) -> u128 {
        u128::from(self.disks[disk].chunks)
    }

    /// Chunks and sizes of all disks.
    fn total(&self) -> (u128, u128) {
        let disks = 0..self.disks.len();
        disks.fold((0, 0), |(chunks, weight), disk| {
            (chunks + self.chunks(disk), weight + self.weight(disk))
        })
    }

    /// Whether one disk is so much fuller than another that something has to move, and whether it would not be the other way
    /// round then.
    fn uneven(&self, (chunks, weight): (u128, u128), from: usize, to: usize) -> bool {
        let (wf, wt) = (self.weight(from), self.weight(to));
        let (high, low) = (self.chunks(from) * wt, self.chunks(to) * wf);
        let gap = high.saturating_sub(low) * weight * SLACK > chunks * wf * wt;
        gap && self.chunks(from) > 0 && (self.chunks(to) + 1) * wf <= (self.chunks(from) - 1) * wt
    }

    /// Positions from the emptiest to the fullest.
    fn by_use(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.disks.len()).collect();
        order.sort_by(|&a, &b| {
            let (high, low) = (self.chunks(a) * self.weight(b), self.chunks(b) * self.weight(a));
            high.cmp(&low).then(a.cmp(&b))
        });
        order
    }
}

/// Chunks that may move, by the position of each disk that has one.
type Candidates<'a> = Vec<Vec<(&'a str, &'a Volume, u32)>>;

fn candidates<'a>(state: &'a State, board: &Board<'_>) -> Candidates<'a> {
    let mut found = vec![Vec::new(); board.disks.len()];
    for (name, volume) in state.volumes.iter().filter(|(_, volume)| volume.owner.is_some()) {
        for (chunk, slots) in (0u32..).zip(&volume.chunks) {
            let sound = slots.iter().all(|slot| slot.state == ReplicaState::InSync);
            if sound && !volume.has_spare(slots) {
                let on = slots.iter().filter_map(|slot| board.find(slot.disk));
                on.for_each(|disk| found[disk].push((name.as_str(), &**volume, chunk)));
            }
        }
    }
    found
}

/// At most `room` replicas that move next.
pub fn plan(state: &State, fills: &Fills, room: usize) -> Vec<Shift> {
    let mut board = Board::new(state);
    board.settle(state, fills);
    let total = board.total();
    let mut shifts: Vec<Shift> = Vec::new();
    let mut found = None;
    while shifts.len() < room {
        let order = board.by_use();
        let targets = || {
            let open = |to: &&usize| !fills.full.contains(&Disk(board.disks[**to].uuid));
            order.iter().filter(open).copied()
        };
        let is_crowded = |from: usize| fills.crowded.contains(&Disk(board.disks[from].uuid));
        let pairs = order.iter().rev().flat_map(|&from| {
            let needed = move |board: &Board<'_>, to| is_crowded(from) || board.uneven(total, from, to);
            let board = &board;
            targets()
                .filter(move |&to| to != from && needed(board, to))
                .map(move |to| (from, to))
        });
        // What there is to move is listed when something has to.
        let mut pairs = pairs.peekable();
        if pairs.peek().is_none() {
            break;
        }
        let found = found.get_or_insert_with(|| candidates(state, &board));
        let Some((from, to, at)) = pairs.find_map(|(from, to)| {
            let at = choose(state, &board, &found[from], &shifts, from, to)?;
            Some((from, to, at))
        }) else {
            break;
        };
        let (name, volume, chunk) = found[from][at];
        // One chunk moves at a time.
        for on in found.iter_mut() {
            on.retain(|&(other, _, number)| (other, number) != (name, chunk));
        }
        let others = volume.chunks[chunk as usize].iter();
        let others: Vec<usize> = others
            .filter_map(|slot| board.find(slot.disk))
            .filter(|&disk| disk != from)
            .collect();
        board.displace(&others, from);
        board.place(&others, to);
        shifts.push(Shift {
            volume: name.to_owned(),
            chunk,
            from: Disk(board.disks[from].uuid),
            to: Disk(board.disks[to].uuid),
        });
    }
    shifts
}

/// The best of some chunks to move, by its place among them.
fn choose(
    state: &State,
    board: &Board<'_>,
    chunks: &[(&str, &Volume, u32)],
    planned: &[Shift],
    from: usize,
    to: usize,
) -> Option<usize> {
    let (n, target) = (board.disks.len(), &board.disks[to]);
    let cost = |&(name, volume, chunk): &(&str, &Volume, u32)| {
        let slots = &volume.chunks[chunk as usize];
        let others = || slots.iter().filter(|slot| slot.disk.0 != board.disks[from].uuid);
        if others().any(|slot| state.domain_of(slot.disk) == Some(target.domain)) {
            return None;
        }
        let is_near = |disk: Disk| state.disks.get(&disk).map(|record| record.node) == volume.owner;
        let near = |disk: usize| is_near(Disk(board.disks[disk].uuid));
        let farther = match others().any(|slot| is_near(slot.disk)) {
            true => 0,
            false => i32::from(near(from)) - i32::from(near(to)),
        };
        let set = chunk - chunk % volume.stripe_width.max(1);
        let stripe = volume
            .chunks
            .iter()
            .skip(set as usize)
            .take(volume.stripe_width as usize);
        let there = stripe.flatten().filter(|slot| slot.disk.0 == target.uuid);
        let stripe = set..set + volume.stripe_width.max(1);
        let coming = planned.iter().filter(|shift| {
            shift.volume == name && shift.to.0 == target.uuid && stripe.contains(&shift.chunk)
        });
        let beside = there.count() + coming.count();
        let others = others().filter_map(|slot| board.find(slot.disk));
        let shared: u32 = others.map(|other| board.pairs[to * n + other]).sum();
        Some((farther, beside, shared))
    };
    let costs = chunks
        .iter()
        .enumerate()
        .filter_map(|(at, chunk)| Some((cost(chunk)?, at)));
    costs.min().map(|(_, at)| at)
}

/// Replicas that have given their place to a successor, all of which `is_ready`.
pub fn finished(
    state: &State,
    fills: &Fills,
    is_ready: impl Fn(&Replica) -> bool,
) -> Vec<(String, u32, Disk)> {
    let mut board = None;
    let mut finished = Vec::new();
    for (name, volume) in &state.volumes {
        for (chunk, slots) in (0u32..)
            .zip(&volume.chunks)
            .filter(|(_, slots)| volume.has_spare(slots))
        {
            let board = board.get_or_insert_with(|| Board::new(state));
            let Some(disk) = board.end_move(state, volume, slots, fills) else {
                continue;
            };
            let others = slots.iter().filter(|slot| slot.disk != disk && is_ready(slot));
            if state.domains(others).len() >= volume.mirror as usize {
                finished.push((name.clone(), chunk, disk));
            }
        }
    }
    finished
}

/// About how many replicas are still to move, beside those that do.
pub fn left(state: &State) -> u64 {
    let fills = Fills::default();
    if plan(state, &fills, 1).is_empty() {
        return 0;
    }
    let mut board = Board::new(state);
    board.settle(state, &fills);
    let (chunks, weight) = board.total();
    let over = |disk: usize| {
        board
            .chunks(disk)
            .saturating_sub((chunks * board.weight(disk)).div_ceil(weight))
    };
    (0..board.disks.len()).map(over).sum::<u128>().max(1) as u64
}

#[cfg(test)]
#[path = "balance_tests.rs"]
pub(super) mod tests;
