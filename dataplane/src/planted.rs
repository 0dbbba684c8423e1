//! Planted bugs: protocol mistakes that a test switches on to see that the simulator finds them.
//!
//! Without the cargo feature `planted` every [`on`] is a constant `false` and the mistake is not in the program. With it
//! the choice is kept per thread, since a simulation runs on one thread and tests run side by side.
//!
//! At each place `if planted::on(Bug::X)` stands beside the rule that it breaks.

/// A protocol mistake, named by what it does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Bug {
    /// Mirror: an operation goes on when a replica is lost, before its `MarkStale` is committed.
    AckBeforeCommit,
    /// Mirror: a write is acknowledged when the first replica has it.
    AckAtFirst,
    /// Mirror: the owner begins without sealing.
    SkipSeal,
    /// Mirror: reads do not wait for writes of the same blocks.
    ReadsIgnoreConflicts,
    /// Mirror: writes do not wait for writes of the same blocks.
    WritesIgnoreConflicts,
    /// Mirror: in-sync replicas are not compared at attach.
    SkipReconcile,
    /// Mirror: a rebuild does not look at extents that only the target has.
    RebuildForgetsTrims,
    /// Mirror: a rebuild copies while writes to the region go on.
    RebuildWithoutLock,
    /// Mirror: a promotion is proposed before the target was flushed.
    PromoteWithoutFlush,
    /// Mirror: a promotion is proposed as soon as the first copy ended, failed installs or not.
    PromoteWithoutCompare,
    /// Mirror: reads go to replicas that are not in sync.
    ReadFromStale,
    /// Mirror: a block that no replica has valid is answered as it is.
    AnswerBadBlock,
    /// Mirror: bad blocks that were read elsewhere are not repaired.
    SkipReadRepair,
    /// Mirror: a flush is answered before all required replicas flushed.
    FlushEarly,
    /// Mirror: a replica's new boot is treated as the old one.
    OldBootIsSame,
    /// Mirror: unaligned writes take the edges before older writes of the same block have ended.
    EdgesWithoutLock,
    /// Mirror: with one replica left, writes are acknowledged unflushed.
    SoleCopyUnflushed,
    /// Mirror: writes do not go to a replica whose promotion is proposed.
    PendingPromotionForgotten,
    /// Store: a freed extent is reused before its freeing is durable.
    ReuseEarly,
    /// Store: a write is answered when its data is written, before its record.
    AckBeforeJournal,
    /// Store: a region's first write does not wait for its dirty mark.
    SkipDirtyMark,
    /// Store: a checkpoint frees journal space before the pages are durable.
    FreeJournalEarly,
    /// Store: blocks of regions found dirty at open are served unchecked.
    IgnoreInDoubt,
    /// Mirror: an owner without a lease believes one replica.
    ReadUnconfirmed,
    /// Store: a chunk is marked clean though a write in it is above the stable version.
    CleanAboveStable,
    /// Store: a write does not wait for a clean mark that is on its way.
    CleanMarkRace,
    /// Link: what is sent again does not wait until the old session was drained.
    ResendBeforeDrain,
    /// Link: an answer of an old session counts for whoever has its place now.
    LateAnswer,
    /// Link: what is sent again goes the wrong way round.
    ResendOutOfOrder,
    /// Link: another process of the peer is taken for the old one.
    NewPeerIsOld,
    /// Agent: an owner takes it that it has a lease.
    LeaseIgnored,
    /// Agent: whether there is a lease is looked at now and then, not when a read is answered.
    LeaseLookedAtLate,
    /// Agent: a lease counts from its answer, not from when it was asked for.
    LeaseFromAnswer,
    /// Agent: a lease counts before what was committed at its grant was applied.
    LeaseBeforeApplied,
    /// Agent: a proposal whose outcome is not known is taken to be refused.
    UndecidedIsRefused,
    /// Agent: the boot of a disk is reported once, whatever is committed later.
    BootReportedOnce,
    /// Leader: an owner is revoked before its lease has run out.
    RevokeEarly,
    /// Leader: a new one does not wait for leases that others granted.
    NewLeaderForgetsLeases,
    /// Leader: a node gets a lease while it is being revoked.
    GrantWhileRevoking,
}

impl Bug {
    /// Those in the mirror.
    pub const MIRROR: &'static [Bug] = &[
        Bug::AckBeforeCommit,
        Bug::AckAtFirst,
        Bug::SkipSeal,
        Bug::ReadsIgnoreConflicts,
        Bug::WritesIgnoreConflicts,
        Bug::SkipReconcile,
        Bug::RebuildForgetsTrims,
        Bug::RebuildWithoutLock,
        Bug::PromoteWithoutFlush,
        Bug::PromoteWithoutCompare,
        Bug::ReadFromStale,
        Bug::AnswerBadBlock,
        Bug::SkipReadRepair,
        Bug::FlushEarly,
        Bug::OldBootIsSame,
        Bug::EdgesWithoutLock,
        Bug::SoleCopyUnflushed,
        Bug::PendingPromotionForgotten,
    ];
    /// Those in the store.
    pub const STORE: &'static [Bug] = &[
        Bug::ReuseEarly,
        Bug::AckBeforeJournal,
        Bug::SkipDirtyMark,
        Bug::FreeJournalEarly,
        Bug::IgnoreInDoubt,
        Bug::CleanMarkRace,
        Bug::CleanAboveStable,
    ];
    /// Those in the simulator's models of link, agent and leader.
    pub const CLUSTER: &'static [Bug] = &[
        Bug::ResendBeforeDrain,
        Bug::LateAnswer,
        Bug::ResendOutOfOrder,
        Bug::NewPeerIsOld,
        Bug::LeaseIgnored,
        Bug::LeaseLookedAtLate,
        Bug::LeaseFromAnswer,
        Bug::LeaseBeforeApplied,
        Bug::UndecidedIsRefused,
        Bug::BootReportedOnce,
        Bug::RevokeEarly,
        Bug::NewLeaderForgetsLeases,
        Bug::GrantWhileRevoking,
    ];
}

#[cfg(feature = "planted")]
mod choice {
    use super::Bug;
    use std::cell::Cell;

    thread_local! {
        static CHOSEN: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Plants a bug on this thread, or none.
    pub fn set(bug: Option<Bug>) {
        CHOSEN.set(bug);
    }

    /// Whether the bug is planted on this thread.
    #[inline]
    pub fn on(bug: Bug) -> bool {
        CHOSEN.get() == Some(bug)
    }
}

#[cfg(feature = "planted")]
pub use choice::{on, set};

/// Whether the bug is planted: never, without the feature `planted`.
#[cfg(not(feature = "planted"))]
#[inline(always)]
pub const fn on(_: Bug) -> bool {
    false
}
