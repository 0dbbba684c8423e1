//! Where chunks go: a pure function of the state, so that every node would plan the same.
//!
//! Each replica goes to the disk that is least full for its size, among those in a domain the chunk has none in; of
//! equals, to the one that shares the fewest chunks with the replicas chosen before. So the disks fill evenly, and the
//! partners of a disk are spread over all others: when it is lost, all of them take part in healing.

use std::collections::BTreeMap;

use unibody_dataplane::ids::{CHUNK, DiskUuid};

use crate::state::{Disk, ReplicaState, State};

/// Widest stripe that is planned by default.
const WIDTH_DEFAULT_MAX: u32 = 16;

/// Why no place was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Too few failure domains.
    #[error(
        "{copies} copies need disks in {copies} failure domains, there are {domains}: add disks, or name their domains with `,domain=`"
    )]
    Domains {
        /// Copies asked for.
        copies: u32,
        /// Domains with usable disks.
        domains: usize,
    },
}

/// The disks that can take chunks, and how full they are.
struct Board<'a> {
    disks: Vec<Candidate<'a>>,
    /// Chunks shared by two disks, by their positions.
    pairs: Vec<u32>,
}

struct Candidate<'a> {
    uuid: DiskUuid,
    domain: &'a str,
    /// Bytes for data.
    bytes: u64,
    /// Chunks placed.
    chunks: u64,
}

impl<'a> Board<'a> {
    fn new(state: &'a State) -> Self {
        let mut disks: Vec<Candidate<'a>> = state
            .disks
            .iter()
            .filter(|(uuid, _)| state.usable(uuid.0).is_some())
            .map(|(uuid, record)| Candidate {
                uuid: uuid.0,
                domain: state.domain_of(*uuid).unwrap_or_default(),
                bytes: record.bytes.max(1),
                chunks: 0,
            })
            .collect();
        let position: BTreeMap<DiskUuid, usize> =
            disks.iter().enumerate().map(|(i, disk)| (disk.uuid, i)).collect();
        let mut pairs = vec![0; disks.len() * disks.len()];
        for slots in state.volumes.values().flat_map(|volume| &volume.chunks) {
            let on: Vec<usize> = slots
                .iter()
                .filter_map(|slot| position.get(&slot.disk.0).copied())
                .collect();
            for &a in &on {
                disks[a].chunks += 1;
                for &b in &on {
                    pairs[a * position.len() + b] += 1;
                }
            }
        }
        Board { disks, pairs }
    }

    fn domains(&self) -> usize {
        let mut names: Vec<_> = self.disks.iter().map(|disk| disk.domain).collect();
        names.sort_unstable();
        names.dedup();
        names.len()
    }

    /// The best disk beside those in `chosen` (positions) and not in one of `domains`.
    fn best(&self, chosen: &[usize], taken: &[&str]) -> Option<usize> {
        let n = self.disks.len();
        let usable = |&i: &usize| {
            let domain = self.disks[i].domain;
            !taken.contains(&domain) && chosen.iter().all(|&c| self.disks[c].domain != domain)
        };
        (0..n).filter(usable).min_by(|&a, &b| {
            // chunks / bytes, compared without division.
            let (da, db) = (&self.disks[a], &self.disks[b]);
            let fill = (u128::from(da.chunks) * u128::from(db.bytes))
                .cmp(&(u128::from(db.chunks) * u128::from(da.bytes)));
            let shared = |i: usize| chosen.iter().map(|&c| self.pairs[i * n + c]).sum::<u32>();
            fill.then_with(|| shared(a).cmp(&shared(b))).then(a.cmp(&b))
        })
    }

    fn place(&mut self, chosen: &[usize], fresh: usize) {
        let n = self.disks.len();
        self.disks[fresh].chunks += 1;
        for &other in chosen {
            self.pairs[fresh * n + other] += 1;
            self.pairs[other * n + fresh] += 1;
        }
    }
}

/// Stripe width for a new volume: over all disks, within reason.
pub fn default_width(state: &State) -> u32 {
    (state
        .disks
        .keys()
        .filter(|disk| state.usable(disk.0).is_some())
        .count() as u32)
        .clamp(1, WIDTH_DEFAULT_MAX)
}

/// Disks for `count` new chunks with `copies` replicas each.
///
/// # Errors
/// When there are too few failure domains.
pub fn plan_chunks(state: &State, count: u32, copies: u32) -> Result<Vec<Vec<DiskUuid>>, PlanError> {
    let mut board = Board::new(state);
    let domains = board.domains();
    if domains < copies as usize {
        return Err(PlanError::Domains { copies, domains });
    }
    let mut plan = Vec::with_capacity(count as usize);
    let mut chosen = Vec::with_capacity(copies as usize);
    for _ in 0..count {
        chosen.clear();
        for _ in 0..copies {
            let Some(disk) = board.best(&chosen, &[]) else {
                return Err(PlanError::Domains { copies, domains });
            };
            board.place(&chosen, disk);
            chosen.push(disk);
        }
        plan.push(chosen.iter().map(|&disk| board.disks[disk].uuid).collect());
    }
    Ok(plan)
}

/// New places for the replicas of a volume on `from` that are not in sync: those refused for want of room if `full`, all
/// otherwise. Chunks for which there is no place are left out.
pub fn plan_moves(state: &State, volume: &str, from: DiskUuid, full: bool) -> Vec<(u32, DiskUuid)> {
    let Some(volume) = state.volumes.get(volume) else {
        return Vec::new();
    };
    let mut board = Board::new(state);
    let mut moves = Vec::new();
    for (number, slots) in (0u32..).zip(&volume.chunks) {
        let Some(old) = slots.iter().find(|slot| slot.disk == Disk(from)) else {
            continue;
        };
        if old.state == ReplicaState::InSync || (full && !old.no_space) {
            continue;
        }
        let others: Vec<_> = slots.iter().filter(|slot| slot.disk != Disk(from)).collect();
        let mut taken: Vec<&str> = others
            .iter()
            .filter_map(|slot| state.domain_of(slot.disk))
            .collect();
        let chosen: Vec<usize> = others
            .iter()
            .filter_map(|slot| board.disks.iter().position(|disk| disk.uuid == slot.disk.0))
            .collect();
        // What was full is full still: another disk, even of the same domain.
        let spare = board.disks.iter().position(|disk| disk.uuid == from);
        let spare = spare
            .map(|disk| std::mem::replace(&mut board.disks[disk].chunks, u64::MAX >> 16).min(u64::MAX >> 16));
        let found = board
            .best(&chosen, &taken)
            .filter(|&disk| board.disks[disk].uuid != from);
        if let (Some(chunks), Some(disk)) = (spare, board.disks.iter().position(|disk| disk.uuid == from)) {
            board.disks[disk].chunks = chunks;
        }
        taken.clear();
        if let Some(disk) = found {
            board.place(&chosen, disk);
            moves.push((number, board.disks[disk].uuid));
        }
    }
    moves
}

/// Chunks of data that `bytes` can hold, for messages about capacity.
pub fn chunks_in(bytes: u64) -> u64 {
    bytes / CHUNK
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Command, NodeId};
    use proptest::prelude::*;

    fn state_of(disks: &[(u64, u32)]) -> State {
        let mut state = State::default();
        for (number, &(gigabytes, domain)) in disks.iter().enumerate() {
            let command = Command::AddDisk {
                disk: DiskUuid(number as u128 + 1),
                node: NodeId::LOCAL,
                domain: format!("d{domain}"),
                bytes: gigabytes << 30,
            };
            state.apply(&command).unwrap();
        }
        state
    }

    #[test]
    fn too_few_domains_are_named() {
        let state = state_of(&[(1, 0), (1, 0)]);
        assert_eq!(
            plan_chunks(&state, 1, 2),
            Err(PlanError::Domains {
                copies: 2,
                domains: 1
            })
        );
    }

    #[test]
    fn partners_are_spread_over_all_others() {
        let state = state_of(&[(1, 0), (1, 1), (1, 2), (1, 3), (1, 4)]);
        let plan = plan_chunks(&state, 1000, 2).unwrap();
        for disk in 1..=5u128 {
            let partners: std::collections::BTreeSet<_> = plan
                .iter()
                .filter(|disks| disks.contains(&DiskUuid(disk)))
                .flatten()
                .filter(|&&other| other != DiskUuid(disk))
                .collect();
            assert_eq!(
                partners.len(),
                4,
                "disk {disk} shares chunks with {partners:?} only"
            );
        }
    }

    proptest! {
        #[test]
        fn plans_keep_the_rules_and_the_balance(
            sizes in prop::collection::vec(1u64..5, 3..20), copies in 1u32..=3, count in 200u32..800,
        ) {
            let disks: Vec<_> = sizes.iter().enumerate().map(|(i, &size)| (size, i as u32)).collect();
            let state = state_of(&disks);
            let plan = plan_chunks(&state, count, copies).unwrap();
            prop_assert_eq!(&plan, &plan_chunks(&state, count, copies).unwrap());
            let mut load = vec![0u64; sizes.len()];
            for chunk in &plan {
                prop_assert_eq!(chunk.len(), copies as usize);
                let distinct: std::collections::BTreeSet<_> = chunk.iter().collect();
                prop_assert_eq!(distinct.len(), chunk.len());
                chunk.iter().for_each(|disk| load[disk.0 as usize - 1] += 1);
            }
            // Where no disk is so large that it must be in every chunk, fill differs by one chunk a disk and rounding.
            let total: u64 = sizes.iter().sum();
            if sizes.iter().all(|&size| size * u64::from(copies) <= total) && copies == 1 {
                let fills: Vec<f64> = load.iter().zip(&sizes).map(|(&l, &s)| l as f64 / s as f64).collect();
                let (min, max) = fills.iter().fold((f64::MAX, 0f64), |(a, b), &f| (a.min(f), b.max(f)));
                prop_assert!(max - min <= 1.0 + 1e-9, "{:?}", fills);
            }
        }
    }
}
