//! What stands around every JSON document that is kept or sent whole: its kind, a format number, a checksum.
//!
//! The format is read before anything else of it, so that a document of a newer program is refused as that and not as
//! damaged. The number is [`FORMAT`] for all kinds: states, log entries and snapshots are made of the same parts.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;

use crate::state::FORMAT;

/// What can be read of any version.
#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    magic: std::borrow::Cow<'a, str>,
    format: u32,
    blake3: String,
    #[serde(borrow)]
    state: &'a RawValue,
}

/// Why a document is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Not one of ours.
    #[error("it is no {expected}: {why}")]
    Foreign {
        /// The kind that was expected.
        expected: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// From the future.
    #[error("it has format {0}, this program knows {FORMAT}: use the newer program")]
    Newer(u32),
    /// Bits have changed.
    #[error("it is damaged: {0}")]
    Damaged(String),
}

/// Puts a document into its envelope.
pub(crate) fn seal(magic: &'static str, document: &impl Serialize) -> Vec<u8> {
    let raw = serde_json::value::to_raw_value(document).expect("our documents have string keys only");
    seal_raw(magic, &raw)
}

/// The same for text that is JSON already.
pub(crate) fn seal_raw(magic: &'static str, raw: &RawValue) -> Vec<u8> {
    let envelope = Envelope {
        magic: magic.into(),
        format: FORMAT,
        blake3: blake3::hash(raw.get().as_bytes()).to_hex().to_string(),
        state: raw,
    };
    let mut bytes = serde_json::to_vec(&envelope).expect("an envelope has string keys only");
    bytes.push(b'\n');
    bytes
}

/// The text of a document, once its kind, its format and its checksum are right.
pub(crate) fn open_raw<'a>(magic: &'static str, bytes: &'a [u8]) -> Result<&'a str, Unreadable> {
    let foreign = |why| Unreadable::Foreign { expected: magic, why };
    let envelope: Envelope<'a> = serde_json::from_slice(bytes).map_err(|error| foreign(error.to_string()))?;
    if envelope.magic != magic {
        return Err(foreign(format!("it begins with {:?}", envelope.magic)));
    }
    if envelope.format > FORMAT {
        return Err(Unreadable::Newer(envelope.format));
    }
    let text = envelope.state.get();
    if blake3::hash(text.as_bytes()).to_hex().as_str() != envelope.blake3 {
        return Err(Unreadable::Damaged("its checksum does not match".into()));
    }
    Ok(text)
}

/// A document, taken out of its envelope.
pub(crate) fn open<T: DeserializeOwned>(magic: &'static str, bytes: &[u8]) -> Result<T, Unreadable> {
    let text = open_raw(magic, bytes)?;
    serde_json::from_str(text).map_err(|error| Unreadable::Damaged(error.to_string()))
}
