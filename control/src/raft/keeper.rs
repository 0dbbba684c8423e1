//! The membership of Raft, as the leader keeps it: a pure choice of the next single change.
//!
//! Every node of the control state takes part: an odd number, at most five, as voters, spread over as many failure domains
//! as there are, the rest as learners. A node that is no longer in the control state leaves. A voter that has been silent
//! for long gives its place to a learner that is there and has caught up. One change at a time; each change of the voters
//! is a set that differs from the present one by one node in, one out, or both.
//!
//! Invariants: a node that is not heard or has not caught up never becomes a voter; voters are only taken away while more
//! than half of what remains is heard. Absent: Raft's own safety, which joint consensus sees to.

use std::collections::{BTreeMap, BTreeSet};

use crate::state::NodeId;

/// Most voters.
pub(super) const VOTERS_MAX: usize = 5;

/// A node as the leader sees it.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) domain: String,
    /// It answered lately.
    pub(super) heard: bool,
    /// It was silent for so long that its place is better given to another.
    pub(super) dead: bool,
    /// Its log is close to the leader's.
    pub(super) caught_up: bool,
}

/// What the leader sees.
#[derive(Clone, Debug, Default)]
pub(super) struct Sight {
    pub(super) leader: NodeId,
    /// The nodes of the control state.
    pub(super) nodes: BTreeMap<NodeId, Seen>,
    pub(super) voters: BTreeSet<NodeId>,
    pub(super) learners: BTreeSet<NodeId>,
}

/// The next change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Let it follow.
    AddLearner(NodeId),
    /// These are the voters.
    Voters(BTreeSet<NodeId>),
    /// It is gone: a learner.
    Forget(NodeId),
}

/// The change to be made now, if any.
pub(super) fn next(sight: &Sight) -> Option<Change> {
    let members: BTreeSet<NodeId> = sight.voters.union(&sight.learners).copied().collect();
    if let Some(gone) = sight
        .learners
        .iter()
        .find(|learner| !sight.nodes.contains_key(learner))
    {
        return Some(Change::Forget(*gone));
    }
    if let Some(new) = sight.nodes.keys().find(|node| !members.contains(node)) {
        return Some(Change::AddLearner(*new));
    }
    voters(sight)
        .filter(|voters| *voters != sight.voters)
        .map(Change::Voters)
}

fn voters(sight: &Sight) -> Option<BTreeSet<NodeId>> {
    let gone = |node: &&NodeId| !sight.nodes.contains_key(node);
    let dead = |node: &&NodeId| sight.nodes.get(node).is_some_and(|seen| seen.dead);
    let wanted = match sight.nodes.len().min(VOTERS_MAX) {
        0 => return None,
        nodes => nodes - (1 - nodes % 2),
    };
    let candidate = |without: Option<NodeId>| candidate(sight, without);
    let swap = |out: NodeId, new: NodeId| {
        let mut voters = sight.voters.clone();
        voters.remove(&out);
        voters.insert(new);
        Some(voters)
    };
    let without = |out: NodeId| {
        let mut voters = sight.voters.clone();
        voters.remove(&out);
        let heard = voters.iter().filter(|node| is_heard(sight, **node)).count();
        (heard * 2 > voters.len()).then_some(voters)
    };
    // The removed first: then the dead: then numbers, then domains. The leader itself goes last.
    let others = || sight.voters.iter().filter(|node| **node != sight.leader);
    if let Some(&out) = others().find(gone).or_else(|| sight.voters.iter().find(gone)) {
        return match candidate(Some(out)) {
            Some(new) => swap(out, new),
            None => without(out),
        };
    }
    if let Some(&out) = others().find(dead)
        && let Some(new) = candidate(Some(out))
    {
        return swap(out, new);
    }
    if sight.voters.len() < wanted {
        let mut voters = sight.voters.clone();
        voters.insert(candidate(None)?);
        return Some(voters);
    }
    if sight.voters.len() > wanted {
        let out =
            others().max_by_key(|node| (!is_heard(sight, **node), crowd(sight, **node, None), **node))?;
        return without(*out);
    }
    // A domain with two voters while a candidate's domain has none.
    let crowded = others().filter(|node| crowd(sight, **node, None) > 1).max()?;
    let new = candidate(Some(*crowded))?;
    (crowd(sight, new, Some(*crowded)) == 0).then(|| swap(*crowded, new))?
}

fn is_heard(sight: &Sight, node: NodeId) -> bool {
    // One that is to go is not watched; it counts until it has gone.
    sight.nodes.get(&node).is_none_or(|seen| seen.heard)
}

/// Voters in a node's domain, without one of them.
fn crowd(sight: &Sight, node: NodeId, without: Option<NodeId>) -> usize {
    let domain = |node: &NodeId| sight.nodes.get(node).map(|seen| seen.domain.as_str());
    let there = sight
        .voters
        .iter()
        .filter(|voter| Some(**voter) != without && domain(voter) == domain(&node));
    there.count()
}

/// The learner that is best made a voter.
fn candidate(sight: &Sight, without: Option<NodeId>) -> Option<NodeId> {
    let fit = |node: &&NodeId| {
        let seen = sight.nodes.get(node);
        seen.is_some_and(|seen| seen.heard && seen.caught_up && !seen.dead)
    };
    let learners = sight.learners.iter().filter(fit);
    learners
        .min_by_key(|node| (crowd(sight, **node, without), **node))
        .copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seen(domain: u8, state: u8) -> Seen {
        Seen {
            domain: format!("d{domain}"),
            heard: state != 1,
            dead: state == 1,
            caught_up: state != 2,
        }
    }

    /// Makes changes until there is none, as the leader would.
    fn settle(sight: &mut Sight) -> usize {
        for steps in 0..100 {
            match next(sight) {
                None => return steps,
                Some(Change::AddLearner(node)) => {
                    assert!(sight.nodes.contains_key(&node) && !sight.voters.contains(&node));
                    assert!(sight.learners.insert(node));
                }
                Some(Change::Forget(node)) => assert!(sight.learners.remove(&node)),
                Some(Change::Voters(voters)) => {
                    assert!(!voters.is_empty());
                    let new: Vec<_> = voters.difference(&sight.voters).copied().collect();
                    let old: Vec<_> = sight.voters.difference(&voters).copied().collect();
                    assert!(new.len() <= 1 && old.len() <= 1, "more than one change");
                    for node in new {
                        assert!(sight.learners.remove(&node));
                        assert!(sight.nodes[&node].heard && sight.nodes[&node].caught_up);
                    }
                    sight.learners.extend(old);
                    sight.voters = voters;
                }
            }
        }
        panic!("it never comes to rest: {sight:?}");
    }

    proptest! {
        #[test]
        fn the_membership_comes_to_rest_where_it_should(
            nodes in prop::collection::btree_map(1u64..12, (0u8..5, 0u8..4), 1..10),
            voters in prop::collection::btree_set(1u64..12, 0..6),
            learners in prop::collection::btree_set(1u64..12, 0..6),
        ) {
            let leader = NodeId(*nodes.keys().next().unwrap());
            let mut sight = Sight {
                leader,
                nodes: nodes.iter().map(|(&node, &(domain, state))| (NodeId(node), seen(domain, state))).collect(),
                voters: voters.into_iter().map(NodeId).chain([leader]).collect(),
                learners: learners.into_iter().map(NodeId).collect(),
            };
            sight.nodes.insert(leader, seen(0, 0));
            sight.learners.retain(|node| !sight.voters.contains(node));
            settle(&mut sight);
            let all_well = sight.nodes.values().all(|seen| seen.heard && seen.caught_up);
            let domains: BTreeSet<_> = sight.nodes.values().map(|seen| &seen.domain).collect();
            if all_well {
                let wanted = match sight.nodes.len().min(5) { n if n % 2 == 0 => n - 1, n => n };
                prop_assert_eq!(sight.voters.len(), wanted);
                let spread: BTreeSet<_> = sight.voters.iter().map(|node| &sight.nodes[node].domain).collect();
                prop_assert_eq!(spread.len(), wanted.min(domains.len()), "{:?}", sight);
                prop_assert!(sight.nodes.keys().all(|n| sight.voters.contains(n) || sight.learners.contains(n)));
            }
        }
    }

    #[test]
    fn a_dead_voter_gives_its_place_to_a_learner() {
        let mut sight = Sight {
            leader: NodeId(1),
            nodes: (1..=4).map(|n| (NodeId(n), seen(n as u8, 0))).collect(),
            voters: (1..=3).map(NodeId).collect(),
            learners: [NodeId(4)].into(),
        };
        assert_eq!(next(&sight), None);
        sight.nodes.insert(NodeId(3), seen(3, 1));
        assert_eq!(next(&sight), Some(Change::Voters([1, 2, 4].map(NodeId).into())));
        sight.nodes.insert(NodeId(4), seen(4, 2));
        assert_eq!(next(&sight), None, "a learner that lags is no better");
    }
}
