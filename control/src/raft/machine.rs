//! The replicated state machine: the control state, and what was answered lately.
//!
//! A request carries an id and how many requests had been applied, as far as its sender knew, when it was made. The answers
//! of the last requests are remembered. So a request that comes again, because its answer was lost, is answered and not
//! applied again; and one that is so old that its answer may have been forgotten is refused ([`Receipt::Expired`]), never
//! applied on a guess. What is remembered is bounded by the number of single answers, so that batches count for what they are.
//!
//! Invariants: pure and deterministic like [`State`]; [`Machine::decode`] of [`Machine::encode`] is the identity.
//! Deliberately absent: sessions, which would have to be opened, and expire by some clock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use openraft::{LogId, StoredMembership};
use serde::{Deserialize, Serialize};
use unibody_dataplane::config::Outcome;

use super::Contact;
use crate::envelope::{self, Unreadable};
use crate::state::{Applied, Command, NodeId, Refused, State, hex_u128};

/// Most answers that are remembered.
pub const REMEMBERED: u64 = 8192;
/// Longest reason for a refusal that is remembered word for word, bytes.
const REASON_MAX: usize = 1024;

const SNAPSHOT: &str = "unibody snapshot";

/// What identifies a request, however often it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RequestId {
    /// Random.
    #[serde(with = "hex_u128")]
    pub id: u128,
    /// Requests that had been applied, as far as its sender knew, before it was made.
    pub since: u64,
}

/// What the log holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Which.
    pub request: RequestId,
    /// The only term in which it may be applied, if that matters: it was made because of something that only the leader of
    /// that term knew.
    pub term: Option<u64>,
    /// What.
    pub command: Command,
}

/// What became of a request, in a few bytes. The rest is in the state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum Receipt {
    /// The entry was no request.
    Nothing,
    /// Done.
    Done,
    /// Done to a volume, which had this generation then.
    Volume {
        /// Its number.
        id: u32,
        /// Its generation.
        generation: u32,
    },
    /// A proposal was committed.
    Committed {
        /// The volume's number.
        id: u32,
    },
    /// A proposal came too late.
    Moved {
        /// The volume's number.
        id: u32,
    },
    /// A proposal came from a former owner.
    Fenced,
    /// A rule forbids it.
    Refused(Refused),
    /// Each of a batch.
    Batch(Vec<Receipt>),
    /// Too old to tell whether it was applied before, or proposed in another term than it was made for. It was not applied
    /// now.
    Expired,
}

impl Receipt {
    fn new(result: &Result<Applied, Refused>) -> Self {
        match result {
            Ok(Applied::Done) => Receipt::Done,
            Ok(Applied::Volume(config)) => Receipt::Volume {
                id: config.id.0,
                generation: config.generation.0,
            },
            Ok(Applied::Outcome(Outcome::Committed(config))) => Receipt::Committed { id: config.id.0 },
            Ok(Applied::Outcome(Outcome::Moved(config))) => Receipt::Moved { id: config.id.0 },
            Ok(Applied::Outcome(Outcome::Fenced)) => Receipt::Fenced,
            Ok(Applied::Batch(results)) => Receipt::Batch(results.iter().map(Receipt::new).collect()),
            // Whatever a caller put into a name is not kept.
            Err(refused) if refused.to_string().len() > REASON_MAX => {
                Receipt::Refused(Refused::Name("(too long)".into()))
            }
            Err(refused) => Receipt::Refused(refused.clone()),
        }
    }

    fn answers(&self) -> u64 {
        match self {
            Receipt::Batch(receipts) => 1 + receipts.len() as u64,
            _ => 1,
        }
    }

    /// The answer in full, from a state in which the request was applied. Where the volume has changed since, the answer is
    /// about the volume as it is.
    ///
    /// # Errors
    /// What was refused; and where the volume has had another owner or is gone since, that.
    pub fn open(&self, command: &Command, state: &State) -> Result<Applied, Refused> {
        let volume = |wanted: u32| {
            let name = command.volume().unwrap_or_default();
            let found = state.volumes.get(name).filter(|volume| volume.id == wanted);
            found.ok_or_else(|| Refused::NoVolume(name.to_owned()))
        };
        Ok(match self {
            Receipt::Nothing | Receipt::Done => Applied::Done,
            Receipt::Volume { id, generation } => {
                let volume = volume(*id)?;
                if volume.generation != *generation {
                    let name = command.volume().unwrap_or_default().to_owned();
                    return Err(Refused::Overtaken { name });
                }
                Applied::Volume(Box::new(volume.to_config()))
            }
            Receipt::Committed { id } | Receipt::Moved { id } => {
                let Command::Propose { proposal, .. } = command else {
                    return Ok(Applied::Outcome(Outcome::Fenced));
                };
                let current = volume(*id)
                    .ok()
                    .filter(|volume| volume.owner.is_some() && volume.generation == proposal.generation.0);
                Applied::Outcome(match (current, self) {
                    (None, _) => Outcome::Fenced,
                    (Some(volume), Receipt::Committed { .. }) => Outcome::Committed(volume.to_config()),
                    (Some(volume), _) => Outcome::Moved(volume.to_config()),
                })
            }
            Receipt::Fenced => Applied::Outcome(Outcome::Fenced),
            Receipt::Refused(refused) => return Err(refused.clone()),
            Receipt::Batch(receipts) => {
                let Command::Batch(commands) = command else {
                    return Ok(Applied::Done);
                };
                let one = |(receipt, command): (&Receipt, &Command)| receipt.open(command, state);
                Applied::Batch(receipts.iter().zip(commands).map(one).collect())
            }
            Receipt::Expired => {
                return Err(Refused::Overtaken {
                    name: "the request".into(),
                });
            }
        })
    }
}

/// An answer that is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    #[serde(with = "hex_u128")]
    id: u128,
    receipt: Receipt,
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// The control state.
    pub state: Arc<State>,
    /// Last applied entry.
    pub applied: Option<LogId<NodeId>>,
    /// Last applied membership.
    pub membership: StoredMembership<NodeId, Contact>,
    /// Requests applied ever.
    count: u64,
    /// The last of them, the youngest at the end.
    answers: VecDeque<Answer>,
    /// Single answers in `answers`.
    weight: u64,
    /// Number of each remembered request (the first ever has number 1).
    numbers: BTreeMap<u128, u64>,
}

/// What a snapshot holds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Snapshot<'a> {
    applied: Option<LogId<NodeId>>,
    membership: StoredMembership<NodeId, Contact>,
    count: u64,
    answers: std::borrow::Cow<'a, VecDeque<Answer>>,
    state: Arc<State>,
}

impl Machine {
    /// Requests applied ever.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Applies a request that was proposed in `term`, or says again what became of it.
    pub fn apply(&mut self, request: &Request, term: u64) -> Receipt {
        let RequestId { id, since } = request.request;
        let first = self.count + 1 - self.answers.len() as u64;
        if let Some(number) = self.numbers.get(&id) {
            return self.answers[(number - first) as usize].receipt.clone();
        }
        if since.saturating_add(1) < first {
            return Receipt::Expired;
        }
        if request.term.is_some_and(|only| only != term) {
            return Receipt::Expired;
        }
        let receipt = Receipt::new(&Arc::make_mut(&mut self.state).apply(&request.command));
        self.count += 1;
        self.weight += receipt.answers();
        self.numbers.insert(id, self.count);
        self.answers.push_back(Answer {
            id,
            receipt: receipt.clone(),
        });
        while self.weight > REMEMBERED && self.answers.len() > 1 {
            let Some(oldest) = self.answers.pop_front() else {
                break;
            };
            self.weight -= oldest.receipt.answers();
            self.numbers.remove(&oldest.id);
        }
        receipt
    }

    /// Everything, as a snapshot.
    pub fn encode(&self) -> Vec<u8> {
        let snapshot = Snapshot {
            applied: self.applied,
            membership: self.membership.clone(),
            count: self.count,
            answers: std::borrow::Cow::Borrowed(&self.answers),
            state: Arc::clone(&self.state),
        };
        envelope::seal(SNAPSHOT, &snapshot)
    }

    /// A snapshot's contents.
    ///
    /// # Errors
    /// When it is foreign, newer or damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        let snapshot: Snapshot<'_> = envelope::open(SNAPSHOT, bytes)?;
        let mut state = snapshot.state;
        Arc::make_mut(&mut state).upgrade();
        state.check().map_err(Unreadable::Damaged)?;
        let answers = snapshot.answers.into_owned();
        let (count, remembered) = (snapshot.count, answers.len() as u64);
        let damaged = |why: &str| Err(Unreadable::Damaged(why.to_owned()));
        if remembered > count || count == u64::MAX {
            return damaged("more answers than requests");
        }
        let numbers: BTreeMap<u128, u64> = answers
            .iter()
            .map(|a| a.id)
            .zip(count + 1 - remembered..)
            .collect();
        let weight = answers.iter().map(|answer| answer.receipt.answers()).sum();
        if numbers.len() != answers.len() {
            return damaged("a request was answered twice");
        }
        Ok(Machine {
            state,
            applied: snapshot.applied,
            membership: snapshot.membership,
            count,
            answers,
            weight,
            numbers,
        })
    }
}

/// A snapshot's bytes, for fuzzing: as they are, and in an intact envelope. Never panics unless what can be read does not
/// survive being written.
pub fn fuzz_snapshot(bytes: &[u8]) {
    let sealed = std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| serde_json::value::RawValue::from_string(text.to_owned()).ok())
        .map(|raw| envelope::seal_raw(SNAPSHOT, &raw));
    for bytes in std::iter::once(bytes).chain(sealed.as_deref()) {
        if let Ok(machine) = Machine::decode(bytes) {
            assert!(
                Machine::decode(&machine.encode()).is_ok_and(|again| again == machine),
                "a snapshot that can be read can be written"
            );
        }
    }
}
