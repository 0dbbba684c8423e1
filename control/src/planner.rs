//! Where chunks go: a pure function of the state, so that every node would plan the same.
//!
//! Each replica goes to the disk that is least full for its size, among those in a domain the chunk has none in; of
//! equals, to the one that shares the fewest chunks with the replicas chosen before. So the disks fill evenly, and the
//! partners of a disk are spread over all others: when it is lost, all of them take part in healing. For a node that will
//! use a volume, the first replica goes to its own disks as long as they are hardly fuller than all are on average.

pub mod balance;

use std::collections::{BTreeMap, BTreeSet};

use unibody_dataplane::ids::{CHUNK, DiskUuid};

use crate::state::{Disk, NodeId, Replica, ReplicaState, State, Volume};

/// Widest stripe that is planned by default.
const WIDTH_DEFAULT_MAX: u32 = 16;

/// By what part a disk may be fuller than the average and still be preferred for being near.
const LOCAL_SLACK: u128 = 40;

/// Most replicas in one plan: a cluster's nodes tell each other of it in 16 MiB.
const REPLICAS_MAX: u32 = 400_000;

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
    /// Too few, because disks are nearly full.
    #[error(
        "{copies} copies need disks in {copies} failure domains that are less than {}% full, there are {domains}: add disks, or delete what is not needed", balance::FULL.0
    )]
    Full {
        /// Copies asked for.
        copies: u32,
        /// Domains with usable disks that are not.
        domains: usize,
    },
    /// More than one change of the state can tell of.
    #[error("a volume grows by at most {most_tib} TiB at a time: resize it in steps")]
    TooMuch {
        /// How much one change can tell of.
        most_tib: u64,
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
    node: NodeId,
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
                node: record.node,
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

    /// The best disk of a node, unless it is fuller than all are on average by more than one part in [`LOCAL_SLACK`].
    fn local(&self, node: NodeId) -> Option<usize> {
        let (chunks, bytes) = self.disks.iter().fold((0u128, 0u128), |(chunks, bytes), disk| {
            (chunks + u128::from(disk.chunks), bytes + u128::from(disk.bytes))
        });
        let own = (0..self.disks.len()).filter(|&i| self.disks[i].node == node);
        let best = own.min_by(|&a, &b| {
            let (da, db) = (&self.disks[a], &self.disks[b]);
            let fill = (u128::from(da.chunks) * u128::from(db.bytes))
                .cmp(&(u128::from(db.chunks) * u128::from(da.bytes)));
            fill.then(a.cmp(&b))
        })?;
        let disk = &self.disks[best];
        let fits = u128::from(disk.chunks) * bytes * LOCAL_SLACK
            <= chunks * u128::from(disk.bytes) * (LOCAL_SLACK + 1);
        fits.then_some(best)
    }

    /// Takes disks off the board, before anything is placed.
    fn leave_out(&mut self, full: &BTreeSet<Disk>) {
        if full.is_empty() {
            return;
        }
        let n = self.disks.len();
        let stays: Vec<usize> = (0..n)
            .filter(|&i| !full.contains(&Disk(self.disks[i].uuid)))
            .collect();
        let pairs = stays.iter().flat_map(|&a| stays.iter().map(move |&b| (a, b)));
        self.pairs = pairs.map(|(a, b)| self.pairs[a * n + b]).collect();
        self.disks.retain(|disk| !full.contains(&Disk(disk.uuid)));
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
/// When there are too few failure domains, or it is more than one change can tell of.
pub fn plan_chunks(state: &State, count: u32, copies: u32) -> Result<Vec<Vec<DiskUuid>>, PlanError> {
    plan_chunks_near(state, count, copies, None, &BTreeSet::new())
}

/// The same for a volume that will be used on a node: its own disks come first where balance allows. Nothing goes to `full`.
///
/// # Errors
/// When there are too few failure domains.
pub fn plan_chunks_near(
    state: &State,
    count: u32,
    copies: u32,
    near: Option<NodeId>,
    full: &BTreeSet<Disk>,
) -> Result<Vec<Vec<DiskUuid>>, PlanError> {
    let most = REPLICAS_MAX / copies.max(1);
    if count > most {
        let most_tib = (u64::from(most) * CHUNK) >> 40;
        return Err(PlanError::TooMuch { most_tib });
    }
    let mut board = Board::new(state);
    let domains = board.domains();
    if domains < copies as usize {
        return Err(PlanError::Domains { copies, domains });
    }
    board.leave_out(full);
    let domains = board.domains();
    if count > 0 && domains < copies as usize {
        return Err(PlanError::Full { copies, domains });
    }
    let mut plan = Vec::with_capacity(count as usize);
    let mut chosen = Vec::with_capacity(copies as usize);
    for _ in 0..count {
        chosen.clear();
        if let Some(disk) = near.and_then(|node| board.local(node)) {
            board.place(&chosen, disk);
            chosen.push(disk);
        }
        while chosen.len() < copies as usize {
            let Some(disk) = board.best(&chosen, &[]) else {
                return Err(PlanError::Domains { copies, domains });
            };
            board.place(&chosen, disk);
            chosen.push(disk);
        }
        // A replica that came to be there for balance alone is as near.
        chosen.sort_by_key(|&disk| near != Some(board.disks[disk].node));
        plan.push(chosen.iter().map(|&disk| board.disks[disk].uuid).collect());
    }
    Ok(plan)
}

/// New places for the replicas of a volume on `from` that are not in sync: those refused for want of room if `full`, all
/// otherwise. Chunks for which there is no place are left out.
pub fn plan_moves(state: &State, volume: &str, from: DiskUuid, full: bool) -> Vec<(u32, DiskUuid)> {
    plan_places(state, volume, from, |volume, slots, old| {
        let spare = !full && state.is_spare(volume, slots, Disk(from));
        old.state != ReplicaState::InSync && (old.no_space || !full) && !spare
    })
}

/// Places for replicas that are to take those of a volume on `from`, which leaves and has them in sync. Chunks for which
/// there is no place, or whose new replica is there already, are left out.
pub fn plan_additions(state: &State, volume: &str, from: DiskUuid) -> Vec<(u32, DiskUuid)> {
    plan_places(state, volume, from, |volume, slots, old| {
        old.state == ReplicaState::InSync && !volume.has_spare(slots)
    })
}

/// Disks for the chunks whose replica on `from` is wanted elsewhere.
fn plan_places(
    state: &State,
    volume: &str,
    from: DiskUuid,
    wanted: impl Fn(&Volume, &[Replica], &Replica) -> bool,
) -> Vec<(u32, DiskUuid)> {
    let Some(volume) = state.volumes.get(volume) else {
        return Vec::new();
    };
    let usable = state.disks.keys().filter(|disk| disk.0 != from);
    let usable: Vec<Disk> = usable
        .copied()
        .filter(|disk| state.usable(disk.0).is_some())
        .collect();
    // Made when it is needed: where nothing can go anywhere that is looked at again and again.
    let mut board = None;
    let mut places = Vec::new();
    for (number, slots) in (0u32..).zip(&volume.chunks) {
        let old = slots.iter().find(|slot| slot.disk == Disk(from));
        if !old.is_some_and(|old| wanted(volume, slots, old)) {
            continue;
        }
        let others: Vec<_> = slots.iter().filter(|slot| slot.disk != Disk(from)).collect();
        let all: BTreeSet<&str> = others
            .iter()
            .filter_map(|slot| state.domain_of(slot.disk))
            .collect();
        let counts = |slot: &&&Replica| !state.leaves(slot.disk) || all.len() < volume.mirror as usize;
        let counted = others.iter().filter(counts);
        let taken: Vec<&str> = counted.filter_map(|slot| state.domain_of(slot.disk)).collect();
        let is_free = |disk: &Disk| {
            state
                .domain_of(*disk)
                .is_some_and(|domain| !taken.contains(&domain))
        };
        if !usable.iter().any(is_free) {
            continue;
        }
        let board = board.get_or_insert_with(|| Board::new(state));
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
        if let Some(disk) = found {
            board.place(&chosen, disk);
            places.push((number, board.disks[disk].uuid));
        }
    }
    places
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
    fn nothing_new_goes_to_full_disks() {
        let state = state_of(&[(1, 0), (1, 1), (1, 2)]);
        let full = |disks: &[u128]| {
            disks
                .iter()
                .map(|&disk| Disk(DiskUuid(disk)))
                .collect::<BTreeSet<_>>()
        };
        let plan = plan_chunks_near(&state, 100, 2, None, &full(&[2])).unwrap();
        assert!(plan.iter().flatten().all(|disk| *disk != DiskUuid(2)));
        let refused = plan_chunks_near(&state, 1, 2, None, &full(&[2, 3])).unwrap_err();
        assert_eq!(
            refused,
            PlanError::Full {
                copies: 2,
                domains: 1
            }
        );
        assert!(refused.to_string().contains("less than 85% full"));
    }

    #[test]
    fn what_no_change_can_tell_of_is_not_planned() {
        let state = state_of(&[(1, 0), (1, 1)]);
        assert_eq!(
            plan_chunks(&state, 200_000, 2).map(|plan| plan.len()),
            Ok(200_000)
        );
        let too_much = |count, copies| plan_chunks(&state, count, copies).unwrap_err().to_string();
        assert!(too_much(200_001, 2).contains("at most 12 TiB"));
        assert!(too_much(u32::MAX, 0).contains("at most 24 TiB"));
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

    /// Nodes with the sizes of their disks, each node a failure domain.
    fn cluster_of(nodes: &[Vec<u64>]) -> State {
        let mut state = State::default();
        for (number, sizes) in (1u64..).zip(nodes) {
            super::balance::tests::add_node(&mut state, number, sizes);
        }
        state
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn a_hundred_thousand_chunks_lie_evenly_over_nodes(
            nodes in prop::collection::vec(prop::collection::vec(1u64..5, 1..6), 3..9),
            copies in 2u32..=3, near: Option<prop::sample::Index>,
        ) {
            const COUNT: u32 = 100_000;
            let state = cluster_of(&nodes);
            let near = near.map(|index| NodeId(index.index(nodes.len()) as u64 + 1));
            let plan = plan_chunks_near(&state, COUNT, copies, near, &BTreeSet::new()).unwrap();
            let mut load = BTreeMap::new();
            let mut local = 0u32;
            for disks in &plan {
                let domains: std::collections::BTreeSet<_> =
                    disks.iter().map(|&disk| state.domain_of(Disk(disk)).unwrap()).collect();
                prop_assert_eq!(domains.len(), copies as usize);
                let is_local = |disk: &DiskUuid| Some(state.disks[&Disk(*disk)].node) == near;
                local += u32::from(is_local(&disks[0]));
                prop_assert!(is_local(&disks[0]) || !disks.iter().any(is_local), "the near one is not the first");
                disks.iter().for_each(|disk| *load.entry(*disk).or_insert(0u64) += 1);
            }
            let total: u64 = nodes.iter().flatten().sum();
            let share = |node: &Vec<u64>| node.iter().sum::<u64>() as f64 / total as f64 * f64::from(copies);
            // Where no node is so large that it must be in nearly every chunk.
            if nodes.iter().all(|node| share(node) <= 0.95) {
                let fair = f64::from(COUNT) * f64::from(copies) / total as f64;
                for (disk, record) in &state.disks {
                    let fill = load[&disk.0] as f64 / ((record.bytes >> 30) as f64 * fair);
                    prop_assert!((0.95..=1.05).contains(&fill), "disk {} is filled to {}", disk, fill);
                }
                if let Some(near) = near {
                    let possible = share(&nodes[near.0 as usize - 1]).min(1.0);
                    prop_assert!(f64::from(local) >= possible * f64::from(COUNT) * 0.98, "{} of {}", local, possible);
                }
            }
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
