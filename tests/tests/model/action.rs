//! What may happen, one thing at a time, and what of it is worth reaching.

use super::control::Change;

/// Names of nodes are `n`, of replicas `r`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Action {
    /// The volume is given to a node, away from whoever has it.
    Attach(usize),
    /// An owner's process ends.
    Crash(usize),
    /// An owner is not sure of its lease any more.
    LeaseEnds(usize),
    LeaseRenewed(usize),
    /// An owner connects to a replica, and seals it.
    Connect(usize, usize),
    Break(usize, usize),
    /// A request reaches its replica.
    Serve(usize, usize),
    /// An answer reaches its owner.
    Answer(usize, usize),
    /// An owner without a trusted replica decides with which to go on.
    Choose(usize),
    Propose(usize, Change),
    /// A node's proposal is decided; `true`: the control state has heard that the disk was rebooted.
    Decide(usize, bool),
    /// An owner hears of a change that it did not propose.
    Hear(usize),
    Write(usize),
    Flush(usize),
    Read(usize, usize),
    /// A replica is read, for a rebuild of the other.
    Rebuild(usize, usize, usize),
    /// A replica loses its process; `false`: and its power.
    Reboot(usize, bool),
    /// An operator takes a disk out.
    TakeOut(usize),
}

/// What the last action brought about that is worth reaching. The properties of the kind `sometimes` ask for each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    /// A write was acknowledged after a replica was removed.
    AcknowledgedDegraded,
    /// A write was acknowledged, and flushed before, with one replica left.
    AcknowledgedAlone,
    /// A write was acknowledged while a promotion was undecided.
    AcknowledgedPending,
    /// An owner that had been replaced collected the last acknowledgement of a write that its successor completed.
    AcknowledgedLate,
    /// A later owner's write was acknowledged.
    AcknowledgedByLater,
    /// A replica refused the write of an owner that had been replaced.
    ZombieRefused,
    /// A read was answered after all required replicas confirmed.
    ReadConfirmed,
    /// A replica did not confirm: an owner that had been replaced answered nothing.
    ConfirmRefused,
    /// The control state refused what an owner that had been replaced proposed.
    ProposalFenced,
    /// The control state refused to drop the last in-sync replica. (An owner does not even propose that.)
    LastCopyKept,
    /// It refused a promotion in a boot that was over.
    OldBootRefused,
    /// An owner's proposal came after another change.
    ProposalMoved,
    /// A rebuilt replica was promoted.
    Promoted,
    /// A rebuild replaced a newer value that nobody else had.
    DivergentReplaced,
    /// A new owner completed a write that had reached some replicas.
    RolledForward,
    /// A lost replica returned with the boot that it had, and went on.
    Returned,
    /// A new owner was the first to know that acknowledged writes are gone.
    PowerLost,
    /// All replicas rebooted under a running guest, and nothing was lost.
    BegunAnew,
    /// All replicas rebooted under a running guest: its device failed, it knows.
    LostUnflushed,
}
