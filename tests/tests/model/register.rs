//! What the guests were told, and what they may be told from now on: the judge of the model.
//!
//! The chunk is one block. Its writes are ordered by version, so that it is a linearizable register exactly if
//! * nothing is acknowledged or read that is older than what had been acknowledged or read when it was asked for, and
//! * what a later owner's read has passed over never comes back.
//!
//! Only losing the power of all in-sync replicas may take acknowledged writes away; not those that were flushed, and
//! not those that were acknowledged while one replica was left.

/// A write: the generation of its owner, then its place among the owner's writes. The default was never written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub(crate) struct Version {
    pub(crate) generation: u8,
    pub(crate) number: u8,
}

/// What everybody can know who asks now.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Known {
    /// The newest write that was acknowledged or read.
    newest: Version,
    /// The newest generation that read, and what it read last.
    read: (u8, Version),
}

/// How a guest was deceived.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Deceit {
    /// An acknowledged or read write was not there any more.
    Lost,
    /// A write was acknowledged that nobody can read any more.
    AcknowledgedInVain,
    /// What a later owner's read had passed over came back.
    CameBack,
    /// Acknowledged writes were given up, and an in-sync replica had them.
    GivenUp,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Register {
    pub(crate) known: Known,
    /// The newest write that outlives a loss of power.
    pub(crate) durable: Version,
}

impl Register {
    /// The newest write that was acknowledged or read.
    pub(crate) fn newest(&self) -> Version {
        self.known.newest
    }

    /// A write that was submitted when `began` was known is acknowledged; `alone`: while one replica was left.
    pub(crate) fn acknowledged(&mut self, version: Version, began: Known, alone: bool) -> Result<(), Deceit> {
        if version < began.newest {
            return Err(Deceit::AcknowledgedInVain);
        }
        self.known.newest = self.known.newest.max(version);
        if alone {
            self.durable = self.durable.max(version);
        }
        Ok(())
    }

    /// A read that was asked for when `began` was known is answered by the owner of `generation`.
    pub(crate) fn read(&mut self, version: Version, generation: u8, began: Known) -> Result<(), Deceit> {
        if version < began.newest {
            return Err(Deceit::Lost);
        }
        let (reader, passed) = began.read;
        if version > passed && version.generation < reader {
            return Err(Deceit::CameBack);
        }
        self.known.newest = self.known.newest.max(version);
        if generation >= self.known.read.0 {
            self.known.read = (generation, version);
        }
        Ok(())
    }

    /// A flush that was asked for when `covers` was the newest is answered.
    pub(crate) fn flushed(&mut self, covers: Version) {
        self.durable = self.durable.max(covers);
    }

    /// The guest is told that power was lost: it starts anew, and relies on what was flushed.
    pub(crate) fn power_lost(&mut self) {
        self.known.newest = self.durable;
    }
}
