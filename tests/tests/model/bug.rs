//! Mistakes that are planted in the model, to see that the checker finds them: a model that accepts everything proves
//! nothing.

/// A protocol mistake, named by what it does wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Bug {
    /// A new owner begins without sealing.
    NoSeal,
    /// A sealed replica obeys an older generation.
    OlderGenerationObeyed,
    /// A replica forgets its seal with its process.
    SealForgotten,
    /// A new owner does not make the replicas equal.
    NoReconcile,
    /// A new owner goes on without replicas that may be the only ones with acknowledged writes.
    SilentNotWaitedFor,
    /// Operations go on without a lost replica before its removal is committed.
    AckBeforeCommit,
    /// A write is acknowledged when the first replica has it.
    AckAtFirst,
    /// A replica that comes back with a new boot is trusted.
    NewBootTrusted,
    /// With one replica left, writes are acknowledged unflushed.
    LastCopyUnflushed,
    /// All replicas rebooted under a running guest, and it is not told.
    LossNotTold,
    /// A flush is answered when the first replica has flushed.
    FlushAtFirst,
    /// A promotion is proposed before the copy is complete.
    PromotedEarly,
    /// A promotion is proposed of a replica that was not flushed.
    PromotedUnflushed,
    /// Writes do not go to a replica whose promotion is undecided.
    PendingForgotten,
    /// A rebuild leaves what the target has newer than the source.
    CopyKeepsNewer,
    /// Without a lease a read is believed unconfirmed.
    ReadUnconfirmed,
    /// Without a lease a read is confirmed by the replica it came from only.
    ConfirmedByOne,
    /// The volume is given away while its owner believes in its lease.
    LeaseCountedLate,
    /// The control state obeys owners of older generations.
    AnyGenerationProposes,
    /// The control state drops the last in-sync replica.
    LastCopyDropped,
}
