//! The control state, as if it were one register with compare-and-set: that is what consensus makes of it.
//!
//! It enforces the rules, not who asks: (a) the last in-sync replica is never made stale; (b) while a volume is attached
//! only its present generation, from its present configuration, changes the states of replicas; (d) a replica becomes
//! in-sync only from rebuilding, in the boot that its disk is known to have; (e) every committed change counts, also one
//! that changes nothing. (c), distinct failure domains, is about placement and not modelled.
//!
//! Configuration numbers are only ever compared for equality. So instead of a number a proposal says whether it is
//! `fresh`: made from the present configuration. That keeps the states finite without limiting the changes.

use super::SLOTS;
use super::bug::Bug;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) enum SlotState {
    /// The model has fewer replicas than room for them.
    #[default]
    Absent,
    InSync,
    Stale,
    Rebuilding,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Slot {
    pub(crate) state: SlotState,
    /// Boot in which the replica was last known in sync.
    pub(crate) boot: u8,
}

pub(crate) type Slots = [Slot; SLOTS];

/// The replicas in sync.
pub(crate) fn in_sync(slots: &Slots) -> impl Iterator<Item = usize> + Clone + '_ {
    (0..SLOTS).filter(|&r| slots[r].state == SlotState::InSync)
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Change {
    MarkStale {
        replica: usize,
    },
    StartRebuild {
        replica: usize,
    },
    /// A promotion; of a replica that is in sync already: its new boot is recorded.
    MarkInSync {
        replica: usize,
        boot: u8,
    },
}

impl Change {
    pub(crate) fn replica(&self) -> usize {
        match *self {
            Change::MarkStale { replica }
            | Change::StartRebuild { replica }
            | Change::MarkInSync { replica, .. } => replica,
        }
    }
}

/// On its way to the control state; it may arrive long after its sender is gone.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Proposal {
    pub(crate) generation: u8,
    pub(crate) fresh: bool,
    pub(crate) change: Change,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Decision {
    /// Committed, though a rule may have forbidden the change.
    Committed,
    /// The configuration had moved on.
    Moved,
    /// Another owner has the volume.
    Fenced,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Control {
    pub(crate) generation: u8,
    /// The node that owns the volume.
    pub(crate) owner: usize,
    pub(crate) slots: Slots,
}

impl Control {
    /// `boot_refused`: it has heard that the disk was rebooted since (it may hear of that late).
    pub(crate) fn decide(&mut self, proposal: Proposal, boot_refused: bool, bug: Option<Bug>) -> Decision {
        if proposal.generation != self.generation && bug != Some(Bug::AnyGenerationProposes) {
            return Decision::Fenced;
        }
        if !proposal.fresh {
            return Decision::Moved;
        }
        match proposal.change {
            Change::MarkStale { replica } => {
                self.mark_stale(replica, bug);
            }
            Change::StartRebuild { replica } => {
                let slot = &mut self.slots[replica];
                if slot.state == SlotState::Stale {
                    slot.state = SlotState::Rebuilding;
                }
            }
            Change::MarkInSync { replica, boot } => {
                let slot = &mut self.slots[replica];
                if slot.state != SlotState::Stale && !boot_refused {
                    *slot = Slot {
                        state: SlotState::InSync,
                        boot,
                    };
                }
            }
        }
        Decision::Committed
    }

    /// Also what an operator does who takes a disk out. Whether it was allowed.
    pub(crate) fn mark_stale(&mut self, replica: usize, bug: Option<Bug>) -> bool {
        let last = in_sync(&self.slots).eq([replica]) && bug != Some(Bug::LastCopyDropped);
        if !last {
            self.slots[replica].state = SlotState::Stale;
        }
        !last
    }
}
