//! A replica: what a disk keeps of the chunk, and what it owes to owners.
//!
//! * It obeys no generation older than the one that it was sealed with, and remembers the seal durably.
//! * A write that it has already changes nothing; a copy replaces whatever it has.
//! * What was not flushed may be gone after a reboot.
//!
//! A reboot that keeps everything stands for a killed process, one that does not for a loss of power; the model does not
//! tell them apart otherwise. Absent: rot, holes, checksums, more than one block.

use super::bug::Bug;
use super::register::Version;

/// What an owner asks.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Request {
    /// Obey no older generation from now on.
    Seal,
    /// Also how an owner compares replicas.
    Read,
    Write {
        version: Version,
        flush: bool,
    },
    /// A rebuild: exactly this, even over something newer.
    Copy {
        version: Version,
        flush: bool,
    },
    Flush,
    /// Is this still the generation that you obey?
    Confirm,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Reply {
    Sealed { boot: u8 },
    Value(Version),
    Done,
    StaleGeneration,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub(crate) struct Replica {
    /// Generation it was sealed with.
    pub(crate) sealed: u8,
    pub(crate) value: Version,
    /// What it has after a loss of power.
    pub(crate) durable: Version,
    /// Counts its reboots.
    pub(crate) boot: u8,
    /// A sealed replica changed what it has for an older generation. Never, without a bug.
    pub(crate) obeyed_older: bool,
}

impl Replica {
    pub(crate) fn serve(&mut self, generation: u8, request: Request, bug: Option<Bug>) -> Reply {
        if generation < self.sealed {
            if bug != Some(Bug::OlderGenerationObeyed) {
                return Reply::StaleGeneration;
            }
            self.obeyed_older |= matches!(request, Request::Write { .. } | Request::Copy { .. });
        }
        match request {
            Request::Seal => {
                self.sealed = self.sealed.max(generation);
                return Reply::Sealed { boot: self.boot };
            }
            Request::Read => return Reply::Value(self.value),
            Request::Write { version, flush } => {
                self.value = self.value.max(version);
                self.flush(flush);
            }
            Request::Copy { version, flush } => {
                let kept = bug == Some(Bug::CopyKeepsNewer) && self.value > version;
                self.value = if kept { self.value } else { version };
                self.flush(flush);
            }
            Request::Flush => self.flush(true),
            Request::Confirm => {}
        }
        Reply::Done
    }

    fn flush(&mut self, really: bool) {
        if really {
            self.durable = self.value;
        }
    }

    pub(crate) fn reboot(&mut self, keeps_all: bool, bug: Option<Bug>) {
        self.boot += 1;
        if !keeps_all {
            self.value = self.durable;
        }
        if bug == Some(Bug::SealForgotten) {
            self.sealed = 0;
        }
    }
}
