//! Leases: until when a node may take it that nobody else was made the owner of its volumes.
//!
//! A node asks the leader and counts from the moment it asked; the leader, having confirmed with a quorum that it leads,
//! counts from the moment it answered, which is later. So when the leader holds a lease to be over, it is over. A new leader
//! knows nothing of leases granted before and takes it that every node got one just before it began to lead. From the moment
//! the leader sets out to take something from a node it grants that node nothing until the outcome is known.
//!
//! Invariant: no moment is both inside a node's lease and after the commit of a change that was proposed because the lease
//! was over; clocks may differ by [`LEASE_MARGIN`] over a [`LEASE`]. Absent: sockets and clocks; times come from the caller.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::state::NodeId;

/// How long a lease lasts, from when it was asked for.
pub const LEASE: Duration = Duration::from_secs(6);
/// By how much more the leader waits.
pub const LEASE_MARGIN: Duration = Duration::from_secs(1);

/// A lease that a node was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// When it ends, by the node's own clock.
    pub until: Instant,
}

/// What a leader knows of leases.
#[derive(Debug, Default)]
pub(super) struct Leases {
    /// The term it leads, and since when (not earlier than it began).
    leading: Option<(u64, Instant)>,
    granted: BTreeMap<NodeId, Instant>,
    barred: BTreeSet<NodeId>,
    /// Counts what was about to be taken, and what was.
    bars: u64,
}

/// What [`Leases`] knew when the asking node's state was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket(u64);

impl Leases {
    /// This node leads in `term` at `now`, or does not lead.
    pub(super) fn leads(&mut self, term: Option<u64>, now: Instant) {
        let known = self.leading.map(|(term, _)| term);
        if term != known {
            *self = Leases {
                leading: term.map(|term| (term, now)),
                bars: self.bars,
                ..Leases::default()
            };
        }
    }

    /// To be taken before the leader looks up to where the asking node must have got.
    pub(super) fn ticket(&self) -> Ticket {
        Ticket(self.bars)
    }

    /// Grants a lease, unless something is being taken from the node, or was since the ticket was taken: then the node might
    /// not know of it.
    pub(super) fn grant(&mut self, node: NodeId, term: u64, ticket: Ticket, now: Instant) -> bool {
        let leads = self.leading.is_some_and(|(leading, _)| leading == term);
        if !leads || ticket.0 != self.bars || self.barred.contains(&node) {
            return false;
        }
        self.granted.insert(node, now);
        true
    }

    /// How long until the node's lease is surely over. Nothing: it is. `Err`: this node does not lead.
    pub(super) fn left(&self, node: NodeId, now: Instant) -> Result<Duration, ()> {
        let (_, since) = self.leading.ok_or(())?;
        let last = self
            .granted
            .get(&node)
            .map_or(since, |&granted| granted.max(since));
        Ok((last + LEASE + LEASE_MARGIN).saturating_duration_since(now))
    }

    /// Grants the node nothing from now on, if its lease is over.
    pub(super) fn bar(&mut self, node: NodeId, now: Instant) -> Result<(), Option<Duration>> {
        match self.left(node, now) {
            Ok(left) if left.is_zero() => {
                self.barred.insert(node);
                self.bars += 1;
                Ok(())
            }
            Ok(left) => Err(Some(left)),
            Err(()) => Err(None),
        }
    }

    /// The outcome is known: the node may have leases again, but none for which it was looked at before.
    pub(super) fn unbar(&mut self, node: NodeId) {
        self.barred.remove(&node);
        self.bars += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: NodeId = NodeId(1);

    fn grant(leases: &mut Leases, term: u64, now: Instant) -> bool {
        let ticket = leases.ticket();
        leases.grant(N, term, ticket, now)
    }

    #[test]
    fn nothing_is_taken_before_the_lease_is_over() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut leases = Leases::default();
        assert_eq!(leases.bar(N, at(100.0)), Err(None), "only a leader may");
        leases.leads(Some(3), start);
        assert!(
            leases.bar(N, at(6.9)).is_err(),
            "an earlier leader may have granted one"
        );
        assert!(grant(&mut leases, 3, at(5.0)));
        assert!(
            !grant(&mut leases, 2, at(5.0)),
            "confirmed in a term that is over"
        );
        assert!(leases.bar(N, at(11.9)).is_err());
        let before = leases.ticket();
        assert_eq!(leases.bar(N, at(12.0)), Ok(()));
        assert!(
            !grant(&mut leases, 3, at(12.0)),
            "something is being taken from the node"
        );
        leases.leads(Some(3), at(13.0));
        assert!(!grant(&mut leases, 3, at(13.0)), "the same term changes nothing");
        let meanwhile = leases.ticket();
        leases.unbar(N);
        for looked in [before, meanwhile] {
            assert!(
                !leases.grant(N, 3, looked, at(13.0)),
                "the node was looked at before what was taken from it was known"
            );
        }
        assert!(grant(&mut leases, 3, at(13.0)));
        leases.leads(None, at(14.0));
        leases.leads(Some(5), at(15.0));
        assert!(
            leases.bar(N, at(21.9)).is_err(),
            "a new leader begins the wait anew"
        );
        assert_eq!(leases.bar(N, at(22.0)), Ok(()));
    }
}
